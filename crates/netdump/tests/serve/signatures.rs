//! What a server does with crashes that it knows.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use netdump::key::HostKey;
use proto::reply::Verdict;
use serde_json::Value;

use crate::check::assert_rebooted;
use crate::host::Host;
use crate::server::{Place, Server, session};

/// An oops, newest piece first.
const OOPS: [&str; 3] = [
    "[   12.000009]  frob_ioctl+0x5a/0x110 [frob]\n[   12.000010]  __x64_sys_ioctl+0x94/0xd0\n\
     [   12.000011]  </TASK>\n[   12.000012] Kernel panic - not syncing: Fatal exception\n",
    "[   12.000000] BUG: kernel NULL pointer dereference, address: 0000000000000000\n\
     [   12.000001] Oops: 0002 [#1] PREEMPT SMP NOPTI\n\
     [   12.000002] RIP: 0010:frob_kick+0x14/0x60 [frob]\n[   12.000003] Call Trace:\n\
     [   12.000004]  <TASK>\n",
    "[    0.000000] Linux version 6.1.0-test\n",
];
const MACHINE_CHECK: [&str; 1] = [
    "[    5.0] mce: [Hardware Error]: CPU 1: Machine Check Exception: 5 Bank 4: b200000000070f0f\n\
     [    5.1] Kernel panic - not syncing: Fatal machine check\n",
];

fn crash(server: &Server, key: &HostKey, arming: u64, log: &[&'static str]) -> Verdict {
    let host = Host {
        log: log.to_vec(),
        boot: [u8::try_from(arming).unwrap(); 16],
        ..Host::new(key, arming)
    };
    let sent = host.crash(server.address);
    assert_rebooted(&sent);
    server.wait_for("complete");
    sent.verdict
}

/// A configuration with one dump of each signature; the file must outlive the server.
fn one_dump(place: &Place) -> String {
    let path = place.keys().with_file_name("one.toml");
    fs::write(&path, "[signatures]\ndumps = 1\n").unwrap();
    path.to_str().unwrap().to_owned()
}

fn known(place: &Place) -> Value {
    let (code, out, error) = place.run(&["signatures", "--json"]);
    assert_eq!(code, 0, "{error}");
    serde_json::from_str(&out).unwrap()
}

#[test]
fn of_equal_crashes_so_many_dumps_are_kept_and_of_the_others_the_log() {
    let (place, key) = Place::new();
    let other = place.add_key("web2");
    let config = one_dump(&place);
    let server = place.serve(&["--config", &config]);
    assert!(matches!(
        crash(&server, &key, 1, &OOPS),
        Verdict::Full { .. }
    ));
    for arming in 2..5 {
        assert_eq!(crash(&server, &other, arming, &OOPS), Verdict::LogOnly);
    }
    let crashes = place.crashes();
    assert!(crashes[0].join("vmcore").exists());
    for known in &crashes[1..] {
        let file = session(known);
        assert_eq!(file["state"], "log-only");
        assert_eq!(file["why"], "1 dumps of it are kept on this kernel already");
        assert_eq!(file["ruling"]["cause"]["function"], "frob_kick");
        let log = fs::read_to_string(known.join("log")).unwrap();
        assert!(log.contains("frob_kick") && !known.join("vmcore").exists());
    }
    let all = known(&place);
    assert_eq!(all[0]["crashes"], 4);
    assert_eq!(all[0]["hosts"], serde_json::json!({"web1": 1, "web2": 3}));
    // A person wants one more, and gets one.
    let signature = all[0]["signature"].as_str().unwrap();
    let (code, _, error) = place.run(&["signatures", "--next-in-full", signature]);
    assert_eq!(code, 0, "{error}");
    assert!(matches!(
        crash(&server, &key, 5, &OOPS),
        Verdict::Full { .. }
    ));
    assert_eq!(crash(&server, &key, 6, &OOPS), Verdict::LogOnly);
    let (_, shown, _) = place.run(&["show", name(&crashes[1])]);
    assert!(
        shown.contains("dumps of it are kept") && shown.contains("frob_kick"),
        "{shown}"
    );
    server.stop();
}

#[test]
fn the_store_is_counted_again_from_the_crashes_when_it_is_lost() {
    let (place, key) = Place::new();
    let config = one_dump(&place);
    let server = place.serve(&["--config", &config]);
    for arming in 1..4 {
        crash(&server, &key, arming, &OOPS);
    }
    crash(&server, &key, 4, &["[    1.0] hung\n"]);
    let before = known(&place);
    assert_eq!(before.as_array().unwrap().len(), 2);
    server.stop();
    assert_eq!(known(&place), before, "the file has it all");
    let file = place.dumps().join(".signatures.json");
    for damage in ["", "{"] {
        fs::write(&file, damage).unwrap();
        let server = place.serve(&["--config", &config]);
        let again = known(&place);
        for (one, other) in before
            .as_array()
            .unwrap()
            .iter()
            .zip(again.as_array().unwrap())
        {
            for field in [
                "signature",
                "crashes",
                "hosts",
                "kernels",
                "title",
                "last_crash",
            ] {
                assert_eq!(one[field], other[field], "{field}");
            }
        }
        server.stop();
    }
    // A dump that was removed makes room for another.
    let server = place.serve(&["--config", &config]);
    fs::remove_file(place.crashes()[0].join("vmcore")).unwrap();
    assert!(matches!(
        crash(&server, &key, 5, &OOPS),
        Verdict::Full { .. }
    ));
    server.stop();
}

#[test]
fn a_signature_is_told_once_and_later_how_often_it_came() {
    let (place, key) = Place::new();
    let path = place.keys().with_file_name("soon.toml");
    fs::write(&path, "[signatures]\nnotice_seconds = 3\n").unwrap();
    let server = place.serve(&["--config", path.to_str().unwrap()]);
    let mut notices = Vec::new();
    for arming in 1..4 {
        let host = Host {
            log: OOPS.to_vec(),
            ..Host::new(&key, arming)
        };
        assert_rebooted(&host.crash(server.address));
    }
    while notices.len() < 2 {
        let event = server.next();
        if event["event"] == "notice" {
            notices.push(event);
        }
    }
    assert_eq!(
        (&notices[0]["crashes"], &notices[0]["repeats"]),
        (&1.into(), &1.into())
    );
    assert_eq!(
        (&notices[1]["crashes"], &notices[1]["repeats"]),
        (&3.into(), &2.into())
    );
    server.stop();
}

#[test]
fn when_the_machine_is_at_fault_its_log_is_enough() {
    let (place, key) = Place::new();
    let server = place.serve(&[]);
    assert_eq!(crash(&server, &key, 1, &MACHINE_CHECK), Verdict::LogOnly);
    let file = session(&place.crashes()[0]);
    assert_eq!(
        file["why"],
        "the machine is at fault, which memory does not explain"
    );
    server.stop();
}

#[test]
fn a_host_whose_text_does_not_come_gets_its_verdict_all_the_same() {
    let (place, key) = Place::new();
    let server = place.serve(&[]);
    let long = "[    1.0] no more than this\n".repeat(2000).leak();
    let host = Host {
        log: vec![long],
        packets_max: Some(2),
        ..Host::new(&key, 1)
    };
    host.crash(server.address);
    let begin = Instant::now();
    let verdict = server.wait_for("verdict");
    assert_eq!(verdict["verdict"], "full");
    assert_eq!(verdict["why"], "its text does not tell what happened");
    let took = begin.elapsed();
    assert!(
        took >= Duration::from_secs(3) && took < Duration::from_secs(10),
        "{took:?}"
    );
    server.stop();
}

fn name(crash: &Path) -> &str {
    crash.file_name().and_then(|name| name.to_str()).unwrap()
}
