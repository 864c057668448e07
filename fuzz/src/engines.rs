//! The engines, each with a peer that holds the right keys and sends what it wants.

use std::collections::BTreeMap;

use proto::arming::{Address, Server};
use proto::client::{Client, Input, PageStatus, Pool, Start, Step, Want};
use proto::keys::{Secret, SessionKeys};
use proto::record::{BLOCK_PAGES, Hello, RamRange};
use proto::reply::{REPLY_BYTES_MAX, WINDOW_PACKETS_MAX};
use proto::server::{Hold, Session};
use proto::time::{Instant, Micros};
use proto::units::{ArmingId, KeyId, PacketNumber, SessionId};
use proto::wire::{
    DATAGRAM_BYTES_MIN, HEADER_BYTES, Header, INCARNATION_BYTES, Kind, seal_client, seal_server,
};
use zerocopy::{FromZeros, IntoBytes};

use crate::{byte, number};

const ID: SessionId = SessionId {
    key: KeyId(1),
    arming: ArmingId(2),
};
/// Steps between two replies that a client may want before something arrives or time passes.
const STEPS_MAX: usize = 100_000;

fn keys() -> SessionKeys {
    Secret([3; 32]).session_keys(ID)
}

/// Transmit buffers that are always free.
struct Buffers(Vec<Vec<u8>>);

impl Pool for Buffers {
    fn buffer(&mut self, slot: u16) -> Option<&mut [u8]> {
        self.0.get_mut(usize::from(slot)).map(Vec::as_mut_slice)
    }
}

/// The client engine against replies of any contents, genuinely sealed.
pub(crate) fn client(mut bytes: &[u8]) {
    let server = Server {
        local: Address::V4([10, 0, 0, 1]),
        local_port: 6666,
        remote: Address::V4([10, 0, 0, 2]),
        remote_port: 6666,
        next_hop: Address::V4([10, 0, 0, 2]),
        next_hop_mac: [2, 0, 0, 0, 0, 2],
        session: ID,
        keys: keys(),
    };
    let start = Start {
        server: &server,
        datagram_bytes: DATAGRAM_BYTES_MIN,
        pool_slots: 1 << (byte(&mut bytes) % 6),
        give_up: Micros::from_secs(60),
        first: PacketNumber(number(&mut bytes)),
        attempt: u16::from(byte(&mut bytes) & 1),
    };
    let mut client = Box::new(Client::new());
    let mut now_us = 0;
    client.start(Instant::from_micros(now_us), &start, &Hello::new_zeroed());
    let mut pool = Buffers(vec![
        vec![0; DATAGRAM_BYTES_MIN];
        usize::from(start.pool_slots)
    ]);
    let mut replies = 0;
    while !bytes.is_empty() {
        if !run(&mut client, &mut pool, now_us) {
            return;
        }
        now_us += u64::from(byte(&mut bytes)) * 5000;
        let length = usize::from(byte(&mut bytes)).min(bytes.len());
        let (payload, rest) = bytes.split_at(length);
        bytes = rest;
        let header = Header {
            kind: Kind::Reply,
            attempt: start.attempt,
            session: ID,
            number: PacketNumber(replies),
        };
        replies += 1;
        let mut datagram = [0; REPLY_BYTES_MAX];
        datagram[HEADER_BYTES + INCARNATION_BYTES..][..length].copy_from_slice(payload);
        let incarnation = [now_us.to_le_bytes()[2] & 3; INCARNATION_BYTES];
        let length = seal_server(&keys().server, &header, &incarnation, &mut datagram, length);
        let length = length.expect("the reply fits");
        let now = Instant::from_micros(now_us);
        let _ = client.handle(now, Input::Datagram(&mut datagram[..length]));
    }
}

/// Runs a client until it waits; `false` when it is finished.
fn run(client: &mut Client, pool: &mut Buffers, now_us: u64) -> bool {
    let now = Instant::from_micros(now_us);
    for _ in 0..STEPS_MAX {
        match client.poll(now, pool) {
            Step::Send { .. } => {}
            Step::WaitUntil(at) => {
                assert!(at > now, "the client wants to wait for the past");
                return true;
            }
            Step::Finished(_) => return false,
            Step::Read(Want::Pages { count, .. }) => {
                let statuses = [PageStatus::Read; BLOCK_PAGES];
                let _ = client.handle(now, Input::Pages(&statuses[..usize::from(count)]));
            }
            Step::Read(Want::MemoryMap) => {
                let map = [RamRange {
                    first: 1.into(),
                    pages: 40.into(),
                }];
                client.scratch()[..16].copy_from_slice(map.as_bytes());
                let _ = client.handle(now, Input::Filled(16));
            }
            Step::Read(_) => {
                let _ = client.handle(now, Input::Filled(0));
            }
        }
    }
    panic!("the client never waits");
}

/// Packets that wait for their turn.
#[derive(Default)]
struct Waiting(BTreeMap<PacketNumber, Vec<u8>>);

impl Hold for Waiting {
    fn keep(&mut self, number: PacketNumber, bytes: &[u8]) -> bool {
        self.0.insert(number, bytes.to_vec());
        true
    }

    fn release<R>(&mut self, number: PacketNumber, with: impl FnOnce(&[u8]) -> R) -> Option<R> {
        self.0.remove(&number).map(|bytes| with(&bytes))
    }
}

/// The server engine against packets of any number and contents, genuinely sealed.
pub(crate) fn server(mut bytes: &[u8]) {
    let first = PacketNumber(number(&mut bytes));
    let mut session = Session::new(ID, keys(), [5; INCARNATION_BYTES], 0, first, first);
    let mut waiting = Waiting::default();
    let mut now_us = 0;
    while !bytes.is_empty() {
        now_us += u64::from(byte(&mut bytes)) * 100;
        let now = Instant::from_micros(now_us);
        let ahead = match byte(&mut bytes) {
            255 => number(&mut bytes),
            near => u64::from(near) * u64::from(byte(&mut bytes)),
        };
        let packet = PacketNumber(first.0.wrapping_add(ahead));
        let header = Header {
            kind: if packet == first {
                Kind::First
            } else {
                Kind::Data
            },
            attempt: 0,
            session: ID,
            number: packet,
        };
        let mut datagram = [0; 64];
        let length = seal_client(&keys().client, &header, &mut datagram, 16);
        let length = length.expect("the packet fits");
        let before = session.next();
        let mut delivered = 0;
        let _ = session.handle(now, &mut datagram[..length], &mut waiting, &mut |stream| {
            delivered += u64::try_from(stream.len() / 16).unwrap_or(0);
        });
        assert_eq!(session.next().since(before), delivered);
        assert!(waiting.0.len() <= WINDOW_PACKETS_MAX);
        if session.reply_at().is_some_and(|at| at <= now) {
            let mut out = [0; REPLY_BYTES_MAX];
            assert!(session.reply(now, &mut out).is_some());
        }
    }
}
