//! Which crashes are known: of each signature how often it came, where and when, and of which
//! crashes the memory is kept. From that follows what is wanted of the next one.
//!
//! The file is replaced as a whole, at most once a second. What a killed server had not written is
//! counted again from the crash directories, and so is everything when the file is lost.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use super::cause::Cause;
use super::directory::{CrashDir, SessionFile, VMCORE_FILE};
use super::registry::lock;
use crate::time::utc;

/// Name of the file in the dump directory.
pub const SIGNATURES_FILE: &str = ".signatures.json";
/// Signatures that are remembered; the one that was seen longest ago is forgotten first.
const SIGNATURES_MAX: usize = 4096;
/// Hosts and kernels that are told apart for each signature; the others are counted together.
const HOSTS_MAX: usize = 64;
const KERNELS_MAX: usize = 16;
/// What hosts and kernels beyond these are counted under.
const OTHERS: &str = "others";
/// The most dumps that can be asked to be kept for a signature and kernel.
const DUMPS_MAX: u32 = 1000;
/// What crashes are counted under whose text names nothing.
pub const UNNAMED: &str = "unnamed";
const UNNAMED_TITLE: &str = "crashes whose text does not tell what happened";
/// Version of the file. A higher one is not read.
const VERSION: u32 = 1;

/// What can be set: the table `[signatures]` of the configuration file. Everything has a default.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Memory images that are kept of each signature on each kernel build.
    pub dumps: u32,
    /// What is wanted of crashes beyond these: `"log-only"` or a filter level.
    pub beyond: Wanted,
    /// What is wanted when the machine is at fault: `"log-only"` or a filter level.
    pub hardware: Wanted,
    /// A signature that comes again is told at most once in so many seconds.
    pub notice_seconds: u64,
}

/// What is wanted of a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "neither \"log-only\" nor a filter level, 0 to 31"
)]
pub enum Wanted {
    /// The memory at this filter level, or at the server's if that leaves out more.
    Filter(Level),
    /// No pages.
    Only(LogOnly),
}

/// The word for no pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogOnly {
    /// Text, registers and state.
    LogOnly,
}

/// A filter level, 0 to 31.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8")]
pub struct Level(pub u8);

impl TryFrom<u8> for Level {
    type Error = String;

    fn try_from(level: u8) -> Result<Self, String> {
        let error = || format!("{level} is no filter level: 0 to 31");
        (level <= 31).then_some(Self(level)).ok_or_else(error)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            dumps: 3,
            beyond: Wanted::Only(LogOnly::LogOnly),
            hardware: Wanted::Only(LogOnly::LogOnly),
            notice_seconds: 3600,
        }
    }
}

/// What was decided of a crash by its signature, as `session.json` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ruling {
    /// What killed the host; absent when its text does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// Which crash of this signature it is here, from 1.
    pub number: u64,
    /// What is wanted of it; `None` is what the server wants of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<Wanted>,
    /// Why.
    pub why: String,
    /// Microseconds from the first packet to the decision.
    pub after_us: u64,
    /// When: microseconds since 1970.
    pub at_us: u64,
}

impl Ruling {
    /// The crash's signature.
    #[must_use]
    pub fn signature(&self) -> Option<String> {
        self.cause.as_ref().map(|cause| cause.signature.clone())
    }
}

/// A crash that is to be ruled on.
#[derive(Debug, Clone, Copy)]
pub struct Crash<'a> {
    /// What killed the host.
    pub cause: Option<&'a Cause>,
    /// The host.
    pub host: &'a str,
    /// Release and version of its kernel.
    pub kernel: &'a str,
    /// The name of its directory.
    pub name: &'a str,
}

/// A signature that is told: new, or with how often it came since it was told last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Notice {
    /// The signature, or [`UNNAMED`].
    pub signature: String,
    /// Its title.
    pub title: String,
    /// The kind.
    pub class: String,
    /// Crashes of it in all.
    pub crashes: u64,
    /// Crashes since it was told last.
    pub repeats: u64,
    /// Hosts that had it.
    pub hosts: usize,
    /// The last crash: the name of its directory.
    pub crash: String,
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            signature,
            title,
            crashes,
            repeats,
            hosts,
            crash,
            ..
        } = self;
        if *crashes == 1 {
            return write!(f, "new crash: {title} ({signature}), in {crash}");
        }
        write!(
            f,
            "{title} ({signature}) came {repeats} more times, {crashes} in all, on {hosts} hosts; \
            the last is {crash}"
        )
    }
}

/// One signature.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Entry {
    /// The name under which similar crashes meet.
    pub family: String,
    /// Its kind.
    pub class: String,
    /// What the kernel community would call it.
    pub title: String,
    /// Crashes in all.
    pub crashes: u64,
    /// UTC time of the first.
    pub first_seen: String,
    /// UTC time of the last.
    pub last_seen: String,
    /// The name of the last one's directory.
    pub last_crash: String,
    /// Crashes by host.
    pub hosts: BTreeMap<String, u64>,
    /// By release and version of the kernel.
    pub kernels: BTreeMap<String, Kernel>,
    /// The next one is wanted in full, whatever is kept already.
    pub next_in_full: bool,
    /// When it was told last: microseconds since 1970.
    pub told_us: u64,
    /// Crashes since then.
    pub untold: u64,
}

/// A signature on one kernel build.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Kernel {
    /// Crashes.
    pub crashes: u64,
    /// Crashes whose memory was asked for: names of directories.
    pub dumps: Vec<String>,
}

/// All signatures by name.
pub type Entries = BTreeMap<String, Entry>;

/// The store: see the module's documentation.
pub struct Signatures {
    dumpdir: PathBuf,
    settings: Settings,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    stored: Stored,
    changed: bool,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// Rulings up to this time are counted: microseconds since 1970.
    until_us: u64,
    signatures: Entries,
}

impl Default for Stored {
    fn default() -> Self {
        Self {
            version: VERSION,
            until_us: 0,
            signatures: Entries::new(),
        }
    }
}

impl Signatures {
    /// A store of nothing.
    #[must_use]
    pub fn new(dumpdir: &Path, settings: Settings) -> Self {
        Self {
            dumpdir: dumpdir.to_owned(),
            settings,
            inner: Mutex::default(),
        }
    }

    /// Reads the file, and counts the crashes in `found` that it does not have. What is wrong with
    /// the file is told through `warn`; then all is counted anew.
    pub fn load(&self, found: &[(CrashDir, SessionFile)], warn: impl FnOnce(String)) {
        let mut inner = lock(&self.inner);
        match read(&self.dumpdir) {
            Ok(stored) => inner.stored = stored.unwrap_or_default(),
            Err(error) => warn(format!(
                "{error:#}; the signatures are counted anew from the crashes that are here"
            )),
        }
        let until = inner.stored.until_us;
        for (dir, file) in found {
            let Some(ruling) = file.ruling.as_ref().filter(|ruling| ruling.at_us > until) else {
                continue;
            };
            let crash = Crash {
                cause: ruling.cause.as_ref(),
                host: &file.host,
                kernel: &file.summary.build(),
                name: dir.name(),
            };
            let keeps = ruling.wanted.is_none() && ruling.cause.is_some();
            let entry = inner.count(&crash, &file.started, ruling.at_us);
            entry.told_us = entry.told_us.max(ruling.at_us);
            if keeps {
                entry.kernel(crash.kernel).dumps.push(crash.name.to_owned());
            }
        }
    }

    /// Counts a crash and says what is wanted of it. `asked`: its memory would be asked for, were
    /// it the first of its kind. Also gives what is to be told.
    pub fn rule(
        &self,
        crash: &Crash<'_>,
        asked: bool,
        now: SystemTime,
        after: Duration,
    ) -> (Ruling, Option<Notice>) {
        let at_us = micros(now);
        let mut inner = lock(&self.inner);
        let entry = inner.count(crash, &utc(now), at_us);
        let (wanted, why) = if asked {
            self.decide(entry, crash)
        } else {
            (None, "its memory is not asked for by itself".to_owned())
        };
        let number = entry.crashes;
        entry.untold += 1;
        let notice = self.due(entry, at_us).then(|| {
            let signature = signature_of(crash.cause);
            tell(&signature, entry, at_us)
        });
        let ruling = Ruling {
            cause: crash.cause.cloned(),
            number,
            wanted,
            why,
            after_us: u64::try_from(after.as_micros()).unwrap_or(u64::MAX),
            at_us,
        };
        (ruling, notice)
    }

    fn decide(&self, entry: &mut Entry, crash: &Crash<'_>) -> (Option<Wanted>, String) {
        if entry.next_in_full {
            entry.next_in_full = false;
            entry.keep(crash);
            return (None, "a person asked for the next one in full".to_owned());
        }
        if crash.cause.is_some_and(|cause| cause.hardware) {
            let why = "the machine is at fault, which memory does not explain".to_owned();
            return (Some(self.settings.hardware), why);
        }
        if crash.cause.is_none() {
            return (None, "its text does not tell what happened".to_owned());
        }
        let kernel = entry.kernel(crash.kernel);
        kernel.dumps.retain(|name| self.is_kept(name));
        let kept = kernel.dumps.len();
        let wanted = usize::try_from(self.settings.dumps.min(DUMPS_MAX)).unwrap_or(usize::MAX);
        if kept < wanted {
            entry.keep(crash);
            let why = format!("{kept} dumps of {wanted} are kept of it on this kernel");
            return (None, why);
        }
        let why = format!("{kept} dumps of it are kept on this kernel already");
        (Some(self.settings.beyond), why)
    }

    /// Whether the crash has its memory image, or may still get it: its spools are there.
    fn is_kept(&self, name: &str) -> bool {
        let dir = CrashDir::at(self.dumpdir.join(name));
        dir.file(VMCORE_FILE).exists() || dir.spools() > 0
    }

    /// The next crash with this signature is wanted in full.
    pub fn want_next(&self, signature: &str) -> Result<()> {
        let mut inner = lock(&self.inner);
        let entry = inner.stored.signatures.get_mut(signature);
        let entry = entry.with_context(|| {
            format!("no crash with signature {signature} was here: netdump signatures lists them")
        })?;
        entry.next_in_full = true;
        inner.changed = true;
        Ok(())
    }

    /// What came again and is due to be told.
    pub fn notices(&self, now: SystemTime) -> Vec<Notice> {
        let now_us = micros(now);
        let mut inner = lock(&self.inner);
        let mut notices = Vec::new();
        for (signature, entry) in &mut inner.stored.signatures {
            if entry.untold > 0 && self.due(entry, now_us) {
                notices.push(tell(signature, entry, now_us));
            }
        }
        inner.changed |= !notices.is_empty();
        notices
    }

    fn due(&self, entry: &Entry, now_us: u64) -> bool {
        let every_us = self.settings.notice_seconds.saturating_mul(1_000_000);
        entry.told_us == 0 || now_us.saturating_sub(entry.told_us) >= every_us
    }

    /// All that is known.
    #[must_use]
    pub fn entries(&self) -> Entries {
        lock(&self.inner).stored.signatures.clone()
    }

    /// Writes the file if there is news.
    pub fn save(&self) -> Result<()> {
        let bytes = {
            let mut inner = lock(&self.inner);
            if !std::mem::take(&mut inner.changed) {
                return Ok(());
            }
            serde_json::to_vec(&inner.stored).context("cannot write JSON")?
        };
        let path = self.dumpdir.join(SIGNATURES_FILE);
        let aside = self.dumpdir.join(format!("{SIGNATURES_FILE}.new"));
        let write = || {
            // The directory may be writable by all: nothing that was planted there is followed.
            drop(fs::remove_file(&aside));
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&aside)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&aside, &path)
        };
        write().with_context(|| {
            lock(&self.inner).changed = true;
            format!("cannot write {}", path.display())
        })
    }
}

impl Inner {
    /// Counts a crash at `at_us`, which is `time` for people.
    fn count(&mut self, crash: &Crash<'_>, time: &str, at_us: u64) -> &mut Entry {
        self.changed = true;
        self.stored.until_us = self.stored.until_us.max(at_us);
        let signature = signature_of(crash.cause);
        let signatures = &mut self.stored.signatures;
        if !signatures.contains_key(&signature) && signatures.len() >= SIGNATURES_MAX {
            let seen = |(_, entry): &(&String, &Entry)| entry.last_seen.clone();
            let oldest = signatures.iter().min_by_key(seen);
            if let Some(oldest) = oldest.map(|(signature, _)| signature.clone()) {
                signatures.remove(&oldest);
            }
        }
        let entry = signatures.entry(signature).or_default();
        if entry.crashes == 0 {
            let cause = crash.cause.cloned().unwrap_or_else(|| Cause {
                title: UNNAMED_TITLE.to_owned(),
                class: UNNAMED.to_owned(),
                ..Cause::default()
            });
            (entry.family, entry.class, entry.title) = (cause.family, cause.class, cause.title);
            time.clone_into(&mut entry.first_seen);
        }
        entry.crashes += 1;
        time.clone_into(&mut entry.last_seen);
        crash.name.clone_into(&mut entry.last_crash);
        *bounded(&mut entry.hosts, crash.host, HOSTS_MAX) += 1;
        entry.kernel(crash.kernel).crashes += 1;
        entry
    }
}

impl Entry {
    fn kernel(&mut self, kernel: &str) -> &mut Kernel {
        bounded(&mut self.kernels, kernel, KERNELS_MAX)
    }

    fn keep(&mut self, crash: &Crash<'_>) {
        self.kernel(crash.kernel).dumps.push(crash.name.to_owned());
    }
}

/// The value of a key, or of all keys beyond the first `limit`.
fn bounded<'m, T: Default>(map: &'m mut BTreeMap<String, T>, key: &str, limit: usize) -> &'m mut T {
    let room = map.len() < limit || map.contains_key(key);
    map.entry(if room { key } else { OTHERS }.to_owned())
        .or_default()
}

fn signature_of(cause: Option<&Cause>) -> String {
    cause.map_or(UNNAMED, |cause| &cause.signature).to_owned()
}

fn tell(signature: &str, entry: &mut Entry, now_us: u64) -> Notice {
    entry.told_us = now_us;
    Notice {
        signature: signature.to_owned(),
        title: entry.title.clone(),
        class: entry.class.clone(),
        crashes: entry.crashes,
        repeats: std::mem::take(&mut entry.untold),
        hosts: entry.hosts.len(),
        crash: entry.last_crash.clone(),
    }
}

fn micros(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// What the file in `dumpdir` has; `None` when there is none.
fn read(dumpdir: &Path) -> Result<Option<Stored>> {
    let path = dumpdir.join(SIGNATURES_FILE);
    let show = path.display();
    let mut open = OpenOptions::new();
    open.read(true).custom_flags(libc::O_NOFOLLOW);
    let mut file = match open.open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {show}")),
    };
    let cannot = || format!("cannot read {show}");
    let owner = file.metadata().with_context(cannot)?.uid();
    ensure!(
        owner == geteuid().as_raw(),
        "{show} belongs to user {owner}, not to the one this runs as"
    );
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).with_context(cannot)?;
    let stored: Stored =
        serde_json::from_slice(&bytes).with_context(|| format!("{show} is malformed"))?;
    ensure!(
        stored.version <= VERSION,
        "{show} is of version {}, this netdump reads up to {VERSION}",
        stored.version
    );
    Ok(Some(stored))
}

/// The signatures of the server that works, or worked, in `dumpdir`.
///
/// # Errors
/// The file cannot be read.
pub fn stored(dumpdir: &Path) -> Result<Entries> {
    Ok(read(dumpdir)?.unwrap_or_default().signatures)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(number: usize) -> Cause {
        Cause {
            signature: format!("s1:{number:016x}"),
            ..Cause::default()
        }
    }

    #[test]
    fn what_is_kept_is_bounded_and_what_is_beyond_is_counted() {
        let dumpdir = tempfile::tempdir().unwrap();
        let store = Signatures::new(dumpdir.path(), Settings::default());
        let rule = |cause: &Cause, host: &str, seconds: u64| {
            let crash = Crash {
                cause: Some(cause),
                host,
                kernel: host,
                name: "web1-20261124T180200Z",
            };
            let now = UNIX_EPOCH + Duration::from_secs(seconds);
            store.rule(&crash, true, now, Duration::ZERO)
        };
        for number in 0..=SIGNATURES_MAX {
            rule(&cause(number), "a", 1 + number as u64);
        }
        let entries = store.entries();
        assert_eq!(entries.len(), SIGNATURES_MAX);
        assert!(
            !entries.contains_key(&cause(0).signature),
            "the oldest is forgotten"
        );
        for number in 0..100 {
            rule(&cause(1), &format!("host{number}"), 10_000);
        }
        let entry = &store.entries()[&cause(1).signature];
        assert_eq!(
            (entry.hosts.len(), entry.kernels.len()),
            (HOSTS_MAX + 1, KERNELS_MAX + 1)
        );
        assert_eq!(entry.hosts[OTHERS], 37);
        assert_eq!(entry.hosts.values().sum::<u64>(), entry.crashes);
        store.save().unwrap();
        assert_eq!(stored(dumpdir.path()).unwrap(), store.entries());
    }

    #[test]
    fn repeats_are_told_when_the_time_is_over_and_not_before() {
        let dumpdir = tempfile::tempdir().unwrap();
        let store = Signatures::new(dumpdir.path(), Settings::default());
        let cause = cause(1);
        let crash = Crash {
            cause: Some(&cause),
            host: "a",
            kernel: "k",
            name: "a-20261124T180200Z",
        };
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let told = |seconds| store.rule(&crash, true, at(seconds), Duration::ZERO).1;
        assert_eq!(told(1).map(|notice| notice.repeats), Some(1));
        assert_eq!((told(2), told(3)), (None, None));
        assert_eq!(store.notices(at(3600)), []);
        let notices = store.notices(at(3601));
        assert_eq!((notices[0].crashes, notices[0].repeats), (3, 2));
        assert_eq!(store.notices(at(9999)), []);
    }
}
