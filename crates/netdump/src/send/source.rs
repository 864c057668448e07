//! What is sent: a machine, and its pages by number.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::{fmt, fs};

use anyhow::{Context as _, Error, Result};
use dump::Machine;
use proto::client::PageStatus;
use proto::units::PAGE_BYTES;

use super::corefile::CoreFile;
use super::synthetic::{Synthetic, Templates};

/// Memory that a session sends.
pub(super) trait Source: Send {
    /// All that is known of it besides its pages.
    fn machine(&self) -> &Machine;

    /// The kernel's log in it; empty when it has none.
    fn log(&mut self) -> Vec<u8>;

    /// Reads the pages from `first` on, or says of each why it is not there.
    fn read(&mut self, first: u64, pages: &mut [[u8; PAGE_BYTES]], statuses: &mut [PageStatus]);
}

/// Where memory comes from, as it is named on the command line.
#[derive(Debug, Clone)]
pub enum Origin {
    /// A core file, or `/proc/vmcore`.
    File(PathBuf),
    /// Computed memory.
    Synthetic(Synthetic),
}

/// Opens the memory of any number of sessions.
pub(super) struct Opener {
    origin: Origin,
    templates: Option<Arc<Templates>>,
    log: Option<Arc<[u8]>>,
}

/// What one session sends.
pub(super) struct Crash {
    pub(super) source: Box<dyn Source>,
    /// The kernel's log.
    pub(super) log: Arc<[u8]>,
}

impl Opener {
    /// `log` is the file of a log that goes before the one in the memory.
    pub(super) fn new(origin: &Origin, log: Option<&Path>) -> Result<Self> {
        let templates = match origin {
            Origin::File(_) => None,
            Origin::Synthetic(wish) => Some(Arc::new(Templates::new(wish.seed))),
        };
        let read = |path: &Path| {
            fs::read(path).with_context(|| format!("cannot read the log {}", path.display()))
        };
        Ok(Self {
            origin: origin.clone(),
            templates,
            log: log.map(read).transpose()?.map(Arc::from),
        })
    }

    /// The memory of session number `index`, and its log.
    pub(super) fn crash(&self, index: u32) -> Result<Crash> {
        let mut source = self.open(index)?;
        let log = match &self.log {
            Some(log) => Arc::clone(log),
            None => source.log().into(),
        };
        Ok(Crash { source, log })
    }

    /// The memory of session number `index`: computed memory differs from session to session.
    pub(super) fn open(&self, index: u32) -> Result<Box<dyn Source>> {
        Ok(match (&self.origin, &self.templates) {
            (Origin::Synthetic(wish), Some(templates)) => Box::new(wish.memory(index, templates)),
            (Origin::Synthetic(wish), None) => {
                Box::new(wish.memory(index, &Arc::new(Templates::new(wish.seed))))
            }
            (Origin::File(path), _) => Box::new(CoreFile::open(path)?),
        })
    }
}

impl FromStr for Origin {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text.strip_prefix(SYNTHETIC_PREFIX) {
            Some(wish) => Self::Synthetic(wish.parse()?),
            None => Self::File(text.into()),
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Synthetic(wish) => write!(f, "{SYNTHETIC_PREFIX}{wish}"),
        }
    }
}

const SYNTHETIC_PREFIX: &str = "synthetic:";
