//! IPv6 and neighbour discovery (RFC 8200, RFC 4861). UDP's checksum is mandatory here, so it is
//! computed; on what arrives it is not checked, because the payload's seal is the stronger check.

use proto::arming::Address;
use zerocopy::big_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ipv4::is_station;
use super::sum::Sum;
use super::{Asker, Mac, PROTOCOL_UDP, Ports, Received, Udp, udp_payload};

/// Bytes of the headers before a payload, Ethernet's not counted.
pub(super) const HEADER_BYTES: usize = size_of::<Headers>();
/// Bytes of a solicitation or advertisement as we write it, with the IPv6 header.
pub(super) const NEIGHBOUR_BYTES: usize = size_of::<Ip>() + size_of::<Neighbour>();

type Ip6 = [u8; 16];

const VERSION: u8 = 0x60;
const PROTOCOL_ICMP: u8 = 58;
const HOP_LIMIT: u8 = 64;
/// Only a neighbour's packet arrives with it: each router takes one off.
const NEIGHBOUR_HOP_LIMIT: u8 = 255;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Flags of an advertisement: somebody asked for it; it replaces what is known.
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
/// Options: the Ethernet address of who asks, and of who answers, each of one unit of 8 bytes.
const OPTION_SOURCE: u8 = 1;
const OPTION_TARGET: u8 = 2;
const OPTION_UNITS: u8 = 1;
const UNSPECIFIED: Ip6 = [0; 16];
const ALL_NODES: Ip6 = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// The addresses of a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) local: Ip6,
    pub(super) remote: Ip6,
    pub(super) next_hop: Ip6,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Ip {
    version: u8,
    class_and_flow: [u8; 3],
    /// Of what is behind this header.
    bytes: U16,
    next_header: u8,
    hop_limit: u8,
    from: Ip6,
    to: Ip6,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Headers {
    ip: Ip,
    udp: Udp,
}

/// Begin of a solicitation or advertisement; options follow.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Message {
    kind: u8,
    code: u8,
    checksum: U16,
    flags: [u8; 4],
    target: Ip6,
}

/// The only options we send or understand.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct LinkOption {
    kind: u8,
    units: u8,
    mac: Mac,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Neighbour {
    message: Message,
    option: LinkOption,
}

impl Ends {
    /// Writes the headers of `packet`, whose end is the payload.
    pub(super) fn finish(&self, packet: &mut [u8], ports: Ports) -> Option<()> {
        let udp_bytes = u16::try_from(packet.len().checked_sub(size_of::<Ip>())?).ok()?;
        let ip = header(PROTOCOL_UDP, udp_bytes, HOP_LIMIT, self.local, self.remote);
        let mut udp = Udp {
            from: ports.local.into(),
            to: ports.remote.into(),
            bytes: udp_bytes.into(),
            checksum: 0.into(),
        };
        let payload = packet.get(HEADER_BYTES..)?;
        let sum = pseudo_header(&ip).add(udp.as_bytes()).add(payload);
        // 0 would say that there is no checksum.
        udp.checksum = match sum.checksum() {
            0 => 0xffff,
            sum => sum,
        }
        .into();
        Headers { ip, udp }.write_to_prefix(packet).ok()
    }

    /// The payload of a datagram from the server to our port. Servers send no extension headers.
    pub(super) fn payload<'a>(&self, packet: &'a mut [u8], ports: Ports) -> Option<&'a mut [u8]> {
        let (ip, _) = Ip::read_from_prefix(packet).ok()?;
        let between_us = ip.from == self.remote && ip.to == self.local;
        if ip.version & 0xf0 != VERSION || ip.next_header != PROTOCOL_UDP || !between_us {
            return None;
        }
        udp_payload(contents(packet, &ip)?, ports)
    }

    /// What the solicitation or advertisement `packet` from `mac` asks or tells us.
    pub(super) fn neighbour(&self, packet: &mut [u8], mac: Mac) -> Option<Received<'static>> {
        let (ip, _) = Ip::read_from_prefix(packet).ok()?;
        let contents = contents(packet, &ip)?;
        let (message, options) = Message::read_from_prefix(contents).ok()?;
        let for_us = ip.to == self.local || ip.to == group_of(self.local);
        let genuine = ip.version & 0xf0 == VERSION
            && ip.hop_limit == NEIGHBOUR_HOP_LIMIT
            && message.code == 0
            && pseudo_header(&ip).add(contents).checksum() == 0;
        if !genuine || !for_us || !is_station(mac) {
            return None;
        }
        match message.kind {
            SOLICITATION if message.target == self.local => Some(Received::Question(Asker {
                mac,
                address: Address::V6(ip.from),
            })),
            ADVERTISEMENT if message.target == self.next_hop => {
                let told = link_option(options, OPTION_TARGET).unwrap_or(mac);
                is_station(told).then_some(Received::NextHop(told))
            }
            _ => None,
        }
    }

    /// Writes the answer to who asked for our Ethernet address; returns its bytes.
    pub(super) fn answer(
        &self,
        packet: &mut [u8],
        own_mac: Mac,
        to: Ip6,
        solicited: bool,
    ) -> Option<usize> {
        let flags = if solicited {
            SOLICITED | OVERRIDE
        } else {
            OVERRIDE
        };
        let message = Message {
            kind: ADVERTISEMENT,
            code: 0,
            checksum: 0.into(),
            flags: [flags, 0, 0, 0],
            target: self.local,
        };
        self.write(packet, to, message, OPTION_TARGET, own_mac)
    }

    /// Writes the question for the next hop's Ethernet address; returns its bytes.
    pub(super) fn ask(&self, packet: &mut [u8], own_mac: Mac) -> Option<usize> {
        let message = Message {
            kind: SOLICITATION,
            code: 0,
            checksum: 0.into(),
            flags: [0; 4],
            target: self.next_hop,
        };
        let to = group_of(self.next_hop);
        self.write(packet, to, message, OPTION_SOURCE, own_mac)
    }

    /// The Ethernet address of the group that hears the question for the next hop.
    pub(super) const fn asked_mac(&self) -> Mac {
        group_mac(group_of(self.next_hop))
    }

    fn write(
        &self,
        packet: &mut [u8],
        to: Ip6,
        message: Message,
        kind: u8,
        mac: Mac,
    ) -> Option<usize> {
        let bytes = u16::try_from(size_of::<Neighbour>()).ok()?;
        let ip = header(PROTOCOL_ICMP, bytes, NEIGHBOUR_HOP_LIMIT, self.local, to);
        let units = OPTION_UNITS;
        let option = LinkOption { kind, units, mac };
        let mut neighbour = Neighbour { message, option };
        let sum = pseudo_header(&ip).add(neighbour.as_bytes());
        neighbour.message.checksum = sum.checksum().into();
        let (head, behind) = packet.split_at_mut_checked(size_of::<Ip>())?;
        ip.write_to(head).ok()?;
        neighbour.write_to_prefix(behind).ok()?;
        Some(NEIGHBOUR_BYTES)
    }
}

/// Whether `packet` is a message of neighbour discovery.
pub(super) fn is_neighbour(packet: &[u8]) -> bool {
    Ip::read_from_prefix(packet).is_ok_and(|(ip, _)| ip.next_header == PROTOCOL_ICMP)
}

/// Whom the answer to a question from `address` at `mac` is for. Who asks without an address wants
/// to know whether ours is free: that it is not, everybody is told.
pub(super) fn answer_to(address: Ip6, mac: Mac) -> (Ip6, Mac) {
    if address == UNSPECIFIED {
        (ALL_NODES, group_mac(ALL_NODES))
    } else {
        (address, mac)
    }
}

const fn header(next_header: u8, bytes: u16, hop_limit: u8, from: Ip6, to: Ip6) -> Ip {
    Ip {
        version: VERSION,
        class_and_flow: [0; 3],
        bytes: U16::new(bytes),
        next_header,
        hop_limit,
        from,
        to,
    }
}

/// What is behind the header `ip` of `packet`; the link may have padded it.
fn contents<'a>(packet: &'a mut [u8], ip: &Ip) -> Option<&'a mut [u8]> {
    let (_, behind) = packet.split_at_mut_checked(size_of::<Ip>())?;
    behind.get_mut(..usize::from(ip.bytes.get()))
}

/// What checksums cover beside the message itself.
fn pseudo_header(ip: &Ip) -> Sum {
    let [high, low] = ip.bytes.get().to_be_bytes();
    Sum::default()
        .add(&ip.from)
        .add(&ip.to)
        .add(&[0, 0, high, low, 0, 0, 0, ip.next_header])
}

/// The group in which whoever has `address` hears solicitations for it.
const fn group_of(address: Ip6) -> Ip6 {
    let [.., a, b, c] = address;
    [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]
}

/// The Ethernet address of a group (RFC 2464).
const fn group_mac(group: Ip6) -> Mac {
    let [.., a, b, c, d] = group;
    [0x33, 0x33, a, b, c, d]
}

/// The Ethernet address in the option of this kind. Ends at the first malformed option.
fn link_option(options: &[u8], kind: u8) -> Option<Mac> {
    let (units, _) = options.as_chunks::<8>();
    let mut units = units.iter();
    while let Some([found, length, mac @ ..]) = units.next() {
        if *found == kind && *length == OPTION_UNITS {
            return Some(*mac);
        }
        for _ in 1..*length {
            units.next();
        }
        if *length == 0 {
            return None;
        }
    }
    None
}
