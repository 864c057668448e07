//! Whether a message is of the boot that the ones before it were of.
//!
//! A kernel's clock starts with it: the time of receipt less the message's own time is no earlier
//! than the kernel's start, and late by how long the message has waited. A kernel that started after
//! the last message of the boot before is another one. A message of the same boot can look the same
//! only when it repeats an old text or has slept with its host; these are kept apart by sequence
//! and by how soon they follow.

/// What is remembered of the last messages of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Last {
    /// When the last one was received, in microseconds since 1970.
    pub(crate) at_us: u64,
    /// The latest kernel time.
    pub(crate) time_us: Option<u64>,
}

/// No kernel ends, and another one starts and has a network, within this time.
const REBOOT_MICROS_MIN: u64 = 500_000;
/// CPUs' clocks and the order of their messages differ by less.
const SKEW_MICROS: u64 = 1_000_000;
/// Records that overtake each other are closer than this.
const NEAR_RECORDS: u64 = 512;

impl Last {
    /// Whether a message received at `at_us` is of another boot; `order` is its sequence number and
    /// the one that would come next, where there are such.
    pub(crate) fn is_of_another_boot(
        &self,
        at_us: u64,
        time_us: Option<u64>,
        order: Option<(u64, u64)>,
    ) -> bool {
        let pause = at_us.saturating_sub(self.at_us);
        let (Some(time_us), Some(last)) = (time_us, self.time_us) else {
            return false;
        };
        let started_later = at_us.saturating_sub(time_us) > self.at_us;
        let is_next = order.is_some_and(|(seq, next)| seq == next) && time_us >= last;
        if pause < REBOOT_MICROS_MIN || !started_later || is_next {
            return false;
        }
        let back_in_order =
            order.is_some_and(|(seq, next)| seq.saturating_add(NEAR_RECORDS) < next);
        let back_in_time = time_us.saturating_add(SKEW_MICROS) < last;
        back_in_order || back_in_time || pause >= SKEW_MICROS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;
    /// When the boot of these tests started.
    const START: u64 = 1_795_543_320 * SECOND;

    /// The last message at this uptime, received as it was printed.
    fn last(uptime: u64) -> Last {
        Last {
            at_us: START + uptime,
            time_us: Some(uptime),
        }
    }

    fn check(last: Last, at_us: u64, time_us: u64, order: Option<(u64, u64)>, expected: bool) {
        let found = last.is_of_another_boot(at_us, Some(time_us), order);
        assert_eq!(found, expected, "{last:?} {at_us} {time_us} {order:?}");
    }

    #[test]
    fn a_capture_kernel_and_a_rebooted_one_are_other_boots() {
        let crash = START + 300 * SECOND;
        for order in [Some((0, 1000)), Some((900, 1000)), Some((1500, 1000)), None] {
            check(last(300 * SECOND), crash + 2 * SECOND, SECOND, order, true);
            check(last(300 * SECOND), crash + 90 * SECOND, 0, order, true);
        }
        // It died before its network's first second was over.
        check(
            last(SECOND / 2),
            START + 3 * SECOND,
            SECOND,
            Some((900, 300)),
            true,
        );
    }

    #[test]
    fn what_comes_late_twice_or_after_a_pause_is_the_same_boot() {
        let uptime = 300 * SECOND;
        let now = START + uptime;
        check(
            last(uptime),
            now + SECOND / 5,
            uptime - 2 * SECOND,
            Some((900, 1000)),
            false,
        );
        check(
            last(uptime),
            now + 2 * SECOND,
            uptime - 2 * SECOND,
            Some((400, 1000)),
            false,
        );
        check(
            last(uptime),
            now + 3600 * SECOND,
            uptime + 3600 * SECOND,
            Some((1009, 1000)),
            false,
        );
        // After a night's sleep its clock is behind, but the next record follows.
        check(
            last(uptime),
            now + 40_000 * SECOND,
            uptime + SECOND,
            Some((1000, 1000)),
            false,
        );
    }

    #[test]
    fn a_log_that_is_read_out_at_once_is_one_boot() {
        let at_us = START + 5 * SECOND;
        let said = Last {
            at_us,
            time_us: Some(SECOND),
        };
        for order in [Some((10, 9)), Some((12, 9)), Some((7, 9)), None] {
            check(said, at_us + 1000, 0, order, false);
            check(said, at_us + 1000, 4 * SECOND, order, false);
        }
    }
}
