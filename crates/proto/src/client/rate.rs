//! How fast the way to the server is, and how much may be under way on it.
//!
//! Two figures are measured: the shortest round trip, and the shortest interval at which packets
//! arrive. What the sender itself was too slow for says nothing about the way, so intervals expire
//! only in rounds in which the sender was held back. From both follows what may be under way (twice
//! what fills the way) and the pace. Loss by itself changes nothing: it is not what tells a full
//! queue from a bad wire. The model is that of BBR (Cardwell et al., ACM Queue 14(5), 2016).

use crate::time::{Instant, Micros};
use crate::units::PacketNumber;

/// Packets under way before anything is measured, and always.
const FLIGHT_MIN: u32 = 32;
/// What may be under way on top of what fills the way: so much time's packets, because servers
/// answer to several at once and a client that polls looks for replies only now and then; within
/// bounds.
const SLACK_TIME: Micros = Micros::from_millis(4);
const SLACK_MIN: u64 = 32;
const SLACK_MAX: u64 = 256;
/// Rounds after which a measured interval is forgotten, if it was not measured again.
const ROUNDS_KEPT: u32 = 8;
/// Time after which the shortest round trip is forgotten, if it was not measured again.
const ROUND_TRIP_KEPT: Micros = Micros::from_secs(10);
/// Packets that may leave at once although the pace says later: trains.
const TRAIN: u64 = 32;
/// The least time such a train stands for: the clock may be coarse and the caller slow.
const TRAIN_TIME: Micros = Micros::from_millis(1);
/// Rounds without a quarter's growth after which the way is taken to be full.
const ROUNDS_FULL: u32 = 3;
/// Pace in quarters of the measured rate, a round each: look for more, drain what that queued, keep.
const PACE: [u64; 8] = [5, 3, 4, 4, 4, 4, 4, 4];
/// How often what fills the way may be under way, until it is full and then.
const FILLS_START: u64 = 3;
const FILLS: u64 = 2;

/// Times a packet's interval is kept in: 1024ths of a microsecond.
const FINE: u32 = 10;
const NEVER: u64 = u64::MAX;

/// What a packet remembers of the moment it left.
#[derive(Clone, Copy)]
pub(super) struct Departure {
    at: Instant,
    /// Packets that had arrived then, modulo 2^32.
    arrived: u32,
    /// Microseconds since the last of them was told, and since that one had left.
    told_ago: u32,
    left_ago: u32,
}

impl Departure {
    pub(super) const NONE: Self = Self {
        at: Instant::from_micros(0),
        arrived: 0,
        told_ago: 0,
        left_ago: 0,
    };

    /// When it left.
    pub(super) const fn at(&self) -> Instant {
        self.at
    }
}

/// The smaller of what was measured in this span and in the one before.
#[derive(Clone, Copy)]
struct Least {
    now: u64,
    before: u64,
}

impl Least {
    const NOTHING: Self = Self {
        now: NEVER,
        before: NEVER,
    };

    fn add(&mut self, value: u64) {
        self.now = self.now.min(value);
    }

    const fn next_span(&mut self) {
        self.before = self.now;
        self.now = NEVER;
    }

    fn value(&self) -> u64 {
        self.now.min(self.before)
    }
}

/// The smoothed round trip and its deviation (RFC 6298).
#[derive(Clone, Copy)]
struct RoundTrip {
    smoothed: Micros,
    deviation: Micros,
}

/// Round trip, rate, and what follows from them.
pub(super) struct Rate {
    round_trip: Option<RoundTrip>,
    /// Shortest round trip in microseconds.
    shortest: Least,
    shortest_since: Instant,
    /// Interval between packets.
    interval: Least,
    interval_rounds: u32,
    /// Packets that have arrived, modulo 2^32; when the last of them was told, and when it had left.
    arrived: u32,
    told_at: Instant,
    left_at: Instant,
    /// The round ends when this packet arrives.
    round_end: PacketNumber,
    /// Whether the sender was held back since the round began.
    held_back: bool,
    /// Rounds so far without growth, and the interval they are compared with; `None` once the way
    /// was full.
    start: Option<(u32, u64)>,
    phase: usize,
    /// When the next packet is due by the pace, in 1024ths of a microsecond.
    due: u64,
    /// What follows from the figures until the next reply: divisions are too slow for each packet.
    flight: u32,
    pace: u64,
}

impl Rate {
    pub(super) const fn new() -> Self {
        Self {
            round_trip: None,
            shortest: Least::NOTHING,
            shortest_since: Instant::from_micros(0),
            interval: Least::NOTHING,
            interval_rounds: 0,
            arrived: 0,
            told_at: Instant::from_micros(0),
            left_at: Instant::from_micros(0),
            round_end: PacketNumber(0),
            held_back: false,
            start: Some((0, NEVER)),
            phase: 0,
            due: 0,
            flight: FLIGHT_MIN,
            pace: 0,
        }
    }

    /// The smoothed round trip, if one was measured.
    pub(super) fn smoothed(&self) -> Option<Micros> {
        self.round_trip.map(|round_trip| round_trip.smoothed)
    }

    /// How long an answer may take: the round trip and four deviations.
    pub(super) fn patience(&self) -> Option<Micros> {
        self.round_trip
            .map(|round_trip| round_trip.smoothed + round_trip.deviation.times(4))
    }

    /// Books a packet that leaves now, with nothing else under way if `alone`.
    pub(super) fn leaves(&mut self, now: Instant, alone: bool) -> Departure {
        if alone {
            self.told_at = now;
            self.left_at = now;
        }
        let train = self.pace.saturating_mul(TRAIN).max(fine(TRAIN_TIME));
        let earliest = fine_time(now).saturating_sub(train);
        self.due = self.due.max(earliest).saturating_add(self.pace);
        Departure {
            at: now,
            arrived: self.arrived,
            told_ago: short(now.since(self.told_at)),
            left_ago: short(now.since(self.left_at)),
        }
    }

    /// Whether one more packet may leave now, with `flying` packets under way. A sender that is
    /// held back is told until when by [`Self::due`].
    pub(super) fn lets(&mut self, now: Instant, flying: u32) -> bool {
        let lets = self.would_let(now, flying);
        self.held_back |= !lets;
        lets
    }

    /// The same, without a trace.
    pub(super) fn would_let(&self, now: Instant, flying: u32) -> bool {
        flying < self.flight && self.due <= fine_time(now)
    }

    /// When the pace lets the next packet go.
    pub(super) const fn due(&self) -> Instant {
        Instant::from_micros((self.due >> FINE).saturating_add(1))
    }

    /// A sample of the round trip.
    pub(super) fn round_trip(&mut self, now: Instant, sample: Micros) {
        if now.since(self.shortest_since) >= ROUND_TRIP_KEPT {
            self.shortest_since = now;
            self.shortest.next_span();
        }
        self.shortest.add(sample.get());
        self.round_trip = Some(match self.round_trip {
            None => RoundTrip {
                smoothed: sample,
                deviation: sample.shr(1),
            },
            Some(RoundTrip {
                smoothed,
                deviation,
            }) => {
                let error = (smoothed - sample) + (sample - smoothed);
                RoundTrip {
                    smoothed: smoothed - smoothed.shr(3) + sample.shr(3),
                    deviation: deviation - deviation.shr(2) + error.shr(2),
                }
            }
        });
    }

    /// A reply told of `fresh` arrivals; `latest` is what the one of them that left last remembers.
    /// Packets below `base` have all arrived, and the next one to leave is `next`.
    pub(super) fn arrivals(
        &mut self,
        now: Instant,
        fresh: u32,
        latest: &Departure,
        (base, next): (PacketNumber, PacketNumber),
    ) {
        self.arrived = self.arrived.wrapping_add(fresh);
        let packets = u64::from(self.arrived.wrapping_sub(latest.arrived));
        // Neither packets that left together nor replies that arrive together make the way faster.
        let left = Micros::new(latest.left_ago.into());
        let told = now.since(latest.at) + Micros::new(latest.told_ago.into());
        if let Some(interval) = fine(left.max(told)).checked_div(packets)
            && interval > 0
        {
            self.interval.add(interval);
        }
        self.told_at = now;
        self.left_at = latest.at;
        if base >= self.round_end {
            self.round_end = next;
            self.end_round();
        }
        self.flight = self.allowed_flight();
        self.pace = self.pace_interval();
    }

    fn end_round(&mut self) {
        if !core::mem::take(&mut self.held_back) {
            return;
        }
        let best = self.interval.value();
        if let Some((rounds, before)) = self.start {
            let grown = best.saturating_add(best >> 2) <= before;
            self.start = match (grown, rounds.saturating_add(1)) {
                (true, _) => Some((0, best)),
                (false, rounds) if rounds < ROUNDS_FULL => Some((rounds, before)),
                (false, _) => None,
            };
        } else {
            self.phase = if self.phase >= 7 {
                0
            } else {
                self.phase.saturating_add(1)
            };
        }
        self.interval_rounds = self.interval_rounds.saturating_add(1);
        if self.interval_rounds >= ROUNDS_KEPT {
            self.interval_rounds = 0;
            self.interval.next_span();
        }
    }

    /// Packets that may be under way.
    fn allowed_flight(&self) -> u32 {
        let (interval, shortest) = (self.interval.value(), self.shortest.value());
        if interval == NEVER || shortest == NEVER {
            return FLIGHT_MIN;
        }
        let times = if self.start.is_some() {
            FILLS_START
        } else {
            FILLS
        };
        let time = shortest.saturating_mul(times << FINE);
        let fills = time.checked_div(interval).unwrap_or(0);
        let slack = fine(SLACK_TIME).checked_div(interval).unwrap_or(0);
        let slack = slack.clamp(SLACK_MIN, SLACK_MAX);
        u32::try_from(fills.saturating_add(slack)).unwrap_or(u32::MAX)
    }

    /// Time between packets by the pace, in 1024ths of a microsecond; none until the way is full.
    fn pace_interval(&self) -> u64 {
        let interval = self.interval.value();
        if interval == NEVER || self.start.is_some() {
            return 0;
        }
        let quarters = PACE.get(self.phase).copied().unwrap_or(4);
        let paced = interval.saturating_mul(4).checked_div(quarters);
        // Never slower than a train a round trip: silence is no measure of the way.
        let slowest = fine(Micros::new(self.shortest.value())) >> TRAIN.ilog2();
        paced.unwrap_or(0).min(slowest)
    }
}

/// A duration in 1024ths of a microsecond.
const fn fine(duration: Micros) -> u64 {
    duration.get().saturating_mul(1 << FINE)
}

/// A time in 1024ths of a microsecond.
const fn fine_time(time: Instant) -> u64 {
    time.as_micros().saturating_mul(1 << FINE)
}

/// A duration in 32 bits of microseconds: longer ones do not matter.
fn short(duration: Micros) -> u32 {
    u32::try_from(duration.get()).unwrap_or(u32::MAX)
}
