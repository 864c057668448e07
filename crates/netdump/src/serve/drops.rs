//! Datagrams that were not taken, counted by reason: loss is data.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use proto::wire::Reject;
use serde::Serialize;

/// Why a datagram was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Not a datagram of this protocol, or of a version, kind or flag this server does not know.
    NotOurs,
    /// Shorter or longer than any datagram of this protocol.
    Truncated,
    /// Sealed with a key that is not in the key directory.
    UnknownKey,
    /// The seal is broken.
    BadSeal,
    /// More sessions at once than this server takes, or a packet beyond all credit.
    OverLimit,
    /// The kernel's receive buffer was full.
    BufferFull,
    /// Of a session that is not under way here, or of an attempt that is over.
    UnknownSession,
}

/// Counts since the server was started.
#[derive(Debug, Default)]
pub struct Drops {
    counts: [AtomicU64; REASONS],
}

/// [`Drops`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DropCounts {
    /// See [`Reason::NotOurs`].
    pub not_ours: u64,
    /// See [`Reason::Truncated`].
    pub truncated: u64,
    /// See [`Reason::UnknownKey`].
    pub unknown_key: u64,
    /// See [`Reason::BadSeal`].
    pub bad_seal: u64,
    /// See [`Reason::OverLimit`].
    pub over_limit: u64,
    /// See [`Reason::BufferFull`].
    pub buffer_full: u64,
    /// See [`Reason::UnknownSession`].
    pub unknown_session: u64,
}

impl Drops {
    /// Counts one datagram.
    pub fn add(&self, reason: Reason) {
        self.add_many(reason, 1);
    }

    /// Counts several datagrams.
    pub fn add_many(&self, reason: Reason, datagrams: u64) {
        self.counts[reason.index()].fetch_add(datagrams, Ordering::Relaxed);
    }

    /// The counts so far.
    #[must_use]
    pub fn counts(&self) -> DropCounts {
        let count = |reason: Reason| self.counts[reason.index()].load(Ordering::Relaxed);
        DropCounts {
            not_ours: count(Reason::NotOurs),
            truncated: count(Reason::Truncated),
            unknown_key: count(Reason::UnknownKey),
            bad_seal: count(Reason::BadSeal),
            over_limit: count(Reason::OverLimit),
            buffer_full: count(Reason::BufferFull),
            unknown_session: count(Reason::UnknownSession),
        }
    }
}

impl Reason {
    fn index(self) -> usize {
        match self {
            Self::NotOurs => 0,
            Self::Truncated => 1,
            Self::UnknownKey => 2,
            Self::BadSeal => 3,
            Self::OverLimit => 4,
            Self::BufferFull => 5,
            Self::UnknownSession => 6,
        }
    }
}

impl From<Reject> for Reason {
    fn from(reject: Reject) -> Self {
        match reject {
            Reject::BadSeal => Self::BadSeal,
            Reject::Truncated(_) | Reject::TooLong(_) => Self::Truncated,
            Reject::OtherSession => Self::UnknownSession,
            Reject::BeyondWindow => Self::OverLimit,
            Reject::NotOurs
            | Reject::Malformed
            | Reject::Stale
            | Reject::OtherVersion(_)
            | Reject::UnknownKind(_)
            | Reject::UnknownFlags(_)
            | Reject::WrongDirection(_) => Self::NotOurs,
        }
    }
}

impl fmt::Display for DropCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "dropped {} not ours, {} truncated, {} unknown key, {} bad seal, {} over limit, {} \
            buffer full, {} unknown session",
            self.not_ours,
            self.truncated,
            self.unknown_key,
            self.bad_seal,
            self.over_limit,
            self.buffer_full,
            self.unknown_session
        )
    }
}

const REASONS: usize = 7;
