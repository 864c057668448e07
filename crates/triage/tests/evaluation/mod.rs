//! The measure on real logs with expected titles (the corpus lies outside the repository).
//!
//! The same four figures as the project's independent evaluation: detection, false alarms, culprit
//! and pairwise F1, and the class beside them.

mod random;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use triage::{Class, Findings, scan};

use random::Random;

/// A log and what is expected of it.
pub(crate) struct Case {
    pub(crate) name: String,
    /// Titles that are right; none for a log without a crash.
    titles: Vec<String>,
    /// Whether its text is mixed or cut, so that no function can be named.
    corrupted: bool,
    body: String,
}

/// The folder of the corpus: `NETDUMP_OOPS_CORPUS`; empty when nobody names one.
pub(crate) fn folder() -> PathBuf {
    std::env::var_os("NETDUMP_OOPS_CORPUS").map_or_else(PathBuf::new, PathBuf::from)
}

/// Reads all cases of a folder; none if there is no such folder.
pub(crate) fn load(folder: &Path) -> Vec<Case> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut cases: Vec<Case> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let text = String::from_utf8_lossy(&fs::read(&path).ok()?).replace('\r', "");
            Some(Case::parse(path.file_name()?.to_str()?, &text))
        })
        .collect();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    cases
}

impl Case {
    fn parse(name: &str, text: &str) -> Self {
        let (head, rest) = match text.strip_prefix('\n') {
            Some(rest) => ("", rest),
            None => text.split_once("\n\n").unwrap_or((text, "")),
        };
        let body = rest.split("\nREPORT:\n").next().unwrap_or(rest);
        let values = |key: &str| -> Vec<String> {
            head.lines()
                .filter_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
                .filter(|value| !value.is_empty())
                .map(str::to_owned)
                .collect()
        };
        let mut titles = values("TITLE");
        titles.extend(values("ALT"));
        Self {
            name: name.to_owned(),
            titles,
            corrupted: !values("CORRUPTED").is_empty(),
            body: format!("{body}\n"),
        }
    }

    /// Whether the text is mixed or cut.
    pub(crate) fn is_corrupted(&self) -> bool {
        self.corrupted
    }

    /// Titles that are no kernel's.
    fn is_foreign(&self) -> bool {
        let foreign = [
            "SYZ",
            "go runtime",
            "lost conn",
            "unexpected kernel reboot",
            "suppress",
        ];
        self.titles
            .first()
            .is_some_and(|title| foreign.iter().any(|start| title.starts_with(start)))
    }

    fn functions(&self) -> Vec<&str> {
        self.titles
            .iter()
            .filter_map(|title| title.rsplit_once(" in ")?.1.split_whitespace().next())
            .collect()
    }

    fn is_named(&self) -> bool {
        !self.corrupted
            && self
                .titles
                .iter()
                .any(|title| title.contains(" in ") && !title.contains("corrupted"))
    }
}

/// How the logs are given to the scanner.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Dress {
    /// As they are.
    Plain,
    /// As extended netconsole: fragments, one datagram in a hundred lost, neighbours swapped.
    Netconsole,
}

/// Figures of a set of logs.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    pub(crate) positive: usize,
    pub(crate) detected: usize,
    pub(crate) negative: usize,
    pub(crate) alarms: usize,
    pub(crate) classes: usize,
    pub(crate) named: usize,
    pub(crate) culprits: usize,
    pub(crate) titles: usize,
    /// F1 of EXACT and of FAMILY.
    pub(crate) exact: f64,
    pub(crate) family: f64,
    /// What went wrong, a line a file.
    pub(crate) misses: String,
}

impl Figures {
    pub(crate) fn detection(&self) -> f64 {
        ratio(self.detected, self.positive)
    }

    pub(crate) fn culprit(&self) -> f64 {
        ratio(self.culprits, self.named)
    }

    pub(crate) fn class(&self) -> f64 {
        ratio(self.classes, self.detected)
    }

    pub(crate) fn table(&self) -> String {
        format!(
            "detection {:.3} ({}/{}), false alarms {}/{}, class {:.3}, culprit {:.3} ({}/{}), title {:.3}, pair F1 exact {:.3} family {:.3}",
            self.detection(),
            self.detected,
            self.positive,
            self.alarms,
            self.negative,
            self.class(),
            self.culprit(),
            self.culprits,
            self.named,
            ratio(self.titles, self.positive),
            self.exact,
            self.family,
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of files")]
fn ratio(part: usize, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// Scans every case and compares.
pub(crate) fn measure(cases: &[&Case], dress: Dress) -> Figures {
    let mut figures = Figures::default();
    let mut results = Vec::new();
    for case in cases.iter().filter(|case| !case.is_foreign()) {
        let findings = match dress {
            Dress::Plain => scan(case.body.as_bytes()),
            Dress::Netconsole => scan(&netconsole(&case.name, &case.body)),
        };
        figures.compare(case, &findings);
        if !case.titles.is_empty() && !case.corrupted {
            let signature = findings.crash().and_then(|report| report.signature.clone());
            results.push((*case, signature));
        }
    }
    figures.exact = pair_f1(&results, |signature| &signature.signature);
    figures.family = pair_f1(&results, |signature| &signature.family);
    figures
}

impl Figures {
    fn compare(&mut self, case: &Case, findings: &Findings) {
        let crash = findings.crash();
        if case.titles.is_empty() {
            self.negative += 1;
            if let Some(report) = crash {
                self.alarms += 1;
                self.miss(case, "false alarm", &report.title);
            }
            return;
        }
        self.positive += 1;
        let Some(report) = crash else {
            self.miss(case, "not detected", "");
            return;
        };
        self.detected += 1;
        if is_class(report.class, &case.titles) {
            self.classes += 1;
        } else {
            self.miss(case, "class", &report.title);
        }
        self.titles += usize::from(case.titles.contains(&report.title));
        if case.is_named() {
            self.named += 1;
            let right = report
                .function
                .as_ref()
                .is_some_and(|function| case.functions().contains(&function.as_str()));
            if right {
                self.culprits += 1;
            } else {
                self.miss(case, "culprit", &report.title);
            }
        }
    }

    fn miss(&mut self, case: &Case, what: &str, got: &str) {
        let expected = case.titles.first().map_or("", String::as_str);
        let _infallible = writeln!(
            self.misses,
            "{}: {what}: {got} instead of {expected}",
            case.name
        );
    }
}

/// Whether a class is the one that the expected titles name.
fn is_class(class: Class, titles: &[String]) -> bool {
    let is = |starts: &[&str]| {
        titles
            .iter()
            .any(|title| starts.iter().any(|start| title.starts_with(start)))
    };
    match class {
        Class::Kasan => is(&["KASAN"]),
        Class::Kmsan => is(&["KMSAN"]),
        Class::Kcsan => is(&["KCSAN"]),
        Class::Kfence => is(&["KFENCE"]),
        Class::Ubsan => is(&["UBSAN"]),
        Class::NullDereference | Class::PageFault => {
            is(&["BUG: unable to handle", "Unhandled fault"])
        }
        Class::GeneralProtection => is(&["general protection"]),
        Class::Trap => is(&[
            "divide",
            "PANIC",
            "Internal error",
            "invalid opcode",
            "stack segment",
            "Unhandled",
            "kernel panic: bad mode",
        ]),
        Class::Bug | Class::ListCorruption | Class::Usercopy => {
            is(&["kernel BUG", "BUG:", "WARNING"])
        }
        Class::Warning | Class::Refcount | Class::Cfi => is(&["WARNING", "BUG: Dentry", "CFI"]),
        Class::Deadlock => is(&["possible deadlock"]),
        Class::LockState => is(&["inconsistent lock state"]),
        Class::Lock => is(&["WARNING: ", "BUG: ", "INFO: trying"]),
        Class::RcuUsage => is(&["WARNING: suspicious RCU"]),
        Class::RcuStall => is(&["INFO: rcu detected stall"]),
        Class::SoftLockup => is(&["BUG: soft lockup"]),
        Class::HardLockup => is(&["BUG: hard lockup", "NMI watchdog"]),
        Class::HungTask => is(&["INFO: task hung", "INFO: task can't die"]),
        Class::Leak => is(&["memory leak", "unregister_netdevice"]),
        Class::Unwinder => is(&["WARNING: kernel stack", "WARNING: "]),
        Class::Panic | Class::StackOverflow | Class::Boot => {
            is(&["kernel panic", "BUG: stack guard", "kernel stack"])
        }
        Class::MachineCheck => is(&["kernel panic", "Machine", "mce", "HARDWARE"]),
        Class::Atomic
        | Class::BadPage
        | Class::Kernel
        | Class::NetDevice
        | Class::Slab
        | Class::WorkqueueLockup => is(&["BUG: ", "VFS: ", "unregister_netdevice"]),
        Class::Block | Class::Filesystem | Class::Hardware | Class::OutOfMemory => false,
    }
}

/// Pairwise F1: two logs belong together when their titles overlap.
fn pair_f1(
    results: &[(&Case, Option<triage::Signature>)],
    level: impl Fn(&triage::Signature) -> &String,
) -> f64 {
    let (mut both, mut ours, mut theirs) = (0, 0, 0);
    for (at, (one, one_signature)) in results.iter().enumerate() {
        for (other, other_signature) in results.iter().skip(at + 1) {
            let titles: BTreeSet<&String> = one.titles.iter().collect();
            let same = other.titles.iter().any(|title| titles.contains(title));
            let met = match (one_signature, other_signature) {
                (Some(one), Some(other)) => level(one) == level(other),
                _ => false,
            };
            both += usize::from(same && met);
            ours += usize::from(met);
            theirs += usize::from(same);
        }
    }
    let (precision, recall) = (ratio(both, ours), ratio(both, theirs));
    if precision + recall > 0.0 {
        2.0 * precision * recall / (precision + recall)
    } else {
        0.0
    }
}

/// Datagrams of extended netconsole are at most this long.
const DATAGRAM: usize = 1000;

/// `log` as a receiver of extended netconsole writes it down, one datagram after another. `name`
/// seeds what is lost and what is swapped.
pub(crate) fn netconsole(name: &str, log: &str) -> Vec<u8> {
    let mut random = Random::new(name);
    let mut datagrams: Vec<Vec<u8>> = Vec::new();
    for (sequence, raw) in log.lines().enumerate() {
        datagrams.extend(record(sequence, raw));
    }
    let mut kept: Vec<Vec<u8>> = Vec::new();
    for datagram in datagrams {
        if random.below(100) > 0 {
            kept.push(datagram);
        }
    }
    for at in 1..kept.len() {
        if random.below(10) == 0 {
            kept.swap(at - 1, at);
        }
    }
    kept.concat()
}

/// The datagrams of one record: whole, or fragments with the header repeated.
fn record(sequence: usize, raw: &str) -> Vec<Vec<u8>> {
    let line = triage::Line::parse(raw);
    let time = line.time.unwrap_or(0);
    let caller = match line.caller {
        Some(triage::Caller::Task(task)) => format!(",caller=T{task}"),
        Some(triage::Caller::Cpu(cpu)) => format!(",caller=C{cpu}"),
        None => String::new(),
    };
    let mut text = String::new();
    for byte in line.text.bytes() {
        if (0x20..0x7f).contains(&byte) && byte != b'\\' {
            text.push(char::from(byte));
        } else {
            let _infallible = write!(text, "\\x{byte:02x}");
        }
    }
    let header = format!("6,{sequence},{time},-{caller}");
    if header.len() + text.len() + 2 <= DATAGRAM && !sequence.is_multiple_of(7) {
        return vec![format!("{header};{text}\n").into_bytes()];
    }
    // Every seventh record is cut as if userdata had made it long.
    let total = text.len() + 1;
    let size = (total / 2).clamp(1, 900);
    let mut body = text.into_bytes();
    body.push(b'\n');
    let mut offset = 0;
    body.chunks(size)
        .map(|piece| {
            let mut datagram = format!("{header},ncfrag={offset}/{total};").into_bytes();
            datagram.extend_from_slice(piece);
            offset += piece.len();
            datagram
        })
        .collect()
}
