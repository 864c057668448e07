//! From a world that fails to a smaller one that fails too.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Options, Report, World};

/// Runs a world; a panic is a failure too.
pub fn run(options: &Options) -> Result<Report, String> {
    match catch_unwind(AssertUnwindSafe(|| World::new(options).run())) {
        Ok(result) => result.map_err(|failure| failure.to_string()),
        Err(_) => Err(format!("it panicked, see above\n{options}")),
    }
}

/// What kind of failure a message tells of: its first line without numbers.
#[must_use]
pub fn kind(what: &str) -> String {
    let line = what.lines().next().unwrap_or_default();
    line.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// Turns options off, and bounds down, one after the other, as long as the world still `fails`.
pub fn shrink(options: &Options, mut fails: impl FnMut(&Options) -> bool) -> Options {
    let mut best = *options;
    let mut names = Vec::new();
    best.each(&mut |name, _, _| names.push(name.to_owned()));
    loop {
        let before = best;
        for name in &names {
            for change in [calm, half, less] {
                let mut smaller = best;
                smaller.each(&mut |other, value, calm| {
                    if other == name {
                        *value = change(*value, calm);
                    }
                });
                if smaller != best && fails(&smaller) {
                    best = smaller;
                }
            }
        }
        if best == before {
            return best;
        }
    }
}

fn calm(_: u64, calm: u64) -> u64 {
    calm
}

/// Halfway to nothing; a calm value stays, or shrinking would never end.
fn half(value: u64, calm: u64) -> u64 {
    if value == calm { value } else { value / 2 }
}

fn less(value: u64, calm: u64) -> u64 {
    if value == calm {
        value
    } else {
        value.saturating_sub(1)
    }
}
