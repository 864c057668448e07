//! What goes wrong in the middle of a crash: servers that are killed, machines that lose what was
//! not synced, networks that are cut, hosts that come back, disks that are full, fail or stall.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use netdump::serve::directory::SPOOLS_MAX;
use proto::reply::Action;
use proto::wire::Header;

use crate::check::{assert_rebooted, assert_whole, read, spooled, wait_for_state};
use crate::host::Host;
use crate::server::{Place, Server, session};

/// Packets that a host of these tests has under way at most.
const WINDOW: u64 = 64;
const LONG: Duration = Duration::from_secs(60);

fn all(host: &Host) -> BTreeSet<u64> {
    let ranges = host
        .ram
        .iter()
        .flat_map(|&(first, pages)| first..first + pages);
    ranges.collect()
}

/// Cuts a spool down to `part` of 4 of its length, as a machine that lost power does.
fn lose_tail(spool: &Path, part: u64) -> BTreeSet<u64> {
    let file = OpenOptions::new().write(true).open(spool).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length * part / 4).unwrap();
    spooled(spool)
}

/// When a server is killed: as soon as its spool, and that of the attempt after, has so many bytes.
/// More are to come then, and the client has heard that half of them are written.
const KILLS: [(&str, u64); 2] = [("spool", 500_000), ("spool-2", 300_000)];

/// The crash whose spool is as long as the kill of number `kill` wants it.
fn ripe(place: &Place, kill: usize) -> Option<PathBuf> {
    let (name, bytes) = *KILLS.get(kill)?;
    let crash = place.crashes().pop()?;
    let spool = fs::metadata(crash.join(name)).ok()?;
    (spool.len() >= bytes).then_some(crash)
}

#[test]
fn a_killed_server_is_sent_nothing_twice_that_it_acknowledged() {
    for lose_every in [None, Some(7)] {
        let (place, key) = Place::new();
        let mut server = Some(place.serve(&[]));
        let address = server.as_ref().unwrap().address;
        let host = Host {
            lose_every,
            ..Host::new(&key, 1)
        };
        let sent = host.crash_with(address, |packets| {
            if packets == 400 {
                server.take().unwrap().kill();
                server = Some(place.serve_at(&address.to_string(), &[]));
            }
        });
        assert_rebooted(&sent);
        server.unwrap().wait_for("complete");
        assert_eq!(sent.attempt, 0);
        assert_eq!(session(&place.crashes()[0])["resumed"], 1);
        assert_whole(&place.crashes()[0], &host);
        let number = |bytes: &Vec<u8>| Header::parse(bytes).unwrap().number.0;
        let newest = sent.datagrams[..400].iter().map(number).max().unwrap();
        let oldest = sent.datagrams[400..].iter().map(number).min().unwrap();
        assert!(
            oldest + WINDOW > newest,
            "{oldest} was sent again at {newest}"
        );
        read(&sent, 0);
    }
}

#[test]
fn what_a_server_lost_is_asked_for_and_nothing_else() {
    let (place, key) = Place::new();
    let mut server = Some(place.serve(&["--filter", "0"]));
    let address = server.as_ref().unwrap().address;
    let host = Host::new(&key, 1);
    let mut there = Vec::new();
    let sent = host.crash_with(address, |_| {
        // In the first attempt, then again while its rest is being pulled.
        if let Some(crash) = ripe(&place, there.len()) {
            server.take().unwrap().kill();
            let (spool, _) = KILLS[there.len()];
            there.push(lose_tail(&crash.join(spool), 2));
            server = Some(place.serve_at(&address.to_string(), &[]));
        }
    });
    assert_rebooted(&sent);
    let server = server.unwrap();
    server.wait_for("rest");
    server.wait_for("complete");
    assert_eq!(sent.attempt, 2);
    assert_eq!(place.crashes().len(), 1);
    assert_whole(&place.crashes()[0], &host);
    let sizes: Vec<usize> = there.iter().map(BTreeSet::len).collect();
    assert!(sizes.iter().all(|&pages| pages > 20), "{sizes:?}");
    // The third attempt brought what the first two spools did not have, and that only.
    let before: BTreeSet<u64> = there.iter().flatten().copied().collect();
    let again = read(&sent, 2);
    let missing: BTreeSet<u64> = all(&host).difference(&before).copied().collect();
    // The unreadable page is asked for, but never read.
    assert!(again.is_disjoint(&before));
    assert!(missing.difference(&again).all(|&pfn| pfn == 77));
}

#[test]
fn a_spool_that_is_gone_costs_another_attempt_in_the_same_directory() {
    let (place, key) = Place::new();
    let mut server = Some(place.serve(&[]));
    let address = server.as_ref().unwrap().address;
    let host = Host::new(&key, 1);
    let sent = host.crash_with(address, |packets| {
        if packets == 400 {
            server.take().unwrap().kill();
            fs::write(place.crashes()[0].join("spool"), "").unwrap();
            server = Some(place.serve_at(&address.to_string(), &[]));
        }
    });
    assert_rebooted(&sent);
    server.unwrap().wait_for("complete");
    assert_eq!((sent.attempt, place.crashes().len()), (1, 1));
    assert_whole(&place.crashes()[0], &host);
}

#[test]
fn a_newest_spool_that_is_gone_costs_another_attempt() {
    let (place, key) = Place::new();
    let mut server = Some(place.serve(&["--filter", "0"]));
    let address = server.as_ref().unwrap().address;
    let host = Host::new(&key, 1);
    let mut kills = 0;
    let sent = host.crash_with(address, |_| {
        if let Some(crash) = ripe(&place, kills) {
            server.take().unwrap().kill();
            if kills == 0 {
                lose_tail(&crash.join("spool"), 2);
            } else {
                fs::remove_file(crash.join("spool-2")).unwrap();
            }
            kills += 1;
            server = Some(place.serve_at(&address.to_string(), &[]));
        }
    });
    assert_rebooted(&sent);
    server.unwrap().wait_for("complete");
    assert_eq!((sent.attempt, place.crashes().len()), (2, 1));
    assert_whole(&place.crashes()[0], &host);
}

#[test]
fn a_server_that_knows_nothing_of_a_crash_has_it_sent_again() {
    let (place, key) = Place::new();
    let mut server = Some(place.serve(&[]));
    let address = server.as_ref().unwrap().address;
    let host = Host::new(&key, 1);
    let sent = host.crash_with(address, |packets| {
        if packets == 400 {
            server.take().unwrap().kill();
            fs::remove_dir_all(&place.crashes()[0]).unwrap();
            server = Some(place.serve_at(&address.to_string(), &[]));
        }
    });
    assert_rebooted(&sent);
    server.unwrap().wait_for("complete");
    assert_eq!(sent.attempt, 1);
    assert_whole(&place.crashes()[0], &host);
}

#[test]
fn a_client_that_starts_over_sends_only_what_is_missing() {
    let (place, key) = Place::new();
    let server = place.serve(&[]);
    let dying = Host {
        packets_max: Some(400),
        ..Host::new(&key, 1)
    };
    let sent = dying.crash(server.address);
    let before = spooled(&place.crashes()[0].join("spool"));
    let host = Host {
        attempt: 1,
        first: sent.next_packet,
        ..Host::new(&key, 1)
    };
    let again = host.crash(server.address);
    assert_rebooted(&again);
    server.wait_for("complete");
    assert_eq!(place.crashes().len(), 1);
    assert_whole(&place.crashes()[0], &host);
    assert!(before.len() > 100);
    assert!(read(&again, 1).is_disjoint(&before));
}

#[test]
fn a_host_that_fell_silent_goes_on_where_it_was() {
    let (place, key) = Place::new();
    let server = place.serve_here(Duration::from_millis(300), LONG);
    let host = Host {
        packets_max: Some(400),
        ..Host::new(&key, 1)
    };
    let sent = host.crash(server.address());
    assert!(sent.outcome.is_none());
    let crash = place.crashes().remove(0);
    wait_for_state(&crash, "incomplete");
    let file = session(&crash);
    assert_eq!(file["why"], "nothing was heard for 0.3 s");
    assert!(file["vmcore"]["pages_lost"].as_u64().unwrap() > 0);
    let image = dump::Reader::open(&crash.join("vmcore-incomplete")).unwrap();
    assert!(image.is_incomplete());
    let before = spooled(&crash.join("spool"));
    let again = Host {
        attempt: 1,
        first: sent.next_packet,
        ..Host::new(&key, 1)
    };
    let again_sent = again.crash(server.address());
    assert_rebooted(&again_sent);
    wait_for_state(&crash, "complete");
    server.stop();
    assert_eq!(place.crashes().len(), 1);
    assert_whole(&crash, &again);
    assert!(read(&again_sent, 1).is_disjoint(&before));
}

#[test]
fn a_cut_network_costs_no_packet_that_was_acknowledged() {
    let (place, key) = Place::new();
    let server = place.serve_here(Duration::from_millis(300), LONG);
    let host = Host {
        cut: Some((400, Duration::from_millis(1500))),
        ..Host::new(&key, 1)
    };
    let sent = host.crash(server.address());
    assert_rebooted(&sent);
    let crash = place.crashes().remove(0);
    wait_for_state(&crash, "complete");
    server.stop();
    // It was closed as silent in between and taken up again.
    assert_eq!(session(&crash)["resumed"], 1);
    assert_eq!((sent.attempt, place.crashes().len()), (0, 1));
    assert_whole(&crash, &host);
    read(&sent, 0);
}

#[test]
fn nobody_is_waited_for_longer_than_said() {
    let (place, key) = Place::new();
    let server = place.serve_here(Duration::from_millis(300), Duration::from_millis(300));
    let host = Host {
        packets_max: Some(400),
        ..Host::new(&key, 1)
    };
    let sent = host.crash(server.address());
    let crash = place.crashes().remove(0);
    wait_for_state(&crash, "incomplete");
    let give_up = Instant::now() + Duration::from_secs(10);
    while crash.join("spool").exists() {
        assert!(Instant::now() < give_up);
        std::thread::sleep(Duration::from_millis(20));
    }
    // Whoever comes later is taken, in a directory of its own.
    let late = Host {
        attempt: 1,
        first: sent.next_packet,
        ..Host::new(&key, 1)
    };
    assert_rebooted(&late.crash(server.address()));
    let other = place.crashes().remove(1);
    wait_for_state(&other, "complete");
    server.stop();
    assert_whole(&other, &late);
    assert_eq!(session(&crash)["state"], "incomplete");
}

#[test]
fn a_host_that_rebooted_and_crashed_again_has_two_crashes() {
    let (place, key) = Place::new();
    let server = place.serve(&[]);
    let first = Host {
        packets_max: Some(400),
        ..Host::new(&key, 1)
    };
    first.crash(server.address);
    let second = Host {
        boot: [2; 16],
        ..Host::new(&key, 2)
    };
    assert_rebooted(&second.crash(server.address));
    let incomplete = server.wait_for("incomplete");
    assert_eq!(incomplete["why"], "the host crashed again in a later life");
    let crashes = place.crashes();
    assert_eq!(crashes.len(), 2);
    wait_for_state(&crashes[1], "complete");
    wait_for_state(&crashes[0], "incomplete");
    assert_whole(&crashes[1], &second);
    assert!(crashes[0].join("vmcore-incomplete").exists());
    assert!(!crashes[0].join("spool").exists());
}

#[test]
fn another_crash_under_the_same_name_is_never_put_together_with_the_first() {
    let (place, key) = Place::new();
    let server = place.serve(&[]);
    let first = Host {
        packets_max: Some(400),
        ..Host::new(&key, 1)
    };
    let sent = first.crash(server.address);
    let second = Host {
        boot: [2; 16],
        attempt: 1,
        first: sent.next_packet,
        ..Host::new(&key, 1)
    };
    let again = second.crash(server.address);
    assert_rebooted(&again);
    server.wait_for("complete");
    let crashes = place.crashes();
    assert_eq!(crashes.len(), 2);
    assert_whole(&crashes[1], &second);
    let file = session(&crashes[0]);
    assert_eq!(file["state"], "incomplete", "{file}");
    assert!(crashes[0].join("vmcore-incomplete").exists());
    // All of it was sent, nothing taken from the first.
    assert_eq!(read(&again, 1).len() as u64, second.pages() - 1);
}

#[test]
fn a_client_that_starts_over_without_end_is_let_go() {
    let (place, key) = Place::new();
    let server = place.serve(&[]);
    let mut first = 0;
    for attempt in 0..=u16::try_from(SPOOLS_MAX).unwrap() {
        let host = Host {
            attempt,
            first,
            packets_max: Some(40),
            ..Host::new(&key, 1)
        };
        let sent = host.crash(server.address);
        first = sent.next_packet;
        if u32::from(attempt) < SPOOLS_MAX {
            assert!(sent.outcome.is_none(), "attempt {attempt}");
        } else {
            assert_eq!(sent.outcome.unwrap().action, Action::Reboot);
        }
    }
    assert_eq!(place.crashes().len(), 1);
    let drops = server.stop();
    assert!(drops["over_limit"].as_u64().unwrap() > 0, "{drops}");
}

/// A server whose files cannot grow beyond `blocks` of 512 bytes.
fn serve_limited(place: &Place, blocks: u32) -> Server {
    let inner = place.command("127.0.0.1:0", &[]);
    let mut command = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    command.arg("-c").arg(script).arg(inner.get_program());
    command.args(inner.get_args());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    place.start(&mut command)
}

#[test]
fn a_write_that_fails_ends_one_session_and_no_other() {
    let (place, key) = Place::new();
    let other = place.add_key("web2");
    let server = serve_limited(&place, 1000);
    let large = Host::new(&key, 1);
    let small = Host {
        ram: vec![(1, 200)],
        announced_pages: 200,
        ..Host::new(&other, 1)
    };
    let sent = std::thread::scope(|scope| {
        let large = scope.spawn(|| large.crash(server.address));
        assert_rebooted(&small.crash(server.address));
        large.join().unwrap()
    });
    let outcome = sent.outcome.unwrap();
    assert_eq!((outcome.action, outcome.complete), (Action::Reboot, false));
    let incomplete = server.wait_for("incomplete");
    let why = incomplete["why"].as_str().unwrap();
    assert!(why.contains("cannot write the"), "{why}");
    let crashes = place.crashes();
    wait_for_state(&crashes[1], "complete");
    assert_whole(&crashes[1], &small);
    wait_for_state(&crashes[0], "incomplete");
    // What arrived is there: as a vmcore, or in the spool if that does not fit either.
    assert!(
        fs::read_to_string(crashes[0].join("log"))
            .unwrap()
            .contains("Kernel panic")
    );
    let kept = crashes[0].join("vmcore-incomplete").exists() || crashes[0].join("spool").exists();
    assert!(kept);
}

/// A server whose dump directory is a file system of its own, of so many MiB; a shell in the same
/// mount namespace is reached through the server's `/proc` entry.
pub(crate) fn serve_on_small_disk(place: &Place, mib: u32) -> Server {
    fs::create_dir_all(place.dumps()).unwrap();
    let inner = place.command("127.0.0.1:0", &[]);
    let mut command = Command::new("unshare");
    let script = format!(
        "mount -t tmpfs -o size={mib}m none '{}' && exec \"$0\" \"$@\"",
        place.dumps().display()
    );
    command.args(["--mount", "--map-root-user", "sh", "-c"]);
    command
        .arg(script)
        .arg(inner.get_program())
        .args(inner.get_args());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    place.start(&mut command)
}

#[test]
fn a_disk_that_fills_up_costs_the_pages_but_not_the_log() {
    for (leave, verdict) in [(16_u64, "log-only"), (0, "nothing")] {
        let (place, key) = Place::new();
        let server = serve_on_small_disk(&place, 100);
        let dumps = format!("/proc/{}/root{}", server.id(), place.dumps().display());
        let host = Host::new(&key, 1);
        let sent = host.crash_with(server.address, |packets| {
            if packets == 300 {
                let mut filler = fs::File::create(format!("{dumps}/filler")).unwrap();
                let room = (100 - leave) << 20;
                let mut left = room;
                while left > 0 && filler.write_all(&vec![7; 1 << 20]).is_ok() {
                    left -= 1 << 20;
                }
                // Time for the server to see it, where it shall see it before it fails to write.
                std::thread::sleep(Duration::from_millis(if leave > 0 { 700 } else { 0 }));
            }
        });
        let outcome = sent.outcome.unwrap();
        assert_eq!(outcome.action, Action::Reboot, "{verdict}");
        while server.wait_for("verdict")["verdict"] != verdict {}
        let crash = fs::read_dir(&dumps)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| path.is_dir())
            .unwrap();
        assert!(
            fs::read_to_string(crash.join("log"))
                .unwrap()
                .contains("Kernel panic")
        );
        if verdict == "log-only" {
            assert!(outcome.complete);
            let complete = server.wait_for("complete");
            let pages = complete["pages"].as_u64().unwrap();
            assert!((1..999).contains(&pages), "{complete}");
            let log = fs::read_to_string(crash.join("log")).unwrap();
            assert!(log.contains("Mem-Info"), "{log}");
        } else {
            let incomplete = server.wait_for("incomplete");
            let why = incomplete["why"].as_str().unwrap();
            assert!(why.contains("No space left"), "{why}");
            assert!(spooled(&crash.join("spool")).len() > 50);
        }
    }
}

#[test]
fn a_disk_that_stalls_holds_up_nobody_else() {
    let (place, key) = Place::new();
    let other = place.add_key("web2");
    let server = place.serve(&["--filter", "0"]);
    let stalled = Host {
        give_up: LONG,
        ..Host::new(&key, 1)
    };
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| {
            stalled.crash_with(server.address, |packets| {
                if packets == 300 {
                    // From now on, whoever opens the log to write waits for a reader.
                    let dir = place.crashes().remove(0);
                    fs::rename(dir.join("log"), dir.join("kept")).unwrap();
                    let made = Command::new("mkfifo").arg(dir.join("log")).status();
                    assert!(made.unwrap().success());
                }
            })
        });
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!slow.is_finished());
        let host = Host {
            ram: vec![(2, 500)],
            announced_pages: 500,
            ..Host::new(&other, 1)
        };
        let sent = host.crash(server.address);
        assert_rebooted(&sent);
        assert!(sent.took < Duration::from_secs(2), "{:?}", sent.took);
        let (code, list, _) = place.run(&["list", "--json"]);
        assert_eq!(code, 0);
        assert!(list.contains("web1-"), "{list}");
        assert!(!slow.is_finished());
        // The disk is there again.
        let dir = place.crashes().remove(0);
        fs::rename(dir.join("log"), dir.join("fifo")).unwrap();
        fs::rename(dir.join("kept"), dir.join("log")).unwrap();
        let mut state = String::new();
        let mut fifo = fs::File::open(dir.join("fifo")).unwrap();
        fifo.read_to_string(&mut state).unwrap();
        fs::remove_file(dir.join("fifo")).unwrap();
        assert!(state.contains("task:init"), "{state}");
        let sent = slow.join().unwrap();
        assert_rebooted(&sent);
        assert!(sent.took > Duration::from_millis(1500));
        wait_for_state(&dir, "complete");
    });
}
