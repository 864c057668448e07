//! The records of a kdump-compressed file, as makedumpfile defines them for 64-bit machines.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{I32, U32, U64},
};

/// The first eight bytes of the file.
pub(crate) const SIGNATURE: [u8; 8] = *b"KDUMP   ";
/// Version 6 has the 64-bit page numbers of the sub-header.
pub(super) const VERSION: i32 = 6;
/// Bytes in a block: everything before the descriptors is counted in blocks.
pub(super) const BLOCK: u64 = 4096;

pub(super) const FLAG_ZLIB: u32 = 0x1;
pub(super) const FLAG_LZO: u32 = 0x2;
pub(super) const FLAG_SNAPPY: u32 = 0x4;
/// In the header's status only.
pub(super) const STATUS_INCOMPLETE: u32 = 0x8;
pub(super) const FLAG_ZSTD: u32 = 0x20;

/// Block 0: `struct disk_dump_header`. The padding is the C compiler's.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) signature: [u8; 8],
    pub(crate) version: I32,
    pub(crate) sysname: [u8; 65],
    pub(crate) nodename: [u8; 65],
    pub(crate) release: [u8; 65],
    pub(crate) kernel_version: [u8; 65],
    pub(crate) machine: [u8; 65],
    pub(crate) domainname: [u8; 65],
    pub(crate) pad: [u8; 6],
    pub(crate) time_s: U64,
    pub(crate) time_us: U64,
    pub(crate) status: U32,
    pub(crate) block_size: I32,
    pub(crate) sub_header_blocks: I32,
    pub(crate) bitmap_blocks: U32,
    /// The low 32 bits; the sub-header has all of it.
    pub(crate) max_mapnr: U32,
    pub(crate) total_ram_blocks: U32,
    pub(crate) device_blocks: U32,
    pub(crate) written_blocks: U32,
    pub(crate) current_cpu: U32,
    pub(crate) cpus: I32,
}

/// Block 1: `struct kdump_sub_header`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SubHeader {
    pub(crate) phys_base: U64,
    pub(crate) dump_level: I32,
    pub(crate) split: I32,
    pub(crate) start_pfn: U64,
    pub(crate) end_pfn: U64,
    pub(crate) vmcoreinfo_offset: U64,
    pub(crate) vmcoreinfo_bytes: U64,
    pub(crate) notes_offset: U64,
    pub(crate) notes_bytes: U64,
    pub(crate) eraseinfo_offset: U64,
    pub(crate) eraseinfo_bytes: U64,
    pub(crate) start_pfn_64: U64,
    pub(crate) end_pfn_64: U64,
    pub(crate) max_mapnr_64: U64,
}

/// `struct page_desc`: where a page's data lies and how it is compressed.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Descriptor {
    pub(crate) offset: U64,
    pub(crate) bytes: U32,
    pub(crate) flags: U32,
    pub(crate) page_flags: U64,
}

pub(super) const DESCRIPTOR: u64 = size_of::<Descriptor>() as u64;

/// Blocks in one bitmap that has a bit for each page number below `end`.
pub(super) const fn bitmap_blocks(end: u64) -> u64 {
    end.div_ceil(8 * BLOCK)
}

const _: () = assert!(size_of::<Header>() == 464);
const _: () = assert!(size_of::<SubHeader>() == 104);
const _: () = assert!(size_of::<Descriptor>() == 24);
