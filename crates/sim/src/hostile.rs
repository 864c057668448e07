//! A peer that holds the right keys and means ill: what a real engine sealed is opened, altered
//! where it hurts, and sealed again.

use proto::record::RECORD_HEADER_BYTES;
use proto::reply::{Action, Verdict};
use proto::units::PacketNumber;
use proto::wire::{HEADER_BYTES, Header, Kind, open_client, seal_client};

use crate::host;
use crate::random::Random;
use crate::server::altered;

/// One who alters so many of 1000 datagrams.
pub struct Hostile {
    permille: u64,
    random: Random,
    /// The packet whose place in the stream is known, and how far into its payload the next record
    /// begins.
    place: Option<(PacketNumber, usize)>,
    /// Datagrams altered.
    pub altered: u64,
}

impl Hostile {
    /// Alters so many of 1000 datagrams.
    #[must_use]
    pub const fn new(permille: u64, random: Random) -> Self {
        Self {
            permille,
            random,
            place: None,
            altered: 0,
        }
    }

    /// From now on it is honest.
    pub fn heal(&mut self) {
        self.permille = 0;
    }

    /// What becomes of a client's datagram.
    pub fn client(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let Ok(header) = Header::parse(&bytes) else {
            return bytes;
        };
        let keys = host::keys(header.session);
        let mut copy = bytes.clone();
        let Ok(stream) = open_client(&keys.client, &header, &mut copy) else {
            return bytes;
        };
        let mut stream = stream.to_vec();
        let record_at = self.follow(&header, &stream);
        if !self.random.chance(self.permille) {
            return bytes;
        }
        self.altered += 1;
        let header = self.header(header);
        match (record_at, self.random.below(4)) {
            (Some(at), 0 | 1) => self.field(&mut stream, at),
            (_, 2) => {
                let length = u64::try_from(stream.len()).unwrap_or(0);
                let kept = self.random.below(length + 1);
                stream.truncate(usize::try_from(kept).unwrap_or(0));
            }
            (_, _) => {
                if let Some(at) = self.position(stream.len()) {
                    stream[at] = self.random.draw().to_le_bytes()[0];
                }
            }
        }
        let mut buffer = vec![0; bytes.len()];
        buffer[HEADER_BYTES..][..stream.len()].copy_from_slice(&stream);
        match seal_client(&keys.client, &header, &mut buffer, stream.len()) {
            Some(length) => buffer[..length].to_vec(),
            None => bytes,
        }
    }

    /// What becomes of a server's datagram.
    pub fn server(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let Ok(header) = Header::parse(&bytes) else {
            return bytes;
        };
        if !self.random.chance(self.permille) {
            return bytes;
        }
        self.altered += 1;
        let (which, number) = (self.random.below(8), self.number());
        let lie = altered(header.session, &bytes, |reply| match which {
            0 => reply.next = PacketNumber(reply.next.0.wrapping_add(number)),
            1 => reply.credit_end = PacketNumber(number),
            2 => reply.latest = PacketNumber(reply.latest.0.wrapping_add(number)),
            3 => reply.delay = proto::time::Micros::new(number),
            4 => reply.attempt = number.to_le_bytes()[0].into(),
            5 => reply.action = Action::Halt,
            6 => {
                reply.verdict = Verdict::Redirect {
                    server: number.to_le_bytes()[0],
                };
            }
            _ => {
                reply.verdict = Verdict::Wait {
                    seconds: number.to_le_bytes()[0].into(),
                };
            }
        });
        lie.unwrap_or(bytes)
    }

    /// Follows the stream from packet to packet; where the first record that begins in this packet
    /// does so, if that is known.
    fn follow(&mut self, header: &Header, stream: &[u8]) -> Option<usize> {
        let (number, first_at) = match (header.kind, self.place) {
            (Kind::First, _) => (header.number, 0),
            (_, place) => place?,
        };
        if number != header.number {
            return None;
        }
        let mut at = first_at;
        while let Some(rest) = stream.get(at..) {
            let Some(length) = rest.get(4..8).and_then(|length| length.first_chunk()) else {
                break;
            };
            let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(0);
            at = at
                .saturating_add(RECORD_HEADER_BYTES)
                .saturating_add(length);
        }
        // A record header that is cut by the packet's end is given up on.
        self.place = at
            .checked_sub(stream.len())
            .map(|next_at| (number.plus(1), next_at));
        (first_at + RECORD_HEADER_BYTES <= stream.len()).then_some(first_at)
    }

    fn header(&mut self, mut header: Header) -> Header {
        match self.random.below(12) {
            0 => header.attempt = header.attempt.wrapping_add(1),
            1 => header.number = PacketNumber(self.number()),
            2 => header.number = PacketNumber(header.number.0 ^ 1),
            3 if header.kind == Kind::First => header.kind = Kind::Data,
            3 => header.kind = Kind::First,
            _ => {}
        }
        header
    }

    /// Alters one field of the record at `at`.
    fn field(&mut self, stream: &mut [u8], at: usize) {
        let number = self.number().to_le_bytes();
        let (from, bytes) = match self.random.below(5) {
            0 => (0, 1),
            1 => (1, 1),
            2 => (2, 2),
            3 => (4, 4),
            _ => (8, 8),
        };
        stream[at + from..][..bytes].copy_from_slice(&number[..bytes]);
    }

    /// A number of the kind that breaks things.
    fn number(&mut self) -> u64 {
        match self.random.below(6) {
            0 => u64::MAX - self.random.below(3),
            1 => 1 << self.random.below(64),
            2 => (1 << 40) - self.random.below(20),
            3 => self.random.draw(),
            _ => self.random.below(300),
        }
    }

    fn position(&mut self, length: usize) -> Option<usize> {
        let length = u64::try_from(length).ok().filter(|length| *length > 0)?;
        usize::try_from(self.random.below(length)).ok()
    }
}
