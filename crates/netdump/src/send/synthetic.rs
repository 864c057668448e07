//! Computed memory of any size: the same pages for the same seed, at the cost of a copy.
//!
//! Memory is cut into stretches of [`STRETCH_PAGES`] pages of one kind, as real memory has them. A
//! page is a window into a template, chosen by its number, with its number stamped into it, so that
//! no two pages with contents are equal.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context as _, Error, Result, bail, ensure};
use dump::{Machine, Pfn, RamRange};
use proto::client::PageStatus;
use proto::record::RAM_PAGES_MAX;
use proto::units::PAGE_BYTES;

use super::source::Source;

/// What computed memory is to be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Synthetic {
    /// Pages of RAM.
    pub pages: u64,
    /// Percent of the pages that are zero.
    pub zero: u8,
    /// Percent that compress about as ordinary memory does.
    pub text: u8,
    /// Percent that do not compress.
    pub random: u8,
    /// Chooses everything else.
    pub seed: u64,
}

/// What pages with contents are cut from.
pub(super) struct Templates {
    text: Vec<u8>,
    random: Vec<u8>,
}

pub(super) struct Memory {
    wish: Synthetic,
    seed: u64,
    machine: Machine,
    templates: Arc<Templates>,
}

impl Synthetic {
    /// Fills `pages` with the contents of the pages from `first` on.
    pub fn fill(&self, first: u64, pages: &mut [[u8; PAGE_BYTES]]) {
        let mut statuses = vec![PageStatus::OtherPass; pages.len()];
        let templates = Arc::new(Templates::new(self.seed));
        self.memory(0, &templates).read(first, pages, &mut statuses);
    }

    pub(super) fn memory(&self, index: u32, templates: &Arc<Templates>) -> Memory {
        let low = LOW_PAGES.min(self.pages);
        let mut ram = vec![RamRange {
            first: Pfn(1),
            pages: low,
        }];
        if self.pages > low {
            ram.push(RamRange {
                first: Pfn(HIGH_FIRST),
                pages: self.pages - low,
            });
        }
        Memory {
            wish: *self,
            seed: mix(self.seed ^ mix(u64::from(index))),
            machine: Machine {
                ram,
                vmcoreinfo: VMCOREINFO.to_vec(),
                release: "synthetic".to_owned(),
                version: format!("netdump send synthetic:{self}"),
                ..Machine::default()
            },
            templates: Arc::clone(templates),
        }
    }
}

impl Source for Memory {
    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn log(&mut self) -> Vec<u8> {
        Vec::new()
    }

    fn read(&mut self, first: u64, pages: &mut [[u8; PAGE_BYTES]], statuses: &mut [PageStatus]) {
        for ((pfn, page), status) in (first..).zip(pages).zip(statuses) {
            *status = PageStatus::Read;
            let dice = mix(self.seed ^ (pfn / STRETCH_PAGES)) % 100;
            let number = mix(self.seed ^ pfn ^ PAGE_SALT);
            if dice < self.wish.zero.into() {
                page.fill(0);
            } else if dice < u64::from(self.wish.zero) + u64::from(self.wish.text) {
                page.copy_from_slice(window(&self.templates.text, number));
                page[..8].copy_from_slice(&number.to_le_bytes());
            } else {
                // Windows overlap; with a number mixed in, no part of one repeats in another.
                let (from, _) = window(&self.templates.random, number).as_chunks::<8>();
                for (to, from) in page.as_chunks_mut::<8>().0.iter_mut().zip(from) {
                    *to = (u64::from_le_bytes(*from) ^ number).to_le_bytes();
                }
            }
        }
    }
}

/// The page's part of a template.
fn window(template: &[u8], number: u64) -> &[u8] {
    let room = template.len() - PAGE_BYTES;
    let at = usize::try_from(number % room as u64).unwrap_or(0);
    &template[at..at + PAGE_BYTES]
}

impl Templates {
    pub(super) fn new(seed: u64) -> Self {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(GOLDEN);
            mix(state)
        };
        let random = (0..TEMPLATE_BYTES / 8)
            .flat_map(|_| next().to_le_bytes())
            .collect();
        let mut text = Vec::with_capacity(TEMPLATE_BYTES);
        while text.len() < TEMPLATE_BYTES {
            let word = WORDS[usize::try_from(next()).unwrap_or(0) % WORDS.len()];
            text.extend_from_slice(word.as_bytes());
            // Numbers between the words, as kernel pointers and lengths lie between names.
            text.extend_from_slice(&next().to_le_bytes()[..NOISE_BYTES]);
        }
        Self { text, random }
    }
}

impl FromStr for Synthetic {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',');
        let bytes = size(parts.next().unwrap_or_default())?;
        let mut wish = Self {
            pages: bytes.div_ceil(PAGE_BYTES as u64),
            zero: 30,
            text: 40,
            random: 30,
            seed: 1,
        };
        ensure!(
            (1..=RAM_PAGES_MAX).contains(&wish.pages),
            "{bytes} bytes of memory are not between one page and 64 TiB"
        );
        for part in parts {
            let (name, value) = part
                .split_once('=')
                .with_context(|| format!("{part:?} is not NAME=VALUE"))?;
            let place = match name {
                "zero" => &mut wish.zero,
                "text" => &mut wish.text,
                "random" => &mut wish.random,
                "seed" => {
                    wish.seed = value
                        .parse()
                        .with_context(|| format!("seed {value:?} is not a number"))?;
                    continue;
                }
                _ => bail!("{name:?} is not zero, text, random or seed"),
            };
            *place = value
                .parse()
                .with_context(|| format!("{name} {value:?} is not a percentage"))?;
        }
        let sum = u32::from(wish.zero) + u32::from(wish.text) + u32::from(wish.random);
        ensure!(
            sum == 100,
            "zero={}, text={} and random={} are {sum} percent together, not 100: name all three",
            wish.zero,
            wish.text,
            wish.random
        );
        Ok(wish)
    }
}

impl fmt::Display for Synthetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pages,
            zero,
            text,
            random,
            seed,
        } = self;
        let kib = pages * (PAGE_BYTES as u64 >> 10);
        write!(
            f,
            "{kib}K,zero={zero},text={text},random={random},seed={seed}"
        )
    }
}

/// A number of bytes with K, M, G or T.
fn size(text: &str) -> Result<u64> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K')) => (&text[..at], 10),
        Some((at, 'M')) => (&text[..at], 20),
        Some((at, 'G')) => (&text[..at], 30),
        Some((at, 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .with_context(|| format!("{text:?} is not a size such as 512M or 4G"))?;
    number
        .checked_mul(1 << shift)
        .with_context(|| format!("{text:?} is more bytes than can be counted"))
}

/// A well-mixed number (the finaliser of splitmix64).
const fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// 256 KiB.
const STRETCH_PAGES: u64 = 64;
/// Larger than a core's second cache would make the copy dearer; smaller ones repeat too soon.
const TEMPLATE_BYTES: usize = 1 << 20;
const NOISE_BYTES: usize = 3;
/// A PC's memory: a little below 640 KiB, the rest above 1 MiB.
const LOW_PAGES: u64 = 0x9e;
const HIGH_FIRST: u64 = 0x100;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
const PAGE_SALT: u64 = 0x5851_f42d_4c95_7f2d;
const VMCOREINFO: &[u8] = b"OSRELEASE=synthetic\nPAGESIZE=4096\n";
const WORDS: [&str; 12] = [
    "task_struct\0\0\0\0\0",
    "/usr/lib/x86_64-linux-gnu/",
    "\0\0\0\0\0\0\0\0",
    "inode_cache",
    "the quick brown ",
    "\u{1}\0\0\0\0\0\0\0",
    "kworker/0:1",
    "dentry ",
    "return -EINVAL;\n",
    "sk_buff_head",
    "\0\0\0\0",
    "page fault at ",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(wish: &str, index: u32) -> Vec<[u8; PAGE_BYTES]> {
        let wish: Synthetic = wish.parse().unwrap();
        let mut memory = wish.memory(index, &Arc::new(Templates::new(wish.seed)));
        let mut pages = vec![[0xee; PAGE_BYTES]; usize::try_from(wish.pages).unwrap()];
        let mut statuses = vec![PageStatus::Excluded; pages.len()];
        memory.read(HIGH_FIRST, &mut pages, &mut statuses);
        assert!(statuses.iter().all(|status| *status == PageStatus::Read));
        pages
    }

    #[test]
    fn memory_is_the_same_for_the_same_seed_only() {
        let (one, again) = (pages("8M,seed=5", 0), pages("8M,seed=5", 0));
        assert!(one == again);
        assert!(one != pages("8M,seed=6", 0));
        assert!(one != pages("8M,seed=5", 1));
    }

    #[test]
    fn the_kinds_have_their_shares_and_compress_as_they_should() {
        let zero = |page: &&[u8; PAGE_BYTES]| page.iter().all(|&byte| byte == 0);
        let share = pages("64M", 0).iter().filter(zero).count() * 100 / (64 << 8);
        assert!((20..40).contains(&share), "{share} % are zero");
        let mut output = vec![0; 16 * PAGE_BYTES];
        let mut packed = |wish| {
            let pages = pages(wish, 0);
            let input = pages[..16].as_flattened();
            let mut table = proto::lz4::Table::new();
            let packed = table.compress(input, &mut output).unwrap_or(input.len());
            packed * 100 / input.len()
        };
        assert!((30..60).contains(&packed("64K,zero=0,text=100,random=0")));
        assert!(packed("64K,zero=0,text=0,random=100") >= 100);
    }

    #[test]
    fn wishes_are_read_and_written_alike() {
        let wish: Synthetic = "64G,zero=0,text=100,random=0,seed=7".parse().unwrap();
        assert_eq!(wish.pages, 16 << 20);
        assert_eq!(wish.to_string().parse::<Synthetic>().unwrap(), wish);
        for (text, expected) in [
            ("", "not a size"),
            ("0", "between one page"),
            ("4G,zero=50", "120 percent"),
            ("4G,full=1", "is not zero, text"),
            ("4G,seed", "NAME=VALUE"),
            ("99999999999999T", "can be counted"),
        ] {
            let error = format!("{:#}", text.parse::<Synthetic>().unwrap_err());
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn memory_has_the_pages_that_were_wished_for() {
        for wish in ["4K", "1M", "64M"] {
            let wish: Synthetic = wish.parse().unwrap();
            let memory = wish.memory(0, &Arc::new(Templates::new(1)));
            assert_eq!(memory.machine().pages(), wish.pages);
        }
    }
}
