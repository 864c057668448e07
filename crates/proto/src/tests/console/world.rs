//! One host, one server, and a link between them that does what the seed says.

use std::collections::{BTreeMap, VecDeque};
use std::string::String;
use std::vec;
use std::vec::Vec;
use std::{format, println};

use super::super::Random;
use crate::console::{
    Caller, Client, Clock, Entry, LOG_REPLY_BYTES_MAX, Log, LogReply, RECORDS_BURST, Range, Reason,
    RecordHead, Ring, RingRead, Server, Setup, Step, Taken,
};
use crate::keys::{Secret, SessionKeys};
use crate::time::{Instant, Micros};
use crate::units::{ArmingId, KeyId, PacketNumber, SessionId};
use crate::wire::{Header, Kind, open_client, seal_server};

const SESSION: SessionId = SessionId {
    key: KeyId(1),
    arming: ArmingId(2),
};
const TICK: Micros = Micros::from_millis(5);
const LEVEL: u8 = 6;

fn keys() -> SessionKeys {
    Secret([3; 32]).log_keys(SESSION)
}

fn text(sequence: u64) -> String {
    let filler = "x".repeat((sequence.wrapping_mul(2_654_435_761) % 200) as usize);
    format!("record {sequence} {filler}")
}

fn level(sequence: u64) -> u8 {
    (sequence % 8) as u8
}

/// A ring buffer that holds its newest `room` records.
struct Printed {
    end: u64,
    room: u64,
}

impl Ring for Printed {
    fn oldest(&mut self) -> u64 {
        self.end.saturating_sub(self.room)
    }

    fn read(&mut self, sequence: u64, room: &mut [u8]) -> RingRead {
        if sequence >= self.end {
            return RingRead::NotYet;
        }
        if sequence < self.oldest() {
            return RingRead::Overwritten;
        }
        let text = text(sequence);
        for (to, from) in room.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        RingRead::Record {
            head: RecordHead {
                time_us: sequence,
                level: level(sequence),
                facility: 0,
                caller: Caller::Task(1),
                continued: false,
                cut: false,
            },
            text: text.len(),
            dictionary: 0,
        }
    }
}

/// What the link does to a datagram, in percent.
#[derive(Clone, Copy)]
struct Faults {
    lose: u64,
    double: u64,
    delay: u64,
}

struct Link {
    faults: Faults,
    under_way: Vec<(Instant, Vec<u8>)>,
}

impl Link {
    fn send(&mut self, random: &mut Random, now: Instant, datagram: &[u8]) {
        let mut copies = u64::from(random.below(100) >= self.faults.lose);
        copies += u64::from(random.below(100) < self.faults.double);
        for _ in 0..copies {
            let mut delay = 200 + random.below(400);
            if random.below(100) < self.faults.delay {
                delay += random.below(60_000);
            }
            let at = now + Micros::new(delay);
            self.under_way.push((at, datagram.to_vec()));
        }
    }

    fn arrived(&mut self, now: Instant) -> Vec<Vec<u8>> {
        let (due, later) = std::mem::take(&mut self.under_way)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        self.under_way = later;
        let mut due: Vec<(Instant, Vec<u8>)> = due;
        due.sort_by_key(|(at, _)| *at);
        due.into_iter().map(|(_, datagram)| datagram).collect()
    }
}

/// What the server has on its disk, and its process.
struct Site {
    server: Server,
    incarnation: u8,
    replies: u64,
    kept: BTreeMap<u64, Vec<u8>>,
    /// Sequence number and text; in the order they were written.
    written: Vec<(u64, String)>,
    skipped: Vec<(Range, Reason)>,
    lost: Vec<Range>,
    /// Where the log on disk begins.
    begins: Option<u64>,
    crash_seen: bool,
}

impl Site {
    fn write(&mut self, now: Instant, payload: &[u8], from: u64) {
        let log = Log::decode(payload).expect("a genuine datagram is legal");
        self.crash_seen |= log.head.crash;
        for entry in log.entries() {
            let covers = entry.covers();
            if covers.end <= from {
                continue;
            }
            match entry {
                Entry::Record(sequence, record) => {
                    let text = String::from_utf8(record.text.to_vec()).expect("our own text");
                    self.written.push((sequence, text));
                }
                Entry::Skip(range, reason) => {
                    let first = range.first.max(from);
                    let end = range.end;
                    self.skipped.push((Range { first, end }, reason));
                }
            }
        }
        self.server.written(now, self.server.next());
    }

    fn release(&mut self, now: Instant) {
        while let Some((first, payload)) = self.kept.pop_first() {
            let head = Log::decode(&payload).expect("was legal").head;
            match self.server.release(now, &head) {
                Some(from) => self.write(now, &payload, from),
                None => {
                    self.kept.insert(first, payload);
                    break;
                }
            }
        }
    }

    fn receive(&mut self, now: Instant, datagram: &mut [u8]) {
        let header = Header::parse(datagram).expect("ours");
        assert_eq!(header.kind, Kind::Log);
        let payload = open_client(&keys().client, &header, datagram).expect("genuine");
        let head = Log::decode(payload).expect("legal").head;
        match self.server.handle(now, &head) {
            Taken::Write(from) => {
                let begin = self.begins.get_or_insert(from);
                *begin = from.min(*begin);
                self.write(now, payload, from);
                self.release(now);
            }
            Taken::Keep => {
                self.kept.insert(head.covers.first, payload.to_vec());
            }
            Taken::Known | Taken::NoRoom => {}
        }
    }

    fn tick(&mut self, now: Instant) -> Option<Vec<u8>> {
        if let Some(lost) = self.server.give_up(now) {
            self.lost.push(lost);
            self.release(now);
            self.server.written(now, self.server.next());
        }
        let reply = self.server.reply(now)?;
        Some(self.seal(&reply))
    }

    fn seal(&mut self, reply: &LogReply) -> Vec<u8> {
        let mut datagram = vec![0; LOG_REPLY_BYTES_MAX];
        let payload = reply.encode(&mut datagram).expect("fits");
        let header = Header {
            kind: Kind::LogReply,
            attempt: 0,
            session: SESSION,
            number: PacketNumber(self.replies),
        };
        self.replies += 1;
        let incarnation = [self.incarnation; 16];
        let length = seal_server(
            &keys().server,
            &header,
            &incarnation,
            &mut datagram,
            payload,
        );
        datagram.truncate(length.expect("fits"));
        datagram
    }

    /// Another process, which finds what was written.
    fn restart(&mut self) {
        self.server = Server::new(self.begins.map(|_| self.server.next()));
        self.incarnation += 1;
        self.replies = 0;
        self.kept.clear();
    }
}

struct World {
    now: Instant,
    random: Random,
    client: Client,
    ring: Printed,
    up: Link,
    down: Link,
    site: Site,
    sent: u64,
}

impl World {
    fn new(seed: u64, faults: Faults) -> Self {
        let now = Instant::from_micros(1_000_000);
        let link = || Link {
            faults,
            under_way: Vec::new(),
        };
        Self {
            now,
            random: Random(seed * 2 + 1),
            client: Client::new(setup(), now),
            ring: Printed { end: 40, room: 600 },
            up: link(),
            down: link(),
            site: Site {
                server: Server::new(None),
                incarnation: 1,
                replies: 0,
                kept: BTreeMap::new(),
                written: Vec::new(),
                skipped: Vec::new(),
                lost: Vec::new(),
                begins: None,
                crash_seen: false,
            },
            sent: 0,
        }
    }

    fn step(&mut self, server_up: bool) {
        self.now = self.now + TICK;
        let clock = Clock::default();
        let mut buffer = vec![0; 1400];
        for _ in 0..64 {
            match self
                .client
                .poll(self.now, clock, &mut self.ring, &mut buffer)
            {
                Step::Send(bytes) => {
                    self.sent += 1;
                    self.up.send(&mut self.random, self.now, &buffer[..bytes]);
                }
                Step::Wait(_) => break,
            }
        }
        for mut datagram in self.up.arrived(self.now) {
            if server_up {
                self.site.receive(self.now, &mut datagram);
            }
        }
        if server_up && let Some(reply) = self.site.tick(self.now) {
            self.down.send(&mut self.random, self.now, &reply);
        }
        for mut datagram in self.down.arrived(self.now) {
            // Doubled replies are refused; nothing else is wrong with any.
            let taken = self.client.handle(self.now, &mut datagram);
            assert!(
                matches!(taken, Ok(()) | Err(crate::wire::Reject::Stale)),
                "{taken:?}"
            );
        }
    }

    fn settle(&mut self) {
        let quiet = Faults {
            lose: 0,
            double: 0,
            delay: 0,
        };
        self.up.faults = quiet;
        self.down.faults = quiet;
        for _ in 0..6000 {
            self.step(true);
            if self.client.is_settled() && self.site.server.next() == self.ring.end {
                return;
            }
        }
        panic!(
            "not settled: {} of {} written, acknowledged {}",
            self.site.server.next(),
            self.ring.end,
            self.client.acked()
        );
    }

    /// Every sequence number once, in order: as its own text, as skipped or as lost.
    fn judge(&self) -> u64 {
        let mut said: VecDeque<(Range, Option<&str>)> = VecDeque::new();
        let one = |first: u64| Range {
            first,
            end: first + 1,
        };
        said.extend(
            self.site
                .written
                .iter()
                .map(|(at, text)| (one(*at), Some(text.as_str()))),
        );
        said.extend(self.site.skipped.iter().map(|(range, _)| (*range, None)));
        said.extend(self.site.lost.iter().map(|range| (*range, None)));
        said.make_contiguous().sort_by_key(|(range, _)| range.first);
        let mut next = self.site.begins.unwrap_or(0);
        for (range, printed) in said {
            assert_eq!(range.first, next, "a hole or a double");
            next = range.end;
            if let Some(printed) = printed {
                assert_eq!(printed, text(range.first));
                assert!(level(range.first) <= LEVEL);
            }
        }
        assert_eq!(next, self.ring.end);
        assert!(self.site.written.is_sorted(), "written in order");
        self.site.lost.iter().map(|range| range.count()).sum()
    }
}

fn setup() -> Setup {
    Setup {
        session: SESSION,
        keys: keys(),
        boot: [8; 16],
        level: LEVEL,
    }
}

fn overwritten(world: &World) -> u64 {
    let skips = world.site.skipped.iter();
    let gone = skips.filter(|(_, reason)| *reason == Reason::Overwritten);
    gone.map(|(range, _)| range.count()).sum()
}

#[test]
fn resending_closes_every_gap() {
    for seed in 0..60 {
        let faults = Faults {
            lose: 5 + seed % 3 * 10,
            double: 5,
            delay: 10,
        };
        let mut world = World::new(seed, faults);
        for _ in 0..600 {
            world.ring.end += world.random.below(4) / 2;
            world.step(true);
        }
        world.settle();
        assert_eq!(world.judge(), 0, "seed {seed}: lost");
        assert_eq!(overwritten(&world), 0, "seed {seed}: overwritten");
    }
}

#[test]
fn a_storm_is_sent_as_far_as_the_ring_buffer_holds_it() {
    let mut world = World::new(
        1,
        Faults {
            lose: 2,
            double: 2,
            delay: 5,
        },
    );
    for _ in 0..400 {
        world.ring.end += 150;
        world.step(true);
    }
    world.settle();
    world.judge();
    let gone = overwritten(&world);
    println!("{} printed, {gone} overwritten", world.ring.end);
    assert!(gone > 0, "the rate is limited");
    let written = world.site.written.len() as u64;
    assert!(written > RECORDS_BURST / 2, "{written} written");
}

#[test]
fn a_server_that_was_away_gets_what_is_left() {
    for seed in 0..20 {
        let mut world = World::new(
            seed,
            Faults {
                lose: 5,
                double: 0,
                delay: 5,
            },
        );
        let mut up = true;
        for _ in 0..30 {
            if world.random.below(3) == 0 {
                up = !up;
                if up {
                    world.site.restart();
                }
            }
            for _ in 0..40 {
                world.ring.end += world.random.below(2);
                world.step(up);
            }
        }
        world.settle();
        assert_eq!(world.judge(), 0, "seed {seed}: lost");
    }
}

#[test]
fn a_silent_server_is_asked_now_and_then() {
    let mut world = World::new(
        3,
        Faults {
            lose: 0,
            double: 0,
            delay: 0,
        },
    );
    for _ in 0..12_000 {
        world.ring.end += world.random.below(3);
        world.step(false);
    }
    assert!(world.sent < 20, "{} datagrams in a minute", world.sent);
}

#[test]
fn a_quiet_host_tells_that_it_is_there() {
    let mut world = World::new(
        3,
        Faults {
            lose: 0,
            double: 0,
            delay: 0,
        },
    );
    world.settle();
    let before = world.sent;
    for _ in 0..36_000 {
        world.step(true);
    }
    assert_eq!(world.sent - before, 3, "one a minute");
}

#[test]
fn a_crash_sends_its_last_words_to_whoever_has_heard_the_host_before() {
    for seed in 0..40 {
        let mut world = World::new(
            seed,
            Faults {
                lose: 10,
                double: 5,
                delay: 5,
            },
        );
        for _ in 0..200 {
            world.ring.end += world.random.below(2);
            world.step(true);
        }
        let acked = world.client.acked();
        world.ring.end += 70;
        world.client = Client::crashed(setup(), world.now, acked);
        world.settle();
        assert_eq!(world.judge(), 0, "seed {seed}: lost");
        assert!(world.site.crash_seen);
    }
}

#[test]
fn who_is_armed_again_goes_on_where_it_was() {
    let mut world = World::new(
        9,
        Faults {
            lose: 0,
            double: 0,
            delay: 0,
        },
    );
    world.settle();
    world.client = Client::new(setup(), world.now);
    world.site.restart();
    world.ring.end += 5;
    world.settle();
    assert_eq!(world.judge(), 0);
}

/// A world in which a host has lost some of what it said and falls silent.
fn silent() -> World {
    let faults = Faults {
        lose: 0,
        double: 0,
        delay: 0,
    };
    let mut world = World::new(5, faults);
    world.settle();
    world.ring.end += 300;
    world.up.faults.lose = 30;
    world.step(true);
    world
}

/// Only the server's clock goes on, for so many ticks; after how many what is kept is overdue, and
/// after how many nothing is kept any more.
fn alone(world: &mut World, ticks: u32) -> (Option<u32>, Option<u32>) {
    let (mut overdue, mut over) = (None, None);
    for tick in 1..=ticks {
        world.now = world.now + TICK;
        for mut datagram in world.up.arrived(world.now) {
            world.site.receive(world.now, &mut datagram);
        }
        world.site.tick(world.now);
        if world.site.server.is_overdue(world.now) {
            overdue.get_or_insert(tick);
        }
        if world.site.kept.is_empty() {
            over.get_or_insert(tick);
        }
    }
    (overdue, over)
}

#[test]
fn a_dead_host_leaves_a_hole_that_others_do_not_wait_for() {
    let mut world = silent();
    let (overdue, over) = alone(&mut world, 2200);
    let lost: u64 = world.site.lost.iter().map(|range| range.count()).sum();
    assert!(lost > 0 && world.site.kept.is_empty(), "{lost} lost");
    // Of 5 ms each: written within half a second, given up after five.
    assert!(overdue.is_some_and(|ticks| ticks <= 97), "{overdue:?}");
    assert!(over.is_some_and(|ticks| ticks > 900), "{over:?}");
}

#[test]
fn a_host_that_was_held_up_loses_nothing() {
    let mut world = silent();
    let (overdue, _) = alone(&mut world, 400);
    assert!(overdue.is_some() && !world.site.kept.is_empty());
    world.up.faults.lose = 0;
    world.settle();
    assert_eq!(world.judge(), 0);
}
