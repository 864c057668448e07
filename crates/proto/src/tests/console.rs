//! Log records: their bytes, and both ends in a seeded world that loses, doubles and reorders.

mod syslog;
mod world;

use std::vec;
use std::vec::Vec;

use super::Random;
use crate::console::{
    ASK_RANGES_MAX, Caller, DICTIONARY_BYTES_MAX, Entry, Head, LOG_HEAD_BYTES, LOG_REPLY_BYTES_MAX,
    Log, LogReply, LogWriter, Range, Reason, RecordHead, TEXT_BYTES_MAX,
};
use crate::wire::{HEADER_BYTES, INCARNATION_BYTES};

const HEAD: Head = Head {
    boot: [5; 16],
    covers: Range { first: 0, end: 0 },
    oldest: 3,
    kernel_us: 12_345_678,
    unix_us: 1_700_000_000_000_000,
    crash: true,
};

const RECORD: RecordHead = RecordHead {
    time_us: 12_345_000,
    level: 6,
    facility: 0,
    caller: Caller::Cpu(3),
    continued: true,
    cut: false,
};

fn payload() -> Vec<u8> {
    let mut bytes = vec![0xAA; 400];
    let mut writer = LogWriter::new(&mut bytes, 7).expect("there is room");
    writer.skip(2, Reason::Overwritten).expect("fits");
    writer.skip(3, Reason::Overwritten).expect("fits");
    let texts = b"a messageSUBSYSTEM=pci\n";
    writer.room()[..texts.len()].copy_from_slice(texts);
    writer.record(&RECORD, 9, 14).expect("fits");
    writer.skip(1, Reason::Level).expect("fits");
    let length = writer.finish(&HEAD).expect("complete");
    bytes.truncate(length);
    bytes
}

#[test]
fn what_is_written_is_read() {
    let bytes = payload();
    let log = Log::decode(&bytes).expect("legal");
    let covers = Range { first: 7, end: 14 };
    assert_eq!(log.head, Head { covers, ..HEAD });
    let entries: Vec<Entry<'_>> = log.entries().collect();
    assert_eq!(
        entries[0],
        Entry::Skip(Range { first: 7, end: 12 }, Reason::Overwritten),
        "runs of one reason are joined"
    );
    let Entry::Record(12, record) = entries[1] else {
        panic!("{:?}", entries[1])
    };
    assert_eq!(record.head, RECORD);
    assert_eq!(
        (record.text, record.dictionary),
        (&b"a message"[..], &b"SUBSYSTEM=pci\n"[..])
    );
    assert_eq!(
        entries[2],
        Entry::Skip(Range { first: 13, end: 14 }, Reason::Level)
    );
    assert_eq!(entries.len(), 3);
}

#[test]
fn log_bytes_are_these() {
    let bytes = payload();
    let head = &bytes[..LOG_HEAD_BYTES];
    assert_eq!(head[16..24], 7_u64.to_le_bytes());
    assert_eq!(head[24..32], 14_u64.to_le_bytes());
    assert_eq!(head[56..60], [1, 0, 0, 0]);
    let skip = [2, 1, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(bytes[LOG_HEAD_BYTES..][..12], skip);
    let record = [1, 6, 0, 1, 9, 0, 14, 0, 3, 0, 0, 0x80];
    assert_eq!(bytes[LOG_HEAD_BYTES + 12..][..12], record);
}

#[test]
fn damaged_logs_are_refused_or_whole() {
    let whole = payload();
    for length in 0..whole.len() {
        assert!(Log::decode(&whole[..length]).is_none(), "{length} bytes");
    }
    let mut longer = whole.clone();
    longer.push(0);
    assert!(Log::decode(&longer).is_none(), "a byte too many");
    let mut random = Random(11);
    for _ in 0..20_000 {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.next() as u8;
        }
        let Some(log) = Log::decode(&bytes) else {
            continue;
        };
        let mut next = log.head.covers.first;
        for entry in log.entries() {
            assert_eq!(entry.covers().first, next);
            next = entry.covers().end;
            if let Entry::Record(_, record) = entry {
                assert!(record.text.len() <= TEXT_BYTES_MAX && record.head.level <= 7);
                assert!(record.dictionary.len() <= DICTIONARY_BYTES_MAX);
            }
        }
        assert_eq!(next, log.head.covers.end, "no hole within a datagram");
    }
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let mut bytes = vec![0; LOG_HEAD_BYTES + 25];
    assert!(LogWriter::new(&mut bytes[..LOG_HEAD_BYTES - 1], 0).is_none());
    let mut writer = LogWriter::new(&mut bytes, 0).expect("room for the head");
    assert_eq!(writer.room().len(), 5);
    assert!(writer.record(&RECORD, 6, 0).is_none());
    assert!(writer.covers().is_empty());
    writer.record(&RECORD, 5, 0).expect("fits exactly");
    assert!(writer.skip(1, Reason::Level).is_none());
    assert_eq!(writer.covers(), Range { first: 0, end: 1 });
}

#[test]
fn sequence_numbers_do_not_wrap() {
    let mut bytes = vec![0; 200];
    let mut writer = LogWriter::new(&mut bytes, u64::MAX).expect("room");
    assert!(writer.skip(1, Reason::Level).is_none());
    assert!(writer.record(&RECORD, 0, 0).is_none());
}

fn encoded(reply: &LogReply) -> Vec<u8> {
    let mut datagram = vec![0; LOG_REPLY_BYTES_MAX];
    let length = reply.encode(&mut datagram).expect("fits");
    datagram[HEADER_BYTES + INCARNATION_BYTES..][..length].to_vec()
}

#[test]
fn replies_are_read_as_written() {
    let mut reply = LogReply::new(10);
    assert!(
        !reply.ask(Range { first: 9, end: 12 }),
        "is written already"
    );
    assert!(!reply.ask(Range { first: 12, end: 12 }), "is empty");
    for at in 0..ASK_RANGES_MAX as u64 {
        let first = 10 + 3 * at;
        assert!(reply.ask(Range {
            first,
            end: first + 2
        }));
    }
    assert!(!reply.ask(Range { first: 90, end: 91 }), "is one too many");
    let bytes = encoded(&reply);
    assert_eq!(LogReply::decode(&bytes), Some(reply));
    for length in 0..bytes.len() {
        assert!(
            LogReply::decode(&bytes[..length]).is_none(),
            "{length} bytes"
        );
    }
    let mut backwards = bytes;
    backwards[16..24].copy_from_slice(&200_u64.to_le_bytes());
    assert!(LogReply::decode(&backwards).is_none(), "an empty run");
}
