//! That each fault really happens, about as often as asked, and that a mutant without recovery
//! fails.

use super::complete;
use crate::options::LinkOptions;
use crate::{Options, World};

fn with_up(up: LinkOptions) -> Options {
    let calm = Options::calm(5);
    Options {
        up: LinkOptions {
            delay_us: 100,
            ..up
        },
        ..calm
    }
}

/// `part` is `permille` of `whole`, give or take a third.
fn about(part: u64, whole: u64, permille: u64) {
    let expected = whole * permille / 1000;
    assert!(
        part * 3 >= expected * 2 && part * 3 <= expected * 4,
        "{part} of {whole} are not about {permille} permille"
    );
}

#[test]
fn without_faults_nothing_is_lost_or_sent_twice() {
    let report = complete(&Options::calm(5));
    assert_eq!(
        (
            report.resent,
            report.duplicates,
            report.refused,
            report.most_waiting
        ),
        (0, 0, 0, 0)
    );
    assert_eq!(
        (report.up.lost, report.up.duplicated, report.up.overtaking),
        (0, 0, 0)
    );
    assert!(
        report.packets > 500,
        "the world is too small to say anything: {}",
        report.packets
    );
}

#[test]
fn loss_happens_and_only_what_was_lost_is_sent_again() {
    let report = complete(&with_up(LinkOptions {
        loss_permille: 50,
        ..LinkOptions::default()
    }));
    about(report.up.lost, report.up.sent, 50);
    assert!(report.resent >= report.up.lost);
    assert!(
        report.resent <= report.up.lost + 5,
        "{} were lost, {} sent again",
        report.up.lost,
        report.resent
    );
}

#[test]
fn duplication_happens_and_costs_nothing() {
    let report = complete(&with_up(LinkOptions {
        duplicate_permille: 100,
        ..LinkOptions::default()
    }));
    about(report.up.duplicated, report.up.sent, 100);
    assert_eq!(report.duplicates, report.up.duplicated);
    assert_eq!(report.resent, 0);
}

#[test]
fn reordering_happens_and_little_is_sent_again() {
    let report = complete(&with_up(LinkOptions {
        jitter_us: 20,
        ..LinkOptions::default()
    }));
    assert!(
        report.up.overtaking * 10 > report.up.sent,
        "only {} overtook",
        report.up.overtaking
    );
    assert!(report.most_waiting > 1);
    assert!(
        report.resent * 50 < report.packets,
        "{} sent again for nothing",
        report.resent
    );
}

#[test]
fn damage_happens_and_is_refused() {
    let up = LinkOptions {
        corrupt_permille: 50,
        truncate_permille: 50,
        ..LinkOptions::default()
    };
    let report = complete(&with_up(up));
    about(report.up.corrupted, report.up.sent, 50);
    about(report.up.truncated, report.up.sent, 50);
    about(report.refused, report.up.sent, 98);
}

#[test]
fn replies_may_get_lost() {
    let calm = Options::calm(5);
    let down = LinkOptions {
        loss_permille: 300,
        ..calm.down
    };
    let report = complete(&Options { down, ..calm });
    about(report.down.lost, report.down.sent, 300);
    assert!(
        report.resent * 20 < report.packets,
        "{} sent again for nothing",
        report.resent
    );
}

#[test]
fn an_engine_that_never_sends_again_fails() {
    let options = with_up(LinkOptions {
        loss_permille: 50,
        ..LinkOptions::default()
    });
    let mutant = Options {
        resends_off: true,
        ..options
    };
    let report = World::new(&mutant)
        .run()
        .expect("it breaks no invariant, it just never gets through");
    assert!(
        !report.outcome.complete,
        "the simulator does not notice missing recovery"
    );
}
