//! `netdump triage`: what killed a kernel, from its console log or its vmcore.
//!
//! One file after another; logs in pieces, so that memory does not grow with a file. Of a vmcore,
//! the log in its memory goes the way of any log, and the rest is told beside it. A file that
//! cannot be read does not keep the others from being told.

mod page;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek as _, Write as _, stdin, stdout};
use std::path::{Path, PathBuf};

use ::triage::memory::{self, Examination};
use ::triage::{Findings, Report, Role, Scanner};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rustix::process::{Resource, Rlimit, nice, setrlimit};
use serde::Serialize;

use crate::hardware::Hardware;

/// The lowest priority.
const LOWEST: i32 = 19;
/// Bytes that are read at a time.
const PIECE: usize = 256 * 1024;

/// How a file is told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// One page for people.
    Page,
    /// The page and what the signature is made of.
    Explained,
    /// The page, and of a vmcore all tasks with their backtraces.
    Tasks,
    /// One JSON object a line, for machines.
    Json,
}

/// The first bytes of the vmcores that are read.
const VMCORES: [&[u8]; 2] = [b"\x7fELF", b"KDUMP   "];

/// Tells each of `files` (`-` is stdin).
///
/// # Errors
/// A file could not be read or is no log; the others were told all the same.
pub fn run(files: &[PathBuf], form: Form) -> Result<()> {
    let mut failed = 0;
    for file in files {
        let name = file.display().to_string();
        let told = tell(file, name.clone()).unwrap_or_else(|error| {
            failed += 1;
            Told::failed(name, &format!("{error:#}"))
        });
        if !print(&told.text(form)?)? {
            return Ok(());
        }
    }
    ensure!(
        failed == 0,
        "{failed} of {} files could not be triaged",
        files.len()
    );
    Ok(())
}

/// Prints the kernel's log of each vmcore in `files`, as `dmesg` does.
///
/// # Errors
/// A file is no vmcore or has no log; the others were printed all the same.
pub fn dmesg(files: &[PathBuf]) -> Result<()> {
    let mut failed = Vec::new();
    for file in files {
        let log = open(file).and_then(|mut core| {
            let machine = core.machine().clone();
            memory::log(&mut core, &machine).map_err(|error| anyhow!("the log: {error}"))
        });
        match log {
            Ok(log) if !print(&log.text)? => return Ok(()),
            Ok(_) => {}
            Err(error) => failed.push(format!("{}: {error:#}", file.display())),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Memory and CPU that [`into`] may take: what any real vmcore needs many times over.
const MEMORY_MAX: u64 = 4 << 30;
const CPU_SECONDS_MAX: u64 = 60;

/// Writes `report.txt` and `report.json` of one file into `folder`, within limits that this process
/// puts on itself: the file may come from anybody.
///
/// # Errors
/// The file cannot be read, or the reports cannot be written.
pub fn into(folder: &Path, file: &Path) -> Result<()> {
    let limit = |value| Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    setrlimit(Resource::As, limit(MEMORY_MAX)).context("cannot limit memory")?;
    setrlimit(Resource::Cpu, limit(CPU_SECONDS_MAX)).context("cannot limit time")?;
    nice(LOWEST).context("cannot lower the priority")?;
    let mut told = tell(file, file.display().to_string())?;
    told.hardware = suspicions(folder);
    for (name, form) in [("report.txt", Form::Tasks), ("report.json", Form::Json)] {
        let path = folder.join(name);
        let aside = folder.join(format!("{name}.new"));
        fs::write(&aside, told.text(form)? + "\n")
            .and_then(|()| fs::rename(&aside, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// What the hardware of the crash in `folder` says against itself. That its file is malformed keeps
/// nobody from the rest of the report.
fn suspicions(folder: &Path) -> Vec<String> {
    match Hardware::read(folder) {
        Ok(hardware) => hardware.map_or_else(Vec::new, |hardware| hardware.suspicions()),
        Err(error) => vec![format!("unknown: {error:#}")],
    }
}

/// Prints a text; false when nobody reads any more, as behind `head`.
fn print(text: &str) -> Result<bool> {
    let line_end = if text.ends_with('\n') { "" } else { "\n" };
    match write!(stdout(), "{text}{line_end}") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to stdout"),
    }
}

/// What is told of the file, under this name.
fn tell(file: &Path, name: String) -> Result<Told> {
    if file.as_os_str() == "-" {
        return Ok(Told::new(name, &scan(&mut stdin().lock())?));
    }
    let mut opened = File::open(file).context("cannot open")?;
    if is_vmcore(&mut opened)? {
        return Ok(Told::of_vmcore(name, examine(file)?));
    }
    Ok(Told::new(name, &scan(&mut opened)?))
}

/// Whether the file begins as a vmcore; it is read from its start afterwards.
fn is_vmcore(file: &mut File) -> Result<bool> {
    let mut first = Vec::new();
    file.take(8)
        .read_to_end(&mut first)
        .context("cannot read")?;
    // A pipe cannot be read again; what cannot seek is no vmcore.
    let again = file.seek(io::SeekFrom::Start(0));
    let is_vmcore = VMCORES.iter().any(|magic| first.starts_with(magic));
    ensure!(
        again.is_ok() || first.is_empty(),
        "cannot seek; give a log as `-`"
    );
    Ok(is_vmcore)
}

fn open(file: &Path) -> Result<dump::Reader> {
    dump::Reader::open(file).context("cannot read the vmcore")
}

fn examine(file: &Path) -> Result<Examination> {
    let mut core = open(file)?;
    let machine = core.machine().clone();
    Ok(memory::examine(&mut core, &machine))
}

fn scan(input: &mut dyn Read) -> Result<Findings> {
    let mut scanner = Scanner::new();
    let mut piece = vec![0; PIECE];
    let mut is_first = true;
    loop {
        let length = match input.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("cannot read"),
        };
        let bytes = piece.get(..length).unwrap_or(&[]);
        if std::mem::take(&mut is_first) {
            check_is_log(bytes)?;
        }
        scanner.push(bytes);
    }
    ensure!(
        !is_first,
        "is empty: it says neither that a kernel died nor that it did not"
    );
    Ok(scanner.finish())
}

/// A vmcore holds the log somewhere in its memory; read as text, from stdin, it would look like a
/// log without a crash, or with one that never was.
fn check_is_log(first: &[u8]) -> Result<()> {
    let formats: [(&[u8], &str); 4] = [
        (b"\x7fELF", "an ELF file"),
        (b"KDUMP   ", "a kdump-compressed vmcore"),
        (b"makedumpfile", "a flattened vmcore"),
        (b"\x1f\x8b", "a gzip file"),
    ];
    if let Some((_, what)) = formats.iter().find(|(magic, _)| first.starts_with(magic)) {
        let instead = if first.starts_with(b"makedumpfile") {
            "restore it with `makedumpfile -R`"
        } else {
            "give the console log, or the `log` file of the crash's directory"
        };
        bail!("is {what}, not a log; {instead}");
    }
    Ok(())
}

/// What is told of one file.
#[derive(Serialize)]
struct Told {
    file: String,
    crash: bool,
    class: Option<::triage::Class>,
    title: Option<String>,
    function: Option<String>,
    module: Option<String>,
    signature: Option<String>,
    family: Option<String>,
    reports: Vec<Report>,
    reports_dropped: u64,
    /// What the hardware says against itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hardware: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Of a vmcore, what its memory says.
    #[serde(flatten)]
    memory: Option<Box<Examination>>,
}

impl Told {
    fn new(file: String, findings: &Findings) -> Self {
        let crash = findings.crash();
        let signature = crash.and_then(|report| report.signature.as_ref());
        Self {
            file,
            crash: crash.is_some(),
            class: crash.map(|report| report.class),
            title: crash.map(|report| report.title.clone()),
            function: crash.and_then(|report| report.function.clone()),
            module: crash.and_then(|report| report.module.clone()),
            signature: signature.map(|signature| signature.signature.clone()),
            family: signature.map(|signature| signature.family.clone()),
            reports: findings.reports.clone(),
            reports_dropped: findings.reports_dropped,
            hardware: Vec::new(),
            error: None,
            memory: None,
        }
    }

    fn of_vmcore(file: String, memory: Examination) -> Self {
        let log = memory.log.as_ref().map_or("", |log| &log.text);
        let findings = ::triage::scan(log.as_bytes());
        Self {
            memory: Some(Box::new(memory)),
            ..Self::new(file, &findings)
        }
    }

    fn text(&self, form: Form) -> Result<String> {
        let mut text = match form {
            Form::Json => return serde_json::to_string(self).context("cannot write JSON"),
            Form::Explained => format!("{self}{}", self.explanation()),
            Form::Page | Form::Tasks => self.to_string(),
        };
        if let Some(memory) = &self.memory {
            text.push_str(&page::page(memory, form == Form::Tasks));
        }
        Ok(text)
    }

    fn explanation(&self) -> String {
        let crash = self
            .reports
            .iter()
            .find(|report| report.role == Role::Cause);
        crash.map(Report::explanation).unwrap_or_default()
    }

    /// Whether this is a vmcore whose log was not found: then nothing is known, not even that nothing
    /// crashed.
    fn log_is_lost(&self) -> bool {
        self.memory
            .as_ref()
            .is_some_and(|memory| memory.log.is_none())
    }

    fn failed(file: String, error: &str) -> Self {
        Self {
            error: Some(error.split_whitespace().collect::<Vec<_>>().join(" ")),
            ..Self::new(file, &Findings::default())
        }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file)?;
        if let Some(error) = &self.error {
            return write!(f, "{error}");
        }
        match self
            .reports
            .iter()
            .find(|report| report.role == Role::Cause)
        {
            Some(report) => write!(f, "{report}")?,
            None if self.log_is_lost() => {
                writeln!(f, "cannot tell what crashed: the log could not be read")?;
            }
            None => writeln!(f, "no crash")?,
        }
        let mut is_first = true;
        for report in &self.reports {
            let what = match report.role {
                Role::Cause if std::mem::take(&mut is_first) => continue,
                Role::Cause => "next boot",
                Role::Consequence => "then",
                Role::Notice => "beside",
            };
            let times = if report.count > 1 {
                format!(" ({} times)", report.count)
            } else {
                String::new()
            };
            writeln!(
                f,
                "  {what:<10} {}{times}, line {}",
                report.title, report.line_number
            )?;
        }
        for suspicion in &self.hardware {
            writeln!(f, "  hardware   {suspicion}")?;
        }
        if self.reports_dropped > 0 {
            writeln!(f, "  and {} more reports", self.reports_dropped)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &[u8] = b"[    1.000000] BUG: KASAN: use-after-free in foo+0x1/0x2\n";

    #[test]
    fn a_log_is_told_in_one_json_line() {
        let told = Told::new("x".to_owned(), &scan(&mut &LOG[..]).unwrap());
        let json: serde_json::Value = serde_json::to_value(&told).unwrap();
        assert_eq!(json["crash"], true);
        assert_eq!(json["title"], "KASAN: use-after-free in foo");
        assert_eq!(json["function"], "foo");
        assert_eq!(json["reports"][0]["signature"], json["signature"]);
        assert!(
            told.to_string()
                .starts_with("x: KASAN: use-after-free in foo\n")
        );
    }

    #[test]
    fn a_vmcore_is_refused_by_name() {
        for first in [&b"\x7fELF\x02"[..], b"KDUMP   \x06", b"makedumpfile\0\0"] {
            let error = scan(&mut &first[..]).unwrap_err().to_string();
            assert!(error.contains("not a log"), "{error}");
        }
        let told = Told::failed("x".to_owned(), "is\nbad");
        assert_eq!(told.to_string(), "x: is bad");
        assert_eq!(serde_json::to_value(&told).unwrap()["crash"], false);
    }
}
