//! `cargo xtask bench console`: console messages into logs, against the same datagrams into a sink.
//!
//! Every run ends with the same sum: what was sent is in the logs, line by line on disk, or in one of
//! the server's counts of loss. The rate is the highest of a ladder at which nothing is lost.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::loss::free_port;
use super::stage::{self, BOTH_CPUS, Place, Programs, RECEIVER_CPU, Row, SENDER_CPU, number};
use crate::netconsole::{self, Cost, Messages};
use crate::vm::Guest;
use crate::{command, output};

const HOSTS: &str = "256";
const SECONDS: &str = "4";
/// Of the rate at which the sink takes them.
const LADDER: [f64; 9] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2];
const IDLE_HOSTS: u32 = 65_536;
/// The rate that must be written without a loss.
const FLOOR_PER_S: f64 = 20_000.0;
const BYTES_PER_HOST_MAX: f64 = 4096.0;
const DELAY_LINES: u32 = 100;
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that is asked for its counts at the end.
struct Logs {
    child: Child,
    events: BufReader<ChildStdout>,
    address: String,
    place: Place,
}

/// What became of what was sent.
struct Sum {
    sent: f64,
    seconds: f64,
    written: f64,
    lost: f64,
}

/// Runs the measurements and prints the row.
///
/// # Errors
/// A sum is wrong, or a figure misses what is promised.
pub(crate) fn run(kernel: &str, json: bool) -> Result<()> {
    let programs = stage::programs()?;
    let limit = limit(&programs)?;
    let mut best = None;
    for share in LADDER {
        let sum = paced(&programs, limit * share)?;
        if sum.lost < 0.5 {
            best = Some(sum);
            break;
        }
    }
    let best = best.context("lines were lost at every rate that was tried")?;
    let written_per_s = best.written / best.seconds;
    let overload = overload(&programs)?;
    let (bytes_per_host, delay_ms) = (idle(&programs)?, delay(&programs)?);
    let row: Row = stage::row(
        "console",
        [
            ("written_per_s", written_per_s),
            ("limit_per_s", limit),
            ("ratio", written_per_s / limit),
            ("lost", best.lost),
            ("overload", overload.sent / overload.written),
            ("overload_lost", overload.lost),
            ("bytes_per_host", bytes_per_host),
            ("delay_ms", delay_ms),
        ],
    );
    let mut rows = vec![row];
    rows.extend(costs(kernel)?);
    stage::print(&rows, json)?;
    ensure!(
        written_per_s >= FLOOR_PER_S,
        "{written_per_s:.0} lines/s are under {FLOOR_PER_S:.0}"
    );
    ensure!(
        bytes_per_host < BYTES_PER_HOST_MAX,
        "an idle host costs {bytes_per_host:.0} bytes, more than {BYTES_PER_HOST_MAX:.0}"
    );
    Ok(())
}

/// What a message costs who prints it, with each way of sending: medians of the rounds' medians.
fn costs(kernel: &str) -> Result<Vec<Row>> {
    let _step = output::step(format!("the cost of a message in a guest with {kernel}"));
    let guest = Guest {
        kernel: kernel.to_owned(),
        nic: "virtio-net".to_owned(),
        ..Guest::default()
    };
    let messages = Messages {
        netconsole: Some("module".to_owned()),
        no_crash: true,
        costs: true,
        ..Messages::default()
    };
    let (heard, folder) = netconsole::judge(&guest, &messages)?;
    let (why, place) = (heard.why.join("; "), folder.display());
    ensure!(
        heard.verdict == "Ok",
        "{}: {why}: see {place}",
        heard.verdict
    );
    fs::remove_dir_all(&folder)?;
    let mut ways: Vec<&str> = Vec::new();
    for cost in &heard.costs {
        if !ways.contains(&cost.config.as_str()) {
            ways.push(&cost.config);
        }
    }
    ways.iter().map(|way| cost_of(way, &heard.costs)).collect()
}

fn cost_of(way: &str, costs: &[Cost]) -> Result<Row> {
    let rounds = costs.iter().filter(|cost| cost.config == way);
    let mut medians: Vec<f64> = rounds.clone().map(|cost| cost.printk_us).collect();
    let mut p90s: Vec<f64> = rounds.map(|cost| cost.printk_p90_us).collect();
    medians.sort_by(f64::total_cmp);
    p90s.sort_by(f64::total_cmp);
    let middle = medians.len() / 2;
    let ends = medians.first().zip(medians.last());
    let (least, most) = ends.with_context(|| format!("{way} was not timed"))?;
    Ok(stage::row(
        way,
        [
            ("printk_us", medians[middle]),
            ("printk_us_min", *least),
            ("printk_us_max", *most),
            ("printk_p90_us", p90s[middle]),
        ],
    ))
}

/// Lines a second that a sink takes, as fast as they can be sent.
fn limit(programs: &Programs) -> Result<f64> {
    let _step = output::step("lines into a sink");
    let address = format!("127.0.0.1:{}", free_port()?);
    let mut sink = stage::pinned(RECEIVER_CPU, &programs.workbench);
    let sink = sink.args(["sink", &address, "gro"]).stdout(Stdio::piped());
    let sink = sink.spawn().context("cannot start the sink")?;
    thread::sleep(Duration::from_millis(300));
    send(programs, SENDER_CPU, &address, 0.0)?;
    let output = sink
        .wait_with_output()
        .context("cannot wait for the sink")?;
    let got = stage::last_object(&String::from_utf8_lossy(&output.stdout))?;
    Ok(number(&got, "datagrams")? / number(&got, "seconds")?)
}

fn send(programs: &Programs, cpu: &str, address: &str, rate: f64) -> Result<Value> {
    let mut lines = stage::pinned(cpu, &programs.workbench);
    lines.args(["lines", address, HOSTS, &format!("{rate:.0}"), SECONDS]);
    stage::object(&mut lines)
}

fn paced(programs: &Programs, rate: f64) -> Result<Sum> {
    let _step = output::step(format!("{rate:.0} lines/s into logs"));
    let logs = Logs::start(programs, BOTH_CPUS)?;
    let sent = send(programs, BOTH_CPUS, &logs.address, rate)?;
    logs.sum(&sent)
}

/// A server that may not run while most of the lines come.
fn overload(programs: &Programs) -> Result<Sum> {
    let _step = output::step("lines into a server that is overloaded");
    let logs = Logs::start(programs, RECEIVER_CPU)?;
    logs.signal("STOP")?;
    let sent = send(programs, BOTH_CPUS, &logs.address, 0.0);
    logs.signal("CONT")?;
    logs.sum(&sent?)
}

/// Bytes of memory for each of many hosts that have said one line.
fn idle(programs: &Programs) -> Result<f64> {
    let _step = output::step(format!("{IDLE_HOSTS} hosts"));
    let mut logs = Logs::start(programs, BOTH_CPUS)?;
    let before = logs.resident_bytes()?;
    let mut once = stage::pinned(BOTH_CPUS, &programs.workbench);
    stage::object(once.args(["once", &logs.address, &IDLE_HOSTS.to_string()]))?;
    let begin = Instant::now();
    while fs::read_dir(logs.dir()).map_or(0, Iterator::count) < IDLE_HOSTS as usize {
        ensure!(
            begin.elapsed() < PATIENCE,
            "not all hosts have a log after {PATIENCE:?}"
        );
        thread::sleep(Duration::from_millis(200));
    }
    thread::sleep(Duration::from_secs(1));
    let after = logs.resident_bytes()?;
    logs.end()?;
    Ok((after - before) / f64::from(IDLE_HOSTS))
}

/// Milliseconds from a line's sending to its place in the log, the median of many.
fn delay(programs: &Programs) -> Result<f64> {
    let _step = output::step("the time from a message to its line");
    let mut logs = Logs::start(programs, BOTH_CPUS)?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let mut delays = Vec::new();
    let mut before = 0;
    for sequence in 0..DELAY_LINES {
        let line = format!("6,{sequence},{},-;a line\n", 100_000_000 + sequence);
        let begin = Instant::now();
        socket.send_to(line.as_bytes(), &logs.address)?;
        loop {
            let bytes = logs.files().iter().map(|path| stage::length(path)).sum();
            if bytes > before {
                before = bytes;
                break;
            }
            ensure!(begin.elapsed() < PATIENCE, "line {sequence} did not come");
        }
        delays.push(begin.elapsed().as_secs_f64() * 1e3);
        thread::sleep(Duration::from_millis(20));
    }
    logs.end()?;
    delays.sort_by(f64::total_cmp);
    delays
        .get(delays.len() / 2)
        .copied()
        .context("no line was measured")
}

impl Logs {
    fn start(programs: &Programs, cpus: &str) -> Result<Self> {
        let place = Place::new("console")?;
        let (keys, dumps) = (place.dir.join("keys"), place.dir.join("crash"));
        fs::create_dir_all(&keys)?;
        let mut new = Command::new(&programs.netdump);
        new.args(["key", "new", "--json", "--host", "host"]);
        command::capture(new.arg(keys.join("host")))?;
        let mut serve = stage::pinned(cpus, &programs.netdump);
        serve.args(["serve", "--json", "--listen", "127.0.0.1:0"]);
        serve.arg("--dumpdir").arg(&dumps).arg("--keys").arg(&keys);
        let mut child = serve
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the server")?;
        let mut events = BufReader::new(child.stdout.take().context("the server has no output")?);
        let mut line = String::new();
        events.read_line(&mut line)?;
        let event: Value = serde_json::from_str(&line)
            .with_context(|| format!("the server began with `{line}`"))?;
        let address = event.get("address").and_then(Value::as_str);
        Ok(Self {
            address: address.context("the server says no address")?.to_owned(),
            child,
            events,
            place,
        })
    }

    fn dir(&self) -> PathBuf {
        self.place.dir.join("crash/console")
    }

    fn files(&self) -> Vec<PathBuf> {
        let hosts = fs::read_dir(self.dir()).into_iter().flatten().flatten();
        let parts =
            hosts.flat_map(|host| fs::read_dir(host.path()).into_iter().flatten().flatten());
        parts.map(|part| part.path()).collect()
    }

    fn signal(&self, name: &str) -> Result<()> {
        let mut kill = Command::new("kill");
        kill.arg(format!("-{name}"))
            .arg(self.child.id().to_string());
        command::run(&mut kill)
    }

    fn resident_bytes(&self) -> Result<f64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
        Ok(kib.with_context(|| format!("{path} has no VmRSS"))? * 1024.0)
    }

    /// Ends the server in good order; its last word about logs.
    fn end(&mut self) -> Result<Value> {
        self.signal("TERM")?;
        let mut last = None;
        for line in self.events.by_ref().lines() {
            let event: Value = serde_json::from_str(&line?)?;
            if event.get("event").and_then(Value::as_str) == Some("console") {
                last = Some(event);
            }
        }
        let status = self.child.wait()?;
        ensure!(status.success(), "the server ended with {status}");
        last.context("the server said nothing of its logs")
    }

    /// Ends the server and holds what is on disk and what it counted against what was sent.
    fn sum(mut self, sent: &Value) -> Result<Sum> {
        // Nothing more comes when it has been quiet for a while.
        thread::sleep(Duration::from_secs(2));
        let figures = self.end()?;
        let mut lines = 0_u32;
        for path in self.files() {
            let text = fs::read_to_string(&path)?;
            let is_record = |line: &str| {
                line.split_once(' ')
                    .is_some_and(|(_, what)| !what.starts_with('!'))
            };
            for line in text.lines() {
                lines += u32::from(is_record(line));
            }
        }
        let mut lost = 0.0;
        for name in [
            "socket_drops",
            "inbox_drops",
            "unwritten",
            "refused",
            "limited",
        ] {
            lost += number(&figures, name)?;
        }
        let (sent, seconds) = (number(sent, "sent")?, number(sent, "seconds")?);
        let written = f64::from(lines);
        // Whole numbers, far below where floats are not exact.
        let missing = sent - written - lost;
        ensure!(
            missing.abs() < 0.5,
            "{sent} lines were sent, {written} are in logs, {lost} are counted as lost: {figures}"
        );
        Ok(Sum {
            sent,
            seconds,
            written,
            lost,
        })
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        // Already ended in every run that went well.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
