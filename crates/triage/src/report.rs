//! A report as it is given out: what died, where, and under which signature.

use std::fmt;

use serde::Serialize;

use crate::anatomy::{Anatomy, Stack};
use crate::class::Class;
use crate::frame::Frame;
use crate::guilt::{Considered, Judgement, judge};
use crate::signature::{self, Signature};
use crate::title;

/// What a report is to the others of its boot.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The first crash report of a boot.
    Cause,
    /// A later one: the kernel was already wrong.
    Consequence,
    /// No crash, but told beside it.
    Notice,
}

/// One report of a kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Cause, consequence or notice.
    pub role: Role,
    /// The kind.
    pub class: Class,
    /// What the kernel community would call it.
    pub title: String,
    /// The culprit, without compiler suffixes.
    pub function: Option<String>,
    /// The module that the culprit is in.
    pub module: Option<String>,
    /// Bytes from the culprit's start.
    pub offset: Option<u64>,
    /// Both levels; absent where nothing identifies the report.
    #[serde(flatten)]
    pub signature: Option<Signature>,
    /// The first line, without prefix.
    pub line: String,
    /// The number of that line in the input, from 1.
    pub line_number: u64,
    /// Microseconds since boot, if the log says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_us: Option<u64>,
    /// Which boot of the input, from 0.
    pub boot: u32,
    /// How often it came: equal reports are told once.
    pub count: u64,
    /// The name of the task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// Its process id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
    /// The taint letters; absent for an untainted kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub taint: Option<String>,
    /// `uname -r`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// What the firmware says that the machine is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hardware: Option<String>,
    /// `file:line` of a `BUG()` or `WARN()`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    /// The message of the panic that it ended in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub panic: Option<String>,
    /// Registers by name, in hexadecimal, as printed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub registers: Vec<(String, String)>,
    /// The bytes around the program counter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// The call traces.
    pub stacks: Vec<Stack>,
    /// What the signature counts and what it passed over.
    pub considered: Vec<Considered>,
}

/// Where and when a report stood in its input.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    pub line_number: u64,
    pub time: Option<u64>,
    pub boot: u32,
}

impl Report {
    pub(crate) fn new(class: Class, anatomy: Anatomy, place: Place) -> Self {
        let class = refined(class, &anatomy);
        let Judgement {
            culprit,
            next,
            considered,
        } = judge(class, &anatomy);
        let signature = signature::of(class, &anatomy, culprit.as_ref(), &next);
        Self {
            role: if class.is_crash() {
                Role::Cause
            } else {
                Role::Notice
            },
            class,
            title: title::of(class, &anatomy, culprit.as_ref()),
            function: culprit.as_ref().map(title::shown),
            module: culprit.as_ref().and_then(|frame| frame.module.clone()),
            offset: culprit.as_ref().and_then(|frame| frame.offset),
            signature,
            line: anatomy.head,
            line_number: place.line_number,
            time_us: place.time,
            boot: place.boot,
            count: 1,
            task: anatomy.task,
            pid: anatomy.pid,
            cpu: anatomy.cpu,
            taint: anatomy.taint,
            release: anatomy.release,
            hardware: anatomy.hardware,
            position: anatomy.position,
            panic: anatomy.panic,
            registers: anatomy.registers,
            code: anatomy.code,
            stacks: anatomy.stacks,
            considered,
        }
    }

    /// What the signature is made of, and each frame that was looked at: a line each, for people.
    #[must_use]
    pub fn explanation(&self) -> String {
        let mut lines = match &self.signature {
            Some(signature) => format!(
                "  EXACT {} of {}\n  FAMILY {} of {}\n",
                signature.signature, signature.signature_of, signature.family, signature.family_of
            ),
            None => "  no signature: neither a culprit nor a text of its own\n".to_owned(),
        };
        for Considered { function, skipped } in &self.considered {
            let verdict = match skipped {
                None => "counts".to_owned(),
                Some(reason) => format!("passed over: {}", reason.what()),
            };
            lines.push_str(&format!("    {function:<40} {verdict}\n"));
        }
        lines
    }

    /// The call trace of what the report is about.
    #[must_use]
    pub fn trace(&self) -> &[Frame] {
        self.stacks.first().map_or(&[], |stack| &stack.frames)
    }
}

/// What follows may say more than the first line: a corrupted list is told before its `BUG()`, an
/// `Oops` of unknown kind by the address.
fn refined(class: Class, anatomy: &Anatomy) -> Class {
    let notes =
        || std::iter::once(anatomy.head.as_str()).chain(anatomy.notes.iter().map(String::as_str));
    match class {
        Class::Kernel if title::is_lost(anatomy) && anatomy.panic.is_some() => Class::Panic,
        Class::Kernel | Class::Cfi => {
            let mut behind = anatomy.notes.iter().filter_map(|note| Class::of_line(note));
            behind
                .find(|class| matches!(class, Class::Bug | Class::Warning))
                .filter(|_| anatomy.head.contains("skb_") || class == Class::Cfi)
                .unwrap_or(class)
        }
        Class::Bug | Class::Warning
            if notes().any(|note| is_damage(note, Class::ListCorruption)) =>
        {
            Class::ListCorruption
        }
        Class::Warning if notes().any(|note| note.contains("lib/refcount.c")) => Class::Refcount,
        Class::Panic => panicked(anatomy).unwrap_or(class),
        Class::Trap if anatomy.head.starts_with("Oops: 0") => Class::PageFault,
        other => other,
    }
}

fn is_damage(note: &str, damage: Class) -> bool {
    Class::of_line(note) == Some(damage)
}

/// The report that led to a panic, where only the panic's own trace came.
fn panicked(anatomy: &Anatomy) -> Option<Class> {
    let why = anatomy.panic.as_deref()?;
    if !why.contains("panic_on_warn") && !why.starts_with("kasan.fault") {
        return None;
    }
    let on_stack = |names: &[&str]| {
        let mut frames = anatomy.stacks.iter().flat_map(|stack| &stack.frames);
        frames.any(|frame| names.iter().any(|name| frame.function().starts_with(name)))
    };
    if on_stack(&[
        "kasan_report",
        "kasan_end_report",
        "__kasan_report",
        "__asan_",
    ]) {
        return Some(Class::Kasan);
    }
    if on_stack(&["kmsan_report", "__msan_warning"]) {
        return Some(Class::Kmsan);
    }
    if on_stack(&["kcsan_"]) {
        return Some(Class::Kcsan);
    }
    if on_stack(&["__ubsan_", "ubsan_"]) {
        return Some(Class::Ubsan);
    }
    on_stack(&["__warn", "warn_slowpath", "report_bug"]).then_some(Class::Warning)
}

/// One page for people.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        let mut row = |name: &str, value: Option<String>| match value {
            Some(value) => writeln!(f, "  {name:<10} {value}"),
            None => Ok(()),
        };
        row("where", self.place())?;
        row("position", self.position.clone())?;
        row(
            "signature",
            self.signature.as_ref().map(ToString::to_string),
        )?;
        row("line", Some(format!("{}: {}", self.line_number, self.line)))?;
        row("kernel", self.kernel())?;
        row("hardware", self.hardware.clone())?;
        row("task", self.running())?;
        row("panic", self.panic.clone())?;
        row("code", self.code.clone())?;
        row("times", (self.count > 1).then(|| self.count.to_string()))?;
        self.write_trace(f)
    }
}

/// Frames that a page shows.
const SHOWN_MAX: usize = 24;

struct Shown<'a>(&'a Frame);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Frame {
            symbol,
            offset,
            module,
            reliable,
            register,
            inlined,
        } = self.0;
        let mark = match (reliable, register) {
            (false, _) => "? ",
            (true, true) => "> ",
            (true, false) => "  ",
        };
        write!(f, "{mark}{symbol}")?;
        if let Some(offset) = offset {
            write!(f, "+{offset:#x}")?;
        }
        if let Some(module) = module {
            write!(f, " [{module}]")?;
        }
        if *inlined {
            write!(f, " (inlined)")?;
        }
        Ok(())
    }
}

impl Report {
    /// The first stack without what the unwinder doubts, unless there is nothing else.
    fn write_trace(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.trace();
        let sure: Vec<&Frame> = all.iter().filter(|frame| frame.reliable).collect();
        let shown = if sure.is_empty() {
            all.iter().collect()
        } else {
            sure
        };
        if shown.is_empty() {
            return Ok(());
        }
        writeln!(f, "  trace")?;
        for frame in shown.iter().take(SHOWN_MAX) {
            writeln!(f, "    {}", Shown(frame))?;
        }
        let hidden = all.len() - shown.len().min(SHOWN_MAX);
        if hidden > 0 {
            writeln!(f, "    ... and {hidden} more or doubtful")?;
        }
        Ok(())
    }

    fn place(&self) -> Option<String> {
        let function = self.function.as_ref()?;
        let mut place = function.clone();
        if let Some(offset) = self.offset {
            place.push_str(&format!("+{offset:#x}"));
        }
        if let Some(module) = &self.module {
            place.push_str(&format!(" [{module}]"));
        }
        Some(place)
    }

    fn kernel(&self) -> Option<String> {
        let release = self.release.as_ref()?;
        Some(match &self.taint {
            Some(taint) => format!("{release}, tainted {taint}"),
            None => format!("{release}, not tainted"),
        })
    }

    fn running(&self) -> Option<String> {
        let task = self.task.as_ref()?;
        let pid = self.pid.map(|pid| format!(" ({pid})")).unwrap_or_default();
        let cpu = self
            .cpu
            .map(|cpu| format!(" on CPU {cpu}"))
            .unwrap_or_default();
        Some(format!("{task}{pid}{cpu}"))
    }
}
