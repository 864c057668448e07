//! The world: one queue of events, one clock, and the invariants that hold after each event.
//!
//! Two phases. Until [`crate::options::WorldOptions::faults_us`] everything goes wrong that the
//! options say, and whatever happens must be right (safety). Then every fault ends, and everything
//! must come to its end within a bound (liveness).

use std::collections::BTreeMap;
use std::fmt;

use proto::client::Outcome;
use proto::reply::{Action, FIRST_CREDIT_PACKETS};
use proto::units::{PacketNumber, SessionId};
use proto::wire::{Header, Kind};

use crate::counts::Counts;
use crate::host::{self, Host};
use crate::hostile::Hostile;
use crate::link::{Fate, Link};
use crate::options::Options;
use crate::random::Random;
use crate::server::{Heard, Made, Server};

/// How often a server looks after what was put off, in microseconds.
const TICK_US: u64 = 100_000;

/// What happens at a time.
enum Event {
    /// A datagram reaches a server; `queued` if it waited in the socket.
    AtServer {
        server: usize,
        host: usize,
        bytes: Vec<u8>,
        queued: bool,
    },
    /// A datagram reaches a host.
    AtHost { host: usize, bytes: Vec<u8> },
    /// A host wanted to run; the number tells whether it still does.
    HostWakes { host: usize, number: u64 },
    /// A host that died has rebooted and crashes again.
    HostReturns { host: usize },
    /// A server wanted to reply.
    ServerReplies { server: usize, id: SessionId },
    /// A server looks after what was put off.
    Tick { server: usize },
    /// A server is killed.
    Kill { server: usize },
    /// A server is started.
    Start { server: usize },
    /// The first server is gone for good.
    Gone,
    /// All faults end.
    Heal,
}

/// A run that went well, in numbers that repeat exactly for the same options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// How each host ended; `None` if it died.
    pub outcomes: Vec<Option<Outcome>>,
    /// Simulated time until all were finished, in microseconds.
    pub time_us: u64,
    /// How often each thing happened, to `host: `, `up: `, `down: ` and `server: `.
    pub counts: Counts,
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
        write!(f, "at {time_us} us: {what}\n{options}")
    }
}

/// A host and the links between it and each server.
struct Place {
    host: Host,
    dead: bool,
    runs: u64,
    /// The wake-up that counts; earlier ones are stale.
    wake: u64,
    hostile: Hostile,
    up: Vec<Link>,
    down: Vec<Link>,
}

/// What the servers have granted an attempt.
struct Granted {
    first: PacketNumber,
    next: PacketNumber,
    credit_end: PacketNumber,
}

/// Hosts, servers, and the links between them.
pub struct World {
    options: Options,
    places: Vec<Place>,
    servers: Vec<Server>,
    /// Datagrams in each server's socket.
    queued: Vec<u64>,
    hostile: Hostile,
    random: Random,
    gone: bool,
    healed: bool,
    granted: BTreeMap<(SessionId, u16), Granted>,
    events: BTreeMap<(u64, u64), Event>,
    scheduled: u64,
    happened: u64,
    counts: Counts,
    trace: u64,
}

impl World {
    /// The world of `options`.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self::scripted(options, &[], &[])
    }

    /// A world in which the first packets of the first host meet given fates.
    #[must_use]
    pub fn scripted(options: &Options, up: &[Fate], down: &[Fate]) -> Self {
        let random = Random::new(options.seed);
        let hosts = options.world.hosts.clamp(1, 8);
        let servers = options.world.servers.clamp(1, 4);
        let link = |options, host: u64, server: u64, way: u64, script: &[Fate]| {
            let random = random.fork(300 + way + 2 * server + 16 * host);
            let script = if host == 0 {
                script.to_vec()
            } else {
                Vec::new()
            };
            Link::new(options, random, script)
        };
        let place = |host: u64| Place {
            host: Host::new(options, host, 0, 0),
            dead: false,
            runs: 0,
            wake: 0,
            hostile: Hostile::new(
                if host == 0 {
                    options.host.hostile_permille
                } else {
                    0
                },
                random.fork(400),
            ),
            up: (0..servers)
                .map(|server| link(options.up, host, server, 0, up))
                .collect(),
            down: (0..servers)
                .map(|server| link(options.down, host, server, 1, down))
                .collect(),
        };
        let places: Vec<Place> = (0..hosts).map(place).collect();
        let servers: Vec<Server> = (0..servers)
            .map(|index| Server::new(options, index))
            .collect();
        Self {
            options: *options,
            places,
            queued: vec![0; servers.len()],
            servers,
            hostile: Hostile::new(options.server.hostile_permille, random.fork(401)),
            random: random.fork(402),
            gone: false,
            healed: false,
            granted: BTreeMap::new(),
            events: BTreeMap::new(),
            scheduled: 0,
            happened: 0,
            counts: Counts::default(),
            trace: 0xCBF2_9CE4_8422_2325,
        }
    }

    /// Runs until all hosts are finished, and judges what the servers got.
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
        self.schedule(self.options.world.faults_us, Event::Heal);
        for server in 0..self.servers.len() {
            self.schedule(TICK_US, Event::Tick { server });
            self.schedule_kill(0, server);
        }
        if self.options.server.gone_us > 0 {
            self.schedule(self.options.server.gone_us, Event::Gone);
        }
        for host in 0..self.places.len() {
            self.run_host(0, host)?;
        }
        let limit_us = self.limit_us();
        while self.unfinished() {
            let Some(((at_us, _), event)) = self.events.pop_first() else {
                return Err("nothing is left to happen and a host is not finished".into());
            };
            *now_us = at_us;
            if at_us > limit_us {
                // Who lies, or was lied to, may wait for what will never come.
                let lied = self.options.server.hostile_permille > 0
                    || (self.options.host.hostile_permille > 0 && self.places.len() == 1);
                if lied {
                    break;
                }
                return Err("a host was not finished in time".into());
            }
            self.happen(at_us, event)?;
            self.happened += 1;
            let every = self.options.server.kill_every;
            if every > 0 && !self.healed && self.happened.is_multiple_of(every) {
                self.kill_all(at_us)?;
            }
        }
        self.report(*now_us)
    }

    /// When everything must be over: the time a dump takes that sends packet by packet, several
    /// times, and all waits that the protocol has.
    fn limit_us(&self) -> u64 {
        let Options {
            world,
            host,
            up,
            down,
            ..
        } = &self.options;
        let payload = host.datagram_bytes.saturating_sub(48).max(1);
        let packets = 50 + host.ram_pages * 4200 / payload;
        let trip_us = up.delay_us + down.delay_us + host.nic_us + 20 * host.step_us + 2100;
        let waits_us = 1_000_000 * (5 * host.give_up_s + 100);
        let pulls_us = (self.options.server.pulls + host.ram_pages) * 4 * trip_us;
        world.faults_us + world.hosts * (4 * packets * trip_us + waits_us + pulls_us)
    }

    /// Whether somebody is still to be waited for. A hostile host is not, unless it is alone: what
    /// its lies cost is its own session.
    fn unfinished(&self) -> bool {
        let waits = |place: &Place| !place.dead && place.host.outcome.is_none();
        let liars = usize::from(self.options.host.hostile_permille > 0 && self.places.len() > 1);
        self.places.iter().skip(liars).any(waits)
            || self
                .events
                .values()
                .any(|event| matches!(event, Event::HostReturns { .. }))
    }

    fn happen(&mut self, now_us: u64, event: Event) -> Result<(), String> {
        match event {
            Event::AtServer {
                server,
                host,
                bytes,
                queued,
            } => {
                self.queued[server] -= u64::from(queued);
                self.at_server(now_us, server, host, bytes)?;
            }
            Event::AtHost { host, bytes } => {
                self.note(now_us, 2, &bytes);
                let place = &mut self.places[host];
                if !place.dead && place.host.outcome.is_none() {
                    place.host.arrive(bytes);
                    if place.host.busy_until_us() <= now_us {
                        self.run_host(now_us, host)?;
                    }
                }
            }
            Event::HostWakes { host, number } => {
                if self.places[host].wake == number {
                    self.run_host(now_us, host)?;
                }
            }
            Event::HostReturns { host } => {
                let boot = self.places[host].host.boot() + 1;
                self.counts
                    .take_in("host: ", &self.places[host].host.counts());
                self.places[host].host = Host::new(&self.options, 0, boot, now_us);
                self.places[host].dead = false;
                self.counts.one("host: came back");
                self.run_host(now_us, host)?;
            }
            Event::ServerReplies { server, id } => self.reply(now_us, server, id)?,
            Event::Tick { server } => {
                self.schedule(now_us + TICK_US, Event::Tick { server });
                if self.servers[server].running {
                    for id in self.servers[server].tick(now_us)? {
                        self.schedule_reply(now_us, server, id);
                    }
                }
            }
            Event::Kill { server } => self.kill(now_us, server)?,
            Event::Start { server } => {
                if !(self.gone && server == 0) {
                    self.servers[server].start(now_us)?;
                }
            }
            Event::Gone => {
                self.gone = true;
                self.counts.one("server: gone for good");
                self.servers[0].kill(true)?;
            }
            Event::Heal => self.heal(),
        }
        Ok(())
    }

    fn at_server(
        &mut self,
        now_us: u64,
        server: usize,
        host: usize,
        bytes: Vec<u8>,
    ) -> Result<(), String> {
        let Server {
            running,
            busy_until_us,
            ..
        } = self.servers[server];
        if !running {
            self.counts.one("server: arrived at nobody");
            return Ok(());
        }
        if now_us < busy_until_us {
            if self.queued[server] >= self.options.server.socket_packets {
                self.counts.one("server: socket full");
                return Ok(());
            }
            self.queued[server] += 1;
            let queued = true;
            self.schedule(
                busy_until_us,
                Event::AtServer {
                    server,
                    host,
                    bytes,
                    queued,
                },
            );
            return Ok(());
        }
        self.note(now_us, 1, &bytes);
        match self.servers[server].receive(now_us, bytes)? {
            Heard::Nothing => {}
            Heard::Session(id) => self.schedule_reply(now_us, server, id),
            Heard::Answer(bytes) => self.down(now_us, server, host, &bytes),
        }
        Ok(())
    }

    fn reply(&mut self, now_us: u64, server: usize, id: SessionId) -> Result<(), String> {
        let due = self.servers[server].reply_at_us(id);
        if !self.servers[server].running || due.is_none_or(|at_us| at_us > now_us) {
            return Ok(());
        }
        let Some(made) = self.servers[server].reply(now_us, id)? else {
            return Ok(());
        };
        self.grant(id, &made);
        let Ok(host) = usize::try_from(id.key.0 - 1) else {
            return Ok(());
        };
        let lies = server == 0 && !self.gone;
        let bytes = if lies {
            self.hostile.server(made.bytes)
        } else {
            made.bytes
        };
        self.down(now_us, server, host, &bytes);
        Ok(())
    }

    fn down(&mut self, now_us: u64, server: usize, host: usize, bytes: &[u8]) {
        for arrival in self.places[host].down[server].send(now_us, bytes) {
            let bytes = arrival.bytes;
            self.schedule(arrival.at_us, Event::AtHost { host, bytes });
        }
    }

    fn grant(&mut self, id: SessionId, made: &Made) {
        if let Some(granted) = self.granted.get_mut(&(id, made.attempt)) {
            granted.next = granted.next.max(made.next);
            granted.credit_end = granted.credit_end.max(made.credit_end);
        }
    }

    fn run_host(&mut self, now_us: u64, host: usize) -> Result<(), String> {
        let options = self.options;
        let place = &mut self.places[host];
        if place.dead || place.host.outcome.is_some() {
            return Ok(());
        }
        place.runs += 1;
        let first_life = host == 0 && place.host.boot() == 0;
        if first_life && options.host.dies_after == place.runs {
            place.dead = true;
            self.counts.one("host: died");
            if options.host.returns_us > 0 {
                let at_us = now_us + options.host.returns_us;
                self.schedule(at_us, Event::HostReturns { host });
            }
            return Ok(());
        }
        let activity = place.host.run(now_us)?;
        for (leaves_us, server, bytes) in activity.sent {
            self.check_window(&bytes)?;
            let place = &mut self.places[host];
            let bytes = place.hostile.client(bytes);
            for arrival in place.up[server].send(leaves_us, &bytes) {
                let bytes = arrival.bytes;
                let queued = false;
                self.schedule(
                    arrival.at_us,
                    Event::AtServer {
                        server,
                        host,
                        bytes,
                        queued,
                    },
                );
            }
        }
        let place = &mut self.places[host];
        place.wake += 1;
        let number = place.wake;
        if let Some(at_us) = activity.wake_us {
            self.schedule(at_us, Event::HostWakes { host, number });
        }
        Ok(())
    }

    /// A client is never more than a window ahead of what it was granted.
    fn check_window(&mut self, bytes: &[u8]) -> Result<(), String> {
        let header = Header::parse(bytes).map_err(|reject| format!("{reject:?}"))?;
        let (id, number) = (header.session, header.number);
        let granted = self
            .granted
            .entry((id, header.attempt))
            .or_insert_with(|| Granted {
                first: number,
                next: number,
                credit_end: number.plus(FIRST_CREDIT_PACKETS),
            });
        let is_first = granted.first == number;
        if is_first != (header.kind == Kind::First) {
            return Err(format!(
                "{number:?} of an attempt is of kind {:?}",
                header.kind
            ));
        }
        let slots = self.options.host.pool_slots.max(1);
        let ahead = number.since(granted.next);
        let lied = self.options.server.hostile_permille > 0;
        if !lied && (number >= granted.credit_end || ahead >= slots) {
            return Err(format!(
                "{number:?} was sent with credit up to {:?} and {:?} acknowledged",
                granted.credit_end, granted.next
            ));
        }
        Ok(())
    }

    fn kill_all(&mut self, now_us: u64) -> Result<(), String> {
        for server in 0..self.servers.len() {
            if self.gone && server == 0 {
                continue;
            }
            let power = self.random.chance(self.options.server.power);
            self.servers[server].kill(power)?;
            self.servers[server].start(now_us)?;
        }
        Ok(())
    }

    fn kill(&mut self, now_us: u64, server: usize) -> Result<(), String> {
        if self.healed || (self.gone && server == 0) {
            return Ok(());
        }
        let power = self.random.chance(self.options.server.power);
        self.servers[server].kill(power)?;
        let back_us = now_us + self.options.server.down_us;
        self.schedule(back_us, Event::Start { server });
        self.schedule_kill(back_us, server);
        Ok(())
    }

    fn schedule_kill(&mut self, from_us: u64, server: usize) {
        let mean_us = self.options.server.kill_us;
        if mean_us > 0 {
            let at_us = from_us + 1 + self.random.exponential(mean_us);
            self.schedule(at_us, Event::Kill { server });
        }
    }

    fn heal(&mut self) {
        self.healed = true;
        self.hostile.heal();
        for place in &mut self.places {
            place.host.heal();
            place.hostile.heal();
            place
                .up
                .iter_mut()
                .chain(&mut place.down)
                .for_each(Link::heal);
        }
        self.servers.iter_mut().for_each(Server::heal);
    }

    fn schedule_reply(&mut self, now_us: u64, server: usize, id: SessionId) {
        if let Some(at_us) = self.servers[server].reply_at_us(id) {
            self.schedule(at_us.max(now_us), Event::ServerReplies { server, id });
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

    fn report(&mut self, time_us: u64) -> Result<Report, String> {
        for (index, server) in self.servers.iter_mut().enumerate() {
            let gone = self.gone && index == 0;
            if !server.running && !gone {
                server.start(time_us)?;
            }
        }
        for (index, place) in self.places.iter().enumerate() {
            self.judge(index, place)?;
        }
        let mut counts = std::mem::take(&mut self.counts);
        for place in &self.places {
            counts.take_in("host: ", &place.host.counts());
            counts.add("host: altered on purpose", place.hostile.altered);
            for (way, links) in [("up: ", &place.up), ("down: ", &place.down)] {
                for link in links {
                    link.check()?;
                    counts.take_in(way, link.counts());
                }
            }
        }
        for server in &self.servers {
            counts.take_in("server: ", &server.counts());
        }
        counts.add("server: altered on purpose", self.hostile.altered);
        let ended = |place: &Place| place.host.outcome;
        Ok(Report {
            outcomes: self.places.iter().map(ended).collect(),
            time_us,
            counts,
            trace: self.trace,
        })
    }

    /// Whether a host ended as it may.
    fn judge(&self, index: usize, place: &Place) -> Result<(), String> {
        let options = &self.options;
        let lies = options.server.hostile_permille > 0
            || (index == 0 && options.host.hostile_permille > 0);
        let Some(outcome) = place.host.outcome.filter(|_| !lies) else {
            return Ok(());
        };
        if outcome.action == Action::None {
            let nobody = self.gone && self.servers.len() == 1;
            if nobody {
                return Ok(());
            }
            return Err(format!("host {index} ended without reason: {outcome:?}"));
        }
        let server = place.host.server();
        let host = u64::try_from(index).unwrap_or(0);
        let number = u64::try_from(server).unwrap_or(0);
        let id = host::session(host, number, place.host.boot());
        if self.gone && server == 0 {
            return Ok(());
        }
        self.servers[server]
            .judge(id)
            .map_err(|why| format!("host {index}: {why}"))
    }
}
