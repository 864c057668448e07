//! The simulated server: the server engine, its spools on a disk that fails, what it wants of each
//! crash, and how it goes on after it was killed.

mod policy;

use std::collections::BTreeMap;

use proto::record::RamRange;
use proto::reply::{Action, Opened, Pull, REPLY_BYTES_MAX, Reply, Verdict, WINDOW_PACKETS_MAX};
use proto::server::{Hold, Session};
use proto::time::Instant;
use proto::units::{PacketNumber, SessionId};
use proto::wire::{Header, INCARNATION_BYTES, Kind, Reject, open_client, open_server, seal_server};

use crate::counts::Counts;
use crate::disk::Disk;
use crate::host::{self, refusal};
use crate::memory::Memory;
use crate::model::{Model, Wrong};
use crate::options::{Mutant, Options, ServerOptions};
use crate::random::Random;
use crate::store;

/// How long a disk may fail before a crash is given up for it, in microseconds.
const DISK_PATIENCE_US: u64 = 3_000_000;
/// How long a silent crash keeps its place, in microseconds.
const SILENCE_US: u64 = 30_000_000;

/// Packets that wait for their turn.
struct Waiting {
    packets: BTreeMap<PacketNumber, Vec<u8>>,
    most: u64,
}

impl Hold for Waiting {
    fn keep(&mut self, number: PacketNumber, bytes: &[u8]) -> bool {
        if u64::try_from(self.packets.len()).unwrap_or(u64::MAX) >= self.most {
            return false;
        }
        self.packets.insert(number, bytes.to_vec());
        true
    }

    fn release<R>(&mut self, number: PacketNumber, with: impl FnOnce(&[u8]) -> R) -> Option<R> {
        self.packets.remove(&number).map(|bytes| with(&bytes))
    }
}

/// The attempt that is being received.
struct Live {
    engine: Session,
    waiting: Waiting,
    /// Every packet below this one is in the spool.
    written: PacketNumber,
    /// Stream bytes that are not.
    pending: Vec<u8>,
    heard_us: u64,
    synced_us: u64,
    failing_since_us: Option<u64>,
    credit_end: PacketNumber,
    replies: u64,
}

/// A crash as the running process knows it.
struct Crash {
    attempt: u16,
    model: Model,
    live: Option<Live>,
    hello_us: Option<u64>,
    /// It holds one of the places.
    place: bool,
    /// Pages of an earlier attempt are known.
    recovering: bool,
}

/// What is known of a crash whatever happens: small files, written aside and synced.
#[derive(Clone, Default)]
struct Durable {
    /// The host was told to reboot, all being there.
    done: bool,
    /// Nothing more is wanted of it: it was given up.
    given_up: bool,
    /// Not all pages were wanted in the end.
    log_only: bool,
    asked: BTreeMap<u32, Vec<RamRange>>,
    /// Pulls up to this one were asked of an attempt that is over.
    void: u32,
    pulls_left: u64,
}

impl Durable {
    fn pull(&self) -> u32 {
        self.asked.keys().next_back().copied().unwrap_or(0)
    }

    fn waits_for_pull(&self, model: &Model) -> bool {
        self.pull() > self.void.max(model.answered)
    }
}

/// What came of a datagram.
pub enum Heard {
    /// Nothing.
    Nothing,
    /// This session may have a reply to make.
    Session(SessionId),
    /// This is the answer; nothing was kept.
    Answer(Vec<u8>),
}

/// A reply and what it grants.
pub struct Made {
    /// The datagram.
    pub bytes: Vec<u8>,
    /// The attempt it answers.
    pub attempt: u16,
    /// See [`Reply::next`].
    pub next: PacketNumber,
    /// See [`Reply::credit_end`].
    pub credit_end: PacketNumber,
}

/// A server.
pub struct Server {
    index: u64,
    world: Options,
    options: ServerOptions,
    random: Random,
    incarnations: Random,
    disk: Disk,
    durable: BTreeMap<SessionId, Durable>,
    crashes: BTreeMap<SessionId, Crash>,
    counts: Counts,
    /// Whether its process runs.
    pub running: bool,
    /// When it has written what it is writing.
    pub busy_until_us: u64,
}

impl Server {
    /// Server `index` of a world.
    #[must_use]
    pub fn new(options: &Options, index: u64) -> Self {
        let random = Random::new(options.seed).fork(200 + index);
        Self {
            index,
            world: *options,
            options: options.server,
            disk: Disk::new(&options.server, random.fork(1)),
            incarnations: random.fork(2),
            random: random.fork(3),
            durable: BTreeMap::new(),
            crashes: BTreeMap::new(),
            counts: Counts::default(),
            running: true,
            busy_until_us: 0,
        }
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = self.counts.clone();
        counts.take_in("", self.disk.counts());
        for crash in self.crashes.values() {
            counts.add("pulls answered", crash.model.pulls_answered);
            if let Some(live) = &crash.live {
                live_counts(&mut counts, live);
            }
        }
        counts
    }

    /// From now on nothing befalls it.
    pub fn heal(&mut self) {
        self.disk.heal();
        self.options.write_us = 0;
        self.options.hold_packets = ServerOptions::CALM.hold_packets;
    }

    /// The process is killed, with `power` the whole machine.
    pub fn kill(&mut self, power: bool) -> Result<(), String> {
        if !self.running {
            return Ok(());
        }
        self.counts
            .one(if power { "lost power" } else { "was killed" });
        let lives = self
            .crashes
            .values()
            .filter_map(|crash| crash.live.as_ref());
        lives.for_each(|live| live_counts(&mut self.counts, live));
        for crash in self.crashes.values() {
            self.counts
                .add("pulls answered", crash.model.pulls_answered);
        }
        self.running = false;
        self.crashes.clear();
        if power {
            self.disk.lose_power();
        }
        if self.options.read_store > 0 {
            self.read_store()?;
        }
        Ok(())
    }

    /// The process starts: it reads its spools and goes on.
    pub fn start(&mut self, now_us: u64) -> Result<(), String> {
        self.running = true;
        let names: Vec<_> = self.disk.names().collect();
        for (id, attempt) in names {
            let Some(spooled) = self.disk.read((id, attempt)) else {
                continue;
            };
            self.counts.one("spools read");
            let durable = self.durable.entry(id).or_default().clone();
            let live = (!durable.done).then(|| self.live(id, attempt, spooled.next, now_us));
            let crash = self.crash(id);
            crash.start(attempt);
            crash.live = live;
            for (number, ranges) in &durable.asked {
                crash.model.ask(*number, ranges.clone());
            }
            match crash.model.push(&spooled.stream) {
                Err(Wrong::Stream(_)) if self.hostile(id) => {}
                Err(Wrong::Stream(why) | Wrong::Untrue(why)) => {
                    return Err(format!("the spool of {id} cannot be gone on from: {why}"));
                }
                Ok(()) => {}
            }
        }
        let ids: Vec<_> = self.crashes.keys().copied().collect();
        for id in ids {
            self.resume_pull(id);
            self.decide(now_us, id);
        }
        Ok(())
    }

    /// Takes a datagram.
    pub fn receive(&mut self, now_us: u64, mut bytes: Vec<u8>) -> Result<Heard, String> {
        match self.take(now_us, &mut bytes) {
            Ok(Heard::Session(id)) => {
                self.commit(now_us, id)?;
                self.decide(now_us, id);
                Ok(Heard::Session(id))
            }
            Ok(heard) => Ok(heard),
            Err(reject) => {
                self.counts.one(&refusal(&reject));
                Ok(Heard::Nothing)
            }
        }
    }

    /// Time passes: what failed is tried again, what was put off is decided.
    pub fn tick(&mut self, now_us: u64) -> Result<Vec<SessionId>, String> {
        let ids: Vec<_> = self.crashes.keys().copied().collect();
        for id in &ids {
            self.commit(now_us, *id)?;
            self.decide(now_us, *id);
        }
        Ok(ids)
    }

    /// When session `id` wants to reply.
    #[must_use]
    pub fn reply_at_us(&self, id: SessionId) -> Option<u64> {
        let live = self.crashes.get(&id)?.live.as_ref()?;
        live.engine.reply_at().map(Instant::as_micros)
    }

    /// Makes the reply of session `id`, unless something it would acknowledge is not written.
    pub fn reply(&mut self, now_us: u64, id: SessionId) -> Result<Option<Made>, String> {
        let given_up = self
            .durable
            .get(&id)
            .is_some_and(|durable| durable.given_up);
        let Some(live) = self
            .crashes
            .get_mut(&id)
            .and_then(|crash| crash.live.as_mut())
        else {
            return Ok(None);
        };
        let written = live.engine.next() == live.written;
        let careless = given_up || self.world.mutant == Mutant::UnwrittenAcknowledged;
        if self.options.partial > 0 && !careless {
            live.engine.set_written(live.written);
        } else if !written && !careless {
            return Ok(None);
        } else {
            live.engine.set_written(live.engine.next());
        }
        let mut out = [0; REPLY_BYTES_MAX];
        let length = live
            .engine
            .reply(Instant::from_micros(now_us), &mut out)
            .ok_or("a reply did not fit")?;
        let made = live.check(id, &out[..length], given_up)?;
        if self.world.mutant == Mutant::LyingNext {
            return Ok(Some(lie(id, made)));
        }
        Ok(Some(made))
    }

    /// Whether a host that was told to reboot may do so.
    pub fn judge(&self, id: SessionId) -> Result<(), String> {
        let durable = self.durable.get(&id).cloned().unwrap_or_default();
        if durable.given_up {
            return Ok(());
        }
        let Some(crash) = self.crashes.get(&id).filter(|_| durable.done) else {
            return Err(format!("{id} rebooted before all was on disk"));
        };
        crash.model.judge(!durable.log_only)
    }

    fn take(&mut self, now_us: u64, bytes: &mut [u8]) -> Result<Heard, Reject> {
        let header = Header::parse(bytes)?;
        let id = header.session;
        if id.key.0 == 0 || id.key.0 > self.world.world.hosts {
            return Err(Reject::OtherSession);
        }
        let is_first = header.kind == Kind::First;
        match self.crashes.get(&id) {
            Some(_) if self.durable.get(&id).is_some_and(|durable| durable.done) => {
                return dismiss(now_us, &header, bytes, self.incarnation()).map(Heard::Answer);
            }
            Some(crash) if is_first && header.attempt > crash.attempt => {
                self.begin(now_us, &header, bytes)?;
            }
            None if is_first => self.begin(now_us, &header, bytes)?,
            Some(crash) if header.attempt <= crash.attempt => {}
            None | Some(_) => {
                let incarnation = self.incarnation();
                let answer = know_nothing(now_us, &header, bytes, incarnation)?;
                self.counts.one("answered a crash it does not know");
                return Ok(Heard::Answer(answer));
            }
        }
        let Some(live) = self
            .crashes
            .get_mut(&id)
            .and_then(|crash| crash.live.as_mut())
        else {
            return Err(Reject::OtherSession);
        };
        let pending = &mut live.pending;
        let mut deliver = |bytes: &[u8]| pending.extend_from_slice(bytes);
        let now = Instant::from_micros(now_us);
        live.engine
            .handle(now, bytes, &mut live.waiting, &mut deliver)?;
        live.heard_us = now_us;
        Ok(Heard::Session(id))
    }

    /// Begins the attempt of a genuine first packet.
    fn begin(&mut self, now_us: u64, header: &Header, bytes: &[u8]) -> Result<(), Reject> {
        let id = header.session;
        open_client(&host::keys(id).client, header, &mut bytes.to_vec())?;
        if !self.disk.create((id, header.attempt), header.number) {
            self.counts.one("attempts the disk did not take");
            return Err(Reject::OtherSession);
        }
        let pulls_left = self.options.pulls;
        let durable = self.durable.entry(id).or_insert_with(|| Durable {
            pulls_left,
            ..Durable::default()
        });
        durable.void = durable.pull();
        let live = self.live(id, header.attempt, header.number, now_us);
        let crash = self.crash(id);
        crash.start(header.attempt);
        crash.live = Some(live);
        let recovering = crash.recovering;
        self.counts.one("attempts begun");
        if recovering {
            self.counts.one("attempts that pull what is missing");
        }
        Ok(())
    }

    /// The crash of session `id`, as a process that has never heard of it knows it.
    fn crash(&mut self, id: SessionId) -> &mut Crash {
        let index = id.key.0 - 1;
        let honest = !self.hostile(id);
        let world = self.world;
        self.crashes.entry(id).or_insert_with(|| Crash {
            attempt: 0,
            model: Model::new(Memory::of(&world, index), world.host.cpus, honest),
            live: None,
            hello_us: None,
            place: false,
            recovering: false,
        })
    }

    /// Whether the host of a session is one that lies.
    fn hostile(&self, id: SessionId) -> bool {
        id.key.0 == 1 && self.world.host.hostile_permille > 0
    }

    fn live(&mut self, id: SessionId, attempt: u16, next: PacketNumber, now_us: u64) -> Live {
        let keys = host::keys(id);
        let incarnation = self.incarnation();
        let first = self.disk.first((id, attempt)).unwrap_or(next);
        Live {
            engine: Session::new(id, keys, incarnation, attempt, first, next),
            waiting: Waiting {
                packets: BTreeMap::new(),
                most: self.options.hold_packets,
            },
            written: next,
            pending: Vec::new(),
            heard_us: now_us,
            synced_us: now_us,
            failing_since_us: None,
            credit_end: PacketNumber(0),
            replies: 0,
        }
    }

    fn incarnation(&mut self) -> [u8; INCARNATION_BYTES] {
        let (a, b) = (self.incarnations.draw(), self.incarnations.draw());
        (u128::from(a) << 64 | u128::from(b)).to_le_bytes()
    }

    /// Writes what the engine delivered, then looks at it.
    fn commit(&mut self, now_us: u64, id: SessionId) -> Result<(), String> {
        let hostile = self.hostile(id);
        let (Some(crash), Some(durable)) = (self.crashes.get_mut(&id), self.durable.get_mut(&id))
        else {
            return Ok(());
        };
        let Some(live) = &mut crash.live else {
            return Ok(());
        };
        live.check_memory()?;
        let packets = live.engine.next().since(live.written);
        if packets == 0 || durable.given_up {
            return Ok(());
        }
        let name = (id, crash.attempt);
        self.busy_until_us = now_us + self.options.write_us;
        if !self.disk.append(name, live.written, packets, &live.pending) {
            let since_us = *live.failing_since_us.get_or_insert(now_us);
            if now_us - since_us >= DISK_PATIENCE_US {
                durable.given_up = true;
                self.counts.one("crashes given up for the disk");
            }
            return Ok(());
        }
        live.failing_since_us = None;
        live.written = live.engine.next();
        if now_us - live.synced_us >= self.options.sync_us && self.disk.sync(name) {
            live.synced_us = now_us;
        }
        let pushed = crash.model.push(&std::mem::take(&mut live.pending));
        match pushed {
            Err(Wrong::Stream(_)) if hostile => {
                durable.given_up = true;
                self.counts.one("crashes given up for their stream");
                Ok(())
            }
            Err(Wrong::Stream(why) | Wrong::Untrue(why)) => Err(why),
            Ok(()) => Ok(()),
        }
    }

    fn read_store(&mut self) -> Result<(), String> {
        let mut streams: BTreeMap<SessionId, Vec<Vec<u8>>> = BTreeMap::new();
        let names: Vec<_> = self.disk.names().collect();
        for name in names {
            if let Some(spooled) = self.disk.read(name) {
                streams.entry(name.0).or_default().push(spooled.stream);
            }
        }
        for (id, streams) in streams {
            let memory = Memory::of(&self.world, id.key.0 - 1);
            let pages = store::read(&streams, &memory).map_err(|why| format!("{id}: {why}"))?;
            self.counts.add("pages read from the store", pages);
        }
        Ok(())
    }
}

impl Crash {
    /// Attempt `attempt` begins.
    fn start(&mut self, attempt: u16) {
        self.recovering = self.model.has_pages();
        self.model.start_over();
        self.attempt = attempt;
        self.hello_us = None;
    }
}

impl Live {
    /// A server's memory is bounded, whatever a client sends.
    fn check_memory(&self) -> Result<(), String> {
        let window = u64::try_from(WINDOW_PACKETS_MAX).unwrap_or(u64::MAX);
        let waiting = u64::try_from(self.waiting.packets.len()).unwrap_or(u64::MAX);
        let unwritten = self.engine.next().since(self.written);
        if waiting > self.waiting.most.min(window) || unwritten > 2 * window {
            return Err(format!(
                "{waiting} packets wait for their turn, {unwritten} for the disk"
            ));
        }
        Ok(())
    }

    /// What must be so of every reply that is made.
    fn check(&mut self, id: SessionId, bytes: &[u8], given_up: bool) -> Result<Made, String> {
        let (header, reply) = open(id, bytes).ok_or("a reply cannot be opened")?;
        if header.number.0 != self.replies {
            return Err(format!(
                "reply {} follows {}",
                header.number.0, self.replies
            ));
        }
        if reply.next > self.written && !given_up {
            return Err(format!(
                "{:?} is acknowledged, {:?} is written",
                reply.next, self.written
            ));
        }
        if reply.credit_end < self.credit_end {
            return Err(format!(
                "credit went back from {:?} to {:?}",
                self.credit_end, reply.credit_end
            ));
        }
        self.replies += 1;
        self.credit_end = reply.credit_end;
        Ok(Made {
            bytes: bytes.to_vec(),
            attempt: reply.attempt,
            next: reply.next,
            credit_end: reply.credit_end,
        })
    }
}

fn live_counts(counts: &mut Counts, live: &Live) {
    let statistics = live.engine.statistics();
    counts.add("taken", statistics.packets);
    counts.add("duplicates", statistics.duplicates);
    counts.add("no room to hold", statistics.no_room);
    counts.add("replies", statistics.replies);
}

fn open(id: SessionId, bytes: &[u8]) -> Option<(Header, Reply)> {
    let header = Header::parse(bytes).ok()?;
    let mut copy = bytes.to_vec();
    let (_, payload) = open_server(&host::keys(id).server, &header, &mut copy).ok()?;
    Some((header, Reply::decode(payload)?.reply))
}

/// Answers a packet of a session that is over: the host may reboot. Keeps nothing.
fn dismiss(
    now_us: u64,
    header: &Header,
    bytes: &mut [u8],
    incarnation: [u8; INCARNATION_BYTES],
) -> Result<Vec<u8>, Reject> {
    let next = header.number.plus(1);
    let verdict = (Verdict::Nothing, Action::Reboot);
    answer(now_us, header, bytes, incarnation, next, verdict)
}

/// Answers a packet of a session that nothing is known of: nothing of it has been received, so a
/// client that was told otherwise starts over.
fn know_nothing(
    now_us: u64,
    header: &Header,
    bytes: &mut [u8],
    incarnation: [u8; INCARNATION_BYTES],
) -> Result<Vec<u8>, Reject> {
    let next = PacketNumber(0);
    let verdict = (Verdict::Undecided, Action::None);
    answer(now_us, header, bytes, incarnation, next, verdict)
}

fn answer(
    now_us: u64,
    header: &Header,
    bytes: &mut [u8],
    incarnation: [u8; INCARNATION_BYTES],
    next: PacketNumber,
    (verdict, action): (Verdict, Action),
) -> Result<Vec<u8>, Reject> {
    let keys = host::keys(header.session);
    open_client(&keys.client, header, bytes)?;
    let (id, attempt) = (header.session, header.attempt);
    let mut engine = Session::new(id, keys, incarnation, attempt, next, next);
    engine.set_verdict(verdict);
    engine.set_action(action);
    let mut out = [0; REPLY_BYTES_MAX];
    let length = engine.reply(Instant::from_micros(now_us), &mut out);
    Ok(length.map_or(Vec::new(), |length| out[..length].to_vec()))
}

/// The mutant's reply: one more packet is acknowledged than has arrived.
fn lie(id: SessionId, made: Made) -> Made {
    altered(id, &made.bytes, |reply| reply.next = reply.next.plus(1)).map_or(
        Made { ..made },
        |bytes| Made {
            bytes,
            attempt: made.attempt,
            next: made.next.plus(1),
            credit_end: made.credit_end,
        },
    )
}

/// A reply with its fixed part altered and sealed anew under its number.
pub(crate) fn altered(
    id: SessionId,
    bytes: &[u8],
    alter: impl FnOnce(&mut Reply),
) -> Option<Vec<u8>> {
    let header = Header::parse(bytes).ok()?;
    let keys = host::keys(id);
    let mut copy = bytes.to_vec();
    let (incarnation, payload) = open_server(&keys.server, &header, &mut copy).ok()?;
    let Opened {
        mut reply,
        bitmap,
        pull,
    } = Reply::decode(payload)?;
    alter(&mut reply);
    let mut out = [0; REPLY_BYTES_MAX];
    let ranges = Pull {
        number: pull.number,
        ranges: pull.ranges,
    };
    let payload = reply.encode(bitmap, ranges, &mut out)?;
    let length = seal_server(&keys.server, &header, &incarnation, &mut out, payload)?;
    Some(out[..length].to_vec())
}
