//! Finds the reports of a log while it streams past, in bounded memory.
//!
//! A report is open from its first line on. Lines belong to the open report of the same caller;
//! where the log does not tell callers, to the last one opened. A report is closed, and taken
//! apart, when another begins, when it is full, after a pause, and at the end.

use crate::anatomy::Anatomy;
use crate::class::{Class, is_error_of_its_kind};
use crate::input::{Event, Input};
use crate::line::{Caller, Line};
use crate::report::{Place, Report, Role};

/// Lines of a report that are kept; the longest that was seen, a hung task with all locks and all
/// CPUs, has about 500 before its second trace.
const LINES_MAX: usize = 800;
/// Characters of a line that are kept.
const CHARS_MAX: usize = 512;
/// Reports that are open at a time, one for each caller.
const OPEN_MAX: usize = 16;
/// Different reports that are kept; the rest is counted.
const REPORTS_MAX: usize = 64;
/// A pause this long ends a report, in microseconds.
const PAUSE_MAX: u64 = 30_000_000;
/// Time may go back this much between CPUs, in microseconds; more is another boot.
const BACK_MAX: u64 = 10_000_000;
/// A message that leads to a `BUG()` does so within this many lines.
const PRELUDE_LINES: usize = 12;
/// A line that no rule knows begins a report only if a CPU or a trace is told within this many.
const DOUBT_LINES: usize = 3;
/// The registers and traces of other CPUs belong to a report for this many callers.
const GUESTS_MAX: usize = 64;

/// What a log holds.
#[derive(Debug, Default)]
pub struct Findings {
    /// The reports in the order of their first lines.
    pub reports: Vec<Report>,
    /// Reports that were not kept because there were too many.
    pub reports_dropped: u64,
    /// Lines that were read.
    pub lines: u64,
}

impl Findings {
    /// The report that names the crash: the cause of the first boot that crashed.
    #[must_use]
    pub fn crash(&self) -> Option<&Report> {
        self.reports
            .iter()
            .find(|report| report.role == Role::Cause)
    }
}

/// Reads a log in pieces.
#[derive(Debug, Default)]
pub struct Scanner {
    input: Input,
    finder: Finder,
}

impl Scanner {
    /// A scanner that has read nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes of the log, cut anywhere.
    pub fn push(&mut self, bytes: &[u8]) {
        let Self { input, finder } = self;
        input.push(bytes, &mut |event| finder.event(event));
    }

    /// Ends the log.
    #[must_use]
    pub fn finish(mut self) -> Findings {
        let finder = &mut self.finder;
        self.input.finish(&mut |event| finder.event(event));
        finder.close_all();
        self.finder.findings()
    }
}

/// The reports of a whole log.
#[must_use]
pub fn scan(log: &[u8]) -> Findings {
    let mut scanner = Scanner::new();
    scanner.push(log);
    scanner.finish()
}

#[derive(Debug)]
struct Draft {
    class: Class,
    caller: Option<Caller>,
    /// Other callers whose lines are part of it.
    guests: Vec<Caller>,
    place: Place,
    /// Order among all drafts.
    number: u64,
    last_time: Option<u64>,
    lines: Vec<(Option<Caller>, String)>,
    /// A line with `[#1]` has come: another one is another exception.
    died: bool,
    /// `kernel BUG at` has come: its exception belongs to it.
    asserted: bool,
    /// Nothing but a call trace that follows at once makes it a report.
    doubtful: bool,
}

#[derive(Debug, Default)]
struct Finder {
    open: Vec<Draft>,
    done: Vec<(u64, Report)>,
    dropped: u64,
    lines: u64,
    drafts: u64,
    boot: u32,
    time: Option<u64>,
    /// The number of the last line about a hardware error: each of them has several.
    hardware_line: Option<u64>,
}

impl Finder {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Boot => self.new_boot(),
            Event::Line(line) => self.line(line),
        }
    }

    fn new_boot(&mut self) {
        self.close_all();
        self.boot = self.boot.saturating_add(1);
        self.time = None;
    }

    fn line(&mut self, line: Line<'_>) {
        self.lines += 1;
        if self.is_boot(&line) {
            self.new_boot();
        }
        if line.time.is_some() {
            self.time = line.time;
        }
        match begin(line.text) {
            Some((at, class)) => {
                let (before, text) = line.text.split_at_checked(at).unwrap_or(("", line.text));
                if at > 0 {
                    self.add(Line {
                        text: before,
                        ..line
                    });
                }
                self.begin(class, Line { text, ..line });
            }
            None => self.middle(line),
        }
    }

    /// A line that begins no report: part of one, or of one whose beginning was lost.
    fn middle(&mut self, line: Line<'_>) {
        let open = self.position(line.caller).and_then(|at| self.open.get(at));
        let is_known = open.is_some_and(|draft| !draft.doubtful);
        match Class::of_middle(line.text) {
            Some(class) if !is_known => self.begin(class, line),
            None if open.is_none() && Class::is_doubtful(line.text) => {
                self.begin(Class::Warning, line);
                if let Some(draft) = self.open.last_mut() {
                    draft.doubtful = true;
                }
            }
            _ if self.open.is_empty() => {}
            _ => self.add(line),
        }
    }

    /// Whether a line about a hardware error only goes on with the one before it.
    fn goes_on_hardware(&mut self, class: Class, line: &Line<'_>) -> bool {
        if !line.text.contains("[Hardware Error]") {
            return false;
        }
        let before = self.hardware_line.replace(self.lines);
        class == Class::Hardware && before.is_some_and(|before| before + 1 == self.lines)
    }

    fn is_boot(&self, line: &Line<'_>) -> bool {
        let (Some(now), Some(before)) = (line.time, self.time) else {
            return false;
        };
        now.saturating_add(BACK_MAX) < before && now < BACK_MAX
    }

    fn begin(&mut self, class: Class, line: Line<'_>) {
        if self.goes_on_hardware(class, &line) {
            self.add(line);
            return;
        }
        if class.is_one_line() {
            let draft = self.draft(class, line);
            self.close(draft);
            return;
        }
        self.expire(line.time);
        self.open.retain(|draft| !draft.doubtful);
        let open = self.position(line.caller);
        if let Some(draft) = open.and_then(|at| self.open.get_mut(at))
            && draft.takes_beginning(class, line.text)
        {
            draft.push(line);
            return;
        }
        if let Some(at) = open {
            let old = self.open.remove(at);
            self.close(old);
        } else if line.caller.is_none() || self.open.len() >= OPEN_MAX {
            self.close_first();
        }
        let draft = self.draft(class, line);
        self.open.push(draft);
    }

    fn draft(&mut self, class: Class, line: Line<'_>) -> Draft {
        self.drafts += 1;
        let mut draft = Draft {
            class,
            caller: line.caller,
            guests: Vec::new(),
            place: Place {
                line_number: self.lines,
                time: line.time,
                boot: self.boot,
            },
            number: self.drafts,
            last_time: line.time,
            lines: Vec::new(),
            died: false,
            asserted: false,
            doubtful: false,
        };
        draft.push(line);
        draft
    }

    fn add(&mut self, line: Line<'_>) {
        let at = self.position(line.caller).or_else(|| self.host(&line));
        let Some(at) = at else { return };
        let Some(draft) = self.open.get_mut(at) else {
            return;
        };
        let is_paused = draft.is_paused(line.time);
        if !is_paused {
            draft.push(line);
        }
        if is_paused || draft.is_refuted() || draft.lines.len() >= LINES_MAX {
            let draft = self.open.remove(at);
            self.close(draft);
        }
    }

    /// The open report that a line of `caller` belongs to.
    fn position(&self, caller: Option<Caller>) -> Option<usize> {
        self.open.iter().rposition(|draft| {
            draft.caller == caller
                || draft.caller.is_none()
                || caller.is_some_and(|caller| draft.guests.contains(&caller))
        })
    }

    /// The open report that asked another CPU, if `line` is where that CPU begins to answer.
    fn host(&mut self, line: &Line<'_>) -> Option<usize> {
        if !line.text.starts_with("NMI backtrace for cpu") {
            return None;
        }
        let at = self
            .open
            .iter()
            .rposition(|draft| draft.class.shows_others())?;
        let draft = self.open.get_mut(at)?;
        if draft.guests.len() < GUESTS_MAX {
            draft.guests.extend(line.caller);
        }
        Some(at)
    }

    fn expire(&mut self, now: Option<u64>) {
        while let Some(at) = self.open.iter().position(|draft| draft.is_paused(now)) {
            let draft = self.open.remove(at);
            self.close(draft);
        }
    }

    fn close_first(&mut self) {
        if !self.open.is_empty() {
            let draft = self.open.remove(0);
            self.close(draft);
        }
    }

    fn close_all(&mut self) {
        while !self.open.is_empty() {
            self.close_first();
        }
    }

    fn close(&mut self, draft: Draft) {
        if draft.doubtful {
            return;
        }
        let report = draft.report();
        let same = self.done.iter_mut().find(|(_, known)| {
            known.boot == report.boot
                && known.title == report.title
                && known.signature == report.signature
        });
        if let Some((_, known)) = same {
            known.count += 1;
        } else if self.done.len() < REPORTS_MAX {
            self.done.push((draft.number, report));
        } else {
            self.dropped += 1;
        }
    }

    fn findings(mut self) -> Findings {
        self.done.sort_by_key(|(number, _)| *number);
        let mut boots_with_cause = Vec::new();
        let mut reports = Vec::with_capacity(self.done.len());
        for (_, mut report) in self.done {
            if report.role == Role::Cause {
                if boots_with_cause.contains(&report.boot) {
                    report.role = Role::Consequence;
                } else {
                    boots_with_cause.push(report.boot);
                }
            }
            reports.push(report);
        }
        Findings {
            reports,
            reports_dropped: self.dropped,
            lines: self.lines,
        }
    }
}

impl Draft {
    fn push(&mut self, line: Line<'_>) {
        self.last_time = line.time.or(self.last_time);
        self.died |= line.text.contains("[#");
        self.asserted |= line.text.contains("ernel BUG ");
        self.doubtful &= !is_trace(line.text);
        if self.lines.len() < LINES_MAX {
            let text: String = line.text.chars().take(CHARS_MAX).collect();
            self.lines.push((line.caller, text));
        }
    }

    /// Whether no trace has come for a line that needs one.
    fn is_refuted(&self) -> bool {
        self.doubtful && self.lines.len() > DOUBT_LINES
    }

    fn is_paused(&self, now: Option<u64>) -> bool {
        match (self.last_time, now) {
            (Some(last), Some(now)) => now.saturating_sub(last) > PAUSE_MAX,
            _ => false,
        }
    }

    /// Whether a line that could begin a report is part of this one.
    fn takes_beginning(&self, class: Class, text: &str) -> bool {
        let near = self.lines.len() <= PRELUDE_LINES;
        let dies = text.contains("[#") || text.starts_with("Internal error");
        if text.contains("Kernel panic - not syncing") {
            // A panic for a reason of its own is another report, and so is one after a warning that
            // did not lead to it.
            let led = self.class != Class::Warning || text.contains("panic_on_warn");
            return class == Class::Panic && led || class == self.class;
        }
        // Two consoles in one file tell everything twice.
        let is_echo = self.lines.last().is_some_and(|(_, last)| last == text);
        if is_echo && near {
            return true;
        }
        // Symbolised logs repeat the first line for each inlined function.
        let repeats = self.class == class
            && self
                .lines
                .last()
                .is_some_and(|(_, last)| last.trim_end().ends_with("[inline]"));
        if repeats && near {
            return true;
        }
        if self.class == Class::RcuStall && text.contains("kthread starved") {
            return true;
        }
        if dies && !self.died && (self.class.is_exception() || self.asserted) {
            return true;
        }
        // What was found by a trap of the compiler's or by a guard page is told, and then the trap.
        let trapped = matches!(self.class, Class::Cfi | Class::Ubsan | Class::StackOverflow);
        if dies && !self.died && near && trapped {
            return true;
        }
        if self.class == Class::Leak && class == Class::Leak {
            return near && text.starts_with("unreferenced object");
        }
        let (is_assertion, asserts) = (
            matches!(self.class, Class::Bug | Class::Warning),
            matches!(class, Class::Bug | Class::Warning),
        );
        // Newer kernels tell the damage before the assertion, older ones behind it.
        near && ((asserts && self.class.is_prelude()) || (is_assertion && class.is_damage()))
    }

    fn report(&self) -> Report {
        // Lines of different callers are interleaved; each caller's are together.
        let mut callers: Vec<Option<Caller>> = Vec::new();
        for (caller, _) in &self.lines {
            if !callers.contains(caller) {
                callers.push(*caller);
            }
        }
        let of = |wanted: Option<Caller>| {
            self.lines
                .iter()
                .filter(move |(caller, _)| *caller == wanted)
                .map(|(_, text)| text.as_str())
        };
        let lines = callers.iter().flat_map(|caller| of(*caller));
        Report::new(self.class, Anatomy::of(self.class, lines), self.place)
    }
}

/// Whether `text` begins the part of a report that shows where a CPU was.
fn is_trace(text: &str) -> bool {
    let text = text.trim_start();
    text.starts_with("Call Trace:")
        || text.starts_with("Call trace:")
        || (text.starts_with("CPU: ") && text.contains(" Comm: "))
}

/// Where in a message a report begins, and of which class.
fn begin(text: &str) -> Option<(usize, Class)> {
    if let Some(class) = Class::of_line(text) {
        return is_error_of_its_kind(class, text).then_some((0, class));
    }
    Class::within_line(text)
}
