//! Tests of the whole crate: files are written, read back, and damaged.

mod damage;
mod golden;
mod parts;
mod round_trip;

use std::path::{Path, PathBuf};

use crate::{
    Compression, Cpu, Format, GREGS, Machine, PAGE_SIZE, Page, PageState, Pfn, RamRange, Reader,
    Summary, Writer,
};

const FORMATS: [Format; 5] = [
    Format::Elf,
    Format::Kdump(Compression::Lzo),
    Format::Kdump(Compression::Zstd { level: 1 }),
    Format::Kdump(Compression::Zlib { level: 1 }),
    Format::Kdump(Compression::None),
];

/// A generator whose stream never changes (xorshift64*).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            let other = self.below(at as u64 + 1);
            items.swap(at, usize::try_from(other).unwrap());
        }
    }
}

/// What a page is given as; `None` is never given.
type Given = Option<Kind>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Bytes that do not compress.
    Noise,
    /// Bytes that do.
    Text,
    Zero,
    ZeroData,
    Excluded,
    Unreadable,
}

fn content(pfn: u64, kind: Kind) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    let mut random = Random(pfn + 1);
    match kind {
        Kind::Noise => page.fill_with(|| random.next().to_le_bytes()[3]),
        Kind::Text => page.fill_with(|| b'a' + random.next().to_le_bytes()[3] % 4),
        Kind::Zero | Kind::ZeroData | Kind::Excluded | Kind::Unreadable => {}
    }
    page
}

fn ram(ranges: &[(u64, u64)]) -> Vec<RamRange> {
    ranges
        .iter()
        .map(|&(first, pages)| RamRange {
            first: Pfn(first),
            pages,
        })
        .collect()
}

fn machine(ranges: &[(u64, u64)]) -> Machine {
    let registers = |cpu: u64| std::array::from_fn::<u64, GREGS, _>(|at| cpu << 32 | at as u64);
    Machine {
        ram: ram(ranges),
        vmcoreinfo: b"OSRELEASE=6.1.0-test\nPAGESIZE=4096\nNUMBER(phys_base)=71303168\n\
            SYMBOL(_stext)=ffffffff88c00000\nKERNELOFFSET=7c00000\n"
            .to_vec(),
        cpus: vec![
            Cpu {
                number: 0,
                pid: 0,
                registers: Some(registers(1)),
                crashed: false,
            },
            Cpu {
                number: 1,
                pid: 77,
                registers: None,
                crashed: false,
            },
            Cpu {
                number: 3,
                pid: 4096,
                registers: Some(registers(3)),
                crashed: true,
            },
        ],
        node: "host-a".to_owned(),
        release: "6.1.0-test".to_owned(),
        version: "#1 SMP".to_owned(),
        crash_time_s: 1_790_000_000,
        page_offset: 0xff49_4672_8000_0000,
        kernel_image: Some(RamRange {
            first: Pfn(ranges[0].0),
            pages: 2,
        }),
        filter: 0,
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("vmcore")
    }
}

fn write(path: &Path, machine: Machine, format: Format, pages: &[(u64, Given)]) -> Summary {
    let mut writer = Writer::create(path, machine, format).unwrap();
    for &(pfn, given) in pages {
        let Some(kind) = given else { continue };
        let bytes = content(pfn, kind);
        let page = match kind {
            Kind::Noise | Kind::Text | Kind::ZeroData => Page::Data(&bytes),
            Kind::Zero => Page::Zero,
            Kind::Excluded => Page::Excluded,
            Kind::Unreadable => Page::Unreadable,
        };
        writer.page(Pfn(pfn), page).unwrap();
    }
    writer.finish().unwrap()
}

fn state(given: Given) -> PageState {
    match given {
        None => PageState::Missing,
        Some(Kind::Noise | Kind::Text | Kind::Zero | Kind::ZeroData) => PageState::Data,
        Some(Kind::Excluded) => PageState::Excluded,
        Some(Kind::Unreadable) => PageState::Unreadable,
    }
}

/// Checks every page of a file against what was given.
fn check_pages(reader: &mut Reader, pages: &[(u64, Given)]) {
    let mut page = [0; PAGE_SIZE];
    for &(pfn, given) in pages {
        let found = reader.read_page(Pfn(pfn), &mut page).unwrap();
        assert_eq!(found, state(given), "pfn {pfn:#x}");
        if let (PageState::Data, Some(kind)) = (found, given) {
            assert!(page == content(pfn, kind), "pfn {pfn:#x} has other bytes");
        }
    }
}
