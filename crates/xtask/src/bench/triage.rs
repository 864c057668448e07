//! `cargo xtask bench triage`: what triage costs and how well it does.
//!
//! The memory half on the core file of a real guest with 4 GiB, and on the vmcore that our server
//! makes of it: the kernel's log, against `makedumpfile --dump-dmesg` and drgn with a debug package,
//! and the whole report. The text half on boot messages, and on logs with expected titles where
//! `NETDUMP_OOPS_CORPUS` names their folder.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::core;
use super::stage::{self, BOTH_CPUS, Place, Programs, Row, Server};
use crate::{cache, command, output, packages, tools};

/// What is promised: CPU milliseconds for the log, seconds for the whole report.
const LOG_CPU_MS_MAX: f64 = 100.0;
const REPORT_SECONDS_MAX: f64 = 2.0;
/// How long a vmcore may take to be made before something must be wrong.
const PATIENCE: Duration = Duration::from_secs(600);
/// Runs of each program: the kernel counts CPU time in hundredths of a second.
const RUNS: u32 = 10;
const SLOW_RUNS: u32 = 3;
/// The kernel's log, and then also all tasks with their backtraces.
const DRGN_LOG: &str = "\
import sys, drgn
from drgn.helpers.linux.printk import get_dmesg
prog = drgn.Program()
prog.set_core_dump(sys.argv[1])
prog.load_debug_info([sys.argv[2]])
print(len(get_dmesg(prog)))
";
const DRGN_TASKS: &str = "\
from drgn.helpers.linux.pid import for_each_task
frames = 0
for task in for_each_task(prog):
    try:
        frames += len(prog.stack_trace(task))
    except ValueError:
        pass
print(frames)
";

/// What a program took, on average.
struct Cost {
    seconds: f64,
    cpu_ms: f64,
}

/// Runs all and prints the rows.
///
/// # Errors
/// A program is missing and cannot be installed, one fails, or a promise is not kept.
pub(crate) fn run(json: bool) -> Result<()> {
    tools::ensure_also(&["makedumpfile"])?;
    let programs = stage::programs()?;
    let core = core::guest()?;
    let place = Place::new("triage")?;
    let server = Server::start(&programs, &place, BOTH_CPUS, 1)?;
    let vmcore = vmcore(&programs, &server, &core)?;
    let mut rows = Vec::new();
    let mut kept = true;
    for (file, name) in [(&core, "ELF of 4 GiB"), (&vmcore, "our vmcore of it")] {
        let log = netdump(&programs, &["triage", "--dmesg"], file)?;
        let report = netdump(&programs, &["triage", "--json"], file)?;
        kept &= log.cpu_ms <= LOG_CPU_MS_MAX && report.seconds <= REPORT_SECONDS_MAX;
        rows.push(log.row(&format!("log: netdump, {name}")));
        rows.push(report.row(&format!("report: netdump, {name}")));
        rows.push(makedumpfile(&place, file)?.row(&format!("log: makedumpfile, {name}")));
        let symbols = packages::vmlinux(&release(&programs, file)?)?;
        let drgn = |script: &str| drgn(script, file, &symbols);
        rows.push(drgn(DRGN_LOG)?.row(&format!("log: drgn with symbols, {name}")));
        let all = [DRGN_LOG, DRGN_TASKS].concat();
        rows.push(drgn(&all)?.row(&format!("tasks: drgn with symbols, {name}")));
    }
    rows.extend(text()?);
    stage::print(&rows, json)?;
    ensure!(
        kept,
        "the log took more than {LOG_CPU_MS_MAX} ms of CPU or the report more than \
        {REPORT_SECONDS_MAX} s"
    );
    Ok(())
}

impl Cost {
    fn row(&self, config: &str) -> Row {
        stage::row(config, [("seconds", self.seconds), ("cpu_ms", self.cpu_ms)])
    }
}

/// The core file as our client sends and our server stores it.
fn vmcore(programs: &Programs, server: &Server, core: &Path) -> Result<PathBuf> {
    let _step = output::step("netdump send to netdump serve");
    let mut send = server.sender(programs, BOTH_CPUS, &server.address);
    stage::object(send.arg(core))?;
    server.vmcore(PATIENCE)
}

/// What a program takes; it has run once before, so that its file is in the page cache.
fn cost(runs: u32, program: impl Fn() -> Command) -> Result<Cost> {
    command::run(&mut program())?;
    let (before, begin) = (stage::children_cpu_seconds()?, Instant::now());
    for _ in 0..runs {
        command::run(&mut program())?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let cpu_seconds = stage::children_cpu_seconds()? - before;
    let runs = f64::from(runs);
    Ok(Cost {
        seconds: seconds / runs,
        cpu_ms: cpu_seconds * 1000.0 / runs,
    })
}

fn netdump(programs: &Programs, arguments: &[&str], file: &Path) -> Result<Cost> {
    let _step = output::step(format!(
        "netdump {} {}",
        arguments.join(" "),
        file.display()
    ));
    cost(RUNS, || {
        let mut netdump = Command::new(&programs.netdump);
        netdump.args(arguments).arg(file).stdout(Stdio::null());
        netdump
    })
}

fn makedumpfile(place: &Place, file: &Path) -> Result<Cost> {
    let _step = output::step(format!("makedumpfile --dump-dmesg {}", file.display()));
    let out = place.dir.join("dmesg");
    cost(RUNS, || {
        let mut makedumpfile = Command::new("makedumpfile");
        makedumpfile.args(["-f", "--dump-dmesg"]).args([file, &out]);
        makedumpfile.stdout(Stdio::null());
        makedumpfile
    })
}

fn drgn(script: &str, file: &Path, symbols: &Path) -> Result<Cost> {
    let _step = output::step(format!("drgn {}", file.display()));
    let python = packages::drgn()?;
    cost(SLOW_RUNS, || {
        let mut drgn = Command::new(&python);
        drgn.args(["-c", script]).args([file, symbols]);
        drgn.stdout(Stdio::null());
        drgn
    })
}

/// The release of the kernel in a core file.
fn release(programs: &Programs, file: &Path) -> Result<String> {
    let mut triage = Command::new(&programs.netdump);
    let told = stage::object(triage.args(["triage", "--json"]).arg(file))?;
    let release = told.pointer("/system/release").and_then(Value::as_str);
    let release = release.with_context(|| format!("{} names no kernel", file.display()))?;
    Ok(release.to_owned())
}

/// What the text half does: megabytes a second, and the scores where there are logs.
fn text() -> Result<Vec<Row>> {
    let _step = output::step("logs");
    let mut rows = Vec::new();
    let mut forms = vec![["--speed", "--json"].as_slice()];
    if std::env::var_os("NETDUMP_OOPS_CORPUS").is_some() {
        forms.push(&["--json"]);
    } else {
        eprintln!("no scores: NETDUMP_OOPS_CORPUS names no folder with logs and expected titles");
    }
    for arguments in forms {
        let mut cargo = Command::new("cargo");
        cargo.args(["run", "--release", "-p", "triage", "--example", "evaluate"]);
        cargo.arg("--").args(arguments).current_dir(cache::tree());
        let printed = command::capture(cargo.stderr(Stdio::null()))?;
        for line in printed.lines() {
            let row = serde_json::from_str(line);
            rows.push(row.with_context(|| format!("`{line}` is no row"))?);
        }
    }
    Ok(rows)
}
