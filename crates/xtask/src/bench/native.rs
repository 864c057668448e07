//! `cargo xtask bench native`: a core file of a real guest to a finished vmcore over loopback, ours
//! against `makedumpfile | ssh | makedumpfile -R`, at the machine's own speed and on the same CPUs.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::core;
use super::ssh::Ssh;
use super::stage::{self, BOTH_CPUS, Place, Programs, Row, Server};
use crate::{command, output, tools};

/// How long a dump may take before something must be wrong.
const PATIENCE: Duration = Duration::from_secs(600);
/// Zero pages are left out; ours tells them in a few bytes.
const LEVEL: f64 = 1.0;

/// One pipeline's run.
struct Figures {
    seconds: f64,
    cpu_seconds: f64,
    wire_bytes: f64,
    file_bytes: f64,
}

/// Runs both and prints the rows.
///
/// # Errors
/// A program is missing and cannot be installed, or a pipeline fails.
pub(crate) fn run(json: bool) -> Result<()> {
    tools::ensure_also(&["makedumpfile", "openssh-client", "openssh-server"])?;
    let programs = stage::programs()?;
    let core = core::guest()?;
    read(&core)?;
    let theirs = makedumpfile(&core)?;
    read(&core)?;
    let ours = netdump(&programs, &core)?;
    let rows = [
        row("kdump lzo ssh", &theirs, &theirs),
        row("netdump", &ours, &theirs),
    ];
    stage::print(&rows, json)
}

fn row(config: &str, of: &Figures, theirs: &Figures) -> Row {
    stage::row(
        config,
        [
            ("level", LEVEL),
            ("seconds", of.seconds),
            ("cpu_seconds", of.cpu_seconds),
            ("wire_bytes", of.wire_bytes),
            ("file_bytes", of.file_bytes),
            ("ratio_wall", theirs.seconds / of.seconds),
            ("ratio_cpu", theirs.cpu_seconds / of.cpu_seconds),
        ],
    )
}

/// Brings the file into the page cache, for both alike.
fn read(core: &Path) -> Result<()> {
    let mut cat = Command::new("sh");
    command::run(cat.args(["-c", "cat \"$0\" > /dev/null"]).arg(core))
}

fn netdump(programs: &Programs, core: &Path) -> Result<Figures> {
    let _step = output::step("netdump send to netdump serve");
    let place = Place::new("native-netdump")?;
    let server = Server::start(programs, &place, BOTH_CPUS, 1)?;
    let (before, begin) = (stage::children_cpu_seconds()?, Instant::now());
    let mut send = server.sender(programs, BOTH_CPUS, &server.address);
    let sent = stage::object(send.arg(core))?;
    let vmcore = server.vmcore(PATIENCE)?;
    let seconds = begin.elapsed().as_secs_f64();
    let sender_cpu_seconds = stage::children_cpu_seconds()? - before;
    Ok(Figures {
        seconds,
        cpu_seconds: sender_cpu_seconds + server.cpu_seconds()?,
        wire_bytes: stage::number(&sent, "wire_bytes")?,
        file_bytes: float(stage::length(&vmcore)),
    })
}

fn makedumpfile(core: &Path) -> Result<Figures> {
    let _step = output::step("makedumpfile -F -l -d 1 to makedumpfile -R by ssh");
    let place = Place::new("native-makedumpfile")?;
    let (finished, flat) = (place.dir.join("vmcore"), place.dir.join("flat-bytes"));
    let ssh = Ssh::start(&place, BOTH_CPUS)?;
    let (server_before, before) = (ssh.server_cpu_seconds()?, stage::children_cpu_seconds()?);
    let begin = Instant::now();
    let mut pipeline = stage::pinned(BOTH_CPUS, Path::new("sh"));
    let receive = format!("makedumpfile -R {} > /dev/null 2>&1", finished.display());
    pipeline.args([
        "-c",
        "makedumpfile -F -l -d 1 \"$0\" 2> /dev/null | ssh \"$@\"",
    ]);
    pipeline.arg(core).args(ssh.arguments()).arg(receive);
    command::run(&mut pipeline)?;
    let seconds = begin.elapsed().as_secs_f64();
    let cpu_seconds =
        stage::children_cpu_seconds()? - before + ssh.server_cpu_seconds()? - server_before;
    let file_bytes = float(stage::length(&finished));
    ensure!(file_bytes > 0.0, "makedumpfile made no vmcore");
    // The flattened stream is what ssh carries; it is made again to be counted.
    let mut count = Command::new("sh");
    count.args([
        "-c",
        "makedumpfile -F -l -d 1 \"$0\" 2> /dev/null | wc -c > \"$1\"",
    ]);
    command::run(count.arg(core).arg(&flat))?;
    Ok(Figures {
        seconds,
        cpu_seconds,
        wire_bytes: fs::read_to_string(&flat)?.trim().parse()?,
        file_bytes,
    })
}

#[expect(clippy::cast_precision_loss, reason = "shown to a few digits")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}
