//! What may differ between a vmcore and the memory of the dead guest, beyond the pages the client lists itself, and why.
//!
//! All other CPUs are held, so whatever changes after a page has been sent is the work of the dump path: our module, the
//! network driver it drives, the allocator under that driver, and the kernel's log when it writes down tasks and memory
//! at the end. Each rule recognises one of them by where the page lies or by what differs in it.

use crate::frame::{HARNESS_MAC, Mac};
use crate::kernel::{KernelView, Place};
use crate::memory::GuestMemory;
use crate::oracle::Page;
use crate::pattern::PAGE_SIZE;
use crate::ring::Range;

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
}

/// Data of the kernel's image that its log writes: the records, their text, and the state of who reads them. The log
/// grows after the memory has been sent, when tasks and memory figures are written down.
const LOG_SYMBOLS: &[&str] = &[
    "__log_buf",
    "_printk_rb_static_descs",
    "_printk_rb_static_infos",
    "printk_rb_static",
    "text",             // the line being formatted for a console (static buffer of printk.c)
    "univ8250_console", // the sequence number of the next record for the serial console
];

/// The rule for memory that a network driver allocated for itself.
pub const DRIVER_STATE: &str = "driver state";
/// The lowest address of kernel memory with five levels of page tables.
const KERNEL_POINTER: u64 = 0xff00_0000_0000_0000;
/// Words below this are physical addresses, or numbers of 8 to 32 bits side by side.
const SMALL: u64 = 1 << 56;

impl Rules<'_> {
    /// The name of the rule that allows page `pfn` of the vmcore to be `page` where memory has `truth`.
    #[must_use]
    pub fn allows(&self, pfn: u64, truth: &[u8], page: &Page) -> Option<&'static str> {
        if self.is_frame(pfn, truth, page) {
            return Some("received frames");
        }
        if self.is_driver_state(pfn, truth, page) {
            return Some(DRIVER_STATE);
        }
        let mut rules = differing_words(truth, page)
            .map(|offset| self.word_rule(pfn * PAGE_SIZE as u64 + offset as u64));
        let first = rules.next()??;
        rules.all(|rule| rule.is_some()).then_some(first)
    }

    /// The driver notes each frame in memory of its own: descriptors' extra state, statistics, the buffer it cuts pieces
    /// from. Where that lies only the driver knows, but each word is a kernel pointer, a physical address or small numbers
    /// side by side, which neither text, code nor the pattern is. The oracle bounds the number of such pages.
    fn is_driver_state(&self, pfn: u64, truth: &[u8], page: &Page) -> bool {
        let plausible = |word: u64| word >= KERNEL_POINTER || word < SMALL;
        differing_words(truth, page).all(|offset| {
            let place = self.kernel.place(pfn * PAGE_SIZE as u64 + offset as u64);
            place == Place::Allocated
                && plausible(word_at(truth, offset))
                && plausible(word_at(page, offset))
        })
    }

    /// The device writes received frames into buffers that the driver allocated, and the allocator clears or reuses them
    /// later: before or after, such a page, or the one a buffer began in, holds the Ethernet header of a frame of ours.
    fn is_frame(&self, pfn: u64, truth: &[u8], page: &Page) -> bool {
        let mut header = [0; 12];
        header[..6].copy_from_slice(&self.mac);
        header[6..].copy_from_slice(&HARNESS_MAC);
        let holds = |bytes: &[u8]| bytes.windows(header.len()).any(|window| window == header);
        let before = pfn
            .checked_sub(1)
            .and_then(|before| self.memory.page(before));
        holds(truth) || holds(page) || before.is_some_and(holds)
    }

    fn word_rule(&self, address: u64) -> Option<&'static str> {
        if self
            .rings
            .iter()
            .any(|(start, end)| (*start..*end).contains(&address))
        {
            return Some("device rings");
        }
        match self.kernel.place(address) {
            // The local symbols of a function's static data carry a number: text.3.
            Place::Image(symbol, _)
                if LOG_SYMBOLS.contains(&symbol.split('.').next().unwrap_or_default()) =>
            {
                Some("log")
            }
            // The receive path takes pages and gives them back, so their entries change.
            Place::PageArray(_) => Some("page array"),
            Place::Image(..) | Place::PerCpu(..) | Place::Allocated => None,
        }
    }
}

/// The word of eight bytes at `offset` of a page.
pub fn word_at(page: &[u8], offset: usize) -> u64 {
    page.get(offset..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |word| u64::from_le_bytes(*word))
}

/// The words of eight bytes that differ, as offsets into the page.
pub fn differing_words<'a>(truth: &'a [u8], page: &'a Page) -> impl Iterator<Item = usize> + 'a {
    let words = truth.chunks_exact(8).zip(page.chunks_exact(8));
    words
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(word, _)| word * 8)
}
