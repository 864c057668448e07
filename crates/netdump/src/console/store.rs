//! Where logs lie: `<dumpdir>/console/<host>/<boot>.<part>.log`, and `.log.zst` once nothing is
//! added any more.
//!
//! A boot is named by the time of its first message. Its parts are numbered from 0; a new one is
//! begun when one has become large. Names sort by time.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read as _, Seek as _, SeekFrom};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context as _, Result};
use netconsole::{Line, Note, Position, Stored, from_utc, utc};

use crate::key::HostName;

/// Name of the logs' directory in the dump directory.
pub const CONSOLE_DIR: &str = "console";
/// How much of a log's end is read to go on with it.
const TAIL_BYTES: u64 = 256 << 10;
/// Bytes of a boot's name: `20261124T003012.123456Z`.
const BOOT_NAME_BYTES: usize = 23;

/// A boot's name: when its first message was received, in microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Boot {
    /// The time.
    pub at_us: u64,
    /// The begin of the kernel's own boot id, of hosts that say it.
    pub id: Option<u32>,
}

/// One file of a host's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Which boot it is of.
    pub boot: Boot,
    /// Its number in the boot.
    pub number: u32,
    /// It is compressed.
    pub packed: bool,
    /// Its bytes on disk.
    pub bytes: u64,
    /// The file.
    pub path: PathBuf,
}

/// The name of the host with this address, for which there is no other name.
pub fn name_of(address: IpAddr) -> Result<HostName> {
    match address {
        IpAddr::V4(address) => HostName::new(&address.to_string()),
        IpAddr::V6(address) => {
            HostName::new(&format!("ip6-{}", address.to_string().replace(':', "-")))
        }
    }
}

impl fmt::Display for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Vec::new();
        utc(&mut text, self.at_us);
        for byte in text.into_iter().filter(|byte| !matches!(byte, b'-' | b':')) {
            write!(f, "{}", char::from(byte))?;
        }
        match self.id {
            Some(id) => write!(f, "-{id:08x}"),
            None => Ok(()),
        }
    }
}

impl Boot {
    /// Reads a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let (time, id) = name.split_at_checked(BOOT_NAME_BYTES)?;
        let id = match id.strip_prefix('-') {
            Some(id) if id.len() == 8 => Some(u32::from_str_radix(id, 16).ok()?),
            Some(_) => return None,
            None if id.is_empty() => None,
            None => return None,
        };
        let field = |from: usize, to: usize| time.get(from..to);
        let text = format!(
            "{}-{}-{}{}:{}:{}",
            field(0, 4)?,
            field(4, 6)?,
            field(6, 8)?,
            field(8, 11)?,
            field(11, 13)?,
            field(13, BOOT_NAME_BYTES)?
        );
        let at_us = from_utc(text.as_bytes())?;
        Some(Self { at_us, id })
    }

    /// Its part `number` in a host's directory, while it is written.
    #[must_use]
    pub fn path(&self, dir: &Path, number: u32) -> PathBuf {
        dir.join(format!("{self}.{number:04}.log"))
    }
}

impl Part {
    fn of(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let (plain, packed) = match name.strip_suffix(".zst") {
            Some(plain) => (plain, true),
            None => (name, false),
        };
        let (boot, number) = plain.strip_suffix(".log")?.rsplit_once('.')?;
        Some(Self {
            boot: Boot::parse(boot)?,
            number: number.parse().ok()?,
            packed,
            bytes: fs::symlink_metadata(&path).ok()?.len(),
            path,
        })
    }

    /// When its last line was written, in microseconds since 1970; a packed part keeps that.
    #[must_use]
    pub fn written_us(&self) -> Option<u64> {
        let written = fs::metadata(&self.path).ok()?.modified().ok()?;
        let since = written.duration_since(UNIX_EPOCH).ok()?;
        u64::try_from(since.as_micros()).ok()
    }

    /// Opens it for reading lines, behind the first `skip` bytes of them.
    ///
    /// # Errors
    /// It cannot be read. One that has been packed since it was listed is not found.
    pub fn open(&self, skip: u64) -> Result<Box<dyn BufRead>> {
        let cannot = || format!("cannot read {}", self.path.display());
        let mut file = File::open(&self.path).with_context(cannot)?;
        if !self.packed {
            file.seek(SeekFrom::Start(skip)).with_context(cannot)?;
            return Ok(Box::new(BufReader::new(file)));
        }
        let mut unpacked = zstd::Decoder::new(file).with_context(cannot)?;
        io::copy(&mut (&mut unpacked).take(skip), &mut io::sink()).with_context(cannot)?;
        Ok(Box::new(BufReader::new(unpacked)))
    }
}

/// The name of a part when it is packed.
#[must_use]
pub fn packed(part: &Path) -> PathBuf {
    let mut name = part.as_os_str().to_owned();
    name.push(".zst");
    name.into()
}

/// The files of a host's log, in the order they were written; none if there is no such directory.
#[must_use]
pub fn parts(dir: &Path) -> Vec<Part> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut parts: Vec<Part> = entries.filter_map(|entry| Part::of(entry.path())).collect();
    parts.sort_by_key(|part| (part.boot, part.number, part.packed));
    // Packing was interrupted between its last two steps: both are whole.
    parts.dedup_by_key(|part| (part.boot, part.number));
    parts
}

/// What is needed to go on with a log after the server was started again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    /// The last part.
    pub part: Part,
    /// Where its records end.
    pub position: Position,
    /// Its last line has no end.
    pub torn: bool,
}

/// The end of a host's log of in-tree netconsole, or of the boot that the host calls `id`.
#[must_use]
pub fn tail(dir: &Path, id: Option<u32>) -> Option<Tail> {
    let part = parts(dir).into_iter().rfind(|part| part.boot.id == id)?;
    if part.packed {
        return None;
    }
    let mut file = File::open(&part.path).ok()?;
    let begin = part.bytes.saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(begin)).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    let torn = bytes.last().is_some_and(|&byte| byte != b'\n');
    // A record that is cut did not come: one that can be had again is asked for.
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').unwrap_or(0);
    bytes.truncate(whole);
    let mut position = Position::default();
    for line in bytes.split(|&byte| byte == b'\n').filter_map(Line::parse) {
        position.at_us = position.at_us.max(line.at_us);
        match line.what {
            Stored::Record(record) => {
                position.seq = position.seq.max(record.seq);
                position.time_us = position.time_us.max(record.time_us);
            }
            Stored::Note(Note::Gap | Note::Lost, [_, last, _], _) => {
                position.seq = position.seq.max(last);
            }
            Stored::Note(..) => {}
        }
    }
    Some(Tail {
        part,
        position,
        torn,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_time_and_read_back() {
        let boots = [(0, None), (1, None), (1_795_543_320_000_001, Some(0xff))];
        let mut before = String::new();
        for (at_us, id) in boots {
            let boot = Boot { at_us, id };
            let name = boot.to_string();
            assert!(name > before, "{name}");
            assert_eq!(Boot::parse(&name), Some(boot));
            before = name;
        }
        assert_eq!(before, "20261124T180200.000001Z-000000ff");
        for name in [
            "",
            "20261124T180200.000001",
            "20261124T180200.000001Z-ff",
            "a/../../etc",
        ] {
            assert_eq!(Boot::parse(name), None, "{name}");
        }
    }

    #[test]
    fn addresses_are_host_names() {
        let check = |address: &str, name: &str| {
            assert_eq!(name_of(address.parse().unwrap()).unwrap().as_str(), name);
        };
        check("10.1.2.3", "10.1.2.3");
        check("::1", "ip6---1");
        check("2001:db8::5", "ip6-2001-db8--5");
    }

    #[test]
    fn the_tail_of_a_log_is_its_last_boot_that_is_of_its_kind() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let time = "2026-11-24T18:02:00.000001Z";
        write("20261124T180100.000000Z.0000.log", "old\n");
        write("20261124T180200.000001Z.0000.log.zst", "");
        write(
            "20261124T180200.000001Z.0001.log",
            &format!(
                "{time} 6,7,50,-;a\n{time} !gap,8,9;x\n{time} 6,10,60,-;b\n{time} 6,11,70,-;c"
            ),
        );
        write("20261124T190200.000001Z-0000002a.0000.log", "");
        write("other", "");
        let tail = tail(dir.path(), None).unwrap();
        assert_eq!((tail.part.number, tail.torn), (1, true));
        assert_eq!(
            (tail.position.seq, tail.position.time_us),
            (Some(10), Some(60))
        );
        assert_eq!(parts(dir.path()).len(), 4);
        assert!(super::tail(dir.path(), Some(42)).is_some());
        assert!(super::tail(dir.path(), Some(43)).is_none());
    }
}
