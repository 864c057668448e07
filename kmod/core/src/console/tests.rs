//! Tests of the last words: what goes out, where to, and when they end.

use std::vec;
use std::vec::Vec;

use proto::arming::{Address, Console as Wanted, HOST_BYTES, SERVERS_MAX, Server};
use proto::console::{Caller, Format, Log, RecordHead, RingRead};
use proto::keys::SessionKeys;
use proto::units::{ArmingId, KeyId, SessionId};
use proto::wire::{Header, open_client};

use super::*;

const SLOTS: u16 = 8;
const OWN: Mac = [2, 0, 0, 0, 0, 1];
/// Ethernet, IPv4 and UDP.
const HEADER_BYTES: usize = 42;

struct Buffers(Vec<Vec<u8>>);

impl Frames for Buffers {
    fn frame(&mut self, slot: u16) -> Option<&mut [u8]> {
        self.0.get_mut(usize::from(slot)).map(Vec::as_mut_slice)
    }
}

/// So many records.
struct Printed(u64);

impl Ring for Printed {
    fn oldest(&mut self) -> u64 {
        0
    }

    fn read(&mut self, sequence: u64, room: &mut [u8]) -> RingRead {
        if sequence >= self.0 {
            return RingRead::NotYet;
        }
        for (to, from) in room.iter_mut().zip(b"last") {
            *to = *from;
        }
        RingRead::Record {
            head: RecordHead {
                time_us: 5_000_000,
                level: 1,
                facility: 0,
                caller: Caller::Cpu(0),
                continued: false,
                cut: false,
            },
            text: 4,
            dictionary: 0,
        }
    }
}

fn way(last: u8, port: u16) -> Server {
    Server {
        local: Address::V4([10, 0, 2, 15]),
        local_port: 6666,
        remote: Address::V4([10, 0, 2, last]),
        remote_port: port,
        next_hop: Address::V4([10, 0, 2, last]),
        next_hop_mac: [2, 0, 0, 0, 0, last],
        session: SessionId {
            key: KeyId(7),
            arming: ArmingId(8),
        },
        keys: keys(1),
    }
}

fn keys(byte: u8) -> SessionKeys {
    SessionKeys {
        client: [byte; 32],
        server: [byte; 32],
    }
}

fn arming() -> Arming {
    let mut host = [0; HOST_BYTES];
    host[..4].copy_from_slice(b"web1");
    let mut servers = [const { None }; SERVERS_MAX];
    servers[0] = Some(way(2, 6666));
    Arming {
        ifindex: 2,
        vlan: None,
        datagram_bytes: 1472,
        give_up_seconds: 60,
        filter: 0,
        keep_user: false,
        boot: [9; 16],
        host,
        servers,
        console: Wanted {
            level: 7,
            keys: Some(keys(3)),
            syslog: Some((Format::Rfc3164, way(3, 514))),
            kdump_first: false,
            kdump_last: false,
        },
    }
}

const DYING: Dying = Dying {
    mac: OWN,
    pool_slots: SLOTS,
    acked: 2,
    syslog_next: 4,
};

/// All frames until nothing is sent for so long, and whether it ended.
fn said(words: &mut LastWords, printed: u64) -> (Vec<Vec<u8>>, bool) {
    let mut buffers = Buffers(vec![vec![0; 1514]; usize::from(SLOTS) + 1]);
    let mut ring = Printed(printed);
    let mut sent = Vec::new();
    loop {
        let now = Instant::from_micros(1000);
        match words.step(now, Clock::default(), &mut ring, &mut buffers) {
            Next::Send { slot, bytes, .. } => {
                sent.push(buffers.0[usize::from(slot)][..bytes].to_vec());
            }
            Next::Finished(_) => return (sent, true),
            Next::Wait(_) | Next::Read { .. } => return (sent, false),
        }
    }
}

fn sequences(frame: &[u8]) -> (u64, u64) {
    let mut datagram = frame[HEADER_BYTES..].to_vec();
    let header = Header::parse(&datagram).expect("ours");
    let payload = open_client(&keys(3).client, &header, &mut datagram).expect("sealed with 3");
    let log = Log::decode(payload).expect("legal");
    assert!(log.head.crash);
    (log.head.covers.first, log.head.covers.end)
}

#[test]
fn both_ways_get_what_they_lack() {
    let mut words = LastWords::new();
    words.start(Instant::from_micros(0), &arming(), &DYING, false);
    let (sent, over) = said(&mut words, 6);
    assert!(!over, "a reply would end it");
    let (syslog, sealed): (Vec<_>, Vec<_>) = sent
        .iter()
        .partition(|frame| frame[36..38] == 514_u16.to_be_bytes());
    assert_eq!(syslog.len(), 2, "records 4 and 5");
    assert!(syslog.iter().all(|frame| frame.ends_with(b"] last")));
    assert_eq!(sealed.len(), 1);
    assert_eq!(sequences(sealed[0]), (2, 6));
}

#[test]
fn without_a_dump_the_server_is_waited_for_longer() {
    let mut words = LastWords::new();
    words.start(Instant::from_micros(0), &arming(), &DYING, true);
    let (sent, over) = said(&mut words, 6);
    assert_eq!((sent.len(), over), (3, false));
    let mut buffers = Buffers(vec![vec![0; 1514]; usize::from(SLOTS) + 1]);
    let later = Instant::from_micros(LAST_WORDS_WAIT_BEFORE_DUMP.get());
    let next = words.step(later, Clock::default(), &mut Printed(6), &mut buffers);
    assert!(!matches!(next, Next::Finished(_)), "{next:?}");
    let late = Instant::from_micros(LAST_WORDS_WAIT.get());
    let next = words.step(late, Clock::default(), &mut Printed(6), &mut buffers);
    assert!(matches!(next, Next::Finished(_)), "but not for ever");
}

#[test]
fn who_is_armed_without_a_console_says_nothing() {
    let mut words = LastWords::new();
    let arming = Arming {
        console: Wanted::NONE,
        ..arming()
    };
    words.start(Instant::from_micros(0), &arming, &DYING, true);
    let (sent, over) = said(&mut words, 6);
    assert_eq!((sent.len(), over), (0, true));
}
