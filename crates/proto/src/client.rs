//! The client engine: from a crashed host's memory to sealed datagrams, and back from replies to
//! what to do next.
//!
//! One entry and one exit. The caller gives what happened to [`Client::handle`] (in) and does what
//! [`Client::poll`] (out) says until it says [`Step::WaitUntil`] or [`Step::Finished`];
//! [`Client::scratch`] is where it puts what a [`Step::Read`] asks for. All other methods are
//! getters. `now` must not go back. After a `Send` with `more` the caller polls again before
//! anything else, so that packets leave in trains.
//!
//! ```text
//! Read -> scratch -> composer (records, LZ4) -> packet in a pool buffer -> seal -> Send -> NIC
//!                                                 ^ window: resent as it is until a reply acknowledges it
//! ```

mod attempts;
mod composer;
mod pull;
mod rate;
mod walk;
mod window;

use crate::arming::Server;
use crate::client::composer::{Composer, Next, Told};
use crate::client::window::Window;
use crate::keys::KEY_BYTES;
use crate::record::{BLOCK_BYTES, Hello, Totals};
use crate::reply::{Action, Opened, Reply, Verdict};
use crate::time::{Instant, Micros};
use crate::units::{PacketNumber, Pfn, SessionId};
use crate::wire::{
    CLIENT_OVERHEAD, DATAGRAM_BYTES_MAX, DATAGRAM_BYTES_MIN, HEADER_BYTES, Header,
    INCARNATION_BYTES, Kind, PacketKey, Reject, open_server, seal_client,
};

pub use crate::client::attempts::{Attempts, MOVES_MAX, SERVER_TRY};
pub use crate::client::window::{SLOTS_MAX, Statistics};

/// How soon the engine looks again when only the NIC keeps it from sending.
const BUSY_WAIT: Micros = Micros::new(200);

/// The transmit buffers, which the caller owns and the NIC borrows.
pub trait Pool {
    /// The UDP payload area of buffer `slot`, or `None` while the NIC still owns it.
    fn buffer(&mut self, slot: u16) -> Option<&mut [u8]>;
}

/// What happened.
pub enum Input<'a> {
    /// A UDP payload arrived on the session's port. It is decrypted in place.
    Datagram(&'a mut [u8]),
    /// The first so many bytes of the scratch buffer are what [`Step::Read`] asked for; see
    /// [`Want`] for what none means.
    Filled(usize),
    /// The pages that [`Want::Pages`] asked for are in the scratch buffer,
    /// [`crate::units::PAGE_BYTES`] each; one status a page, in order.
    Pages(&'a [PageStatus]),
    /// Instead of `Pages`: all that [`Want::Pages`] asked for, and what follows up to so many pages
    /// from the first, have one status and no contents. The engine takes of it what lies in the
    /// same range of the memory map, so that free memory of a large host is told at once.
    Run(u64, PageStatus),
}

/// What became of one page that was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageStatus {
    /// Its contents are in the scratch buffer.
    Read,
    /// It belongs to the other pass.
    #[default]
    OtherPass,
    /// It could not be read.
    Unreadable,
    /// The filter leaves it out.
    Excluded,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send the first `len` bytes of buffer `slot` to the server; with `more`, another one follows
    /// at once.
    Send {
        /// The pool's buffer.
        slot: u16,
        /// Bytes of UDP payload.
        len: usize,
        /// The next step is a `Send` too.
        more: bool,
    },
    /// Put this into the scratch buffer and report it.
    Read(Want),
    /// Nothing to do before this time unless something arrives.
    WaitUntil(Instant),
    /// The session is over.
    Finished(Outcome),
}

/// What a [`Step::Read`] asks for. Answer with [`Input::Filled`], except for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The next older piece of the kernel log, the first one being the newest. No bytes: there is
    /// no more.
    Text,
    /// The [`crate::record::Cpu`] of the n-th CPU. No bytes: there is no more.
    Registers(u32),
    /// VMCOREINFO.
    Notes,
    /// The memory map: [`crate::record::RamRange`]s.
    MemoryMap,
    /// Pages, and the state of each. Answer with [`Input::Pages`].
    Pages {
        /// First page.
        first: Pfn,
        /// How many: 1 to [`crate::record::BLOCK_PAGES`].
        count: u16,
        /// Which pages are meant; the others are [`PageStatus::OtherPass`].
        pass: Pass,
        /// The filter level of the server's verdict.
        filter: u8,
    },
    /// The pages that the dump path itself writes: [`crate::record::WrittenRange`]s.
    Written,
    /// The hardware state of the n-th CPU: the body of a [`crate::record::Kind::Processor`]. No
    /// bytes: there is no more.
    Processor(u32),
    /// The next devices' configuration spaces: the body of a [`crate::record::Kind::Devices`]. No
    /// bytes: there is no more.
    Devices,
    /// The next piece of the State text; the first request makes the kernel write it. No bytes:
    /// there is no more.
    State,
}

/// Memory is walked twice; each pass takes the pages of its kind and leaves the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Kernel image and page tables.
    Precious,
    /// All the rest.
    Rest,
    /// Both at once, for pages that the server asks for by number.
    Both,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What the host shall do; [`Action::None`] if nobody told.
    pub action: Action,
    /// Whether the server has everything it asked for.
    pub complete: bool,
    /// Where to go on.
    pub then: Then,
}

/// Where a crash goes on after a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nowhere, or with the next server: this one has all it wants, or is silent.
    Over,
    /// At the same server, with another attempt: it was restarted and has lost packets that were
    /// acknowledged, and are not here any more. Memory still is.
    StartOver,
    /// At another one of the armed servers, which this one names.
    Redirect(u8),
}

/// What a session begins with.
pub struct Start<'a> {
    /// The server, the keys and the session's name.
    pub server: &'a Server,
    /// Largest UDP payload to send, in bytes; cut to the protocol's bounds.
    pub datagram_bytes: usize,
    /// Buffers in the pool; at most [`SLOTS_MAX`] are used.
    pub pool_slots: u16,
    /// How long to go on without a reply.
    pub give_up: Micros,
    /// The first packet number: one after the last ever used under these keys, 0 if none was.
    pub first: PacketNumber,
    /// How often this session was started before.
    pub attempt: u16,
}

/// The engine. About 120 KiB, without pointers; meant for static storage. `K` seals its packets.
pub struct Client<K = [u8; KEY_BYTES]> {
    session: SessionId,
    client_key: Option<K>,
    server_key: [u8; KEY_BYTES],
    attempt: u16,
    first: PacketNumber,
    /// Stream bytes in a full packet.
    payload_bytes: usize,
    /// Stream bytes already in the packet being filled, which is packet `window.next()`.
    filled: usize,
    composer: Composer,
    window: Window,
    verdict: Verdict,
    action: Action,
    /// The server knows the records of hardware state.
    knows_hardware: bool,
    give_up: Micros,
    heard_at: Instant,
    heard: Option<Heard>,
    /// Incarnations that were heard before this one, so that a replay of theirs is not news.
    past: [Option<[u8; INCARNATION_BYTES]>; PAST_INCARNATIONS],
    /// The server has lost what it had acknowledged.
    start_over: bool,
    ended: bool,
}

/// Incarnations of the server that are remembered.
const PAST_INCARNATIONS: usize = 4;

/// The last reply taken: older ones are replays or came late.
#[derive(Clone, Copy)]
struct Heard {
    incarnation: [u8; INCARNATION_BYTES],
    number: PacketNumber,
}

impl Client {
    /// An engine that has not been started; it is [`Step::Finished`] at once. It seals with the
    /// portable implementation.
    #[must_use]
    pub const fn new() -> Self {
        Self::with_packet_key()
    }
}

impl<K: PacketKey> Client<K> {
    /// The same, sealing with `K`.
    #[must_use]
    pub const fn with_packet_key() -> Self {
        Self {
            session: SessionId {
                key: crate::units::KeyId(0),
                arming: crate::units::ArmingId(0),
            },
            client_key: None,
            server_key: [0; KEY_BYTES],
            attempt: 0,
            first: PacketNumber(0),
            payload_bytes: 0,
            filled: 0,
            composer: Composer::new(),
            window: Window::new(),
            verdict: Verdict::Undecided,
            action: Action::None,
            knows_hardware: false,
            give_up: Micros::new(0),
            heard_at: Instant::from_micros(0),
            heard: None,
            past: [None; PAST_INCARNATIONS],
            start_over: false,
            ended: true,
        }
    }

    /// In: begins a session. `hello` is completed by what the engine knows (packet size, slots,
    /// version).
    pub fn start(&mut self, now: Instant, start: &Start<'_>, hello: &Hello) {
        let datagram_bytes = start
            .datagram_bytes
            .clamp(DATAGRAM_BYTES_MIN, DATAGRAM_BYTES_MAX);
        self.session = start.server.session;
        self.client_key = Some(K::prepare(&start.server.keys.client));
        self.server_key = start.server.keys.server;
        self.attempt = start.attempt;
        self.first = start.first;
        self.payload_bytes = datagram_bytes.saturating_sub(CLIENT_OVERHEAD);
        self.filled = 0;
        self.window.start(start.first, start.pool_slots);
        self.verdict = Verdict::Undecided;
        self.action = Action::None;
        self.knows_hardware = false;
        self.give_up = start.give_up;
        self.heard_at = now;
        self.heard = None;
        self.past = [None; PAST_INCARNATIONS];
        self.start_over = false;
        self.ended = false;
        let mut hello = *hello;
        hello.version = crate::record::HELLO_VERSION.into();
        hello.pool_slots = self.window.buffers().into();
        hello.packet_bytes = u16::try_from(self.payload_bytes).unwrap_or(u16::MAX).into();
        self.composer.start(&hello);
    }

    /// In: takes what happened. A datagram that is not a genuine, current reply is refused with the
    /// reason and changes nothing.
    pub fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), Reject> {
        match input {
            Input::Datagram(datagram) => return self.datagram(now, datagram),
            Input::Filled(bytes) => self.composer.filled(bytes),
            Input::Pages(statuses) => self.composer.pages(statuses),
            Input::Run(pages, status) => self.composer.pages_alike(pages, status),
        }
        Ok(())
    }

    /// Out: what to do next.
    pub fn poll(&mut self, now: Instant, pool: &mut impl Pool) -> Step {
        if let Some(outcome) = self.outcome(now) {
            self.ended = true;
            return Step::Finished(outcome);
        }
        // With a packet half filled nothing is probed for: it will be sent, and where there is one
        // buffer only, it lies in that of the last one.
        if self.filled == 0 || !self.window.is_empty() {
            self.window.on_time(now);
        }
        if let Some(slot) = self.window.resend(now, pool) {
            // Where there is one buffer only, this send takes it from the next packet.
            let next_is_apart = self.window.next_buffer() != slot.index;
            let more = self.window.resend_ready(now, pool)
                || (next_is_apart && self.can_compose(now, pool));
            return Step::Send {
                slot: slot.index,
                len: slot.bytes,
                more,
            };
        }
        self.compose(now, pool)
    }

    /// Getter: where the caller puts what it reads; [`BLOCK_BYTES`] bytes.
    pub fn scratch(&mut self) -> &mut [u8; BLOCK_BYTES] {
        self.composer.scratch()
    }

    /// In: the kernel faulted while it wrote the State text. The stream ends here, saying so.
    pub fn state_faulted(&mut self) {
        self.composer.state_faulted();
    }

    /// Getter: the first packet number that has not been used under the session's keys.
    #[must_use]
    pub const fn next_packet(&self) -> PacketNumber {
        self.window.next()
    }

    /// Getter: counts since the start.
    #[must_use]
    pub const fn statistics(&self) -> &Statistics {
        self.window.statistics()
    }

    /// Getter: pages told so far, by kind, and their digest.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.composer.totals()
    }

    /// Getter: the smoothed round trip, once one is measured.
    #[must_use]
    pub fn round_trip(&self) -> Option<Micros> {
        self.window.round_trip()
    }

    /// Getter: the server's verdict so far.
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        self.verdict
    }

    fn outcome(&self, now: Instant) -> Option<Outcome> {
        let complete = self.composer.done() && self.window.is_empty();
        let told = self.action != Action::None && (complete || self.verdict == Verdict::Nothing);
        // A client that was told to wait does not expect to hear anything before.
        let silent = now.since(self.heard_at) >= self.give_up + self.window.patience();
        let then = if told {
            Then::Over
        } else if let Verdict::Redirect { server } = self.verdict {
            Then::Redirect(server)
        } else if self.start_over {
            Then::StartOver
        } else {
            Then::Over
        };
        (self.ended || told || silent || then != Then::Over).then_some(Outcome {
            action: self.action,
            complete,
            then,
        })
    }

    /// Puts stream bytes into the next packet until it is full or the composer has no more for now.
    fn compose(&mut self, now: Instant, pool: &mut impl Pool) -> Step {
        if !self.window.may_send(now) {
            let paced = self.window.is_paced();
            return Step::WaitUntil(self.window.wait_until(now, paced));
        }
        let index = self.window.next_buffer();
        let Some(buffer) = pool.buffer(index) else {
            return Step::WaitUntil(now + BUSY_WAIT);
        };
        while let Some(room) = room(buffer, self.filled, self.payload_bytes) {
            let told = Told {
                verdict: self.verdict,
                settled: self.window.is_empty() && self.filled == 0,
                knows_hardware: self.knows_hardware,
            };
            match self.composer.next(told) {
                Next::Bytes(bytes) => {
                    let taken = copy_prefix(room, bytes);
                    self.composer.consume(taken);
                    self.filled = self.filled.saturating_add(taken);
                }
                Next::Read(want) => return Step::Read(want),
                Next::Blocked if self.filled == 0 => {
                    return Step::WaitUntil(self.window.wait_until(now, false));
                }
                Next::Blocked => break,
            }
        }
        let key = self.client_key.as_ref();
        let sealed = key.and_then(|key| seal_client(key, &self.header(), buffer, self.filled));
        let Some(len) = sealed else {
            // The caller gave a buffer smaller than it promised: no packet can be made.
            self.ended = true;
            return Step::Finished(Outcome {
                action: self.action,
                complete: false,
                then: Then::Over,
            });
        };
        self.filled = 0;
        self.window.sent_new(now, len);
        let more = self.can_compose(now, pool);
        Step::Send {
            slot: index,
            len,
            more,
        }
    }

    /// Whether the next poll is sure to yield a full new packet.
    fn can_compose(&self, now: Instant, pool: &mut impl Pool) -> bool {
        self.window.would_send(now)
            && self.composer.pending() >= self.payload_bytes.saturating_sub(self.filled)
            && pool.buffer(self.window.next_buffer()).is_some()
    }

    fn header(&self) -> Header {
        let number = self.window.next();
        let kind = if number == self.first {
            Kind::First
        } else {
            Kind::Data
        };
        Header {
            kind,
            attempt: self.attempt,
            session: self.session,
            number,
        }
    }

    fn datagram(&mut self, now: Instant, datagram: &mut [u8]) -> Result<(), Reject> {
        let header = Header::parse(datagram)?;
        if header.session != self.session {
            return Err(Reject::OtherSession);
        }
        let (incarnation, payload) = open_server(&self.server_key, &header, datagram)?;
        let opened = Reply::decode(payload).ok_or(Reject::Malformed)?;
        let reply = &opened.reply;
        if reply.attempt != self.attempt || reply.next > self.window.next() {
            return Err(Reject::OtherSession);
        }
        let heard = Heard {
            incarnation,
            number: header.number,
        };
        if !self.is_news(heard, reply) {
            return Err(Reject::Stale);
        }
        self.take(now, heard, &opened);
        Ok(())
    }

    /// Whether a reply came after the last one taken. Within an incarnation the packet number tells.
    /// Another incarnation is a server that was restarted, or a replay of one before.
    fn is_news(&self, heard: Heard, reply: &Reply) -> bool {
        match self.heard {
            // What was told to be done at once will be done.
            _ if self.verdict == Verdict::Nothing && self.action != Action::None => false,
            None => true,
            Some(before) if before.incarnation == heard.incarnation => heard.number > before.number,
            // A server that is through with the host answers each packet by itself, and knows no
            // more than that one.
            Some(_) if reply.verdict == Verdict::Nothing => reply.next >= self.window.base(),
            Some(_) => !self.past.contains(&Some(heard.incarnation)),
        }
    }

    fn take(&mut self, now: Instant, heard: Heard, opened: &Opened<'_>) {
        if let Some(before) = self.heard
            && before.incarnation != heard.incarnation
        {
            self.past.rotate_right(1);
            if let Some(latest) = self.past.first_mut() {
                *latest = Some(before.incarnation);
            }
            self.window.server_restarted();
        }
        let reply = &opened.reply;
        self.heard = Some(heard);
        self.heard_at = now;
        self.verdict = reply.verdict;
        self.action = reply.action;
        self.knows_hardware = reply.knows_hardware;
        self.window.set_patience(match reply.verdict {
            Verdict::Wait { seconds } => Micros::from_secs(seconds.into()),
            Verdict::Undecided
            | Verdict::Full { .. }
            | Verdict::LogOnly
            | Verdict::Nothing
            | Verdict::Hold { .. }
            | Verdict::Redirect { .. } => Micros::new(0),
        });
        // A server that knows nothing of the session says that it has nothing of it. Unless it had
        // acknowledged something, nothing is lost by that.
        self.start_over |= reply.next.max(self.first) < self.window.base();
        self.composer.pull(opened.pull);
        self.window.acknowledged(now, reply, opened.bitmap);
    }
}

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

/// The unfilled part of a packet's payload, or `None` if there is none.
fn room(buffer: &mut [u8], filled: usize, payload_bytes: usize) -> Option<&mut [u8]> {
    let payload = buffer
        .get_mut(HEADER_BYTES..)?
        .get_mut(filled..payload_bytes)?;
    (!payload.is_empty()).then_some(payload)
}

/// Copies as much of `from` as fits into `to` and returns how much that was.
fn copy_prefix(to: &mut [u8], from: &[u8]) -> usize {
    let bytes = to.len().min(from.len());
    if let (Some(to), Some(from)) = (to.get_mut(..bytes), from.get(..bytes)) {
        to.copy_from_slice(from);
    }
    bytes
}
