//! Tests of frames: what the standards say, what is for us, and that no truncation reads outside.

use std::vec;
use std::vec::Vec;

use proto::keys::SessionKeys;
use proto::units::SessionId;

use super::*;

const OWN: Mac = [2, 0, 0, 0, 0, 1];
const HOP: Mac = [2, 0, 0, 0, 0, 2];
const HEADER_BYTES: usize = HEADER_BYTES_MIN;
const ARP_BYTES: usize = 42;
/// fd00::15 and fd00::2.
const OWN6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x15];
const SERVER6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];

fn server(local: Address, remote: Address) -> Server {
    Server {
        local,
        local_port: 6666,
        remote,
        remote_port: 7777,
        next_hop: remote,
        next_hop_mac: HOP,
        session: SessionId::default(),
        keys: SessionKeys {
            client: [0; 32],
            server: [0; 32],
        },
    }
}

fn v4() -> Server {
    server(Address::V4([10, 0, 2, 15]), Address::V4([10, 0, 2, 2]))
}

fn v6() -> Server {
    server(Address::V6(OWN6), Address::V6(SERVER6))
}

fn route() -> Route {
    Route::new(OWN, None, &v4()).unwrap()
}

/// The four ways there are: both families, outside and inside of a VLAN.
fn routes() -> [Route; 4] {
    [
        (None, v4()),
        (Some(0xa064), v4()),
        (None, v6()),
        (Some(0xa064), v6()),
    ]
    .map(|(tag, server)| Route::new(OWN, tag, &server).unwrap())
}

/// The same way, seen from the server.
fn reverse(there: &Route) -> Route {
    let ends = match there.ends {
        Ends::V4(ends) => Ends::V4(ipv4::Ends {
            local: ends.remote,
            remote: ends.local,
            next_hop: ends.local,
        }),
        Ends::V6(ends) => Ends::V6(ipv6::Ends {
            local: ends.remote,
            remote: ends.local,
            next_hop: ends.local,
        }),
    };
    Route {
        own_mac: HOP,
        next_hop: Some(OWN),
        // The server's side uses another priority.
        tag: there.tag.map(|tag| tag & VLAN_MASK | 0x2000),
        ends,
        ports: Ports {
            local: there.ports.remote,
            remote: there.ports.local,
        },
    }
}

/// A frame with `payload` from the other end of `route`.
fn replied(route: &Route, payload: &[u8]) -> Vec<u8> {
    let at = route.header_bytes();
    let mut frame = vec![0; at + payload.len()];
    frame[at..].copy_from_slice(payload);
    assert_eq!(
        reverse(route).finish(&mut frame, payload.len()),
        Some(frame.len())
    );
    frame
}

fn sent_by_server(payload: &[u8]) -> Vec<u8> {
    replied(&route(), payload)
}

fn arp(operation: u8, sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(HOP);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(HOP);
    frame.extend(sender);
    frame.extend([0; 6]);
    frame.extend(target);
    frame
}

fn question(target: [u8; 4]) -> Vec<u8> {
    arp(1, [10, 0, 2, 2], target)
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
        assert_eq!(sum::Sum::default().add(&frame[14..34]).checksum(), 0);
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
    for route in routes() {
        let mut question = [0; NEIGHBOUR_BYTES_MAX];
        let bytes = reverse(&route).ask(&mut question).unwrap();
        for whole in [&replied(&route, b"reply")[..], &question[..bytes]] {
            assert_ne!(route.receive(&mut whole.to_vec()), Received::Other);
            for bytes in 0..whole.len() {
                assert_eq!(
                    route.receive(&mut whole[..bytes].to_vec()),
                    Received::Other,
                    "{bytes} bytes"
                );
            }
        }
    }
}

#[test]
fn any_header_byte_changed_never_reads_outside() {
    for route in routes() {
        let whole = replied(&route, b"reply");
        for at in 0..route.header_bytes() {
            for value in 0..=u8::MAX {
                let mut frame = whole.clone();
                frame[at] = value;
                if let Received::Payload(payload) = route.receive(&mut frame) {
                    assert!(payload.len() <= 5);
                }
            }
        }
    }
}

#[test]
fn replies_are_taken_on_our_vlan_only_whatever_their_priority() {
    let [plain, tagged, ..] = routes();
    let payload = |route: &Route, mut frame: Vec<u8>| match route.receive(&mut frame) {
        Received::Payload(payload) => Some(payload.to_vec()),
        Received::Question(_) | Received::NextHop(_) | Received::Other => None,
    };
    assert_eq!(
        payload(&tagged, replied(&tagged, b"x")),
        Some(b"x".to_vec())
    );
    assert_eq!(payload(&plain, replied(&tagged, b"x")), None);
    assert_eq!(payload(&tagged, replied(&plain, b"x")), None);
    let mut other = replied(&tagged, b"x");
    other[15] = 0x65;
    assert_eq!(payload(&tagged, other), None);
    // A tag of priority only.
    let mut priority = replied(&tagged, b"x");
    (priority[14], priority[15]) = (0xe0, 0);
    assert_eq!(payload(&plain, priority), Some(b"x".to_vec()));
}

#[test]
fn a_tag_keeps_its_priority_and_lies_behind_the_addresses() {
    let mut frame = [0xaa; 46 + 4];
    assert_eq!(routes()[1].finish(&mut frame, 4), Some(50));
    assert_eq!(frame[12..20], [0x81, 0, 0xa0, 0x64, 8, 0, 0x45, 0]);
    assert_eq!(frame[46..], [0xaa; 4]);
}

#[test]
fn an_ipv6_frame_is_what_the_standards_say() {
    let mut frame = [0xaa; 62 + 4];
    assert_eq!(routes()[2].finish(&mut frame, 4), Some(66));
    assert_eq!(frame[12..22], [0x86, 0xdd, 0x60, 0, 0, 0, 0, 12, 17, 64]);
    assert_eq!((&frame[22..38], &frame[38..54]), (&OWN6[..], &SERVER6[..]));
    assert_eq!(frame[54..60], [0x1a, 0x0a, 0x1e, 0x61, 0, 12]);
    // By hand: fd00 + 15 + fd00 + 2 + 11 + c + 1a0a + 1e61 + c + aaaa + aaaa = 387ff, folded 8802,
    // inverted.
    assert_eq!(frame[60..62], [0x77, 0xfd]);
}

#[test]
fn every_ipv6_datagram_has_a_right_checksum_that_is_not_zero() {
    let route = routes()[2];
    for bytes in (0..40).chain([1231, 1232, 8952]) {
        let mut frame = vec![0; 62 + bytes];
        for (at, byte) in frame.iter_mut().enumerate() {
            *byte = at.to_le_bytes()[0].wrapping_mul(31);
        }
        route.finish(&mut frame, bytes).unwrap();
        assert_ne!(frame[60..62], [0, 0]);
        let length = frame.len() - 54;
        let sum = sum::Sum::default()
            .add(&frame[22..54])
            .add(&u32::try_from(length).unwrap().to_be_bytes())
            .add(&[0, 0, 0, 17])
            .add(&frame[54..]);
        assert_eq!(sum.checksum(), 0, "{bytes} bytes");
    }
}

#[test]
fn each_end_asks_the_other_and_learns() {
    for route in routes() {
        let server = reverse(&route);
        let mut asked = [0; NEIGHBOUR_BYTES_MAX];
        let bytes = route.ask(&mut asked).unwrap();
        let Received::Question(asker) = server.receive(&mut asked[..bytes]) else {
            panic!("no question")
        };
        let mut answer = [0; NEIGHBOUR_BYTES_MAX];
        let bytes = server.answer(&asker, &mut answer).unwrap();
        let told = route.receive(&mut answer[..bytes]);
        assert_eq!(told, Received::NextHop(HOP));
        let mut unresolved = Route {
            next_hop: None,
            ..route
        };
        assert_eq!(unresolved.finish(&mut [0; 100], 4), None);
        unresolved.learn(HOP);
        assert_eq!(unresolved, route);
    }
}

/// A solicitation for our address with the bytes that `change` makes wrong, checksummed again.
fn solicited(change: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut frame = vec![0; 14 + ipv6::NEIGHBOUR_BYTES];
    reverse(&routes()[2]).ask(&mut frame).unwrap();
    change(&mut frame);
    (frame[56], frame[57]) = (0, 0);
    let sum = sum::Sum::default()
        .add(&frame[22..54])
        .add(&[0, 0, 0, 32, 0, 0, 0, 58])
        .add(&frame[54..]);
    frame[56..58].copy_from_slice(&sum.checksum().to_be_bytes());
    frame
}

#[test]
fn a_solicitation_is_as_the_standards_say_and_its_answer_too() {
    let mut frame = solicited(|_| ());
    assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0, 0, 0x15]);
    assert_eq!(frame[21], 255);
    assert_eq!(
        frame[38..54],
        [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 0x15]
    );
    let route = routes()[2];
    let Received::Question(asker) = route.receive(&mut frame) else {
        panic!("not taken")
    };
    let mut answer = [0; NEIGHBOUR_BYTES_MAX];
    let bytes = route.answer(&asker, &mut answer).unwrap();
    assert_eq!(bytes, 86);
    assert_eq!((&answer[..6], &answer[38..54]), (&HOP[..], &SERVER6[..]));
    assert_eq!(answer[54..56], [136, 0]);
    assert_eq!(answer[58], 0x60);
    assert_eq!(answer[62..78], OWN6);
    assert_eq!((&answer[78..80], &answer[80..86]), (&[2, 1][..], &OWN[..]));
}

#[test]
fn who_checks_whether_our_address_is_free_hears_with_everybody_that_it_is_not() {
    let route = routes()[2];
    let mut frame = solicited(|frame| frame[22..38].fill(0));
    let Received::Question(asker) = route.receive(&mut frame) else {
        panic!("not taken")
    };
    let mut answer = [0; NEIGHBOUR_BYTES_MAX];
    route.answer(&asker, &mut answer).unwrap();
    assert_eq!(answer[..6], [0x33, 0x33, 0, 0, 0, 1]);
    assert_eq!((answer[38], answer[39], answer[53]), (0xff, 2, 1));
    assert_eq!(answer[58], 0x20);
}

#[test]
fn solicitations_that_are_not_genuine_or_not_for_us_are_ignored() {
    let route = routes()[2];
    // Hop limit, code, target, group; a sender that is a group.
    for (at, value) in [(21, 64), (55, 1), (77, 0x16), (53, 0x16), (6, 3)] {
        let mut frame = solicited(|frame| frame[at] = value);
        assert_eq!(route.receive(&mut frame), Received::Other, "byte {at}");
    }
    let mut damaged = solicited(|_| ());
    damaged[80] ^= 1;
    assert_eq!(route.receive(&mut damaged), Received::Other);
    let mut unicast = solicited(|frame| {
        frame[..6].copy_from_slice(&OWN);
        frame[38..54].copy_from_slice(&OWN6);
    });
    assert!(matches!(route.receive(&mut unicast), Received::Question(_)));
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
fn questions_for_others_and_answers_of_others_are_ignored() {
    let receive = |mut frame: Vec<u8>| match route().receive(&mut frame) {
        Received::NextHop(mac) => Some(mac),
        Received::Other => None,
        other @ (Received::Payload(_) | Received::Question(_)) => panic!("{other:?}"),
    };
    assert_eq!(receive(question([10, 0, 2, 16])), None);
    assert_eq!(receive(arp(2, [10, 0, 2, 3], [10, 0, 2, 15])), None);
    assert_eq!(receive(arp(2, [10, 0, 2, 2], [10, 0, 2, 15])), Some(HOP));
    assert_eq!(receive(arp(3, [10, 0, 2, 2], [10, 0, 2, 15])), None);
    let mut of_group = arp(2, [10, 0, 2, 2], [10, 0, 2, 15]);
    of_group[22] = 3;
    assert_eq!(receive(of_group), None);
}

#[test]
fn there_is_no_way_between_families() {
    let mixed = server(Address::V6([0; 16]), Address::V4([1; 4]));
    assert_eq!(Route::new(OWN, None, &mixed), None);
}
