//! Reading kdump-compressed files: ours, makedumpfile's and QEMU's.

use flate2::{Decompress, FlushDecompress, Status};
use zerocopy::FromBytes as _;

use super::layout::{
    BLOCK, DESCRIPTOR, Descriptor, FLAG_LZO, FLAG_SNAPPY, FLAG_ZLIB, FLAG_ZSTD, Header,
    STATUS_INCOMPLETE, SubHeader, bitmap_blocks,
};
use super::lzo;
use crate::error::DumpError;
use crate::file::{Input, Window};
use crate::machine::Machine;
use crate::notes::{self, PageFacts, Parsed, field_name};
use crate::page::{PAGE_SIZE, PFN_LIMIT, Pfn, RamRange};

/// Pages counted together, so that a page's descriptor is found without counting from the start.
const RANK_PAGES: usize = 4096;
/// More RAM ranges than any memory map has; it bounds what a bitmap of alternating bits can cost.
const RANGES_MAX: usize = 1 << 20;

/// Reads pages of a kdump-compressed file.
pub(crate) struct KdumpReader {
    in_file: Vec<u8>,
    /// Pages in the file before each group of [`RANK_PAGES`].
    ranks: Vec<u64>,
    descriptors_at: u64,
    codecs: Codecs,
    descriptors: Window,
    data: Window,
}

/// What pages are unpacked with.
struct Codecs {
    zlib: Decompress,
    zstd: zstd::bulk::Decompressor<'static>,
}

/// Why a page cannot be unpacked.
enum Unpack {
    /// It is damaged; the sentence says how.
    Damaged(String),
    /// It is compressed in a way that is not read here.
    Unsupported(DumpError),
}

/// What the headers and notes of a file say.
pub(crate) struct Opened {
    pub(crate) machine: Machine,
    pub(crate) facts: Option<PageFacts>,
    pub(crate) incomplete: bool,
    pub(crate) reader: KdumpReader,
}

impl KdumpReader {
    pub(crate) fn open(input: &Input) -> Result<Opened, DumpError> {
        let header: Header = input.record("the header", 0)?;
        let layout = Layout::new(input, &header)?;
        let sub: SubHeader = input.record("the sub-header", BLOCK)?;
        let end = layout.max_mapnr(input, &header, &sub)?;
        let bitmap_bytes = bitmap_blocks(end) * BLOCK;
        let ram = input.bytes("bitmap 1", layout.bitmaps_at, bitmap_bytes)?;
        let in_file = input.bytes(
            "bitmap 2",
            layout.bitmaps_at + layout.bitmap_bytes,
            bitmap_bytes,
        )?;
        let ranks = rank(&in_file);
        let mut parsed = read_notes(input, &header, &sub)?;
        let ram = ranges(input, layout.bitmaps_at, &ram, end)?;
        if parsed.facts.is_none() {
            fill_names(&mut parsed.machine, &header);
        }
        parsed.machine.ram = ram;
        parsed.machine.filter = u8::try_from(sub.dump_level.get()).unwrap_or(0);
        Ok(Opened {
            machine: parsed.machine,
            facts: parsed.facts,
            incomplete: header.status.get() & STATUS_INCOMPLETE != 0,
            reader: Self {
                in_file,
                ranks,
                descriptors_at: layout.descriptors_at,
                codecs: Codecs {
                    zlib: Decompress::new(true),
                    zstd: zstd::bulk::Decompressor::new()
                        .map_err(DumpError::io("making a decompressor", input.path()))?,
                },
                descriptors: Window::default(),
                data: Window::default(),
            },
        })
    }

    /// Reads a page's bytes; false when the page is not in the file.
    pub(crate) fn page(
        &mut self,
        input: &Input,
        pfn: Pfn,
        page: &mut [u8; PAGE_SIZE],
    ) -> Result<bool, DumpError> {
        let Some(rank) = self.rank(pfn) else {
            return Ok(false);
        };
        // The rank is below 2^36, so this cannot wrap.
        let place = self.descriptors_at + rank * DESCRIPTOR;
        let bytes =
            self.descriptors
                .get(input, "a page descriptor", place, size_of::<Descriptor>())?;
        // The window has as many bytes as were asked for, so this cannot fail.
        let Ok(descriptor) = Descriptor::read_from_bytes(bytes) else {
            return Ok(false);
        };
        if descriptor.offset.get() == 0 {
            // makedumpfile's mark for pages lost when the disk was full.
            return Ok(false);
        }
        let bytes = packed_bytes(&descriptor).map_err(|what| damaged(input, place, pfn, what))?;
        let offset = descriptor.offset.get();
        let packed = self.data.get(input, "page data", offset, bytes)?;
        self.codecs
            .unpack(input, descriptor.flags.get(), packed, page)
            .map_err(|why| why.at(input, place, pfn))?;
        Ok(true)
    }

    /// Reads pages that follow each other with two system calls; false, with nothing said of any,
    /// when they are not all in the file or their data lies too far apart.
    pub(crate) fn run(
        &mut self,
        input: &Input,
        first: Pfn,
        pages: &mut [[u8; PAGE_SIZE]],
    ) -> Result<bool, DumpError> {
        let all = (first.0..).map(Pfn).take(pages.len());
        let (Some(rank), true) = (
            self.rank(first),
            all.clone().all(|pfn| self.is_in_file(pfn)),
        ) else {
            return Ok(false);
        };
        let place = self.descriptors_at + rank * DESCRIPTOR;
        let bytes = input.bytes("page descriptors", place, pages.len() as u64 * DESCRIPTOR)?;
        // Their length is a multiple of a descriptor's, so this cannot fail.
        let descriptors = <[Descriptor]>::ref_from_bytes(&bytes).unwrap_or_default();
        let begin = descriptors
            .iter()
            .map(|page| page.offset.get())
            .min()
            .unwrap_or(0);
        let ends = descriptors
            .iter()
            .map(|page| page.offset.get().saturating_add(page.bytes.get().into()));
        let length = ends.max().unwrap_or(0).saturating_sub(begin);
        if begin == 0 || length > (pages.len() * PAGE_SIZE) as u64 {
            return Ok(false);
        }
        let data = input.bytes("page data", begin, length)?;
        let places = (place..).step_by(size_of::<Descriptor>());
        for (((pfn, descriptor), place), page) in all.zip(descriptors).zip(places).zip(pages) {
            let bytes =
                packed_bytes(descriptor).map_err(|what| damaged(input, place, pfn, what))?;
            let from = usize::try_from(descriptor.offset.get() - begin).unwrap_or(usize::MAX);
            let packed = data.get(from..).and_then(|rest| rest.get(..bytes));
            self.codecs
                .unpack(
                    input,
                    descriptor.flags.get(),
                    packed.unwrap_or_default(),
                    page,
                )
                .map_err(|why| why.at(input, place, pfn))?;
        }
        Ok(true)
    }

    fn is_in_file(&self, pfn: Pfn) -> bool {
        let at = usize::try_from(pfn.0).ok();
        at.and_then(|at| Some(self.in_file.get(at / 8)? >> (at % 8) & 1 != 0))
            .unwrap_or(false)
    }

    /// How many pages in the file come before `pfn`, or `None` when it is not in the file.
    fn rank(&self, pfn: Pfn) -> Option<u64> {
        let at = usize::try_from(pfn.0).ok()?;
        let byte = self.in_file.get(at / 8)?;
        if byte >> (at % 8) & 1 == 0 {
            return None;
        }
        let group = at / RANK_PAGES;
        let before = self.in_file.get(group * RANK_PAGES / 8..at / 8)?;
        let low = byte & ((1 << (at % 8)) - 1);
        Some(self.ranks.get(group)? + ones(before) + u64::from(low.count_ones()))
    }
}

impl Codecs {
    fn unpack(
        &mut self,
        input: &Input,
        flags: u32,
        packed: &[u8],
        page: &mut [u8; PAGE_SIZE],
    ) -> Result<(), Unpack> {
        let unpacked = match flags {
            0 => {
                let stored = packed.len();
                *page = *<&[u8; PAGE_SIZE]>::try_from(packed).map_err(|_length| {
                    Unpack::Damaged(format!(
                        "it is stored as it is but has {stored} bytes, not {PAGE_SIZE}"
                    ))
                })?;
                PAGE_SIZE
            }
            FLAG_ZLIB => inflate(&mut self.zlib, packed, page).map_err(Unpack::Damaged)?,
            FLAG_ZSTD => self
                .zstd
                .decompress_to_buffer(packed, page.as_mut_slice())
                .map_err(|error| Unpack::Damaged(format!("its zstd data is damaged: {error}")))?,
            FLAG_LZO => lzo::unpack(packed, page)
                .ok_or_else(|| Unpack::Damaged("its LZO data is damaged".to_owned()))?,
            FLAG_SNAPPY => return Err(Unpack::Unsupported(unsupported(input, "snappy"))),
            other => {
                let what = format!("flags {other:#x} name no known compression");
                return Err(Unpack::Damaged(what));
            }
        };
        if unpacked != PAGE_SIZE {
            let what = format!("it unpacks to {unpacked} bytes, not {PAGE_SIZE}");
            return Err(Unpack::Damaged(what));
        }
        Ok(())
    }
}

impl Unpack {
    fn at(self, input: &Input, place: u64, pfn: Pfn) -> DumpError {
        match self {
            Self::Damaged(what) => damaged(input, place, pfn, what),
            Self::Unsupported(error) => error,
        }
    }
}

fn damaged(input: &Input, place: u64, pfn: Pfn, what: String) -> DumpError {
    DumpError::malformed(input.path(), place, format!("pfn {:#x}: {what}", pfn.0))
}

/// The length of a page's data.
fn packed_bytes(descriptor: &Descriptor) -> Result<usize, String> {
    let bytes = usize::try_from(descriptor.bytes.get()).unwrap_or(usize::MAX);
    if bytes > PAGE_SIZE {
        return Err(format!(
            "its data has {bytes} bytes, more than a page's {PAGE_SIZE}"
        ));
    }
    Ok(bytes)
}

/// Where things are, checked against each other and the file.
struct Layout {
    bitmaps_at: u64,
    bitmap_bytes: u64,
    descriptors_at: u64,
}

impl Layout {
    fn new(input: &Input, header: &Header) -> Result<Self, DumpError> {
        let version = header.version.get();
        let block = header.block_size.get();
        let sub_blocks = header.sub_header_blocks.get();
        if i64::from(block) != BLOCK.cast_signed() {
            return Err(DumpError::malformed(
                input.path(),
                428,
                format!("block size {block}; x86-64 files have {BLOCK}"),
            ));
        }
        if !(1..=6).contains(&version) {
            return Err(DumpError::unsupported(
                input.path(),
                format!("kdump header version {version}; 1 to 6 are known"),
            ));
        }
        let sub_blocks = u64::try_from(sub_blocks)
            .ok()
            .filter(|&blocks| blocks > 0)
            .ok_or_else(|| {
                DumpError::malformed(
                    input.path(),
                    432,
                    format!("sub-header of {sub_blocks} blocks"),
                )
            })?;
        let bitmaps_at = (1 + sub_blocks) * BLOCK;
        let bitmaps_bytes = u64::from(header.bitmap_blocks.get()) * BLOCK;
        input.check("the bitmaps", bitmaps_at, bitmaps_bytes)?;
        Ok(Self {
            bitmaps_at,
            bitmap_bytes: bitmaps_bytes / 2,
            descriptors_at: bitmaps_at + bitmaps_bytes,
        })
    }

    /// The page number after the last, checked against the size of the bitmaps.
    fn max_mapnr(&self, input: &Input, header: &Header, sub: &SubHeader) -> Result<u64, DumpError> {
        let end = if header.version.get() >= 6 {
            sub.max_mapnr_64.get()
        } else {
            u64::from(header.max_mapnr.get())
        };
        if end > PFN_LIMIT.0 || bitmap_blocks(end) * BLOCK > self.bitmap_bytes {
            return Err(DumpError::malformed(
                input.path(),
                440,
                format!(
                    "max_mapnr {end:#x}, but each bitmap has {} bytes",
                    self.bitmap_bytes
                ),
            ));
        }
        if header.version.get() >= 2 && sub.split.get() != 0 {
            return Err(DumpError::unsupported(
                input.path(),
                "one part of a split dump; join the parts with makedumpfile --reassemble",
            ));
        }
        Ok(end)
    }
}

fn read_notes(input: &Input, header: &Header, sub: &SubHeader) -> Result<Parsed, DumpError> {
    let version = header.version.get();
    let mut parsed = Parsed::default();
    let (at, bytes) = (sub.notes_offset.get(), sub.notes_bytes.get());
    if version >= 4 && at != 0 && bytes != 0 {
        parsed = notes::read(input, at, bytes)?;
    }
    let (at, bytes) = (sub.vmcoreinfo_offset.get(), sub.vmcoreinfo_bytes.get());
    if version >= 3 && at != 0 && bytes != 0 && parsed.machine.vmcoreinfo.is_empty() {
        parsed.machine.vmcoreinfo = input.bytes("VMCOREINFO", at, bytes)?;
    }
    Ok(parsed)
}

/// Names and time for files of others, which lack our note.
fn fill_names(machine: &mut Machine, header: &Header) {
    machine.node = field_name(&header.nodename);
    machine.release = field_name(&header.release);
    machine.version = field_name(&header.kernel_version);
    machine.crash_time_s = header.time_s.get();
}

fn ranges(input: &Input, at: u64, bits: &[u8], end: u64) -> Result<Vec<RamRange>, DumpError> {
    let mut ranges: Vec<RamRange> = Vec::new();
    let mut add = |first: u64, pages: u64| match ranges.last_mut() {
        Some(range) if range.end() == first => {
            range.pages += pages;
            true
        }
        _ => {
            ranges.push(RamRange {
                first: Pfn(first),
                pages,
            });
            ranges.len() <= RANGES_MAX
        }
    };
    for (&byte, first) in bits.iter().zip((0..end).step_by(8)) {
        let few_enough = match byte {
            0 => true,
            0xff if end - first >= 8 => add(first, 8),
            _ => (0..8.min(end - first))
                .filter(|bit| byte >> bit & 1 != 0)
                .all(|bit| add(first + bit, 1)),
        };
        if !few_enough {
            let what = format!("bitmap 1 has more than {RANGES_MAX} separate RAM ranges");
            return Err(DumpError::malformed(input.path(), at + first / 8, what));
        }
    }
    Ok(ranges)
}

fn rank(bits: &[u8]) -> Vec<u64> {
    let mut total = 0;
    bits.chunks(RANK_PAGES / 8)
        .map(|group| {
            let before = total;
            total += ones(group);
            before
        })
        .collect()
}

fn ones(bytes: &[u8]) -> u64 {
    bytes.iter().map(|byte| u64::from(byte.count_ones())).sum()
}

fn inflate(
    zlib: &mut Decompress,
    packed: &[u8],
    page: &mut [u8; PAGE_SIZE],
) -> Result<usize, String> {
    zlib.reset(true);
    match zlib.decompress(packed, page, FlushDecompress::Finish) {
        Ok(Status::StreamEnd) => Ok(usize::try_from(zlib.total_out()).unwrap_or(usize::MAX)),
        Ok(Status::Ok | Status::BufError) => {
            Err("its zlib data is cut short or too long".to_owned())
        }
        Err(error) => Err(format!("its zlib data is damaged: {error}")),
    }
}

fn unsupported(input: &Input, name: &str) -> DumpError {
    DumpError::unsupported(
        input.path(),
        format!(
            "pages are compressed with {name}; zlib, LZO and zstd are read, so convert the file with makedumpfile -c or -l"
        ),
    )
}
