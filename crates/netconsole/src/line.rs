//! A log's lines: one a record or note, as text that people can read, `grep` can search and
//! [`Line::parse`] can read back.
//!
//! ```text
//! line   = utc SP (record / note) LF
//! record = prefix "," seq "," time "," flag ["," "caller=" caller] ";" text *(TAB key "=" value)
//! note   = "!" kind *("," number) ";" text *(TAB key "=" value)
//! ```
//!
//! What is not known of a record is `-`. Text is escaped as the kernel does it: bytes that are not
//! printable ASCII, and the backslash, are `\xHH`; so LF and TAB occur as marks only.

use std::fmt::Arguments;
use std::io::Write as _;

use memchr::memchr;

use crate::datagram::Caller;
use crate::number;
use crate::time::{self, TIME_BYTES};

/// One kernel message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Facility times eight plus level; basic netconsole does not say it.
    pub prefix: Option<u16>,
    /// The record's number in its boot.
    pub seq: Option<u64>,
    /// Microseconds of the kernel's local clock.
    pub time_us: Option<u64>,
    /// `-`, or `c` or `+` for a part of a line.
    pub flag: u8,
    /// Who printed it.
    pub caller: Option<Caller>,
    /// Its text and dictionary.
    pub body: Body<'a>,
}

/// Text and dictionary of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body<'a> {
    /// As extended netconsole has them: escaped text, LF, lines of ` key=value`.
    Escaped(&'a [u8]),
    /// Text as it was printed, and a dictionary as [`Body::Escaped`] has it, of plain bytes.
    Plain(&'a [u8], &'a [u8]),
    /// As a log has them: escaped text, and each `key=value` behind a TAB.
    Stored(&'a [u8]),
}

/// What a log says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// A boot begins.
    Boot,
    /// Numbers: first and last record that were not seen.
    Gap,
    /// Numbers: first and last record that were not seen, and how many of them were sent.
    Lost,
    /// Numbers: record, bytes of it that arrived, bytes of all. It follows as far as it arrived.
    Part,
    /// A malformed datagram, escaped.
    Raw,
    /// Number: datagrams, of whatever host, that the server had no room for.
    Dropped,
    /// Number: datagrams of this host that were over its limit.
    Limited,
    /// The server was started again; what came in between was not received.
    Resumed,
}

/// A line of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line<'a> {
    /// When it was received, in microseconds since 1970.
    pub at_us: u64,
    /// What was received.
    pub what: Stored<'a>,
}

/// What a line holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored<'a> {
    /// A record, with a stored body.
    Record(Record<'a>),
    /// A note: its kind, its first three numbers and its text.
    Note(Note, [Option<u64>; 3], &'a [u8]),
}

/// Writes times; those of one second share their digits.
#[derive(Debug, Default)]
pub struct Stamp {
    second: Option<u64>,
    digits: Vec<u8>,
}

impl Stamp {
    /// Appends a time in microseconds since 1970.
    pub fn write(&mut self, out: &mut Vec<u8>, micros: u64) {
        let second = micros / 1_000_000;
        if self.second != Some(second) {
            self.digits.clear();
            time::seconds(&mut self.digits, second);
            self.digits.push(b'.');
            self.second = Some(second);
        }
        out.extend_from_slice(&self.digits);
        number::write_padded(out, micros % 1_000_000, 6);
        out.push(b'Z');
    }
}

/// Appends a record's line.
pub fn write_record(out: &mut Vec<u8>, stamp: &mut Stamp, at_us: u64, record: &Record<'_>) {
    stamp.write(out, at_us);
    out.push(b' ');
    for value in [record.prefix.map(u64::from), record.seq, record.time_us] {
        match value {
            Some(value) => number::write(out, value),
            None => out.push(b'-'),
        }
        out.push(b',');
    }
    out.push(record.flag);
    if let Some(caller) = record.caller {
        out.extend_from_slice(b",caller=");
        caller.write(out);
    }
    out.push(b';');
    match record.body {
        Body::Escaped(body) => write_escaped(out, body),
        Body::Plain(text, dictionary) => {
            escape(out, text, true);
            for entry in dictionary.split(|&byte| byte == b'\n') {
                if !entry.is_empty() {
                    out.push(b'\t');
                    escape(out, entry.strip_prefix(b" ").unwrap_or(entry), true);
                }
            }
        }
        Body::Stored(body) => out.extend_from_slice(body),
    }
    out.push(b'\n');
}

/// Appends a note's line.
pub fn write_note(
    out: &mut Vec<u8>,
    stamp: &mut Stamp,
    at_us: u64,
    (note, numbers): (Note, &[u64]),
    text: Arguments<'_>,
) {
    stamp.write(out, at_us);
    out.extend_from_slice(b" !");
    out.extend_from_slice(note.name().as_bytes());
    for &number in numbers {
        out.push(b',');
        number::write(out, number);
    }
    out.push(b';');
    let begin = out.len();
    // Writing to memory does not fail.
    drop(out.write_fmt(text));
    debug_assert!(!out[begin..].contains(&b'\n'), "a note is one line");
    out.push(b'\n');
}

/// Appends `bytes` so that they are a log's text.
pub(crate) fn escape(out: &mut Vec<u8>, bytes: &[u8], backslash: bool) {
    let plain = |byte: &u8| (0x20..0x7f).contains(byte) && !(backslash && *byte == b'\\');
    let mut rest = bytes;
    while !rest.is_empty() {
        let clean = rest
            .iter()
            .position(|byte| !plain(byte))
            .unwrap_or(rest.len());
        let (good, others) = rest.split_at(clean);
        out.extend_from_slice(good);
        let Some((&bad, others)) = others.split_first() else {
            return;
        };
        out.extend_from_slice(&[b'\\', b'x', hex(bad >> 4), hex(bad & 15)]);
        rest = others;
    }
}

/// Appends `bytes` as they were before they were escaped.
pub(crate) fn unescape(out: &mut Vec<u8>, bytes: &[u8]) {
    let mut rest = bytes;
    while let Some(at) = memchr(b'\\', rest) {
        out.extend_from_slice(&rest[..at]);
        let digits = rest.get(at + 1..at + 4).and_then(|code| match *code {
            [b'x', high, low] => Some((digit(high)? << 4) | digit(low)?),
            _ => None,
        });
        match digits {
            Some(byte) => {
                out.push(byte);
                rest = &rest[at + 4..];
            }
            None => {
                out.push(b'\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.extend_from_slice(rest);
}

fn hex(value: u8) -> u8 {
    b"0123456789abcdef"[usize::from(value & 15)]
}

fn digit(hex: u8) -> Option<u8> {
    let value = char::from(hex).to_digit(16)?;
    u8::try_from(value).ok()
}

/// Text and dictionary of a body that a kernel has escaped. One that does not keep to the grammar
/// loses nothing: its line breaks are escaped.
fn write_escaped(out: &mut Vec<u8>, body: &[u8]) {
    let mut rest = body;
    loop {
        let end = memchr(b'\n', rest).unwrap_or(rest.len());
        escape(out, &rest[..end], false);
        match rest.get(end + 1..) {
            None | Some([]) => return,
            Some([b' ', more @ ..]) => {
                out.push(b'\t');
                rest = more;
            }
            Some(more) => {
                out.extend_from_slice(b"\\x0a");
                rest = more;
            }
        }
    }
}

impl<'a> Line<'a> {
    /// Reads a line, without its LF. `None` for what is no line, as after a disk has lost its end.
    #[must_use]
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let (time, rest) = line.split_at_checked(TIME_BYTES)?;
        let at_us = time::from_utc(time)?;
        let rest = rest.strip_prefix(b" ")?;
        let (header, text) = rest.split_at(memchr(b';', rest)?);
        let text = text.get(1..)?;
        let what = match header.strip_prefix(b"!") {
            Some(note) => note_of(note, text)?,
            None => Stored::Record(record_of(header, text)?),
        };
        Some(Self { at_us, what })
    }
}

fn note_of<'a>(header: &[u8], text: &'a [u8]) -> Option<Stored<'a>> {
    let mut fields = header.split(|&byte| byte == b',');
    let name = fields.next()?;
    let note = Note::ALL
        .into_iter()
        .find(|note| note.name().as_bytes() == name)?;
    let mut number = || fields.next().and_then(number::parse);
    Some(Stored::Note(note, [number(), number(), number()], text))
}

fn record_of<'a>(header: &[u8], text: &'a [u8]) -> Option<Record<'a>> {
    let mut fields = header.split(|&byte| byte == b',');
    let mut number = || match fields.next()? {
        b"-" => Some(None),
        digits => number::parse(digits).map(Some),
    };
    let (prefix, seq, time_us) = (number()?, number()?, number()?);
    let &[flag] = fields.next()? else {
        return None;
    };
    let caller = fields
        .next()
        .and_then(|field| field.strip_prefix(b"caller="));
    Some(Record {
        prefix: prefix.and_then(|prefix| u16::try_from(prefix).ok()),
        seq,
        time_us,
        flag,
        caller: caller.and_then(Caller::parse),
        body: Body::Stored(text),
    })
}

impl<'a> Record<'a> {
    /// Severity, 0 (emergency) to 7 (debug).
    #[must_use]
    pub fn level(&self) -> Option<u8> {
        self.prefix.and_then(|prefix| u8::try_from(prefix & 7).ok())
    }

    /// Facility, 0 for the kernel itself.
    #[must_use]
    pub fn facility(&self) -> Option<u8> {
        self.prefix
            .and_then(|prefix| u8::try_from(prefix >> 3).ok())
    }

    /// The text of a stored record, as it was printed.
    #[must_use]
    pub fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        match self.body {
            Body::Stored(body) => {
                let end = memchr(b'\t', body).unwrap_or(body.len());
                unescape(&mut text, &body[..end]);
            }
            Body::Escaped(body) => {
                let end = memchr(b'\n', body).unwrap_or(body.len());
                unescape(&mut text, &body[..end]);
            }
            Body::Plain(plain, _) => text.extend_from_slice(plain),
        }
        text
    }

    /// The `key=value` entries of a stored record's dictionary, still escaped.
    pub fn dictionary(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let body = match self.body {
            Body::Stored(body) => body,
            Body::Escaped(_) | Body::Plain(..) => &[],
        };
        body.split(|&byte| byte == b'\t').skip(1)
    }
}

impl Note {
    const ALL: [Self; 8] = [
        Self::Boot,
        Self::Gap,
        Self::Lost,
        Self::Part,
        Self::Raw,
        Self::Dropped,
        Self::Limited,
        Self::Resumed,
    ];

    /// Its name in the log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Gap => "gap",
            Self::Lost => "lost",
            Self::Part => "part",
            Self::Raw => "raw",
            Self::Dropped => "dropped",
            Self::Limited => "limited",
            Self::Resumed => "resumed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 1_795_543_320_000_001;

    fn line(record: &Record<'_>) -> String {
        let mut out = Vec::new();
        write_record(&mut out, &mut Stamp::default(), AT, record);
        String::from_utf8(out).unwrap()
    }

    fn record(body: Body<'_>) -> Record<'_> {
        Record {
            prefix: Some(30),
            seq: Some(7),
            time_us: Some(5),
            flag: b'-',
            caller: Some(Caller::Cpu(2)),
            body,
        }
    }

    #[test]
    fn a_record_is_one_line_and_reads_back() {
        let body = b"a\\x09b \\x5c\n SUBSYSTEM=net\n DEVICE=n1\n";
        let text = line(&record(Body::Escaped(body)));
        assert_eq!(
            text,
            "2026-11-24T18:02:00.000001Z 30,7,5,-,caller=C2;a\\x09b \\x5c\tSUBSYSTEM=net\tDEVICE=n1\n"
        );
        let back = Line::parse(text.trim_end().as_bytes()).unwrap();
        let Stored::Record(found) = back.what else {
            panic!("{back:?}");
        };
        assert_eq!((back.at_us, found.level()), (AT, Some(6)));
        assert_eq!(found.text(), b"a\tb \\");
        let entries: Vec<&[u8]> = found.dictionary().collect();
        assert_eq!(entries, [&b"SUBSYSTEM=net"[..], b"DEVICE=n1"]);
        assert_eq!(
            line(&found),
            text,
            "a stored record is written as it was read"
        );
    }

    #[test]
    fn every_facility_is_kept() {
        let record = Record {
            prefix: Some(2047),
            ..record(Body::Escaped(b"x\n"))
        };
        let text = line(&record);
        let Some(Stored::Record(found)) =
            Line::parse(text.trim_end().as_bytes()).map(|line| line.what)
        else {
            panic!("{text}");
        };
        assert_eq!((found.facility(), found.level()), (Some(255), Some(7)));
    }

    #[test]
    fn plain_text_keeps_every_byte() {
        let text: Vec<u8> = (0..=255).collect();
        let written = line(&record(Body::Plain(&text, b" A=\x01\n")));
        assert_eq!(written.matches('\n').count(), 1);
        let back = Line::parse(written.trim_end_matches('\n').as_bytes()).unwrap();
        let Stored::Record(found) = back.what else {
            panic!("{back:?}");
        };
        assert_eq!(found.text(), text);
        assert_eq!(found.dictionary().next(), Some(&b"A=\\x01"[..]));
    }

    #[test]
    fn bodies_outside_of_the_grammar_stay_on_their_line() {
        let text = line(&record(Body::Escaped(b"a\nb\n\n c=\xff\n")));
        assert!(text.ends_with(";a\\x0ab\\x0a\tc=\\xff\n"), "{text}");
    }

    #[test]
    fn notes_read_back() {
        let mut out = Vec::new();
        let numbers = (Note::Gap, &[5, 7][..]);
        write_note(
            &mut out,
            &mut Stamp::default(),
            AT,
            numbers,
            format_args!("three"),
        );
        assert_eq!(out, b"2026-11-24T18:02:00.000001Z !gap,5,7;three\n");
        let back = Line::parse(&out[..out.len() - 1]).unwrap();
        let expected = Stored::Note(Note::Gap, [Some(5), Some(7), None], b"three");
        assert_eq!(back.what, expected);
    }

    #[test]
    fn torn_lines_are_none() {
        for text in [
            "",
            "2026-11-24T18:02:00.000001Z",
            "2026-11-24T18:02:00.000001Z 6,1,2",
        ] {
            assert_eq!(Line::parse(text.as_bytes()), None, "{text}");
        }
    }
}
