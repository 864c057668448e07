//! The bytes of the headers, spelled out: a change of the format is a change of this file.

use std::fs;

use super::{Folder, Kind, machine, write};
use crate::{Compression, Format};

/// RAM of three pages at pfn 2 and one at pfn 9; pfn 3 excluded, pfn 4 missing.
fn file(format: Format) -> Vec<u8> {
    let folder = Folder::new();
    let pages = [
        (9, Some(Kind::Noise)),
        (2, Some(Kind::Zero)),
        (3, Some(Kind::Excluded)),
    ];
    write(&folder.file(), machine(&[(2, 3), (9, 1)]), format, &pages);
    fs::read(folder.file()).unwrap()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn kdump_header() {
    let file = file(Format::Kdump(Compression::Zstd { level: 1 }));
    assert_eq!(&file[..12], b"KDUMP   \x06\0\0\0");
    for (at, name) in [
        (12, "Linux"),
        (77, "host-a"),
        (142, "6.1.0-test"),
        (207, "#1 SMP"),
        (272, "x86_64"),
    ] {
        assert_eq!(&file[at..at + name.len()], name.as_bytes());
        assert_eq!(file[at + name.len()], 0);
    }
    assert_eq!(u64_at(&file, 408), 1_790_000_000, "time in seconds");
    assert_eq!(u32_at(&file, 424), 0x20 | 0x8, "zstd and incomplete");
    assert_eq!(u32_at(&file, 428), 4096, "block size");
    assert_eq!(u32_at(&file, 432), 1, "blocks of the sub-header");
    assert_eq!(u32_at(&file, 436), 2, "blocks of both bitmaps");
    assert_eq!(u32_at(&file, 440), 10, "max_mapnr");
    assert_eq!(u32_at(&file, 444), 4, "pages of RAM");
    assert_eq!(u32_at(&file, 452), 2, "pages written");
    assert_eq!(u32_at(&file, 456), 3, "crashed CPU");
    assert_eq!(u32_at(&file, 460), 3, "CPUs");
}

#[test]
fn kdump_body() {
    let file = file(Format::Kdump(Compression::None));
    assert_eq!(u64_at(&file, 4096), 71_303_168, "phys_base");
    assert_eq!(u64_at(&file, 4096 + 96), 10, "max_mapnr_64");
    let (text, bytes) = (u64_at(&file, 4096 + 32), u64_at(&file, 4096 + 40));
    let text = usize::try_from(text).unwrap();
    assert_eq!(
        &file[text..text + usize::try_from(bytes).unwrap()],
        machine(&[(2, 1)]).vmcoreinfo
    );
    let notes = usize::try_from(u64_at(&file, 4096 + 48)).unwrap();
    assert_eq!(
        &file[notes..notes + 20],
        b"\x05\0\0\0\x50\x01\0\0\x01\0\0\0CORE\0\0\0\0"
    );
    assert_eq!(&file[8192..8194], [0b0001_1100, 0b10], "bitmap 1: RAM");
    assert_eq!(
        &file[12288..12290],
        [0b0000_0100, 0b10],
        "bitmap 2: in the file"
    );
    // Descriptors of pfn 2 and 9 follow each other although those of 3 and 4 had places between.
    let (zero, noise) = (16384, 16384 + 24);
    assert_eq!(u64_at(&file, noise), 20480, "the page that came first");
    assert_eq!(u64_at(&file, zero), 24576);
    for descriptor in [zero, noise] {
        assert_eq!(u32_at(&file, descriptor + 8), 4096);
        assert_eq!(u32_at(&file, descriptor + 12), 0);
        assert_eq!(u64_at(&file, descriptor + 16), 0);
    }
}

#[test]
fn elf_header() {
    let file = file(Format::Elf);
    assert_eq!(
        &file[..24],
        b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0"
    );
    assert_eq!(u64_at(&file, 32), 64, "program headers");
    assert_eq!(u32_at(&file, 48), 1, "incomplete");
    // Notes, pfn 2, pfn 9, and pfn 2 again where the kernel image is linked.
    assert_eq!(file[56..58], [4, 0]);
    assert_eq!(u32_at(&file, 64), 4, "PT_NOTE is first");
    let data = u64_at(&file, 64 + 56 + 8);
    let segment = |number: usize| {
        let at = 64 + 56 * number;
        assert_eq!(u32_at(&file, at), 1, "PT_LOAD");
        assert_eq!(u64_at(&file, at + 32), 4096, "bytes in the file");
        assert_eq!(u64_at(&file, at + 40), 4096, "bytes in memory");
        assert_eq!(u64_at(&file, at + 48), 0, "p_align");
        [
            u64_at(&file, at + 8),
            u64_at(&file, at + 16),
            u64_at(&file, at + 24),
        ]
    };
    assert_eq!(segment(1), [data, 0xff49_4672_8000_2000, 0x2000]);
    assert_eq!(segment(2), [data + 3 * 4096, 0xff49_4672_8000_9000, 0x9000]);
    assert_eq!(segment(3), [data, 0xffff_ffff_7bc0_2000, 0x2000]);
    assert_eq!(data % 4096, 0);
}

#[test]
fn prstatus_note() {
    let file = file(Format::Kdump(Compression::None));
    let notes = usize::try_from(u64_at(&file, 4096 + 48)).unwrap();
    for (order, pid) in [(0, 1), (1, 0), (2, 4)] {
        let note = notes + order * 356 + 20;
        assert_eq!(
            u32_at(&file, note + 32),
            pid,
            "CPU + 1, or 0 when it did not answer"
        );
    }
    let third = notes + 2 * 356 + 20 + 112;
    assert_eq!(u64_at(&file, third + 8 * 16), 3 << 32 | 16, "rip");
    let silent = notes + 356 + 20 + 112;
    assert!(file[silent..silent + 27 * 8].iter().all(|&byte| byte == 0));
}
