//! Lines on their way from the thread that writes logs to the one that makes messages of them. The
//! first copies them and goes on; what does not fit is counted.

use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::message::Said;
use crate::console::store::Boot;
use crate::serve::registry::lock;

/// Bytes that may wait.
const WAITING_BYTES_MAX: usize = 16 << 20;
/// Crashes that may wait.
const CRASHES_MAX: usize = 1024;

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<Batch>,
    more: Condvar,
    overflows: AtomicU64,
}

/// Lines of logs, back to back, and crashes.
#[derive(Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    chunks: Vec<Chunk>,
    pub(super) crashes: Vec<Said>,
}

struct Chunk {
    name_end: usize,
    boot: Option<Boot>,
    end: usize,
}

impl Queue {
    /// Adds lines of one boot of a host, which hold so many records.
    pub(super) fn push(&self, host: &str, boot: Option<Boot>, lines: &[u8], records: u64) {
        let mut waiting = lock(&self.waiting);
        if waiting.bytes.len() + host.len() + lines.len() > WAITING_BYTES_MAX {
            self.overflows.fetch_add(records, Ordering::Relaxed);
            return;
        }
        waiting.bytes.extend_from_slice(host.as_bytes());
        let name_end = waiting.bytes.len();
        waiting.bytes.extend_from_slice(lines);
        let end = waiting.bytes.len();
        waiting.chunks.push(Chunk {
            name_end,
            boot,
            end,
        });
        drop(waiting);
        self.more.notify_one();
    }

    /// Adds a crash.
    pub(super) fn push_crash(&self, crash: Said) {
        let mut waiting = lock(&self.waiting);
        if waiting.crashes.len() < CRASHES_MAX {
            waiting.crashes.push(crash);
        } else {
            self.overflows.fetch_add(1, Ordering::Relaxed);
        }
        drop(waiting);
        self.more.notify_one();
    }

    /// Takes what is there, after waiting for it for `wait` at most; `empty` is filled next.
    pub(super) fn swap(&self, mut empty: Batch, wait: Duration) -> Batch {
        empty.clear();
        let mut waiting = lock(&self.waiting);
        if waiting.is_empty() {
            let woken = self.more.wait_timeout(waiting, wait);
            waiting = woken.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        mem::replace(&mut *waiting, empty)
    }

    /// Messages for which there was no room since this was asked last.
    pub(super) fn take_overflows(&self) -> u64 {
        self.overflows.swap(0, Ordering::Relaxed)
    }
}

impl Batch {
    /// Each line: its host, its boot, and the line without its LF.
    pub(super) fn each(&self, mut line: impl FnMut(&str, Option<Boot>, &[u8])) {
        let mut begin = 0;
        for chunk in &self.chunks {
            let host = str::from_utf8(&self.bytes[begin..chunk.name_end]).unwrap_or_default();
            let lines = &self.bytes[chunk.name_end..chunk.end];
            for text in lines.split(|&byte| byte == b'\n') {
                if !text.is_empty() {
                    line(host, chunk.boot, text);
                }
            }
            begin = chunk.end;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.crashes.is_empty()
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(KEPT_BYTES);
        self.chunks.clear();
        self.chunks.shrink_to(KEPT_BYTES / size_of::<Chunk>());
        self.crashes.clear();
    }
}

/// An area that was enlarged by a burst shrinks to this again.
const KEPT_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_by_host_and_what_does_not_fit_is_counted() {
        let queue = Queue::default();
        queue.push("web1", None, b"one\ntwo\n", 2);
        queue.push("db1", None, b"three\n", 1);
        queue.push("db1", None, &vec![b'x'; WAITING_BYTES_MAX], 7);
        let batch = queue.swap(Batch::default(), Duration::ZERO);
        let mut all = Vec::new();
        batch.each(|host, _, line| all.push(format!("{host} {}", line.escape_ascii())));
        assert_eq!(all, ["web1 one", "web1 two", "db1 three"]);
        assert_eq!((queue.take_overflows(), queue.take_overflows()), (7, 0));
        assert!(queue.swap(batch, Duration::ZERO).is_empty());
    }
}
