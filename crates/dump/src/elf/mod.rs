//! ELF vmcores.
//!
//! ```text
//! 0              ELF header, then program headers: one PT_NOTE, then PT_LOADs (room for all of them)
//! then           one section header, which holds the number of segments when it passes 65534
//! then           notes
//! then           RAM, page after page without what lies between the ranges; zero pages are holes
//! ```

mod layout;
mod read;
mod write;

pub(crate) use layout::MAGIC;
pub(crate) use read::ElfReader;
pub(crate) use write::ElfWriter;
