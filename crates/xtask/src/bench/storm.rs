//! `cargo xtask bench storm`: many hosts crash at once.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

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
    stage::print(&rows, json)?;
    for row in &rows {
        let figure = |name: &str| {
            row.get(name)
                .and_then(serde_json::Value::as_f64)
                .unwrap_or(0.0)
        };
        let (sessions, fair) = (figure("sessions"), figure("slowest_over_fastest"));
        let rss = figure("server_rss_mib");
        ensure!(
            rss <= RSS_MIB_MAX,
            "{sessions} sessions: the server held {rss:.0} MiB, more than {RSS_MIB_MAX}"
        );
        ensure!(
            fair >= FAIRNESS_MIN,
            "{sessions} sessions: the slowest had {fair:.2} of the fastest's rate, not {FAIRNESS_MIN}"
        );
    }
    Ok(())
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
