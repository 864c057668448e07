//! What `cargo xtask bench` measures the product against: the engines alone in memory, datagrams
//! with no protocol around them, and a link that loses and delays. Each prints one JSON object a
//! row.
//!
//! ```text
//! workbench engine
//! workbench sink ADDRESS [gro]
//! workbench blast ADDRESS DATAGRAM_BYTES SECONDS [MBIT_S]
//! workbench lines ADDRESS HOSTS RATE SECONDS
//! workbench once ADDRESS HOSTS
//! workbench link ADDRESS SERVER LOSS_PERCENT RTT_MS MBIT_S
//! ```

#![expect(
    clippy::cast_precision_loss,
    reason = "rates are shown to a few digits"
)]

#[path = "workbench/engine.rs"]
mod engine;
#[path = "workbench/lines.rs"]
mod lines;
#[path = "workbench/link.rs"]
mod link;
#[path = "workbench/raw.rs"]
mod raw;

use std::fmt::Display;
use std::str::FromStr;

use anyhow::{Context as _, Result, anyhow, bail};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["engine"] => engine::run(),
        ["sink", address] => raw::sink(parse(address)?, false),
        ["sink", address, "gro"] => raw::sink(parse(address)?, true),
        ["blast", address, bytes, seconds] => {
            raw::blast(parse(address)?, parse(bytes)?, parse(seconds)?, None)
        }
        ["blast", address, bytes, seconds, rate] => {
            let bytes: usize = parse(bytes)?;
            let share = bytes as f64 / (bytes + link::FRAME_BYTES) as f64;
            let bytes_per_second = parse::<f64>(rate)? * 125_000.0 * share;
            raw::blast(
                parse(address)?,
                bytes,
                parse(seconds)?,
                Some(bytes_per_second),
            )
        }
        ["lines", address, hosts, rate, seconds] => lines::run(
            parse(address)?,
            parse(hosts)?,
            parse(rate)?,
            parse(seconds)?,
        ),
        ["once", address, hosts] => lines::once(parse(address)?, parse(hosts)?),
        ["link", address, server, loss, rtt, rate] => link::run(&link::Link {
            listen: parse(address)?,
            server: parse(server)?,
            loss: parse::<f64>(loss)? / 100.0,
            delay_us: half_micros(parse(rtt)?),
            bytes_per_second: parse::<u64>(rate)? * 125_000,
        }),
        _ => bail!("see the top of crates/netdump/examples/workbench.rs for the words"),
    }
}

fn parse<T: FromStr>(word: &str) -> Result<T>
where
    T::Err: Display,
{
    word.parse()
        .map_err(|error| anyhow!("{error}"))
        .with_context(|| format!("{word:?} is not understood"))
}

/// One way of a round trip of so many milliseconds.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "round trips are some milliseconds"
)]
fn half_micros(rtt_ms: f64) -> u64 {
    (rtt_ms * 500.0) as u64
}
