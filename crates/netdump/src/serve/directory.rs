//! One crash's directory: `<dumpdir>/<host>-<UTC time>/` and the `session.json` in it.
//!
//! `session.json` is replaced as a whole (write aside, sync, rename), so a reader, or a server that
//! was killed, finds either the old one or the new one.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};
use proto::units::{ArmingId, KeyId, SessionId};
use serde::{Deserialize, Serialize};

use super::content::Summary;
use super::registry::Over;
use super::signatures::Ruling;
use super::spool::SPOOL_FILE;
use super::verdict::Want;
use crate::hardware::HARDWARE_FILE;
use crate::key::HostName;
use crate::time::utc_compact;

/// Name of the session's file in a crash directory.
pub const SESSION_FILE: &str = "session.json";
/// Name of the log in a crash directory.
pub const LOG_FILE: &str = "log";
/// Name of the finished memory image.
pub const VMCORE_FILE: &str = "vmcore";
/// Name of the memory image until it is verified.
pub const VMCORE_INCOMPLETE_FILE: &str = "vmcore-incomplete";
/// Name of a memory image that grows while its pages arrive. It lives no longer than the spools.
pub const VMCORE_GROWING_FILE: &str = "vmcore-growing";

/// An existing crash directory.
#[derive(Debug, Clone)]
pub struct CrashDir {
    path: PathBuf,
}

/// Where a session stands. What comes after `Receiving` and `Finishing` is final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The client sends.
    Receiving,
    /// The client is done or dead; the vmcore is being written.
    Finishing,
    /// The vmcore holds all memory, verified.
    Complete,
    /// Something is missing; `SessionFile::why` says what.
    Incomplete,
    /// Log and registers only, because the verdict was so.
    LogOnly,
}

/// The contents of `session.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionFile {
    /// Version of this file's format. Readers refuse a higher one; fields may be added without
    /// raising it.
    pub version: u32,
    /// Where the session stands.
    pub state: State,
    /// What was wanted of the client, once that was decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Want>,
    /// Filter level of the dump: makedumpfile's dump levels.
    #[serde(default)]
    pub filter: u8,
    /// Why it is incomplete or log-only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Name of the host, from its key.
    pub host: String,
    /// Key id, 16 hexadecimal digits.
    pub key: String,
    /// Arming id, 16 hexadecimal digits.
    pub arming: String,
    /// How often the client had started over.
    #[serde(default)]
    pub attempt: u16,
    /// How often a restarted server went on with it.
    #[serde(default)]
    pub resumed: u32,
    /// Where the client's packets come from.
    pub peer: SocketAddr,
    /// UTC time of the first packet.
    pub started: String,
    /// Seconds from the first packet to the last one.
    pub seconds: f64,
    /// Stream bytes received.
    pub bytes: u64,
    /// What was decided by the crash's signature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ruling: Option<Ruling>,
    /// What the client has told.
    #[serde(flatten)]
    pub summary: Summary,
    /// The memory image, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmcore: Option<Vmcore>,
}

/// A memory image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vmcore {
    /// Its name in the crash directory.
    pub file: String,
    /// `kdump` or `elf`.
    pub format: String,
    /// Its length.
    pub bytes: u64,
    /// Pages of System RAM that it lacks because they never arrived.
    pub pages_lost: u64,
}

impl CrashDir {
    /// Makes the directory of a crash of `host` at `time`. A second crash in the same second gets
    /// the suffix `-2`, and so on. Only its owner may look into it: a memory image holds every
    /// secret of its host.
    pub fn create(dumpdir: &Path, host: &HostName, time: SystemTime) -> Result<Self> {
        let name = format!("{host}-{}", utc_compact(time));
        for number in 1..=SAME_SECOND_MAX {
            let suffix = if number == 1 {
                String::new()
            } else {
                format!("-{number}")
            };
            let path = dumpdir.join(format!("{name}{suffix}"));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self { path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot create {}", path.display()));
                }
            }
        }
        bail!("{SAME_SECOND_MAX} crashes of {host} in one second: {name} and its suffixes exist")
    }

    /// All crash directories in `dumpdir` that hold a readable `session.json`, by name. What is
    /// wrong with others is told through `warn`; directories without one are not ours.
    pub fn scan(dumpdir: &Path, mut warn: impl FnMut(String)) -> Result<Vec<(Self, SessionFile)>> {
        let entries =
            fs::read_dir(dumpdir).with_context(|| format!("cannot read {}", dumpdir.display()))?;
        let mut paths: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        paths.sort();
        let mut found = Vec::new();
        for path in paths
            .into_iter()
            .filter(|path| path.join(SESSION_FILE).exists())
        {
            let dir = Self { path };
            match dir.session() {
                Ok(session) => found.push((dir, session)),
                Err(error) => warn(format!("{error:#}")),
            }
        }
        Ok(found)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it. `name` is one of this program's constants, never text from the network.
    #[must_use]
    pub fn file(&self, name: &'static str) -> PathBuf {
        self.path.join(name)
    }

    /// The spool of the crash's `number`-th attempt, counted from 1.
    #[must_use]
    pub fn spool(&self, number: u32) -> PathBuf {
        if number == 1 {
            self.path.join(SPOOL_FILE)
        } else {
            self.path.join(format!("{SPOOL_FILE}-{number}"))
        }
    }

    /// How many spools there are: they are numbered without gaps.
    #[must_use]
    pub fn spools(&self) -> u32 {
        let exists = |number: &u32| self.spool(*number).exists();
        u32::try_from((1..=SPOOLS_MAX).take_while(exists).count()).unwrap_or(SPOOLS_MAX)
    }

    /// Removes all spools, the last one first, so that what is left has no gaps.
    pub fn remove_spools(&self) -> Result<()> {
        self.remove_growing();
        for number in (1..=self.spools()).rev() {
            let path = self.spool(number);
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    /// Removes the image that grew, if there is one. One that stays costs room and nothing else.
    pub fn remove_growing(&self) {
        drop(fs::remove_file(self.file(VMCORE_GROWING_FILE)));
    }

    /// The directory's own name, which names the crash.
    #[must_use]
    pub fn name(&self) -> &str {
        let name = self.path.file_name();
        name.and_then(|name| name.to_str()).unwrap_or_default()
    }

    /// The crash directory `path`, which exists.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Reads `session.json`.
    pub fn session(&self) -> Result<SessionFile> {
        let path = self.file(SESSION_FILE);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let session: SessionFile = serde_json::from_str(&text)
            .with_context(|| format!("{} is malformed", path.display()))?;
        if session.version > SESSION_FILE_VERSION {
            bail!(
                "{} is of version {}, this netdump reads up to {SESSION_FILE_VERSION}",
                path.display(),
                session.version
            );
        }
        Ok(session)
    }

    /// Replaces `session.json`.
    pub fn write_session(&self, session: &SessionFile) -> Result<()> {
        let mut text = serde_json::to_string_pretty(session).context("cannot write JSON")?;
        text.push('\n');
        self.replace(SESSION_FILE, text.as_bytes(), File::sync_all)?;
        self.sync()
    }

    /// Replaces `session.json`, without waiting for the disk: while a crash arrives, its spool is
    /// not waited for either.
    pub fn write_session_soon(&self, session: &SessionFile) -> Result<()> {
        let text = serde_json::to_string_pretty(session).context("cannot write JSON")?;
        self.replace(SESSION_FILE, format!("{text}\n").as_bytes(), |_| Ok(()))
    }

    /// Replaces the log. It is durable only after a sync of its own: while a crash arrives, readers
    /// matter more.
    pub fn write_log(&self, log: &[u8]) -> Result<()> {
        self.replace(LOG_FILE, log, |_| Ok(()))
    }

    /// Replaces what is kept of the hardware. It is durable like the log.
    pub fn write_hardware(&self, json: &[u8]) -> Result<()> {
        self.replace(HARDWARE_FILE, json, |_| Ok(()))
    }

    fn replace(
        &self,
        name: &'static str,
        bytes: &[u8],
        sync: fn(&File) -> io::Result<()>,
    ) -> Result<()> {
        let path = self.file(name);
        let aside = self.path.join(format!(".{name}.new"));
        let write = || {
            let mut file = File::create(&aside)?;
            file.write_all(bytes)?;
            sync(&file)?;
            fs::rename(&aside, &path)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Makes renames and new names in the directory durable, and the directory itself.
    pub fn sync(&self) -> Result<()> {
        sync_dir(&self.path)?;
        self.path.parent().map_or(Ok(()), sync_dir)
    }
}

impl SessionFile {
    /// The session's identifiers, or `None` when somebody edited them into something else.
    #[must_use]
    pub fn id(&self) -> Option<SessionId> {
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        Some(SessionId {
            key: KeyId(number(&self.key)?),
            arming: ArmingId(number(&self.arming)?),
        })
    }
}

impl SessionFile {
    /// How the session ended, if it has.
    #[must_use]
    pub fn over(&self) -> Over {
        let dismissed = matches!(self.verdict, Some(Want::Nothing(_)));
        Over {
            attempt: self.attempt,
            whole: dismissed || matches!(self.state, State::Complete | State::LogOnly),
            spools: None,
            broken: false,
        }
    }
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .with_context(|| format!("cannot sync {}", path.display()))
}

/// Version of the `session.json` written here.
pub const SESSION_FILE_VERSION: u32 = 1;
/// Attempts of one crash whose packets are kept. The host of a crash that needs more is told to
/// reboot.
pub const SPOOLS_MAX: u32 = 8;
/// Bounds the search for a free name.
const SAME_SECOND_MAX: u32 = 100;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn crashes_of_one_host_in_one_second_get_directories_of_their_own() {
        let dumpdir = tempfile::tempdir().unwrap();
        let host = HostName::new("web1").unwrap();
        let time = UNIX_EPOCH + Duration::from_secs(1_795_543_320);
        let names: Vec<String> = (0..3)
            .map(|_| CrashDir::create(dumpdir.path(), &host, time).unwrap())
            .map(|dir| dir.path().file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(
            names,
            [
                "web1-20261124T180200Z",
                "web1-20261124T180200Z-2",
                "web1-20261124T180200Z-3"
            ]
        );
    }

    #[test]
    fn a_clock_that_steps_back_takes_no_name_twice() {
        let dumpdir = tempfile::tempdir().unwrap();
        let host = HostName::new("web1").unwrap();
        let times = [60, 0, 60, 0, 30, 60].map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
        let paths: BTreeSet<PathBuf> = times
            .iter()
            .map(|&time| CrashDir::create(dumpdir.path(), &host, time).unwrap().path)
            .collect();
        assert_eq!(paths.len(), times.len());
    }

    #[test]
    fn spools_are_counted_and_removed_without_gaps() {
        let dumpdir = tempfile::tempdir().unwrap();
        let host = HostName::new("web1").unwrap();
        let dir = CrashDir::create(dumpdir.path(), &host, UNIX_EPOCH).unwrap();
        for number in [1, 2, 4] {
            fs::write(dir.spool(number), "").unwrap();
        }
        assert_eq!(dir.spools(), 2);
        dir.remove_spools().unwrap();
        assert_eq!(dir.spools(), 0);
    }

    #[test]
    fn a_session_file_reads_back_and_a_newer_one_is_refused() {
        let dumpdir = tempfile::tempdir().unwrap();
        let dir =
            CrashDir::create(dumpdir.path(), &HostName::new("a").unwrap(), UNIX_EPOCH).unwrap();
        let mut session = SessionFile {
            filter: 0,
            version: SESSION_FILE_VERSION,
            state: State::Receiving,
            verdict: Some(Want::LogOnly("no space".into())),
            why: None,
            host: "a".into(),
            key: "00000000000000ff".into(),
            arming: "0000000000000001".into(),
            attempt: 0,
            resumed: 0,
            peer: "10.0.0.1:6666".parse().unwrap(),
            started: "1970-01-01T00:00:00Z".into(),
            seconds: 0.5,
            bytes: 3,
            ruling: None,
            summary: Summary::default(),
            vmcore: None,
        };
        dir.write_session(&session).unwrap();
        let found = CrashDir::scan(dumpdir.path(), |warning| panic!("{warning}")).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            found[0].1.id(),
            Some(SessionId {
                key: KeyId(255),
                arming: ArmingId(1)
            })
        );
        session.version += 1;
        dir.write_session(&session).unwrap();
        let mut warnings = Vec::new();
        assert!(
            CrashDir::scan(dumpdir.path(), |warning| warnings.push(warning))
                .unwrap()
                .is_empty()
        );
        assert!(warnings[0].contains("version 2"), "{warnings:?}");
    }
}
