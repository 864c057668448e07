//! Bytes of any log to messages: lines, the records and fragments of extended netconsole, and
//! their order.
//!
//! A file of extended records is what a receiver wrote down as it came: fragments do not end in a
//! line feed, datagrams overtake each other and some are missing. A window of [`WINDOW`] records
//! puts them in order again.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::line::{Caller, Line, caller, glued};

/// Messages longer than this lose their end. The kernel's own limit is 1024 bytes, or 8192 with
/// the dictionary of an extended record.
pub(crate) const LINE_MAX: usize = 8192;

/// Extended records that wait for earlier ones.
const WINDOW: usize = 64;

/// A sequence number this much below the last one means that the host has booted again.
const BOOT_GAP: u64 = 4096;

/// A message, or the beginning of another boot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Event<'a> {
    Line(Line<'a>),
    /// The sequence numbers began anew.
    Boot,
}

/// Cuts bytes into messages.
#[derive(Debug, Default)]
pub(crate) struct Input {
    partial: Vec<u8>,
    /// True while the rest of an overlong line is thrown away.
    overlong: bool,
    records: Records,
}

impl Input {
    /// Takes the next bytes and gives what they complete to `sink`.
    pub(crate) fn push(&mut self, mut bytes: &[u8], sink: &mut dyn FnMut(Event<'_>)) {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            let (line, rest) = bytes.split_at(end);
            bytes = rest.get(1..).unwrap_or(&[]);
            if self.partial.is_empty() && !self.overlong {
                Self::line(&mut self.records, line, sink);
            } else {
                self.keep(line);
                let whole = std::mem::take(&mut self.partial);
                Self::line(&mut self.records, &whole, sink);
                self.overlong = false;
            }
        }
        self.keep(bytes);
    }

    /// Gives what is left to `sink`.
    pub(crate) fn finish(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        let whole = std::mem::take(&mut self.partial);
        if !whole.is_empty() {
            Self::line(&mut self.records, &whole, sink);
        }
        self.records.flush(sink);
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = LINE_MAX.saturating_sub(self.partial.len());
        self.overlong |= bytes.len() > room;
        self.partial
            .extend_from_slice(bytes.get(..room).unwrap_or(bytes));
    }

    fn line(records: &mut Records, bytes: &[u8], sink: &mut dyn FnMut(Event<'_>)) {
        let bytes = bytes.get(..LINE_MAX).unwrap_or(bytes);
        let text = String::from_utf8_lossy(bytes);
        let text = text.trim_matches(['\r', '\0']);
        if records.take(text, sink) {
            return;
        }
        let mut rest = text;
        while let Some((first, second)) = glued(rest).and_then(|at| rest.split_at_checked(at)) {
            let before = Line::parse(first);
            // A level or a log head alone is the rest's own.
            if !before.text.is_empty() {
                sink(Event::Line(before));
            }
            rest = second;
        }
        sink(Event::Line(Line::parse(rest)));
    }
}

/// Extended records that are not yet in order or whole.
#[derive(Debug, Default)]
struct Records {
    waiting: BTreeMap<u64, Record>,
    /// The last sequence number that was given on.
    last: Option<u64>,
    /// Whether the line before was an extended record: then lines with a space are its dictionary.
    inside: bool,
}

#[derive(Debug)]
struct Record {
    time: u64,
    caller: Option<Caller>,
    /// Offset and text of the pieces that came.
    pieces: BTreeMap<usize, String>,
}

impl Records {
    /// Takes a line that belongs to extended netconsole; false if it does not.
    fn take(&mut self, text: &str, sink: &mut dyn FnMut(Event<'_>)) -> bool {
        let mut rest = text;
        let mut any = false;
        while let Some(header) = Header::parse(rest) {
            any = true;
            let (body, after) = header.body(rest);
            self.insert(&header, body, sink);
            rest = after;
        }
        if any {
            self.inside = true;
            return true;
        }
        if self.inside && text.starts_with(' ') {
            return true;
        }
        self.inside = false;
        self.flush(sink);
        false
    }

    fn insert(&mut self, header: &Header, body: &str, sink: &mut dyn FnMut(Event<'_>)) {
        if self
            .last
            .is_some_and(|last| header.sequence.saturating_add(BOOT_GAP) < last)
        {
            self.flush(sink);
            self.last = None;
            sink(Event::Boot);
        }
        let record = self
            .waiting
            .entry(header.sequence)
            .or_insert_with(|| Record {
                time: header.time,
                caller: header.caller,
                pieces: BTreeMap::new(),
            });
        if record.pieces.len() < PIECES_MAX {
            record.pieces.insert(
                header.fragment.map_or(0, |(offset, _)| offset),
                body.to_owned(),
            );
        }
        if self.waiting.len() > WINDOW {
            self.give_first(sink);
        }
    }

    fn give_first(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        if let Some((sequence, record)) = self.waiting.pop_first() {
            self.last = Some(self.last.unwrap_or(0).max(sequence));
            record.give(sink);
        }
    }

    fn flush(&mut self, sink: &mut dyn FnMut(Event<'_>)) {
        while !self.waiting.is_empty() {
            self.give_first(sink);
        }
    }
}

/// 74 KiB is the most that a record can have; a piece is about 900 bytes.
const PIECES_MAX: usize = 96;

impl Record {
    /// The pieces up to the first hole: half a name is worse than none.
    fn text(&self) -> String {
        let mut text = String::new();
        let mut end = 0;
        for (offset, piece) in &self.pieces {
            if *offset > end {
                break;
            }
            // Lines of a dictionary may lie between this piece and the next.
            end = offset.saturating_add(piece.len()).saturating_add(1);
            text.push_str(piece);
        }
        text
    }

    fn give(&self, sink: &mut dyn FnMut(Event<'_>)) {
        let text = self.text();
        let text = unescaped(&text);
        for part in text.split('\n') {
            let mut line = Line::parse(part);
            line.time = line.time.or(Some(self.time));
            line.caller = line.caller.or(self.caller);
            sink(Event::Line(line));
        }
    }
}

/// `[release,]prefix,sequence,time,flag[,key=value...];`
struct Header {
    sequence: u64,
    time: u64,
    caller: Option<Caller>,
    /// Offset and total.
    fragment: Option<(usize, usize)>,
    length: usize,
}

/// The longest header that is looked for: a release and some keys.
const HEADER_MAX: usize = 256;

impl Header {
    fn parse(text: &str) -> Option<Self> {
        let first = *text.as_bytes().first()?;
        if !first.is_ascii_alphanumeric() {
            return None;
        }
        let head = text.as_bytes().get(..HEADER_MAX).unwrap_or(text.as_bytes());
        let length = memchr::memchr(b';', head)?;
        let head = text.get(..length)?;
        let mut fields = head.split(',');
        let mut prefix = fields.next()?;
        if prefix.contains('.') {
            prefix = fields.next()?;
        }
        let is_prefix =
            (1..=3).contains(&prefix.len()) && prefix.bytes().all(|b| b.is_ascii_digit());
        if !is_prefix {
            return None;
        }
        let sequence = number(fields.next()?)?;
        let time = number(fields.next()?)?;
        if !matches!(fields.next()?, "-" | "c" | "+") {
            return None;
        }
        let mut header = Self {
            sequence,
            time,
            caller: None,
            fragment: None,
            length: length + 1,
        };
        for field in fields {
            if let Some(value) = field.strip_prefix("caller=") {
                header.caller = caller(value);
            } else if let Some(value) = field.strip_prefix("ncfrag=") {
                let (offset, total) = value.split_once('/')?;
                header.fragment = Some((offset.parse().ok()?, total.parse().ok()?));
            }
        }
        Some(header)
    }

    /// The body that follows the header in `text`, and what follows the body.
    fn body<'a>(&self, text: &'a str) -> (&'a str, &'a str) {
        let body = text.get(self.length..).unwrap_or("");
        let Some((offset, total)) = self.fragment else {
            return (body, "");
        };
        let end = next_header(body)
            .unwrap_or(body.len())
            .min(total.saturating_sub(offset));
        body.split_at_checked(end).unwrap_or((body, ""))
    }
}

/// Where in the body of a fragment the next datagram begins. A fragment does not end in a line
/// feed, and the next one, which its length would lead to, may be lost.
fn next_header(body: &str) -> Option<usize> {
    let bytes = body.as_bytes();
    let mut before = b' ';
    for (at, byte) in bytes.iter().enumerate() {
        let begins = byte.is_ascii_digit() && !before.is_ascii_digit();
        before = *byte;
        if begins
            && body
                .get(at..)
                .is_some_and(|rest| Header::parse(rest).is_some())
        {
            return Some(at);
        }
    }
    None
}

fn number(text: &str) -> Option<u64> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())?
}

/// `\xHH` back to bytes.
fn unescaped(text: &str) -> Cow<'_, str> {
    if !text.contains("\\x") {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("\\x") {
        bytes.extend_from_slice(before.as_bytes());
        let byte = after
            .get(..2)
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        rest = if let Some(byte) = byte {
            bytes.push(byte);
            after.get(2..).unwrap_or("")
        } else {
            bytes.extend_from_slice(b"\\x");
            after
        };
    }
    bytes.extend_from_slice(rest.as_bytes());
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(log: &[u8]) -> Vec<String> {
        let mut all = Vec::new();
        let mut sink = |event: Event<'_>| match event {
            Event::Line(line) => all.push(line.text.to_owned()),
            Event::Boot => all.push("(boot)".to_owned()),
        };
        let mut input = Input::default();
        // Cut at an odd place, to see that it does not matter.
        let (first, second) = log.split_at(log.len() / 3);
        input.push(first, &mut sink);
        input.push(second, &mut sink);
        input.finish(&mut sink);
        all
    }

    #[test]
    fn records_come_in_order_without_their_dictionary() {
        let log = b"6,12,200,-,caller=T1;second\n SUBSYSTEM=usb\n4,11,100,-;first\\x09x\n";
        assert_eq!(texts(log), ["first\tx", "second"]);
        let log = b"6.1.0-1,4,11,100,-;first\n";
        assert_eq!(texts(log), ["first"]);
    }

    #[test]
    fn fragments_are_joined_with_and_without_line_feeds() {
        let glued = b"6,1,2,-,ncfrag=0/11;hello 6,1,2,-,ncfrag=6/11;world6,2,3,-;next\n";
        assert_eq!(texts(glued), ["hello world", "next"]);
        let lines = b"6,1,2,-,ncfrag=6/11;world\n6,1,2,-,ncfrag=0/11;hello \n";
        assert_eq!(texts(lines), ["hello world"]);
    }

    #[test]
    fn a_reboot_is_told() {
        let log = b"6,9000,2,-;old\n6,1,2,-;new\nplain\n6,2,2,-;newer\n";
        let mut far = Vec::new();
        for sequence in 9000..9100 {
            far.extend_from_slice(format!("6,{sequence},2,-;old\n").as_bytes());
        }
        far.extend_from_slice(b"6,1,2,-;new\n");
        let all = texts(&far);
        assert_eq!(
            all.get(100..),
            Some(&["(boot)".to_owned(), "new".to_owned()][..])
        );
        assert!(texts(log).contains(&"plain".to_owned()));
    }

    #[test]
    fn ordinary_lines_with_semicolons_stay() {
        assert_eq!(
            texts(b"3 eggs; milk\na,b,c,d;e\n"),
            ["3 eggs; milk", "a,b,c,d;e"]
        );
    }

    #[test]
    fn overlong_lines_are_cut_not_kept() {
        let mut log = vec![b'x'; 3 * LINE_MAX];
        log.extend_from_slice(b"\nBUG: y\n");
        let all = texts(&log);
        assert_eq!(all.len(), 2);
        assert_eq!(all.first().map(String::len), Some(LINE_MAX));
        assert_eq!(all.last().map(String::as_str), Some("BUG: y"));
    }
}
