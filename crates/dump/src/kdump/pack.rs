//! Compressing pages on all CPUs, in the order they came.
//!
//! Pages are gathered in batches, batches go to the threads in turn, and are taken back in the same
//! turn: so the order is kept without a number on anything.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::{fmt, io};

use flate2::{Compress, FlushCompress, Status};

use super::layout::{FLAG_LZO, FLAG_ZLIB, FLAG_ZSTD};
use super::lzo;
use crate::kdump::Compression;
use crate::page::PAGE_SIZE;

/// Pages with data in a batch: enough that a batch's way to a thread and back does not show.
const BATCH_PAGES: usize = 64;
/// Pages of any kind in a batch.
const BATCH_ENTRIES: usize = 4096;
/// Batches that a thread may have before it: one to work on, one that waits.
const BATCHES_EACH: usize = 2;
const THREADS_MAX: usize = 8;

/// What became of a page.
#[derive(Clone, Copy, Debug)]
pub(super) enum Entry {
    /// It is zero.
    Zero {
        /// Its place among all pages of RAM.
        index: usize,
    },
    /// So many next bytes of the batch are its data.
    Data {
        /// Its place among all pages of RAM.
        index: usize,
        /// A whole page before it is packed.
        bytes: usize,
        /// How it is compressed.
        flags: u32,
    },
    /// So many next bytes of the batch are the LZ4 form of pages that follow it there. The next
    /// places of the batch are theirs. Packed, it becomes entries of its pages.
    Block {
        /// Pages.
        pages: usize,
        /// Bytes of the LZ4 form.
        bytes: usize,
    },
}

/// Pages that travel together: before they are packed, and after.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) entries: Vec<Entry>,
    pub(super) data: Vec<u8>,
    /// Of pages in blocks: their places among all pages of RAM. None: it is not wanted.
    places: Vec<Option<usize>>,
}

/// The threads.
#[derive(Debug)]
pub(super) struct Packers {
    threads: Vec<(SyncSender<Batch>, Receiver<Batch>)>,
    gathered: Batch,
    /// Batches given to threads so far, and taken back.
    given: usize,
    taken: usize,
    flag: u32,
}

impl Packers {
    pub(super) fn new(compression: Compression) -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, usize::from);
        let mut threads = Vec::new();
        for _ in 0..count.min(THREADS_MAX) {
            let mut compressor = Compressor::new(compression)?;
            let (to_thread, batches) = sync_channel::<Batch>(BATCHES_EACH);
            let (packed, from_thread) = sync_channel(BATCHES_EACH);
            thread::Builder::new()
                .name("pack".to_owned())
                .spawn(move || {
                    for batch in batches {
                        if packed.send(compressor.pack_all(&batch)).is_err() {
                            return;
                        }
                    }
                })?;
            threads.push((to_thread, from_thread));
        }
        Ok(Self {
            threads,
            gathered: Batch::default(),
            given: 0,
            taken: 0,
            flag: flag(compression),
        })
    }

    /// The header's bit for the compression.
    pub(super) const fn flag(&self) -> u32 {
        self.flag
    }

    pub(super) fn add_data(&mut self, index: usize, page: &[u8; PAGE_SIZE]) {
        self.gathered.entries.push(Entry::Data {
            index,
            bytes: PAGE_SIZE,
            flags: 0,
        });
        self.gathered.data.extend_from_slice(page);
    }

    pub(super) fn add_block(&mut self, places: &[Option<usize>], lz4: &[u8], pages: &[u8]) {
        self.gathered.entries.push(Entry::Block {
            pages: places.len(),
            bytes: lz4.len(),
        });
        self.gathered.places.extend_from_slice(places);
        self.gathered.data.extend_from_slice(lz4);
        self.gathered.data.extend_from_slice(pages);
    }

    pub(super) fn add_zero(&mut self, index: usize) {
        self.gathered.entries.push(Entry::Zero { index });
    }

    /// A batch that is packed, if the pages added since the last call call for one: when enough are
    /// gathered and every thread has its fill.
    pub(super) fn next(&mut self) -> io::Result<Option<Batch>> {
        let full = self.gathered.data.len() >= BATCH_PAGES * PAGE_SIZE
            || self.gathered.entries.len() >= BATCH_ENTRIES;
        if !full {
            return Ok(None);
        }
        let fill = self.given - self.taken >= self.threads.len() * BATCHES_EACH;
        let packed = if fill { Some(self.take()?) } else { None };
        self.give()?;
        Ok(packed)
    }

    /// The next batch when no page follows; `None` when all are taken.
    pub(super) fn last(&mut self) -> io::Result<Option<Batch>> {
        if !self.gathered.entries.is_empty() {
            if self.given - self.taken >= self.threads.len() * BATCHES_EACH {
                return self.take().map(Some);
            }
            self.give()?;
        }
        if self.taken == self.given {
            return Ok(None);
        }
        self.take().map(Some)
    }

    fn give(&mut self) -> io::Result<()> {
        let batch = std::mem::take(&mut self.gathered);
        let thread = self.threads.get(self.given % self.threads.len());
        self.given += 1;
        thread
            .and_then(|(to_thread, _)| to_thread.send(batch).ok())
            .ok_or_else(gone)
    }

    fn take(&mut self) -> io::Result<Batch> {
        let thread = self.threads.get(self.taken % self.threads.len());
        self.taken += 1;
        thread
            .and_then(|(_, from_thread)| from_thread.recv().ok())
            .ok_or_else(gone)
    }
}

fn gone() -> io::Error {
    io::Error::other("a compressing thread has ended before its work")
}

const fn flag(compression: Compression) -> u32 {
    match compression {
        Compression::None => 0,
        Compression::Lzo => FLAG_LZO,
        Compression::Zlib { .. } => FLAG_ZLIB,
        Compression::Zstd { .. } => FLAG_ZSTD,
    }
}

enum Compressor {
    None,
    /// With room for a page's LZ4 form.
    Lzo(Vec<u8>),
    Zlib(Compress),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Compressor")
    }
}

impl Batch {
    fn put(&mut self, index: usize, data: &[u8], flags: u32) {
        self.data.extend_from_slice(data);
        self.entries.push(Entry::Data {
            index,
            bytes: data.len(),
            flags,
        });
    }
}

impl Compressor {
    fn new(compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::None,
            Compression::Lzo => {
                Self::Lzo(vec![0; lz4_flex::block::get_maximum_output_size(PAGE_SIZE)])
            }
            Compression::Zlib { level } => {
                Self::Zlib(Compress::new(flate2::Compression::new(level.min(9)), true))
            }
            Compression::Zstd { level } => {
                let mut zstd = zstd::bulk::Compressor::new(level)?;
                zstd.include_checksum(false)?;
                Self::Zstd(zstd)
            }
        })
    }

    fn pack_all(&mut self, batch: &Batch) -> Batch {
        let mut packed = Batch {
            entries: Vec::with_capacity(batch.entries.len().max(batch.places.len())),
            data: Vec::with_capacity(batch.data.len()),
            places: Vec::new(),
        };
        let (mut rest, mut places) = (batch.data.as_slice(), batch.places.as_slice());
        for entry in &batch.entries {
            match *entry {
                Entry::Zero { .. } => packed.entries.push(*entry),
                Entry::Data { index, .. } => {
                    let Some((page, behind)) = rest.split_first_chunk() else {
                        break;
                    };
                    rest = behind;
                    self.pack_page(index, page, &mut packed);
                }
                Entry::Block { pages, bytes } => {
                    let (lz4, behind) = rest.split_at(bytes);
                    let (contents, behind) = behind.split_at(pages * PAGE_SIZE);
                    let (those, others) = places.split_at(pages);
                    (rest, places) = (behind, others);
                    self.pack_block(those, lz4, contents, &mut packed);
                }
            }
        }
        packed
    }

    fn pack_page(&mut self, index: usize, page: &[u8; PAGE_SIZE], packed: &mut Batch) {
        let mut buffer = [0; PAGE_SIZE];
        let count = self.pack(page, &mut buffer);
        let shrunk = count.filter(|&count| count < PAGE_SIZE);
        match shrunk.and_then(|count| buffer.get(..count)) {
            Some(data) => packed.put(index, data, self.flag()),
            None => packed.put(index, page, 0),
        }
    }

    /// Makes pages of a block. Those that its LZ4 form does not tell, because it is not theirs, are
    /// packed one by one.
    fn pack_block(
        &mut self,
        places: &[Option<usize>],
        lz4: &[u8],
        contents: &[u8],
        packed: &mut Batch,
    ) {
        let (pages, _) = contents.as_chunks::<PAGE_SIZE>();
        let mut wanted = places.iter().zip(pages);
        lzo::transcode(lz4, contents, |shrunk| {
            if let Some((Some(index), page)) = wanted.next() {
                match shrunk {
                    Some(data) => packed.put(*index, data, FLAG_LZO),
                    None => packed.put(*index, page, 0),
                }
            }
        });
        for (index, page) in wanted {
            if let Some(index) = index {
                self.pack_page(*index, page, packed);
            }
        }
    }

    const fn flag(&self) -> u32 {
        match self {
            Self::None => 0,
            Self::Lzo(_) => FLAG_LZO,
            Self::Zlib(_) => FLAG_ZLIB,
            Self::Zstd(_) => FLAG_ZSTD,
        }
    }

    /// Compresses a page into `packed` and returns the length, or `None` when it does not fit: then
    /// the page would not have shrunk.
    fn pack(&mut self, page: &[u8; PAGE_SIZE], packed: &mut [u8; PAGE_SIZE]) -> Option<usize> {
        match self {
            Self::None => None,
            Self::Lzo(room) => {
                let count = lz4_flex::block::compress_into(page, room).ok()?;
                let mut fit = None;
                lzo::transcode(room.get(..count)?, page, |page| {
                    fit = page.and_then(|page| {
                        packed.get_mut(..page.len())?.copy_from_slice(page);
                        Some(page.len())
                    });
                });
                fit
            }
            Self::Zlib(zlib) => {
                zlib.reset();
                match zlib.compress(page, packed, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => usize::try_from(zlib.total_out()).ok(),
                    Ok(Status::Ok | Status::BufError) | Err(_) => None,
                }
            }
            Self::Zstd(zstd) => zstd.compress_to_buffer(page, packed.as_mut_slice()).ok(),
        }
    }
}
