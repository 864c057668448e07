//! The memory of a simulated host: every page's contents follow from the seed, so that nothing
//! needs to be stored.

use proto::client::{PageStatus, Pass};
use proto::record::RamRange;
use proto::units::{PAGE_BYTES, Pfn};

use crate::options::Options;
use crate::random::Random;

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All zero.
    Zero,
    /// Bytes that LZ4 shrinks.
    Ordinary,
    /// Bytes that it does not.
    Noise,
    /// Reading it fails.
    Unreadable,
}

/// What a filter level other than 0 leaves out, one page in this many.
const EXCLUDED_IN: u64 = 8;

/// A host's memory.
#[derive(Clone, Debug)]
pub struct Memory {
    seed: u64,
    ranges: Vec<RamRange>,
}

impl Memory {
    /// A memory of `pages` pages in up to three ranges with holes between them.
    #[must_use]
    pub fn new(seed: u64, pages: u64) -> Self {
        let mut random = Random::new(seed).fork(2);
        let mut ranges = Vec::new();
        let (mut first, mut left) = (1, pages);
        while left > 0 {
            let last = ranges.len() == 2;
            let length = if last { left } else { 1 + random.below(left) };
            ranges.push(RamRange {
                first: first.into(),
                pages: length.into(),
            });
            first += length + random.below(1000);
            left -= length;
        }
        Self { seed, ranges }
    }

    /// The memory of host `index` of a world. Hosts have different sizes.
    #[must_use]
    pub fn of(options: &Options, index: u64) -> Self {
        let pages = options.host.ram_pages.max(1);
        Self::new(options.seed ^ (index << 48), (pages >> index).max(1))
    }

    /// The ranges of System RAM.
    #[must_use]
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// All page frame numbers, ascending.
    pub fn pfns(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.ranges.iter().flat_map(|range| {
            let first = range.first.get();
            (first..first + range.pages.get()).map(Pfn)
        })
    }

    /// The page frame numbers from `first` up to, not including, `end`.
    pub fn pfns_between(&self, first: Pfn, end: Pfn) -> impl Iterator<Item = Pfn> + '_ {
        self.ranges.iter().flat_map(move |range| {
            let (from, to) = (range.first.get(), range.first.get() + range.pages.get());
            (from.max(first.0)..to.min(end.0)).map(Pfn)
        })
    }

    /// What page `pfn` is. Neighbours are often alike, as in real memory.
    #[must_use]
    pub fn content(&self, pfn: Pfn) -> Content {
        let neighbourhood = Random::new(self.seed ^ (pfn.0 >> 4)).fork(3).below(8);
        let own = Random::new(self.seed ^ pfn.0).fork(4).below(16);
        match (neighbourhood, own) {
            (0..3, 1..) | (_, 2..4) => Content::Zero,
            (_, 0) => Content::Unreadable,
            (3, _) | (_, 1) => Content::Noise,
            (_, _) => Content::Ordinary,
        }
    }

    /// Which pass a page belongs to.
    #[must_use]
    pub fn pass(&self, pfn: Pfn) -> Pass {
        let precious = Random::new(self.seed ^ (pfn.0 >> 3)).fork(5).below(5) == 0;
        if precious { Pass::Precious } else { Pass::Rest }
    }

    /// Whether filter level `filter` leaves page `pfn` out.
    #[must_use]
    pub fn excluded(&self, pfn: Pfn, filter: u8) -> bool {
        filter > 0 && Random::new(self.seed ^ pfn.0).fork(7).below(EXCLUDED_IN) == 0
    }

    /// Reads page `pfn` into `out` for `pass`.
    pub fn read(&self, pfn: Pfn, pass: Pass, filter: u8, out: &mut [u8]) -> PageStatus {
        if pass != Pass::Both && self.pass(pfn) != pass {
            return PageStatus::OtherPass;
        }
        if self.excluded(pfn, filter) {
            return PageStatus::Excluded;
        }
        let mut random = Random::new(self.seed ^ pfn.0).fork(6);
        match self.content(pfn) {
            Content::Unreadable => return PageStatus::Unreadable,
            Content::Zero => out.fill(0),
            Content::Noise => {
                for word in out.chunks_mut(8) {
                    let bytes = random.draw().to_le_bytes();
                    word.copy_from_slice(&bytes[..word.len()]);
                }
            }
            Content::Ordinary => {
                let word = random.draw().to_le_bytes();
                for (index, byte) in out.iter_mut().enumerate() {
                    *byte = word[index % 7] ^ u8::from(index % 97 == 0);
                }
            }
        }
        PageStatus::Read
    }

    /// The bytes of page `pfn`, or `None` if it cannot be read.
    #[must_use]
    pub fn page(&self, pfn: Pfn) -> Option<[u8; PAGE_BYTES]> {
        let mut page = [0; PAGE_BYTES];
        let status = self.read(pfn, Pass::Both, 0, &mut page);
        (status == PageStatus::Read).then_some(page)
    }
}
