//! Kernel messages in the forms that the harness meets them in: `/dev/kmsg`, datagrams of
//! netconsole, `netdump log`. Written from the kernel's documentation, not from our server's code,
//! so that the two can disagree.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// A kernel message.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Message {
    /// Facility times eight plus level.
    pub prefix: u64,
    /// Its number in its boot.
    pub seq: u64,
    /// Microseconds of the kernel's clock.
    pub time_us: u64,
    /// As it was printed, without the LF at its end.
    pub text: Vec<u8>,
    /// Keys and values, escaped as the kernel does it.
    pub dictionary: BTreeMap<String, String>,
}

/// A datagram of extended netconsole: a message or a fragment of one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Datagram {
    /// The kernel's release, if it is told.
    pub release: Option<String>,
    head: Message,
    /// Where in the body this part begins, and the length of all, of a fragment.
    fragment: Option<(usize, usize)>,
    body: Vec<u8>,
}

/// All that is there of one message.
#[derive(Clone, Debug, Default)]
pub struct Assembly {
    head: Message,
    total: Option<usize>,
    pieces: BTreeMap<usize, Vec<u8>>,
}

/// A line of `netdump log --json`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Entry {
    /// "record" or the kind of a note.
    pub kind: String,
    /// Number of a record.
    #[serde(default)]
    pub sequence: Option<u64>,
    /// Its kernel time.
    #[serde(default)]
    pub time_us: Option<u64>,
    /// Its facility.
    #[serde(default)]
    pub facility: Option<u64>,
    /// Its level.
    #[serde(default)]
    pub level: Option<u64>,
    /// A note's numbers.
    #[serde(default)]
    pub numbers: Vec<u64>,
    /// Its text; bytes that are not UTF-8 are replaced.
    pub text: String,
    /// Its keys and values.
    #[serde(default)]
    pub dictionary: BTreeMap<String, String>,
}

impl Message {
    /// Reads what one read(2) of `/dev/kmsg` gave, or an extended datagram without its release.
    #[must_use]
    pub fn parse(record: &str) -> Option<Self> {
        let (header, body) = record.split_once(';')?;
        let mut message = Self::of_header(header)?;
        message.set_body(body.as_bytes());
        Some(message)
    }

    /// The text as `netdump log --json` shows it.
    #[must_use]
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.text).into_owned()
    }

    fn of_header(header: &str) -> Option<Self> {
        let mut numbers = header.split(',').map(str::parse::<u64>);
        let mut number = || numbers.next()?.ok();
        Some(Self {
            prefix: number()?,
            seq: number()?,
            time_us: number()?,
            ..Self::default()
        })
    }

    fn set_body(&mut self, body: &[u8]) {
        let mut lines = body.split(|byte| *byte == b'\n');
        self.text = unescaped(lines.next().unwrap_or_default());
        let entries = lines.filter_map(|line| {
            let line = String::from_utf8_lossy(line.strip_prefix(b" ")?).into_owned();
            let (key, value) = line.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        });
        self.dictionary = entries.collect();
    }
}

impl Datagram {
    /// Reads a datagram.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.iter().position(|byte| *byte == b';')?;
        let mut header = std::str::from_utf8(&bytes[..end]).ok()?;
        let mut release = None;
        if let Some((first, rest)) = header.split_once(',')
            && first.contains('.')
        {
            release = Some(first.to_owned());
            header = rest;
        }
        let fragment = header.split(',').find_map(|field| {
            let (offset, total) = field.strip_prefix("ncfrag=")?.split_once('/')?;
            Some((offset.parse().ok()?, total.parse().ok()?))
        });
        Some(Self {
            release,
            head: Message::of_header(header)?,
            fragment,
            body: bytes[end + 1..].to_vec(),
        })
    }

    /// Which message, and which part of it.
    #[must_use]
    pub fn place(&self) -> (u64, usize) {
        (self.head.seq, self.fragment.map_or(0, |(offset, _)| offset))
    }

    /// It is a part of a message.
    #[must_use]
    pub fn is_fragment(&self) -> bool {
        self.fragment.is_some()
    }
}

impl Assembly {
    /// Joins datagrams, whatever their order; messages by number.
    #[must_use]
    pub fn of(datagrams: &[Datagram]) -> BTreeMap<u64, Self> {
        let mut all = BTreeMap::<u64, Self>::new();
        for datagram in datagrams {
            let (seq, offset) = datagram.place();
            let assembly = all.entry(seq).or_default();
            assembly.head = datagram.head.clone();
            assembly.total = datagram.fragment.map(|(_, total)| total);
            assembly.pieces.insert(offset, datagram.body.clone());
        }
        all
    }

    /// Bytes of its body that are there, and of all of it.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        let have: usize = self.pieces.values().map(Vec::len).sum();
        (have as u64, self.total.unwrap_or(have) as u64)
    }

    /// The message, if all of it is there.
    #[must_use]
    pub fn message(&self) -> Option<Message> {
        let (have, all) = self.bytes();
        let mut message = self.head.clone();
        message.set_body(&self.pieces.values().flatten().copied().collect::<Vec<_>>());
        (have == all).then_some(message)
    }

    /// Fragments that it consists of.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }
}

impl Entry {
    /// Facility times eight plus level, if it is known.
    #[must_use]
    pub fn prefix(&self) -> Option<u64> {
        Some(self.facility? * 8 + self.level?)
    }
}

/// The kernel writes bytes that are not printable ASCII, and the backslash, as `\xHH`.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let escape = rest.strip_prefix(b"\\x").and_then(|rest| rest.get(..2));
        let digits = escape.and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        plain.push(code.unwrap_or(byte));
        rest = code.map_or(after, |_| &rest[4..]);
    }
    plain
}

/// The lines that a console shows of a message: the time before each.
#[must_use]
pub fn console_lines(message: &Message) -> Vec<(u64, Vec<u8>)> {
    let lines = message.text.split(|byte| *byte == b'\n');
    lines.map(|line| (message.time_us, line.to_vec())).collect()
}

/// Time and text of a line as a console shows it.
#[must_use]
pub fn of_console_line(line: &[u8]) -> Option<(u64, Vec<u8>)> {
    let end = line.iter().position(|byte| *byte == b']')?;
    let time = std::str::from_utf8(line.get(1..end)?).ok()?;
    let (seconds, micros) = time.trim_start().split_once('.')?;
    let time_us = seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?;
    let text = line.get(end + 1..)?;
    let text = text.strip_prefix(b" ").unwrap_or(text);
    (line.first() == Some(&b'[')).then(|| (time_us, text.to_vec()))
}

/// The numbers of each datagram that repeats one before it.
#[must_use]
pub fn repeats(datagrams: &[Datagram]) -> u64 {
    let mut seen = BTreeSet::new();
    let again = datagrams
        .iter()
        .filter(|datagram| !seen.insert(datagram.place()));
    again.count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_and_its_escapes_undone() {
        let message =
            Message::parse("30,7,5000001,-;a\\x0ab\\x5c \\xff\n SUBSYSTEM=net\n").unwrap();
        assert_eq!((message.prefix, message.seq), (30, 7));
        assert_eq!(message.text, b"a\nb\\ \xff");
        assert_eq!(message.dictionary["SUBSYSTEM"], "net");
        let lines = console_lines(&message);
        assert_eq!(lines[0], (5_000_001, b"a".to_vec()));
        assert_eq!(of_console_line(b"[    5.000001] a"), lines.first().cloned());
        assert_eq!(Message::parse("no record"), None);
        assert_eq!(of_console_line(b"no line"), None);
    }

    #[test]
    fn fragments_make_a_message_when_all_are_there() {
        let parts = [
            "6.12-x,6,9,1,-,ncfrag=3/9;d\n A=1",
            "6.12-x,6,9,1,-,ncfrag=0/9;abc",
        ];
        let parts = parts.map(|text| Datagram::parse(text.as_bytes()).unwrap());
        assert_eq!(parts[0].release.as_deref(), Some("6.12-x"));
        let all = Assembly::of(&parts);
        let message = all[&9].message().unwrap();
        assert_eq!((message.text, message.time_us), (b"abcd".to_vec(), 1));
        assert_eq!(message.dictionary["A"], "1");
        let some = Assembly::of(&parts[..1]);
        assert_eq!((some[&9].bytes(), some[&9].message()), ((6, 9), None));
        assert_eq!(repeats(&[&parts[..], &parts[..1]].concat()), 1);
    }
}
