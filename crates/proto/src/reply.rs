//! The reply: what a server tells a client, all of it in every packet, so that losing some costs
//! nothing.
//!
//! ```text
//!  byte 0      8             16      24            28       30        31       32          36       38
//!       +------+-------------+-------+-------------+--------+---------+--------+-----------+--------+-------------+
//!       | next | credit end  | latest| delay (us)  |attempt | verdict | action | argument  | length | bitmap      |
//!       +------+-------------+-------+-------------+--------+---------+--------+-----------+--------+-------------+
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

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
pub const REPLY_BYTES_MAX: usize = SERVER_OVERHEAD + FIXED_BYTES + BITMAP_BYTES_MAX;
/// Packets a client may send before the first reply.
pub const FIRST_CREDIT_PACKETS: u64 = 32;

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

/// A legal reply. The bitmap is apart: see [`Reply::decode`].
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
    argument: U32,
    bitmap_bytes: U16,
}

impl Reply {
    /// Writes the reply's payload where [`crate::wire::seal_server`] expects it in `datagram`. Bit
    /// `i` (least significant first) of `bitmap` tells that packet `next + 1 + i` is received.
    /// Returns the payload's length, or `None` if `datagram` or `bitmap` have not the sizes this
    /// module names.
    #[must_use]
    pub fn encode(&self, bitmap: &[u8], datagram: &mut [u8]) -> Option<usize> {
        let bitmap_bytes = u16::try_from(bitmap.len()).ok()?;
        if bitmap.len() > BITMAP_BYTES_MAX {
            return None;
        }
        let (verdict, argument) = match self.verdict {
            Verdict::Undecided => (0, 0),
            Verdict::Full { filter } => (1, u32::from(filter)),
            Verdict::LogOnly => (2, 0),
            Verdict::Nothing => (3, 0),
        };
        let action = match self.action {
            Action::None => 0,
            Action::Reboot => 1,
            Action::Halt => 2,
            Action::Stay => 3,
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
        };
        let payload = datagram.get_mut(HEADER_BYTES.checked_add(INCARNATION_BYTES)?..)?;
        raw.write_to_prefix(payload).ok()?;
        payload
            .get_mut(FIXED_BYTES..)?
            .get_mut(..bitmap.len())?
            .copy_from_slice(bitmap);
        FIXED_BYTES.checked_add(bitmap.len())
    }

    /// Reads an opened reply's payload: the reply and its bitmap. `None` if it is malformed: the
    /// server that sealed it is broken or of a version that was not agreed on, and it is ignored.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Option<(Self, &[u8])> {
        let (raw, bitmap) = RawReply::ref_from_prefix(payload).ok()?;
        if bitmap.len() != usize::from(raw.bitmap_bytes.get()) || bitmap.len() > BITMAP_BYTES_MAX {
            return None;
        }
        let verdict = match raw.verdict {
            0 => Verdict::Undecided,
            1 => Verdict::Full {
                filter: u8::try_from(raw.argument.get()).ok()?,
            },
            2 => Verdict::LogOnly,
            3 => Verdict::Nothing,
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
        };
        Some((reply, bitmap))
    }
}
