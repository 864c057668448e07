//! Records as syslog messages, for servers that know nothing of netdump, RFC 5424 or RFC 3164.
//!
//! A [`Message`] is how one looks, whoever sends it: a host ([`Syslog`]), one UDP datagram a record,
//! which nobody acknowledges, so that nothing is sent again; or a server that forwards.

use super::client::{Budget, Clock, Ring, RingRead, Step};
use super::datagram::{RecordHead, TEXT_BYTES_MAX};
use crate::time::{Instant, Micros};

/// Bytes before the text at most: priority, time, host, name and structured data.
const HEADER_BYTES_MAX: usize = 192;
/// Facilities that syslog knows; others count as user messages.
const FACILITY_MAX: u8 = 23;
const FACILITY_USER: u8 = 1;
/// The facility of the syslog system itself, and a warning's level: what we say ourselves.
const OWN_PRIORITY: u8 = 5 * 8 + 4;
/// Bytes of the text that tells of overwritten records.
const GONE_TEXT_BYTES_MAX: usize = 96;
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
                self.budget.take(1);
                let message = Message {
                    text: text.get(..bytes).unwrap_or(text),
                    ..Message::of_kernel(priority(&head), clock, host, head.time_us, sequence)
                };
                return Step::Send(message.write(self.format, buffer));
            }
        }
    }

    fn tell_gone(&self, clock: Clock, host: &[u8], buffer: &mut [u8]) -> usize {
        let mut text = [0; GONE_TEXT_BYTES_MAX];
        let mut line = Line::new(&mut text);
        line.text(b"netdump: ");
        line.number(self.gone, 1);
        line.text(b" messages were overwritten before they could be sent");
        let used = line.used;
        let message = Message {
            text: text.get(..used).unwrap_or_default(),
            ..Message::of_kernel(OWN_PRIORITY, clock, host, clock.kernel_us, self.next)
        };
        message.write(self.format, buffer)
    }
}

/// One message as syslog has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Facility times eight plus level.
    pub priority: u8,
    /// When it was said, in microseconds since 1970.
    pub unix_us: u64,
    /// The host that said it.
    pub host: &'a [u8],
    /// The program: the kernel, or who speaks about it.
    pub app: &'a [u8],
    /// Who in it; RFC 5424 only.
    pub process: &'a [u8],
    /// The kind of message; RFC 5424 only.
    pub id: &'a [u8],
    /// The record's number in its boot; RFC 5424 only.
    pub sequence: Option<u64>,
    /// Microseconds of the kernel's clock.
    pub time_us: Option<u64>,
    /// The text as it was printed.
    pub text: &'a [u8],
}

impl<'a> Message<'a> {
    const fn of_kernel(
        priority: u8,
        clock: Clock,
        host: &'a [u8],
        time_us: u64,
        sequence: u64,
    ) -> Self {
        let age = clock.kernel_us.saturating_sub(time_us);
        Self {
            priority,
            unix_us: clock.unix_us.saturating_sub(age),
            host,
            app: b"kernel",
            process: b"-",
            id: b"-",
            sequence: Some(sequence),
            time_us: Some(time_us),
            text: b"",
        }
    }

    /// Writes the message; returns its bytes. What does not fit is cut.
    #[must_use]
    pub fn write(&self, format: Format, buffer: &mut [u8]) -> usize {
        let mut line = Line::new(buffer);
        line.text(b"<");
        line.number(self.priority.into(), 1);
        line.text(b">");
        let date = Date::of(self.unix_us / MICROS);
        match format {
            Format::Rfc3164 => self.head_3164(&mut line, &date),
            Format::Rfc5424 => self.head_5424(&mut line, &date),
        }
        if let Some(time_us) = self.time_us {
            line.text(b"[");
            line.spaced(time_us / MICROS, 5);
            line.text(b".");
            line.number(time_us % MICROS, 6);
            line.text(b"] ");
        }
        line.escaped(self.text);
        line.used
    }

    fn head_3164(&self, line: &mut Line<'_>, date: &Date) {
        line.text(MONTHS.get(date.month).copied().unwrap_or_default());
        line.text(if date.day < 10 { b"  " } else { b" " });
        line.number(date.day, 1);
        line.text(b" ");
        line.clock(date);
        line.text(b" ");
        line.text(self.host);
        line.text(b" ");
        line.text(self.app);
        line.text(b": ");
    }

    fn head_5424(&self, line: &mut Line<'_>, date: &Date) {
        line.text(b"1 ");
        line.number(date.year, 4);
        line.text(b"-");
        line.number(u64::try_from(date.month).unwrap_or(0).saturating_add(1), 2);
        line.text(b"-");
        line.number(date.day, 2);
        line.text(b"T");
        line.clock(date);
        line.text(b".");
        line.number(self.unix_us % MICROS, 6);
        line.text(b"Z ");
        for field in [self.host, self.app, self.process, self.id] {
            line.text(field);
            line.text(b" ");
        }
        if self.sequence.is_none() && self.time_us.is_none() {
            return line.text(b"- ");
        }
        line.text(b"[meta");
        if let Some(sequence) = self.sequence {
            line.text(b" sequenceId=\"");
            line.number((sequence % SEQUENCE_ID_MAX).saturating_add(1), 1);
            line.text(b"\"");
        }
        if let Some(time_us) = self.time_us {
            line.text(b" sysUpTime=\"");
            line.number(time_us / 10_000, 1);
            line.text(b"\"");
        }
        line.text(b"] ");
    }
}

/// The smallest buffer that a whole record fits into if nothing in it is escaped.
pub const SYSLOG_BYTES: usize = HEADER_BYTES_MAX + TEXT_BYTES_MAX;

const MONTHS: [&[u8]; 12] = [
    b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec",
];

fn priority(head: &RecordHead) -> u8 {
    let facility = if head.facility > FACILITY_MAX {
        FACILITY_USER
    } else {
        head.facility
    };
    facility.wrapping_shl(3) | head.level.min(7)
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
