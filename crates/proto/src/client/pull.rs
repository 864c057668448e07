//! Pages that the server asks for by number, beyond its verdict: in hold, after a restart, or to
//! look before it decides. One pull is answered at a time; of those that wait, the latest counts,
//! because a reply says all that the server wants.

use crate::client::walk::RamMap;
use crate::record::{PFN_MAX, RamRange, Tally};
use crate::reply::{PULL_RANGES_MAX, Pull};
use crate::units::Pfn;

const NO_RANGE: RamRange = RamRange {
    first: zerocopy::little_endian::U64::ZERO,
    pages: zerocopy::little_endian::U64::ZERO,
};

/// What was asked for.
#[derive(Clone, Copy)]
struct Asked {
    number: u32,
    ranges: [RamRange; PULL_RANGES_MAX],
    used: usize,
}

const NOTHING: Asked = Asked {
    number: 0,
    ranges: [NO_RANGE; PULL_RANGES_MAX],
    used: 0,
};

/// The pull that is being answered and the one that waits.
pub(super) struct Pulls {
    latest: Asked,
    now: Asked,
    under_way: bool,
    /// The range of `now` that is being answered, and how far.
    index: usize,
    at: u64,
    /// What has been sent of `now`.
    pub(super) tally: Tally,
}

/// The next pages of a pull.
pub(super) enum Piece {
    /// These can be read: first page and how many.
    Ram(Pfn, u64),
    /// These are no System RAM.
    Hole(Pfn, u64),
    /// There are no more.
    Over,
}

impl Pulls {
    pub(super) const fn new() -> Self {
        Self {
            latest: NOTHING,
            now: NOTHING,
            under_way: false,
            index: 0,
            at: 0,
            tally: Tally::new(),
        }
    }

    /// Takes what a reply asks for.
    pub(super) fn ask(&mut self, pull: Pull<'_>) {
        if pull.number <= self.latest.number {
            return;
        }
        self.latest.number = pull.number;
        self.latest.used = pull.ranges.len().min(PULL_RANGES_MAX);
        for (to, from) in self.latest.ranges.iter_mut().zip(pull.ranges) {
            *to = *from;
        }
    }

    /// Whether a pull waits to be begun.
    pub(super) const fn waits(&self) -> bool {
        self.latest.number > self.now.number
    }

    /// Whether a pull is being answered.
    pub(super) const fn under_way(&self) -> bool {
        self.under_way
    }

    /// Begins the pull that waits; gives its number and ranges.
    pub(super) fn begin(&mut self) -> (u32, &[RamRange]) {
        self.now = self.latest;
        (self.under_way, self.index, self.at) = (true, 0, 0);
        self.tally = Tally::new();
        let ranges = self.now.ranges.get(..self.now.used);
        (self.now.number, ranges.unwrap_or_default())
    }

    /// Ends the pull that is being answered; gives its number.
    pub(super) const fn end(&mut self) -> u32 {
        self.under_way = false;
        self.now.number
    }

    /// The next pages, at most `most` if they can be read.
    pub(super) fn next(&mut self, ram: &RamMap, most: u64) -> Piece {
        while let Some(range) = self
            .now
            .ranges
            .get(..self.now.used)
            .and_then(|r| r.get(self.index))
        {
            let first = range.first.get().min(PFN_MAX);
            let end = first.saturating_add(range.pages.get()).min(PFN_MAX);
            let at = self.at.max(first);
            if at >= end {
                self.index = self.index.saturating_add(1);
                self.at = 0;
                continue;
            }
            let part = ram.part_from(at);
            let (from, to) = part.map_or((end, end), |part| (part.0.min(end), part.1.min(end)));
            let piece = if from > at {
                self.at = from;
                Piece::Hole(Pfn(at), from.saturating_sub(at))
            } else {
                let pages = to.saturating_sub(at).min(most);
                self.at = at.saturating_add(pages);
                Piece::Ram(Pfn(at), pages)
            };
            return piece;
        }
        Piece::Over
    }
}
