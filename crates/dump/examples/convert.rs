//! Converts a vmcore of any kind that `dump` reads into one that it writes.
//!
//! `cargo run --release -p dump --example convert -- IN OUT FORMAT [OPTION...]`
//!
//! FORMAT is `elf`, `zstd[:LEVEL]`, `zlib[:LEVEL]` or `none`. Options are what some files do not
//! say: `crashed=CPU`, `page-offset=HEX`, `image=FIRST_PFN:PAGES`; and `silent=CPU` (a CPU that did
//! not answer), `offline=CPU`, `missing=`, `excluded=` and `unreadable=FIRST_PFN:PAGES`
//! (hexadecimal), which show how a reader meets such pages. Made for trying debuggers on memory
//! that QEMU's `dump-guest-memory` saved.

use std::path::Path;
use std::time::Instant;

use dump::{
    Compression, DumpError, Format, Machine, PAGE_SIZE, Page, PageState, Pfn, RamRange, Reader,
    Writer,
};

fn main() -> Result<(), String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [input, output, format, options @ ..] = arguments.as_slice() else {
        return Err("usage: convert IN OUT elf|zstd|zlib|none [OPTION...]".to_owned());
    };
    let mut reader = Reader::open(Path::new(input)).map_err(|error| error.to_string())?;
    let mut machine = reader.machine().clone();
    let mut left_out = Vec::new();
    for option in options {
        apply(option, &mut machine, &mut left_out)
            .ok_or_else(|| format!("option {option:?} is not understood"))?;
    }
    let format = parse_format(format).ok_or_else(|| format!("no format is called {format:?}"))?;
    let start = Instant::now();
    let writer = Writer::create(Path::new(output), machine, format);
    let summary = writer
        .and_then(|writer| copy(&mut reader, writer, &left_out))
        .map_err(|error| error.to_string())?;
    println!("{summary:?} in {:.2} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn copy(
    reader: &mut Reader,
    mut writer: Writer,
    left_out: &[(PageState, RamRange)],
) -> Result<dump::Summary, DumpError> {
    let ranges = reader.ram().to_vec();
    let mut page = [0; PAGE_SIZE];
    for pfn in ranges
        .iter()
        .flat_map(|range| range.first.0..range.end())
        .map(Pfn)
    {
        let listed = left_out
            .iter()
            .find(|(_, run)| run.first <= pfn && pfn.0 < run.end());
        let state = match listed {
            Some((state, _)) => *state,
            None => reader.read_page(pfn, &mut page)?,
        };
        match state {
            PageState::Data => writer.page(pfn, Page::Data(&page))?,
            PageState::Excluded => writer.page(pfn, Page::Excluded)?,
            PageState::Unreadable => writer.page(pfn, Page::Unreadable)?,
            PageState::Missing | PageState::NotRam => {}
        }
    }
    writer.finish()
}

fn parse_format(text: &str) -> Option<Format> {
    let (name, level) = text.split_once(':').unwrap_or((text, "1"));
    Some(match name {
        "elf" => Format::Elf,
        "zstd" => Format::Kdump(Compression::Zstd {
            level: level.parse().ok()?,
        }),
        "zlib" => Format::Kdump(Compression::Zlib {
            level: level.parse().ok()?,
        }),
        "none" => Format::Kdump(Compression::None),
        _ => return None,
    })
}

fn apply(
    option: &str,
    machine: &mut Machine,
    left_out: &mut Vec<(PageState, RamRange)>,
) -> Option<()> {
    let (name, value) = option.split_once('=')?;
    match name {
        "crashed" => machine.cpus.get_mut(value.parse::<usize>().ok()?)?.crashed = true,
        "silent" => {
            machine
                .cpus
                .get_mut(value.parse::<usize>().ok()?)?
                .registers = None
        }
        "offline" => drop(machine.cpus.remove(value.parse().ok()?)),
        "page-offset" => machine.page_offset = u64::from_str_radix(value, 16).ok()?,
        "image" => machine.kernel_image = Some(run(value)?),
        "missing" => left_out.push((PageState::Missing, run(value)?)),
        "excluded" => left_out.push((PageState::Excluded, run(value)?)),
        "unreadable" => left_out.push((PageState::Unreadable, run(value)?)),
        _ => return None,
    }
    Some(())
}

fn run(text: &str) -> Option<RamRange> {
    let (first, pages) = text.split_once(':')?;
    let first = Pfn(u64::from_str_radix(first, 16).ok()?);
    Some(RamRange {
        first,
        pages: u64::from_str_radix(pages, 16).ok()?,
    })
}
