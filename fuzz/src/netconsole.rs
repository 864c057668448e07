//! Console datagrams: whatever comes, in whatever order, each datagram is told once, every line of
//! the log is one line and reads back, and nothing stays behind.

use ::netconsole::{
    BootStart, Counts, Gap, Line, Note, Part, Record, Room, Sink, Stamp, Stored, Stream,
    Unfinished, write_note, write_record,
};

use crate::byte;

const ROOM_BYTES: usize = 16 << 10;
const BEGIN_MICROS: u64 = 1_795_543_320_000_000;

/// A log in memory.
#[derive(Default)]
struct Log {
    text: Vec<u8>,
    stamp: Stamp,
    counts: Counts,
    lines: usize,
}

/// Takes datagrams, each behind its length and the pause before it.
pub(crate) fn netconsole(bytes: &[u8]) {
    let mut rest = bytes;
    let mut room = Room::new(ROOM_BYTES);
    let mut log = Log::default();
    let mut stream = Stream::default();
    let (mut now, mut datagrams) = (BEGIN_MICROS, 0);
    while !rest.is_empty() {
        let length = usize::from(byte(&mut rest)).min(rest.len());
        let pause = u64::from(byte(&mut rest));
        now += pause * pause * 100;
        let (datagram, more) = rest.split_at(length.min(rest.len()));
        rest = more;
        stream.take(now, datagram, &mut room, &mut log);
        datagrams += 1;
        if stream.due().is_some_and(|due| due <= now) {
            stream.expire(now, &mut room, &mut log);
        }
    }
    stream.finish(&mut room, &mut log);
    assert_eq!(log.counts.datagrams, datagrams);
    assert_eq!(stream.due(), None, "something still waits");
    let mut lines = 0;
    for line in log.text.split_inclusive(|&byte| byte == b'\n') {
        let parsed = Line::parse(&line[..line.len() - 1]).expect("a line reads back");
        if let Stored::Record(record) = parsed.what {
            let mut again = Vec::new();
            write_record(&mut again, &mut Stamp::default(), parsed.at_us, &record);
            assert_eq!(again, line, "a record is written as it was read");
        }
        lines += 1;
    }
    assert_eq!(lines, log.lines);
}

impl Log {
    fn note(&mut self, at_us: u64, note: Note, text: std::fmt::Arguments<'_>) {
        self.lines += 1;
        write_note(&mut self.text, &mut self.stamp, at_us, (note, &[]), text);
    }
}

impl Sink for Log {
    fn boot(&mut self, start: &BootStart<'_>) {
        self.note(start.at_us, Note::Boot, format_args!("{:?}", start.release));
    }

    fn record(&mut self, at_us: u64, record: &Record<'_>) {
        self.lines += 1;
        write_record(&mut self.text, &mut self.stamp, at_us, record);
    }

    fn gap(&mut self, at_us: u64, gap: Gap) {
        assert!(gap.first <= gap.last);
        self.note(at_us, Note::Gap, format_args!("{gap:?}"));
    }

    fn part(&mut self, at_us: u64, part: Part) {
        assert!(part.have < part.total);
        self.note(at_us, Note::Part, format_args!("{part:?}"));
    }

    fn raw(&mut self, at_us: u64, bytes: &[u8], why: Unfinished) {
        self.note(
            at_us,
            Note::Raw,
            format_args!("{why:?}: {}", bytes.escape_ascii()),
        );
    }

    fn counts(&mut self) -> &mut Counts {
        &mut self.counts
    }
}
