//! Console messages into a real server: what is sent is in the log, whatever the way does to it.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use netdump::key::HostKey;
use proto::console::{Caller, Head, LogReply, LogWriter, Range, RecordHead};
use proto::units::{ArmingId, PacketNumber, SessionId};
use proto::wire::{HEADER_BYTES, Header, Kind, open_server, seal_client};

use crate::server::{Place, Server};

const WAIT: Duration = Duration::from_secs(20);

/// A host that sends from an address of its own.
pub(crate) fn host(number: u8) -> UdpSocket {
    UdpSocket::bind(SocketAddr::new([127, 0, 9, number].into(), 0)).unwrap()
}

pub(crate) fn logs(place: &Place, host: &str) -> Vec<PathBuf> {
    let dir = place.dumps().join("console").join(host);
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
}

/// Lines of a log, without their times.
fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let without_time = |line: &str| line.split_once(' ').unwrap().1.to_owned();
    text.lines().map(without_time).collect()
}

/// Waits until there are `count` logs and the last one ends with `last`.
fn wait_for(place: &Place, host: &str, count: usize, last: &str) -> Vec<PathBuf> {
    let begin = Instant::now();
    loop {
        let logs = logs(place, host);
        let end = logs.last().map(|path| fs::read_to_string(path).unwrap());
        if logs.len() == count
            && end
                .as_ref()
                .is_some_and(|text| text.trim_end().ends_with(last))
        {
            return logs;
        }
        assert!(begin.elapsed() < WAIT, "{logs:?} end with {end:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn messages_are_in_their_hosts_log_with_what_is_missing_named() {
    let (place, _) = Place::new();
    let server = place.serve(&[]);
    let socket = host(1);
    let send = |text: &str| socket.send_to(text.as_bytes(), server.address).unwrap();
    send("6,1,100000000,-,caller=T1;one\n SUBSYSTEM=net\n");
    send("4,3,100000300,-,ncfrag=3/6;ee\n");
    send("4,3,100000300,-,ncfrag=0/6;thr");
    let sent = Instant::now();
    let logs = wait_for(&place, "127.0.9.1", 1, ";three");
    assert!(
        sent.elapsed() < Duration::from_millis(500),
        "a hole before silence"
    );
    assert_eq!(
        lines(&logs[0]),
        [
            "!boot,1;a boot begins\trelease=-",
            "6,1,100000000,-,caller=T1;one\tSUBSYSTEM=net",
            "!gap,2,2;1 records, 2 to 2, did not come: lost, or held back by the host's log level",
            "4,3,100000300,-;three",
        ]
    );
    server.stop();
    let (code, text, _) = place.run(&["log", "127.0.9.1", "--level", "4"]);
    let shown: Vec<&str> = text.lines().filter(|line| !line.contains(" -- ")).collect();
    assert_eq!((code, shown.len()), (0, 1), "{text}");
    assert!(shown[0].ends_with(" [  100.000300] three"), "{text}");
    let (_, text, _) = place.run(&["log", "127.0.9.1", "--json", "--grep", "one", "--boot", "0"]);
    let object: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&object["sequence"], &object["caller"]),
        (&1.into(), &"T1".into())
    );
    assert_eq!(object["dictionary"]["SUBSYSTEM"], "net");
    let (code, _, error) = place.run(&["log", "127.0.9.9"]);
    assert!(code == 1 && error.contains("logs of 127.0.9.1"), "{error}");
}

#[test]
fn a_restarted_server_goes_on_in_the_same_boot_and_another_boot_begins_a_file() {
    let (place, _) = Place::new();
    let server = place.serve(&[]);
    let socket = host(2);
    socket
        .send_to(b"6,7,100000000,-;seven\n", server.address)
        .unwrap();
    socket
        .send_to(b"6,9,100000001,-;nine\n", server.address)
        .unwrap();
    // It ends before the hole's time is over, and writes what it has.
    thread::sleep(Duration::from_millis(50));
    server.stop();
    let server = place.serve(&[]);
    socket
        .send_to(b"6,10,100000002,-;ten\n", server.address)
        .unwrap();
    let logs = wait_for(&place, "127.0.9.2", 1, ";ten");
    let text = lines(&logs[0]).join(" ");
    assert!(
        text.contains(";nine !resumed;") && text.contains("!gap,8,8;"),
        "{text}"
    );
    thread::sleep(Duration::from_millis(600));
    socket
        .send_to(b"5,0,0,-;Linux version 6\n", server.address)
        .unwrap();
    let logs = wait_for(&place, "127.0.9.2", 2, ";Linux version 6");
    assert_eq!(lines(&logs[0]).last().unwrap(), "6,10,100000002,-;ten");
    server.stop();
}

#[test]
fn what_is_malformed_or_not_allowed_is_counted() {
    let (place, _) = Place::new();
    let config = place.dumps().with_file_name("netdump.toml");
    fs::write(
        &config,
        "[console]\nallow = ['127.0.9.3']\ndatagrams_per_second = 5\n[console.hosts]\n'127.0.9.3' = 'db1'\n",
    )
    .unwrap();
    let server = place.serve(&["--config", config.to_str().unwrap()]);
    host(4)
        .send_to(b"[ 1.000000] stranger\n", server.address)
        .unwrap();
    let socket = host(3);
    for number in 0..50 {
        socket
            .send_to(format!("9999,{number},1;\0").as_bytes(), server.address)
            .unwrap();
    }
    wait_for(&place, "db1", 1, "\\x00");
    thread::sleep(Duration::from_millis(1100));
    socket.send_to(b"last\n", server.address).unwrap();
    let log = wait_for(&place, "db1", 1, ";last").remove(0);
    let written = lines(&log);
    let raw = written
        .iter()
        .filter(|line| line.starts_with("!raw,"))
        .count();
    let limited = written
        .iter()
        .find(|line| line.starts_with("!limited,"))
        .unwrap();
    // All within one second, or within two.
    assert!(raw == 5 || raw == 10, "{raw}");
    assert!(
        limited.starts_with(&format!("!limited,{};", 50 - raw)) || raw == 10,
        "{limited}"
    );
    let figures = server.stop_with("console");
    assert_eq!(figures["refused"], 1, "{figures}");
    assert_eq!(figures["malformed"], raw, "{figures}");
    assert_eq!(figures["written"], raw + 1, "{figures}");
    assert_eq!(figures["limited"], 50 - raw, "{figures}");
    assert!(logs(&place, "127.0.9.4").is_empty());
}

/// A host of our own that says `records`, from sequence number `first` on.
fn say(key: &HostKey, number: u64, first: u64, records: &[&str]) -> Vec<u8> {
    let mut buffer = vec![0; 1400];
    let head = Head {
        boot: [0x2a; 16],
        kernel_us: 100,
        ..Head::default()
    };
    let payload = &mut buffer[HEADER_BYTES..1400 - 16];
    let mut writer = LogWriter::new(payload, first).unwrap();
    for text in records {
        writer.room()[..text.len()].copy_from_slice(text.as_bytes());
        let record = RecordHead {
            time_us: 100_000_000,
            level: 4,
            facility: 0,
            caller: Caller::Task(7),
            continued: false,
            cut: false,
        };
        writer.record(&record, text.len(), 0).unwrap();
    }
    let length = writer.finish(&head).unwrap();
    let header = Header {
        kind: Kind::Log,
        attempt: 0,
        session: session_of(key),
        number: PacketNumber(number),
    };
    let keys = key.secret.log_keys(header.session);
    let length = seal_client(&keys.client, &header, &mut buffer, length).unwrap();
    buffer.truncate(length);
    buffer
}

fn session_of(key: &HostKey) -> SessionId {
    SessionId {
        key: key.id,
        arming: ArmingId(5),
    }
}

/// Waits for a reply that says that all below `next` is written; what it asks for.
fn reply(key: &HostKey, socket: &UdpSocket, next: u64) -> Vec<Range> {
    let keys = key.secret.log_keys(session_of(key));
    socket.set_read_timeout(Some(WAIT)).unwrap();
    loop {
        let mut buffer = [0; 1400];
        let length = socket.recv(&mut buffer).unwrap();
        let datagram = &mut buffer[..length];
        let header = Header::parse(datagram).unwrap();
        assert_eq!(header.kind, Kind::LogReply);
        let (_, payload) = open_server(&keys.server, &header, datagram).unwrap();
        let reply = LogReply::decode(payload).unwrap();
        if reply.next == next {
            return reply.asked().to_vec();
        }
    }
}

#[test]
fn sealed_records_are_acknowledged_when_written_and_asked_for_again() {
    let (place, key) = Place::new();
    let server = place.serve(&[]);
    let socket = host(5);
    let send = |server: &Server, datagram: &[u8]| socket.send_to(datagram, server.address).unwrap();
    send(&server, &say(&key, 0, 0, &["zero", "one\nmore"]));
    send(&server, &say(&key, 1, 4, &["four"]));
    assert_eq!(reply(&key, &socket, 2), [Range { first: 2, end: 4 }]);
    send(&server, &say(&key, 2, 2, &["two", "three"]));
    assert_eq!(reply(&key, &socket, 5), []);
    let log = wait_for(&place, "web1", 1, ";four").remove(0);
    assert!(
        log.to_str().unwrap().ends_with("-2a2a2a2a.0000.log"),
        "{log:?}"
    );
    let mut forged = say(&key, 3, 5, &["forged"]);
    forged[60] ^= 1;
    send(&server, &forged);
    let drops = server.stop();
    assert_eq!(drops["bad_seal"], 1, "{drops}");
    // Another server knows from the log how far the first one has come.
    let server = place.serve(&[]);
    send(&server, &say(&key, 4, 5, &[]));
    assert_eq!(reply(&key, &socket, 5), []);
    send(&server, &say(&key, 5, 5, &["five"]));
    send(&server, &say(&key, 6, 7, &["seven"]));
    let silent = Instant::now();
    // The host is silent, and may be dead: what came behind the hole is written.
    wait_for(&place, "web1", 1, ";seven");
    let took = silent.elapsed();
    assert!(took < Duration::from_secs(3), "{took:?}");
    // It was only held up.
    send(&server, &say(&key, 7, 6, &["six"]));
    assert_eq!(reply(&key, &socket, 8), []);
    send(&server, &say(&key, 8, 9, &["nine"]));
    let log = wait_for(&place, "web1", 1, "asked for in vain").remove(0);
    let expected = [
        "!boot,0;a boot begins\trelease=-",
        "4,0,100000000,-,caller=T7;zero",
        "4,1,100000000,-,caller=T7;one\\x0amore",
        "4,2,100000000,-,caller=T7;two",
        "4,3,100000000,-,caller=T7;three",
        "4,4,100000000,-,caller=T7;four",
        "4,5,100000000,-,caller=T7;five",
        "!gap,6,6;1 records, 6 to 6, have not come yet",
        "4,7,100000000,-,caller=T7;seven",
        "4,6,100000000,-,caller=T7;six",
        "!gap,8,8;1 records, 8 to 8, have not come yet",
        "4,9,100000000,-,caller=T7;nine",
        "!lost,8,8,1;1 records, 8 to 8, are lost: asked for in vain",
    ];
    assert_eq!(lines(&log), expected);
    let figures = server.stop_with("console");
    let count = |name: &str| figures[name].as_u64().unwrap();
    assert_eq!((count("written"), count("late")), (4, 1), "{figures}");
    assert_eq!((count("gaps"), count("lost")), (2, 1), "{figures}");
}
