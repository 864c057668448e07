//! The datagram: sealing, opening, and everything that must be refused.

use std::vec;
use std::vec::Vec;

use chacha20poly1305::aead::Aead;
use chacha20poly1305::aead::Payload;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit, XChaCha20Poly1305};

use super::Random;
use crate::keys::Secret;
use crate::units::{ArmingId, KeyId, PacketNumber, SessionId};
use crate::wire::{
    CLIENT_OVERHEAD, DATAGRAM_BYTES_MAX, HEADER_BYTES, Header, INCARNATION_BYTES, Kind, MAGIC,
    Reject, SERVER_OVERHEAD, open_client, open_server, seal_client, seal_server,
};

const KEY: [u8; 32] = [7; 32];
const INCARNATION: [u8; 16] = [9; 16];

fn header(kind: Kind) -> Header {
    let session = SessionId {
        key: KeyId(0x0102_0304_0506_0708),
        arming: ArmingId(0x1112_1314_1516_1718),
    };
    Header {
        kind,
        attempt: 0x2122,
        session,
        number: PacketNumber(0x3132_3334_3536_3738),
    }
}

fn client_packet(payload: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0xAA; payload.len() + CLIENT_OVERHEAD];
    buffer[HEADER_BYTES..][..payload.len()].copy_from_slice(payload);
    let sealed = seal_client(&KEY, &header(Kind::Data), &mut buffer, payload.len());
    assert_eq!(sealed, Some(buffer.len()));
    buffer
}

fn server_packet(payload: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0xAA; payload.len() + SERVER_OVERHEAD];
    buffer[HEADER_BYTES + INCARNATION_BYTES..][..payload.len()].copy_from_slice(payload);
    let sealed = seal_server(
        &KEY,
        &header(Kind::Reply),
        &INCARNATION,
        &mut buffer,
        payload.len(),
    );
    assert_eq!(sealed, Some(buffer.len()));
    buffer
}

#[test]
fn clear_header_is_these_bytes() {
    let packet = client_packet(b"");
    let golden = [
        0xFE, b'N', b'D', 1, 2, 0, 0x22, 0x21, 8, 7, 6, 5, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15,
        0x14, 0x13, 0x12, 0x11, 0x38, 0x37, 0x36, 0x35, 0x34, 0x33, 0x32, 0x31,
    ];
    assert_eq!(packet[..HEADER_BYTES], golden);
    assert_eq!(packet[..4], MAGIC);
}

#[test]
fn client_packets_are_rfc_8439() {
    let payload: Vec<u8> = (0..=200).collect();
    let packet = client_packet(&payload);
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&0x3132_3334_3536_3738_u64.to_le_bytes());
    let reference = ChaCha20Poly1305::new(&KEY.into())
        .encrypt(
            &nonce.into(),
            Payload {
                msg: &payload,
                aad: &packet[..HEADER_BYTES],
            },
        )
        .expect("the reference seals");
    assert_eq!(packet[HEADER_BYTES..], reference);
}

#[test]
fn replies_are_xchacha20_poly1305() {
    let packet = server_packet(b"a reply");
    let mut nonce = [9; 24];
    nonce[16..].copy_from_slice(&0x3132_3334_3536_3738_u64.to_le_bytes());
    let clear = HEADER_BYTES + INCARNATION_BYTES;
    let reference = XChaCha20Poly1305::new(&KEY.into())
        .encrypt(
            &nonce.into(),
            Payload {
                msg: b"a reply",
                aad: &packet[..clear],
            },
        )
        .expect("the reference seals");
    assert_eq!(packet[clear..], reference);
}

#[test]
fn what_is_sealed_opens() {
    for length in [0, 1, 15, 16, 17, 63, 64, 65, 1424, 8924] {
        let mut payload = vec![0; length];
        Random(length as u64 + 1).fill(&mut payload);
        let mut packet = client_packet(&payload);
        let parsed = Header::parse(&packet).expect("parses");
        assert_eq!(parsed, header(Kind::Data));
        assert_eq!(
            open_client(&KEY, &parsed, &mut packet).expect("opens"),
            payload
        );
    }
    let mut reply = server_packet(b"reply");
    let parsed = Header::parse(&reply).expect("parses");
    let (incarnation, payload) = open_server(&KEY, &parsed, &mut reply).expect("opens");
    assert_eq!((incarnation, &*payload), (INCARNATION, &b"reply"[..]));
}

#[test]
fn any_flipped_bit_breaks_the_seal() {
    let whole = client_packet(b"some bytes of a stream");
    for bit in 0..whole.len() * 8 {
        let mut packet = whole.clone();
        packet[bit / 8] ^= 1 << (bit % 8);
        let opened =
            Header::parse(&packet).and_then(|h| open_client(&KEY, &h, &mut packet).map(drop));
        assert!(opened.is_err(), "bit {bit} was not noticed");
    }
    let whole = server_packet(b"a reply");
    for bit in 0..whole.len() * 8 {
        let mut packet = whole.clone();
        packet[bit / 8] ^= 1 << (bit % 8);
        let opened =
            Header::parse(&packet).and_then(|h| open_server(&KEY, &h, &mut packet).map(drop));
        assert!(opened.is_err(), "bit {bit} was not noticed");
    }
}

#[test]
fn every_prefix_is_refused() {
    for whole in [client_packet(b"some bytes"), server_packet(b"a reply")] {
        for length in 0..whole.len() {
            let mut packet = whole[..length].to_vec();
            let Ok(header) = Header::parse(&packet) else {
                continue;
            };
            let opened = if header.kind.is_from_server() {
                open_server(&KEY, &header, &mut packet).map(drop)
            } else {
                open_client(&KEY, &header, &mut packet).map(drop)
            };
            assert!(
                opened.is_err(),
                "{length} bytes of {} were taken",
                whole.len()
            );
        }
    }
}

#[test]
fn a_refused_packet_is_left_as_it_was() {
    let mut packet = client_packet(b"some bytes");
    packet[HEADER_BYTES] ^= 1;
    let before = packet.clone();
    let header = Header::parse(&packet).expect("parses");
    assert_eq!(
        open_client(&KEY, &header, &mut packet),
        Err(Reject::BadSeal)
    );
    assert_eq!(packet, before);
}

#[test]
fn refusals_name_their_cause() {
    let packet = client_packet(b"");
    let with = |at: usize, byte: u8| {
        let mut packet = packet.clone();
        packet[at] = byte;
        Header::parse(&packet).expect_err("refused")
    };
    assert_eq!(with(0, b'1'), Reject::NotOurs);
    assert_eq!(with(3, 2), Reject::OtherVersion(2));
    assert_eq!(with(4, 0), Reject::UnknownKind(0));
    assert_eq!(with(4, 9), Reject::UnknownKind(9));
    assert_eq!(with(5, 1), Reject::UnknownFlags(1));
    assert_eq!(Header::parse(&packet[..40]), Err(Reject::Truncated(40)));
    assert_eq!(Header::parse(&[]), Err(Reject::Truncated(0)));
    let mut long = packet.clone();
    long.resize(DATAGRAM_BYTES_MAX + 1, 0);
    assert_eq!(
        Header::parse(&long),
        Err(Reject::TooLong(DATAGRAM_BYTES_MAX + 1))
    );
    let (client, reply) = (header(Kind::Data), header(Kind::Reply));
    let mut packet = packet.clone();
    assert_eq!(
        open_server(&KEY, &client, &mut packet),
        Err(Reject::WrongDirection(Kind::Data))
    );
    assert_eq!(
        open_client(&KEY, &reply, &mut packet),
        Err(Reject::WrongDirection(Kind::Reply))
    );
}

#[test]
fn buffers_that_are_too_small_are_told() {
    let mut buffer = [0; CLIENT_OVERHEAD + 9];
    assert_eq!(
        seal_client(&KEY, &header(Kind::Data), &mut buffer, 10),
        None
    );
    let mut buffer = [0; SERVER_OVERHEAD + 9];
    assert_eq!(
        seal_server(&KEY, &header(Kind::Reply), &INCARNATION, &mut buffer, 10),
        None
    );
}

#[test]
fn keys_differ_by_direction_session_and_secret() {
    let secret = Secret([1; 32]);
    let id = SessionId {
        key: KeyId(1),
        arming: ArmingId(2),
    };
    let keys = secret.session_keys(id);
    assert_ne!(keys.client, keys.server);
    let other_arming = SessionId {
        arming: ArmingId(3),
        ..id
    };
    assert_ne!(secret.session_keys(other_arming).client, keys.client);
    let other_key = SessionId {
        key: KeyId(2),
        ..id
    };
    assert_ne!(secret.session_keys(other_key).client, keys.client);
    assert_ne!(Secret([2; 32]).session_keys(id).client, keys.client);
    // Golden, computed with another HKDF: both sides of an upgrade must derive the same.
    let hex: std::string::String = keys.client[..8]
        .iter()
        .map(|b| std::format!("{b:02x}"))
        .collect();
    assert_eq!(hex, "3488987dbdcfbbc0");
}
