//! Tests of frames: what the standards say, what is for us, and that no truncation reads outside.

use std::vec;
use std::vec::Vec;

use proto::keys::SessionKeys;
use proto::units::SessionId;

use super::*;

const OWN: Mac = [2, 0, 0, 0, 0, 1];
const HOP: Mac = [2, 0, 0, 0, 0, 2];

fn server(local: Address, remote: Address) -> Server {
    Server {
        local,
        local_port: 6666,
        remote,
        remote_port: 7777,
        next_hop: HOP,
        session: SessionId::default(),
        keys: SessionKeys {
            client: [0; 32],
            server: [0; 32],
        },
    }
}

fn route() -> Route {
    Route::new(
        OWN,
        &server(Address::V4([10, 0, 2, 15]), Address::V4([10, 0, 2, 2])),
    )
    .unwrap()
}

/// The same way, seen from the server.
fn reverse() -> Route {
    let there = route();
    Route {
        own_mac: there.next_hop,
        next_hop: there.own_mac,
        local: there.remote,
        remote: there.local,
        local_port: there.remote_port,
        remote_port: there.local_port,
    }
}

fn sent_by_server(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES + payload.len()];
    frame[HEADER_BYTES..].copy_from_slice(payload);
    assert_eq!(
        reverse().finish(&mut frame, payload.len()),
        Some(frame.len())
    );
    frame
}

fn question(target: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0; ARP_BYTES];
    let arp = Arp {
        kinds: ARP_KINDS,
        operation: ARP_REQUEST.into(),
        sender_mac: HOP,
        sender: [10, 0, 2, 2],
        target_mac: [0; 6],
        target,
    };
    let ethernet = Ethernet {
        to: [0xff; 6],
        from: HOP,
        ethertype: ETHERTYPE_ARP.into(),
    };
    ArpFrame { ethernet, arp }.write_to(&mut frame).unwrap();
    frame
}

#[test]
fn a_frame_is_what_the_standards_say() {
    let mut frame = [0xaa; HEADER_BYTES + 4];
    assert_eq!(route().finish(&mut frame, 4), Some(HEADER_BYTES + 4));
    let expected = [
        2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, // Ethernet
        0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0x22, 0xbd, 10, 0, 2, 15, 10, 0, 2, 2, // IPv4
        0x1a, 0x0a, 0x1e, 0x61, 0, 12, 0, 0, // UDP
        0xaa, 0xaa, 0xaa, 0xaa,
    ];
    assert_eq!(frame, expected);
}

#[test]
fn a_checksummed_header_sums_up_to_zero() {
    for payload in [0, 1, 508, 1472] {
        let frame = sent_by_server(&vec![7; payload]);
        assert_eq!(checksum(&frame[14..34]), 0);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    assert_eq!(route().finish(&mut [0; HEADER_BYTES + 3], 4), None);
    assert_eq!(route().finish(&mut vec![0; 70_000], 65_508), None);
    assert_eq!(route().finish(&mut vec![0; 70_000], 65_507), Some(65_549));
    assert_eq!(route().finish(&mut [0; 64], usize::MAX), None);
}

#[test]
fn a_reply_is_taken_and_padding_is_not() {
    let mut frame = sent_by_server(b"reply");
    frame.resize(60, 0xee);
    let Received::Payload(payload) = route().receive(&mut frame) else {
        panic!("not taken")
    };
    assert_eq!(payload, b"reply");
}

#[test]
fn ip_options_are_skipped() {
    let plain = sent_by_server(b"reply");
    let mut frame = plain[..34].to_vec();
    frame.extend([1, 1, 1, 0]);
    frame.extend(&plain[34..]);
    frame[14] = 0x46;
    frame[17] += 4;
    let Received::Payload(payload) = route().receive(&mut frame) else {
        panic!("not taken")
    };
    assert_eq!(payload, b"reply");
}

#[test]
fn every_truncation_is_refused() {
    let whole = sent_by_server(b"reply");
    for bytes in 0..whole.len() {
        assert_eq!(
            route().receive(&mut whole[..bytes].to_vec()),
            Received::Other,
            "{bytes} bytes"
        );
    }
    let whole = question([10, 0, 2, 15]);
    for bytes in 0..whole.len() {
        assert_eq!(
            route().receive(&mut whole[..bytes].to_vec()),
            Received::Other,
            "{bytes} bytes"
        );
    }
}

#[test]
fn any_header_byte_changed_never_reads_outside() {
    let whole = sent_by_server(b"reply");
    for at in 0..HEADER_BYTES {
        for value in 0..=u8::MAX {
            let mut frame = whole.clone();
            frame[at] = value;
            if let Received::Payload(payload) = route().receive(&mut frame) {
                assert!(payload.len() <= 5);
            }
        }
    }
}

#[test]
fn others_datagrams_are_not_for_us() {
    // Source address, destination address, source port, destination port, protocol, fragment
    // offset, more fragments.
    for (at, value) in [
        (26, 11),
        (33, 16),
        (34, 0),
        (37, 0),
        (23, 6),
        (21, 1),
        (20, 0x20),
    ] {
        let mut frame = sent_by_server(b"reply");
        frame[at] = value;
        assert_eq!(route().receive(&mut frame), Received::Other, "byte {at}");
    }
}

#[test]
fn a_question_for_our_address_is_answered() {
    let Received::Question(asker) = route().receive(&mut question([10, 0, 2, 15])) else {
        panic!("not taken")
    };
    let mut answer = [0; ARP_BYTES];
    assert_eq!(route().answer(&asker, &mut answer), Some(ARP_BYTES));
    let expected = [
        2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 6, // Ethernet
        0, 1, 8, 0, 6, 4, 0, 2, 2, 0, 0, 0, 0, 1, 10, 0, 2, 15, 2, 0, 0, 0, 0, 2, 10, 0, 2, 2,
    ];
    assert_eq!(answer, expected);
    assert_eq!(route().answer(&asker, &mut [0; ARP_BYTES - 1]), None);
}

#[test]
fn questions_for_others_and_answers_are_ignored() {
    assert_eq!(
        route().receive(&mut question([10, 0, 2, 16])),
        Received::Other
    );
    let mut reply = question([10, 0, 2, 15]);
    reply[21] = 2;
    assert_eq!(route().receive(&mut reply), Received::Other);
}

#[test]
fn there_is_no_way_to_ipv6_yet() {
    assert_eq!(
        Route::new(OWN, &server(Address::V6([0; 16]), Address::V6([1; 16]))),
        None
    );
}
