//! `cargo xtask bench`: what is promised, measured. The modules below have one benchmark each; here
//! is `bench dump`: how close the dump comes to what the network card can do.
//!
//! The limit is measured in the same guest and run: the bench variant of the module first sends
//! equally large datagrams as fast as it can, raw and then sealed, with no protocol around them,
//! and says in the log how fast that was. Memory is random for the ratio, because it cannot be
//! compressed, and ordinary for the rate that people will see.

pub(crate) mod console;
mod core;
pub(crate) mod engine;
pub(crate) mod loopback;
pub(crate) mod loss;
pub(crate) mod native;
pub(crate) mod peer;
mod ssh;
mod stage;
pub(crate) mod storm;
pub(crate) mod triage;

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;

use crate::demo::{self, Session, megabytes_per_second};
use crate::kmod::Variant;
use crate::output;
use crate::vm::{self, Guest};

/// The least ratio of goodput to the sealed limit that we promise.
const RATIO_MIN: f64 = 0.8;
const PAGE_BYTES: u64 = 4096;

/// The figures; rates are in decimal megabytes per second.
#[derive(Debug, PartialEq, Serialize)]
struct Figures {
    /// `goodput_mb_s` to `sealed_limit_mb_s`.
    ratio: f64,
    /// Stream bytes while incompressible memory is sent, each counted once; see [`steady`].
    goodput_mb_s: f64,
    /// Stream bytes of the same dump over its whole time, with the ordinary and zero pages and the
    /// State text that it has as well.
    whole_mb_s: f64,
    /// Bytes of sealed datagrams with no protocol around them.
    sealed_limit_mb_s: f64,
    /// Bytes of datagrams that are not even sealed.
    raw_limit_mb_s: f64,
    /// Ordinary memory, by its own size.
    memory_mb_s: f64,
    /// Memory of the module while armed.
    armed_kib: u64,
}

/// One whole dump.
struct Measured {
    verdict: String,
    session: Session,
    log: String,
    server_log: String,
    armed_kib: u64,
}

/// Runs the guests and prints the figures: a table, or with `json` one object.
///
/// # Errors
/// A guest's dump is not whole, the module did not say its limits, or the ratio is too low.
pub(crate) fn dump(guest: &Guest, json: bool) -> Result<()> {
    let random = measure(guest, "random", Variant::Bench)?;
    let ordinary = measure(guest, "ordinary", Variant::Product)?;
    let figures = figures(&random, &ordinary)?;
    if json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        print!("{}", output::table(&rows(&figures)));
    }
    let ratio = figures.ratio;
    ensure!(
        ratio >= RATIO_MIN,
        "the ratio {ratio:.2} is under {RATIO_MIN}: the dump is too slow"
    );
    Ok(())
}

fn measure(guest: &Guest, fill: &str, variant: Variant) -> Result<Measured> {
    let guest = Guest {
        fill: Some(fill.to_owned()),
        ..guest.clone()
    };
    let (found, folder) = vm::judge(&guest, variant)?;
    let (session, crash) = demo::session(&folder)?;
    // Whether each page is right is the tests' business; a rate needs the whole dump.
    let (why, place) = (&found.why, folder.display());
    ensure!(
        session.state == "complete",
        "the guest with {fill} memory: {why}: see {place}"
    );
    let log =
        fs::read(crash.join("log")).with_context(|| format!("no log in {}", crash.display()))?;
    let server_log = fs::read_to_string(folder.join("server.log"))
        .with_context(|| format!("no server.log in {}", folder.display()))?;
    let armed_kib = found
        .armed_kib
        .context("vmtest did not say the module's memory (armed_kib)")?;
    Ok(Measured {
        verdict: found.verdict,
        session,
        log: String::from_utf8_lossy(&log).into_owned(),
        server_log,
        armed_kib,
    })
}

fn figures(random: &Measured, ordinary: &Measured) -> Result<Figures> {
    let goodput_mb_s = steady(&random.server_log)?;
    let sealed_limit_mb_s = limit(&random.log, "sealed")?;
    let memory_bytes = ordinary.session.ram_pages * PAGE_BYTES;
    Ok(Figures {
        ratio: goodput_mb_s / sealed_limit_mb_s,
        goodput_mb_s,
        whole_mb_s: megabytes_per_second(random.session.bytes, random.session.seconds),
        sealed_limit_mb_s,
        raw_limit_mb_s: limit(&random.log, "raw")?,
        memory_mb_s: megabytes_per_second(memory_bytes, ordinary.session.seconds),
        armed_kib: ordinary.armed_kib,
    })
}

/// The rate between a fifth and nine tenths of the stream, from the server's lines of progress
/// (`...), 563.2 MiB in 11.3 s (...`). There the guest's filler is sent, incompressible memory and
/// little else; the kernel's own pages go before it, free zero pages and the State text after it, and
/// these cost time without yielding bytes.
fn steady(server_log: &str) -> Result<f64> {
    let point = |line: &str| {
        let (before, after) = line.split_once(" MiB in ")?;
        let mebibytes = before.rsplit(' ').next()?.parse::<f64>().ok()?;
        let seconds = after.split_once(" s ")?.0.parse::<f64>().ok()?;
        Some((mebibytes, seconds))
    };
    let points: Vec<(f64, f64)> = server_log.lines().filter_map(point).collect();
    let whole = points.last().map_or(0.0, |(mebibytes, _)| *mebibytes);
    let inside = |(mebibytes, _): &&(f64, f64)| (0.2..=0.9).contains(&(mebibytes / whole));
    let middle: Vec<&(f64, f64)> = points.iter().filter(inside).collect();
    let [first, .., last] = middle.as_slice() else {
        bail!("the dump is too short to measure: give the guest more memory with --memory");
    };
    Ok((last.0 - first.0) * 1.048_576 / (last.1 - first.1))
}

/// The rate in the log's line `netdump: bench <kind> 84.20 MB/s`.
fn limit(log: &str, kind: &str) -> Result<f64> {
    let mark = format!("netdump: bench {kind} ");
    let found = log.lines().find_map(|line| {
        let (_, rest) = line.split_once(&mark)?;
        rest.strip_suffix(" MB/s")?.parse::<f64>().ok()
    });
    let rate = found.with_context(|| format!("the crash's log has no line `{mark}... MB/s`"))?;
    ensure!(
        rate > 0.0,
        "the module measured a {kind} limit of {rate} MB/s"
    );
    Ok(rate)
}

fn rows(figures: &Figures) -> [Vec<String>; 7] {
    let share = |rate: f64| format!("{:.2}", rate / figures.sealed_limit_mb_s);
    let row = |what: &str, rate: f64| vec![what.to_owned(), format!("{rate:.1} MB/s"), share(rate)];
    let armed = format!("{} KiB", figures.armed_kib);
    [
        vec![
            "what".to_owned(),
            "figure".to_owned(),
            "to sealed".to_owned(),
        ],
        row("limit, raw datagrams", figures.raw_limit_mb_s),
        row("limit, sealed datagrams", figures.sealed_limit_mb_s),
        row("goodput, random memory", figures.goodput_mb_s),
        row("the same dump as a whole", figures.whole_mb_s),
        row("memory, ordinary", figures.memory_mb_s),
        vec!["module while armed".to_owned(), armed],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_from_the_log() {
        let log = "[ 9.1] netdump: bench raw 95.31 MB/s\n[ 9.2] netdump: bench sealed 0.00 MB/s\n";
        assert!((limit(log, "raw").unwrap() - 95.31).abs() < 1e-9);
        assert!(
            limit(log, "sealed")
                .unwrap_err()
                .to_string()
                .contains("limit of 0 MB/s")
        );
        assert!(
            limit("", "raw")
                .unwrap_err()
                .to_string()
                .contains("no line `netdump: bench raw ")
        );
    }

    #[test]
    fn a_dump_that_is_too_short_is_not_measured() {
        let log = "a: 5 of 9 pages (5 %), 50.0 MiB in 2.5 s (20.0 MB/s)\n";
        assert!(steady(log).is_err());
        assert!(steady("").is_err());
    }

    #[test]
    fn figures_are_ratios_to_the_sealed_limit() {
        let session = |bytes: u64, pages: u64| {
            let text = format!(
                r#"{{"state":"complete","host":"a","seconds":2.0,"bytes":{bytes},"kernel":"6.1","reason":"x",
                "task":{{"comm":"a","pid":1,"cpu":0}},"cpus":1,"cpus_captured":1,"ram_pages":{pages},
                "pages":{{"data":1,"zero":0,"unreadable":0,"excluded":0}}}}"#
            );
            serde_json::from_str(&text).unwrap()
        };
        let log = "netdump: bench raw 100.0 MB/s\nnetdump: bench sealed 80.0 MB/s\n".to_owned();
        let random = Measured {
            verdict: "Ok".to_owned(),
            session: session(144_000_000, 1),
            log,
            server_log: "listening\n\
                a: 1 of 9 pages (1 %), 5.0 MiB in 1.3 s (4.0 MB/s)\n\
                a: 2 of 9 pages (2 %), 20.0 MiB in 2.0 s (10.0 MB/s)\n\
                a: 5 of 9 pages (5 %), 50.0 MiB in 2.5 s (20.0 MB/s)\n\
                a: received 9 of 9 pages (100 %), 80.0 MiB in 9.0 s (9.0 MB/s)\n"
                .to_owned(),
            armed_kib: 1,
        };
        let ordinary = Measured {
            verdict: "Ok".to_owned(),
            session: session(1, 250_000),
            log: String::new(),
            server_log: String::new(),
            armed_kib: 900,
        };
        let steady_mb_s = (50.0 - 20.0) * 1.048_576 / (2.5 - 2.0);
        let found = figures(&random, &ordinary).unwrap();
        let expected = Figures {
            ratio: steady_mb_s / 80.0,
            goodput_mb_s: steady_mb_s,
            whole_mb_s: 72.0,
            sealed_limit_mb_s: 80.0,
            raw_limit_mb_s: 100.0,
            memory_mb_s: 512.0,
            armed_kib: 900,
        };
        assert_eq!(found, expected);
    }
}
