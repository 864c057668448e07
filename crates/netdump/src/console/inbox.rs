//! Datagrams on their way from the receive threads to the one that writes logs.
//!
//! A receive thread copies what is not ours into one area and goes on; the writing thread takes the
//! whole area at once and gives back an empty one. Nothing is allocated a datagram, nobody waits for
//! a disk, and what does not fit is counted.

use std::mem;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::serve::registry::lock;
use crate::serve::socket::Peer;

/// Bytes that may wait.
const WAITING_BYTES_MAX: usize = 32 << 20;
/// Datagrams that may wait.
const WAITING_MAX: usize = 1 << 19;
/// Sealed datagrams that may wait.
const SEALED_MAX: usize = 4096;
/// An area that was enlarged by a burst shrinks to this again.
const KEPT_BYTES: usize = 1 << 20;

/// See the module's documentation.
#[derive(Default)]
pub struct Inbox {
    waiting: Mutex<Letters>,
    more: Condvar,
    overflows: AtomicU64,
}

/// Datagrams, back to back.
#[derive(Default)]
pub struct Letters {
    bytes: Vec<u8>,
    letters: Vec<Letter>,
    sealed: Vec<Sealed>,
}

/// A datagram of one of our own clients, as it came.
pub struct Sealed {
    /// Who sent it.
    pub peer: Peer,
    /// When it was received.
    pub at_us: u64,
    /// Its bytes.
    pub datagram: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Letter {
    from: IpAddr,
    at_us: u64,
    end: usize,
}

/// One batch's way into the inbox. It holds the inbox from the first datagram on.
pub struct Delivery<'a> {
    inbox: &'a Inbox,
    waiting: Option<MutexGuard<'a, Letters>>,
    at_us: u64,
}

impl Inbox {
    /// Begins a batch received now.
    #[must_use]
    pub fn delivery(&self) -> Delivery<'_> {
        Delivery {
            inbox: self,
            waiting: None,
            at_us: 0,
        }
    }

    /// Waits until there is something, for `wait` at most.
    pub fn wait(&self, wait: Duration) {
        let waiting = lock(&self.waiting);
        if waiting.is_empty() {
            // Whether it was woken, or by whom, makes no difference: it looks again.
            drop(self.more.wait_timeout(waiting, wait));
        }
    }

    /// Takes what is there; `empty` is filled next.
    #[must_use]
    pub fn swap(&self, mut empty: Letters) -> Letters {
        empty.clear();
        mem::replace(&mut *lock(&self.waiting), empty)
    }

    /// Datagrams for which there was no room.
    #[must_use]
    pub fn overflows(&self) -> u64 {
        self.overflows.load(Ordering::Relaxed)
    }
}

impl Delivery<'_> {
    /// Adds a datagram.
    pub fn push(&mut self, from: IpAddr, datagram: &[u8]) {
        if self.at_us == 0 {
            self.at_us = now_us();
        }
        let waiting = self
            .waiting
            .get_or_insert_with(|| lock(&self.inbox.waiting));
        let end = waiting.bytes.len() + datagram.len();
        if end > WAITING_BYTES_MAX || waiting.letters.len() >= WAITING_MAX {
            self.inbox.overflows.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.bytes.extend_from_slice(datagram);
        let at_us = self.at_us;
        waiting.letters.push(Letter { from, at_us, end });
    }
}

impl Delivery<'_> {
    /// Adds a sealed datagram. It holds many records, so it may have memory of its own.
    pub fn push_sealed(&mut self, peer: Peer, datagram: &[u8]) {
        let waiting = self
            .waiting
            .get_or_insert_with(|| lock(&self.inbox.waiting));
        if waiting.sealed.len() >= SEALED_MAX {
            self.inbox.overflows.fetch_add(1, Ordering::Relaxed);
            return;
        }
        waiting.sealed.push(Sealed {
            peer,
            at_us: now_us(),
            datagram: datagram.to_vec(),
        });
    }
}

impl Drop for Delivery<'_> {
    fn drop(&mut self) {
        if self.waiting.take().is_some() {
            self.inbox.more.notify_one();
        }
    }
}

impl Letters {
    /// Each datagram: who sent it, when it was received, its bytes.
    pub fn each(&self, mut datagram: impl FnMut(IpAddr, u64, &[u8])) {
        let mut begin = 0;
        for letter in &self.letters {
            datagram(letter.from, letter.at_us, &self.bytes[begin..letter.end]);
            begin = letter.end;
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.letters.len()
    }

    /// There is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.letters.is_empty() && self.sealed.is_empty()
    }

    /// Takes the sealed ones.
    pub fn take_sealed(&mut self) -> Vec<Sealed> {
        mem::take(&mut self.sealed)
    }

    fn clear(&mut self) {
        let small = self.bytes.len() < KEPT_BYTES;
        self.bytes.clear();
        self.letters.clear();
        if small {
            self.bytes.shrink_to(KEPT_BYTES);
            self.letters.shrink_to(KEPT_BYTES / size_of::<Letter>());
        }
    }
}

/// Microseconds since 1970.
#[must_use]
pub fn now_us() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn contents(letters: &Letters) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        letters.each(|from, at_us, bytes| {
            assert_eq!(from, HOST);
            assert!(at_us > 0);
            all.push(bytes.to_vec());
        });
        all
    }

    #[test]
    fn what_was_delivered_is_taken_once_and_in_order() {
        let inbox = Inbox::default();
        inbox.wait(Duration::ZERO);
        for part in [&[&b"one"[..], b""][..], &[b"three"]] {
            let mut delivery = inbox.delivery();
            for bytes in part {
                delivery.push(HOST, bytes);
            }
        }
        inbox.wait(Duration::from_secs(60));
        let letters = inbox.swap(Letters::default());
        assert_eq!(contents(&letters), [&b"one"[..], b"", b"three"]);
        assert!(inbox.swap(letters).is_empty());
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let inbox = Inbox::default();
        let datagram = [7; 1 << 16];
        let fit = WAITING_BYTES_MAX / datagram.len();
        let mut delivery = inbox.delivery();
        for _ in 0..fit + 3 {
            delivery.push(HOST, &datagram);
        }
        drop(delivery);
        assert_eq!(
            (inbox.swap(Letters::default()).len(), inbox.overflows()),
            (fit, 3)
        );
    }
}
