//! The network card: transmit buffers that it owns until it has sent them, and a ring that fills.

use std::collections::VecDeque;

use proto::client::Pool;
use proto::wire::DATAGRAM_BYTES_MIN;

use crate::options::HostOptions;

/// The card and the engine's buffers.
pub(super) struct Card {
    pub(super) now_us: u64,
    /// Each buffer, and when the card gives it back.
    buffers: Vec<(Vec<u8>, u64)>,
    /// When each packet in the transmit ring will have left it.
    ring: VecDeque<u64>,
    ring_slots: u64,
    nic_us: u64,
}

impl Card {
    pub(super) fn new(options: &HostOptions) -> Self {
        let least = u64::try_from(DATAGRAM_BYTES_MIN).unwrap_or(0);
        let bytes = usize::try_from(options.datagram_bytes.max(least)).unwrap_or(0);
        let slots = usize::try_from(options.pool_slots.max(1)).unwrap_or(0);
        Self {
            now_us: 0,
            buffers: vec![(vec![0; bytes], 0); slots],
            ring: VecDeque::new(),
            ring_slots: options.ring_slots,
            nic_us: options.nic_us,
        }
    }

    pub(super) fn slots(&self) -> u16 {
        u16::try_from(self.buffers.len()).unwrap_or(u16::MAX)
    }

    /// Queues a buffer; returns when there was room for it in the ring, and its bytes.
    pub(super) fn send(
        &mut self,
        now_us: u64,
        slot: u16,
        len: usize,
    ) -> Result<(u64, Vec<u8>), String> {
        while self.ring.front().is_some_and(|left| *left <= now_us) {
            self.ring.pop_front();
        }
        let full = self.ring_slots > 0
            && u64::try_from(self.ring.len()).unwrap_or(u64::MAX) >= self.ring_slots;
        let leaves_us = match self.ring.pop_front() {
            Some(room_us) if full => room_us,
            Some(first) => {
                self.ring.push_front(first);
                now_us
            }
            None => now_us,
        };
        let (buffer, free_us) = &mut self.buffers[usize::from(slot)];
        if *free_us > now_us {
            return Err(format!("slot {slot} was sent while the card owned it"));
        }
        *free_us = leaves_us + self.nic_us;
        self.ring.push_back(*free_us);
        Ok((leaves_us, buffer[..len].to_vec()))
    }
}

impl Pool for Card {
    fn buffer(&mut self, slot: u16) -> Option<&mut [u8]> {
        let (buffer, free_us) = &mut self.buffers[usize::from(slot)];
        (*free_us <= self.now_us).then_some(&mut buffer[..])
    }
}
