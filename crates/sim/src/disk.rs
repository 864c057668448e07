//! A server's disk: files whose writes are pending until they are synced, and that fail as disks do.

use std::collections::BTreeMap;

use proto::units::{PacketNumber, SessionId};

use crate::counts::Counts;
use crate::options::ServerOptions;
use crate::random::Random;

/// Which spool: the session and the attempt.
pub type SpoolName = (SessionId, u16);

/// Bytes before a frame's stream bytes: packet number, packets, length, hash.
const FRAME_HEADER_BYTES: usize = 24;
const HASH_START: u64 = 0xCBF2_9CE4_8422_2325;

#[derive(Clone, Default)]
struct File {
    bytes: Vec<u8>,
    /// Bytes that survive the loss of power; `None` if not even the file's name does.
    synced: Option<usize>,
}

/// A disk. What a process wrote survives the process; only what was synced survives the machine.
pub struct Disk {
    files: BTreeMap<SpoolName, File>,
    options: ServerOptions,
    random: Random,
    counts: Counts,
}

/// What a spool holds, read as far as it is whole.
pub struct Spooled {
    /// The packet that comes next.
    pub next: PacketNumber,
    /// The stream.
    pub stream: Vec<u8>,
}

impl Disk {
    /// An empty disk.
    #[must_use]
    pub fn new(options: &ServerOptions, random: Random) -> Self {
        Self {
            files: BTreeMap::new(),
            options: *options,
            random,
            counts: Counts::default(),
        }
    }

    /// What happened so far.
    #[must_use]
    pub const fn counts(&self) -> &Counts {
        &self.counts
    }

    /// From now on it does what it is told, and has room.
    pub fn heal(&mut self) {
        self.options = ServerOptions::CALM;
    }

    /// The spools, in order.
    pub fn names(&self) -> impl Iterator<Item = SpoolName> {
        self.files.keys().copied()
    }

    /// The packet that a spool begins with; `None` if it is none.
    #[must_use]
    pub fn first(&self, name: SpoolName) -> Option<PacketNumber> {
        let first = self.files.get(&name)?.bytes.first_chunk()?;
        Some(PacketNumber(u64::from_le_bytes(*first)))
    }

    /// Creates an empty spool whose first packet is `first`; `false` if that fails.
    pub fn create(&mut self, name: SpoolName, first: PacketNumber) -> bool {
        self.files.insert(name, File::default());
        if self.write(name, &first.0.to_le_bytes()) {
            return true;
        }
        self.files.remove(&name);
        false
    }

    /// Appends a frame: the stream bytes of `packets` packets from `next` on. If that fails, what
    /// was written of it is cut off again, and `false` returned.
    pub fn append(
        &mut self,
        name: SpoolName,
        next: PacketNumber,
        packets: u64,
        stream: &[u8],
    ) -> bool {
        let length = u64::try_from(stream.len()).unwrap_or(u64::MAX);
        let counts = packets << 32 | length;
        let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + stream.len());
        frame.extend_from_slice(&next.0.to_le_bytes());
        frame.extend_from_slice(&counts.to_le_bytes());
        frame.extend_from_slice(&hash(&frame, stream).to_le_bytes());
        frame.extend_from_slice(stream);
        let end = self.files.get(&name).map_or(0, |file| file.bytes.len());
        let whole = self.write(name, &frame);
        if !whole && let Some(file) = self.files.get_mut(&name) {
            file.bytes.truncate(end);
        }
        whole
    }

    /// Makes what was written to a spool survive; `false` if that fails.
    pub fn sync(&mut self, name: SpoolName) -> bool {
        if self.random.chance(self.options.write_error) {
            self.counts.one("syncs that failed");
            return false;
        }
        if let Some(file) = self.files.get_mut(&name) {
            file.synced = Some(file.bytes.len());
        }
        true
    }

    /// The machine loses power. Of what was not synced some survives, and the end of that may be
    /// torn.
    pub fn lose_power(&mut self) {
        let mut gone = Vec::new();
        for (name, file) in &mut self.files {
            let Some(synced) = file.synced else {
                gone.push(*name);
                continue;
            };
            let pending = u64::try_from(file.bytes.len() - synced).unwrap_or(0);
            if pending == 0 {
                continue;
            }
            self.counts.one("spools cut short");
            let kept = synced + usize::try_from(self.random.below(pending)).unwrap_or(0);
            file.bytes.truncate(kept);
            if kept > synced {
                file.bytes[kept - 1] ^= 0x10;
            }
            file.synced = Some(kept);
        }
        for name in gone {
            self.counts.one("spools that vanished");
            self.files.remove(&name);
        }
    }

    /// Reads a spool as far as it is whole, and cuts off the rest. `None` if it is none.
    pub fn read(&mut self, name: SpoolName) -> Option<Spooled> {
        let file = self.files.get_mut(&name)?;
        let (first, mut rest) = file.bytes.split_first_chunk::<8>()?;
        let mut next = PacketNumber(u64::from_le_bytes(*first));
        let mut stream = Vec::new();
        while let Some((packets, bytes, after)) = frame(rest, next) {
            next = next.plus(packets);
            stream.extend_from_slice(bytes);
            rest = after;
        }
        let whole = file.bytes.len() - rest.len();
        file.bytes.truncate(whole);
        file.synced = file.synced.map(|synced| synced.min(whole));
        Some(Spooled { next, stream })
    }

    /// Writes at the end of a file; part of it if that fails.
    fn write(&mut self, name: SpoolName, bytes: &[u8]) -> bool {
        let used: usize = self.files.values().map(|file| file.bytes.len()).sum();
        let Some(file) = self.files.get_mut(&name) else {
            return false;
        };
        let total = u64::try_from(used + bytes.len()).unwrap_or(u64::MAX);
        let full = self.options.disk_bytes > 0 && total > self.options.disk_bytes;
        let short = self.random.chance(self.options.short_write);
        let error = self.random.chance(self.options.write_error);
        if full || short {
            self.counts
                .one(if full { "disk full" } else { "short writes" });
            file.bytes.extend_from_slice(&bytes[..bytes.len() / 2]);
        } else if error {
            self.counts.one("write errors");
        } else {
            file.bytes.extend_from_slice(bytes);
        }
        !(full || short || error)
    }
}

/// The frame at the begin of `bytes`: its packets, its stream bytes, and what follows it.
fn frame(bytes: &[u8], next: PacketNumber) -> Option<(u64, &[u8], &[u8])> {
    let (header, rest) = bytes.split_first_chunk::<FRAME_HEADER_BYTES>()?;
    let word = |at: usize| {
        let word = header.get(at..at + 8).and_then(|word| word.first_chunk());
        word.map_or(0, |word| u64::from_le_bytes(*word))
    };
    let length = usize::try_from(word(8) & 0xFFFF_FFFF).ok()?;
    let (stream, after) = rest.split_at_checked(length)?;
    let genuine = word(0) == next.0 && word(16) == hash(&header[..16], stream);
    genuine.then_some((word(8) >> 32, stream, after))
}

fn hash(header: &[u8], stream: &[u8]) -> u64 {
    header.iter().chain(stream).fold(HASH_START, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}
