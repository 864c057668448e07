//! `netdump status`: how this machine stands, as a host that is armed and as a server that runs.

use std::fmt;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::arm;
use crate::console::Figures;
use crate::console::view::Hosts;
use crate::forward;
use crate::operate::{self, table};

/// Hosts that are shown to people.
const SHOWN_MAX: usize = 50;

/// Both sides.
#[derive(Debug, Serialize)]
pub struct Status {
    #[serde(flatten)]
    client: arm::Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<Server>,
}

/// What a running server says of hosts' messages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Server {
    /// Totals since it was started.
    pub console: Figures,
    /// Hosts; none when the disk does not let the server answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Hosts>,
    /// Where messages are forwarded to.
    pub forward: Vec<forward::Row>,
    /// Messages that came from a syslog server and were not forwarded.
    pub looped: u64,
}

/// Asks the module, and the server that works in `dumpdir` if there is one.
///
/// # Errors
/// One of them answers what cannot be read.
pub fn status(dumpdir: &Path) -> Result<Status> {
    Ok(Status {
        client: arm::status()?,
        server: operate::status(dumpdir)?,
    })
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.client)?;
        match &self.server {
            Some(server) => write!(f, "\n{server}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.console)?;
        for target in &self.forward {
            write!(f, "\nforwarded to {target}")?;
        }
        if self.looped > 0 {
            let looped = self.looped;
            write!(
                f,
                "\nnot forwarded: {looped} that came from a syslog server"
            )?;
        }
        let Some(hosts) = &self.hosts else {
            return f.write_str("\nthe thread that writes logs does not answer: is the disk full?");
        };
        if hosts.rows.is_empty() {
            return Ok(());
        }
        let heading = ["host", "boot", "records", "gaps", "lost", "silent"];
        let mut rows = vec![heading.map(str::to_owned).to_vec()];
        rows.extend(hosts.rows.iter().take(SHOWN_MAX).map(|row| {
            vec![
                row.host.clone(),
                row.boot.clone().unwrap_or_else(|| "-".to_owned()),
                row.records.to_string(),
                row.gaps.to_string(),
                row.lost.to_string(),
                format!("{:.1} s", row.silent_seconds),
            ]
        }));
        write!(f, "\n{}", table(&rows))?;
        let more = hosts.rows.len().saturating_sub(SHOWN_MAX) as u64 + hosts.more;
        if more > 0 {
            write!(f, "\nand {more} more; --json lists a thousand")?;
        }
        Ok(())
    }
}
