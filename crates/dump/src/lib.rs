//! The vmcore: the file a crash is read from, written and read in the two formats debuggers know.
//!
//! Nouns:
//! - **machine**: what a vmcore says besides pages: RAM ranges, VMCOREINFO, CPUs, names, time.
//! - **page**: 4096 bytes of RAM, named by its **pfn** (physical address divided by 4096).
//! - **ELF**: pages lie as they are; any tool reads it; it cannot name a page it does not have.
//! - **kdump**: the kdump-compressed format of makedumpfile; pages are compressed one by one and a
//!   bitmap says which are not in the file. The default.
//! - **own note**: one ELF note of ours in either format with what the formats have no place for
//!   (`docs/dump-format.md`). Other readers skip it.
//!
//! Flow: [`Writer::create`] with a [`Machine`], [`Writer::page`] once for each page in any order,
//! [`Writer::finish`]; later [`Reader::open`] and [`Reader::read_page`].
//!
//! This crate knows nothing of packets, and no length or offset of a file is used before it is
//! bounded by the file.

#![forbid(unsafe_code)]

mod elf;
mod error;
mod file;
mod kdump;
mod machine;
mod notes;
mod page;
mod ram;
mod reader;
mod vmcoreinfo;
mod writer;

pub use error::DumpError;
pub use kdump::Compression;
pub use machine::{Cpu, GREGS, Gregs, Machine};
pub use page::{PAGE_SIZE, PFN_LIMIT, Page, PageState, Pfn, RamRange};
pub use reader::Reader;
pub use vmcoreinfo::Vmcoreinfo;
pub use writer::{Format, Summary, Writer};

#[cfg(test)]
mod tests;
