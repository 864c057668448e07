//! `cargo xtask bench loss`: goodput over a link that loses and delays, as a share of what the same
//! link carries of raw datagrams.
//!
//! The link is the workbench's own, in user space, because many kernels lack `sch_netem`. The limit
//! is measured once for each round trip, just before the cells that have it. Each cell has a fresh
//! server and takes the spool's growth over a few seconds of the dump of memory that does not
//! compress, after the start has settled.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::stage::{self, Place, Programs, RECEIVER_CPU, Row, SENDER_CPU, Server};
use crate::kmod::Variant;
use crate::output;
use crate::vm::Guest;

const LOSSES_PCT: [f64; 5] = [0.0, 0.1, 1.0, 5.0, 10.0];
const RTTS_MS: [f64; 4] = [0.2, 1.0, 10.0, 50.0];
/// Gigabit Ethernet.
const MBIT_S: &str = "1000";
const MTU: &str = "1500";
const DATAGRAM_BYTES: &str = "1472";
/// Twice what the link carries in the time: a server wants room for all of it on its disk.
const MEMORY: &str = "synthetic:2G,zero=0,text=0,random=100";
const SETTLE: Duration = Duration::from_millis(1500);
const MEASURE: Duration = Duration::from_secs(4);
/// Guests that panic: loss in percent, round trip in ms that the wire adds, and the least ratio to
/// the guest's sealed limit.
const PANIC_RATIOS_MIN: [(f64, f64, f64); 5] = [
    (0.0, 0.0, 0.9),
    (1.0, 0.0, 0.8),
    (5.0, 0.0, 0.6),
    (10.0, 0.0, 0.3),
    (0.0, 50.0, 0.7),
];
const PANIC_MEMORY: &str = "768M";
const BLAST_SECONDS: &str = "3";

/// A program that runs until it is not needed any more.
struct Running(Child);

/// Runs the grid and prints the rows.
///
/// # Errors
/// A program cannot be started or does not do its part.
pub(crate) fn run(json: bool) -> Result<()> {
    let programs = stage::programs()?;
    let cells = RTTS_MS.len() * LOSSES_PCT.len();
    let steps = output::steps("goodput under loss", (RTTS_MS.len() + cells) as u64);
    let mut rows = Vec::new();
    for rtt_ms in RTTS_MS {
        steps.begin(&format!("what the link of {rtt_ms} ms carries"));
        let limit_mb_s = limit(&programs, rtt_ms)?;
        steps.end();
        for loss_pct in LOSSES_PCT {
            steps.begin(&format!("{loss_pct} % loss, {rtt_ms} ms"));
            rows.push(cell(&programs, loss_pct, rtt_ms, limit_mb_s)?);
            steps.end();
        }
    }
    drop(steps);
    stage::print(&rows, json)
}

/// Runs a guest for each cell, with memory that does not compress, and prints the rows. Frames are
/// lost and delayed both ways, and every page of each dump is compared with the guest's own memory.
///
/// # Errors
/// A dump is not whole and right, or a ratio is under what is promised.
pub(crate) fn panic(json: bool) -> Result<()> {
    let mut rows = Vec::new();
    for (loss_pct, rtt_ms, _) in PANIC_RATIOS_MIN {
        let guest = Guest {
            memory: PANIC_MEMORY.to_owned(),
            cpus: 1,
            loss: Some(loss_pct),
            delay: (rtt_ms > 0.0).then_some(rtt_ms / 2.0),
            ..Guest::default()
        };
        let found = super::measure(&guest, "random", Variant::Bench)?;
        ensure!(
            found.verdict == "Ok",
            "the dump at {loss_pct} % loss and {rtt_ms} ms is not right: {}",
            found.verdict
        );
        let goodput_mb_s = super::steady(&found.server_log)?;
        let limit_mb_s = super::limit(&found.log, "sealed")?;
        rows.push(stage::row(
            "netdump in panic",
            [
                ("loss_pct", loss_pct),
                ("rtt_ms", rtt_ms),
                ("goodput_mb_s", goodput_mb_s),
                ("limit_mb_s", limit_mb_s),
                ("ratio", goodput_mb_s / limit_mb_s),
            ],
        ));
    }
    stage::print(&rows, json)?;
    for (row, (loss_pct, rtt_ms, least)) in rows.iter().zip(PANIC_RATIOS_MIN) {
        let ratio = row.get("ratio").and_then(Value::as_f64).unwrap_or(0.0);
        ensure!(
            ratio >= least,
            "at {loss_pct} % loss and {rtt_ms} ms the ratio is {ratio:.2} and should be {least}"
        );
    }
    Ok(())
}

fn cell(programs: &Programs, loss_pct: f64, rtt_ms: f64, limit_mb_s: f64) -> Result<Row> {
    let place = Place::new(&format!("loss-{loss_pct}-{rtt_ms}"))?;
    let server = Server::start(programs, &place, RECEIVER_CPU, 1)?;
    let (_link, address) = link(programs, &server.address, loss_pct, rtt_ms)?;
    let mut send = server.sender(programs, SENDER_CPU, &address);
    send.args([MEMORY, "--mtu", MTU]).stdout(Stdio::null());
    let mut sender = Running(send.spawn().context("cannot start the sender")?);
    thread::sleep(SETTLE);
    let (before, begin) = (server.spooled(), Instant::now());
    thread::sleep(MEASURE);
    let (bytes, seconds) = (server.spooled() - before, begin.elapsed().as_secs_f64());
    let ended = sender.0.try_wait().context("cannot ask for the sender")?;
    ensure!(
        ended.is_none(),
        "the sender ended before its time at {loss_pct} % loss and {rtt_ms} ms; what it said is above"
    );
    #[expect(clippy::cast_precision_loss, reason = "a rate of a few digits")]
    let goodput_mb_s = bytes as f64 / 1e6 / seconds;
    Ok(stage::row(
        "netdump",
        [
            ("loss_pct", loss_pct),
            ("rtt_ms", rtt_ms),
            ("goodput_mb_s", goodput_mb_s),
            ("limit_mb_s", limit_mb_s),
            ("ratio", goodput_mb_s / limit_mb_s),
        ],
    ))
}

/// What the link carries of raw datagrams that come as fast as it is, when it loses none at random.
fn limit(programs: &Programs, rtt_ms: f64) -> Result<f64> {
    let port = free_port()?;
    let sink_at = format!("127.0.0.1:{port}");
    let mut sink = stage::pinned(RECEIVER_CPU, &programs.workbench);
    sink.args(["sink", &sink_at, "gro"]).stdout(Stdio::piped());
    let sink = sink.spawn().context("cannot start the sink")?;
    let (_link, address) = link(programs, &sink_at, 0.0, rtt_ms)?;
    let mut blast = stage::pinned(SENDER_CPU, &programs.workbench);
    // Faster than the link, they would only cost it the time to drop them.
    let what = ["blast", &address, DATAGRAM_BYTES, BLAST_SECONDS, MBIT_S];
    stage::object(blast.args(what))?;
    let output = sink
        .wait_with_output()
        .context("cannot wait for the sink")?;
    let got = stage::last_object(&String::from_utf8_lossy(&output.stdout))?;
    Ok(stage::number(&got, "bytes")? / 1e6 / stage::number(&got, "seconds")?)
}

/// A link to `server`, and its address.
fn link(
    programs: &Programs,
    server: &str,
    loss_pct: f64,
    rtt_ms: f64,
) -> Result<(Running, String)> {
    let address = format!("127.0.0.1:{}", free_port()?);
    let mut link = Command::new(&programs.workbench);
    link.args(["link", &address, server]);
    link.args([&loss_pct.to_string(), &rtt_ms.to_string(), MBIT_S]);
    let running = Running(link.spawn().context("cannot start the link")?);
    // It has said nothing because there is nothing to say; it is up when its port is taken.
    let give_up = Instant::now() + Duration::from_secs(5);
    while std::net::UdpSocket::bind(&address).is_ok() && Instant::now() < give_up {
        thread::sleep(Duration::from_millis(5));
    }
    Ok((running, address))
}

pub(super) fn free_port() -> Result<u16> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").context("no free port")?;
    Ok(socket.local_addr()?.port())
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.kill().and_then(|()| self.0.wait()).is_err() {
            eprintln!("a program of this measurement was gone before its end");
        }
    }
}
