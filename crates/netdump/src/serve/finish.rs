//! From the spools to the vmcore, in one pass: each block is unpacked once, and its LZ4 form becomes
//! the pages' form in the image. Of a page that came more than once, the first one counts. For one
//! session at a time [`super::follow`] makes that pass while the pages arrive.
//!
//! That the pages are the client's was proved by their digest when they arrived, that the spool is
//! as it was written by its frames' hashes; the writer proves that the image is.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs, io};

use anyhow::{Context as _, Result, ensure};
use dump::{Compression, Machine, Page, RamRange, Summary, Writer};
use proto::arming::text;
use proto::record::{
    BLOCK_BYTES, Block, CPU_CAPTURED, CPU_CRASHING, Codec, Cpu, Hello, Kind, Malformed, Record, Run,
};
use proto::units::PAGE_BYTES;

use super::content::{BlockRoom, RecordStream};
use super::directory::{CrashDir, VMCORE_FILE, VMCORE_INCOMPLETE_FILE, Vmcore};
use super::follow::Follower;
use super::spool::Reader;

/// Which vmcore to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// kdump-compressed (LZO): readers can tell excluded from zero.
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

/// Writes the vmcore, reads it back, and, when the stream is whole and no page is missing, gives it
/// its final name. `None` when the stream ended before the memory map. `followed` has written what
/// the first spool held; with others beside it, it is of no use.
///
/// The spool is left alone in any case.
pub fn finish(job: &Job<'_>, followed: Option<Follower>) -> Result<Option<Vmcore>> {
    let followed = followed.filter(|_| job.dir.spools() == 1);
    let aside = job.dir.file(VMCORE_INCOMPLETE_FILE);
    let image = match followed.and_then(|follower| follower.image(job.filter)) {
        Some(image) => image.moved(aside.clone())?,
        None => whole(job, aside.clone())?,
    };
    let Some(written) = image.end()? else {
        return Ok(None);
    };
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

/// An image, record by record.
pub struct Image {
    path: PathBuf,
    format: dump::Format,
    filter: u8,
    machine: Machine,
    writer: Option<Writer>,
    block: Box<BlockRoom>,
}

impl Image {
    /// An image of which nothing is known yet; its file is made at `path` when the first page comes.
    #[must_use]
    pub fn new(path: PathBuf, format: Format, filter: u8) -> Self {
        Self {
            path,
            format: match format {
                Format::Kdump => dump::Format::Kdump(Compression::default()),
                Format::Elf => dump::Format::Elf,
            },
            filter,
            machine: Machine::default(),
            writer: None,
            block: Box::new([0; BLOCK_BYTES]),
        }
    }

    /// Takes the next record.
    pub fn record(&mut self, record: Record<'_>) -> Result<(), Fault> {
        match record {
            // A later attempt tells all of it anew; the first one that brought pages counts.
            Record::Hello(_) | Record::Registers(_) | Record::Notes(_) | Record::MemoryMap(_)
                if self.writer.is_some() => {}
            Record::Hello(hello) => self.machine = described_machine(hello, self.filter),
            Record::Registers(cpu) => self.machine.cpus.push(described(cpu)),
            Record::Notes(notes) => self.machine.vmcoreinfo.extend_from_slice(notes),
            Record::MemoryMap(ranges) => {
                self.machine.ram = ranges
                    .iter()
                    .map(|range| ram_range(range.first.get(), range.pages.get()))
                    .collect();
            }
            Record::Pages(sent) => self.pages(&sent)?,
            Record::Run(run) => write_run(self.started()?, run)?,
            Record::Text { .. }
            | Record::Totals(_)
            | Record::Written(_)
            | Record::State { .. }
            | Record::End(_)
            | Record::PullBegin { .. }
            | Record::PullEnd { .. }
            | Record::Processor(_)
            | Record::Devices { .. } => {}
        }
        Ok(())
    }

    fn pages(&mut self, sent: &Block<'_>) -> Result<(), Fault> {
        self.started()?;
        let pages = sent.decode(&mut self.block)?;
        let lz4 = (sent.codec == Codec::Lz4).then_some(sent.body);
        let (pages, _) = pages.as_chunks::<PAGE_BYTES>();
        let writer = self.writer.as_mut().context("the writer was just made")?;
        // What is no RAM was pulled by number and has no place in the image.
        writer
            .block(dump::Pfn(sent.first.0), lz4, pages)
            .context("writing the vmcore")?;
        Ok(())
    }

    /// The writer, created when the first page comes: by then everything else it needs has come.
    fn started(&mut self) -> Result<&mut Writer> {
        if self.writer.is_none() {
            self.machine.cpus.sort_by_key(|cpu| cpu.number);
            let writer = Writer::create(&self.path, self.machine.clone(), self.format);
            self.writer = Some(writer.context("creating the vmcore")?);
        }
        self.writer.as_mut().context("the writer was just made")
    }

    /// The same image at another path.
    fn moved(mut self, path: PathBuf) -> Result<Self> {
        if self.writer.is_some() {
            let rename = || format!("cannot rename {}", self.path.display());
            fs::rename(&self.path, &path).with_context(rename)?;
        }
        self.path = path;
        Ok(self)
    }

    /// Makes the file whole and durable, and proves it. `None` without a memory map.
    fn end(mut self) -> Result<Option<Summary>> {
        if !self.machine.ram.is_empty() {
            // Even without a page the image has the registers and VMCOREINFO.
            self.started()?;
        }
        let written = self.writer.map(Writer::finish).transpose();
        written.context("writing the vmcore")
    }
}

/// The image of all spools.
fn whole(job: &Job<'_>, path: PathBuf) -> Result<Image> {
    let mut image = Image::new(path, job.format, job.filter);
    records(job, |record| image.record(record))?;
    Ok(image)
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
        if writer.lacks(dump::Pfn(pfn)) {
            writer
                .page(dump::Pfn(pfn), page)
                .context("writing the vmcore")?;
        }
    }
    Ok(())
}

/// Calls `record` with each record of each spool, until its end or until what follows cannot be
/// read. A spool that lost its begin holds nothing.
fn records(job: &Job<'_>, mut record: impl FnMut(Record<'_>) -> Result<(), Fault>) -> Result<()> {
    for number in 1..=job.dir.spools() {
        let path = job.dir.spool(number);
        let show = path.display();
        let mut spool = match Reader::open(&path) {
            Ok(spool) => spool,
            Err(error) if is_broken(&error) => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot read {show}")),
        };
        let (mut stream, mut frame) = (RecordStream::default(), Vec::new());
        while spool
            .frame(&mut frame)
            .with_context(|| format!("cannot read {show}"))?
        {
            ensure!(!job.stop.load(Ordering::Relaxed), "the server ends");
            match stream.push(&frame, &mut record) {
                Ok(()) => {}
                Err(Fault::Malformed) => break,
                Err(Fault::Other(error)) => return Err(error),
            }
        }
    }
    Ok(())
}

fn is_broken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData
    )
}

/// Why the records of a spool are not gone through further.
pub enum Fault {
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

fn described_machine(hello: &Hello, filter: u8) -> Machine {
    let field = |bytes: &[u8]| text(bytes).unwrap_or_default().to_owned();
    let image = ram_range(hello.image_pfn.get(), hello.image_pages.get());
    Machine {
        filter,
        node: field(&hello.host),
        release: field(&hello.release),
        version: field(&hello.kernel_version),
        crash_time_s: hello.unix_seconds.get(),
        page_offset: hello.page_offset.get(),
        kernel_image: (image.pages > 0).then_some(image),
        ..Machine::default()
    }
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
