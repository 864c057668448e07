//! The window: which packets are under way, which are lost, when to send them again and how many
//! may be under way.
//!
//! Packet `n` lives in slot `n mod slots` from the time it is sealed until the reply that
//! acknowledges it and all before it, so the pool of transmit buffers is the retransmission buffer.
//! Loss is told by order of sending: when something that left later has arrived, and by time: when
//! nothing arrives at all. Only what is lost is sent again.

use crate::client::Pool;
use crate::reply::{FIRST_CREDIT_PACKETS, Reply};
use crate::time::{Instant, Micros};
use crate::units::PacketNumber;

/// Slots the window can keep book of.
pub const SLOTS_MAX: u16 = 1024;
const SLOTS: usize = 1024;
/// A packet is lost when one that was sent this many sends later has arrived. Links that reorder
/// more than this cost some needless resends, which the server counts.
const REORDER_SENDS: u64 = 16;
/// Packets under way at the start; doubles every round trip.
const CONGESTION_START: u32 = 32;
/// Packets that may be under way however bad the link is.
const CONGESTION_MIN: u32 = 16;
/// A round trip that lost more than one packet in this many shrinks what may be under way; less
/// than that is taken for noise on the link, which slowing down does not cure.
const LOSS_TOLERATED: u64 = 6;
/// Time without progress after which the oldest packet is sent again, before any round trip was
/// measured.
const TIMEOUT_START: Micros = Micros::from_millis(200);
/// The shortest such time: a virtual machine's neighbours may hold its packets for this long.
const TIMEOUT_MIN: Micros = Micros::from_millis(20);
/// The longest such time, reached by doubling.
const TIMEOUT_MAX: Micros = Micros::from_secs(1);
const BACKOFF_MAX: u32 = 6;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Flying,
    Lost,
    Acknowledged,
}

#[derive(Clone, Copy)]
struct Slot {
    sent_at: Instant,
    /// Position of the last send among all sends.
    order: u64,
    sends: u32,
    bytes: u16,
    state: State,
}

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

/// Invariants: `base <= next <= base + slots`; every packet in `base..next` has a slot that is not
/// free; `flying` and `lost` count the slots of that state.
pub(super) struct Window {
    slots: [Slot; SLOTS],
    /// Slots in use less one; a power of two less one.
    mask: u16,
    first: PacketNumber,
    base: PacketNumber,
    next: PacketNumber,
    credit_end: PacketNumber,
    congestion: u32,
    flying: u32,
    lost: u32,
    /// Sends so far.
    sends: u64,
    /// Largest `order` of a packet that has arrived.
    newest_order: u64,
    round: Round,
    round_trip: Option<RoundTrip>,
    /// When the timeout's time began.
    timer_from: Instant,
    backoff: u32,
    probe: bool,
    /// How long to be quiet when nothing is under way; none if zero.
    patience: Micros,
    statistics: Statistics,
}

/// What one round trip's worth of packets lost: from the packet that was next when it began until
/// that one arrives.
#[derive(Clone, Copy)]
struct Round {
    end: PacketNumber,
    acknowledged: u64,
    lost: u64,
}

/// The smoothed round trip and its deviation (RFC 6298).
#[derive(Clone, Copy)]
struct RoundTrip {
    smoothed: Micros,
    deviation: Micros,
}

impl Window {
    pub(super) const fn new() -> Self {
        let slot = Slot {
            sent_at: Instant::from_micros(0),
            order: 0,
            sends: 0,
            bytes: 0,
            state: State::Free,
        };
        Self {
            slots: [slot; SLOTS],
            mask: 0,
            first: PacketNumber(0),
            base: PacketNumber(0),
            next: PacketNumber(0),
            credit_end: PacketNumber(0),
            congestion: 0,
            flying: 0,
            lost: 0,
            sends: 0,
            newest_order: 0,
            round: Round {
                end: PacketNumber(0),
                acknowledged: 0,
                lost: 0,
            },
            round_trip: None,
            timer_from: Instant::from_micros(0),
            backoff: 0,
            probe: false,
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

    pub(super) fn start(&mut self, first: PacketNumber, pool_slots: u16) {
        let slots = u32::from(pool_slots.clamp(1, SLOTS_MAX));
        let largest_power = 1_u32.wrapping_shl(slots.ilog2());
        for slot in &mut self.slots {
            slot.state = State::Free;
        }
        self.mask = u16::try_from(largest_power.saturating_sub(1)).unwrap_or(0);
        (self.first, self.base, self.next) = (first, first, first);
        self.credit_end = first.plus(FIRST_CREDIT_PACKETS);
        self.congestion = CONGESTION_START;
        (self.flying, self.lost) = (0, 0);
        (self.sends, self.newest_order) = (0, 0);
        self.round = Round {
            end: first,
            acknowledged: 0,
            lost: 0,
        };
        self.round_trip = None;
        self.backoff = 0;
        self.probe = false;
        self.patience = Micros::new(0);
        self.statistics = Statistics::default();
    }

    pub(super) const fn slots(&self) -> u16 {
        self.mask.saturating_add(1)
    }

    pub(super) const fn next(&self) -> PacketNumber {
        self.next
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

    pub(super) const fn round_trip(&self) -> Option<Micros> {
        match self.round_trip {
            Some(RoundTrip { smoothed, .. }) => Some(smoothed),
            None => None,
        }
    }

    /// Whether everything sent is acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        self.base == self.next
    }

    /// The slot of a packet.
    pub(super) fn slot_of(&self, number: PacketNumber) -> u16 {
        u16::try_from(number.0 & u64::from(self.mask)).unwrap_or(0)
    }

    /// Whether one more new packet may be sent.
    pub(super) fn may_send(&self) -> bool {
        self.next.since(self.base) < u64::from(self.slots())
            && self.next < self.credit_end
            && self.flying < self.congestion
    }

    /// Books packet `next` as sent, `bytes` long.
    pub(super) fn sent_new(&mut self, now: Instant, bytes: usize) {
        let number = self.next;
        if self.is_empty() {
            // Whatever probes came before, this packet's timeout is a first one.
            self.timer_from = now;
            self.backoff = 0;
        }
        let order = self.count_send();
        let bytes = u16::try_from(bytes).unwrap_or(u16::MAX);
        if let Some(slot) = self.slot_mut(number) {
            *slot = Slot {
                sent_at: now,
                order,
                sends: 1,
                bytes,
                state: State::Flying,
            };
        }
        self.flying = self.flying.saturating_add(1);
        self.next = number.plus(1);
        self.statistics.packets = self.statistics.packets.saturating_add(1);
        self.statistics.bytes = self.statistics.bytes.saturating_add(u64::from(bytes));
    }

    /// The time at which [`Self::on_time`] will have something to do.
    pub(super) fn deadline(&self, now: Instant) -> Instant {
        (self.timer_from + self.timeout()).max(now + Micros::new(1))
    }

    /// Reacts to the passing of time: without progress for too long, the oldest packet counts as
    /// lost; with nothing under way, the last packet is sent once more to make the server speak.
    pub(super) fn on_time(&mut self, now: Instant) {
        if now.since(self.timer_from) < self.timeout() || self.next == self.first {
            return;
        }
        self.timer_from = now;
        self.backoff = self.backoff.saturating_add(1).min(BACKOFF_MAX);
        self.statistics.timeouts = self.statistics.timeouts.saturating_add(1);
        if self.is_empty() {
            self.probe = true;
        } else {
            self.lose(self.base);
        }
    }

    /// Whether [`Self::resend`] would give a packet.
    pub(super) fn resend_ready(&self, pool: &mut impl Pool) -> bool {
        self.first_lost(pool).is_some()
    }

    /// The packet to send again now, if there is one; books it as sent.
    pub(super) fn resend(&mut self, now: Instant, pool: &mut impl Pool) -> Option<Resend> {
        let number = if self.probe {
            self.probe(pool)
        } else {
            self.first_lost(pool)
        }?;
        let index = self.slot_of(number);
        let order = self.count_send();
        let slot = self.slot_mut(number)?;
        slot.sent_at = now;
        slot.order = order;
        slot.sends = slot.sends.saturating_add(1);
        let bytes = usize::from(slot.bytes);
        if slot.state == State::Lost {
            slot.state = State::Flying;
            self.lost = self.lost.saturating_sub(1);
            self.flying = self.flying.saturating_add(1);
        }
        self.probe = false;
        self.statistics.resent = self.statistics.resent.saturating_add(1);
        Some(Resend { index, bytes })
    }

    /// Takes a reply: marks what it acknowledges, measures, finds losses and opens the window.
    pub(super) fn acknowledged(&mut self, now: Instant, reply: &Reply, bitmap: &[u8]) {
        self.statistics.replies = self.statistics.replies.saturating_add(1);
        self.measure(now, reply);
        let mut fresh = 0;
        while self.base < reply.next && self.base < self.next {
            fresh = self.mark(self.base).saturating_add(fresh);
            self.base = self.base.plus(1);
        }
        let mut number = reply.next.plus(1);
        for byte in bitmap {
            for bit in 0..8 {
                if byte & (1_u8 << bit) != 0 && number < self.next {
                    fresh = self.mark(number).saturating_add(fresh);
                }
                number = number.plus(1);
            }
        }
        self.credit_end = self.credit_end.max(reply.credit_end);
        if fresh > 0 {
            self.backoff = 0;
            self.timer_from = now;
        } else if self.is_empty() && self.patience > Micros::new(0) {
            // It was asked and has answered: the wait begins anew.
            self.backoff = 0;
        }
        self.find_losses();
        self.steer(fresh);
    }

    /// The server was restarted: what was under way, and what had arrived ahead of its turn and was
    /// in its memory only, counts as lost, unless the new server's reply says otherwise.
    pub(super) fn server_restarted(&mut self) {
        let mut number = self.base;
        while number < self.next {
            if let Some(slot) = self.slot_mut(number) {
                slot.state = State::Lost;
            }
            number = number.plus(1);
        }
        self.flying = 0;
        self.lost = u32::try_from(self.next.since(self.base)).unwrap_or(u32::MAX);
        self.backoff = 0;
    }

    /// A sample of the round trip, if the packet that arrived last was sent once and is news.
    fn measure(&mut self, now: Instant, reply: &Reply) {
        if reply.latest < self.base || reply.latest >= self.next {
            return;
        }
        let Some(slot) = self.slot(reply.latest) else {
            return;
        };
        if slot.sends != 1 || slot.state != State::Flying {
            return;
        }
        let sample = now.since(slot.sent_at) - reply.delay;
        self.round_trip = Some(match self.round_trip {
            None => RoundTrip {
                smoothed: sample,
                deviation: sample.shr(1),
            },
            Some(RoundTrip {
                smoothed,
                deviation,
            }) => {
                let error = (smoothed - sample) + (sample - smoothed);
                RoundTrip {
                    smoothed: smoothed - smoothed.shr(3) + sample.shr(3),
                    deviation: deviation - deviation.shr(2) + error.shr(2),
                }
            }
        });
    }

    fn timeout(&self) -> Micros {
        // Once it has asked, it asks again as soon as with everything else: its question may be lost.
        if self.is_empty() && self.patience > Micros::new(0) && self.backoff == 0 {
            return self.patience;
        }
        let base = match self.round_trip {
            None => TIMEOUT_START,
            Some(RoundTrip {
                smoothed,
                deviation,
            }) => (smoothed + deviation.times(4)).max(TIMEOUT_MIN),
        };
        base.times(1_u64.wrapping_shl(self.backoff))
            .min(TIMEOUT_MAX.max(base))
    }

    /// Marks a packet as arrived; returns 1 if that is news.
    fn mark(&mut self, number: PacketNumber) -> u64 {
        let Some(slot) = self.slot_mut(number) else {
            return 0;
        };
        let (before, order) = (slot.state, slot.order);
        slot.state = State::Acknowledged;
        match before {
            State::Flying => {
                self.flying = self.flying.saturating_sub(1);
                self.newest_order = self.newest_order.max(order);
            }
            State::Lost => self.lost = self.lost.saturating_sub(1),
            State::Free | State::Acknowledged => return 0,
        }
        1
    }

    fn find_losses(&mut self) {
        let mut number = self.base;
        while number < self.next {
            let overtaken = self.slot(number).is_some_and(|slot| {
                slot.state == State::Flying
                    && slot.order.saturating_add(REORDER_SENDS) <= self.newest_order
            });
            if overtaken {
                self.lose(number);
            }
            number = number.plus(1);
        }
    }

    fn lose(&mut self, number: PacketNumber) {
        let Some(slot) = self.slot_mut(number) else {
            return;
        };
        if slot.state == State::Flying {
            slot.state = State::Lost;
            self.flying = self.flying.saturating_sub(1);
            self.lost = self.lost.saturating_add(1);
            self.round.lost = self.round.lost.saturating_add(1);
        }
    }

    /// Grows or shrinks what may be under way, a decision a round trip.
    fn steer(&mut self, fresh: u64) {
        self.round.acknowledged = self.round.acknowledged.saturating_add(fresh);
        if self.base < self.round.end {
            return;
        }
        let Round {
            acknowledged, lost, ..
        } = self.round;
        self.congestion = if lost.saturating_mul(LOSS_TOLERATED) > acknowledged {
            self.congestion
                .saturating_sub(self.congestion >> 2)
                .max(CONGESTION_MIN)
        } else {
            self.congestion.saturating_mul(2).min(u32::from(SLOTS_MAX))
        };
        self.round = Round {
            end: self.next,
            acknowledged: 0,
            lost: 0,
        };
    }

    /// The lowest lost packet whose buffer the NIC has given back.
    fn first_lost(&self, pool: &mut impl Pool) -> Option<PacketNumber> {
        if self.lost == 0 {
            return None;
        }
        let mut number = self.base;
        while number < self.next {
            let lost = self
                .slot(number)
                .is_some_and(|slot| slot.state == State::Lost);
            if lost && pool.buffer(self.slot_of(number)).is_some() {
                return Some(number);
            }
            number = number.plus(1);
        }
        None
    }

    fn probe(&self, pool: &mut impl Pool) -> Option<PacketNumber> {
        let last = PacketNumber(self.next.0.checked_sub(1)?);
        pool.buffer(self.slot_of(last)).is_some().then_some(last)
    }

    fn count_send(&mut self) -> u64 {
        self.sends = self.sends.saturating_add(1);
        self.sends
    }

    fn slot(&self, number: PacketNumber) -> Option<&Slot> {
        self.slots.get(usize::from(self.slot_of(number)))
    }

    fn slot_mut(&mut self, number: PacketNumber) -> Option<&mut Slot> {
        let index = usize::from(self.slot_of(number));
        self.slots.get_mut(index)
    }
}
