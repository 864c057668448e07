//! One direction of a link: what becomes of a packet.

use std::collections::VecDeque;

use crate::counts::Counts;
use crate::options::LinkOptions;
use crate::random::Random;

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
    sent: usize,
    latest_us: u64,
    /// In a burst of losses.
    bad: bool,
    clogged_until_us: u64,
    cut_until_us: u64,
    /// When each packet that waits at the narrowest part has left it.
    queue: VecDeque<u64>,
    counts: Counts,
}

impl Link {
    /// A link whose first packets meet the fates of `script`, the others chance.
    #[must_use]
    pub fn new(options: LinkOptions, random: Random, script: Vec<Fate>) -> Self {
        Self {
            options,
            random,
            script,
            sent: 0,
            latest_us: 0,
            bad: false,
            clogged_until_us: 0,
            cut_until_us: 0,
            queue: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    /// What happened so far.
    #[must_use]
    pub const fn counts(&self) -> &Counts {
        &self.counts
    }

    /// From now on the link only delays.
    pub fn heal(&mut self) {
        self.options = LinkOptions {
            delay_us: self.options.delay_us,
            ..LinkOptions::CALM
        };
        self.bad = false;
        (self.clogged_until_us, self.cut_until_us) = (0, 0);
    }

    /// Sends `bytes` at `now_us` and returns the arrivals.
    pub fn send(&mut self, now_us: u64, bytes: &[u8]) -> Vec<Arrival> {
        let fate = self.script.get(self.sent).copied();
        self.sent += 1;
        self.counts.one("sent");
        let lost = match fate {
            Some(fate) => (fate == Fate::Drop).then_some("lost"),
            None => self.loss(now_us, bytes.len()),
        };
        if let Some(why) = lost {
            self.counts.one(why);
            self.counts.one("lost in all");
            return Vec::new();
        }
        let Some(begin_us) = self.narrow(now_us, bytes.len()) else {
            self.counts.one("queue full");
            self.counts.one("lost in all");
            return Vec::new();
        };
        let twice = match fate {
            Some(fate) => fate == Fate::Duplicate,
            None => self.random.chance(self.options.duplicate),
        };
        let mut arrivals = vec![self.arrival(begin_us, bytes, fate)];
        if twice {
            self.counts.one("duplicated");
            arrivals.push(self.arrival(begin_us, bytes, fate));
        }
        if fate.is_none() && self.random.chance(self.options.replay) {
            self.counts.one("replayed");
            let later_us = self.random.exponential(self.options.replay_us);
            arrivals.push(self.arrival(begin_us + later_us, bytes, fate));
        }
        let count = u64::try_from(arrivals.len()).unwrap_or(0);
        self.counts.add("arrivals", count);
        arrivals
    }

    /// Whether each packet that was sent arrived, or is counted as lost.
    pub fn check(&self) -> Result<(), String> {
        let [sent, lost, twice, replayed, arrivals] =
            ["sent", "lost in all", "duplicated", "replayed", "arrivals"]
                .map(|name| self.counts.get(name));
        if sent + twice + replayed == arrivals + lost {
            return Ok(());
        }
        Err(format!(
            "a loss was not counted: {sent} sent, {twice} duplicated, {replayed} replayed, \
             {arrivals} arrived, {lost} lost"
        ))
    }

    /// Why a packet is lost, if it is.
    fn loss(&mut self, now_us: u64, length: usize) -> Option<&'static str> {
        let LinkOptions {
            deaf_us,
            mtu_bytes,
            cut,
            cut_us,
            burst,
            burst_packets,
            loss,
            ..
        } = self.options;
        if self.random.chance(cut) && now_us >= self.cut_until_us {
            self.cut_until_us = now_us + cut_us;
            self.counts.one("cuts");
        }
        if self.bad {
            self.bad = self.random.below(burst_packets.max(1)) != 0;
        } else if self.random.chance(burst) {
            self.bad = true;
            self.counts.one("bursts");
        }
        let long = mtu_bytes > 0 && u64::try_from(length).unwrap_or(0) > mtu_bytes;
        if now_us < deaf_us {
            Some("no neighbour")
        } else if now_us < self.cut_until_us {
            Some("cut off")
        } else if long {
            Some("over the MTU")
        } else if self.bad && self.random.chance(800) {
            Some("lost in bursts")
        } else {
            self.random.chance(loss).then_some("lost")
        }
    }

    /// When a packet has passed the narrowest part; `None` if its queue is full.
    fn narrow(&mut self, now_us: u64, length: usize) -> Option<u64> {
        let LinkOptions {
            rate,
            queue_packets,
            ..
        } = self.options;
        if rate == 0 {
            return Some(now_us);
        }
        while self.queue.front().is_some_and(|left| *left <= now_us) {
            self.queue.pop_front();
        }
        if u64::try_from(self.queue.len()).unwrap_or(0) >= queue_packets {
            return None;
        }
        let begin_us = self.queue.back().map_or(now_us, |left| (*left).max(now_us));
        let end_us = begin_us + u64::try_from(length).unwrap_or(0) * 1000 / rate;
        self.queue.push_back(end_us);
        if end_us > now_us {
            self.counts.one("queued");
        }
        Some(end_us)
    }

    fn arrival(&mut self, begin_us: u64, bytes: &[u8], fate: Option<Fate>) -> Arrival {
        let mut bytes = bytes.to_vec();
        let mut at_us = begin_us + self.options.delay_us;
        match fate {
            Some(Fate::Delay) => at_us += 3000,
            Some(Fate::Deliver | Fate::Drop | Fate::Duplicate) => {}
            None => {
                if self.options.jitter_us > 0 {
                    at_us += self.random.exponential(self.options.jitter_us);
                }
                if self.random.chance(self.options.clog) {
                    self.clogged_until_us = self.clogged_until_us.max(at_us + self.options.clog_us);
                    self.counts.one("clogs");
                }
                if at_us < self.clogged_until_us {
                    at_us = self.clogged_until_us;
                    self.counts.one("clogged");
                }
                self.damage(&mut bytes);
            }
        }
        if at_us < self.latest_us {
            self.counts.one("overtaking");
        }
        self.latest_us = self.latest_us.max(at_us);
        Arrival { at_us, bytes }
    }

    fn damage(&mut self, bytes: &mut Vec<u8>) {
        let length = u64::try_from(bytes.len()).unwrap_or(0);
        if length == 0 {
            return;
        }
        if self.random.chance(self.options.corrupt) {
            let bit = self.random.below(length * 8);
            bytes[usize::try_from(bit / 8).unwrap_or(0)] ^= 1 << (bit % 8);
            self.counts.one("corrupted");
        }
        if self.random.chance(self.options.truncate) {
            bytes.truncate(usize::try_from(self.random.below(length)).unwrap_or(0));
            self.counts.one("truncated");
        }
    }
}
