//! What people say to a running server, with the commands they use.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use proto::client::Then;
use proto::reply::Action;
use serde_json::Value;

use crate::check::{assert_rebooted, assert_whole, wait_for_state};
use crate::host::{Host, page};
use crate::server::{Place, session};

/// Waits until the server lists one crash in this state; gives its name.
fn listed(place: &Place, state: &str) -> String {
    let give_up = Instant::now() + Duration::from_secs(10);
    loop {
        let (code, list, error) = place.run(&["list", "--json"]);
        assert_eq!(code, 0, "{error}");
        let rows: Value = serde_json::from_str(&list).unwrap();
        if rows[0]["state"] == state {
            return rows[0]["crash"].as_str().unwrap().to_owned();
        }
        assert!(Instant::now() < give_up, "{list}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_held_host_answers_pulls_and_then_sends_all() {
    let (place, key) = Place::new();
    let server = place.serve(&["--hold"]);
    let host = Host::new(&key, 1);
    std::thread::scope(|scope| {
        let crash = scope.spawn(|| host.crash(server.address));
        let name = listed(&place, "hold");
        let (_, list, _) = place.run(&["list"]);
        assert!(list.contains("hold, 0 of 999 pages"), "{list}");
        let out = place.dumps().join("out");
        // Two pages with contents, one of zeros, one that cannot be read, one that is no memory.
        let pages = ["5", "0x6", "8", "77", "2000"];
        let mut args = vec!["pull", &name, "--out", out.to_str().unwrap()];
        args.extend(pages);
        let (code, _, error) = place.run(&args);
        assert_eq!(code, 0, "{error}");
        let expected = [page(5), page(6), page(8), [0; 4096], [0; 4096]].concat();
        assert!(fs::read(&out).unwrap() == expected);
        fs::remove_file(&out).unwrap();
        let (_, text, _) = place.run(&["pull", &name, "6+3"]);
        assert!(
            text.starts_with("pfn 0x6: data\n000000006000  06 00"),
            "{text}"
        );
        assert!(text.ends_with("pfn 0x8: zero\n\n"), "{text}");
        let (code, _, error) = place.run(&["pull", &name, "0+5000"]);
        assert_eq!(code, 1);
        assert!(error.contains("1 to 4096 pages"), "{error}");
        let (code, told, error) = place.run(&["verdict", &name, "full", "--filter", "0"]);
        assert_eq!(
            (code, told.trim()),
            (0, format!("{name}: full").as_str()),
            "{error}"
        );
        assert_rebooted(&crash.join().unwrap());
    });
    server.wait_for("complete");
    assert_whole(&place.crashes()[0], &host);
    let (code, _, error) = place.run(&["verdict", "web1-1", "halt"]);
    assert_eq!(code, 1);
    assert!(error.contains("no crash web1-1 is under way"), "{error}");
}

#[test]
fn every_verdict_reaches_the_host() {
    for (order, action) in [
        ("log-only", Action::Reboot),
        ("reboot", Action::Reboot),
        ("halt", Action::Halt),
        ("stay", Action::Stay),
    ] {
        let (place, key) = Place::new();
        let server = place.serve(&["--hold"]);
        let host = Host::new(&key, 1);
        std::thread::scope(|scope| {
            let crash = scope.spawn(|| host.crash(server.address));
            let name = listed(&place, "hold");
            let (code, _, error) = place.run(&["verdict", &name, order]);
            assert_eq!(code, 0, "{error}");
            let outcome = crash.join().unwrap().outcome.unwrap();
            assert_eq!(outcome.action, action, "{order}");
        });
        let state = if order == "log-only" {
            "log-only"
        } else {
            "incomplete"
        };
        wait_for_state(&place.crashes()[0], state);
    }
}

#[test]
fn a_dump_can_be_held_and_goes_on() {
    let (place, key) = Place::new();
    let server = place.serve(&[]);
    let host = Host::new(&key, 1);
    std::thread::scope(|scope| {
        let crash = scope.spawn(|| {
            host.crash_with(server.address, |packets| {
                if packets == 300 {
                    let name = listed(&place, "full");
                    assert_eq!(place.run(&["verdict", &name, "hold"]).0, 0);
                }
            })
        });
        let name = listed(&place, "hold");
        std::thread::sleep(Duration::from_millis(500));
        assert!(!crash.is_finished());
        assert_eq!(place.run(&["verdict", &name, "full"]).0, 0);
        assert_rebooted(&crash.join().unwrap());
    });
    server.wait_for("complete");
    assert_whole(&place.crashes()[0], &host);
}

#[test]
fn the_action_is_what_the_server_was_started_with() {
    for (name, action) in [("halt", Action::Halt), ("stay", Action::Stay)] {
        let (place, key) = Place::new();
        let server = place.serve(&["--action", name]);
        let sent = Host::new(&key, 1).crash(server.address);
        assert_eq!(sent.outcome.unwrap().action, action);
        server.wait_for("complete");
    }
}

#[test]
fn a_crash_goes_to_the_server_it_is_sent_to_if_its_host_knows_that() {
    let (place, key) = Place::new();
    let other = "127.0.0.1:7777".parse().unwrap();
    let server = place.serve(&["--redirect", "127.0.0.1:7777"]);
    let host = Host {
        servers: vec![server.address, other],
        ..Host::new(&key, 1)
    };
    let sent = host.crash(server.address);
    assert_eq!(sent.outcome.unwrap().then, Then::Redirect(1));
    assert!(sent.pages.is_empty());
    let incomplete = server.wait_for("incomplete");
    assert_eq!(incomplete["why"], "the host went to 127.0.0.1:7777");
    // It comes back: the other one is not there. Its dump is taken.
    let back = Host {
        attempt: 1,
        first: sent.next_packet,
        ..host
    };
    assert_rebooted(&back.crash(server.address));
    server.wait_for("complete");
    assert_eq!(place.crashes().len(), 1);
    assert_whole(&place.crashes()[0], &back);
    // A host that was not armed for it stays.
    let stranger = Host::new(&place.add_key("web2"), 1);
    assert_rebooted(&stranger.crash(server.address));
    let warning = server.wait_for("warning");
    let message = warning["message"].as_str().unwrap();
    assert!(
        message.contains("was not armed for that server"),
        "{message}"
    );
}

#[test]
fn only_the_owner_may_control_a_server() {
    let (place, key) = Place::new();
    let server = place.serve(&["--hold"]);
    let mode = |path: &str| {
        let permissions = fs::metadata(place.dumps().join(path))
            .unwrap()
            .permissions();
        permissions.mode() & 0o777
    };
    assert_eq!(mode(".control"), 0o600);
    // A killed server leaves its socket behind; the next one takes its place.
    server.kill();
    let (code, _, error) = place.run(&["list"]);
    assert_eq!(code, 1);
    assert!(error.contains("no netdump serve answers"), "{error}");
    let server = place.serve(&[]);
    assert_eq!(place.run(&["list"]).1.trim(), "no crash is under way");
    assert_rebooted(&Host::new(&key, 1).crash(server.address));
    server.wait_for("complete");
    assert_eq!(session(&place.crashes()[0])["state"], "complete");
}
