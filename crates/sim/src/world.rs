//! The world: one queue of events, one clock, and the invariants that hold after each event.

use std::collections::BTreeMap;
use std::fmt;

use proto::client::Outcome;
use proto::reply::{Action, Verdict};

use crate::host::Host;
use crate::link::{Fate, Link, LinkCounts};
use crate::memory::Memory;
use crate::options::Options;
use crate::random::Random;
use crate::server::Server;

/// What happens at a time.
enum Event {
    /// A datagram reaches the server.
    AtServer(Vec<u8>),
    /// A datagram reaches the host.
    AtHost(Vec<u8>),
    /// The host wanted to run.
    HostWakes,
    /// The server wanted to reply.
    ServerReplies,
}

/// A run that went well, in numbers that repeat exactly for the same options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// How the host's session ended.
    pub outcome: Outcome,
    /// Simulated time until the host was finished, in microseconds.
    pub time_us: u64,
    /// Packets the client sealed.
    pub packets: u64,
    /// Packets it sent again.
    pub resent: u64,
    /// Packets the server met twice.
    pub duplicates: u64,
    /// Datagrams the server refused.
    pub refused: u64,
    /// Packets that waited for their turn at most.
    pub most_waiting: usize,
    /// What happened on the way up and down.
    pub up: LinkCounts,
    /// See `up`.
    pub down: LinkCounts,
    /// A hash over every event and its time.
    pub trace: u64,
}

/// A run that broke an invariant or did not end.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What was wrong.
    pub what: String,
    /// When, in microseconds.
    pub time_us: u64,
    /// The world it happened in.
    pub options: Options,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            time_us,
            options,
        } = self;
        let seed = options.seed;
        write!(
            f,
            "at {time_us} us: {what}\n{options}\nreplay: cargo xtask sim --seed {seed}"
        )
    }
}

/// One host, one server, one link.
pub struct World {
    options: Options,
    /// The host, for a test to give it special faults before the run.
    pub host: Host,
    /// The server, likewise.
    pub server: Server,
    up: Link,
    down: Link,
    /// Whether the server exists at all.
    pub server_alive: bool,
    events: BTreeMap<(u64, u64), Event>,
    scheduled: u64,
    /// The host's wake-up that counts; earlier ones are stale.
    host_wakes_us: Option<u64>,
    trace: u64,
}

impl World {
    /// The world of `options`.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self::scripted(options, Vec::new(), Vec::new())
    }

    /// A world in which the first packets each way meet given fates.
    #[must_use]
    pub fn scripted(options: &Options, up: Vec<Fate>, down: Vec<Fate>) -> Self {
        let memory = Memory::new(options.seed, options.ram_pages);
        let random = Random::new(options.seed);
        Self {
            options: *options,
            host: Host::new(options, memory.clone()),
            server: Server::new(options, memory),
            up: Link::new(options.up, random.fork(10), up),
            down: Link::new(options.down, random.fork(11), down),
            server_alive: true,
            events: BTreeMap::new(),
            scheduled: 0,
            host_wakes_us: None,
            trace: 0xCBF2_9CE4_8422_2325,
        }
    }

    /// Runs until the host is finished, and judges what the server got.
    pub fn run(mut self) -> Result<Report, Box<Failure>> {
        let mut now_us = 0;
        let result = self.run_to_end(&mut now_us);
        let options = self.options;
        result.map_err(|what| {
            Box::new(Failure {
                what,
                time_us: now_us,
                options,
            })
        })
    }

    fn run_to_end(&mut self, now_us: &mut u64) -> Result<Report, String> {
        self.run_host(0)?;
        while self.host.outcome.is_none() {
            let Some(((at_us, _), event)) = self.events.pop_first() else {
                return Err("nothing is left to happen and the host is not finished".into());
            };
            *now_us = at_us;
            if at_us > self.options.limit_us {
                return Err("the host was not finished in time".into());
            }
            self.happen(at_us, event)?;
        }
        self.report(*now_us)
    }

    fn happen(&mut self, now_us: u64, event: Event) -> Result<(), String> {
        match event {
            Event::AtServer(bytes) => {
                self.note(now_us, 1, &bytes);
                self.server.receive(now_us, bytes)?;
                self.schedule_reply(now_us);
            }
            Event::ServerReplies => {
                if self.server.reply_at_us().is_some_and(|at| at <= now_us) {
                    let reply = self.server.reply(now_us).ok_or("the reply did not fit")?;
                    for arrival in self.down.send(now_us, &reply) {
                        self.schedule(arrival.at_us, Event::AtHost(arrival.bytes));
                    }
                }
            }
            Event::AtHost(bytes) => {
                self.note(now_us, 2, &bytes);
                self.host.receive(now_us, bytes);
                self.run_host(now_us)?;
            }
            Event::HostWakes if self.host_wakes_us == Some(now_us) => self.run_host(now_us)?,
            Event::HostWakes => {}
        }
        Ok(())
    }

    fn run_host(&mut self, now_us: u64) -> Result<(), String> {
        let activity = self.host.run(now_us)?;
        for bytes in activity.sent {
            let arrivals = self.up.send(now_us, &bytes);
            if !self.server_alive {
                continue;
            }
            for arrival in arrivals {
                self.schedule(arrival.at_us, Event::AtServer(arrival.bytes));
            }
        }
        self.host_wakes_us = activity.wake_us;
        if let Some(at_us) = activity.wake_us {
            self.schedule(at_us, Event::HostWakes);
        }
        Ok(())
    }

    fn schedule_reply(&mut self, now_us: u64) {
        if let Some(at_us) = self.server.reply_at_us() {
            self.schedule(at_us.max(now_us), Event::ServerReplies);
        }
    }

    fn schedule(&mut self, at_us: u64, event: Event) {
        self.scheduled += 1;
        self.events.insert((at_us, self.scheduled), event);
    }

    fn note(&mut self, now_us: u64, kind: u64, bytes: &[u8]) {
        for byte in now_us
            .to_le_bytes()
            .iter()
            .chain(&kind.to_le_bytes())
            .chain(bytes)
        {
            self.trace = (self.trace ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
        }
    }

    fn report(&self, time_us: u64) -> Result<Report, String> {
        let outcome = self.host.outcome.ok_or("the host is not finished")?;
        if outcome.action == Action::Reboot && self.server.verdict != Verdict::Nothing {
            self.server.judge()?;
        }
        let session = self.server.session().map(|session| *session.statistics());
        let statistics = self.host.client().statistics();
        Ok(Report {
            outcome,
            time_us,
            packets: statistics.packets,
            resent: statistics.resent,
            duplicates: session.map_or(0, |session| session.duplicates),
            refused: self.server.refused,
            most_waiting: self.server.most_waiting(),
            up: *self.up.counts(),
            down: *self.down.counts(),
            trace: self.trace,
        })
    }
}
