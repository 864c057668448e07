//! Core files to measure with, made once and kept in the cache.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::kmod::Variant;
use crate::vm::{self, Guest};
use crate::{cache, demo, output};

const PAGE_BYTES: u64 = 4096;
/// An ELF header and one program header.
const HEADER_BYTES: usize = 64 + 56;

/// An ELF core file of so many MiB of memory that does not compress.
///
/// # Errors
/// It cannot be written.
pub(crate) fn random(mib: u64) -> Result<PathBuf> {
    let path = folder()?.join(format!("random-{mib}m.elf"));
    if path.exists() {
        return Ok(path);
    }
    let _step = output::step(format!("making {}", path.display()));
    let partial = path.with_extension("partial");
    let bytes = mib << 20;
    let mut file = BufWriter::new(File::create(&partial)?);
    let mut header = header(bytes);
    header.resize(usize::try_from(PAGE_BYTES)?, 0);
    file.write_all(&header)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..bytes / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes())?;
    }
    file.into_inner()
        .context("cannot write the core file")?
        .sync_all()?;
    fs::rename(&partial, &path)?;
    Ok(path)
}

/// The ELF core file of a real guest with 4 GiB of memory, most of it in use.
///
/// # Errors
/// The guest cannot be run, or its dump is not good.
pub(crate) fn guest() -> Result<PathBuf> {
    let path = folder()?.join("guest-4g.elf");
    if path.exists() {
        return Ok(path);
    }
    let guest = Guest {
        memory: "4G".to_owned(),
        fill: Some("ordinary".to_owned()),
        format: Some("elf".to_owned()),
        cpus: 2,
        ..Guest::default()
    };
    let (found, folder) = vm::judge(&guest, Variant::Product)?;
    ensure!(
        found.verdict == "Ok",
        "the guest's dump is not good: {}",
        found.why
    );
    let (_, crash) = demo::session(&folder)?;
    move_file(&crash.join("vmcore"), &path)?;
    Ok(path)
}

/// The cache may be another file system than the tree.
fn move_file(from: &Path, to: &Path) -> Result<()> {
    let partial = to.with_extension("partial");
    fs::copy(from, &partial).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::rename(&partial, to)?;
    fs::remove_file(from)?;
    Ok(())
}

fn folder() -> Result<PathBuf> {
    let folder = cache::dir()?.join("bench");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// A core file of x86-64 with one segment of so many bytes, at 16 MiB of physical memory, that
/// begins at the file's second page.
fn header(bytes: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for (value, width) in [
        (4, 2), // a core file
        (62, 2),
        (1, 4),
        (0, 8),
        (64, 8), // the program header's place
        (0, 8),
        (0, 4),
        (64, 2),
        (56, 2),
        (1, 2), // one of them
        (0, 2),
        (0, 2),
        (0, 2),
        (1, 4), // it is loadable
        (7, 4),
        (PAGE_BYTES, 8),
        (0, 8),
        (16 << 20, 8),
        (bytes, 8),
        (bytes, 8),
        (PAGE_BYTES, 8),
    ] {
        header.extend(value.to_le_bytes().iter().take(width));
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_its_two_parts() {
        let header = header(1 << 20);
        assert_eq!(header.len(), HEADER_BYTES);
        assert_eq!(header[54..58], [56, 0, 1, 0]);
    }
}
