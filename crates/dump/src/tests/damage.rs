//! Files that are cut or changed give errors or other pages, never a panic.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{FORMATS, Folder, Given, Kind, Random, machine, write};
use crate::{DumpError, Format, PAGE_SIZE, Pfn, Reader};

const RANGES: [(u64, u64); 2] = [(2, 5), (9, 1)];
const PAGES: [(u64, Given); 6] = [
    (9, Some(Kind::Text)),
    (2, Some(Kind::Zero)),
    (3, Some(Kind::Excluded)),
    (4, Some(Kind::Text)),
    (5, Some(Kind::Unreadable)),
    (6, None),
];

fn read_all(path: &Path) -> Result<(), DumpError> {
    let mut reader = Reader::open(path)?;
    let mut page = [0; PAGE_SIZE];
    let mut result = Ok(());
    // Not the ranges the file claims: a changed one may claim 256 TiB.
    for pfn in (0..16).chain([u64::MAX / 4096, u64::MAX]) {
        let read = reader.read_page(Pfn(pfn), &mut page).map(drop);
        result = result.and(read);
    }
    result
}

#[test]
fn cut_at_every_length() {
    let folder = Folder::new();
    for format in FORMATS {
        let written = write(&folder.file(), machine(&RANGES), format, &PAGES);
        let file = OpenOptions::new().write(true).open(folder.file()).unwrap();
        for length in (0..written.file_bytes).rev() {
            file.set_len(length).unwrap();
            let error = Reader::open(&folder.file()).err();
            assert!(
                matches!(error, Some(DumpError::Malformed { .. })),
                "{format:?} cut to {length} bytes: {error:?}"
            );
        }
    }
}

#[test]
fn changed_at_every_byte() {
    let folder = Folder::new();
    let mut random = Random(7);
    for format in FORMATS {
        write(&folder.file(), machine(&RANGES), format, &PAGES);
        let bytes = fs::read(folder.file()).unwrap();
        let file = OpenOptions::new().write(true).open(folder.file()).unwrap();
        for (at, &byte) in (0..).zip(&bytes) {
            let draw = random.next().to_le_bytes();
            // Stretches of zeros are sampled; bytes that say something get two values each.
            if byte == 0 && draw[4] >= 24 {
                continue;
            }
            for changed in [byte ^ (1 << (draw[5] % 8)), draw[6]] {
                file.write_all_at(&[changed], at).unwrap();
                if let Err(error) = read_all(&folder.file()) {
                    assert!(!error.to_string().contains('\n'), "{error}");
                }
            }
            file.write_all_at(&[byte], at).unwrap();
        }
        read_all(&folder.file()).unwrap();
    }
}

#[test]
fn large_numbers_at_every_word() {
    let folder = Folder::new();
    for format in FORMATS {
        write(&folder.file(), machine(&RANGES), format, &PAGES);
        let bytes = fs::read(folder.file()).unwrap();
        let file = OpenOptions::new().write(true).open(folder.file()).unwrap();
        for (at, word) in (0..).step_by(4).zip(bytes.chunks_exact(4)) {
            // Page data has no numbers in it.
            if word == [0; 4] && at > 8192 {
                continue;
            }
            for number in [u32::MAX, i32::MAX.cast_unsigned(), 0x1000_0000] {
                file.write_all_at(&number.to_le_bytes(), at).unwrap();
                drop(read_all(&folder.file()));
            }
            file.write_all_at(word, at).unwrap();
        }
    }
}

#[test]
fn other_files_are_named() {
    let folder = Folder::new();
    let says = |bytes: &[u8], wanted: &str| {
        fs::write(folder.file(), bytes).unwrap();
        let error = Reader::open(&folder.file()).err().unwrap().to_string();
        assert!(error.contains(wanted), "{error}");
    };
    says(
        b"",
        "the first bytes needs 8 bytes but the file has 0 bytes",
    );
    says(b"makedumpfile\0\0\0\0", "makedumpfile -R");
    says(b"#!/bin/sh\n", "not a vmcore");
    says(
        &[0x7f, b'E', b'L', b'F', 1, 1, 1]
            .map(|byte| [byte; 1])
            .concat()
            .repeat(20),
        "not 64-bit",
    );
}

#[test]
fn compressions_that_are_not_read_are_named() {
    let folder = Folder::new();
    write(
        &folder.file(),
        machine(&[(0, 1)]),
        FORMATS[3],
        &[(0, Some(Kind::Text))],
    );
    let file = OpenOptions::new().write(true).open(folder.file()).unwrap();
    for (flag, name) in [(4_u32, "snappy"), (0x40, "0x40")] {
        file.write_all_at(&flag.to_le_bytes(), 4 * 4096 + 12)
            .unwrap();
        let error = read_all(&folder.file()).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = Reader::open(Path::new("/nonexistent/vmcore"))
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.starts_with("/nonexistent/vmcore: opening for reading failed"),
        "{error}"
    );
    let machine = machine(&[(0, 1)]);
    let error = crate::Writer::create(Path::new("/nonexistent/vmcore"), machine, Format::Elf);
    assert!(
        error
            .unwrap_err()
            .to_string()
            .starts_with("/nonexistent/vmcore: creating failed")
    );
}
