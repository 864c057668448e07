//! One session: the engine, its buffers, its memory and its socket.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, anyhow};
use dump::{Machine, Vmcoreinfo};
use proto::arming::{Address, Server};
use proto::client::{Attempts, Client, Input, Outcome, PageStatus, Pass, Start, Step, Then, Want};
use proto::record::{
    ARCH_X86_64, BLOCK_BYTES, BLOCK_PAGES, CPU_CAPTURED, CPU_CRASHING, Cpu, Hello, RamRange,
    ServerName,
};
use proto::time::{Instant, Micros};
use proto::units::{ArmingId, PAGE_BYTES, Pfn, SessionId};
use proto::wire::Reject;
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::source::{Crash, Source};
use super::train::{self, Slots, Train};
use crate::arm::address;
use crate::key::{HostKey, fill_random};
use crate::seal::RingKey;
use crate::serve::socket::Batch;

/// What sessions have in common.
pub(super) struct Plan {
    pub(super) server: SocketAddr,
    pub(super) mtu: Option<u16>,
    pub(super) give_up: Micros,
    /// Bytes that a session's transmit buffers may take.
    pub(super) pool_bytes: usize,
    /// How the memory is called.
    pub(super) name: String,
    pub(super) progress: Progress,
}

/// How far all sessions have come, for whoever watches.
#[derive(Default)]
pub(super) struct Progress {
    pub(super) pages: AtomicU64,
    pub(super) wire_bytes: AtomicU64,
}

pub(super) struct Session {
    client: Box<Client<RingKey>>,
    slots: Slots,
    pool_slots: u16,
    train: Train,
    socket: UdpSocket,
    source: Box<dyn Source>,
    log: Arc<[u8]>,
    /// Bytes of the log that are not sent yet: its begin, because the newest go first.
    log_left: usize,
    key: HostKey,
    name: SessionId,
    attempts: Attempts,
    /// When the engine wants to be asked again.
    wake_at: Instant,
    started_at: Instant,
    /// The last filter level asked for.
    filter: u8,
    wire_bytes: u64,
    datagram_bytes: usize,
}

/// What became of a session.
pub(super) struct Sent {
    pub(super) outcome: Outcome,
    pub(super) verdict: proto::reply::Verdict,
    pub(super) name: SessionId,
    pub(super) filter: u8,
    pub(super) statistics: proto::client::Statistics,
    pub(super) totals: proto::record::Totals,
    pub(super) round_trip: Option<Micros>,
    pub(super) seconds: f64,
    pub(super) wire_bytes: u64,
    pub(super) datagram_bytes: usize,
    pub(super) ram_pages: u64,
}

impl Session {
    pub(super) fn start(plan: &Plan, key: &HostKey, crash: Crash, now: Instant) -> Result<Self> {
        let (socket, datagram_bytes) = train::open(plan.server, plan.mtu)
            .with_context(|| format!("cannot open a socket towards {}", plan.server))?;
        let mut arming = [0; 8];
        fill_random(&mut arming)?;
        let name = SessionId {
            key: key.id,
            arming: ArmingId(u64::from_le_bytes(arming)),
        };
        let fit = u16::try_from(plan.pool_bytes / datagram_bytes).unwrap_or(u16::MAX);
        let pool_slots = fit.clamp(POOL_SLOTS_MIN, proto::client::SLOTS_MAX);
        let mut session = Self {
            client: Box::new(Client::with_packet_key()),
            slots: Slots::new(pool_slots, datagram_bytes),
            pool_slots,
            train: Train::new(),
            socket,
            source: crash.source,
            log: crash.log,
            log_left: 0,
            key: key.clone(),
            name,
            attempts: Attempts::new(now, 1, plan.give_up),
            wake_at: now,
            started_at: now,
            filter: 0,
            wire_bytes: 0,
            datagram_bytes,
        };
        session.begin(plan, now);
        Ok(session)
    }

    /// Begins an attempt.
    fn begin(&mut self, plan: &Plan, now: Instant) {
        let start = Start {
            server: &server(plan, &self.key, self.name),
            datagram_bytes: self.datagram_bytes,
            pool_slots: self.pool_slots,
            give_up: self.attempts.try_for(),
            first: self.attempts.first(),
            attempt: self.attempts.attempt(),
        };
        self.client
            .start(now, &start, &hello(plan, &self.key, self.source.machine()));
        self.wake_at = now;
        self.log_left = self.log.len();
    }

    pub(super) fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    pub(super) fn wake_at(&self) -> Instant {
        self.wake_at
    }

    /// Goes on until a train has left or there is nothing to do; returns the bytes sent, and what
    /// became of the session if it is over.
    pub(super) fn turn(
        &mut self,
        clock: &impl Fn() -> Instant,
        plan: &Plan,
    ) -> Result<(u64, Option<Sent>)> {
        let progress = &plan.progress;
        loop {
            let now = clock();
            match self.client.poll(now, &mut self.slots) {
                Step::Send { slot, len, .. } => {
                    let full = !self.train.has_room(len);
                    let bytes = if full { self.leave(progress)? } else { 0 };
                    self.train.push(&mut self.slots, slot, len);
                    if full {
                        return Ok((bytes, None));
                    }
                }
                Step::Read(want) => self
                    .answer(now, want, progress)
                    .map_err(|reject| anyhow!("the engine took no answer: {reject:?}"))?,
                Step::WaitUntil(at) => {
                    self.wake_at = at;
                    return Ok((self.leave(progress)?, None));
                }
                Step::Finished(outcome) => {
                    let here = matches!(outcome.then, Then::StartOver | Then::Redirect(OUR_SERVER));
                    let next = self.client.next_packet();
                    if here && self.attempts.next(now, &outcome, next) {
                        self.leave(progress)?;
                        self.begin(plan, now);
                        continue;
                    }
                    return Ok((self.leave(progress)?, Some(self.sent(now, outcome))));
                }
            }
        }
    }

    /// Takes the replies that are there.
    pub(super) fn hear(&mut self, batch: &mut Batch, now: Instant) -> Result<()> {
        batch
            .receive(&self.socket, std::time::Duration::ZERO)
            .context("cannot receive replies")?;
        batch.each(|_, datagram| {
            // What is no genuine, current reply is none of ours.
            if self.client.handle(now, Input::Datagram(datagram)).is_ok() {
                self.attempts.heard(now);
                self.wake_at = now;
            }
        });
        Ok(())
    }

    fn leave(&mut self, progress: &Progress) -> Result<u64> {
        let left = self
            .train
            .leave(&self.socket, &mut self.slots)
            .context("cannot send")?;
        self.wire_bytes += left.bytes;
        progress.wire_bytes.fetch_add(left.bytes, Ordering::Relaxed);
        Ok(left.bytes)
    }

    fn answer(&mut self, now: Instant, want: Want, progress: &Progress) -> Result<(), Reject> {
        let machine = self.source.machine();
        let scratch = self.client.scratch();
        let filled = match want {
            Want::Pages {
                first,
                count,
                pass,
                filter,
            } => {
                self.filter = filter;
                return self.pages(now, first, count.into(), pass, progress);
            }
            Want::Registers(index) => usize::try_from(index)
                .ok()
                .and_then(|index| machine.cpus.get(index))
                .map_or(0, |cpu| fill(scratch, registers(cpu).as_bytes())),
            Want::Notes => fill(scratch, &machine.vmcoreinfo),
            Want::MemoryMap => {
                let range = |range: &dump::RamRange| RamRange {
                    first: range.first.0.into(),
                    pages: range.pages.into(),
                };
                let ranges: Vec<RamRange> = machine.ram.iter().map(range).collect();
                fill(scratch, ranges.as_bytes())
            }
            Want::Text => {
                let end = self.log_left;
                self.log_left = end.saturating_sub(scratch.len());
                fill(scratch, &self.log[self.log_left..end])
            }
            // Nothing here writes to the memory; tasks are for who analyses; the hardware was another's.
            Want::Written | Want::State | Want::Processor(_) | Want::Devices => 0,
        };
        self.client.handle(now, Input::Filled(filled))
    }

    fn pages(
        &mut self,
        now: Instant,
        first: Pfn,
        count: usize,
        pass: Pass,
        progress: &Progress,
    ) -> Result<(), Reject> {
        let mut statuses = [PageStatus::OtherPass; BLOCK_PAGES];
        let statuses = &mut statuses[..count.min(BLOCK_PAGES)];
        if is_of(self.source.machine(), first, count, pass) {
            let (pages, _) = self.client.scratch().as_chunks_mut::<PAGE_BYTES>();
            let pages = &mut pages[..statuses.len()];
            self.source.read(first.0, pages, statuses);
            progress
                .pages
                .fetch_add(statuses.len() as u64, Ordering::Relaxed);
        }
        self.client.handle(now, Input::Pages(statuses))
    }

    fn sent(&self, now: Instant, outcome: Outcome) -> Sent {
        let micros = now.since(self.started_at).get();
        Sent {
            outcome,
            verdict: self.client.verdict(),
            name: self.name,
            filter: self.filter,
            statistics: *self.client.statistics(),
            totals: self.client.totals(),
            round_trip: self.client.round_trip(),
            #[expect(clippy::cast_precision_loss, reason = "shown to a few digits")]
            seconds: micros as f64 / 1e6,
            wire_bytes: self.wire_bytes,
            datagram_bytes: self.datagram_bytes,
            ram_pages: self.source.machine().pages(),
        }
    }
}

/// Whether a block belongs to a pass. The kernel image is all that a core file tells apart, and it
/// goes first, whole blocks of it.
fn is_of(machine: &Machine, first: Pfn, count: usize, pass: Pass) -> bool {
    let precious = machine
        .kernel_image
        .is_some_and(|image| first.0 < image.end() && image.first.0 < first.plus(count as u64).0);
    match pass {
        Pass::Precious => precious,
        Pass::Rest => !precious,
        Pass::Both => true,
    }
}

fn server(plan: &Plan, key: &HostKey, session: SessionId) -> Server {
    // The engine takes names and keys from it; frames are made by the kernel.
    Server {
        local: Address::V4([0; 4]),
        local_port: 0,
        remote: address(plan.server.ip()),
        remote_port: plan.server.port(),
        next_hop: Address::V4([0; 4]),
        next_hop_mac: [0; 6],
        session,
        keys: key.secret.session_keys(session),
    }
}

fn hello(plan: &Plan, key: &HostKey, machine: &Machine) -> Hello {
    let mut hello = Hello::new_zeroed();
    let crashed = machine.cpus.iter().find(|cpu| cpu.crashed);
    let image = machine.kernel_image;
    let phys_base = Vmcoreinfo::new(&machine.vmcoreinfo).phys_base();
    hello.arch = ARCH_X86_64.into();
    hello.page_bytes = 4096.into();
    hello.cpus = u32::try_from(machine.cpus.len()).unwrap_or(0).into();
    hello.crashing_cpu = crashed.map_or(0, |cpu| cpu.number).into();
    hello.pid = crashed.map_or(0, pid).into();
    hello.ram_pages = machine.pages().into();
    hello.unix_seconds = machine.crash_time_s.into();
    hello.page_offset = machine.page_offset.into();
    hello.phys_base = phys_base.unwrap_or(0).into();
    hello.image_pfn = image.map_or(0, |image| image.first.0).into();
    hello.image_pages = image.map_or(0, |image| image.pages).into();
    hello.servers[usize::from(OUR_SERVER)] =
        ServerName::new(address(plan.server.ip()), plan.server.port());
    let host = if machine.node.is_empty() {
        key.host.as_str()
    } else {
        &machine.node
    };
    put(&mut hello.host, host);
    put(&mut hello.release, &machine.release);
    put(&mut hello.kernel_version, &machine.version);
    put(
        &mut hello.reason,
        &format!("unknown: netdump send {}", plan.name),
    );
    hello
}

fn registers(cpu: &dump::Cpu) -> Cpu {
    let mut record = Cpu::new_zeroed();
    let captured = cpu.registers.map_or(0, |_| CPU_CAPTURED);
    let crashing = if cpu.crashed { CPU_CRASHING } else { 0 };
    record.cpu = cpu.number.into();
    record.flags = (captured | crashing).into();
    record.pid = pid(cpu).into();
    record.registers = cpu.registers.unwrap_or_default().map(Into::into);
    record
}

fn pid(cpu: &dump::Cpu) -> i32 {
    i32::try_from(cpu.pid).unwrap_or(0)
}

/// Copies as much of `bytes` as there is room for.
fn fill(scratch: &mut [u8; BLOCK_BYTES], bytes: &[u8]) -> usize {
    let count = bytes.len().min(scratch.len());
    scratch[..count].copy_from_slice(&bytes[..count]);
    count
}

fn put(field: &mut [u8], text: &str) {
    let mut count = text.len().min(field.len());
    while !text.is_char_boundary(count) {
        count -= 1;
    }
    field[..count].copy_from_slice(&text.as_bytes()[..count]);
}

/// The one server's place among those the session could go to.
const OUR_SERVER: u8 = 0;
/// Fewer would stall every round trip.
const POOL_SLOTS_MIN: u16 = 16;
