//! The arming message: round trip, and every illegal field by name.

use std::boxed::Box;
use std::vec::Vec;

use crate::arming::{
    Address, Arming, Command, Console, FILTER_MAX, HOST_BYTES, MESSAGE_BYTES, Refusal, SERVERS_MAX,
    STATUS_BYTES, Server, State, Status, text,
};
use crate::console::Format;
use crate::keys::SessionKeys;
use crate::units::{ArmingId, KeyId, SessionId};

pub(super) fn server(arming: u64) -> Server {
    Server {
        local: Address::V4([10, 0, 2, 15]),
        local_port: 6666,
        remote: Address::V4([10, 0, 2, 2]),
        remote_port: 6666,
        next_hop: Address::V4([10, 0, 2, 2]),
        next_hop_mac: [0x52, 0x55, 10, 0, 2, 2],
        session: SessionId {
            key: KeyId(5),
            arming: ArmingId(arming),
        },
        keys: SessionKeys {
            client: [1; 32],
            server: [2; 32],
        },
    }
}

fn arming() -> Arming {
    let mut host = [0; HOST_BYTES];
    host[..4].copy_from_slice(b"web1");
    let mut servers = [const { None }; SERVERS_MAX];
    servers[0] = Some(server(1));
    servers[1] = Some(Server {
        local: Address::V6([1; 16]),
        remote: Address::V6([2; 16]),
        next_hop: Address::V6([3; 16]),
        ..server(2)
    });
    Arming {
        ifindex: 3,
        vlan: Some(0xA064),
        datagram_bytes: 1472,
        give_up_seconds: 60,
        filter: 8,
        keep_user: true,
        boot: [8; 16],
        host,
        servers,
        console: Console {
            level: 6,
            keys: Some(server(1).keys),
            syslog: Some((Format::Rfc5424, server(9))),
            kdump_first: true,
            kdump_last: false,
        },
    }
}

fn decode_with(change: impl FnOnce(&mut Arming)) -> Result<Command, Refusal> {
    let mut arming = arming();
    change(&mut arming);
    Command::decode(&Command::Arm(arming).encode())
}

#[test]
fn round_trip() {
    let bytes = Command::Arm(arming()).encode();
    let Ok(Command::Arm(back)) = Command::decode(&bytes) else {
        panic!("refused")
    };
    assert_eq!(Command::Arm(back.clone()).encode(), bytes);
    assert_eq!(
        back.servers[1].as_ref().expect("second server").remote,
        Address::V6([2; 16])
    );
    assert!(back.servers[2].is_none());
    assert_eq!((back.filter, back.keep_user), (8, true));
    assert_eq!((back.console.level, back.console.kdump_first), (6, true));
    let last = decode_with(|arming| {
        arming.console.kdump_first = false;
        arming.console.kdump_last = true;
    });
    assert!(
        matches!(last, Ok(Command::Arm(arming)) if arming.console.kdump_last && !arming.console.kdump_first)
    );
    assert!(matches!(back.console.syslog, Some((Format::Rfc5424, _))));
    let syslog_only = decode_with(|a| a.servers = [const { None }; SERVERS_MAX]);
    assert!(syslog_only.is_ok(), "a syslog server needs no other");
    assert!(matches!(
        Command::decode(&Command::Disarm.encode()),
        Ok(Command::Disarm)
    ));
}

#[test]
fn every_wrong_length_is_refused() {
    let mut bytes: Vec<u8> = Command::Arm(arming()).encode().to_vec();
    for length in 0..MESSAGE_BYTES {
        assert_eq!(
            Command::decode(&bytes[..length]).err(),
            Some(Refusal::Length)
        );
    }
    bytes.push(0);
    assert_eq!(Command::decode(&bytes).err(), Some(Refusal::Length));
}

type Change = Box<dyn FnOnce(&mut Arming)>;

#[test]
fn illegal_fields_are_named() {
    let second = |change: fn(&mut Server)| {
        move |arming: &mut Arming| change(arming.servers[1].as_mut().expect("second server"))
    };
    let cases: [(Refusal, Change); 16] = [
        (Refusal::Vlan, Box::new(|a| a.vlan = Some(0x2000))),
        (Refusal::Vlan, Box::new(|a| a.vlan = Some(0x0fff))),
        (Refusal::Vlan, Box::new(|a| a.vlan = Some(0x1064))),
        (Refusal::Device, Box::new(|a| a.ifindex = 0)),
        (Refusal::DatagramBytes, Box::new(|a| a.datagram_bytes = 507)),
        (
            Refusal::DatagramBytes,
            Box::new(|a| a.datagram_bytes = 9000),
        ),
        (Refusal::GiveUpSeconds, Box::new(|a| a.give_up_seconds = 0)),
        (
            Refusal::GiveUpSeconds,
            Box::new(|a| a.give_up_seconds = 3601),
        ),
        (
            Refusal::Servers,
            Box::new(|a| {
                a.servers = [const { None }; SERVERS_MAX];
                a.console = Console::NONE;
            }),
        ),
        (Refusal::Console, Box::new(|a| a.console.level = 8)),
        (Refusal::Filter, Box::new(|a| a.filter = FILTER_MAX + 1)),
        (Refusal::Host, Box::new(|a| a.host = [0; HOST_BYTES])),
        (Refusal::Host, Box::new(|a| a.host[20] = b'x')),
        (Refusal::Port, Box::new(second(|s| s.remote_port = 0))),
        (
            Refusal::NextHop,
            Box::new(second(|s| s.next_hop_mac = [0xFF; 6])),
        ),
        (
            Refusal::SessionTwice,
            Box::new(second(|s| s.session.arming = ArmingId(1))),
        ),
    ];
    for (refusal, change) in cases {
        assert_eq!(decode_with(change).err(), Some(refusal));
    }
}

#[test]
fn illegal_envelopes_are_named() {
    let with = |at: usize, byte: u8| {
        let mut bytes = Command::Disarm.encode();
        bytes[at] = byte;
        Command::decode(&bytes).err()
    };
    assert_eq!(with(0, b'n'), Some(Refusal::Magic));
    assert_eq!(with(4, 9), Some(Refusal::Version));
    assert_eq!(with(6, 9), Some(Refusal::Command));
}

#[test]
fn no_message_panics() {
    let mut random = super::Random(4);
    let good = Command::Arm(arming()).encode();
    for _ in 0..20_000 {
        let mut bytes = good;
        for _ in 0..1 + random.below(4) {
            bytes[random.below(MESSAGE_BYTES as u64) as usize] = random.next().to_le_bytes()[0];
        }
        let Ok(Command::Arm(arming)) = Command::decode(&bytes) else {
            continue;
        };
        assert!(arming.servers.iter().flatten().count() >= 1);
    }
}

#[test]
fn status_is_read_back() {
    let idle = Status::idle();
    let bytes = zerocopy::IntoBytes::as_bytes(&idle);
    assert_eq!(bytes.len(), STATUS_BYTES);
    assert_eq!(
        Status::decode(bytes).expect("decodes").state(),
        Some(State::Idle)
    );
    assert_eq!(Status::decode(&bytes[1..]).err(), Some(Refusal::Length));
}

#[test]
fn padded_text() {
    assert_eq!(text(b"ab\0\0"), Some("ab"));
    assert_eq!(text(b"ab"), Some("ab"));
    assert_eq!(text(b"a\0b"), None);
    assert_eq!(text(&[0xFF, 0]), None);
    assert_eq!(text(b""), Some(""));
}
