//! The engines under every fault, and the simulator under test itself.

mod exhaustive;
mod faults;
mod scripts;
mod swarm;
mod table;

use proto::client::Outcome;
use proto::reply::Action;

use crate::{Options, Report, World};

/// Runs a world that must end with the whole dump and a reboot.
fn complete(options: &Options) -> Report {
    let report = World::new(options)
        .run()
        .unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(
        report.outcome,
        Outcome {
            action: Action::Reboot,
            complete: true,
            then: proto::client::Then::Over,
        },
        "{options}"
    );
    report
}
