//! One direction of the wire, and what goes wrong on it.
//!
//! A frame meets the faults in this order: lost, one bit flipped, cut short, doubled, held back
//! until others have overtaken it, delayed. Each is decided by the same seeded sequence, so a seed
//! gives the same faults to the same sequence of frames; each is counted when it has happened.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::frame::Format;
use crate::pattern;

/// What goes wrong on the wire, the same in both directions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Frames lost out of a hundred.
    pub loss_percent: f64,
    /// Frames that arrive twice.
    pub duplicate_percent: f64,
    /// Frames that others overtake.
    pub reorder_percent: f64,
    /// Frames in which one bit changes behind the hardware addresses.
    pub corrupt_percent: f64,
    /// Frames that end early: half of them in the middle of a packet, half as whole but shorter
    /// datagrams.
    pub truncate_percent: f64,
    /// What each frame takes from one end to the other.
    pub delay: Duration,
    /// The same seed does the same to the same sequence of frames.
    pub seed: u64,
}

impl Faults {
    /// Whether frames may be lost, changed, doubled or put out of order.
    #[must_use]
    pub fn is_some(self) -> bool {
        let Self {
            loss_percent,
            duplicate_percent,
            reorder_percent,
            corrupt_percent,
            truncate_percent,
            ..
        } = self;
        let all = [
            loss_percent,
            duplicate_percent,
            reorder_percent,
            corrupt_percent,
            truncate_percent,
        ];
        all.into_iter().any(|percent| percent > 0.0)
    }
}

/// What has gone wrong so far; the wire's thread writes, everybody reads.
#[derive(Debug, Default)]
pub struct Mishaps {
    /// Frames lost.
    pub lost: AtomicU64,
    /// Frames that arrived twice.
    pub duplicated: AtomicU64,
    /// Frames that arrived after at least one that had been sent later.
    pub reordered: AtomicU64,
    /// Frames with a wrong bit.
    pub corrupted: AtomicU64,
    /// Frames cut short.
    pub truncated: AtomicU64,
    /// Frames that were on their way for the delay.
    pub delayed: AtomicU64,
}

/// A frame is overtaken by as many as this: more than the client takes for granted.
const OVERTAKING_MAX: u64 = 32;
/// If so many do not come, it is held back for this long.
const HELD_MAX: Duration = Duration::from_millis(20);
/// Behind this begins what may go wrong: hardware addresses are compared before all else, and a
/// wrong one is a loss.
const ADDRESSES: usize = 12;

/// One direction.
#[derive(Debug)]
pub struct Road {
    faults: Faults,
    format: Format,
    state: u64,
    held: Vec<Held>,
    /// What is on its way, and when it arrives; in order, because the delay is always the same.
    travelling: VecDeque<(Instant, Vec<u8>)>,
    mishaps: Arc<Mishaps>,
}

#[derive(Debug)]
struct Held {
    frame: Vec<u8>,
    until: Instant,
    /// How many must still overtake it, and how many have.
    waits_for: u64,
    overtaken_by: u64,
}

impl Road {
    /// An empty road for frames of `format`; directions of different numbers roll different dice.
    #[must_use]
    pub fn new(faults: Faults, format: Format, direction: u64, mishaps: Arc<Mishaps>) -> Self {
        Self {
            faults,
            format,
            state: pattern::mix(faults.seed ^ (direction << 63)),
            held: Vec::new(),
            travelling: VecDeque::new(),
            mishaps,
        }
    }

    /// Takes a frame at one end. What arrives at the other end at once is added to `arrived`; the
    /// rest comes with [`Road::leave`].
    pub fn enter<'a>(&mut self, now: Instant, frame: &'a [u8], arrived: &mut Vec<Cow<'a, [u8]>>) {
        let faults = self.faults;
        if self.rolls(faults.loss_percent) {
            count(&self.mishaps.lost);
            return;
        }
        let mut frame = Cow::Borrowed(frame);
        if self.rolls(faults.corrupt_percent) {
            self.corrupt(frame.to_mut());
        }
        if self.rolls(faults.truncate_percent) {
            self.truncate(frame.to_mut());
        }
        if self.rolls(faults.duplicate_percent) {
            count(&self.mishaps.duplicated);
            self.arrange(now, frame.clone(), arrived);
        }
        self.arrange(now, frame, arrived);
    }

    /// Adds to `arrived` what is due at `now`.
    pub fn leave(&mut self, now: Instant, arrived: &mut Vec<Cow<'_, [u8]>>) {
        let due = |held: &mut Held| held.until <= now;
        for held in self.held.extract_if(.., due).collect::<Vec<_>>() {
            self.release(now, held, arrived);
        }
        while let Some((_, frame)) = self.travelling.pop_front_if(|(at, _)| *at <= now) {
            arrived.push(Cow::Owned(frame));
        }
    }

    /// When [`Road::leave`] will have something.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let held = self.held.iter().map(|held| held.until);
        held.chain(self.travelling.front().map(|(at, _)| *at)).min()
    }

    /// Holds a frame back or lets it go; what goes overtakes what is held.
    fn arrange<'a>(
        &mut self,
        now: Instant,
        frame: Cow<'a, [u8]>,
        arrived: &mut Vec<Cow<'a, [u8]>>,
    ) {
        if self.rolls(self.faults.reorder_percent) {
            let waits_for = 1 + self.random() % OVERTAKING_MAX;
            self.held.push(Held {
                frame: frame.into_owned(),
                until: now + HELD_MAX,
                waits_for,
                overtaken_by: 0,
            });
            return;
        }
        self.travel(now, frame, arrived);
        for held in &mut self.held {
            held.overtaken_by += 1;
        }
        let enough = |held: &mut Held| held.overtaken_by >= held.waits_for;
        for held in self.held.extract_if(.., enough).collect::<Vec<_>>() {
            self.release(now, held, arrived);
        }
    }

    fn release(&mut self, now: Instant, held: Held, arrived: &mut Vec<Cow<'_, [u8]>>) {
        if held.overtaken_by > 0 {
            count(&self.mishaps.reordered);
        }
        self.travel(now, Cow::Owned(held.frame), arrived);
    }

    fn travel<'a>(&mut self, now: Instant, frame: Cow<'a, [u8]>, arrived: &mut Vec<Cow<'a, [u8]>>) {
        if self.faults.delay.is_zero() {
            arrived.push(frame);
        } else {
            count(&self.mishaps.delayed);
            let at = now + self.faults.delay;
            self.travelling.push_back((at, frame.into_owned()));
        }
    }

    fn corrupt(&mut self, frame: &mut [u8]) {
        let Some(behind) = frame.get_mut(ADDRESSES..).filter(|rest| !rest.is_empty()) else {
            return;
        };
        let bit = self.below(behind.len() * 8);
        behind[bit / 8] ^= 1 << (bit % 8);
        count(&self.mishaps.corrupted);
    }

    fn truncate(&mut self, frame: &mut Vec<u8>) {
        let payload = frame.len().saturating_sub(self.format.header_bytes());
        let keep = self.below(payload.max(1));
        let whole = self.random().is_multiple_of(2);
        if !whole || !self.format.shorten(frame, keep) {
            let keep = self.below(frame.len().max(1)).max(ADDRESSES);
            frame.truncate(keep);
        }
        count(&self.mishaps.truncated);
    }

    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        pattern::mix(self.state)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.random() % bound as u64).unwrap_or(0)
    }

    fn rolls(&mut self, percent: f64) -> bool {
        // What never happens costs no number, so that adding a kind of fault does not change runs
        // without it.
        percent > 0.0 && self.below(PARTS) < parts(percent)
    }
}

/// Probabilities are rounded to this fraction.
const PARTS: usize = 100_000_000;

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a percentage is from 0 to 100, so the parts are from 0 to PARTS"
)]
fn parts(percent: f64) -> usize {
    (percent * 1e6) as usize
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Frame;
    use crate::frame::tests::datagram;

    fn road(faults: Faults) -> (Road, Arc<Mishaps>) {
        let mishaps = Arc::new(Mishaps::default());
        let road = Road::new(faults, Format::default(), 0, Arc::clone(&mishaps));
        (road, mishaps)
    }

    /// Sends `number` numbered datagrams, all at one time, and waits for what is late.
    fn run(faults: Faults, number: u32) -> (Vec<Vec<u8>>, Arc<Mishaps>) {
        let (mut road, mishaps) = road(faults);
        let start = Instant::now();
        let frames: Vec<Vec<u8>> = (0..number)
            .map(|at| datagram(Format::default(), &at.to_be_bytes()))
            .collect();
        let mut arrived = Vec::new();
        for frame in &frames {
            road.enter(start, frame, &mut arrived);
        }
        while let Some(due) = road.due() {
            road.leave(due, &mut arrived);
        }
        (arrived.into_iter().map(Cow::into_owned).collect(), mishaps)
    }

    fn numbers(frames: &[Vec<u8>]) -> Vec<u32> {
        let read = |frame: &Vec<u8>| {
            let Frame::Udp { payload, .. } = Format::default().parse(frame) else {
                panic!("no datagram")
            };
            u32::from_be_bytes(frame[payload].try_into().unwrap())
        };
        frames.iter().map(read).collect()
    }

    /// Within five standard deviations of `percent` of 20,000.
    fn often(counter: &AtomicU64, percent: f64) {
        let (seen, expected) = (counter.load(Ordering::Relaxed) as f64, 200.0 * percent);
        let deviation = (expected * (1.0 - percent / 100.0)).sqrt();
        assert!(
            (seen - expected).abs() < 5.0 * deviation,
            "{seen} of {expected}"
        );
    }

    #[test]
    fn without_faults_everything_arrives_once_in_order() {
        let (frames, _) = run(Faults::default(), 1000);
        assert_eq!(numbers(&frames), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn loss_and_duplication_happen_as_often_as_asked() {
        let faults = Faults {
            loss_percent: 0.5,
            duplicate_percent: 2.0,
            seed: 7,
            ..Faults::default()
        };
        let (frames, mishaps) = run(faults, 20_000);
        often(&mishaps.lost, 0.5);
        often(&mishaps.duplicated, 2.0);
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let expected = 20_000 - count(&mishaps.lost) + count(&mishaps.duplicated);
        assert_eq!(frames.len() as u64, expected);
    }

    #[test]
    fn reordering_really_reorders_and_loses_nothing() {
        let faults = Faults {
            reorder_percent: 3.0,
            seed: 1,
            ..Faults::default()
        };
        let (frames, mishaps) = run(faults, 20_000);
        let mut numbers = numbers(&frames);
        let late = {
            let mut newest = 0;
            let late = |number: &&u32| {
                let is_late = **number < newest;
                newest = newest.max(**number);
                is_late
            };
            numbers.iter().filter(late).count() as u64
        };
        assert_eq!(late, mishaps.reordered.load(Ordering::Relaxed));
        often(&mishaps.reordered, 3.0);
        numbers.sort_unstable();
        assert_eq!(numbers, (0..20_000).collect::<Vec<_>>());
    }

    #[test]
    fn corrupted_frames_differ_by_one_bit_and_truncated_ones_are_shorter() {
        let original = datagram(Format::default(), &[0; 100]);
        for (corrupt_percent, truncate_percent) in [(100.0, 0.0), (0.0, 100.0)] {
            let (mut road, mishaps) = road(Faults {
                corrupt_percent,
                truncate_percent,
                seed: 3,
                ..Faults::default()
            });
            let mut whole = 0;
            for _ in 0..1000 {
                let mut arrived = Vec::new();
                road.enter(Instant::now(), &original, &mut arrived);
                let frame = &arrived[0];
                assert_eq!(frame[..ADDRESSES], original[..ADDRESSES]);
                if truncate_percent > 0.0 {
                    assert!(frame.len() < original.len());
                    let datagram = matches!(Format::default().parse(frame), Frame::Udp { .. });
                    whole += u32::from(datagram);
                    continue;
                }
                let pairs = frame.iter().zip(&original);
                assert_eq!(pairs.map(|(a, b)| (a ^ b).count_ones()).sum::<u32>(), 1);
            }
            if truncate_percent > 0.0 {
                assert!((400..600).contains(&whole), "{whole} of 1000");
                assert_eq!(mishaps.truncated.load(Ordering::Relaxed), 1000);
            } else {
                assert_eq!(mishaps.corrupted.load(Ordering::Relaxed), 1000);
            }
        }
    }

    #[test]
    fn the_delay_is_exact_and_keeps_the_order() {
        let delay = Duration::from_micros(100);
        let (mut road, mishaps) = road(Faults {
            delay,
            ..Faults::default()
        });
        let start = Instant::now();
        let (first, second) = (
            datagram(Format::default(), b"1"),
            datagram(Format::default(), b"2"),
        );
        let mut arrived = Vec::new();
        road.enter(start, &first, &mut arrived);
        road.enter(start + Duration::from_micros(10), &second, &mut arrived);
        assert!(arrived.is_empty());
        assert_eq!(road.due(), Some(start + delay));
        road.leave(start + delay, &mut arrived);
        assert_eq!(arrived, [&first[..]]);
        road.leave(start + Duration::from_micros(110), &mut arrived);
        assert_eq!(arrived, [&first[..], &second[..]]);
        assert_eq!(
            (road.due(), mishaps.delayed.load(Ordering::Relaxed)),
            (None, 2)
        );
    }

    #[test]
    fn a_seed_repeats_and_directions_differ() {
        let faults = Faults {
            loss_percent: 50.0,
            ..Faults::default()
        };
        let fate = |seed, direction| {
            let faults = Faults { seed, ..faults };
            let mut road = Road::new(faults, Format::default(), direction, Arc::default());
            std::array::from_fn::<usize, 64, _>(|_| {
                let mut arrived = Vec::new();
                road.enter(Instant::now(), &[0; 60], &mut arrived);
                arrived.len()
            })
        };
        assert_eq!(fate(1, 0), fate(1, 0));
        assert_ne!(fate(1, 0), fate(1, 1));
        assert_ne!(fate(1, 0), fate(2, 0));
    }
}
