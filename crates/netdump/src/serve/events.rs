//! What the server tells people and programs while it runs: a progress bar a session on a terminal,
//! else a line an event, or one JSON object an event.

use std::collections::HashMap;
use std::io::{IsTerminal as _, Write as _, stderr, stdout};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use proto::units::{PAGE_BYTES, SessionId};
use serde::Serialize;

use super::drops::DropCounts;
use super::registry::lock;
use super::signatures::Notice;
use crate::console::Figures;
use crate::forward::Row;

/// Something that happened.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The server can be reached.
    Listening {
        /// Where.
        address: SocketAddr,
        /// Where crashes are put.
        dumpdir: PathBuf,
        /// Hosts it knows.
        keys: usize,
        /// Receive threads.
        threads: usize,
        /// Bytes the kernel buffers for each.
        buffer_bytes: usize,
    },
    /// Something a person should look at.
    Warning {
        /// What.
        message: String,
    },
    /// A session began, or was taken up again after a restart.
    Session {
        /// Which.
        #[serde(flatten)]
        about: About,
        /// Where its packets come from.
        peer: SocketAddr,
        /// How often the client had started over.
        attempt: u16,
        /// It was taken up again, with this many stream bytes.
        #[serde(skip_serializing_if = "Option::is_none")]
        resumed_bytes: Option<u64>,
    },
    /// It is known who crashed, and decided what is wanted.
    Verdict {
        /// Which.
        #[serde(flatten)]
        about: About,
        /// Kernel release.
        kernel: String,
        /// Why it died.
        reason: String,
        /// Pages of memory.
        ram_pages: u64,
        /// `full`, `wait`, `rest`, `log-only`, `hold`, `redirect` or `nothing`.
        verdict: &'static str,
        /// Why.
        #[serde(skip_serializing_if = "Option::is_none")]
        why: Option<String>,
        /// The crash's signature, if its text tells.
        #[serde(skip_serializing_if = "Option::is_none")]
        signature: Option<String>,
    },
    /// A crash that was not known, or how often a known one came since it was told last: what
    /// people are notified of.
    Notice {
        /// What.
        #[serde(flatten)]
        notice: Notice,
    },
    /// A later attempt goes on where the ones before ended.
    Rest {
        /// Which.
        #[serde(flatten)]
        about: About,
        /// Pages that those brought.
        pages: u64,
        /// Pages that are missing and will be asked for.
        missing: u64,
    },
    /// Pages have arrived.
    Progress {
        /// Which.
        #[serde(flatten)]
        about: About,
        /// How far it has come.
        #[serde(flatten)]
        arrived: Arrived,
    },
    /// Everything has arrived and is on disk; the host is told to reboot.
    Received {
        /// Which.
        #[serde(flatten)]
        about: About,
        /// How much it was.
        #[serde(flatten)]
        arrived: Arrived,
    },
    /// The crash is on disk with all that was wanted.
    Complete {
        /// Which.
        #[serde(flatten)]
        about: About,
        /// How much it was.
        #[serde(flatten)]
        arrived: Arrived,
        /// The memory image's bytes.
        vmcore_bytes: u64,
    },
    /// The crash is on disk as far as it came.
    Incomplete {
        /// Which.
        #[serde(flatten)]
        about: About,
        /// How far it came.
        #[serde(flatten)]
        arrived: Arrived,
        /// What is missing.
        why: String,
    },
    /// Datagrams were not taken since the last such event.
    Drops {
        /// Totals since the start.
        #[serde(flatten)]
        counts: DropCounts,
    },
    /// What became of console messages.
    Console {
        /// Totals since the start.
        #[serde(flatten)]
        figures: Figures,
    },
    /// What became of messages to a target.
    Forward {
        /// Totals since the start.
        #[serde(flatten)]
        target: Row,
    },
    /// The server ends.
    Stopped {
        /// Sessions that a restarted server goes on with.
        unfinished: usize,
    },
}

/// Which session an event is about.
#[derive(Debug, Clone, Serialize)]
pub struct About {
    /// The session.
    #[serde(serialize_with = "as_text")]
    pub session: SessionId,
    /// The host.
    pub host: String,
    /// The crash's directory.
    pub directory: PathBuf,
}

/// How much of a crash has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Arrived {
    /// Pages accounted for.
    pub pages: u64,
    /// Pages of memory.
    pub ram_pages: u64,
    /// Stream bytes.
    pub bytes: u64,
    /// Seconds from the first packet to the last one.
    pub seconds: f64,
}

/// Where events go.
pub struct Events {
    output: Output,
    warned_at: Mutex<Option<Instant>>,
}

enum Output {
    Json(Mutex<HashMap<SessionId, Instant>>),
    Lines(Mutex<HashMap<SessionId, Instant>>),
    Bars {
        all: MultiProgress,
        bars: Mutex<HashMap<SessionId, ProgressBar>>,
    },
}

impl Events {
    /// Events as JSON on stdout, or for people on stderr.
    #[must_use]
    pub fn new(json: bool) -> Self {
        let output = if json {
            Output::Json(Mutex::default())
        } else if stderr().is_terminal() {
            Output::Bars {
                all: MultiProgress::new(),
                bars: Mutex::default(),
            }
        } else {
            Output::Lines(Mutex::default())
        };
        Self {
            output,
            warned_at: Mutex::default(),
        }
    }

    /// Tells an event. Output that nobody reads is lost without harm.
    pub fn tell(&self, event: &Event) {
        match &self.output {
            Output::Json(told) => {
                if !progress_due(&mut lock(told), event) {
                    return;
                }
                let Ok(line) = serde_json::to_string(event) else {
                    return;
                };
                drop(writeln!(stdout().lock(), "{line}"));
            }
            Output::Lines(told) => {
                if !progress_due(&mut lock(told), event) {
                    return;
                }
                drop(writeln!(stderr().lock(), "{}", sentence(event)));
            }
            Output::Bars { all, bars } => show(all, &mut lock(bars), event),
        }
    }

    /// Tells a warning.
    pub fn warn(&self, message: String) {
        self.tell(&Event::Warning { message });
    }

    /// Tells a warning that packets may cause at any rate: one a second is told.
    pub fn warn_rarely(&self, message: String) {
        let mut warned_at = lock(&self.warned_at);
        if warned_at.is_none_or(|at| at.elapsed() >= WARNING_EVERY) {
            *warned_at = Some(Instant::now());
            self.warn(message);
        }
    }
}

/// A line of progress is told every [`PROGRESS_LINE_EVERY`] a session; other events always.
fn progress_due(told: &mut HashMap<SessionId, Instant>, event: &Event) -> bool {
    match event {
        Event::Progress { about, .. } => {
            let now = Instant::now();
            let last = told.entry(about.session).or_insert(now);
            let due = now.duration_since(*last) >= PROGRESS_LINE_EVERY;
            if due {
                *last = now;
            }
            due
        }
        Event::Complete { about, .. } | Event::Incomplete { about, .. } => {
            told.remove(&about.session);
            true
        }
        Event::Listening { .. }
        | Event::Warning { .. }
        | Event::Session { .. }
        | Event::Verdict { .. }
        | Event::Notice { .. }
        | Event::Rest { .. }
        | Event::Received { .. }
        | Event::Drops { .. }
        | Event::Console { .. }
        | Event::Forward { .. }
        | Event::Stopped { .. } => true,
    }
}

fn show(all: &MultiProgress, bars: &mut HashMap<SessionId, ProgressBar>, event: &Event) {
    match event {
        Event::Progress { about, arrived } => {
            let bar = bars.entry(about.session).or_insert_with(|| {
                let bar = ProgressBar::new(arrived.ram_pages).with_style(bar_style());
                all.add(bar.with_prefix(about.host.clone()))
            });
            bar.set_length(arrived.ram_pages);
            bar.set_position(arrived.pages);
            bar.set_message(format!("{:.1} MB/s on the wire", arrived.rate()));
            return;
        }
        Event::Received { about, .. }
        | Event::Incomplete { about, .. }
        | Event::Complete { about, .. } => {
            if let Some(bar) = bars.remove(&about.session) {
                bar.finish_and_clear();
            }
        }
        Event::Listening { .. }
        | Event::Warning { .. }
        | Event::Session { .. }
        | Event::Verdict { .. }
        | Event::Notice { .. }
        | Event::Rest { .. }
        | Event::Drops { .. }
        | Event::Console { .. }
        | Event::Forward { .. }
        | Event::Stopped { .. } => {}
    }
    // Printing above the bars; where they cannot be drawn the line is lost with them.
    drop(all.println(sentence(event)));
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{prefix} [{bar:32}] {percent}% {pos}/{len} pages, {msg}, {eta} left",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar())
    .progress_chars("=> ")
}

/// An event as a person reads it.
fn sentence(event: &Event) -> String {
    match event {
        Event::Listening {
            address,
            dumpdir,
            keys,
            threads,
            buffer_bytes,
        } => {
            let (buffer, dumpdir) = (buffer_bytes >> 20, dumpdir.display());
            format!(
                "listening on {address}: {keys} keys, {threads} threads with {buffer} MiB each, \
                into {dumpdir}"
            )
        }
        Event::Warning { message } => format!("warning: {message}"),
        Event::Session {
            about,
            peer,
            attempt,
            resumed_bytes,
        } => {
            let directory = about.directory.display();
            match resumed_bytes {
                Some(bytes) => format!("{about}: goes on after {} in {directory}", mib(*bytes)),
                None => format!("{about}: attempt {attempt} from {peer}, goes to {directory}"),
            }
        }
        Event::Verdict {
            about,
            kernel,
            reason,
            ram_pages,
            verdict,
            why,
            signature: _,
        } => {
            let memory = memory(*ram_pages);
            let why = why.as_deref().unwrap_or("there is room");
            format!("{about}: {reason}, kernel {kernel}, {memory}; verdict {verdict} ({why})")
        }
        Event::Notice { notice } => notice.to_string(),
        Event::Rest {
            about,
            pages,
            missing,
        } => format!("{about}: {pages} pages came before, {missing} are asked for now"),
        Event::Progress { about, arrived } => format!("{about}: {arrived}"),
        Event::Received { about, arrived } => format!("{about}: received {arrived}"),
        Event::Complete {
            about,
            arrived,
            vmcore_bytes,
        } => {
            let (vmcore, directory) = (mib(*vmcore_bytes), about.directory.display());
            format!("{about}: complete, {arrived}; vmcore of {vmcore} in {directory}")
        }
        Event::Incomplete {
            about,
            arrived,
            why,
        } => {
            let directory = about.directory.display();
            format!("{about}: incomplete, {why}; {arrived}; kept in {directory}")
        }
        Event::Drops { counts } => counts.to_string(),
        Event::Console { figures } => figures.to_string(),
        Event::Forward { target } => format!("forwarded to {target}"),
        Event::Stopped { unfinished } => format!("stopped; {unfinished} sessions stay spooled"),
    }
}

impl Arrived {
    /// Megabytes (10^6) a second on the wire; 0 for a time too short to tell.
    fn rate(&self) -> f64 {
        if self.seconds >= 0.01 {
            to_f64(self.bytes) / self.seconds / 1e6
        } else {
            0.0
        }
    }
}

impl std::fmt::Display for Arrived {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            pages,
            ram_pages,
            bytes,
            seconds,
        } = self;
        let percent = pages
            .saturating_mul(100)
            .checked_div(*ram_pages)
            .unwrap_or(0);
        let (bytes, rate) = (mib(*bytes), self.rate());
        write!(
            f,
            "{pages} of {ram_pages} pages ({percent} %), {bytes} in {seconds:.1} s ({rate:.1} MB/s)"
        )
    }
}

impl std::fmt::Display for About {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.host)
    }
}

fn as_text<S: serde::Serializer>(session: &SessionId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(session)
}

fn memory(ram_pages: u64) -> String {
    let bytes = ram_pages.saturating_mul(PAGE_BYTES as u64);
    format!("{} of memory", mib(bytes))
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", to_f64(bytes) / f64::from(1 << 20))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "for people, who read four digits"
)]
fn to_f64(number: u64) -> f64 {
    number as f64
}

const WARNING_EVERY: Duration = Duration::from_secs(1);
const PROGRESS_LINE_EVERY: Duration = Duration::from_secs(1);
