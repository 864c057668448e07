//! The truth: every page of the guest's memory against the vmcore, and the seeded pattern against
//! both.
//!
//! The dump path itself writes to some memory after it has sent it. The client lists the pages it
//! knows of (`written` in session.json); what the driver and the kernel write on its behalf is in
//! `rules`, with the reasons. A page may differ only where one of the two says so.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;

use anyhow::Result;
use dump::PageState;

use crate::pattern::{self, PAGE_SIZE};
use crate::rules::{DRIVER_STATE, FREE_LISTS, Rules, differences, word_at};
use crate::stage::PatternRun;

/// A page as bytes.
pub type Page = [u8; PAGE_SIZE];

/// Pages the client says the dump path writes: few ranges, which may overlap.
#[derive(Debug, Default)]
pub struct Written {
    ranges: Vec<(Range<u64>, &'static str)>,
}

/// What the comparison has found.
#[derive(Debug, Default)]
pub struct Comparison {
    /// Pages of System RAM that were compared.
    pub checked: u64,
    /// Of these, pages that differ and are not listed.
    pub different: u64,
    /// Pages on the client's list.
    pub listed: u64,
    /// Pages that differ and may, by the kind or rule that allows it.
    pub listed_different: BTreeMap<String, u64>,
    /// Pages that are not in the vmcore though they are System RAM.
    pub absent: u64,
    /// Pages that the filter left out.
    pub excluded: u64,
    /// Pages that the vmcore calls unreadable.
    pub unreadable: u64,
    /// Pages of QEMU's RAM that are not System RAM: the firmware's.
    pub firmware: u64,
    /// The first differences that are not listed, at most 400.
    pub examples: Vec<(u64, String)>,
}

/// Differences that are described; more of them rarely say more.
const EXAMPLES_MAX: usize = 400;
/// Pages a driver may keep its state in: descriptors' extra state of two queues, its structures,
/// statistics. As many may hold objects that it gives back.
const DRIVER_PAGES_MAX: u64 = 32;
/// Differences of a page that are shown.
const WORDS_MAX: usize = 8;
/// A firmware keeps less than this for itself: tables, its own code, the legacy hole below 1 MiB.
pub const FIRMWARE_PAGES_MAX: u64 = 1024;

impl Written {
    /// Takes the list from session.json: first pfn, pages, kind.
    #[must_use]
    pub fn new(ranges: &[(u64, u64, u32)]) -> Self {
        let ranges = ranges
            .iter()
            .map(|(first, pages, kind)| (*first..first.saturating_add(*pages), kind_name(*kind)))
            .collect();
        Self { ranges }
    }

    /// Why page `pfn` may differ.
    #[must_use]
    pub fn kind(&self, pfn: u64) -> Option<&'static str> {
        let found = self.ranges.iter().find(|(range, _)| range.contains(&pfn));
        found.map(|(_, kind)| *kind)
    }

    /// How many pages are listed, each counted once.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let mut starts: Vec<&Range<u64>> = self.ranges.iter().map(|(range, _)| range).collect();
        starts.sort_by_key(|range| range.start);
        let mut end = 0;
        let mut pages = 0;
        for range in starts {
            pages += range.end.saturating_sub(range.start.max(end));
            end = end.max(range.end);
        }
        pages
    }
}

/// Compares all pages of `system_ram` (first and last byte of each range, as in /proc/iomem) with
/// what `vmcore` gives.
///
/// # Errors
/// What `vmcore` fails with: then the file cannot be read, which is not a difference.
pub fn compare(
    system_ram: &[(u64, u64)],
    written: &Written,
    rules: &Rules<'_>,
    mut vmcore: impl FnMut(u64, &mut Page) -> Result<PageState>,
) -> Result<Comparison> {
    let mut comparison = Comparison {
        listed: written.pages(),
        ..Comparison::default()
    };
    let mut page = [0; PAGE_SIZE];
    for pfn in pages(system_ram) {
        let Some(truth) = rules.memory.page(pfn) else {
            continue;
        };
        comparison.checked += 1;
        match vmcore(pfn, &mut page)? {
            PageState::Data if page == truth => {}
            PageState::Data => comparison.judge(pfn, truth, &page, written, rules),
            PageState::Unreadable => comparison.unreadable += 1,
            PageState::Excluded => comparison.excluded += 1,
            PageState::Missing | PageState::NotRam => comparison.absent += 1,
        }
    }
    comparison.firmware = rules.memory.size() / PAGE_SIZE as u64 - comparison.checked;
    Ok(comparison)
}

impl Comparison {
    /// Pages that differ and are listed.
    #[must_use]
    pub fn listed_different_pages(&self) -> u64 {
        self.listed_different.values().sum()
    }

    fn judge(&mut self, pfn: u64, truth: &[u8], page: &Page, written: &Written, rules: &Rules<'_>) {
        let kind = written.kind(pfn).or_else(|| rules.allows(pfn, truth, page));
        if let Some(kind) = kind {
            let pages = self.listed_different.entry(kind.to_owned()).or_default();
            if ![DRIVER_STATE, FREE_LISTS].contains(&kind) || *pages < DRIVER_PAGES_MAX {
                *pages += 1;
                return;
            }
        }
        self.different += 1;
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push((pfn, describe(pfn, truth, page, rules)));
        }
    }
}

/// The name of a kind of the client's list (docs/protocol.md, record Written).
fn kind_name(kind: u32) -> &'static str {
    match kind {
        1 => "module",
        2 => "pool",
        3 => "reserve",
        4 => "stack",
        5 => "percpu",
        6 => "log",
        7 => "device",
        _ => "other",
    }
}

/// The numbers of all whole pages of `ranges` (first and last byte).
fn pages(ranges: &[(u64, u64)]) -> impl Iterator<Item = u64> {
    let size = PAGE_SIZE as u64;
    ranges
        .iter()
        .flat_map(move |(first, last)| first.div_ceil(size)..(last + 1) / size)
}

/// Where the page lies and what differs: the first words as memory has them and as the vmcore has
/// them.
fn describe(pfn: u64, truth: &[u8], page: &Page, rules: &Rules<'_>) -> String {
    let offsets: Vec<usize> = differences(truth, page).collect();
    let mut text = format!("{} differences:", offsets.len());
    for offset in offsets.iter().take(WORDS_MAX) {
        let place = rules.kernel.place(pfn * PAGE_SIZE as u64 + *offset as u64);
        write!(
            text,
            " {offset:#x} ({place}) {:x} is {:x},",
            word_at(truth, *offset),
            word_at(page, *offset)
        )
        .unwrap_or_default();
    }
    text
}

/// Pages of the pattern that the vmcore does not hold as they were placed, or holds though they are
/// user memory that was to be left out: their kind, index and page number.
///
/// # Errors
/// What `vmcore` fails with.
pub fn pattern_damage(
    runs: &[PatternRun],
    seed: u64,
    leaves_out_user: bool,
    mut vmcore: impl FnMut(u64, &mut Page) -> Result<PageState>,
) -> Result<Vec<String>> {
    let mut damage = Vec::new();
    let mut page = [0; PAGE_SIZE];
    for run in runs {
        let seed = pattern::seed_of(seed, &run.kind);
        for (index, pfn) in (run.index..)
            .zip(run.pfn..)
            .take(usize::try_from(run.pages).unwrap_or(usize::MAX))
        {
            let state = vmcore(pfn, &mut page)?;
            let good = if leaves_out_user && run.kind == "user" {
                state == PageState::Excluded
            } else {
                state == PageState::Data && pattern::matches(seed, index, &page)
            };
            if !good {
                damage.push(format!(
                    "{} pattern page {index} at {pfn:#x} is {state:?}",
                    run.kind
                ));
            }
        }
    }
    Ok(damage)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::kernel::KernelView;
    use crate::memory::GuestMemory;
    use crate::stage::Kernel;

    const RAM: [(u64, u64); 2] = [(0x1000, 0x5_0fff), (0x10_0000, 0x13_ffff)];

    fn run(
        written: &[(u64, u64, u32)],
        vmcore: impl FnMut(u64, &mut Page) -> Result<PageState>,
    ) -> Comparison {
        let memory = GuestMemory::new(2 << 20).unwrap();
        let facts = Kernel::default();
        let kernel = KernelView::new(&memory, &facts, 1);
        let rules = Rules {
            memory: &memory,
            kernel: &kernel,
            mac: [2; 6],
            rings: &[(0x13_e000, 0x13_e008)],
            buffers: &[0x38 / 8].into(),
            bounce: None,
            faults: false,
        };
        compare(&RAM, &Written::new(written), &rules, vmcore).unwrap()
    }

    /// A vmcore in which some pages are text, where memory has zeros.
    fn spoiled(pfns: &'static [u64]) -> impl FnMut(u64, &mut Page) -> Result<PageState> {
        move |pfn, page| {
            page.fill(if pfns.contains(&pfn) { b'a' } else { 0 });
            Ok(PageState::Data)
        }
    }

    #[test]
    fn a_cleared_buffer_of_the_ring_may_differ_and_its_neighbours_may_not() {
        let comparison = run(&[], spoiled(&[0x37, 0x3a, 0x40]));
        assert_eq!(comparison.different, 2);
        assert_eq!(comparison.listed_different["receive buffers"], 1);
    }

    #[test]
    fn equal_memory_has_no_differences() {
        let comparison = run(&[], spoiled(&[]));
        assert_eq!(
            (comparison.checked, comparison.different, comparison.absent),
            (0x50 + 0x40, 0, 0)
        );
        assert_eq!(comparison.firmware, 512 - 0x90);
    }

    #[test]
    fn a_difference_is_found_and_described() {
        let comparison = run(&[], spoiled(&[0x102]));
        assert_eq!(comparison.different, 1);
        assert_eq!(comparison.examples[0].0, 0x102);
        let words = "1024 differences: 0x0 (allocated) 0 is 6161616161616161,";
        assert!(
            comparison.examples[0].1.starts_with(words),
            "{}",
            comparison.examples[0].1
        );
    }

    #[test]
    fn listed_pages_may_differ_and_their_neighbours_not() {
        let comparison = run(&[(0x102, 2, 3)], spoiled(&[0x101, 0x102, 0x103, 0x104]));
        assert_eq!((comparison.listed, comparison.different), (2, 2));
        assert_eq!(comparison.listed_different.get("reserve"), Some(&2));
        assert_eq!(comparison.listed_different_pages(), 2);
    }

    #[test]
    fn a_page_may_differ_where_a_rule_says_so_and_nowhere_else() {
        let text = |bytes: usize| {
            move |pfn: u64, page: &mut Page| {
                page.fill(0);
                page[..bytes].fill(if pfn == 0x13e { b'a' } else { 0 });
                Ok(PageState::Data)
            }
        };
        assert_eq!(
            run(&[], text(8)).listed_different.get("device rings"),
            Some(&1)
        );
        let comparison = run(&[], text(16));
        assert_eq!(comparison.different, 1);
    }

    #[test]
    fn a_free_list_is_a_word_at_one_place_of_objects_of_a_slab_and_no_other() {
        let chained = |offsets: &'static [usize]| {
            let memory = GuestMemory::new(2 << 20).unwrap();
            let facts = Kernel {
                slabs: vec![(256, 0x70), (704, 0x140)],
                ..Kernel::default()
            };
            let kernel = KernelView::new(&memory, &facts, 1);
            let rules = Rules {
                memory: &memory,
                kernel: &kernel,
                mac: [2; 6],
                rings: &[],
                buffers: &BTreeSet::new(),
                bounce: None,
                faults: false,
            };
            let scrambled = 0x7b45_05a8_6fa6_f2c0_u64.to_le_bytes();
            let vmcore = |pfn, page: &mut Page| {
                page.fill(0);
                if pfn == 0x102 {
                    for offset in offsets {
                        page[*offset..offset + 8].copy_from_slice(&scrambled);
                    }
                }
                Ok(PageState::Data)
            };
            let comparison = compare(&RAM, &Written::default(), &rules, vmcore).unwrap();
            let listed = comparison.listed_different.get(FREE_LISTS).copied();
            (listed.unwrap_or(0), comparison.different)
        };
        assert_eq!(chained(&[0x70, 0x170, 0xf70]), (1, 0));
        assert_eq!(chained(&[0x140, 0x400]), (1, 0), "at the begin of its slab");
        assert_eq!(chained(&[0x1c0, 0x480]), (1, 0), "in its second page");
        assert_eq!(chained(&[0x70, 0x178]), (0, 1));
        assert_eq!(chained(&[0x70, 0x140]), (0, 1), "of two caches");
        assert_eq!(chained(&[0x78]), (0, 1));
    }

    #[test]
    fn driver_state_is_numbers_and_pointers_in_few_pages() {
        let comparison = run(&[], |pfn, page| {
            page.fill(0);
            if pfn >= 0x100 {
                page[..8].copy_from_slice(&0xff44_05a8_6fa6_f200_u64.to_le_bytes());
                page[8..16].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 0]);
            }
            Ok(PageState::Data)
        });
        assert_eq!(
            comparison.listed_different.get(DRIVER_STATE),
            Some(&DRIVER_PAGES_MAX)
        );
        assert_eq!(comparison.different, 0x40 - DRIVER_PAGES_MAX);
    }

    #[test]
    fn received_frames_are_known_by_their_header() {
        let comparison = run(&[], |pfn, page| {
            page.fill(0);
            if pfn == 0x110 {
                page[100..106].fill(2);
                page[106..112].copy_from_slice(&crate::frame::HARNESS_MAC);
            }
            Ok(PageState::Data)
        });
        assert_eq!(comparison.listed_different.get("received frames"), Some(&1));
    }

    #[test]
    fn ranges_may_overlap() {
        let written = Written::new(&[(0x110, 8, 5), (0x112, 1, 4), (0x200, 1, 1)]);
        assert_eq!(written.kind(0x117), Some("percpu"));
        assert_eq!(written.kind(0x118), None);
        assert_eq!(written.pages(), 9);
    }

    #[test]
    fn absent_pages_are_no_zero_pages() {
        let comparison = run(&[], |pfn, page| {
            page.fill(0);
            Ok(match pfn {
                1 => PageState::Missing,
                2 => PageState::Excluded,
                3 => PageState::Unreadable,
                _ => PageState::Data,
            })
        });
        let counts = [
            comparison.absent,
            comparison.excluded,
            comparison.unreadable,
        ];
        assert_eq!(counts, [1, 1, 1]);
    }

    #[test]
    fn a_spoiled_pattern_is_found() {
        let runs = [PatternRun {
            kind: "user".to_owned(),
            index: 5,
            pfn: 0x110,
            pages: 3,
        }];
        let vmcore = |pfn: u64, page: &mut Page| {
            pattern::fill(pattern::seed_of(9, "user"), 5 + pfn - 0x110, page);
            page[0] ^= u8::from(pfn == 0x111);
            Ok(PageState::Data)
        };
        let damage = pattern_damage(&runs, 9, false, vmcore).unwrap();
        assert_eq!(damage, ["user pattern page 6 at 0x111 is Data"]);
        let kept = pattern_damage(&runs, 9, true, vmcore).unwrap();
        assert_eq!(kept.len(), 3, "what was to be left out is there: {kept:?}");
        let excluded = |_, _: &mut Page| Ok(PageState::Excluded);
        assert!(pattern_damage(&runs, 9, true, excluded).unwrap().is_empty());
    }
}
