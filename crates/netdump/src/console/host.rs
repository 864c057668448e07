//! One host's state between its messages: its stream, and the file it is written to. It is small,
//! because there may be very many.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, IoSlice, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use netconsole::{Position, Stream};

use super::store::{self, Boot};
use super::view::Heard;

/// See the module's documentation.
pub(super) struct Host {
    /// The name of its directory.
    pub(super) name: Box<str>,
    pub(super) stream: Stream,
    pub(super) log: Log,
    /// The first and the last of its lines of this pass.
    pub(super) lines: Option<(u32, u32)>,
    /// Its stream waits for something.
    pub(super) waits: bool,
    /// What it still may send in this second, and which second that is.
    pub(super) allowance: (u32, u64),
    /// Datagrams over its limit that its log does not tell yet.
    pub(super) limited: u64,
    /// Losses of the server that its log tells, and when it told them.
    pub(super) told: (u64, u64),
    /// What it said, for people who ask.
    pub(super) heard: Heard,
}

/// The file that a host's lines go to.
#[derive(Default)]
pub(super) struct Log {
    boot: Option<Boot>,
    /// What the kernel calls its boot, of those that say it.
    id: Option<u32>,
    part: u32,
    bytes: u64,
    file: Option<File>,
    /// The last line has no end.
    torn: bool,
    /// The last write was given up; the next one that fails is not waited for.
    pub(super) fails: bool,
    /// Used since the last look for files to close.
    pub(super) used: bool,
}

impl Host {
    /// A host, or one boot of it that it calls `id`, and where an earlier server's log of it ended.
    pub(super) fn open(dir: &Path, name: &str, id: Option<u32>) -> (Self, Option<Position>) {
        let tail = store::tail(&dir.join(name), id);
        let position = tail.as_ref().map(|tail| tail.position);
        let (stream, log) = match tail {
            Some(tail) => (
                Stream::resume(tail.position),
                Log {
                    boot: Some(tail.part.boot),
                    part: tail.part.number,
                    bytes: tail.part.bytes,
                    torn: tail.torn,
                    ..Log::default()
                },
            ),
            None => (Stream::default(), Log::default()),
        };
        let log = Log { id, ..log };
        let host = Self {
            name: name.into(),
            stream,
            log,
            lines: None,
            waits: false,
            allowance: (0, 0),
            limited: 0,
            told: (0, 0),
            heard: Heard {
                at_us: position.map_or(0, |position| position.at_us),
                ..Heard::default()
            },
        };
        (host, position)
    }
}

impl Log {
    /// What follows belongs to another boot.
    pub(super) fn begin(&mut self, at_us: u64) {
        let id = self.id;
        *self = Self {
            boot: Some(Boot { at_us, id }),
            id,
            ..Self::default()
        };
    }

    /// Its boot has begun.
    pub(super) fn has_boot(&self) -> bool {
        self.boot.is_some()
    }

    /// The boot that lines belong to now.
    pub(super) fn boot(&self) -> Option<Boot> {
        self.boot
    }

    /// Its boot begins with what is put into the pass next.
    pub(super) fn expect_boot(&mut self) {
        self.boot = Some(Boot {
            at_us: 0,
            id: self.id,
        });
    }

    /// There is a file open.
    pub(super) fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// Closes the file; the next line opens it again.
    pub(super) fn close(&mut self) {
        self.file = None;
    }

    /// The open file once more, to be synced by somebody else.
    pub(super) fn clone_file(&self) -> Option<File> {
        self.file.as_ref().and_then(|file| file.try_clone().ok())
    }

    /// A line was given up in its middle.
    pub(super) fn tear(&mut self) {
        self.torn = true;
    }

    /// Ends the part, if it has `part_bytes` or more.
    pub(super) fn turn(&mut self, part_bytes: u64) -> bool {
        let full = self.bytes >= part_bytes;
        if full {
            self.file = None;
            self.part += 1;
            self.bytes = 0;
        }
        full
    }

    /// Appends what `slices` hold; those that are written are gone from it, even when the call
    /// fails, so that it can be called again.
    pub(super) fn append(&mut self, dir: &Path, slices: &mut &mut [IoSlice<'_>]) -> io::Result<()> {
        self.used = true;
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.open(dir)?,
        };
        let written = self.write(&mut file, slices);
        self.file = Some(file);
        written
    }

    fn write(&mut self, file: &mut File, slices: &mut &mut [IoSlice<'_>]) -> io::Result<()> {
        if self.torn {
            file.write_all(TORN_END)?;
            self.torn = false;
            self.bytes += TORN_END.len() as u64;
        }
        while !slices.is_empty() {
            match file.write_vectored(slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.bytes += written as u64;
                    IoSlice::advance_slices(slices, written);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Opens the file of this part. One that was packed or removed since it was closed stays as it is:
    /// what follows is in a part of its own.
    fn open(&mut self, dir: &Path) -> io::Result<File> {
        loop {
            let Some(boot) = &mut self.boot else {
                return Err(io::Error::other("a line that belongs to no boot"));
            };
            let path = boot.path(dir, self.part);
            match open_part(&path, self.part, self.bytes) {
                Ok(Some(file)) => return Ok(file),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => {
                    fs::DirBuilder::new()
                        .recursive(true)
                        .mode(0o700)
                        .create(dir)?;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && self.bytes > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
            // A boot that begins gets a file of its own, even in the same microsecond.
            if self.part == 0 && self.bytes == 0 {
                boot.at_us += 1;
            } else {
                self.part += 1;
            }
            self.bytes = 0;
            self.torn = false;
        }
    }
}

/// Ends a line that was cut when a server or a disk came to its end, and says so in its dictionary.
const TORN_END: &[u8] = b"\tcut=1\n";

/// Opens a part that has `bytes` already, or makes one; none if it is being packed, or has been.
fn open_part(path: &Path, part: u32, bytes: u64) -> io::Result<Option<File>> {
    let begins = bytes == 0;
    if begins && store::packed(path).exists() {
        return Ok(None);
    }
    let file = OpenOptions::new()
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .create(begins)
        .create_new(begins && part == 0)
        .open(path)?;
    // Who packs holds a lock until the file is gone. A file system without locks is not packed.
    let is_taken = matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
    let is_ours = !is_taken && file.metadata()?.nlink() > 0;
    Ok(is_ours.then_some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(log: &mut Log, dir: &Path, text: &str) {
        let mut slices = [IoSlice::new(text.as_bytes())];
        log.append(dir, &mut &mut slices[..]).unwrap();
    }

    #[test]
    fn boots_and_parts_have_files_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("console/web1");
        for text in ["first\n", "second\n"] {
            let mut log = Log::default();
            log.begin(1_000_000);
            append(&mut log, &dir, text);
            assert!(!log.turn(100) && log.turn(5));
            append(&mut log, &dir, "part two\n");
        }
        let texts = store::parts(&dir)
            .into_iter()
            .map(|part| fs::read_to_string(part.path).unwrap());
        let texts: Vec<String> = texts.collect();
        assert_eq!(texts, ["first\n", "part two\n", "second\n", "part two\n"]);
    }

    #[test]
    fn a_part_that_is_packed_while_it_is_closed_is_followed_by_another() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("web1");
        let mut log = Log::default();
        log.begin(1_000_000);
        append(&mut log, &dir, "one\n");
        let path = store::parts(&dir).remove(0).path;
        // It is locked as long as it is open.
        assert!(File::open(&path).unwrap().try_lock().is_err());
        log.close();
        let packer = File::open(&path).unwrap();
        packer.try_lock().unwrap();
        append(&mut log, &dir, "two\n");
        log.close();
        fs::rename(&path, store::packed(&path)).unwrap();
        drop(packer);
        append(&mut log, &dir, "three\n");
        log.close();
        fs::remove_file(dir.join("19700101T000001.000000Z.0001.log")).unwrap();
        append(&mut log, &dir, "four\n");
        let parts = store::parts(&dir).into_iter();
        let texts: Vec<(u32, String)> = parts
            .map(|part| (part.number, fs::read_to_string(part.path).unwrap()))
            .collect();
        assert_eq!(texts, [(0, "one\n".into()), (2, "four\n".into())]);
    }

    #[test]
    fn a_torn_line_is_ended_before_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::default();
        log.begin(1_000_000);
        append(
            &mut log,
            &dir.path().join("web1"),
            "1970-01-01T00:00:01.000000Z 6,1,2,-;x\n6,",
        );
        let (mut host, position) = Host::open(dir.path(), "web1", None);
        assert_eq!(position.unwrap().seq, Some(1));
        append(&mut host.log, &dir.path().join("web1"), "next\n");
        let parts = store::parts(&dir.path().join("web1"));
        let text = fs::read_to_string(&parts[0].path).unwrap();
        assert!(text.ends_with("\n6,\tcut=1\nnext\n"), "{text}");
    }

    #[test]
    fn a_host_is_small() {
        assert!(size_of::<Host>() <= 400, "{}", size_of::<Host>());
    }
}
