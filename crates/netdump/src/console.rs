//! Hosts' logs: console messages as they come, live, from every host.
//!
//! How a message travels: a receive thread gives what is not ours to the [`inbox`]; the thread of
//! `writer` takes it from there, has the `netconsole` crate put each host's messages in order, and
//! appends them, a `pass` of all hosts at a time, to the logs that [`store`] names. A third thread
//! `keep`s: it packs what is complete and removes what is too old. [`settings`] bounds all of it,
//! [`view`] shows how it stands.

mod host;
pub mod inbox;
mod keep;
mod pass;
pub mod settings;
pub mod store;
pub mod view;
mod writer;

pub use self::writer::run as write;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use netconsole::Counts;
use serde::{Deserialize, Serialize};

use self::inbox::Inbox;
use self::settings::Settings;
use self::view::Askers;
use crate::serve::events::Events;
use crate::serve::registry::lock;

/// What the threads of one server share.
pub struct Console {
    dir: PathBuf,
    settings: Settings,
    /// Datagrams on their way.
    pub inbox: Inbox,
    /// Datagrams that the kernel threw away because the sockets' buffers were full.
    socket_drops: AtomicU64,
    tally: Mutex<Tally>,
    /// Directories of hosts that have a complete part.
    full_dirs: Mutex<Vec<PathBuf>>,
    askers: Askers,
    over: AtomicBool,
}

/// What became of datagrams and records, since the server was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// See [`Counts`].
    pub counts: Counts,
    /// Records, and malformed datagrams, that are in a log.
    pub written: u64,
    /// Records that could not be written.
    pub unwritten: u64,
    /// Datagrams of hosts that are not allowed, or too many.
    pub refused: u64,
    /// Datagrams over their host's limit.
    pub limited: u64,
    /// Hosts.
    pub hosts: u64,
}

/// [`Tally`] and what did not come so far, as an event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Datagrams put into order.
    pub datagrams: u64,
    /// Records, and malformed datagrams, in logs.
    pub written: u64,
    /// Boots begun.
    pub boots: u64,
    /// Sequence numbers that were passed over.
    pub gaps: u64,
    /// Of those, records known to be sent.
    pub lost: u64,
    /// Records that came after they had been passed over.
    pub late: u64,
    /// Records and fragments that came more than once.
    pub duplicates: u64,
    /// Records of which fragments are missing.
    pub incomplete: u64,
    /// Malformed datagrams.
    pub malformed: u64,
    /// Datagrams for which the sockets had no room, those of crashes among them.
    pub socket_drops: u64,
    /// Datagrams for which the inbox had no room.
    pub inbox_drops: u64,
    /// Records that could not be written.
    pub unwritten: u64,
    /// Datagrams of hosts that are not allowed, or too many.
    pub refused: u64,
    /// Datagrams over their host's limit.
    pub limited: u64,
    /// Hosts.
    pub hosts: u64,
}

impl Console {
    /// Logs in `dumpdir`.
    #[must_use]
    pub fn new(dumpdir: &Path, settings: Settings) -> Self {
        Self {
            dir: dumpdir.join(store::CONSOLE_DIR),
            settings,
            inbox: Inbox::default(),
            socket_drops: AtomicU64::new(0),
            tally: Mutex::default(),
            full_dirs: Mutex::default(),
            askers: Askers::default(),
            over: AtomicBool::new(false),
        }
    }

    /// Packs and removes old logs until `stopping`.
    pub fn keep(&self, events: &Events, stopping: impl Fn() -> bool) {
        keep::run(self, events, stopping);
    }

    /// Counts datagrams that the kernel threw away.
    pub fn add_socket_drops(&self, datagrams: u64) {
        self.socket_drops.fetch_add(datagrams, Ordering::Relaxed);
    }

    /// The server ends: a full disk is not waited for any more.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Whether [`Self::end`] was called.
    #[must_use]
    pub fn ends(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// What became of everything so far.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let Tally {
            counts,
            written,
            unwritten,
            refused,
            limited,
            hosts,
        } = *lock(&self.tally);
        let Counts {
            datagrams,
            boots,
            gaps,
            lost,
            late,
            duplicates,
            incomplete,
            malformed,
            ..
        } = counts;
        Figures {
            datagrams,
            written,
            boots,
            gaps,
            lost,
            late,
            duplicates,
            incomplete,
            malformed,
            socket_drops: self.socket_drops.load(Ordering::Relaxed),
            inbox_drops: self.inbox.overflows(),
            unwritten,
            refused,
            limited,
            hosts,
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "console: {} records of {} hosts written in {} boots; {} passed over ({} of them surely \
            lost), {} late, {} twice, {} incomplete, {} malformed; no room for {} in sockets and {} \
            in memory, {} unwritten, {} refused, {} over limits",
            self.written,
            self.hosts,
            self.boots,
            self.gaps,
            self.lost,
            self.late,
            self.duplicates,
            self.incomplete,
            self.malformed,
            self.socket_drops,
            self.inbox_drops,
            self.unwritten,
            self.refused,
            self.limited
        )
    }
}
