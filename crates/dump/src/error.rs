//! Errors by blame: the operating system, the file, this reader's limits, the caller.

use std::path::{Path, PathBuf};
use std::{fmt, io};

/// Why a vmcore could not be written or read.
#[derive(Debug)]
#[non_exhaustive]
pub enum DumpError {
    /// The operating system refused.
    Io {
        /// What was being done, as in "writing page data".
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's own words.
        source: io::Error,
    },
    /// The file breaks its format.
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where in the file the trouble lies, in bytes.
        offset: u64,
        /// What is wrong, with the numbers.
        what: String,
    },
    /// The caller broke a rule of the interface; the message says which.
    Misuse {
        /// The file.
        path: PathBuf,
        /// The rule and the numbers.
        what: String,
    },
    /// A sound file, or a legal wish, that this code does not serve; the message says what does.
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it would take.
        what: String,
    },
}

impl DumpError {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            doing,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn malformed(path: &Path, offset: u64, what: impl Into<String>) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            offset,
            what: what.into(),
        }
    }

    pub(crate) fn misuse(path: &Path, what: impl Into<String>) -> Self {
        Self::Misuse {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        Self::Unsupported {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}

impl fmt::Display for DumpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // What failed underneath is the source, which whoever prints the chain adds.
            Self::Io { doing, path, .. } => write!(f, "{}: {doing} failed", path.display()),
            Self::Malformed { path, offset, what } => {
                write!(
                    f,
                    "{}: not a sound vmcore at byte {offset}: {what}",
                    path.display()
                )
            }
            Self::Misuse { path, what } | Self::Unsupported { path, what } => {
                write!(f, "{}: {what}", path.display())
            }
        }
    }
}

impl std::error::Error for DumpError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Malformed { .. } | Self::Misuse { .. } | Self::Unsupported { .. } => None,
        }
    }
}
