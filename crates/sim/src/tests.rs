//! The engines under every fault, and the simulator under test itself.

mod exhaustive;
mod faults;
mod peers;
mod regressions;
mod scripts;
mod swarm;
mod table;

use proto::client::{Outcome, Then};
use proto::reply::Action;

use crate::{Options, Report, World};

const WHOLE: Outcome = Outcome {
    action: Action::Reboot,
    complete: true,
    then: Then::Over,
};

/// A calm world but for some options, given as `name=value name=value`.
fn with(options: &str) -> Options {
    let mut calm = Options::calm(5);
    for assignment in options.split_whitespace() {
        calm.set(assignment).expect("the option exists");
    }
    calm
}

/// Runs a world that must end well.
fn run(options: &Options) -> Report {
    World::new(options)
        .run()
        .unwrap_or_else(|failure| panic!("{failure}"))
}

/// Runs a world that must end with the whole dump of every host.
fn complete(options: &Options) -> Report {
    let report = run(options);
    for outcome in &report.outcomes {
        assert_eq!(*outcome, Some(WHOLE), "{options}");
    }
    report
}

/// Why a world does not end well.
fn failure(options: &Options) -> String {
    match World::new(options).run() {
        Ok(_) => panic!("nothing was noticed\n{options}"),
        Err(failure) => failure.what,
    }
}
