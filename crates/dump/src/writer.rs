//! Writing a vmcore: pages in any order, each once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, mem};

use crate::elf::ElfWriter;
use crate::error::DumpError;
use crate::kdump::{Compression, KdumpWriter};
use crate::machine::Machine;
use crate::notes::{LISTED_RUNS_MAX, PageFacts};
use crate::page::{PAGE_SIZE, Page, Pfn, RamRange};
use crate::ram::{PageSet, RamMap};

/// Most CPUs a vmcore is written for: the kernel's own limit on x86-64 (`NR_CPUS`).
const CPUS_MAX: usize = 8192;
/// Most bytes of VMCOREINFO: the kernel's own note has one page; this leaves room for growth.
const VMCOREINFO_BYTES_MAX: usize = 1 << 20;

/// Most pages that are taken as one block.
const BLOCK_PAGES_MAX: usize = 64;

/// Which vmcore to write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    /// Pages as they are, zero pages as holes in a sparse file. Readers take a page that is in no
    /// segment for "not there"; they cannot say why.
    Elf,
    /// kdump-compressed, version 6 of its header.
    Kdump(Compression),
}

/// How many pages of each kind a vmcore holds, and its size.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Summary {
    /// Pages with bytes other than zero.
    pub data: u64,
    /// Pages of zero bytes.
    pub zero: u64,
    /// Pages left out on purpose.
    pub excluded: u64,
    /// Pages that could not be read.
    pub unreadable: u64,
    /// Pages of RAM that were never given to the writer.
    pub missing: u64,
    /// The length of the file in bytes, holes included.
    pub file_bytes: u64,
}

impl Summary {
    /// Whether every page of RAM was accounted for.
    pub const fn is_complete(&self) -> bool {
        self.missing == 0
    }
}

/// Writes one vmcore, compressing on up to eight CPUs. Memory: two bits for each page of RAM, a few
/// buffers of 1 MiB, and one for each CPU.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    machine: Machine,
    ram: RamMap,
    /// Pages that were given.
    seen: PageSet,
    /// Pages whose bytes are in the file.
    stored: PageSet,
    unreadable: Vec<RamRange>,
    summary: Summary,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Elf(ElfWriter),
    Kdump(Box<KdumpWriter>),
}

impl Writer {
    /// Creates (or truncates) the file at `path` and lays it out for the machine's RAM.
    ///
    /// # Errors
    /// [`DumpError::Misuse`] when the machine contradicts itself, [`DumpError::Io`].
    pub fn create(path: &Path, machine: Machine, format: Format) -> Result<Self, DumpError> {
        let ram = check(&machine).map_err(|what| DumpError::misuse(path, what))?;
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(DumpError::io("creating", path))?;
        let file = Arc::new(file);
        let body = match format {
            Format::Elf => Body::Elf(ElfWriter::new(&file, path, &machine, &ram)?),
            Format::Kdump(compression) => {
                Body::Kdump(Box::new(KdumpWriter::new(&file, path, &ram, compression)?))
            }
        };
        Ok(Self {
            path: path.to_owned(),
            seen: PageSet::new(ram.pages()),
            stored: PageSet::new(ram.pages()),
            machine,
            ram,
            unreadable: Vec::new(),
            summary: Summary::default(),
            body,
        })
    }

    /// Takes one page. Pages may come in any order; runs in ascending order are written fastest.
    ///
    /// # Errors
    /// [`DumpError::Misuse`] when the page is not RAM or was given before, [`DumpError::Io`].
    pub fn page(&mut self, pfn: Pfn, page: Page<'_>) -> Result<(), DumpError> {
        let index = self.ram.index(pfn).ok_or_else(|| {
            DumpError::misuse(
                &self.path,
                format!("pfn {:#x} is not RAM of this machine", pfn.0),
            )
        })?;
        if !self.seen.insert(index) {
            let what = format!("pfn {:#x} was given twice; a page is written once", pfn.0);
            return Err(DumpError::misuse(&self.path, what));
        }
        match page {
            Page::Data(bytes) if !is_zero(bytes) => {
                self.summary.data += 1;
                self.stored.insert(index);
                match &mut self.body {
                    Body::Elf(elf) => elf.page(index, bytes),
                    Body::Kdump(kdump) => kdump.page(index, bytes),
                }
            }
            Page::Data(_) | Page::Zero => {
                self.summary.zero += 1;
                self.stored.insert(index);
                match &mut self.body {
                    // The file was made at its full length: what is not written reads as zeros.
                    Body::Elf(_) => Ok(()),
                    Body::Kdump(kdump) => kdump.zero_page(index),
                }
            }
            Page::Excluded => {
                self.summary.excluded += 1;
                Ok(())
            }
            Page::Unreadable => {
                self.summary.unreadable += 1;
                add_to_runs(&mut self.unreadable, pfn);
                Ok(())
            }
        }
    }

    /// Takes the pages of a block from `first` on, which `lz4` is the LZ4 form of. Those that are no
    /// RAM or were given before are left out. With [`Compression::Lzo`] this is much faster than
    /// [`Self::page`] for each.
    ///
    /// # Errors
    /// [`DumpError::Io`].
    pub fn block(
        &mut self,
        first: Pfn,
        lz4: Option<&[u8]>,
        pages: &[[u8; PAGE_SIZE]],
    ) -> Result<(), DumpError> {
        let takes = match &self.body {
            Body::Elf(_) => false,
            Body::Kdump(kdump) => kdump.takes_blocks(),
        };
        let lz4 = lz4.filter(|_| takes);
        let mut places = [None; BLOCK_PAGES_MAX];
        if lz4.is_none() || pages.len() > places.len() {
            for (pfn, page) in (first.0..).map(Pfn).zip(pages) {
                if self.lacks(pfn) {
                    self.page(pfn, Page::Data(page))?;
                }
            }
            return Ok(());
        }
        for ((pfn, page), place) in (first.0..).map(Pfn).zip(pages).zip(&mut places) {
            if !self.lacks(pfn) {
                continue;
            }
            if is_zero(page) {
                self.page(pfn, Page::Zero)?;
            } else if let Some(index) = self.ram.index(pfn) {
                self.seen.insert(index);
                self.stored.insert(index);
                self.summary.data += 1;
                *place = Some(index);
            }
        }
        let places = places.get(..pages.len()).unwrap_or_default();
        match (&mut self.body, lz4) {
            (Body::Kdump(kdump), Some(lz4)) => kdump.block(places, lz4, pages.as_flattened()),
            (Body::Kdump(_) | Body::Elf(_), _) => Ok(()),
        }
    }

    /// Whether `pfn` was given already; false for what is not RAM.
    pub fn has(&self, pfn: Pfn) -> bool {
        self.ram
            .index(pfn)
            .is_some_and(|index| self.seen.contains(index))
    }

    /// Whether `pfn` is RAM and was not given yet.
    #[must_use]
    pub fn lacks(&self, pfn: Pfn) -> bool {
        self.ram
            .index(pfn)
            .is_some_and(|index| !self.seen.contains(index))
    }

    /// Writes headers, notes and maps, waits until all of it is on the disk, and reads the pages'
    /// data back to prove that the file has what was written. Pages that were never given are
    /// missing: the file says that it is incomplete.
    ///
    /// # Errors
    /// [`DumpError::Io`]; [`DumpError::Malformed`] when the file gives back other bytes than were
    /// written; [`DumpError::Unsupported`] when pages that are not in the file would cut
    /// an ELF file into more segments than it has room for.
    pub fn finish(mut self) -> Result<Summary, DumpError> {
        let given =
            self.summary.data + self.summary.zero + self.summary.excluded + self.summary.unreadable;
        self.summary.missing = self.ram.pages() as u64 - given;
        self.unreadable.sort_by_key(|run| run.first);
        let runs = self.ram.runs(&self.seen, false).take(LISTED_RUNS_MAX);
        let facts = PageFacts {
            summary: self.summary,
            missing: runs.map(|(_, run)| run).collect(),
            unreadable: mem::take(&mut self.unreadable),
        };
        let file_bytes = match self.body {
            Body::Elf(elf) => elf.finish(&self.machine, &self.ram, &self.stored, &facts)?,
            Body::Kdump(kdump) => kdump.finish(&self.machine, &self.ram, &self.stored, &facts)?,
        };
        Ok(Summary {
            file_bytes,
            ..self.summary
        })
    }
}

/// Adds a page to a list of runs that is kept short; pages mostly come in ascending order.
fn add_to_runs(runs: &mut Vec<RamRange>, pfn: Pfn) {
    if let Some(run) = runs.last_mut().filter(|run| run.end() == pfn.0) {
        run.pages += 1;
    } else if runs.len() < LISTED_RUNS_MAX {
        runs.push(RamRange {
            first: pfn,
            pages: 1,
        });
    }
}

/// Checks a machine; the error is a sentence about what is wrong.
fn check(machine: &Machine) -> Result<RamMap, String> {
    let text = machine.vmcoreinfo.len();
    if text > VMCOREINFO_BYTES_MAX {
        return Err(format!(
            "VMCOREINFO has {text} bytes; at most {VMCOREINFO_BYTES_MAX} are taken"
        ));
    }
    if machine.cpus.len() > CPUS_MAX {
        let cpus = machine.cpus.len();
        return Err(format!("{cpus} CPUs; at most {CPUS_MAX} are taken"));
    }
    if let Some([before, after]) = machine
        .cpus
        .array_windows()
        .find(|[before, after]| before.number >= after.number)
    {
        return Err(format!(
            "CPU {} follows CPU {}; sort the CPUs by number and list each once",
            after.number, before.number
        ));
    }
    if machine.ram.is_empty() {
        return Err(
            "the machine has no RAM ranges; a vmcore needs the memory map first".to_owned(),
        );
    }
    RamMap::new(&machine.ram)
}

/// Compared in large pieces, so that the compiler can use wide registers.
fn is_zero(bytes: &[u8; PAGE_SIZE]) -> bool {
    bytes
        .chunks_exact(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}
