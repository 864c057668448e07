//! The memory map and the walk over it.

use zerocopy::little_endian::U64;

use crate::client::Pass;
use crate::record::{self, BLOCK_PAGES, RAM_RANGES_MAX, RamRange};
use crate::units::Pfn;

/// The ranges of System RAM, ascending and disjoint.
pub(super) struct RamMap {
    ranges: [RamRange; RAM_RANGES_MAX],
    used: usize,
}

/// How far memory has been walked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Walk {
    pub(super) pass: Pass,
    range: usize,
    at: u64,
}

impl RamMap {
    pub(super) const fn new() -> Self {
        let none = RamRange {
            first: U64::ZERO,
            pages: U64::ZERO,
        };
        Self {
            ranges: [none; RAM_RANGES_MAX],
            used: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.used = 0;
    }

    /// Keeps the body of a memory map; an illegal one is empty.
    pub(super) fn keep(&mut self, body: &[u8]) {
        let map = record::ram_map(body).unwrap_or_default();
        for (to, from) in self.ranges.iter_mut().zip(map) {
            *to = *from;
        }
        self.used = map.len();
    }

    /// First page and end of the System RAM at or after `at`.
    pub(super) fn part_from(&self, at: u64) -> Option<(u64, u64)> {
        let used = self.ranges.get(..self.used)?;
        used.iter()
            .map(|range| bounds(*range))
            .find(|(_, end)| at < *end)
            .map(|(first, end)| (first.max(at), end))
    }
}

impl Walk {
    /// At the begin of the first pass.
    pub(super) const BEGIN: Self = Self {
        pass: Pass::Precious,
        range: 0,
        at: 0,
    };

    /// The walk's next block and the walk after it; `None` when both passes are over. Blocks end at
    /// multiples of their size, so that both passes cut memory alike.
    pub(super) fn next(mut self, ram: &RamMap) -> Option<(Pfn, u16, Self)> {
        loop {
            let Some(range) = ram.ranges.get(..ram.used).and_then(|r| r.get(self.range)) else {
                if self.pass == Pass::Rest {
                    return None;
                }
                self = Self {
                    pass: Pass::Rest,
                    range: 0,
                    at: 0,
                };
                if ram.used == 0 {
                    return None;
                }
                continue;
            };
            let (first, end) = bounds(*range);
            let at = self.at.max(first);
            if at >= end {
                self.range = self.range.saturating_add(1);
                self.at = 0;
                continue;
            }
            let block_end = (at | BLOCK_PAGE_MASK).saturating_add(1).min(end);
            let count = u16::try_from(block_end.saturating_sub(at)).unwrap_or(0);
            return Some((
                Pfn(at),
                count,
                Self {
                    at: block_end,
                    ..self
                },
            ));
        }
    }
}

impl Walk {
    /// Leaves out what lies before `to` in the range under way, and says how many pages that are.
    pub(super) fn skip(&mut self, ram: &RamMap, to: Pfn) -> u64 {
        let range = ram.ranges.get(..ram.used).and_then(|r| r.get(self.range));
        let end = range.map_or(0, |range| bounds(*range).1);
        let from = self.at;
        self.at = from.max(to.0.min(end));
        self.at.saturating_sub(from)
    }
}

fn bounds(range: RamRange) -> (u64, u64) {
    let first = range.first.get();
    (first, first.saturating_add(range.pages.get()))
}

const BLOCK_PAGE_MASK: u64 = 15;
const _: () = assert!(
    BLOCK_PAGES == 16,
    "the mask must be one less than the pages of a block"
);
