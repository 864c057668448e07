//! ORC: for every instruction, where the caller's frame lies.
//!
//! Two tables: instruction addresses relative to their own place, sorted, and an entry of six bytes
//! for each. The bits of an entry changed in 6.3 and 6.4; BTF has them. Kernels whose entries have
//! an `end` bit number the types as before 6.4. The numbers of registers changed in 7.x, and nothing
//! says so; but where a function begins, its caller's frame is always eight bytes above the stack
//! pointer, so the register that is named there is the stack pointer.

use super::btf::{Btf, Field};
use super::image::{Image, Unread};

/// Bytes of an entry.
const ENTRY_BYTES: usize = 6;
/// Entries of one table; 6.12 has 600,000.
const ENTRIES_MAX: u64 = 1 << 24;

/// A register that ORC names.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Base {
    Undefined,
    PreviousSp,
    Dx,
    Di,
    Bp,
    Sp,
    R10,
    R13,
    BpIndirect,
    SpIndirect,
}

/// Registers by number, up to 6.x.
const NUMBERS: [Base; 11] = [
    Base::Undefined,
    Base::PreviousSp,
    Base::Dx,
    Base::Di,
    Base::Bp,
    Base::Sp,
    Base::R10,
    Base::R13,
    Base::BpIndirect,
    Base::SpIndirect,
    Base::Undefined,
];
/// The same in 7.x. Its number 1, AX, leads to no frame of x86-64 kernels.
const NEW_NUMBERS: [Base; 11] = [
    Base::Undefined,
    Base::Undefined,
    Base::Dx,
    Base::Sp,
    Base::Bp,
    Base::Di,
    Base::R10,
    Base::R13,
    Base::PreviousSp,
    Base::SpIndirect,
    Base::BpIndirect,
];

/// What lies at the caller's frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// Nothing is known.
    Undefined,
    /// The stack ends here.
    End,
    /// A return address.
    Call,
    /// All registers of what was interrupted.
    Regs,
    /// Only instruction pointer, flags, stack pointer.
    PartialRegs,
}

/// How to get from a function to its caller.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Entry {
    pub(crate) sp: Base,
    pub(crate) sp_offset: i16,
    pub(crate) bp: Base,
    pub(crate) bp_offset: i16,
    pub(crate) kind: Kind,
}

impl Entry {
    /// A function that begins with `push rbp; mov rbp, rsp`: the guess where ORC has nothing.
    pub(crate) const FRAME_POINTER: Self = Self {
        sp: Base::Bp,
        sp_offset: 16,
        bp: Base::PreviousSp,
        bp_offset: -16,
        kind: Kind::Call,
    };
    /// A call to where no function is: only the return address is on the stack.
    pub(crate) const NO_FUNCTION: Self = Self {
        sp: Base::Sp,
        sp_offset: 8,
        bp: Base::Undefined,
        bp_offset: 0,
        kind: Kind::Call,
    };
}

/// Where the bits of an entry lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    sp_offset: Field,
    bp_offset: Field,
    sp: (u32, u32),
    bp: (u32, u32),
    kind: (u32, u32),
    end: Option<(u32, u32)>,
    numbers: [Base; 11],
}

impl Layout {
    pub(crate) fn new(btf: &Btf) -> Result<Self, Unread> {
        const NAME: &str = "orc_entry";
        let bits = |member: &str| {
            btf.field(NAME, member)?
                .bits
                .ok_or_else(|| Unread::Strange(format!("{NAME}.{member} is no bit field")))
        };
        let size = btf.size(NAME)?;
        if size != ENTRY_BYTES as u64 {
            return Err(Unread::Strange(format!(
                "struct {NAME} has {size} bytes, not {ENTRY_BYTES}"
            )));
        }
        Ok(Self {
            sp_offset: btf.field(NAME, "sp_offset")?,
            bp_offset: btf.field(NAME, "bp_offset")?,
            sp: bits("sp_reg")?,
            bp: bits("bp_reg")?,
            kind: bits("type")?,
            end: bits("end").ok(),
            numbers: NUMBERS,
        })
    }

    /// Learns the numbers of registers from the entry of a function's first instruction.
    pub(crate) fn learn(&mut self, at_begin: Entry) {
        // Read by the old numbers, the new number of the stack pointer is that of DI.
        if at_begin.sp == Base::Di && at_begin.sp_offset == 8 {
            self.numbers = NEW_NUMBERS;
        }
    }

    fn base(&self, number: u64) -> Base {
        let at = usize::try_from(number).unwrap_or(usize::MAX);
        self.numbers.get(at).copied().unwrap_or(Base::Undefined)
    }

    pub(crate) fn decode(&self, bytes: [u8; ENTRY_BYTES]) -> Entry {
        let [a, b, c, d, e, f] = bytes;
        let whole = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
        let bits = |(first, count): (u32, u32)| {
            whole.checked_shr(first).unwrap_or(0)
                & 1u64.checked_shl(count).unwrap_or(0).wrapping_sub(1)
        };
        let offset = |field: Field| {
            let shifted = whole.checked_shr(u32::try_from(field.offset * 8).unwrap_or(64));
            let [low, high, ..] = shifted.unwrap_or(0).to_le_bytes();
            i16::from_le_bytes([low, high])
        };
        Entry {
            sp: self.base(bits(self.sp)),
            sp_offset: offset(self.sp_offset),
            bp: self.base(bits(self.bp)),
            bp_offset: offset(self.bp_offset),
            kind: match self.end {
                Some(end) if bits(end) != 0 => Kind::End,
                // Before 6.4 there was no "undefined" and no "end" among the types.
                Some(_) => kind(bits(self.kind) + 2),
                None => kind(bits(self.kind)),
            },
        }
    }
}

fn kind(number: u64) -> Kind {
    match number {
        1 => Kind::End,
        2 => Kind::Call,
        3 => Kind::Regs,
        4 => Kind::PartialRegs,
        _ => Kind::Undefined,
    }
}

/// The tables of the kernel or of a module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    /// Where the instruction addresses begin.
    pub(crate) addresses: u64,
    /// Where the entries begin.
    pub(crate) entries: u64,
    pub(crate) count: u64,
}

impl Table {
    /// The entry for an instruction: the last at or before it.
    pub(crate) fn find(
        &self,
        image: &mut Image<'_>,
        layout: &Layout,
        address: u64,
    ) -> Result<Option<Entry>, Unread> {
        let (mut low, mut high) = (0, self.count.min(ENTRIES_MAX));
        while low < high {
            let middle = low + (high - low) / 2;
            let at = self.addresses.wrapping_add(middle * 4);
            let offset = i64::from(image.i32(at)?).cast_unsigned();
            if at.wrapping_add(offset) <= address {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(place) = low.checked_sub(1) else {
            return Ok(None);
        };
        let bytes = image.array(self.entries.wrapping_add(place * ENTRY_BYTES as u64))?;
        Ok(Some(layout.decode(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_begin_of_a_function_tells_which_number_the_stack_pointer_has() {
        let mut layout = Layout {
            sp_offset: Field::default(),
            bp_offset: Field::default(),
            sp: (32, 4),
            bp: (36, 4),
            kind: (40, 3),
            end: None,
            numbers: NUMBERS,
        };
        layout.learn(layout.decode([8, 0, 0, 0, 0x05, 2]));
        assert_eq!(layout.decode([8, 0, 0, 0, 0x15, 2]).sp, Base::Sp);
        layout.learn(layout.decode([8, 0, 0, 0, 0x03, 2]));
        let caller = layout.decode([16, 0, 0, 0, 0x83, 2]);
        assert_eq!((caller.sp, caller.bp), (Base::Sp, Base::PreviousSp));
        assert_eq!(caller.kind, Kind::Call);
    }
}
