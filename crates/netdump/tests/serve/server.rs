//! A `netdump serve` process of a test: started, listened to, ended.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use netdump::key::{HostKey, HostName};
use netdump::serve::events::Events;
use netdump::serve::finish::Format;
use netdump::serve::hub::Policy;
use netdump::serve::signatures::Settings;
use netdump::serve::verdict::Deed;
use netdump::serve::{Options, Server as InProcess};
use serde_json::Value;
use tempfile::TempDir;

/// Directories of one test.
pub(crate) struct Place {
    dir: TempDir,
}

/// A running server.
pub(crate) struct Server {
    child: Child,
    events: Receiver<Value>,
    /// Where it receives.
    pub(crate) address: SocketAddr,
}

impl Place {
    /// A place with one host's key.
    pub(crate) fn new() -> (Self, HostKey) {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(place.keys()).unwrap();
        let key = place.add_key("web1");
        (place, key)
    }

    /// Makes a key for `host` in the key directory.
    pub(crate) fn add_key(&self, host: &str) -> HostKey {
        let key = HostKey::random(HostName::new(host).unwrap()).unwrap();
        key.store(&self.keys().join(host)).unwrap();
        key
    }

    pub(crate) fn keys(&self) -> PathBuf {
        self.dir.path().join("keys")
    }

    pub(crate) fn dumps(&self) -> PathBuf {
        self.dir.path().join("crash")
    }

    /// The crash directories, by name.
    pub(crate) fn crashes(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dumps())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let mut crashes: Vec<PathBuf> = entries
            .filter(|path| path.is_dir())
            .filter(|path| !path.ends_with("console") && !path.ends_with("forward"))
            .collect();
        crashes.sort();
        crashes
    }

    /// The command line of a server here.
    pub(crate) fn command(&self, listen: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_netdump"));
        command
            .args(["serve", "--json", "--listen", listen])
            .args(more);
        command
            .arg("--dumpdir")
            .arg(self.dumps())
            .arg("--keys")
            .arg(self.keys());
        // Tests crash alike; only those about signatures want fewer dumps than they send.
        if !more.contains(&"--config") {
            let config = self.dir.path().join("many.toml");
            fs::write(&config, "[signatures]\ndumps = 100\n").unwrap();
            command.arg("--config").arg(config);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a server at a free port.
    pub(crate) fn serve(&self, more: &[&str]) -> Server {
        self.serve_at("127.0.0.1:0", more)
    }

    /// Starts a server.
    pub(crate) fn serve_at(&self, listen: &str, more: &[&str]) -> Server {
        self.start(&mut self.command(listen, more))
    }

    /// Starts a server with this command line.
    pub(crate) fn start(&self, command: &mut Command) -> Server {
        let mut child = command.spawn().unwrap();
        let (sender, events) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(serde_json::from_str(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        let mut server = Server {
            child,
            events,
            address: "127.0.0.1:0".parse().unwrap(),
        };
        let listening = server.wait_for("listening");
        server.address = listening["address"].as_str().unwrap().parse().unwrap();
        server
    }

    /// A server in this process, for what the command line does not set: how soon a session counts
    /// as silent, and how long its spools stay.
    pub(crate) fn serve_here(&self, silence: Duration, linger: Duration) -> InProcess {
        let options = Options {
            console: netdump::console::settings::Settings::default(),
            signatures: Settings {
                dumps: 100,
                ..Settings::default()
            },
            forward: Vec::new(),
            listen: "127.0.0.1:0".parse().unwrap(),
            dumpdir: self.dumps(),
            keys: self.keys(),
            format: Format::Kdump,
            policy: Policy::Full,
            filter: 0,
            hold: false,
            redirect: None,
            action: Deed::Reboot,
            active: 8,
            threads: 2,
            silence,
            linger,
            triage: Some(env!("CARGO_BIN_EXE_netdump").into()),
        };
        InProcess::start(&options, Events::new(false)).unwrap()
    }

    /// Runs another `netdump` command on the dump directory here; its exit code, stdout and stderr.
    pub(crate) fn run(&self, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_netdump"))
            .args(args)
            .arg("--dumpdir")
            .arg(self.dumps())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    /// Runs a server that must fail to start; returns its stderr.
    pub(crate) fn refuse(&self, listen: &str, more: &[&str]) -> String {
        let mut child = self.command(listen, more).spawn().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1));
        let mut text = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    }
}

impl Server {
    /// The next event of this kind. Panics when it does not come soon.
    pub(crate) fn wait_for(&self, kind: &str) -> Value {
        let give_up = Instant::now() + Duration::from_secs(20);
        let mut others = Vec::new();
        while let Ok(event) = self
            .events
            .recv_timeout(give_up.saturating_duration_since(Instant::now()))
        {
            if event["event"] == kind {
                return event;
            }
            others.push(event);
        }
        panic!("no {kind} event came, but {others:?}");
    }

    /// The next event of any kind.
    pub(crate) fn next(&self) -> Value {
        let wait = Duration::from_secs(10);
        self.events.recv_timeout(wait).expect("an event")
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as an administrator would; returns the drop counts it told last.
    pub(crate) fn stop(self) -> Value {
        self.stop_with("drops")
    }

    /// Ends it in good order; returns its last event of this kind.
    pub(crate) fn stop_with(mut self, kind: &str) -> Value {
        let killed = Command::new("kill")
            .arg(self.child.id().to_string())
            .status()
            .unwrap();
        assert!(killed.success());
        assert!(self.child.wait().unwrap().success());
        let events = self.events.iter().filter(|event| event["event"] == kind);
        events.last().unwrap_or(Value::Null)
    }

    /// Kills it, so that it can do nothing more.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already ended in most tests; in one that panicked nothing may stay behind.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The `session.json` of a crash directory.
pub(crate) fn session(crash: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(crash.join("session.json")).unwrap()).unwrap()
}
