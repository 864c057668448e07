//! Writer of a capture file: the classic pcap format with nanoseconds, which every analyser opens.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// An open capture.
#[derive(Debug)]
pub struct Pcap {
    file: BufWriter<File>,
}

/// Bytes kept of a frame: its headers and the clear beginning of a datagram; what follows is
/// sealed.
const SNAP: usize = 96;
/// Magic number of captures with nanoseconds, in the writer's byte order.
const MAGIC: u32 = 0xa1b2_3c4d;
const LINKTYPE_ETHERNET: u32 = 1;

impl Pcap {
    /// Starts a capture in a new file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        // Version 2.4, time zone 0, accuracy 0.
        for word in [MAGIC, 4 << 16 | 2, 0, 0, 0xffff, LINKTYPE_ETHERNET] {
            file.write_all(&word.to_le_bytes())?;
        }
        Ok(Self { file })
    }

    /// Adds one frame that passed at `when`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn frame(&mut self, when: SystemTime, frame: &[u8]) -> io::Result<()> {
        let since = when.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let kept = &frame[..frame.len().min(SNAP)];
        let word = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        // The format's seconds are 32 bits: good until 2106.
        let seconds = u32::try_from(since.as_secs()).unwrap_or(u32::MAX);
        for word in [
            seconds,
            since.subsec_nanos(),
            word(kept.len()),
            word(frame.len()),
        ] {
            self.file.write_all(&word.to_le_bytes())?;
        }
        self.file.write_all(kept)
    }

    /// Writes what is buffered.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
