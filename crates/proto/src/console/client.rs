//! The client's end: which records go out next, and when.

use super::datagram::{
    ASK_RANGES_MAX, DICTIONARY_BYTES_MAX, Head, LogReply, LogWriter, Range, Reason, RecordHead,
    TEXT_BYTES_MAX,
};
use crate::keys::SessionKeys;
use crate::time::{Instant, Micros};
use crate::units::{PacketNumber, SessionId};
use crate::wire::{
    HEADER_BYTES, Header, INCARNATION_BYTES, Kind, Reject, TAG_BYTES, open_server, seal_client,
};

/// Records that may be sent and not yet acknowledged. A server that is silent is not flooded.
pub const WINDOW_RECORDS: u64 = 1024;
/// Records a second that are sent in the long run. What comes faster waits in the ring buffer.
pub const RECORDS_PER_SECOND: u64 = 4000;
/// Records that may be sent at once after a quiet time: a boot's messages.
pub const RECORDS_BURST: u64 = 8192;
/// After so long without an answer the newest records are sent again, doubling up to [`RESEND_MAX`].
pub const RESEND_FIRST: Micros = Micros::from_millis(200);
/// See [`RESEND_FIRST`]; a crash has no time to lose.
const RESEND_FIRST_CRASHED: Micros = Micros::from_millis(50);
/// See [`RESEND_FIRST`].
pub const RESEND_MAX: Micros = Micros::from_secs(8);
/// After so long without anything to send the client tells that it is there.
pub const KEEPALIVE: Micros = Micros::from_secs(60);
/// The packet numbers of a crash begin here: whoever was interrupted while it sealed a packet
/// cannot have used them.
const CRASH_NUMBERS: u64 = 1 << 63;
/// Incarnations of servers that are remembered so that their replies are not taken again.
const INCARNATIONS: usize = 4;

/// What reading one sequence number from the ring buffer gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingRead {
    /// A record. As much of its text, then of its dictionary, as fits is in the room given.
    Record {
        /// All but the texts.
        head: RecordHead,
        /// Bytes of the whole text.
        text: usize,
        /// Bytes of the whole dictionary.
        dictionary: usize,
    },
    /// Nothing was printed under this number yet.
    NotYet,
    /// Its record is overwritten.
    Overwritten,
    /// Its record has no text.
    Unreadable,
}

/// The kernel's ring buffer.
pub trait Ring {
    /// The oldest sequence number that can be read.
    fn oldest(&mut self) -> u64;
    /// Reads a record, its texts to the begin of `room`.
    fn read(&mut self, sequence: u64, room: &mut [u8]) -> RingRead;
}

/// What the clocks say, for the head of a datagram.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// See [`Head::kernel_us`].
    pub kernel_us: u64,
    /// See [`Head::unix_us`].
    pub unix_us: u64,
}

/// What a client knows from the arming.
#[derive(Clone)]
pub struct Setup {
    /// Whose records these are.
    pub session: SessionId,
    /// [`crate::keys::Secret::log_keys`] of it.
    pub keys: SessionKeys,
    /// The boot.
    pub boot: [u8; 16],
    /// Records of a higher level are not sent; 7 sends all.
    pub level: u8,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send the first bytes of the buffer; then ask again.
    Send(usize),
    /// Nothing until this time, until something is printed or a datagram arrives.
    Wait(Instant),
}

/// A token bucket over records, which keeps a log storm from filling the network.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    records: u64,
    at: Instant,
}

impl Budget {
    /// A full one.
    #[must_use]
    pub const fn new(now: Instant) -> Self {
        Self {
            records: RECORDS_BURST,
            at: now,
        }
    }

    /// Whether something may be sent now. Adds what has become due.
    pub fn has_some(&mut self, now: Instant) -> bool {
        let elapsed = now.since(self.at).get().min(10_000_000);
        let due = elapsed.saturating_mul(RECORDS_PER_SECOND) / 1_000_000;
        if due > 0 {
            self.records = self.records.saturating_add(due).min(RECORDS_BURST);
            self.at = now;
        }
        self.records > 0
    }

    /// Takes what was sent.
    pub const fn take(&mut self, records: u64) {
        self.records = self.records.saturating_sub(records);
    }

    /// When there is something again, if there is nothing now.
    #[must_use]
    pub fn refilled_at(&self) -> Instant {
        self.at + Micros::new((1_000_000 / RECORDS_PER_SECOND).saturating_mul(16))
    }
}

/// The client's end of one boot's records.
pub struct Client {
    setup: Setup,
    crash: bool,
    number: u64,
    /// Sent up to here.
    next: u64,
    /// The server has written up to here.
    acked: u64,
    /// The server has answered, so it is known from where on it wants the records.
    opened: bool,
    asked: [Range; ASK_RANGES_MAX],
    /// What the last datagram covered.
    last: Range,
    /// Where the last datagram of records that had not been sent before began.
    newest: u64,
    resend_at: Instant,
    resend_after: Micros,
    keepalive_at: Instant,
    budget: Budget,
    incarnations: [[u8; INCARNATION_BYTES]; INCARNATIONS],
    incarnations_used: usize,
    replies: Option<PacketNumber>,
}

impl Client {
    /// A client of a healthy host: it asks the server first what that has of this boot.
    #[must_use]
    pub fn new(setup: Setup, now: Instant) -> Self {
        Self {
            setup,
            crash: false,
            number: 0,
            next: 0,
            acked: 0,
            opened: false,
            asked: [Range::default(); ASK_RANGES_MAX],
            last: Range::default(),
            newest: 0,
            resend_at: now,
            resend_after: RESEND_FIRST,
            keepalive_at: now + KEEPALIVE,
            budget: Budget::new(now),
            incarnations: [[0; INCARNATION_BYTES]; INCARNATIONS],
            incarnations_used: 0,
            replies: None,
        }
    }

    /// A client of a host that has just crashed, which asks nobody. `acked` is
    /// [`Client::acked`] of the client before, at some time.
    #[must_use]
    pub fn crashed(setup: Setup, now: Instant, acked: u64) -> Self {
        let healthy = Self::new(setup, now);
        Self {
            crash: true,
            number: CRASH_NUMBERS,
            next: acked,
            acked,
            newest: acked,
            opened: true,
            resend_at: now + RESEND_FIRST_CRASHED,
            resend_after: RESEND_FIRST_CRASHED,
            ..healthy
        }
    }

    /// Getter: the server has written all below this sequence number.
    #[must_use]
    pub const fn acked(&self) -> u64 {
        self.acked
    }

    /// Getter: whether the server has ever answered.
    #[must_use]
    pub const fn is_answered(&self) -> bool {
        self.replies.is_some()
    }

    /// Getter: whether everything that was sent is written.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        self.opened && self.acked == self.next
    }

    /// In: takes a datagram from the network, which is decrypted in place.
    pub fn handle(&mut self, now: Instant, datagram: &mut [u8]) -> Result<(), Reject> {
        let header = Header::parse(datagram)?;
        if header.kind != Kind::LogReply {
            return Err(Reject::WrongDirection(header.kind));
        }
        if header.session != self.setup.session {
            return Err(Reject::OtherSession);
        }
        let (incarnation, payload) = open_server(&self.setup.keys.server, &header, datagram)?;
        let reply = LogReply::decode(payload).ok_or(Reject::Malformed)?;
        let restarted = self.note_incarnation(&incarnation, header.number)?;
        self.take(now, &reply, restarted);
        Ok(())
    }

    /// Whether the reply is from another process than the last one; refuses what is old.
    fn note_incarnation(
        &mut self,
        incarnation: &[u8; INCARNATION_BYTES],
        number: PacketNumber,
    ) -> Result<bool, Reject> {
        let known = self.incarnations.get(..self.incarnations_used);
        let place = known
            .unwrap_or_default()
            .iter()
            .position(|known| known == incarnation);
        match (place, self.replies) {
            // The latest process is the first one in the list.
            (Some(0), Some(last)) if number > last => {
                self.replies = Some(number);
                Ok(false)
            }
            (Some(_), _) => Err(Reject::Stale),
            (None, _) => {
                self.incarnations.rotate_right(1);
                if let Some(first) = self.incarnations.first_mut() {
                    *first = *incarnation;
                }
                let used = self.incarnations_used.saturating_add(1);
                self.incarnations_used = used.min(INCARNATIONS);
                self.replies = Some(number);
                Ok(true)
            }
        }
    }

    fn take(&mut self, now: Instant, reply: &LogReply, restarted: bool) {
        if !self.opened {
            self.opened = true;
            self.next = reply.next;
            self.newest = reply.next;
        }
        let next = reply.next.min(self.next);
        // Only a server that has lost its memory may take back what it has said.
        if next > self.acked || restarted {
            self.acked = next;
            self.resend_after = self.resend_first();
            self.resend_at = now + self.resend_after;
        }
        // A reply that asks for nothing leaves standing what the one before asked for.
        if !reply.asked().is_empty() {
            self.asked = [Range::default(); ASK_RANGES_MAX];
        }
        for (place, range) in self.asked.iter_mut().zip(reply.asked()) {
            *place = Range {
                first: range.first,
                end: range.end.min(self.next),
            };
        }
    }

    /// Out: what to do next. A datagram is composed in `buffer`, all of which it may fill; a buffer
    /// below [`crate::wire::DATAGRAM_BYTES_MIN`] sends nothing.
    pub fn poll(
        &mut self,
        now: Instant,
        clock: Clock,
        ring: &mut impl Ring,
        buffer: &mut [u8],
    ) -> Step {
        let sent = if self.opened {
            self.send_asked(now, clock, ring, buffer)
                .or_else(|| self.send_new(now, clock, ring, buffer))
                .or_else(|| self.send_again(now, clock, ring, buffer))
        } else {
            self.knock(now, clock, ring, buffer)
        };
        match sent {
            Some(bytes) => {
                self.keepalive_at = now + KEEPALIVE;
                Step::Send(bytes)
            }
            None => Step::Wait(self.wake_at(now)),
        }
    }

    fn wake_at(&mut self, now: Instant) -> Instant {
        let mut at = self.keepalive_at;
        if !self.is_settled() {
            at = at.min(self.resend_at);
        }
        if self.opened && !self.budget.has_some(now) {
            at = at.min(self.budget.refilled_at());
        }
        at
    }

    /// Asks a server that has not answered yet what it has of this boot.
    fn knock(
        &mut self,
        now: Instant,
        clock: Clock,
        ring: &mut impl Ring,
        buffer: &mut [u8],
    ) -> Option<usize> {
        if now < self.resend_at {
            return None;
        }
        self.back_off(now);
        self.next = ring.oldest();
        let at = self.next;
        self.compose(clock, ring, buffer, Range { first: at, end: at })
    }

    /// What the server asks for again.
    fn send_asked(
        &mut self,
        now: Instant,
        clock: Clock,
        ring: &mut impl Ring,
        buffer: &mut [u8],
    ) -> Option<usize> {
        let place = self.asked.iter().position(|range| !range.is_empty())?;
        if !self.budget.has_some(now) {
            return None;
        }
        let range = *self.asked.get(place)?;
        let bytes = self.compose(clock, ring, buffer, range);
        if let Some(asked) = self.asked.get_mut(place) {
            // A range that cannot be composed is given up rather than tried for ever.
            asked.first = bytes.map_or(asked.end, |_| self.last.end);
        }
        bytes
    }

    /// What has been printed since.
    fn send_new(
        &mut self,
        now: Instant,
        clock: Clock,
        ring: &mut impl Ring,
        buffer: &mut [u8],
    ) -> Option<usize> {
        let end = self.acked.saturating_add(WINDOW_RECORDS);
        if self.next >= end || !self.budget.has_some(now) {
            return None;
        }
        let first = self.next;
        // What is overwritten is one run, however long, and is told at once.
        let end = end.max(ring.oldest());
        if matches!(ring.read(first, &mut []), RingRead::NotYet) {
            return None;
        }
        let was_settled = self.is_settled();
        let bytes = self.compose(clock, ring, buffer, Range { first, end })?;
        self.next = self.last.end;
        self.newest = first;
        if was_settled {
            self.resend_after = self.resend_first();
            self.resend_at = now + self.resend_after;
        }
        Some(bytes)
    }

    /// The newest records again, because nobody says that they have arrived; or an empty datagram,
    /// to tell that the host is there. Either is answered, with what is missing.
    fn send_again(
        &mut self,
        now: Instant,
        clock: Clock,
        ring: &mut impl Ring,
        buffer: &mut [u8],
    ) -> Option<usize> {
        if now < self.keepalive_at && (self.is_settled() || now < self.resend_at) {
            return None;
        }
        self.back_off(now);
        let range = Range {
            first: self.newest.max(self.acked),
            end: self.next,
        };
        self.compose(clock, ring, buffer, range)
    }

    const fn resend_first(&self) -> Micros {
        if self.crash {
            RESEND_FIRST_CRASHED
        } else {
            RESEND_FIRST
        }
    }

    fn back_off(&mut self, now: Instant) {
        self.resend_at = now + self.resend_after;
        self.resend_after = self.resend_after.times(2).min(RESEND_MAX);
    }

    /// Makes a datagram of as much of `range` as fits and is printed. `self.last` is what it covers.
    fn compose(
        &mut self,
        clock: Clock,
        ring: &mut impl Ring,
        buffer: &mut [u8],
        range: Range,
    ) -> Option<usize> {
        let end = buffer.len().checked_sub(TAG_BYTES)?;
        let payload = buffer.get_mut(HEADER_BYTES..end)?;
        let mut writer = LogWriter::new(payload, range.first)?;
        let oldest = ring.oldest();
        let mut records = 0;
        while writer.covers().end < range.end {
            match self.add(&mut writer, ring, oldest, range.end) {
                Added::Record => records = u64::saturating_add(records, 1),
                Added::Skip => {}
                Added::Nothing => break,
            }
        }
        let covers = writer.covers();
        if covers.is_empty() && !range.is_empty() {
            return None;
        }
        let head = Head {
            boot: self.setup.boot,
            covers,
            oldest,
            kernel_us: clock.kernel_us,
            unix_us: clock.unix_us,
            crash: self.crash,
        };
        let payload = writer.finish(&head)?;
        let header = Header {
            kind: Kind::Log,
            attempt: 0,
            session: self.setup.session,
            number: PacketNumber(self.number),
        };
        let bytes = seal_client(&self.setup.keys.client, &header, buffer, payload)?;
        // The last number is never used, so none is used twice.
        self.number = self.number.checked_add(1)?;
        self.budget.take(records);
        self.last = covers;
        Some(bytes)
    }

    fn add(
        &self,
        writer: &mut LogWriter<'_>,
        ring: &mut impl Ring,
        oldest: u64,
        end: u64,
    ) -> Added {
        let at = writer.covers().end;
        if at < oldest {
            let count = oldest.min(end).saturating_sub(at);
            return Added::from_skip(writer.skip(count, Reason::Overwritten));
        }
        let room = writer.room();
        let room_bytes = room.len();
        match ring.read(at, room) {
            RingRead::NotYet => Added::Nothing,
            RingRead::Overwritten => Added::from_skip(writer.skip(1, Reason::Overwritten)),
            RingRead::Unreadable => Added::from_skip(writer.skip(1, Reason::Unreadable)),
            RingRead::Record { head, .. } if head.level > self.setup.level => {
                Added::from_skip(writer.skip(1, Reason::Level))
            }
            RingRead::Record {
                mut head,
                text,
                dictionary,
            } => {
                let (whole_text, whole_dictionary) = (
                    text.min(TEXT_BYTES_MAX),
                    dictionary.min(DICTIONARY_BYTES_MAX),
                );
                let fits = whole_text.saturating_add(whole_dictionary) <= room_bytes;
                // Only a record that has a datagram of its own is cut.
                if !fits && !writer.covers().is_empty() {
                    return Added::Nothing;
                }
                let text_kept = whole_text.min(room_bytes);
                // Texts lie one behind the other, so a cut text leaves no dictionary.
                let dictionary_kept =
                    if fits && whole_text == text && whole_dictionary == dictionary {
                        whole_dictionary
                    } else {
                        0
                    };
                head.cut |= text_kept != text || dictionary_kept != dictionary;
                match writer.record(&head, text_kept, dictionary_kept) {
                    Some(()) => Added::Record,
                    None => Added::Nothing,
                }
            }
        }
    }
}

/// What became of one sequence number.
enum Added {
    Record,
    Skip,
    /// No room, or nothing printed.
    Nothing,
}

impl Added {
    const fn from_skip(skip: Option<()>) -> Self {
        match skip {
            Some(()) => Self::Skip,
            None => Self::Nothing,
        }
    }
}
