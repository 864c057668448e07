//! The server engine: one session's datagrams in, the stream in order out, and the replies that
//! steer the client.
//!
//! One entry, [`Session::handle`] (in), gives stream bytes in order to its caller; one exit,
//! [`Session::reply`] (out), makes the reply that is due by [`Session::reply_at`]. The contract
//! that makes an acknowledgement worth something: **the caller writes what `handle` delivered
//! before it calls `reply`**, or it says with [`Session::set_written`] how far it has written, and
//! calls `reply` at any time. `now` must not go back.
//!
//! What arrives ahead of its turn is kept in a [`Hold`] of the caller's, so that the caller owns,
//! bounds and counts that memory.

use crate::keys::{KEY_BYTES, SessionKeys};
use crate::record::RamRange;
use crate::reply::{
    Action, BITMAP_BYTES_MAX, FIRST_CREDIT_PACKETS, PULL_RANGES_MAX, Pull, Reply, Verdict,
    WINDOW_PACKETS_MAX,
};
use crate::time::{Instant, Micros};
use crate::units::{PacketNumber, SessionId};
use crate::wire::{Header, INCARNATION_BYTES, Kind, PacketKey, Reject, open_client, seal_server};

/// Packets after which a reply is due at once.
const REPLY_EVERY: u32 = 16;
/// The same while something is missing: the client shall hear of it soon.
const REPLY_EVERY_MISSING: u32 = 4;
/// The longest time a packet waits for its reply.
const REPLY_DELAY: Micros = Micros::from_millis(2);
const WINDOW: u64 = 4096;
const WORDS: usize = WINDOW_PACKETS_MAX / 64;

const _: () = assert!(
    WINDOW_PACKETS_MAX == 4096,
    "WINDOW is WINDOW_PACKETS_MAX as a u64"
);

/// Where packets wait that arrived ahead of their turn.
pub trait Hold {
    /// Keeps the packet's share of the stream. `false`: there is no room; the packet then counts as
    /// not received and the client sends it again.
    fn keep(&mut self, number: PacketNumber, bytes: &[u8]) -> bool;

    /// Gives back what was kept and forgets it; `None` if it was not kept.
    fn release<R>(&mut self, number: PacketNumber, with: impl FnOnce(&[u8]) -> R) -> Option<R>;
}

/// Counts of one session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Genuine packets that were news.
    pub packets: u64,
    /// Genuine packets that had been received before.
    pub duplicates: u64,
    /// Genuine packets that were ahead and for which there was no room.
    pub no_room: u64,
    /// Replies made.
    pub replies: u64,
}

/// One session as the server sees it. About 1 KiB; what waits for its turn is in the caller's
/// [`Hold`]. `K` opens the client's packets.
///
/// Invariant: bit `n mod 4096` of `ahead` is set exactly if packet `n` in `next + 1 .. next + 4096`
/// is in the hold.
pub struct Session<K = [u8; KEY_BYTES]> {
    id: SessionId,
    client_key: K,
    server_key: [u8; KEY_BYTES],
    incarnation: [u8; INCARNATION_BYTES],
    attempt: u16,
    first: PacketNumber,
    next: PacketNumber,
    /// Packets from this one on are not acknowledged, delivered or not.
    unwritten: PacketNumber,
    /// One after the largest packet received.
    seen_end: PacketNumber,
    ahead: [u64; WORDS],
    credit: u64,
    credit_end: PacketNumber,
    latest: PacketNumber,
    latest_at: Instant,
    unanswered: u32,
    unanswered_since: Instant,
    urgent: bool,
    verdict: Verdict,
    action: Action,
    pull: u32,
    pull_ranges: [RamRange; PULL_RANGES_MAX],
    pull_used: usize,
    replies: u64,
    statistics: Statistics,
}

impl Session {
    /// A session whose stream begins with packet `first` of attempt `attempt` (both from the header
    /// of a [`Kind::First`] packet) and of which everything below `next` has been written already:
    /// `first` for a new session, more for one that goes on from its spool.
    ///
    /// `incarnation` is 16 fresh random bytes, never given to another `Session`.
    ///
    /// Packets are opened with the portable implementation.
    #[must_use]
    pub fn new(
        id: SessionId,
        keys: SessionKeys,
        incarnation: [u8; INCARNATION_BYTES],
        attempt: u16,
        first: PacketNumber,
        next: PacketNumber,
    ) -> Self {
        Self::with_packet_key(id, keys, incarnation, attempt, first, next)
    }
}

impl<K: PacketKey> Session<K> {
    /// As [`Session::new`], opening packets with `K`.
    #[must_use]
    pub fn with_packet_key(
        id: SessionId,
        keys: SessionKeys,
        incarnation: [u8; INCARNATION_BYTES],
        attempt: u16,
        first: PacketNumber,
        next: PacketNumber,
    ) -> Self {
        Self {
            id,
            client_key: K::prepare(&keys.client),
            server_key: keys.server,
            incarnation,
            attempt,
            first,
            next,
            unwritten: PacketNumber(u64::MAX),
            seen_end: next,
            ahead: [0; WORDS],
            credit: FIRST_CREDIT_PACKETS,
            credit_end: first.plus(FIRST_CREDIT_PACKETS),
            latest: next,
            latest_at: Instant::from_micros(0),
            unanswered: 0,
            unanswered_since: Instant::from_micros(0),
            urgent: false,
            verdict: Verdict::Undecided,
            action: Action::None,
            pull: 0,
            pull_ranges: [RamRange::default(); PULL_RANGES_MAX],
            pull_used: 0,
            replies: 0,
            statistics: Statistics::default(),
        }
    }

    /// In: takes a client's datagram, which is decrypted in place, and delivers what it completes
    /// of the stream, in order. A datagram that is not a genuine packet of this session is refused
    /// with the reason and changes nothing.
    pub fn handle(
        &mut self,
        now: Instant,
        datagram: &mut [u8],
        hold: &mut impl Hold,
        deliver: &mut impl FnMut(&[u8]),
    ) -> Result<(), Reject> {
        let header = Header::parse(datagram)?;
        if header.session != self.id || header.attempt != self.attempt {
            return Err(Reject::OtherSession);
        }
        let number = header.number;
        let is_first = header.kind == Kind::First;
        if number < self.first || is_first != (number == self.first) {
            return Err(Reject::OtherSession);
        }
        // After the last number there is none, so a packet of that number would never count as had.
        if number.since(self.next) >= WINDOW || number == PacketNumber(u64::MAX) {
            return Err(Reject::BeyondWindow);
        }
        let bytes = open_client(&self.client_key, &header, datagram)?;
        self.note_arrival(now, number);
        if number < self.next || self.is_ahead(number) {
            self.statistics.duplicates = self.statistics.duplicates.saturating_add(1);
            // Its reply was lost, or the client probes: it waits for an answer.
            self.urgent = true;
        } else if number == self.next {
            self.count_packet();
            deliver(bytes);
            self.next = number.plus(1);
            self.deliver_ahead(hold, deliver);
        } else if hold.keep(number, bytes) {
            self.count_packet();
            self.set_ahead(number, true);
        } else {
            self.statistics.no_room = self.statistics.no_room.saturating_add(1);
        }
        Ok(())
    }

    /// Out: makes the reply in `out` ([`crate::reply::REPLY_BYTES_MAX`] bytes) and returns its
    /// length.
    #[must_use]
    pub fn reply(&mut self, now: Instant, out: &mut [u8]) -> Option<usize> {
        let written = self.next.min(self.unwritten);
        self.credit_end = self.credit_end.max(written.plus(self.credit));
        let reply = Reply {
            next: written,
            credit_end: self.credit_end,
            latest: self.latest,
            delay: now.since(self.latest_at),
            attempt: self.attempt,
            verdict: self.verdict,
            action: self.action,
            knows_hardware: true,
        };
        let mut bitmap = [0; BITMAP_BYTES_MAX];
        let used = self.bitmap(written, &mut bitmap);
        let pull = Pull {
            number: self.pull,
            ranges: self.pull_ranges.get(..self.pull_used)?,
        };
        let payload = reply.encode(bitmap.get(..used)?, pull, out)?;
        let header = Header {
            kind: Kind::Reply,
            attempt: self.attempt,
            session: self.id,
            number: PacketNumber(self.replies),
        };
        self.replies = self.replies.saturating_add(1);
        self.statistics.replies = self.statistics.replies.saturating_add(1);
        // What is delivered and not written waits for a further reply.
        self.unanswered = u32::try_from(self.next.since(written)).unwrap_or(u32::MAX);
        self.unanswered_since = now;
        self.urgent = false;
        seal_server(&self.server_key, &header, &self.incarnation, out, payload)
    }

    /// Getter: when a reply is due; `None` if there is nothing to tell.
    #[must_use]
    pub fn reply_at(&self) -> Option<Instant> {
        let missing = self.seen_end > self.next;
        let every = if missing {
            REPLY_EVERY_MISSING
        } else {
            REPLY_EVERY
        };
        if self.urgent || self.unanswered >= every {
            return Some(self.unanswered_since);
        }
        (self.unanswered > 0).then(|| self.unanswered_since + REPLY_DELAY)
    }

    /// In: what the client is told to do from the next reply on.
    pub fn set_verdict(&mut self, verdict: Verdict) {
        self.urgent |= self.verdict != verdict;
        self.verdict = verdict;
    }

    /// In: what the host is told to do in the end.
    pub fn set_action(&mut self, action: Action) {
        self.urgent |= self.action != action;
        self.action = action;
    }

    /// In: asks for pages, from the next reply on. The number must be larger than that of any pull
    /// before in this session, whichever process made it; of the ranges, the first
    /// [`PULL_RANGES_MAX`] count. The answer is [`crate::record::Record::PullBegin`], the pages, and
    /// [`crate::record::Record::PullEnd`]; only then is the next pull due.
    pub fn set_pull(&mut self, pull: Pull<'_>) {
        self.urgent |= self.pull != pull.number;
        self.pull = pull.number;
        self.pull_used = pull.ranges.len().min(PULL_RANGES_MAX);
        for (to, from) in self.pull_ranges.iter_mut().zip(pull.ranges) {
            *to = *from;
        }
    }

    /// In: how many packets beyond the last one written the client may send; at most
    /// [`WINDOW_PACKETS_MAX`]. What was granted before stays granted.
    pub fn set_credit(&mut self, packets: u64) {
        self.credit = packets.min(WINDOW);
    }

    /// In: everything below `next` is written, and nothing above it may be acknowledged. Without a
    /// call, everything delivered is.
    pub fn set_written(&mut self, next: PacketNumber) {
        self.unwritten = next;
    }

    /// Getter: the verdict so far.
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Getter: every packet below this one has been delivered.
    #[must_use]
    pub const fn next(&self) -> PacketNumber {
        self.next
    }

    /// Getter: the session's name.
    #[must_use]
    pub const fn id(&self) -> SessionId {
        self.id
    }

    /// Getter: the attempt.
    #[must_use]
    pub const fn attempt(&self) -> u16 {
        self.attempt
    }

    /// Getter: counts so far.
    #[must_use]
    pub const fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    fn note_arrival(&mut self, now: Instant, number: PacketNumber) {
        self.latest = number;
        self.latest_at = now;
        self.seen_end = self.seen_end.max(number.plus(1));
        if self.unanswered == 0 {
            self.unanswered_since = now;
        }
        self.unanswered = self.unanswered.saturating_add(1);
    }

    fn count_packet(&mut self) {
        self.statistics.packets = self.statistics.packets.saturating_add(1);
    }

    fn deliver_ahead(&mut self, hold: &mut impl Hold, deliver: &mut impl FnMut(&[u8])) {
        while self.is_ahead(self.next) {
            let number = self.next;
            self.set_ahead(number, false);
            if hold.release(number, &mut *deliver).is_none() {
                // The hold lost it: it counts as never received, and the client sends it again.
                return;
            }
            self.next = number.plus(1);
        }
    }

    /// Fills the bitmap of a reply that acknowledges everything below `written`; returns how many
    /// bytes of it are used. What is delivered but not written is received, `written` too.
    fn bitmap(&self, written: PacketNumber, bitmap: &mut [u8; BITMAP_BYTES_MAX]) -> usize {
        let mut used = 0_usize;
        let mut number = written;
        for (index, byte) in bitmap.iter_mut().enumerate() {
            if number >= self.seen_end {
                break;
            }
            for bit in 0..8 {
                if number < self.next || self.is_ahead(number) {
                    *byte |= 1_u8 << bit;
                    used = index.saturating_add(1);
                }
                number = number.plus(1);
            }
        }
        used
    }

    fn is_ahead(&self, number: PacketNumber) -> bool {
        let (word, mask) = place(number);
        self.ahead.get(word).is_some_and(|bits| bits & mask != 0)
    }

    fn set_ahead(&mut self, number: PacketNumber, ahead: bool) {
        let (word, mask) = place(number);
        if let Some(bits) = self.ahead.get_mut(word) {
            *bits = if ahead { *bits | mask } else { *bits & !mask };
        }
    }
}

/// Word and bit of a packet in the ring of [`WINDOW`] bits.
fn place(number: PacketNumber) -> (usize, u64) {
    let bit = number.0 & (WINDOW - 1);
    (usize::try_from(bit >> 6).unwrap_or(0), 1_u64 << (bit & 63))
}
