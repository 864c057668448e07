//! A host's clock: coarse, and stepping forward now and then, but never back.

use proto::time::Instant;

use crate::options::HostOptions;
use crate::random::Random;

/// Mean time between two steps.
const STEP_EVERY_US: u64 = 2_000_000;

pub(super) struct Clock {
    tick_us: u64,
    step_us: u64,
    random: Random,
    next_step_us: u64,
    ahead_us: u64,
    steps: u64,
}

impl Clock {
    pub(super) fn new(options: &HostOptions, mut random: Random) -> Self {
        Self {
            tick_us: options.clock_tick_us.max(1),
            step_us: options.clock_step_us,
            next_step_us: random.exponential(STEP_EVERY_US),
            random,
            ahead_us: 0,
            steps: 0,
        }
    }

    /// From now on it does not step.
    pub(super) fn heal(&mut self) {
        self.step_us = 0;
    }

    pub(super) const fn steps(&self) -> u64 {
        self.steps
    }

    /// What it shows at `now_us`.
    pub(super) fn read(&mut self, now_us: u64) -> Instant {
        if self.step_us > 0 && now_us >= self.next_step_us {
            self.next_step_us = now_us + self.random.exponential(STEP_EVERY_US);
            self.ahead_us += self.step_us;
            self.steps += 1;
        }
        let shown_us = now_us + self.ahead_us;
        Instant::from_micros(shown_us - shown_us % self.tick_us)
    }

    /// The true time at which it will show `at` or more, unless it steps before.
    pub(super) fn when(&self, at: Instant) -> u64 {
        let shown_us = at.as_micros().div_ceil(self.tick_us) * self.tick_us;
        shown_us.saturating_sub(self.ahead_us)
    }
}
