//! What a server wants of each crash: verdicts, places, pulls, and when all is there.

use proto::record::{PFN_MAX, RamRange};
use proto::reply::{Action, PULL_RANGES_MAX, Pull, Verdict};
use proto::units::{Pfn, SessionId};

use super::{SILENCE_US, Server};
use crate::model::Model;
use crate::random::Random;

impl Server {
    /// Tells the engine what is wanted now, and notices when all is there.
    pub(super) fn decide(&mut self, now_us: u64, id: SessionId) {
        let Some(crash) = self.crashes.get(&id) else {
            return;
        };
        let given_up = self
            .durable
            .get(&id)
            .is_some_and(|durable| durable.given_up);
        if crash.live.is_none() || !(crash.model.hello() || given_up) {
            return;
        }
        let verdict = self.verdict(now_us, id);
        self.ask(id, verdict);
        let (Some(crash), Some(durable)) = (self.crashes.get_mut(&id), self.durable.get_mut(&id))
        else {
            return;
        };
        let Some(live) = &mut crash.live else {
            return;
        };
        if live.engine.verdict() != verdict {
            self.counts.one(&format!("verdict {}", name(verdict)));
        }
        durable.log_only |= verdict == Verdict::LogOnly && !crash.recovering;
        live.engine.set_credit(self.options.credit);
        live.engine.set_verdict(verdict);
        if durable.given_up {
            live.engine.set_action(Action::Reboot);
        } else if crash.model.ending().is_some()
            && !durable.waits_for_pull(&crash.model)
            && self.disk.sync((id, crash.attempt))
        {
            durable.done = true;
            crash.place = false;
            live.engine.set_action(Action::Reboot);
        }
    }

    fn verdict(&mut self, now_us: u64, id: SessionId) -> Verdict {
        let place = self.place(now_us, id);
        let (Some(crash), Some(durable)) = (self.crashes.get_mut(&id), self.durable.get_mut(&id))
        else {
            return Verdict::Undecided;
        };
        let options = &self.options;
        let hello_us = *crash.hello_us.get_or_insert(now_us);
        if options.verdict == 2 && !durable.given_up {
            durable.given_up = true;
            self.counts.one("crashes of which nothing is wanted");
        }
        let change = options.change_us > 0 && now_us >= hello_us + options.change_us;
        let redirected = self.index == 0
            && self.world.world.servers > 1
            && crash.attempt == 0
            && Random::new(id.arming.0 ^ id.key.0)
                .fork(self.world.seed)
                .chance(options.redirect);
        if durable.given_up {
            Verdict::Nothing
        } else if redirected {
            Verdict::Redirect { server: 1 }
        } else if now_us < hello_us + options.undecided_us {
            Verdict::Undecided
        } else if !place {
            let seconds = u16::try_from(options.wait_s).unwrap_or(1);
            Verdict::Wait { seconds }
        } else if options.verdict == 1 || change || durable.log_only {
            Verdict::LogOnly
        } else if crash.recovering {
            let missing = crash.model.missing().next().is_some();
            if missing {
                Verdict::Hold { filter: 0 }
            } else {
                Verdict::LogOnly
            }
        } else if options.hold > 0
            && (durable.pulls_left > 0 || durable.waits_for_pull(&crash.model))
        {
            Verdict::Hold { filter: 0 }
        } else {
            let filter = u8::try_from(options.filter).unwrap_or(0);
            Verdict::Full { filter }
        }
    }

    /// Whether a crash has one of the places, which it gets if one is free.
    fn place(&mut self, now_us: u64, id: SessionId) -> bool {
        if self.options.places == 0 {
            return true;
        }
        let mut taken = 0;
        for (other, crash) in &mut self.crashes {
            let silent = crash
                .live
                .as_ref()
                .is_none_or(|live| now_us - live.heard_us > SILENCE_US);
            crash.place &= !silent || *other == id;
            taken += u64::from(crash.place);
        }
        let Some(crash) = self.crashes.get_mut(&id) else {
            return false;
        };
        crash.place |= taken < self.options.places;
        crash.place
    }

    /// Asks for the next pull, if there is one and the one before is answered.
    fn ask(&mut self, id: SessionId, verdict: Verdict) {
        let (Some(crash), Some(durable)) = (self.crashes.get_mut(&id), self.durable.get_mut(&id))
        else {
            return;
        };
        let model = &crash.model;
        let over = model.ending().is_some() || durable.given_up;
        if over || !model.map() || durable.waits_for_pull(model) {
            return;
        }
        let ranges = if crash.recovering && matches!(verdict, Verdict::Hold { .. }) {
            missing_ranges(model)
        } else if durable.pulls_left > 0 && !crash.recovering {
            durable.pulls_left -= 1;
            drawn_ranges(&mut self.random)
        } else {
            return;
        };
        let number = durable.pull() + 1;
        durable.asked.insert(number, ranges.clone());
        crash.model.ask(number, ranges);
        self.counts.one("pulls asked");
        self.resume_pull(id);
    }

    /// Puts the pull that is not answered yet into the replies.
    pub(super) fn resume_pull(&mut self, id: SessionId) {
        let (Some(crash), Some(durable)) = (self.crashes.get_mut(&id), self.durable.get(&id))
        else {
            return;
        };
        if durable.waits_for_pull(&crash.model)
            && let Some(live) = &mut crash.live
        {
            let number = durable.pull();
            let ranges = durable.asked.get(&number).map_or(&[][..], Vec::as_slice);
            live.engine.set_pull(Pull { number, ranges });
        }
    }
}

/// The first ranges of pages that are not known.
fn missing_ranges(model: &Model) -> Vec<RamRange> {
    let mut ranges: Vec<RamRange> = Vec::new();
    for Pfn(pfn) in model.missing() {
        let full = ranges.len() == PULL_RANGES_MAX;
        match ranges.last_mut() {
            Some(last) if last.first.get() + last.pages.get() == pfn => {
                last.pages = (last.pages.get() + 1).into();
            }
            Some(_) if full => break,
            Some(_) | None => ranges.push(RamRange {
                first: pfn.into(),
                pages: 1.into(),
            }),
        }
    }
    ranges
}

/// Ranges in and outside of System RAM, some of them empty, some beyond all memory.
fn drawn_ranges(random: &mut Random) -> Vec<RamRange> {
    let count = random.below(1 + u64::try_from(PULL_RANGES_MAX).unwrap_or(0));
    let range = |random: &mut Random| {
        let (first, pages) = match random.below(16) {
            0 => (random.below(3000), 0),
            1 => (random.draw(), random.draw()),
            2 => (PFN_MAX - random.below(10), random.below(20)),
            _ => (random.below(3000), random.below(60)),
        };
        RamRange {
            first: first.into(),
            pages: pages.into(),
        }
    };
    (0..count).map(|_| range(random)).collect()
}

fn name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Undecided => "undecided",
        Verdict::Full { .. } => "full",
        Verdict::LogOnly => "log only",
        Verdict::Nothing => "nothing",
        Verdict::Wait { .. } => "wait",
        Verdict::Hold { .. } => "hold",
        Verdict::Redirect { .. } => "redirect",
    }
}
