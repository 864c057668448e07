//! RAM as a dense sequence: every page of RAM has an index, and sets of pages are bits by index.

use crate::page::{PFN_LIMIT, Pfn, RamRange};

/// Where each page of RAM comes in the sequence of all pages of RAM.
///
/// Invariant: the ranges are sorted, not empty, do not overlap, end below [`PFN_LIMIT`], and
/// `starts[i]` is the number of pages in all ranges before range `i`.
#[derive(Debug)]
pub(crate) struct RamMap {
    ranges: Vec<RamRange>,
    starts: Vec<usize>,
    pages: usize,
}

impl RamMap {
    /// Checks `ranges`; the error is a sentence about the first bad one.
    pub(crate) fn new(ranges: &[RamRange]) -> Result<Self, String> {
        let mut starts = Vec::with_capacity(ranges.len());
        let mut pages = 0_usize;
        let mut end = 0_u64;
        for range in ranges {
            let (first, count) = (range.first.0, range.pages);
            if count == 0 {
                return Err(format!("RAM range at pfn {first:#x} has no pages"));
            }
            if first < end {
                return Err(format!(
                    "RAM range at pfn {first:#x} begins before pfn {end:#x}, where the range before it ends; sort and merge the ranges"
                ));
            }
            end = range.end();
            if end > PFN_LIMIT.0 {
                return Err(format!(
                    "RAM range at pfn {first:#x} with {count:#x} pages passes the limit, pfn {:#x}",
                    PFN_LIMIT.0
                ));
            }
            starts.push(pages);
            pages = usize::try_from(count)
                .ok()
                .and_then(|count| pages.checked_add(count))
                .ok_or_else(|| format!("RAM range at pfn {first:#x}: too many pages"))?;
        }
        Ok(Self {
            ranges: ranges.to_vec(),
            starts,
            pages,
        })
    }

    pub(crate) const fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// The page number after the last page of RAM.
    pub(crate) fn end(&self) -> u64 {
        self.ranges.last().map_or(0, |range| range.end())
    }

    /// The place of `pfn` in the sequence, or `None` when it is not RAM.
    pub(crate) fn index(&self, pfn: Pfn) -> Option<usize> {
        let after = self.ranges.partition_point(|range| range.first <= pfn);
        let at = after.checked_sub(1)?;
        let (range, start) = (self.ranges.get(at)?, self.starts.get(at)?);
        if pfn.0 >= range.end() {
            return None;
        }
        Some(start + usize::try_from(pfn.0 - range.first.0).ok()?)
    }

    /// Whether all of `pages` pages from `first` on lie in one range.
    pub(crate) fn contains_run(&self, first: Pfn, pages: u64) -> bool {
        let after = self.ranges.partition_point(|range| range.first <= first);
        let range = after.checked_sub(1).and_then(|at| self.ranges.get(at));
        range.is_some_and(|range| first.0.saturating_add(pages) <= range.end())
    }

    /// Runs of pages that are in `set`, or not in it, in the order of their numbers. A run never
    /// crosses the end of a RAM range. Each comes with the index of its first page.
    pub(crate) fn runs<'a>(
        &'a self,
        set: &'a PageSet,
        inside: bool,
    ) -> impl Iterator<Item = (usize, RamRange)> + 'a {
        self.ranges
            .iter()
            .zip(&self.starts)
            .flat_map(move |(range, &start)| {
                let last = start + usize::try_from(range.pages).unwrap_or(0);
                let mut at = start;
                std::iter::from_fn(move || {
                    let from = set.next(at, last, inside)?;
                    at = set.next(from, last, !inside).unwrap_or(last);
                    let first = Pfn(range.first.0 + (from - start) as u64);
                    Some((
                        from,
                        RamRange {
                            first,
                            pages: (at - from) as u64,
                        },
                    ))
                })
            })
    }
}

/// A set of pages of RAM, one bit a page, by index.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            words: vec![0; pages.div_ceil(64)],
        }
    }

    /// Adds a page; false when it was there already. An index beyond the set is ignored.
    pub(crate) fn insert(&mut self, index: usize) -> bool {
        let bit = 1 << (index % 64);
        self.words.get_mut(index / 64).is_some_and(|word| {
            let fresh = *word & bit == 0;
            *word |= bit;
            fresh
        })
    }

    pub(crate) fn contains(&self, index: usize) -> bool {
        self.words
            .get(index / 64)
            .is_some_and(|word| word >> (index % 64) & 1 != 0)
    }

    /// The first index in `at..end` that is in the set (`inside`) or not in it.
    fn next(&self, mut at: usize, end: usize, inside: bool) -> Option<usize> {
        while at < end {
            let word = self.words.get(at / 64)?;
            let wanted = if inside { *word } else { !*word } >> (at % 64);
            if wanted != 0 {
                let found = at + wanted.trailing_zeros() as usize;
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}
