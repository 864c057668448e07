//! What everybody has of the guest's messages, held against each other.
//!
//! Three things are compared. What the guest sent must be what its own `/dev/kmsg` and its serial
//! console have. What the server keeps must be what arrived on its end of the wire, message by
//! message. And what did not arrive must be told in its log, by number, and in its counts.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use serde::Serialize;

use super::message::{Assembly, Datagram, Entry, Message, console_lines, of_console_line, repeats};
use super::syslog::{Line, escaped};
use super::{BEGIN, Cost, SYSDATA, Sender, USERDATA};
use crate::link::Passed;
use crate::readers::Complaints;
use crate::server::{Figures, HOST_NAME};

/// Everything that was seen of one run.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// `uname -r`.
    pub(super) kernel: String,
    /// What of netconsole was switched on in the guest.
    pub(super) features: Vec<String>,
    /// `/dev/kmsg`, read before the crash.
    pub(super) truth: Vec<Message>,
    /// The lines of the serial console from the crash on.
    pub(super) crash: Vec<String>,
    /// What went to the server.
    pub(super) server: Passed,
    /// What the server keeps.
    pub(super) log: Vec<Entry>,
    /// What it counted.
    pub(super) figures: Figures,
    /// What went to rsyslog, and what that wrote.
    pub(super) syslog: Option<(Passed, Vec<Line>)>,
    /// Something was to go wrong on the wire.
    pub(super) faults: bool,
    /// What it costs to print.
    pub(super) costs: Vec<Cost>,
}

/// How much was compared.
#[derive(Debug, Default, Serialize)]
pub struct Tally {
    /// Messages in the guest's `/dev/kmsg`.
    pub messages: u64,
    /// Of those, what is not plain: several lines, bytes that are not ASCII, a dictionary.
    pub multiline: u64,
    /// Bytes that are not printable ASCII.
    pub non_ascii: u64,
    /// A dictionary.
    pub dictionaries: u64,
    /// Levels among them.
    pub levels: u64,
    /// Lines of the serial console from the crash on.
    pub crash_lines: u64,
    /// Of those, what the guest did not send.
    pub crash_unsent: u64,
    /// Messages (lines, with basic netconsole) that the guest did not send.
    pub unsent: u64,
    /// Datagrams that the guest sent to the server.
    pub sent: u64,
    /// Datagrams that arrived there.
    pub arrived: u64,
    /// Of the sent ones, fragments.
    pub fragments: u64,
    /// Records in the server's log.
    pub stored: u64,
    /// Messages that did not arrive at all, up to the last that did.
    pub missing: u64,
    /// Of those, what the log names by number.
    pub named: u64,
    /// Messages of which fragments are missing, each named.
    pub parts: u64,
    /// Datagrams to rsyslog, those that arrived there, and lines that it wrote.
    pub syslog_sent: u64,
    /// Arrived.
    pub syslog_arrived: u64,
    /// Written.
    pub syslog_stored: u64,
}

/// Of so many messages one may stay unsent.
const UNSENT_SHARE: u64 = 100;

/// Lines and how often each is there.
type Bag = BTreeMap<(Option<u64>, String), u64>;

/// Compares all of it.
pub(super) fn judge(sender: Sender, evidence: &Evidence) -> (Tally, Complaints) {
    let (mut tally, mut found) = (variety(evidence), Vec::new());
    if tally.messages == 0 || tally.levels < 8 || tally.multiline * tally.non_ascii == 0 {
        found.push("the guest's messages are not as many and various as they should be".to_owned());
    }
    match sender {
        Sender::Basic => basic(evidence, &mut tally, &mut found),
        Sender::Extended => extended(evidence, &mut tally, &mut found),
        Sender::Module => module(evidence, &mut found),
    }
    // A few may be held back: sysrq changes the log level for a moment.
    if tally.unsent * UNSENT_SHARE > tally.messages {
        found.push(format!(
            "the guest sent {} of its messages not at all",
            tally.unsent
        ));
    }
    let figures = &evidence.figures;
    for (what, count) in [
        ("dropped by sockets", figures.socket_drops),
        ("dropped for want of memory", figures.inbox_drops),
        ("not written", figures.unwritten),
        ("called malformed", figures.malformed),
        ("more than one boots", figures.boots.saturating_sub(1)),
    ] {
        if count > 0 {
            found.push(format!(
                "{count} datagrams or records of the server are {what}"
            ));
        }
    }
    if figures.written != tally.stored {
        let (written, stored) = (figures.written, tally.stored);
        found.push(format!(
            "the server counts {written} records as written, its log has {stored}"
        ));
    }
    syslog(sender, evidence, &mut tally, &mut found);
    (tally, found)
}

fn variety(evidence: &Evidence) -> Tally {
    let truth = &evidence.truth;
    let count = |is: &dyn Fn(&&Message) -> bool| truth.iter().filter(is).count() as u64;
    let levels: BTreeSet<u64> = truth.iter().map(|message| message.prefix & 7).collect();
    let plain = |byte: &u8| byte.is_ascii_graphic() || matches!(byte, b' ' | b'\n');
    let records = evidence.log.iter().filter(|entry| entry.kind == "record");
    Tally {
        messages: count(&|_| true),
        multiline: count(&|message| message.text.contains(&b'\n')),
        non_ascii: count(&|message| !message.text.iter().all(plain)),
        dictionaries: count(&|message| !message.dictionary.is_empty()),
        levels: levels.len() as u64,
        crash_lines: evidence.crash.len() as u64,
        sent: evidence.server.sent.len() as u64,
        arrived: evidence.server.arrived.len() as u64,
        stored: records.count() as u64,
        ..Tally::default()
    }
}

/// In-tree netconsole, basic: lines without numbers.
fn basic(evidence: &Evidence, tally: &mut Tally, found: &mut Complaints) {
    let Passed { sent, arrived } = &evidence.server;
    let sent = bag(lines(&sent.concat()));
    let said = evidence
        .truth
        .iter()
        .skip_while(|message| message.text != BEGIN.as_bytes());
    let said = said.flat_map(console_lines);
    let said = bag(said.map(|(time_us, text)| (Some(time_us), lossy(&text))));
    tally.unsent = without(&said, &sent).values().sum();
    let texts: Vec<&str> = sent.keys().map(|(_, text)| text.as_str()).collect();
    tally.crash_unsent = unsent(&evidence.crash, &texts);
    let entries = evidence.log.iter().filter(|entry| entry.kind == "record");
    let stored = entries.map(|entry| (entry.time_us, entry.text.clone()));
    // A datagram that is no whole line is joined with the ones before and after it, which only a
    // wire without faults leaves in their places.
    let (whole, cut): (Vec<&Vec<u8>>, Vec<&Vec<u8>>) = arrived
        .iter()
        .partition(|datagram| datagram.starts_with(b"[") && datagram.ends_with(b"\n"));
    if evidence.faults {
        let expected = bag(whole.iter().flat_map(|datagram| lines(datagram)));
        let stored = bag(stored);
        complain(
            found,
            "lines arrived and are not in the log",
            &without(&expected, &stored),
        );
        let strange = without(&stored, &expected);
        if strange.values().sum::<u64>() > cut.len() as u64 {
            complain(found, "lines are in the log and did not arrive", &strange);
        }
    } else {
        let expected: Vec<_> = lines(&arrived.concat()).collect();
        let stored: Vec<_> = stored.collect();
        let differs = expected
            .iter()
            .zip(&stored)
            .find(|(one, other)| one != other);
        if expected.len() != stored.len() || differs.is_some() {
            found.push(format!(
                "{} lines arrived and {} are in the log; the first that differs: {differs:?}",
                expected.len(),
                stored.len()
            ));
        }
    }
    let arrived = arrived.len() as u64;
    if evidence.figures.datagrams != arrived {
        let taken = evidence.figures.datagrams;
        found.push(format!(
            "{arrived} datagrams arrived, the server counts {taken}"
        ));
    }
}

/// In-tree netconsole, extended: numbered messages, long ones in fragments.
fn extended(evidence: &Evidence, tally: &mut Tally, found: &mut Complaints) {
    let [sent, arrived] = [&evidence.server.sent, &evidence.server.arrived].map(|datagrams| {
        let parsed = datagrams.iter().filter_map(|bytes| Datagram::parse(bytes));
        parsed.collect::<Vec<Datagram>>()
    });
    let all = evidence.server.sent.len();
    if sent.len() != all {
        found.push(format!(
            "{} of {all} datagrams cannot be read",
            all - sent.len()
        ));
    }
    tally.fragments = sent
        .iter()
        .filter(|datagram| datagram.is_fragment())
        .count() as u64;
    if tally.fragments == 0 {
        found.push("no message was long enough for fragments".to_owned());
    }
    let released = evidence.features.iter().any(|feature| feature == "release");
    let release = released.then_some(evidence.kernel.as_str());
    let unnamed = sent
        .iter()
        .filter(|datagram| datagram.release.as_deref() != release);
    if unnamed.count() > 0 {
        found.push(format!(
            "not all datagrams say {release:?} as their release"
        ));
    }
    let (sent_ones, arrived_ones) = (Assembly::of(&sent), Assembly::of(&arrived));
    as_printed(evidence, &sent_ones, tally, found);
    as_arrived(&evidence.log, &arrived_ones, tally, found);
    told_missing(evidence, (&sent_ones, &arrived_ones), tally, found);
    let figures = &evidence.figures;
    for (what, counted, seen) in [
        ("datagrams", figures.datagrams, arrived.len() as u64),
        ("duplicates", figures.duplicates, repeats(&arrived)),
        ("incomplete messages", figures.incomplete, tally.parts),
    ] {
        if counted != seen {
            found.push(format!(
                "the server counts {counted} {what}, the wire {seen}"
            ));
        }
    }
}

/// What the guest sent is what it has in its own log.
fn as_printed(
    evidence: &Evidence,
    sent: &BTreeMap<u64, Assembly>,
    tally: &mut Tally,
    found: &mut Complaints,
) {
    let first = sent.keys().next().copied().unwrap_or(u64::MAX);
    let (mut other, mut compared) = (None, 0);
    for said in evidence.truth.iter().filter(|said| said.seq >= first) {
        let message = sent.get(&said.seq).and_then(Assembly::message);
        let Some(message) = message else {
            tally.unsent += 1;
            continue;
        };
        compared += 1;
        let mut expected = said.clone();
        expected.dictionary.extend(added(evidence, &message));
        if message != expected {
            other.get_or_insert((expected, message));
        }
    }
    if let Some((expected, message)) = other {
        found.push(format!(
            "the guest printed {expected:?} and sent {message:?}"
        ));
    }
    if compared == 0 {
        found.push("the guest sent none of its messages".to_owned());
    }
    let messages = sent.values().filter_map(Assembly::message);
    let texts: Vec<String> = messages.map(|message| message.shown()).collect();
    let texts: Vec<&str> = texts.iter().flat_map(|text| text.lines()).collect();
    tally.crash_unsent = unsent(&evidence.crash, &texts);
}

/// What netconsole adds to a message's dictionary, with the values that are known or, where only
/// the kernel knows them, those that it sent.
fn added(evidence: &Evidence, message: &Message) -> BTreeMap<String, String> {
    let has = |feature: &str| evidence.features.iter().any(|found| found == feature);
    let mut added = BTreeMap::new();
    if has("userdata") {
        let known = USERDATA
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone()));
        added.extend(known);
    }
    for (feature, key) in SYSDATA {
        if has(feature) {
            let sent = message.dictionary.get(key).cloned();
            let known = (key == "release").then(|| evidence.kernel.clone());
            added.insert(key.to_owned(), known.or(sent).unwrap_or_default());
        }
    }
    added
}

/// The log has what arrived, each message once, and a part as a part.
fn as_arrived(
    log: &[Entry],
    arrived: &BTreeMap<u64, Assembly>,
    tally: &mut Tally,
    found: &mut Complaints,
) {
    let mut stored = BTreeMap::new();
    for entry in log.iter().filter(|entry| entry.kind == "record") {
        let seq = entry.sequence.unwrap_or(u64::MAX);
        if !arrived.contains_key(&seq) {
            found.push(format!("the log has record {seq}, which did not arrive"));
        }
        if stored.insert(seq, entry).is_some() {
            found.push(format!("the log has record {seq} twice"));
        }
    }
    let parts = log.iter().filter(|entry| entry.kind == "part");
    let parts: BTreeSet<&[u64]> = parts.map(|entry| entry.numbers.as_slice()).collect();
    for (&seq, assembly) in arrived {
        let (have, total) = assembly.bytes();
        match (stored.get(&seq), assembly.message()) {
            (None, _) => found.push(format!("message {seq} arrived and is not in the log")),
            (Some(entry), Some(message)) => {
                if let Some(difference) = difference(entry, &message) {
                    found.push(difference);
                }
            }
            (Some(_), None) => {
                tally.parts += 1;
                if !parts.contains([seq, have, total].as_slice()) {
                    let which = format!("message {seq}, of which {have} of {total} bytes came");
                    found.push(format!("the log does not tell that of {which}"));
                }
            }
        }
    }
    if parts.len() as u64 != tally.parts {
        found.push(format!(
            "{} parts are told, {} arrived",
            parts.len(),
            tally.parts
        ));
    }
}

fn difference(entry: &Entry, message: &Message) -> Option<String> {
    let same = entry.prefix() == Some(message.prefix)
        && entry.sequence == Some(message.seq)
        && entry.time_us == Some(message.time_us)
        && entry.text == message.shown()
        && entry.dictionary == message.dictionary;
    (!same).then(|| format!("the log has {entry:?} instead of {message:?}"))
}

/// Every number that did not arrive is in a note of the log, and no other.
fn told_missing(
    evidence: &Evidence,
    (sent, arrived): (&BTreeMap<u64, Assembly>, &BTreeMap<u64, Assembly>),
    tally: &mut Tally,
    found: &mut Complaints,
) {
    let notes = evidence.log.iter();
    let notes = notes.filter(|entry| matches!(entry.kind.as_str(), "gap" | "lost"));
    let ranges = notes
        .clone()
        .filter_map(|entry| match *entry.numbers.as_slice() {
            [first, last, ..] => Some(first..=last),
            _ => None,
        });
    let told: Vec<RangeInclusive<u64>> = ranges.collect();
    let is_told = |seq: u64| told.iter().any(|range| range.contains(&seq));
    let (Some((&first, _)), Some((&last, _))) =
        (arrived.first_key_value(), arrived.last_key_value())
    else {
        return;
    };
    let missing: Vec<u64> = (first..=last)
        .filter(|seq| !arrived.contains_key(seq))
        .collect();
    tally.missing = missing.len() as u64;
    // A host that counts what it sends tells the server which numbers it never sent.
    let counts = evidence.features.iter().any(|feature| feature == "msgid");
    let silent: Vec<&u64> = missing
        .iter()
        .filter(|seq| !is_told(**seq) && (!counts || sent.contains_key(seq)))
        .collect();
    tally.named = missing.iter().filter(|seq| is_told(**seq)).count() as u64;
    if let Some(first) = silent.first() {
        let many = silent.len();
        found.push(format!(
            "{many} messages did not come and no note says so, first {first}"
        ));
    }
    let wrongly = arrived.keys().filter(|seq| is_told(**seq)).count() as u64;
    if wrongly > evidence.figures.late {
        found.push(format!("{wrongly} messages are told missing that came"));
    }
    if counts {
        let told = notes.filter_map(|entry| entry.numbers.get(2)).sum::<u64>();
        let lost = missing.iter().filter(|seq| sent.contains_key(seq)).count() as u64;
        if told != lost || evidence.figures.lost != lost {
            let counted = evidence.figures.lost;
            found.push(format!(
                "{lost} were sent and lost, notes say {told}, counts {counted}"
            ));
        }
    }
}

/// Our module: everything, whatever the wire does.
fn module(evidence: &Evidence, found: &mut Complaints) {
    let (mut stored, mut passed_over) = (BTreeMap::new(), Vec::new());
    for entry in &evidence.log {
        match entry.kind.as_str() {
            // A guest that is held up is not waited for; what it says later is written later.
            "gap" => passed_over.extend(entry.numbers.get(..2)),
            "record" => {
                let seq = entry.sequence.unwrap_or(u64::MAX);
                if stored.insert(seq, entry).is_some() {
                    found.push(format!("the log has record {seq} twice"));
                }
            }
            "boot" => {}
            _ => found.push(format!("the log is not whole: {}", entry.text)),
        }
    }
    for range in passed_over {
        let missing = (range[0]..=range[1]).filter(|seq| !stored.contains_key(seq));
        let missing = missing.count();
        if missing > 0 {
            found.push(format!("{missing} records of {range:?} never came"));
        }
    }
    for said in &evidence.truth {
        match stored.get(&said.seq) {
            None => found.push(format!("message {} is not in the log: {said:?}", said.seq)),
            Some(entry) => found.extend(difference(entry, said)),
        }
    }
    let texts = evidence.log.iter().flat_map(|entry| entry.text.lines());
    let missing = unsent(&evidence.crash, &texts.collect::<Vec<&str>>());
    if missing > 0 {
        found.push(format!("{missing} lines of the crash are not in the log"));
    }
}

/// What rsyslog made of the guest's messages.
fn syslog(sender: Sender, evidence: &Evidence, tally: &mut Tally, found: &mut Complaints) {
    let Some((Passed { sent, arrived }, lines)) = &evidence.syslog else {
        return;
    };
    tally.syslog_sent = sent.len() as u64;
    tally.syslog_arrived = arrived.len() as u64;
    tally.syslog_stored = lines.len() as u64;
    if lines.is_empty() {
        found.push("rsyslog wrote nothing".to_owned());
    }
    let raw = |text: &[u8]| (None, lossy(text));
    let came = bag(arrived.iter().map(|datagram| raw(&escaped(datagram))));
    let wrote = bag(lines.iter().map(|line| raw(&line.raw)));
    complain(
        found,
        "datagrams came to rsyslog and are not written",
        &without(&came, &wrote),
    );
    complain(
        found,
        "lines of rsyslog did not come",
        &without(&wrote, &came),
    );
    if sender == Sender::Module {
        let distinct: BTreeSet<&Vec<u8>> = arrived.iter().collect();
        let lost = sent.len().saturating_sub(distinct.len());
        as_understood(&evidence.truth, lines, lost, found);
    }
}

/// Each message is understood by rsyslog as what it is, but for those that were lost.
fn as_understood(truth: &[Message], lines: &[Line], lost: usize, found: &mut Complaints) {
    let by_sequence: BTreeMap<u64, &Line> = lines
        .iter()
        .filter_map(|line| Some((line.sequence()?, line)))
        .collect();
    let by_text: BTreeMap<&[u8], &Line> = lines
        .iter()
        .map(|line| (line.text.trim_ascii_start(), line))
        .collect();
    let mut absent = 0;
    for said in truth {
        let text = syslog_text(said);
        let line = match by_sequence.get(&said.seq) {
            None if by_sequence.is_empty() => by_text.get(text.as_slice()),
            line => line,
        };
        let Some(line) = line else {
            absent += 1;
            continue;
        };
        // Facilities above 23 are unknown to syslog, so they are users'.
        let prefix = if said.prefix >> 3 > 23 {
            8 + (said.prefix & 7)
        } else {
            said.prefix
        };
        let as_it_is = line.prefix == prefix
            && line.text.trim_ascii_start() == text
            && (line.host.as_slice(), line.program.as_slice()) == (HOST_NAME.as_bytes(), b"kernel");
        if !as_it_is {
            found.push(format!("rsyslog has {line:?} for {said:?}"));
        }
    }
    if absent > lost {
        found.push(format!(
            "rsyslog lacks {absent} messages, and {lost} datagrams were lost"
        ));
    }
}

/// A message as our module sends it and rsyslog writes it: control characters as the kernel escapes
/// them, but a TAB, which rsyslog escapes in its own way.
fn syslog_text(message: &Message) -> Vec<u8> {
    let (seconds, micros) = (message.time_us / 1_000_000, message.time_us % 1_000_000);
    let mut text = format!("[{seconds:5}.{micros:06}] ").into_bytes();
    for &byte in &message.text {
        match byte {
            b'\t' => text.extend_from_slice(b"#011"),
            _ if byte.is_ascii_control() => {
                text.extend_from_slice(format!("\\x{byte:02x}").as_bytes());
            }
            _ => text.push(byte),
        }
    }
    text
}

/// Lines of a crash that are not among `texts`.
fn unsent(crash: &[String], texts: &[&str]) -> u64 {
    let texts: BTreeSet<&str> = texts.iter().map(|text| text.trim_end()).collect();
    let missing = crash.iter().filter(|line| !texts.contains(line.as_str()));
    missing.count() as u64
}

/// Lines as basic netconsole sends them, with their times.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (Option<u64>, String)> {
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    lines.map(|line| {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        match of_console_line(line) {
            Some((time_us, text)) => (Some(time_us), lossy(&text)),
            None => (None, lossy(line)),
        }
    })
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

fn bag(lines: impl Iterator<Item = (Option<u64>, String)>) -> Bag {
    let mut bag = Bag::new();
    for line in lines {
        *bag.entry(line).or_default() += 1;
    }
    bag
}

/// What is oftener in `one` than in `other`, and by how much.
fn without(one: &Bag, other: &Bag) -> Bag {
    let rest = one.iter().map(|(line, count)| {
        let there = other.get(line).copied().unwrap_or(0);
        (line.clone(), count.saturating_sub(there))
    });
    rest.filter(|(_, count)| *count > 0).collect()
}

fn complain(found: &mut Complaints, what: &str, lines: &Bag) {
    if let Some((first, _)) = lines.first_key_value() {
        let many: u64 = lines.values().sum();
        found.push(format!("{many} {what}, first {first:?}"));
    }
}
