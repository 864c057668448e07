//! A set of pages as disjoint ranges: what has arrived, or what is still missing.

use std::collections::BTreeMap;

use proto::record::RamRange;
use proto::units::Pfn;

/// Ranges of one set. What would need more is not remembered: its pages then count as missing and
/// are sent once more. A range is some 50 bytes.
pub const RANGES_MAX: usize = 1 << 16;

/// Disjoint ranges that do not touch: first page to the page after the last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    ends: BTreeMap<u64, u64>,
    pages: u64,
}

impl Ranges {
    /// The pages of a memory map, or of any other list.
    #[must_use]
    pub fn of(list: &[RamRange]) -> Self {
        let mut set = Self::default();
        for range in list {
            set.add(Pfn(range.first.get()), range.pages.get());
        }
        set
    }

    /// Adds `pages` pages from `first` on; those that are in the set already change nothing.
    pub fn add(&mut self, first: Pfn, pages: u64) {
        let (mut begin, mut end) = (first.0, first.0.saturating_add(pages));
        if begin == end {
            return;
        }
        // Everything that overlaps or touches becomes part of the new range.
        while let Some((&other, &other_end)) = self.ends.range(..=end).next_back() {
            if other_end < begin {
                break;
            }
            self.ends.remove(&other);
            self.pages -= other_end - other;
            (begin, end) = (begin.min(other), end.max(other_end));
        }
        if self.ends.len() < RANGES_MAX {
            self.ends.insert(begin, end);
            self.pages += end - begin;
        }
    }

    /// Removes `pages` pages from `first` on.
    pub fn remove(&mut self, first: Pfn, pages: u64) {
        let (begin, end) = (first.0, first.0.saturating_add(pages));
        if begin == end {
            return;
        }
        while let Some((&other, &other_end)) = self.ends.range(..end).next_back() {
            if other_end <= begin {
                break;
            }
            self.ends.remove(&other);
            self.pages -= other_end - other;
            for (from, to) in [(other, begin.min(other_end)), (end.max(other), other_end)] {
                if from < to {
                    self.ends.insert(from, to);
                    self.pages += to - from;
                }
            }
            if other <= begin {
                break;
            }
        }
    }

    /// How many of `pages` pages from `first` on are in the set.
    #[must_use]
    pub fn overlap(&self, first: Pfn, pages: u64) -> u64 {
        let (begin, end) = (first.0, first.0.saturating_add(pages));
        let mut sum = 0;
        for (&other, &other_end) in self.ends.range(..end).rev() {
            if other_end <= begin {
                break;
            }
            sum += other_end.min(end) - other.max(begin);
        }
        sum
    }

    /// The first `ranges` ranges, cut so that they are `pages` pages at most.
    #[must_use]
    pub fn front(&self, ranges: usize, pages: u64) -> Vec<RamRange> {
        let mut room = pages;
        let mut front = Vec::new();
        for (&first, &end) in self.ends.iter().take(ranges) {
            let count = (end - first).min(room);
            if count == 0 {
                break;
            }
            room -= count;
            front.push(RamRange {
                first: first.into(),
                pages: count.into(),
            });
        }
        front
    }

    /// Pages in the set.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn list(set: &Ranges) -> Vec<(u64, u64)> {
        let front = set.front(usize::MAX, u64::MAX);
        let pair = |range: &RamRange| (range.first.get(), range.pages.get());
        front.iter().map(pair).collect()
    }

    #[test]
    fn ranges_behave_like_a_set_of_pages() {
        let (mut set, mut model) = (Ranges::default(), BTreeSet::new());
        let mut state = 1_u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..20_000 {
            let (first, pages) = (random(200), random(20));
            if random(2) == 0 {
                set.add(Pfn(first), pages);
                model.extend(first..first + pages);
            } else {
                set.remove(Pfn(first), pages);
                model.retain(|page| !(first..first + pages).contains(page));
            }
            assert_eq!(set.pages(), model.len() as u64);
            let (from, many) = (random(200), random(50));
            let overlap = model.range(from..from + many).count() as u64;
            assert_eq!(set.overlap(Pfn(from), many), overlap);
        }
        let flat: BTreeSet<u64> = list(&set)
            .into_iter()
            .flat_map(|(first, pages)| first..first + pages)
            .collect();
        assert_eq!(flat, model);
    }

    #[test]
    fn the_front_is_cut_to_ranges_and_pages() {
        let mut set = Ranges::default();
        for first in [0, 10, 20] {
            set.add(Pfn(first), 5);
        }
        assert_eq!(list(&set), [(0, 5), (10, 5), (20, 5)]);
        assert_eq!(set.front(2, 7).len(), 2);
        assert_eq!(set.front(2, 7)[1].pages.get(), 2);
        assert_eq!(set.front(2, 5).len(), 1);
    }

    #[test]
    fn what_is_too_scattered_is_forgotten_not_kept() {
        let mut set = Ranges::default();
        for index in 0..2 * RANGES_MAX as u64 {
            set.add(Pfn(2 * index), 1);
        }
        assert_eq!(set.ends.len(), RANGES_MAX);
        assert_eq!(set.pages(), RANGES_MAX as u64);
    }
}
