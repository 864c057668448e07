//! From spool to vmcore: writes the memory image, then proves it by reading back every page.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, anyhow, ensure};
use dump::{
    Compression, Machine, Page, PageState, RamRange, Reader as ImageReader, Summary, Writer,
};
use proto::arming::text;
use proto::record::{
    BLOCK_BYTES, CPU_CAPTURED, CPU_CRASHING, Cpu, Hello, Kind, Malformed, Record, Run,
};
use proto::units::PAGE_BYTES;

use super::content::RecordStream;
use super::directory::{CrashDir, VMCORE_FILE, VMCORE_INCOMPLETE_FILE, Vmcore};
use super::spool::{Reader, SPOOL_FILE};

/// Which vmcore to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// kdump-compressed (zstd): readers can tell excluded from zero.
    Kdump,
    /// ELF.
    Elf,
}

/// What to make of a spool.
pub struct Job<'a> {
    /// The crash's directory.
    pub dir: &'a CrashDir,
    /// The format to write.
    pub format: Format,
    /// Filter level of the dump.
    pub filter: u8,
    /// Whether the stream is whole; only then the image gets its final name.
    pub whole: bool,
    /// Set when the server ends: the job is given up, and the spool stays as it is.
    pub stop: &'a AtomicBool,
}

/// Writes the vmcore, reads it back and compares every page with the spool, and, when the stream is
/// whole and no page is missing, gives it its final name. `None` when the stream ended before the
/// memory map.
///
/// The spool is left alone in any case.
pub fn finish(job: &Job<'_>) -> Result<Option<Vmcore>> {
    let aside = job.dir.file(VMCORE_INCOMPLETE_FILE);
    let Some(written) = write(job, &aside)? else {
        return Ok(None);
    };
    verify(job, &aside)?;
    let name = if job.whole && written.missing == 0 {
        VMCORE_FILE
    } else {
        VMCORE_INCOMPLETE_FILE
    };
    if name == VMCORE_FILE {
        let path = job.dir.file(VMCORE_FILE);
        fs::rename(&aside, &path)
            .with_context(|| format!("cannot rename {} to {VMCORE_FILE}", aside.display()))?;
        job.dir.sync()?;
    }
    let format = match job.format {
        Format::Kdump => "kdump",
        Format::Elf => "elf",
    };
    Ok(Some(Vmcore {
        file: name.to_owned(),
        format: format.to_owned(),
        bytes: written.file_bytes,
        pages_lost: written.missing,
    }))
}

/// Writes the image from the spool, durably.
fn write(job: &Job<'_>, aside: &Path) -> Result<Option<Summary>> {
    let mut machine = Machine {
        filter: job.filter,
        ..Machine::default()
    };
    let mut writer: Option<Writer> = None;
    let mut block = Box::new([0; BLOCK_BYTES]);
    records(job, |record| {
        match record {
            Record::Hello(hello) => describe(&mut machine, hello),
            Record::Registers(cpu) => machine.cpus.push(described(cpu)),
            Record::Notes(notes) => machine.vmcoreinfo.extend_from_slice(notes),
            Record::MemoryMap(ranges) => {
                machine.ram = ranges
                    .iter()
                    .map(|range| ram_range(range.first.get(), range.pages.get()))
                    .collect();
            }
            Record::Pages(sent) => {
                let pages = sent.decode(&mut block)?;
                let writer = started(&mut writer, &mut machine, job, aside)?;
                for (pfn, page) in (sent.first.0..).zip(pages.as_chunks::<PAGE_BYTES>().0) {
                    writer
                        .page(dump::Pfn(pfn), Page::Data(page))
                        .context("writing the vmcore")?;
                }
            }
            Record::Run(run) => write_run(started(&mut writer, &mut machine, job, aside)?, run)?,
            Record::Text { .. }
            | Record::Totals(_)
            | Record::Written(_)
            | Record::State { .. }
            | Record::End(_)
            | Record::PullBegin { .. }
            | Record::PullEnd { .. } => {}
        }
        Ok(())
    })?;
    if !machine.ram.is_empty() {
        // Even without a page the image has the registers and VMCOREINFO.
        started(&mut writer, &mut machine, job, aside)?;
    }
    let Some(writer) = writer else {
        return Ok(None);
    };
    Ok(Some(writer.finish().context("writing the vmcore")?))
}

/// The writer, created when the first page comes: by then everything else it needs has come.
fn started<'a>(
    writer: &'a mut Option<Writer>,
    machine: &mut Machine,
    job: &Job<'_>,
    aside: &Path,
) -> Result<&'a mut Writer> {
    if writer.is_none() {
        machine.cpus.sort_by_key(|cpu| cpu.number);
        let format = match job.format {
            Format::Kdump => dump::Format::Kdump(Compression::default()),
            Format::Elf => dump::Format::Elf,
        };
        *writer =
            Some(Writer::create(aside, machine.clone(), format).context("creating the vmcore")?);
    }
    writer.as_mut().context("the writer was just made")
}

fn write_run(writer: &mut Writer, run: Run) -> Result<()> {
    let page = if run.why == Kind::Excluded {
        Page::Excluded
    } else if run.why == Kind::Unreadable {
        Page::Unreadable
    } else {
        Page::Zero
    };
    for pfn in run.first.0..run.first.plus(run.pages).0 {
        writer
            .page(dump::Pfn(pfn), page)
            .context("writing the vmcore")?;
    }
    Ok(())
}

/// Reads every page with contents back from the image and compares it with the spool.
fn verify(job: &Job<'_>, aside: &Path) -> Result<()> {
    let mut image = ImageReader::open(aside).context("reading the vmcore back")?;
    let mut block = Box::new([0; BLOCK_BYTES]);
    let mut back = [0; PAGE_BYTES];
    records(job, |record| {
        let Record::Pages(sent) = record else {
            return Ok(());
        };
        let pages = sent.decode(&mut block)?;
        for (pfn, page) in (sent.first.0..).zip(pages.as_chunks::<PAGE_BYTES>().0) {
            let state = image
                .read_page(dump::Pfn(pfn), &mut back)
                .context("reading the vmcore back")?;
            if state != PageState::Data || back != *page {
                return Err(
                    anyhow!("page {pfn:#x} of the vmcore differs from what was received").into(),
                );
            }
        }
        Ok(())
    })
}

/// Calls `record` with each record of the spool, until its end or until what follows cannot be
/// read.
fn records(job: &Job<'_>, mut record: impl FnMut(Record<'_>) -> Result<(), Fault>) -> Result<()> {
    let path = job.dir.file(SPOOL_FILE);
    let mut spool =
        Reader::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut stream = RecordStream::default();
    let mut frame = Vec::new();
    while spool
        .frame(&mut frame)
        .with_context(|| format!("cannot read {}", path.display()))?
    {
        ensure!(!job.stop.load(Ordering::Relaxed), "the server ends");
        match stream.push(&frame, &mut record) {
            Ok(()) => {}
            Err(Fault::Malformed) => break,
            Err(Fault::Other(error)) => return Err(error),
        }
    }
    Ok(())
}

/// Why the records of a spool are not gone through further.
enum Fault {
    /// The client sent what is no record. What came before is good.
    Malformed,
    /// Anything else.
    Other(anyhow::Error),
}

impl From<Malformed> for Fault {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

fn describe(machine: &mut Machine, hello: &Hello) {
    let field = |bytes: &[u8]| text(bytes).unwrap_or_default().to_owned();
    machine.node = field(&hello.host);
    machine.release = field(&hello.release);
    machine.version = field(&hello.kernel_version);
    machine.crash_time_s = hello.unix_seconds.get();
    machine.page_offset = hello.page_offset.get();
    let image = ram_range(hello.image_pfn.get(), hello.image_pages.get());
    machine.kernel_image = (image.pages > 0).then_some(image);
}

fn described(cpu: &Cpu) -> dump::Cpu {
    let flags = cpu.flags.get();
    dump::Cpu {
        number: cpu.cpu.get(),
        pid: u32::try_from(cpu.pid.get()).unwrap_or(0),
        registers: (flags & CPU_CAPTURED != 0)
            .then(|| cpu.registers.map(|register| register.get())),
        crashed: flags & CPU_CRASHING != 0,
    }
}

fn ram_range(first: u64, pages: u64) -> RamRange {
    RamRange {
        first: dump::Pfn(first),
        pages,
    }
}
