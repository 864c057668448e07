//! Tests of the driver with a shim that keeps its frames in vectors.

use std::vec;
use std::vec::Vec;

use proto::arming::{Console, SERVERS_MAX, Server, Status};
use proto::client::{Pass, Then};
use proto::keys::SessionKeys;
use proto::units::{ArmingId, KeyId, Pfn, SessionId};
use proto::wire::Header;

use super::*;

/// Bytes before a payload to an IPv4 server without a VLAN.
const HEADER_BYTES: usize = HEADER_BYTES_MIN;
/// Bytes of an ARP frame.
const ARP_BYTES: usize = 42;
const SLOTS: u16 = 32;
const DATAGRAM_BYTES: u16 = 1472;
const OWN: Mac = [2, 0, 0, 0, 0, 1];
const GIVE_UP_SECONDS: u32 = 60;
/// Filter level that the host demands.
const DEMANDED: u8 = 8;

/// Buffers that the device gives back at once, unless it is told to keep them.
struct FakeFrames {
    buffers: Vec<Vec<u8>>,
    kept: bool,
}

impl FakeFrames {
    fn new() -> Self {
        let bytes = usize::from(DATAGRAM_BYTES) + HEADER_BYTES;
        Self {
            buffers: vec![vec![0; bytes]; usize::from(SLOTS) + 1],
            kept: false,
        }
    }
}

impl Frames for FakeFrames {
    fn frame(&mut self, slot: u16) -> Option<&mut [u8]> {
        let buffer = self.buffers.get_mut(usize::from(slot))?;
        (!self.kept).then_some(buffer.as_mut_slice())
    }
}

fn server(last: u8) -> Server {
    Server {
        local: Address::V4([10, 0, 2, 15]),
        local_port: 6666,
        remote: Address::V4([10, 0, 2, last]),
        remote_port: 6666,
        next_hop: Address::V4([10, 0, 2, last]),
        next_hop_mac: [2, 0, 0, 0, 0, last],
        session: SessionId {
            key: KeyId(7),
            arming: ArmingId(u64::from(last)),
        },
        keys: SessionKeys {
            client: [last; 32],
            server: [last; 32],
        },
    }
}

fn message(servers: &[Server]) -> Vec<u8> {
    let mut host = [0; HOST_BYTES];
    host[..4].copy_from_slice(b"host");
    let mut arming = Arming {
        ifindex: 2,
        vlan: None,
        datagram_bytes: DATAGRAM_BYTES,
        give_up_seconds: GIVE_UP_SECONDS,
        filter: DEMANDED,
        keep_user: true,
        boot: [9; 16],
        host,
        servers: [const { None }; SERVERS_MAX],
        console: Console::NONE,
    };
    for (place, server) in arming.servers.iter_mut().zip(servers) {
        *place = Some(server.clone());
    }
    Command::Arm(arming).encode().to_vec()
}

fn crash() -> Crash {
    Crash {
        hello: blank_hello(),
        pool_slots: SLOTS,
        mac: OWN,
    }
}

fn crashed(servers: &[Server]) -> Driver {
    let mut driver = Driver::new();
    assert!(driver.command(&message(servers)).is_ok());
    driver.accept();
    driver.start(Instant::from_micros(0), &crash());
    driver
}

/// Answers what the driver asks for with nothing until it sends or waits.
fn next(driver: &mut Driver, now: Instant, frames: &mut FakeFrames) -> Next {
    for _ in 0..100 {
        match driver.step(now, frames) {
            Next::Read { .. } => driver.filled(now, 0),
            next @ (Next::Send { .. } | Next::Wait(_) | Next::Finished(_)) => return next,
        }
    }
    panic!("the driver asks for ever");
}

/// The same server over IPv6.
fn server6(last: u8) -> Server {
    Server {
        local: Address::V6([1; 16]),
        remote: Address::V6([last; 16]),
        next_hop: Address::V6([last; 16]),
        ..server(last)
    }
}

fn answer(mac: Mac) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1];
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend(mac);
    frame.extend([10, 0, 2, 2, 2, 0, 0, 0, 0, 1, 10, 0, 2, 15]);
    frame
}

/// Runs `driver` until `until`; returns the frames it sends, with the time of each.
fn sent(driver: &mut Driver, from: Instant, until: Instant) -> Vec<(Instant, Vec<u8>)> {
    let (mut frames, mut now, mut sent) = (FakeFrames::new(), from, Vec::new());
    while now < until {
        match next(driver, now, &mut frames) {
            Next::Send { slot, bytes, .. } => {
                sent.push((now, frames.buffers[usize::from(slot)][..bytes].to_vec()));
            }
            Next::Wait(at) => now = at.max(now + Micros::new(100)),
            other @ (Next::Read { .. } | Next::Finished(_)) => panic!("{other:?}"),
        }
    }
    sent
}

fn is_arp(frame: &[u8]) -> bool {
    frame[12..14] == [8, 6]
}

fn question() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend([
        2, 0, 0, 0, 0, 2, 10, 0, 2, 2, 0, 0, 0, 0, 0, 0, 10, 0, 2, 15,
    ]);
    frame
}

#[test]
fn a_driver_that_was_not_started_is_finished() {
    let mut driver = Driver::new();
    let next = driver.step(Instant::from_micros(0), &mut FakeFrames::new());
    assert_eq!(next, Next::Finished(Action::None));
}

#[test]
fn a_refused_message_costs_nothing() {
    let mut driver = Driver::new();
    driver.command(&message(&[server(2)])).unwrap();
    driver.accept();
    driver.command(&message(&[server(9)])).unwrap();
    assert!(driver.command(b"garbage").is_err());
    let mut status = Status::idle();
    driver.status(&mut status);
    assert_eq!(status.server_address(), Some(Address::V4([10, 0, 2, 2])));
    assert_eq!(driver.command(&Command::Disarm.encode()), Ok(None));
    let mut status = Status::idle();
    driver.status(&mut status);
    assert_eq!(status.server_address(), None);
}

#[test]
fn the_first_frame_goes_to_the_first_server_and_is_a_sessions_first() {
    let mut driver = crashed(&[server(2), server(3)]);
    let mut frames = FakeFrames::new();
    let Next::Send { slot, bytes, .. } = next(&mut driver, Instant::from_micros(1), &mut frames)
    else {
        panic!("nothing is sent")
    };
    let frame = &frames.buffers[usize::from(slot)][..bytes];
    assert_eq!(frame[..6], [2, 0, 0, 0, 0, 2]);
    assert_eq!(frame[30..34], [10, 0, 2, 2]);
    let header = Header::parse(&frame[HEADER_BYTES..]).unwrap();
    assert_eq!(header.session, server(2).session);
    assert_eq!((header.kind, header.attempt), (proto::wire::Kind::First, 0));
}

#[test]
fn a_question_is_answered_from_the_spare_buffer_when_it_is_free() {
    let mut driver = crashed(&[server(2)]);
    let mut frames = FakeFrames::new();
    let now = Instant::from_micros(1);
    driver.received(now, &mut question());
    frames.kept = true;
    assert!(matches!(
        driver.step(now, &mut frames),
        Next::Wait(_) | Next::Read { .. }
    ));
    frames.kept = false;
    let expected = Next::Send {
        slot: SLOTS,
        bytes: ARP_BYTES,
        more: false,
    };
    assert_eq!(driver.step(now, &mut frames), expected);
    assert_ne!(
        driver.step(now, &mut frames),
        expected,
        "it is answered once"
    );
}

#[test]
fn the_shim_is_told_the_longest_frame_of_all_servers() {
    let mut driver = Driver::new();
    let expected = |frame_bytes, packet_bytes| Needs {
        ifindex: 2,
        frame_bytes,
        packet_bytes,
        keep_user: true,
        dumps: true,
        kdump_first: false,
        kdump_last: false,
    };
    let v4 = driver.command(&message(&[server(2)]));
    assert_eq!(v4, Ok(Some(expected(1514, 1500))));
    let both = driver.command(&message(&[server(2), server6(3)]));
    assert_eq!(both, Ok(Some(expected(1534, 1520))));
}

#[test]
fn a_silent_next_hop_is_asked_and_followed_to_its_new_address() {
    let mut driver = crashed(&[server(2)]);
    let second = Instant::from_micros(1_000_000);
    let unasked = [2, 0, 0, 0, 0, 8];
    driver.received(Instant::from_micros(1), &mut answer(unasked));
    let before = sent(&mut driver, Instant::from_micros(1), second);
    assert!(!before.is_empty());
    for (_, frame) in &before {
        assert!(!is_arp(frame), "it is asked too early");
        assert_eq!(
            frame[..6],
            [2, 0, 0, 0, 0, 2],
            "who was not asked is believed"
        );
    }
    let later = second + Micros::from_millis(2500);
    let after = sent(&mut driver, second, later);
    let asked: Vec<u64> = after
        .iter()
        .filter(|(_, frame)| is_arp(frame))
        .map(|(at, _)| at.as_micros() / 1_000_000)
        .collect();
    assert_eq!(asked, [1, 2, 3]);
    driver.received(later, &mut answer([2, 0, 0, 0, 0, 9]));
    let moved = sent(&mut driver, later, later + Micros::from_secs(3));
    let mut datagrams = moved.iter().filter(|(_, frame)| !is_arp(frame)).peekable();
    assert!(datagrams.peek().is_some());
    assert!(datagrams.all(|(_, frame)| frame[..6] == [2, 0, 0, 0, 0, 9]));
}

#[test]
fn a_server_that_did_not_answer_when_armed_is_asked_first() {
    let mut unknown = server(2);
    unknown.next_hop_mac = [0; 6];
    let mut driver = crashed(&[unknown, server(3)]);
    let start = Instant::from_micros(0);
    let later = start + Micros::from_millis(2500);
    let before = sent(&mut driver, start, later);
    assert!(before.iter().all(|(_, frame)| is_arp(frame)));
    assert_eq!(before.len(), 3);
    driver.received(later, &mut answer([2, 0, 0, 0, 0, 9]));
    let after = sent(&mut driver, later, later + Micros::from_millis(10));
    assert_eq!(after[0].1[..6], [2, 0, 0, 0, 0, 9]);
}

#[test]
fn a_server_that_never_answers_makes_room_for_the_next() {
    let mut unknown = server(2);
    unknown.next_hop_mac = [0; 6];
    let mut driver = crashed(&[unknown, server(3)]);
    let start = Instant::from_micros(0);
    let sent = sent(&mut driver, start, start + Micros::from_secs(11));
    let (at, frame) = sent.iter().find(|(_, frame)| !is_arp(frame)).unwrap();
    assert_eq!(at.as_micros() / 1_000_000, 10);
    assert_eq!(frame[..6], [2, 0, 0, 0, 0, 3]);
    let header = Header::parse(&frame[HEADER_BYTES..]).unwrap();
    assert_eq!(header.session, server(3).session);
}

#[test]
fn a_server_can_send_the_crash_to_another_by_its_index() {
    let mut driver = crashed(&[server(2), server6(3)]);
    let start = Instant::from_micros(1);
    let millisecond = start + Micros::from_millis(1);
    let first = sent(&mut driver, start, millisecond);
    let last = Header::parse(&first.last().unwrap().1[HEADER_BYTES..]).unwrap();
    let to = |server| Outcome {
        action: Action::None,
        complete: false,
        then: Then::Redirect(server),
    };
    assert!(driver.try_next(millisecond, &to(1)));
    let (_, frame) = sent(&mut driver, millisecond, millisecond + Micros::new(50))[0].clone();
    assert_eq!(frame[12..14], [0x86, 0xdd]);
    let header = Header::parse(&frame[62..]).unwrap();
    assert_eq!((header.session, header.attempt), (server6(3).session, 0));
    assert!(driver.try_next(millisecond, &to(0)));
    let (_, frame) = sent(&mut driver, millisecond, millisecond + Micros::new(50))[0].clone();
    let header = Header::parse(&frame[HEADER_BYTES..]).unwrap();
    assert_eq!((header.session, header.attempt), (server(2).session, 1));
    assert!(header.number > last.number, "a packet number is used twice");
}

#[test]
fn a_device_that_keeps_all_buffers_is_polled_now_and_then_and_not_asked_to_hurry() {
    let mut driver = crashed(&[server(2)]);
    let mut frames = FakeFrames::new();
    frames.kept = true;
    let mut now = Instant::from_micros(0);
    let mut steps = 0;
    while now < Instant::from_micros(10_000) {
        let Next::Wait(until) = next(&mut driver, now, &mut frames) else {
            panic!("a buffer is used that the device has")
        };
        now = until;
        steps += 1;
    }
    assert!((10..=100).contains(&steps), "{steps} steps in 10 ms");
    frames.kept = false;
    assert!(matches!(
        next(&mut driver, now, &mut frames),
        Next::Send { .. }
    ));
}

#[test]
fn silent_servers_are_tried_in_turn_without_a_nonce_used_twice_until_it_is_enough() {
    let mut driver = crashed(&[server(2), server(3)]);
    let mut frames = FakeFrames::new();
    let mut firsts: Vec<(SessionId, u16, u64)> = Vec::new();
    let mut now = Instant::from_micros(0);
    let end = loop {
        match next(&mut driver, now, &mut frames) {
            Next::Send { slot, bytes, .. } => {
                let frame = &frames.buffers[usize::from(slot)][..bytes];
                if is_arp(frame) {
                    continue;
                }
                let header = Header::parse(&frame[HEADER_BYTES..]).unwrap();
                let seen = (header.session, header.attempt, header.number.0);
                if header.kind == proto::wire::Kind::First && firsts.last() != Some(&seen) {
                    firsts.push(seen);
                }
            }
            Next::Wait(until) => now = until.max(now + Micros::from_millis(1)),
            Next::Read { .. } => {}
            Next::Finished(action) => break action,
        }
        assert!(now.as_micros() < 100_000_000, "it never gives up");
    };
    assert_eq!(end, Action::None);
    // Each try ends when the engine looks at the time again, which it does every other second when
    // nobody answers.
    let seconds = now.as_micros() / 1_000_000;
    assert!((60..=64).contains(&seconds), "gave up after {seconds} s");
    let tried: Vec<u64> = firsts
        .iter()
        .map(|(session, ..)| session.arming.0)
        .collect();
    assert_eq!(tried, [2, 3, 2, 3, 2, 3]);
    let attempts: Vec<u16> = firsts.iter().map(|&(_, attempt, _)| attempt).collect();
    assert_eq!(attempts, [0, 0, 1, 1, 2, 2]);
    assert!(firsts[2].2 > firsts[0].2, "packet numbers go on");
}

#[test]
fn what_the_host_demands_is_left_out_whoever_asks() {
    let driver = crashed(&[server(1)]);
    let level = |filter| {
        let want = Want::Pages {
            first: Pfn(16),
            count: 16,
            pass: Pass::Rest,
            filter,
        };
        let Want::Pages { filter, .. } = driver.demand(want) else {
            panic!("pages were asked for")
        };
        filter
    };
    assert_eq!(level(0), DEMANDED);
    assert_eq!(level(16), DEMANDED | 16);
    assert_eq!(level(31), 31);
}
