//! The server's end: order, holes, and what to ask for again.

use super::datagram::{ASK_RANGES_MAX, Head, LogReply, Range};
use crate::time::{Instant, Micros};

/// Datagrams of one boot that may wait for what is missing before them.
pub const AHEAD_DATAGRAMS_MAX: usize = 64;
/// Time from a datagram to its reply, so that one reply serves several. A hole that is only a matter
/// of order closes in it.
pub const REPLY_DELAY: Micros = Micros::from_millis(20);
/// What is missing is asked for again after so long.
pub const ASK_EVERY: Micros = Micros::from_millis(100);
/// A host that has been silent for so long may be dead: what it said behind a hole is written...
pub const HOLE_SILENCE: Micros = Micros::from_millis(450);
/// ... but the hole itself is asked for longer, because a host may also have been held up.
pub const HOLE_MAX: Micros = Micros::from_secs(5);
/// Datagrams that are answered at once.
const REPLY_EVERY: u32 = 16;

/// What to do with a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Write its entries from this sequence number on, then offer what was kept to
    /// [`Server::release`], the lowest first.
    Write(u64),
    /// Keep it: something before it is missing.
    Keep,
    /// Nothing in it is new.
    Known,
    /// There is no room to keep it. It will be asked for again.
    NoRoom,
}

/// The server's end of one boot's records. It holds no texts: its caller keeps the datagrams that
/// came early, [`AHEAD_DATAGRAMS_MAX`] at most.
#[derive(Clone, Debug)]
pub struct Server {
    /// The sequence number that is written next; `None` while nothing of the boot is known.
    next: Option<u64>,
    written: u64,
    /// What is kept, by where it begins. Runs may overlap; none is empty.
    ahead: [Range; AHEAD_DATAGRAMS_MAX],
    ahead_used: usize,
    /// Since when something has been missing.
    hole_since: Instant,
    heard_at: Instant,
    ask_at: Instant,
    reply_at: Option<Instant>,
    unanswered: u32,
}

impl Server {
    /// Nothing of the boot is known, or all below `next` is written (from an earlier process or an
    /// earlier arming).
    #[must_use]
    pub fn new(next: Option<u64>) -> Self {
        Self {
            next,
            written: next.unwrap_or(0),
            ahead: [Range::default(); AHEAD_DATAGRAMS_MAX],
            ahead_used: 0,
            hole_since: Instant::default(),
            heard_at: Instant::default(),
            ask_at: Instant::default(),
            reply_at: None,
            unanswered: 0,
        }
    }

    /// Getter: the sequence number that is written next.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next.unwrap_or(0)
    }

    /// In: a genuine datagram of this boot. Every one is answered.
    pub fn handle(&mut self, now: Instant, head: &Head) -> Taken {
        let next = *self.next.get_or_insert_with(|| {
            self.written = head.oldest.min(head.covers.first);
            self.written
        });
        self.heard_at = now;
        self.unanswered = self.unanswered.saturating_add(1);
        let covers = head.covers;
        let taken = if covers.end <= next || self.is_ahead(covers) {
            Taken::Known
        } else if covers.first <= next {
            self.advance(now, covers.end);
            Taken::Write(next)
        } else if self.keep(now, covers) {
            Taken::Keep
        } else {
            Taken::NoRoom
        };
        // Who repeats itself, or tells only that it is there, waits for an answer.
        let urgent = taken == Taken::Known || self.unanswered >= REPLY_EVERY;
        let due = if urgent { now } else { now + REPLY_DELAY };
        self.reply_at = Some(self.reply_at.map_or(due, |at| at.min(due)));
        taken
    }

    /// In: may a datagram that was kept be written now? Its entries from this sequence number on;
    /// none, if all of them have come again meanwhile.
    pub fn release(&mut self, now: Instant, head: &Head) -> Option<u64> {
        let next = self.next?;
        if head.covers.first > next {
            return None;
        }
        self.advance(now, head.covers.end);
        Some(next)
    }

    /// In: gives up what is missing, if it is time. The caller writes that it is lost, and offers
    /// what was kept to [`Server::release`].
    pub fn give_up(&mut self, now: Instant) -> Option<Range> {
        if now < self.give_up_at()? {
            return None;
        }
        let lost = self.hole(0)?;
        self.advance(now, lost.end);
        Some(lost)
    }

    /// Getter: something is missing, and its host has been silent for so long that it may be dead. Its
    /// caller is to write what is kept now, out of order; nothing else changes: what is missing is
    /// asked for further, and what is kept stays kept.
    #[must_use]
    pub fn is_overdue(&self, now: Instant) -> bool {
        self.ahead_used > 0 && now >= self.heard_at + HOLE_SILENCE
    }

    /// In: the host is gone or the server ends: what is missing is given up at once.
    pub fn abandon(&mut self, now: Instant) -> Option<Range> {
        let lost = self.hole(0)?;
        self.advance(now, lost.end);
        Some(lost)
    }

    /// In: all below `sequence` is written to disk. Never goes back.
    pub fn written(&mut self, now: Instant, sequence: u64) {
        if sequence > self.written {
            self.written = sequence.min(self.next());
            let due = now + REPLY_DELAY;
            self.reply_at = Some(self.reply_at.map_or(due, |at| at.min(due)));
        }
    }

    /// Getter: when [`Server::reply`] or [`Server::give_up`] has something to do.
    #[must_use]
    pub fn wake_at(&self) -> Option<Instant> {
        match (self.reply_at, self.give_up_at()) {
            (Some(reply), Some(give_up)) => Some(reply.min(give_up)),
            (reply, give_up) => reply.or(give_up),
        }
    }

    /// Out: the reply, if one is due.
    pub fn reply(&mut self, now: Instant) -> Option<LogReply> {
        if now < self.reply_at? {
            return None;
        }
        self.reply_at = None;
        self.unanswered = 0;
        let mut reply = LogReply::new(self.written);
        if self.ahead_used == 0 {
            return Some(reply);
        }
        if now >= self.ask_at {
            for index in 0..ASK_RANGES_MAX {
                let Some(hole) = self.hole(index) else { break };
                reply.ask(hole);
            }
            self.ask_at = now + ASK_EVERY;
        }
        self.reply_at = Some(self.ask_at);
        Some(reply)
    }

    fn give_up_at(&self) -> Option<Instant> {
        (self.ahead_used > 0).then(|| self.hole_since + HOLE_MAX)
    }

    /// The `index`-th run that is missing before something that is kept.
    fn hole(&self, index: usize) -> Option<Range> {
        let mut first = self.next?;
        let mut holes = 0_usize;
        for range in self.ahead.get(..self.ahead_used)? {
            let hole = Range {
                first,
                end: range.first,
            };
            if !hole.is_empty() {
                if holes == index {
                    return Some(hole);
                }
                holes = holes.saturating_add(1);
            }
            first = first.max(range.end);
        }
        None
    }

    fn is_ahead(&self, range: Range) -> bool {
        let ahead = self.ahead.get(..self.ahead_used).unwrap_or_default();
        // An empty one is never kept: it says nothing that is to be written.
        range.is_empty()
            || ahead
                .iter()
                .any(|kept| kept.first <= range.first && range.end <= kept.end)
    }

    /// Notes that `range` is kept.
    fn keep(&mut self, now: Instant, range: Range) -> bool {
        if self.ahead_used == AHEAD_DATAGRAMS_MAX {
            return false;
        }
        let ahead = self.ahead.get(..self.ahead_used).unwrap_or_default();
        let at = ahead
            .iter()
            .take_while(|kept| kept.first <= range.first)
            .count();
        let used = self.ahead_used.saturating_add(1);
        if let Some(tail) = self.ahead.get_mut(at..used) {
            tail.rotate_right(1);
            if let Some(place) = tail.first_mut() {
                *place = range;
            }
        }
        if self.ahead_used == 0 {
            self.hole_since = now;
            self.ask_at = now;
        }
        self.ahead_used = used;
        true
    }

    /// All below `end` is delivered.
    fn advance(&mut self, now: Instant, end: u64) {
        let next = self.next().max(end);
        self.next = Some(next);
        let before = self.ahead_used;
        let ahead = self.ahead.get(..before).unwrap_or_default();
        let passed = ahead.iter().take_while(|kept| kept.end <= next).count();
        self.ahead.rotate_left(passed);
        self.ahead_used = before.saturating_sub(passed);
        // A host that is gone fills the next hole as little as this one.
        if now < self.heard_at + HOLE_MAX {
            self.hole_since = now;
        }
    }
}
