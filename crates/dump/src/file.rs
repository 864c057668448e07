//! The file underneath: runs of bytes written in large pieces, and reads that are bounded first.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::FromBytes;

use crate::error::DumpError;

/// Bytes gathered before they are written: enough that the cost of a system call does not show.
const BUFFER_BYTES: usize = 1 << 20;

/// Bytes read ahead.
const AHEAD_BYTES: u64 = 256 << 10;

/// Writes bytes to places in a file and gathers what is contiguous.
#[derive(Debug)]
pub(crate) struct RunWriter {
    file: Arc<File>,
    path: PathBuf,
    doing: &'static str,
    /// Where the first gathered byte belongs.
    start: u64,
    bytes: Vec<u8>,
    /// What was written, if it is to be proved.
    written: Option<Vec<Piece>>,
}

/// What one call wrote.
#[derive(Debug)]
struct Piece {
    start: u64,
    bytes: usize,
    hash: u64,
}

impl RunWriter {
    pub(crate) fn new(file: &Arc<File>, path: &Path, doing: &'static str) -> Self {
        let bytes = Vec::with_capacity(BUFFER_BYTES);
        Self {
            file: Arc::clone(file),
            path: path.to_owned(),
            doing,
            start: 0,
            bytes,
            written: None,
        }
    }

    /// A writer whose [`Self::prove`] proves what it wrote. It never writes to a place twice.
    pub(crate) fn proving(file: &Arc<File>, path: &Path, doing: &'static str) -> Self {
        Self {
            written: Some(Vec::new()),
            ..Self::new(file, path, doing)
        }
    }

    /// Reads back all that was written and compares hashes.
    pub(crate) fn prove(&self) -> Result<(), DumpError> {
        let mut back = Vec::new();
        for piece in self.written.iter().flatten() {
            back.resize(piece.bytes, 0);
            self.file
                .read_exact_at(&mut back, piece.start)
                .map_err(DumpError::io("reading back", &self.path))?;
            if xxh3_64(&back) != piece.hash {
                let what = format!("{} bytes read back are not what was written", piece.bytes);
                return Err(DumpError::malformed(&self.path, piece.start, what));
            }
        }
        Ok(())
    }

    pub(crate) fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DumpError> {
        let contiguous = self.start + self.bytes.len() as u64 == offset;
        if !contiguous || self.bytes.len() + bytes.len() > BUFFER_BYTES {
            self.flush()?;
            self.start = offset;
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), DumpError> {
        if !self.bytes.is_empty() {
            self.file
                .write_all_at(&self.bytes, self.start)
                .map_err(DumpError::io(self.doing, &self.path))?;
            if let Some(written) = &mut self.written {
                written.push(Piece {
                    start: self.start,
                    bytes: self.bytes.len(),
                    hash: xxh3_64(&self.bytes),
                });
            }
            self.start += self.bytes.len() as u64;
            self.bytes.clear();
        }
        Ok(())
    }
}

/// A part of a file that was read ahead, for readers that mostly go forwards.
#[derive(Debug, Default)]
pub(crate) struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    /// The `count` bytes at `offset`. When they lie shortly behind those of the last call, some
    /// more are read with them; a jump reads no more than it needs.
    pub(crate) fn get(
        &mut self,
        input: &Input,
        what: &str,
        offset: u64,
        count: usize,
    ) -> Result<&[u8], DumpError> {
        input.check(what, offset, count as u64)?;
        let end = self.start + self.bytes.len() as u64;
        if offset < self.start || offset + count as u64 > end {
            let forwards = (self.start..=end + AHEAD_BYTES).contains(&offset);
            let ahead = if forwards { AHEAD_BYTES } else { 0 };
            let more = ahead.max(count as u64).min(input.len() - offset);
            self.bytes.resize(usize::try_from(more).unwrap_or(count), 0);
            self.start = offset;
            if let Err(error) = input.fill(what, offset, &mut self.bytes) {
                self.bytes.clear();
                return Err(error);
            }
        }
        let from = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        let bytes = self.bytes.get(from..).and_then(|rest| rest.get(..count));
        Ok(bytes.unwrap_or_default())
    }
}

/// A file opened for reading whose every read is checked against its length first.
#[derive(Debug)]
pub(crate) struct Input {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl Input {
    pub(crate) fn open(path: &Path) -> Result<Self, DumpError> {
        let file = File::open(path).map_err(DumpError::io("opening for reading", path))?;
        let bytes = file
            .metadata()
            .map_err(DumpError::io("asking its size", path))?
            .len();
        Ok(Self {
            file,
            path: path.to_owned(),
            bytes,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) const fn len(&self) -> u64 {
        self.bytes
    }

    /// Checks that `count` bytes at `offset` are in the file.
    pub(crate) fn check(&self, what: &str, offset: u64, count: u64) -> Result<(), DumpError> {
        match offset.checked_add(count) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(DumpError::malformed(
                &self.path,
                offset,
                format!(
                    "{what} needs {count} bytes but the file has {} bytes",
                    self.bytes
                ),
            )),
        }
    }

    pub(crate) fn fill(&self, what: &str, offset: u64, bytes: &mut [u8]) -> Result<(), DumpError> {
        self.check(what, offset, bytes.len() as u64)?;
        self.file
            .read_exact_at(bytes, offset)
            .map_err(DumpError::io("reading", &self.path))
    }

    /// Reads `count` bytes into fresh memory, which is no larger than the file.
    pub(crate) fn bytes(&self, what: &str, offset: u64, count: u64) -> Result<Vec<u8>, DumpError> {
        self.check(what, offset, count)?;
        let count = usize::try_from(count).map_err(|_too_large| {
            DumpError::malformed(
                &self.path,
                offset,
                format!("{what} has {count} bytes, more than fit in memory"),
            )
        })?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(count).map_err(|_no_memory| {
            DumpError::malformed(
                &self.path,
                offset,
                format!("{what} has {count} bytes, more than fit in memory"),
            )
        })?;
        bytes.resize(count, 0);
        self.fill(what, offset, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn record<T: FromBytes>(&self, what: &str, offset: u64) -> Result<T, DumpError> {
        let bytes = self.bytes(what, offset, size_of::<T>() as u64)?;
        T::read_from_bytes(&bytes).map_err(|_size| {
            DumpError::malformed(&self.path, offset, format!("{what} is cut short"))
        })
    }
}
