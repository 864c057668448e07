//! The server's side: `netdump serve`, an sshd, or a file behind a TCP port.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, ensure};

use super::{Plan, SERVER, TCP_PORT, Transport, Way, end};
use crate::stage::SERVER_PORT;

/// What receives; ended when dropped.
pub(super) struct Receiver {
    child: Option<Child>,
    way: Way,
    folder: PathBuf,
    makedumpfile: String,
    /// The key that netdump or ssh in the guest uses.
    pub(super) key: PathBuf,
}

/// Starts what receives dumps that go `plan.way`.
pub(super) fn start(plan: &Plan, folder: &Path) -> Result<Receiver> {
    let mut receiver = Receiver {
        child: None,
        way: plan.way,
        folder: folder.to_owned(),
        makedumpfile: plan.makedumpfile.clone(),
        key: folder.join("keys").join("peer"),
    };
    fs::create_dir_all(folder.join("keys"))?;
    receiver.child = match plan.way.dump() {
        None => Some(receiver.serve(plan)?),
        Some((_, Transport::Ssh)) => Some(receiver.sshd()?),
        Some((_, Transport::Tcp { .. })) => {
            receiver.listen()?;
            None
        }
    };
    Ok(receiver)
}

impl Receiver {
    /// What ssh is to run for the file to be in order and then to be there.
    pub(super) fn command(&self) -> String {
        let (partial, whole) = (self.folder.join("partial"), self.folder.join("vmcore"));
        format!(
            "{} -R {} > /dev/null && mv {1} {}",
            self.makedumpfile,
            partial.display(),
            whole.display()
        )
    }

    /// The finished file, once there is one.
    pub(super) fn finished(&self) -> Result<Option<PathBuf>> {
        let mut places = vec![self.folder.join("vmcore"), self.folder.join("flat")];
        let crashes = self.folder.join("crash");
        if self.way == Way::Netdump && crashes.exists() {
            let crashes = fs::read_dir(&crashes)?.flatten();
            places.extend(crashes.map(|crash| crash.path().join("vmcore")));
        }
        Ok(places.into_iter().find(|place| place.exists()))
    }

    /// What came over TCP is a stream that readers do not know; others are as they should be.
    pub(super) fn in_order(&self, file: PathBuf) -> Result<PathBuf> {
        if file.file_name().is_none_or(|name| name != "flat") {
            return Ok(file);
        }
        let whole = self.folder.join("vmcore");
        let mut words = self.makedumpfile.split_ascii_whitespace();
        let mut command = Command::new(words.next().context("no makedumpfile")?);
        command
            .args(words)
            .arg("-R")
            .arg(&whole)
            .stdin(File::open(&file)?);
        let status = command
            .stdout(Stdio::null())
            .status()
            .context("cannot start makedumpfile")?;
        ensure!(status.success(), "makedumpfile -R ended with {status}");
        Ok(whole)
    }

    fn serve(&self, plan: &Plan) -> Result<Child> {
        let new = ["key", "new", "--host", "peer"];
        let made = Command::new(&plan.netdump)
            .args(new)
            .arg(&self.key)
            .output()?;
        ensure!(
            made.status.success(),
            "netdump key new failed: {}",
            String::from_utf8_lossy(&made.stderr).trim()
        );
        let address = format!("{SERVER}:{SERVER_PORT}");
        let mut serve = Command::new(&plan.netdump);
        serve.args([
            "serve",
            "--listen",
            &address,
            "--filter",
            &plan.level.to_string(),
        ]);
        serve.arg("--dumpdir").arg(self.folder.join("crash"));
        serve.arg("--keys").arg(self.folder.join("keys"));
        self.spawn(&mut serve)
    }

    fn sshd(&self) -> Result<Child> {
        let mut keygen = Command::new("ssh-keygen");
        keygen
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&self.key);
        let status = keygen
            .stdin(Stdio::null())
            .status()
            .context("cannot start ssh-keygen")?;
        ensure!(status.success(), "ssh-keygen ended with {status}");
        let (own, public) = (self.key.display(), self.key.with_extension("pub"));
        let text = format!(
            "ListenAddress {SERVER}\nPort 22022\nHostKey {own}\nAuthorizedKeysFile {}\n\
             StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nUseDNS no\n",
            public.display()
        );
        let config = self.folder.join("sshd_config");
        fs::write(&config, text)?;
        // sshd wants this empty directory, which only its service makes.
        fs::create_dir_all("/run/sshd").context("cannot make /run/sshd")?;
        let mut sshd = Command::new("/usr/sbin/sshd");
        self.spawn(sshd.args(["-D", "-e", "-f"]).arg(&config))
    }

    fn listen(&self) -> Result<()> {
        fs::write(&self.key, "")?;
        let listener = TcpListener::bind((SERVER, TCP_PORT)).context("cannot listen")?;
        let (partial, whole) = (self.folder.join("partial"), self.folder.join("flat"));
        thread::spawn(move || {
            let received = listener.accept().and_then(|(mut stream, _)| {
                let mut file = File::create(&partial)?;
                std::io::copy(&mut stream, &mut file)?;
                file.flush()?;
                fs::rename(&partial, &whole)
            });
            if let Err(error) = received {
                eprintln!("vmtest: cannot receive over TCP: {error}");
            }
        });
        Ok(())
    }

    fn spawn(&self, command: &mut Command) -> Result<Child> {
        let log = File::create(self.folder.join("server.log"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let program = command.get_program().to_owned();
        command
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child, "the server");
        }
    }
}
