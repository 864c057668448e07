//! The datagram: a clear header that can be read alone, and a sealed payload.
//!
//! ```text
//!  byte 0        4     5      6        8        16          24               32
//!       +--------+-----+------+--------+--------+-----------+----------------+-------------------+-----+
//! first | magic  |kind |flags |attempt | key id | arming id | packet number  | sealed payload ...| tag |
//! data  +--------+-----+------+--------+--------+-----------+----------------+-------------------+-----+
//! reply | same header, kind = 3                             |                | incarnation (16)  | sealed ... | tag |
//! ```
//! Log datagrams (kind 4) look like data, their replies (kind 5) like replies; see [`crate::console`].
//! All integers are little-endian. The header (and the incarnation) is the seal's associated data.
//! Parsing judges everything it returns: a [`Header`] is well formed, but only [`open_client`] or
//! [`open_server`] says that it is genuine.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::keys::KEY_BYTES;
use crate::seal::{self, Nonce};
pub use crate::seal::{PacketKey, TAG_BYTES};
use crate::units::{ArmingId, KeyId, PacketNumber, SessionId};

/// The UDP port of both ends.
pub const PORT: u16 = 6666;
/// First bytes of every datagram. The first one is no text (netconsole) and no version or magic of
/// the 2002 protocol.
pub const MAGIC: [u8; 4] = [0xFE, b'N', b'D', 1];
/// Bytes of the clear header.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();
// The size that docs/protocol.md draws.
const _: () = assert!(HEADER_BYTES == 32);
/// Bytes a client datagram has beside its share of the stream.
pub const CLIENT_OVERHEAD: usize = HEADER_BYTES + TAG_BYTES;
/// Bytes of a server's incarnation.
pub const INCARNATION_BYTES: usize = 16;
/// Bytes a reply has beside its payload.
pub const SERVER_OVERHEAD: usize = HEADER_BYTES + INCARNATION_BYTES + TAG_BYTES;
/// The largest UDP payload anybody sends: an MTU of 9000 less IPv4 and UDP headers.
pub const DATAGRAM_BYTES_MAX: usize = 9000 - 28;
/// The smallest UDP payload a client may be configured for: an MTU of 576 less the largest IPv4 and
/// UDP headers.
pub const DATAGRAM_BYTES_MIN: usize = 508;

/// What a datagram is, readable before it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From a client: the first packet of an attempt. Its packet number is where the attempt's
    /// stream begins.
    First,
    /// From a client: a later packet of an attempt.
    Data,
    /// From a server.
    Reply,
    /// From a client, healthy or crashed: log records.
    Log,
    /// From a server: what it has of them.
    LogReply,
}

impl Kind {
    /// Whether a server sends datagrams of this kind.
    #[must_use]
    pub const fn is_from_server(self) -> bool {
        matches!(self, Self::Reply | Self::LogReply)
    }
}

/// The clear header of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the datagram is.
    pub kind: Kind,
    /// Which attempt of the session it belongs to; starting over counts up from zero.
    pub attempt: u16,
    /// The session.
    pub session: SessionId,
    /// The packet's number in its direction.
    pub number: PacketNumber,
}

/// Why a datagram was not taken, by blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// The seal is broken: altered on the way, forged, or sealed with another key.
    BadSeal,
    /// The magic is ours, but of another version: byte 3 is given.
    OtherVersion(u8),
    /// So far ahead that no credit can have allowed it.
    BeyondWindow,
    /// Opened well, but its contents are not legal: the peer is broken.
    Malformed,
    /// The first bytes are not ours: something else's datagram.
    NotOurs,
    /// Of a session or an attempt that is not this one.
    OtherSession,
    /// Older than one already taken: late or replayed.
    Stale,
    /// Longer than [`DATAGRAM_BYTES_MAX`]; the length is given.
    TooLong(usize),
    /// Shorter than header and tag; the length is given.
    Truncated(usize),
    /// A kind this version does not know.
    UnknownKind(u8),
    /// A flag this version does not know.
    UnknownFlags(u8),
    /// A kind that the other side sends.
    WrongDirection(Kind),
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    kind: u8,
    flags: u8,
    attempt: U16,
    key: U64,
    arming: U64,
    number: U64,
}

impl Header {
    /// Reads the clear header of `datagram`.
    pub fn parse(datagram: &[u8]) -> Result<Self, Reject> {
        let length = datagram.len();
        let Some(magic) = datagram.first_chunk::<4>() else {
            return Err(Reject::Truncated(length));
        };
        let [m0, m1, m2, version] = *magic;
        let [o0, o1, o2, our_version] = MAGIC;
        if [m0, m1, m2] != [o0, o1, o2] {
            return Err(Reject::NotOurs);
        }
        if version != our_version {
            return Err(Reject::OtherVersion(version));
        }
        if length > DATAGRAM_BYTES_MAX {
            return Err(Reject::TooLong(length));
        }
        let Ok((raw, rest)) = RawHeader::ref_from_prefix(datagram) else {
            return Err(Reject::Truncated(length));
        };
        if raw.flags != 0 {
            return Err(Reject::UnknownFlags(raw.flags));
        }
        let (kind, rest_min) = match raw.kind {
            1 => (Kind::First, TAG_BYTES),
            2 => (Kind::Data, TAG_BYTES),
            3 => (Kind::Reply, INCARNATION_BYTES + TAG_BYTES),
            4 => (Kind::Log, TAG_BYTES),
            5 => (Kind::LogReply, INCARNATION_BYTES + TAG_BYTES),
            other => return Err(Reject::UnknownKind(other)),
        };
        if rest.len() < rest_min {
            return Err(Reject::Truncated(length));
        }
        let session = SessionId {
            key: KeyId(raw.key.get()),
            arming: ArmingId(raw.arming.get()),
        };
        let number = PacketNumber(raw.number.get());
        Ok(Self {
            kind,
            attempt: raw.attempt.get(),
            session,
            number,
        })
    }

    fn raw(&self) -> RawHeader {
        let kind = match self.kind {
            Kind::First => 1,
            Kind::Data => 2,
            Kind::Reply => 3,
            Kind::Log => 4,
            Kind::LogReply => 5,
        };
        RawHeader {
            magic: MAGIC,
            kind,
            flags: 0,
            attempt: self.attempt.into(),
            key: self.session.key.0.into(),
            arming: self.session.arming.0.into(),
            number: self.number.0.into(),
        }
    }
}

/// Seals a client datagram in place: `buffer` holds `payload` stream bytes at offset
/// [`HEADER_BYTES`]; header and tag are written around them. Returns the datagram's length, or
/// `None` if `buffer` is too small, which a caller that sized it by [`CLIENT_OVERHEAD`] never sees.
#[must_use]
pub fn seal_client(
    key: &impl PacketKey,
    header: &Header,
    buffer: &mut [u8],
    payload: usize,
) -> Option<usize> {
    let (head, rest) = buffer.split_at_mut_checked(HEADER_BYTES)?;
    let (body, rest) = rest.split_at_mut_checked(payload)?;
    let tag = rest.first_chunk_mut::<TAG_BYTES>()?;
    header.raw().write_to(head).ok()?;
    *tag = key.seal(&client_nonce(header.number), head, body)?;
    CLIENT_OVERHEAD.checked_add(payload)
}

/// Opens a client datagram in place and returns its share of the stream.
pub fn open_client<'a>(
    key: &impl PacketKey,
    header: &Header,
    datagram: &'a mut [u8],
) -> Result<&'a mut [u8], Reject> {
    if header.kind.is_from_server() {
        return Err(Reject::WrongDirection(header.kind));
    }
    let truncated = Reject::Truncated(datagram.len());
    let (head, rest) = datagram
        .split_at_mut_checked(HEADER_BYTES)
        .ok_or(truncated)?;
    let (body, tag) = rest.split_last_chunk_mut::<TAG_BYTES>().ok_or(truncated)?;
    key.open(&client_nonce(header.number), head, body, tag)
        .ok_or(Reject::BadSeal)?;
    Ok(body)
}

/// Seals a reply in place: `buffer` holds `payload` bytes at offset [`HEADER_BYTES`] +
/// [`INCARNATION_BYTES`]. Returns the datagram's length, or `None` if `buffer` is too small.
///
/// The nonce is XChaCha20's 24 bytes: the incarnation (random, one a server process) and the packet
/// number. A server that was killed and forgot its numbers can therefore never reuse one.
#[must_use]
pub fn seal_server(
    key: &[u8; KEY_BYTES],
    header: &Header,
    incarnation: &[u8; INCARNATION_BYTES],
    buffer: &mut [u8],
    payload: usize,
) -> Option<usize> {
    let (head, rest) = buffer.split_at_mut_checked(HEADER_BYTES + INCARNATION_BYTES)?;
    let (body, rest) = rest.split_at_mut_checked(payload)?;
    let tag = rest.first_chunk_mut::<TAG_BYTES>()?;
    header.raw().write_to_prefix(head).ok()?;
    *head.last_chunk_mut::<INCARNATION_BYTES>()? = *incarnation;
    *tag = seal::seal(key, server_nonce(incarnation, header.number), head, body)?;
    SERVER_OVERHEAD.checked_add(payload)
}

/// Opens a reply in place; returns the server's incarnation and the payload.
pub fn open_server<'a>(
    key: &[u8; KEY_BYTES],
    header: &Header,
    datagram: &'a mut [u8],
) -> Result<([u8; INCARNATION_BYTES], &'a mut [u8]), Reject> {
    if !header.kind.is_from_server() {
        return Err(Reject::WrongDirection(header.kind));
    }
    let truncated = Reject::Truncated(datagram.len());
    let (head, rest) = datagram
        .split_at_mut_checked(HEADER_BYTES + INCARNATION_BYTES)
        .ok_or(truncated)?;
    let incarnation = *head.last_chunk::<INCARNATION_BYTES>().ok_or(truncated)?;
    let (body, tag) = rest.split_last_chunk_mut::<TAG_BYTES>().ok_or(truncated)?;
    let nonce = server_nonce(&incarnation, header.number);
    seal::open(key, nonce, head, body, tag).ok_or(Reject::BadSeal)?;
    Ok((incarnation, body))
}

fn client_nonce(number: PacketNumber) -> [u8; 12] {
    let [a, b, c, d, e, f, g, h] = number.0.to_le_bytes();
    [a, b, c, d, e, f, g, h, 0, 0, 0, 0]
}

fn server_nonce(incarnation: &[u8; INCARNATION_BYTES], number: PacketNumber) -> Nonce {
    let mut nonce = [0; 24];
    let number = number.0.to_le_bytes();
    for (to, from) in nonce.iter_mut().zip(incarnation.iter().chain(&number)) {
        *to = *from;
    }
    Nonce::Long(nonce)
}
