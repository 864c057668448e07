//! `cargo xtask demo`: from a fresh machine to a vmcore of a crashed kernel, in one command.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use crate::vm::{self, Guest};
use crate::{command, output, packages};

/// Prints the stack of the thread that crashed.
const BACKTRACE: &str = "\
import sys, drgn, drgn.helpers.linux
prog = drgn.Program()
prog.set_core_dump(sys.argv[1])
prog.load_debug_info([sys.argv[2]])
print(prog.crashed_thread().stack_trace())
";

/// What the server wrote about the crash, of which only what is shown here.
#[derive(Debug, Deserialize)]
pub(crate) struct Session {
    pub(crate) state: String,
    pub(crate) host: String,
    /// Seconds from the first datagram to the last.
    pub(crate) seconds: f64,
    /// Bytes of the stream, without what was sent again.
    pub(crate) bytes: u64,
    kernel: String,
    reason: String,
    task: Task,
    cpus: u32,
    cpus_captured: u32,
    pub(crate) ram_pages: u64,
    pages: Pages,
}

#[derive(Debug, Deserialize)]
struct Task {
    comm: String,
    pid: i32,
    cpu: u32,
}

#[derive(Debug, Deserialize)]
struct Pages {
    data: u64,
    zero: u64,
    unreadable: u64,
    excluded: u64,
}

/// Crashes a guest for people to watch and tells what was learned.
///
/// # Errors
/// Something is missing that cannot be installed, or the dump did not arrive whole.
pub(crate) fn run() -> Result<()> {
    let guest = Guest {
        crash: "sysrq".into(),
        symbols: true,
        ..Guest::default()
    };
    let kernel = packages::kernel(&guest.kernel)?;
    eprintln!(
        "A guest with Debian's kernel {} will be armed, will panic, and will send its memory.",
        kernel.release
    );
    let (folder, judgement) = vm::show(&guest)?;
    // Without a session there is nothing to tell but the judgement.
    let Ok((session, crash)) = session(&folder) else {
        return judgement;
    };
    let (vmcore, vmlinux) = (crash.join("vmcore"), packages::vmlinux(&kernel.release)?);
    let python = packages::drgn()?;
    let backtrace = {
        let _step = output::step("asking drgn for the crashed thread's stack");
        command::capture(
            Command::new(&python)
                .args(["-c", BACKTRACE])
                .arg(&vmcore)
                .arg(&vmlinux),
        )?
    };
    let size = fs::metadata(&vmcore)
        .with_context(|| format!("no {}", vmcore.display()))?
        .len();
    print!("\n{}", report(&session, size, &backtrace));
    let drgn = python.with_file_name("drgn");
    let crash_reader = packages::crash_reader()?.join(" ");
    let (vmcore, vmlinux) = (vmcore.display(), vmlinux.display());
    println!("\nThe crash's directory: {}", crash.display());
    println!(
        "Open the vmcore with drgn:\n  {} -c {vmcore} -s {vmlinux}",
        drgn.display()
    );
    println!("or with crash:\n  {crash_reader} {vmlinux} {vmcore}");
    judgement
}

/// Finds the one `session.json` below a run's folder; returns it and the directory it lies in.
///
/// # Errors
/// There is none or more than one, or it cannot be read.
pub(crate) fn session(folder: &Path) -> Result<(Session, PathBuf)> {
    let mut found = Vec::new();
    find(folder, "session.json", &mut found)?;
    let [file] = found.as_slice() else {
        bail!(
            "{}: expected one session.json, found {found:?}",
            folder.display()
        )
    };
    let text =
        fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let session = serde_json::from_str(&text)
        .with_context(|| format!("{} is not what a server writes", file.display()))?;
    Ok((session, file.parent().unwrap_or(folder).to_owned()))
}

fn find(folder: &Path, name: &str, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), name, found)?;
        } else if entry.file_name() == name {
            found.push(entry.path());
        }
    }
    Ok(())
}

fn report(session: &Session, vmcore_bytes: u64, backtrace: &str) -> String {
    const PAGE_BYTES: u64 = 4096;
    let Session { task, pages, .. } = session;
    let memory = session.ram_pages * PAGE_BYTES;
    let rate = |bytes: u64| megabytes_per_second(bytes, session.seconds);
    let rows = [
        ("host", session.host.clone()),
        ("kernel", session.kernel.clone()),
        ("reason", session.reason.clone()),
        (
            "crashed",
            format!("{} (pid {}) on CPU {}", task.comm, task.pid, task.cpu),
        ),
        (
            "CPUs",
            format!(
                "{} online, registers of {}",
                session.cpus, session.cpus_captured
            ),
        ),
        (
            "pages",
            format!(
                "{} with data, {} zero, {} unreadable, {} left out",
                pages.data, pages.zero, pages.unreadable, pages.excluded
            ),
        ),
        (
            "memory",
            format!(
                "{} MB in {:.1} s, {:.0} MB/s",
                memory / 1_000_000,
                session.seconds,
                rate(memory)
            ),
        ),
        (
            "sent",
            format!(
                "{:.1} MB, {:.0} MB/s",
                as_megabytes(session.bytes),
                rate(session.bytes)
            ),
        ),
        (
            "vmcore",
            format!("{:.1} MB, {}", as_megabytes(vmcore_bytes), session.state),
        ),
    ];
    let rows = rows.map(|(name, value)| vec![name.to_owned(), value]);
    format!(
        "{}\nstack of the crashed thread:\n{backtrace}",
        output::table(&rows)
    )
}

/// Decimal megabytes.
#[expect(clippy::cast_precision_loss, reason = "for people: exact up to 8 PB")]
pub(crate) fn as_megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Decimal megabytes per second, zero when no time has passed.
pub(crate) fn megabytes_per_second(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        as_megabytes(bytes) / seconds
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: &str = r#"{"version":1,"state":"complete","host":"web1","seconds":2.0,"bytes":50000000,
        "kernel":"6.1.0-9-amd64","reason":"Oops","task":{"comm":"sh","pid":7,"cpu":1},"cpus":3,
        "cpus_captured":3,"ram_pages":100000,"pages":{"data":1,"zero":2,"unreadable":0,"excluded":0}}"#;

    #[test]
    fn the_one_session_is_found_and_reported() {
        let folder = tempfile::tempdir().unwrap();
        assert!(session(folder.path()).is_err());
        let crash = folder.path().join("dumps/web1-20260101T000000Z");
        fs::create_dir_all(&crash).unwrap();
        fs::write(crash.join("session.json"), SESSION).unwrap();
        let (session, found) = session(folder.path()).unwrap();
        assert_eq!(found, crash);
        let text = report(&session, 40_000_000, "#0 panic\n");
        for part in [
            "sh (pid 7) on CPU 1",
            "409 MB in 2.0 s, 205 MB/s",
            "50.0 MB, 25 MB/s",
            "#0 panic",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
