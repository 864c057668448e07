//! Many crashes at once: who sends pages, who waits, who is refused, and that all of them are told.

use std::fs;
use std::time::{Duration, Instant};

use netdump::serve::registry::SESSIONS_PER_KEY_MAX;
use proto::reply::Verdict;

use crate::check::{assert_rebooted, assert_whole, wait_for_state};
use crate::host::Host;
use crate::server::{Place, session};

#[test]
fn a_bounded_number_sends_pages_and_the_others_wait_their_turn() {
    let (place, _) = Place::new();
    let keys: Vec<_> = (0..6).map(|n| place.add_key(&format!("db{n}"))).collect();
    let server = place.serve(&["--active", "2"]);
    let hosts: Vec<Host> = keys.iter().map(|key| Host::new(key, 1)).collect();
    std::thread::scope(|scope| {
        let crashes: Vec<_> = hosts
            .iter()
            .map(|host| scope.spawn(|| host.crash(server.address)))
            .collect();
        let mut paging = Vec::new();
        for crash in crashes {
            let sent = crash.join().unwrap();
            paging.push(sent.paging.unwrap());
            assert_rebooted(&sent);
            // Whoever waits is told when it is its turn: nobody needed to ask after 5 s.
            assert!(sent.took < Duration::from_secs(5), "{:?}", sent.took);
        }
        for (at, _) in &paging {
            let others = paging.iter().filter(|(from, to)| from <= at && at <= to);
            assert!(others.count() <= 2, "{paging:?}");
        }
    });
    let (mut waited, mut admitted, mut complete) = (Vec::new(), Vec::new(), 0);
    while complete < hosts.len() {
        let event = server.next();
        let host = event["host"].as_str().unwrap_or_default().to_owned();
        match event["event"].as_str().unwrap() {
            "verdict" if event["verdict"] == "full" && waited.contains(&host) => {
                admitted.push(host);
            }
            "verdict" if event["verdict"] == "full" => {}
            "verdict" => {
                assert_eq!(event["verdict"], "wait");
                waited.push(host);
            }
            "complete" => complete += 1,
            _ => {}
        }
    }
    assert_eq!(waited.len(), 4);
    assert_eq!(admitted, waited, "first come, first served");
    for (crash, host) in place.crashes().iter().zip(&hosts) {
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
