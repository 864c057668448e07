//! Reading a vmcore of either format.

use std::path::Path;

use crate::elf::{self, ElfReader};
use crate::error::DumpError;
use crate::file::Input;
use crate::kdump::{self, KdumpReader};
use crate::machine::{Cpu, Machine};
use crate::notes::PageFacts;
use crate::page::{PAGE_SIZE, PageState, Pfn, RamRange};
use crate::ram::RamMap;
use crate::vmcoreinfo::Vmcoreinfo;
use crate::writer::Summary;

/// An open vmcore: ours, or one of the kernel, makedumpfile or QEMU.
pub struct Reader {
    input: Input,
    machine: Machine,
    ram: RamMap,
    facts: Option<PageFacts>,
    incomplete: bool,
    body: Body,
}

enum Body {
    Elf(ElfReader),
    Kdump(Box<KdumpReader>),
}

impl Reader {
    /// Opens a vmcore and reads everything but its pages.
    ///
    /// # Errors
    /// [`DumpError::Io`]; [`DumpError::Malformed`]; [`DumpError::Unsupported`] for flattened and
    /// split files, other architectures, and what is no vmcore at all.
    pub fn open(path: &Path) -> Result<Self, DumpError> {
        let input = Input::open(path)?;
        let magic: [u8; 8] = input.record("the first bytes", 0)?;
        let (mut machine, facts, incomplete, body) = match &magic {
            [a, b, c, d, ..] if [*a, *b, *c, *d] == elf::MAGIC => {
                let opened = ElfReader::open(&input)?;
                (
                    opened.machine,
                    opened.facts,
                    opened.incomplete,
                    Body::Elf(opened.reader),
                )
            }
            &kdump::SIGNATURE => {
                let opened = KdumpReader::open(&input)?;
                let body = Body::Kdump(Box::new(opened.reader));
                (opened.machine, opened.facts, opened.incomplete, body)
            }
            b"makedump" => {
                let what = "a flattened dump; put it in order with makedumpfile -R <new file> < <this file>";
                return Err(DumpError::unsupported(path, what));
            }
            _ => {
                let what =
                    format!("not a vmcore: it begins with {magic:02x?}, not with ELF or KDUMP");
                return Err(DumpError::unsupported(path, what));
            }
        };
        let ram = RamMap::new(&machine.ram).map_err(|what| DumpError::malformed(path, 0, what))?;
        if machine.release.is_empty() {
            let release = Vmcoreinfo::new(&machine.vmcoreinfo).osrelease();
            machine.release = release.unwrap_or_default().to_owned();
        }
        Ok(Self {
            input,
            machine,
            ram,
            facts,
            incomplete,
            body,
        })
    }

    /// All that the file says of the machine. In files of others `page_offset`, `kernel_image`, the
    /// tasks and the crashed CPU are not known.
    pub const fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The VMCOREINFO text.
    pub fn vmcoreinfo(&self) -> Vmcoreinfo<'_> {
        Vmcoreinfo::new(&self.machine.vmcoreinfo)
    }

    /// The CPUs that were online.
    pub fn cpus(&self) -> &[Cpu] {
        &self.machine.cpus
    }

    /// RAM, sorted.
    pub fn ram(&self) -> &[RamRange] {
        &self.machine.ram
    }

    /// Pages by kind, as the writer counted them; `None` in files of others.
    pub fn summary(&self) -> Option<Summary> {
        let facts = self.facts.as_ref()?;
        Some(Summary {
            file_bytes: self.input.len(),
            ..facts.summary
        })
    }

    /// Whether the file says that pages are missing.
    pub const fn is_incomplete(&self) -> bool {
        self.incomplete
    }

    /// Reads one page. `page` has its bytes when the answer is [`PageState::Data`], and zeros or
    /// scraps otherwise.
    ///
    /// # Errors
    /// [`DumpError::Malformed`] when the file is damaged at this page, [`DumpError::Unsupported`]
    /// when it is compressed in a way that is not read here, [`DumpError::Io`].
    pub fn read_page(
        &mut self,
        pfn: Pfn,
        page: &mut [u8; PAGE_SIZE],
    ) -> Result<PageState, DumpError> {
        if self.ram.index(pfn).is_none() {
            return Ok(PageState::NotRam);
        }
        let found = match &mut self.body {
            Body::Elf(elf) => elf.page(&self.input, pfn, page)?,
            Body::Kdump(kdump) => kdump.page(&self.input, pfn, page)?,
        };
        Ok(if found {
            PageState::Data
        } else {
            self.absent(pfn)
        })
    }

    /// Reads pages that follow each other, with as few system calls as the format allows: as
    /// [`Self::read_page`] for each of `pages`, whose states go to the same places of `states`.
    ///
    /// # Errors
    /// As [`Self::read_page`]; nothing is said of any page then.
    pub fn read_pages(
        &mut self,
        first: Pfn,
        pages: &mut [[u8; PAGE_SIZE]],
        states: &mut [PageState],
    ) -> Result<(), DumpError> {
        let in_ram = self.ram.contains_run(first, pages.len() as u64);
        let whole = match &mut self.body {
            _ if !in_ram => false,
            Body::Elf(elf) => elf.run(&self.input, first, pages)?,
            Body::Kdump(kdump) => kdump.run(&self.input, first, pages)?,
        };
        for ((pfn, page), state) in (first.0..).map(Pfn).zip(pages).zip(states) {
            *state = if whole {
                PageState::Data
            } else {
                self.read_page(pfn, page)?
            };
        }
        Ok(())
    }

    /// Why a page of RAM is not in the file.
    fn absent(&self, pfn: Pfn) -> PageState {
        let Some(facts) = &self.facts else {
            return if self.incomplete {
                PageState::Missing
            } else {
                PageState::Excluded
            };
        };
        if is_in(&facts.unreadable, pfn) {
            PageState::Unreadable
        } else if is_in(&facts.missing, pfn) {
            PageState::Missing
        } else {
            PageState::Excluded
        }
    }
}

/// The runs of our note are sorted.
fn is_in(runs: &[RamRange], pfn: Pfn) -> bool {
    let after = runs.partition_point(|run| run.first <= pfn);
    after
        .checked_sub(1)
        .and_then(|at| runs.get(at))
        .is_some_and(|run| pfn.0 < run.end())
}
