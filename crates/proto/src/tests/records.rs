//! Records and replies: round trips, bounds, and totality over damaged bytes.

use std::vec;
use std::vec::Vec;

use zerocopy::IntoBytes;

use super::Random;
use crate::hardware::{DeviceHead, Devices, PROCESSOR_REGISTERS_MAX};
use crate::record::{
    self, BLOCK_BYTES, BODY_BYTES_MAX, Codec, Ending, Hello, Kind, Malformed, PFN_MAX,
    RAM_PAGES_MAX, RAM_RANGES_MAX, RECORD_HEADER_BYTES, RamRange, Record, Totals, decode, header,
};
use crate::reply::{
    Action, BITMAP_BYTES_MAX, PULL_RANGES_MAX, Pull, REPLY_BYTES_MAX, Reply, Verdict,
};
use crate::time::Micros;
use crate::units::{PAGE_BYTES, PacketNumber, Pfn};
use crate::wire::{HEADER_BYTES, INCARNATION_BYTES};

fn record_bytes(kind: Kind, codec: Codec, pages: u16, argument: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = header(kind, codec, pages, body.len() as u32, argument).to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn malformed(bytes: &[u8]) -> Malformed {
    match decode(bytes) {
        Err(malformed) => malformed,
        Ok(_) => panic!("was taken"),
    }
}

#[test]
fn a_record_needs_all_its_bytes() {
    let whole = record_bytes(Kind::Text, Codec::Raw, 0, 3, b"Oops: 0002");
    for length in 0..whole.len() {
        assert!(
            matches!(decode(&whole[..length]), Ok(None)),
            "{length} bytes were taken"
        );
    }
    let Ok(Some(decoded)) = decode(&whole) else {
        panic!("not decoded")
    };
    assert_eq!(decoded.bytes, whole.len());
    assert!(matches!(
        decoded.record,
        Record::Text {
            piece: 3,
            text: b"Oops: 0002"
        }
    ));
}

#[test]
fn illegal_records_are_named() {
    let long = header(Kind::Text, Codec::Raw, 0, BODY_BYTES_MAX as u32 + 1, 0);
    assert_eq!(
        malformed(&long),
        Malformed::Length {
            kind: 2,
            length: BODY_BYTES_MAX as u32 + 1
        }
    );
    let mut unknown = long;
    unknown[0] = 99;
    assert_eq!(malformed(&unknown), Malformed::Kind(99));
    assert_eq!(
        malformed(&record_bytes(Kind::Pages, Codec::Raw, 0, 1, b"x")),
        Malformed::PageCount(0)
    );
    assert_eq!(
        malformed(&record_bytes(Kind::Pages, Codec::Raw, 17, 1, b"x")),
        Malformed::PageCount(17)
    );
    let mut codec = record_bytes(Kind::Pages, Codec::Raw, 1, 1, b"x");
    codec[1] = 7;
    assert_eq!(malformed(&codec), Malformed::Codec(7));
    let far = record_bytes(Kind::Zero, Codec::Raw, 0, PFN_MAX, &2_u64.to_le_bytes());
    assert_eq!(
        malformed(&far),
        Malformed::Argument {
            kind: 7,
            argument: PFN_MAX
        }
    );
    let none = record_bytes(Kind::Zero, Codec::Raw, 0, 1, &0_u64.to_le_bytes());
    assert_eq!(
        malformed(&none),
        Malformed::Argument {
            kind: 7,
            argument: 1
        }
    );
    let overflow = record_bytes(Kind::Zero, Codec::Raw, 0, u64::MAX, &u64::MAX.to_le_bytes());
    assert_eq!(
        malformed(&overflow),
        Malformed::Argument {
            kind: 7,
            argument: u64::MAX
        }
    );
    assert_eq!(
        malformed(&record_bytes(Kind::Hello, Codec::Raw, 0, 0, b"short")),
        Malformed::Length { kind: 1, length: 5 }
    );
    assert_eq!(
        malformed(&record_bytes(Kind::End, Codec::Raw, 0, 9, b"")),
        Malformed::Argument {
            kind: 13,
            argument: 9
        }
    );
    assert_eq!(
        malformed(&record_bytes(Kind::End, Codec::Raw, 0, 0, b"x")),
        Malformed::Length {
            kind: 13,
            length: 1
        }
    );
}

#[test]
fn memory_maps_are_judged() {
    let map = |ranges: &[(u64, u64)]| -> Vec<u8> {
        let ranges: Vec<RamRange> = ranges
            .iter()
            .map(|&(first, pages)| RamRange {
                first: first.into(),
                pages: pages.into(),
            })
            .collect();
        ranges.as_bytes().to_vec()
    };
    assert!(record::ram_map(&map(&[(1, 158), (256, 1000)])).is_some());
    assert!(
        record::ram_map(&map(&[(1, 158), (159, 1)])).is_some(),
        "ranges may touch"
    );
    assert!(record::ram_map(&map(&[])).is_none());
    assert!(record::ram_map(&map(&[(1, 0)])).is_none());
    assert!(
        record::ram_map(&map(&[(10, 10), (19, 1)])).is_none(),
        "ranges overlap"
    );
    assert!(
        record::ram_map(&map(&[(10, 1), (5, 1)])).is_none(),
        "ranges descend"
    );
    assert!(
        record::ram_map(&map(&[(u64::MAX, 2)])).is_none(),
        "end overflows"
    );
    assert!(record::ram_map(&map(&[(PFN_MAX, 1)])).is_none());
    assert!(record::ram_map(&map(&[(0, RAM_PAGES_MAX)])).is_some());
    assert!(record::ram_map(&map(&[(0, RAM_PAGES_MAX), (1 << 35, 1)])).is_none());
    let many: Vec<(u64, u64)> = (0..=RAM_RANGES_MAX as u64).map(|n| (2 * n, 1)).collect();
    assert!(record::ram_map(&map(&many)).is_none());
    assert!(record::ram_map(&map(&many[1..])).is_some());
}

#[test]
fn blocks_decode_to_their_pages_or_not_at_all() {
    let mut out = [0; BLOCK_BYTES];
    let page = vec![5; PAGE_BYTES];
    let raw = record::Block {
        first: Pfn(1),
        pages: 1,
        codec: Codec::Raw,
        body: &page,
    };
    assert_eq!(raw.decode(&mut out).expect("decodes"), page);
    let short = record::Block {
        body: &page[1..],
        ..raw
    };
    assert_eq!(
        short.decode(&mut out),
        Err(Malformed::Block {
            first: Pfn(1),
            body: PAGE_BYTES - 1
        })
    );
    let mut compressed = vec![0; PAGE_BYTES];
    let length = crate::lz4::Table::new()
        .compress(&page, &mut compressed)
        .expect("fits");
    let block = record::Block {
        first: Pfn(1),
        pages: 1,
        codec: Codec::Lz4,
        body: &compressed[..length],
    };
    assert_eq!(block.decode(&mut out).expect("decodes"), page);
    let two = record::Block { pages: 2, ..block };
    assert!(two.decode(&mut out).is_err(), "one page passed for two");
}

#[test]
fn damaged_records_never_panic() {
    let mut random = Random(5);
    let mut hello: Hello = zerocopy::FromZeros::new_zeroed();
    hello.reason[..4].copy_from_slice(b"oops");
    let seeds = [
        record_bytes(Kind::Hello, Codec::Raw, 0, 0, hello.as_bytes()),
        record_bytes(
            Kind::Pages,
            Codec::Lz4,
            2,
            77,
            &[0x1F, 0, 1, 0, 255, 255, 3, 0x50, 1, 2, 3, 4, 5],
        ),
        record_bytes(Kind::MemoryMap, Codec::Raw, 0, 0, &[1; 32]),
        record_bytes(Kind::Registers, Codec::Raw, 0, 1, &[0; 256]),
        record_bytes(Kind::Processor, Codec::Raw, 0, 0, &[0; 24]),
        record_bytes(Kind::Devices, Codec::Raw, 0, 0, &[0; 24]),
        record_bytes(
            Kind::End,
            Codec::Raw,
            0,
            Ending::StateFaulted.to_wire(),
            b"",
        ),
    ];
    let mut out = [0; BLOCK_BYTES];
    for round in 0..60_000 {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.next().to_le_bytes()[0];
        }
        bytes.truncate(1 + random.below(bytes.len() as u64) as usize);
        if let Ok(Some(decoded)) = decode(&bytes) {
            assert!(decoded.bytes <= bytes.len() && decoded.bytes >= RECORD_HEADER_BYTES);
            if let Record::Pages(block) = decoded.record
                && let Ok(pages) = block.decode(&mut out)
            {
                assert_eq!(pages.len(), usize::from(block.pages) * PAGE_BYTES);
            }
        }
    }
}

#[test]
fn replies_round_trip() {
    let verdicts = [
        Verdict::Undecided,
        Verdict::Full { filter: 31 },
        Verdict::LogOnly,
        Verdict::Nothing,
        Verdict::Wait { seconds: 17 },
        Verdict::Hold { filter: 31 },
        Verdict::Redirect { server: 3 },
    ];
    let actions = [Action::None, Action::Reboot, Action::Halt, Action::Stay];
    let range = |first: u64, pages: u64| RamRange {
        first: first.into(),
        pages: pages.into(),
    };
    let ranges = [range(7, 1), range(PFN_MAX, u64::MAX)];
    for (verdict, action) in verdicts.into_iter().zip(actions.into_iter().cycle()) {
        let reply = Reply {
            next: PacketNumber(10),
            credit_end: PacketNumber(300),
            latest: PacketNumber(12),
            delay: Micros::new(77),
            attempt: 3,
            verdict,
            action,
            knows_hardware: action == Action::None,
        };
        let pull = Pull {
            number: 9,
            ranges: &ranges,
        };
        let mut datagram = [0; REPLY_BYTES_MAX];
        let length = reply
            .encode(&[0b101, 0xFF], pull, &mut datagram)
            .expect("fits");
        let payload = &datagram[HEADER_BYTES + INCARNATION_BYTES..][..length];
        let opened = Reply::decode(payload).expect("is legal");
        assert_eq!(opened.reply, reply);
        assert_eq!(opened.bitmap, &[0b101, 0xFF]);
        assert_eq!(opened.pull, pull);
        for cut in 0..length {
            assert!(
                Reply::decode(&payload[..cut]).is_none(),
                "{cut} bytes were taken"
            );
        }
        let mut large = [0; 2 * REPLY_BYTES_MAX];
        let nothing = Pull::default();
        let long = [0; BITMAP_BYTES_MAX + 1];
        assert_eq!(reply.encode(&long, nothing, &mut large), None);
        let many = Pull {
            number: 1,
            ranges: &[range(0, 1); PULL_RANGES_MAX + 1],
        };
        assert_eq!(reply.encode(&[], many, &mut large), None);
        assert_eq!(reply.encode(&long[..9], pull, &mut [0; 60]), None);
    }
}

#[test]
fn the_wire_knows_every_kind_and_no_other() {
    let totals = Totals::default();
    let run = 1_u64.to_le_bytes();
    let range = [1_u64.to_le_bytes(), 1_u64.to_le_bytes()].concat();
    let registers = [[3, 0, 0, 0, 0, 0, 0, 0].as_slice(), &[1; 32]].concat();
    let devices = [0, 0, 0, 0, 1, 8, 4, 0, 2, 0, 0, 0, 0x86, 0x80];
    let bodies: [(Kind, u64, &[u8]); 17] = [
        (Kind::Hello, 0, &[0; size_of::<Hello>()]),
        (Kind::Text, 0, b"text"),
        (Kind::Registers, 0, &[0; size_of::<record::Cpu>()]),
        (Kind::Notes, 0, b"notes"),
        (Kind::MemoryMap, 0, &range),
        (Kind::Pages, 1, &[1; PAGE_BYTES]),
        (Kind::Zero, 1, &run),
        (Kind::Unreadable, 1, &run),
        (Kind::Excluded, 1, &run),
        (Kind::Totals, 0, totals.as_bytes()),
        (Kind::Written, 0, &range),
        (Kind::State, 0, b"state"),
        (Kind::End, 0, b""),
        (Kind::PullBegin, 4, &range),
        (Kind::PullEnd, 4, totals.as_bytes()),
        (Kind::Processor, 3, &registers),
        (Kind::Devices, 0, &devices),
    ];
    for (number, (kind, argument, body)) in (1..).zip(bodies) {
        let bytes = record_bytes(kind, Codec::Raw, 1, argument, body);
        assert_eq!(bytes[0], number, "{kind:?} has another number");
        let Ok(Some(decoded)) = decode(&bytes) else {
            panic!("{kind:?} was not taken");
        };
        let back = match decoded.record {
            Record::Hello(_) => Kind::Hello,
            Record::Text { .. } => Kind::Text,
            Record::Registers(_) => Kind::Registers,
            Record::Notes(_) => Kind::Notes,
            Record::MemoryMap(_) => Kind::MemoryMap,
            Record::Pages(_) => Kind::Pages,
            Record::Run(run) => run.why,
            Record::Totals(_) => Kind::Totals,
            Record::Written(_) => Kind::Written,
            Record::State { .. } => Kind::State,
            Record::End(_) => Kind::End,
            Record::PullBegin { .. } => Kind::PullBegin,
            Record::PullEnd { .. } => Kind::PullEnd,
            Record::Processor(_) => Kind::Processor,
            Record::Devices { .. } => Kind::Devices,
        };
        assert_eq!(back, kind);
    }
    for number in (0..=u8::MAX).filter(|number| !(1..=17).contains(number)) {
        let mut bytes = record_bytes(Kind::Text, Codec::Raw, 0, 0, b"");
        bytes[0] = number;
        assert_eq!(malformed(&bytes), Malformed::Kind(number));
    }
}

#[test]
fn registers_of_a_cpu_are_bounded_and_its_own() {
    let register = [
        1_u16.to_le_bytes().as_slice(),
        &[0; 2],
        &[7, 0, 0, 0],
        &[9; 8],
    ]
    .concat();
    let body = |count: usize| [2_u64.to_le_bytes().to_vec(), register.repeat(count)].concat();
    let most = record_bytes(
        Kind::Processor,
        Codec::Raw,
        0,
        2,
        &body(PROCESSOR_REGISTERS_MAX),
    );
    let Ok(Some(decoded)) = decode(&most) else {
        panic!("as many registers as may be were refused");
    };
    let Record::Processor(processor) = decoded.record else {
        panic!("it became another record");
    };
    assert_eq!(
        (processor.cpu, processor.registers.len()),
        (2, PROCESSOR_REGISTERS_MAX)
    );
    let first = processor.registers[0];
    assert_eq!((first.space.get(), first.number.get()), (1, 7));
    assert_eq!(first.value.get(), u64::from_le_bytes([9; 8]));
    let many = record_bytes(
        Kind::Processor,
        Codec::Raw,
        0,
        2,
        &body(PROCESSOR_REGISTERS_MAX + 1),
    );
    assert!(matches!(malformed(&many), Malformed::Length { .. }));
    let other = record_bytes(Kind::Processor, Codec::Raw, 0, 3, &body(1));
    assert!(matches!(malformed(&other), Malformed::Argument { .. }));
    let none = record_bytes(Kind::Processor, Codec::Raw, 0, 2, &body(0));
    assert!(decode(&none).is_ok_and(|decoded| decoded.is_some()));
}

#[test]
fn devices_lie_one_behind_the_other() {
    let device = |read: u16, config: &[u8]| {
        let length = u16::try_from(config.len()).unwrap();
        let head = DeviceHead {
            segment: 0x1_0000.into(),
            bus: 2,
            devfn: 0x1b,
            read: read.into(),
            length: length.into(),
            reserved: 0.into(),
        };
        [head.as_bytes(), config].concat()
    };
    let body = [
        device(256, &[1, 2, 3]),
        device(0, &[]),
        device(4096, &[4; 4096]),
    ]
    .concat();
    let devices = Devices::decode(&body).expect("is legal");
    let read: Vec<(u16, usize)> = devices
        .map(|device| (device.head.read.get(), device.config.len()))
        .collect();
    assert_eq!(read, [(256, 3), (0, 0), (4096, 4096)]);
    for wrong in [
        device(2, &[1, 2, 3]),
        device(4097, &[1]),
        device(256, &[1; 8])[..15].to_vec(),
    ] {
        let bytes = record_bytes(Kind::Devices, Codec::Raw, 0, 0, &wrong);
        assert!(matches!(malformed(&bytes), Malformed::Length { .. }));
    }
}
