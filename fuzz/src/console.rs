//! Log records: what is in their datagrams and replies, and the server's end of them.

use std::collections::BTreeMap;

use proto::console::{
    AHEAD_DATAGRAMS_MAX, DICTIONARY_BYTES_MAX, Entry, Head, LOG_REPLY_BYTES_MAX, Log, LogReply,
    LogWriter, Range, Server, TEXT_BYTES_MAX, Taken,
};
use proto::time::{Instant, Micros};
use proto::wire::{HEADER_BYTES, INCARNATION_BYTES};

use crate::{byte, number};

/// What is taken can be written again and says the same; and a server that is told any heads in any
/// order neither loses a number nor has one twice.
pub(crate) fn console(bytes: &[u8]) {
    if let Some(log) = Log::decode(bytes) {
        again(&log);
    }
    if let Some(reply) = LogReply::decode(bytes) {
        let mut out = [0; LOG_REPLY_BYTES_MAX];
        let length = reply.encode(&mut out).expect("a legal reply fits");
        let payload = &out[HEADER_BYTES + INCARNATION_BYTES..][..length];
        assert_eq!(LogReply::decode(payload), Some(reply));
    }
    serve(bytes);
}

fn again(log: &Log<'_>) {
    let mut payload = vec![0; 16_384];
    let mut writer = LogWriter::new(&mut payload, log.head.covers.first).expect("room");
    for entry in log.entries() {
        let written = match entry {
            Entry::Record(_, record) => {
                let (text, dictionary) = (record.text.len(), record.dictionary.len());
                assert!(text <= TEXT_BYTES_MAX && dictionary <= DICTIONARY_BYTES_MAX);
                let room = writer.room();
                if room.len() < text + dictionary {
                    return;
                }
                room[..text].copy_from_slice(record.text);
                room[text..][..dictionary].copy_from_slice(record.dictionary);
                writer.record(&record.head, text, dictionary)
            }
            Entry::Skip(range, reason) => writer.skip(range.count(), reason),
        };
        if written.is_none() {
            return;
        }
    }
    let length = writer.finish(&log.head).expect("complete");
    let read = Log::decode(&payload[..length]).expect("what was written is legal");
    assert_eq!(read.head, log.head);
}

/// What is written so far, and what waits for its turn.
struct Disk {
    written: u64,
    kept: BTreeMap<u64, Head>,
}

impl Disk {
    fn write(&mut self, from: u64, head: &Head) {
        assert_eq!(from, self.written, "in order, without a hole");
        self.written = self.written.max(head.covers.end);
    }

    fn release(&mut self, now: Instant, server: &mut Server) {
        while let Some((first, head)) = self.kept.pop_first() {
            let Some(from) = server.release(now, &head) else {
                self.kept.insert(first, head);
                break;
            };
            self.write(from, &head);
        }
    }
}

fn serve(mut bytes: &[u8]) {
    let mut now = Instant::from_micros(0);
    let mut server = Server::new(Some(0));
    let mut disk = Disk {
        written: 0,
        kept: BTreeMap::new(),
    };
    while !bytes.is_empty() {
        now = now + Micros::from_millis(u64::from(byte(&mut bytes)));
        let first = number(&mut bytes) % 2000;
        let end = first + u64::from(byte(&mut bytes));
        let head = Head {
            covers: Range { first, end },
            ..Head::default()
        };
        match server.handle(now, &head) {
            Taken::Write(from) => {
                disk.write(from, &head);
                disk.release(now, &mut server);
            }
            Taken::Keep => {
                disk.kept.insert(first, head);
            }
            Taken::Known | Taken::NoRoom => {}
        }
        if let Some(lost) = server.give_up(now) {
            assert_eq!(lost.first, disk.written);
            disk.written = lost.end;
            disk.release(now, &mut server);
        }
        assert!(disk.kept.len() <= AHEAD_DATAGRAMS_MAX);
        assert_eq!(server.next(), disk.written);
        server.written(now, disk.written);
        if let Some(reply) = server.reply(now) {
            assert!(reply.next <= disk.written);
        }
    }
}
