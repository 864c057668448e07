//! A target's messages on disk until it has them: lines, one a message, in files of a few
//! megabytes. A place is a number of bytes since the spool was begun, so it stays the same when
//! files go.
//!
//! `<begin>.spool` holds the lines from place `begin` on; `acknowledged` says up to where the target
//! has them. A server that was killed goes on there.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// A file that is so long gets no more lines.
const FILE_BYTES: u64 = 4 << 20;
/// Name of the file that says what the target has.
const ACKNOWLEDGED_FILE: &str = "acknowledged";

/// See the module's documentation.
pub(super) struct Spool {
    dir: PathBuf,
    bytes_max: u64,
    /// Where each file begins.
    begins: VecDeque<u64>,
    end: u64,
    acknowledged: u64,
    /// The last file.
    file: Option<File>,
    acknowledged_file: File,
}

impl Spool {
    /// Opens the spool in `dir`, which is made when it does not exist, with what an earlier server
    /// left there; says how many messages that is.
    pub(super) fn open(dir: &Path, bytes_max: u64) -> Result<(Self, u64)> {
        let show = dir.display();
        let cannot = || format!("cannot use the spool {show}");
        fs::create_dir_all(dir).with_context(cannot)?;
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let path = dir.join(ACKNOWLEDGED_FILE);
        let mut acknowledged_file = guarded(&mut options).open(path).with_context(cannot)?;
        let mut text = String::new();
        acknowledged_file
            .read_to_string(&mut text)
            .with_context(cannot)?;
        let said: u64 = text.trim().parse().unwrap_or(0);
        let mut begins: Vec<u64> = fs::read_dir(dir)
            .with_context(cannot)?
            .filter_map(|entry| begin_of(&entry.ok()?.path()))
            .collect();
        begins.sort_unstable();
        let mut spool = Self {
            dir: dir.to_owned(),
            bytes_max,
            end: said,
            acknowledged: said,
            begins: begins.into(),
            file: None,
            acknowledged_file,
        };
        let waiting = spool.take_up().with_context(cannot)?;
        Ok((spool, waiting))
    }

    /// Finds the end of the last whole line, and counts what waits.
    fn take_up(&mut self) -> io::Result<u64> {
        let (Some(&first), Some(&last)) = (self.begins.front(), self.begins.back()) else {
            return Ok(0);
        };
        let bytes = fs::read(self.path(last))?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n');
        let whole = whole.map_or(0, |at| at as u64 + 1);
        let file = guarded(OpenOptions::new().append(true)).open(self.path(last))?;
        // A line that has no end was not told to be there.
        file.set_len(whole)?;
        self.file = Some(file);
        self.end = last + whole;
        self.acknowledged = self.acknowledged.clamp(first, self.end);
        let (mut at, mut waiting, mut lines) = (self.acknowledged, 0, Vec::new());
        while at < self.end {
            self.read(at, &mut lines)?;
            waiting += lines.iter().filter(|&&byte| byte == b'\n').count() as u64;
            at += lines.len() as u64;
        }
        Ok(waiting)
    }

    /// There is room for so many bytes.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        self.end - self.acknowledged + bytes <= self.bytes_max
    }

    /// Appends lines.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        let begin = self.begins.back().copied();
        let full = begin.is_none_or(|begin| self.end - begin >= FILE_BYTES);
        let mut file = match self.file.take().filter(|_| !full) {
            Some(file) => file,
            None => {
                let mut options = OpenOptions::new();
                let options = guarded(options.append(true).create_new(true));
                let file = options.open(self.path(self.end))?;
                self.begins.push_back(self.end);
                file
            }
        };
        let written = file.write_all(lines);
        if written.is_ok() {
            self.end += lines.len() as u64;
        } else {
            let begin = self.begins.back().copied().unwrap_or(self.end);
            // A full disk has room for less.
            file.set_len(self.end - begin)?;
        }
        self.file = Some(file);
        written
    }

    /// Replaces `lines` by the whole lines from place `from` on, as many as one read brings.
    pub(super) fn read(&self, from: u64, lines: &mut Vec<u8>) -> io::Result<()> {
        lines.clear();
        let after = self.begins.partition_point(|&begin| begin <= from);
        let Some(&begin) = after.checked_sub(1).and_then(|at| self.begins.get(at)) else {
            return Ok(());
        };
        let end = self.begins.get(after).copied().unwrap_or(self.end);
        let left = usize::try_from(end.saturating_sub(from)).unwrap_or(usize::MAX);
        lines.resize(left.min(READ_BYTES), 0);
        File::open(self.path(begin))?.read_exact_at(lines, from - begin)?;
        let whole = lines.iter().rposition(|&byte| byte == b'\n');
        lines.truncate(whole.map_or(0, |at| at + 1));
        if lines.is_empty() && left > 0 {
            return Err(io::Error::other(format!(
                "no line ends in {} behind byte {}",
                self.path(begin).display(),
                from - begin
            )));
        }
        Ok(())
    }

    /// The target has everything before `place`; what is before `free` is not needed again.
    pub(super) fn acknowledge(&mut self, place: u64, free: u64) -> io::Result<()> {
        if place != self.acknowledged {
            self.acknowledged = place;
            self.acknowledged_file
                .write_all_at(format!("{place:020}\n").as_bytes(), 0)?;
        }
        while self.begins.get(1).is_some_and(|&next| next <= free) {
            if let Some(begin) = self.begins.pop_front() {
                fs::remove_file(self.path(begin))?;
            }
        }
        Ok(())
    }

    /// Where the next line goes.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Up to where the target has everything.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    fn path(&self, begin: u64) -> PathBuf {
        self.dir.join(format!("{begin:020}.spool"))
    }
}

/// Nobody else reads it, and no link that somebody planted is followed.
fn guarded(options: &mut OpenOptions) -> &OpenOptions {
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW)
}

fn begin_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(".spool")?.parse().ok()
}

/// Bytes of one read: more than any message has.
const READ_BYTES: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn all(spool: &Spool, mut from: u64) -> String {
        let (mut text, mut lines) = (Vec::new(), Vec::new());
        while from < spool.end() {
            spool.read(from, &mut lines).unwrap();
            from += lines.len() as u64;
            text.extend_from_slice(&lines);
        }
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn lines_survive_a_kill_and_a_torn_one_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (mut spool, waiting) = Spool::open(dir.path(), 100).unwrap();
        assert_eq!(waiting, 0);
        spool.append(b"one\ntwo\n").unwrap();
        spool.acknowledge(4, 4).unwrap();
        let path = spool.path(0);
        drop(spool);
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(b"thr").unwrap();
        let (mut spool, waiting) = Spool::open(dir.path(), 100).unwrap();
        assert_eq!((waiting, spool.end()), (1, 8));
        spool.append(b"four\n").unwrap();
        assert_eq!(all(&spool, spool.acknowledged()), "two\nfour\n");
    }

    #[test]
    fn it_is_bounded_and_files_go_when_nobody_needs_them() {
        let dir = tempfile::tempdir().unwrap();
        let line = [vec![b'x'; (1 << 17) - 1], b"\n".to_vec()].concat();
        let (mut spool, _) = Spool::open(dir.path(), 12 << 20).unwrap();
        let mut lines = 0;
        while spool.has_room(line.len() as u64) {
            spool.append(&line).unwrap();
            lines += 1;
        }
        assert_eq!((lines, spool.begins.len()), (96, 3));
        assert_eq!(all(&spool, 0).lines().count(), 96);
        spool.acknowledge(9 << 20, 7 << 20).unwrap();
        assert_eq!(spool.begins, [4 << 20, 8 << 20]);
        assert!(spool.has_room(line.len() as u64), "there is room again");
        spool.append(&line).unwrap();
        drop(spool);
        let (spool, waiting) = Spool::open(dir.path(), 12 << 20).unwrap();
        assert_eq!((waiting, spool.acknowledged()), (25, 9 << 20));
    }
}
