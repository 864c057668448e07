//! That each fault really happens, about as often as asked, and costs no more than it must.

use super::{complete, run, with};
use crate::Report;

/// `part` is `permille` of `whole`, give or take a third.
#[track_caller]
fn about(part: u64, whole: u64, permille: u64) {
    let expected = whole * permille / 1000;
    assert!(
        part * 3 >= expected * 2 && part * 3 <= expected * 4,
        "{part} of {whole} are not about {permille} permille"
    );
}

/// How often `fault` happened on the way up, of all packets sent.
#[track_caller]
fn up_about(report: &Report, fault: &str, permille: u64) {
    let counts = &report.counts;
    about(
        counts.get(&format!("up: {fault}")),
        counts.get("up: sent"),
        permille,
    );
}

#[track_caller]
fn happened(report: &Report, names: &[&str]) {
    for name in names {
        assert!(report.counts.get(name) > 0, "`{name}` did not happen");
    }
}

#[test]
fn without_faults_nothing_is_lost_or_sent_twice() {
    let report = complete(&with("world.hosts=2"));
    for name in [
        "up: lost in all",
        "up: overtaking",
        "host: sent again",
        "host: timeouts",
        "server: duplicates",
    ] {
        assert_eq!(report.counts.get(name), 0, "{name}");
    }
    let refused = |(name, _): &(&str, u64)| name.contains("refused");
    assert_eq!(report.counts.iter().find(refused), None);
    assert!(
        report.counts.get("host: packets") > 300,
        "the world is too small to say anything"
    );
}

#[test]
fn loss_happens_and_only_what_was_lost_is_sent_again() {
    let report = complete(&with("up.loss=50 host.ram_pages=2500"));
    up_about(&report, "lost", 50);
    let (lost, again) = (
        report.counts.get("up: lost"),
        report.counts.get("host: sent again"),
    );
    assert!(
        again >= lost && again <= lost + 5,
        "{lost} were lost, {again} sent again"
    );
}

#[test]
fn bursts_of_losses_happen() {
    let report = complete(&with("up.burst=10 up.burst_packets=10 host.ram_pages=2500"));
    // A burst lasts 10 packets of which 8 are lost, and the good state 100.
    up_about(&report, "lost in bursts", 73);
    happened(&report, &["up: bursts"]);
}

#[test]
fn duplication_happens_and_costs_nothing() {
    let report = complete(&with("up.duplicate=100"));
    up_about(&report, "duplicated", 100);
    let counts = &report.counts;
    // The last packet's copy comes when the session is over, and is not the session's to count.
    let (twice, told) = (
        counts.get("up: duplicated"),
        counts.get("server: duplicates"),
    );
    assert!(told == twice || told + 1 == twice, "{told} of {twice}");
    assert_eq!(counts.get("host: sent again"), 0);
}

#[test]
fn late_replays_happen_and_are_refused() {
    let report = complete(&with(
        "up.replay=100 up.replay_us=5000 down.replay=200 down.replay_us=5000 host.step_us=50 \
         host.ram_pages=2500",
    ));
    up_about(&report, "replayed", 100);
    happened(&report, &["host: refused: Stale", "server: duplicates"]);
}

#[test]
fn reordering_happens_and_little_is_sent_again() {
    let report = complete(&with("up.jitter_us=10 host.ram_pages=2500"));
    let counts = &report.counts;
    assert!(counts.get("up: overtaking") * 10 > counts.get("up: sent"));
    assert!(counts.get("host: sent again") * 20 < counts.get("host: packets"));
}

#[test]
fn damage_happens_and_is_refused() {
    let report = complete(&with("up.corrupt=50 up.truncate=50"));
    up_about(&report, "corrupted", 50);
    up_about(&report, "truncated", 50);
    happened(&report, &["server: refused: BadSeal"]);
}

#[test]
fn replies_may_get_lost() {
    let report = complete(&with(
        "down.loss=300 host.ram_pages=2500 host.datagram_bytes=508",
    ));
    let counts = &report.counts;
    about(counts.get("down: lost"), counts.get("down: sent"), 300);
    assert!(counts.get("host: sent again") * 20 < counts.get("host: packets"));
}

#[test]
fn a_link_can_clog_be_cut_and_begin_deaf() {
    let report = complete(&with(
        "up.clog=5 up.clog_us=2000 down.cut=100 down.cut_us=20000 up.deaf_us=1000",
    ));
    let names = [
        "up: clogs",
        "up: clogged",
        "down: cuts",
        "down: cut off",
        "up: no neighbour",
    ];
    happened(&report, &names);
}

#[test]
fn a_narrow_link_queues_and_drops() {
    let report = complete(&with("up.rate=20000 up.queue_packets=16"));
    happened(&report, &["up: queued", "up: queue full"]);
    // 360 packets of 1472 bytes at 20 bytes a microsecond.
    assert!(report.time_us > 360 * 1472 / 20);
}

#[test]
fn long_packets_are_dropped_until_the_path_is_itself_again() {
    let report = complete(&with("up.mtu_bytes=700 world.faults_us=500000"));
    happened(&report, &["up: over the MTU"]);
    assert!(report.time_us >= 500_000);
}

#[test]
fn a_host_stalls_and_its_rings_fill() {
    let report = complete(&with(
        "host.stall_permille=10 host.stall_us=5000 host.receive_slots=1 host.ring_slots=1 \
         host.nic_us=300 down.duplicate=100 host.step_us=50",
    ));
    let names = [
        "host: stalls",
        "host: receive ring full",
        "host: transmit ring full",
    ];
    happened(&report, &names);
}

#[test]
fn a_clock_may_be_coarse_and_step() {
    let report = complete(&with(
        "host.clock_tick_us=10000 up.loss=100 down.loss=100 \
         host.ram_pages=2500",
    ));
    happened(&report, &["host: timeouts"]);
    let stepping = "host.clock_step_us=50000 server.undecided_us=700000 server.places=1 \
                    server.wait_s=10 world.hosts=4";
    happened(&run(&with(stepping)), &["host: clock stepped"]);
}

#[test]
fn packets_that_come_early_may_find_no_room() {
    let report = complete(&with("up.jitter_us=20 server.hold_packets=0"));
    happened(&report, &["server: no room to hold"]);
}

#[test]
fn disks_fail_and_nothing_unwritten_is_acknowledged() {
    let report = complete(&with(
        "server.write_error=100 server.short_write=100 server.write_us=20 \
         server.socket_packets=16",
    ));
    let names = [
        "server: write errors",
        "server: short writes",
        "server: syncs that failed",
    ];
    happened(&report, &names[..2]);
    complete(&with("server.partial=1 server.write_error=300 up.loss=10"));
    let slow = run(&with("server.write_us=2000 server.socket_packets=16"));
    happened(&slow, &["server: socket full"]);
}

#[test]
fn a_crash_is_given_up_for_a_disk_that_stays_full() {
    let report = run(&with("server.disk_bytes=300000"));
    let names = ["server: disk full", "server: crashes given up for the disk"];
    happened(&report, &names);
}

#[test]
fn a_killed_server_goes_on_from_its_spool() {
    let report = complete(&with("server.kill_us=10000 host.step_us=50"));
    happened(&report, &["server: was killed", "server: spools read"]);
    assert_eq!(report.counts.get("host: started over"), 0);
}

#[test]
fn a_server_without_power_pulls_what_it_lost() {
    let report = complete(&with(
        "server.kill_us=10000 server.power=1000 server.sync_us=3000 host.step_us=50 \
         host.ram_pages=2500",
    ));
    let names = [
        "server: lost power",
        "server: spools cut short",
        "host: started over",
        "server: attempts that pull what is missing",
        "server: pulls answered",
    ];
    happened(&report, &names);
}

#[test]
fn a_server_that_lost_its_spool_altogether_is_begun_with_again() {
    let report = complete(&with(
        "server.kill_us=10000 server.power=1000 host.step_us=50",
    ));
    let names = [
        "server: spools that vanished",
        "server: answered a crash it does not know",
        "host: started over",
    ];
    happened(&report, &names);
}

#[test]
fn a_server_gone_for_good_is_left_for_the_next_one() {
    let report = complete(&with("world.servers=2 server.gone_us=3000"));
    happened(
        &report,
        &["server: gone for good", "host: went to the next server"],
    );
}
