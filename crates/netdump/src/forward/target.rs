//! One target: its spool, and the thread that empties it.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::link::{Batch, Broken, Datagrams, Stream, refuse_loop};
use super::message::{Said, Told};
use super::otlp::{self, Answer};
use super::settings::{Settings, Way};
use super::spool::Spool;
use super::tls;
use crate::serve::events::Events;
use crate::serve::registry::lock;

/// How long a target that is away is left alone, at first and at most.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How long the thread sleeps when there is nothing to send.
const IDLE_WAIT: Duration = Duration::from_millis(200);
/// The same while messages are under way.
const BUSY_WAIT: Duration = Duration::from_millis(20);
/// How long the end of the server waits for a target that takes messages.
const END_WAIT: Duration = Duration::from_secs(3);

/// A spool that was full takes messages again when this part of it is free.
const ROOM_PARTS: u64 = 8;

/// See the module's documentation.
pub(super) struct Target {
    pub(super) settings: Settings,
    own: SocketAddr,
    spool: Mutex<Spool>,
    more: Condvar,
    /// Why it takes nothing now; `None` if it does, or has not been asked.
    away: Mutex<Option<String>>,
    counts: Counts,
    /// Messages that were dropped and of which the target knows nothing yet.
    untold: AtomicU64,
}

/// Whether, and since when, the server ends.
#[derive(Default)]
pub(super) struct Ending(OnceLock<Instant>);

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    waiting: AtomicU64,
    dropped: AtomicU64,
    repeated: AtomicU64,
    retries: AtomicU64,
    rejected: AtomicU64,
    cut: AtomicU64,
}

/// How a target stands, for people and programs. Counts are since the server was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub to: String,
    /// Why it takes nothing now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub away: Option<String>,
    /// Messages that it has, as far as can be known.
    pub sent: u64,
    /// Messages in its spool that it does not have.
    pub spooled: u64,
    /// Their bytes.
    pub spooled_bytes: u64,
    /// Bytes that may wait.
    pub spool_bytes: u64,
    /// Messages that it will never get: there was no room in spool or memory.
    pub dropped: u64,
    /// Messages that it may have got twice.
    pub repeated: u64,
    /// Attempts to reach it that failed.
    pub retries: u64,
    /// Messages that it refused.
    pub rejected: u64,
    /// Messages whose end was cut.
    pub cut: u64,
}

impl Target {
    /// Checks what can be wrong, and opens the spool.
    pub(super) fn open(settings: &Settings, spools: &Path, own: SocketAddr) -> Result<Self> {
        let name = &settings.name;
        let wrong = || format!("cannot forward to {name}");
        match settings.to.way {
            Way::Udp => refuse_loop(&settings.to, own).with_context(wrong)?,
            Way::Http | Way::Https => otlp::check(settings)?,
            Way::Tcp | Way::Tls => {}
        }
        if settings.to.way.is_secure() {
            drop(tls::connection(settings).with_context(wrong)?);
        }
        let spools = settings.spool.as_deref().unwrap_or(spools);
        let dir = spools.join(name.as_str());
        let (spool, waiting) = Spool::open(&dir, settings.spool_bytes).with_context(wrong)?;
        Ok(Self {
            settings: settings.clone(),
            own,
            spool: Mutex::new(spool),
            more: Condvar::new(),
            away: Mutex::default(),
            counts: Counts {
                waiting: waiting.into(),
                ..Counts::default()
            },
            untold: AtomicU64::new(0),
        })
    }

    /// Appends a message to `out`, if the target wants it.
    pub(super) fn write(&self, said: &Said, out: &mut Vec<u8>) {
        if said.kernel && said.level() > self.settings.level {
            return;
        }
        if said.write(&self.settings, out) == Told::Cut {
            self.counts.cut.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts messages that it will never get.
    pub(super) fn add_dropped(&self, messages: u64) {
        self.counts.dropped.fetch_add(messages, Ordering::Relaxed);
        self.untold.fetch_add(messages, Ordering::Relaxed);
    }

    /// Moves messages into the spool, behind a word about those before them that were dropped.
    pub(super) fn append(&self, out: &mut Vec<u8>, events: &Events) {
        if out.is_empty() {
            return;
        }
        self.tell_dropped(false);
        let messages = count(out);
        // Nothing goes between dropped messages and the word about them.
        let told = self.untold.load(Ordering::Relaxed) == 0;
        if !(told && self.keep(out, messages, events)) {
            self.add_dropped(messages);
        }
        out.clear();
    }

    /// Tells the target how many messages it will never get, once there is room for more than that;
    /// `now` is for a server that ends.
    pub(super) fn tell_dropped(&self, now: bool) {
        let untold = self.untold.load(Ordering::Relaxed);
        if untold == 0 {
            return;
        }
        let mut spool = lock(&self.spool);
        if !now && !spool.has_room(self.settings.spool_bytes / ROOM_PARTS) {
            return;
        }
        let mebibytes = self.settings.spool_bytes >> 20;
        let why = format!("its spool of {mebibytes} MiB, or the server's memory, was full");
        let mut out = Vec::new();
        Said::loss(untold, &why).write(&self.settings, &mut out);
        if spool.append(&out).is_ok() {
            self.untold.fetch_sub(untold, Ordering::Relaxed);
            self.counts.waiting.fetch_add(1, Ordering::Relaxed);
            self.more.notify_one();
        }
    }

    fn keep(&self, lines: &[u8], messages: u64, events: &Events) -> bool {
        let mut spool = lock(&self.spool);
        if !spool.has_room(lines.len() as u64) {
            return false;
        }
        if let Err(error) = spool.append(lines) {
            let name = &self.settings.name;
            events.warn_rarely(format!(
                "{messages} messages to {name} are lost: cannot write to its spool: {error}"
            ));
            return false;
        }
        self.counts.waiting.fetch_add(messages, Ordering::Relaxed);
        self.more.notify_one();
        true
    }

    /// Sends what is in the spool until the server ends, and a little longer if the target takes it.
    pub(super) fn deliver(&self, events: &Events, ending: &Ending) {
        let mut from = lock(&self.spool).acknowledged();
        let mut wait = RETRY_FIRST;
        while self.wait_for_work(from, ending) {
            let before = from;
            match self.carry(&mut from, ending) {
                Ok(()) => return,
                Err(error) => self.set_away(events, format!("{error:#}")),
            }
            self.counts.retries.fetch_add(1, Ordering::Relaxed);
            if ending.is_asked() {
                return;
            }
            wait = if from > before {
                RETRY_FIRST
            } else {
                (wait * 2).min(RETRY_MAX)
            };
            thread::sleep(wait);
        }
    }

    /// Waits until there is something to send; `false` when nothing will come any more.
    fn wait_for_work(&self, from: u64, ending: &Ending) -> bool {
        loop {
            let over = ending.is_asked();
            let spool = lock(&self.spool);
            if spool.end() > from {
                return true;
            }
            if over {
                return false;
            }
            drop(self.more.wait_timeout(spool, IDLE_WAIT));
        }
    }

    /// Sends from place `from` on over one link; ends well when the server ends.
    fn carry(&self, from: &mut u64, ending: &Ending) -> Result<()> {
        match self.settings.to.way {
            Way::Udp => self.by_datagrams(from, ending),
            Way::Tcp | Way::Tls => self.by_stream(from, ending),
            Way::Http | Way::Https => self.by_requests(from, ending),
        }
    }

    fn by_datagrams(&self, from: &mut u64, ending: &Ending) -> Result<()> {
        let link = Datagrams::open(&self.settings.to, self.own)?;
        while self.wait_for_work(*from, ending) && !ending.is_over() {
            let batch = self.read(*from)?;
            let sent = link.send(&batch, |end| {
                *from = end;
                self.add_sent(1);
            });
            self.settle(*from, *from)?;
            sent.with_context(|| self.settings.to.to_string())?;
            self.set_reached();
        }
        Ok(())
    }

    fn by_stream(&self, from: &mut u64, ending: &Ending) -> Result<()> {
        let mut link = Stream::open(&self.settings, *from)?;
        self.set_reached();
        let Err(broken) = self.by_link(&mut link, from, ending) else {
            return Ok(());
        };
        let Broken {
            why,
            back_to,
            repeated,
        } = broken;
        *from = back_to;
        self.counts.sent.fetch_sub(repeated, Ordering::Relaxed);
        self.counts.waiting.fetch_add(repeated, Ordering::Relaxed);
        self.counts.repeated.fetch_add(repeated, Ordering::Relaxed);
        self.settle(back_to, back_to)?;
        bail!("{}: {why}", self.settings.to)
    }

    fn by_link(&self, link: &mut Stream, from: &mut u64, ending: &Ending) -> Result<(), Broken> {
        loop {
            let asked = ending.is_asked();
            let heard = link.look();
            self.add_sent(link.take_arrived());
            heard?;
            let settled = self.settle(link.acknowledged, link.free);
            settled.map_err(|error| link.stopped(&error))?;
            let batch = self.read(*from).map_err(|error| link.stopped(&error))?;
            if batch.lines.is_empty() {
                if (asked && link.is_idle()) || ending.is_over() {
                    return Ok(());
                }
                let wait = if link.is_idle() { IDLE_WAIT } else { BUSY_WAIT };
                let spool = lock(&self.spool);
                if spool.end() == *from {
                    drop(self.more.wait_timeout(spool, wait));
                }
                continue;
            }
            *from += batch.lines.len() as u64;
            let sent = link.send(&batch, || ending.is_over());
            self.add_sent(link.take_arrived());
            sent?;
        }
    }

    fn by_requests(&self, from: &mut u64, ending: &Ending) -> Result<()> {
        while self.wait_for_work(*from, ending) && !ending.is_over() {
            let batch = self.read(*from)?;
            let messages = batch.count();
            let (rejected, why) = match otlp::post(&self.settings, &batch)? {
                Answer::Taken { rejected, why } => (rejected.min(messages), why),
                Answer::Refused(why) => (messages, why),
            };
            *from += batch.lines.len() as u64;
            self.settle(*from, *from)?;
            self.add_sent(messages - rejected);
            self.counts.waiting.fetch_sub(rejected, Ordering::Relaxed);
            self.counts.rejected.fetch_add(rejected, Ordering::Relaxed);
            self.set_reached();
            if rejected > 0 {
                *lock(&self.away) = Some(format!("{rejected} messages refused: {why}"));
            }
        }
        Ok(())
    }

    fn read(&self, from: u64) -> Result<Batch> {
        let mut lines = Vec::new();
        let read = lock(&self.spool).read(from, &mut lines);
        read.with_context(|| format!("cannot read the spool of {}", self.settings.name))?;
        Ok(Batch { begin: from, lines })
    }

    fn settle(&self, acknowledged: u64, free: u64) -> Result<()> {
        let settled = lock(&self.spool).acknowledge(acknowledged, free);
        settled.with_context(|| format!("cannot keep the spool of {}", self.settings.name))
    }

    fn add_sent(&self, messages: u64) {
        self.counts.sent.fetch_add(messages, Ordering::Relaxed);
        self.counts.waiting.fetch_sub(messages, Ordering::Relaxed);
    }

    fn set_reached(&self) {
        *lock(&self.away) = None;
    }

    fn set_away(&self, events: &Events, why: String) {
        let mut away = lock(&self.away);
        if away.is_none() {
            let name = &self.settings.name;
            events.warn(format!(
                "{name} takes no messages: {why}; they wait in its spool"
            ));
        }
        *away = Some(why);
    }

    /// How it stands.
    pub(super) fn row(&self) -> Row {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Counts {
            sent,
            waiting,
            dropped,
            repeated,
            retries,
            rejected,
            cut,
        } = &self.counts;
        let spool = lock(&self.spool);
        Row {
            name: self.settings.name.to_string(),
            to: self.settings.to.to_string(),
            away: lock(&self.away).clone(),
            sent: count(sent),
            spooled: count(waiting),
            spooled_bytes: spool.end() - spool.acknowledged(),
            spool_bytes: self.settings.spool_bytes,
            dropped: count(dropped),
            repeated: count(repeated),
            retries: count(retries),
            rejected: count(rejected),
            cut: count(cut),
        }
    }
}

impl Ending {
    /// The server ends now.
    pub(super) fn ask(&self) {
        self.0.get_or_init(Instant::now);
    }

    /// The server ends.
    pub(super) fn is_asked(&self) -> bool {
        self.0.get().is_some()
    }

    /// Targets were waited for long enough.
    fn is_over(&self) -> bool {
        self.0.get().is_some_and(|at| at.elapsed() >= END_WAIT)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, to, .. } = self;
        write!(
            f,
            "{name} ({to}): {} sent, {} in its spool ({} of {} KiB), {} dropped, {} maybe twice, {} \
            refused, {} cut, {} retries",
            self.sent,
            self.spooled,
            self.spooled_bytes >> 10,
            self.spool_bytes >> 10,
            self.dropped,
            self.repeated,
            self.rejected,
            self.cut,
            self.retries
        )?;
        match &self.away {
            Some(why) => write!(f, "; away: {why}"),
            None => Ok(()),
        }
    }
}

/// Messages in `lines`.
fn count(lines: &[u8]) -> u64 {
    lines.iter().filter(|&&byte| byte == b'\n').count() as u64
}
