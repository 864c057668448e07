//! `cargo xtask bench storm`: many hosts crash at once, of different things or of the same.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::stage::{self, Place, Programs, RECEIVER_CPU, Row, SENDER_CPU, Server};
use crate::output;

/// Sessions, and memory of each in MiB.
const STORMS: [(u32, u32); 4] = [(1, 1024), (16, 64), (128, 16), (1000, 4)];
/// What Ethernet takes.
const MTU: &str = "1500";
/// What a server with 1000 sessions may hold.
const RSS_MIB_MAX: f64 = 512.0;
/// The rate of the slowest session to the fastest's.
const FAIRNESS_MIN: f64 = 0.5;

/// Hosts that die of the same, and what the policy keeps of them unless it is told otherwise.
const EQUAL_SESSIONS: u32 = 1000;
const EQUAL_DUMPS: usize = 3;
/// Lines of their logs before the crash: some 80 KiB.
const BOOT_LINES: u32 = 1000;
/// How long the server may take to have all of them on disk.
const END_WAIT: Duration = Duration::from_secs(120);
const CRASH: &str = "\
[ 3600.000001] BUG: kernel NULL pointer dereference, address: 0000000000000008
[ 3600.000002] #PF: supervisor write access in kernel mode
[ 3600.000003] Oops: 0002 [#1] PREEMPT SMP NOPTI
[ 3600.000004] CPU: 1 PID: 812 Comm: frobd Not tainted 6.1.0-56-amd64 #1  Debian 6.1.170-1
[ 3600.000005] RIP: 0010:frob_kick+0x14/0x60 [frob]
[ 3600.000006] RSP: 0018:ffffa4c2807abd10 EFLAGS: 00010246
[ 3600.000007] Call Trace:
[ 3600.000008]  <TASK>
[ 3600.000009]  frob_ioctl+0x5a/0x110 [frob]
[ 3600.000010]  __x64_sys_ioctl+0x94/0xd0
[ 3600.000011]  do_syscall_64+0x5b/0xc0
[ 3600.000012]  entry_SYSCALL_64_after_hwframe+0x64/0xce
[ 3600.000013]  </TASK>
[ 3600.000014] Kernel panic - not syncing: Fatal exception
";

/// Runs the storms and prints the rows.
///
/// # Errors
/// A session is not complete, or a promise is not kept.
pub(crate) fn run(json: bool) -> Result<()> {
    let programs = stage::programs()?;
    let mut rows = Vec::new();
    for (sessions, mib) in STORMS {
        rows.push(storm(&programs, sessions, mib)?);
    }
    rows.push(equal(&programs)?);
    stage::print(&rows, json)?;
    for row in &rows {
        let figure = |name: &str| row.get(name).and_then(Value::as_f64).unwrap_or(0.0);
        let (sessions, rss) = (figure("sessions"), figure("server_rss_mib"));
        ensure!(
            rss <= RSS_MIB_MAX,
            "{sessions} sessions: the server held {rss:.0} MiB, more than {RSS_MIB_MAX}"
        );
        let fair = row
            .get("slowest_over_fastest")
            .map_or(1.0, |_| figure("slowest_over_fastest"));
        ensure!(
            fair >= FAIRNESS_MIN,
            "{sessions} sessions: the slowest had {fair:.2} of the fastest's rate, not {FAIRNESS_MIN}"
        );
    }
    Ok(())
}

/// Many hosts die of the same: the server keeps as many dumps as its policy says and everybody's
/// log, and tells it once.
///
/// # Errors
/// A log, a dump or a notice is missing, or there is one too many.
fn equal(programs: &Programs) -> Result<Row> {
    let _step = output::step(format!("{EQUAL_SESSIONS} equal crashes"));
    let place = Place::new("storm-equal")?;
    let log = place.dir.join("log");
    fs::write(&log, crash_log()).context("cannot write the log")?;
    let server = Server::start(programs, &place, RECEIVER_CPU, EQUAL_SESSIONS)?;
    let mut send = server.sender(programs, SENDER_CPU, &server.address);
    send.arg("synthetic:4M").args(["--mtu", MTU]);
    send.args(["--sessions", &EQUAL_SESSIONS.to_string()]);
    send.arg("--log").arg(&log);
    // It fails, because most of the sessions send no memory; the records say what became of each.
    let sent = send.output().context("cannot start the sender")?;
    let sent = stage::last_object(&String::from_utf8_lossy(&sent.stdout))?;
    let expected = EQUAL_SESSIONS as usize;
    let give_up = Instant::now() + END_WAIT;
    while server.events("complete")? < expected && Instant::now() < give_up {
        thread::sleep(Duration::from_millis(100));
    }
    let (dumps, notices) = (server.files("vmcore").len(), server.events("notice")?);
    let head = CRASH.lines().next().unwrap_or_default();
    let has_head = |log: &PathBuf| fs::read_to_string(log).is_ok_and(|log| log.contains(head));
    let logs = server.files("log").into_iter().filter(has_head).count();
    ensure!(
        (dumps, logs, notices) == (EQUAL_DUMPS, expected, 1),
        "{EQUAL_SESSIONS} equal crashes left {dumps} dumps, {logs} logs with the crash in them and \
        {notices} notices, not {EQUAL_DUMPS}, {expected} and 1"
    );
    let mut verdicts: Vec<f64> = server
        .files("session.json")
        .iter()
        .map(|file| verdict_ms(file))
        .collect::<Result<_>>()?;
    verdicts.sort_by(f64::total_cmp);
    let at = |percent: usize| verdicts[(verdicts.len() - 1) * percent / 100];
    Ok(stage::row(
        "netdump, equal crashes",
        [
            ("sessions", f64::from(EQUAL_SESSIONS)),
            ("seconds", stage::number(&sent, "seconds")?),
            ("verdict_ms_median", at(50)),
            ("verdict_ms_p99", at(99)),
            ("verdict_ms_worst", at(100)),
            ("server_rss_mib", server.peak_mib()?),
            ("server_cpu_seconds", server.cpu_seconds()?),
        ],
    ))
}

/// Milliseconds from a crash's first packet to its verdict, of its record.
fn verdict_ms(file: &Path) -> Result<f64> {
    let text = fs::read_to_string(file).context("cannot read a crash's record")?;
    let record: Value = serde_json::from_str(&text).context("a crash's record is malformed")?;
    let after = record.pointer("/ruling/after_us").and_then(Value::as_f64);
    let after = after.with_context(|| format!("{} has no ruling", file.display()))?;
    Ok(after / 1000.0)
}

/// What a kernel of an hour's age says, and at its end why it dies.
fn crash_log() -> String {
    let mut log = String::new();
    for line in 0..BOOT_LINES {
        let message = "pci 0000:00:03.0: reg 0x14: [mem 0xfebfe000-0xfebfe07f]";
        log.push_str(&format!("[{:5}.{:06}] {message}\n", line / 100, line % 100));
    }
    log.push_str(CRASH);
    log
}

fn storm(programs: &Programs, sessions: u32, mib: u32) -> Result<Row> {
    let _step = output::step(format!("{sessions} sessions of {mib} MiB"));
    let place = Place::new(&format!("storm-{sessions}"))?;
    let server = Server::start(programs, &place, RECEIVER_CPU, sessions)?;
    let mut send = server.sender(programs, SENDER_CPU, &server.address);
    send.arg(format!("synthetic:{mib}M")).args(["--mtu", MTU]);
    send.args(["--sessions", &sessions.to_string()]);
    let before = server.cpu_seconds()?;
    let sent = stage::object(&mut send)?;
    let (server_cpu_seconds, rss) = (server.cpu_seconds()? - before, server.peak_mib()?);
    // The vmcores that are being written are not looked at; the disk shall be quiet for the next.
    drop(server);
    thread::sleep(Duration::from_millis(200));
    Ok(stage::row(
        "netdump",
        [
            ("sessions", f64::from(sessions)),
            ("seconds", stage::number(&sent, "seconds")?),
            ("memory_mb_s", stage::number(&sent, "memory_mb_s")?),
            ("wire_mb_s", stage::number(&sent, "wire_mb_s")?),
            ("wire_bytes", stage::number(&sent, "wire_bytes")?),
            ("resent", stage::number(&sent, "resent")?),
            (
                "slowest_over_fastest",
                stage::number(&sent, "slowest_over_fastest")?,
            ),
            ("server_rss_mib", rss),
            ("server_cpu_seconds", server_cpu_seconds),
        ],
    ))
}
