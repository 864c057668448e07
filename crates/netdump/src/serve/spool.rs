//! The spool: what the server has received of one session, in order, on disk.
//!
//! ```text
//!  byte 0        8        16         24        26        32             40
//!       +--------+--------+----------+---------+---------+--------------+
//! file  | magic  | key id | arming id| attempt | zero    | first packet |  then frames:
//!       +--------+--------+----------+---------+---------+--------------+
//! frame | packet number   | packets (4), bytes (4)       | XXH3-64      |  then the stream's bytes
//!       +-----------------+------------------------------+--------------+
//! ```
//! All integers are little-endian. The hash covers the frame's first 16 bytes and its stream bytes.
//! A frame that is cut short or whose hash differs never existed, and nothing after it did: packets
//! are acknowledged only once their frame is written, so a client still has what a torn frame would
//! have held.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, IoSlice, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use proto::units::{ArmingId, KeyId, PacketNumber, SessionId};
use xxhash_rust::xxh3::Xxh3Default;

/// Name of the spool in a crash directory.
pub const SPOOL_FILE: &str = "spool";

/// Which stream a spool holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The session.
    pub session: SessionId,
    /// The attempt of the session.
    pub attempt: u16,
    /// The packet its stream begins with.
    pub first: PacketNumber,
}

/// A spool that is being written.
#[derive(Debug)]
pub struct Spool {
    file: File,
    next: PacketNumber,
    bytes: u64,
    /// Length of the file up to the last whole frame.
    end: u64,
}

/// A spool that is being read, frame by frame.
#[derive(Debug)]
pub struct Reader {
    file: BufReader<File>,
    origin: Origin,
    next: PacketNumber,
    bytes: u64,
    end: u64,
}

impl Spool {
    /// Starts an empty spool at `path`, replacing what is there: an earlier attempt of the same
    /// session, which the client has given up.
    pub fn create(path: &Path, origin: Origin) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        file.write_all(&origin.header())?;
        Ok(Self {
            file,
            next: origin.first,
            bytes: 0,
            end: HEADER_BYTES as u64,
        })
    }

    /// Appends the stream bytes of the `packets` packets from the next one on, with one write.
    ///
    /// After an error the spool is as it was before the call: what was written of the frame is cut
    /// off again, or, where even that fails, overwritten by the next frame.
    pub fn append(&mut self, packets: u32, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut frame = [0; FRAME_HEADER_BYTES];
        frame[0..8].copy_from_slice(&self.next.0.to_le_bytes());
        frame[8..12].copy_from_slice(&packets.to_le_bytes());
        frame[12..16].copy_from_slice(&length.to_le_bytes());
        let hash = frame_hash(&frame[..16], bytes);
        frame[16..24].copy_from_slice(&hash.to_le_bytes());
        if let Err(error) = write_both(&mut self.file, &frame, bytes) {
            self.file.set_len(self.end)?;
            self.file.seek(SeekFrom::Start(self.end))?;
            return Err(error);
        }
        self.next = self.next.plus(u64::from(packets));
        self.bytes += u64::from(length);
        self.end += FRAME_HEADER_BYTES as u64 + u64::from(length);
        Ok(())
    }

    /// A second handle, for waiting in [`File::sync_data`] while this one is written.
    pub fn handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// The packet that the next frame begins with.
    #[must_use]
    pub fn next(&self) -> PacketNumber {
        self.next
    }

    /// Stream bytes written.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Reader {
    /// Opens the spool at `path`. [`io::ErrorKind::InvalidData`] when it is none.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = BufReader::with_capacity(READ_BYTES, File::open(path)?);
        let mut header = [0; HEADER_BYTES];
        file.read_exact(&mut header)?;
        let origin = Origin::parse(&header).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "its header is not a spool's")
        })?;
        Ok(Self {
            file,
            origin,
            next: origin.first,
            bytes: 0,
            end: HEADER_BYTES as u64,
        })
    }

    /// Which stream the spool holds.
    #[must_use]
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Reads the next whole frame's stream bytes into `bytes`, replacing its contents. `false` at
    /// the end.
    pub fn frame(&mut self, bytes: &mut Vec<u8>) -> io::Result<bool> {
        let mut header = [0; FRAME_HEADER_BYTES];
        if !read_whole(&mut self.file, &mut header)? {
            return Ok(false);
        }
        let number = u64_at(&header, 0);
        let (packets, length) = (u32_at(&header, 8), u32_at(&header, 12));
        if number != self.next.0 || length > FRAME_BYTES_MAX {
            return Ok(false);
        }
        bytes.resize(length as usize, 0);
        if !read_whole(&mut self.file, bytes)?
            || frame_hash(&header[..16], bytes) != u64_at(&header, 16)
        {
            return Ok(false);
        }
        self.next = self.next.plus(u64::from(packets));
        self.bytes += u64::from(length);
        self.end += FRAME_HEADER_BYTES as u64 + u64::from(length);
        Ok(true)
    }

    /// Stream bytes read.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Cuts off what follows the last whole frame that was read, and goes on writing there.
    pub fn into_writer(self, path: &Path) -> io::Result<Spool> {
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.set_len(self.end)?;
        file.seek(SeekFrom::Start(self.end))?;
        Ok(Spool {
            file,
            next: self.next,
            bytes: self.bytes,
            end: self.end,
        })
    }
}

impl Origin {
    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[0..8].copy_from_slice(&MAGIC);
        header[8..16].copy_from_slice(&self.session.key.0.to_le_bytes());
        header[16..24].copy_from_slice(&self.session.arming.0.to_le_bytes());
        header[24..26].copy_from_slice(&self.attempt.to_le_bytes());
        header[32..40].copy_from_slice(&self.first.0.to_le_bytes());
        header
    }

    fn parse(header: &[u8; HEADER_BYTES]) -> Option<Self> {
        let session = SessionId {
            key: KeyId(u64_at(header, 8)),
            arming: ArmingId(u64_at(header, 16)),
        };
        let attempt = u16::from_le_bytes([header[24], header[25]]);
        let origin = Self {
            session,
            attempt,
            first: PacketNumber(u64_at(header, 32)),
        };
        // Comparing the whole header also checks the magic and the bytes that must be zero.
        (origin.header() == *header).then_some(origin)
    }
}

/// One write for a frame, so that two files' frames do not interleave into many small ones.
fn write_both(file: &mut File, head: &[u8], body: &[u8]) -> io::Result<()> {
    let written = file.write_vectored(&[IoSlice::new(head), IoSlice::new(body)])?;
    if written < head.len() {
        file.write_all(&head[written..])?;
    }
    file.write_all(&body[written.saturating_sub(head.len())..])
}

/// Fills `buffer`; `false` when the file ends before.
fn read_whole(file: &mut impl io::Read, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

fn frame_hash(head: &[u8], body: &[u8]) -> u64 {
    let mut hash = Xxh3Default::new();
    hash.update(head);
    hash.update(body);
    hash.digest()
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..]
        .first_chunk()
        .copied()
        .map_or(0, u64::from_le_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes[offset..]
        .first_chunk()
        .copied()
        .map_or(0, u32::from_le_bytes)
}

const MAGIC: [u8; 8] = *b"NDspool1";
const HEADER_BYTES: usize = 40;
const FRAME_HEADER_BYTES: usize = 24;
/// Far above what one batch of datagrams brings; a larger length is a torn frame.
const FRAME_BYTES_MAX: u32 = 256 << 20;
const READ_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const ORIGIN: Origin = Origin {
        session: SessionId {
            key: KeyId(7),
            arming: ArmingId(9),
        },
        attempt: 3,
        first: PacketNumber(100),
    };

    fn read_all(path: &Path) -> (Reader, Vec<u8>) {
        let mut reader = Reader::open(path).unwrap();
        let (mut all, mut frame) = (Vec::new(), Vec::new());
        while reader.frame(&mut frame).unwrap() {
            all.extend_from_slice(&frame);
        }
        (reader, all)
    }

    #[test]
    fn what_is_appended_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SPOOL_FILE);
        let mut spool = Spool::create(&path, ORIGIN).unwrap();
        spool.append(2, b"first").unwrap();
        spool.append(1, b"second").unwrap();
        let (reader, all) = read_all(&path);
        assert_eq!(all, b"firstsecond");
        assert_eq!(reader.origin(), ORIGIN);
        assert_eq!((reader.next, reader.bytes), (PacketNumber(103), 11));
    }

    #[test]
    fn any_cut_leaves_the_whole_frames_and_writing_goes_on_after_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SPOOL_FILE);
        let mut spool = Spool::create(&path, ORIGIN).unwrap();
        spool.append(2, b"first").unwrap();
        let whole = fs::read(&path).unwrap().len();
        spool.append(1, b"second").unwrap();
        let bytes = fs::read(&path).unwrap();
        for cut in whole..bytes.len() {
            fs::write(&path, &bytes[..cut]).unwrap();
            let (reader, all) = read_all(&path);
            assert_eq!(all, b"first", "cut at {cut}");
            let mut spool = reader.into_writer(&path).unwrap();
            assert_eq!((spool.next(), spool.bytes()), (PacketNumber(102), 5));
            spool.append(1, b"other").unwrap();
            assert_eq!(read_all(&path).1, b"firstother");
        }
    }

    #[test]
    fn any_flipped_byte_ends_the_spool_before_its_frame() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SPOOL_FILE);
        let mut spool = Spool::create(&path, ORIGIN).unwrap();
        spool.append(2, b"first").unwrap();
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 0x40;
            fs::write(&path, &broken).unwrap();
            // A flip in the origin's numbers is not noticed by the header alone; the frame's number
            // is.
            if let Ok(mut reader) = Reader::open(&path) {
                let mut frame = Vec::new();
                let whole = reader.frame(&mut frame).unwrap();
                assert!(!whole || reader.origin() != ORIGIN, "flip at {at}");
            }
        }
    }
}
