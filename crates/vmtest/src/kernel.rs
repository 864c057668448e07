//! Where things lie in the guest's memory: kernel symbols, per-CPU areas and the page array,
//! resolved with nothing but the memory itself and what the guest said about its kernel before it
//! crashed.

use crate::memory::GuestMemory;
use crate::pattern::PAGE_SIZE;
use crate::stage::Kernel;

/// The guest's kernel and its memory.
#[derive(Debug)]
pub struct KernelView<'a> {
    memory: &'a GuestMemory,
    facts: &'a Kernel,
    areas: Vec<Area>,
}

/// A piece of physical memory with a purpose.
#[derive(Debug)]
struct Area {
    start: u64,
    end: u64,
    purpose: Purpose,
}

#[derive(Clone, Copy, Debug)]
enum Purpose {
    /// The kernel's own image.
    Image,
    /// The per-CPU data of one CPU.
    PerCpu(u32),
    /// The array of `struct page`; `first` is the number of the page its first entry describes.
    PageArray { first: u64 },
}

/// What lies at one physical address.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Place {
    /// The symbol that begins at or before it in the kernel's image, and the distance.
    Image(String, u64),
    /// The same in the per-CPU data of a CPU.
    PerCpu(u32, String, u64),
    /// The `struct page` of a page.
    PageArray(u64),
    /// Memory that was allocated while the kernel ran.
    Allocated,
}

/// Size of `struct page` in the kernels tested here (`CONFIG_MEMCG` or not, with 64-bit atomics).
const STRUCT_PAGE: u64 = 64;
/// Per-CPU symbols are offsets below this; everything else has the upper half of the address space.
const PER_CPU_OFFSET_MAX: u64 = 1 << 20;
/// The pages of the largest slab (`slab_max_order`).
const SLAB_PAGES_MAX: u64 = 8;
/// The parts of the image that are freed, each from one symbol to another (mark_rodata_ro,
/// free_initmem and mem_encrypt_free_decrypted_mem).
const FREED: [(&str, &str); 4] = [
    ("_etext", "__start_rodata"),
    ("__end_rodata", "_sdata"),
    ("__init_begin", "__init_end"),
    ("__start_bss_decrypted_unused", "__end_bss_decrypted"),
];
const PRESENT: u64 = 1;
const HUGE: u64 = 1 << 7;
const FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;

impl<'a> KernelView<'a> {
    /// Finds the areas of a guest with `cpus` CPUs. What cannot be found is left out: its pages are
    /// then `Allocated`.
    #[must_use]
    pub fn new(memory: &'a GuestMemory, facts: &'a Kernel, cpus: u32) -> Self {
        let mut view = Self {
            memory,
            facts,
            areas: Vec::new(),
        };
        let mut areas = Vec::new();
        areas.extend(view.image());
        areas.extend((0..cpus).filter_map(|cpu| view.per_cpu(cpu)));
        areas.extend(view.page_array());
        view.areas = areas;
        view
    }

    /// What lies at physical address `address`.
    #[must_use]
    pub fn place(&self, address: u64) -> Place {
        let Some(area) = self
            .areas
            .iter()
            .find(|area| (area.start..area.end).contains(&address))
        else {
            return Place::Allocated;
        };
        let offset = address - area.start;
        if matches!(area.purpose, Purpose::Image) && self.is_freed(offset) {
            return Place::Allocated;
        }
        let named = |symbol: Option<(&str, u64)>| {
            symbol.map_or_else(
                || ("?".to_owned(), 0),
                |(name, distance)| (name.to_owned(), distance),
            )
        };
        match area.purpose {
            Purpose::Image => {
                let (name, distance) =
                    named(self.symbol_at(self.address_of("_text").unwrap_or(0) + offset));
                Place::Image(name, distance)
            }
            Purpose::PerCpu(cpu) => {
                let (name, distance) = named(self.symbol_at(offset));
                Place::PerCpu(cpu, name, distance)
            }
            Purpose::PageArray { first } => Place::PageArray(first + offset / STRUCT_PAGE),
        }
    }

    /// The address of a symbol.
    #[must_use]
    pub fn address_of(&self, name: &str) -> Option<u64> {
        self.facts
            .symbols
            .iter()
            .find(|(_, symbol)| symbol == name)
            .map(|(address, _)| *address)
    }

    /// The physical address behind a kernel virtual address, by the kernel's own page tables.
    #[must_use]
    pub fn translate(&self, address: u64) -> Option<u64> {
        let five_levels = self.image_word("__pgtable_l5_enabled")? & 0xffff_ffff != 0;
        let mut table = self.image_address(self.address_of("init_top_pgt")?)?;
        for level in (0..if five_levels { 5 } else { 4 }).rev() {
            let shift = 12 + 9 * level;
            let entry = self.word(table + (address >> shift & 511) * 8)?;
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 0 || entry & HUGE != 0 && level <= 2 {
                let offset = address & ((1 << shift) - 1);
                return Some((entry & FRAME_MASK & !((1 << shift) - 1)) | offset);
            }
            table = entry & FRAME_MASK;
        }
        None
    }

    /// Whether words at these offsets of one page are where one cache of the slab allocator keeps,
    /// in objects that are free, the pointer to the next. The kernel scrambles it, so its value
    /// says nothing.
    #[must_use]
    pub fn are_free_pointers(&self, words: &[u64]) -> bool {
        // An object may lie across pages: the page is any of its slab.
        let pages = 0..SLAB_PAGES_MAX;
        pages.into_iter().any(|page| {
            self.facts.slabs.iter().any(|(bytes, pointer)| {
                words
                    .iter()
                    .all(|word| (page * PAGE_SIZE as u64 + word) % bytes == *pointer)
            })
        })
    }

    /// Whether the kernel has given the byte at this offset of its image back to the allocator: the
    /// gaps between its sections, and what only booting needed.
    fn is_freed(&self, offset: u64) -> bool {
        let Some(text) = self.address_of("_text") else {
            return false;
        };
        FREED.iter().any(
            |(from, to)| match (self.address_of(from), self.address_of(to)) {
                (Some(from), Some(to)) => (from..to).contains(&(text + offset)),
                _ => false,
            },
        )
    }

    fn symbol_at(&self, address: u64) -> Option<(&str, u64)> {
        let after = self
            .facts
            .symbols
            .partition_point(|(symbol, _)| *symbol <= address);
        let (start, name) = self.facts.symbols.get(after.checked_sub(1)?)?;
        Some((name, address - start))
    }

    fn word(&self, physical: u64) -> Option<u64> {
        Some(u64::from_le_bytes(
            *self.memory.read(physical, 8)?.first_chunk()?,
        ))
    }

    /// The physical address of an address in the kernel's image, which is one piece of memory.
    fn image_address(&self, address: u64) -> Option<u64> {
        Some(address.checked_sub(self.address_of("_text")?)? + self.facts.code)
    }

    fn image_word(&self, symbol: &str) -> Option<u64> {
        self.word(self.image_address(self.address_of(symbol)?)?)
    }

    /// To the end of bss: most of what follows it (brk) is given back to the allocator.
    fn image(&self) -> Option<Area> {
        let end = self.image_address(self.address_of("__bss_stop")?)?;
        Some(Area {
            start: self.facts.code,
            end,
            purpose: Purpose::Image,
        })
    }

    fn per_cpu(&self, cpu: u32) -> Option<Area> {
        let offsets = self.image_address(self.address_of("__per_cpu_offset")?)?;
        let start = self.translate(self.word(offsets + u64::from(cpu) * 8)?)?;
        let below = |address: &&(u64, String)| address.0 < PER_CPU_OFFSET_MAX;
        let size = self
            .facts
            .symbols
            .iter()
            .take_while(below)
            .last()?
            .0
            .next_multiple_of(PAGE_SIZE as u64);
        Some(Area {
            start,
            end: start + size,
            purpose: Purpose::PerCpu(cpu),
        })
    }

    /// The page array is virtually one piece and physically many: each 2 MiB of it is looked up.
    fn page_array(&self) -> Vec<Area> {
        const PIECE: u64 = 2 << 20;
        let Some(base) = self.image_word("vmemmap_base") else {
            return Vec::new();
        };
        let pages = self
            .memory
            .ranges()
            .last()
            .map_or(0, |(_, end)| end / PAGE_SIZE as u64);
        (0..(pages * STRUCT_PAGE).div_ceil(PIECE))
            .filter_map(|piece| {
                let start = self.translate(base + piece * PIECE)?;
                let first = piece * PIECE / STRUCT_PAGE;
                Some(Area {
                    start,
                    end: start + PIECE,
                    purpose: Purpose::PageArray { first },
                })
            })
            .collect()
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image(symbol, offset) => write!(f, "{symbol}+{offset:#x}"),
            Self::PerCpu(cpu, symbol, offset) => write!(f, "CPU {cpu} {symbol}+{offset:#x}"),
            Self::PageArray(pfn) => write!(f, "struct page of {pfn:#x}"),
            Self::Allocated => f.write_str("allocated"),
        }
    }
}
