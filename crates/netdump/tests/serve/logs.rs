//! What was received is in the logs, or counted: a server that is overloaded, killed, out of disk,
//! or turns its files over while messages come.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::console::{host, logs};
use crate::faults::serve_on_small_disk;
use crate::server::{Place, Server};

const WAIT: Duration = Duration::from_secs(60);
/// What the kernel charges a small datagram to the socket that it waits in, at least.
const CHARGE_BYTES: u64 = 768;

/// A host whose records count from 0, with a uniform clock.
struct Speaker {
    socket: UdpSocket,
    to: SocketAddr,
    next: u64,
}

impl Speaker {
    fn new(number: u8, to: SocketAddr) -> Self {
        Self {
            socket: host(number),
            to,
            next: 0,
        }
    }

    /// One record; nobody may be listening.
    fn say(&mut self) {
        let seq = self.next;
        // Texts that do not pack well, so that packed parts have a size.
        let noise = seq.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let text = format!(
            "6,{seq},{},-,caller=T1;record {seq} {noise:016x}{:016x}{:016x}{:016x}\n",
            100_000_000 + seq,
            noise.rotate_left(13).wrapping_mul(31),
            noise.rotate_left(27).wrapping_mul(37),
            noise.rotate_left(41).wrapping_mul(41),
        );
        // A socket that was told that nobody listens says so once.
        drop(self.socket.send_to(text.as_bytes(), self.to));
        self.next += 1;
    }

    /// So many records, at a rate that a server takes without losing one.
    fn say_slowly(&mut self, records: u64) {
        for number in 0..records {
            self.say();
            if number % 64 == 63 {
                thread::sleep(Duration::from_millis(3));
            }
        }
    }
}

/// What a log says of its records.
#[derive(Debug, Default)]
struct Account {
    /// How often each number is there.
    records: BTreeMap<u64, u64>,
    /// Numbers that notes say are missing.
    named: BTreeSet<u64>,
    /// Notes, by kind.
    notes: BTreeMap<String, u64>,
}

impl Account {
    /// Reads what `netdump log --json` printed.
    fn of(text: &str) -> Self {
        let mut account = Self::default();
        for line in text.lines() {
            let entry: Value = serde_json::from_str(line).unwrap();
            let kind = entry["kind"].as_str().unwrap();
            if kind == "record" {
                let seq = entry["sequence"].as_u64().unwrap();
                *account.records.entry(seq).or_default() += 1;
                continue;
            }
            *account.notes.entry(kind.to_owned()).or_default() += 1;
            let number = |index: usize| entry["numbers"][index].as_u64().unwrap();
            if matches!(kind, "gap" | "lost") {
                account.named.extend(number(0)..=number(1));
            }
        }
        account
    }

    fn at(place: &Place, host: &str, more: &[&str]) -> Self {
        let (code, text, error) = place.run(&[&["log", host, "--json"], more].concat());
        assert_eq!(code, 0, "{error}");
        Self::of(&text)
    }

    /// Every number up to `end` is there once, or named as missing; how many are missing.
    fn check(&self, end: u64) -> u64 {
        let twice = self.records.iter().find(|&(_, &count)| count > 1);
        assert_eq!(twice, None);
        for seq in 0..end {
            assert!(
                self.records.contains_key(&seq) != self.named.contains(&seq),
                "record {seq} is neither there nor named, or both: {:?}",
                self.notes
            );
        }
        end - self.records.len() as u64
    }
}

/// Whole record lines in plain files of a host's directory.
fn record_lines(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let texts = entries.map(|entry| fs::read_to_string(entry.path()).unwrap());
    let is_record = |line: &&str| {
        let what = line.split_once(' ').map(|(_, what)| what);
        line.ends_with('\n') && what.is_some_and(|what| !what.starts_with('!'))
    };
    let count = |text: String| text.split_inclusive('\n').filter(is_record).count() as u64;
    texts.map(count).sum()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < WAIT, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn signal(server: &Server, name: &str) {
    let mut kill = Command::new("kill");
    let status = kill.arg(name).arg(server.id().to_string()).status();
    assert!(status.unwrap().success());
}

/// A server with no more room in its socket than the system gives everybody.
fn serve_with_little_room(place: &Place) -> Server {
    let inner = place.command("127.0.0.1:0", &[]);
    let mut command = Command::new("setpriv");
    command.args(["--inh-caps=-net_admin", "--bounding-set=-net_admin"]);
    command.arg(inner.get_program()).args(inner.get_args());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    place.start(&mut command)
}

#[test]
fn an_overloaded_server_has_written_or_counted_everything_that_was_sent() {
    let (place, _) = Place::new();
    let server = serve_with_little_room(&place);
    let mut speaker = Speaker::new(20, server.address);
    let room = fs::read_to_string("/proc/sys/net/core/rmem_max").unwrap();
    // The kernel doubles what is asked for; five times what fits comes while the server stands.
    let burst = room.trim().parse::<u64>().unwrap() * 2 / CHARGE_BYTES * 5;
    speaker.say();
    wait_until("the first record", || record_lines(&dir(&place, 20)) == 1);
    for _ in 0..6 {
        signal(&server, "-STOP");
        for _ in 0..burst {
            speaker.say();
        }
        signal(&server, "-CONT");
        thread::sleep(Duration::from_millis(300));
    }
    // The hosts' logs tell of it at most once a second.
    thread::sleep(Duration::from_millis(1100));
    speaker.say();
    thread::sleep(Duration::from_millis(500));
    let figures = server.stop_with("console");
    let count = |name: &str| figures[name].as_u64().unwrap();
    let (sent, written) = (speaker.next, count("written"));
    let lost = count("socket_drops") + count("inbox_drops");
    assert_eq!(sent, written + lost, "{figures}");
    assert!(sent > 3 * written, "{sent} sent, {written} written");
    assert_eq!(record_lines(&dir(&place, 20)), written);
    let account = Account::at(&place, "127.0.9.20", &[]);
    assert_eq!(account.check(sent), lost);
    assert!(account.notes["dropped"] > 0, "{:?}", account.notes);
}

fn dir(place: &Place, number: u8) -> PathBuf {
    let host = format!("127.0.9.{number}");
    place.dumps().join("console").join(host)
}

#[test]
fn a_killed_server_keeps_what_it_wrote_and_names_what_it_had_in_memory() {
    const BEFORE: u64 = 6000;
    const AFTER: u64 = 3000;
    let (place, _) = Place::new();
    let server = place.serve(&[]);
    let address = server.address;
    let mut speaker = Speaker::new(21, address);
    speaker.say_slowly(BEFORE / 2);
    wait_until("half of the records", || {
        record_lines(&dir(&place, 21)) == BEFORE / 2
    });
    speaker.say_slowly(BEFORE / 2);
    server.kill();
    let log = logs(&place, "127.0.9.21").remove(0);
    let kept = fs::read(&log).unwrap();
    // Nobody listens to these.
    speaker.say_slowly(100);
    let server = place.serve_at(&address.to_string(), &[]);
    speaker.say_slowly(AFTER);
    let last = speaker.next - 1;
    wait_until("the last record", || {
        let text = fs::read_to_string(&log).unwrap();
        text.contains(&format!("record {last} "))
    });
    let figures = server.stop_with("console");
    assert_eq!(figures["written"], AFTER, "{figures}");
    assert!(fs::read(&log).unwrap().starts_with(&kept), "append only");
    assert_eq!(logs(&place, "127.0.9.21").len(), 1, "one boot is one file");
    let account = Account::at(&place, "127.0.9.21", &[]);
    let missing = account.check(speaker.next);
    assert!(missing >= 100, "{missing}");
    assert_eq!(account.notes["resumed"], 1);
    // What was lost is what nobody listened to, and what had just come.
    let range = BEFORE / 2..BEFORE + 100;
    assert!(account.named.iter().all(|seq| range.contains(seq)));
}

/// `netdump log -f --json`, and what it has said.
struct Follower {
    child: Child,
    lines: thread::JoinHandle<Vec<String>>,
}

impl Follower {
    fn start(place: &Place, host: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_netdump"))
            .args(["log", host, "-f", "--since", "1d", "--json", "--dumpdir"])
            .arg(place.dumps())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let lines = thread::spawn(move || {
            let lines = output.lines().map_while(Result::ok);
            let mut all = Vec::new();
            for line in lines {
                let last = line.contains("the end of it");
                all.push(line);
                if last {
                    break;
                }
            }
            all
        });
        Self { child, lines }
    }

    /// Waits for the last record; everything that was shown.
    fn end(mut self) -> String {
        wait_until("the follower shows the end", || self.lines.is_finished());
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.lines.join().unwrap().join("\n")
    }
}

#[test]
fn parts_are_turned_and_packed_while_records_come_and_none_is_lost_or_shown_twice() {
    const RECORDS: u64 = 45_000;
    let (place, _) = Place::new();
    let config = place.dumps().with_file_name("small.toml");
    fs::write(&config, "[console]\npart_mib = 1\n").unwrap();
    let server = place.serve(&["--config", config.to_str().unwrap()]);
    let mut speaker = Speaker::new(22, server.address);
    speaker.say();
    wait_until("the first record", || record_lines(&dir(&place, 22)) == 1);
    let follower = Follower::start(&place, "127.0.9.22");
    speaker.say_slowly(RECORDS - 1);
    thread::sleep(Duration::from_millis(1200));
    let socket = &speaker.socket;
    socket
        .send_to(b"5,0,1000,-;another boot\n", server.address)
        .unwrap();
    socket
        .send_to(b"5,1,2000,-;the end of it\n", server.address)
        .unwrap();
    let shown = follower.end();
    let (first, second) = shown.split_at(shown.rfind("another boot").unwrap());
    let boot = first.rfind("\"kind\":\"boot\"").unwrap();
    let begin = first[..boot].rfind('\n').unwrap();
    assert_eq!(Account::of(&first[..begin]).check(RECORDS), 0);
    assert!(second.contains("the end of it"));
    let is_packed = |path: &PathBuf| path.extension().is_some_and(|end| end == "zst");
    wait_until("all but the last part are packed", || {
        let files = logs(&place, "127.0.9.22");
        files.len() > 5 && files.iter().filter(|path| !is_packed(path)).count() <= 2
    });
    assert_eq!(
        Account::at(&place, "127.0.9.22", &["--boot", "-1"]).check(RECORDS),
        0
    );
    let figures = server.stop_with("console");
    assert_eq!(figures["written"], RECORDS + 2, "{figures}");
}

#[test]
fn the_oldest_parts_are_removed_beyond_what_a_host_may_have() {
    const RECORDS: u64 = 30_000;
    let (place, _) = Place::new();
    let config = place.dumps().with_file_name("small.toml");
    fs::write(&config, "[console]\npart_mib = 1\nhost_mib = 1\n").unwrap();
    let server = place.serve(&["--config", config.to_str().unwrap()]);
    let mut speaker = Speaker::new(23, server.address);
    speaker.say_slowly(RECORDS);
    let bytes = || -> u64 {
        let files = logs(&place, "127.0.9.23");
        let sizes = files.iter().flat_map(fs::metadata);
        sizes.map(|file| file.len()).sum()
    };
    let figures = || Account::at(&place, "127.0.9.23", &[]);
    wait_until("the last record", || {
        figures().records.contains_key(&(RECORDS - 1))
    });
    wait_until("no more than may be", || bytes() <= 2 << 20);
    let records = figures().records;
    let first = *records.keys().next().unwrap();
    assert!(first > 0 && records.len() as u64 == RECORDS - first);
    server.stop();
}

/// Fills the file system of `dir`, but for less than a page.
fn fill(dir: &Path) {
    use std::io::Write as _;
    let mut file = File::create(dir.join("ballast")).unwrap();
    let piece = vec![0xff; 4096];
    while file.write_all(&piece).is_ok() {}
}

#[test]
fn a_full_disk_costs_nothing_when_it_is_emptied_and_what_is_told_when_it_is_not() {
    const RECORDS: u64 = 2000;
    let (place, _) = Place::new();
    let server = serve_on_small_disk(&place, 8);
    // The file system lives as long as this is open, seen from here or not.
    let seen = PathBuf::from(format!(
        "/proc/{}/root{}",
        server.id(),
        place.dumps().display()
    ));
    let open = File::open(&seen).unwrap();
    let disk = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
    let dir = disk.join("console/127.0.9.24");
    let mut speaker = Speaker::new(24, server.address);
    speaker.say_slowly(100);
    wait_until("the first records", || record_lines(&dir) == 100);
    fill(&disk);
    speaker.say_slowly(RECORDS);
    thread::sleep(Duration::from_millis(300));
    assert!(record_lines(&dir) < 100 + RECORDS, "the disk is not full");
    fs::remove_file(disk.join("ballast")).unwrap();
    wait_until("all records", || record_lines(&dir) == 100 + RECORDS);
    // Once more, and the server ends before there is room.
    fill(&disk);
    speaker.say_slowly(RECORDS);
    thread::sleep(Duration::from_millis(500));
    let figures = server.stop_with("console");
    let count = |name: &str| figures[name].as_u64().unwrap();
    assert_eq!((count("socket_drops"), count("inbox_drops")), (0, 0));
    assert!(count("unwritten") > 0, "{figures}");
    assert_eq!(count("written"), record_lines(&dir), "{figures}");
    assert_eq!(
        count("written") + count("unwritten"),
        speaker.next,
        "{figures}"
    );
    let account = account_of(&dir);
    assert_eq!(account.check(account.records.len() as u64), 0);
}

/// The account of plain files that no other program can see.
fn account_of(dir: &Path) -> Account {
    let mut account = Account::default();
    let entries = fs::read_dir(dir).unwrap().flatten();
    for text in entries.map(|entry| fs::read_to_string(entry.path()).unwrap()) {
        let words = text
            .lines()
            .filter_map(|line| line.split_once(";record ")?.1.split_once(' '));
        for (seq, _) in words.filter(|(_, noise)| noise.len() == 64) {
            *account.records.entry(seq.parse().unwrap()).or_default() += 1;
        }
    }
    account
}

#[test]
fn a_hole_before_silence_is_written_in_time_while_others_speak() {
    let (place, _) = Place::new();
    let server = place.serve(&[]);
    let mut others = Speaker::new(26, server.address);
    others.say();
    let begin = Instant::now();
    let socket = host(25);
    socket
        .send_to(b"6,1,100000000,-;one\n", server.address)
        .unwrap();
    // Number 2 is lost, and 4; a line of another kind has no end.
    for text in ["6,3,100000001,-;three\n", "6,5,100000002,-;five\n"] {
        socket.send_to(text.as_bytes(), server.address).unwrap();
    }
    let last = ";five\n";
    let written = || {
        let files = logs(&place, "127.0.9.25");
        let text = files.last().map(|path| fs::read_to_string(path).unwrap());
        text.is_some_and(|text| text.ends_with(last))
    };
    let mut took = None;
    wait_until("the record behind two holes", || {
        others.say();
        if took.is_none() && written() {
            took = Some(begin.elapsed());
        }
        took.is_some()
    });
    assert!(took.unwrap() < Duration::from_millis(500), "{took:?}");
    let account = Account::at(&place, "127.0.9.25", &[]);
    assert_eq!(account.named, BTreeSet::from([2, 4]));
    server.stop();
}
