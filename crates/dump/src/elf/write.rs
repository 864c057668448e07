//! Writing ELF vmcores: a place for every page from the start, segments at the end.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zerocopy::{
    FromZeros, IntoBytes,
    little_endian::{U16, U32, U64},
};

use super::layout::{
    EM_X86_64, ET_CORE, FLAG_INCOMPLETE, FLAGS_RWX, FileHeader, IDENT, PN_XNUM, PT_LOAD, PT_NOTE,
    Section, Segment,
};
use crate::error::DumpError;
use crate::file::RunWriter;
use crate::machine::Machine;
use crate::notes::{Notes, PageFacts};
use crate::page::{PAGE_SIZE, Pfn, RamRange};
use crate::ram::{PageSet, RamMap};
use crate::vmcoreinfo::Vmcoreinfo;

const PAGE: u64 = PAGE_SIZE as u64;
/// Room for program headers: `crash` reads all bytes before the first page into memory, and with
/// this many that is 7 MiB.
const SEGMENTS_MAX: usize = 1 << 17;
/// Where the kernel image is linked; KASLR and `phys_base` tell where it lies.
const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// Writes the body of an ELF vmcore.
#[derive(Debug)]
pub(crate) struct ElfWriter {
    file: Arc<File>,
    path: PathBuf,
    data: RunWriter,
    segments_max: usize,
    notes_at: u64,
    data_at: u64,
}

impl ElfWriter {
    pub(crate) fn new(
        file: &Arc<File>,
        path: &Path,
        machine: &Machine,
        ram: &RamMap,
    ) -> Result<Self, DumpError> {
        // Every second page missing is the worst case, and the kernel image is mapped twice.
        let worst = 2 * (ram.ranges().len() + ram.pages() / 2 + 1) + 1;
        let segments_max = worst.min(SEGMENTS_MAX);
        let section_at = size_of::<FileHeader>() + segments_max * size_of::<Segment>();
        let notes_at = section_at + size_of::<Section>();
        let data_at = (notes_at + Notes::bytes_max(machine)).next_multiple_of(PAGE_SIZE) as u64;
        let end = data_at + ram.pages() as u64 * PAGE;
        file.set_len(end)
            .map_err(DumpError::io("setting its length", path))?;
        Ok(Self {
            file: Arc::clone(file),
            path: path.to_owned(),
            data: RunWriter::proving(file, path, "writing page data"),
            segments_max,
            notes_at: notes_at as u64,
            data_at,
        })
    }

    pub(crate) fn page(&mut self, index: usize, bytes: &[u8; PAGE_SIZE]) -> Result<(), DumpError> {
        self.data.put(self.data_at + index as u64 * PAGE, bytes)
    }

    /// Writes everything but pages and returns the length of the file.
    pub(crate) fn finish(
        mut self,
        machine: &Machine,
        ram: &RamMap,
        stored: &PageSet,
        facts: &PageFacts,
    ) -> Result<u64, DumpError> {
        self.data.flush()?;
        let notes = Notes::encode(machine, facts);
        let segments = self.segments(machine, ram, stored, &notes)?;
        let section_at = self.notes_at - size_of::<Section>() as u64;
        let mut header = header(facts);
        if let Some(count) = u16::try_from(segments.len())
            .ok()
            .filter(|&count| count < PN_XNUM)
        {
            header.segments = U16::new(count);
        } else {
            let mut section = Section::new_zeroed();
            // At most SEGMENTS_MAX, so the number fits.
            section.info = U32::new(u32::try_from(segments.len()).unwrap_or(u32::MAX));
            header.segments = U16::new(PN_XNUM);
            header.sections_at = U64::new(section_at);
            header.sections = U16::new(1);
            self.write(section.as_bytes(), section_at, "writing the section header")?;
        }
        self.write(&notes.bytes, self.notes_at, "writing notes")?;
        self.write(
            segments.as_bytes(),
            size_of::<FileHeader>() as u64,
            "writing segments",
        )?;
        self.write(header.as_bytes(), 0, "writing the header")?;
        self.file
            .sync_all()
            .map_err(DumpError::io("flushing to disk", &self.path))?;
        self.data.prove()?;
        Ok(self.data_at + ram.pages() as u64 * PAGE)
    }

    fn write(&self, bytes: &[u8], offset: u64, doing: &'static str) -> Result<(), DumpError> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(DumpError::io(doing, &self.path))
    }

    /// PT_NOTE first, then RAM in the direct map, then the kernel image where it is linked. Runs of
    /// pages that are not in the file lie between segments: they would read as zeros inside one.
    fn segments(
        &self,
        machine: &Machine,
        ram: &RamMap,
        stored: &PageSet,
        notes: &Notes,
    ) -> Result<Vec<Segment>, DumpError> {
        let mut segments = vec![note_segment(self.notes_at, notes.bytes.len() as u64)];
        for (index, run) in ram.runs(stored, true) {
            let address = machine.page_offset.wrapping_add(run.first.address());
            segments.push(self.load(index, run, address));
        }
        let phys_base = Vmcoreinfo::new(&machine.vmcoreinfo).phys_base();
        if let (Some(image), Some(phys_base)) = (machine.kernel_image, phys_base) {
            let displacement = START_KERNEL_MAP.wrapping_sub(phys_base);
            for (index, run) in ram.runs(stored, true) {
                let Some((skipped, run)) = overlap(run, image) else {
                    continue;
                };
                let address = run.first.address().wrapping_add(displacement);
                segments.push(self.load(index + skipped, run, address));
            }
        }
        if segments.len() > self.segments_max {
            let what = format!(
                "pages that are not in the file cut it into {} segments, and an ELF file here has room for {}; write kdump-compressed instead",
                segments.len(),
                self.segments_max
            );
            return Err(DumpError::unsupported(&self.path, what));
        }
        Ok(segments)
    }

    fn load(&self, index: usize, run: RamRange, virtual_address: u64) -> Segment {
        let bytes = U64::new(run.pages * PAGE);
        Segment {
            kind: U32::new(PT_LOAD),
            flags: U32::new(FLAGS_RWX),
            offset: U64::new(self.data_at + index as u64 * PAGE),
            virtual_address: U64::new(virtual_address),
            physical_address: U64::new(run.first.address()),
            file_bytes: bytes,
            memory_bytes: bytes,
            // Not 4096: `crash` would take the file for one of the netdump of 2002, without KASLR.
            align: U64::new(0),
        }
    }
}

fn note_segment(offset: u64, bytes: u64) -> Segment {
    let mut segment = Segment::new_zeroed();
    segment.kind = U32::new(PT_NOTE);
    segment.offset = U64::new(offset);
    segment.file_bytes = U64::new(bytes);
    segment.memory_bytes = U64::new(bytes);
    segment
}

/// The part of `run` inside `image`, and how many pages of `run` come before it.
fn overlap(run: RamRange, image: RamRange) -> Option<(usize, RamRange)> {
    let first = run.first.0.max(image.first.0);
    let end = run.end().min(image.end());
    let pages = end.checked_sub(first).filter(|&pages| pages > 0)?;
    let skipped = usize::try_from(first - run.first.0).ok()?;
    Some((
        skipped,
        RamRange {
            first: Pfn(first),
            pages,
        },
    ))
}

fn header(facts: &PageFacts) -> FileHeader {
    let mut header = FileHeader::new_zeroed();
    header.ident = IDENT;
    header.kind = U16::new(ET_CORE);
    header.machine = U16::new(EM_X86_64);
    header.version = U32::new(1);
    header.segments_at = U64::new(size_of::<FileHeader>() as u64);
    header.flags = U32::new(if facts.summary.is_complete() {
        0
    } else {
        FLAG_INCOMPLETE
    });
    header.header_bytes = U16::new(64);
    header.segment_bytes = U16::new(56);
    header.section_bytes = U16::new(64);
    header
}
