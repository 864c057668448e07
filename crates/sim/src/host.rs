//! The simulated host: the client engine as a driver in the kernel runs it (one server after the
//! other, attempts counted), its network card, its clock, and the answers to what the engine asks.

mod card;
mod clock;

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use proto::arming::{Address, Server};
use proto::client::{Attempts, Client, Input, Outcome, PageStatus, Pass, Start, Step, Then, Want};
use proto::keys::{Secret, SessionKeys};
use proto::record::{BLOCK_BYTES, BLOCK_PAGES, CPU_CAPTURED, Cpu, Hello, WrittenRange};
use proto::time::{Instant, Micros};
use proto::units::{ArmingId, KeyId, PAGE_BYTES, PacketNumber, Pfn, SessionId};
use proto::wire::{Header, Kind};
use zerocopy::{FromZeros, IntoBytes};

use crate::counts::Counts;
use crate::host::card::Card;
use crate::host::clock::Clock;
use crate::memory::Memory;
use crate::options::{HostOptions, Mutant, Options};
use crate::random::Random;

/// The kernel log of every host, oldest piece first: the client sends the newest first.
pub const LOG: [&str; 3] = [
    "boot messages\n",
    "device messages\n",
    "kernel panic: simulated\n",
];
/// The State text of every host.
pub const STATE: [&str; 2] = ["task:init\n", "Mem-Info:\n"];
/// VMCOREINFO of every host.
pub const NOTES: &str = "OSRELEASE=simulated\nPAGESIZE=4096\n";
/// Steps in one go that cost no time. Nothing needs half as many.
const STEPS_MAX: usize = 1_000_000;

/// The session of host `host` with server `server` after it was armed for the `boot`-th time.
#[must_use]
pub const fn session(host: u64, server: u64, boot: u64) -> SessionId {
    SessionId {
        key: KeyId(host + 1),
        arming: ArmingId((boot << 8) | (server + 1)),
    }
}

/// The keys of a session.
#[must_use]
pub fn keys(id: SessionId) -> SessionKeys {
    Secret([id.key.0.to_le_bytes()[0]; 32]).session_keys(id)
}

/// What a host did in one go.
#[derive(Default)]
pub struct Activity {
    /// Packets sent: when they leave, to which server, and their bytes.
    pub sent: Vec<(u64, usize, Vec<u8>)>,
    /// When it wants to run again if nothing arrives; `None` if it is finished.
    pub wake_us: Option<u64>,
}

/// A host.
pub struct Host {
    index: u64,
    boot: u64,
    client: Box<Client>,
    card: Card,
    clock: Clock,
    memory: Memory,
    options: HostOptions,
    mutant: Mutant,
    random: Random,
    attempts: Attempts,
    received: VecDeque<Vec<u8>>,
    busy_until_us: u64,
    text_pieces: usize,
    state_pieces: usize,
    /// Digest of what each packet number was sealed over: a number must never stand for two
    /// packets.
    sealed: BTreeMap<(SessionId, PacketNumber), u64>,
    /// Whether the last step promised that the next one sends.
    train: bool,
    counts: Counts,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

impl Host {
    /// Host `index`, which has crashed at `now_us` after it was armed for the `boot`-th time.
    #[must_use]
    pub fn new(options: &Options, index: u64, boot: u64, now_us: u64) -> Self {
        let random = Random::new(options.seed).fork(100 + index + (boot << 8));
        let servers = usize::try_from(options.world.servers.clamp(1, 4)).unwrap_or(1);
        let give_up = Micros::from_secs(options.host.give_up_s);
        let mut clock = Clock::new(&options.host, random.fork(1));
        let now = clock.read(now_us);
        let mut host = Self {
            index,
            boot,
            client: Box::new(Client::new()),
            card: Card::new(&options.host),
            clock,
            memory: Memory::of(options, index),
            options: options.host,
            mutant: options.mutant,
            random: random.fork(2),
            attempts: Attempts::new(now, servers, give_up),
            received: VecDeque::new(),
            busy_until_us: now_us,
            text_pieces: 0,
            state_pieces: 0,
            sealed: BTreeMap::new(),
            train: false,
            counts: Counts::default(),
            outcome: None,
        };
        host.begin(now);
        host
    }

    /// The engine, for its getters.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// How often the host was armed before.
    #[must_use]
    pub const fn boot(&self) -> u64 {
        self.boot
    }

    /// The server it talks to.
    #[must_use]
    pub const fn server(&self) -> usize {
        self.attempts.server()
    }

    /// When it is back from what it does.
    #[must_use]
    pub const fn busy_until_us(&self) -> u64 {
        self.busy_until_us
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = self.counts.clone();
        let statistics = self.client.statistics();
        counts.add("packets", statistics.packets);
        counts.add("sent again", statistics.resent);
        counts.add("timeouts", statistics.timeouts);
        counts.add("clock stepped", self.clock.steps());
        counts
    }

    /// From now on only the speed of things differs from host to host.
    pub fn heal(&mut self) {
        self.options.stall_permille = 0;
        self.options.receive_slots = HostOptions::CALM.receive_slots;
        self.clock.heal();
    }

    /// A datagram reaches the network card.
    pub fn arrive(&mut self, bytes: Vec<u8>) {
        if u64::try_from(self.received.len()).unwrap_or(0) >= self.options.receive_slots {
            self.counts.one("receive ring full");
        } else {
            self.received.push_back(bytes);
        }
    }

    /// Takes what has arrived, then one step that costs time, or as many as cost none.
    pub fn run(&mut self, now_us: u64) -> Result<Activity, String> {
        let mut activity = Activity::default();
        let now = self.clock.read(now_us);
        self.card.now_us = now_us;
        if !self.train {
            self.receive(now);
        }
        for _ in 0..STEPS_MAX {
            let step = self.client.poll(now, &mut self.card);
            if self.train && !matches!(step, Step::Send { .. }) {
                return Err(format!("promised another packet, then wanted {step:?}"));
            }
            self.train = false;
            let mut next_us = now_us + self.options.step_us;
            match step {
                Step::Send { slot, len, more } => {
                    self.train = more;
                    let leaves_us = self.send(now_us, slot, len, &mut activity)?;
                    next_us = next_us.max(leaves_us);
                }
                Step::Read(want) => self.answer(now, want),
                Step::WaitUntil(at) => {
                    activity.wake_us = Some(self.clock.when(at).max(now_us + 1));
                    return Ok(activity);
                }
                Step::Finished(outcome) => {
                    if !self.try_next(now, &outcome) {
                        self.outcome = Some(outcome);
                        return Ok(activity);
                    }
                }
            }
            if self.random.chance(self.options.stall_permille) {
                next_us += self.options.stall_us;
                self.counts.one("stalls");
            }
            if next_us > now_us {
                self.busy_until_us = next_us;
                activity.wake_us = Some(next_us);
                return Ok(activity);
            }
        }
        Err(format!("{STEPS_MAX} steps took no time: the client spins"))
    }

    /// What the engine refuses is dropped, as a host drops it.
    fn receive(&mut self, now: Instant) {
        while let Some(mut bytes) = self.received.pop_front() {
            match self.client.handle(now, Input::Datagram(&mut bytes)) {
                Ok(()) => self.attempts.heard(now),
                Err(reject) => self.counts.one(&refusal(&reject)),
            }
        }
    }

    /// Whether there is another attempt after a session ended with `outcome`, which is begun then.
    fn try_next(&mut self, now: Instant, outcome: &Outcome) -> bool {
        let next = self.client.next_packet();
        if !self.attempts.next(now, outcome, next) {
            return false;
        }
        let statistics = *self.client.statistics();
        self.counts.add("packets", statistics.packets);
        self.counts.add("sent again", statistics.resent);
        self.counts.add("timeouts", statistics.timeouts);
        self.counts.one(match outcome.then {
            Then::Redirect(_) => "redirected",
            Then::StartOver => "started over",
            Then::Over => "went to the next server",
        });
        self.begin(now);
        true
    }

    fn begin(&mut self, now: Instant) {
        let id = session(
            self.index,
            u64::try_from(self.server()).unwrap_or(0),
            self.boot,
        );
        let server = Server {
            local: Address::V4([10, 0, 0, 1]),
            local_port: 6666,
            remote: Address::V4([10, 0, 0, 2]),
            remote_port: 6666,
            next_hop: Address::V4([10, 0, 0, 2]),
            next_hop_mac: [2, 0, 0, 0, 0, 2],
            session: id,
            keys: keys(id),
        };
        let start = Start {
            server: &server,
            datagram_bytes: usize::try_from(self.options.datagram_bytes).unwrap_or(0),
            pool_slots: self.card.slots(),
            give_up: self.attempts.try_for(),
            first: self.attempts.first(),
            attempt: self.attempts.attempt(),
        };
        let mut hello = Hello::new_zeroed();
        hello.ram_pages = u64::try_from(self.memory.pfns().count())
            .unwrap_or(0)
            .into();
        hello.cpus = u32::try_from(self.options.cpus).unwrap_or(1).into();
        hello.host[..4].copy_from_slice(b"host");
        hello.reason[..9].copy_from_slice(b"simulated");
        (self.text_pieces, self.state_pieces) = (0, 0);
        self.train = false;
        self.client.start(now, &start, &hello);
    }

    /// Gives a buffer to the network card; returns when it leaves.
    fn send(
        &mut self,
        now_us: u64,
        slot: u16,
        len: usize,
        activity: &mut Activity,
    ) -> Result<u64, String> {
        let (leaves_us, bytes) = self.card.send(now_us, slot, len)?;
        let header =
            Header::parse(&bytes).map_err(|reject| format!("sent no packet: {reject:?}"))?;
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let digest = hasher.finish();
        let again = match self.sealed.insert((header.session, header.number), digest) {
            Some(before) if before != digest => {
                return Err(format!(
                    "{:?} was sealed twice with different bytes",
                    header.number
                ));
            }
            before => before.is_some(),
        };
        if header.kind == Kind::First && !again {
            self.counts.one("attempts");
        }
        if leaves_us > now_us {
            self.counts.one("transmit ring full");
        }
        if !(again && self.mutant == Mutant::NoResends) {
            activity.sent.push((leaves_us, self.server(), bytes));
        }
        Ok(leaves_us)
    }

    fn answer(&mut self, now: Instant, want: Want) {
        let scratch = self.client.scratch();
        let filled = match want {
            Want::Text => {
                let piece = LOG
                    .len()
                    .checked_sub(self.text_pieces + 1)
                    .and_then(|n| LOG.get(n));
                self.text_pieces += 1;
                fill(scratch, piece.map_or(&[], |text| text.as_bytes()))
            }
            Want::Registers(index) if u64::from(index) < self.options.cpus => {
                fill(scratch, cpu(index).as_bytes())
            }
            // Processors and devices: a simulated host has no hardware.
            Want::Registers(_) | Want::Processor(_) | Want::Devices => 0,
            Want::Notes => fill(scratch, NOTES.as_bytes()),
            Want::MemoryMap => fill(scratch, self.memory.ranges().as_bytes()),
            Want::Written => {
                let range = WrittenRange {
                    first: 1.into(),
                    pages: 1.into(),
                    kind: 1.into(),
                };
                fill(scratch, range.as_bytes())
            }
            Want::State if self.options.state_faults > 0 => return self.client.state_faulted(),
            Want::State => {
                let piece = STATE.get(self.state_pieces);
                self.state_pieces += 1;
                fill(scratch, piece.map_or(&[], |text| text.as_bytes()))
            }
            Want::Pages {
                first,
                count,
                pass,
                filter,
            } => {
                let mut statuses = [PageStatus::OtherPass; BLOCK_PAGES];
                let pages = scratch
                    .chunks_mut(PAGE_BYTES)
                    .zip(&mut statuses)
                    .take(count.into());
                for (pfn, (page, status)) in (first.0..).map(Pfn).zip(pages) {
                    *status = self.memory.read(pfn, pass, filter, page);
                }
                if pass == Pass::Both && self.mutant == Mutant::SkippedPage {
                    statuses[0] = PageStatus::OtherPass;
                }
                let pages = Input::Pages(&statuses[..usize::from(count)]);
                return self.give(now, pages);
            }
        };
        self.give(now, Input::Filled(filled));
    }

    /// Only datagrams can be refused.
    fn give(&mut self, now: Instant, input: Input<'_>) {
        if self.client.handle(now, input).is_err() {
            self.counts.one("refused what was asked for");
        }
    }
}

/// The name under which a refused datagram is counted: why, without the particulars.
pub(crate) fn refusal(reject: &proto::wire::Reject) -> String {
    let text = format!("{reject:?}");
    let word = text.split('(').next().unwrap_or_default();
    format!("refused: {word}")
}

/// The registers of CPU `index`: numbers that follow from it.
#[must_use]
pub fn cpu(index: u32) -> Cpu {
    let mut cpu = Cpu::new_zeroed();
    cpu.cpu = index.into();
    cpu.flags = CPU_CAPTURED.into();
    cpu.registers = [u64::from(index + 100).into(); 27];
    cpu
}

fn fill(scratch: &mut [u8; BLOCK_BYTES], bytes: &[u8]) -> usize {
    scratch[..bytes.len()].copy_from_slice(bytes);
    bytes.len()
}
