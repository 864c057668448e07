//! A real rsyslogd, as Debian has it, and what it makes of the guest's messages.

use std::fs::{self, File};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// How long it may take to start.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between the fields of a line; rsyslog writes control characters in messages as `#ooo`.
const MARK: &str = "\t";

/// A running rsyslogd; it ends when dropped.
#[derive(Debug)]
pub(super) struct Rsyslog {
    child: Child,
    output: PathBuf,
    /// UDP port on loopback.
    pub(super) port: u16,
}

/// A message as rsyslog understood it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Line {
    /// Facility times eight plus level.
    pub(super) prefix: u64,
    /// Who sent it, by its own word.
    pub(super) host: Vec<u8>,
    /// The program.
    pub(super) program: Vec<u8>,
    /// RFC 5424's structured data.
    pub(super) data: Vec<u8>,
    /// The message.
    pub(super) text: Vec<u8>,
    /// All of the datagram.
    pub(super) raw: Vec<u8>,
}

impl Rsyslog {
    /// Starts `program` with all its files in `folder`.
    ///
    /// # Errors
    /// If it does not listen in time.
    pub(super) fn start(program: &Path, folder: &Path) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").context("cannot have a port on loopback")?;
        let port = socket.local_addr()?.port();
        drop(socket);
        let (output, settings) = (folder.join("rsyslog.txt"), folder.join("rsyslog.conf"));
        let fields = [
            "pri",
            "hostname",
            "app-name",
            "structured-data",
            "msg",
            "rawmsg",
        ];
        let fields = fields.map(|field| format!("%{field}%")).join("\\t");
        let text = format!(
            "module(load=\"imudp\")\n\
            input(type=\"imudp\" port=\"{port}\" address=\"127.0.0.1\" rcvbufSize=\"8m\")\n\
            template(name=\"fields\" type=\"string\" string=\"{fields}\\n\")\n\
            action(type=\"omfile\" file=\"{}\" template=\"fields\")\n",
            output.display()
        );
        fs::write(&settings, text)?;
        let said = File::create(folder.join("rsyslog.log"))?;
        let child = Command::new(program)
            .arg("-n")
            .arg("-f")
            .arg(&settings)
            .arg("-i")
            .arg(folder.join("rsyslog.pid"))
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut rsyslog = Self {
            child,
            output,
            port,
        };
        rsyslog.wait()?;
        Ok(rsyslog)
    }

    /// Waits until it listens: the first message it writes is our own.
    fn wait(&mut self) -> Result<()> {
        let begin = Instant::now();
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        while fs::metadata(&self.output).map_or(0, |file| file.len()) == 0 {
            ensure!(
                self.child.try_wait()?.is_none() && begin.elapsed() < PATIENCE,
                "rsyslogd does not listen: see rsyslog.log beside {}",
                self.output.display()
            );
            // Refused until it listens.
            drop(socket.send_to(b"<5>vmtest: begin", ("127.0.0.1", self.port)));
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Ends it in good order; what it wrote of the guest's messages.
    ///
    /// # Errors
    /// If it cannot be ended, or its file cannot be read.
    pub(super) fn end(mut self) -> Result<Vec<Line>> {
        let id = i32::try_from(self.child.id()).ok();
        let process = id.and_then(Pid::from_raw).context("no process")?;
        kill_process(process, Signal::TERM).context("cannot end rsyslogd")?;
        let status = self.child.wait()?;
        ensure!(status.success(), "rsyslogd ended with {status}");
        let text = fs::read(&self.output).context("rsyslogd wrote nothing")?;
        let lines = text.split(|byte| *byte == b'\n').filter_map(Line::parse);
        Ok(lines
            .filter(|line| line.raw != b"<5>vmtest: begin")
            .collect())
    }
}

impl Line {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == MARK.as_bytes()[0]);
        let mut field = || fields.next().map(<[u8]>::to_vec);
        let prefix = field()?;
        Some(Self {
            prefix: std::str::from_utf8(&prefix).ok()?.parse().ok()?,
            host: field()?,
            program: field()?,
            data: field()?,
            text: field()?,
            raw: field()?,
        })
    }

    /// The number of a message of ours by RFC 5424, which counts from 1 in `sequenceId`.
    pub(super) fn sequence(&self) -> Option<u64> {
        let data = std::str::from_utf8(&self.data).ok()?;
        let (_, rest) = data.split_once("sequenceId=\"")?;
        rest.split('"').next()?.parse::<u64>().ok()?.checked_sub(1)
    }
}

/// Bytes as rsyslog writes them: control characters by their octal numbers, and without the LF at
/// the end.
pub(super) fn escaped(bytes: &[u8]) -> Vec<u8> {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let mut text = Vec::new();
    for &byte in bytes {
        if byte.is_ascii_control() {
            text.extend_from_slice(format!("#{byte:03o}").as_bytes());
        } else {
            text.push(byte);
        }
    }
    text
}

impl Drop for Rsyslog {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.child.try_wait() {
            return;
        }
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("vmtest: cannot end rsyslogd: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_fields_and_ours_a_number() {
        let line = b"4\thost\tkernel\t[meta sequenceId=\"8\" sysUpTime=\"1\"]\t[ 1] a#011b\t<4>1 x";
        let line = Line::parse(line).unwrap();
        assert_eq!((line.prefix, line.sequence()), (4, Some(7)));
        assert_eq!(line.text, b"[ 1] a#011b");
        assert_eq!(escaped(b"a\tb\n\xff\n"), b"a#011b#012\xff");
        assert_eq!(Line::parse(b"4\thost"), None);
    }
}
