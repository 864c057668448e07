//! Records as syslog messages, for servers that know nothing of netdump: one UDP datagram a record,
//! RFC 5424 or RFC 3164. Nobody acknowledges them, so nothing is sent again.

use super::client::{Budget, Clock, Ring, RingRead, Step};
use super::datagram::{RecordHead, TEXT_BYTES_MAX};
use crate::time::{Instant, Micros};

/// Bytes before the text at most: priority, time, host, name and structured data.
const HEADER_BYTES_MAX: usize = 192;
/// Facilities that syslog knows; others count as user messages.
const FACILITY_MAX: u8 = 23;
const FACILITY_USER: u8 = 1;
/// The facility of the syslog system itself, and a warning's level: what we say ourselves.
const OWN_PRIORITY: u64 = 5 * 8 + 4;
/// RFC 5424 wants sequence numbers from 1 to this.
const SEQUENCE_ID_MAX: u64 = 2_147_483_647;
/// How often somebody looks for new records that were not announced.
const LOOK_EVERY: Micros = Micros::from_secs(60);
const MICROS: u64 = 1_000_000;

/// How a message looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// RFC 3164: `<6>Nov 24 00:50:12 host kernel: [   12.345678] text`, the time in UTC.
    Rfc3164,
    /// RFC 5424: `<6>1 2026-11-24T00:50:12.345678Z host kernel - - [meta ...] [   12.345678] text`.
    Rfc5424,
}

/// The client's end: a place in the ring buffer and nothing else.
pub struct Syslog {
    format: Format,
    level: u8,
    next: u64,
    gone: u64,
    budget: Budget,
}

impl Syslog {
    /// Sends records of at most `level` from sequence number `next` on.
    #[must_use]
    pub const fn new(format: Format, level: u8, next: u64, now: Instant) -> Self {
        Self {
            format,
            level,
            next,
            gone: 0,
            budget: Budget::new(now),
        }
    }

    /// Getter: the sequence number that is sent next.
    #[must_use]
    pub const fn next(&self) -> u64 {
        self.next
    }

    /// Out: what to do next. A message is composed in `buffer`, without header and seal; a record's
    /// text lies in `text` until then.
    pub fn poll(
        &mut self,
        now: Instant,
        (clock, host): (Clock, &[u8]),
        ring: &mut impl Ring,
        text: &mut [u8; TEXT_BYTES_MAX],
        buffer: &mut [u8],
    ) -> Step {
        loop {
            if !self.budget.has_some(now) {
                return Step::Wait(self.budget.refilled_at());
            }
            let oldest = ring.oldest();
            self.gone = self.gone.saturating_add(oldest.saturating_sub(self.next));
            self.next = self.next.max(oldest);
            let read = ring.read(self.next, text);
            if let RingRead::Overwritten = read {
                self.gone = self.gone.saturating_add(1);
            } else if self.gone > 0 {
                let bytes = self.tell_gone(clock, host, buffer);
                self.gone = 0;
                self.budget.take(1);
                return Step::Send(bytes);
            }
            if let RingRead::NotYet = read {
                return Step::Wait(now + LOOK_EVERY);
            }
            let sequence = self.next;
            self.next = sequence.saturating_add(1);
            if let RingRead::Record {
                head, text: bytes, ..
            } = read
                && head.level <= self.level
            {
                let text = text.get(..bytes).unwrap_or(text);
                self.budget.take(1);
                let mut line = Line::new(buffer);
                self.header(
                    &mut line,
                    priority(&head),
                    clock,
                    host,
                    head.time_us,
                    sequence,
                );
                line.escaped(text);
                return Step::Send(line.used);
            }
        }
    }

    fn tell_gone(&self, clock: Clock, host: &[u8], buffer: &mut [u8]) -> usize {
        let mut line = Line::new(buffer);
        let (time, sequence) = (clock.kernel_us, self.next);
        self.header(&mut line, OWN_PRIORITY, clock, host, time, sequence);
        line.text(b"netdump: ");
        line.number(self.gone, 1);
        line.text(b" messages were overwritten before they could be sent");
        line.used
    }

    /// All that is before the text.
    fn header(
        &self,
        line: &mut Line<'_>,
        priority: u64,
        clock: Clock,
        host: &[u8],
        time_us: u64,
        sequence: u64,
    ) {
        let age = clock.kernel_us.saturating_sub(time_us);
        let unix_us = clock.unix_us.saturating_sub(age);
        let date = Date::of(unix_us / MICROS);
        line.text(b"<");
        line.number(priority, 1);
        line.text(b">");
        match self.format {
            Format::Rfc3164 => {
                line.text(MONTHS.get(date.month).copied().unwrap_or_default());
                line.text(if date.day < 10 { b"  " } else { b" " });
                line.number(date.day, 1);
                line.text(b" ");
                line.clock(&date);
                line.text(b" ");
                line.text(host);
                line.text(b" kernel: ");
            }
            Format::Rfc5424 => {
                line.text(b"1 ");
                line.number(date.year, 4);
                line.text(b"-");
                line.number(u64::try_from(date.month).unwrap_or(0).saturating_add(1), 2);
                line.text(b"-");
                line.number(date.day, 2);
                line.text(b"T");
                line.clock(&date);
                line.text(b".");
                line.number(unix_us % MICROS, 6);
                line.text(b"Z ");
                line.text(host);
                line.text(b" kernel - - [meta sequenceId=\"");
                line.number((sequence % SEQUENCE_ID_MAX).saturating_add(1), 1);
                line.text(b"\" sysUpTime=\"");
                line.number(time_us / 10_000, 1);
                line.text(b"\"] ");
            }
        }
        line.text(b"[");
        line.spaced(time_us / MICROS, 5);
        line.text(b".");
        line.number(time_us % MICROS, 6);
        line.text(b"] ");
    }
}

/// The smallest buffer that a whole record fits into if nothing in it is escaped.
pub const SYSLOG_BYTES: usize = HEADER_BYTES_MAX + TEXT_BYTES_MAX;

const MONTHS: [&[u8]; 12] = [
    b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec",
];

fn priority(head: &RecordHead) -> u64 {
    let facility = if head.facility > FACILITY_MAX {
        FACILITY_USER
    } else {
        head.facility
    };
    u64::from(facility)
        .saturating_mul(8)
        .saturating_add(head.level.min(7).into())
}

/// A time of the Gregorian calendar, UTC.
struct Date {
    year: u64,
    /// 0 to 11.
    month: usize,
    /// 1 to 31.
    day: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Date {
    fn of(unix_seconds: u64) -> Self {
        let mut days = unix_seconds / 86_400;
        let second = unix_seconds % 86_400;
        let mut year = 1970_u64;
        // A clock that is millennia wrong is told as the year 9999.
        while days >= days_of(year) && year < 9999 {
            days = days.saturating_sub(days_of(year));
            year = year.saturating_add(1);
        }
        let mut month = 0;
        for length in months_of(year) {
            if days < length || month == 11 {
                break;
            }
            days = days.saturating_sub(length);
            month = usize::saturating_add(month, 1);
        }
        Self {
            year,
            month,
            day: days.min(30).saturating_add(1),
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
        }
    }
}

const fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

const fn days_of(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

const fn months_of(year: u64) -> [u64; 12] {
    let february = if is_leap(year) { 29 } else { 28 };
    [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
}

/// A message under construction; what does not fit is cut.
struct Line<'a> {
    buffer: &'a mut [u8],
    used: usize,
}

impl<'a> Line<'a> {
    const fn new(buffer: &'a mut [u8]) -> Self {
        Self { buffer, used: 0 }
    }

    fn text(&mut self, bytes: &[u8]) {
        let room = self.buffer.get_mut(self.used..).unwrap_or_default();
        for (to, &from) in room.iter_mut().zip(bytes) {
            *to = from;
        }
        let written = bytes.len().min(room.len());
        self.used = self.used.saturating_add(written);
    }

    /// Control characters as `\xHH`, as `/dev/kmsg` has them: a message is one line.
    fn escaped(&mut self, bytes: &[u8]) {
        const HEX: [u8; 16] = *b"0123456789abcdef";
        let digit = |nibble: u8| HEX.get(usize::from(nibble & 15)).copied().unwrap_or(b'0');
        for &byte in bytes {
            if byte.is_ascii_control() && byte != b'\t' {
                self.text(&[b'\\', b'x', digit(byte >> 4), digit(byte)]);
            } else {
                self.text(&[byte]);
            }
        }
    }

    /// In decimal, with zeros before it up to `width` digits.
    fn number(&mut self, number: u64, width: usize) {
        self.padded(number, width, b'0');
    }

    /// In decimal, with spaces before it up to `width` digits.
    fn spaced(&mut self, number: u64, width: usize) {
        self.padded(number, width, b' ');
    }

    fn padded(&mut self, mut number: u64, width: usize, pad: u8) {
        let mut digits = [pad; 20];
        let mut used = 0_usize;
        for place in digits.iter_mut().rev() {
            if number == 0 && used > 0 {
                break;
            }
            let digit = u8::try_from(number % 10).unwrap_or(0);
            *place = b'0'.saturating_add(digit);
            number /= 10;
            used = used.saturating_add(1);
        }
        let from = digits.len().saturating_sub(used.max(width));
        self.text(digits.get(from..).unwrap_or_default());
    }

    fn clock(&mut self, date: &Date) {
        self.number(date.hour, 2);
        self.text(b":");
        self.number(date.minute, 2);
        self.text(b":");
        self.number(date.second, 2);
    }
}
