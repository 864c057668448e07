//! Many crashes at once: who sends pages, who waits, who is refused, and that all of them are told.

use std::collections::VecDeque;
use std::fs;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use netdump::serve::registry::SESSIONS_PER_KEY_MAX;
use proto::reply::Verdict;

use crate::check::{assert_rebooted, assert_whole, wait_for_state};
use crate::host::Host;
use crate::server::{Place, session};

/// Whoever waits asks again after so long.
const ASKS_AGAIN: Duration = Duration::from_secs(5);
/// After so many packets a host has sent a part of its pages.
const HALF_WAY: u64 = 400;

#[test]
fn a_bounded_number_sends_pages_and_the_others_wait_their_turn() {
    let (place, _) = Place::new();
    let keys: Vec<_> = (0..6).map(|n| place.add_key(&format!("db{n}"))).collect();
    let server = place.serve(&["--active", "2"]);
    let hosts: Vec<Host> = keys.iter().map(|key| Host::new(key, 1)).collect();
    let verdict = |of: &Host| {
        let event = server.wait_for("verdict");
        assert_eq!(event["host"], of.key.host.as_str());
        event["verdict"].as_str().unwrap().to_owned()
    };
    std::thread::scope(|scope| {
        // One after the other, and each stops half way until it is let go on.
        let mut crashes = VecDeque::new();
        for (at, host) in hosts.iter().enumerate() {
            let (go_on, gate) = channel();
            let crash = scope.spawn(move || {
                host.crash_with(server.address, |packets| {
                    if packets == HALF_WAY {
                        gate.recv().unwrap();
                    }
                })
            });
            crashes.push_back((go_on, crash));
            assert_eq!(verdict(host), if at < 2 { "full" } else { "wait" });
        }
        let (mut paging, mut told) = (Vec::new(), Vec::new());
        for at in 0..hosts.len() {
            let (go_on, crash) = crashes.pop_front().unwrap();
            go_on.send(()).unwrap();
            // First come, first served: whoever has waited longest takes the place.
            if let Some(next) = hosts.get(at + 2) {
                assert_eq!(verdict(next), "full");
                told.push(Instant::now());
            }
            let sent = crash.join().unwrap();
            assert_rebooted(&sent);
            paging.push(sent.paging.unwrap());
        }
        for (at, _) in &paging {
            let others = paging.iter().filter(|(from, to)| from <= at && at <= to);
            assert!(others.count() <= 2, "{paging:?}");
        }
        for ((begin, _), told) in paging.iter().skip(2).zip(told) {
            let late = begin.saturating_duration_since(told);
            assert!(late < ASKS_AGAIN, "told only when it asked: {late:?}");
        }
    });
    for (crash, host) in place.crashes().iter().zip(&hosts) {
        wait_for_state(crash, "complete");
        assert_whole(crash, host);
    }
}

#[test]
fn whoever_waits_has_delivered_its_log_and_registers() {
    let (place, key) = Place::new();
    let server = place.serve(&["--active", "1"]);
    let other = place.add_key("web2");
    let first = Host {
        packets_max: Some(400),
        ..Host::new(&key, 1)
    };
    first.crash(server.address);
    let waiting = Host {
        lives: Some(Duration::from_secs(2)),
        ..Host::new(&other, 1)
    };
    let sent = waiting.crash(server.address);
    assert_eq!(sent.verdict, Verdict::Wait { seconds: 5 });
    assert!(sent.pages.is_empty());
    let crash = place.crashes().remove(1);
    let log = fs::read_to_string(crash.join("log")).unwrap();
    assert!(log.contains("Kernel panic"), "{log}");
    assert!(session(&crash)["verdict"]["wait"].is_object());
    // A restarted server remembers who waits.
    server.kill();
    let _server = place.serve(&["--active", "1"]);
    let give_up = Instant::now() + Duration::from_secs(10);
    while !place
        .run(&["list", "--json"])
        .1
        .contains(r#""state":"wait""#)
    {
        assert!(Instant::now() < give_up);
    }
}

#[test]
fn who_is_refused_is_told_and_counted_and_taken_later() {
    let (place, key) = Place::new();
    let server = place.serve(&[]);
    let places = SESSIONS_PER_KEY_MAX as u64;
    for arming in 0..places {
        let host = Host {
            packets_max: Some(100),
            ..Host::new(&key, arming)
        };
        host.crash(server.address);
    }
    let refused = Host {
        lives: Some(Duration::from_secs(1)),
        ..Host::new(&key, places)
    };
    let sent = refused.crash(server.address);
    assert_eq!(sent.verdict, Verdict::Wait { seconds: 10 });
    assert_eq!(place.crashes().len() as u64, places);
    // Other hosts are not affected.
    let other = Host::new(&place.add_key("web2"), 1);
    assert_rebooted(&other.crash(server.address));
    let crash = place.crashes().pop().unwrap();
    wait_for_state(&crash, "complete");
    let drops = server.stop();
    assert!(drops["over_limit"].as_u64().unwrap() > 0, "{drops}");
}
