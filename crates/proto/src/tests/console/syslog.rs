//! Records as syslog messages.

use std::string::String;
use std::vec;
use std::vec::Vec;

use crate::console::{Caller, Clock, Format, RecordHead, Ring, RingRead, Step, Syslog};
use crate::time::Instant;

/// Records that are still there from `oldest` on.
struct Printed {
    oldest: u64,
    records: Vec<(u8, u8, &'static str)>,
}

impl Ring for Printed {
    fn oldest(&mut self) -> u64 {
        self.oldest
    }

    fn read(&mut self, sequence: u64, room: &mut [u8]) -> RingRead {
        let Some((facility, level, text)) = self.records.get(sequence as usize) else {
            return RingRead::NotYet;
        };
        room[..text.len()].copy_from_slice(text.as_bytes());
        RingRead::Record {
            head: RecordHead {
                time_us: 12_345_678,
                level: *level,
                facility: *facility,
                caller: Caller::Task(1),
                continued: false,
                cut: false,
            },
            text: text.len(),
            dictionary: 0,
        }
    }
}

/// Ten seconds after the records were printed: 2024-02-29 12:34:56.7 UTC.
const CLOCK: Clock = Clock {
    kernel_us: 22_345_678,
    unix_us: 1_709_210_096_700_000,
};

fn lines(format: Format, ring: &mut Printed) -> Vec<String> {
    let now = Instant::from_micros(5);
    let mut syslog = Syslog::new(format, 6, 0, now);
    let mut buffer = vec![0; 1400];
    let mut text = [0; 1024];
    let mut lines = Vec::new();
    while let Step::Send(bytes) = syslog.poll(now, (CLOCK, b"host7"), ring, &mut text, &mut buffer)
    {
        lines.push(String::from_utf8(buffer[..bytes].to_vec()).expect("text"));
    }
    lines
}

#[test]
fn messages_are_as_the_standards_say() {
    let records = vec![
        (0, 6, "usb 1-1: new device"),
        (0, 7, "debug"),
        (30, 3, "two\nlines"),
    ];
    let mut ring = Printed { oldest: 0, records };
    assert_eq!(
        lines(Format::Rfc5424, &mut ring),
        [
            "<6>1 2024-02-29T12:34:46.700000Z host7 kernel - - [meta sequenceId=\"1\" \
             sysUpTime=\"1234\"] [   12.345678] usb 1-1: new device",
            "<11>1 2024-02-29T12:34:46.700000Z host7 kernel - - [meta sequenceId=\"3\" \
             sysUpTime=\"1234\"] [   12.345678] two\\x0alines",
        ]
    );
    assert_eq!(
        lines(Format::Rfc3164, &mut ring)[0],
        "<6>Feb 29 12:34:46 host7 kernel: [   12.345678] usb 1-1: new device"
    );
}

#[test]
fn what_was_overwritten_is_told() {
    let records = vec![(0, 6, "gone"), (0, 6, "gone too"), (0, 6, "left")];
    let mut ring = Printed { oldest: 2, records };
    let lines = lines(Format::Rfc3164, &mut ring);
    assert!(lines[0].starts_with("<44>") && lines[0].contains("netdump: 2 messages were"));
    assert!(lines[1].ends_with("left"));
}
