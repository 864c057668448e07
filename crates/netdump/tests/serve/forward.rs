//! What is forwarded, at the other end: a plain receiver in this process, and, where they are
//! installed, a real rsyslogd and a decoder of OpenTelemetry's own.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::host::Host;
use crate::server::{Place, Server};

const WAIT: Duration = Duration::from_secs(60);

/// Writes a configuration; the arguments that name it.
fn config(place: &Place, text: &str) -> [String; 2] {
    let path = place.keys().with_file_name("netdump.toml");
    fs::write(&path, text).unwrap();
    ["--config".to_owned(), path.to_str().unwrap().to_owned()]
}

fn serve(place: &Place, text: &str) -> Server {
    let [flag, path] = config(place, text);
    place.serve(&[&flag, &path])
}

/// A port that nobody has now.
fn free_port() -> u16 {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

/// A host that says numbered messages, some thousand a second.
struct Talker {
    socket: UdpSocket,
    to: SocketAddr,
    said: u64,
}

impl Talker {
    fn new(number: u8, server: &Server) -> Self {
        let own = SocketAddr::new([127, 0, 10, number].into(), 0);
        Self {
            socket: UdpSocket::bind(own).unwrap(),
            to: server.address,
            said: 0,
        }
    }

    fn say(&mut self, messages: u64) {
        for number in self.said..self.said + messages {
            let text = format!("6,{number},{},-;message {number};\n", 100_000_000 + number);
            self.socket.send_to(text.as_bytes(), self.to).unwrap();
            if number % 20 == 19 {
                thread::sleep(Duration::from_millis(5));
            }
        }
        self.said += messages;
    }
}

/// How often each numbered message is in `text`.
fn numbers(text: &str) -> BTreeMap<u64, u64> {
    let mut counts = BTreeMap::new();
    for rest in text.split("message ").skip(1) {
        if let Some((digits, _)) = rest.split_once(';')
            && let Ok(number) = digits.parse()
        {
            *counts.entry(number).or_default() += 1;
        }
    }
    counts
}

/// All of 0 to `said` are there, and those that came more than once were counted.
fn assert_all(text: &str, said: u64, row: &Value) {
    let counts = numbers(text);
    let missing: Vec<u64> = (0..said).filter(|n| !counts.contains_key(n)).collect();
    let twice: u64 = counts.values().map(|count| count - 1).sum();
    assert!(missing.is_empty(), "{missing:?} are missing; {row}");
    assert!(twice <= row["repeated"].as_u64().unwrap(), "{twice}; {row}");
    assert_eq!((&row["dropped"], &row["spooled"]), (&0.into(), &0.into()));
}

/// Waits until what `text` gives has `count` numbers.
fn wait_for(count: u64, text: impl Fn() -> String) {
    let begin = Instant::now();
    while (numbers(&text()).len() as u64) < count {
        assert!(
            begin.elapsed() < WAIT,
            "{} of {count}",
            numbers(&text()).len()
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// Reads frames of octet counting, strictly, until the connection ends.
fn frames(stream: TcpStream) -> Vec<String> {
    let mut reader = BufReader::new(stream);
    let mut frames = Vec::new();
    loop {
        let mut length = Vec::new();
        if reader.read_until(b' ', &mut length).unwrap_or(0) == 0 {
            return frames;
        }
        let length = String::from_utf8(length).unwrap();
        let mut frame = vec![0; length.trim_end().parse().unwrap()];
        reader.read_exact(&mut frame).unwrap();
        frames.push(String::from_utf8(frame).unwrap());
    }
}

#[test]
fn records_and_a_summary_of_a_crash_are_forwarded() {
    let (place, key) = Place::new();
    let receiver = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = receiver.local_addr().unwrap();
    let received = thread::spawn(move || frames(receiver.accept().unwrap().0));
    let server = serve(
        &place,
        &format!("[[forward]]\nname = 'siem'\nto = 'tcp://{to}'\nlevel = 5\n"),
    );
    let host = UdpSocket::bind("127.0.10.1:0").unwrap();
    for text in [
        "4,7,100000000,-,caller=T9;a\\x09b\n SUBSYSTEM=net\n",
        "6,8,100000001,-;not of this level\n",
        "9999,1,1;malformed",
        "5,9,100000002,-;last\n",
    ] {
        host.send_to(text.as_bytes(), server.address).unwrap();
    }
    host.send_to(
        b"<13>1 2026-11-24T18:02:00Z relay - - - - hello\n",
        server.address,
    )
    .unwrap();
    let crash = Host::new(&key, 1);
    crash.crash(server.address);
    server.wait_for("complete");
    thread::sleep(Duration::from_millis(500));
    assert_status(&place);
    let row = server.stop_with("forward");
    let frames = received.join().unwrap();
    let without_time = |frame: &String| {
        let (head, rest) = frame.split_once(' ').unwrap();
        let (time, rest) = rest.split_once(' ').unwrap();
        assert!(time.ends_with('Z') && time.len() == 27, "{frame}");
        format!("{head} {rest}")
    };
    let mut shown: Vec<String> = frames.iter().map(without_time).collect();
    let summary = shown.pop().unwrap();
    assert_eq!(
        shown,
        [
            "<4>1 127.0.10.1 kernel T9 - [meta sequenceId=\"8\" sysUpTime=\"10000\"] [  100.000000] \
             a\tb",
            "<44>1 127.0.10.1 netdump - raw - Malformed(Prefix): 9999,1,1;malformed",
            "<5>1 127.0.10.1 kernel - - [meta sequenceId=\"10\" sysUpTime=\"10000\"] [  100.000002] \
             last",
        ]
    );
    let vmcore = place.crashes()[0].join("vmcore");
    let begin = "<26>1 web1 netdump - crash - crash of web1: ";
    assert!(summary.starts_with(begin), "{summary}");
    for part in [
        "panic",
        "kernel 6.1.0-test",
        "complete",
        vmcore.to_str().unwrap(),
    ] {
        assert!(summary.contains(part), "{part}: {summary}");
    }
    assert_eq!(
        (&row["sent"], &row["spooled"]),
        (&4.into(), &0.into()),
        "{row}"
    );
}

/// What `netdump status` says of the messages of the test above.
fn assert_status(place: &Place) {
    let (code, text, error) = place.run(&["status", "--json"]);
    assert_eq!(code, 0, "{error}");
    let status: Value = serde_json::from_str(&text).unwrap();
    let server = &status["server"];
    assert_eq!(server["looped"], 1, "{text}");
    assert_eq!(server["forward"][0]["sent"], 4, "{text}");
    assert_eq!(server["console"]["written"], 5, "{text}");
    let host = &server["hosts"]["rows"][0];
    assert_eq!(host["host"], "127.0.10.1", "{text}");
    assert_eq!(
        (&host["records"], &host["gaps"]),
        (&4.into(), &0.into()),
        "{text}"
    );
    let (_, text, _) = place.run(&["status"]);
    let row = text.lines().last().unwrap();
    assert!(
        row.starts_with("127.0.10.1  ") && row.contains("  4  "),
        "{text}"
    );
    assert!(text.contains("forwarded to siem (tcp://"), "{text}");
}

#[test]
fn our_own_port_and_a_bad_certificate_are_refused_at_start() {
    let (place, _) = Place::new();
    let port = free_port();
    let [flag, path] = config(
        &place,
        &format!("[[forward]]\nname = 'loop'\nto = 'udp://127.0.0.1:{port}'\n"),
    );
    let text = place.refuse(&format!("0.0.0.0:{port}"), &[&flag, &path]);
    assert!(text.contains("this server's own port"), "{text}");
    let [flag, path] = config(
        &place,
        "[[forward]]\nname = 'a'\nto = 'tls://a'\nca = '/nonexistent/ca.pem'\n",
    );
    let text = place.refuse("127.0.0.1:0", &[&flag, &path]);
    assert!(text.contains("/nonexistent/ca.pem"), "{text}");
}

#[test]
fn what_a_target_misses_waits_within_bounds_and_what_is_dropped_is_told() {
    let (place, _) = Place::new();
    let to = format!("127.0.0.1:{}", free_port());
    let text = format!("[[forward]]\nname = 'siem'\nto = 'tcp://{to}'\nspool_mib = 1\n");
    let server = serve(&place, &text);
    let mut talker = Talker::new(2, &server);
    talker.say(3000);
    // Another server, after a kill, goes on with the same spool.
    wait_for(3000, || spooled(&place));
    server.kill();
    let server = serve(&place, &text);
    talker.to = server.address;
    talker.say(12_000);
    thread::sleep(Duration::from_millis(500));
    let receiver = TcpListener::bind(&to).unwrap();
    let received = thread::spawn(move || frames(receiver.accept().unwrap().0));
    let begin = Instant::now();
    while !spooled(&place).contains("were not forwarded") {
        assert!(begin.elapsed() < WAIT);
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(Duration::from_millis(500));
    let row = server.stop_with("forward");
    let frames = received.join().unwrap();
    let dropped = row["dropped"].as_u64().unwrap();
    assert!(dropped > 0, "{row}");
    assert_eq!(
        numbers(&frames.concat()).len() as u64 + dropped,
        talker.said
    );
    let told = frames.iter().filter_map(|frame| {
        let (_, rest) = frame.split_once(" netdump - dropped - ")?;
        rest.split(' ').next()?.parse::<u64>().ok()
    });
    assert_eq!(told.sum::<u64>(), dropped);
}

/// What is in the spool of the target `siem`.
fn spooled(place: &Place) -> String {
    let dir = place.dumps().join("forward/siem");
    let paths = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = paths.map(|entry| entry.path()).collect();
    paths.sort();
    paths
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect()
}

/// An rsyslogd of a test.
struct Rsyslog {
    dir: PathBuf,
    child: Child,
}

impl Rsyslog {
    fn start(dir: &Path, config: &str) -> Self {
        fs::create_dir_all(dir.join("work")).unwrap();
        let out = dir.join("out");
        let text = format!(
            "global(workDirectory=\"{}\" maxMessageSize=\"16k\")\n\
             main_queue(queue.timeoutShutdown=\"20000\")\n{config}\n\
             template(name=\"raw\" type=\"string\" string=\"%rawmsg%\\n\")\n\
             action(type=\"omfile\" file=\"{}\" template=\"raw\" asyncWriting=\"off\")\n",
            dir.join("work").display(),
            out.display()
        );
        let path = dir.join("rsyslog.conf");
        fs::write(&path, text).unwrap();
        let child = Command::new("rsyslogd")
            .args(["-n", "-f", path.to_str().unwrap()])
            .args(["-i", dir.join("pid").to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.join("err")).unwrap())
            .spawn()
            .unwrap();
        let dir = dir.to_owned();
        Self { dir, child }
    }

    fn text(&self) -> String {
        fs::read_to_string(self.dir.join("out")).unwrap_or_default()
    }

    /// Ends it in good order.
    fn stop(mut self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").arg(id).status().unwrap().success());
        self.child.wait().unwrap();
    }
}

impl Drop for Rsyslog {
    fn drop(&mut self) {
        // Already ended, but for a test that panicked.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A target that is stopped and started again in the middle gets each message.
fn through_a_restart(number: u8, to: &str, rsyslog: &str, quiet: Duration) {
    let (place, _) = Place::new();
    let dir = place.keys().with_file_name("rsyslog");
    let target = Rsyslog::start(&dir, rsyslog);
    // It has no sign of being ready but that it is.
    thread::sleep(Duration::from_millis(700));
    let server = serve(&place, &format!("[[forward]]\nname = 'siem'\n{to}"));
    let mut talker = Talker::new(number, &server);
    talker.say(3000);
    thread::sleep(quiet);
    if quiet > Duration::ZERO {
        wait_for(3000, || target.text());
    }
    target.stop();
    talker.say(3000);
    let target = Rsyslog::start(&dir, rsyslog);
    talker.say(3000);
    wait_for(9000, || target.text());
    let row = server.stop_with("forward");
    thread::sleep(Duration::from_millis(200));
    assert_all(&target.text(), 9000, &row);
    assert!(row["retries"].as_u64().unwrap() > 0, "{row}");
    println!("{row}");
    target.stop();
}

#[test]
#[ignore = "needs rsyslogd: cargo xtask test runs it where that is installed"]
fn rsyslogd_by_udp() {
    let port = free_port();
    through_a_restart(
        3,
        &format!("to = 'udp://127.0.0.1:{port}'\n"),
        &format!(
            "module(load=\"imudp\")\ninput(type=\"imudp\" address=\"127.0.0.1\" port=\"{port}\")"
        ),
        // What is in its socket when it ends is lost, and nobody can know.
        Duration::from_secs(1),
    );
}

#[test]
#[ignore = "needs rsyslogd: cargo xtask test runs it where that is installed"]
fn rsyslogd_by_tcp() {
    let port = free_port();
    through_a_restart(
        4,
        &format!("to = 'tcp://127.0.0.1:{port}'\n"),
        &format!(
            "module(load=\"imtcp\")\ninput(type=\"imtcp\" address=\"127.0.0.1\" port=\"{port}\")"
        ),
        Duration::ZERO,
    );
}

/// An authority, a server's certificate for `localhost` and a client's, in `dir`.
fn certificates(dir: &Path) {
    let run = |args: &str| {
        let output = Command::new("openssl")
            .args(args.split(' '))
            .current_dir(dir)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    run(
        "req -x509 -newkey rsa:2048 -nodes -days 2 -keyout ca.key -out ca.pem -subj /CN=test-ca \
        -addext basicConstraints=critical,CA:TRUE",
    );
    for (name, subject) in [("server", "DNS:localhost"), ("client", "DNS:netdump")] {
        fs::write(dir.join("ext"), format!("subjectAltName={subject}\n")).unwrap();
        run(&format!(
            "req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"
        ));
        run(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext \
            -out {name}.pem"
        ));
    }
}

/// rsyslogd with TLS that wants a client's certificate.
fn rsyslog_tls(dir: &Path, port: u16) -> String {
    let file = |name: &str| dir.join(name).display().to_string();
    format!(
        "global(defaultNetstreamDriverCAFile=\"{}\" defaultNetstreamDriverCertFile=\"{}\" \
         defaultNetstreamDriverKeyFile=\"{}\")\n\
         module(load=\"imtcp\" streamDriver.name=\"gtls\" streamDriver.mode=\"1\" \
         streamDriver.authMode=\"x509/certvalid\")\n\
         input(type=\"imtcp\" address=\"127.0.0.1\" port=\"{port}\")",
        file("ca.pem"),
        file("server.pem"),
        file("server.key")
    )
}

#[test]
#[ignore = "needs rsyslogd: cargo xtask test runs it where that is installed"]
fn rsyslogd_by_tls() {
    let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
    certificates(dir.path());
    let file = |name: &str| dir.path().join(name).display().to_string();
    through_a_restart(
        5,
        &format!(
            "to = 'tls://localhost:{port}'\nca = '{}'\ncertificate = '{}'\nkey = '{}'\n",
            file("ca.pem"),
            file("client.pem"),
            file("client.key")
        ),
        &rsyslog_tls(dir.path(), port),
        Duration::ZERO,
    );
}

#[test]
#[ignore = "needs rsyslogd: cargo xtask test runs it where that is installed"]
fn a_server_of_another_name_gets_nothing() {
    let (place, _) = Place::new();
    let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
    certificates(dir.path());
    let target = Rsyslog::start(&dir.path().join("rsyslog"), &rsyslog_tls(dir.path(), port));
    let begin = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(begin.elapsed() < WAIT);
        thread::sleep(Duration::from_millis(20));
    }
    let ca = dir.path().join("ca.pem");
    let server = serve(
        &place,
        &format!(
            "[[forward]]\nname = 'siem'\nto = 'tls://localhost:{port}'\nca = '{}'\n\
             server_name = 'logs.example.com'\n",
            ca.display()
        ),
    );
    Talker::new(6, &server).say(10);
    let warning = server.wait_for("warning");
    let text = warning["message"].as_str().unwrap();
    assert!(text.contains("not valid for name"), "{text}");
    let row = server.stop_with("forward");
    assert_eq!(
        (&row["sent"], &row["spooled"]),
        (&0.into(), &10.into()),
        "{row}"
    );
    assert_eq!(target.text(), "");
    target.stop();
}

/// The receiver of OTLP: every request is decoded by OpenTelemetry's own definitions, strictly.
struct Collector {
    out: PathBuf,
    child: Child,
}

impl Collector {
    /// One that answers the first request with 503, if it is `busy`.
    fn start(dir: &Path, port: u16, busy: bool) -> Self {
        let python = std::env::var("NETDUMP_OTLP_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let out = dir.join("otlp");
        let mut child = Command::new(python)
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/serve/collector.py"
            ))
            .args([port.to_string(), u8::from(busy).to_string()])
            .arg(&out)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { out, child }
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.out).unwrap_or_default()
    }

    fn stop(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        // Already ended, but for a test that panicked.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
#[ignore = "needs opentelemetry-proto: cargo xtask test runs it where that can be installed"]
fn a_collector_that_is_away_gets_each_record_by_the_official_definitions() {
    let (place, key) = Place::new();
    let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
    let server = serve(
        &place,
        &format!(
            "[[forward]]\nname = 'otel'\nto = 'http://127.0.0.1:{port}'\n\
             headers = {{ Authorization = 'Bearer abc' }}\n"
        ),
    );
    let mut talker = Talker::new(7, &server);
    talker.say(2000);
    let target = Collector::start(dir.path(), port, true);
    talker.say(2000);
    wait_for(4000, || target.text());
    target.stop();
    talker.say(2000);
    let target = Collector::start(dir.path(), port, false);
    wait_for(6000, || target.text());
    Host::new(&key, 1).crash(server.address);
    server.wait_for("complete");
    thread::sleep(Duration::from_millis(500));
    let row = server.stop_with("forward");
    let text = target.text();
    assert_all(&text, 6000, &row);
    assert_eq!(row["rejected"], 0, "{row}");
    let records: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let record = &records[0];
    assert_eq!(record["host"], "127.0.10.7", "{record}");
    assert_eq!(record["authorization"], "Bearer abc", "{record}");
    assert_eq!(record["severity"], "SEVERITY_NUMBER_INFO", "{record}");
    assert!(
        record["attributes"]["log.record.uid"]
            .as_str()
            .unwrap()
            .ends_with(":0")
    );
    let crash = records.last().unwrap();
    assert_eq!(crash["event"], "netdump.crash", "{crash}");
    assert_eq!(crash["severity"], "SEVERITY_NUMBER_ERROR2", "{crash}");
    println!("{row}");
}
