//! The composer: in which order what is asked for and how it becomes stream bytes.
//!
//! At any time there is at most one record on its way into packets: a short head (header, run
//! length) and a body that lies in the scratch buffer or, compressed, in the block buffer. Nothing
//! is asked for while a record is pending, so the scratch buffer is never overwritten under it.

use zerocopy::IntoBytes;

use crate::client::pull::{Piece, Pulls};
use crate::client::walk::{RamMap, Walk};
use crate::client::{PageStatus, Pass, Want};
use crate::lz4::Table;
use crate::record::{
    self, BLOCK_BYTES, BLOCK_PAGES, Codec, Ending, Hello, Kind, RECORD_HEADER_BYTES, Run, Tally,
};
use crate::reply::{Pull, Verdict};
use crate::units::{PAGE_BYTES, Pfn};

/// Pieces of the kernel log: 32 of 64 KiB, 2 MiB. The kernel's ring buffer is seldom larger.
const TEXT_PIECES_MAX: u64 = 32;
/// Pieces of the State text: 4 MiB.
const STATE_PIECES_MAX: u64 = 64;
/// Pieces of devices: 4 MiB, of about 1000 devices with all of their configuration space.
const DEVICE_PIECES_MAX: u64 = 64;
const HEAD_BYTES: usize = RECORD_HEADER_BYTES + 8;

/// What the server has told, and whether it has all so far.
#[derive(Clone, Copy)]
pub(super) struct Told {
    pub(super) verdict: Verdict,
    /// All bytes so far are acknowledged.
    pub(super) settled: bool,
    /// The server knows the records of hardware state.
    pub(super) knows_hardware: bool,
}

/// What comes next.
pub(super) enum Next<'a> {
    /// These bytes of the stream. [`Composer::consume`] tells how many were taken.
    Bytes(&'a [u8]),
    /// Nothing before this is read.
    Read(Want),
    /// Nothing before the server says something, or nothing any more.
    Blocked,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Text {
        piece: u64,
    },
    Registers {
        index: u32,
    },
    Notes,
    MemoryMap,
    /// Waits for a verdict.
    Verdict,
    /// It was given, and with it what the server knows.
    Processors {
        index: u32,
    },
    /// Waits for a verdict again: it may have changed.
    Decided,
    Pages(Walk),
    Totals,
    Written,
    /// Waits until everything so far is acknowledged: a device that does not answer may stop the
    /// machine for good.
    SettleDevices,
    Devices {
        piece: u64,
    },
    /// The same before the State text: the kernel may not survive it.
    Settle,
    State {
        piece: u64,
    },
    End(Ending),
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Scratch,
    Block,
}

/// The record on its way: what is left of its head, then what is left of its body.
#[derive(Clone, Copy)]
struct Pending {
    head: [u8; HEAD_BYTES],
    head_from: usize,
    head_to: usize,
    source: Source,
    body_from: usize,
    body_to: usize,
}

/// The pages in the scratch buffer that are not composed yet.
#[derive(Clone, Copy)]
struct Batch {
    first: Pfn,
    at: usize,
    count: usize,
    /// How many were asked for and are not there yet.
    asked: usize,
    statuses: [PageStatus; BLOCK_PAGES],
}

pub(super) struct Composer {
    stage: Stage,
    pending: Pending,
    batch: Batch,
    /// Pages without contents that are not told yet.
    run: Option<Run>,
    ram: RamMap,
    tally: Tally,
    pulls: Pulls,
    table: Table,
    scratch: [u8; BLOCK_BYTES],
    block: [u8; BLOCK_BYTES],
}

const NOTHING_PENDING: Pending = Pending {
    head: [0; HEAD_BYTES],
    head_from: 0,
    head_to: 0,
    source: Source::Scratch,
    body_from: 0,
    body_to: 0,
};

const NO_BATCH: Batch = Batch {
    first: Pfn(0),
    at: 0,
    count: 0,
    asked: 0,
    statuses: [PageStatus::Unreadable; BLOCK_PAGES],
};

impl Composer {
    pub(super) const fn new() -> Self {
        Self {
            stage: Stage::Done,
            pending: NOTHING_PENDING,
            batch: NO_BATCH,
            run: None,
            ram: RamMap::new(),
            tally: Tally::new(),
            pulls: Pulls::new(),
            table: Table::new(),
            scratch: [0; BLOCK_BYTES],
            block: [0; BLOCK_BYTES],
        }
    }

    pub(super) fn start(&mut self, hello: &Hello) {
        self.batch = NO_BATCH;
        self.run = None;
        self.ram.clear();
        self.tally = Tally::new();
        self.pulls = Pulls::new();
        self.stage = Stage::Text { piece: 0 };
        let bytes = hello.as_bytes();
        if let Some(to) = self.scratch.get_mut(..bytes.len()) {
            to.copy_from_slice(bytes);
        }
        self.scratch_record(Kind::Hello, bytes.len(), 0);
    }

    pub(super) fn scratch(&mut self) -> &mut [u8; BLOCK_BYTES] {
        &mut self.scratch
    }

    pub(super) fn totals(&self) -> record::Totals {
        self.tally.totals()
    }

    /// Whether the stream has been composed to its end.
    pub(super) fn done(&self) -> bool {
        self.stage == Stage::Done
            && self.pending() == 0
            && !self.pulls.waits()
            && !self.pulls.under_way()
    }

    /// The server asks for pages.
    pub(super) fn pull(&mut self, pull: Pull<'_>) {
        self.pulls.ask(pull);
    }

    /// Stream bytes that can be had without a further question.
    pub(super) fn pending(&self) -> usize {
        let Pending {
            head_from,
            head_to,
            body_from,
            body_to,
            ..
        } = self.pending;
        head_to
            .saturating_sub(head_from)
            .saturating_add(body_to.saturating_sub(body_from))
    }

    /// The next bytes of the stream.
    pub(super) fn next(&mut self, told: Told) -> Next<'_> {
        while self.pending() == 0 {
            match self.advance(told) {
                Advance::Composed => {}
                Advance::Read(want) => return Next::Read(want),
                Advance::Blocked => return Next::Blocked,
            }
        }
        let Pending {
            head,
            head_from,
            head_to,
            source,
            body_from,
            body_to,
        } = &self.pending;
        let bytes = match source {
            _ if head_from < head_to => head.get(*head_from..*head_to),
            Source::Scratch => self.scratch.get(*body_from..*body_to),
            Source::Block => self.block.get(*body_from..*body_to),
        };
        Next::Bytes(bytes.unwrap_or_default())
    }

    /// Takes `bytes` of what [`Self::next`] gave.
    pub(super) fn consume(&mut self, bytes: usize) {
        let pending = &mut self.pending;
        if pending.head_from < pending.head_to {
            pending.head_from = pending.head_from.saturating_add(bytes);
        } else {
            pending.body_from = pending.body_from.saturating_add(bytes);
        }
    }

    /// What was asked for last lies in the first `bytes` of the scratch buffer.
    pub(super) fn filled(&mut self, bytes: usize) {
        let bytes = bytes.min(BLOCK_BYTES);
        let (kind, argument, next) = match self.stage {
            Stage::Text { .. } if bytes == 0 => return self.stage = Stage::Registers { index: 0 },
            Stage::Registers { .. } if bytes == 0 => return self.stage = Stage::Notes,
            Stage::Processors { .. } if bytes == 0 => return self.stage = Stage::Decided,
            Stage::Devices { .. } if bytes == 0 => return self.stage = Stage::Settle,
            Stage::State { .. } if bytes == 0 => return self.stage = Stage::End(Ending::Complete),
            Stage::Text { piece } => {
                let next = piece.saturating_add(1);
                let more = Stage::Text { piece: next };
                let stage = if next < TEXT_PIECES_MAX {
                    more
                } else {
                    Stage::Registers { index: 0 }
                };
                (Kind::Text, piece, stage)
            }
            Stage::Registers { index } => {
                let next = Stage::Registers {
                    index: index.saturating_add(1),
                };
                (Kind::Registers, self.cpu_number(), next)
            }
            Stage::Notes => (Kind::Notes, 0, Stage::MemoryMap),
            Stage::MemoryMap => {
                self.ram.keep(self.scratch.get(..bytes).unwrap_or_default());
                (Kind::MemoryMap, 0, Stage::Verdict)
            }
            Stage::Processors { index } => {
                let index = index.saturating_add(1);
                let next = Stage::Processors { index };
                (Kind::Processor, self.cpu_number(), next)
            }
            Stage::Written => (Kind::Written, 0, Stage::SettleDevices),
            Stage::Devices { piece } => {
                let next = piece.saturating_add(1);
                let more = Stage::Devices { piece: next };
                let stage = if next < DEVICE_PIECES_MAX {
                    more
                } else {
                    Stage::Settle
                };
                (Kind::Devices, piece, stage)
            }
            Stage::State { piece } => {
                let next = piece.saturating_add(1);
                let more = Stage::State { piece: next };
                let end = Stage::End(Ending::Complete);
                (
                    Kind::State,
                    piece,
                    if next < STATE_PIECES_MAX { more } else { end },
                )
            }
            // Nothing was asked for, or pages were: a caller's mistake that must not spoil the
            // stream.
            Stage::Verdict
            | Stage::Decided
            | Stage::Pages(_)
            | Stage::Totals
            | Stage::SettleDevices
            | Stage::Settle
            | Stage::End(_)
            | Stage::Done => return,
        };
        self.stage = next;
        self.scratch_record(kind, bytes, argument);
    }

    /// The pages that were asked for lie in the scratch buffer.
    pub(super) fn pages(&mut self, statuses: &[PageStatus]) {
        // What was not answered counts as unreadable; more than was asked for is ignored.
        for (to, from) in self.batch.statuses.iter_mut().zip(statuses) {
            *to = *from;
        }
        self.batch.count = core::mem::take(&mut self.batch.asked);
    }

    /// So many pages from the first one that was asked for have this status and no contents.
    pub(super) fn pages_alike(&mut self, pages: u64, status: PageStatus) {
        let (first, asked) = (self.batch.first, widen(self.batch.asked));
        self.batch = NO_BATCH;
        if asked == 0 {
            return;
        }
        let pulled = self.pulls.under_way();
        let mut beyond = 0;
        if let (Stage::Pages(walk), false) = (&mut self.stage, pulled) {
            beyond = walk.skip(&self.ram, first.plus(pages));
        }
        let why = match status {
            PageStatus::OtherPass => return,
            PageStatus::Excluded => Kind::Excluded,
            PageStatus::Read | PageStatus::Unreadable => Kind::Unreadable,
        };
        self.add_run(Run {
            first,
            pages: asked.saturating_add(beyond),
            why,
        });
    }

    /// The kernel faulted while it wrote the State text.
    pub(super) fn state_faulted(&mut self) {
        if matches!(self.stage, Stage::State { .. }) {
            self.stage = Stage::End(Ending::StateFaulted);
        }
    }

    /// Goes one step on, with nothing pending.
    fn advance(&mut self, told: Told) -> Advance {
        let verdict = told.verdict;
        if self.batch.at < self.batch.count {
            return self.compose_pages();
        }
        if self.pulls.under_way() || (self.pulls.waits() && self.may_pull()) {
            return self.advance_pull(verdict);
        }
        match self.stage {
            Stage::Text { .. } => Advance::Read(Want::Text),
            Stage::Registers { index } => Advance::Read(Want::Registers(index)),
            Stage::Notes => Advance::Read(Want::Notes),
            Stage::MemoryMap => Advance::Read(Want::MemoryMap),
            Stage::Verdict if told.is_decided() && told.knows_hardware => {
                self.enter(Stage::Processors { index: 0 })
            }
            Stage::Processors { index } => Advance::Read(Want::Processor(index)),
            Stage::Verdict | Stage::Decided => match verdict {
                Verdict::LogOnly => self.enter(Stage::SettleDevices),
                Verdict::Full { .. } => self.enter(Stage::Pages(Walk::BEGIN)),
                Verdict::Undecided
                | Verdict::Nothing
                | Verdict::Wait { .. }
                | Verdict::Hold { .. }
                | Verdict::Redirect { .. } => Advance::Blocked,
            },
            Stage::Pages(walk) => self.advance_walk(verdict, walk),
            Stage::Totals => {
                let totals = self.tally.totals();
                self.enter(Stage::Written);
                self.copied_record(Kind::Totals, totals.as_bytes(), 0)
            }
            Stage::Written => Advance::Read(Want::Written),
            Stage::SettleDevices if !told.knows_hardware => self.enter(Stage::Settle),
            Stage::SettleDevices if told.settled => self.enter(Stage::Devices { piece: 0 }),
            Stage::SettleDevices => Advance::Blocked,
            Stage::Devices { .. } => Advance::Read(Want::Devices),
            Stage::Settle if told.settled => self.enter(Stage::State { piece: 0 }),
            Stage::Settle => Advance::Blocked,
            Stage::State { .. } => Advance::Read(Want::State),
            Stage::End(ending) => {
                self.stage = Stage::Done;
                self.scratch_record(Kind::End, 0, ending.to_wire());
                Advance::Composed
            }
            Stage::Done => Advance::Blocked,
        }
    }

    fn enter(&mut self, stage: Stage) -> Advance {
        self.stage = stage;
        Advance::Composed
    }

    fn advance_walk(&mut self, verdict: Verdict, walk: Walk) -> Advance {
        let filter = match verdict {
            Verdict::Full { filter } => filter,
            // The server changed its mind: what is sent so far counts.
            Verdict::LogOnly => return self.finish_pages(),
            Verdict::Undecided
            | Verdict::Nothing
            | Verdict::Wait { .. }
            | Verdict::Hold { .. }
            | Verdict::Redirect { .. } => return Advance::Blocked,
        };
        let Some((first, count, next)) = walk.next(&self.ram) else {
            return self.finish_pages();
        };
        self.stage = Stage::Pages(next);
        self.ask_pages(first, count, next.pass, filter)
    }

    fn finish_pages(&mut self) -> Advance {
        self.stage = Stage::Totals;
        self.flush_run()
    }

    /// Whether a pull can be begun: the memory map is known and the kernel is not writing text.
    const fn may_pull(&self) -> bool {
        matches!(
            self.stage,
            Stage::Verdict
                | Stage::Decided
                | Stage::Pages(_)
                | Stage::SettleDevices
                | Stage::Settle
                | Stage::Done
        )
    }

    /// Goes one step on with a pull.
    fn advance_pull(&mut self, verdict: Verdict) -> Advance {
        if !self.pulls.under_way() {
            // What the walk has told of a run belongs before the pull.
            if self.run.is_some() {
                return self.flush_run();
            }
            let (number, ranges) = self.pulls.begin();
            let body = ranges.as_bytes();
            if let Some(to) = self.scratch.get_mut(..body.len()) {
                to.copy_from_slice(body);
            }
            let bytes = body.len();
            self.scratch_record(Kind::PullBegin, bytes, u64::from(number));
            return Advance::Composed;
        }
        match self.pulls.next(&self.ram, widen(BLOCK_PAGES)) {
            Piece::Ram(first, pages) => {
                let count = u16::try_from(pages).unwrap_or(0);
                let filter = match verdict {
                    Verdict::Hold { filter } => filter,
                    Verdict::Undecided
                    | Verdict::Full { .. }
                    | Verdict::LogOnly
                    | Verdict::Nothing
                    | Verdict::Wait { .. }
                    | Verdict::Redirect { .. } => 0,
                };
                self.ask_pages(first, count, Pass::Both, filter)
            }
            Piece::Hole(first, pages) => {
                let why = Kind::Unreadable;
                self.add_run(Run { first, pages, why })
            }
            Piece::Over if self.run.is_some() => self.flush_run(),
            Piece::Over => {
                let totals = self.pulls.tally.totals();
                let number = self.pulls.end();
                self.copied_record(Kind::PullEnd, totals.as_bytes(), u64::from(number))
            }
        }
    }

    fn ask_pages(&mut self, first: Pfn, count: u16, pass: Pass, filter: u8) -> Advance {
        self.batch = Batch {
            first,
            asked: count.into(),
            ..NO_BATCH
        };
        Advance::Read(Want::Pages {
            first,
            count,
            pass,
            filter,
        })
    }

    /// Composes the next record of the batch: a block, or a run that something else now follows.
    fn compose_pages(&mut self) -> Advance {
        let Batch {
            first, at, count, ..
        } = self.batch;
        let mut end = at;
        let kind = self.content(at);
        while end < count && self.content(end) == kind {
            end = end.saturating_add(1);
        }
        let (pfn, pages) = (first.plus(widen(at)), widen(end.saturating_sub(at)));
        let why = match kind {
            Content::OtherPass => {
                self.batch.at = end;
                return Advance::Composed;
            }
            Content::Data => {
                // A run that lies before the block goes first; the block is taken up again
                // afterwards.
                if self.run.is_some() {
                    return self.flush_run();
                }
                self.batch.at = end;
                return self.compose_block(pfn, at, end);
            }
            Content::Zero => Kind::Zero,
            Content::Unreadable => Kind::Unreadable,
            Content::Excluded => Kind::Excluded,
        };
        self.batch.at = end;
        self.add_run(Run {
            first: pfn,
            pages,
            why,
        })
    }

    /// Adds pages without contents to the run; if they do not continue it, composes it and begins
    /// another one.
    fn add_run(&mut self, more: Run) -> Advance {
        if let Some(run) = &mut self.run
            && run.why == more.why
            && run.first.plus(run.pages) == more.first
        {
            run.pages = run.pages.saturating_add(more.pages);
            return Advance::Composed;
        }
        let advance = self.flush_run();
        self.run = Some(more);
        advance
    }

    fn compose_block(&mut self, first: Pfn, at: usize, end: usize) -> Advance {
        let (from, to) = (
            at.saturating_mul(PAGE_BYTES),
            end.saturating_mul(PAGE_BYTES),
        );
        let Some(raw) = self.scratch.get(from..to) else {
            return Advance::Composed;
        };
        tally(&mut self.pulls, &mut self.tally).block(first, raw);
        let pages = widen(end.saturating_sub(at));
        // An output shorter than the input: what does not shrink is sent as it is.
        let shrunk = self.block.get_mut(..raw.len().saturating_sub(1));
        let compressed = shrunk.and_then(|output| self.table.compress(raw, output));
        let (codec, source, body_from, body_to) = match compressed {
            Some(bytes) => (Codec::Lz4, Source::Block, 0, bytes),
            None => (Codec::Raw, Source::Scratch, from, to),
        };
        let length = u32::try_from(body_to.saturating_sub(body_from)).unwrap_or(0);
        let pages = u16::try_from(pages).unwrap_or(0);
        self.pending = Pending {
            head_to: RECORD_HEADER_BYTES,
            source,
            body_from,
            body_to,
            ..NOTHING_PENDING
        };
        self.set_head(&record::header(Kind::Pages, codec, pages, length, first.0));
        Advance::Composed
    }

    /// Composes the run, if there is one.
    fn flush_run(&mut self) -> Advance {
        let Some(run) = self.run.take() else {
            return Advance::Composed;
        };
        tally(&mut self.pulls, &mut self.tally).run(&run);
        let Run { first, pages, why } = run;
        let [a, b, c, d, e, f, g, h] = pages.to_le_bytes();
        self.pending = Pending {
            head_to: HEAD_BYTES,
            ..NOTHING_PENDING
        };
        self.set_head(&record::header(why, Codec::Raw, 0, 8, first.0));
        if let Some(body) = self.pending.head.last_chunk_mut::<8>() {
            *body = [a, b, c, d, e, f, g, h];
        }
        Advance::Composed
    }

    fn content(&self, at: usize) -> Content {
        match self.batch.statuses.get(at) {
            Some(PageStatus::Read) if self.is_zero(at) => Content::Zero,
            Some(PageStatus::Read) => Content::Data,
            Some(PageStatus::Unreadable) => Content::Unreadable,
            Some(PageStatus::Excluded) => Content::Excluded,
            Some(PageStatus::OtherPass) | None => Content::OtherPass,
        }
    }

    fn is_zero(&self, at: usize) -> bool {
        let (pages, _) = self.scratch.as_chunks::<PAGE_BYTES>();
        let Some(page) = pages.get(at) else {
            return false;
        };
        let (words, _) = page.as_chunks::<8>();
        words.iter().all(|word| *word == [0; 8])
    }

    fn cpu_number(&self) -> u64 {
        self.scratch
            .first_chunk::<4>()
            .map_or(0, |cpu| u64::from(u32::from_le_bytes(*cpu)))
    }

    fn copied_record(&mut self, kind: Kind, body: &[u8], argument: u64) -> Advance {
        if let Some(to) = self.scratch.get_mut(..body.len()) {
            to.copy_from_slice(body);
        }
        self.scratch_record(kind, body.len(), argument);
        Advance::Composed
    }

    fn scratch_record(&mut self, kind: Kind, bytes: usize, argument: u64) {
        let length = u32::try_from(bytes).unwrap_or(0);
        self.pending = Pending {
            head_to: RECORD_HEADER_BYTES,
            body_to: bytes,
            ..NOTHING_PENDING
        };
        self.set_head(&record::header(kind, Codec::Raw, 0, length, argument));
    }

    fn set_head(&mut self, header: &[u8; RECORD_HEADER_BYTES]) {
        for (to, from) in self.pending.head.iter_mut().zip(header) {
            *to = *from;
        }
    }
}

impl Told {
    /// Whether it is known if pages are wanted.
    const fn is_decided(self) -> bool {
        matches!(self.verdict, Verdict::LogOnly | Verdict::Full { .. })
    }
}

/// What came of one step.
enum Advance {
    /// Something changed: look again.
    Composed,
    Read(Want),
    Blocked,
}

/// What one page of a batch holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Data,
    Zero,
    Unreadable,
    Excluded,
    OtherPass,
}

/// What the pages that are composed now count for: the pull or the walk.
const fn tally<'a>(pulls: &'a mut Pulls, walk: &'a mut Tally) -> &'a mut Tally {
    if pulls.under_way() {
        &mut pulls.tally
    } else {
        walk
    }
}

/// A small count as a 64-bit one.
fn widen(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[expect(
    clippy::arithmetic_side_effects,
    reason = "a test that overflows fails"
)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;
    use crate::record::{RamRange, Record, decode};

    /// The numbers of the kinds that a server gets that knows hardware state or does not. Nothing is
    /// acknowledged before the composer waits for it.
    fn kinds(verdict: Verdict, knows_hardware: bool) -> Vec<u8> {
        let mut composer = Composer::new();
        composer.start(&zerocopy::FromZeros::new_zeroed());
        let (mut stream, mut settled, mut devices) = (Vec::new(), false, 12);
        while !composer.done() {
            let told = Told {
                verdict,
                settled,
                knows_hardware,
            };
            let want = match composer.next(told) {
                Next::Bytes(bytes) => {
                    stream.extend_from_slice(bytes);
                    let taken = bytes.len();
                    composer.consume(taken);
                    settled = false;
                    continue;
                }
                Next::Blocked => {
                    assert!(!settled, "it waits for nothing");
                    settled = true;
                    continue;
                }
                Next::Read(want) => want,
            };
            composer.scratch().fill(0);
            let bytes = match want {
                Want::Pages { pass, .. } => {
                    let other = (pass == Pass::Precious).then_some(PageStatus::OtherPass);
                    composer.pages(&[other.unwrap_or(PageStatus::Unreadable)]);
                    continue;
                }
                Want::MemoryMap => {
                    composer.scratch()[8] = 1;
                    16
                }
                Want::Devices => {
                    assert!(
                        settled || devices == 0,
                        "all is there before devices are asked"
                    );
                    core::mem::take(&mut devices)
                }
                Want::Processor(0) => 8,
                Want::Text
                | Want::Registers(_)
                | Want::Notes
                | Want::Written
                | Want::Processor(_)
                | Want::State => 0,
            };
            composer.filled(bytes);
        }
        let (mut kinds, mut rest) = (vec![], stream.as_slice());
        while let Ok(Some(decoded)) = decode(rest) {
            kinds.push(rest[0]);
            rest = &rest[decoded.bytes..];
        }
        assert!(rest.is_empty(), "{} bytes are no record", rest.len());
        kinds
    }

    #[test]
    fn hardware_state_goes_to_who_knows_it() {
        let full = Verdict::Full { filter: 0 };
        // Hello, Notes, MemoryMap, Processor, Unreadable, Totals, Written, Devices, End.
        assert_eq!(kinds(full, true), [1, 4, 5, 16, 8, 10, 11, 17, 13]);
        assert_eq!(kinds(full, false), [1, 4, 5, 8, 10, 11, 13]);
        assert_eq!(kinds(Verdict::LogOnly, true), [1, 4, 5, 16, 17, 13]);
        assert_eq!(kinds(Verdict::LogOnly, false), [1, 4, 5, 13]);
    }

    /// Composes all of two ranges of which every page is excluded, answering each question for
    /// `pages` pages. Gives the runs, the excluded pages of Totals, and the questions for pages.
    fn compose(pages: u64) -> (Vec<Run>, u64, u32) {
        let ranges = [(0x10, 0x85), (0x100, 0x10)].map(|(first, pages): (u64, u64)| RamRange {
            first: first.into(),
            pages: pages.into(),
        });
        let mut composer = Composer::new();
        composer.start(&zerocopy::FromZeros::new_zeroed());
        let (mut stream, mut questions) = (Vec::new(), 0);
        while !composer.done() {
            let told = Told {
                verdict: Verdict::Full { filter: 31 },
                settled: true,
                knows_hardware: false,
            };
            let want = match composer.next(told) {
                Next::Bytes(bytes) => {
                    stream.extend_from_slice(bytes);
                    let taken = bytes.len();
                    composer.consume(taken);
                    continue;
                }
                Next::Read(want) => want,
                Next::Blocked => panic!("nothing holds it up"),
            };
            if let Want::Pages { pass, .. } = want {
                questions += 1;
                let other = (pass == Pass::Precious).then_some(PageStatus::OtherPass);
                composer.pages_alike(pages, other.unwrap_or(PageStatus::Excluded));
                continue;
            }
            let map = ranges.as_bytes();
            let bytes = if want == Want::MemoryMap {
                map.len()
            } else {
                0
            };
            composer.scratch()[..bytes].copy_from_slice(&map[..bytes]);
            composer.filled(bytes);
        }
        let (mut runs, mut excluded, mut rest) = (vec![], 0, stream.as_slice());
        while let Ok(Some(decoded)) = decode(rest) {
            if let Record::Run(run) = decoded.record {
                runs.push(run);
            } else if let Record::Totals(totals) = decoded.record {
                excluded = totals.excluded.get();
            }
            rest = &rest[decoded.bytes..];
        }
        assert!(rest.is_empty(), "{} bytes are no record", rest.len());
        (runs, excluded, questions)
    }

    #[test]
    fn a_run_is_told_at_once_and_ends_with_its_range() {
        let run = |first, pages| Run {
            first: Pfn(first),
            pages,
            why: Kind::Excluded,
        };
        let runs = vec![run(0x10, 0x85), run(0x100, 0x10)];
        assert_eq!(compose(u64::MAX), (runs.clone(), 0x95, 4));
        // Less than was asked for is taken for all of it; an odd end cuts the next block short.
        assert_eq!(compose(0), (runs.clone(), 0x95, 20));
        assert_eq!(compose(0x21), (runs, 0x95, 12));
    }
}
