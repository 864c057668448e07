//! Peers that lie, engines that are broken on purpose, and a store that is cut anywhere.

use super::{complete, failure, run, with};
use crate::Options;
use crate::options::Mutant;

fn mutant(mutant: Mutant, options: &str) -> Options {
    Options {
        mutant,
        ..with(options)
    }
}

#[test]
fn an_engine_that_never_sends_again_fails() {
    let what = failure(&mutant(Mutant::NoResends, "up.loss=50"));
    assert!(what.contains("ended without reason"), "{what}");
}

#[test]
fn replies_that_acknowledge_too_much_are_noticed() {
    let what = failure(&mutant(Mutant::LyingNext, "up.loss=50"));
    assert!(what.contains("not finished in time"), "{what}");
}

#[test]
fn a_pull_that_leaves_a_page_out_is_noticed() {
    let what = failure(&mutant(Mutant::SkippedPage, "server.pulls=5"));
    assert!(what.starts_with("pull "), "{what}");
}

#[test]
fn a_server_that_acknowledges_before_it_writes_is_noticed() {
    let options = "server.write_error=100";
    let what = failure(&mutant(Mutant::UnwrittenAcknowledged, options));
    assert!(what.contains("is acknowledged"), "{what}");
}

#[test]
fn a_hostile_client_costs_its_own_session_only() {
    for seed in 0..20 {
        let options = Options {
            seed,
            ..with("world.hosts=3 host.hostile_permille=300 host.ram_pages=400")
        };
        let report = run(&options);
        assert!(report.counts.get("host: altered on purpose") > 0);
        let others = report.outcomes.iter().skip(1);
        assert!(
            others.flatten().all(|outcome| outcome.complete),
            "{options}"
        );
    }
}

#[test]
fn a_hostile_server_breaks_nothing() {
    let mut altered = 0;
    for seed in 0..20 {
        let options = Options {
            seed,
            ..with("server.hostile_permille=100 server.pulls=5 host.ram_pages=400")
        };
        altered += run(&options).counts.get("server: altered on purpose");
    }
    assert!(altered > 20, "only {altered} replies were altered");
}

#[test]
fn a_store_is_readable_wherever_it_is_cut() {
    for every in [50, 117, 500] {
        for power in [0, 500] {
            let options = format!(
                "host.ram_pages=400 server.read_store=1 server.kill_every={every} \
                 server.power={power} server.sync_us=1000 up.loss=10 server.pulls=2"
            );
            let report = complete(&with(&options));
            assert!(report.counts.get("server: pages read from the store") > 0);
        }
    }
}
