//! Writing kdump-compressed files in one pass over pages that come in any order.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zerocopy::{
    FromZeros, IntoBytes,
    little_endian::{I32, U32, U64},
};

use super::layout::{
    BLOCK, DESCRIPTOR, Descriptor, FLAG_LZO, Header, SIGNATURE, STATUS_INCOMPLETE, SubHeader,
    VERSION, bitmap_blocks,
};
use super::pack::{Batch, Entry, Packers};
use crate::error::DumpError;
use crate::file::RunWriter;
use crate::machine::Machine;
use crate::notes::{Notes, PageFacts, name_field};
use crate::page::{PAGE_SIZE, RamRange};
use crate::ram::{PageSet, RamMap};
use crate::vmcoreinfo::Vmcoreinfo;

/// Descriptors moved at once when pages that are not in the file are taken out of their row.
const MOVED_DESCRIPTORS: usize = 1 << 15;

/// How pages of a kdump-compressed file are compressed. A page that does not shrink is stored as it
/// is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Compression {
    /// Pages as they are.
    None,
    /// LZO, which every reader has. Pages that come as LZ4 ([`crate::Writer::block`]) are
    /// transcoded without a search; others are compressed.
    #[default]
    Lzo,
    /// zlib, which every reader has. Level 1 (fast) to 9.
    Zlib {
        /// The level.
        level: u32,
    },
    /// zstd, which needs crash 8 or libkdumpfile 0.5. Negative levels are faster than 1.
    Zstd {
        /// The level.
        level: i32,
    },
}

/// Writes the body of a kdump-compressed file.
///
/// The descriptor of each page of RAM has its place from the start, so that pages can come in any
/// order. Readers expect no descriptor for a page that is not in the file: those places are taken
/// out of the row in one pass at the end.
#[derive(Debug)]
pub(crate) struct KdumpWriter {
    file: Arc<File>,
    path: PathBuf,
    packers: Packers,
    descriptors: RunWriter,
    descriptors_at: u64,
    data: RunWriter,
    /// Where the next page's data goes.
    data_end: u64,
    /// The page all zero pages share.
    zeros: Option<Descriptor>,
}

impl KdumpWriter {
    pub(crate) fn new(
        file: &Arc<File>,
        path: &Path,
        ram: &RamMap,
        compression: Compression,
    ) -> Result<Self, DumpError> {
        let packers =
            Packers::new(compression).map_err(DumpError::io("starting to compress", path))?;
        let descriptors_at = (2 + 2 * bitmap_blocks(ram.end())) * BLOCK;
        let descriptors_end = descriptors_at + ram.pages() as u64 * DESCRIPTOR;
        Ok(Self {
            file: Arc::clone(file),
            path: path.to_owned(),
            packers,
            descriptors: RunWriter::new(file, path, "writing page descriptors"),
            descriptors_at,
            data: RunWriter::proving(file, path, "writing page data"),
            data_end: descriptors_end.next_multiple_of(BLOCK),
            zeros: None,
        })
    }

    pub(crate) fn page(&mut self, index: usize, bytes: &[u8; PAGE_SIZE]) -> Result<(), DumpError> {
        self.packers.add_data(index, bytes);
        self.go_on()
    }

    /// Takes the pages of a block, which `lz4` is the LZ4 form of; those without a place are not
    /// wanted.
    pub(crate) fn block(
        &mut self,
        places: &[Option<usize>],
        lz4: &[u8],
        pages: &[u8],
    ) -> Result<(), DumpError> {
        self.packers.add_block(places, lz4, pages);
        self.go_on()
    }

    /// Whether [`Self::block`] is of use.
    pub(crate) const fn takes_blocks(&self) -> bool {
        self.packers.flag() == FLAG_LZO
    }

    pub(crate) fn zero_page(&mut self, index: usize) -> Result<(), DumpError> {
        self.packers.add_zero(index);
        self.go_on()
    }

    fn go_on(&mut self) -> Result<(), DumpError> {
        let packed = self.packers.next();
        match packed.map_err(DumpError::io("compressing", &self.path))? {
            Some(batch) => self.store(&batch),
            None => Ok(()),
        }
    }

    /// Puts a batch behind what is there.
    fn store(&mut self, batch: &Batch) -> Result<(), DumpError> {
        let mut rest = batch.data.as_slice();
        for entry in &batch.entries {
            match *entry {
                Entry::Zero { index } => {
                    let descriptor = match self.zeros {
                        Some(descriptor) => descriptor,
                        None => self.put(&[0; PAGE_SIZE], 0)?,
                    };
                    self.zeros = Some(descriptor);
                    self.describe(index, descriptor)?;
                }
                Entry::Data {
                    index,
                    bytes,
                    flags,
                } => {
                    let (data, behind) = rest.split_at_checked(bytes).unwrap_or((rest, &[]));
                    rest = behind;
                    let descriptor = self.put(data, flags)?;
                    self.describe(index, descriptor)?;
                }
                // The threads make pages of all blocks.
                Entry::Block { .. } => {}
            }
        }
        Ok(())
    }

    /// Puts a page's data behind what is there.
    fn put(&mut self, data: &[u8], flags: u32) -> Result<Descriptor, DumpError> {
        let offset = self.data_end;
        self.data.put(offset, data)?;
        self.data_end += data.len() as u64;
        // A page never has more than 4096 bytes, so the length fits.
        let bytes = U32::new(u32::try_from(data.len()).unwrap_or(u32::MAX));
        Ok(Descriptor {
            offset: U64::new(offset),
            bytes,
            flags: U32::new(flags),
            page_flags: U64::new(0),
        })
    }

    fn describe(&mut self, index: usize, descriptor: Descriptor) -> Result<(), DumpError> {
        let place = self.descriptors_at + index as u64 * DESCRIPTOR;
        self.descriptors.put(place, descriptor.as_bytes())
    }

    /// Writes everything but pages and returns the length of the file.
    pub(crate) fn finish(
        mut self,
        machine: &Machine,
        ram: &RamMap,
        stored: &PageSet,
        facts: &PageFacts,
    ) -> Result<u64, DumpError> {
        while let Some(batch) = self
            .packers
            .last()
            .map_err(DumpError::io("compressing", &self.path))?
        {
            self.store(&batch)?;
        }
        self.descriptors.flush()?;
        self.data.flush()?;
        self.close_gaps(ram, stored)?;
        self.bitmap(2, ram.ranges())?;
        let in_file: Vec<_> = ram.runs(stored, true).map(|(_, run)| run).collect();
        self.bitmap(2 + bitmap_blocks(ram.end()), &in_file)?;
        let notes = Notes::encode(machine, facts);
        let notes_at = self.data_end.next_multiple_of(4);
        let end = notes_at + notes.bytes.len() as u64;
        self.write(&notes.bytes, notes_at, "writing notes")?;
        self.write(
            sub_header(machine, ram, &notes, notes_at).as_bytes(),
            BLOCK,
            "writing the sub-header",
        )?;
        let header = header(machine, ram, facts, self.packers.flag());
        self.write(header.as_bytes(), 0, "writing the header")?;
        self.file
            .sync_all()
            .map_err(DumpError::io("flushing to disk", &self.path))?;
        self.data.prove()?;
        Ok(end)
    }

    fn write(&self, bytes: &[u8], offset: u64, doing: &'static str) -> Result<(), DumpError> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(DumpError::io(doing, &self.path))
    }

    /// Moves descriptors down so that those of pages in the file follow each other. Every
    /// descriptor moves to a place that was read before, so one buffer is enough.
    fn close_gaps(&mut self, ram: &RamMap, stored: &PageSet) -> Result<(), DumpError> {
        let mut to = self.descriptors_at;
        for (index, run) in ram.runs(stored, true) {
            let mut from = self.descriptors_at + index as u64 * DESCRIPTOR;
            let mut left = run.pages * DESCRIPTOR;
            if from == to {
                to += left;
                continue;
            }
            let mut buffer = vec![0; MOVED_DESCRIPTORS * size_of::<Descriptor>()];
            while left > 0 {
                let count = usize::try_from(left)
                    .unwrap_or(usize::MAX)
                    .min(buffer.len());
                let Some(part) = buffer.get_mut(..count) else {
                    break;
                };
                self.file
                    .read_exact_at(part, from)
                    .map_err(DumpError::io("reading page descriptors back", &self.path))?;
                self.descriptors.put(to, part)?;
                let moved = count as u64;
                (from, to, left) = (from + moved, to + moved, left - moved);
            }
        }
        self.descriptors.flush()
    }

    /// Writes one bitmap; only blocks with bits in them take room on the disk.
    fn bitmap(&self, block: u64, runs: &[RamRange]) -> Result<(), DumpError> {
        let mut bits = BitmapWriter {
            out: RunWriter::new(&self.file, &self.path, "writing a bitmap"),
            at: block * BLOCK,
            number: 0,
            byte: 0,
        };
        for run in runs {
            bits.set(run.first.0, run.end())?;
        }
        bits.finish()
    }
}

/// Writes set bits of a bitmap in ascending order, least significant bit first.
struct BitmapWriter {
    out: RunWriter,
    /// Where the bitmap begins in the file.
    at: u64,
    /// The number of the byte that is being filled, and its bits so far.
    number: u64,
    byte: u8,
}

impl BitmapWriter {
    fn set(&mut self, mut bit: u64, end: u64) -> Result<(), DumpError> {
        while bit < end {
            if bit / 8 != self.number {
                self.put()?;
                self.number = bit / 8;
            }
            if bit.is_multiple_of(8) && end - bit >= 8 {
                self.byte = 0xff;
                bit += 8;
            } else {
                self.byte |= 1 << (bit % 8);
                bit += 1;
            }
        }
        Ok(())
    }

    fn put(&mut self) -> Result<(), DumpError> {
        if self.byte != 0 {
            self.out.put(self.at + self.number, &[self.byte])?;
            self.byte = 0;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), DumpError> {
        self.put()?;
        self.out.flush()
    }
}

fn header(machine: &Machine, ram: &RamMap, facts: &PageFacts, flag: u32) -> Header {
    let mut header = Header::new_zeroed();
    let crashed = machine.cpus.iter().find(|cpu| cpu.crashed);
    let incomplete = if facts.summary.is_complete() {
        0
    } else {
        STATUS_INCOMPLETE
    };
    header.signature = SIGNATURE;
    header.version = I32::new(VERSION);
    header.sysname = name_field("Linux");
    header.nodename = name_field(or_unknown(&machine.node));
    header.release = name_field(or_unknown(&machine.release));
    header.kernel_version = name_field(or_unknown(&machine.version));
    header.machine = name_field("x86_64");
    header.time_s = U64::new(machine.crash_time_s);
    header.status = U32::new(flag | incomplete);
    header.block_size = I32::new(4096);
    header.sub_header_blocks = I32::new(1);
    header.bitmap_blocks = low_half(2 * bitmap_blocks(ram.end()));
    header.max_mapnr = low_half(ram.end());
    header.total_ram_blocks = low_half(ram.pages() as u64);
    header.written_blocks = low_half(facts.summary.data + facts.summary.zero);
    header.current_cpu = U32::new(crashed.map_or(0, |cpu| cpu.number));
    header.cpus = I32::new(i32::try_from(machine.cpus.len()).unwrap_or(i32::MAX));
    header
}

/// libkdumpfile takes a header with an empty name for garbage and then knows no architecture.
fn or_unknown(name: &str) -> &str {
    if name.is_empty() { "(unknown)" } else { name }
}

fn sub_header(machine: &Machine, ram: &RamMap, notes: &Notes, notes_at: u64) -> SubHeader {
    let mut sub = SubHeader::new_zeroed();
    let phys_base = Vmcoreinfo::new(&machine.vmcoreinfo).phys_base();
    sub.phys_base = U64::new(phys_base.unwrap_or(0));
    sub.dump_level = I32::new(machine.filter.into());
    sub.end_pfn = U64::new(ram.end());
    sub.end_pfn_64 = U64::new(ram.end());
    sub.max_mapnr_64 = U64::new(ram.end());
    sub.notes_offset = U64::new(notes_at);
    sub.notes_bytes = U64::new(notes.bytes.len() as u64);
    if notes.text_bytes > 0 {
        sub.vmcoreinfo_offset = U64::new(notes_at + notes.text_at);
        sub.vmcoreinfo_bytes = U64::new(notes.text_bytes);
    }
    sub
}

/// The header's counters have 32 bits; the sub-header has what must be exact.
fn low_half(count: u64) -> U32 {
    U32::new(u32::try_from(count & u64::from(u32::MAX)).unwrap_or(u32::MAX))
}
