//! Old logs: parts to which nothing is added any more are packed, and what is too old or too much is
//! removed. The part that a host's messages go to is never touched.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};

use super::Console;
use super::store::{self, Part};
use crate::serve::events::Events;
use crate::serve::registry::lock;

/// Packs and removes until the server ends.
pub(super) fn run(console: &Console, events: &Events, stopping: impl Fn() -> bool) {
    let mut next = Instant::now() + FIRST_LOOK;
    while !stopping() {
        thread::sleep(STEP);
        let mut dirs = std::mem::take(&mut *lock(&console.full_dirs));
        if Instant::now() >= next {
            next = Instant::now() + LOOK_EVERY;
            dirs = hosts(&console.dir);
        }
        for dir in dirs {
            if stopping() {
                return;
            }
            if let Err(error) = tidy(console, &dir) {
                events.warn_rarely(format!("{error:#}"));
            }
        }
    }
}

fn hosts(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Packs and removes in one host's directory.
fn tidy(console: &Console, dir: &Path) -> Result<()> {
    let parts = store::parts(dir);
    let complete = parts.iter().filter(|part| is_complete(part, &parts));
    for part in complete.filter(|part| !part.packed) {
        if let Some(file) = claim(part)? {
            pack(part, file)?;
        }
    }
    let parts = store::parts(dir);
    let mut bytes: u64 = parts.iter().map(|part| part.bytes).sum();
    let days = Duration::from_secs(console.settings.days.saturating_mul(24 * 60 * 60));
    for part in parts.iter().filter(|part| is_complete(part, &parts)) {
        let old = age(part).is_some_and(|age| age > days);
        if !old && bytes <= console.settings.host_mib << 20 {
            break;
        }
        let Some(_claimed) = claim(part)? else {
            continue;
        };
        let show = part.path.display();
        fs::remove_file(&part.path).with_context(|| format!("cannot remove {show}"))?;
        bytes -= part.bytes;
    }
    Ok(())
}

/// The part's file, locked, if it is not open for writing: a writer holds a lock of its own. Names
/// alone do not tell, because a clock that was set back makes the newest one look old, and two
/// machines may share a key. Who opens the part while it is locked begins another one.
fn claim(part: &Part) -> Result<Option<File>> {
    let show = part.path.display();
    let cannot = || format!("cannot lock {show}");
    let file = File::open(&part.path).with_context(cannot)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).with_context(cannot),
    }
}

/// Whether nothing more is added: there is a later part of the same kind of log.
fn is_complete(part: &Part, parts: &[Part]) -> bool {
    let place = |part: &Part| (part.boot, part.number);
    let same_kind = |other: &&Part| other.boot.id.is_some() == part.boot.id.is_some();
    parts
        .iter()
        .filter(same_kind)
        .any(|other| place(other) > place(part))
}

fn age(part: &Part) -> Option<Duration> {
    let written = fs::metadata(&part.path).ok()?.modified().ok()?;
    SystemTime::now().duration_since(written).ok()
}

/// Replaces a part by a packed one. It is there in one form or the other at any moment.
fn pack(part: &Part, mut from: File) -> Result<()> {
    let show = part.path.display();
    let packed = store::packed(&part.path);
    let aside = packed.with_extension("zst.new");
    let mut work = || -> io::Result<()> {
        let written = from.metadata()?.modified()?;
        let mut to = zstd::Encoder::new(File::create(&aside)?, PACK_LEVEL)?;
        io::copy(&mut from, &mut to)?;
        let to = to.finish()?;
        to.set_modified(written)?;
        to.sync_all()?;
        fs::rename(&aside, &packed)?;
        fs::remove_file(&part.path)
    };
    work().with_context(|| format!("cannot pack {show}"))
}

const STEP: Duration = Duration::from_millis(500);
const FIRST_LOOK: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_secs(600);
/// Text packs well at the default level, at hundreds of megabytes a second.
const PACK_LEVEL: i32 = 3;

#[cfg(test)]
mod tests {
    use std::io::BufRead as _;

    use super::super::settings::Settings;
    use super::*;

    #[test]
    fn complete_parts_are_packed_and_the_oldest_removed_the_last_one_never() {
        let dump = tempfile::tempdir().unwrap();
        let settings = |host_mib| Settings {
            host_mib,
            ..Settings::default()
        };
        let console = Console::new(dump.path(), settings(2));
        let dir = console.dir.join("web1");
        fs::create_dir_all(&dir).unwrap();
        let text = "2026-11-24T18:02:00.000001Z 6,7,50,-;a line\n".repeat(20_000);
        for name in [
            "20261124T180100.000000Z.0000",
            "20261124T180200.000000Z.0000",
        ] {
            fs::write(dir.join(format!("{name}.log")), &text).unwrap();
        }
        fs::write(dir.join("20261124T180200.000000Z.0001.log"), &text).unwrap();
        let last = File::open(dir.join("20261124T180100.000000Z.0000.log")).unwrap();
        last.lock_shared().unwrap();
        tidy(&console, &dir).unwrap();
        // One that is written to has the oldest name, as when the clock was set back.
        assert!(!store::parts(&dir)[0].packed && store::parts(&dir)[1].packed);
        drop(last);
        tidy(&console, &dir).unwrap();
        let packed = |parts: &[Part]| parts.iter().map(|part| part.packed).collect::<Vec<_>>();
        let parts = store::parts(&dir);
        assert_eq!(packed(&parts), [true, true, false]);
        assert_eq!(parts[0].open(0).unwrap().lines().count(), 20_000);
        tidy(&Console::new(dump.path(), settings(0)), &dir).unwrap();
        assert_eq!(packed(&store::parts(&dir)), [false]);
    }
}
