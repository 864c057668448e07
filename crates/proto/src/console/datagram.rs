//! What log datagrams and their replies hold, once opened.
//!
//! ```text
//!  byte 0       16      24    32       40          48        56      60
//!       +-------+-------+-----+--------+-----------+---------+-------+- - - - - -
//!       | boot  | first | end | oldest | kernel us | unix us | flags | entries
//!       +-------+-------+-----+--------+-----------+---------+-------+- - - - - -
//!
//!  byte 0   1       2          3       4      6            8        12       20
//!       +---+-------+----------+-------+------+------------+--------+--------+- - - + - - - - - -
//!       | 1 | level | facility | flags | text | dictionary | caller | time us| text | dictionary
//!       +---+-------+----------+-------+------+------------+--------+--------+- - - + - - - - - -
//!       | 2 | reason| 0                | count (8)         |
//!       +---+-------+------------------+-------------------+
//!
//!  byte 0      8       10     16
//!       +------+--------+------+- - - - - - - - - - - -
//! reply | next | ranges | 0    | first (8), end (8) ...
//!       +------+--------+------+- - - - - - - - - - - -
//! ```

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::wire::{HEADER_BYTES, INCARNATION_BYTES, SERVER_OVERHEAD};

/// Bytes before the first entry.
pub const LOG_HEAD_BYTES: usize = size_of::<RawHead>();
/// Bytes of a record before its text.
pub const LOG_RECORD_HEADER_BYTES: usize = size_of::<RawRecord>();
/// Bytes of a skip.
pub const LOG_SKIP_BYTES: usize = size_of::<RawSkip>();
/// Bytes of a record's text at most: the kernel cuts there too.
pub const TEXT_BYTES_MAX: usize = 1024;
/// Bytes of a record's dictionary at most: `SUBSYSTEM=` and 15 bytes, `DEVICE=` and 47.
pub const DICTIONARY_BYTES_MAX: usize = 96;
/// Runs a reply can ask for.
pub const ASK_RANGES_MAX: usize = 8;
/// Bytes of the longest reply datagram.
pub const LOG_REPLY_BYTES_MAX: usize =
    SERVER_OVERHEAD + REPLY_FIXED_BYTES + ASK_RANGES_MAX * size_of::<RawRange>();
const REPLY_FIXED_BYTES: usize = size_of::<RawReply>();
// The sizes that docs/protocol.md draws.
const _: () = assert!(LOG_HEAD_BYTES == 60);
const _: () = assert!(LOG_RECORD_HEADER_BYTES == 20);
const _: () = assert!(LOG_SKIP_BYTES == 12);
const _: () = assert!(REPLY_FIXED_BYTES == 16);

const KIND_RECORD: u8 = 1;
const KIND_SKIP: u8 = 2;
const FLAG_CRASH: u32 = 1;
const FLAG_CONTINUED: u8 = 1;
const FLAG_CUT: u8 = 2;
const LEVEL_MAX: u8 = 7;
/// The bit of a caller that says it is a CPU, as in the kernel.
const CALLER_CPU: u32 = 0x8000_0000;

/// A run of sequence numbers: `first` up to and without `end`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// The first one.
    pub first: u64,
    /// The one after the last.
    pub end: u64,
}

impl Range {
    /// Whether there is nothing in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.first >= self.end
    }

    /// How many there are.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.end.saturating_sub(self.first)
    }
}

/// The part of a log datagram before its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// The boot that the records are of: `/proc/sys/kernel/random/boot_id`.
    pub boot: [u8; 16],
    /// The sequence numbers that the entries cover. An empty run tells how far the client has sent.
    pub covers: Range,
    /// The oldest sequence number that can still be asked for.
    pub oldest: u64,
    /// The kernel's clock when this was sent, in microseconds: the clock of the records' times.
    pub kernel_us: u64,
    /// The host's clock when this was sent, in microseconds since 1970; 0 if it cannot be read.
    pub unix_us: u64,
    /// The kernel is dead: these are its last words.
    pub crash: bool,
}

/// Who printed a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A task, by its id.
    Task(u32),
    /// An interrupt on a CPU.
    Cpu(u32),
}

impl Caller {
    /// From the kernel's number.
    #[must_use]
    pub const fn from_kernel(number: u32) -> Self {
        if number & CALLER_CPU == 0 {
            Self::Task(number)
        } else {
            Self::Cpu(number & !CALLER_CPU)
        }
    }

    const fn to_kernel(self) -> u32 {
        match self {
            Self::Task(id) => id & !CALLER_CPU,
            Self::Cpu(cpu) => cpu | CALLER_CPU,
        }
    }
}

/// All of a record but its texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    /// When it was printed, in microseconds of the kernel's clock.
    pub time_us: u64,
    /// Its level, 0 (emergency) to 7 (debug).
    pub level: u8,
    /// Its facility: 0 the kernel, others what wrote to `/dev/kmsg`.
    pub facility: u8,
    /// Who printed it.
    pub caller: Caller,
    /// It continues the record before it (`KERN_CONT`).
    pub continued: bool,
    /// It did not fit into a datagram: the end of its text, or its dictionary, is missing.
    pub cut: bool,
}

/// One kernel message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// All but the texts.
    pub head: RecordHead,
    /// The message as the kernel holds it: any bytes, newlines within included.
    pub text: &'a [u8],
    /// `KEY=value` lines (SUBSYSTEM, DEVICE), empty for most records.
    pub dictionary: &'a [u8],
}

/// Why sequence numbers come without records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The ring buffer was overwritten before they could be sent. They are lost.
    Overwritten,
    /// Their level is not to be sent.
    Level,
    /// The kernel has the number but no text for it.
    Unreadable,
}

/// What a log datagram says of one sequence number or a run of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A record.
    Record(u64, Record<'a>),
    /// No records.
    Skip(Range, Reason),
}

impl Entry<'_> {
    /// The sequence numbers it covers.
    #[must_use]
    pub const fn covers(&self) -> Range {
        match *self {
            Self::Record(first, _) => Range {
                first,
                end: first.saturating_add(1),
            },
            Self::Skip(range, _) => range,
        }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHead {
    boot: [u8; 16],
    first: U64,
    end: U64,
    oldest: U64,
    kernel_us: U64,
    unix_us: U64,
    flags: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    kind: u8,
    level: u8,
    facility: u8,
    flags: u8,
    text: U16,
    dictionary: U16,
    caller: U32,
    time_us: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSkip {
    kind: u8,
    reason: u8,
    reserved: U16,
    count: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawReply {
    next: U64,
    ranges: U16,
    reserved: [u8; 6],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRange {
    first: U64,
    end: U64,
}

/// An opened log datagram. Whoever has one knows that all of it is legal.
#[derive(Clone, Copy, Debug)]
pub struct Log<'a> {
    /// What is before the entries.
    pub head: Head,
    entries: &'a [u8],
}

impl<'a> Log<'a> {
    /// Reads and judges a payload that [`crate::wire::open_client`] gave. `None`: it is not legal.
    #[must_use]
    pub fn decode(payload: &'a [u8]) -> Option<Self> {
        let (raw, entries) = RawHead::ref_from_prefix(payload).ok()?;
        let head = Head {
            boot: raw.boot,
            covers: Range {
                first: raw.first.get(),
                end: raw.end.get(),
            },
            oldest: raw.oldest.get(),
            kernel_us: raw.kernel_us.get(),
            unix_us: raw.unix_us.get(),
            crash: raw.flags.get() & FLAG_CRASH != 0,
        };
        if raw.flags.get() & !FLAG_CRASH != 0 || head.covers.first > head.covers.end {
            return None;
        }
        let log = Self { head, entries };
        let mut all = log.entries();
        let mut end = head.covers.first;
        for entry in all.by_ref() {
            end = entry.covers().end;
        }
        (all.rest.is_empty() && end == head.covers.end).then_some(log)
    }

    /// What it says, in order and without a hole.
    #[must_use]
    pub const fn entries(&self) -> Entries<'a> {
        Entries {
            next: self.head.covers.first,
            rest: self.entries,
        }
    }
}

/// See [`Log::entries`].
#[derive(Clone, Copy, Debug)]
pub struct Entries<'a> {
    next: u64,
    rest: &'a [u8],
}

impl<'a> Entries<'a> {
    fn read_record(&self) -> Option<(Record<'a>, &'a [u8])> {
        let (raw, rest) = RawRecord::ref_from_prefix(self.rest).ok()?;
        let (text, dictionary) = (raw.text.get().into(), raw.dictionary.get().into());
        let unknown = raw.flags & !(FLAG_CONTINUED | FLAG_CUT);
        if raw.level > LEVEL_MAX
            || unknown != 0
            || text > TEXT_BYTES_MAX
            || dictionary > DICTIONARY_BYTES_MAX
        {
            return None;
        }
        let (text, rest) = rest.split_at_checked(text)?;
        let (dictionary, rest) = rest.split_at_checked(dictionary)?;
        let head = RecordHead {
            time_us: raw.time_us.get(),
            level: raw.level,
            facility: raw.facility,
            caller: Caller::from_kernel(raw.caller.get()),
            continued: raw.flags & FLAG_CONTINUED != 0,
            cut: raw.flags & FLAG_CUT != 0,
        };
        let record = Record {
            head,
            text,
            dictionary,
        };
        Some((record, rest))
    }

    fn read_skip(&self) -> Option<(u64, Reason, &'a [u8])> {
        let (raw, rest) = RawSkip::ref_from_prefix(self.rest).ok()?;
        let reason = match raw.reason {
            1 => Reason::Overwritten,
            2 => Reason::Level,
            3 => Reason::Unreadable,
            _ => return None,
        };
        let count = Some(raw.count.get()).filter(|&count| count > 0)?;
        (raw.reserved.get() == 0).then_some((count, reason, rest))
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Entry<'a>> {
        let first = self.next;
        let (entry, end, rest) = match *self.rest.first()? {
            KIND_RECORD => {
                let (record, rest) = self.read_record()?;
                (Entry::Record(first, record), first.checked_add(1)?, rest)
            }
            KIND_SKIP => {
                let (count, reason, rest) = self.read_skip()?;
                let end = first.checked_add(count)?;
                (Entry::Skip(Range { first, end }, reason), end, rest)
            }
            _ => return None,
        };
        self.next = end;
        self.rest = rest;
        Some(entry)
    }
}

/// Writes a log datagram's payload into a buffer, entry by entry.
pub struct LogWriter<'a> {
    payload: &'a mut [u8],
    used: usize,
    covers: Range,
    /// A skip that may still grow, and its place.
    skip: Option<(usize, u64, Reason)>,
}

impl<'a> LogWriter<'a> {
    /// Begins a payload that covers sequence numbers from `first` on. `None` if there is no room
    /// for anything.
    #[must_use]
    pub fn new(payload: &'a mut [u8], first: u64) -> Option<Self> {
        (payload.len() >= LOG_HEAD_BYTES).then_some(Self {
            payload,
            used: LOG_HEAD_BYTES,
            covers: Range { first, end: first },
            skip: None,
        })
    }

    /// The sequence numbers that are covered so far.
    #[must_use]
    pub const fn covers(&self) -> Range {
        self.covers
    }

    /// Where the texts of the next record go, text first. Empty if there is no room.
    #[must_use]
    pub fn room(&mut self) -> &mut [u8] {
        let at = self.used.saturating_add(LOG_RECORD_HEADER_BYTES);
        self.payload.get_mut(at..).unwrap_or_default()
    }

    /// Adds the next record, whose `text` and `dictionary` bytes lie in [`LogWriter::room`]. `None`
    /// if it does not fit; nothing is changed then.
    #[must_use]
    pub fn record(&mut self, head: &RecordHead, text: usize, dictionary: usize) -> Option<()> {
        let texts = text.checked_add(dictionary)?;
        let end = self
            .used
            .checked_add(LOG_RECORD_HEADER_BYTES)?
            .checked_add(texts)?;
        if end > self.payload.len() || text > TEXT_BYTES_MAX || dictionary > DICTIONARY_BYTES_MAX {
            return None;
        }
        let mut flags = 0;
        if head.continued {
            flags |= FLAG_CONTINUED;
        }
        if head.cut {
            flags |= FLAG_CUT;
        }
        let raw = RawRecord {
            kind: KIND_RECORD,
            level: head.level.min(LEVEL_MAX),
            facility: head.facility,
            flags,
            text: u16::try_from(text).ok()?.into(),
            dictionary: u16::try_from(dictionary).ok()?.into(),
            caller: head.caller.to_kernel().into(),
            time_us: head.time_us.into(),
        };
        raw.write_to_prefix(self.payload.get_mut(self.used..)?)
            .ok()?;
        self.used = end;
        self.covers.end = self.covers.end.checked_add(1)?;
        self.skip = None;
        Some(())
    }

    /// Says that the next `count` sequence numbers come without records. `None` if that does not
    /// fit; nothing is changed then.
    #[must_use]
    pub fn skip(&mut self, count: u64, reason: Reason) -> Option<()> {
        let end = self.covers.end.checked_add(count)?;
        let (at, before) = match self.skip {
            Some((at, before, known)) if known == reason => (at, before),
            _ => (self.used, 0),
        };
        let together = before.checked_add(count).filter(|&count| count > 0)?;
        let raw = RawSkip {
            kind: KIND_SKIP,
            reason: match reason {
                Reason::Overwritten => 1,
                Reason::Level => 2,
                Reason::Unreadable => 3,
            },
            reserved: 0.into(),
            count: together.into(),
        };
        raw.write_to_prefix(self.payload.get_mut(at..)?).ok()?;
        self.used = at.checked_add(LOG_SKIP_BYTES)?;
        self.covers.end = end;
        self.skip = Some((at, together, reason));
        Some(())
    }

    /// Completes the payload with `head`, whose `covers` does not matter, and returns its length.
    #[must_use]
    pub fn finish(self, head: &Head) -> Option<usize> {
        let raw = RawHead {
            boot: head.boot,
            first: self.covers.first.into(),
            end: self.covers.end.into(),
            oldest: head.oldest.into(),
            kernel_us: head.kernel_us.into(),
            unix_us: head.unix_us.into(),
            flags: if head.crash { FLAG_CRASH } else { 0 }.into(),
        };
        raw.write_to_prefix(self.payload).ok()?;
        Some(self.used)
    }
}

/// What a server says of a boot's records, all of it each time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogReply {
    /// All below this sequence number is written, or given up.
    pub next: u64,
    asked: [Range; ASK_RANGES_MAX],
    used: usize,
}

impl LogReply {
    /// Asks for nothing yet.
    #[must_use]
    pub const fn new(next: u64) -> Self {
        Self {
            next,
            asked: [Range { first: 0, end: 0 }; ASK_RANGES_MAX],
            used: 0,
        }
    }

    /// Asks for `range`, which comes after all that has been asked for. False if there is no room
    /// or it is empty.
    pub fn ask(&mut self, range: Range) -> bool {
        let from = self.asked().last().map_or(self.next, |last| last.end);
        let Some(place) = self.asked.get_mut(self.used) else {
            return false;
        };
        if range.is_empty() || range.first < from {
            return false;
        }
        *place = range;
        self.used = self.used.saturating_add(1);
        true
    }

    /// What is asked for: ascending, disjoint, none empty.
    #[must_use]
    pub fn asked(&self) -> &[Range] {
        self.asked.get(..self.used).unwrap_or_default()
    }

    /// Writes the payload where [`crate::wire::seal_server`] expects it in `datagram`
    /// ([`LOG_REPLY_BYTES_MAX`] bytes); returns its length.
    #[must_use]
    pub fn encode(&self, datagram: &mut [u8]) -> Option<usize> {
        let payload = datagram.get_mut(HEADER_BYTES.checked_add(INCARNATION_BYTES)?..)?;
        let raw = RawReply {
            next: self.next.into(),
            ranges: u16::try_from(self.used).ok()?.into(),
            reserved: [0; 6],
        };
        raw.write_to_prefix(payload).ok()?;
        let mut at = REPLY_FIXED_BYTES;
        for range in self.asked() {
            let raw = RawRange {
                first: range.first.into(),
                end: range.end.into(),
            };
            raw.write_to_prefix(payload.get_mut(at..)?).ok()?;
            at = at.checked_add(size_of::<RawRange>())?;
        }
        Some(at)
    }

    /// Reads and judges a payload that [`crate::wire::open_server`] gave. `None`: it is not legal.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let (raw, rest) = RawReply::ref_from_prefix(payload).ok()?;
        let ranges = <[RawRange]>::ref_from_bytes(rest).ok()?;
        if raw.reserved != [0; 6] || ranges.len() != usize::from(raw.ranges.get()) {
            return None;
        }
        let mut reply = Self::new(raw.next.get());
        for range in ranges {
            let range = Range {
                first: range.first.get(),
                end: range.end.get(),
            };
            if !reply.ask(range) {
                return None;
            }
        }
        Some(reply)
    }
}
