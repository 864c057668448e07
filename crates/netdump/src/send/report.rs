//! What `netdump send` says at its end.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use proto::reply::{Action, Verdict};
use proto::units::PAGE_BYTES;
use serde::Serialize;

use super::Request;
use super::session::Sent;

/// All sessions together.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    source: String,
    server: SocketAddr,
    /// The session's name, if it was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
    sessions: usize,
    /// Sessions whose server has all that it asked for.
    complete: usize,
    verdict: String,
    action: &'static str,
    seconds: f64,
    /// Bytes of the memory that was sent or told of.
    memory_bytes: u64,
    /// Bytes of UDP payload, resent ones included.
    wire_bytes: u64,
    /// Bytes of UDP payload, each packet counted once.
    fresh_bytes: u64,
    memory_mb_s: f64,
    wire_mb_s: f64,
    pages: Pages,
    datagram_bytes: usize,
    packets: u64,
    resent: u64,
    timeouts: u64,
    /// The mean of the sessions' smoothed round trips.
    #[serde(skip_serializing_if = "Option::is_none")]
    round_trip_us: Option<u64>,
    /// The rate of the slowest session to that of the fastest.
    slowest_over_fastest: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
}

/// Pages by kind, as the engine counted them.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Pages {
    data: u64,
    zero: u64,
    excluded: u64,
    unreadable: u64,
}

impl Report {
    pub(super) fn new(
        request: &Request,
        server: SocketAddr,
        elapsed: Duration,
        sent: &[Sent],
    ) -> Self {
        let seconds = elapsed.as_secs_f64();
        let sum = |of: fn(&Sent) -> u64| sent.iter().map(of).sum::<u64>();
        let pages = Pages {
            data: sum(|sent| sent.totals.data.get()),
            zero: sum(|sent| sent.totals.zero.get()),
            excluded: sum(|sent| sent.totals.excluded.get()),
            unreadable: sum(|sent| sent.totals.unreadable.get()),
        };
        let told = pages.data + pages.zero + pages.excluded + pages.unreadable;
        let (memory_bytes, wire_bytes) = (told * PAGE_BYTES as u64, sum(|sent| sent.wire_bytes));
        let trips: Vec<u64> = sent
            .iter()
            .filter_map(|sent| Some(sent.round_trip?.get()))
            .collect();
        let mean = trips.iter().sum::<u64>().checked_div(trips.len() as u64);
        let slowest = sent.iter().map(|sent| sent.seconds).fold(0.0, f64::max);
        let fastest = sent
            .iter()
            .map(|sent| sent.seconds)
            .fold(f64::MAX, f64::min);
        Self {
            source: request.origin.to_string(),
            server,
            session: match sent {
                [one] => Some(one.name.to_string()),
                _ => None,
            },
            sessions: sent.len(),
            complete: sent.iter().filter(|sent| sent.outcome.complete).count(),
            verdict: sent.last().map_or_else(String::new, verdict),
            action: sent
                .last()
                .map_or("none", |sent| action(sent.outcome.action)),
            seconds,
            memory_bytes,
            wire_bytes,
            fresh_bytes: sum(|sent| sent.statistics.bytes),
            memory_mb_s: megabytes_per_second(memory_bytes, seconds),
            wire_mb_s: megabytes_per_second(wire_bytes, seconds),
            pages,
            datagram_bytes: sent.first().map_or(0, |sent| sent.datagram_bytes),
            packets: sum(|sent| sent.statistics.packets),
            resent: sum(|sent| sent.statistics.resent),
            timeouts: sum(|sent| sent.statistics.timeouts),
            round_trip_us: mean,
            slowest_over_fastest: if slowest > 0.0 {
                fastest / slowest
            } else {
                1.0
            },
            failure: sent.iter().find_map(|sent| failure(request, server, sent)),
        }
    }

    /// Why not every session is whole; `None` if all are.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Pages {
            data,
            zero,
            excluded,
            unreadable,
        } = self.pages;
        writeln!(
            f,
            "{} to {}: {} of {} sessions complete, verdict {}, action {} (not carried out)",
            self.source, self.server, self.complete, self.sessions, self.verdict, self.action
        )?;
        writeln!(
            f,
            "  {data} pages with data, {zero} zero, {excluded} excluded, {unreadable} unreadable"
        )?;
        writeln!(
            f,
            "  {} MiB of memory as {} MiB in {:.2} s: {:.1} MB/s of memory, {:.1} MB/s sent",
            self.memory_bytes >> 20,
            self.wire_bytes >> 20,
            self.seconds,
            self.memory_mb_s,
            self.wire_mb_s
        )?;
        write!(
            f,
            "  {} packets of {} bytes, {} resent, {} timeouts, round trip {} us",
            self.packets,
            self.datagram_bytes,
            self.resent,
            self.timeouts,
            self.round_trip_us
                .map_or_else(|| "?".to_owned(), |micros| micros.to_string())
        )
    }
}

fn failure(request: &Request, server: SocketAddr, sent: &Sent) -> Option<String> {
    if sent.verdict == Verdict::LogOnly {
        return Some(format!(
            "the server {server} took no pages: its log says why (no room on its disk, or             --verdict log-only)"
        ));
    }
    if sent.outcome.complete {
        return None;
    }
    let told = [
        sent.totals.data,
        sent.totals.zero,
        sent.totals.excluded,
        sent.totals.unreadable,
    ];
    let told: u64 = told.iter().map(|pages| pages.get()).sum();
    let how_far = format!("after {told} of {} pages", sent.ram_pages);
    Some(if sent.verdict == Verdict::Nothing {
        format!(
            "the server {server} ended session {} {how_far}: its log says why",
            sent.name
        )
    } else if let Verdict::Redirect { server: place } = sent.verdict {
        format!("the server {server} redirects to server number {place}, and one was named")
    } else if sent.statistics.replies == 0 {
        format!(
            "the server {server} never answered within {} s: is it running, does it have this \
            key, and does a firewall let UDP through?",
            request.give_up.as_secs()
        )
    } else {
        format!(
            "the server {server} went silent {how_far} and did not come back within {} s",
            request.give_up.as_secs()
        )
    })
}

fn verdict(sent: &Sent) -> String {
    match sent.verdict {
        Verdict::Undecided => "none".to_owned(),
        Verdict::Full { .. } if sent.filter == 0 => "full".to_owned(),
        // Which pages are cache, user or free only the kernel's own page structures tell.
        Verdict::Full { .. } => format!(
            "full with filter level {}, of which only zero pages and what the file leaves out are \
            left out",
            sent.filter
        ),
        Verdict::LogOnly => "log only".to_owned(),
        Verdict::Nothing => "nothing more".to_owned(),
        Verdict::Wait { .. } => "wait".to_owned(),
        Verdict::Hold { .. } => "hold".to_owned(),
        Verdict::Redirect { .. } => "redirect".to_owned(),
    }
}

fn action(action: Action) -> &'static str {
    match action {
        Action::None => "none",
        Action::Reboot => "reboot",
        Action::Halt => "halt",
        Action::Stay => "stay",
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown to a few digits")]
fn megabytes_per_second(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        bytes as f64 / 1e6 / seconds
    } else {
        0.0
    }
}
