//! Which function a report is about.
//!
//! A report gives a path: the functions from the one that failed outwards to the system call. The
//! culprit is the first that is not passed over ([`crate::innocence`]). Only stalls differ: a CPU
//! that loops is caught at a random place of its loop, so they are named after the innermost
//! operation that some dispatcher called: a timer's handler, a protocol's receiver, an ioctl.

use serde::Serialize;

use crate::anatomy::{Anatomy, Stack, StackKind};
use crate::class::Class;
use crate::frame::Frame;
use crate::innocence::{
    Reason, is_dispatcher, is_idle, is_interrupt_entry, is_relay, reason, reason_when_locking,
    reason_when_stuck, reason_when_waiting,
};

/// A frame and what was thought of it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Considered {
    /// The function's name without compiler suffixes.
    pub function: String,
    /// Why it was passed over; none for one that counts.
    pub skipped: Option<Reason>,
}

/// The result.
#[derive(Clone, Debug, Default)]
pub(crate) struct Judgement {
    pub culprit: Option<Frame>,
    /// The frames after the culprit that count.
    pub next: Vec<Frame>,
    pub considered: Vec<Considered>,
}

/// Frames that are looked at behind the culprit to fill the signature.
const CONSIDERED_MAX: usize = 48;
/// Frames behind the culprit that are part of the signature.
pub(crate) const NEXT_MAX: usize = 2;

/// Finds the culprit.
pub(crate) fn judge(class: Class, anatomy: &Anatomy) -> Judgement {
    match class {
        Class::RcuStall | Class::SoftLockup | Class::HardLockup => stalled(anatomy),
        // A stack overflows wherever it happens to be deepest.
        Class::StackOverflow if anatomy.named.is_none() => stalled(anatomy),
        Class::Unwinder
        | Class::Boot
        | Class::Hardware
        | Class::Filesystem
        | Class::Block
        | Class::MachineCheck
        | Class::OutOfMemory => Judgement::default(),
        // Who takes a damaged page table down has not damaged it.
        Class::BadPage if !anatomy.head.contains("Bad page state") => Judgement::default(),
        Class::Panic
            if anatomy
                .panic
                .as_deref()
                .is_some_and(|why| !names_a_function(why)) =>
        {
            Judgement::default()
        }
        _ => first_kept(class, &path(class, anatomy)),
    }
}

/// Panics whose message says what was wrong at the place that called `panic()`. The others are
/// the last words of another report, or of init.
fn names_a_function(why: &str) -> bool {
    let consequences = [
        "Fatal exception",
        "Attempted to kill",
        "Aiee, killing",
        "panic_on_warn",
        "kasan.fault=panic",
        "hung_task",
        "sysrq",
        "Fatal trap",
        "Oops",
        "Fatal error",
        "System is deadlocked",
        "Out of memory",
        "bad mode",
    ];
    !consequences.iter().any(|start| why.starts_with(start))
}

/// The functions from the one that failed outwards.
fn path(class: Class, anatomy: &Anatomy) -> Vec<Frame> {
    let own = || {
        let own = anatomy
            .stacks
            .iter()
            .find(|stack| stack.kind == StackKind::Own);
        let any = || {
            anatomy
                .stacks
                .iter()
                .find(|stack| stack.kind != StackKind::Own || stack.frames.len() > 1)
        };
        // A lock report that lost its end still has the chain that leads to it.
        let chain = matches!(class, Class::Deadlock | Class::LockState | Class::Leak);
        own.or_else(|| if chain { any() } else { None })
    };
    let stack: Vec<Frame> = own().map(sure).unwrap_or_default();
    let start = anatomy.lock.as_ref().or(anatomy.named.as_ref());
    let Some(start) = start else {
        return from_registers(stack);
    };
    let same = |frame: &Frame| frame.function() == start.function();
    // The function that failed is on the stack behind what reported it.
    let mut path = vec![start.clone()];
    match stack.iter().position(same) {
        Some(at) => path.extend(stack.into_iter().skip(at + 1).skip_while(same)),
        None => path.extend(from_registers(stack).into_iter().skip_while(same)),
    }
    path
}

/// The frames that the unwinder is sure of; all, if it is sure of none. Inlined functions are not
/// in the log as the kernel wrote it, so they do not count.
fn sure(stack: &Stack) -> Vec<Frame> {
    let real = || stack.frames.iter().filter(|frame| !frame.inlined);
    let mut frames: Vec<Frame> = real().filter(|frame| frame.reliable).cloned().collect();
    let only_registers = frames.len() < 2 && frames.iter().all(|frame| frame.register);
    if only_registers {
        frames.extend(real().filter(|frame| !frame.reliable).cloned());
    }
    frames
}

/// Without what reported, if registers in the middle of the stack say where the exception was.
/// Behind an interrupt they only say what it came upon.
fn from_registers(stack: Vec<Frame>) -> Vec<Frame> {
    if stack.first().is_some_and(|frame| frame.register) {
        return stack;
    }
    let excepted = stack.windows(2).position(|pair| match pair {
        [entry, frame] => frame.register && !is_interrupt_entry(entry.function()),
        _ => false,
    });
    match excepted {
        Some(entry) => stack.into_iter().skip(entry + 1).collect(),
        None => stack,
    }
}

fn first_kept(class: Class, path: &[Frame]) -> Judgement {
    let rule = match class {
        Class::HungTask | Class::Atomic | Class::WorkqueueLockup | Class::Panic | Class::Lock => {
            reason_when_waiting
        }
        Class::Deadlock | Class::LockState => reason_when_locking,
        _ => reason,
    };
    // The stack protector names the function whose frame was overwritten.
    let fixed = (class == Class::StackOverflow)
        .then_some(0)
        .or_else(|| relayed(path, rule));
    collect(path, |frame| rule(frame.function()), fixed)
}

/// What a relay called, where nothing but relays is left to blame: the outermost function before
/// it that does something of its own.
fn relayed(path: &[Frame], rule: fn(&str) -> Option<Reason>) -> Option<usize> {
    let first = path
        .iter()
        .position(|frame| rule(frame.function()).is_none())?;
    let relay = path.get(first)?;
    let called = path.get(..first)?;
    is_relay(relay.function()).then(|| {
        called
            .iter()
            .rposition(|frame| rule(frame.function()).is_some_and(does_something))
    })?
}

/// Whether a function that is passed over for `reason` does more than report, enter or leave.
fn does_something(reason: Reason) -> bool {
    !matches!(
        reason,
        Reason::Machinery
            | Reason::Instrumentation
            | Reason::Exception
            | Reason::Entry
            | Reason::Tick
    )
}

/// Goes along `path` to the culprit (the first kept frame, or the one at `fixed`) and the kept
/// frames behind it.
fn collect(
    path: &[Frame],
    why: impl Fn(&Frame) -> Option<Reason>,
    fixed: Option<usize>,
) -> Judgement {
    let mut judgement = Judgement::default();
    let chosen = fixed
        .or_else(|| path.iter().position(|frame| why(frame).is_none()))
        .or_else(|| least_bad(path, &why));
    for (at, frame) in path.iter().enumerate().take(CONSIDERED_MAX) {
        let skipped = match chosen {
            Some(chosen) if at == chosen => None,
            Some(chosen) if at < chosen => why(frame).or(Some(Reason::Inside)),
            _ => why(frame),
        };
        judgement.considered.push(Considered {
            function: frame.function().to_owned(),
            skipped,
        });
        let known = |other: &Frame| other.function() == frame.function();
        if chosen == Some(at) {
            judgement.culprit = Some(frame.clone());
        } else if skipped.is_none()
            && judgement
                .culprit
                .as_ref()
                .is_some_and(|culprit| !known(culprit))
            && !judgement.next.iter().any(known)
        {
            judgement.next.push(frame.clone());
            if judgement.next.len() == NEXT_MAX {
                break;
            }
        }
    }
    judgement
}

/// Where all are passed over, one that at least did something: not the report's own functions,
/// then not the entry.
fn least_bad(path: &[Frame], why: &impl Fn(&Frame) -> Option<Reason>) -> Option<usize> {
    let with = |allowed: &dyn Fn(Reason) -> bool| {
        path.iter()
            .position(|frame| why(frame).is_some_and(allowed))
    };
    with(&does_something)
        .or_else(|| with(&|reason| reason == Reason::Exception))
        .or_else(|| with(&|reason| reason == Reason::Entry))
        .or_else(|| with(&|reason| reason == Reason::Instrumentation))
}

fn stalled(anatomy: &Anatomy) -> Judgement {
    let mut idle = None;
    for stack in anatomy.stacks.iter().filter(|s| s.kind != StackKind::Other) {
        let path = interrupted(sure(stack));
        let busy = !path.iter().any(|frame| is_idle(frame.function()));
        let judgement = stalled_on(&path);
        if judgement.culprit.is_some() && busy {
            return judgement;
        }
        if judgement.culprit.is_some() && idle.is_none() {
            idle = Some(judgement);
        }
    }
    idle.unwrap_or_default()
}

/// What the tick or the backtrace's own interrupt interrupted.
fn interrupted(stack: Vec<Frame>) -> Vec<Frame> {
    if stack.first().is_some_and(|frame| frame.register) {
        return stack;
    }
    let Some(first) = stack
        .iter()
        .position(|frame| is_interrupt_entry(frame.function()))
    else {
        return from_registers(stack);
    };
    let entries = stack
        .iter()
        .skip(first)
        .take_while(|frame| is_interrupt_entry(frame.function()))
        .count();
    stack.into_iter().skip(first + entries).collect()
}

fn stalled_on(path: &[Frame]) -> Judgement {
    let why = |frame: &Frame| reason_when_stuck(frame.function());
    let first = path.iter().position(|frame| why(frame).is_none());
    let waits = first
        .and_then(|at| path.get(at))
        .is_some_and(|frame| frame.function().starts_with("smp_call_function"));
    let operation = if waits { first } else { operation(path, &why) };
    collect(path, why, operation)
}

/// The innermost function that a dispatcher called, or the system call.
fn operation(path: &[Frame], why: &impl Fn(&Frame) -> Option<Reason>) -> Option<usize> {
    let mut callers = path.iter().skip(1);
    let dispatched = path.iter().position(|frame| {
        let is_called = callers
            .next()
            .is_some_and(|caller| dispatches(caller.function()));
        is_called && !dispatches(frame.function()) && why(frame).is_none()
    });
    dispatched.or_else(|| {
        // Starting a program does a little of everything, so execve says nothing.
        let is_telling = |name: String| !name.starts_with("sys_exec");
        path.iter()
            .position(|frame| system_call(frame.function()).is_some_and(is_telling))
    })
}

/// Whether `function` only calls an operation, through a pointer and on somebody's behalf.
fn dispatches(function: &str) -> bool {
    is_dispatcher(function)
        || function.ends_with("_compat_ioctl")
        || system_call(function).is_some_and(|name| name == "sys_ioctl")
}

/// `sys_read` of `__x64_sys_read`, `SyS_read` and every other spelling of a system call's entry.
#[must_use]
pub(crate) fn system_call(function: &str) -> Option<String> {
    const SPELLINGS: [&str; 22] = [
        "__x64_sys_",
        "__ia32_sys_",
        "__ia32_compat_sys_",
        "__x64_compat_sys_",
        "__x32_compat_sys_",
        "__arm64_sys_",
        "__arm64_compat_sys_",
        "__riscv_sys_",
        "__s390x_sys_",
        "__s390_sys_",
        "__powerpc_sys_",
        "__se_sys_",
        "__se_compat_sys_",
        "__do_sys_",
        "__do_compat_sys_",
        "compat_SyS_",
        "C_SYSC_",
        "SyS_",
        "SYSC_",
        "compat_sys_",
        "__sys_",
        "sys_",
    ];
    SPELLINGS
        .iter()
        .find_map(|spelling| function.strip_prefix(spelling))
        .filter(|name| !name.is_empty())
        .map(|name| format!("sys_{name}"))
}
