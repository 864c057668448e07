//! What may differ between a vmcore and the memory of the dead guest, beyond the pages the client
//! lists itself, and why.
//!
//! All other CPUs are held, so whatever changes after a page has been sent is the work of the dump
//! path: our module, the network driver it drives, the allocator under that driver, and the
//! kernel's log when it writes down tasks and memory at the end. Each rule recognises one of them
//! by where the page lies or by what differs in it.

use std::collections::BTreeSet;

use crate::frame::{HARNESS_MAC, Mac};
use crate::kernel::{KernelView, Place};
use crate::memory::GuestMemory;
use crate::oracle::Page;
use crate::pattern::PAGE_SIZE;
use crate::ring::Range;

/// The hardware address of everybody.
const BROADCAST: Mac = [0xff; 6];

/// The rules of one run.
#[derive(Debug)]
pub struct Rules<'a> {
    /// The memory of the dead guest.
    pub memory: &'a GuestMemory,
    /// Its kernel.
    pub kernel: &'a KernelView<'a>,
    /// The hardware address of its network device.
    pub mac: Mac,
    /// The rings of that device.
    pub rings: &'a [Range],
    /// Blocks of `BLOCK_PAGES` pages in which a descriptor of those rings points, from
    /// [`buffer_blocks`].
    pub buffers: &'a BTreeSet<u64>,
    /// Memory through which the kernel passes what a device cannot reach itself (swiotlb).
    pub bounce: Option<Range>,
    /// The dump path itself was made to fault.
    pub faults: bool,
}

/// Data of the kernel's image that its log writes: the records, their text, and the state of who
/// reads them. The log grows after the memory has been sent, when tasks and memory figures are
/// written down.
const LOG_SYMBOLS: &[&str] = &[
    "__log_buf",
    "_printk_rb_static_descs",
    "_printk_rb_static_infos",
    "panic_nbcon_pbufs", // the same for consoles that need no lock, in a panic (6.13 and newer)
    "printk_rb_static",
    "text",             // the line being formatted for a console (static buffer of printk.c)
    "univ8250_console", // the sequence number of the next record for the serial console
];

/// Data of the kernel's image that `emergency_restart` writes on its way: the state of the whole
/// system, and how other CPUs are told (arch/x86/kernel/reboot.c, kernel/reboot.c).
const REBOOT_SYMBOLS: &[&str] = &[
    "crash_ipi_issued",
    "crashing_cpu",
    "nmi_desc",
    "reboot_emergency",
    "shootdown_callback",
    "system_state",
    "virt_rebooting", // no more faults by virtual machines' instructions are to be told (7.x)
    "waiting_for_crash_ipi",
];

/// Data of the kernel's image that an oops writes (arch/x86/kernel/dumpstack.c, kernel/panic.c,
/// lib/debug_locks.c, kernel/trace/trace.c): a fault of the dump path is one.
const OOPS_SYMBOLS: &[&str] = &[
    "debug_locks",
    "die_counter",
    "die_lock",
    "die_nest_count",
    "die_owner",
    "exec_summary_regs",
    "global_trace",
    "oops_in_progress",
    "tainted_mask",
];

/// Data of the kernel's image that taking and giving back memory for received frames writes: counts
/// of free pages (mm/vmstat.c) and of bounce buffers (kernel/dma/swiotlb.c), and the random
/// generator's key, which is renewed when it is older than a minute and somebody draws
/// (drivers/char/random.c).
const MEMORY_SYMBOLS: &[&str] = &[
    "base_crng",
    "io_tlb_default_mem",
    "vm_node_stat",
    "vm_zone_stat",
];

/// Where the bounce buffers lie, from the kernel's line at boot
/// (`software IO TLB: mapped [mem 0x...-0x...] (64MB)`, kernel/dma/swiotlb.c); the end is exclusive.
#[must_use]
pub fn bounce_buffers(console: &str) -> Option<Range> {
    let (_, rest) = console.split_once("software IO TLB: mapped [mem ")?;
    let (start, end) = rest.split_once(']')?.0.split_once('-')?;
    let address = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    Some((address(start)?, address(end)?))
}

/// The largest piece that drivers take from the allocator to cut receive buffers from, in pages.
const BLOCK_PAGES: u64 = 8;

/// The blocks of pages that the words of `rings` point into, if they are addresses: whatever a
/// device's descriptors look like, the address of a buffer is a word of eight bytes in them.
#[must_use]
pub fn buffer_blocks(memory: &GuestMemory, rings: &[Range]) -> BTreeSet<u64> {
    let words = rings.iter().flat_map(|(start, end)| {
        let bytes = usize::try_from(end - start).unwrap_or(0);
        let ring = memory.read(*start, bytes).unwrap_or_default();
        ring.as_chunks()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word))
    });
    let pfns = words.map(|word| word / PAGE_SIZE as u64);
    pfns.filter(|pfn| *pfn > 0 && memory.page(*pfn).is_some())
        .map(|pfn| pfn / BLOCK_PAGES)
        .collect()
}

/// The rule for memory that a network driver allocated for itself.
pub const DRIVER_STATE: &str = "driver state";
/// The rule for objects that the receive path gave back to the slab allocator.
pub const FREE_LISTS: &str = "free lists";
/// The lowest address of kernel memory with five levels of page tables.
const KERNEL_POINTER: u64 = 0xff00_0000_0000_0000;
/// Words below this are physical addresses, or numbers of 8 to 32 bits side by side.
const SMALL: u64 = 1 << 56;
/// Two counters of 32 bits side by side stay below this each: bytes queued on the wire (struct
/// dql). Text does not.
const COUNTER: u64 = 1 << 29;

impl Rules<'_> {
    /// The name of the rule that allows page `pfn` of the vmcore to be `page` where memory has
    /// `truth`.
    #[must_use]
    pub fn allows(&self, pfn: u64, truth: &[u8], page: &Page) -> Option<&'static str> {
        let to_guest = [self.mac, BROADCAST];
        if to_guest
            .iter()
            .any(|to| self.has_header(pfn, truth, page, *to, HARNESS_MAC))
        {
            return Some("received frames");
        }
        if self.is_bounced(pfn) && self.has_header(pfn, truth, page, HARNESS_MAC, self.mac) {
            return Some("bounce buffers");
        }
        if self.is_cleared_buffer(pfn, truth, page) {
            return Some("receive buffers");
        }
        let mut page_rule = None;
        let mut chained = Vec::new();
        for offset in differences(truth, page) {
            let address = pfn * PAGE_SIZE as u64 + offset as u64;
            let word = offset / 8 * 8;
            let words = [word_at(truth, word), word_at(page, word)];
            if let Some(rule) = self.place_rule(address) {
                page_rule = page_rule.or(Some(rule));
            } else if self.is_driver_state(address, words) {
                // The bounded rule counts, if any word needs it.
                page_rule = Some(DRIVER_STATE);
            } else if self.kernel.place(address) == Place::Allocated {
                chained.push(word as u64);
            } else {
                return None;
            }
        }
        match chained.as_slice() {
            [] => page_rule,
            words => self.kernel.are_free_pointers(words).then_some(FREE_LISTS),
        }
    }

    /// The driver notes each frame in memory of its own: descriptors' extra state, statistics, the
    /// buffer it cuts pieces from. Where that lies only the driver knows, but each word is a kernel
    /// pointer, a physical address or small numbers side by side, which neither text, code nor the
    /// pattern is. The oracle bounds the number of such pages.
    fn is_driver_state(&self, address: u64, words: [u64; 2]) -> bool {
        let counters = |word: u64| word >> 32 < COUNTER && word & 0xffff_ffff < COUNTER;
        let plausible = |word: &u64| *word >= KERNEL_POINTER || *word < SMALL || counters(*word);
        self.kernel.place(address) == Place::Allocated && words.iter().all(plausible)
    }

    /// Whether page `pfn` lies in the bounce buffers: a card of 32 bits in a host with memory above
    /// 4 GiB sends from copies that the kernel makes there.
    fn is_bounced(&self, pfn: u64) -> bool {
        let address = pfn * PAGE_SIZE as u64;
        self.bounce
            .is_some_and(|(start, end)| (start..end).contains(&address))
    }

    /// The driver fills its ring with buffers that no frame has come into yet. The allocator cleared
    /// them, whatever the free pages held when they were sent.
    fn is_cleared_buffer(&self, pfn: u64, truth: &[u8], page: &Page) -> bool {
        self.buffers.contains(&(pfn / BLOCK_PAGES))
            && differences(truth, page).all(|offset| truth.get(offset..offset + 4) == Some(&[0; 4]))
    }

    /// The device writes received frames into buffers that the driver allocated, and the allocator
    /// clears or reuses them later: before or after, such a page, or the one a buffer began in,
    /// holds the Ethernet header of a frame of ours.
    fn has_header(&self, pfn: u64, truth: &[u8], page: &Page, to: Mac, from: Mac) -> bool {
        let mut header = [0; 12];
        header[..6].copy_from_slice(&to);
        header[6..].copy_from_slice(&from);
        let holds = |bytes: &[u8]| bytes.windows(header.len()).any(|window| window == header);
        let before = pfn
            .checked_sub(1)
            .and_then(|before| self.memory.page(before));
        holds(truth) || holds(page) || before.is_some_and(holds)
    }

    fn place_rule(&self, address: u64) -> Option<&'static str> {
        if self
            .rings
            .iter()
            .any(|(start, end)| (*start..*end).contains(&address))
        {
            return Some("device rings");
        }
        match self.kernel.place(address) {
            Place::Image(symbol, _) => {
                // The local symbols of a function's static data carry a number: text.3.
                let symbol = symbol.split('.').next().unwrap_or_default();
                let is_in = |list: &[&str]| list.contains(&symbol);
                if is_in(LOG_SYMBOLS) {
                    Some("log")
                } else if is_in(MEMORY_SYMBOLS) {
                    Some("counters")
                } else if self.faults && is_in(OOPS_SYMBOLS) {
                    Some("oops")
                } else {
                    is_in(REBOOT_SYMBOLS).then_some("reboot")
                }
            }
            // The receive path takes pages and gives them back, so their entries change.
            Place::PageArray(_) => Some("page array"),
            Place::PerCpu(..) | Place::Allocated => None,
        }
    }
}

/// The word of eight bytes at `offset` of a page.
pub fn word_at(page: &[u8], offset: usize) -> u64 {
    page.get(offset..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |word| u64::from_le_bytes(*word))
}

/// Offsets into the page at which four bytes differ; smaller variables are not told apart.
pub fn differences<'a>(truth: &'a [u8], page: &'a Page) -> impl Iterator<Item = usize> + 'a {
    let words = truth.chunks_exact(4).zip(page.chunks_exact(4));
    words
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(word, _)| word * 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounce_buffers_are_where_the_kernel_says() {
        let line = "[ 1.2] software IO TLB: area num 1.\n[ 1.3] software IO TLB: mapped \
                    [mem 0x000000007a5cf000-0x000000007e5cf000] (64MB)\n";
        assert_eq!(bounce_buffers(line), Some((0x7a5c_f000, 0x7e5c_f000)));
        assert_eq!(bounce_buffers("no such line"), None);
        assert_eq!(
            bounce_buffers("software IO TLB: mapped [mem 0xzz-0x1]"),
            None
        );
    }
}
