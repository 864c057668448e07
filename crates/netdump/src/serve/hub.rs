//! What all threads of a server share.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use proto::reply::{FIRST_CREDIT_PACKETS, WINDOW_PACKETS_MAX};
use proto::time::Instant as EngineInstant;
use proto::units::{KeyId, PAGE_BYTES};
use rustix::fs::statvfs;

use super::Options;
use super::admission::Admission;
use super::drops::Drops;
use super::events::Events;
use super::finish::Format;
use super::registry::{Registry, lock};
use super::signatures::Signatures;
use super::socket::{Peer, send};
use super::verdict::{Deed, Want};
use super::writers::Queue;
use crate::console::Console;
use crate::forward::Forward;
use crate::key::{HostKey, Keyring};

/// What the server wants of crashes in general.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// The whole memory, if the disk has room for it.
    Full,
    /// Text, registers and state only.
    LogOnly,
    /// Nothing beyond what arrives by itself: the host reboots at once.
    Reboot,
}

/// See the module's documentation.
pub struct Hub {
    /// Where crashes are put.
    pub dumpdir: PathBuf,
    /// Which memory image to write.
    pub format: Format,
    /// See [`Policy`].
    pub policy: Policy,
    /// See [`super::Options::filter`].
    pub filter: u8,
    /// Every crash is held until a person says what to do with it.
    pub hold: bool,
    /// Crashes go to this other server, if their host was armed for it.
    pub redirect: Option<SocketAddr>,
    /// What hosts do in the end.
    pub action: Deed,
    /// See [`super::Options::triage`].
    pub triage: Option<PathBuf>,
    /// Who may send pages.
    pub admission: Admission,
    /// Which crashes are known.
    pub signatures: Signatures,
    /// Sessions that have something to write.
    pub queue: Queue,
    /// A session that is silent for so long is over.
    pub silence: Duration,
    /// The spools of an incomplete crash wait for so long for its host to come back.
    pub linger: Duration,
    /// Where events go.
    pub events: Events,
    /// Datagrams not taken.
    pub drops: Drops,
    /// Hosts' logs.
    pub console: Console,
    /// Where their messages are forwarded to.
    pub forward: Forward,
    /// All sessions.
    pub registry: Registry,
    /// Bytes that wait for their turn, in all sessions.
    pub held_bytes: Arc<AtomicUsize>,
    /// Held while a new session is made, so that two threads do not make one twice.
    pub creating: Mutex<()>,
    /// Held while a session gets a place or waits for one, and is told so: whoever is told first is
    /// the first in the queue.
    pub deciding: Mutex<()>,
    /// Held while a vmcore is written: one at a time, so that they do not take the disk from each
    /// other.
    pub finishing: Mutex<()>,
    /// A session is followed by its vmcore; see [`super::follow`].
    pub following: Arc<AtomicBool>,
    /// The server ends.
    pub stop: AtomicBool,
    keys_dir: PathBuf,
    keys: Mutex<Keys>,
    /// For replies that are not the answer to a batch.
    socket: UdpSocket,
    /// Bytes that the kernel buffers in all sockets.
    buffer_bytes: usize,
    epoch: Instant,
    closing: Mutex<Vec<JoinHandle<()>>>,
}

struct Keys {
    ring: Arc<Keyring>,
    scanned_at: Instant,
}

/// What a hub is made of.
pub struct Parts<'a> {
    /// How the server is to run.
    pub options: &'a Options,
    /// See [`Hub::forward`].
    pub forward: Forward,
    /// The hosts' keys.
    pub ring: Keyring,
    /// See [`Hub::events`].
    pub events: Events,
    /// A socket of the server.
    pub socket: UdpSocket,
    /// Bytes that the kernel buffers in all sockets.
    pub buffer_bytes: usize,
}

impl Hub {
    /// Makes a hub.
    #[must_use]
    pub fn new(parts: Parts<'_>) -> Self {
        let options = parts.options;
        Self {
            dumpdir: options.dumpdir.clone(),
            format: options.format,
            policy: options.policy,
            filter: options.filter,
            hold: options.hold,
            redirect: options.redirect,
            action: options.action,
            triage: options.triage.clone(),
            admission: Admission::new(options.active),
            signatures: Signatures::new(&options.dumpdir, options.signatures.clone()),
            queue: Queue::default(),
            silence: options.silence,
            linger: options.linger,
            events: parts.events,
            drops: Drops::default(),
            console: Console::new(&options.dumpdir, options.console.clone()),
            forward: parts.forward,
            registry: Registry::default(),
            held_bytes: Arc::default(),
            creating: Mutex::default(),
            deciding: Mutex::default(),
            finishing: Mutex::default(),
            following: Arc::default(),
            stop: AtomicBool::new(false),
            keys_dir: options.keys.clone(),
            keys: Mutex::new(Keys {
                ring: Arc::new(parts.ring),
                scanned_at: Instant::now(),
            }),
            socket: parts.socket,
            buffer_bytes: parts.buffer_bytes,
            epoch: Instant::now(),
            closing: Mutex::default(),
        }
    }

    /// The server ends.
    #[must_use]
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The time as the engines see it.
    #[must_use]
    pub fn now(&self) -> EngineInstant {
        EngineInstant::from_micros(
            u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(u64::MAX),
        )
    }

    /// The key with this id. The key directory is read again when it is not known, once a second at
    /// most, so that a new host needs no restart.
    pub fn key(&self, id: KeyId) -> Option<HostKey> {
        let mut keys = lock(&self.keys);
        if let Some(key) = keys.ring.get(id) {
            return Some(key.clone());
        }
        if keys.scanned_at.elapsed() < KEYS_SCAN_EVERY {
            return None;
        }
        keys.scanned_at = Instant::now();
        match Keyring::scan(&self.keys_dir, |warning| self.events.warn(warning)) {
            Ok(ring) => keys.ring = Arc::new(ring),
            Err(error) => self.events.warn(format!("{error:#}")),
        }
        keys.ring.get(id).cloned()
    }

    /// How many packets beyond the last one written a client may send: its share of what the kernel
    /// can buffer, so that nothing is lost when all send at once.
    #[must_use]
    pub fn credit(&self, packet_bytes: u16, sessions: usize) -> u64 {
        let cost = usize::from(packet_bytes.max(PACKET_BYTES_GUESS)) * 2 + PACKET_BOOKKEEPING_BYTES;
        let share = self.buffer_bytes / cost / sessions.max(1);
        let bounded = u64::try_from(share.min(WINDOW_PACKETS_MAX)).unwrap_or(0);
        bounded.max(FIRST_CREDIT_PACKETS)
    }

    /// Sessions that send, or may begin to at any time.
    #[must_use]
    pub fn sending(&self) -> usize {
        let open = self.registry.open();
        open.saturating_sub(self.admission.waiting()).max(1)
    }

    /// What is wanted of a crash of `ram_pages` pages while `promised` bytes are still to come from
    /// others.
    pub fn decide(&self, ram_pages: u64, promised: u64) -> Want {
        match self.policy {
            Policy::LogOnly => {
                return Want::LogOnly("the server was started with --verdict log-only".to_owned());
            }
            Policy::Reboot => {
                return Want::Nothing("the server was started with --verdict reboot".to_owned());
            }
            Policy::Full => {}
        }
        match self.room(bytes_expected(ram_pages, self.filter), promised) {
            Ok(()) => Want::Full {
                filter: self.filter,
            },
            Err(why) => Want::LogOnly(why),
        }
    }

    /// Whether the disk has room for a crash of `expected` bytes while `promised` bytes are still to
    /// come from others; if not, says how much it has.
    pub fn room(&self, expected: u64, promised: u64) -> Result<(), String> {
        let need = expected.saturating_add(SPACE_MARGIN_BYTES);
        match free_bytes(&self.dumpdir) {
            Ok(free) if free.saturating_sub(promised) >= need => Ok(()),
            Ok(free) => Err(format!(
                "{} has {} MiB free, {} MiB of them promised to other crashes; this one may need \
                {} MiB",
                self.dumpdir.display(),
                free >> 20,
                promised >> 20,
                need >> 20
            )),
            // The dump matters more than the estimate; a full disk is met when it is full.
            Err(error) => {
                self.events.warn(format!("{error:#}"));
                Ok(())
            }
        }
    }

    /// Sends a reply that is not the answer to a batch. A lost one is made again when the client
    /// asks again.
    pub fn send(&self, bytes: &[u8], peer: Peer) {
        drop(send(&self.socket, bytes, peer));
    }

    /// Runs `work` in a thread of its own, which [`Self::join`] waits for.
    pub fn spawn(&self, work: impl FnOnce() + Send + 'static) {
        match thread::Builder::new().name("close".to_owned()).spawn(work) {
            Ok(handle) => {
                let mut closing = lock(&self.closing);
                closing.retain(|handle| !handle.is_finished());
                closing.push(handle);
            }
            // The session stays in its spool; a restarted server closes it.
            Err(error) => self.events.warn(format!("cannot start a thread: {error}")),
        }
    }

    /// Waits for all threads that [`Self::spawn`] started.
    pub fn join(&self) {
        loop {
            let Some(handle) = lock(&self.closing).pop() else {
                return;
            };
            if handle.join().is_err() {
                self.events
                    .warn("a closing thread panicked; its session stays in its spool".to_owned());
            }
        }
    }
}

/// Bytes free to this process in the file system of `path`.
pub fn free_bytes(path: &std::path::Path) -> Result<u64> {
    let stat = statvfs(path)
        .with_context(|| format!("cannot ask for the free space of {}", path.display()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Room beside the memory itself: log, headers, session.json of this crash and of those that
/// follow.
pub const SPACE_MARGIN_BYTES: u64 = 64 << 20;
/// With less than this, no session sends pages any more: what is left is for logs and ends.
pub const SPACE_LAST_BYTES: u64 = 32 << 20;
const KEYS_SCAN_EVERY: Duration = Duration::from_secs(1);
/// Before the Hello the size of a client's packets is not known.
const PACKET_BYTES_GUESS: u16 = 1424;
/// What the kernel charges a socket for a packet beside its bytes, whose area is rounded up to a
/// power of two.
const PACKET_BOOKKEEPING_BYTES: usize = 1024;

/// Bytes that a crash of `ram_pages` pages may take at this filter level. Without page cache, user
/// memory and free memory rarely more than an eighth is left (docs/benchmarks.md); a quarter is
/// asked for, and should the disk fill all the same, its watch stops the pages in time.
pub fn bytes_expected(ram_pages: u64, filter: u8) -> u64 {
    let bytes = ram_pages.saturating_mul(PAGE_BYTES as u64);
    if filter & MOST_OF_MEMORY == MOST_OF_MEMORY {
        bytes / 4
    } else {
        bytes
    }
}

/// The bits of a filter level that leave out page cache, private page cache, user and free memory.
const MOST_OF_MEMORY: u8 = 2 | 4 | 8 | 16;
