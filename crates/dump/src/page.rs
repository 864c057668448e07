//! Page numbers, runs of pages, and what can be said of one page.

/// Bytes in a page. The formats allow others; x86-64 has only this one.
pub const PAGE_SIZE: usize = 4096;

/// The first page number that is refused: 2^36 pages are 256 TiB of physical addresses. It bounds
/// the bitmaps of a kdump-compressed file to 8 GiB each.
pub const PFN_LIMIT: Pfn = Pfn(1 << 36);

/// A page frame number: a physical address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The physical address of the page's first byte; wraps for numbers beyond any real machine.
    pub const fn address(self) -> u64 {
        self.0.wrapping_mul(PAGE_SIZE as u64)
    }
}

/// A run of pages that are RAM.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RamRange {
    /// The first page.
    pub first: Pfn,
    /// How many pages follow each other, the first included.
    pub pages: u64,
}

impl RamRange {
    /// The page number after the last page.
    pub const fn end(self) -> u64 {
        self.first.0.saturating_add(self.pages)
    }
}

/// One page as it is given to a writer.
#[derive(Clone, Copy, Debug)]
pub enum Page<'a> {
    /// The page's bytes.
    Data(&'a [u8; PAGE_SIZE]),
    /// 4096 zero bytes.
    Zero,
    /// Left out on purpose by the dump's filter.
    Excluded,
    /// RAM that could not be read (poisoned memory, a machine check).
    Unreadable,
}

/// What a vmcore has of one page.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PageState {
    /// The page is in the file.
    Data,
    /// Left out on purpose, or the file does not say why.
    Excluded,
    /// RAM that could not be read when the host crashed.
    Unreadable,
    /// RAM that never arrived: the dump is incomplete.
    Missing,
    /// Not RAM.
    NotRam,
}
