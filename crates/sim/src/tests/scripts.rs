//! Single situations.

use proto::client::Outcome;
use proto::record::Ending;
use proto::reply::{Action, Verdict};

use crate::host::GIVE_UP;
use crate::link::Fate;
use crate::{Options, Report, World};

fn run(world: World) -> Report {
    world.run().unwrap_or_else(|failure| panic!("{failure}"))
}

#[test]
fn a_host_without_a_server_gives_up_in_time() {
    let mut world = World::new(&Options::calm(1));
    world.server_alive = false;
    let report = run(world);
    assert_eq!(
        report.outcome,
        Outcome {
            action: Action::None,
            complete: false,
            then: proto::client::Then::Over,
        }
    );
    assert!(report.time_us >= GIVE_UP.get());
    assert!(
        report.time_us <= GIVE_UP.get() + 1_000_000,
        "took {} us",
        report.time_us
    );
    assert!(
        report.up.sent < 150,
        "{} packets into the void",
        report.up.sent
    );
}

#[test]
fn log_only_sends_no_pages() {
    let mut world = World::new(&Options::calm(1));
    world.server.verdict = Verdict::LogOnly;
    let report = run(world);
    assert_eq!(
        report.outcome,
        Outcome {
            action: Action::Reboot,
            complete: true,
            then: proto::client::Then::Over,
        }
    );
    assert!(report.packets < 10, "{} packets for a log", report.packets);
}

#[test]
fn nothing_means_reboot_now() {
    let mut world = World::new(&Options::calm(1));
    world.server.verdict = Verdict::Nothing;
    let report = run(world);
    assert_eq!(report.outcome.action, Action::Reboot);
    assert!(
        report.packets < 10,
        "{} packets for nothing",
        report.packets
    );
}

#[test]
fn a_fault_in_the_state_text_costs_nothing_before_it() {
    let mut world = World::new(&Options::calm(1));
    world.host.state_faults = true;
    let report = run(world);
    assert_eq!(
        report.outcome,
        Outcome {
            action: Action::Reboot,
            complete: true,
            then: proto::client::Then::Over,
        }
    );
}

#[test]
fn a_lost_verdict_is_told_again() {
    // The reply with the verdict and the four after it are lost.
    let down = vec![Fate::Drop; 5];
    let report = run(World::scripted(&Options::calm(1), Vec::new(), down));
    assert_eq!(
        report.outcome,
        Outcome {
            action: Action::Reboot,
            complete: true,
            then: proto::client::Then::Over,
        }
    );
}

#[test]
fn a_lost_first_packet_is_sent_again() {
    let report = run(World::scripted(
        &Options::calm(1),
        vec![Fate::Drop; 4],
        Vec::new(),
    ));
    assert_eq!(
        report.outcome,
        Outcome {
            action: Action::Reboot,
            complete: true,
            then: proto::client::Then::Over,
        }
    );
    assert!(report.resent >= 1);
}

#[test]
fn one_slot_is_enough() {
    let options = Options {
        pool_slots: 1,
        ram_pages: 50,
        ..Options::calm(1)
    };
    assert!(run(World::new(&options)).outcome.complete);
}

#[test]
fn the_ending_is_what_the_wire_says() {
    assert_eq!(Ending::Complete.to_wire(), 0);
    assert_eq!(Ending::StateFaulted.to_wire(), 1);
}
