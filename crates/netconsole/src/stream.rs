//! One source's datagrams, put into records and into order.
//!
//! A record that follows the last one goes straight through. One that does not, or is a fragment,
//! is held until what it waits for has come, at most [`HOLE_MICROS`], also when nothing else comes:
//! the caller asks [`Stream::due`]. Then the hole is a gap. Late records are still given on,
//! duplicates are counted.

use std::collections::BTreeMap;
use std::mem;

use crate::boot::Last;
use crate::datagram::{Caller, Datagram, Extended, Flaw, Fragment};
use crate::line::{Body, Record};
use crate::number;

/// How long a hole in the order is waited for.
pub const HOLE_MICROS: u64 = 200_000;
/// Records before the next one of which it is known whether they came.
const SEEN_RECORDS: u64 = 512;
const SEEN_WORDS: usize = 8;
const _: () = assert!(SEEN_WORDS as u64 * 64 == SEEN_RECORDS);
/// Records that one source may have waiting.
const HELD_RECORDS_MAX: usize = 512;
/// Bytes that one source may have waiting: three bodies of the longest kind.
const HELD_BYTES_MAX: usize = 256 << 10;
/// What a held datagram costs beside its bytes.
const HELD_BOOKKEEPING_BYTES: usize = 128;
/// The longest line of basic netconsole that is put together.
const LINE_BYTES_MAX: usize = 16 << 10;

/// Where a stream's results go.
pub trait Sink {
    /// A boot begins; what follows belongs to it.
    fn boot(&mut self, start: &BootStart<'_>);
    /// The next record, received at `at_us` (microseconds since 1970).
    fn record(&mut self, at_us: u64, record: &Record<'_>);
    /// Records are missing before the next one.
    fn gap(&mut self, at_us: u64, gap: Gap);
    /// Of the next record only a part has arrived.
    fn part(&mut self, at_us: u64, part: Part);
    /// Bytes that are no message.
    fn raw(&mut self, at_us: u64, bytes: &[u8], why: Unfinished);
    /// Where it is counted.
    fn counts(&mut self) -> &mut Counts;
}

/// Why bytes are given on as they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// They are malformed.
    Malformed(Flaw),
    /// A fragment that contradicts the ones before it, or for which there was no room.
    Fragment,
}

/// The begin of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootStart<'a> {
    /// When its first message was received.
    pub at_us: u64,
    /// Number of that record, if it has one.
    pub first: Option<u64>,
    /// The kernel's release, if the host says it.
    pub release: Option<&'a str>,
}

/// Records that were not seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The first one.
    pub first: u64,
    /// The last one.
    pub last: u64,
    /// How many of them the host has sent, if it counts what it sends.
    pub lost: Option<u64>,
}

/// A record of which fragments are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Its number.
    pub seq: u64,
    /// Bytes of its body that arrived.
    pub have: usize,
    /// Bytes of its body.
    pub total: usize,
}

/// What happened to datagrams and records, over all sources that share it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Datagrams taken.
    pub datagrams: u64,
    /// Records given on, whole or in part.
    pub records: u64,
    /// Boots begun.
    pub boots: u64,
    /// Sequence numbers that were passed over.
    pub gaps: u64,
    /// Of those, records that the host is known to have sent.
    pub lost: u64,
    /// Records that came after they had been passed over.
    pub late: u64,
    /// Records and fragments that came more than once.
    pub duplicates: u64,
    /// Records of which fragments are missing.
    pub incomplete: u64,
    /// Datagrams that are malformed.
    pub malformed: u64,
}

/// Bytes that all sources together may have waiting.
#[derive(Debug)]
pub struct Room {
    left: usize,
}

/// Where a stream stood; enough to go on with it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Position {
    /// When the last record was received.
    pub at_us: u64,
    /// Its kernel time.
    pub time_us: Option<u64>,
    /// Its number.
    pub seq: Option<u64>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Stream {
    last: Option<Last>,
    next: Option<u64>,
    /// Bit `n % SEEN_RECORDS` says whether record `n` came, for those before `next`.
    seen: [u64; SEEN_WORDS],
    /// The host's own count of what it sends.
    msgid: Option<u32>,
    release: Option<Box<str>>,
    held: Option<Box<Held>>,
    partial: Option<Box<Partial>>,
}

#[derive(Debug, Default)]
struct Held {
    records: BTreeMap<u64, Pieces>,
    bytes: usize,
    oldest_us: u64,
}

/// The datagrams of one record.
#[derive(Debug)]
struct Pieces {
    since_us: u64,
    /// The body's length, if it comes in fragments.
    total: Option<usize>,
    /// By the offset of what they carry.
    datagrams: BTreeMap<usize, Box<[u8]>>,
    body_bytes: usize,
    cost: usize,
}

/// A line of which the end has not come.
#[derive(Debug)]
struct Partial {
    since_us: u64,
    bytes: Vec<u8>,
}

impl Room {
    /// Room for so many bytes.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self { left: bytes }
    }

    fn take(&mut self, bytes: usize) -> bool {
        let fits = bytes <= self.left;
        if fits {
            self.left -= bytes;
        }
        fits
    }
}

impl Stream {
    /// Goes on where another one stood.
    #[must_use]
    pub fn resume(position: Position) -> Self {
        let mut stream = Self {
            last: Some(Last {
                at_us: position.at_us,
                time_us: position.time_us,
            }),
            ..Self::default()
        };
        if let Some(seq) = position.seq {
            stream.next = Some(seq.saturating_add(1));
            stream.mark(seq);
        }
        stream
    }

    /// Takes a datagram received at `at_us`, microseconds since 1970.
    pub fn take(&mut self, at_us: u64, datagram: &[u8], room: &mut Room, sink: &mut impl Sink) {
        sink.counts().datagrams += 1;
        match Datagram::parse(datagram) {
            Datagram::Extended(extended) => {
                self.extended(at_us, &extended, datagram, room, sink);
            }
            Datagram::Basic(text) => self.basic(at_us, text, room, sink),
            Datagram::Malformed(flaw) => {
                self.ensure_boot(at_us, sink);
                sink.counts().malformed += 1;
                sink.raw(at_us, datagram, Unfinished::Malformed(flaw));
            }
        }
    }

    /// When [`Self::expire`] has something to do, in microseconds since 1970.
    #[must_use]
    pub fn due(&self) -> Option<u64> {
        let held = self.held.as_ref().map(|held| held.oldest_us);
        let partial = self.partial.as_ref().map(|partial| partial.since_us);
        let since = held.into_iter().chain(partial).min()?;
        Some(since.saturating_add(HOLE_MICROS))
    }

    /// Gives on what has waited long enough. A clock that was set back ends all waiting.
    pub fn expire(&mut self, now_us: u64, room: &mut Room, sink: &mut impl Sink) {
        let is_over = |since_us: u64| since_us > now_us || now_us - since_us >= HOLE_MICROS;
        if self
            .partial
            .as_ref()
            .is_some_and(|partial| is_over(partial.since_us))
        {
            self.end_partial(room, sink);
        }
        let Some(held) = &self.held else {
            return;
        };
        let over = held
            .records
            .iter()
            .rev()
            .find(|(_, pieces)| is_over(pieces.since_us));
        if let Some((&seq, _)) = over {
            self.release(Some(seq), room, sink);
        }
    }

    /// Gives on everything that waits.
    pub fn finish(&mut self, room: &mut Room, sink: &mut impl Sink) {
        self.end_partial(room, sink);
        self.release(Some(u64::MAX), room, sink);
    }

    fn extended(
        &mut self,
        at_us: u64,
        extended: &Extended<'_>,
        datagram: &[u8],
        room: &mut Room,
        sink: &mut impl Sink,
    ) {
        let seq = extended.seq;
        let order = self.next.map(|next| (seq, next));
        let other_release = extended.release.is_some_and(|release| {
            self.release
                .as_deref()
                .is_some_and(|before| before != release)
        });
        let time_us = Some(extended.time_us);
        let another = |last: Last| other_release || last.is_of_another_boot(at_us, time_us, order);
        if self.last.is_none_or(another) {
            self.finish(room, sink);
            self.begin(at_us, Some(seq), extended.release, sink);
        }
        self.note(at_us, time_us);
        let next = *self.next.get_or_insert(seq);
        if self.has_seen(seq, next) {
            sink.counts().duplicates += 1;
        } else if extended.fragment.is_some() {
            self.hold(at_us, extended, datagram, room, sink);
        } else if seq < next {
            sink.counts().late += 1;
            self.emit(at_us, extended, extended.body, sink);
        } else if seq == next && self.held.is_none() {
            self.emit(at_us, extended, extended.body, sink);
        } else {
            self.hold(at_us, extended, datagram, room, sink);
        }
    }

    /// A boot begins, if there was none.
    fn ensure_boot(&mut self, at_us: u64, sink: &mut impl Sink) {
        if self.last.is_none() {
            self.begin(at_us, None, None, sink);
            self.note(at_us, None);
        }
    }

    fn begin(
        &mut self,
        at_us: u64,
        first: Option<u64>,
        release: Option<&str>,
        sink: &mut impl Sink,
    ) {
        let (held, partial) = (self.held.take(), self.partial.take());
        debug_assert!(held.is_none() && partial.is_none(), "finished before");
        *self = Self {
            release: release.map(Box::from),
            ..Self::default()
        };
        sink.counts().boots += 1;
        sink.boot(&BootStart {
            at_us,
            first,
            release,
        });
    }

    fn note(&mut self, at_us: u64, time_us: Option<u64>) {
        let latest = self.last.and_then(|last| last.time_us);
        self.last = Some(Last {
            at_us,
            time_us: latest.max(time_us),
        });
    }

    fn has_seen(&self, seq: u64, next: u64) -> bool {
        let before = next.wrapping_sub(seq);
        seq < next && before <= SEEN_RECORDS && self.seen[word(seq)] & bit(seq) != 0
    }

    fn mark(&mut self, seq: u64) {
        self.seen[word(seq)] |= bit(seq);
    }

    /// Makes `seq` the last record that came.
    fn advance(&mut self, seq: u64) {
        let next = self.next.unwrap_or(seq);
        if seq < next {
            if next - seq <= SEEN_RECORDS {
                self.mark(seq);
            }
            return;
        }
        for skipped in (next..seq).rev().take(self.seen.len() * 64) {
            self.seen[word(skipped)] &= !bit(skipped);
        }
        self.mark(seq);
        self.next = Some(seq.saturating_add(1));
    }

    fn emit(&mut self, at_us: u64, header: &Extended<'_>, body: &[u8], sink: &mut impl Sink) {
        self.pass_over(at_us, header.seq, body, sink);
        self.advance(header.seq);
        sink.counts().records += 1;
        sink.record(
            at_us,
            &Record {
                prefix: Some(header.prefix),
                seq: Some(header.seq),
                time_us: Some(header.time_us),
                flag: header.flag,
                caller: header.caller,
                body: Body::Escaped(body),
            },
        );
    }

    /// Tells the gap before record `seq`, if there is one.
    fn pass_over(&mut self, at_us: u64, seq: u64, body: &[u8], sink: &mut impl Sink) {
        let next = self.next.unwrap_or(seq);
        if seq < next {
            return;
        }
        let before = mem::replace(&mut self.msgid, msgid(body));
        if seq == next {
            return;
        }
        let between = before
            .zip(self.msgid)
            .map(|(before, after)| after.wrapping_sub(before));
        let lost = between.map(|between| u64::from(between.saturating_sub(1)).min(seq - next));
        sink.counts().gaps += seq - next;
        sink.counts().lost += lost.unwrap_or(0);
        if lost != Some(0) {
            let (first, last) = (next, seq - 1);
            sink.gap(at_us, Gap { first, last, lost });
        }
    }

    /// Keeps a datagram that cannot be given on yet.
    fn hold(
        &mut self,
        at_us: u64,
        extended: &Extended<'_>,
        datagram: &[u8],
        room: &mut Room,
        sink: &mut impl Sink,
    ) {
        let cost = datagram.len() + HELD_BOOKKEEPING_BYTES;
        let full = |held: &Held| {
            held.records.len() >= HELD_RECORDS_MAX || held.bytes + cost > HELD_BYTES_MAX
        };
        while self.held.as_deref().is_some_and(full) {
            self.give_up(room, sink);
        }
        if !room.take(cost) {
            self.release(Some(u64::MAX), room, sink);
            if extended.fragment.is_some() {
                sink.raw(at_us, datagram, Unfinished::Fragment);
            } else {
                self.emit(at_us, extended, extended.body, sink);
            }
            return;
        }
        let held = self.held.get_or_insert_with(|| {
            Box::new(Held {
                oldest_us: at_us,
                ..Held::default()
            })
        });
        let total = extended.fragment.map(|fragment| fragment.total);
        let pieces = held.records.entry(extended.seq).or_insert(Pieces {
            since_us: at_us,
            total,
            datagrams: BTreeMap::new(),
            body_bytes: 0,
            cost: 0,
        });
        let offset = extended.fragment.map_or(0, |fragment| fragment.offset);
        match pieces.place(offset, extended.body.len(), total) {
            Place::Free => {
                pieces.datagrams.insert(offset, datagram.into());
                pieces.body_bytes += extended.body.len();
                pieces.cost += cost;
                held.bytes += cost;
            }
            Place::Taken => {
                room.left += cost;
                sink.counts().duplicates += 1;
            }
            Place::Contradicts => {
                room.left += cost;
                sink.counts().malformed += 1;
                sink.raw(at_us, datagram, Unfinished::Fragment);
            }
        }
        self.release(None, room, sink);
    }

    /// Gives on the first record that waits, and with it the hole before it.
    fn give_up(&mut self, room: &mut Room, sink: &mut impl Sink) {
        let first = self
            .held
            .as_ref()
            .and_then(|held| held.records.keys().next());
        let through = first.copied().unwrap_or(u64::MAX);
        self.release(Some(through), room, sink);
    }

    /// Gives on what is in order, and all records up to `through`, in order or not.
    fn release(&mut self, through: Option<u64>, room: &mut Room, sink: &mut impl Sink) {
        let Some(mut held) = self.held.take() else {
            return;
        };
        let mut gone = false;
        while let Some(entry) = held.records.first_entry() {
            let seq = *entry.key();
            let follows = self.next.is_none_or(|next| seq <= next) && entry.get().is_whole();
            if !follows && through.is_none_or(|through| seq > through) {
                break;
            }
            let pieces = entry.remove();
            held.bytes -= pieces.cost;
            room.left += pieces.cost;
            gone = true;
            self.emit_pieces(seq, &pieces, sink);
        }
        if gone {
            let since = held.records.values().map(|pieces| pieces.since_us);
            held.oldest_us = since.min().unwrap_or(u64::MAX);
        }
        if !held.records.is_empty() {
            self.held = Some(held);
        }
    }

    fn emit_pieces(&mut self, seq: u64, pieces: &Pieces, sink: &mut impl Sink) {
        let parts = pieces
            .datagrams
            .values()
            .filter_map(|bytes| match Datagram::parse(bytes) {
                Datagram::Extended(extended) => Some(extended),
                Datagram::Basic(_) | Datagram::Malformed(_) => None,
            });
        let parts: Vec<Extended<'_>> = parts.collect();
        let Some(header) = parts.first() else {
            return;
        };
        if self.next.is_some_and(|next| seq < next) {
            sink.counts().late += 1;
        }
        let at_us = pieces.since_us;
        if let [whole] = parts.as_slice()
            && pieces.is_whole()
        {
            self.emit(at_us, header, whole.body, sink);
            return;
        }
        let mut body = Vec::with_capacity(pieces.body_bytes);
        for part in &parts {
            let Some(Fragment { offset, .. }) = part.fragment else {
                continue;
            };
            if offset > body.len() {
                body.resize(offset, HOLE_BYTE);
            }
            body.extend_from_slice(part.body);
        }
        if !pieces.is_whole() {
            let total = pieces.total.unwrap_or(body.len());
            body.resize(total, HOLE_BYTE);
            self.pass_over(at_us, seq, &body, sink);
            sink.counts().incomplete += 1;
            let have = pieces.body_bytes;
            sink.part(at_us, Part { seq, have, total });
            // The gap before it is told.
            self.next = self.next.max(Some(seq));
        }
        self.emit(at_us, header, &body, sink);
    }

    fn basic(&mut self, at_us: u64, text: &[u8], room: &mut Room, sink: &mut impl Sink) {
        self.ensure_boot(at_us, sink);
        // The end of the line before was lost.
        if self.partial.is_some() && Prefix::parse(text).0.time_us.is_some() {
            self.end_partial(room, sink);
        }
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            let ended = line.strip_suffix(b"\n");
            match (ended, self.partial.take()) {
                (Some(line), None) => self.basic_line(at_us, line, room, sink),
                (None, None) if !room.take(LINE_BYTES_MAX) => {
                    self.basic_line(at_us, line, room, sink);
                }
                (None, None) => {
                    let (since_us, bytes) = (at_us, line.to_vec());
                    self.partial = Some(Box::new(Partial { since_us, bytes }));
                }
                (ended, Some(mut partial)) => {
                    partial.bytes.extend_from_slice(ended.unwrap_or(line));
                    let over = ended.is_some() || partial.bytes.len() > LINE_BYTES_MAX;
                    self.partial = Some(partial);
                    if over {
                        self.end_partial(room, sink);
                    }
                }
            }
        }
    }

    fn end_partial(&mut self, room: &mut Room, sink: &mut impl Sink) {
        if let Some(partial) = self.partial.take() {
            room.left += LINE_BYTES_MAX;
            self.basic_line(partial.since_us, &partial.bytes, room, sink);
        }
    }

    fn basic_line(&mut self, at_us: u64, line: &[u8], room: &mut Room, sink: &mut impl Sink) {
        let (prefix, text) = Prefix::parse(line);
        let time_us = prefix.time_us;
        let another = |last: Last| {
            last.is_of_another_boot(at_us, time_us, None)
                || (time_us.is_none() && text.starts_with(FIRST_LINE))
        };
        if self.last.is_none_or(another) {
            self.finish(room, sink);
            self.begin(at_us, None, None, sink);
        }
        self.note(at_us, time_us);
        sink.counts().records += 1;
        sink.record(
            at_us,
            &Record {
                prefix: None,
                seq: None,
                time_us,
                flag: b'-',
                caller: prefix.caller,
                body: Body::Plain(text, &[]),
            },
        );
    }
}

/// Whether a piece of a record can be kept.
enum Place {
    Free,
    Taken,
    Contradicts,
}

impl Pieces {
    fn is_whole(&self) -> bool {
        match self.total {
            Some(total) => self.body_bytes == total,
            None => !self.datagrams.is_empty(),
        }
    }

    fn place(&self, offset: usize, length: usize, total: Option<usize>) -> Place {
        if self.datagrams.is_empty() {
            return Place::Free;
        }
        if total != self.total {
            return Place::Contradicts;
        }
        let body = |datagram: &[u8]| match Datagram::parse(datagram) {
            Datagram::Extended(extended) => extended.body.len(),
            Datagram::Basic(_) | Datagram::Malformed(_) => 0,
        };
        match self.datagrams.get(&offset) {
            Some(there) if body(there) == length => return Place::Taken,
            Some(_) => return Place::Contradicts,
            None => {}
        }
        let before = self.datagrams.range(..offset).next_back();
        let after = self.datagrams.range(offset..).next();
        let overlaps = before.is_some_and(|(at, there)| at + body(there) > offset)
            || after.is_some_and(|(&at, _)| offset + length > at);
        if overlaps {
            Place::Contradicts
        } else {
            Place::Free
        }
    }
}

/// What a console puts before a line.
#[derive(Default)]
struct Prefix {
    time_us: Option<u64>,
    caller: Option<Caller>,
}

impl Prefix {
    /// `[   12.345678] text` and `[   12.345678][  T123] text`; what follows is the text.
    fn parse(line: &[u8]) -> (Self, &[u8]) {
        let time = bracketed(line).and_then(|(time, rest)| {
            let (seconds, micros) = time.split_at(time.iter().position(|&byte| byte == b'.')?);
            let micros = micros.get(1..).filter(|micros| micros.len() == 6)?;
            let seconds = number::parse(seconds)?;
            Some((
                seconds
                    .checked_mul(1_000_000)?
                    .checked_add(number::parse(micros)?)?,
                rest,
            ))
        });
        let (time_us, rest) = match time {
            Some((time, rest)) => (Some(time), rest),
            None => return (Self::default(), line),
        };
        let caller =
            bracketed(rest).and_then(|(caller, rest)| Some((Caller::parse(caller)?, rest)));
        let (caller, rest) = caller.map_or((None, rest), |(caller, rest)| (Some(caller), rest));
        let text = rest.strip_prefix(b" ").unwrap_or(rest);
        (Self { time_us, caller }, text)
    }
}

/// What stands in brackets at the begin, without padding, and what follows.
fn bracketed(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let inside = text.strip_prefix(b"[")?;
    let reach = inside.get(..BRACKET_BYTES_MAX.min(inside.len()))?;
    let end = reach.iter().position(|&byte| byte == b']')?;
    Some((inside[..end].trim_ascii_start(), &inside[end + 1..]))
}

/// The host's count of what it sends, from the system data behind a text.
fn msgid(body: &[u8]) -> Option<u32> {
    let mut lines = body.split(|&byte| byte == b'\n').skip(1);
    let digits = lines.find_map(|line| line.strip_prefix(b" msgid="))?;
    u32::try_from(number::parse(digits)?).ok()
}

fn word(seq: u64) -> usize {
    usize::try_from(seq % SEEN_RECORDS / 64).unwrap_or(0)
}

fn bit(seq: u64) -> u64 {
    1 << (seq % 64)
}

/// The first text of every kernel, for those whose lines have no time.
const FIRST_LINE: &[u8] = b"Linux version ";
/// Time or caller with their padding.
const BRACKET_BYTES_MAX: usize = 24;
/// What stands for bytes that did not arrive. No text has it, so it is seen as `\x00`.
const HOLE_BYTE: u8 = 0;

#[cfg(test)]
mod tests;
