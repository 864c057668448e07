//! The real server: a `netdump serve` process on loopback, and the crash directory it fills.

use std::fs::{self, File};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// Name of the host in its key.
pub const HOST_NAME: &str = "vmtest";

/// A running server; it ends when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    dumpdir: PathBuf,
    errors: PathBuf,
    /// UDP port on loopback.
    pub port: u16,
    /// The guest's key file.
    pub key: PathBuf,
}

/// How a server is to run.
#[derive(Clone, Copy, Debug)]
pub struct Listen {
    /// The filter level that it asks for.
    pub filter: u8,
    /// On the loopback address of IPv6, not of IPv4.
    pub ip6: bool,
    /// It tells its events in JSON.
    pub events: bool,
}

/// What the server says of hosts' messages when it ends.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Figures {
    /// Datagrams that it took.
    pub datagrams: u64,
    /// Records in logs.
    pub written: u64,
    /// Boots begun.
    pub boots: u64,
    /// Sequence numbers passed over.
    pub gaps: u64,
    /// Of those, records known to be sent.
    pub lost: u64,
    /// Records that came after they had been passed over.
    pub late: u64,
    /// Records and fragments that came more than once.
    pub duplicates: u64,
    /// Records of which fragments are missing.
    pub incomplete: u64,
    /// Malformed datagrams.
    pub malformed: u64,
    /// Datagrams for which the sockets had no room.
    pub socket_drops: u64,
    /// Datagrams for which its memory had no room.
    pub inbox_drops: u64,
    /// Records that could not be written.
    pub unwritten: u64,
}

/// The parts of `session.json` that are judged.
#[derive(Clone, Debug, Deserialize)]
pub struct Session {
    /// "receiving", "finishing", "complete", "incomplete" or "log-only".
    pub state: String,
    /// Why it is not complete.
    #[serde(default)]
    pub why: Option<String>,
    /// Why the kernel died, as the client saw it.
    #[serde(default)]
    pub reason: String,
    /// CPUs online.
    #[serde(default)]
    pub cpus: u32,
    /// CPUs whose registers arrived.
    #[serde(default)]
    pub cpus_captured: u32,
    /// Filter level that was used.
    #[serde(default)]
    pub filter: u8,
    /// Pages the dump path itself writes: first pfn, pages, kind.
    #[serde(default)]
    pub written: Vec<(u64, u64, u32)>,
}

impl Session {
    /// Whether nothing more will change.
    #[must_use]
    pub fn is_final(&self) -> bool {
        !matches!(self.state.as_str(), "receiving" | "finishing")
    }
}

impl Server {
    /// Makes a key and starts `program` as a server with all its files below `folder`.
    ///
    /// # Errors
    /// If the key cannot be made or the process cannot be started.
    pub fn start(program: &Path, folder: &Path, format: &str, how: Listen) -> Result<Self> {
        let (keys, dumpdir) = (folder.join("keys"), folder.join("crash"));
        for path in [&keys, &dumpdir] {
            fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let key = keys.join(HOST_NAME);
        let made = Command::new(program)
            .args(["key", "new"])
            .arg(&key)
            .args(["--host", HOST_NAME])
            .output()
            .with_context(|| format!("cannot run {}", program.display()))?;
        ensure!(
            made.status.success(),
            "{} key new failed ({}): {}",
            program.display(),
            made.status,
            String::from_utf8_lossy(&made.stderr).trim()
        );
        // A port that is free now; should another process take it in between, the server says so
        // and the run fails.
        let address = UdpSocket::bind(if how.ip6 { "[::1]:0" } else { "127.0.0.1:0" })
            .and_then(|socket| socket.local_addr())
            .context("cannot have a port on loopback")?;
        // A machine check is dumped like anything else here: its memory is compared too.
        let config = folder.join("serve.toml");
        fs::write(
            &config,
            format!("[signatures]\nhardware = {}\n", how.filter),
        )
        .context("cannot write the server's configuration")?;
        let errors = folder.join("server.log");
        let log =
            File::create(&errors).with_context(|| format!("cannot write {}", errors.display()))?;
        let child = Command::new(program)
            .args([
                "serve",
                "--listen",
                &address.to_string(),
                "--format",
                format,
                "--filter",
                &how.filter.to_string(),
                "--dumpdir",
            ])
            .arg(&dumpdir)
            .arg("--keys")
            .arg(&keys)
            .arg("--config")
            .arg(&config)
            .args(how.events.then_some("--json"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Self {
            child,
            dumpdir,
            errors,
            port: address.port(),
            key,
        })
    }

    /// Fails if the process has ended, with what it said last.
    ///
    /// # Errors
    /// If the server is gone.
    pub fn check(&mut self) -> Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let said = fs::read_to_string(&self.errors).unwrap_or_default();
        let last = said.lines().last().unwrap_or("nothing");
        anyhow::bail!("netdump serve ended during the run ({status}); it said last: {last}")
    }

    /// Ends the server in good order; what it says of hosts' messages.
    ///
    /// # Errors
    /// If it cannot be told to end, fails, or says nothing.
    pub fn end(&mut self) -> Result<Figures> {
        let id = i32::try_from(self.child.id()).ok();
        let process = id.and_then(Pid::from_raw).context("no process")?;
        kill_process(process, Signal::TERM).context("cannot end the server")?;
        let status = self.child.wait()?;
        ensure!(status.success(), "netdump serve ended with {status}");
        let said = fs::read_to_string(&self.errors).context("the server's events are gone")?;
        let event = said
            .lines()
            .rev()
            .find(|line| line.contains(r#""event":"console""#))
            .context("the server says nothing of messages; was it told to with --json?")?;
        serde_json::from_str(event).with_context(|| format!("the server says {event:?}"))
    }

    /// The directory of all that the server keeps.
    #[must_use]
    pub fn dumpdir(&self) -> &Path {
        &self.dumpdir
    }

    /// The directory of the only crash, once there is one.
    ///
    /// # Errors
    /// If the dump directory cannot be read, or holds more than one crash.
    pub fn crash_dir(&self) -> Result<Option<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dumpdir)? {
            let path = entry?.path();
            if path.join("session.json").is_file() {
                found.push(path);
            }
        }
        ensure!(
            found.len() <= 1,
            "{} holds {} crashes after one crash",
            self.dumpdir.display(),
            found.len()
        );
        Ok(found.pop())
    }

    /// What `session.json` in `crash_dir` says.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn session(crash_dir: &Path) -> Result<Session> {
        let path = crash_dir.join("session.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is malformed", path.display()))
    }
}

/// What the server kept of the host's live messages: its logs beside `crash_dir`, in order of their
/// names.
///
/// # Errors
/// If there is none, or it cannot be read.
pub fn console_log(crash_dir: &Path) -> Result<String> {
    let console = crash_dir.with_file_name("console");
    let mut paths = Vec::new();
    for host in fs::read_dir(&console)
        .with_context(|| format!("the server kept no messages: {}", console.display()))?
    {
        for log in fs::read_dir(host?.path())? {
            paths.push(log?.path());
        }
    }
    paths.sort();
    let mut text = String::new();
    for path in paths {
        text.push_str(
            &fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?,
        );
    }
    Ok(text)
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!(
                "vmtest: cannot end the server (process {}): {error}",
                self.child.id()
            );
        }
    }
}
