//! `cargo xtask bench loopback`: a dump over loopback against datagrams with no protocol, and
//! against the same bytes through `nc` and `ssh`, with sender and receiver on a CPU each.
//!
//! Memory is random, so that as many bytes go over the wire as lie in the file. A sink is measured
//! twice: taking datagrams one by one, and merged as the server takes them.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::core;
use super::loss::free_port;
use super::ssh::Ssh;
use super::stage::{self, Place, Programs, RECEIVER_CPU, Row, SENDER_CPU, Server};
use crate::{output, tools};

const BLAST_SECONDS: &str = "3";
const CORE_MIB: u64 = 1024;
/// For Ethernet's and loopback's MTU: the datagram, and the sender's option.
const SIZES: [(u32, u32); 2] = [(1472, 1500), (8972, 9000)];

/// One transfer.
struct Carried {
    bytes: f64,
    seconds: f64,
    receiver_cpu_seconds: f64,
}

/// Runs the transfers and prints the rows.
///
/// # Errors
/// A program is missing and cannot be installed, or a transfer fails.
pub(crate) fn run(json: bool) -> Result<()> {
    tools::ensure_also(&["netcat-openbsd", "openssh-client", "openssh-server"])?;
    let programs = stage::programs()?;
    let core = core::random(CORE_MIB)?;
    let mut rows = Vec::new();
    for (datagram_bytes, mtu) in SIZES {
        let plain = sink(&programs, datagram_bytes, false)?;
        let merged = sink(&programs, datagram_bytes, true)?;
        let dump = netdump(&programs, &core, mtu)?;
        let name = |what: &str| format!("{what} {datagram_bytes}");
        rows.push(row(&name("raw sink"), &plain, &plain, &merged));
        rows.push(row(&name("raw sink merged"), &merged, &plain, &merged));
        rows.push(row(&name("netdump"), &dump, &plain, &merged));
        if mtu == SIZES[1].1 {
            rows.push(row("nc", &netcat(&core)?, &plain, &merged));
            rows.push(row("ssh cat", &ssh(&core)?, &plain, &merged));
        }
    }
    stage::print(&rows, json)
}

/// `ratio` is that of the receiver's bytes per CPU second to the sink's that takes datagrams one by
/// one, `ratio_merged` to the other's.
fn row(config: &str, of: &Carried, plain: &Carried, merged: &Carried) -> Row {
    stage::row(
        config,
        [
            ("rate_mb_s", of.bytes / 1e6 / of.seconds),
            ("core_mb_s", of.core_mb_s()),
            ("ratio", of.core_mb_s() / plain.core_mb_s()),
            ("ratio_merged", of.core_mb_s() / merged.core_mb_s()),
            ("seconds", of.seconds),
            ("wire_bytes", of.bytes),
        ],
    )
}

impl Carried {
    /// What one core of the receiver takes.
    fn core_mb_s(&self) -> f64 {
        self.bytes / 1e6 / self.receiver_cpu_seconds
    }
}

fn sink(programs: &Programs, datagram_bytes: u32, merged: bool) -> Result<Carried> {
    let _step = output::step(format!("raw datagrams of {datagram_bytes} bytes"));
    let address = format!("127.0.0.1:{}", free_port()?);
    let mut sink = stage::pinned(RECEIVER_CPU, &programs.workbench);
    sink.args(["sink", &address]).args(merged.then_some("gro"));
    let sink = sink
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the sink")?;
    thread::sleep(Duration::from_millis(300));
    let mut blast = stage::pinned(SENDER_CPU, &programs.workbench);
    blast.args([
        "blast",
        &address,
        &datagram_bytes.to_string(),
        BLAST_SECONDS,
    ]);
    stage::object(&mut blast)?;
    let output = sink
        .wait_with_output()
        .context("cannot wait for the sink")?;
    let got = stage::last_object(&String::from_utf8_lossy(&output.stdout))?;
    Ok(Carried {
        bytes: stage::number(&got, "bytes")?,
        seconds: stage::number(&got, "seconds")?,
        receiver_cpu_seconds: stage::number(&got, "cpu_seconds")?,
    })
}

fn netdump(programs: &Programs, core: &Path, mtu: u32) -> Result<Carried> {
    let _step = output::step(format!("netdump send with an MTU of {mtu}"));
    let place = Place::new("loopback")?;
    let server = Server::start(programs, &place, RECEIVER_CPU, 1)?;
    let mut send = server.sender(programs, SENDER_CPU, &server.address);
    send.arg(core).args(["--mtu", &mtu.to_string()]);
    let before = server.cpu_seconds()?;
    let sent = stage::object(&mut send)?;
    // The sender ends when everything is spooled. What the vmcore has cost that grew meanwhile counts.
    let receiver_cpu_seconds = server.cpu_seconds()? - before;
    Ok(Carried {
        bytes: stage::number(&sent, "fresh_bytes")?,
        seconds: stage::number(&sent, "seconds")?,
        receiver_cpu_seconds,
    })
}

fn netcat(core: &Path) -> Result<Carried> {
    let _step = output::step("nc");
    let (place, port) = (Place::new("nc")?, free_port()?.to_string());
    let nc = Path::new("nc");
    let received = place.dir.join("received");
    let mut listen = stage::pinned(RECEIVER_CPU, nc);
    listen
        .args(["-l", "127.0.0.1", &port])
        .stdout(File::create(&received)?);
    let mut listen = listen.spawn().context("cannot start nc")?;
    thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    let mut send = stage::pinned(SENDER_CPU, nc);
    send.args(["-N", "127.0.0.1", &port])
        .stdin(File::open(core)?);
    let status = send.status().context("cannot start nc")?;
    ensure!(status.success(), "nc ended with {status}");
    let before = stage::children_cpu_seconds()?;
    listen.wait().context("cannot wait for nc")?;
    carried(
        core,
        &received,
        begin,
        stage::children_cpu_seconds()? - before,
    )
}

fn ssh(core: &Path) -> Result<Carried> {
    let _step = output::step("ssh cat");
    let place = Place::new("ssh")?;
    let received = place.dir.join("received");
    let ssh = Ssh::start(&place, RECEIVER_CPU)?;
    let begin = Instant::now();
    let mut send = ssh.command(SENDER_CPU, &format!("cat > {}", received.display()));
    let status = send
        .stdin(File::open(core)?)
        .status()
        .context("cannot start ssh")?;
    ensure!(status.success(), "ssh ended with {status}");
    carried(core, &received, begin, ssh.server_cpu_seconds()?)
}

fn carried(
    core: &Path,
    received: &Path,
    begin: Instant,
    receiver_cpu_seconds: f64,
) -> Result<Carried> {
    let seconds = begin.elapsed().as_secs_f64();
    let (sent, got) = (stage::length(core), stage::length(received));
    ensure!(sent == got, "{got} of {sent} bytes arrived");
    #[expect(clippy::cast_precision_loss, reason = "a rate of a few digits")]
    let bytes = got as f64;
    Ok(Carried {
        bytes,
        seconds,
        receiver_cpu_seconds,
    })
}
