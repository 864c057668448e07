//! A host that crashes on loopback: the real client engine over a real socket, with memory that is
//! computed.

use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use netdump::key::HostKey;
use proto::arming::{Address, Server};
use proto::client::{Client, Input, Outcome, PageStatus, Pass, Pool, Start, Step, Then, Want};
use proto::record::{
    BLOCK_BYTES, BLOCK_PAGES, CPU_CAPTURED, CPU_CRASHING, Cpu, Hello, RamRange, ServerName,
    WrittenRange,
};
use proto::reply::Verdict;
use proto::time::{Instant as EngineInstant, Micros};
use proto::units::{ArmingId, PAGE_BYTES, PacketNumber, Pfn, SessionId};
use proto::wire::Reject;
use zerocopy::{FromZeros as _, IntoBytes as _};

/// The kernel log, newest piece first, as it is sent.
const TEXT: [&str; 3] = [
    "Kernel panic - not syncing: test\n",
    "eth0: link is up\n",
    "Linux version 6.1.0-test\n",
];
/// The State text, in order.
pub(crate) const STATE: [&str; 2] = ["task:init state:S\n", "Mem-Info:\n"];
/// Pages before this one belong to the first pass.
const PRECIOUS_END: u64 = 64;
const SLOTS: u16 = 64;
const PATIENCE: Duration = Duration::from_secs(60);
const DATAGRAM_BYTES: usize = 1472;

/// A host with so many pages of RAM in two ranges, about to crash.
pub(crate) struct Host {
    /// Its key.
    pub(crate) key: HostKey,
    /// Its arming.
    pub(crate) arming: u64,
    /// Its ranges of RAM: first page and number.
    pub(crate) ram: Vec<(u64, u64)>,
    /// Pages of RAM that its Hello announces.
    pub(crate) announced_pages: u64,
    /// How often this crash was sent before.
    pub(crate) attempt: u16,
    /// The first packet number.
    pub(crate) first: u64,
    /// Every so many-th packet that is sent is lost on its way.
    pub(crate) lose_every: Option<u64>,
    /// It dies after so many packets.
    pub(crate) packets_max: Option<u64>,
    /// It dies after this time.
    pub(crate) lives: Option<Duration>,
    /// The network is cut for so long after so many packets.
    pub(crate) cut: Option<(u64, Duration)>,
    /// How long it goes on without a reply.
    pub(crate) give_up: Duration,
    /// Its boot id.
    pub(crate) boot: [u8; 16],
    /// The kernel log, newest piece first.
    pub(crate) log: Vec<&'static str>,
    /// The servers it was armed for, of which it is with the first.
    pub(crate) servers: Vec<SocketAddr>,
}

/// What became of a crash.
pub(crate) struct Sent {
    /// How the engine ended; `None` if the host died.
    pub(crate) outcome: Option<Outcome>,
    /// The first packet number that is free.
    pub(crate) next_packet: u64,
    /// All datagrams, as they were sent.
    pub(crate) datagrams: Vec<Vec<u8>>,
    /// All pages that were sent, in order, with the attempt.
    pub(crate) pages: Vec<(u16, u64)>,
    /// When it read its first page and its last.
    pub(crate) paging: Option<(Instant, Instant)>,
    /// The last attempt.
    pub(crate) attempt: u16,
    /// The last verdict it heard.
    pub(crate) verdict: Verdict,
    /// How long it took.
    pub(crate) took: Duration,
}

impl Host {
    /// A host with some 4 MiB of RAM: about 800 packets.
    pub(crate) fn new(key: &HostKey, arming: u64) -> Self {
        Self {
            key: key.clone(),
            arming,
            ram: vec![(1, 699), (4096, 300)],
            announced_pages: 999,
            attempt: 0,
            first: 0,
            lose_every: None,
            packets_max: None,
            lives: None,
            cut: None,
            give_up: Duration::from_secs(20),
            boot: [1; 16],
            log: TEXT.to_vec(),
            servers: Vec::new(),
        }
    }

    /// Crashes: sends everything to `server`.
    pub(crate) fn crash(&self, server: SocketAddr) -> Sent {
        self.crash_with(server, |_| {})
    }

    /// Crashes, and calls `watch` with the number of packets sent before each one.
    pub(crate) fn crash_with(&self, server: SocketAddr, watch: impl FnMut(u64)) -> Sent {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(server).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut client = Box::new(Client::new());
        client.start(
            EngineInstant::from_micros(0),
            &self.start(&self.server(), self.attempt, self.first),
            &self.hello(),
        );
        let run = Run {
            host: self,
            socket,
            client,
            pool: Buffers(vec![vec![0; DATAGRAM_BYTES]; usize::from(SLOTS)]),
            begin: Instant::now(),
            text: 0,
            state: 0,
            devices: false,
            cut_until: None,
            paging: None,
            attempt: self.attempt,
            datagrams: Vec::new(),
            pages: Vec::new(),
        };
        run.run(watch)
    }

    /// Pages of RAM, all ranges.
    pub(crate) fn pages(&self) -> u64 {
        self.ram.iter().map(|(_, pages)| pages).sum()
    }

    fn server(&self) -> Server {
        let session = SessionId {
            key: self.key.id,
            arming: ArmingId(self.arming),
        };
        Server {
            local: Address::V4([127, 0, 0, 1]),
            local_port: 6666,
            remote: Address::V4([127, 0, 0, 1]),
            remote_port: 6666,
            next_hop: Address::V4([127, 0, 0, 1]),
            next_hop_mac: [2, 0, 0, 0, 0, 2],
            session,
            keys: self.key.secret.session_keys(session),
        }
    }

    fn start<'a>(&self, server: &'a Server, attempt: u16, first: u64) -> Start<'a> {
        Start {
            server,
            datagram_bytes: DATAGRAM_BYTES,
            pool_slots: SLOTS,
            give_up: Micros::from_millis(u64::try_from(self.give_up.as_millis()).unwrap()),
            first: PacketNumber(first),
            attempt,
        }
    }

    fn hello(&self) -> Hello {
        let mut hello = Hello::new_zeroed();
        hello.arch = proto::record::ARCH_X86_64.into();
        hello.page_bytes = 4096.into();
        hello.cpus = 2.into();
        hello.ram_pages = self.announced_pages.into();
        hello.unix_seconds = 1_795_543_320.into();
        hello.page_offset = 0xffff_8880_0000_0000.into();
        hello.boot = self.boot;
        for (name, server) in hello.servers.iter_mut().zip(&self.servers) {
            let SocketAddr::V4(server) = server else {
                panic!("the tests use IPv4");
            };
            *name = ServerName::new(Address::V4(server.ip().octets()), server.port());
        }
        put(&mut hello.host, self.key.host.as_str());
        put(&mut hello.release, "6.1.0-test");
        put(&mut hello.kernel_version, "#1 SMP test");
        put(&mut hello.reason, "Kernel panic - not syncing: test\n");
        put(&mut hello.comm, "init");
        hello
    }
}

/// What a page holds: zeros, noise, or text that compresses.
pub(crate) fn page(pfn: u64) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    match pfn % 4 {
        0 => {}
        1 => {
            let mut state = pfn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            for byte in &mut page {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *byte = state.to_le_bytes()[0];
            }
        }
        _ => {
            let word = pfn.to_le_bytes();
            page.as_chunks_mut::<8>().0.fill(word);
        }
    }
    page
}

struct Buffers(Vec<Vec<u8>>);

impl Pool for Buffers {
    fn buffer(&mut self, slot: u16) -> Option<&mut [u8]> {
        self.0.get_mut(usize::from(slot)).map(Vec::as_mut_slice)
    }
}

struct Run<'a> {
    host: &'a Host,
    socket: UdpSocket,
    client: Box<Client>,
    pool: Buffers,
    begin: Instant,
    text: usize,
    state: usize,
    devices: bool,
    cut_until: Option<Instant>,
    paging: Option<(Instant, Instant)>,
    attempt: u16,
    datagrams: Vec<Vec<u8>>,
    pages: Vec<(u16, u64)>,
}

impl Run<'_> {
    fn run(mut self, mut watch: impl FnMut(u64)) -> Sent {
        let outcome = loop {
            let now = self.now();
            if self
                .host
                .lives
                .is_some_and(|lives| self.begin.elapsed() > lives)
            {
                break None;
            }
            // A host that is told to stay does so for ever; a test that forgot it ends here.
            assert!(self.begin.elapsed() < PATIENCE, "the host still waits");
            match self.client.poll(now, &mut self.pool) {
                Step::Send { slot, len, more } => {
                    let sent = self.datagrams.len() as u64;
                    watch(sent);
                    if self.host.packets_max.is_some_and(|max| sent >= max) {
                        break None;
                    }
                    self.send(slot, len);
                    if !more {
                        self.hear(Duration::ZERO);
                    }
                }
                Step::Read(want) => self.answer(want),
                Step::WaitUntil(at) => self.hear(Duration::from_micros(at.since(now).get())),
                Step::Finished(outcome) if outcome.then == Then::StartOver => self.start_over(),
                Step::Finished(outcome) => break Some(outcome),
            }
        };
        Sent {
            outcome,
            next_packet: self.client.next_packet().0,
            datagrams: self.datagrams,
            pages: self.pages,
            paging: self.paging,
            attempt: self.attempt,
            verdict: self.client.verdict(),
            took: self.begin.elapsed(),
        }
    }

    /// The server has lost what it had acknowledged: everything again, as another attempt.
    fn start_over(&mut self) {
        let first = self.client.next_packet().0;
        self.attempt += 1;
        (self.text, self.state) = (0, 0);
        let server = self.host.server();
        let start = self.host.start(&server, self.attempt, first);
        let now = self.now();
        self.client.start(now, &start, &self.host.hello());
    }

    fn now(&self) -> EngineInstant {
        EngineInstant::from_micros(u64::try_from(self.begin.elapsed().as_micros()).unwrap())
    }

    fn send(&mut self, slot: u16, len: usize) {
        let bytes = self.pool.0[usize::from(slot)][..len].to_vec();
        let sent = self.datagrams.len() as u64;
        if let Some((at, duration)) = self.host.cut
            && sent == at
        {
            self.cut_until = Some(Instant::now() + duration);
        }
        let cut = self.cut_until.is_some_and(|until| Instant::now() < until);
        let unlucky = |every: u64| sent % every == every - 1;
        let lost = cut || self.host.lose_every.is_some_and(unlucky);
        if !lost {
            // A refused port is a server that is being restarted.
            drop(self.socket.send(&bytes));
        }
        self.datagrams.push(bytes);
    }

    /// Takes what has arrived; if nothing has, waits for it, for `wait` at most. A receive with a
    /// timeout would wait for a tick of the kernel's clock at least.
    fn hear(&mut self, wait: Duration) {
        let mut bytes = [0; 2048];
        let until = Instant::now() + wait;
        let mut heard = false;
        loop {
            while let Ok(length) = self.socket.recv(&mut bytes) {
                let now = self.now();
                let taken = self
                    .client
                    .handle(now, Input::Datagram(&mut bytes[..length]));
                // A reply may be late, or of a server that is dead, but never broken.
                if let Err(reject) = taken {
                    assert!(
                        matches!(reject, Reject::Stale | Reject::OtherSession),
                        "{reject:?}"
                    );
                }
                heard = true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if heard || left.is_zero() {
                return;
            }
            thread::sleep(left.min(Duration::from_micros(100)));
        }
    }

    fn answer(&mut self, want: Want) {
        let now = self.now();
        let scratch = self.client.scratch();
        let filled = match want {
            Want::Text => fill(scratch, next(&self.host.log, &mut self.text)),
            Want::Registers(index) if index < 2 => fill(scratch, cpu(index).as_bytes()),
            Want::Processor(cpu @ 0..2) => fill(scratch, &processor(cpu)),
            Want::Devices if !std::mem::replace(&mut self.devices, true) => fill(scratch, &DEVICE),
            Want::Registers(_) | Want::Processor(_) | Want::Devices => 0,
            Want::Notes => fill(
                scratch,
                b"OSRELEASE=6.1.0-test\nPAGESIZE=4096\nNUMBER(phys_base)=0\n",
            ),
            Want::MemoryMap => {
                let range = |&(first, pages): &(u64, u64)| RamRange {
                    first: first.into(),
                    pages: pages.into(),
                };
                let ranges: Vec<RamRange> = self.host.ram.iter().map(range).collect();
                fill(scratch, ranges.as_bytes())
            }
            Want::Written => fill(
                scratch,
                WrittenRange {
                    first: 5.into(),
                    pages: 2.into(),
                    kind: 1.into(),
                }
                .as_bytes(),
            ),
            Want::State => fill(scratch, next(&STATE, &mut self.state)),
            Want::Pages {
                first, count, pass, ..
            } => {
                let now_read = Instant::now();
                let (from, _) = self.paging.unwrap_or((now_read, now_read));
                self.paging = Some((from, now_read));
                let mut statuses = [PageStatus::OtherPass; BLOCK_PAGES];
                for ((Pfn(pfn), place), status) in (first.0..)
                    .map(Pfn)
                    .zip(scratch.chunks_mut(PAGE_BYTES))
                    .zip(&mut statuses)
                    .take(count.into())
                {
                    let precious = pfn < PRECIOUS_END;
                    let other = pass != Pass::Both && precious != (pass == Pass::Precious);
                    *status = if other {
                        PageStatus::OtherPass
                    } else if pfn == 77 {
                        PageStatus::Unreadable
                    } else {
                        self.pages.push((self.attempt, pfn));
                        place.copy_from_slice(&page(pfn));
                        PageStatus::Read
                    };
                }
                self.client
                    .handle(now, Input::Pages(&statuses[..usize::from(count)]))
                    .unwrap();
                return;
            }
        };
        self.client.handle(now, Input::Filled(filled)).unwrap();
    }
}

/// A CPU with two registers.
fn processor(cpu: u32) -> Vec<u8> {
    let register =
        |space: u8, number: u8| [space, 0, 0, 0, number, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    let head = u64::from(cpu).to_le_bytes();
    [&head[..], &register(2, 0), &register(1, 0x1b)].concat()
}

/// A network card of which nothing but its name was not zero.
const DEVICE: [u8; 16] = [
    0, 0, 0, 0, 0, 0x18, 0, 1, 4, 0, 0, 0, 0x86, 0x80, 0x0e, 0x10,
];

fn next(pieces: &[&'static str], at: &mut usize) -> &'static [u8] {
    let piece = pieces.get(*at).copied().unwrap_or_default();
    *at += 1;
    piece.as_bytes()
}

fn fill(scratch: &mut [u8; BLOCK_BYTES], bytes: &[u8]) -> usize {
    scratch[..bytes.len()].copy_from_slice(bytes);
    bytes.len()
}

fn put(field: &mut [u8], text: &str) {
    field[..text.len()].copy_from_slice(text.as_bytes());
}

fn cpu(number: u32) -> Cpu {
    let mut cpu = Cpu::new_zeroed();
    cpu.cpu = number.into();
    cpu.flags = (CPU_CAPTURED | if number == 0 { CPU_CRASHING } else { 0 }).into();
    cpu.pid = i32::try_from(number).unwrap().into();
    cpu.registers[16] = 0xffff_ffff_8100_0000.into();
    put(&mut cpu.comm, "init");
    cpu
}
