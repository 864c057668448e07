//! IPv4 and ARP (RFC 791, RFC 826). The UDP checksum is left out, which RFC 768 allows here: the
//! payload's seal is the stronger check, and it is made by the same CPU anyway.

use proto::arming::Address;
use zerocopy::big_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::sum::Sum;
use super::{Asker, Mac, PROTOCOL_UDP, Ports, Received, Udp, udp_payload};

/// Bytes of the headers before a payload, Ethernet's not counted.
pub(super) const HEADER_BYTES: usize = size_of::<Headers>();

const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
/// Ethernet, IPv4, 6 and 4 bytes of address: all that we speak.
const ARP_KINDS: [u8; 6] = [0, 1, 8, 0, 6, 4];
const PLAIN: u8 = 0x45;
const DONT_FRAGMENT: u16 = 0x4000;
const FRAGMENT: u16 = 0x3fff;
const TTL: u8 = 64;

/// The addresses of a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) local: [u8; 4],
    pub(super) remote: [u8; 4],
    pub(super) next_hop: [u8; 4],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Ip {
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
struct Headers {
    ip: Ip,
    udp: Udp,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Arp {
    kinds: [u8; 6],
    operation: U16,
    sender_mac: Mac,
    sender: [u8; 4],
    target_mac: Mac,
    target: [u8; 4],
}

impl Ends {
    /// Writes the headers of `packet`, whose end is the payload.
    pub(super) fn finish(&self, packet: &mut [u8], ports: Ports) -> Option<()> {
        let ip_bytes = u16::try_from(packet.len()).ok()?;
        let udp_bytes = ip_bytes.checked_sub(u16::try_from(size_of::<Ip>()).ok()?)?;
        let mut ip = Ip {
            version_and_words: PLAIN,
            service: 0,
            total_bytes: ip_bytes.into(),
            // Meaningless in a datagram that is never fragmented (RFC 6864).
            id: 0.into(),
            fragment: DONT_FRAGMENT.into(),
            ttl: TTL,
            protocol: PROTOCOL_UDP,
            checksum: 0.into(),
            from: self.local,
            to: self.remote,
        };
        ip.checksum = Sum::default().add(ip.as_bytes()).checksum().into();
        let udp = Udp {
            from: ports.local.into(),
            to: ports.remote.into(),
            bytes: udp_bytes.into(),
            checksum: 0.into(),
        };
        Headers { ip, udp }.write_to_prefix(packet).ok()
    }

    /// The payload of a datagram from the server to our port.
    pub(super) fn payload<'a>(&self, packet: &'a mut [u8], ports: Ports) -> Option<&'a mut [u8]> {
        let (ip, _) = Ip::read_from_prefix(packet).ok()?;
        let version = ip.version_and_words >> 4;
        let header_bytes = usize::from(ip.version_and_words & 0xf).checked_mul(4)?;
        let whole = ip.fragment.get() & FRAGMENT == 0;
        let between_us = ip.from == self.remote && ip.to == self.local;
        if version != 4
            || ip.protocol != PROTOCOL_UDP
            || !whole
            || !between_us
            || header_bytes < size_of::<Ip>()
        {
            return None;
        }
        // The link may have padded the packet.
        let packet = packet.get_mut(..usize::from(ip.total_bytes.get()))?;
        udp_payload(packet.get_mut(header_bytes..)?, ports)
    }

    /// What the ARP `packet` asks or tells us.
    pub(super) fn neighbour(&self, packet: &[u8]) -> Option<Received<'static>> {
        let (arp, _) = Arp::read_from_prefix(packet).ok()?;
        if arp.kinds != ARP_KINDS || arp.target != self.local || !is_station(arp.sender_mac) {
            return None;
        }
        match arp.operation.get() {
            ARP_REQUEST => Some(Received::Question(Asker {
                mac: arp.sender_mac,
                address: Address::V4(arp.sender),
            })),
            ARP_REPLY if arp.sender == self.next_hop => Some(Received::NextHop(arp.sender_mac)),
            _ => None,
        }
    }

    /// Writes the answer to who asked for our Ethernet address; returns its bytes.
    pub(super) fn answer(
        &self,
        packet: &mut [u8],
        own_mac: Mac,
        to_mac: Mac,
        to: [u8; 4],
    ) -> Option<usize> {
        self.arp(packet, ARP_REPLY, own_mac, (to_mac, to))
    }

    /// Writes the question for the next hop's Ethernet address; returns its bytes.
    pub(super) fn ask(&self, packet: &mut [u8], own_mac: Mac) -> Option<usize> {
        self.arp(packet, ARP_REQUEST, own_mac, ([0; 6], self.next_hop))
    }

    fn arp(
        &self,
        packet: &mut [u8],
        operation: u16,
        sender_mac: Mac,
        (target_mac, target): (Mac, [u8; 4]),
    ) -> Option<usize> {
        let arp = Arp {
            kinds: ARP_KINDS,
            operation: operation.into(),
            sender_mac,
            sender: self.local,
            target_mac,
            target,
        };
        arp.write_to_prefix(packet).ok()?;
        Some(size_of::<Arp>())
    }
}

/// Whether `mac` is one station's address: neither a group's nor none.
pub(super) fn is_station([first, rest @ ..]: Mac) -> bool {
    first & 1 == 0 && (first != 0 || rest != [0; 5])
}
