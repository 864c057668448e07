//! The Ethernet frames the wire knows: ARP and UDP over IPv4, read and built in place.
//!
//! Offsets from the start of the frame: Ethernet 0 (destination, source, type), IPv4 or ARP 14, UDP
//! 34, payload 42.

use std::ops::Range;

/// An Ethernet hardware address.
pub type Mac = [u8; 6];
/// An IPv4 address and a UDP port.
pub type Endpoint = ([u8; 4], u16);

/// Bytes before the payload of a UDP datagram: Ethernet 14, IPv4 without options 20, UDP 8.
pub const UDP_HEADERS: usize = 42;
/// The hardware address of the harness on the wire: locally administered, so nobody else's.
pub const HARNESS_MAC: Mac = [0x02, 0x6e, 0x64, 0x00, 0x00, 0x01];

const ARP_FRAME: usize = 42;
const BROADCAST: Mac = [0xff; 6];

/// What a frame from the guest is.
#[derive(Debug, Eq, PartialEq)]
pub enum Frame {
    /// It asks who has `target`.
    ArpRequest {
        /// The address asked for.
        target: [u8; 4],
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
    /// Anything else: the guest's kernel also speaks IPv6, for example.
    Other,
}

/// Tells what `frame` is; bytes that are too short or damaged are `Other`.
#[must_use]
pub fn parse(frame: &[u8]) -> Frame {
    match field::<2>(frame, 12) {
        Some([0x08, 0x06]) => parse_arp(frame).unwrap_or(Frame::Other),
        Some([0x08, 0x00]) => parse_udp(frame).unwrap_or(Frame::Other),
        _ => Frame::Other,
    }
}

/// The hardware address `frame` was sent from.
#[must_use]
pub fn source(frame: &[u8]) -> Option<Mac> {
    field(frame, 6)
}

/// The answer to an ARP request: `HARNESS_MAC` has `target`.
#[must_use]
pub fn arp_reply(request: &[u8], target: [u8; 4]) -> Option<[u8; ARP_FRAME]> {
    let mut reply = [0; ARP_FRAME];
    let (asker, asker_address) = (field::<6>(request, 22)?, field::<4>(request, 28)?);
    reply[..6].copy_from_slice(&asker);
    reply[6..12].copy_from_slice(&HARNESS_MAC);
    // Type ARP; hardware Ethernet, protocol IPv4, their lengths; operation 2, a reply.
    reply[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    reply[22..28].copy_from_slice(&HARNESS_MAC);
    reply[28..32].copy_from_slice(&target);
    reply[32..38].copy_from_slice(&asker);
    reply[38..42].copy_from_slice(&asker_address);
    Some(reply)
}

/// Writes the headers of a datagram whose payload already lies behind them, from `UDP_HEADERS` to
/// the end of `frame`.
///
/// # Panics
/// If `frame` is shorter than its headers or longer than IPv4 allows: both are the caller's
/// buffers, not input.
pub fn write_udp_headers(frame: &mut [u8], to_mac: Mac, from: Endpoint, to: Endpoint) {
    assert!(
        (UDP_HEADERS..=0xffff).contains(&frame.len()),
        "a frame of {} bytes",
        frame.len()
    );
    let total = u16::try_from(frame.len() - 14).unwrap_or(u16::MAX);
    frame[..6].copy_from_slice(&to_mac);
    frame[6..12].copy_from_slice(&HARNESS_MAC);
    frame[12..16].copy_from_slice(&[0x08, 0x00, 0x45, 0x00]);
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    // Identification 0, do not fragment, 64 hops, UDP, checksum to be filled in.
    frame[18..26].copy_from_slice(&[0, 0, 0x40, 0, 64, 17, 0, 0]);
    frame[26..30].copy_from_slice(&from.0);
    frame[30..34].copy_from_slice(&to.0);
    let header = !sum(0, &frame[14..34]);
    frame[24..26].copy_from_slice(&header.to_be_bytes());
    frame[34..36].copy_from_slice(&from.1.to_be_bytes());
    frame[36..38].copy_from_slice(&to.1.to_be_bytes());
    frame[38..40].copy_from_slice(&(total - 20).to_be_bytes());
    frame[40..42].copy_from_slice(&[0, 0]);
    // The pseudo-header: both addresses, the protocol, the length.
    let pseudo = sum(
        sum(0, &frame[26..34]),
        &[[0, 17], (total - 20).to_be_bytes()].concat(),
    );
    let datagram = match !sum(pseudo, &frame[34..]) {
        0 => 0xffff, // 0 would say that there is no checksum
        checksum => checksum,
    };
    frame[40..42].copy_from_slice(&datagram.to_be_bytes());
}

fn field<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..)?.first_chunk().copied()
}

fn parse_arp(frame: &[u8]) -> Option<Frame> {
    if field(frame, 14)? != [0, 1, 8, 0, 6, 4, 0, 1] {
        return None;
    }
    Some(Frame::ArpRequest {
        target: field(frame, 38)?,
    })
}

fn parse_udp(frame: &[u8]) -> Option<Frame> {
    let to_us = matches!(field(frame, 0)?, HARNESS_MAC | BROADCAST);
    let [version, _] = field(frame, 14)?;
    let [flags, fragment] = field(frame, 20)?;
    let [_, protocol] = field(frame, 22)?;
    // More fragments, or not the first: the guest's datagrams fit its MTU.
    if !to_us || version != 0x45 || flags & 0x3f != 0 || fragment != 0 || protocol != 17 {
        return None;
    }
    let length = usize::from(u16::from_be_bytes(field(frame, 38)?));
    let payload = UDP_HEADERS..34usize.checked_add(length)?;
    frame.get(payload.clone())?;
    let endpoint = |address, port| {
        Some((
            field(frame, address)?,
            u16::from_be_bytes(field(frame, port)?),
        ))
    };
    Some(Frame::Udp {
        from: endpoint(26, 34)?,
        to: endpoint(30, 36)?,
        payload,
    })
}

/// The Internet checksum's sum of 16-bit words (RFC 1071), going on from `start`.
fn sum(start: u16, bytes: &[u8]) -> u16 {
    let mut total = u32::from(start);
    for pair in bytes.chunks(2) {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        total += u32::from(word);
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Mac = [0x52, 0x54, 0, 1, 2, 3];

    fn datagram(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; UDP_HEADERS];
        frame.extend_from_slice(payload);
        write_udp_headers(
            &mut frame,
            GUEST,
            ([10, 0, 2, 2], 6666),
            ([10, 0, 2, 15], 40000),
        );
        frame
    }

    #[test]
    fn built_datagrams_parse_and_their_sums_are_right() {
        let mut frame = datagram(b"hello");
        assert_eq!(sum(0, &frame[14..34]), 0xffff);
        let pseudo = sum(sum(0, &frame[26..34]), &[0, 17, 0, 13]);
        assert_eq!(sum(pseudo, &frame[34..]), 0xffff);
        frame[..6].copy_from_slice(&HARNESS_MAC);
        let expected = Frame::Udp {
            from: ([10, 0, 2, 2], 6666),
            to: ([10, 0, 2, 15], 40000),
            payload: UDP_HEADERS..47,
        };
        assert_eq!(parse(&frame), expected);
    }

    #[test]
    fn every_prefix_parses_without_panic() {
        let mut frame = datagram(b"hello");
        frame[..6].copy_from_slice(&HARNESS_MAC);
        for end in 0..frame.len() {
            assert_eq!(parse(&frame[..end]), Frame::Other, "cut at {end}");
        }
    }

    #[test]
    fn arp_is_answered_with_the_right_addresses() {
        let mut request = vec![0xff; 6];
        request.extend_from_slice(&GUEST);
        request.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        request.extend_from_slice(&GUEST);
        request.extend_from_slice(&[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
        assert_eq!(
            parse(&request),
            Frame::ArpRequest {
                target: [10, 0, 2, 2]
            }
        );
        let reply = arp_reply(&request, [10, 0, 2, 2]).unwrap();
        assert_eq!(reply[..6], GUEST);
        assert_eq!(reply[20..22], [0, 2]);
        assert_eq!(reply[22..32], [2, 0x6e, 0x64, 0, 0, 1, 10, 0, 2, 2]);
        assert_eq!(reply[32..42], [0x52, 0x54, 0, 1, 2, 3, 10, 0, 2, 15]);
    }
}
