//! Where a crash goes on after each session, for whoever drives the engine.

use crate::arming::SERVERS_MAX;
use crate::client::{Outcome, Then};
use crate::reply::Action;
use crate::time::{Instant, Micros};
use crate::units::PacketNumber;

/// How long one of several servers is tried before the next one is.
pub const SERVER_TRY: Micros = Micros::from_secs(10);

/// How often a crash goes on after a session with a server that did answer. Without a bound two
/// servers that name each other would keep a dead host from its reboot for ever; with it, some
/// minutes, while a server that is restarted over and over is still followed.
pub const MOVES_MAX: u16 = 10_000;

/// How far the sessions with one server got, so that starting over uses no packet number twice.
#[derive(Clone, Copy)]
struct Progress {
    first: PacketNumber,
    attempt: u16,
}

/// The attempts of one crash at its servers.
pub struct Attempts {
    servers: usize,
    give_up: Micros,
    server: usize,
    progress: [Progress; SERVERS_MAX],
    heard_at: Instant,
    /// Whether the server that is being tried has answered.
    answered: bool,
    moves: u16,
}

impl Attempts {
    /// The first attempt is at the first of `servers` servers (1 to [`SERVERS_MAX`]); there is no
    /// further one after `give_up` without a reply from any of them.
    #[must_use]
    pub const fn new(now: Instant, servers: usize, give_up: Micros) -> Self {
        Self {
            servers,
            give_up,
            server: 0,
            progress: [Progress {
                first: PacketNumber(0),
                attempt: 0,
            }; SERVERS_MAX],
            heard_at: now,
            answered: false,
            moves: 0,
        }
    }

    /// Index of the server that is being tried.
    #[must_use]
    pub const fn server(&self) -> usize {
        self.server
    }

    /// The first packet number of the session that begins now; see [`crate::client::Start::first`].
    #[must_use]
    pub fn first(&self) -> PacketNumber {
        self.progress().first
    }

    /// How often the session was started before.
    #[must_use]
    pub fn attempt(&self) -> u16 {
        self.progress().attempt
    }

    /// How long this server is tried without a reply.
    #[must_use]
    pub fn try_for(&self) -> Micros {
        if self.servers > 1 {
            self.give_up.min(SERVER_TRY)
        } else {
            self.give_up
        }
    }

    /// When a server was last heard, or when the crash was.
    #[must_use]
    pub const fn heard_at(&self) -> Instant {
        self.heard_at
    }

    /// A server was heard.
    pub const fn heard(&mut self, now: Instant) {
        self.heard_at = now;
        self.answered = true;
    }

    /// Whether there is another attempt after a session ended with `outcome`; `next` is the number
    /// that its next packet would have had.
    pub fn next(&mut self, now: Instant, outcome: &Outcome, next: PacketNumber) -> bool {
        let settled = outcome.action != Action::None || outcome.complete;
        if settled || now.since(self.heard_at) >= self.give_up {
            return false;
        }
        if core::mem::take(&mut self.answered) {
            if self.moves == MOVES_MAX {
                return false;
            }
            self.moves = self.moves.saturating_add(1);
        }
        let server = match outcome.then {
            Then::Over => self.server.saturating_add(1),
            Then::StartOver => self.server,
            Then::Redirect(server) => server.into(),
        };
        if let Some(progress) = self.progress.get_mut(self.server) {
            progress.first = next;
            progress.attempt = progress.attempt.saturating_add(1);
        }
        self.server = if server < self.servers { server } else { 0 };
        true
    }

    fn progress(&self) -> Progress {
        let progress = self.progress.get(self.server);
        progress.copied().unwrap_or(Progress {
            first: PacketNumber(0),
            attempt: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVE_UP: Micros = Micros::from_secs(60);

    fn ended(then: Then) -> Outcome {
        Outcome {
            action: Action::None,
            complete: false,
            then,
        }
    }

    /// Silence is bounded by time instead.
    #[test]
    fn two_servers_that_name_each_other_are_obeyed_so_often() {
        let now = Instant::from_micros(0);
        let mut attempts = Attempts::new(now, 2, GIVE_UP);
        for told in 0..MOVES_MAX {
            attempts.heard(now);
            let other = u8::from(told % 2 == 0);
            let next = PacketNumber(10 * (u64::from(told) + 1));
            assert!(attempts.next(now, &ended(Then::Redirect(other)), next));
            assert_eq!(attempts.server(), usize::from(other));
        }
        for then in [Then::Redirect(1), Then::StartOver, Then::Over] {
            attempts.heard(now);
            assert!(!attempts.next(now, &ended(then), PacketNumber(1_000_000)));
        }
        assert!(attempts.next(now, &ended(Then::Over), PacketNumber(1_000_000)));
    }

    #[test]
    fn a_server_that_is_tried_again_sees_no_packet_number_twice() {
        let now = Instant::from_micros(0);
        let mut attempts = Attempts::new(now, 2, GIVE_UP);
        assert!(attempts.next(now, &ended(Then::Over), PacketNumber(7)));
        assert_eq!((attempts.first(), attempts.attempt()), (PacketNumber(0), 0));
        assert!(attempts.next(now, &ended(Then::Over), PacketNumber(3)));
        assert_eq!(attempts.server(), 0);
        assert_eq!((attempts.first(), attempts.attempt()), (PacketNumber(7), 1));
    }

    #[test]
    fn silence_and_what_is_settled_end_it() {
        let now = Instant::from_micros(0);
        let mut attempts = Attempts::new(now, 1, GIVE_UP);
        let done = Outcome {
            complete: true,
            ..ended(Then::Over)
        };
        assert!(!attempts.next(now, &done, PacketNumber(1)));
        let told = Outcome {
            action: Action::Reboot,
            ..ended(Then::Over)
        };
        assert!(!attempts.next(now, &told, PacketNumber(1)));
        assert!(!attempts.next(now + GIVE_UP, &ended(Then::Over), PacketNumber(1)));
    }
}
