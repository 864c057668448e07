//! `netdump serve` as a process, with real sockets on loopback and the real client engine on the
//! other side.

#[cfg(test)]
mod check;
#[cfg(test)]
mod console;
#[cfg(test)]
mod control;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod forward;
#[cfg(test)]
mod host;
#[cfg(test)]
mod logs;
#[cfg(test)]
mod server;
#[cfg(test)]
mod signatures;
#[cfg(test)]
mod storm;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::UdpSocket;
    use std::thread;
    use std::time::{Duration, Instant};

    use netdump::key::HostKey;
    use proto::keys::Secret;
    use proto::reply::Action;

    use crate::check::{LOG, assert_rebooted, assert_reported, assert_whole};
    use crate::host::Host;
    use crate::server::{Place, session};

    #[test]
    fn a_crash_arrives_whole() {
        for format in ["kdump", "elf"] {
            let (place, key) = Place::new();
            let server = place.serve(&["--format", format]);
            let host = Host::new(&key, 1);
            assert_rebooted(&host.crash(server.address));
            let complete = server.wait_for("complete");
            assert_eq!(complete["pages"], host.pages());
            let crash = &place.crashes()[0];
            let file = session(crash);
            assert_eq!(file["host"], "web1");
            assert_eq!(file["kernel"], "6.1.0-test");
            assert_eq!(file["reason"], "Kernel panic - not syncing: test");
            assert_eq!(file["task"]["comm"], "init");
            assert_eq!(file["cpus_captured"], 2);
            assert_eq!(file["vmcore"]["format"], format);
            assert_eq!(file["written"][0], serde_json::json!([5, 2, 1]));
            assert_whole(crash, &host);
            server.stop();
        }
    }

    #[test]
    fn a_vmcore_grows_while_its_pages_arrive() {
        let (place, key) = Place::new();
        let server = place.serve(&[]);
        let host = Host::new(&key, 1);
        let sent = host.crash_with(server.address, |packets| {
            if packets == 600 {
                let growing = place.crashes()[0].join("vmcore-growing");
                wait_until(|| growing.exists());
            }
        });
        assert_rebooted(&sent);
        server.wait_for("complete");
        let crash = &place.crashes()[0];
        assert_whole(crash, &host);
        assert!(!crash.join("vmcore-growing").exists());
    }

    fn wait_until(done: impl Fn() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < Duration::from_secs(20), "in vain");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn lost_packets_are_sent_again() {
        let (place, key) = Place::new();
        let server = place.serve(&[]);
        let host = Host {
            lose_every: Some(10),
            ..Host::new(&key, 1)
        };
        assert_rebooted(&host.crash(server.address));
        server.wait_for("complete");
        assert_whole(&place.crashes()[0], &host);
        assert_reported(&place.crashes()[0]);
    }

    #[test]
    fn garbage_is_counted_by_reason_and_harms_nobody() {
        let (place, key) = Place::new();
        let server = place.serve(&[]);
        let host = Host::new(&key, 1);
        let stranger = Host::new(&place.add_key("later"), 1);
        fs::remove_file(place.keys().join("later")).unwrap();
        let sink = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let real = Host {
            packets_max: Some(1),
            ..Host::new(&key, 2)
        }
        .crash(sink)
        .datagrams;
        let strange = Host {
            packets_max: Some(1),
            ..stranger
        }
        .crash(sink)
        .datagrams;
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let send = |bytes: &[u8]| socket.send_to(bytes, server.address).unwrap();
        for bytes in [&[][..], b"x", &real[0][..20], &real[0][..40]] {
            send(bytes);
        }
        for bytes in [
            &[0; 1400][..],
            b"6,416,1234,-;netconsole text",
            &[0xfe; 9000],
        ] {
            send(bytes);
        }
        let mut flipped = real[0].clone();
        flipped[100] ^= 1;
        send(&flipped);
        send(&strange[0]);
        assert_rebooted(&host.crash(server.address));
        server.wait_for("complete");
        let drops = server.stop();
        assert_eq!(drops["truncated"], 3, "{drops}");
        assert_eq!(drops["not_ours"], 1, "{drops}");
        assert_eq!(drops["bad_seal"], 1, "{drops}");
        assert_eq!(drops["unknown_key"], 1, "{drops}");
        assert_whole(&place.crashes()[0], &host);
    }

    #[test]
    fn a_wrong_key_makes_no_directory() {
        let (place, key) = Place::new();
        let server = place.serve(&[]);
        let wrong = HostKey {
            secret: Secret([9; 32]),
            ..key
        };
        let host = Host {
            give_up: Duration::from_millis(300),
            ..Host::new(&wrong, 1)
        };
        let sent = host.crash(server.address);
        assert_eq!(sent.outcome.unwrap().action, Action::None);
        let drops = server.stop();
        assert!(drops["bad_seal"].as_u64().unwrap() > 0, "{drops}");
        assert!(place.crashes().is_empty());
    }

    #[test]
    fn a_second_crash_of_the_same_host_gets_a_directory_of_its_own() {
        let (place, key) = Place::new();
        let server = place.serve(&[]);
        let hosts = [Host::new(&key, 1), Host::new(&key, 2)];
        thread::scope(|scope| {
            for host in &hosts {
                scope.spawn(|| assert_rebooted(&host.crash(server.address)));
            }
        });
        server.wait_for("complete");
        server.wait_for("complete");
        assert_eq!(place.crashes().len(), 2);
        for crash in place.crashes() {
            assert_whole(&crash, &hosts[0]);
        }
    }

    #[test]
    fn a_killed_server_goes_on_from_the_spool_even_if_that_is_torn() {
        let (place, key) = Place::new();
        let mut server = Some(place.serve(&[]));
        let address = server.as_ref().unwrap().address;
        let listen = address.to_string();
        let host = Host::new(&key, 1);
        let sent = host.crash_with(address, |packets| {
            if packets == 400 {
                server.take().unwrap().kill();
                let spool = place.crashes()[0].join("spool");
                let mut bytes = fs::read(&spool).unwrap();
                bytes.extend_from_slice(&[7; 1000]);
                fs::write(&spool, bytes).unwrap();
                server = Some(place.serve_at(&listen, &[]));
            }
        });
        assert_rebooted(&sent);
        let server = server.unwrap();
        server.wait_for("complete");
        assert_eq!(place.crashes().len(), 1);
        assert_whole(&place.crashes()[0], &host);
    }

    #[test]
    fn a_server_that_was_stopped_goes_on_too() {
        let (place, key) = Place::new();
        let mut server = Some(place.serve(&[]));
        let address = server.as_ref().unwrap().address;
        let host = Host::new(&key, 1);
        let sent = host.crash_with(address, |packets| {
            if packets == 400 {
                server.take().unwrap().stop();
                server = Some(place.serve_at(&address.to_string(), &[]));
            }
        });
        assert_rebooted(&sent);
        server.unwrap().wait_for("complete");
        assert_whole(&place.crashes()[0], &host);
    }

    #[test]
    fn replayed_packets_of_a_finished_crash_begin_nothing_even_after_a_restart() {
        let (place, key) = Place::new();
        let server = place.serve(&[]);
        let sent = Host::new(&key, 1).crash(server.address);
        server.wait_for("complete");
        server.stop();
        let server = place.serve(&[]);
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        for datagram in sent.datagrams.iter().take(20) {
            socket.send_to(datagram, server.address).unwrap();
        }
        // A client that lost the last reply is told again.
        let host = Host {
            attempt: 1,
            first: sent.next_packet,
            ..Host::new(&key, 1)
        };
        assert_eq!(
            host.crash(server.address).outcome.unwrap().action,
            Action::Reboot
        );
        server.stop();
        assert_eq!(place.crashes().len(), 1);
    }

    #[test]
    fn log_only_keeps_log_and_registers() {
        let (place, key) = Place::new();
        let server = place.serve(&["--verdict", "log-only"]);
        assert_rebooted(&Host::new(&key, 1).crash(server.address));
        server.wait_for("complete");
        let crash = &place.crashes()[0];
        let file = session(crash);
        assert_eq!(file["state"], "log-only", "{file}");
        assert_eq!(file["pages"]["data"], 0);
        assert_eq!(fs::read_to_string(crash.join("log")).unwrap(), LOG);
        let image = dump::Reader::open(&crash.join("vmcore-incomplete")).unwrap();
        assert!(image.cpus().iter().all(|cpu| cpu.registers.is_some()));
    }

    #[test]
    fn a_crash_larger_than_the_disk_is_log_only_and_says_why() {
        // All of the memory, or what is expected to be left of it at the usual filter level.
        for (filter, mib) in [("0", 4_294_967_360_u64), ("31", 1_073_741_888)] {
            let (place, key) = Place::new();
            let server = place.serve(&["--filter", filter]);
            let host = Host {
                announced_pages: 1 << 40,
                ..Host::new(&key, 1)
            };
            assert_rebooted(&host.crash(server.address));
            let verdict = server.wait_for("verdict");
            assert_eq!(verdict["verdict"], "log-only");
            let need = format!("this one may need {mib} MiB");
            assert!(
                verdict["why"].as_str().unwrap().contains(&need),
                "{verdict}"
            );
            server.wait_for("complete");
            assert_eq!(session(&place.crashes()[0])["state"], "log-only");
        }
    }

    #[test]
    fn a_server_killed_while_it_writes_the_vmcore_writes_it_again() {
        let (place, key) = Place::new();
        let server = place.serve(&[]);
        let host = Host::new(&key, 1);
        assert_rebooted(&host.crash(server.address));
        server.wait_for("received");
        server.kill();
        let unfinished = place.crashes()[0].join("spool").exists();
        let server = place.serve(&[]);
        if unfinished {
            server.wait_for("complete");
        }
        assert_whole(&place.crashes()[0], &host);
    }

    #[test]
    fn verdict_reboot_lets_the_host_go_at_once() {
        let (place, key) = Place::new();
        let server = place.serve(&["--verdict", "reboot"]);
        let sent = Host::new(&key, 1).crash(server.address);
        assert_eq!(sent.outcome.unwrap().action, Action::Reboot);
        assert!(sent.datagrams.len() < 100);
        server.wait_for("incomplete");
        assert_eq!(session(&place.crashes()[0])["state"], "incomplete");
    }

    #[test]
    fn a_key_that_is_added_later_needs_no_restart() {
        let (place, _) = Place::new();
        let server = place.serve(&[]);
        let host = Host::new(&place.add_key("db1"), 1);
        assert_rebooted(&host.crash(server.address));
        server.wait_for("complete");
        assert_whole(&place.crashes()[0], &host);
    }

    #[test]
    fn what_keeps_a_server_from_starting_is_said_in_one_line() {
        let (place, _) = Place::new();
        let server = place.serve(&[]);
        let listen = server.address.to_string();
        let (other, _) = Place::new();
        let text = other.refuse(&listen, &[]);
        assert!(
            text.contains(&format!("cannot listen on {listen}")) && text.contains("in use"),
            "{text}"
        );
        let text = place.refuse("127.0.0.1:0", &[]);
        assert!(
            text.contains("another netdump serve uses the dump directory"),
            "{text}"
        );

        let (place, _) = Place::new();
        fs::write(place.dumps(), "a file").unwrap();
        let text = place.refuse("127.0.0.1:0", &[]);
        assert!(text.contains("cannot make the dump directory"), "{text}");

        let (place, _) = Place::new();
        fs::remove_file(place.keys().join("web1")).unwrap();
        let text = place.refuse("127.0.0.1:0", &[]);
        assert!(
            text.contains("no usable key") && text.contains("netdump key new"),
            "{text}"
        );
    }

    #[test]
    fn two_hosts_cannot_be_confused() {
        let (place, key) = Place::new();
        let other = place.add_key("web2");
        let server = place.serve(&[]);
        let hosts = [
            Host::new(&key, 1),
            Host {
                ram: vec![(2, 500)],
                announced_pages: 500,
                ..Host::new(&other, 1)
            },
        ];
        thread::scope(|scope| {
            for host in &hosts {
                scope.spawn(|| assert_rebooted(&host.crash(server.address)));
            }
        });
        server.wait_for("complete");
        server.wait_for("complete");
        for (crash, host) in place.crashes().iter().zip(&hosts) {
            assert_eq!(session(crash)["host"], host.key.host.as_str());
            assert_whole(crash, host);
        }
    }
}
