//! The console: kernel messages to the first server, sealed, and to a syslog server, in the clear.
//!
//! Two lives. While the host is healthy, [`Console`] says to the shim's thread what to send by which
//! of its two sockets. In a crash, [`LastWords`] sends what has not been sent yet in frames of our
//! own, by polling; it begins anew from two numbers, because the thread may have been stopped
//! anywhere.

use proto::arming::{Arming, text};
use proto::console::{Client, Clock, Ring, Setup, Step, Syslog, TEXT_BYTES_MAX};
use proto::time::{Instant, Micros};
use proto::wire::DATAGRAM_BYTES_MAX;

use crate::driver::{Frames, Next};
use crate::frame::{Asker, Mac, Received, Route};

/// How long a crash waits for the server to acknowledge its last words, if nothing else of ours
/// comes after them.
const LAST_WORDS_WAIT: Micros = Micros::from_secs(2);
/// How long if a dump does, which brings the same text again.
const LAST_WORDS_WAIT_BEFORE_DUMP: Micros = Micros::from_millis(250);
/// How soon the shim tries again when the device owns all buffers.
const BUSY_WAIT: Micros = Micros::from_millis(1);

/// The sealed datagrams and the syslog messages go different ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// To our server.
    Sealed,
    /// To the syslog server.
    Syslog,
}

/// What the shim's thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Todo {
    /// Send the first bytes of its buffer.
    Send(Lane, usize),
    /// Sleep until this time, or until something is printed or received.
    Sleep(Instant),
}

/// Both ends of an arming's console, as far as they are wanted.
struct Ends {
    client: Option<Client>,
    syslog: Option<Syslog>,
    host: [u8; proto::arming::HOST_BYTES],
    datagram_bytes: usize,
    /// A syslog message's text; the stack is too small for it.
    text: [u8; TEXT_BYTES_MAX],
}

impl Ends {
    const NONE: Self = Self {
        client: None,
        syslog: None,
        host: [0; proto::arming::HOST_BYTES],
        datagram_bytes: 0,
        text: [0; TEXT_BYTES_MAX],
    };

    fn close(&mut self) {
        self.client = None;
        self.syslog = None;
        self.datagram_bytes = 0;
    }

    fn open(
        &mut self,
        now: Instant,
        arming: &Arming,
        syslog_from: u64,
        client: impl FnOnce(Setup, Instant) -> Client,
    ) {
        let console = &arming.console;
        let session = arming.servers.iter().flatten().next();
        let setup = session.and_then(|server| {
            Some(Setup {
                session: server.session,
                keys: console.keys.clone()?,
                boot: arming.boot,
                level: console.level,
            })
        });
        let syslog = console.syslog.as_ref();
        self.client = setup.map(|setup| client(setup, now));
        self.syslog =
            syslog.map(|(format, _)| Syslog::new(*format, console.level, syslog_from, now));
        self.host = arming.host;
        self.datagram_bytes = usize::from(arming.datagram_bytes);
    }

    fn poll(
        &mut self,
        lane: Lane,
        now: Instant,
        clock: Clock,
        ring: &mut impl Ring,
        buffer: &mut [u8],
    ) -> Option<Step> {
        let bytes = self.datagram_bytes.min(buffer.len());
        let buffer = buffer.get_mut(..bytes)?;
        match lane {
            Lane::Sealed => Some(self.client.as_mut()?.poll(now, clock, ring, buffer)),
            Lane::Syslog => {
                let host = text(&self.host).unwrap_or_default().as_bytes();
                let syslog = self.syslog.as_mut()?;
                Some(syslog.poll(now, (clock, host), ring, &mut self.text, buffer))
            }
        }
    }
}

/// The console of a healthy host.
pub struct Console {
    ends: Ends,
    /// Where the syslog server's next record is, kept over armings: it is sent nothing twice.
    syslog_from: u64,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// Nothing is sent.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            ends: Ends::NONE,
            syslog_from: 0,
        }
    }

    /// Begins to send what `arming` wants. Returns whether there is something.
    pub fn open(&mut self, now: Instant, arming: &Arming) -> bool {
        self.ends.open(now, arming, self.syslog_from, Client::new);
        self.ends.client.is_some() || self.ends.syslog.is_some()
    }

    /// Sends nothing any more and forgets the keys.
    pub fn close(&mut self) {
        self.syslog_from = self.syslog_next();
        self.ends.close();
    }

    /// Bytes of the buffer that [`Console::poll`] wants.
    #[must_use]
    pub fn buffer_bytes(&self) -> usize {
        self.ends.datagram_bytes.min(DATAGRAM_BYTES_MAX)
    }

    /// All below this is written by our server.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.ends.client.as_ref().map_or(0, Client::acked)
    }

    /// The syslog server's next record.
    #[must_use]
    pub fn syslog_next(&self) -> u64 {
        let syslog = self.ends.syslog.as_ref();
        syslog.map_or(self.syslog_from, Syslog::next)
    }

    /// What to do next; a datagram is in `buffer`.
    pub fn poll(
        &mut self,
        now: Instant,
        clock: Clock,
        ring: &mut impl Ring,
        buffer: &mut [u8],
    ) -> Todo {
        let mut sleep = now + Micros::from_secs(60);
        for lane in [Lane::Sealed, Lane::Syslog] {
            match self.ends.poll(lane, now, clock, ring, buffer) {
                Some(Step::Send(bytes)) => return Todo::Send(lane, bytes),
                Some(Step::Wait(until)) => sleep = sleep.min(until),
                None => {}
            }
        }
        Todo::Sleep(sleep)
    }

    /// Takes what the sealed lane's socket received. What is not a reply to us changes nothing.
    pub fn received(&mut self, now: Instant, datagram: &mut [u8]) {
        if let Some(client) = &mut self.ends.client {
            client.handle(now, datagram).unwrap_or_default();
        }
    }
}

/// One way out of the crash.
#[derive(Clone, Copy)]
struct Exit {
    lane: Lane,
    route: Option<Route>,
    /// Everything has been sent once, at least.
    said: bool,
}

/// What a crash needs to know to send its last words.
#[derive(Clone, Copy)]
pub struct Dying {
    /// The device's Ethernet address.
    pub mac: Mac,
    /// Buffers in the pool.
    pub pool_slots: u16,
    /// [`Console::acked`], some time before.
    pub acked: u64,
    /// [`Console::syslog_next`], some time before.
    pub syslog_next: u64,
}

/// The console of a host that has crashed.
pub struct LastWords {
    ends: Ends,
    exits: [Exit; 2],
    pool_slots: u16,
    slot: u16,
    until: Instant,
    asker: Option<Asker>,
}

impl Default for LastWords {
    fn default() -> Self {
        Self::new()
    }
}

impl LastWords {
    /// Nothing to say.
    #[must_use]
    pub const fn new() -> Self {
        const fn exit(lane: Lane) -> Exit {
            Exit {
                lane,
                route: None,
                said: true,
            }
        }
        Self {
            ends: Ends::NONE,
            exits: [exit(Lane::Syslog), exit(Lane::Sealed)],
            pool_slots: 0,
            slot: 0,
            until: Instant::from_micros(0),
            asker: None,
        }
    }

    /// Begins. `are_all`: no dump follows, so the server is waited for longer.
    pub fn start(&mut self, now: Instant, arming: &Arming, dying: &Dying, are_all: bool) {
        self.ends
            .open(now, arming, dying.syslog_next, |setup, now| {
                Client::crashed(setup, now, dying.acked)
            });
        let server = arming.servers.iter().flatten().next();
        let syslog = arming.console.syslog.as_ref().map(|(_, way)| way);
        for exit in &mut self.exits {
            let (way, wanted) = match exit.lane {
                Lane::Sealed => (server, self.ends.client.is_some()),
                Lane::Syslog => (syslog, self.ends.syslog.is_some()),
            };
            let route = way.and_then(|way| Route::new(dying.mac, arming.vlan, way));
            // A next hop that nobody knows is not asked for: the dump, which does ask, is worth more.
            exit.route = route.filter(|route| route.is_resolved());
            exit.said = !wanted || exit.route.is_none();
        }
        self.pool_slots = dying.pool_slots;
        self.until = now
            + if are_all {
                LAST_WORDS_WAIT
            } else {
                LAST_WORDS_WAIT_BEFORE_DUMP
            };
    }

    /// What to do next; [`Next::Finished`] when all is said.
    pub fn step(
        &mut self,
        now: Instant,
        clock: Clock,
        ring: &mut impl Ring,
        frames: &mut impl Frames,
    ) -> Next {
        const OVER: Next = Next::Finished(proto::reply::Action::None);
        if now >= self.until {
            return OVER;
        }
        if let Some(next) = self.answer(frames) {
            return next;
        }
        let mut wait = self.until;
        for index in 0..self.exits.len() {
            let Some(slot) = self.free_slot(frames) else {
                return Next::Wait(now + BUSY_WAIT);
            };
            match self.say(index, slot, now, clock, ring, frames) {
                Said::Frame(bytes) => {
                    return Next::Send {
                        slot,
                        bytes,
                        more: false,
                    };
                }
                Said::Nothing(until) => wait = wait.min(until),
            }
        }
        let said = self.exits.iter().all(|exit| exit.said);
        let client = self.ends.client.as_ref();
        let sealed = self.exits.iter().find(|exit| exit.lane == Lane::Sealed);
        let reachable = sealed.is_some_and(|exit| exit.route.is_some());
        let heard = !reachable || client.is_none_or(Client::is_settled);
        if said && heard {
            OVER
        } else {
            Next::Wait(wait)
        }
    }

    /// Takes a frame that arrived.
    pub fn received(&mut self, now: Instant, frame: &mut [u8]) {
        let sealed = self.exits.iter().find(|exit| exit.lane == Lane::Sealed);
        let syslog = self.exits.iter().find(|exit| exit.lane == Lane::Syslog);
        let route = sealed.and_then(|exit| exit.route);
        let Some(route) = route.or_else(|| syslog.and_then(|exit| exit.route)) else {
            return;
        };
        match route.receive(frame) {
            Received::Payload(datagram) => {
                if let Some(client) = &mut self.ends.client {
                    client.handle(now, datagram).unwrap_or_default();
                }
            }
            Received::Question(asker) => self.asker = Some(asker),
            Received::NextHop(_) | Received::Other => {}
        }
    }

    fn answer(&mut self, frames: &mut impl Frames) -> Option<Next> {
        let asker = self.asker?;
        let route = self.exits.iter().find_map(|exit| exit.route)?;
        let slot = self.pool_slots;
        let bytes = route.answer(&asker, frames.frame(slot)?)?;
        self.asker = None;
        Some(Next::Send {
            slot,
            bytes,
            more: false,
        })
    }

    /// The next buffer, in turn, that the device does not own.
    fn free_slot(&mut self, frames: &mut impl Frames) -> Option<u16> {
        for _ in 0..self.pool_slots {
            let next = self.slot.saturating_add(1);
            self.slot = if next >= self.pool_slots { 0 } else { next };
            if frames.frame(self.slot).is_some() {
                return Some(self.slot);
            }
        }
        None
    }

    fn say(
        &mut self,
        index: usize,
        slot: u16,
        now: Instant,
        clock: Clock,
        ring: &mut impl Ring,
        frames: &mut impl Frames,
    ) -> Said {
        let nothing = Said::Nothing(self.until);
        let Some(exit) = self.exits.get_mut(index) else {
            return nothing;
        };
        let (Some(route), Some(frame)) = (exit.route, frames.frame(slot)) else {
            return nothing;
        };
        let payload = frame.get_mut(route.header_bytes()..).unwrap_or_default();
        match self.ends.poll(exit.lane, now, clock, ring, payload) {
            Some(Step::Send(bytes)) => route.finish(frame, bytes).map_or(nothing, Said::Frame),
            Some(Step::Wait(until)) => {
                exit.said = true;
                Said::Nothing(until)
            }
            None => nothing,
        }
    }
}

/// What became of one way's turn.
#[derive(Clone, Copy)]
enum Said {
    /// A frame of so many bytes is in the buffer.
    Frame(usize),
    /// Nothing before this time.
    Nothing(Instant),
}

#[cfg(test)]
mod tests;
