//! Backtraces: from registers to the callers, by ORC, across interrupt and exception stacks.
//!
//! The way of the kernel's own unwinder: the entry for an instruction says where the caller's
//! frame begins and what lies there, a return address or saved registers. What was interrupted is
//! looked up by its exact address, a caller by the byte before its return address, because a call
//! may be the last instruction of a function.

use std::fmt;

use dump::Gregs;
use serde::Serialize;

use super::image::Unread;
use super::kernel::Kernel;
use super::orc::{Base, Entry, Kind};

/// Frames of one backtrace; a 16 KiB stack that overflows has about 200.
const FRAMES_MAX: usize = 256;
/// What a frame costs beside its name and the reads that lead to it: the memory it is kept in.
const FRAME_WORK: u64 = 64;
/// The two bits of a code segment that say which ring it runs in.
const RING: u64 = 3;
/// The first address of the kernel's half, with four or five levels of page tables.
const KERNEL_HALF: u64 = 1 << 63;

/// One function of a backtrace.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Frame {
    /// The instruction, or the one it returns to.
    pub address: u64,
    /// The function's symbol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
    /// Bytes from the function's begin.
    pub offset: u64,
    /// Its module.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// Whether it did not call but was interrupted, or ran when the machine stopped.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub interrupted: bool,
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.function {
            Some(function) => write!(f, "{function}+{:#x}", self.offset)?,
            None => write!(f, "{:#x}", self.address)?,
        }
        if let Some(module) = &self.module {
            write!(f, " [{module}]")?;
        }
        Ok(())
    }
}

/// A backtrace.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Backtrace {
    /// Innermost first.
    pub frames: Vec<Frame>,
    /// Where user space was, if the stack begins there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<u64>,
    /// Why it ends before the stack does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
}

/// What is known of the registers in a frame.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Registers {
    pub(crate) ip: u64,
    pub(crate) sp: u64,
    pub(crate) bp: u64,
    pub(crate) code_segment: u64,
    /// Those that ORC names besides; unknown behind a call.
    other: Option<Other>,
    /// Whether `ip` is the very instruction and no return address.
    pub(crate) exact: bool,
}

#[derive(Clone, Copy, Debug)]
struct Other {
    r10: u64,
    r13: u64,
    dx: u64,
    di: u64,
}

impl Registers {
    /// The registers of a running CPU.
    pub(crate) const fn of_cpu(gregs: &Gregs) -> Self {
        let [
            _r15,
            _r14,
            r13,
            _r12,
            bp,
            _bx,
            _r11,
            r10,
            _r9,
            _r8,
            _ax,
            _cx,
            dx,
            _si,
            di,
            _orig_ax,
            ip,
            code_segment,
            _flags,
            sp,
            ..,
        ] = *gregs;
        Self {
            ip,
            sp,
            bp,
            code_segment,
            other: Some(Other { r10, r13, dx, di }),
            exact: true,
        }
    }

    /// The registers of a task that does not run, from where it left them on its stack.
    pub(crate) fn of_sleeper(kernel: &mut Kernel<'_>, stack: u64) -> Result<Self, Unread> {
        const NAME: &str = "inactive_task_frame";
        Ok(Self {
            ip: kernel.member(stack, NAME, "ret_addr")?,
            bp: kernel.member(stack, NAME, "bp")?,
            sp: stack.wrapping_add(kernel.btf.size(NAME)?),
            ..Self::default()
        })
    }

    const fn is_user(&self) -> bool {
        self.code_segment & RING != 0
    }

    fn base(&self, base: Base) -> Option<u64> {
        Some(match base {
            Base::Sp | Base::SpIndirect => self.sp,
            Base::Bp | Base::BpIndirect => self.bp,
            Base::R10 => self.other?.r10,
            Base::R13 => self.other?.r13,
            Base::Dx => self.other?.dx,
            Base::Di => self.other?.di,
            Base::PreviousSp | Base::Undefined => return None,
        })
    }
}

/// The callers, from `registers` on.
pub(crate) fn backtrace(kernel: &mut Kernel<'_>, registers: Registers) -> Backtrace {
    let mut trace = Backtrace::default();
    let mut now = registers;
    loop {
        if now.is_user() || now.ip < KERNEL_HALF && !trace.frames.is_empty() {
            trace.user = (now.ip != 0).then_some(now.ip);
            return trace;
        }
        if trace.frames.len() == FRAMES_MAX {
            trace.broken = Some(format!("more than {FRAMES_MAX} frames"));
            return trace;
        }
        let frame = frame(kernel, &now);
        let name = frame.function.as_ref().map_or(0, String::len);
        if let Err(error) = kernel.image.spend(FRAME_WORK + name as u64) {
            trace.broken = Some(error.to_string());
            return trace;
        }
        trace.frames.push(frame);
        match caller(kernel, &now) {
            Ok(Some(next)) => now = next,
            Ok(None) => return trace,
            Err(error) => {
                trace.broken = Some(error.to_string());
                return trace;
            }
        }
    }
}

fn frame(kernel: &mut Kernel<'_>, registers: &Registers) -> Frame {
    let back = u64::from(!registers.exact);
    let mut frame = Frame {
        address: registers.ip,
        interrupted: registers.exact,
        ..Frame::default()
    };
    if let Some((name, offset, module)) = kernel.function(registers.ip.wrapping_sub(back)) {
        frame.function = Some(name);
        frame.offset = offset + back;
        frame.module = module;
    }
    frame
}

/// One step up; `None` at the end of the stack.
fn caller(kernel: &mut Kernel<'_>, now: &Registers) -> Result<Option<Registers>, Unread> {
    let lookup = now.ip.wrapping_sub(u64::from(!now.exact));
    let entry = match kernel.orc(lookup)? {
        Some(entry) => entry,
        None if now.exact && !kernel.is_text(lookup) => Entry::NO_FUNCTION,
        None => Entry::FRAME_POINTER,
    };
    if entry.kind == Kind::End {
        return Ok(None);
    }
    let strange = |what: &str| Unread::Strange(format!("at {:#x}: {what}", now.ip));
    if entry.kind == Kind::Undefined {
        return Err(strange("ORC does not know this code"));
    }
    let base = now
        .base(entry.sp)
        .ok_or_else(|| strange("the register that leads to the caller is not known"))?;
    let offset = i64::from(entry.sp_offset).cast_unsigned();
    let sp = match entry.sp {
        Base::SpIndirect => kernel.image.u64(base)?.wrapping_add(offset),
        Base::BpIndirect => kernel.image.u64(base.wrapping_add(offset))?,
        _ => base.wrapping_add(offset),
    };
    let mut next = match entry.kind {
        Kind::Regs => saved(kernel, sp)?,
        Kind::PartialRegs => partial(kernel, now, sp)?,
        _ => Registers {
            ip: kernel.image.u64(sp.wrapping_sub(8))?,
            sp,
            bp: now.bp,
            ..Registers::default()
        },
    };
    let offset = i64::from(entry.bp_offset).cast_unsigned();
    match entry.bp {
        Base::PreviousSp => next.bp = kernel.image.u64(sp.wrapping_add(offset))?,
        Base::Bp => next.bp = kernel.image.u64(now.bp.wrapping_add(offset))?,
        _ => {}
    }
    if next.ip == 0 || next.sp == now.sp && next.ip == now.ip {
        return Err(strange("nothing sound lies at the caller's frame"));
    }
    Ok(Some(next))
}

/// All registers of what was interrupted.
fn saved(kernel: &mut Kernel<'_>, at: u64) -> Result<Registers, Unread> {
    let mut register = |name: &str| kernel.member(at, "pt_regs", name);
    Ok(Registers {
        ip: register("ip")?,
        sp: register("sp")?,
        bp: register("bp")?,
        code_segment: register("cs")?,
        other: Some(Other {
            r10: register("r10")?,
            r13: register("r13")?,
            dx: register("dx")?,
            di: register("di")?,
        }),
        exact: true,
    })
}

/// What the CPU itself saved: the rest is as it was.
fn partial(kernel: &mut Kernel<'_>, now: &Registers, at: u64) -> Result<Registers, Unread> {
    let begin = kernel.btf.offset("pt_regs", "ip")?;
    let at = at.wrapping_sub(begin);
    let mut register = |name: &str| kernel.member(at, "pt_regs", name);
    Ok(Registers {
        ip: register("ip")?,
        sp: register("sp")?,
        code_segment: register("cs")?,
        exact: true,
        ..*now
    })
}
