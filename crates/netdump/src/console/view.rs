//! How hosts' logs stand, for people who ask. Only the thread that writes them knows, so it is the
//! one that answers, between two passes.

use std::sync::Mutex;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Console;
use super::host::Host;
use super::inbox::now_us;
use crate::serve::registry::lock;

/// Hosts that an answer lists: those heard last.
const ROWS_MAX: usize = 1000;
/// Who may wait for an answer at a time.
const ASKERS_MAX: usize = 16;
/// A thread that does not answer within this time waits for a disk.
const ANSWER_WAIT: Duration = Duration::from_secs(2);

/// One host's log; of our own clients, one boot's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The host.
    pub host: String,
    /// The boot that its last messages are of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
    /// Records since the server was started.
    pub records: u64,
    /// Sequence numbers that were passed over.
    pub gaps: u64,
    /// Of those, records known to be sent.
    pub lost: u64,
    /// Seconds since it was heard; of a log that is only known from before, since then.
    pub silent_seconds: f64,
}

/// Hosts, those heard last first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Hosts {
    /// At most a thousand of them.
    pub rows: Vec<Row>,
    /// How many more there are.
    pub more: u64,
}

/// What a host has said since the server was started.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Heard {
    pub(super) records: u64,
    pub(super) gaps: u64,
    pub(super) lost: u64,
    pub(super) at_us: u64,
}

/// Who waits for an answer.
#[derive(Default)]
pub(super) struct Askers(Mutex<Vec<SyncSender<Hosts>>>);

impl Console {
    /// How hosts' logs stand; `None` when the thread that writes them does not answer.
    #[must_use]
    pub fn hosts(&self) -> Option<Hosts> {
        let (answer, answers) = sync_channel(1);
        let mut askers = lock(&self.askers.0);
        if askers.len() >= ASKERS_MAX {
            return None;
        }
        askers.push(answer);
        drop(askers);
        answers.recv_timeout(ANSWER_WAIT).ok()
    }

    /// Answers all who asked.
    pub(super) fn answer(&self, hosts: &[Host]) {
        let askers = std::mem::take(&mut *lock(&self.askers.0));
        if askers.is_empty() {
            return;
        }
        let hosts = view(hosts);
        for asker in askers {
            // Who does not wait any more needs no answer.
            drop(asker.try_send(hosts.clone()));
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "for people, who read four digits"
)]
fn view(hosts: &[Host]) -> Hosts {
    let now_us = now_us();
    let mut order: Vec<&Host> = hosts.iter().collect();
    order.sort_unstable_by_key(|host| std::cmp::Reverse(host.heard.at_us));
    let row = |host: &&Host| {
        let Heard {
            records,
            gaps,
            lost,
            at_us,
        } = host.heard;
        Row {
            host: host.name.to_string(),
            boot: host.log.boot().map(|boot| boot.to_string()),
            records,
            gaps,
            lost,
            silent_seconds: now_us.saturating_sub(at_us) as f64 / 1e6,
        }
    };
    Hosts {
        rows: order.iter().take(ROWS_MAX).map(row).collect(),
        more: order.len().saturating_sub(ROWS_MAX) as u64,
    }
}
