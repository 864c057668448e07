//! QEMU's control channel: one JSON object a line, as docs/interop/qmp-spec of QEMU says.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    line: String,
    shutdown: Option<String>,
}

/// QEMU answers a command in milliseconds, except when its main loop is busy writing memory.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

impl Qmp {
    /// Greets the QEMU at the other end of `stream`.
    ///
    /// # Errors
    /// If it does not answer as QEMU does.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let mut qmp = Self {
            stream: BufReader::new(stream),
            line: String::new(),
            shutdown: None,
        };
        qmp.command("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and gives what it returned.
    ///
    /// # Errors
    /// If QEMU is gone, silent for 30 s, or refuses the command.
    pub fn command(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot send {name} to QEMU"))?;
        self.stream
            .get_ref()
            .set_read_timeout(Some(REPLY_TIMEOUT))?;
        loop {
            let message = self
                .receive()
                .with_context(|| format!("QEMU did not answer {name}"))?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refused {name}: {error}");
            }
            if let Some(result) = message.get("return") {
                return Ok(result.clone());
            }
        }
    }

    /// Why the guest stopped, once it has: "guest-reset", "guest-shutdown" and so on. Does not
    /// wait.
    ///
    /// # Errors
    /// If QEMU is gone.
    pub fn shutdown(&mut self) -> Result<Option<&str>> {
        while self.shutdown.is_none() && self.ready()? {
            self.receive()?;
        }
        Ok(self.shutdown.as_deref())
    }

    /// Whether a message, or the end of the connection, can be read without waiting.
    fn ready(&self) -> Result<bool> {
        if !self.stream.buffer().is_empty() {
            return Ok(true);
        }
        let mut poll = [rustix::event::PollFd::new(
            self.stream.get_ref(),
            rustix::event::PollFlags::IN,
        )];
        Ok(rustix::event::poll(&mut poll, Some(&rustix::event::Timespec::default()))? > 0)
    }

    fn receive(&mut self) -> Result<Value> {
        self.line.clear();
        let read = self
            .stream
            .read_line(&mut self.line)
            .context("cannot read from QEMU")?;
        if read == 0 {
            bail!("QEMU has ended");
        }
        let message: Value = serde_json::from_str(&self.line)
            .with_context(|| format!("QEMU said {:?}", self.line))?;
        if message
            .get("event")
            .is_some_and(|event| event == "SHUTDOWN")
        {
            let reason = message
                .pointer("/data/reason")
                .and_then(Value::as_str)
                .unwrap_or("unknown");
            self.shutdown = Some(reason.to_owned());
        }
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_between_commands_are_kept() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .write_all(
                b"{\"QMP\": {}}\n{\"return\": {}}\n\
                  {\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}\n",
            )
            .unwrap();
        let mut qmp = Qmp::new(ours).unwrap();
        assert_eq!(qmp.shutdown().unwrap(), Some("guest-reset"));
        theirs
            .write_all(b"{\"error\": {\"desc\": \"no\"}}\n")
            .unwrap();
        assert!(
            qmp.command("stop", &json!({}))
                .unwrap_err()
                .to_string()
                .contains("refused stop")
        );
        drop(theirs);
        assert_eq!(qmp.shutdown().unwrap(), Some("guest-reset"));
    }
}
