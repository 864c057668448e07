//! The kernel's memory by virtual address: page-table walk over the pages of a vmcore.
//!
//! Every byte may be hostile. A page table may point anywhere, so a walk has as many steps as the
//! machine has levels; pages are cached in bounded memory; and all reads of one vmcore together
//! have [`WORK_MAX`], so that lists and stacks that lead in circles end although each of their
//! steps is sound.

use std::collections::HashMap;
use std::fmt;

use dump::{DumpError, PAGE_SIZE, PageState, Pfn, Reader, Vmcoreinfo};

/// Pages kept unpacked: 64 MiB.
const CACHE_PAGES: usize = 16 * 1024;
/// Translations kept.
const TRANSLATIONS_MAX: usize = 256 * 1024;
/// What all reads of one vmcore may cost: one for each page touched and [`LOAD_WORK`] for each page
/// that had to be read from the file. The report of a host with ten thousand tasks takes a tenth.
const WORK_MAX: u64 = 1 << 26;
/// What a page from the file costs, compared with one from the cache.
const LOAD_WORK: u64 = 64;
/// The largest piece that is read at once.
pub(crate) const PIECE_MAX: usize = 64 << 20;

/// Where the kernel's image is linked.
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// The bits of a page-table entry that hold a physical address.
const ADDRESS_BITS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const PAGE: u64 = PAGE_SIZE as u64;
/// Entries of a page table.
const ENTRIES_MASK: u64 = 511;

/// Pages of physical memory.
pub trait Source {
    /// Reads a page; `page` has its bytes when the answer is [`PageState::Data`].
    ///
    /// # Errors
    /// The file is damaged here.
    fn page(&mut self, pfn: Pfn, page: &mut [u8; PAGE_SIZE]) -> Result<PageState, DumpError>;
}

impl Source for Reader {
    fn page(&mut self, pfn: Pfn, page: &mut [u8; PAGE_SIZE]) -> Result<PageState, DumpError> {
        self.read_page(pfn, page)
    }
}

/// Why something of the memory could not be read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Unread {
    /// The kernel maps nothing there.
    NotMapped {
        /// The virtual address.
        address: u64,
    },
    /// The page is not in the file.
    Absent {
        /// The virtual address, or the physical one of a page table.
        address: u64,
        /// The page.
        pfn: u64,
        /// Why it is not there.
        state: PageState,
    },
    /// All reads together were too many: something leads in circles.
    Exhausted,
    /// What was read makes no sense, or the kernel does not have it; the text says what.
    Strange(String),
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMapped { address } => write!(f, "nothing is mapped at {address:#x}"),
            Self::Absent {
                address,
                pfn,
                state,
            } => {
                let why = match state {
                    PageState::Excluded => "was left out of the dump",
                    PageState::Unreadable => "could not be read when the host crashed",
                    PageState::Missing => "never arrived",
                    PageState::NotRam => "is no RAM",
                    PageState::Data => "is there",
                };
                write!(f, "page {pfn:#x} for address {address:#x} {why}")
            }
            Self::Exhausted => write!(
                f,
                "more than {WORK_MAX} steps of work for one vmcore: its memory leads in circles"
            ),
            Self::Strange(what) => f.write_str(what),
        }
    }
}

impl Unread {
    pub(crate) fn strange(what: impl Into<String>) -> Self {
        Self::Strange(what.into())
    }
}

/// The memory of a crashed kernel.
pub(crate) struct Image<'a> {
    source: &'a mut dyn Source,
    /// The pages that were read, and where each is.
    pages: Vec<[u8; PAGE_SIZE]>,
    places: HashMap<u64, usize>,
    /// Pages by virtual page number.
    translations: HashMap<u64, usize>,
    /// The page touched last: virtual page number and place.
    last: Option<(u64, usize)>,
    /// Physical address of the top page table.
    root: u64,
    levels: u32,
    address_bits: u64,
    work: u64,
}

impl<'a> Image<'a> {
    pub(crate) fn new(source: &'a mut dyn Source, info: Vmcoreinfo<'_>) -> Result<Self, Unread> {
        let lacks = |what: &str| Unread::strange(format!("VMCOREINFO lacks {what}"));
        let top = info
            .symbol("init_top_pgt")
            .or_else(|| info.symbol("swapper_pg_dir"))
            .ok_or_else(|| lacks("SYMBOL(init_top_pgt), so memory has no addresses"))?;
        let phys_base = info.phys_base().ok_or_else(|| lacks("NUMBER(phys_base)"))?;
        let encrypted = info.number("sme_mask").unwrap_or(0).cast_unsigned();
        let address_bits = ADDRESS_BITS & !encrypted;
        Ok(Self {
            source,
            pages: Vec::new(),
            places: HashMap::new(),
            translations: HashMap::new(),
            last: None,
            root: top.wrapping_sub(START_KERNEL_MAP).wrapping_add(phys_base) & address_bits,
            levels: if info.five_level_paging() == Some(true) {
                5
            } else {
                4
            },
            address_bits,
            work: 0,
        })
    }

    /// Fills `bytes` from a virtual address.
    pub(crate) fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), Unread> {
        let mut address = address;
        let mut rest = bytes;
        while !rest.is_empty() {
            let place = self.place(address)?;
            let from = index(address % PAGE);
            let length = rest.len().min(PAGE_SIZE - from);
            let (now, later) = rest.split_at_mut(length);
            let page = self
                .pages
                .get(place)
                .and_then(|page| page.get(from..from + length));
            now.copy_from_slice(page.ok_or(Unread::Exhausted)?);
            rest = later;
            address = address.wrapping_add(length as u64);
        }
        Ok(())
    }

    pub(crate) fn array<const N: usize>(&mut self, address: u64) -> Result<[u8; N], Unread> {
        let mut bytes = [0; N];
        self.read(address, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn u64(&mut self, address: u64) -> Result<u64, Unread> {
        self.array(address).map(u64::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, address: u64) -> Result<u32, Unread> {
        self.array(address).map(u32::from_le_bytes)
    }

    pub(crate) fn i32(&mut self, address: u64) -> Result<i32, Unread> {
        self.array(address).map(i32::from_le_bytes)
    }

    /// An unsigned number of 1 to 8 bytes.
    pub(crate) fn number(&mut self, address: u64, bytes: u64) -> Result<u64, Unread> {
        let mut value = [0; 8];
        let length = index(bytes).min(8);
        let (used, _) = value.split_at_mut(length);
        self.read(address, used)?;
        Ok(u64::from_le_bytes(value))
    }

    /// So many bytes in fresh memory.
    pub(crate) fn bytes(&mut self, address: u64, count: u64) -> Result<Vec<u8>, Unread> {
        let length = index(count);
        if length > PIECE_MAX {
            return Err(Unread::strange(format!(
                "a piece of {count} bytes at {address:#x}; the limit is {PIECE_MAX}"
            )));
        }
        let found = self.stretch(address, length);
        if found.len() == length {
            return Ok(found);
        }
        let end = address.wrapping_add(found.len() as u64);
        Err(self.place(end).err().unwrap_or(Unread::Exhausted))
    }

    /// The bytes from an address on that can be read, at most so many.
    pub(crate) fn stretch(&mut self, address: u64, limit: usize) -> Vec<u8> {
        let mut found = Vec::new();
        let mut address = address;
        while found.len() < limit.min(PIECE_MAX) {
            let Ok(place) = self.place(address) else {
                break;
            };
            let from = index(address % PAGE);
            let length = (limit - found.len()).min(PAGE_SIZE - from);
            let page = self
                .pages
                .get(place)
                .and_then(|page| page.get(from..from + length));
            let Some(page) = page else { break };
            found.extend_from_slice(page);
            address = address.wrapping_add(length as u64);
        }
        found
    }

    /// Text up to a NUL, at most `limit` bytes; what is no printable ASCII becomes `?`.
    pub(crate) fn text(&mut self, address: u64, limit: usize) -> Result<String, Unread> {
        let bytes = self.stretch(address, limit);
        if bytes.is_empty() {
            self.place(address)?;
        }
        Ok(text(&bytes))
    }

    /// Where the page with a virtual address lies in `pages`.
    fn place(&mut self, address: u64) -> Result<usize, Unread> {
        self.spend(1)?;
        let page = address / PAGE;
        if let Some((last, place)) = self.last
            && last == page
        {
            return Ok(place);
        }
        let place = match self.translations.get(&page) {
            Some(&place) => place,
            None => {
                let physical = self.translate(address)?;
                let place = self.load(address, physical / PAGE)?;
                if self.translations.len() >= TRANSLATIONS_MAX {
                    self.translations.clear();
                }
                self.translations.insert(page, place);
                place
            }
        };
        self.last = Some((page, place));
        Ok(place)
    }

    /// The physical address of a virtual one.
    fn translate(&mut self, address: u64) -> Result<u64, Unread> {
        let unmapped = Unread::NotMapped { address };
        let top_bit = 11 + 9 * self.levels;
        let above = address >> top_bit;
        if above != 0 && above != u64::MAX >> top_bit {
            return Err(unmapped);
        }
        let mut table = self.root;
        for level in (0..self.levels).rev() {
            let shift = 12 + 9 * level;
            let entry_at = table | (((address >> shift) & ENTRIES_MASK) << 3);
            let entry = self.entry(entry_at)?;
            if entry & PRESENT == 0 {
                return Err(unmapped);
            }
            let is_last = level == 0 || (level <= 2 && entry & LARGE != 0);
            let inside = (1 << shift) - 1;
            let target = entry & self.address_bits;
            if is_last {
                return Ok((target & !inside) | (address & inside));
            }
            table = target;
        }
        Err(unmapped)
    }

    /// An entry of a page table.
    fn entry(&mut self, physical: u64) -> Result<u64, Unread> {
        let place = self.load(physical, physical / PAGE)?;
        let from = index(physical % PAGE);
        let bytes = self
            .pages
            .get(place)
            .and_then(|page| page.get(from..)?.first_chunk());
        bytes
            .map(|&bytes| u64::from_le_bytes(bytes))
            .ok_or(Unread::Exhausted)
    }

    /// Where a page of physical memory lies in `pages`, which it is brought to first.
    fn load(&mut self, address: u64, pfn: u64) -> Result<usize, Unread> {
        if let Some(&place) = self.places.get(&pfn) {
            return Ok(place);
        }
        self.spend(LOAD_WORK)?;
        if self.pages.len() >= CACHE_PAGES {
            self.pages.clear();
            self.places.clear();
            self.translations.clear();
            self.last = None;
        }
        let mut page = [0; PAGE_SIZE];
        let state = self
            .source
            .page(Pfn(pfn), &mut page)
            .map_err(|error| Unread::Strange(error.to_string()))?;
        if state != PageState::Data {
            return Err(Unread::Absent {
                address,
                pfn,
                state,
            });
        }
        let place = self.pages.len();
        self.pages.push(page);
        self.places.insert(pfn, place);
        Ok(place)
    }

    /// Counts work that is more than a read; the same limit is for all.
    pub(crate) fn spend(&mut self, work: u64) -> Result<(), Unread> {
        self.work = self.work.saturating_add(work);
        if self.work > WORK_MAX {
            return Err(Unread::Exhausted);
        }
        Ok(())
    }
}

/// Text up to a NUL; what is no printable ASCII becomes `?`.
pub(crate) fn text(bytes: &[u8]) -> String {
    bytes
        .iter()
        .take_while(|&&byte| byte != 0)
        .map(|&byte| match byte {
            b' '..=b'~' => char::from(byte),
            _ => '?',
        })
        .collect()
}

/// A number as an index; what no memory holds becomes the largest, which no slice has.
pub(crate) fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
