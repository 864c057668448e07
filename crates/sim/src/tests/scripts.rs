//! Single situations.

use proto::client::{Outcome, Then};
use proto::record::Ending;
use proto::reply::Action;

use super::{WHOLE, complete, run, with};
use crate::World;
use crate::link::Fate;

#[test]
fn a_host_without_a_server_gives_up_in_time() {
    let options = with("server.gone_us=1 up.delay_us=50");
    let report = run(&options);
    let outcome = Outcome {
        action: Action::None,
        complete: false,
        then: Then::Over,
    };
    assert_eq!(report.outcomes, [Some(outcome)]);
    let give_up_us = 1_000_000 * options.host.give_up_s;
    assert!(report.time_us >= give_up_us && report.time_us <= give_up_us + 1_000_000);
    let sent = report.counts.get("up: sent");
    assert!(sent < 150, "{sent} packets into the void");
}

#[test]
fn log_only_sends_no_pages() {
    let report = complete(&with("server.verdict=1"));
    assert!(report.counts.get("host: packets") < 10);
}

#[test]
fn nothing_means_reboot_now() {
    let report = run(&with("server.verdict=2"));
    let action = report.outcomes[0].map(|outcome| outcome.action);
    assert_eq!(action, Some(Action::Reboot));
    assert!(report.counts.get("host: packets") < 10);
}

#[test]
fn a_verdict_may_change_in_the_middle() {
    let report = complete(&with("server.change_us=2000"));
    let packets = report.counts.get("host: packets");
    assert!(packets > 20 && packets < 300, "{packets} packets");
    assert_eq!(report.counts.get("server: verdict log only"), 1);
}

#[test]
fn hosts_that_wait_come_one_after_the_other() {
    let report = complete(&with("world.hosts=4 server.places=1 server.wait_s=2"));
    assert_eq!(report.counts.get("server: verdict wait"), 3);
    assert_eq!(report.counts.get("server: verdict full"), 4);
}

#[test]
fn a_waiting_host_asks_again_though_its_question_is_lost() {
    // It waits longer than it would go on without a reply.
    let report = complete(&with(
        "world.hosts=2 server.places=1 server.wait_s=90 down.loss=200 up.loss=200 up.rate=1000 \
         world.faults_us=20000000",
    ));
    assert!(report.time_us < 100_000_000);
}

#[test]
fn a_held_host_answers_pulls_and_then_sends_all() {
    let report = complete(&with("server.hold=1 server.pulls=40"));
    assert_eq!(report.counts.get("server: pulls answered"), 40);
    assert_eq!(report.counts.get("server: verdict full"), 1);
}

#[test]
fn pulls_are_answered_in_the_middle_of_a_dump() {
    let report = complete(&with("server.pulls=5 up.loss=10"));
    assert_eq!(report.counts.get("server: pulls answered"), 5);
}

#[test]
fn a_host_goes_where_it_is_sent() {
    let report = complete(&with("world.servers=2 server.redirect=1000"));
    assert_eq!(report.counts.get("host: redirected"), 1);
}

#[test]
fn a_filter_leaves_pages_out() {
    let whole = complete(&with("")).counts.get("host: packets");
    let filtered = complete(&with("server.filter=31"))
        .counts
        .get("host: packets");
    assert!(filtered < whole, "{filtered} of {whole} packets");
}

#[test]
fn a_fault_in_the_state_text_costs_nothing_before_it() {
    complete(&with("host.state_faults=1"));
}

#[test]
fn a_host_that_dies_may_crash_again_later() {
    let report = run(&with("host.dies_after=200 host.returns_us=700000"));
    assert_eq!(report.outcomes, [Some(WHOLE)]);
    assert_eq!(report.counts.get("host: came back"), 1);
    assert_eq!(report.counts.get("server: attempts begun"), 2);
    let report = run(&with("host.dies_after=200 world.hosts=2"));
    assert_eq!(report.outcomes, [None, Some(WHOLE)]);
}

#[test]
fn a_lost_verdict_is_told_again() {
    let report = World::scripted(&with(""), &[], &[Fate::Drop; 5]).run();
    assert_eq!(report.expect("it ends well").outcomes, [Some(WHOLE)]);
}

#[test]
fn a_lost_first_packet_is_sent_again() {
    let report = World::scripted(&with(""), &[Fate::Drop; 4], &[]).run();
    let report = report.expect("it ends well");
    assert_eq!(report.outcomes, [Some(WHOLE)]);
    assert!(report.counts.get("host: sent again") >= 1);
}

#[test]
fn the_ending_is_what_the_wire_says() {
    assert_eq!(Ending::Complete.to_wire(), 0);
    assert_eq!(Ending::StateFaulted.to_wire(), 1);
}

#[test]
fn transmit_completions_of_milliseconds_neither_stall_nor_count_as_losses() {
    let late = |nic_us: u64| run(&with(&format!("host.pool_slots=64 host.nic_us={nic_us}")));
    let at_once = late(0);
    for nic_us in [1_000, 5_000, 19_000] {
        let report = late(nic_us);
        assert_eq!(report.outcomes, [Some(WHOLE)]);
        assert_eq!(report.counts.get("host: sent again"), 0, "{nic_us} us");
        // Each buffer is used again as soon as the device gives it back; the engine may look up to
        // 200 us too late.
        let rounds = report.counts.get("host: packets") / 64 + 1;
        let limit = at_once.time_us + rounds * (nic_us + 300);
        assert!(
            report.time_us <= limit,
            "{nic_us} us a completion: took {} us, {limit} us are enough",
            report.time_us
        );
    }
}
