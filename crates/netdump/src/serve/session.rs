//! The wire side of one session: engine, what waits to be written, and what the host is told.
//!
//! Order is everything here: datagrams go through the engine ([`Session::receive`]), what they
//! completed is written by a thread of [`super::writers`] and only then acknowledged
//! ([`Session::written`]). A disk that stalls keeps acknowledgements back, never a receive thread.

use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use proto::record::RamRange;
use proto::reply::Pull;
use proto::server::Session as Engine;
use proto::time::Instant as EngineInstant;
use proto::units::{PacketNumber, SessionId};
use proto::wire::{INCARNATION_BYTES, Reject};

use super::cause::{TEXT_ENOUGH, TEXT_WAIT};
use super::content::{Crash, Pulled, Summary};
use super::directory::{CrashDir, SESSION_FILE_VERSION, SessionFile, State};
use super::disk::Disk;
use super::events::{About, Arrived};
use super::hold::Held;
use super::hub::bytes_expected;
use super::rest::Rest;
use super::signatures::Ruling;
use super::socket::Peer;
use super::spool::Origin;
use super::verdict::{Deed, Want};
use crate::key::{HostKey, fill_random};
use crate::seal::RingKey;
use crate::time::utc;

/// Where a session stands in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The client sends.
    Receiving,
    /// A closing thread has taken it over, or will when the writer is through with it; the engine
    /// goes on answering.
    Closing,
}

/// A session under way.
pub struct Session {
    engine: Engine<RingKey>,
    held: Held,
    /// Stream bytes that the engine delivered and no writer has taken yet.
    pending: Vec<u8>,
    /// The packet that `pending` begins with.
    taken: PacketNumber,
    /// A writer has it, or will.
    queued: bool,
    disk: Option<Arc<Mutex<Disk>>>,
    origin: Origin,
    about: About,
    came: Came,
    since: Instant,
    heard_at: Instant,
    phase: Phase,
    close_why: Option<String>,
    /// Another attempt has taken its place, or the host has another life: nobody comes back to it.
    fate: Fate,
    want: Option<Want>,
    deed: Option<Deed>,
    told: Told,
    /// Pages that earlier attempts lack.
    rest: Option<Rest>,
    /// Who waits for the pages of a pull.
    waiter: Option<Waiter>,
    /// Numbers of pulls given out.
    pulls: u32,
    /// How often a restarted server went on with it.
    resumed: u32,
    /// Attempts before this one that left spools in the same directory.
    earlier: u32,
    /// Filter level of those attempts.
    before: Option<u8>,
    /// What was decided by its signature.
    ruling: Option<Ruling>,
}

/// What becomes of a session when it is closed as incomplete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The host may come back to it: the spools stay for a while.
    Open,
    /// The host will not come back.
    Gone,
    /// A later attempt goes on in the same directory.
    Superseded,
}

/// Where and when a session came from.
pub struct Came {
    /// Where its packets come from.
    pub peer: Peer,
    /// UTC time of the first packet.
    pub started: String,
    /// Seconds it took before this process, or this attempt, went on with it.
    pub seconds: f64,
}

/// What the writers have told of the stream.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// As far as it is known; the counts of pages are up to date, the rest since the last record
    /// that matters.
    pub summary: Summary,
    /// Which crash it is.
    pub crash: Option<Crash>,
    /// Stream bytes a full packet of the client carries; 0 before the Hello.
    pub packet_bytes: u16,
    /// Stream bytes in the spool.
    pub bytes: u64,
    /// As much of the text has arrived as a verdict needs.
    pub text_enough: bool,
}

/// A person who waits for pages.
struct Waiter {
    number: u32,
    answer: SyncSender<Pulled>,
}

/// What a writer is to write.
pub struct Task {
    /// Packets.
    pub packets: u32,
    /// Their stream bytes.
    pub bytes: Vec<u8>,
    /// Where to.
    pub disk: Option<Arc<Mutex<Disk>>>,
    /// What a new spool begins with.
    pub origin: Origin,
}

impl Came {
    /// Now, from `peer`.
    #[must_use]
    pub fn now(peer: Peer) -> Self {
        Self {
            peer,
            started: utc(SystemTime::now()),
            seconds: 0.0,
        }
    }
}

impl Session {
    /// A session of `key`'s host. `next` is the first packet that is not written yet, and `disk`
    /// where the others are; without one, a writer makes it.
    pub fn new(
        key: &HostKey,
        origin: Origin,
        next: PacketNumber,
        about: About,
        came: Came,
        held_bytes: &Arc<AtomicUsize>,
    ) -> Result<Self> {
        let mut incarnation = [0; INCARNATION_BYTES];
        fill_random(&mut incarnation)?;
        let keys = key.secret.session_keys(origin.session);
        let mut engine = Engine::with_packet_key(
            origin.session,
            keys,
            incarnation,
            origin.attempt,
            origin.first,
            next,
        );
        engine.set_written(next);
        let now = Instant::now();
        Ok(Self {
            engine,
            held: Held::new(Arc::clone(held_bytes)),
            pending: Vec::new(),
            taken: next,
            queued: false,
            disk: None,
            origin,
            about,
            came,
            since: now,
            heard_at: now,
            phase: Phase::Receiving,
            close_why: None,
            fate: Fate::Open,
            want: None,
            deed: None,
            told: Told::default(),
            rest: None,
            waiter: None,
            pulls: 0,
            resumed: 0,
            earlier: 0,
            before: None,
            ruling: None,
        })
    }

    /// Takes a datagram from `peer`. Refused ones change nothing. What comes after the end is
    /// answered, not kept.
    pub fn receive(
        &mut self,
        now: EngineInstant,
        peer: Peer,
        datagram: &mut [u8],
    ) -> Result<(), Reject> {
        let (pending, open) = (&mut self.pending, self.phase == Phase::Receiving);
        let mut deliver = |bytes: &[u8]| {
            if open {
                pending.extend_from_slice(bytes);
            }
        };
        self.engine
            .handle(now, datagram, &mut self.held, &mut deliver)?;
        self.came.peer = peer;
        self.heard_at = Instant::now();
        Ok(())
    }

    /// Whether there is something to write that no writer knows of. The caller then queues it.
    pub fn queue(&mut self) -> bool {
        let news = self.engine.next() > self.taken && self.phase == Phase::Receiving;
        let queue = news && !self.queued;
        self.queued |= queue;
        queue
    }

    /// Whether a writer has it, or will.
    #[must_use]
    pub fn queued(&self) -> bool {
        self.queued
    }

    /// Hands what is to be written to a writer.
    pub fn take(&mut self) -> Task {
        let next = self.engine.next();
        let packets = u32::try_from(next.since(self.taken)).unwrap_or(u32::MAX);
        self.taken = next;
        Task {
            packets,
            bytes: std::mem::take(&mut self.pending),
            disk: self.disk.clone(),
            origin: self.origin,
        }
    }

    /// A writer has written: everything before `next` is in the spool.
    pub fn written(&mut self, next: PacketNumber, spare: Vec<u8>) {
        self.engine.set_written(next);
        // The writer's buffer is used again, unless it is one of the large ones of a busy time.
        if self.pending.is_empty() && spare.capacity() <= SPARE_BYTES_MAX {
            self.pending = spare;
            self.pending.clear();
        }
    }

    /// A writer is through with it.
    pub fn release(&mut self) {
        self.queued = false;
    }

    /// Makes the reply in `out`.
    pub fn reply(&mut self, now: EngineInstant, out: &mut [u8]) -> Option<usize> {
        self.engine.reply(now, out)
    }

    /// When a reply is due.
    #[must_use]
    pub fn reply_at(&self) -> Option<EngineInstant> {
        self.engine.reply_at()
    }

    /// Tells the client, from the next reply on, what is wanted of it.
    pub fn want(&mut self, want: Want) {
        self.engine.set_verdict(want.verdict());
        self.want = Some(want);
    }

    /// Tells the host, from the next reply on, what to do: at once, if it has not come to its end.
    /// What it was told before stays.
    pub fn dismiss(&mut self, deed: Deed) {
        if self.told.summary.ended.is_none() {
            self.engine.set_verdict(proto::reply::Verdict::Nothing);
        }
        let deed = *self.deed.get_or_insert(deed);
        self.engine.set_action(deed.action());
    }

    /// Lets the client send `packets` packets beyond the last one written.
    pub fn set_credit(&mut self, packets: u64) {
        self.engine.set_credit(packets);
    }

    /// Asks for pages; gives the number of the pull.
    pub fn pull(&mut self, ranges: &[RamRange]) -> u32 {
        self.pulls = self.pulls.saturating_add(1);
        // A server that is killed forgets which numbers it gave out. Each life has its own.
        let number = (self.resumed << PULLS_PER_LIFE_BITS).saturating_add(self.pulls);
        self.engine.set_pull(Pull { number, ranges });
        number
    }

    /// The number that the next pull will have.
    #[must_use]
    pub fn next_pull(&self) -> u32 {
        (self.resumed << PULLS_PER_LIFE_BITS).saturating_add(self.pulls.saturating_add(1))
    }

    /// The pages that earlier attempts lack, if there were any.
    #[must_use]
    pub fn rest(&self) -> Option<&Rest> {
        self.rest.as_ref()
    }

    /// The same, to take what was pulled.
    pub fn rest_mut(&mut self) -> Option<&mut Rest> {
        self.rest.as_mut()
    }

    /// Asks for pages that `answer` gets. `None` while others are being pulled.
    pub fn pull_for(&mut self, ranges: &[RamRange], answer: SyncSender<Pulled>) -> Option<u32> {
        if self.waiter.is_some() {
            return None;
        }
        let number = self.pull(ranges);
        self.waiter = Some(Waiter { number, answer });
        Some(number)
    }

    /// Nobody waits any more.
    pub fn forget_waiter(&mut self) {
        self.waiter = None;
    }

    /// Hands the answer of a pull to whoever waits for it.
    pub fn hand_over(&mut self, pulled: Pulled) {
        if let Some(waiter) = self.waiter.take_if(|waiter| waiter.number == pulled.number) {
            // Whoever waited may have given up.
            drop(waiter.answer.try_send(pulled));
        }
    }

    /// What has arrived, as the writers told.
    #[must_use]
    pub fn told(&self) -> &Told {
        &self.told
    }

    /// Takes over what `disk` knows; all of it, or the counts only.
    pub fn learn(&mut self, disk: &Disk, all: bool) {
        let content = disk.content();
        if all {
            self.told.summary = content.summary().clone();
            self.told.crash = content.crash().cloned();
            self.told.packet_bytes = content.packet_bytes();
        }
        self.told.summary.pages = content.summary().pages;
        if let Some(rest) = &self.rest {
            rest.count(&mut self.told.summary.pages);
        }
        self.told.bytes = disk.spool().bytes();
        self.told.text_enough = content.text_over() || content.text_bytes() >= TEXT_ENOUGH;
    }

    /// Gives it the place that a writer made for it.
    pub fn set_disk(&mut self, disk: Disk) -> Arc<Mutex<Disk>> {
        self.about.directory = disk.dir().path().to_owned();
        self.earlier = disk.number() - 1;
        let disk = Arc::new(Mutex::new(disk));
        self.disk = Some(Arc::clone(&disk));
        disk
    }

    /// Its disk side, once a writer has made it.
    #[must_use]
    pub fn disk(&self) -> Option<Arc<Mutex<Disk>>> {
        self.disk.clone()
    }

    /// A restarted server, or a later attempt, goes on with what `file` tells.
    pub fn goes_on(&mut self, file: &SessionFile, resumed: bool) {
        self.came.started.clone_from(&file.started);
        self.came.seconds = file.seconds;
        self.before = file.verdict.as_ref().and_then(Want::asks_pages);
        self.ruling.clone_from(&file.ruling);
        self.resumed = if resumed { file.resumed + 1 } else { 0 };
    }

    /// Attempts before this one that left spools in its directory.
    #[must_use]
    pub fn earlier(&self) -> u32 {
        self.earlier
    }

    /// It turned out to be of another crash than those attempts.
    pub fn stands_alone(&mut self, disk: &Disk) {
        self.about.directory = disk.dir().path().to_owned();
        self.earlier = 0;
        self.ruling = None;
    }

    /// What was wanted, once that is decided.
    #[must_use]
    pub fn wanted(&self) -> Option<&Want> {
        self.want.as_ref()
    }

    /// Whether it is to be decided now what is wanted: it is known who crashed, and enough of the
    /// text is here, or was waited for long enough.
    #[must_use]
    pub fn verdict_due(&self) -> bool {
        let known = self.told.crash.is_some() && self.want.is_none();
        known && (self.told.text_enough || self.since.elapsed() >= TEXT_WAIT)
    }

    /// Whether no writer has it. The caller then queues it, although there may be nothing to write.
    pub fn queue_for_verdict(&mut self) -> bool {
        let queue = !self.queued;
        self.queued = true;
        queue
    }

    /// What was decided by its signature.
    #[must_use]
    pub fn ruling(&self) -> Option<&Ruling> {
        self.ruling.as_ref()
    }

    /// It was decided by its signature.
    pub fn set_ruling(&mut self, ruling: Ruling) {
        self.ruling = Some(ruling);
    }

    /// Time since its first packet, or since a server took it up again.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Where the session stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Ends the receiving. `why` tells what is missing. Nothing happens when it has ended already.
    /// Whether the caller is to start the closing thread: if not, the writer that has the session
    /// does.
    pub fn begin_closing(&mut self, why: Option<String>) -> bool {
        let first = self.phase == Phase::Receiving;
        if first {
            self.phase = Phase::Closing;
            self.close_why = why;
        }
        first && !self.queued
    }

    /// What becomes of it when it is closed as incomplete.
    #[must_use]
    pub fn fate(&self) -> Fate {
        self.fate
    }

    /// Says what becomes of it when it is closed as incomplete.
    pub fn set_fate(&mut self, fate: Fate) {
        self.fate = fate;
    }

    /// Begins in the directory of the attempts before it, of which `earlier` left spools.
    pub fn follows(&mut self, earlier: u32) {
        self.earlier = earlier;
    }

    /// The pages that earlier attempts lack are known, or it is known that none are to be pulled.
    pub fn set_rest(&mut self, rest: Rest) {
        rest.count(&mut self.told.summary.pages);
        self.rest = Some(rest);
    }

    /// All pages are there: the client may go on to the State text and end.
    pub fn go_on_to_state(&mut self) {
        self.engine.set_verdict(proto::reply::Verdict::LogOnly);
    }

    /// What [`Self::begin_closing`] was told.
    #[must_use]
    pub fn close_why(&self) -> Option<String> {
        self.close_why.clone()
    }

    /// Nothing is kept any more, and whatever arrives is acknowledged, so that the host gets away.
    pub fn acknowledge_all(&mut self) {
        self.engine.set_written(PacketNumber(u64::MAX));
    }

    /// Which session this is.
    #[must_use]
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The session's name.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.origin.session
    }

    /// The attempt that is being received.
    #[must_use]
    pub fn attempt(&self) -> u16 {
        self.origin.attempt
    }

    /// Where its packets come from.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.came.peer
    }

    /// When a genuine packet came last.
    #[must_use]
    pub fn heard_at(&self) -> Instant {
        self.heard_at
    }

    /// Its directory, once there is one.
    #[must_use]
    pub fn dir(&self) -> CrashDir {
        CrashDir::at(self.about.directory.clone())
    }

    /// The server at `address` as the host knows it, if it is one of the others it was armed for.
    #[must_use]
    pub fn server_at(&self, address: SocketAddr) -> Option<u8> {
        let crash = self.told.crash.as_ref()?;
        let mut others = crash
            .servers
            .iter()
            .filter(|(place, _)| *place != crash.server);
        let (place, _) = others.find(|(_, server)| *server == address)?;
        u8::try_from(*place).ok()
    }

    /// Seconds from the first packet to the last one.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.came.seconds + self.heard_at.duration_since(self.since).as_secs_f64()
    }

    /// How far it has come.
    #[must_use]
    pub fn arrived(&self) -> Arrived {
        Arrived {
            pages: self.told.summary.pages.total(),
            ram_pages: self.told.summary.ram_pages,
            bytes: self.told.bytes,
            seconds: self.seconds(),
        }
    }

    /// Bytes of memory that have not arrived yet, if they are wanted: what the disk must have room
    /// for.
    #[must_use]
    pub fn bytes_to_come(&self) -> u64 {
        let summary = &self.told.summary;
        let pages = summary.ram_pages.saturating_sub(summary.pages.total());
        if matches!(self.want, Some(Want::Full { .. } | Want::Rest { .. })) {
            bytes_expected(pages, self.filter())
        } else {
            0
        }
    }

    /// Filter level of the dump, if the host sends all of its memory now.
    #[must_use]
    pub fn sends_all(&self) -> Option<u8> {
        let open = self.phase == Phase::Receiving;
        let wanted = self.want.as_ref().and_then(Want::asks_at_once);
        wanted.filter(|_| open).map(|_| self.filter())
    }

    /// Filter level of the dump: what either side leaves out.
    #[must_use]
    pub fn filter(&self) -> u8 {
        self.want.as_ref().map_or(0, Want::filter) | self.told.summary.filter_demanded
    }

    /// Filter level that the attempts before this one had; `otherwise` if it was not decided.
    #[must_use]
    pub fn filter_before(&self, otherwise: u8) -> u8 {
        self.before.unwrap_or(otherwise)
    }

    /// Whether pages were wanted in the attempts before this one, by the rule or by a person.
    #[must_use]
    pub fn asked_before(&self) -> bool {
        self.before.is_some()
    }

    /// What `session.json` holds at this moment.
    #[must_use]
    pub fn file(&self, state: State, why: Option<String>) -> SessionFile {
        SessionFile {
            version: SESSION_FILE_VERSION,
            state,
            verdict: self.want.clone(),
            filter: self.filter(),
            why,
            host: self.about.host.clone(),
            key: self.id().key.to_string(),
            arming: self.id().arming.to_string(),
            attempt: self.attempt(),
            resumed: self.resumed,
            peer: self.came.peer.address,
            started: self.came.started.clone(),
            seconds: self.seconds(),
            bytes: self.told.bytes,
            ruling: self.ruling.clone(),
            summary: self.told.summary.clone(),
            vmcore: None,
        }
    }

    /// Replaces `session.json`.
    pub fn write_file(&self, state: State, why: Option<String>) -> Result<()> {
        self.dir().write_session(&self.file(state, why))
    }
}

/// A writer's buffer that is larger is given back to the allocator.
const SPARE_BYTES_MAX: usize = 128 << 10;
/// Pulls that a server can ask for in its life: as many as these bits can count.
const PULLS_PER_LIFE_BITS: u32 = 20;
