//! The driver: the client engine on one side, the C shim's frames and requests on the other.
//!
//! It adds three things to [`proto::client`]: frames around datagrams, questions and answers about
//! Ethernet addresses (nobody else on the host asks or answers after a crash), and the order in
//! which the armed servers are tried.

use proto::arming::{Address, Arming, Command, HOST_BYTES, Refusal, Status};
use proto::client::{Attempts, Client, Input, Outcome, PageStatus, Pool, Start, Step, Then, Want};
use proto::record::{ARCH_X86_64, BLOCK_BYTES, Hello, ServerName};
use proto::reply::Action;
use proto::time::{Instant, Micros};
use proto::units::PAGE_BYTES;
use zerocopy::FromZeros as _;

use crate::frame::{Asker, HEADER_BYTES_MIN, Mac, Received, Route};

/// After so long a silence the next hop may have moved to another Ethernet address: it is asked.
const SILENCE: Micros = Micros::from_secs(1);
/// Time between two such questions.
const ASK_EVERY: Micros = Micros::from_secs(1);
/// How soon the driver looks again when the device keeps it from asking.
const BUSY_WAIT: Micros = Micros::from_millis(1);

/// The shim's transmit buffers.
pub trait Frames {
    /// The whole buffer `slot`, or `None` while the device still owns it. The slot after the pool's
    /// last one is spare, for questions and answers about Ethernet addresses.
    fn frame(&mut self, slot: u16) -> Option<&mut [u8]>;
}

/// What the shim does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send the first bytes of a buffer.
    Send {
        /// The buffer.
        slot: u16,
        /// Bytes of the frame.
        bytes: usize,
        /// Another one follows at once.
        more: bool,
    },
    /// Put into the scratch buffer what the engine wants and report it.
    Read {
        /// What it wants.
        want: Want,
        /// Whether text is asked for from its beginning, because a session has just begun.
        from_start: bool,
    },
    /// Poll the device until something arrives or this time comes.
    Wait(Instant),
    /// It is over. [`Action::None`] if nobody told what then.
    Finished(Action),
}

/// What the shim knows of the crash.
#[derive(Clone, Copy)]
pub struct Crash {
    /// The part of Hello that comes from the kernel.
    pub hello: Hello,
    /// Buffers in the pool.
    pub pool_slots: u16,
    /// The device's Ethernet address at the time of the crash.
    pub mac: Mac,
}

/// What the shim needs for an arming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Index of the device.
    pub ifindex: u32,
    /// Longest frame, in bytes, Ethernet header and tag included.
    pub frame_bytes: usize,
    /// The same without what is before the IP header: what a device's MTU limits.
    pub packet_bytes: usize,
    /// The crashing task's user memory is sent whatever the filter level says.
    pub keep_user: bool,
    /// There is a server that takes dumps.
    pub dumps: bool,
    /// A crash kernel that is loaded runs before the panic notifiers.
    pub kdump_first: bool,
    /// A crash kernel that is loaded runs after the dump.
    pub kdump_last: bool,
}

impl Needs {
    fn of(arming: &Arming) -> Self {
        let mut needs = Self {
            ifindex: arming.ifindex,
            frame_bytes: 0,
            packet_bytes: 0,
            keep_user: arming.keep_user,
            dumps: arming.servers.iter().flatten().next().is_some(),
            kdump_first: arming.console.kdump_first,
            kdump_last: arming.console.kdump_last,
        };
        let syslog = arming.console.syslog.as_ref();
        let syslog = syslog.and_then(|(_, way)| Route::new([0; 6], arming.vlan, way));
        for route in routes(arming).chain(syslog) {
            let bytes = route
                .header_bytes()
                .saturating_add(arming.datagram_bytes.into());
            needs.frame_bytes = needs.frame_bytes.max(bytes);
            let packet_bytes = bytes.saturating_sub(route.link_bytes());
            needs.packet_bytes = needs.packet_bytes.max(packet_bytes);
        }
        needs
    }
}

/// The ways to the servers of `arming`, but for our own Ethernet address.
fn routes(arming: &Arming) -> impl Iterator<Item = Route> {
    let servers = arming.servers.iter().flatten();
    servers.filter_map(|server| Route::new([0; 6], arming.vlan, server))
}

/// Everything the core has; static, about 130 KiB.
pub struct Driver {
    client: Client,
    /// The latest good message, until the shim has found its device good too.
    offered: Option<Arming>,
    arming: Option<Arming>,
    crash: Option<Crash>,
    route: Option<Route>,
    attempts: Attempts,
    /// When the latest attempt began.
    begun_at: Instant,
    asker: Option<Asker>,
    /// When the next hop may be asked for its Ethernet address again.
    ask_at: Instant,
    /// Whether it has been asked since a server was last heard. Who was not asked is not believed.
    asked: bool,
    /// Whether text and State have been asked for since the session began.
    text_begun: bool,
    state_begun: bool,
    devices_begun: bool,
}

impl Driver {
    /// Not armed.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            client: Client::new(),
            offered: None,
            arming: None,
            crash: None,
            route: None,
            attempts: Attempts::new(Instant::from_micros(0), 0, Micros::new(0)),
            begun_at: Instant::from_micros(0),
            asker: None,
            ask_at: Instant::from_micros(0),
            asked: false,
            text_begun: false,
            state_begun: false,
            devices_begun: false,
        }
    }

    /// Takes a message. One that arms is only kept; [`Driver::accept`] makes it count. Returns the
    /// part of it that the shim needs, or `None` for a disarmed host.
    ///
    /// # Errors
    /// Why the message was refused, in words for the person who armed.
    pub fn command(&mut self, message: &[u8]) -> Result<Option<Needs>, &'static str> {
        match Command::decode(message).map_err(explain)? {
            Command::Disarm => {
                self.disarm();
                Ok(None)
            }
            Command::Arm(arming) => {
                let needs = Needs::of(&arming);
                self.offered = Some(arming);
                Ok(Some(needs))
            }
        }
    }

    /// Arms with what the latest message said, in the place of any earlier arming.
    pub const fn accept(&mut self) {
        self.arming = self.offered.take();
    }

    /// Forgets servers and keys.
    pub fn disarm(&mut self) {
        self.offered = None;
        self.arming = None;
    }

    /// The arming that counts.
    #[must_use]
    pub const fn arming(&self) -> Option<&Arming> {
        self.arming.as_ref()
    }

    /// Completes `status` with what the core knows.
    pub fn status(&self, status: &mut Status) {
        let Some(arming) = &self.arming else {
            return;
        };
        status.host = arming.host;
        if let Some(server) = arming.servers.iter().flatten().next() {
            status.key = server.session.key.0.into();
            status.server_port = server.remote_port.into();
            match server.remote {
                Address::V4([a, b, c, d]) => {
                    status.server_family = 4.into();
                    status.server = [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                }
                Address::V6(address) => {
                    status.server_family = 6.into();
                    status.server = address;
                }
            }
        }
    }

    /// Begins the session of a crash with the first server.
    pub fn start(&mut self, now: Instant, crash: &Crash) {
        self.crash = Some(*crash);
        if let Some(arming) = &self.arming {
            let give_up = Micros::from_secs(arming.give_up_seconds.into());
            self.attempts = Attempts::new(now, arming.servers.iter().flatten().count(), give_up);
        }
        self.begin(now);
    }

    /// What to do next.
    pub fn step(&mut self, now: Instant, frames: &mut impl Frames) -> Next {
        if let Some(next) = self.answer(frames) {
            return next;
        }
        if let Some(next) = self.ask(now, frames) {
            return next;
        }
        // Two rounds: the second one's session has just begun and has something to do.
        for _ in 0..2 {
            match self.poll(now, frames) {
                Step::Send { slot, len, more } => return self.send(frames, slot, len, more),
                Step::Read(want) => return self.read(want),
                Step::WaitUntil(until) => return Next::Wait(until.min(self.next_question())),
                Step::Finished(outcome) => {
                    if !self.try_next(now, &outcome) {
                        return Next::Finished(outcome.action);
                    }
                }
            }
        }
        Next::Finished(Action::None)
    }

    /// Takes a frame that arrived.
    pub fn received(&mut self, now: Instant, frame: &mut [u8]) {
        let Some(route) = &mut self.route else {
            return;
        };
        match route.receive(frame) {
            Received::Payload(datagram) => {
                if self.client.handle(now, Input::Datagram(datagram)).is_ok() {
                    self.attempts.heard(now);
                    self.asked = false;
                }
            }
            // Only the latest one is answered; who asked before asks again.
            Received::Question(asker) => self.asker = Some(asker),
            Received::NextHop(mac) if self.asked => {
                route.learn(mac);
                let at = self.attempts.server();
                let servers = self.arming.as_mut().map(|arming| &mut arming.servers);
                let server = servers.and_then(|servers| servers.get_mut(at)?.as_mut());
                if let Some(server) = server {
                    server.next_hop_mac = mac;
                }
            }
            Received::NextHop(_) | Received::Other => {}
        }
    }

    /// The scratch buffer holds so many bytes of what was asked for.
    pub fn filled(&mut self, now: Instant, bytes: usize) {
        self.input(now, Input::Filled(bytes));
    }

    /// The scratch buffer holds the pages that were asked for.
    pub fn pages(&mut self, now: Instant, statuses: &[PageStatus]) {
        self.input(now, Input::Pages(statuses));
    }

    /// So many pages from the first one that was asked for have this status and no contents.
    pub fn run(&mut self, now: Instant, pages: u64, status: PageStatus) {
        self.input(now, Input::Run(pages, status));
    }

    /// The kernel faulted while it wrote the State text.
    pub fn state_faulted(&mut self) {
        self.client.state_faulted();
    }

    /// Where the shim puts what it reads.
    pub fn scratch(&mut self) -> &mut [u8; BLOCK_BYTES] {
        self.client.scratch()
    }

    /// Makes a frame as large as the dump's, to nobody: sealed by the same work, or as the buffer
    /// is. Returns its bytes.
    #[cfg(feature = "bench")]
    pub fn bench(&self, frames: &mut impl Frames, slot: u16, number: u64, sealed: bool) -> usize {
        const NO_KEY: [u8; 32] = [0; 32];
        let (Some(frame), Some(route), Some(arming)) =
            (frames.frame(slot), &self.route, &self.arming)
        else {
            return 0;
        };
        let datagram_bytes = usize::from(arming.datagram_bytes);
        if let (true, Some(datagram)) = (sealed, frame.get_mut(route.header_bytes()..)) {
            let header = proto::wire::Header {
                kind: proto::wire::Kind::Data,
                attempt: 0,
                session: proto::units::SessionId::default(),
                number: proto::units::PacketNumber(number),
            };
            let payload = datagram_bytes.saturating_sub(proto::wire::CLIENT_OVERHEAD);
            if proto::wire::seal_client(&NO_KEY, &header, datagram, payload).is_none() {
                return 0;
            }
        }
        route.finish(frame, datagram_bytes).unwrap_or(0)
    }

    /// UDP payload bytes of a frame that [`Driver::bench`] makes.
    #[cfg(feature = "bench")]
    pub fn bench_payload(&self) -> u16 {
        self.arming
            .as_ref()
            .map_or(0, |arming| arming.datagram_bytes)
    }

    fn input(&mut self, now: Instant, input: Input<'_>) {
        let taken = self.client.handle(now, input);
        debug_assert!(taken.is_ok(), "only datagrams are ever refused");
    }

    fn answer(&mut self, frames: &mut impl Frames) -> Option<Next> {
        let asker = self.asker?;
        let slot = self.crash.as_ref()?.pool_slots;
        let bytes = self.route?.answer(&asker, frames.frame(slot)?)?;
        self.asker = None;
        Some(Next::Send {
            slot,
            bytes,
            more: false,
        })
    }

    /// Asks for the next hop's Ethernet address, if it is time.
    fn ask(&mut self, now: Instant, frames: &mut impl Frames) -> Option<Next> {
        let slot = self.crash.as_ref()?.pool_slots;
        let route = self.route?;
        if now < self.next_question() {
            return None;
        }
        self.ask_at = now + BUSY_WAIT;
        let bytes = route.ask(frames.frame(slot)?)?;
        self.ask_at = now + ASK_EVERY;
        self.asked = true;
        Some(Next::Send {
            slot,
            bytes,
            more: false,
        })
    }

    /// When the next hop is to be asked if nothing is heard until then.
    fn next_question(&self) -> Instant {
        let resolved = self.route.is_none_or(|route| route.is_resolved());
        if resolved {
            self.ask_at.max(self.attempts.heard_at() + SILENCE)
        } else {
            self.ask_at
        }
    }

    /// What the engine wants, which may not send before somebody has told where to.
    fn poll(&mut self, now: Instant, frames: &mut impl Frames) -> Step {
        let header_bytes = match self.route {
            Some(route) if route.is_resolved() => route.header_bytes(),
            Some(_) if now.since(self.begun_at) < self.attempts.try_for() => {
                return Step::WaitUntil(self.begun_at + self.attempts.try_for());
            }
            Some(_) => {
                return Step::Finished(Outcome {
                    action: Action::None,
                    complete: false,
                    then: Then::Over,
                });
            }
            None => HEADER_BYTES_MIN,
        };
        let mut payloads = Payloads {
            frames,
            header_bytes,
        };
        self.client.poll(now, &mut payloads)
    }

    fn send(&self, frames: &mut impl Frames, slot: u16, len: usize, more: bool) -> Next {
        let bytes = self
            .route
            .and_then(|route| route.finish(frames.frame(slot)?, len));
        // The engine has just been given this buffer and this route, so a frame without either is a
        // bug; a frame of no bytes goes out as padding and the engine loses nothing but time.
        Next::Send {
            slot,
            bytes: bytes.unwrap_or(0),
            more,
        }
    }

    fn read(&mut self, want: Want) -> Next {
        let begun = match want {
            Want::Text => core::mem::replace(&mut self.text_begun, true),
            Want::State => core::mem::replace(&mut self.state_begun, true),
            Want::Devices => core::mem::replace(&mut self.devices_begun, true),
            Want::Registers(_)
            | Want::Processor(_)
            | Want::Notes
            | Want::MemoryMap
            | Want::Pages { .. }
            | Want::Written => true,
        };
        Next::Read {
            want: self.demand(want),
            from_start: !begun,
        }
    }

    /// What the host's own configuration demands is left out whoever asks for pages, and why.
    fn demand(&self, want: Want) -> Want {
        let Want::Pages {
            first,
            count,
            pass,
            filter,
        } = want
        else {
            return want;
        };
        let demanded = self.arming.as_ref().map_or(0, |arming| arming.filter);
        Want::Pages {
            first,
            count,
            pass,
            filter: filter | demanded,
        }
    }

    /// Whether there is another attempt after a session ended with `outcome`, which is begun then.
    fn try_next(&mut self, now: Instant, outcome: &Outcome) -> bool {
        let goes_on = self.attempts.next(now, outcome, self.client.next_packet());
        if goes_on {
            self.begin(now);
        }
        goes_on
    }

    fn begin(&mut self, now: Instant) {
        let (Some(arming), Some(crash)) = (&self.arming, &self.crash) else {
            return;
        };
        let at = self.attempts.server();
        let Some(server) = arming.servers.get(at).and_then(Option::as_ref) else {
            return;
        };
        let start = Start {
            server,
            datagram_bytes: arming.datagram_bytes.into(),
            pool_slots: crash.pool_slots,
            give_up: self.attempts.try_for(),
            first: self.attempts.first(),
            attempt: self.attempts.attempt(),
        };
        let mut hello = Hello {
            boot: arming.boot,
            host: arming.host,
            server: u16::try_from(at).unwrap_or(u16::MAX).into(),
            filter: u16::from(arming.filter).into(),
            ..crash.hello
        };
        for (name, server) in hello
            .servers
            .iter_mut()
            .zip(arming.servers.iter().flatten())
        {
            *name = ServerName::new(server.remote, server.remote_port);
        }
        self.route = Route::new(crash.mac, arming.vlan, server);
        self.text_begun = false;
        self.state_begun = false;
        self.devices_begun = false;
        self.begun_at = now;
        self.ask_at = now;
        self.asked = false;
        self.client.start(now, &start, &hello);
    }
}

impl Default for Driver {
    fn default() -> Self {
        Self::new()
    }
}

/// The buffers as the engine sees them: UDP payloads only.
struct Payloads<'a, F> {
    frames: &'a mut F,
    header_bytes: usize,
}

impl<F: Frames> Pool for Payloads<'_, F> {
    fn buffer(&mut self, slot: u16) -> Option<&mut [u8]> {
        self.frames.frame(slot)?.get_mut(self.header_bytes..)
    }
}

/// A Hello of what all hosts with this module have in common.
#[must_use]
pub fn blank_hello() -> Hello {
    Hello {
        arch: ARCH_X86_64.into(),
        page_bytes: u32::try_from(PAGE_BYTES).unwrap_or(0).into(),
        ..Hello::new_zeroed()
    }
}

fn explain(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::Length => {
            "the message has the wrong length: tool and module are of different versions"
        }
        Refusal::Magic => "this is no netdump message",
        Refusal::Version => {
            "tool and module are of different versions: install both from one source"
        }
        Refusal::Command => "unknown command: tool and module are of different versions",
        Refusal::Device => "the message names no device",
        Refusal::DatagramBytes => "the datagram size is out of bounds (508 to 8972 bytes)",
        Refusal::GiveUpSeconds => "the time to look for a server is out of bounds (1 to 3600 s)",
        Refusal::Servers => "the number of servers is out of bounds (1 to 4)",
        Refusal::Family => "a server's addresses are of an unknown family",
        Refusal::Port => "a port is 0",
        Refusal::NextHop => "a next hop's Ethernet address is a group's",
        Refusal::Vlan => "the 802.1Q tag names no VLAN from 1 to 4094",
        Refusal::SessionTwice => "two servers share one session: give each its own",
        Refusal::Host => "the host's name is empty, or not UTF-8",
        Refusal::Console => "level, syslog format or a flag of the console is unknown",
        Refusal::Filter => "the filter level is out of bounds (0 to 31)",
    }
}

const _: () = assert!(
    HOST_BYTES == 64,
    "Hello and Arming name the host in fields of one size"
);

#[cfg(test)]
mod tests;
