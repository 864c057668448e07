//! Packets that arrived ahead of their turn, bounded over all sessions together.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proto::server::Hold;
use proto::units::PacketNumber;

/// Bytes that may wait in all sessions together. What has no room is sent again by its client.
pub const HELD_BYTES_MAX: usize = 128 << 20;

/// One session's packets that wait. The bytes of all sessions are counted together.
pub struct Held {
    packets: HashMap<PacketNumber, Box<[u8]>>,
    bytes: Arc<AtomicUsize>,
}

impl Held {
    /// Nothing waits; `bytes` counts what waits in all sessions.
    #[must_use]
    pub fn new(bytes: Arc<AtomicUsize>) -> Self {
        Self {
            packets: HashMap::new(),
            bytes,
        }
    }
}

impl Hold for Held {
    fn keep(&mut self, number: PacketNumber, bytes: &[u8]) -> bool {
        let before = self.bytes.fetch_add(bytes.len(), Ordering::Relaxed);
        if before + bytes.len() > HELD_BYTES_MAX {
            self.bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
            return false;
        }
        if let Some(twice) = self.packets.insert(number, bytes.into()) {
            self.bytes.fetch_sub(twice.len(), Ordering::Relaxed);
        }
        true
    }

    fn release<R>(&mut self, number: PacketNumber, with: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let bytes = self.packets.remove(&number)?;
        self.bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
        Some(with(&bytes))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let bytes = self.packets.values().map(|packet| packet.len()).sum();
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_given_back_once_and_the_count_returns_to_zero() {
        let bytes = Arc::new(AtomicUsize::new(0));
        let mut held = Held::new(Arc::clone(&bytes));
        assert!(held.keep(PacketNumber(3), b"abc"));
        assert!(held.keep(PacketNumber(4), b"d"));
        assert_eq!(
            held.release(PacketNumber(3), <[u8]>::to_vec),
            Some(b"abc".to_vec())
        );
        assert_eq!(held.release(PacketNumber(3), <[u8]>::to_vec), None);
        assert_eq!(bytes.load(Ordering::Relaxed), 1);
        drop(held);
        assert_eq!(bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_exceeds_the_bound_is_refused() {
        let bytes = Arc::new(AtomicUsize::new(HELD_BYTES_MAX));
        let mut held = Held::new(Arc::clone(&bytes));
        assert!(!held.keep(PacketNumber(1), b"x"));
        assert_eq!(bytes.load(Ordering::Relaxed), HELD_BYTES_MAX);
    }
}
