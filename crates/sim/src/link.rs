//! One direction of the link: what becomes of a packet, and counts that prove that each fault
//! really happened.

use crate::options::LinkOptions;
use crate::random::Random;

/// What happened on one direction so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounts {
    /// Packets given to the link.
    pub sent: u64,
    /// Packets that vanished.
    pub lost: u64,
    /// Packets that arrived twice.
    pub duplicated: u64,
    /// Packets with a flipped bit.
    pub corrupted: u64,
    /// Packets cut short.
    pub truncated: u64,
    /// Packets that arrive before one that was sent earlier.
    pub overtaking: u64,
}

/// What a test script does to one packet, in place of chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It arrives after the usual delay.
    Deliver,
    /// It vanishes.
    Drop,
    /// It arrives twice.
    Duplicate,
    /// It arrives late enough to be overtaken by the next few.
    Delay,
}

/// A packet on its way: when it arrives, and as what.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Simulated time in microseconds.
    pub at_us: u64,
    /// The bytes that arrive.
    pub bytes: Vec<u8>,
}

/// One direction.
#[derive(Clone, Debug)]
pub struct Link {
    options: LinkOptions,
    random: Random,
    script: Vec<Fate>,
    latest_us: u64,
    counts: LinkCounts,
}

impl Link {
    /// A link whose first packets meet the fates of `script`, the others chance.
    #[must_use]
    pub fn new(options: LinkOptions, random: Random, script: Vec<Fate>) -> Self {
        Self {
            options,
            random,
            script,
            latest_us: 0,
            counts: LinkCounts::default(),
        }
    }

    /// What happened so far.
    #[must_use]
    pub const fn counts(&self) -> &LinkCounts {
        &self.counts
    }

    /// Sends `bytes` at `now_us` and returns the arrivals: none, one or two.
    pub fn send(&mut self, now_us: u64, bytes: &[u8]) -> Vec<Arrival> {
        let position = usize::try_from(self.counts.sent).unwrap_or(usize::MAX);
        let fate = self.script.get(position).copied();
        self.counts.sent += 1;
        let lost = match fate {
            Some(fate) => fate == Fate::Drop,
            None => self.random.chance(self.options.loss_permille),
        };
        if lost {
            self.counts.lost += 1;
            return Vec::new();
        }
        let twice = match fate {
            Some(fate) => fate == Fate::Duplicate,
            None => self.random.chance(self.options.duplicate_permille),
        };
        self.counts.duplicated += u64::from(twice);
        let copies = if twice { 2 } else { 1 };
        (0..copies)
            .map(|_| self.arrival(now_us, bytes, fate))
            .collect()
    }

    fn arrival(&mut self, now_us: u64, bytes: &[u8], fate: Option<Fate>) -> Arrival {
        let mut bytes = bytes.to_vec();
        let mut delay = self.options.delay_us;
        match fate {
            Some(Fate::Delay) => delay += 3000,
            Some(_) => {}
            None => {
                if self.options.jitter_us > 0 {
                    delay += self.random.exponential(self.options.jitter_us);
                }
                self.damage(&mut bytes);
            }
        }
        let at_us = now_us + delay;
        self.counts.overtaking += u64::from(at_us < self.latest_us);
        self.latest_us = self.latest_us.max(at_us);
        Arrival { at_us, bytes }
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        let length = u64::try_from(bytes.len()).unwrap_or(0);
        if length == 0 {
            return;
        }
        if self.random.chance(self.options.corrupt_permille) {
            let bit = self.random.below(length * 8);
            bytes[usize::try_from(bit / 8).unwrap_or(0)] ^= 1 << (bit % 8);
            self.counts.corrupted += 1;
        }
        if self.random.chance(self.options.truncate_permille) {
            bytes.truncate(usize::try_from(self.random.below(length)).unwrap_or(0));
            self.counts.truncated += 1;
        }
    }
}
