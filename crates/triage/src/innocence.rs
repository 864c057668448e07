//! Functions that are on many stacks and to blame on few: what the kernel reports with, what it
//! enters and leaves by, and the primitives that every subsystem calls.
//!
//! The rule behind the lists: a function is passed over if its contract puts the burden on its
//! caller. Freed memory in `memcpy`, a broken node in `list_del`, a lock that is no lock, a size
//! that the allocator refuses: the caller brought it. What only some subsystem calls is not passed
//! over, however deep it lies. The names are in `innocence.txt`, of kernels 2.6.32 to 7.x.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde::Serialize;

/// Why a function was passed over.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// It writes the report.
    Machinery,
    /// The compiler or a tracer put it in.
    Instrumentation,
    /// It is how an exception or interrupt is entered or left.
    Exception,
    /// It is where a system call, thread or work item begins.
    Entry,
    /// It copies, compares, prints or searches what its caller gave it.
    Helper,
    /// It is a container, a counter or an object of the kernel's library.
    Container,
    /// It is a lock.
    Lock,
    /// It is an allocator.
    Allocator,
    /// It moves data of a socket buffer or an I/O vector.
    Buffer,
    /// It waits, wakes or schedules.
    Scheduler,
    /// It is the driver core, asked by a driver.
    DriverCore,
    /// It walks the page cache for a file system.
    PageCache,
    /// It is the tick or what a stalled CPU reports with.
    Tick,
    /// Its operation names the report better.
    Inside,
}

/// The lists: `[section]` lines, names, and beginnings of names that end in a star.
static LISTS: LazyLock<Lists> = LazyLock::new(|| Lists::parse(include_str!("innocence.txt")));

#[derive(Default)]
struct Lists {
    names: HashMap<&'static str, Vec<&'static str>>,
    /// By their first byte, because there are many.
    beginnings: HashMap<u8, Vec<(&'static str, &'static str)>>,
}

impl Lists {
    fn parse(text: &'static str) -> Self {
        let mut lists = Self::default();
        let mut section = "";
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some(name) = line
                .strip_prefix('[')
                .and_then(|name| name.strip_suffix(']'))
            {
                section = name;
                continue;
            }
            for word in line.split_whitespace() {
                match (word.strip_suffix('*'), word.as_bytes().first()) {
                    (Some(beginning), Some(first)) => {
                        let known = lists.beginnings.entry(*first).or_default();
                        known.push((beginning, section));
                    }
                    _ => lists.names.entry(word).or_default().push(section),
                }
            }
        }
        lists
    }

    /// The sections that `function` is in.
    fn sections(&self, function: &str) -> impl Iterator<Item = &'static str> {
        let named = self.names.get(function).into_iter().flatten().copied();
        let first = function.as_bytes().first();
        let begun = first
            .and_then(|first| self.beginnings.get(first))
            .into_iter()
            .flatten();
        named.chain(
            begun
                .filter(|(beginning, _)| function.starts_with(beginning))
                .map(|(_, section)| *section),
        )
    }
}

/// Why `function`, without compiler suffixes, is passed over in every report; none if it is not.
pub(crate) fn reason(function: &str) -> Option<Reason> {
    let function = function.strip_suffix("_noprof").unwrap_or(function);
    if is_rust_panic(function) {
        return Some(Reason::Machinery);
    }
    LISTS.sections(function).find_map(Reason::of_section)
}

/// Rust's way to `BUG()`: `core::panicking` and what it calls, in mangled names.
fn is_rust_panic(function: &str) -> bool {
    function.starts_with("_R")
        && (function.contains("9panicking") || function.ends_with("17rust_begin_unwind"))
}

/// Whether `function` hands interrupts, timers, callbacks and work items over to whose they are: it
/// is never to blame itself while anything that it called is known.
pub(crate) fn is_relay(function: &str) -> bool {
    is_in("relay", function)
}

/// Why `function` is passed over where the report is about waiting.
pub(crate) fn reason_when_waiting(function: &str) -> Option<Reason> {
    if is_in("waiting", function) {
        return Some(Reason::Scheduler);
    }
    // What a file system waits for in the page cache is its own affair.
    reason(function).filter(|reason| *reason != Reason::PageCache)
}

/// Why `function` is passed over where the report is about who takes a lock: that may be any code
/// but the lock itself, and an allocator, which only says so on behalf of reclaim.
pub(crate) fn reason_when_locking(function: &str) -> Option<Reason> {
    let of_locks = [
        Reason::Machinery,
        Reason::Instrumentation,
        Reason::Exception,
        Reason::Lock,
        Reason::Allocator,
    ];
    reason(function).filter(|reason| of_locks.contains(reason))
}

/// Why `function` is passed over where a CPU is stuck.
pub(crate) fn reason_when_stuck(function: &str) -> Option<Reason> {
    if is_interrupt_entry(function) {
        return Some(Reason::Exception);
    }
    reason_when_waiting(function)
        .or_else(|| is_in("stack-walk", function).then_some(Reason::Machinery))
}

/// Whether a CPU in `function` is idle.
pub(crate) fn is_idle(function: &str) -> bool {
    is_in("idle", function)
}

/// Whether the frames behind `function` were interrupted.
pub(crate) fn is_interrupt_entry(function: &str) -> bool {
    is_in("interrupt", function)
}

/// Whether `function` only calls an operation on somebody's behalf.
pub(crate) fn is_dispatcher(function: &str) -> bool {
    is_in("dispatcher", function)
}

fn is_in(section: &str, function: &str) -> bool {
    LISTS.sections(function).any(|known| known == section)
}

impl Reason {
    /// The reason in words.
    #[must_use]
    pub fn what(self) -> &'static str {
        match self {
            Self::Machinery => "writes the report",
            Self::Instrumentation => "put in by the compiler or a tracer",
            Self::Exception => "enters or leaves an exception or interrupt",
            Self::Entry => "begins a system call, thread or work item",
            Self::Helper => "works on what its caller gave it",
            Self::Container => "a container, counter or object of the library",
            Self::Lock => "a lock",
            Self::Allocator => "an allocator",
            Self::Buffer => "moves data of a buffer",
            Self::Scheduler => "waits, wakes or schedules",
            Self::DriverCore => "the driver core, asked by a driver",
            Self::PageCache => "walks the page cache for a file system",
            Self::Tick => "the tick, or what a stalled CPU reports with",
            Self::Inside => "inside the operation that is named",
        }
    }

    fn of_section(section: &str) -> Option<Self> {
        Some(match section {
            "machinery" => Self::Machinery,
            "instrumentation" => Self::Instrumentation,
            "exception" => Self::Exception,
            "entry" => Self::Entry,
            "helper" => Self::Helper,
            "container" => Self::Container,
            "lock" => Self::Lock,
            "allocator" => Self::Allocator,
            "buffer" => Self::Buffer,
            "scheduler" => Self::Scheduler,
            "driver-core" => Self::DriverCore,
            "page-cache" => Self::PageCache,
            "tick" => Self::Tick,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_is_known_and_every_word_is_a_name() {
        let text = include_str!("innocence.txt");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some(section) = line.strip_prefix('[') {
                let section = section.trim_end_matches(']');
                let known = Reason::of_section(section).is_some()
                    || [
                        "waiting",
                        "idle",
                        "interrupt",
                        "stack-walk",
                        "dispatcher",
                        "relay",
                    ]
                    .contains(&section);
                assert!(known, "{section}");
                continue;
            }
            for word in line.split_whitespace() {
                let name = word.trim_end_matches('*');
                assert!(name.len() > 1, "{word}");
                assert!(
                    name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'),
                    "{word}"
                );
            }
        }
    }

    #[test]
    fn primitives_are_passed_over_and_their_callers_are_not() {
        for (function, expected) in [
            ("kasan_report", Some(Reason::Machinery)),
            ("memcpy", Some(Reason::Helper)),
            ("kmalloc_array_noprof", Some(Reason::Allocator)),
            ("_raw_spin_lock_irqsave", Some(Reason::Lock)),
            ("skb_put", Some(Reason::Buffer)),
            ("memory_failure", None),
            ("strp_data_ready", None),
            ("copy_page_range", None),
            ("ext4_writepages", None),
        ] {
            assert_eq!(reason(function), expected, "{function}");
        }
        assert_eq!(reason("schedule"), None);
        assert_eq!(reason_when_waiting("schedule"), Some(Reason::Scheduler));
    }
}
