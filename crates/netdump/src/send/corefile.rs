//! Core files: ELF and kdump-compressed, and `/proc/vmcore`, which is an ELF file that the kernel
//! makes up while it is read.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use dump::{Machine, PageState, Pfn, Reader};
use proto::client::PageStatus;
use proto::record::{BLOCK_PAGES, RAM_RANGES_MAX};
use proto::units::PAGE_BYTES;
use triage::memory;

use super::source::Source;

/// An open core file.
pub(super) struct CoreFile {
    reader: Reader,
}

impl CoreFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let reader = Reader::open(path).context("cannot read the core file")?;
        let ranges = reader.ram().len();
        ensure!(ranges > 0, "{} has no pages of RAM", path.display());
        ensure!(
            ranges <= RAM_RANGES_MAX,
            "{} has {ranges} ranges of RAM, and a session takes {RAM_RANGES_MAX}: convert it with \
            makedumpfile first",
            path.display()
        );
        Ok(Self { reader })
    }

    fn read_one(&mut self, pfn: u64, page: &mut [u8; PAGE_BYTES]) -> PageStatus {
        // A page of poisoned memory fails alone, and so does a damaged part of a file.
        self.reader
            .read_page(Pfn(pfn), page)
            .map_or(PageStatus::Unreadable, status)
    }
}

impl Source for CoreFile {
    fn machine(&self) -> &Machine {
        self.reader.machine()
    }

    fn log(&mut self) -> Vec<u8> {
        let machine = self.reader.machine().clone();
        // Memory without a log that can be read is sent all the same.
        memory::log(&mut self.reader, &machine)
            .map(|log| log.text.into_bytes())
            .unwrap_or_default()
    }

    fn read(&mut self, first: u64, pages: &mut [[u8; PAGE_BYTES]], statuses: &mut [PageStatus]) {
        let mut states = [PageState::NotRam; BLOCK_PAGES];
        let block = self.reader.read_pages(Pfn(first), pages, &mut states);
        let all = (first..).zip(pages).zip(states).zip(statuses);
        for (((pfn, page), state), to) in all {
            *to = match block {
                Ok(()) => status(state),
                Err(_) => self.read_one(pfn, page),
            };
        }
    }
}

fn status(state: PageState) -> PageStatus {
    match state {
        PageState::Data => PageStatus::Read,
        PageState::Excluded => PageStatus::Excluded,
        // What never reached the file cannot be read from it.
        PageState::Unreadable | PageState::Missing | PageState::NotRam => PageStatus::Unreadable,
    }
}
