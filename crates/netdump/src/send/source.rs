//! What is sent: a machine, and its pages by number.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Error, Result};
use dump::Machine;
use proto::client::PageStatus;
use proto::units::PAGE_BYTES;

use super::corefile::CoreFile;
use super::synthetic::{Synthetic, Templates};

/// Memory that a session sends.
pub(super) trait Source: Send {
    /// All that is known of it besides its pages.
    fn machine(&self) -> &Machine;

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
}

impl Opener {
    pub(super) fn new(origin: &Origin) -> Self {
        let templates = match origin {
            Origin::File(_) => None,
            Origin::Synthetic(wish) => Some(Arc::new(Templates::new(wish.seed))),
        };
        Self {
            origin: origin.clone(),
            templates,
        }
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
