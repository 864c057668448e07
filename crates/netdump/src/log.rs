//! `netdump log`: a host's log as people and programs want it. Reads the files; needs no server.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, BufRead as _, IsTerminal as _, Write as _, stdout};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::ptr;
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use netconsole::{Caller, Line, Note, Record, Stored, from_utc, utc};
use serde::Serialize;

use crate::console::inbox::now_us;
use crate::console::store::{Boot, CONSOLE_DIR, Part, parts};
use crate::key::HostName;

/// What is to be shown of which log.
#[derive(Debug, Clone)]
pub struct Request {
    /// The server's dump directory.
    pub dumpdir: PathBuf,
    /// The host.
    pub host: String,
    /// Go on with what comes.
    pub follow: bool,
    /// Only what was received since: an age (`90s`, `10m`, `2h`, `3d`) or a time in UTC.
    pub since: Option<String>,
    /// Only this boot: 0 the last one, -1 the one before, or a name.
    pub boot: Option<String>,
    /// Only records of this level or a graver one.
    pub level: Option<u8>,
    /// Only records with this text in them.
    pub grep: Option<String>,
    /// One JSON object a line.
    pub json: bool,
    /// Only the last so many lines of what there is; then what comes, if it is followed.
    pub lines: Option<usize>,
    /// Whether there are colours.
    pub color: Color,
}

/// When a log is coloured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always, as for `less -R`.
    Always,
    /// Never.
    Never,
}

impl Color {
    fn is_wanted(self, json: bool) -> bool {
        let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let wanted = match self {
            Self::Auto => stdout().is_terminal() && !forbidden,
            Self::Always => true,
            Self::Never => false,
        };
        wanted && !json
    }
}

/// Reads a level: its number, or its name as `dmesg` has it.
pub fn parse_level(text: &str) -> Result<u8> {
    let named = LEVELS.iter().position(|name| *name == text);
    let level = named.and_then(|level| u8::try_from(level).ok());
    let level = level.or_else(|| text.parse().ok().filter(|level| *level < 8));
    level.ok_or_else(|| anyhow!("a level is 0 to 7, or one of {}", LEVELS.join(", ")))
}

/// Shows a log on stdout, until its end or, if it is followed, until nobody reads any more.
pub fn run(request: &Request) -> Result<()> {
    let host = HostName::new(&request.host)?;
    let logs = request.dumpdir.join(CONSOLE_DIR);
    let dir = logs.join(host.as_str());
    let since_us = request
        .since
        .as_deref()
        .map_or(Ok(0), |since| parse_since(since, now_us()))?;
    let all = parts(&dir);
    ensure!(
        !all.is_empty(),
        "no log of {host} in {}; there are logs of {}",
        logs.display(),
        names(&logs)
    );
    let boot = request
        .boot
        .as_deref()
        .map(|boot| find_boot(boot, &all))
        .transpose()?;
    let mut reader = Reader {
        dir,
        boot,
        since_us,
        seen: HashMap::new(),
        view: View {
            request,
            since_us,
            color: request.color.is_wanted(request.json),
            out: String::new(),
        },
    };
    match reader.all() {
        Err(error) if is_broken_pipe(&error) => Ok(()),
        other => other,
    }
}

/// What has been read of each part of a log.
struct Reader<'a> {
    dir: PathBuf,
    boot: Option<Boot>,
    since_us: u64,
    seen: HashMap<(Boot, u32), Seen>,
    view: View<'a>,
}

/// How far a part has been read.
#[derive(Clone, Copy)]
struct Seen {
    /// Bytes of lines, which are not those of a packed file.
    bytes: u64,
    packed: bool,
}

impl Reader<'_> {
    /// Shows what there is and, if the log is followed, what comes.
    fn all(&mut self) -> Result<()> {
        if let Some(lines) = self.lines() {
            self.last(lines)?;
        }
        loop {
            while !self.look()? {}
            if !self.view.request.follow {
                return Ok(());
            }
            thread::sleep(FOLLOW_EVERY);
        }
    }

    /// How many lines to begin with, if not with all.
    fn lines(&self) -> Option<usize> {
        let Request {
            lines,
            follow,
            since,
            boot,
            ..
        } = self.view.request;
        let live = *follow && since.is_none() && boot.is_none();
        lines.or(live.then_some(FOLLOW_LINES))
    }

    /// Shows what is new in each part, the oldest first; `false` if one was packed or removed
    /// between listing and opening it, so that it is to be looked for again.
    fn look(&mut self) -> Result<bool> {
        for part in parts(&self.dir) {
            let Some(skip) = self.to_read(&part) else {
                continue;
            };
            let mut out = stdout().lock();
            let mut show = |text: &str| out.write_all(text.as_bytes());
            match self.view.part(&part, skip, &mut show) {
                Ok(bytes) => self.note(&part, bytes),
                Err(error) if is_not_found(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
            out.flush()?;
        }
        Ok(true)
    }

    /// Shows the last `lines` lines of all; reads no older parts than it takes.
    fn last(&mut self, lines: usize) -> Result<()> {
        let mut kept = VecDeque::new();
        for part in parts(&self.dir).iter().rev() {
            let skip = self.to_read(part).filter(|_| kept.len() < lines);
            let Some(skip) = skip else {
                self.note(part, part.bytes);
                continue;
            };
            let (mut of_part, most) = (VecDeque::new(), lines - kept.len());
            let mut keep = |text: &str| {
                of_part.extend(text.split_inclusive('\n').map(str::to_owned));
                of_part.drain(..of_part.len().saturating_sub(most));
                Ok(())
            };
            match self.view.part(part, skip, &mut keep) {
                Ok(bytes) => self.note(part, bytes),
                // Its lines are shown after those that are newer: late, but not lost.
                Err(error) if is_not_found(&error) => continue,
                Err(error) => return Err(error),
            }
            of_part.append(&mut kept);
            kept = of_part;
        }
        let mut out = stdout().lock();
        for line in kept {
            out.write_all(line.as_bytes())?;
        }
        Ok(out.flush()?)
    }

    /// From where on a part is to be read; nowhere, if there is nothing new in it or it is not asked for.
    fn to_read(&self, part: &Part) -> Option<u64> {
        if self.boot.is_some_and(|boot| part.boot != boot) {
            return None;
        }
        let Some(seen) = self.seen.get(&(part.boot, part.number)) else {
            let written_us = part.written_us().unwrap_or(u64::MAX);
            return (written_us >= self.since_us).then_some(0);
        };
        let grown = if part.packed {
            !seen.packed
        } else {
            part.bytes > seen.bytes
        };
        grown.then_some(seen.bytes)
    }

    fn note(&mut self, part: &Part, bytes: u64) {
        let packed = part.packed;
        let place = (part.boot, part.number);
        self.seen.insert(place, Seen { bytes, packed });
    }
}

fn is_not_found(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Hosts that have logs, for an error.
fn names(logs: &Path) -> String {
    let entries = std::fs::read_dir(logs).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .take(NAMES_MAX)
        .collect();
    names.sort();
    if names.is_empty() {
        "no host".to_owned()
    } else {
        names.join(", ")
    }
}

fn find_boot(wanted: &str, parts: &[Part]) -> Result<Boot> {
    let mut boots: Vec<Boot> = parts.iter().map(|part| part.boot).collect();
    boots.dedup();
    let by_name = boots.iter().find(|boot| boot.to_string() == wanted);
    let back = wanted.parse::<i64>().ok().filter(|back| *back <= 0);
    let by_number = back.and_then(|back| usize::try_from(-back).ok());
    let by_number = by_number.and_then(|back| boots.iter().rev().nth(back));
    by_name.or(by_number).copied().ok_or_else(|| {
        let names: Vec<String> = boots
            .iter()
            .rev()
            .map(Boot::to_string)
            .take(NAMES_MAX)
            .collect();
        anyhow!(
            "no boot {wanted}; there are 0 to -{}: {}",
            boots.len() - 1,
            names.join(", ")
        )
    })
}

fn parse_since(text: &str, now_us: u64) -> Result<u64> {
    let unit = text.chars().last().and_then(|unit| match unit {
        's' => Some(1),
        'm' => Some(60),
        'h' => Some(3600),
        'd' => Some(86_400),
        _ => None,
    });
    if let Some(seconds) = unit
        && let Ok(count) = text[..text.len() - 1].parse::<u64>()
    {
        return Ok(now_us.saturating_sub(count.saturating_mul(seconds * 1_000_000)));
    }
    // A day, or a time with or without its fraction.
    let whole = match text.len() {
        10 => format!("{text}T00:00:00.000000Z"),
        20 => format!("{}.000000Z", text.trim_end_matches('Z')),
        _ => text.to_owned(),
    };
    match from_utc(whole.as_bytes()) {
        Some(time) => Ok(time),
        None => bail!(
            "--since {text:?} is neither an age (90s, 10m, 2h, 3d) nor a time (2026-11-24T18:02:00Z)"
        ),
    }
}

struct View<'a> {
    request: &'a Request,
    since_us: u64,
    color: bool,
    out: String,
}

impl View<'_> {
    /// Gives a part's lines behind the first `skip` bytes to `show`; returns how far it went. A line
    /// that is being written is left for the next time.
    fn part(
        &mut self,
        part: &Part,
        skip: u64,
        show: &mut dyn FnMut(&str) -> io::Result<()>,
    ) -> Result<u64> {
        let mut lines = part.open(skip)?;
        let (mut at, mut line) = (skip, Vec::new());
        loop {
            line.clear();
            let length = lines.read_until(b'\n', &mut line)?;
            if line.pop() != Some(b'\n') {
                return Ok(at);
            }
            at += length as u64;
            if let Some(line) = Line::parse(&line) {
                self.out.clear();
                self.line(part, &line);
                show(&self.out)?;
            }
        }
    }

    fn line(&mut self, part: &Part, line: &Line<'_>) {
        if line.at_us < self.since_us {
            return;
        }
        let json = self.request.json;
        match &line.what {
            Stored::Record(record) => {
                let text = String::from_utf8_lossy(&record.text()).into_owned();
                let quiet = self
                    .request
                    .level
                    .is_some_and(|level| record.level() > Some(level));
                let other = self
                    .request
                    .grep
                    .as_ref()
                    .is_some_and(|grep| !text.contains(grep));
                if quiet || other {
                    return;
                }
                if json {
                    self.object(&Object::of_record(part, line.at_us, record, text));
                } else {
                    self.text(line.at_us, record, &text);
                }
            }
            Stored::Note(note, numbers, text) => {
                if self.request.grep.is_some() {
                    return;
                }
                let text = String::from_utf8_lossy(text).into_owned();
                if json {
                    self.object(&Object::of_note(part, line.at_us, *note, numbers, text));
                } else {
                    self.note(part, line.at_us, *note, &text);
                }
            }
        }
    }

    fn object(&mut self, object: &Object) {
        if let Ok(text) = serde_json::to_string(object) {
            self.out.push_str(&text);
            self.out.push('\n');
        }
    }

    fn text(&mut self, at_us: u64, record: &Record<'_>, text: &str) {
        let (dim, bright, plain) = self.colors(record.level());
        let head = match record.time_us {
            Some(time) => format!("[{:5}.{:06}] ", time / 1_000_000, time % 1_000_000),
            None => String::new(),
        };
        let local = local(at_us);
        for line in text.split('\n') {
            // Control characters of a foreign kernel are not for this terminal.
            let safe: String = line
                .chars()
                .map(|c| {
                    if c.is_control() && c != '\t' {
                        '\u{fffd}'
                    } else {
                        c
                    }
                })
                .collect();
            self.out.push_str(&format!(
                "{dim}{local} {head}{plain}{bright}{safe}{plain}\n"
            ));
        }
    }

    fn note(&mut self, part: &Part, at_us: u64, note: Note, text: &str) {
        let (on, off) = if self.color {
            ("\x1b[35m", "\x1b[0m")
        } else {
            ("", "")
        };
        let local = local(at_us);
        let boot = if note == Note::Boot {
            format!(" {}", part.boot)
        } else {
            String::new()
        };
        let text = text.replace("\trelease=-", "").replace('\t', ", ");
        self.out.push_str(&format!(
            "{on}{local} -- {}{boot}: {text} --{off}\n",
            note.name()
        ));
    }

    /// As `dmesg` does it: the time, then the text by its level, then as before.
    fn colors(&self, level: Option<u8>) -> (&'static str, &'static str, &'static str) {
        if !self.color {
            return ("", "", "");
        }
        let text = match level {
            Some(0..=2) => "\x1b[1;31m",
            Some(3) => "\x1b[31m",
            Some(4) => "\x1b[33m",
            Some(5) => "\x1b[1m",
            Some(7) => "\x1b[2m",
            Some(_) | None => "",
        };
        ("\x1b[32m", text, "\x1b[0m")
    }
}

/// A line for programs.
#[derive(Serialize)]
struct Object {
    received: String,
    boot: String,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    sequence: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    facility: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    level: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    caller: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    numbers: Vec<u64>,
    text: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    dictionary: BTreeMap<String, String>,
}

impl Object {
    fn new(part: &Part, at_us: u64, kind: &'static str, text: String) -> Self {
        let mut received = Vec::new();
        utc(&mut received, at_us);
        Self {
            received: String::from_utf8_lossy(&received).into_owned(),
            boot: part.boot.to_string(),
            kind,
            sequence: None,
            time_us: None,
            facility: None,
            level: None,
            caller: None,
            numbers: Vec::new(),
            text,
            dictionary: BTreeMap::new(),
        }
    }

    fn of_record(part: &Part, at_us: u64, record: &Record<'_>, text: String) -> Self {
        let entries = record.dictionary().filter_map(|entry| {
            let entry = String::from_utf8_lossy(entry);
            let (key, value) = entry.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        });
        Self {
            sequence: record.seq,
            time_us: record.time_us,
            facility: record.facility(),
            level: record.level(),
            caller: record.caller.map(|caller| match caller {
                Caller::Task(number) => format!("T{number}"),
                Caller::Cpu(number) => format!("C{number}"),
            }),
            dictionary: entries.collect(),
            ..Self::new(part, at_us, "record", text)
        }
    }

    fn of_note(part: &Part, at_us: u64, note: Note, numbers: &[Option<u64>], text: String) -> Self {
        Self {
            numbers: numbers.iter().copied().flatten().collect(),
            ..Self::new(part, at_us, note.name(), text)
        }
    }
}

/// `Nov 24 19:02:00.000001`, in this machine's time zone.
fn local(at_us: u64) -> String {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let seconds = i64::try_from(at_us / 1_000_000).unwrap_or(i64::MAX);
    let mut civil = MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both point to what the call expects; it writes only to the second.
    let result = unsafe { libc::localtime_r(ptr::from_ref(&seconds), civil.as_mut_ptr()) };
    // SAFETY: zeroed at first, which is a valid tm (integers and a null pointer), then written.
    let civil = unsafe { civil.assume_init() };
    let month = usize::try_from(civil.tm_mon)
        .ok()
        .and_then(|month| MONTHS.get(month));
    match month {
        Some(month) if !result.is_null() => format!(
            "{month} {:2} {:02}:{:02}:{:02}.{:06}",
            civil.tm_mday,
            civil.tm_hour,
            civil.tm_min,
            civil.tm_sec,
            at_us % 1_000_000
        ),
        _ => format!("{at_us} us"),
    }
}

const LEVELS: [&str; 8] = [
    "emerg", "alert", "crit", "err", "warn", "notice", "info", "debug",
];
/// What is shown of the past when a log is followed, unless told otherwise.
const FOLLOW_LINES: usize = 10;
const FOLLOW_EVERY: Duration = Duration::from_millis(100);
/// Names that an error lists.
const NAMES_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_an_age_or_a_time() {
        const SECOND: u64 = 1_000_000;
        let now = 1_795_543_320 * SECOND;
        let check =
            |text, expected| assert_eq!(parse_since(text, now).unwrap(), expected, "{text}");
        check("90s", now - 90 * SECOND);
        check("2h", now - 7200 * SECOND);
        check("2026-11-24T18:02:00Z", now);
        check("2026-11-24T18:02:00.000001Z", now + 1);
        check("2026-11-24", now - (18 * 3600 + 120) * SECOND);
        for text in ["", "yesterday", "-5m", "m", "2026-11-24T18:02"] {
            assert!(parse_since(text, now).is_err(), "{text}");
        }
    }

    #[test]
    fn levels_have_numbers_and_names() {
        for (text, expected) in [
            ("0", Some(0)),
            ("7", Some(7)),
            ("err", Some(3)),
            ("warn", Some(4)),
        ] {
            assert_eq!(parse_level(text).ok(), expected);
        }
        for text in ["8", "-1", "", "ERR"] {
            assert!(parse_level(text).is_err(), "{text}");
        }
    }

    #[test]
    fn boots_are_found_by_number_and_name() {
        let part = |at_us| Part {
            boot: Boot { at_us, id: None },
            number: 0,
            packed: false,
            bytes: 0,
            path: PathBuf::new(),
        };
        let parts = [part(1), part(1), part(5)];
        assert_eq!(find_boot("0", &parts).unwrap().at_us, 5);
        assert_eq!(find_boot("-1", &parts).unwrap().at_us, 1);
        assert_eq!(
            find_boot(&parts[0].boot.to_string(), &parts).unwrap().at_us,
            1
        );
        let error = find_boot("-2", &parts).unwrap_err().to_string();
        assert!(error.contains("0 to -1"), "{error}");
    }
}
