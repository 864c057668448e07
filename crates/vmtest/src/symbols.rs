//! Data symbols of a kernel with debug information, for guests whose /proc/kallsyms leaves some out.
//!
//! Of the ELF file only the section headers, the symbol table and its strings are read: kernels
//! with debug information have hundreds of megabytes.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use crate::stage::Kernel;

/// Offsets and sizes by the ELF-64 specification.
const HEADER_BYTES: usize = 64;
const SECTION_BYTES: usize = 64;
const SYMBOL_BYTES: usize = 24;
const SECTION_SYMBOLS: u32 = 2;
/// Symbols of sections and files, which have no place of their own.
const TYPE_FUNCTION_MAX: u8 = 2;
/// Where the image begins, in the file and in the guest.
const TEXT: &str = "_text";
/// The kernel's image lies above this in every x86-64 kernel, wherever it was moved to.
const IMAGE_MIN: u64 = 0xffff_ffff_8000_0000;

/// Adds to what the guest said of its kernel the symbols of its image that it left out.
///
/// # Errors
/// If `vmlinux` is no ELF file with symbols, or the guest did not say where its image lies.
pub fn add(facts: &mut Kernel, vmlinux: &Path) -> Result<()> {
    let found = read(vmlinux).with_context(|| format!("cannot read {}", vmlinux.display()))?;
    let address = |symbols: &[(u64, String)]| {
        let text = symbols.iter().find(|(_, name)| name == TEXT);
        text.map(|(address, _)| *address)
            .with_context(|| format!("there is no symbol {TEXT}"))
    };
    let moved = address(&facts.symbols)?.wrapping_sub(address(&found)?);
    let in_image = found
        .into_iter()
        .filter(|(address, _)| *address >= IMAGE_MIN);
    let moved_there = in_image.map(|(address, name)| (address.wrapping_add(moved), name));
    facts.symbols.extend(moved_there);
    facts.symbols.sort();
    facts.symbols.dedup();
    Ok(())
}

/// Address and name of all symbols that have a place.
fn read(path: &Path) -> Result<Vec<(u64, String)>> {
    let file = File::open(path)?;
    let header = bytes(&file, 0, HEADER_BYTES)?;
    ensure!(
        header.starts_with(b"\x7fELF\x02\x01"),
        "it is no ELF file of 64 bits"
    );
    let (sections, count) = (word(&header, 40)?, half(&header, 60)?);
    let table = bytes(&file, sections, usize::from(count) * SECTION_BYTES)?;
    let section = |index: usize| table.get(index * SECTION_BYTES..(index + 1) * SECTION_BYTES);
    let symbols = (0..usize::from(count))
        .filter_map(section)
        .find(|section| number(section, 4).is_ok_and(|kind| kind == SECTION_SYMBOLS))
        .context("it has no symbols")?;
    let strings = section(usize::try_from(number(symbols, 40)?)?).context("no strings")?;
    let content = |section: &[u8]| -> Result<Vec<u8>> {
        bytes(
            &file,
            word(section, 24)?,
            usize::try_from(word(section, 32)?)?,
        )
    };
    let (symbols, strings) = (content(symbols)?, content(strings)?);
    let entries = symbols.chunks_exact(SYMBOL_BYTES);
    Ok(entries
        .filter(|entry| entry[4] & 15 < TYPE_FUNCTION_MAX && entry[6..8] != [0, 0])
        .filter_map(|entry| {
            let name = strings.get(usize::try_from(number(entry, 0).ok()?).ok()?..)?;
            let end = name.iter().position(|byte| *byte == 0)?;
            let name = String::from_utf8_lossy(&name[..end]).into_owned();
            (!name.is_empty()).then_some((word(entry, 8).ok()?, name))
        })
        .collect())
}

fn bytes(file: &File, at: u64, count: usize) -> Result<Vec<u8>> {
    let size = file.metadata()?.len();
    ensure!(
        count as u64 <= size,
        "{count} bytes at {at} of a file of {size}"
    );
    let mut bytes = vec![0; count];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

fn word(bytes: &[u8], at: usize) -> Result<u64> {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk);
    Ok(u64::from_le_bytes(*word.context("a structure is cut off")?))
}

fn number(bytes: &[u8], at: usize) -> Result<u32> {
    let number = bytes.get(at..).and_then(<[u8]>::first_chunk);
    Ok(u32::from_le_bytes(
        *number.context("a structure is cut off")?,
    ))
}

fn half(bytes: &[u8], at: usize) -> Result<u16> {
    let half = bytes.get(at..).and_then(<[u8]>::first_chunk);
    Ok(u16::from_le_bytes(*half.context("a structure is cut off")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT_ADDRESS: u64 = IMAGE_MIN + 0x100_0000;

    /// An ELF file of two sections, symbols and strings, which lie behind its header.
    fn file(symbols: &[(u64, &str)]) -> tempfile::NamedTempFile {
        let (mut table, mut strings) = (Vec::new(), vec![0]);
        for (address, name) in symbols {
            let mut entry = [0; SYMBOL_BYTES];
            entry[..4].copy_from_slice(&u32::try_from(strings.len()).unwrap().to_le_bytes());
            (entry[4], entry[6]) = (1, 1);
            entry[8..16].copy_from_slice(&address.to_le_bytes());
            table.extend(entry);
            strings.extend_from_slice(name.as_bytes());
            strings.push(0);
        }
        let section = |kind: u32, at: usize, bytes: usize, link: u32| {
            let mut section = [0; SECTION_BYTES];
            section[4..8].copy_from_slice(&kind.to_le_bytes());
            section[24..32].copy_from_slice(&(at as u64).to_le_bytes());
            section[32..40].copy_from_slice(&(bytes as u64).to_le_bytes());
            section[40..44].copy_from_slice(&link.to_le_bytes());
            section
        };
        let mut header = vec![0; HEADER_BYTES];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let at = HEADER_BYTES + table.len() + strings.len();
        header[40..48].copy_from_slice(&(at as u64).to_le_bytes());
        header[60] = 2;
        let sections = [
            section(SECTION_SYMBOLS, HEADER_BYTES, table.len(), 1),
            section(3, HEADER_BYTES + table.len(), strings.len(), 0),
        ];
        let file = tempfile::NamedTempFile::new().unwrap();
        let content = [header, table, strings, sections.concat()].concat();
        std::fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn what_the_guest_left_out_is_added_where_its_image_was_moved_to() {
        let file = file(&[
            (TEXT_ADDRESS, TEXT),
            (TEXT_ADDRESS + 0x20, "known"),
            (TEXT_ADDRESS + 0x30, "nmi_desc"),
            (0x40, "per_cpu"),
        ]);
        let moved = 0x200_0000;
        let mut facts = Kernel {
            symbols: vec![
                (TEXT_ADDRESS + moved, TEXT.to_owned()),
                (TEXT_ADDRESS + moved + 0x20, "known".to_owned()),
            ],
            ..Kernel::default()
        };
        add(&mut facts, file.path()).unwrap();
        let last = facts.symbols.last().unwrap();
        assert_eq!(
            (last.0, last.1.as_str(), facts.symbols.len()),
            (TEXT_ADDRESS + moved + 0x30, "nmi_desc", 3)
        );
    }

    #[test]
    fn a_file_that_is_none_or_is_cut_short_is_refused() {
        let whole = file(&[(TEXT_ADDRESS, TEXT)]);
        let content = std::fs::read(whole.path()).unwrap();
        let mut facts = Kernel {
            symbols: vec![(TEXT_ADDRESS, TEXT.to_owned())],
            ..Kernel::default()
        };
        for cut in 0..content.len() {
            std::fs::write(whole.path(), &content[..cut]).unwrap();
            assert!(add(&mut facts, whole.path()).is_err(), "{cut} bytes");
        }
        std::fs::write(whole.path(), &content).unwrap();
        add(&mut facts, whole.path()).unwrap();
        facts.symbols.clear();
        assert!(add(&mut facts, whole.path()).is_err());
    }
}
