//! What is written is what is read, whatever the order and the kinds of pages.

use super::{FORMATS, Folder, Given, Kind, Random, check_pages, machine, ram, state, write};
use crate::{Format, Machine, PAGE_SIZE, Page, PageState, Pfn, Reader, Writer};

#[test]
fn all_kinds_in_random_order() {
    for seed in 1..=12 {
        let mut random = Random(seed);
        let ranges = random_ranges(&mut random);
        for format in FORMATS {
            // The first seeds leave nothing out, so that both ways to place descriptors are taken.
            let kinds = if seed <= 3 { 4 } else { 7 };
            let pages = random_pages(&mut random, &ranges, kinds);
            round_trip(&ranges, format, &pages);
        }
    }
}

fn random_ranges(random: &mut Random) -> Vec<(u64, u64)> {
    let mut first = random.below(3);
    (0..=random.below(5))
        .map(|_| {
            let pages = 1 + random.below(150);
            let range = (first, pages);
            first += pages + 1 + random.below(40_000);
            range
        })
        .collect()
}

fn random_pages(random: &mut Random, ranges: &[(u64, u64)], kinds: u64) -> Vec<(u64, Given)> {
    let mut pages: Vec<_> = ranges
        .iter()
        .flat_map(|&(first, pages)| first..first + pages)
        .map(|pfn| (pfn, random_kind(random.below(kinds))))
        .collect();
    random.shuffle(&mut pages);
    pages
}

const fn random_kind(draw: u64) -> Given {
    Some(match draw {
        0 => Kind::Noise,
        1 => Kind::Text,
        2 => Kind::Zero,
        3 => Kind::ZeroData,
        4 => Kind::Excluded,
        5 => Kind::Unreadable,
        _ => return None,
    })
}

fn round_trip(ranges: &[(u64, u64)], format: Format, pages: &[(u64, Given)]) {
    let folder = Folder::new();
    let written = write(&folder.file(), machine(ranges), format, pages);
    let mut reader = Reader::open(&folder.file()).unwrap();
    let count = |wanted: PageState| {
        pages
            .iter()
            .filter(|(_, given)| state(*given) == wanted)
            .count() as u64
    };
    assert_eq!(written.data + written.zero, count(PageState::Data));
    assert_eq!(written.excluded, count(PageState::Excluded));
    assert_eq!(written.unreadable, count(PageState::Unreadable));
    assert_eq!(written.missing, count(PageState::Missing));
    assert_eq!(reader.summary(), Some(written));
    assert_eq!(reader.is_incomplete(), written.missing > 0);
    assert_eq!(reader.machine(), &machine(ranges));
    check_pages(&mut reader, pages);
    let mut page = [0; PAGE_SIZE];
    let beyond = reader.machine().end();
    assert_eq!(
        reader.read_page(beyond, &mut page).unwrap(),
        PageState::NotRam
    );
    assert_eq!(
        reader.read_page(Pfn(u64::MAX), &mut page).unwrap(),
        PageState::NotRam
    );
}

#[test]
fn a_page_above_4_gib() {
    for format in FORMATS {
        let pages = [(1, Some(Kind::Text)), (0x10_0000, Some(Kind::Noise))];
        round_trip(&[(1, 1), (0x10_0000, 1)], format, &pages);
    }
}

#[test]
fn nothing_arrived() {
    for format in FORMATS {
        round_trip(&[(4, 3)], format, &[(4, None), (5, None), (6, None)]);
    }
}

#[test]
fn a_kdump_file_tells_its_filter_level() {
    let folder = Folder::new();
    let machine = Machine {
        filter: 31,
        ..machine(&[(0, 1)])
    };
    let format = Format::Kdump(crate::Compression::None);
    write(
        &folder.file(),
        machine,
        format,
        &[(0, Some(Kind::Excluded))],
    );
    assert_eq!(Reader::open(&folder.file()).unwrap().machine().filter, 31);
}

#[test]
fn a_crash_time_line_is_left_out() {
    let folder = Folder::new();
    for format in FORMATS {
        let mut machine = machine(&[(0, 1)]);
        let kept = machine.vmcoreinfo.clone();
        machine
            .vmcoreinfo
            .extend_from_slice(b"CRASHTIME=1790000000\n");
        write(&folder.file(), machine, format, &[(0, Some(Kind::Text))]);
        assert_eq!(
            Reader::open(&folder.file()).unwrap().machine().vmcoreinfo,
            kept
        );
    }
}

#[test]
fn each_page_once_and_only_ram() {
    let folder = Folder::new();
    for format in FORMATS {
        let mut writer = Writer::create(&folder.file(), machine(&[(8, 4)]), format).unwrap();
        writer.page(Pfn(9), Page::Zero).unwrap();
        assert!(writer.has(Pfn(9)));
        assert!(!writer.has(Pfn(10)));
        let twice = writer.page(Pfn(9), Page::Excluded).unwrap_err();
        assert!(
            twice.to_string().contains("pfn 0x9 was given twice"),
            "{twice}"
        );
        for pfn in [0, 7, 12, u64::MAX] {
            let error = writer.page(Pfn(pfn), Page::Zero).unwrap_err();
            assert!(error.to_string().contains("is not RAM"), "{error}");
        }
        assert_eq!(writer.finish().unwrap().missing, 3);
    }
}

#[test]
fn machines_that_contradict_themselves() {
    let folder = Folder::new();
    let refused = |change: fn(&mut Machine), says: &str| {
        let mut machine = machine(&[(0, 4), (8, 4)]);
        change(&mut machine);
        let error = Writer::create(&folder.file(), machine, Format::Elf).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    };
    refused(|machine| machine.ram.clear(), "no RAM ranges");
    refused(
        |machine| machine.ram = ram(&[(0, 4), (3, 2)]),
        "begins before pfn 0x4",
    );
    refused(
        |machine| machine.ram = ram(&[(8, 4), (0, 2)]),
        "begins before",
    );
    refused(|machine| machine.ram = ram(&[(8, 0)]), "has no pages");
    refused(
        |machine| machine.ram = ram(&[(1 << 36, 1)]),
        "passes the limit",
    );
    refused(
        |machine| machine.ram = ram(&[(1, u64::MAX)]),
        "passes the limit",
    );
    refused(|machine| machine.cpus.swap(0, 1), "CPU 0 follows CPU 1");
    refused(
        |machine| machine.vmcoreinfo = vec![b'x'; 2 << 20],
        "VMCOREINFO has 2097152 bytes",
    );
}

#[test]
fn more_segments_than_the_elf_header_can_count() {
    let folder = Folder::new();
    let pages = 140_000;
    let mut writer = Writer::create(&folder.file(), machine(&[(0, pages)]), Format::Elf).unwrap();
    for pfn in (0..pages).step_by(2) {
        writer.page(Pfn(pfn), Page::Zero).unwrap();
    }
    writer.finish().unwrap();
    let mut reader = Reader::open(&folder.file()).unwrap();
    let mut page = [1; PAGE_SIZE];
    for pfn in [0, 70_000, 139_998] {
        assert_eq!(
            reader.read_page(Pfn(pfn), &mut page).unwrap(),
            PageState::Data
        );
    }
    assert_eq!(
        reader.read_page(Pfn(1), &mut page).unwrap(),
        PageState::Missing
    );
}

#[test]
fn more_segments_than_an_elf_file_has_room_for() {
    let folder = Folder::new();
    let pages = 270_000;
    let mut writer = Writer::create(&folder.file(), machine(&[(0, pages)]), Format::Elf).unwrap();
    for pfn in (0..pages).step_by(2) {
        writer.page(Pfn(pfn), Page::Zero).unwrap();
    }
    let error = writer.finish().unwrap_err();
    assert!(
        error.to_string().contains("write kdump-compressed instead"),
        "{error}"
    );
}
