//! The wire: a thread that is the switch, the gateway and the road to the server for one guest.
//!
//! QEMU's `dgram` network backend sends and takes one Ethernet frame a message over a connected
//! pair of local sockets, which hold back the sender instead of losing frames. The thread answers
//! questions for the server's hardware address, asks the crashed guest for its own as the server's
//! kernel would, and carries UDP between the guest and a real server process on loopback. Each
//! frame, whichever way it goes, takes a [`Road`] with its faults; what arrives is written to the
//! capture.

use std::borrow::Cow;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::batch::{self, Batch, CAPACITY};
use crate::frame::{self, Endpoint, Frame, HARNESS_MAC, Mac};
use crate::pcap::Pcap;
use crate::road::{Faults, Mishaps, Road};
use crate::stage::{FLOOD_BYTES, FLOOD_PORT, Network, Over, SERVER_PORT};

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
    /// What went wrong with the guest's frames, and with those for it.
    pub mishaps: [Arc<Mishaps>; 2],
    /// Datagrams of the guest that any stack throws away for their checksum.
    pub damaged: AtomicU64,
    /// Frames and datagrams that found a full socket: losses nobody asked for.
    pub overruns: AtomicU64,
    /// Questions of the guest for the server's hardware address.
    pub asked_by_guest: AtomicU64,
    /// Questions to the crashed guest for its hardware address.
    pub asked: AtomicU64,
    /// Its answers.
    pub answered: AtomicU64,
    /// Frames that are nothing of all this; a flood's of the guest are among them.
    pub other: AtomicU64,
    /// Frames of a flood that the guest took.
    pub flooded: AtomicU64,
    /// Frames by which cards of a crashed guest's bond kept their place in it.
    pub signs_of_life: AtomicU64,
    /// Frames of either direction that a switch dropped because there was none in time.
    pub given_up: AtomicU64,
    /// Nanoseconds from the start of the link to the mark, or 0 before.
    marked_ns: AtomicU64,
    /// Bytes of the guest's frames at the mark.
    marked_bytes: AtomicU64,
    /// The same as `marked_ns` for the first datagram after the mark, or 0 before.
    first_ns: AtomicU64,
    /// The same for the last datagram of the guest.
    last_ns: AtomicU64,
}

/// A port of the server, as the guest sees it, and the process behind it.
#[derive(Clone, Debug)]
pub struct Door {
    /// The UDP port the guest sends to.
    pub port: u16,
    /// The port on loopback where it leads.
    pub to: u16,
    /// Where a copy of every datagram is kept, if it is to be known which of them came through.
    pub tap: Option<Arc<Tap>>,
}

/// What the guest sent to one door.
#[derive(Debug, Default)]
pub struct Tap {
    passed: Mutex<Passed>,
}

/// Payloads of datagrams, on both ends of the road to the server.
#[derive(Debug, Default)]
pub struct Passed {
    /// As the guest sent them.
    pub sent: Vec<Vec<u8>>,
    /// As they were given to the process behind the door.
    pub arrived: Vec<Vec<u8>>,
}

impl Door {
    /// Where crashes go, with nobody looking.
    #[must_use]
    pub fn server(to: u16) -> Self {
        Self {
            port: SERVER_PORT,
            to,
            tap: None,
        }
    }

    /// A door with a tap.
    #[must_use]
    pub fn tapped(port: u16, to: u16) -> Self {
        let tap = Some(Arc::default());
        Self { port, to, tap }
    }

    /// What has passed since the last call.
    #[must_use]
    pub fn passed(&self) -> Passed {
        let tap = self.tap.as_deref();
        tap.map_or_else(Passed::default, |tap| {
            std::mem::take(&mut *tap.passed.lock().unwrap_or_else(PoisonError::into_inner))
        })
    }

    fn record(&self, add: impl FnOnce(&mut Passed)) {
        if let Some(tap) = &self.tap {
            add(&mut tap.passed.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
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
/// A crashed guest is asked for its hardware address this often.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// A switch that waits shortest takes a port out of a bond after this silence (IEEE 802.1AX).
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// A guest that is flooded gets so many frames in each such time: 3200 a second.
const FLOOD_EVERY: Duration = Duration::from_millis(10);
const FLOOD_FRAMES: usize = 32;
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
    /// Starts the wire to the processes behind `doors`; gives the guest's end for QEMU.
    ///
    /// # Errors
    /// If sockets, the capture file or the thread cannot be made.
    pub fn start(
        network: Network,
        doors: &[Door],
        faults: Faults,
        capture: &Path,
    ) -> Result<(Self, OwnedFd)> {
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
        let road = |direction: u8| {
            let mishaps = Arc::clone(&counters.mishaps[usize::from(direction)]);
            Road::new(faults, network.format(), direction.into(), mishaps)
        };
        let switch = Switch {
            wire: ours,
            network,
            doors: doors.to_vec(),
            guest_mac: [0xff; 6],
            flows: Vec::new(),
            roads: [road(0), road(1)],
            ask_at: started,
            flood_at: started,
            heard_at: started,
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

/// The guest's datagrams from one port leave from a socket of their own, so that replies find their
/// way back.
#[derive(Debug)]
struct Flow {
    guest: Endpoint,
    door: usize,
    socket: UdpSocket,
}

struct Switch {
    wire: OwnedFd,
    network: Network,
    doors: Vec<Door>,
    guest_mac: Mac,
    flows: Vec<Flow>,
    /// From the guest, and to it.
    roads: [Road; 2],
    /// When a crashed guest is asked next.
    ask_at: Instant,
    /// When it is flooded next.
    flood_at: Instant,
    /// When its bond was last heard of.
    heard_at: Instant,
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
            rustix::event::poll(&mut poll, Some(&self.patience()))?;
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
            self.deliver_late()
                .context("cannot carry what was held back")?;
            self.ask_guest()?;
            self.flood_guest()?;
        }
        self.capture.flush().context("cannot write the capture")
    }

    /// How long nothing may happen until there is something to do.
    fn patience(&self) -> Timespec {
        let flood = self.is_flooding().then_some(self.flood_at);
        let due = self.roads.iter().filter_map(Road::due).chain(flood).min();
        let wait = due.map(|due| due.saturating_duration_since(Instant::now()));
        wait.and_then(|wait| Timespec::try_from(wait).ok())
            .map_or(POLL_TIMEOUT, |wait| wait.min(POLL_TIMEOUT))
    }

    fn carry_out(&mut self, batch: &mut Batch) -> Result<()> {
        let count = batch.receive(&self.wire, 0)?;
        let (now, mut arrived) = (Instant::now(), Vec::new());
        for index in 0..count {
            let frame = batch.get(index);
            add(&self.counters.guest_frames, 1);
            add(&self.counters.guest_bytes, frame.len() as u64);
            self.watch(frame);
            self.roads[0].enter(now, frame, &mut arrived);
        }
        self.outward(&arrived)
    }

    /// Keeps a copy of a datagram for a door with a tap.
    fn watch(&self, frame: &[u8]) {
        if self.doors.iter().all(|door| door.tap.is_none()) {
            return;
        }
        if let Frame::Udp { to, payload, .. } = self.network.format().parse(frame)
            && let Some(door) = self.door(to)
        {
            self.doors[door].record(|passed| passed.sent.push(frame[payload].to_vec()));
        }
    }

    /// The door that a datagram to this endpoint goes through.
    fn door(&self, to: Endpoint) -> Option<usize> {
        let (server, port) = to;
        let is_it = |door: &Door| server == self.network.server() && door.port == port;
        self.doors.iter().position(is_it)
    }

    fn carry_in(&mut self, flow: usize, batch: &mut Batch) -> Result<()> {
        let format = self.network.format();
        let count = match batch.receive(&self.flows[flow].socket, format.header_bytes()) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => 0,
            Err(error) => return Err(error.into()),
        };
        let Flow { guest, door, .. } = self.flows[flow];
        let server = (self.network.server(), self.doors[door].port);
        for index in 0..count {
            let macs = [self.guest_mac, HARNESS_MAC];
            format.write_headers(batch.get_mut(index), macs, server, guest);
        }
        let (now, mut arrived) = (Instant::now(), Vec::new());
        for index in 0..count {
            self.roads[1].enter(now, batch.get(index), &mut arrived);
        }
        self.inward(&arrived)
    }

    fn deliver_late(&mut self) -> Result<()> {
        let now = Instant::now();
        for direction in 0..self.roads.len() {
            let mut arrived = Vec::new();
            self.roads[direction].leave(now, &mut arrived);
            match direction {
                0 => self.outward(&arrived)?,
                _ => self.inward(&arrived)?,
            }
        }
        Ok(())
    }

    /// Asks a guest that crashes or has for its hardware address, as the server's kernel does when it
    /// has not used what it knows for a while.
    fn ask_guest(&mut self) -> Result<()> {
        let crashing = self.counters.marked_ns.load(Ordering::Acquire) > 0;
        let now = Instant::now();
        if !crashing || now < self.ask_at {
            return Ok(());
        }
        self.ask_at = now + ASK_EVERY;
        add(&self.counters.asked, 1);
        let (guest, server) = (self.network.guest(), self.network.server());
        let question = self.network.format().question(guest, server);
        self.send_own(&question)
    }

    /// Notes a bond's sign of life; whether a frame of the guest passes a switch that expects them
    /// from the crash on. Before, the guest's kernel is in no hurry: its partner does not speak.
    fn passes(&mut self, frame: &[u8]) -> bool {
        if frame::is_sign_of_life(frame) && self.counters.marked_ns.load(Ordering::Acquire) > 0 {
            self.heard_at = Instant::now();
            add(&self.counters.signs_of_life, 1);
        }
        !self.is_given_up()
    }

    fn is_given_up(&self) -> bool {
        let marked = self.counters.marked_ns.load(Ordering::Acquire);
        let crash = self.started + Duration::from_nanos(marked);
        self.network.over == Some(Over::Bond8023ad)
            && marked > 0
            && self.heard_at.max(crash).elapsed() > SILENCE_MAX
    }

    fn is_flooding(&self) -> bool {
        self.network.traffic && self.counters.marked_ns.load(Ordering::Acquire) > 0
    }

    /// Gives a guest that crashes, or has, the next frames of a flood that nobody waits for. They take
    /// no road, whose faults are for what matters.
    fn flood_guest(&mut self) -> Result<()> {
        let now = Instant::now();
        if !self.is_flooding() || now < self.flood_at {
            return Ok(());
        }
        self.flood_at = now + FLOOD_EVERY;
        let format = self.network.format();
        let mut frame = vec![b'f'; format.header_bytes() + FLOOD_BYTES];
        let macs = [self.guest_mac, HARNESS_MAC];
        let server = (self.network.server(), FLOOD_PORT);
        format.write_headers(&mut frame, macs, server, (self.network.guest(), FLOOD_PORT));
        let sent = match batch::send(&self.wire, &[&frame[..]; FLOOD_FRAMES]) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Err(error) => return Err(error.into()),
        };
        add(&self.counters.flooded, sent as u64);
        Ok(())
    }

    /// Takes what arrives from the guest.
    fn outward(&mut self, frames: &[Cow<'_, [u8]>]) -> Result<()> {
        let now = SystemTime::now();
        let server = self.network.server();
        let mut waiting: Vec<&[u8]> = Vec::with_capacity(frames.len());
        let mut waiting_flow = 0;
        for bytes in frames {
            self.capture.frame(now, bytes)?;
            if !self.passes(bytes) {
                add(&self.counters.given_up, 1);
                continue;
            }
            let parsed = self.network.format().parse(bytes);
            match parsed {
                _ if !frame::is_for_harness(bytes) => add(&self.counters.other, 1),
                Frame::Question { target, asker } if target == server => {
                    self.answer(bytes, asker)?;
                }
                Frame::Answer { target } if target == self.network.guest() => {
                    add(&self.counters.answered, 1);
                }
                Frame::Udp { from, to, payload } => {
                    let Some(door) = self.door(to) else {
                        add(&self.counters.other, 1);
                        continue;
                    };
                    self.guest_mac = frame::source(bytes).unwrap_or(self.guest_mac);
                    let flow = self.flow(from, door)?;
                    if flow != waiting_flow {
                        self.to_server(waiting_flow, &waiting)?;
                        waiting.clear();
                    }
                    waiting_flow = flow;
                    waiting.push(&bytes[payload]);
                }
                Frame::Damaged => add(&self.counters.damaged, 1),
                Frame::Question { .. } | Frame::Answer { .. } | Frame::Other => {
                    add(&self.counters.other, 1)
                }
            }
        }
        self.to_server(waiting_flow, &waiting)
    }

    fn to_server(&self, flow: usize, datagrams: &[&[u8]]) -> Result<()> {
        if datagrams.is_empty() {
            return Ok(());
        }
        let now = nanoseconds(self.started.elapsed());
        self.counters.last_ns.store(now, Ordering::Release);
        if self.counters.first_ns.load(Ordering::Acquire) == 0 {
            self.counters.first_ns.store(now, Ordering::Release);
        }
        for datagrams in datagrams.chunks(CAPACITY) {
            let sent = match batch::send(&self.flows[flow].socket, datagrams) {
                Ok(sent) => sent,
                // Nobody listens there (yet, or any more): to the guest that is a server that does
                // not answer.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => 0,
                Err(error) => return Err(error.into()),
            };
            let door = &self.doors[self.flows[flow].door];
            door.record(|passed| {
                let arrived = datagrams.iter().take(sent);
                passed.arrived.extend(arrived.map(|bytes| bytes.to_vec()));
            });
            add(&self.counters.to_server, sent as u64);
            add(&self.counters.overruns, (datagrams.len() - sent) as u64);
        }
        Ok(())
    }

    /// Gives the guest what arrives for it.
    fn inward(&mut self, frames: &[Cow<'_, [u8]>]) -> Result<()> {
        let now = SystemTime::now();
        for frame in frames {
            self.capture.frame(now, frame)?;
        }
        if self.is_given_up() {
            add(&self.counters.given_up, frames.len() as u64);
            return Ok(());
        }
        for frames in frames.chunks(CAPACITY) {
            let frames: Vec<&[u8]> = frames.iter().map(|frame| &**frame).collect();
            let sent = match batch::send(&self.wire, &frames) {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
                Err(error) => return Err(error.into()),
            };
            add(&self.counters.to_guest, sent as u64);
            add(&self.counters.overruns, (frames.len() - sent) as u64);
        }
        Ok(())
    }

    fn answer(&mut self, question: &[u8], asker: IpAddr) -> Result<()> {
        add(&self.counters.asked_by_guest, 1);
        let Some(mac) = frame::source(question) else {
            return Ok(());
        };
        let format = self.network.format();
        self.send_own(&format.answer(mac, asker, self.network.server()))
    }

    /// Sends the guest a frame that is the harness's own.
    fn send_own(&mut self, frame: &[u8]) -> Result<()> {
        let mut arrived = Vec::new();
        self.roads[1].enter(Instant::now(), frame, &mut arrived);
        self.inward(&arrived)
    }

    /// The flow from the guest's endpoint `guest` through a door, made when it is new; the oldest
    /// makes room.
    fn flow(&mut self, guest: Endpoint, door: usize) -> Result<usize> {
        let is_it = |flow: &Flow| (flow.guest, flow.door) == (guest, door);
        if let Some(index) = self.flows.iter().position(is_it) {
            return Ok(index);
        }
        let loopback = if self.network.ip6 {
            IpAddr::from(Ipv6Addr::LOCALHOST)
        } else {
            Ipv4Addr::LOCALHOST.into()
        };
        let socket =
            UdpSocket::bind((loopback, 0)).context("cannot make a socket to the server")?;
        socket.connect(SocketAddr::new(loopback, self.doors[door].to))?;
        sockopt::set_socket_recv_buffer_size_force(socket.as_fd(), SOCKET_BUFFER)
            .or_else(|_| sockopt::set_socket_recv_buffer_size(socket.as_fd(), SOCKET_BUFFER))?;
        if self.flows.len() == FLOWS_MAX {
            self.flows.remove(0);
        }
        self.flows.push(Flow {
            guest,
            door,
            socket,
        });
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
    use crate::frame::tests::GUEST;

    const OTHER_PORT: u16 = 514;

    struct World {
        network: Network,
        server: UdpSocket,
        link: Link,
        doors: [Door; 2],
        guest: OwnedFd,
        _folder: tempfile::TempDir,
    }

    fn world(network: Network, faults: Faults) -> World {
        let loopback = if network.ip6 {
            "[::1]:0"
        } else {
            "127.0.0.1:0"
        };
        let server = UdpSocket::bind(loopback).unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let port = server.local_addr().unwrap().port();
        let capture = folder.path().join("wire.pcap");
        let doors = [Door::server(port), Door::tapped(OTHER_PORT, port)];
        let (link, guest) = Link::start(network, &doors, faults, &capture).unwrap();
        World {
            network,
            server,
            link,
            doors,
            guest,
            _folder: folder,
        }
    }

    impl World {
        /// A frame as the guest sends it: a datagram from its port `port` to the server.
        fn guest_frame(&self, port: u16, payload: &[u8]) -> Vec<u8> {
            self.frame_to(SERVER_PORT, port, payload)
        }

        fn frame_to(&self, to: u16, port: u16, payload: &[u8]) -> Vec<u8> {
            let format = self.network.format();
            let mut frame = vec![0; format.header_bytes()];
            frame.extend_from_slice(payload);
            let (from, to) = ((self.network.guest(), port), (self.network.server(), to));
            format.write_headers(&mut frame, [HARNESS_MAC, GUEST], from, to);
            frame
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
        for (ip6, vlan) in [
            (false, None),
            (true, None),
            (false, Some(7)),
            (true, Some(7)),
        ] {
            let network = Network {
                ip6,
                vlan,
                ..Network::default()
            };
            let world = world(network, Faults::default());
            for port in [40000, 40001] {
                let frame = world.guest_frame(port, b"hello");
                batch::send(&world.guest, &[&frame]).unwrap();
                let mut bytes = [0; 16];
                let (length, from) = world.server.recv_from(&mut bytes).unwrap();
                assert_eq!(&bytes[..length], b"hello");
                world.server.send_to(b"welcome", from).unwrap();
                let reply = receive(&world.guest);
                assert_eq!(reply[..6], GUEST);
                let Frame::Udp { to, payload, .. } = network.format().parse(&reply) else {
                    panic!("no datagram")
                };
                assert_eq!((to.1, &reply[payload]), (port, &b"welcome"[..]));
            }
        }
    }

    #[test]
    fn a_tap_keeps_what_was_sent_and_what_arrived() {
        let faults = Faults {
            loss_percent: 50.0,
            seed: 3,
            ..Faults::default()
        };
        let world = world(Network::default(), faults);
        for number in 0..100_u8 {
            let frame = world.frame_to(OTHER_PORT, 40000, &[number]);
            while batch::send(&world.guest, &[&frame]).unwrap() == 0 {
                std::thread::yield_now();
            }
        }
        let counters = Arc::clone(&world.link.counters);
        while counters.guest_frames.load(Ordering::Relaxed) < 100 {
            std::thread::yield_now();
        }
        world.link.stop().unwrap();
        let lost = counters.mishaps[0].lost.load(Ordering::Relaxed);
        let Passed { sent, arrived } = world.doors[1].passed();
        assert_eq!(
            sent,
            (0..100).map(|number| vec![number]).collect::<Vec<_>>()
        );
        assert!((1..100).contains(&lost) && arrived.len() as u64 == 100 - lost);
        assert!(arrived.iter().all(|bytes| sent.contains(bytes)));
    }

    #[test]
    fn a_crashed_guest_is_asked_and_its_answer_counted() {
        let world = world(Network::default(), Faults::default());
        world.link.marker().mark(Duration::ZERO);
        let frame = world.guest_frame(40000, b"crash");
        batch::send(&world.guest, &[&frame]).unwrap();
        world.server.recv_from(&mut [0; 16]).unwrap();
        assert!(world.link.first_datagram().is_some());
        let question = receive(&world.guest);
        let format = world.network.format();
        let expected = Frame::Question {
            target: world.network.guest(),
            asker: world.network.server(),
        };
        assert_eq!(format.parse(&question), expected);
        let mut answer = format.answer(HARNESS_MAC, world.network.server(), world.network.guest());
        answer[6..12].copy_from_slice(&GUEST);
        batch::send(&world.guest, &[&answer]).unwrap();
        let counters = Arc::clone(&world.link.counters);
        while counters.answered.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        assert!(counters.asked.load(Ordering::Relaxed) >= 1);
    }

    #[test]
    fn a_delay_is_what_was_asked_for_in_each_direction() {
        let delay = Duration::from_millis(30);
        let world = world(
            Network::default(),
            Faults {
                delay,
                ..Faults::default()
            },
        );
        let start = Instant::now();
        let frame = world.guest_frame(40000, b"hello");
        batch::send(&world.guest, &[&frame]).unwrap();
        let (_, from) = world.server.recv_from(&mut [0; 16]).unwrap();
        assert!(start.elapsed() >= delay);
        world.server.send_to(b"welcome", from).unwrap();
        receive(&world.guest);
        assert!((delay * 2..delay * 3).contains(&start.elapsed()));
    }

    #[test]
    fn loss_happens_on_the_wire_too() {
        let world = world(
            Network::default(),
            Faults {
                loss_percent: 5.0,
                seed: 7,
                ..Faults::default()
            },
        );
        let frame = world.guest_frame(40000, &[0; 100]);
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
        let lost = counters.mishaps[0].lost.load(Ordering::Relaxed);
        // Five standard deviations around 1000.
        assert!((845..=1155).contains(&lost), "{lost} of {frames} frames");
    }
}
