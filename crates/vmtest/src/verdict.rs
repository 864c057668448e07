//! The one word at the end of a run: the first stage that failed, or Ok.

use std::fmt;

use crate::crash::End;

/// How a run ended. The order is the order of a run: a verdict says that every stage before it went
/// well.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// The guest's first program never spoke.
    NotBooted {
        /// What is known of it.
        why: String,
    },
    /// The guest booted but did not get as far as crashing.
    NotArmed {
        /// What is known of it.
        why: String,
    },
    /// The module would not be armed for this device.
    Refused {
        /// Its reason.
        why: String,
    },
    /// The machine cannot be crashed in this way.
    Impossible {
        /// What it lacks.
        why: String,
    },
    /// A host that was not armed has sent something.
    Unexpected,
    /// The guest crashed and no datagram came.
    NoFirstPacket,
    /// Datagrams came, and then nothing, without an end.
    Stalled {
        /// Megabytes on the wire when it stopped.
        at_mb: u64,
    },
    /// The server ended the session without all of it.
    Incomplete {
        /// What is not there.
        missing: String,
    },
    /// A page of the vmcore is not what the guest's memory holds, and nothing lists it.
    Mismatch {
        /// Its number.
        pfn: u64,
        /// Where in the kernel it lies and what differs.
        what: String,
    },
    /// Somebody who reads vmcores or logs does not find what must be there.
    Unreadable {
        /// Who.
        by: String,
        /// What is not found.
        why: String,
    },
    /// The crash kernel did not run.
    NotCaptured,
    /// The dump is good, but the machine stays dead.
    NotRebooted,
    /// Everything went well.
    Ok,
}

/// What the run has seen, in the order it happens.
#[derive(Debug, Default)]
pub struct Observations {
    /// The guest's first program spoke.
    pub booted: bool,
    /// The guest was about to crash.
    pub armed: bool,
    /// What the crash is meant to leave.
    pub end: End,
    /// Why the module would not be armed.
    pub refused: Option<String>,
    /// Why the machine cannot be crashed in this way.
    pub impossible: Option<String>,
    /// Why the guest did not get further, in its own words or ours.
    pub failure: Option<String>,
    /// A datagram came after the crash began.
    pub first_packet: bool,
    /// Megabytes on the wire after the crash began.
    pub wire_mb: u64,
    /// The session came to an end on the server, good or bad.
    pub session_final: bool,
    /// What the vmcore lacks; nothing when it is whole.
    pub missing: Option<String>,
    /// The first page that differs and is not listed.
    pub mismatch: Option<(u64, String)>,
    /// Each reader that did not find what must be there, and what.
    pub unreadable: Vec<(String, String)>,
    /// The crash kernel ran.
    pub captured: bool,
    /// The guest reset itself.
    pub rebooted: bool,
}

impl Observations {
    /// The verdict.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let why = || {
            self.failure
                .clone()
                .unwrap_or_else(|| "nothing happened any more".to_owned())
        };
        if !self.booted {
            return Verdict::NotBooted { why: why() };
        }
        if let Some(why) = self.refused.clone() {
            return Verdict::Refused { why };
        }
        if let Some(why) = self.impossible.clone() {
            return Verdict::Impossible { why };
        }
        if !self.armed {
            return Verdict::NotArmed { why: why() };
        }
        if self.end == End::Nothing {
            return match (self.first_packet, self.rebooted) {
                (true, _) => Verdict::Unexpected,
                (false, true) => Verdict::Ok,
                (false, false) => Verdict::NotRebooted,
            };
        }
        if self.end == End::Capture {
            return match (self.first_packet, self.captured) {
                (true, _) => Verdict::Unexpected,
                (false, true) => Verdict::Ok,
                (false, false) => Verdict::NotCaptured,
            };
        }
        if !self.first_packet {
            return Verdict::NoFirstPacket;
        }
        if !self.session_final {
            return Verdict::Stalled {
                at_mb: self.wire_mb,
            };
        }
        if let Some(missing) = &self.missing {
            return Verdict::Incomplete {
                missing: missing.clone(),
            };
        }
        if let Some((pfn, what)) = &self.mismatch {
            return Verdict::Mismatch {
                pfn: *pfn,
                what: what.clone(),
            };
        }
        if let Some((by, why)) = self.unreadable.first() {
            return Verdict::Unreadable {
                by: by.clone(),
                why: why.clone(),
            };
        }
        if self.end == End::DumpThenCapture && !self.captured {
            Verdict::NotCaptured
        } else if self.rebooted {
            Verdict::Ok
        } else {
            Verdict::NotRebooted
        }
    }
}

impl Verdict {
    /// The word alone, as reports have it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::NotBooted { .. } => "NotBooted",
            Self::NotArmed { .. } => "NotArmed",
            Self::Refused { .. } => "Refused",
            Self::Impossible { .. } => "Impossible",
            Self::Unexpected => "Unexpected",
            Self::NoFirstPacket => "NoFirstPacket",
            Self::Stalled { .. } => "Stalled",
            Self::Incomplete { .. } => "Incomplete",
            Self::Mismatch { .. } => "Mismatch",
            Self::Unreadable { .. } => "Unreadable",
            Self::NotCaptured => "NotCaptured",
            Self::NotRebooted => "NotRebooted",
            Self::Ok => "Ok",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::NotBooted { why }
            | Self::NotArmed { why }
            | Self::Refused { why }
            | Self::Impossible { why } => write!(f, ": {why}"),
            Self::Stalled { at_mb } => write!(f, " after {at_mb} MB on the wire"),
            Self::Incomplete { missing } => write!(f, ": {missing}"),
            Self::Mismatch { pfn, what } => write!(f, " of page {pfn:#x}: {what}"),
            Self::Unreadable { by, why } => write!(f, " by {by}: {why}"),
            Self::Unexpected
            | Self::NoFirstPacket
            | Self::NotCaptured
            | Self::NotRebooted
            | Self::Ok => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_kernel_must_run_when_it_is_its_turn() {
        let mut seen = Observations {
            booted: true,
            armed: true,
            rebooted: true,
            end: End::Capture,
            ..Observations::default()
        };
        assert_eq!(seen.verdict(), Verdict::NotCaptured);
        seen.captured = true;
        assert_eq!(seen.verdict(), Verdict::Ok);
        seen.first_packet = true;
        assert_eq!(seen.verdict(), Verdict::Unexpected);
        seen.end = End::DumpThenCapture;
        seen.session_final = true;
        assert_eq!(seen.verdict(), Verdict::Ok);
        seen.captured = false;
        assert_eq!(seen.verdict(), Verdict::NotCaptured);
        seen.missing = Some("a page".to_owned());
        assert_eq!(seen.verdict().name(), "Incomplete");
    }

    #[test]
    fn the_first_stage_that_failed_is_named() {
        let mut seen = Observations::default();
        let mut names = Vec::new();
        let steps: [fn(&mut Observations); 8] = [
            |seen| seen.booted = true,
            |seen| seen.armed = true,
            |seen| seen.first_packet = true,
            |seen| seen.session_final = true,
            |seen| seen.missing = None,
            |seen| seen.mismatch = None,
            |seen| seen.unreadable.clear(),
            |seen| seen.rebooted = true,
        ];
        seen.missing = Some("3 pages".to_owned());
        seen.mismatch = Some((7, "slab".to_owned()));
        seen.unreadable
            .push(("drgn".to_owned(), "no tasks".to_owned()));
        for step in steps {
            names.push(seen.verdict().name());
            step(&mut seen);
        }
        let expected = [
            "NotBooted",
            "NotArmed",
            "NoFirstPacket",
            "Stalled",
            "Incomplete",
            "Mismatch",
            "Unreadable",
            "NotRebooted",
        ];
        assert_eq!(names, expected);
        assert_eq!(seen.verdict(), Verdict::Ok);
    }
}
