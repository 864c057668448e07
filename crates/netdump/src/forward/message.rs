//! Messages as targets want them: a log's line as syslog, or as a JSON object of OpenTelemetry.

use std::sync::OnceLock;

use netconsole::{Line, Note, Record, Stored};
use proto::console::Message;
use serde::Serialize;

use super::settings::{Settings, Way};
use crate::console::store::Boot;

/// Bytes of a message; RFC 5425 asks receivers for so many. What is longer is cut.
pub(super) const MESSAGE_BYTES_MAX: usize = 8192;
/// Bytes of text that a collector gets of one record.
const BODY_BYTES_MAX: usize = 16 << 10;
/// The facility of users' programs, and the last priority that syslog knows.
const FACILITY_USER: u8 = 1;
const PRIORITY_MAX: u8 = 23 * 8 + 7;
/// What basic netconsole does not say: a kernel's message of information.
const PRIORITY_UNKNOWN: u8 = 6;
/// The syslog system itself, a warning: what we say of losses.
const PRIORITY_LOSS: u8 = 5 * 8 + 4;
/// A system daemon, critical: what we say of crashes.
pub(super) const PRIORITY_CRASH: u8 = 3 * 8 + 2;
/// OpenTelemetry's number of each level, by the appendix of its data model.
const SEVERITIES: [u8; 8] = [21, 19, 18, 17, 13, 10, 9, 5];
const LEVELS: [&str; 8] = [
    "emerg", "alert", "crit", "err", "warning", "notice", "info", "debug",
];

/// Something that is told to targets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// The host that it is about.
    pub(super) host: String,
    /// When, in microseconds since 1970.
    pub(super) at_us: u64,
    /// Facility times eight plus level.
    pub(super) priority: u8,
    /// The kernel said it, not we.
    pub(super) kernel: bool,
    /// The kind of what we say.
    pub(super) kind: &'static str,
    /// The thread or CPU that said it.
    pub(super) caller: Option<String>,
    /// The boot, as its log is named.
    pub(super) boot: Option<Boot>,
    pub(super) sequence: Option<u64>,
    pub(super) time_us: Option<u64>,
    pub(super) text: Vec<u8>,
    /// What else is known, for a collector.
    pub(super) attributes: Vec<(String, String)>,
}

/// What became of something that was to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// A message was made.
    Whole,
    /// A message was made without the end of its text.
    Cut,
}

impl Said {
    /// What a line of a log says, if it is to be told: a record, or a note of a loss. A gap is no
    /// loss; kernels give numbers to what they hold back, too.
    pub(super) fn of(host: &str, boot: Option<Boot>, line: &Line<'_>) -> Option<Self> {
        let said = Self {
            host: host.to_owned(),
            at_us: line.at_us,
            boot,
            ..Self::default()
        };
        match &line.what {
            Stored::Record(record) => Some(said.record(record)),
            Stored::Note(
                note @ (Note::Lost | Note::Part | Note::Raw | Note::Dropped | Note::Limited),
                _,
                text,
            ) => Some(Self {
                priority: PRIORITY_LOSS,
                kind: note.name(),
                text: text.to_vec(),
                ..said
            }),
            Stored::Note(Note::Boot | Note::Gap | Note::Resumed, ..) => None,
        }
    }

    fn record(self, record: &Record<'_>) -> Self {
        let entries = record.dictionary().filter_map(|entry| {
            let entry = String::from_utf8_lossy(entry);
            let (key, value) = entry.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        });
        Self {
            priority: record.prefix.map_or(PRIORITY_UNKNOWN, priority),
            kernel: true,
            caller: record.caller.map(|caller| {
                let mut text = Vec::new();
                caller.write(&mut text);
                String::from_utf8_lossy(&text).into_owned()
            }),
            sequence: record.seq,
            time_us: record.time_us,
            text: record.text(),
            attributes: entries.collect(),
            ..self
        }
    }

    /// What we say of messages that this target will never get.
    pub(super) fn loss(count: u64, why: &str) -> Self {
        Self {
            host: own_name().to_owned(),
            at_us: crate::console::inbox::now_us(),
            priority: PRIORITY_LOSS,
            kind: "dropped",
            text: format!("{count} messages were not forwarded: {why}").into_bytes(),
            ..Self::default()
        }
    }

    /// It is a syslog message that somebody sent to the port of kernels' messages, as a relay would
    /// that our own messages go to. It must not go round.
    pub(super) fn came_from_syslog(&self) -> bool {
        let digits = self.text.iter().skip(1).take_while(|b| b.is_ascii_digit());
        let digits = digits.count();
        self.kernel
            && self.sequence.is_none()
            && self.text.first() == Some(&b'<')
            && (1..=3).contains(&digits)
            && self.text.get(digits + 1) == Some(&b'>')
    }

    /// Severity, 0 to 7.
    pub(super) fn level(&self) -> u8 {
        self.priority & 7
    }

    /// Appends it as one line.
    pub(super) fn write(&self, settings: &Settings, out: &mut Vec<u8>) -> Told {
        match settings.to.way {
            Way::Udp | Way::Tcp | Way::Tls => self.write_syslog(settings, out),
            Way::Http | Way::Https => self.write_object(out),
        }
    }

    fn write_syslog(&self, settings: &Settings, out: &mut Vec<u8>) -> Told {
        let message = Message {
            priority: self.priority,
            unix_us: self.at_us,
            host: self.host.as_bytes(),
            app: if self.kernel { b"kernel" } else { b"netdump" },
            process: self.caller.as_deref().unwrap_or("-").as_bytes(),
            id: if self.kernel {
                b"-"
            } else {
                self.kind.as_bytes()
            },
            sequence: self.sequence,
            time_us: self.time_us,
            text: &self.text,
        };
        let begin = out.len();
        // A byte more than is sent, so that what is cut shows.
        out.resize(begin + MESSAGE_BYTES_MAX + 1, 0);
        let used = message.write(settings.format, &mut out[begin..]);
        out.truncate(begin + used.min(MESSAGE_BYTES_MAX));
        out.push(b'\n');
        if used > MESSAGE_BYTES_MAX {
            Told::Cut
        } else {
            Told::Whole
        }
    }

    fn write_object(&self, out: &mut Vec<u8>) -> Told {
        let text = &self.text[..self.text.len().min(BODY_BYTES_MAX)];
        let mut attributes: Vec<Attribute> = Vec::new();
        let mut tell = |key: &str, value: String| {
            attributes.push(Attribute {
                key: key.to_owned(),
                value: Value {
                    string_value: value,
                },
            });
        };
        tell("syslog.facility", (self.priority >> 3).to_string());
        if let (Some(boot), Some(sequence)) = (self.boot, self.sequence) {
            tell("log.record.uid", format!("{boot}:{sequence}"));
        }
        let more = [
            (
                "linux.kernel.sequence",
                self.sequence.map(|n| n.to_string()),
            ),
            ("linux.kernel.time_us", self.time_us.map(|n| n.to_string())),
            ("linux.kernel.caller", self.caller.clone()),
        ];
        for (key, value) in more {
            if let Some(value) = value {
                tell(key, value);
            }
        }
        for (key, value) in &self.attributes {
            tell(key, value.clone());
        }
        let nanos = self.at_us.saturating_mul(1000).to_string();
        let object = ResourceLogs::new(
            &self.host,
            LogRecord {
                time_unix_nano: nanos.clone(),
                observed_time_unix_nano: nanos,
                severity_number: SEVERITIES[usize::from(self.level())],
                severity_text: LEVELS[usize::from(self.level())],
                event_name: (!self.kernel).then(|| format!("netdump.{}", self.kind)),
                body: Value {
                    string_value: String::from_utf8_lossy(text).into_owned(),
                },
                attributes,
            },
        );
        // Writing to memory does not fail, and these objects have only texts for keys.
        drop(serde_json::to_writer(&mut *out, &object));
        out.push(b'\n');
        if text.len() < self.text.len() {
            Told::Cut
        } else {
            Told::Whole
        }
    }
}

/// A record's prefix as syslog has it: of facilities that only the kernel knows it makes users'.
fn priority(prefix: u16) -> u8 {
    let level = u8::try_from(prefix & 7).unwrap_or(0);
    let known = u8::try_from(prefix)
        .ok()
        .filter(|priority| *priority <= PRIORITY_MAX);
    known.unwrap_or(FACILITY_USER * 8 + level)
}

/// What this machine calls itself.
fn own_name() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| {
        let name = rustix::system::uname();
        name.nodename().to_string_lossy().into_owned()
    })
}

/// A record with the host that it is of, in OTLP's JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ResourceLogs {
    resource: Resource,
    scope_logs: [ScopeLogs; 1],
}

#[derive(Serialize)]
struct Resource {
    attributes: [Attribute; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ScopeLogs {
    scope: Scope,
    log_records: [LogRecord; 1],
}

#[derive(Serialize)]
struct Scope {
    name: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LogRecord {
    time_unix_nano: String,
    observed_time_unix_nano: String,
    severity_number: u8,
    severity_text: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_name: Option<String>,
    body: Value,
    attributes: Vec<Attribute>,
}

#[derive(Serialize)]
struct Attribute {
    key: String,
    value: Value,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Value {
    string_value: String,
}

impl ResourceLogs {
    fn new(host: &str, record: LogRecord) -> Self {
        Self {
            resource: Resource {
                attributes: [Attribute {
                    key: "host.name".to_owned(),
                    value: Value {
                        string_value: host.to_owned(),
                    },
                }],
            },
            scope_logs: [ScopeLogs {
                scope: Scope { name: "netdump" },
                log_records: [record],
            }],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &[u8] =
        b"2026-11-24T18:02:00.000001Z 4,7,12345678,-,caller=T9;a\\x0ab\tSUBSYSTEM=net";

    fn settings(to: &str) -> Settings {
        let text = format!("name = 'a'\nto = '{to}'\n");
        toml::from_str(&text).unwrap()
    }

    fn written(line: &[u8], to: &str) -> (String, Told) {
        let line = Line::parse(line).unwrap();
        let said = Said::of("web1", Boot::parse("20261124T180100.000000Z"), &line).unwrap();
        let mut out = Vec::new();
        let told = said.write(&settings(to), &mut out);
        (String::from_utf8(out).unwrap(), told)
    }

    #[test]
    fn facilities_that_syslog_does_not_know_are_users() {
        assert_eq!([0, 30, 191].map(priority), [0, 30, 191]);
        assert_eq!([192, 255, 2042].map(priority), [8, 15, 10]);
    }

    #[test]
    fn a_record_is_a_line_of_syslog_or_an_object() {
        let (text, told) = written(RECORD, "tcp://a");
        assert_eq!(told, Told::Whole);
        assert_eq!(
            text,
            "<4>1 2026-11-24T18:02:00.000001Z web1 kernel T9 - [meta sequenceId=\"8\" \
             sysUpTime=\"1234\"] [   12.345678] a\\x0ab\n"
        );
        let (text, _) = written(RECORD, "http://a");
        let object: serde_json::Value = serde_json::from_str(&text).unwrap();
        let record = &object["scopeLogs"][0]["logRecords"][0];
        assert_eq!(record["severityNumber"], 13);
        assert_eq!(record["body"]["stringValue"], "a\nb");
        assert_eq!(record["timeUnixNano"], "1795543320000001000");
        let keys: Vec<&str> = record["attributes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|attribute| attribute["key"].as_str().unwrap())
            .collect();
        assert_eq!(keys.last(), Some(&"SUBSYSTEM"));
        assert!(keys.contains(&"log.record.uid"), "{keys:?}");
    }

    #[test]
    fn long_texts_are_cut_and_that_is_told() {
        let mut line = RECORD.to_vec();
        line.extend(vec![b'x'; BODY_BYTES_MAX]);
        line.retain(|&byte| byte != b'\t');
        for (to, length) in [("udp://a", MESSAGE_BYTES_MAX + 1), ("http://a", 16_384)] {
            let (text, told) = written(&line, to);
            assert_eq!(told, Told::Cut);
            assert!(text.len() >= length && text.ends_with('\n'), "{to}");
        }
    }

    #[test]
    fn losses_are_told_and_gaps_are_not() {
        let of = |text: &str| {
            let line = format!("2026-11-24T18:02:00.000001Z {text}");
            Said::of("web1", None, &Line::parse(line.as_bytes()).unwrap())
        };
        assert_eq!(of("!lost,5,6,2;two").unwrap().kind, "lost");
        assert_eq!(of("!gap,5,6;two"), None);
        let relayed = of("-,-,-,-;<46>1 2026-11-24T18:02:00Z web1 kernel - - - text").unwrap();
        assert!(relayed.came_from_syslog());
        assert!(!of("4,5,6,-;<46>1").unwrap().came_from_syslog());
        assert!(!of("-,-,-,-;<IRQ> at").unwrap().came_from_syslog());
    }
}
