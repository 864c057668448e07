//! The simulated host: the client engine, its transmit buffers, and the answers to what it asks
//! for.

use std::collections::BTreeMap;

use proto::arming::{Address, Server};
use proto::client::{Client, Input, Outcome, Pool, Start, Step, Want};
use proto::keys::{Secret, SessionKeys};
use proto::record::{BLOCK_BYTES, BLOCK_PAGES, CPU_CAPTURED, Cpu, Hello, WrittenRange};
use proto::time::{Instant, Micros};
use proto::units::{ArmingId, KeyId, PAGE_BYTES, PacketNumber, Pfn, SessionId};
use proto::wire::Header;
use zerocopy::{FromZeros, IntoBytes};

use crate::memory::Memory;
use crate::options::Options;

/// The session every world uses.
pub const SESSION: SessionId = SessionId {
    key: KeyId(1),
    arming: ArmingId(2),
};
/// How long the host goes on without a reply.
pub const GIVE_UP: Micros = Micros::from_secs(60);
/// The kernel log of every host, oldest piece first: the client sends the newest first.
pub const LOG: [&str; 3] = [
    "boot messages\n",
    "device messages\n",
    "kernel panic: simulated\n",
];
/// The State text of every host.
pub const STATE: [&str; 2] = ["task:init\n", "Mem-Info:\n"];

/// The keys of [`SESSION`].
#[must_use]
pub fn keys() -> SessionKeys {
    Secret([3; 32]).session_keys(SESSION)
}

/// What a host did in one go.
pub struct Activity {
    /// Packets sent.
    pub sent: Vec<Vec<u8>>,
    /// When it wants to run again if nothing arrives; `None` if it is finished.
    pub wake_us: Option<u64>,
}

/// A host.
pub struct Host {
    client: Box<Client>,
    pool: Buffers,
    memory: Memory,
    options: Options,
    text_pieces: usize,
    state_pieces: usize,
    /// Digest of every packet number's first bytes: a number must never stand for two packets.
    sealed: BTreeMap<PacketNumber, Vec<u8>>,
    /// Whether the last step promised that the next one sends.
    train: bool,
    /// Datagrams that the engine refused.
    pub refused: u64,
    /// Pretend that the kernel faults when it writes the State text.
    pub state_faults: bool,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

/// The pool: buffers and the times at which the NIC gives each back.
struct Buffers {
    now_us: u64,
    buffers: Vec<(Vec<u8>, u64)>,
}

impl Pool for Buffers {
    fn buffer(&mut self, slot: u16) -> Option<&mut [u8]> {
        let (buffer, free_at) = &mut self.buffers[usize::from(slot)];
        (*free_at <= self.now_us).then_some(&mut buffer[..])
    }
}

impl Host {
    /// A host that has just crashed.
    #[must_use]
    pub fn new(options: &Options, memory: Memory) -> Self {
        let server = Server {
            local: Address::V4([10, 0, 0, 1]),
            local_port: 6666,
            remote: Address::V4([10, 0, 0, 2]),
            remote_port: 6666,
            next_hop: Address::V4([10, 0, 0, 2]),
            next_hop_mac: [2, 0, 0, 0, 0, 2],
            session: SESSION,
            keys: keys(),
        };
        let start = Start {
            server: &server,
            datagram_bytes: options.datagram_bytes,
            pool_slots: options.pool_slots,
            give_up: GIVE_UP,
            first: PacketNumber(options.seed % 1000),
            attempt: 0,
        };
        let mut hello = Hello::new_zeroed();
        hello.ram_pages = u64::try_from(memory.pfns().count()).unwrap_or(0).into();
        hello.cpus = options.cpus.into();
        hello.host[..4].copy_from_slice(b"host");
        hello.reason[..9].copy_from_slice(b"simulated");
        let mut client = Box::new(Client::new());
        client.start(Instant::from_micros(0), &start, &hello);
        let buffer = (vec![0; options.datagram_bytes], 0);
        let pool = Buffers {
            now_us: 0,
            buffers: vec![buffer; usize::from(options.pool_slots)],
        };
        Self {
            client,
            pool,
            memory,
            options: *options,
            text_pieces: 0,
            state_pieces: 0,
            sealed: BTreeMap::new(),
            train: false,
            refused: 0,
            state_faults: false,
            outcome: None,
        }
    }

    /// The engine, for its getters.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Takes a datagram. What the engine refuses is dropped, as a host drops it.
    pub fn receive(&mut self, now_us: u64, mut bytes: Vec<u8>) {
        self.train = false;
        let now = Instant::from_micros(now_us);
        if self
            .client
            .handle(now, Input::Datagram(&mut bytes))
            .is_err()
        {
            self.refused += 1;
        }
    }

    /// Takes one step that costs time, or as many as cost none.
    pub fn run(&mut self, now_us: u64) -> Result<Activity, String> {
        let mut sent = Vec::new();
        loop {
            self.pool.now_us = now_us;
            let step = self
                .client
                .poll(Instant::from_micros(now_us), &mut self.pool);
            if self.train && !matches!(step, Step::Send { .. }) {
                return Err(format!("promised another packet, then wanted {step:?}"));
            }
            self.train = false;
            match step {
                Step::Send { slot, len, more } => {
                    sent.extend(self.send(now_us, slot, len)?);
                    self.train = more;
                }
                Step::Read(want) => self.answer(now_us, want),
                Step::WaitUntil(at) => {
                    return Ok(Activity {
                        sent,
                        wake_us: Some(at.as_micros().max(now_us + 1)),
                    });
                }
                Step::Finished(outcome) => {
                    self.outcome = Some(outcome);
                    return Ok(Activity {
                        sent,
                        wake_us: None,
                    });
                }
            }
            if self.options.step_us > 0 {
                return Ok(Activity {
                    sent,
                    wake_us: Some(now_us + self.options.step_us),
                });
            }
        }
    }

    /// Gives a buffer to the NIC; returns what goes onto the link.
    fn send(&mut self, now_us: u64, slot: u16, len: usize) -> Result<Option<Vec<u8>>, String> {
        let (buffer, free_at) = &mut self.pool.buffers[usize::from(slot)];
        if *free_at > now_us {
            return Err(format!("slot {slot} was sent while the NIC owned it"));
        }
        *free_at = now_us + self.options.nic_us;
        let bytes = buffer[..len].to_vec();
        let header =
            Header::parse(&bytes).map_err(|reject| format!("sent no packet: {reject:?}"))?;
        match self.sealed.get(&header.number) {
            None => {
                self.sealed.insert(header.number, bytes.clone());
            }
            Some(before) if *before != bytes => {
                return Err(format!(
                    "{:?} was sealed twice with different bytes",
                    header.number
                ));
            }
            Some(_) if self.options.resends_off => return Ok(None),
            Some(_) => {}
        }
        Ok(Some(bytes))
    }

    fn answer(&mut self, now_us: u64, want: Want) {
        let now = Instant::from_micros(now_us);
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
            Want::Registers(index) if index < self.options.cpus => {
                fill(scratch, cpu(index).as_bytes())
            }
            Want::Registers(_) => 0,
            Want::Notes => fill(scratch, b"OSRELEASE=simulated\n"),
            Want::MemoryMap => fill(scratch, self.memory.ranges().as_bytes()),
            Want::Written => {
                let range = WrittenRange {
                    first: 1.into(),
                    pages: 1.into(),
                    kind: 1.into(),
                };
                fill(scratch, range.as_bytes())
            }
            Want::State if self.state_faults => return self.client.state_faulted(),
            Want::State => {
                let piece = STATE.get(self.state_pieces);
                self.state_pieces += 1;
                fill(scratch, piece.map_or(&[], |text| text.as_bytes()))
            }
            Want::Pages {
                first, count, pass, ..
            } => {
                let mut statuses = [const { proto::client::PageStatus::OtherPass }; BLOCK_PAGES];
                let pages = scratch
                    .chunks_mut(PAGE_BYTES)
                    .zip(&mut statuses)
                    .take(count.into());
                for (pfn, (page, status)) in (first.0..).map(Pfn).zip(pages) {
                    *status = self.memory.read(pfn, pass, page);
                }
                let pages = Input::Pages(&statuses[..usize::from(count)]);
                return self.give(now, pages);
            }
        };
        self.give(now, Input::Filled(filled));
    }

    /// Only datagrams can be refused.
    fn give(&mut self, now: Instant, input: Input<'_>) {
        self.refused += u64::from(self.client.handle(now, input).is_err());
    }
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
