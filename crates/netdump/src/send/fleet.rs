//! Any number of sessions on a few threads.

use std::net::SocketAddr;
use std::num::NonZero;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use proto::time::{Instant, Micros};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};

use super::Request;
use super::report::Report;
use super::session::{Plan, Progress, Sent, Session};
use super::source::Opener;
use crate::key::HostKey;
use crate::serve::socket::Batch;

/// Runs all sessions of a request.
pub(super) fn run(request: &Request, keys: &[HostKey], server: SocketAddr) -> Result<Report> {
    let sessions = request.sessions.max(1);
    raise_file_limit(sessions)?;
    let opener = Opener::new(&request.origin, request.log.as_deref())?;
    let plan = Plan {
        server,
        mtu: request.mtu,
        give_up: Micros::from_millis(request.give_up.as_millis().try_into().unwrap_or(u64::MAX)),
        pool_bytes: POOL_BYTES / usize::try_from(sessions).unwrap_or(usize::MAX),
        name: request.origin.to_string(),
        progress: Progress::default(),
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = u32::try_from(threads).unwrap_or(1).min(sessions);
    let begin = std::time::Instant::now();
    let sent = thread::scope(|scope| {
        let crews: Vec<_> = (0..threads)
            .map(|thread| {
                let (plan, opener) = (&plan, &opener);
                let pace = Pace::new(
                    request
                        .bytes_per_second
                        .map(|rate| rate / u64::from(threads)),
                );
                let mine = (thread..sessions).step_by(threads as usize);
                scope.spawn(move || crew(plan, keys, opener, mine, pace, begin))
            })
            .collect();
        if request.progress {
            let ram = opener.open(0)?.machine().pages() * u64::from(sessions);
            watch(&plan.progress, ram, || {
                crews.iter().all(|crew| crew.is_finished())
            });
        }
        let mut sent = Vec::new();
        for crew in crews {
            let done = crew
                .join()
                .map_err(|_panic| anyhow!("a sending thread panicked"))?;
            sent.extend(done?);
        }
        anyhow::Ok(sent)
    })?;
    Ok(Report::new(request, server, begin.elapsed(), &sent))
}

/// Runs some of the sessions to their ends.
fn crew(
    plan: &Plan,
    keys: &[HostKey],
    opener: &Opener,
    mine: impl Iterator<Item = u32>,
    mut pace: Pace,
    begin: std::time::Instant,
) -> Result<Vec<Sent>> {
    let clock = || {
        let micros = begin.elapsed().as_micros();
        Instant::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    };
    let mut live = Vec::new();
    for index in mine {
        let key = &keys[index as usize % keys.len()];
        live.push(Session::start(plan, key, opener.crash(index)?, clock())?);
    }
    let (mut batch, mut sent) = (Batch::new(), Vec::new());
    while !live.is_empty() {
        let mut idle = true;
        let mut failed = None;
        live.retain_mut(|session| {
            let now = clock();
            if failed.is_some() || session.wake_at() > now || !pace.allows(now) {
                return true;
            }
            idle = false;
            let turn = session.turn(&clock, plan);
            let heard = session.hear(&mut batch, clock());
            match turn.and_then(|turn| heard.map(|()| turn)) {
                Ok((bytes, over)) => {
                    pace.spend(now, bytes);
                    let goes_on = over.is_none();
                    sent.extend(over);
                    goes_on
                }
                Err(error) => {
                    failed = Some(error);
                    true
                }
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if idle {
            wait(&mut live, &mut batch, &pace, &clock)?;
        }
    }
    Ok(sent)
}

/// Waits until a reply comes or something is to be done without one.
fn wait(
    live: &mut [Session],
    batch: &mut Batch,
    pace: &Pace,
    clock: &impl Fn() -> Instant,
) -> Result<()> {
    let now = clock();
    let wake_at = live.iter().map(Session::wake_at).min().unwrap_or(now);
    let left = wake_at.max(pace.free_at).since(now).get();
    let timeout = Timespec::try_from(Duration::from_micros(left)).context("a wait is too long")?;
    let mut polled: Vec<PollFd<'_>> = live
        .iter()
        .map(|session| PollFd::new(session.socket(), PollFlags::IN))
        .collect();
    match poll(&mut polled, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno).context("cannot wait for replies"),
    }
    let ready: Vec<bool> = polled
        .iter()
        .map(|polled| !polled.revents().is_empty())
        .collect();
    drop(polled);
    for (session, _) in live.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
        session.hear(batch, clock())?;
    }
    Ok(())
}

/// Keeps a crew to its share of the rate that was asked for.
struct Pace {
    bytes_per_second: Option<u64>,
    /// Before this nothing may be sent.
    free_at: Instant,
}

impl Pace {
    fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second: bytes_per_second.map(|rate| rate.max(1)),
            free_at: Instant::from_micros(0),
        }
    }

    fn allows(&self, now: Instant) -> bool {
        self.free_at <= now
    }

    fn spend(&mut self, now: Instant, bytes: u64) {
        if let Some(rate) = self.bytes_per_second {
            let cost = bytes.saturating_mul(1_000_000) / rate;
            self.free_at = self.free_at.max(now) + Micros::new(cost);
        }
    }
}

/// Shows how far the sessions are until `over`.
fn watch(progress: &Progress, ram_pages: u64, over: impl Fn() -> bool) {
    let bar = ProgressBar::new(ram_pages << PAGE_SHIFT);
    let template = "{bar:30} {bytes} of {total_bytes} of memory, {bytes_per_sec}, {eta} left, \
        {msg} sent";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    while !over() {
        bar.set_position(progress.pages.load(Ordering::Relaxed) << PAGE_SHIFT);
        let mib = progress.wire_bytes.load(Ordering::Relaxed) >> 20;
        bar.set_message(format!("{mib} MiB"));
        thread::sleep(WATCH_EVERY);
    }
    bar.finish_and_clear();
}

/// Each session has a socket.
fn raise_file_limit(sessions: u32) -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = u64::from(sessions) * FILES_EACH + FILES_MARGIN;
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(limit.maximum.map_or(wanted, |maximum| maximum.min(wanted)));
        setrlimit(Resource::Nofile, limit)
            .with_context(|| format!("cannot raise the limit of open files to {wanted}"))?;
    }
    Ok(())
}

/// For the transmit buffers of all sessions together.
const POOL_BYTES: usize = 64 << 20;
/// A socket and a core file.
const FILES_EACH: u64 = 2;
const FILES_MARGIN: u64 = 64;
const PAGE_SHIFT: u32 = 12;
const WATCH_EVERY: Duration = Duration::from_millis(100);
