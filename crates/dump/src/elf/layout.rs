//! The records of an ELF core file for x86-64.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// The first four bytes of the file.
pub(crate) const MAGIC: [u8; 4] = *b"\x7fELF";

/// 64-bit, little-endian, version 1, System V.
pub(super) const IDENT: [u8; 16] = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0";
pub(super) const ET_CORE: u16 = 4;
pub(super) const EM_X86_64: u16 = 62;
pub(super) const PT_LOAD: u32 = 1;
pub(super) const PT_NOTE: u32 = 4;
/// In `phnum`: the number is in section header 0.
pub(super) const PN_XNUM: u16 = 0xffff;
/// In `flags`: makedumpfile's mark of a file that was not written to its end.
pub(super) const FLAG_INCOMPLETE: u32 = 1;
/// Readable, writable, executable.
pub(super) const FLAGS_RWX: u32 = 7;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct FileHeader {
    pub(crate) ident: [u8; 16],
    pub(crate) kind: U16,
    pub(crate) machine: U16,
    pub(crate) version: U32,
    pub(crate) entry: U64,
    pub(crate) segments_at: U64,
    pub(crate) sections_at: U64,
    pub(crate) flags: U32,
    pub(crate) header_bytes: U16,
    pub(crate) segment_bytes: U16,
    pub(crate) segments: U16,
    pub(crate) section_bytes: U16,
    pub(crate) sections: U16,
    pub(crate) names_section: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Segment {
    pub(crate) kind: U32,
    pub(crate) flags: U32,
    pub(crate) offset: U64,
    pub(crate) virtual_address: U64,
    pub(crate) physical_address: U64,
    pub(crate) file_bytes: U64,
    pub(crate) memory_bytes: U64,
    pub(crate) align: U64,
}

/// Only section 0 is ever written: with PN_XNUM its `info` is the number of segments.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Section {
    pub(crate) name_and_kind: [u8; 8],
    pub(crate) flags_address_offset: [u8; 24],
    pub(crate) bytes: U64,
    pub(crate) link: U32,
    pub(crate) info: U32,
    pub(crate) align_and_entry: [u8; 16],
}

const _: () = assert!(size_of::<FileHeader>() == 64);
const _: () = assert!(size_of::<Segment>() == 56);
const _: () = assert!(size_of::<Section>() == 64);
