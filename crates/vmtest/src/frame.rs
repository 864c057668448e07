//! The Ethernet frames the wire knows: UDP over IPv4 and IPv6, ARP and neighbour discovery, on a
//! VLAN or outside of any; read and built in place.
//!
//! Offsets from the start of the frame: Ethernet 0 (destination, source, type), tag 14 if there is
//! one, then at [`Format::link_bytes`] IPv4 (20 bytes), IPv6 (40) or ARP, then UDP (8), the payload.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// An Ethernet hardware address.
pub type Mac = [u8; 6];
/// An IP address and a UDP port.
pub type Endpoint = (IpAddr, u16);

/// Whether a frame is one by which a port of an 802.3ad bond tells its partner that it is there.
#[must_use]
pub fn is_sign_of_life(frame: &[u8]) -> bool {
    frame.get(12..15) == Some(&SIGN_OF_LIFE)
}

/// The hardware address of the harness on the wire: locally administered, so nobody else's.
pub const HARNESS_MAC: Mac = [0x02, 0x6e, 0x64, 0x00, 0x00, 0x01];

const BROADCAST: Mac = [0xff; 6];
const ETHERNET: usize = 14;
const TAG: usize = 4;
const IPV4: usize = 20;
const IPV6: usize = 40;
const UDP: usize = 8;
const PROTOCOL_UDP: u8 = 17;
const PROTOCOL_ICMP6: u8 = 58;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const TYPE_VLAN: [u8; 2] = [0x81, 0x00];
const TYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// The type of slow protocols, and among them that of LACP.
const SIGN_OF_LIFE: [u8; 3] = [0x88, 0x09, 1];
/// What ARP begins with for Ethernet and IPv4.
const ARP_KINDS: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// The priority of the harness's own tags, unlike the guest's.
const PRIORITY: u16 = 5 << 13;

/// What a frame from the guest is.
#[derive(Debug, Eq, PartialEq)]
pub enum Frame {
    /// It asks who has `target`.
    Question {
        /// The address asked for.
        target: IpAddr,
        /// Who asks.
        asker: IpAddr,
    },
    /// It says who has `target`.
    Answer {
        /// The address that was asked for.
        target: IpAddr,
    },
    /// A UDP datagram, not a fragment.
    Udp {
        /// Who sent it.
        from: Endpoint,
        /// For whom it is.
        to: Endpoint,
        /// Where in the frame its payload lies.
        payload: Range<usize>,
    },
    /// A UDP datagram that any stack throws away for its checksum.
    Damaged,
    /// Anything else: the guest's kernel also looks for routers, for example.
    Other,
}

/// What the frames of a network have in common.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Format {
    /// Datagrams are IPv6's.
    pub ip6: bool,
    /// The VLAN whose tag all frames have.
    pub vlan: Option<u16>,
}

impl Format {
    /// Bytes before the IP header.
    #[must_use]
    pub fn link_bytes(self) -> usize {
        self.vlan.map_or(ETHERNET, |_| ETHERNET + TAG)
    }

    /// Bytes before the payload of a datagram.
    #[must_use]
    pub fn header_bytes(self) -> usize {
        self.link_bytes() + if self.ip6 { IPV6 } else { IPV4 } + UDP
    }

    /// Tells what `frame` is; bytes that are too short, damaged or of another VLAN are `Other`.
    #[must_use]
    pub fn parse(self, frame: &[u8]) -> Frame {
        self.parse_inside(frame).unwrap_or(Frame::Other)
    }

    fn parse_inside(self, frame: &[u8]) -> Option<Frame> {
        let kind = match self.vlan {
            None => field(frame, 12)?,
            Some(vlan) => {
                let tag = u16::from_be_bytes(field(frame, 14)?);
                if field(frame, 12)? != TYPE_VLAN || tag & 0xfff != vlan {
                    return None;
                }
                field(frame, 16)?
            }
        };
        let packet = frame.get(self.link_bytes()..)?;
        match (kind, self.ip6) {
            (TYPE_ARP, false) => parse_arp(packet),
            (TYPE_IPV4, false) => self.parse_ipv4(packet),
            (TYPE_IPV6, true) => self.parse_ipv6(packet),
            _ => None,
        }
    }

    fn parse_ipv4(self, packet: &[u8]) -> Option<Frame> {
        let [version, _] = field(packet, 0)?;
        let total = usize::from(u16::from_be_bytes(field(packet, 2)?));
        let [flags, fragment] = field(packet, 6)?;
        let [_, protocol] = field(packet, 8)?;
        // More fragments, or not the first: the guest's datagrams fit its MTU.
        let plain = version == 0x45 && flags & 0x3f == 0 && fragment == 0;
        if !plain || protocol != PROTOCOL_UDP || sum(0, packet.get(..IPV4)?) != 0xffff {
            return None;
        }
        let address = |at| Some(IpAddr::from(field::<4>(packet, at)?));
        let addresses = [address(12)?, address(16)?];
        let datagram = packet.get(IPV4..total)?;
        self.parse_udp(datagram, addresses, packet.get(12..20)?)
    }

    fn parse_ipv6(self, packet: &[u8]) -> Option<Frame> {
        let [version] = field(packet, 0)?;
        let bytes = usize::from(u16::from_be_bytes(field(packet, 4)?));
        let [protocol, hop_limit] = field(packet, 6)?;
        let contents = packet.get(IPV6..IPV6 + bytes)?;
        let address = |at| Some(IpAddr::from(field::<16>(packet, at)?));
        let addresses = [address(8)?, address(24)?];
        match protocol {
            _ if version & 0xf0 != 0x60 => None,
            PROTOCOL_UDP => self.parse_udp(contents, addresses, packet.get(8..40)?),
            PROTOCOL_ICMP6 if hop_limit == 255 => {
                let pseudo = pseudo(packet.get(8..40)?, PROTOCOL_ICMP6, contents.len());
                if sum(pseudo, contents) != 0xffff {
                    return Some(Frame::Damaged);
                }
                let target = IpAddr::from(field::<16>(contents, 8)?);
                match *contents.first()? {
                    SOLICITATION => Some(Frame::Question {
                        target,
                        asker: addresses[0],
                    }),
                    ADVERTISEMENT => Some(Frame::Answer { target }),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// `covered` is what the checksum covers of the IP header.
    fn parse_udp(self, datagram: &[u8], [from, to]: [IpAddr; 2], covered: &[u8]) -> Option<Frame> {
        let length = usize::from(u16::from_be_bytes(field(datagram, 4)?));
        let whole = datagram.get(..length).filter(|whole| whole.len() >= UDP)?;
        let missing = field(datagram, 6)? == [0, 0];
        // IPv4 datagrams may go without a checksum, IPv6 ones may not.
        if self.ip6 && missing
            || !missing && sum(pseudo(covered, PROTOCOL_UDP, length), whole) != 0xffff
        {
            return Some(Frame::Damaged);
        }
        let port = |at| Some(u16::from_be_bytes(field(datagram, at)?));
        let start = self.header_bytes();
        Some(Frame::Udp {
            from: (from, port(0)?),
            to: (to, port(2)?),
            payload: start..start + length - UDP,
        })
    }

    /// Writes the headers of a datagram whose payload already lies behind them, from
    /// [`Format::header_bytes`] to the end of `frame`.
    ///
    /// # Panics
    /// If `frame` is shorter than its headers or longer than IP allows, or an address is of the
    /// other family: all are the caller's, not input.
    pub fn write_headers(self, frame: &mut [u8], macs: [Mac; 2], from: Endpoint, to: Endpoint) {
        assert!(
            (self.header_bytes()..=0xffff).contains(&frame.len()),
            "a frame of {} bytes",
            frame.len()
        );
        assert!(
            from.0.is_ipv6() == self.ip6 && to.0.is_ipv6() == self.ip6,
            "a datagram from {} to {}",
            from.0,
            to.0
        );
        let kind = if self.ip6 { TYPE_IPV6 } else { TYPE_IPV4 };
        let packet = self.write_link(frame, macs, kind);
        let (ip, udp) = packet.split_at_mut(if self.ip6 { IPV6 } else { IPV4 });
        let length = u16::try_from(udp.len()).unwrap_or(u16::MAX);
        match (from.0, to.0) {
            (IpAddr::V4(from), IpAddr::V4(to)) => write_ipv4(ip, length, from, to),
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                write_ipv6(ip, length, (PROTOCOL_UDP, 64), [from, to])
            }
            // The assertion above says that there is no such pair.
            _ => {}
        }
        udp[..2].copy_from_slice(&from.1.to_be_bytes());
        udp[2..4].copy_from_slice(&to.1.to_be_bytes());
        udp[4..6].copy_from_slice(&length.to_be_bytes());
        udp[6..8].copy_from_slice(&[0, 0]);
        let covered = if self.ip6 { &ip[8..40] } else { &ip[12..20] };
        let checksum = match !sum(pseudo(covered, PROTOCOL_UDP, udp.len()), udp) {
            0 => 0xffff, // 0 would say that there is no checksum
            checksum => checksum,
        };
        udp[6..8].copy_from_slice(&checksum.to_be_bytes());
    }

    /// Cuts the payload of a datagram to its first `keep` bytes, with headers that say so; whether
    /// `frame` is one that has more.
    pub fn shorten(self, frame: &mut Vec<u8>, keep: usize) -> bool {
        let Frame::Udp { from, to, payload } = self.parse(frame) else {
            return false;
        };
        if keep >= payload.len() {
            return false;
        }
        let mut macs = [[0; 6]; 2];
        macs[0].copy_from_slice(&frame[..6]);
        macs[1].copy_from_slice(&frame[6..12]);
        frame.truncate(payload.start + keep);
        self.write_headers(frame, macs, from, to);
        true
    }

    /// The question who has `target`, asked by the harness, which has `own`.
    #[must_use]
    pub fn question(self, target: IpAddr, own: IpAddr) -> Vec<u8> {
        match (target, own) {
            (IpAddr::V6(target), IpAddr::V6(own)) => {
                let [.., a, b, c] = target.octets();
                let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]);
                let to = ([0x33, 0x33, 0xff, a, b, c], group);
                self.neighbour(to, own, (SOLICITATION, 0, 1), target)
            }
            (IpAddr::V4(target), IpAddr::V4(own)) => {
                self.arp(ARP_REQUEST, own, (BROADCAST, target))
            }
            _ => Vec::new(),
        }
    }

    /// The answer to a question of `asker`, whose hardware address is `mac`: the harness has `own`.
    #[must_use]
    pub fn answer(self, mac: Mac, asker: IpAddr, own: IpAddr) -> Vec<u8> {
        match (asker, own) {
            (IpAddr::V6(asker), IpAddr::V6(own)) => {
                // Solicited, and to replace what is known.
                self.neighbour((mac, asker), own, (ADVERTISEMENT, 0x60, 2), own)
            }
            (IpAddr::V4(asker), IpAddr::V4(own)) => self.arp(ARP_REPLY, own, (mac, asker)),
            _ => Vec::new(),
        }
    }

    fn arp(self, operation: u8, own: Ipv4Addr, (mac, target): (Mac, Ipv4Addr)) -> Vec<u8> {
        let mut frame = vec![0; self.link_bytes() + 28];
        let packet = self.write_link(&mut frame, [mac, HARNESS_MAC], TYPE_ARP);
        packet[..6].copy_from_slice(&ARP_KINDS);
        packet[7] = operation;
        packet[8..14].copy_from_slice(&HARNESS_MAC);
        packet[14..18].copy_from_slice(&own.octets());
        packet[18..24].copy_from_slice(&mac);
        packet[24..28].copy_from_slice(&target.octets());
        frame
    }

    /// A message of neighbour discovery of this type, with these flags and this one option.
    fn neighbour(
        self,
        (mac, to): (Mac, Ipv6Addr),
        own: Ipv6Addr,
        (kind, flags, option): (u8, u8, u8),
        target: Ipv6Addr,
    ) -> Vec<u8> {
        let mut frame = vec![0; self.link_bytes() + IPV6 + 32];
        let packet = self.write_link(&mut frame, [mac, HARNESS_MAC], TYPE_IPV6);
        let (ip, message) = packet.split_at_mut(IPV6);
        write_ipv6(ip, 32, (PROTOCOL_ICMP6, 255), [own, to]);
        message[0] = kind;
        message[4] = flags;
        message[8..24].copy_from_slice(&target.octets());
        message[24..26].copy_from_slice(&[option, 1]);
        message[26..32].copy_from_slice(&HARNESS_MAC);
        let checksum = !sum(pseudo(&ip[8..40], PROTOCOL_ICMP6, 32), message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        frame
    }

    /// Writes hardware addresses (to, from), tag and type; gives what is behind them.
    fn write_link(self, frame: &mut [u8], [to, from]: [Mac; 2], kind: [u8; 2]) -> &mut [u8] {
        frame[..6].copy_from_slice(&to);
        frame[6..12].copy_from_slice(&from);
        if let Some(vlan) = self.vlan {
            frame[12..14].copy_from_slice(&TYPE_VLAN);
            frame[14..16].copy_from_slice(&(PRIORITY | vlan).to_be_bytes());
        }
        let at = self.link_bytes();
        frame[at - 2..at].copy_from_slice(&kind);
        &mut frame[at..]
    }
}

/// The hardware address `frame` was sent from.
#[must_use]
pub fn source(frame: &[u8]) -> Option<Mac> {
    field(frame, 6)
}

/// Whether a station with the hardware address of the harness takes `frame`.
#[must_use]
pub fn is_for_harness(frame: &[u8]) -> bool {
    matches!(
        field(frame, 0),
        Some(HARNESS_MAC | BROADCAST | [0x33, 0x33, ..])
    )
}

fn field<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..)?.first_chunk().copied()
}

fn parse_arp(packet: &[u8]) -> Option<Frame> {
    if field(packet, 0)? != ARP_KINDS {
        return None;
    }
    let address = |at| Some(IpAddr::from(field::<4>(packet, at)?));
    match field(packet, 6)? {
        [0, ARP_REQUEST] => Some(Frame::Question {
            target: address(24)?,
            asker: address(14)?,
        }),
        [0, ARP_REPLY] => Some(Frame::Answer {
            target: address(14)?,
        }),
        _ => None,
    }
}

fn write_ipv4(ip: &mut [u8], datagram: u16, from: Ipv4Addr, to: Ipv4Addr) {
    let total = datagram.saturating_add(20);
    ip[..2].copy_from_slice(&[0x45, 0]);
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    // Identification 0, do not fragment, 64 hops, UDP, checksum to be filled in.
    ip[4..12].copy_from_slice(&[0, 0, 0x40, 0, 64, PROTOCOL_UDP, 0, 0]);
    ip[12..16].copy_from_slice(&from.octets());
    ip[16..20].copy_from_slice(&to.octets());
    let header = !sum(0, ip);
    ip[10..12].copy_from_slice(&header.to_be_bytes());
}

fn write_ipv6(ip: &mut [u8], bytes: u16, (protocol, hops): (u8, u8), ends: [Ipv6Addr; 2]) {
    ip[..4].copy_from_slice(&[0x60, 0, 0, 0]);
    ip[4..6].copy_from_slice(&bytes.to_be_bytes());
    ip[6..8].copy_from_slice(&[protocol, hops]);
    ip[8..24].copy_from_slice(&ends[0].octets());
    ip[24..40].copy_from_slice(&ends[1].octets());
}

/// The sum over what checksums cover beside the message: both addresses, protocol and length.
fn pseudo(addresses: &[u8], protocol: u8, length: usize) -> u16 {
    let length = u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
    sum(sum(0, addresses), &[0, protocol, length[0], length[1]])
}

/// The Internet checksum's sum of 16-bit words (RFC 1071), going on from `start`.
fn sum(start: u16, bytes: &[u8]) -> u16 {
    let mut total = u64::from(start);
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        total += u64::from(u32::from_be_bytes(*word));
    }
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_be_bytes(last));
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap_or(0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::stage::Network;

    pub(crate) const GUEST: Mac = [0x52, 0x54, 0, 1, 2, 3];

    /// Both families, outside and inside of a VLAN.
    fn formats() -> [Format; 4] {
        [
            (false, None),
            (false, Some(7)),
            (true, None),
            (true, Some(7)),
        ]
        .map(|(ip6, vlan)| Format { ip6, vlan })
    }

    fn ends(format: Format) -> [Endpoint; 2] {
        let network = Network {
            ip6: format.ip6,
            ..Network::default()
        };
        [(network.guest(), 40000), (network.server(), 6666)]
    }

    /// A frame as the guest sends it to the server.
    pub(crate) fn datagram(format: Format, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; format.header_bytes()];
        frame.extend_from_slice(payload);
        let [from, to] = ends(format);
        format.write_headers(&mut frame, [HARNESS_MAC, GUEST], from, to);
        frame
    }

    #[test]
    fn a_bonds_sign_of_life_is_known_by_its_type() {
        let mut frame = [0; 124];
        assert!(!is_sign_of_life(&frame));
        frame[12..15].copy_from_slice(&SIGN_OF_LIFE);
        assert!(is_sign_of_life(&frame));
        frame[14] = 2; // the marker protocol
        assert!(!is_sign_of_life(&frame));
        assert!(!is_sign_of_life(&frame[..14]));
    }

    #[test]
    fn built_datagrams_parse() {
        for format in formats() {
            let frame = datagram(format, b"hello");
            let [from, to] = ends(format);
            let start = format.header_bytes();
            let expected = Frame::Udp {
                from,
                to,
                payload: start..start + 5,
            };
            assert_eq!(format.parse(&frame), expected);
            assert!(is_for_harness(&frame));
            for other in formats().iter().filter(|other| **other != format) {
                assert_eq!(other.parse(&frame), Frame::Other);
            }
        }
    }

    #[test]
    fn every_prefix_parses_without_panic() {
        for format in formats() {
            let frame = datagram(format, b"hello");
            for end in 0..frame.len() {
                assert_eq!(format.parse(&frame[..end]), Frame::Other, "cut at {end}");
            }
        }
    }

    #[test]
    fn a_changed_bit_is_noticed_behind_the_hardware_addresses() {
        for format in formats() {
            let frame = datagram(format, b"hello");
            let whole = format.parse(&frame);
            for at in 14..frame.len() {
                let mut frame = frame.clone();
                frame[at] ^= 1;
                let parsed = format.parse(&frame);
                // The tag's priority, and what of IPv6's header no checksum covers.
                let free =
                    at == 14 || format.ip6 && (14..22).contains(&(at + 14 - format.link_bytes()));
                assert!(parsed != whole || free, "byte {at} of {format:?}");
            }
        }
    }

    #[test]
    fn an_ipv6_datagram_without_a_checksum_is_damaged_an_ipv4_one_is_not() {
        for format in formats() {
            let mut frame = datagram(format, b"hello");
            let at = format.header_bytes() - 2;
            frame[at..at + 2].fill(0);
            assert_eq!(format.parse(&frame) == Frame::Damaged, format.ip6);
        }
    }

    #[test]
    fn a_shortened_datagram_is_whole_again() {
        for format in formats() {
            let mut frame = datagram(format, b"hello");
            assert!(!format.shorten(&mut frame, 5));
            assert!(format.shorten(&mut frame, 2));
            let Frame::Udp { payload, .. } = format.parse(&frame) else {
                panic!("no datagram")
            };
            assert_eq!(&frame[payload], b"he");
            assert_eq!(source(&frame), Some(GUEST));
        }
    }

    #[test]
    fn questions_and_answers_are_read_back() {
        for format in formats() {
            let [(guest, _), (server, _)] = ends(format);
            let question = format.question(guest, server);
            let expected = Frame::Question {
                target: guest,
                asker: server,
            };
            assert_eq!(format.parse(&question), expected);
            let answer = format.answer(GUEST, guest, server);
            assert_eq!(format.parse(&answer), Frame::Answer { target: server });
            assert_eq!(answer[..6], GUEST);
        }
    }
}
