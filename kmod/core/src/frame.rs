//! Frames: what goes around a UDP payload on an Ethernet, and what of the frames that arrive is for
//! us.
//!
//! ```text
//!  0         14               34        42
//!  +---------+----------------+---------+-----------------+
//!  |Ethernet | IPv4           | UDP     | payload ...     |
//!  +---------+----------------+---------+-----------------+
//! ```
//! All integers are big-endian. The UDP checksum is left out (RFC 768 allows it on IPv4): the
//! payload's seal is the stronger check, and it is made by the same CPU anyway.

use proto::arming::{Address, Server};
use zerocopy::big_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Bytes before the payload.
pub const HEADER_BYTES: usize = size_of::<Headers>();
/// Bytes of an answer to ARP.
pub const ARP_BYTES: usize = size_of::<ArpFrame>();

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const IPV4_PLAIN: u8 = 0x45;
const IPV4_DONT_FRAGMENT: u16 = 0x4000;
const IPV4_FRAGMENT: u16 = 0x3fff;
const TTL: u8 = 64;
const PROTOCOL_UDP: u8 = 17;

/// The way between this host and one server. IPv6 will be another kind of way with headers of its
/// own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    own_mac: Mac,
    next_hop: Mac,
    local: [u8; 4],
    remote: [u8; 4],
    local_port: u16,
    remote_port: u16,
}

/// What an arriving frame is to us.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// A UDP payload from the server to our port.
    Payload(&'a mut [u8]),
    /// Somebody asks for our Ethernet address.
    Question(Asker),
    /// Something else.
    Other,
}

/// Who asked for our Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    mac: Mac,
    address: [u8; 4],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Ethernet {
    to: Mac,
    from: Mac,
    ethertype: U16,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Ipv4 {
    version_and_words: u8,
    service: u8,
    total_bytes: U16,
    id: U16,
    fragment: U16,
    ttl: u8,
    protocol: u8,
    checksum: U16,
    from: [u8; 4],
    to: [u8; 4],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Udp {
    from: U16,
    to: U16,
    bytes: U16,
    checksum: U16,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Headers {
    ethernet: Ethernet,
    ip: Ipv4,
    udp: Udp,
}

#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Arp {
    /// Ethernet, IPv4, 6 and 4 bytes of address: all that we speak.
    kinds: [u8; 6],
    operation: U16,
    sender_mac: Mac,
    sender: [u8; 4],
    target_mac: Mac,
    target: [u8; 4],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ArpFrame {
    ethernet: Ethernet,
    arp: Arp,
}

const ARP_KINDS: [u8; 6] = [0, 1, 8, 0, 6, 4];

impl Route {
    /// The way from the device with address `own_mac` to `server`, or `None` for a server of a
    /// family that frames cannot be made for yet.
    #[must_use]
    pub const fn new(own_mac: Mac, server: &Server) -> Option<Self> {
        let (Address::V4(local), Address::V4(remote)) = (server.local, server.remote) else {
            return None;
        };
        Some(Self {
            own_mac,
            next_hop: server.next_hop,
            local,
            remote,
            local_port: server.local_port,
            remote_port: server.remote_port,
        })
    }

    /// Writes the headers before `payload` bytes that lie at [`HEADER_BYTES`] of `frame`. Returns
    /// the frame's length, or `None` if it does not fit into `frame` or into IPv4.
    pub fn finish(&self, frame: &mut [u8], payload: usize) -> Option<usize> {
        let bytes = HEADER_BYTES.checked_add(payload)?;
        if bytes > frame.len() {
            return None;
        }
        let udp_bytes = size_of::<Udp>().checked_add(payload)?;
        let ip_bytes = size_of::<Ipv4>().checked_add(udp_bytes)?;
        let mut headers = Headers {
            ethernet: Ethernet {
                to: self.next_hop,
                from: self.own_mac,
                ethertype: ETHERTYPE_IPV4.into(),
            },
            ip: Ipv4 {
                version_and_words: IPV4_PLAIN,
                service: 0,
                total_bytes: u16::try_from(ip_bytes).ok()?.into(),
                // Meaningless in a datagram that is never fragmented (RFC 6864).
                id: 0.into(),
                fragment: IPV4_DONT_FRAGMENT.into(),
                ttl: TTL,
                protocol: PROTOCOL_UDP,
                checksum: 0.into(),
                from: self.local,
                to: self.remote,
            },
            udp: Udp {
                from: self.local_port.into(),
                to: self.remote_port.into(),
                bytes: u16::try_from(udp_bytes).ok()?.into(),
                checksum: 0.into(),
            },
        };
        headers.ip.checksum = checksum(headers.ip.as_bytes()).into();
        headers.write_to_prefix(frame).ok()?;
        Some(bytes)
    }

    /// Judges a frame that arrived.
    pub fn receive<'a>(&self, frame: &'a mut [u8]) -> Received<'a> {
        let Ok((ethernet, _)) = Ethernet::read_from_prefix(frame) else {
            return Received::Other;
        };
        match ethernet.ethertype.get() {
            ETHERTYPE_ARP => self
                .question(frame)
                .map_or(Received::Other, Received::Question),
            ETHERTYPE_IPV4 => self
                .payload(frame)
                .map_or(Received::Other, Received::Payload),
            _ => Received::Other,
        }
    }

    /// Writes the answer to `asker` into `frame`. Returns its length, or `None` if `frame` is too
    /// small.
    pub fn answer(&self, asker: &Asker, frame: &mut [u8]) -> Option<usize> {
        let answer = ArpFrame {
            ethernet: Ethernet {
                to: asker.mac,
                from: self.own_mac,
                ethertype: ETHERTYPE_ARP.into(),
            },
            arp: Arp {
                kinds: ARP_KINDS,
                operation: ARP_REPLY.into(),
                sender_mac: self.own_mac,
                sender: self.local,
                target_mac: asker.mac,
                target: asker.address,
            },
        };
        answer.write_to_prefix(frame).ok()?;
        Some(ARP_BYTES)
    }

    fn question(&self, frame: &[u8]) -> Option<Asker> {
        let (ArpFrame { arp, .. }, _) = ArpFrame::read_from_prefix(frame).ok()?;
        let for_us = arp.kinds == ARP_KINDS
            && arp.operation.get() == ARP_REQUEST
            && arp.target == self.local;
        for_us.then_some(Asker {
            mac: arp.sender_mac,
            address: arp.sender,
        })
    }

    fn payload<'a>(&self, frame: &'a mut [u8]) -> Option<&'a mut [u8]> {
        let (_, packet) = frame.split_at_mut_checked(size_of::<Ethernet>())?;
        let (ip, _) = Ipv4::read_from_prefix(packet).ok()?;
        let version = ip.version_and_words >> 4;
        let header_bytes = usize::from(ip.version_and_words & 0xf).checked_mul(4)?;
        let whole = ip.fragment.get() & IPV4_FRAGMENT == 0;
        let between_us = ip.from == self.remote && ip.to == self.local;
        if version != 4
            || ip.protocol != PROTOCOL_UDP
            || !whole
            || !between_us
            || header_bytes < size_of::<Ipv4>()
        {
            return None;
        }
        // The link may have padded the packet.
        let packet = packet.get_mut(..usize::from(ip.total_bytes.get()))?;
        let datagram = packet.get_mut(header_bytes..)?;
        let (udp, _) = Udp::read_from_prefix(datagram).ok()?;
        if udp.from.get() != self.remote_port || udp.to.get() != self.local_port {
            return None;
        }
        datagram.get_mut(size_of::<Udp>()..usize::from(udp.bytes.get()))
    }
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let (words, _) = bytes.as_chunks::<2>();
    let sum = words.iter().fold(0_u32, |sum, word| {
        sum.wrapping_add(u32::from(u16::from_be_bytes(*word)))
    });
    // Two folds are enough for the 30 words of the longest header.
    let folded = (sum >> 16).wrapping_add(sum & 0xffff);
    let folded = (folded >> 16).wrapping_add(folded & 0xffff);
    let [_, _, high, low] = folded.to_be_bytes();
    !u16::from_be_bytes([high, low])
}

#[cfg(test)]
#[expect(
    clippy::arithmetic_side_effects,
    reason = "a test that overflows fails"
)]
mod tests;
