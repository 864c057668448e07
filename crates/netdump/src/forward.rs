//! Forwarding: what hosts say, and one summary a crash, to syslog servers and collectors.
//!
//! How a message travels: the thread that writes logs copies a host's lines into the `queue`; the
//! thread of [`Forward::take_in`] makes `message`s of them and appends those to each target's
//! `spool`; a thread a target ([`Forward::deliver`]) reads them there and sends them over its `link`.
//! A target that is away costs nothing but disk, up to the bound of its spool. What is dropped is
//! counted, and told to the target when there is room again. None of these threads is waited for by
//! the ones that receive, and all of them come last when the CPUs are busy.

mod link;
mod message;
mod otlp;
mod queue;
pub mod settings;
mod spool;
mod target;
mod tls;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use netconsole::Line;
use rustix::process::setpriority_process;

use self::message::{PRIORITY_CRASH, Said};
use self::queue::{Batch, Queue};
use self::settings::{Settings, TARGETS_MAX};
pub use self::target::Row;
use self::target::{Ending, Target};
use crate::console::inbox::now_us;
use crate::console::store::Boot;
use crate::serve::events::Events;

/// Name of the spools' directory in the dump directory.
pub const FORWARD_DIR: &str = "forward";
/// How long the thread that makes messages sleeps when there is nothing to make.
const IDLE_WAIT: Duration = Duration::from_millis(200);
/// Messages of so many bytes are written to a spool at once.
const WRITE_BYTES: usize = 64 << 10;
/// Whoever receives comes first.
const NICE: i32 = 10;

/// All targets of a server.
pub struct Forward {
    targets: Vec<Target>,
    queue: Queue,
    /// Messages that came from a syslog server, which get no further.
    looped: AtomicU64,
    ending: Ending,
}

/// A crash, as its summary tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Crash {
    /// The host.
    pub host: String,
    /// What killed it.
    pub title: String,
    /// Kernel release.
    pub kernel: String,
    /// Its signature, if it has one.
    pub signature: Option<String>,
    /// `complete`, `incomplete`, ...
    pub state: String,
    /// What lies where.
    pub path: String,
}

impl Forward {
    /// Checks the targets of a server that listens at `own`, and opens their spools.
    ///
    /// # Errors
    /// A target is this server itself, two have one name, a certificate cannot be read, a spool
    /// cannot be used.
    pub fn open(all: &[Settings], dumpdir: &Path, own: SocketAddr) -> Result<Self> {
        ensure!(
            all.len() <= TARGETS_MAX,
            "the configuration has {} tables [[forward]]; {TARGETS_MAX} are the most",
            all.len()
        );
        let mut targets: Vec<Target> = Vec::new();
        for settings in all {
            let name = &settings.name;
            ensure!(
                targets.iter().all(|target| target.settings.name != *name),
                "the configuration has two tables [[forward]] of the name {name}: name one of them \
                otherwise"
            );
            targets.push(Target::open(settings, &dumpdir.join(FORWARD_DIR), own)?);
        }
        Ok(Self {
            targets,
            queue: Queue::default(),
            looped: AtomicU64::new(0),
            ending: Ending::default(),
        })
    }

    /// How many targets there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.targets.len()
    }

    /// There is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// Lines of one boot's log, which hold so many records. Never waits.
    pub fn lines(&self, host: &str, boot: Option<Boot>, lines: &[u8], records: u64) {
        if !self.is_empty() {
            self.queue.push(host, boot, lines, records);
        }
    }

    /// A crash that is over.
    pub fn crash(&self, crash: &Crash) {
        if !self.is_empty() {
            self.queue.push_crash(said(crash));
        }
    }

    /// Makes messages until [`Self::end`].
    pub fn take_in(&self, events: &Events) {
        come_last();
        let mut batch = Batch::default();
        loop {
            let ends = self.ending.is_asked();
            batch = self.queue.swap(batch, IDLE_WAIT);
            let overflows = self.queue.take_overflows();
            for target in &self.targets {
                target.add_dropped(overflows);
            }
            if batch.is_empty() {
                for target in &self.targets {
                    target.tell_dropped(ends);
                }
                if ends {
                    return;
                }
                continue;
            }
            self.spread(&batch, events);
        }
    }

    /// Gives a batch to all targets.
    fn spread(&self, batch: &Batch, events: &Events) {
        let mut outs: Vec<Vec<u8>> = vec![Vec::new(); self.targets.len()];
        let mut tell = |said: &Said| {
            if said.came_from_syslog() {
                self.looped.fetch_add(1, Ordering::Relaxed);
                return;
            }
            for (target, out) in self.targets.iter().zip(&mut outs) {
                target.write(said, out);
                if out.len() >= WRITE_BYTES {
                    target.append(out, events);
                }
            }
        };
        batch.each(|host, boot, line| {
            if let Some(said) = Line::parse(line).and_then(|line| Said::of(host, boot, &line)) {
                tell(&said);
            }
        });
        for crash in &batch.crashes {
            tell(crash);
        }
        for (target, out) in self.targets.iter().zip(&mut outs) {
            target.append(out, events);
        }
    }

    /// Sends to target `number` until [`Self::end`] and a little longer.
    pub fn deliver(&self, number: usize, events: &Events) {
        come_last();
        if let Some(target) = self.targets.get(number) {
            target.deliver(events, &self.ending);
        }
    }

    /// The server ends: no more lines will come. What targets do not take soon stays in their
    /// spools.
    pub fn end(&self) {
        self.ending.ask();
    }

    /// How each target stands.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        self.targets.iter().map(Target::row).collect()
    }

    /// Messages that were not forwarded because they came from a syslog server.
    #[must_use]
    pub fn looped(&self) -> u64 {
        self.looped.load(Ordering::Relaxed)
    }
}

/// A summary as one message.
fn said(crash: &Crash) -> Said {
    let Crash {
        host,
        title,
        kernel,
        signature,
        state,
        path,
    } = crash;
    let signed = signature.as_deref().unwrap_or("no signature");
    let text = format!("crash of {host}: {title}; kernel {kernel}; {signed}; {state}; {path}");
    let attributes = [
        ("netdump.crash.title", title),
        ("linux.kernel.release", kernel),
        ("netdump.crash.state", state),
        ("netdump.crash.path", path),
    ];
    let mut attributes: Vec<(String, String)> = attributes
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect();
    if let Some(signature) = signature {
        attributes.push(("netdump.crash.signature".to_owned(), signature.clone()));
    }
    Said {
        host: host.clone(),
        at_us: now_us(),
        priority: PRIORITY_CRASH,
        kind: "crash",
        text: text.into_bytes(),
        attributes,
        ..Said::default()
    }
}

/// The calling thread gets the CPU after others. Where that is not allowed it goes on as it is.
fn come_last() {
    setpriority_process(None, NICE).unwrap_or_default();
}
