//! kdump-compressed files, version 6 of the header.
//!
//! ```text
//! block 0        header: machine names, time, status, sizes
//! block 1        sub-header: phys_base, where VMCOREINFO and the notes are, max_mapnr
//! then           bitmap 1: which pages are RAM;  bitmap 2: which pages are in the file
//! then           descriptors, 24 bytes each, one for each page in the file, by page number
//! then           page data in the order the pages came, and behind it the notes
//! ```

mod layout;
mod lzo;
mod pack;
mod read;
mod write;

pub(crate) use layout::SIGNATURE;
pub(crate) use read::KdumpReader;
pub use write::Compression;
pub(crate) use write::KdumpWriter;
