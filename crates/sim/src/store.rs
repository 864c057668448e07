//! Whether a store is readable wherever it was cut: its streams become a vmcore, as the product's
//! server makes one, and the vmcore is read back and compared with the host's memory.

use std::path::Path;

use dump::{Compression, Format, Machine, Page, PageState, Reader, Writer};
use proto::record::{self, BLOCK_BYTES, Kind, Record};
use proto::units::{PAGE_BYTES, Pfn};

use crate::memory::Memory;

/// Writes and reads the vmcore of the streams of one crash's attempts; returns how many pages it
/// has. A stream may end anywhere, even before there is a memory map.
pub fn read(streams: &[Vec<u8>], memory: &Memory) -> Result<u64, String> {
    let folder = tempfile::tempdir().map_err(|error| format!("no folder for a vmcore: {error}"))?;
    let path = folder.path().join("vmcore");
    let mut writer = None;
    let mut told = Vec::new();
    for stream in streams {
        write(stream, memory, &path, &mut writer, &mut told)?;
    }
    let Some(writer) = writer else { return Ok(0) };
    let broken = |error: dump::DumpError| format!("the store cannot be read: {error}");
    writer.finish().map_err(broken)?;
    let mut reader = Reader::open(&path).map_err(broken)?;
    let mut page = [0; PAGE_BYTES];
    for pfn in &told {
        let state = reader
            .read_page(dump::Pfn(pfn.0), &mut page)
            .map_err(broken)?;
        let right = memory.page(*pfn);
        if right.is_some_and(|right| right != page) && state != PageState::Excluded {
            return Err(format!(
                "{pfn:?} is {state:?} in the vmcore, with other bytes"
            ));
        }
    }
    Ok(u64::try_from(told.len()).unwrap_or(0))
}

/// Writes what one stream tells and no other has told before.
fn write(
    stream: &[u8],
    memory: &Memory,
    path: &Path,
    writer: &mut Option<Writer>,
    told: &mut Vec<Pfn>,
) -> Result<(), String> {
    let mut rest = stream;
    let wrong = |why: String| format!("the spool cannot be read: {why}");
    while let Some(decoded) = record::decode(rest).map_err(|error| wrong(format!("{error:?}")))? {
        rest = &rest[decoded.bytes..];
        match decoded.record {
            Record::MemoryMap(map) if writer.is_none() => {
                let ranges = map.iter().map(|range| dump::RamRange {
                    first: dump::Pfn(range.first.get()),
                    pages: range.pages.get(),
                });
                let machine = Machine {
                    ram: ranges.collect(),
                    vmcoreinfo: crate::host::NOTES.into(),
                    ..Machine::default()
                };
                let format = Format::Kdump(Compression::default());
                let made = Writer::create(path, machine, format);
                *writer = Some(made.map_err(|error| wrong(error.to_string()))?);
            }
            Record::Pages(block) => {
                let mut out = [0; BLOCK_BYTES];
                let pages = block
                    .decode(&mut out)
                    .map_err(|error| wrong(format!("{error:?}")))?;
                for (pfn, page) in (block.first.0..).zip(pages.as_chunks().0) {
                    put(writer, told, Pfn(pfn), Page::Data(page))?;
                }
            }
            Record::Run(run) => {
                let page = if run.why == Kind::Zero {
                    Page::Zero
                } else if run.why == Kind::Excluded {
                    Page::Excluded
                } else {
                    Page::Unreadable
                };
                // The answer to a pull may tell of pages that are no System RAM.
                for pfn in memory.pfns_between(run.first, run.first.plus(run.pages)) {
                    put(writer, told, pfn, page)?;
                }
            }
            Record::MemoryMap(_)
            | Record::Hello(_)
            | Record::Text { .. }
            | Record::Registers(_)
            | Record::Notes(_)
            | Record::Totals(_)
            | Record::Written(_)
            | Record::State { .. }
            | Record::End(_)
            | Record::PullBegin { .. }
            | Record::PullEnd { .. }
            | Record::Processor(_)
            | Record::Devices { .. } => {}
        }
    }
    Ok(())
}

fn put(
    writer: &mut Option<Writer>,
    told: &mut Vec<Pfn>,
    pfn: Pfn,
    page: Page<'_>,
) -> Result<(), String> {
    let Some(writer) = writer else {
        return Err("pages come before the memory map".into());
    };
    if writer.has(dump::Pfn(pfn.0)) {
        return Ok(());
    }
    told.push(pfn);
    writer
        .page(dump::Pfn(pfn.0), page)
        .map_err(|error| format!("the vmcore cannot be written: {error}"))
}
