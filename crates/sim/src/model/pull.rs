//! The answer to a pull, which must tell every page of every range that was asked for, in order.

use proto::record::{PFN_MAX, RamRange, Tally, Totals};
use proto::units::Pfn;

/// An answer under way.
#[derive(Clone)]
pub(super) struct Answer {
    number: u32,
    ranges: Vec<RamRange>,
    index: usize,
    at: u64,
    pub(super) tally: Tally,
}

impl Answer {
    pub(super) const fn new(number: u32, ranges: Vec<RamRange>) -> Self {
        Self {
            number,
            ranges,
            index: 0,
            at: 0,
            tally: Tally::new(),
        }
    }

    pub(super) const fn number(&self) -> u32 {
        self.number
    }

    /// Takes `pages` pages from `first` on, which must be what comes next.
    pub(super) fn told(&mut self, first: Pfn, pages: u64) -> Result<(), String> {
        let (mut first, mut left) = (first.0, pages);
        while left > 0 {
            let Some((at, end)) = self.next() else {
                return Err(format!("pull {} tells more than was asked", self.number));
            };
            if at != first {
                return Err(format!(
                    "pull {} tells pfn {first} where pfn {at} comes next",
                    self.number
                ));
            }
            let taken = left.min(end - at);
            self.at = at + taken;
            first += taken;
            left -= taken;
        }
        Ok(())
    }

    /// The answer is over: nothing may be left, and the totals must be right.
    pub(super) fn end(mut self, totals: Totals) -> Result<(), String> {
        if let Some((at, _)) = self.next() {
            return Err(format!("pull {} leaves out pfn {at}", self.number));
        }
        let counted = self.tally.totals();
        if totals == counted {
            return Ok(());
        }
        let number = self.number;
        Err(format!(
            "pull {number} told {totals:?}, counted {counted:?}"
        ))
    }

    /// The page that comes next and the end of its range.
    fn next(&mut self) -> Option<(u64, u64)> {
        loop {
            let range = self.ranges.get(self.index)?;
            let first = range.first.get().min(PFN_MAX);
            let end = first.saturating_add(range.pages.get()).min(PFN_MAX);
            let at = self.at.max(first);
            if at < end {
                return Some((at, end));
            }
            self.index += 1;
            self.at = 0;
        }
    }
}
