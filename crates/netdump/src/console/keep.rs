//! Old logs: parts to which nothing is added any more are packed, and what is too old or too much is
//! removed. The part that a host's messages go to is never touched.

use std::fs::{self, File};
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
        pack(part)?;
    }
    let parts = store::parts(dir);
    let mut bytes: u64 = parts.iter().map(|part| part.bytes).sum();
    let days = Duration::from_secs(console.settings.days.saturating_mul(24 * 60 * 60));
    for part in parts.iter().filter(|part| is_complete(part, &parts)) {
        let old = age(part).is_some_and(|age| age > days);
        if !old && bytes <= console.settings.host_mib << 20 {
            break;
        }
        let show = part.path.display();
        fs::remove_file(&part.path).with_context(|| format!("cannot remove {show}"))?;
        bytes -= part.bytes;
    }
    Ok(())
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
fn pack(part: &Part) -> Result<()> {
    let show = part.path.display();
    let mut name = part.path.clone().into_os_string();
    name.push(".zst");
    let packed = PathBuf::from(&name);
    name.push(".new");
    let aside = PathBuf::from(name);
    let work = || -> io::Result<()> {
        let mut from = File::open(&part.path)?;
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
        let console = Console::new(dump.path(), settings(1));
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
        tidy(&console, &dir).unwrap();
        let packed = |parts: &[Part]| parts.iter().map(|part| part.packed).collect::<Vec<_>>();
        let parts = store::parts(&dir);
        assert_eq!(packed(&parts), [true, true, false]);
        assert_eq!(parts[0].open().unwrap().lines().count(), 20_000);
        tidy(&Console::new(dump.path(), settings(0)), &dir).unwrap();
        assert_eq!(packed(&store::parts(&dir)), [false]);
    }
}
