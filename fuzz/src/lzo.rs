//! Blocks of pages on their way into a vmcore: whatever LZ4 they came as, and however often their
//! bytes repeat within pages and across them, the vmcore gives back the pages.

use std::fs;

use dump::{Compression, Format, Machine, PAGE_SIZE, Pfn, RamRange, Reader, Writer};
use proto::lz4::Table;
use proto::record::{BLOCK_BYTES, Block, Codec};

use crate::byte;
use crate::files::file;

const PAGES_MAX: u16 = 16;
const FIRST: Pfn = Pfn(2);

/// A block: its pages, how it is made, and what it is made of.
pub(crate) fn lzo(mut bytes: &[u8]) {
    let pages = u16::from(byte(&mut bytes)) % PAGES_MAX + 1;
    let raw_bytes = usize::from(pages) * PAGE_SIZE;
    let mut raw = Box::new([0; BLOCK_BYTES]);
    let is_lz4 = byte(&mut bytes).is_multiple_of(2);
    let mut lz4 = bytes.to_vec();
    if is_lz4 {
        let block = Block {
            first: proto::units::Pfn(FIRST.0),
            pages,
            codec: Codec::Lz4,
            body: bytes,
        };
        if block.decode(&mut raw).is_err() {
            return;
        }
    } else {
        grow(&mut raw[..raw_bytes], bytes);
    }
    let raw = &raw[..raw_bytes];
    if !is_lz4 {
        lz4.resize(raw_bytes, 0);
        let Some(length) = Table::new().compress(raw, &mut lz4) else {
            return;
        };
        lz4.truncate(length);
    }
    comes_back(&lz4, raw.as_chunks().0);
}

/// Fills pages: literals, then what repeats from some way back, by turns.
fn grow(raw: &mut [u8], mut bytes: &[u8]) {
    let mut at = 0;
    while at < raw.len() && !bytes.is_empty() {
        for _ in 0..byte(&mut bytes) % 32 {
            if let Some(to) = raw.get_mut(at) {
                *to = byte(&mut bytes);
                at += 1;
            }
        }
        let back = usize::from(byte(&mut bytes)) | usize::from(byte(&mut bytes)) << 8;
        let count = usize::from(byte(&mut bytes)) * 9;
        for _ in 0..count {
            let from = at
                .checked_sub(back + 1)
                .and_then(|from| raw.get(from).copied());
            if let (Some(from), Some(to)) = (from, raw.get_mut(at)) {
                *to = from;
                at += 1;
            }
        }
    }
}

fn comes_back(lz4: &[u8], pages: &[[u8; PAGE_SIZE]]) {
    let path = file(&[]);
    let machine = Machine {
        ram: vec![RamRange {
            first: FIRST,
            pages: pages.len() as u64,
        }],
        ..Machine::default()
    };
    let format = Format::Kdump(Compression::Lzo);
    let mut writer = Writer::create(&path, machine, format).expect("a vmcore can be written");
    let taken = writer.block(FIRST, Some(lz4), pages);
    taken.expect("a block can be taken");
    writer.finish().expect("the vmcore can be finished");
    let mut reader = Reader::open(&path).expect("our own vmcore can be opened");
    let mut page = [0; PAGE_SIZE];
    for (pfn, expected) in (FIRST.0..).map(Pfn).zip(pages) {
        reader
            .read_page(pfn, &mut page)
            .expect("a page can be read");
        assert!(page == *expected, "page {} came back as another", pfn.0);
    }
    fs::remove_file(&path).expect("the file is ours");
}
