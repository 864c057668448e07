//! The reply: what a server tells a client, all of it in every packet, so that losing some costs
//! nothing.
//!
//! ```text
//!  byte 0      8             16       24            28        30        31       32         34       36     40       42       44
//!       +------+-------------+--------+-------------+---------+---------+--------+----------+--------+------+--------+--------+ - - - - + - - - -
//!       | next | credit end  | latest | delay (us)  | attempt | verdict | action | argument | length | pull | ranges | known  | bitmap  | ranges
//!       +------+-------------+--------+-------------+---------+---------+--------+----------+--------+------+--------+--------+ - - - - + - - - -
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::record::RamRange;
use crate::time::Micros;
use crate::units::PacketNumber;
use crate::wire::{HEADER_BYTES, INCARNATION_BYTES, SERVER_OVERHEAD};

/// Packets that may be in flight at most: the reach of the bitmap. At 1424 bytes a packet this is
/// 5.8 MB, at 8924 bytes 36 MB: 10 Gbit/s over 29 ms.
pub const WINDOW_PACKETS_MAX: usize = 4096;
/// Bytes of the longest bitmap.
pub const BITMAP_BYTES_MAX: usize = WINDOW_PACKETS_MAX / 8;
/// Bytes of a reply before its bitmap.
const FIXED_BYTES: usize = size_of::<RawReply>();
/// Bytes of the longest reply datagram.
pub const REPLY_BYTES_MAX: usize =
    SERVER_OVERHEAD + FIXED_BYTES + BITMAP_BYTES_MAX + PULL_RANGES_MAX * size_of::<RamRange>();
// The size that docs/protocol.md draws.
const _: () = assert!(FIXED_BYTES == 44);
/// Ranges of pages that a server can ask for at a time. With the bitmap of a client of
/// [`crate::client::SLOTS_MAX`] buffers, a reply still fits into the smallest datagram.
pub const PULL_RANGES_MAX: usize = 8;
/// The longest time a client may be told to wait before it asks again, in seconds.
pub const WAIT_SECONDS_MAX: u16 = 300;
/// Packets a client may send before the first reply.
pub const FIRST_CREDIT_PACKETS: u64 = 32;

/// Bit of what the server knows: the records of hardware state.
pub const KNOWN_HARDWARE: u16 = 1;

/// What the server wants of the crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// Not decided: the client sends everything before the pages, then waits.
    #[default]
    Undecided,
    /// The whole dump. `filter` says which pages are left out (makedumpfile's dump levels 0 to 31;
    /// 0 is none).
    Full {
        /// The filter level.
        filter: u8,
    },
    /// No pages: text, registers and State only.
    LogOnly,
    /// Nothing more: perform the action.
    Nothing,
    /// Others come first. The client goes on waiting and asks again after so many seconds, unless
    /// the server speaks before.
    Wait {
        /// 1 to [`WAIT_SECONDS_MAX`].
        seconds: u16,
    },
    /// Stay, send no pages but those that are pulled, until the verdict changes.
    Hold {
        /// Filter level for what is pulled meanwhile; 0 sends whatever is asked for.
        filter: u8,
    },
    /// Go to another one of the servers that the host was armed for.
    Redirect {
        /// Its place in [`crate::record::Hello::servers`].
        server: u8,
    },
}

/// Pages the server asks for beyond the verdict. Each pull has a number of its own, larger than the
/// one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pull<'a> {
    /// Its number; 0: nothing is asked for.
    pub number: u32,
    /// At most [`PULL_RANGES_MAX`] ranges; what is not System RAM comes back as unreadable.
    pub ranges: &'a [RamRange],
}

/// What the host does when the session is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Not yet told.
    #[default]
    None,
    /// Reboot.
    Reboot,
    /// Stop and stay down.
    Halt,
    /// Return to the kernel's own panic code, which does what `panic_timeout` says.
    Stay,
}

/// A legal reply. The parts of varying length are apart: see [`Opened`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// Every packet below this one is received and written to the spool.
    pub next: PacketNumber,
    /// The first packet the client may not send. Never goes back.
    pub credit_end: PacketNumber,
    /// The packet that arrived last.
    pub latest: PacketNumber,
    /// Time from its arrival to this reply.
    pub delay: Micros,
    /// The attempt this reply is about.
    pub attempt: u16,
    /// What the server wants.
    pub verdict: Verdict,
    /// What the host does in the end.
    pub action: Action,
    /// The server knows the records of hardware state.
    pub knows_hardware: bool,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawReply {
    next: U64,
    credit_end: U64,
    latest: U64,
    delay: U32,
    attempt: U16,
    verdict: u8,
    action: u8,
    argument: U16,
    bitmap_bytes: U16,
    pull: U32,
    pull_ranges: U16,
    known: U16,
}

/// A reply that was opened.
#[derive(Clone, Copy)]
pub struct Opened<'a> {
    /// The part of fixed length.
    pub reply: Reply,
    /// Bit `i` (least significant first) tells that packet `next + i` is received.
    pub bitmap: &'a [u8],
    /// The pages that are asked for.
    pub pull: Pull<'a>,
}

impl Reply {
    /// Writes the reply's payload where [`crate::wire::seal_server`] expects it in `datagram`. Bit
    /// `i` (least significant first) of `bitmap` tells that packet `next + i` is received.
    /// Returns the payload's length, or `None` if `datagram`, `bitmap` or `pull` have not the sizes
    /// this module names.
    #[must_use]
    pub fn encode(&self, bitmap: &[u8], pull: Pull<'_>, datagram: &mut [u8]) -> Option<usize> {
        let bitmap_bytes = u16::try_from(bitmap.len()).ok()?;
        let pull_ranges = u16::try_from(pull.ranges.len()).ok()?;
        if bitmap.len() > BITMAP_BYTES_MAX || pull.ranges.len() > PULL_RANGES_MAX {
            return None;
        }
        let (verdict, argument) = match self.verdict {
            Verdict::Undecided => (0, 0),
            Verdict::Full { filter } => (1, u16::from(filter)),
            Verdict::LogOnly => (2, 0),
            Verdict::Nothing => (3, 0),
            Verdict::Wait { seconds } => (4, seconds),
            Verdict::Hold { filter } => (5, u16::from(filter)),
            Verdict::Redirect { server } => (6, u16::from(server)),
        };
        let action = match self.action {
            Action::None => 0,
            Action::Reboot => 1,
            Action::Halt => 2,
            Action::Stay => 3,
        };
        let known = if self.knows_hardware {
            KNOWN_HARDWARE
        } else {
            0
        };
        let raw = RawReply {
            next: self.next.0.into(),
            credit_end: self.credit_end.0.into(),
            latest: self.latest.0.into(),
            delay: u32::try_from(self.delay.get()).unwrap_or(u32::MAX).into(),
            attempt: self.attempt.into(),
            verdict,
            action,
            argument: argument.into(),
            bitmap_bytes: bitmap_bytes.into(),
            pull: pull.number.into(),
            pull_ranges: pull_ranges.into(),
            known: known.into(),
        };
        let payload = datagram.get_mut(HEADER_BYTES.checked_add(INCARNATION_BYTES)?..)?;
        raw.write_to_prefix(payload).ok()?;
        let (to_bitmap, to_ranges) = payload
            .get_mut(FIXED_BYTES..)?
            .split_at_mut_checked(bitmap.len())?;
        to_bitmap.copy_from_slice(bitmap);
        let ranges = pull.ranges.as_bytes();
        to_ranges.get_mut(..ranges.len())?.copy_from_slice(ranges);
        FIXED_BYTES
            .checked_add(bitmap.len())?
            .checked_add(ranges.len())
    }

    /// Reads an opened reply's payload. `None` if it is malformed: the server that sealed it is
    /// broken or of a version that was not agreed on, and it is ignored.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Option<Opened<'_>> {
        let (raw, rest) = RawReply::ref_from_prefix(payload).ok()?;
        let (bitmap, ranges) = rest.split_at_checked(raw.bitmap_bytes.get().into())?;
        let ranges = <[RamRange]>::ref_from_bytes(ranges).ok()?;
        if bitmap.len() > BITMAP_BYTES_MAX
            || ranges.len() != usize::from(raw.pull_ranges.get())
            || ranges.len() > PULL_RANGES_MAX
        {
            return None;
        }
        let small = u8::try_from(raw.argument.get()).ok();
        let verdict = match raw.verdict {
            0 => Verdict::Undecided,
            1 => Verdict::Full { filter: small? },
            2 => Verdict::LogOnly,
            3 => Verdict::Nothing,
            4 => Verdict::Wait {
                seconds: raw.argument.get().clamp(1, WAIT_SECONDS_MAX),
            },
            5 => Verdict::Hold { filter: small? },
            6 => Verdict::Redirect { server: small? },
            _ => return None,
        };
        let action = match raw.action {
            0 => Action::None,
            1 => Action::Reboot,
            2 => Action::Halt,
            3 => Action::Stay,
            _ => return None,
        };
        let reply = Self {
            next: PacketNumber(raw.next.get()),
            credit_end: PacketNumber(raw.credit_end.get()),
            latest: PacketNumber(raw.latest.get()),
            delay: Micros::new(u64::from(raw.delay.get())),
            attempt: raw.attempt.get(),
            verdict,
            action,
            knows_hardware: raw.known.get() & KNOWN_HARDWARE != 0,
        };
        let number = raw.pull.get();
        Some(Opened {
            reply,
            bitmap,
            pull: Pull { number, ranges },
        })
    }
}
