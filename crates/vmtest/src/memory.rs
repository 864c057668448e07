//! The guest's memory as the host sees it: one anonymous file that QEMU maps as RAM and the harness
//! maps to read.
//!
//! Below 4 GiB a PC has a hole for devices. The q35 machine of QEMU puts RAM there up to 2 GiB when
//! the guest has 2.75 GiB or more, and all of it otherwise; the rest follows at 4 GiB
//! (hw/i386/pc_q35.c, `pc_q35_init`). Each run checks this against QEMU itself by `pmemsave`.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context as _, Result};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

use crate::pattern::PAGE_SIZE;

const GIB: u64 = 1 << 30;
/// Guests with less than this have all their RAM below the hole.
const HOLE_FROM: u64 = 0xb000_0000;
/// Where RAM ends below the hole in larger guests.
const LOW_END: u64 = 2 * GIB;
/// Where RAM goes on above the hole.
const HIGH_START: u64 = 4 * GIB;

/// A guest's RAM.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    bytes: &'static [u8],
}

impl GuestMemory {
    /// Makes RAM of `size` bytes, all zero.
    ///
    /// # Errors
    /// If the host cannot make or map the file.
    pub fn new(size: u64) -> Result<Self> {
        let file: File = rustix::fs::memfd_create("vmtest-ram", MemfdFlags::CLOEXEC)
            .context("cannot make a file in memory for the guest's RAM")?
            .into();
        file.set_len(size)
            .with_context(|| format!("cannot make {size} bytes of guest RAM"))?;
        let length = usize::try_from(size)
            .context("the guest's RAM is larger than this host's address space")?;
        // SAFETY: a null hint and no MAP_FIXED: the kernel chooses an address where nothing is
        // mapped.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ,
                MapFlags::SHARED,
                &file,
                0,
            )
        }
        .with_context(|| format!("cannot map {size} bytes of guest RAM"))?;
        // SAFETY: the mapping covers `length` bytes of a file of that size, which nobody shrinks;
        // it stays mapped until drop, and no slice outlives `self`. QEMU may write while we read:
        // callers read only when the guest is paused.
        let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), length) };
        Ok(Self { file, bytes })
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The page with number `pfn`, or nothing where the guest has no RAM.
    #[must_use]
    pub fn page(&self, pfn: u64) -> Option<&[u8]> {
        self.read(pfn.checked_mul(PAGE_SIZE as u64)?, PAGE_SIZE)
    }

    /// `length` bytes at physical address `address`, or nothing if not all of them are RAM.
    #[must_use]
    pub fn read(&self, address: u64, length: usize) -> Option<&[u8]> {
        let (start, end) = self
            .ranges()
            .into_iter()
            .scan(0, |offset, (start, end)| {
                let here = *offset;
                *offset += end - start;
                Some((start, end, here))
            })
            .find(|(start, end, _)| (*start..*end).contains(&address))
            .map(|(start, end, offset)| (address - start + offset, end - start + offset))?;
        let start = usize::try_from(start).ok()?;
        let stop = start.checked_add(length)?;
        if stop as u64 > end {
            None
        } else {
            self.bytes.get(start..stop)
        }
    }

    /// Physical addresses that are RAM: start and end of each range, in order.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        ranges(self.size())
    }
}

impl AsFd for GuestMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping made in `new`, and every slice of it borrowed `self`.
        let unmapped =
            unsafe { rustix::mm::munmap(self.bytes.as_ptr().cast_mut().cast(), self.bytes.len()) };
        debug_assert!(
            unmapped.is_ok(),
            "unmapping our own mapping cannot fail: {unmapped:?}"
        );
    }
}

fn ranges(size: u64) -> Vec<(u64, u64)> {
    if size < HOLE_FROM {
        return vec![(0, size)];
    }
    vec![(0, LOW_END), (HIGH_START, HIGH_START + size - LOW_END)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_guests_have_a_hole() {
        assert_eq!(ranges(GIB), [(0, GIB)]);
        assert_eq!(ranges(5 * GIB), [(0, 2 * GIB), (4 * GIB, 7 * GIB)]);
    }

    #[test]
    fn reads_stay_inside_ram() {
        let memory = GuestMemory::new(3 * GIB).unwrap();
        assert!(memory.page(0).is_some());
        assert!(memory.page(LOW_END / 4096 - 1).is_some());
        assert!(memory.page(LOW_END / 4096).is_none());
        assert!(memory.read(LOW_END - 8, 16).is_none());
        assert!(memory.page(HIGH_START / 4096).is_some());
        assert!(memory.page(HIGH_START / 4096 + GIB / 4096).is_none());
    }
}
