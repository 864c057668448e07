//! Reading ELF vmcores: ours, the kernel's, makedumpfile's and QEMU's.

use zerocopy::FromBytes;

use super::layout::{
    EM_X86_64, ET_CORE, FLAG_INCOMPLETE, FileHeader, IDENT, PN_XNUM, PT_LOAD, PT_NOTE, Section,
    Segment,
};
use crate::error::DumpError;
use crate::file::Input;
use crate::machine::Machine;
use crate::notes::{self, PageFacts, Parsed};
use crate::page::{PAGE_SIZE, PFN_LIMIT, Pfn, RamRange};

const PAGE: u64 = PAGE_SIZE as u64;
/// What the class, the byte order and the version take in the identification.
const IDENT_CHECKED: usize = 7;

/// Reads pages of an ELF vmcore.
#[derive(Debug)]
pub(crate) struct ElfReader {
    /// Sorted by first page; they may overlap.
    runs: Vec<Run>,
}

/// Whole pages of one segment.
#[derive(Debug)]
struct Run {
    range: RamRange,
    /// Pages from the first that are in the file.
    stored: u64,
    offset: u64,
}

/// What the headers and notes of a file say.
pub(crate) struct Opened {
    pub(crate) machine: Machine,
    pub(crate) facts: Option<PageFacts>,
    pub(crate) incomplete: bool,
    pub(crate) reader: ElfReader,
}

impl ElfReader {
    pub(crate) fn open(input: &Input) -> Result<Opened, DumpError> {
        let header: FileHeader = input.record("the ELF header", 0)?;
        check(input, &header)?;
        let (at, bytes) = segments(input, &header)?;
        let mut parsed = Parsed::default();
        let mut runs = Vec::new();
        for (segment, place) in table(&bytes)
            .iter()
            .zip((at..).step_by(size_of::<Segment>()))
        {
            match segment.kind.get() {
                PT_NOTE => {
                    parsed = notes::read(input, segment.offset.get(), segment.file_bytes.get())?;
                }
                PT_LOAD => runs.extend(run(input, place, segment)?),
                _ => {}
            }
        }
        runs.sort_by_key(|run| (run.range.first, std::cmp::Reverse(run.stored)));
        // A segment that maps pages again (the kernel image) adds nothing.
        runs.dedup_by(|later, kept| {
            later.range.end() <= kept.range.end()
                && later.range.first.0 + later.stored <= kept.range.first.0 + kept.stored
        });
        if parsed.machine.ram.is_empty() {
            parsed.machine.ram = union(&runs);
        }
        Ok(Opened {
            machine: parsed.machine,
            facts: parsed.facts,
            incomplete: header.flags.get() & FLAG_INCOMPLETE != 0,
            reader: Self { runs },
        })
    }

    /// Reads a page's bytes; false when the page is not in the file.
    pub(crate) fn page(
        &self,
        input: &Input,
        pfn: Pfn,
        page: &mut [u8; PAGE_SIZE],
    ) -> Result<bool, DumpError> {
        let Some(offset) = self.place(pfn, 1) else {
            return Ok(false);
        };
        input.fill("page data", offset, page)?;
        Ok(true)
    }

    /// Reads pages that follow each other with one system call; false, with nothing read, when they
    /// are not in one piece in the file.
    pub(crate) fn run(
        &self,
        input: &Input,
        first: Pfn,
        pages: &mut [[u8; PAGE_SIZE]],
    ) -> Result<bool, DumpError> {
        let Some(offset) = self.place(first, pages.len() as u64) else {
            return Ok(false);
        };
        input.fill("page data", offset, pages.as_flattened_mut())?;
        Ok(true)
    }

    /// Where so many pages lie in one piece.
    fn place(&self, first: Pfn, pages: u64) -> Option<u64> {
        let after = self.runs.partition_point(|run| run.range.first <= first);
        let run = self.runs.get(after.checked_sub(1)?)?;
        let skipped = first.0 - run.range.first.0;
        // Checked when the segment was read, so this cannot wrap.
        (skipped.saturating_add(pages) <= run.stored).then_some(run.offset + skipped * PAGE)
    }
}

fn check(input: &Input, header: &FileHeader) -> Result<(), DumpError> {
    if header.ident.get(..IDENT_CHECKED) != IDENT.get(..IDENT_CHECKED) {
        return Err(DumpError::unsupported(
            input.path(),
            "an ELF file, but not 64-bit little-endian; only x86-64 vmcores are read",
        ));
    }
    let (kind, machine) = (header.kind.get(), header.machine.get());
    if kind != ET_CORE || machine != EM_X86_64 {
        return Err(DumpError::unsupported(
            input.path(),
            format!(
                "an ELF file of type {kind} for machine {machine}, not a core file (4) of x86-64 (62)"
            ),
        ));
    }
    let bytes = usize::from(header.segment_bytes.get());
    if bytes != size_of::<Segment>() {
        let what = format!("program headers of {bytes} bytes, not 56");
        return Err(DumpError::malformed(input.path(), 54, what));
    }
    Ok(())
}

/// The program headers as bytes, and where they lie.
fn segments(input: &Input, header: &FileHeader) -> Result<(u64, Vec<u8>), DumpError> {
    let mut count = u32::from(header.segments.get());
    if header.segments.get() == PN_XNUM {
        let section: Section = input.record("section header 0", header.sections_at.get())?;
        count = section.info.get();
    }
    let at = header.segments_at.get();
    let bytes = u64::from(count) * size_of::<Segment>() as u64;
    Ok((at, input.bytes("the program headers", at, bytes)?))
}

fn table(bytes: &[u8]) -> &[Segment] {
    // Their length is a multiple of a segment's, so this cannot fail.
    <[Segment]>::ref_from_bytes(bytes).unwrap_or_default()
}

/// The whole pages of a segment; `None` when it has none or has no physical address.
fn run(input: &Input, place: u64, segment: &Segment) -> Result<Option<Run>, DumpError> {
    let (address, memory) = (segment.physical_address.get(), segment.memory_bytes.get());
    let (offset, in_file) = (segment.offset.get(), segment.file_bytes.get());
    if address == u64::MAX || memory == 0 {
        return Ok(None);
    }
    let bad = |what: String| DumpError::malformed(input.path(), place, what);
    let end = address
        .checked_add(memory)
        .filter(|end| end / PAGE <= PFN_LIMIT.0);
    let Some(end) = end else {
        return Err(bad(format!(
            "segment of {memory:#x} bytes at physical address {address:#x} passes the limit, {:#x}",
            PFN_LIMIT.address()
        )));
    };
    if in_file > memory {
        return Err(bad(format!(
            "segment has {in_file:#x} bytes in the file but {memory:#x} in memory"
        )));
    }
    input.check("a segment", offset, in_file)?;
    let first = address.div_ceil(PAGE);
    let skipped = first * PAGE - address;
    let pages = (end / PAGE).saturating_sub(first);
    let stored = in_file.saturating_sub(skipped) / PAGE;
    let range = RamRange {
        first: Pfn(first),
        pages,
    };
    Ok((pages > 0).then_some(Run {
        range,
        stored,
        offset: offset + skipped,
    }))
}

/// The ranges that runs cover, sorted and merged.
fn union(runs: &[Run]) -> Vec<RamRange> {
    let mut ranges: Vec<RamRange> = Vec::new();
    for Run { range, .. } in runs {
        match ranges.last_mut() {
            Some(last) if range.first.0 <= last.end() => {
                last.pages = last.end().max(range.end()) - last.first.0;
            }
            _ => ranges.push(*range),
        }
    }
    ranges
}
