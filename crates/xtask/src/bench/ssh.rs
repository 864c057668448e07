//! An SSH server of our own on loopback, with keys that live as long as it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::stage::{self, Place};
use crate::command;

/// A running server.
pub(crate) struct Ssh {
    child: Child,
    port: u16,
    key: PathBuf,
    user: String,
}

impl Ssh {
    /// Starts it on these CPUs.
    pub(crate) fn start(place: &Place, cpus: &str) -> Result<Self> {
        let key = place.dir.join("key");
        let mut keygen = Command::new("ssh-keygen");
        keygen
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&key);
        command::run(&mut keygen)?;
        let socket = std::net::TcpListener::bind("127.0.0.1:0").context("no free port")?;
        let port = socket.local_addr()?.port();
        drop(socket);
        let config = place.dir.join("sshd_config");
        let (own, public) = (key.display(), key.with_extension("pub"));
        let text = format!(
            "ListenAddress 127.0.0.1\nPort {port}\nHostKey {own}\nAuthorizedKeysFile {}\n\
             StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\n",
            public.display()
        );
        fs::write(&config, text)?;
        // sshd wants this empty directory, which only its service makes.
        fs::create_dir_all("/run/sshd").context("cannot make /run/sshd")?;
        let mut sshd = stage::pinned(cpus, Path::new("/usr/sbin/sshd"));
        sshd.args(["-D", "-e", "-f"])
            .arg(&config)
            .stderr(Stdio::null());
        let child = sshd.spawn().context("cannot start sshd")?;
        let user = command::capture(Command::new("id").arg("-un"))?
            .trim()
            .to_owned();
        let ssh = Self {
            child,
            port,
            key,
            user,
        };
        ssh.wait_until_up()?;
        Ok(ssh)
    }

    fn wait_until_up(&self) -> Result<()> {
        let give_up = Instant::now() + Duration::from_secs(10);
        while Instant::now() < give_up {
            let up = self
                .command(stage::BOTH_CPUS, "true")
                .stderr(Stdio::null())
                .status();
            if up.context("cannot start ssh")?.success() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
        ensure!(false, "sshd on port {} lets nobody in", self.port);
        Ok(())
    }

    /// An `ssh` that runs `remote` there.
    pub(crate) fn command(&self, cpus: &str, remote: &str) -> Command {
        let mut ssh = stage::pinned(cpus, Path::new("ssh"));
        ssh.args(self.arguments()).arg(remote);
        ssh
    }

    /// What `ssh` needs before the command to run.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = ["-F", "none", "-o", "LogLevel=ERROR"]
            .into_iter()
            .chain([
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
            ])
            .map(str::to_owned)
            .collect();
        arguments.extend(["-i".to_owned(), self.key.display().to_string()]);
        arguments.extend(["-p".to_owned(), self.port.to_string()]);
        arguments.push(format!("{}@127.0.0.1", self.user));
        arguments
    }

    /// CPU time of the server and of all sessions that are over.
    pub(crate) fn server_cpu_seconds(&self) -> Result<f64> {
        // A session's processes end a moment after its client.
        thread::sleep(Duration::from_millis(300));
        stage::tree_cpu_seconds(self.child.id())
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        if self.child.kill().and_then(|()| self.child.wait()).is_err() {
            eprintln!("sshd was gone before its end");
        }
    }
}
