//! `netdump send`: the client engine in user space, over an ordinary UDP socket.
//!
//! What a crashed host sends from its frozen memory, this sends from a `source`: a core file,
//! `/proc/vmcore` of a kdump kernel, or memory that is computed. It obeys the server's verdict and
//! prints its action, but never carries it out. With many sessions it is the load generator.
//!
//! How a page travels: the engine asks for a block, `source` reads it straight into the engine's
//! scratch buffer, the engine seals it into a buffer of the `session`'s pool, and a `train`
//! hands up to 64 such buffers to the kernel with one system call.

mod corefile;
mod fleet;
mod report;
mod session;
mod source;
mod synthetic;
mod train;

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context as _, Result, ensure};

use crate::key::HostKey;
use crate::way;

pub use self::report::Report;
pub use self::source::Origin;
pub use self::synthetic::Synthetic;
pub use self::train::Blaster;

/// What `netdump send` was asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// What to send.
    pub origin: Origin,
    /// A kernel log that is sent as the crashed host's, instead of the one in the memory.
    pub log: Option<PathBuf>,
    /// The server, `HOST[:PORT]`.
    pub server: String,
    /// The host's key file, or a directory of several hosts', which the sessions take in turn.
    pub key: PathBuf,
    /// Sessions at the same time, each with an arming id of its own.
    pub sessions: u32,
    /// The most bytes of UDP payload a second, all sessions together; `None` is no limit.
    pub bytes_per_second: Option<u64>,
    /// The largest IP packet to send, where the path would take larger ones.
    pub mtu: Option<u16>,
    /// How long to go on without a reply.
    pub give_up: Duration,
    /// Show a progress bar.
    pub progress: bool,
}

/// Sends; returns when every session is over, however it ended: [`Report::failure`] says whether
/// all of them were whole.
pub fn send(request: &Request) -> Result<Report> {
    let keys = keys(&request.key)?;
    let server = way::resolve(&request.server)?.remote;
    fleet::run(request, &keys, server)
}

fn keys(path: &Path) -> Result<Vec<HostKey>> {
    if !path.is_dir() {
        return Ok(vec![HostKey::load(path)?]);
    }
    let entries = fs::read_dir(path)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .with_context(|| format!("cannot read the key directory {}", path.display()))?;
    let mut paths: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
    paths.sort();
    ensure!(!paths.is_empty(), "no key in {}", path.display());
    paths.iter().map(|path| HostKey::load(path)).collect()
}
