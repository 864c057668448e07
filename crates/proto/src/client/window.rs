//! The window: which packets are under way, what is lost, what may be sent.
//!
//! A packet stays in the caller's buffer, sealed, until it is acknowledged. Loss is told by order of
//! sending: when something that left later has arrived, and by time: when nothing arrives at all.
//! Only what is lost is sent again. How much may be under way is [`Rate`]'s business.

use crate::client::Pool;
use crate::client::rate::{Departure, Rate};
use crate::reply::{FIRST_CREDIT_PACKETS, Reply};
use crate::time::{Instant, Micros};
use crate::units::PacketNumber;

/// Packets under way at most, each in a buffer of its own. It stays there until the server has
/// written it and all before it: a server that is restarted forgets what came ahead of its turn.
pub const SLOTS_MAX: u16 = 2048;
const RING: usize = 2048;
const RING_MASK: u64 = 2047;
const WORDS: usize = RING / 64;
/// A packet is lost when one that was sent this many sends later has arrived, and left an eighth of
/// a round trip later. Links that reorder more than this cost some needless resends, which the
/// server counts.
const REORDER_SENDS: u32 = 16;
const REORDER_SHIFT: u32 = 3;
/// Time without progress after which the oldest packet is sent again, before any round trip was
/// measured.
const TIMEOUT_START: Micros = Micros::from_millis(200);
/// The shortest such time: a virtual machine's neighbours may hold its packets for this long.
const TIMEOUT_MIN: Micros = Micros::from_millis(20);
/// The longest such time, reached by doubling.
const TIMEOUT_MAX: Micros = Micros::from_secs(1);
const BACKOFF_MAX: u32 = 6;

#[derive(Clone, Copy)]
struct Slot {
    left: Departure,
    /// Position of the last send among all sends, modulo 2^32.
    order: u32,
    sends: u16,
    bytes: u16,
    buffer: u16,
}

/// One bit for each packet of the ring.
struct Bits([u64; WORDS]);

/// A packet to send again.
pub(super) struct Resend {
    pub(super) index: u16,
    pub(super) bytes: usize,
}

/// Counts since the start of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Packets sealed and sent for the first time.
    pub packets: u64,
    /// UDP payload bytes of those.
    pub bytes: u64,
    /// Packets sent again.
    pub resent: u64,
    /// Times that nothing arrived for too long.
    pub timeouts: u64,
    /// Replies taken.
    pub replies: u64,
}

/// Invariants: `base <= next <= base + buffers`; a packet in `base..next` is flying unless its bit in
/// `arrived` or `lost` is set, never both; `flying` and `lost_packets` count them; those below `base`
/// have arrived and those at or above `seen_end` have not.
pub(super) struct Window {
    slots: [Slot; RING],
    arrived: Bits,
    lost: Bits,
    buffers: u16,
    /// The buffer of packet `next`.
    next_buffer: u16,
    first: PacketNumber,
    base: PacketNumber,
    next: PacketNumber,
    seen_end: PacketNumber,
    credit_end: PacketNumber,
    flying: u32,
    lost_packets: u32,
    /// Sends so far, modulo 2^32.
    sends: u32,
    /// Of the packets that have arrived, the one that left last: its order, and when.
    newest_order: u32,
    newest_left: Instant,
    rate: Rate,
    /// When the timeout's time began.
    timer_from: Instant,
    backoff: u32,
    probe: bool,
    /// The timeout's packet goes whatever the rate says: what is taken to be under way may be gone.
    overdue: bool,
    /// How long to be quiet when nothing is under way; none if zero.
    patience: Micros,
    statistics: Statistics,
}

impl Bits {
    fn has(&self, number: PacketNumber) -> bool {
        let (word, bit) = place(number);
        self.0.get(word).is_some_and(|bits| bits & bit != 0)
    }

    fn set(&mut self, number: PacketNumber, to: bool) {
        let (word, bit) = place(number);
        if let Some(bits) = self.0.get_mut(word) {
            *bits = if to { *bits | bit } else { *bits & !bit };
        }
    }

    /// The word that holds `number`'s bit.
    fn word(&self, number: PacketNumber) -> u64 {
        self.0.get(place(number).0).copied().unwrap_or(0)
    }
}

impl Window {
    pub(super) const fn new() -> Self {
        let slot = Slot {
            left: Departure::NONE,
            order: 0,
            sends: 0,
            bytes: 0,
            buffer: 0,
        };
        Self {
            slots: [slot; RING],
            arrived: Bits([0; WORDS]),
            lost: Bits([0; WORDS]),
            buffers: 0,
            next_buffer: 0,
            first: PacketNumber(0),
            base: PacketNumber(0),
            next: PacketNumber(0),
            seen_end: PacketNumber(0),
            credit_end: PacketNumber(0),
            flying: 0,
            lost_packets: 0,
            sends: 0,
            newest_order: 0,
            newest_left: Instant::from_micros(0),
            rate: Rate::new(),
            timer_from: Instant::from_micros(0),
            backoff: 0,
            probe: false,
            overdue: false,
            patience: Micros::new(0),
            statistics: Statistics {
                packets: 0,
                bytes: 0,
                resent: 0,
                timeouts: 0,
                replies: 0,
            },
        }
    }

    pub(super) fn start(&mut self, first: PacketNumber, buffers: u16) {
        self.buffers = buffers.clamp(1, SLOTS_MAX);
        self.next_buffer = 0;
        (self.first, self.base, self.next, self.seen_end) = (first, first, first, first);
        self.credit_end = first.plus(FIRST_CREDIT_PACKETS);
        (self.flying, self.lost_packets) = (0, 0);
        (self.sends, self.newest_order) = (0, 0);
        self.newest_left = Instant::from_micros(0);
        self.rate = Rate::new();
        self.backoff = 0;
        self.probe = false;
        self.overdue = false;
        self.patience = Micros::new(0);
        self.statistics = Statistics::default();
    }

    /// Buffers in use.
    pub(super) const fn buffers(&self) -> u16 {
        self.buffers
    }

    pub(super) const fn next(&self) -> PacketNumber {
        self.next
    }

    /// The buffer of packet [`Self::next`].
    pub(super) const fn next_buffer(&self) -> u16 {
        self.next_buffer
    }

    /// The smoothed round trip, if one was measured.
    pub(super) fn round_trip(&self) -> Option<Micros> {
        self.rate.smoothed()
    }

    pub(super) const fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// The first packet that is not acknowledged.
    pub(super) const fn base(&self) -> PacketNumber {
        self.base
    }

    /// How long the client is quiet when nothing is under way.
    pub(super) const fn patience(&self) -> Micros {
        self.patience
    }

    /// The server wants to hear nothing for so long, unless there is something to send.
    pub(super) const fn set_patience(&mut self, patience: Micros) {
        self.patience = patience;
    }

    /// Whether everything sent is acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        self.base == self.next
    }

    /// Whether one more new packet may be sent; if not, [`Self::wait_until`] says when to look
    /// again.
    pub(super) fn may_send(&mut self, now: Instant) -> bool {
        self.has_room() && self.rate.lets(now, self.flying)
    }

    /// The same, only to know.
    pub(super) fn would_send(&self, now: Instant) -> bool {
        self.has_room() && self.rate.would_let(now, self.flying)
    }

    fn has_room(&self) -> bool {
        self.next.since(self.base) < u64::from(self.buffers) && self.next < self.credit_end
    }

    /// Books packet `next` as sent, `bytes` long.
    pub(super) fn sent_new(&mut self, now: Instant, bytes: usize) {
        let number = self.next;
        if self.is_empty() {
            // Whatever probes came before, this packet's timeout is a first one.
            self.timer_from = now;
            self.backoff = 0;
        }
        let slot = Slot {
            left: self.rate.leaves(now, self.is_empty()),
            order: self.count_send(),
            sends: 1,
            bytes: u16::try_from(bytes).unwrap_or(u16::MAX),
            buffer: self.next_buffer,
        };
        self.arrived.set(number, false);
        self.lost.set(number, false);
        if let Some(to) = self.slot_mut(number) {
            *to = slot;
        }
        self.flying = self.flying.saturating_add(1);
        self.next = number.plus(1);
        self.next_buffer = self.next_buffer.saturating_add(1);
        if self.next_buffer >= self.buffers {
            self.next_buffer = 0;
        }
        self.statistics.packets = self.statistics.packets.saturating_add(1);
        self.statistics.bytes = self.statistics.bytes.saturating_add(u64::from(slot.bytes));
    }

    /// The time at which there will be something to do, if nothing arrives before: a packet that the
    /// pace lets go if `paced`, or [`Self::on_time`].
    pub(super) fn wait_until(&self, now: Instant, paced: bool) -> Instant {
        let timer = self.timer_from + self.timeout();
        let due = self.rate.due();
        let until = if paced && due > now {
            timer.min(due)
        } else {
            timer
        };
        until.max(now + Micros::new(1))
    }

    /// Whether only the pace keeps something from being sent.
    pub(super) fn is_paced(&self) -> bool {
        self.lost_packets > 0 || self.has_room()
    }

    /// Reacts to the passing of time: without progress for too long, the oldest packet that has not
    /// arrived counts as lost; if all have, the last one is sent once more to make the server speak.
    pub(super) fn on_time(&mut self, now: Instant) {
        if now.since(self.timer_from) < self.timeout() || self.next == self.first {
            return;
        }
        self.timer_from = now;
        self.backoff = self.backoff.saturating_add(1).min(BACKOFF_MAX);
        self.statistics.timeouts = self.statistics.timeouts.saturating_add(1);
        let missing = first_set(self.base, self.next, |number| !self.arrived.word(number));
        if let Some(number) = missing {
            self.lose(number);
            self.overdue = true;
        } else {
            self.probe = true;
        }
    }

    /// Whether [`Self::resend`] would give a packet.
    pub(super) fn resend_ready(&self, now: Instant, pool: &mut impl Pool) -> bool {
        (self.overdue || self.rate.would_let(now, self.flying)) && self.first_lost(pool).is_some()
    }

    /// The packet to send again now, if there is one; books it as sent.
    pub(super) fn resend(&mut self, now: Instant, pool: &mut impl Pool) -> Option<Resend> {
        let number = if self.probe {
            self.probe(pool)
        } else if self.lost_packets > 0 && (self.overdue || self.rate.lets(now, self.flying)) {
            self.first_lost(pool)
        } else {
            None
        }?;
        let left = self.rate.leaves(now, self.flying == 0);
        let order = self.count_send();
        let slot = self.slot_mut(number)?;
        slot.left = left;
        slot.order = order;
        slot.sends = slot.sends.saturating_add(1);
        let (index, bytes) = (slot.buffer, slot.bytes.into());
        if self.lost.has(number) {
            self.lost.set(number, false);
            self.lost_packets = self.lost_packets.saturating_sub(1);
            self.flying = self.flying.saturating_add(1);
        }
        self.probe = false;
        self.overdue = false;
        self.statistics.resent = self.statistics.resent.saturating_add(1);
        Some(Resend { index, bytes })
    }

    /// Takes a reply: marks what it acknowledges, measures, finds losses and opens the window.
    pub(super) fn acknowledged(&mut self, now: Instant, reply: &Reply, bitmap: &[u8]) {
        self.statistics.replies = self.statistics.replies.saturating_add(1);
        self.measure(now, reply);
        let mut fresh = Fresh::NOTHING;
        while self.base < reply.next && self.base < self.next {
            self.mark(self.base, &mut fresh);
            self.base = self.base.plus(1);
        }
        self.seen_end = self.seen_end.max(self.base);
        self.mark_bitmap(reply.next, bitmap, &mut fresh);
        self.credit_end = self.credit_end.max(reply.credit_end);
        if fresh.packets > 0 {
            self.backoff = 0;
            self.timer_from = now;
            if let Some((_, left)) = &fresh.latest {
                let ends = (self.base, self.next);
                self.rate.arrivals(now, fresh.packets, left, ends);
            }
            self.find_losses();
        } else if self.is_empty() && self.patience > Micros::new(0) {
            // It was asked and has answered: the wait begins anew.
            self.backoff = 0;
        }
    }

    /// The server was restarted: what was under way, and what had arrived ahead of its turn and was
    /// in its memory only, counts as lost, unless the new server's reply says otherwise.
    pub(super) fn server_restarted(&mut self) {
        let mut number = self.base;
        while number < self.next {
            self.arrived.set(number, false);
            self.lost.set(number, true);
            number = number.plus(1);
        }
        self.seen_end = self.base;
        self.flying = 0;
        self.lost_packets = u32::try_from(self.next.since(self.base)).unwrap_or(u32::MAX);
        self.backoff = 0;
    }

    /// Marks the packets whose bits are set, the first bit being that of packet `from`.
    fn mark_bitmap(&mut self, mut from: PacketNumber, bitmap: &[u8], fresh: &mut Fresh) {
        for bytes in bitmap.chunks(8) {
            let mut word = 0_u64;
            for byte in bytes.iter().rev() {
                word = (word << 8) | u64::from(*byte);
            }
            word &= !self.arrived_from(from);
            while word != 0 {
                let number = from.plus(word.trailing_zeros().into());
                if number >= self.next {
                    return;
                }
                self.seen_end = self.seen_end.max(number.plus(1));
                self.mark(number, fresh);
                word &= word.wrapping_sub(1);
            }
            from = from.plus(64);
        }
    }

    /// The 64 bits of `arrived` from packet `from` on.
    fn arrived_from(&self, from: PacketNumber) -> u64 {
        let shift = from.0 & 63;
        let low = self.arrived.word(from) >> shift;
        if shift == 0 {
            return low;
        }
        low | (self.arrived.word(from.plus(64)) << (64_u64.saturating_sub(shift)))
    }

    /// A sample of the round trip, if the packet that arrived last was sent once and is news.
    fn measure(&mut self, now: Instant, reply: &Reply) {
        let number = reply.latest;
        if number < self.base || number >= self.next || self.arrived.has(number) {
            return;
        }
        let Some(slot) = self.slot(number).filter(|slot| slot.sends == 1) else {
            return;
        };
        let sample = now.since(slot.left.at()) - reply.delay;
        self.rate.round_trip(now, sample);
    }

    fn timeout(&self) -> Micros {
        // Once it has asked, it asks again as soon as with everything else: its question may be lost.
        if self.is_empty() && self.patience > Micros::new(0) && self.backoff == 0 {
            return self.patience;
        }
        let base = self
            .rate
            .patience()
            .map_or(TIMEOUT_START, |patience| patience.max(TIMEOUT_MIN));
        base.times(1_u64.wrapping_shl(self.backoff))
            .min(TIMEOUT_MAX.max(base))
    }

    /// Marks a packet as arrived.
    fn mark(&mut self, number: PacketNumber, fresh: &mut Fresh) {
        if self.arrived.has(number) {
            return;
        }
        self.arrived.set(number, true);
        fresh.packets = fresh.packets.saturating_add(1);
        let Some(slot) = self.slot(number).copied() else {
            return;
        };
        if self.lost.has(number) {
            self.lost.set(number, false);
            self.lost_packets = self.lost_packets.saturating_sub(1);
            return;
        }
        self.flying = self.flying.saturating_sub(1);
        if is_later(slot.order, self.newest_order) {
            self.newest_order = slot.order;
            self.newest_left = slot.left.at();
        }
        // Of a packet that was sent again nobody knows which time it arrived.
        let later = fresh
            .latest
            .as_ref()
            .is_none_or(|(order, _)| is_later(slot.order, *order));
        if slot.sends == 1 && later {
            fresh.latest = Some((slot.order, slot.left));
        }
    }

    fn find_losses(&mut self) {
        let margin = self.rate.smoothed().unwrap_or_default().shr(REORDER_SHIFT);
        let mut from = self.base;
        while let Some(number) = self.next_flying(from) {
            let overtaken = self.slot(number).is_some_and(|slot| {
                !is_later(slot.order.wrapping_add(REORDER_SENDS), self.newest_order)
                    && slot.left.at() + margin <= self.newest_left
            });
            if overtaken {
                self.lose(number);
            }
            from = number.plus(1);
        }
    }

    /// The first packet from `from` on, below the last one that arrived, that is under way.
    fn next_flying(&self, from: PacketNumber) -> Option<PacketNumber> {
        first_set(from, self.seen_end, |number| {
            !self.arrived.word(number) & !self.lost.word(number)
        })
    }

    fn lose(&mut self, number: PacketNumber) {
        if !self.arrived.has(number) && !self.lost.has(number) {
            self.lost.set(number, true);
            self.flying = self.flying.saturating_sub(1);
            self.lost_packets = self.lost_packets.saturating_add(1);
        }
    }

    /// The lowest lost packet whose buffer the NIC has given back.
    fn first_lost(&self, pool: &mut impl Pool) -> Option<PacketNumber> {
        let mut from = self.base;
        while let Some(number) = first_set(from, self.next, |number| self.lost.word(number)) {
            if pool.buffer(self.slot(number)?.buffer).is_some() {
                return Some(number);
            }
            from = number.plus(1);
        }
        None
    }

    fn probe(&self, pool: &mut impl Pool) -> Option<PacketNumber> {
        let last = PacketNumber(self.next.0.checked_sub(1)?);
        pool.buffer(self.slot(last)?.buffer)
            .is_some()
            .then_some(last)
    }

    fn count_send(&mut self) -> u32 {
        self.sends = self.sends.wrapping_add(1);
        self.sends
    }

    fn slot(&self, number: PacketNumber) -> Option<&Slot> {
        self.slots.get(ring_index(number))
    }

    fn slot_mut(&mut self, number: PacketNumber) -> Option<&mut Slot> {
        self.slots.get_mut(ring_index(number))
    }
}

/// What a reply told that was not known.
struct Fresh {
    packets: u32,
    /// Of those that were sent once, the one that left last: its order, and what it remembers.
    latest: Option<(u32, Departure)>,
}

impl Fresh {
    const NOTHING: Self = Self {
        packets: 0,
        latest: None,
    };
}

/// Whether send `a` came after send `b`, for sends that are less than 2^31 apart.
const fn is_later(a: u32, b: u32) -> bool {
    let ahead = a.wrapping_sub(b);
    ahead != 0 && ahead < 1 << 31
}

/// The first packet in `from..end` whose bit is set in the words that `word_of` gives.
fn first_set(
    mut from: PacketNumber,
    end: PacketNumber,
    word_of: impl Fn(PacketNumber) -> u64,
) -> Option<PacketNumber> {
    while from < end {
        let bits = word_of(from) >> (from.0 & 63);
        if bits != 0 {
            let number = from.plus(bits.trailing_zeros().into());
            return (number < end).then_some(number);
        }
        from = PacketNumber(from.0 | 63).plus(1);
    }
    None
}

fn ring_index(number: PacketNumber) -> usize {
    usize::try_from(number.0 & RING_MASK).unwrap_or(0)
}

/// Word and bit of a packet.
fn place(number: PacketNumber) -> (usize, u64) {
    (ring_index(number) >> 6, 1_u64 << (number.0 & 63))
}
