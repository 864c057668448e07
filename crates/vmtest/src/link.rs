//! The wire: a thread that is the switch, the gateway and the road to the server for one guest.
//!
//! QEMU's `dgram` network backend sends and takes one Ethernet frame a message over a connected
//! pair of local sockets, which hold back the sender instead of losing frames. The thread answers
//! ARP for the server's address and carries UDP between the guest and a real server process on
//! loopback. Each frame, whichever way it goes, is first given to the faults; what is lost is
//! counted and not written to the capture.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::batch::{self, Batch, CAPACITY};
use crate::frame::{self, Endpoint, Frame, Mac, UDP_HEADERS};
use crate::pattern;
use crate::pcap::Pcap;
use crate::stage::{SERVER_ADDRESS, SERVER_PORT};

/// What goes wrong on the wire, the same in both directions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Frames lost out of a hundred.
    pub loss_percent: u8,
    /// The same seed loses the same frames of the same sequence.
    pub seed: u64,
}

/// What has passed so far; the thread writes, everybody reads.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames the guest sent, and their bytes.
    pub guest_frames: AtomicU64,
    /// Bytes of those frames.
    pub guest_bytes: AtomicU64,
    /// Datagrams of the guest that reached the server.
    pub to_server: AtomicU64,
    /// Frames given to the guest.
    pub to_guest: AtomicU64,
    /// Frames of the guest that the faults lost.
    pub lost_from_guest: AtomicU64,
    /// Frames for the guest that the faults lost.
    pub lost_to_guest: AtomicU64,
    /// Frames and datagrams that found a full socket: losses nobody asked for.
    pub overruns: AtomicU64,
    /// Requests for the server's hardware address.
    pub arp: AtomicU64,
    /// Frames that are neither ARP nor UDP for the server.
    pub other: AtomicU64,
    /// Nanoseconds from the start of the link to the mark, or 0 before.
    marked_ns: AtomicU64,
    /// Bytes of the guest's frames at the mark.
    marked_bytes: AtomicU64,
    /// The same as `marked_ns` for the first datagram after the mark, or 0 before.
    first_ns: AtomicU64,
    /// The same for the last datagram of the guest.
    last_ns: AtomicU64,
}

/// A running wire; it ends when dropped.
#[derive(Debug)]
pub struct Link {
    /// What has passed.
    pub counters: Arc<Counters>,
    started: Instant,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// Local sockets hold this much before they hold back the sender, if the system allows it (root),
/// else its own limit.
const SOCKET_BUFFER: usize = 8 << 20;
/// How long the thread may not notice that it should end.
const POLL_TIMEOUT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};
/// Source ports of the guest that are remembered; it uses one for arming and one for its session.
const FLOWS_MAX: usize = 64;

/// Marks the beginning of the crash.
#[derive(Clone, Debug)]
pub struct Marker {
    counters: Arc<Counters>,
    started: Instant,
}

impl Marker {
    /// The crash begins when `delay` is over: datagrams from here on belong to it.
    pub fn mark(&self, delay: Duration) {
        let bytes = self.counters.guest_bytes.load(Ordering::Relaxed);
        self.counters.marked_bytes.store(bytes, Ordering::Relaxed);
        self.counters.first_ns.store(0, Ordering::Release);
        let crash = nanoseconds(self.started.elapsed() + delay);
        self.counters.marked_ns.store(crash, Ordering::Release);
    }
}

impl Link {
    /// Starts the wire to the server on loopback port `server_port`; gives the guest's end for
    /// QEMU.
    ///
    /// # Errors
    /// If sockets, the capture file or the thread cannot be made.
    pub fn start(server_port: u16, faults: Faults, capture: &Path) -> Result<(Self, OwnedFd)> {
        let (ours, guest) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .context("cannot make the guest's wire")?;
        for end in [&ours, &guest] {
            // The forced form needs root; the plain one is cut to the system's limit, which only
            // costs speed.
            sockopt::set_socket_send_buffer_size_force(end, SOCKET_BUFFER)
                .or_else(|_| sockopt::set_socket_send_buffer_size(end, SOCKET_BUFFER))?;
        }
        let counters = Arc::new(Counters::default());
        let stop = Arc::new(AtomicBool::new(false));
        let started = Instant::now();
        let switch = Switch {
            wire: ours,
            server_port,
            guest_mac: [0xff; 6],
            flows: Vec::new(),
            dice: [Dice::new(faults, 0), Dice::new(faults, 1)],
            counters: Arc::clone(&counters),
            started,
            capture: Pcap::create(capture)
                .with_context(|| format!("cannot write {}", capture.display()))?,
        };
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("wire".to_owned())
            .spawn(move || switch.run(&stopped))
            .context("cannot start the wire's thread")?;
        Ok((
            Self {
                counters,
                started,
                stop,
                thread: Some(thread),
            },
            guest,
        ))
    }

    /// What tells the wire, from any thread, that the crash begins.
    #[must_use]
    pub fn marker(&self) -> Marker {
        Marker {
            counters: Arc::clone(&self.counters),
            started: self.started,
        }
    }

    /// Bytes of the guest's frames since the mark, 0 before it.
    #[must_use]
    pub fn bytes_since_mark(&self) -> u64 {
        if self.counters.marked_ns.load(Ordering::Acquire) == 0 {
            return 0;
        }
        let before = self.counters.marked_bytes.load(Ordering::Relaxed);
        self.counters
            .guest_bytes
            .load(Ordering::Relaxed)
            .saturating_sub(before)
    }

    /// Time from the mark to the first datagram after it.
    #[must_use]
    pub fn first_datagram(&self) -> Option<Duration> {
        let [marked, first] = [&self.counters.marked_ns, &self.counters.first_ns]
            .map(|time| time.load(Ordering::Acquire));
        (marked > 0 && first > 0).then(|| Duration::from_nanos(first.saturating_sub(marked)))
    }

    /// Time from the first datagram after the mark to the last.
    #[must_use]
    pub fn session_time(&self) -> Option<Duration> {
        let [first, last] = [&self.counters.first_ns, &self.counters.last_ns]
            .map(|time| time.load(Ordering::Acquire));
        (first > 0).then(|| Duration::from_nanos(last.saturating_sub(first)))
    }

    /// Ends the thread.
    ///
    /// # Errors
    /// What ended it before, if something did.
    pub fn stop(mut self) -> Result<()> {
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Release);
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        thread.join().unwrap_or_else(|_| {
            Err(anyhow::anyhow!(
                "the wire's thread panicked; this is a bug of vmtest"
            ))
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Err(error) = self.join() {
            eprintln!("vmtest: the wire broke: {error:#}");
        }
    }
}

/// Decides for one direction which frames are lost.
#[derive(Debug)]
struct Dice {
    loss_percent: u8,
    state: u64,
}

impl Dice {
    fn new(faults: Faults, direction: u64) -> Self {
        Self {
            loss_percent: faults.loss_percent,
            state: pattern::mix(faults.seed ^ (direction << 63)),
        }
    }

    fn loses(&mut self) -> bool {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        pattern::mix(self.state) % 100 < u64::from(self.loss_percent)
    }
}

/// The guest's datagrams from one port leave from a socket of their own, so that replies find their
/// way back.
#[derive(Debug)]
struct Flow {
    guest: Endpoint,
    socket: UdpSocket,
}

struct Switch {
    wire: OwnedFd,
    server_port: u16,
    guest_mac: Mac,
    flows: Vec<Flow>,
    dice: [Dice; 2],
    counters: Arc<Counters>,
    started: Instant,
    capture: Pcap,
}

impl Switch {
    fn run(mut self, stop: &AtomicBool) -> Result<()> {
        let mut batch = Batch::default();
        while !stop.load(Ordering::Acquire) {
            let mut poll = vec![PollFd::new(&self.wire, PollFlags::IN)];
            poll.extend(
                self.flows
                    .iter()
                    .map(|flow| PollFd::new(&flow.socket, PollFlags::IN)),
            );
            rustix::event::poll(&mut poll, Some(&POLL_TIMEOUT))?;
            if poll[0].revents().contains(PollFlags::HUP) {
                break;
            }
            let ready: Vec<bool> = poll
                .iter()
                .map(|poll| poll.revents().contains(PollFlags::IN))
                .collect();
            if ready[0] {
                self.carry_out(&mut batch)
                    .context("cannot carry the guest's frames")?;
            }
            for (index, _) in ready[1..].iter().enumerate().filter(|(_, ready)| **ready) {
                self.carry_in(index, &mut batch)
                    .context("cannot carry the server's replies")?;
            }
        }
        self.capture.flush().context("cannot write the capture")
    }

    fn carry_out(&mut self, batch: &mut Batch) -> Result<()> {
        let count = batch.receive(&self.wire, 0)?;
        let now = SystemTime::now();
        let mut waiting: [&[u8]; CAPACITY] = [&[]; CAPACITY];
        let mut waiting_count = 0;
        let mut waiting_flow = 0;
        for index in 0..count {
            let bytes = batch.get(index);
            add(&self.counters.guest_frames, 1);
            add(&self.counters.guest_bytes, bytes.len() as u64);
            if self.dice[0].loses() {
                add(&self.counters.lost_from_guest, 1);
                continue;
            }
            self.capture.frame(now, bytes)?;
            match frame::parse(bytes) {
                Frame::ArpRequest { target } if target == SERVER_ADDRESS => {
                    self.answer_arp(bytes, now)?
                }
                Frame::Udp { from, to, payload } if to == (SERVER_ADDRESS, SERVER_PORT) => {
                    self.guest_mac = frame::source(bytes).unwrap_or(self.guest_mac);
                    let flow = self.flow(from)?;
                    if flow != waiting_flow && waiting_count > 0 {
                        self.to_server(waiting_flow, &waiting[..waiting_count])?;
                        waiting_count = 0;
                    }
                    waiting_flow = flow;
                    waiting[waiting_count] = &bytes[payload];
                    waiting_count += 1;
                }
                Frame::ArpRequest { .. } | Frame::Udp { .. } | Frame::Other => {
                    add(&self.counters.other, 1)
                }
            }
        }
        if waiting_count > 0 {
            self.to_server(waiting_flow, &waiting[..waiting_count])?;
        }
        Ok(())
    }

    fn to_server(&self, flow: usize, datagrams: &[&[u8]]) -> Result<()> {
        let now = nanoseconds(self.started.elapsed());
        self.counters.last_ns.store(now, Ordering::Release);
        if self.counters.first_ns.load(Ordering::Acquire) == 0 {
            self.counters.first_ns.store(now, Ordering::Release);
        }
        let sent = match batch::send(&self.flows[flow].socket, datagrams) {
            Ok(sent) => sent,
            // Nobody listens there (yet, or any more): to the guest that is a server that does not
            // answer.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => 0,
            Err(error) => return Err(error.into()),
        };
        add(&self.counters.to_server, sent as u64);
        add(&self.counters.overruns, (datagrams.len() - sent) as u64);
        Ok(())
    }

    fn carry_in(&mut self, flow: usize, batch: &mut Batch) -> Result<()> {
        let count = match batch.receive(&self.flows[flow].socket, UDP_HEADERS) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => 0,
            Err(error) => return Err(error.into()),
        };
        let guest = self.flows[flow].guest;
        let now = SystemTime::now();
        let mut kept = [0; CAPACITY];
        let mut kept_count = 0;
        for index in 0..count {
            if self.dice[1].loses() {
                add(&self.counters.lost_to_guest, 1);
                continue;
            }
            let reply = batch.get_mut(index);
            frame::write_udp_headers(reply, self.guest_mac, (SERVER_ADDRESS, SERVER_PORT), guest);
            self.capture.frame(now, reply)?;
            kept[kept_count] = index;
            kept_count += 1;
        }
        let mut frames: [&[u8]; CAPACITY] = [&[]; CAPACITY];
        for (frame, index) in frames.iter_mut().zip(&kept[..kept_count]) {
            *frame = batch.get(*index);
        }
        self.to_guest(&frames[..kept_count])
    }

    fn to_guest(&self, frames: &[&[u8]]) -> Result<()> {
        let sent = match batch::send(&self.wire, frames) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Err(error) => return Err(error.into()),
        };
        add(&self.counters.to_guest, sent as u64);
        add(&self.counters.overruns, (frames.len() - sent) as u64);
        Ok(())
    }

    fn answer_arp(&mut self, request: &[u8], now: SystemTime) -> Result<()> {
        add(&self.counters.arp, 1);
        let Some(reply) = frame::arp_reply(request, SERVER_ADDRESS) else {
            return Ok(());
        };
        if self.dice[1].loses() {
            add(&self.counters.lost_to_guest, 1);
            return Ok(());
        }
        self.capture.frame(now, &reply)?;
        self.to_guest(&[&reply])
    }

    /// The flow of the guest's endpoint `guest`, made when it is new; the oldest makes room.
    fn flow(&mut self, guest: Endpoint) -> Result<usize> {
        if let Some(index) = self.flows.iter().position(|flow| flow.guest == guest) {
            return Ok(index);
        }
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
            .context("cannot make a socket to the server")?;
        socket.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, self.server_port)))?;
        sockopt::set_socket_recv_buffer_size_force(socket.as_fd(), SOCKET_BUFFER)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(socket.as_fd(), SOCKET_BUFFER))?;
        if self.flows.len() == FLOWS_MAX {
            self.flows.remove(0);
        }
        self.flows.push(Flow { guest, socket });
        Ok(self.flows.len() - 1)
    }
}

fn add(counter: &AtomicU64, number: u64) {
    counter.fetch_add(number, Ordering::Relaxed);
}

/// Never 0, which means "not yet".
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::HARNESS_MAC;

    /// A frame as the guest sends it: a datagram from its port `port` to the server.
    fn guest_frame(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; UDP_HEADERS];
        frame.extend_from_slice(payload);
        frame::write_udp_headers(
            &mut frame,
            HARNESS_MAC,
            ([10, 0, 2, 15], port),
            (SERVER_ADDRESS, SERVER_PORT),
        );
        frame[6..12].copy_from_slice(&[0x52, 0x54, 0, 1, 2, 3]);
        frame
    }

    struct World {
        server: UdpSocket,
        link: Link,
        guest: OwnedFd,
        _folder: tempfile::TempDir,
    }

    fn world(loss_percent: u8) -> World {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let port = server.local_addr().unwrap().port();
        let (link, guest) = Link::start(
            port,
            Faults {
                loss_percent,
                seed: 7,
            },
            &folder.path().join("wire.pcap"),
        )
        .unwrap();
        World {
            server,
            link,
            guest,
            _folder: folder,
        }
    }

    fn receive(socket: &impl AsFd) -> Vec<u8> {
        let mut poll = [PollFd::new(socket, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 5,
            tv_nsec: 0,
        };
        assert_eq!(
            rustix::event::poll(&mut poll, Some(&limit)).unwrap(),
            1,
            "nothing came"
        );
        let mut batch = Batch::default();
        assert_eq!(batch.receive(socket, 0).unwrap(), 1);
        batch.get(0).to_vec()
    }

    #[test]
    fn datagrams_reach_the_server_and_replies_their_port() {
        let world = world(0);
        world.link.marker().mark(Duration::ZERO);
        for port in [40000, 40001] {
            batch::send(&world.guest, &[&guest_frame(port, b"hello")]).unwrap();
            let mut bytes = [0; 16];
            let (length, from) = world.server.recv_from(&mut bytes).unwrap();
            assert_eq!(&bytes[..length], b"hello");
            world.server.send_to(b"welcome", from).unwrap();
            let reply = receive(&world.guest);
            assert_eq!(reply[..6], [0x52, 0x54, 0, 1, 2, 3]);
            assert_eq!(reply[36..38], u16::to_be_bytes(port));
            assert_eq!(&reply[UDP_HEADERS..], b"welcome");
        }
        assert!(world.link.first_datagram().is_some());
        assert!(world.link.session_time().is_some());
    }

    #[test]
    fn loss_happens_as_often_as_asked() {
        let world = world(5);
        let frame = guest_frame(40000, &[0; 100]);
        let frames: u64 = 20_000;
        for _ in 0..frames {
            while batch::send(&world.guest, &[&frame]).unwrap() == 0 {
                std::thread::yield_now();
            }
        }
        let counters = Arc::clone(&world.link.counters);
        while counters.guest_frames.load(Ordering::Relaxed) < frames {
            std::thread::yield_now();
        }
        world.link.stop().unwrap();
        let lost = counters.lost_from_guest.load(Ordering::Relaxed);
        // Five standard deviations around 1000.
        assert!(
            (845..=1155).contains(&lost),
            "{lost} of {frames} frames were lost at 5 %"
        );
    }

    #[test]
    fn dice_are_the_same_for_the_same_seed_and_differ_by_direction() {
        let rolls = |seed, direction| {
            let mut dice = Dice::new(
                Faults {
                    loss_percent: 50,
                    seed,
                },
                direction,
            );
            std::array::from_fn::<bool, 64, _>(|_| dice.loses())
        };
        assert_eq!(rolls(1, 0), rolls(1, 0));
        assert_ne!(rolls(1, 0), rolls(1, 1));
        assert_ne!(rolls(1, 0), rolls(2, 0));
    }

    #[test]
    fn no_faults_lose_nothing() {
        let mut dice = Dice::new(Faults::default(), 0);
        assert!((0..100_000).all(|_| !dice.loses()));
    }
}
