//! The parts of one report: stacks, registers, who was running on what.
//!
//! Nothing here decides: each line is put where its form says it belongs. A report may lack any
//! part, because logs are cut and lines are lost.

use serde::Serialize;

use crate::class::Class;
use crate::frame::{Frame, TraceLine};

/// Frames of a stack beyond this many are not kept; the kernel's own unwinders stop near 64.
const FRAMES_MAX: usize = 128;
/// Stacks of a report beyond this many are not kept.
const STACKS_MAX: usize = 24;
/// The registers of the widest architecture, twice.
const REGISTERS_MAX: usize = 80;

/// What a stack of a report shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StackKind {
    /// Who did what the report is about.
    Own,
    /// A CPU that was asked where it is.
    Asked,
    /// History and bystanders: who allocated, who freed, other chains of locks, other tasks.
    Other,
}

/// One call trace.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Stack {
    /// What it shows.
    pub kind: StackKind,
    /// From the callee outwards.
    pub frames: Vec<Frame>,
}

/// The parts of one report.
#[derive(Clone, Debug, Default)]
pub(crate) struct Anatomy {
    /// The line that began it, without prefix.
    pub head: String,
    /// The function that the first line names.
    pub named: Option<Frame>,
    /// The other function of a data race.
    pub second: Option<Frame>,
    /// Where the lock that a lock report is about was taken.
    pub lock: Option<Frame>,
    /// `Read` or `Write` of a bad access.
    pub access: Option<&'static str>,
    /// `file:line` that `BUG()` and `WARN()` tell.
    pub position: Option<String>,
    /// The text of the warning before its line, or of the condition.
    pub notes: Vec<String>,
    pub stacks: Vec<Stack>,
    pub task: Option<String>,
    pub pid: Option<u32>,
    pub cpu: Option<u32>,
    pub taint: Option<String>,
    pub release: Option<String>,
    pub hardware: Option<String>,
    pub registers: Vec<(String, String)>,
    pub code: Option<String>,
    /// The message of the panic that the report ended in.
    pub panic: Option<String>,
}

impl Anatomy {
    /// Takes a report apart. `lines` are in the order of one writer each.
    pub(crate) fn of(class: Class, lines: impl Iterator<Item = impl AsRef<str>>) -> Self {
        let mut parser = Parser {
            class,
            anatomy: Self::default(),
            kind: StackKind::Own,
            open: false,
            has_lock_line: false,
            waits_for_lock: false,
            user: false,
            aside: false,
            astray: false,
        };
        for (number, line) in lines.enumerate() {
            if number == 0 {
                parser.head(line.as_ref());
            } else {
                parser.line(line.as_ref());
            }
        }
        parser
            .anatomy
            .stacks
            .retain(|stack| !stack.frames.is_empty());
        parser.anatomy
    }
}

struct Parser {
    class: Class,
    anatomy: Anatomy,
    /// What the next stack shows.
    kind: StackKind,
    /// Whether the last stack takes more frames.
    open: bool,
    has_lock_line: bool,
    waits_for_lock: bool,
    /// Whether the registers that come are those of user mode.
    user: bool,
    /// Whether the next line names a function that is beside the matter.
    aside: bool,
    /// Whether the program counter was in no function, so that the caller's register has to do.
    astray: bool,
}

impl Parser {
    fn head(&mut self, line: &str) {
        line.clone_into(&mut self.anatomy.head);
        self.name_in(line);
        self.lock_line(line);
        self.notes(line);
        self.facts(line);
        self.panic(line);
    }

    /// The function and the position that a beginning names.
    fn name_in(&mut self, line: &str) {
        if let Some((one, other)) = line.split_once(" / ")
            && self.class == Class::Kcsan
        {
            self.anatomy.second = bare_or_symbolic(other);
            let name = one.rsplit(" in ").next().unwrap_or(one);
            self.anatomy.named = bare_or_symbolic(name);
            return;
        }
        // Only behind these words: other numbers of a line look like functions as well.
        let named = match self.class {
            Class::Kcsan => line
                .rsplit_once(" in ")
                .and_then(|(_, name)| bare_or_symbolic(name)),
            // A name without offset is a name that was cut.
            Class::Kasan | Class::Kmsan | Class::Kfence => line
                .rsplit_once(" in ")
                .and_then(|(_, name)| Frame::within(name)),
            Class::StackOverflow => line
                .split_once("corrupted in: ")
                .and_then(|(_, name)| bare_or_symbolic(name)),
            // "last function: frob_work", and since 6.7 "workfn=frob_work".
            Class::Kernel if line.contains("function: ") || line.contains("workfn=") => line
                .rsplit_once("function: ")
                .or_else(|| line.rsplit_once("workfn="))
                .and_then(|(_, name)| bare_or_symbolic(name)),
            Class::Warning | Class::Bug | Class::Cfi | Class::Trap | Class::Ubsan => {
                // The function of a cut line may be cut too, and says nothing.
                Frame::within(line)
            }
            _ => None,
        };
        if named.is_some() && self.anatomy.named.is_none() {
            self.anatomy.named = named;
        }
        if matches!(self.class, Class::Warning | Class::Bug)
            && let Some(position) = position(line)
        {
            self.anatomy.position = Some(position);
        }
    }

    fn line(&mut self, line: &str) {
        let text = line.trim();
        let is_aside = std::mem::take(&mut self.aside);
        if let Some(trace) = TraceLine::parse(line) {
            if !is_aside {
                self.trace(trace);
            }
            return;
        }
        if ASIDES.iter().any(|start| text.starts_with(start)) {
            self.aside = text.ends_with(':');
            return;
        }
        if self.heading(text) || self.register_place(text) {
            return;
        }
        self.panic(text);
        self.lock_line(text);
        self.facts(text);
        if !self.user {
            self.code(text);
            self.registers(text);
        }
        self.notes(text);
    }

    fn trace(&mut self, trace: TraceLine) {
        for frame in trace.frames {
            self.frame(frame);
        }
    }

    fn frame(&mut self, frame: Frame) {
        if !self.open {
            self.new_stack(self.kind);
        }
        let Some(stack) = self.anatomy.stacks.last_mut() else {
            return;
        };
        // arm names each function twice: as caller and as the next callee.
        let repeated = stack.frames.last().is_some_and(|last| {
            last.symbol == frame.symbol && (frame.offset.is_none() || last.offset.is_none())
        });
        if stack.frames.len() < FRAMES_MAX && !repeated {
            stack.frames.push(frame);
        }
    }

    fn new_stack(&mut self, kind: StackKind) {
        self.open = true;
        if self.anatomy.stacks.len() < STACKS_MAX {
            self.anatomy.stacks.push(Stack {
                kind,
                frames: Vec::new(),
            });
        } else {
            // Nothing may be added to the last stack that was kept.
            self.anatomy.stacks.push(Stack {
                kind: StackKind::Other,
                frames: Vec::new(),
            });
            self.anatomy.stacks.remove(STACKS_MAX - 1);
        }
    }

    /// Lines that say what the next stack shows.
    fn heading(&mut self, text: &str) -> bool {
        let is = |beginnings: &[&str]| beginnings.iter().any(|b| text.starts_with(b));
        if is(&[
            "Call Trace:",
            "Call trace:",
            "Backtrace:",
            "Call Backtrace",
            "Stack backtrace:",
        ]) {
            // Registers came first; the trace goes on from them.
            let goes_on = self.open
                && self.anatomy.stacks.last().is_some_and(|stack| {
                    stack.kind == self.kind && stack.frames.iter().all(|frame| frame.register)
                });
            if !goes_on {
                self.new_stack(self.kind);
            }
            // Old kernels put the first frame on the same line.
            if let Some((_, rest)) = text.split_once(':')
                && let Some(trace) = TraceLine::parse(rest)
            {
                self.trace(trace);
            }
            return true;
        }
        let kind = if is(&OTHER_HEADINGS) || text.contains("kthread stack dump:") {
            StackKind::Other
        } else if is(&ASKED_HEADINGS) {
            StackKind::Asked
        } else if is(&["stack backtrace:", "Stack traceback"]) {
            StackKind::Own
        } else if self.class == Class::Kcsan && text.contains(" by ") && text.contains(" of ") {
            // The first of the two accesses is the one that was caught.
            if self.anatomy.stacks.is_empty() {
                StackKind::Own
            } else {
                StackKind::Other
            }
        } else {
            return false;
        };
        self.kind = kind;
        self.open = false;
        true
    }

    /// Lines that say where the program counter was.
    fn register_place(&mut self, text: &str) -> bool {
        if self.astray
            && let Some(mut frame) = return_place(text).and_then(Frame::within)
        {
            self.astray = false;
            frame.register = true;
            self.frame(frame);
            return true;
        }
        let Some((rest, is_start)) = place(text) else {
            return false;
        };
        if let Some(code) = rest
            .strip_prefix("0033:")
            .or_else(|| rest.strip_prefix("0023:"))
        {
            // The user's registers end a stack.
            self.open = code.is_empty();
            self.user = true;
            return true;
        }
        self.user = false;
        let Some(mut frame) = Frame::within(rest) else {
            self.astray |= self.anatomy.stacks.is_empty() && is_nowhere(rest);
            return true;
        };
        frame.register = true;
        let mut known = self
            .anatomy
            .stacks
            .iter()
            .filter(|stack| stack.frames.first().is_some_and(|first| *first == frame));
        // The registers are told once before the trace, by old kernels twice, and once more after it.
        match known.next() {
            Some(stack) if is_start && self.open => {
                if stack.frames.iter().any(|frame| !frame.register) {
                    self.open = false;
                    self.kind = StackKind::Other;
                }
            }
            _ => self.frame(frame),
        }
        true
    }

    fn panic(&mut self, text: &str) {
        if let Some((_, why)) = text.split_once("Kernel panic - not syncing")
            && self.anatomy.panic.is_none()
        {
            let why = why.trim_start_matches(':').trim();
            self.anatomy.panic = Some(why.to_owned());
            if self.anatomy.named.is_none() {
                self.name_in(text);
            }
        }
    }

    /// `comm/pid is trying to acquire lock:` and the line after it.
    fn lock_line(&mut self, text: &str) {
        let starts = [
            "is trying to acquire lock:",
            "is trying to acquire:",
            "is trying to lock:",
            "is trying to release lock",
            "just changed the state of lock",
            "with a lock still held there!",
            "] takes:",
        ];
        if self.waits_for_lock && !self.has_lock_line && !text.is_empty() {
            let place = text
                .split_once(" at: ")
                .map(|(_, place)| place)
                .or_else(|| text.starts_with('[').then_some(text));
            self.anatomy.lock = place.and_then(Frame::within);
            self.has_lock_line = self.anatomy.lock.is_some();
            self.waits_for_lock = false;
        }
        if starts.iter().any(|start| text.contains(start)) {
            self.waits_for_lock = true;
        }
        // Nobody is on a stack when a lock is still held: the first lock is all there is.
        if self.class == Class::Lock
            && self.anatomy.lock.is_none()
            && self.anatomy.head.contains(" held ")
            && text.starts_with("#0: ")
        {
            let place = text.split_once(" at: ").map_or("", |(_, place)| place);
            self.anatomy.lock = Frame::within(place);
        }
    }

    fn notes(&mut self, text: &str) {
        let access = [
            "Read of size",
            "Read at addr",
            "Write of size",
            "Write at addr",
        ];
        if access.iter().any(|start| text.starts_with(start)) && self.anatomy.access.is_none() {
            self.anatomy.access = Some(if text.starts_with('R') {
                "Read"
            } else {
                "Write"
            });
        }
        if matches!(self.class, Class::Kfence) && self.anatomy.access.is_none() {
            // The access is in the first line of KFENCE.
            self.anatomy.access = Some("");
        }
        let is_note = Class::of_line(text).is_some()
            || text.starts_with("ODEBUG: ")
            || text.starts_with("last function: ")
            || text.contains(" workfn=")
            || text.starts_with("DEBUG_LOCKS_WARN_ON");
        if is_note && self.anatomy.notes.len() < NOTES_MAX {
            self.anatomy.notes.push(text.to_owned());
            self.name_in(text);
        }
    }

    /// `CPU: 0 PID: 1 Comm: sh Tainted: G W 6.1.0 #1` and the lines around it.
    fn facts(&mut self, text: &str) {
        let a = &mut self.anatomy;
        if let Some(hardware) = text.strip_prefix("Hardware name: ") {
            a.hardware.get_or_insert_with(|| hardware.trim().to_owned());
        }
        if a.cpu.is_none() {
            a.cpu = after_number(text, "CPU: ")
                .or_else(|| after_number(text, "CPU#"))
                .or_else(|| after_number(text, "on cpu "));
        }
        if a.pid.is_none() {
            a.pid = after_number(text, "PID: ").or_else(|| after_number(text, "Pid: "));
        }
        if let Some((_, rest)) = text.split_once("Comm: ")
            && a.task.is_none()
        {
            identity(a, rest, &["Not tainted", "Tainted:"]);
        } else if let Some((_, rest)) = text.split_once(", comm: ")
            && a.task.is_none()
        {
            // Before 3.10: "Pid: 1, comm: sh Not tainted 2.6.32 #1".
            identity(a, rest, &["Not tainted", "Tainted:"]);
        }
        if let Some((_, rest)) = text.split_once(" by task ")
            && a.task.is_none()
            && let Some((task, pid)) = rest.trim().rsplit_once('/')
        {
            a.task = Some(task.to_owned());
            a.pid = a.pid.or_else(|| pid.parse().ok());
        }
        if let Some(rest) = text.strip_prefix("INFO: task ")
            && a.task.is_none()
            && let Some((who, _)) = rest
                .split_once(" blocked for")
                .or_else(|| rest.split_once(" blocked in I/O wait"))
                .or_else(|| rest.split_once(" can't die"))
            && let Some((task, pid)) = who.rsplit_once(':')
        {
            a.task = Some(task.to_owned());
            a.pid = pid.parse().ok();
        }
    }

    /// The bytes around the program counter.
    fn code(&mut self, text: &str) {
        let code = text
            .strip_prefix("Code: ")
            .or_else(|| text.strip_prefix("code: "))
            .filter(|code| code.bytes().any(|b| b.is_ascii_digit()));
        if let Some(code) = code
            && self.anatomy.code.is_none()
        {
            self.anatomy.code = Some(code.trim().to_owned());
        }
    }

    /// `RAX: 0000 RBX: 0000`, `x29: ffff x28: ffff`, `sp : ffff`, `GPR00: ...`.
    fn registers(&mut self, text: &str) {
        let a = &mut self.anatomy;
        if a.registers.len() >= REGISTERS_MAX || !text.contains(": ") {
            return;
        }
        let mut words = text.split_whitespace().peekable();
        let mut found = Vec::new();
        while let Some(word) = words.next() {
            let name = if let Some(name) = word.strip_suffix(':') {
                name
            } else if words.peek() == Some(&":") {
                words.next();
                word
            } else {
                return;
            };
            let Some(value) = words.next() else { return };
            if name.len() > 6 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
                return;
            }
            let digits = value.split(['(', ':', ' ']).next().unwrap_or("");
            let digits = digits.trim_start_matches("[<").trim_end_matches(">]");
            if digits.len() < 4 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                return;
            }
            // EFLAGS stands behind RSP without a colon of its own kind.
            found.push((name.to_owned(), value.to_owned()));
        }
        for (name, value) in found {
            if !a.registers.iter().any(|(known, _)| *known == name) {
                a.registers.push((name, value));
            }
        }
    }
}

/// Lines of a report that name a class again are few.
const NOTES_MAX: usize = 8;

const OTHER_HEADINGS: [&str; 26] = [
    "Allocated by task",
    "Allocated:",
    "Freed by task",
    "Freed:",
    "Last potentially related work creation",
    "Second to last potentially related",
    "Last call_rcu",
    "Second to last call_rcu",
    "allocated by task",
    "freed by task",
    "kfence-#",
    "Uninit was created at",
    "Uninit was stored to memory at",
    "Local variable ",
    "page last allocated via",
    "page last free",
    "page_owner tracks the page",
    "the existing dependency chain",
    "-> #",
    "the dependencies between the lock",
    "the dependencies between ",
    "Showing all locks held",
    "Showing all work",
    "Register x",
    "INFO: Allocated in",
    "INFO: Freed in",
];

/// Lines behind which one function stands that has nothing to do with who failed.
const ASIDES: [&str; 4] = [
    "Preemption disabled at:",
    "preempt disabled at:",
    "Last Breaking-Event-Address:",
    "Bad RIP value",
];

const ASKED_HEADINGS: [&str; 4] = [
    "NMI backtrace for cpu",
    "Task dump for CPU",
    "Sending NMI",
    "Sending IPI",
];

/// The value of a line that says where the program counter was, and whether it begins a set of
/// registers.
fn place(text: &str) -> Option<(&str, bool)> {
    let starts = [
        "RIP: ",
        "EIP: ",
        "EIP is at ",
        "ip is at ",
        "IP: ",
        "RIP  ",
        "pc : ",
        "PC is at ",
        "pc is at ",
        "ERA: ",
        "IAOQ[0]: ",
        "TPC: <",
        "epc : ",
        "epc   : ",
        "pc: ",
        "Krnl PSW : ",
        "PC: ",
    ];
    if let Some(rest) = starts.iter().find_map(|start| text.strip_prefix(start)) {
        return Some((rest.trim_start(), true));
    }
    // ppc64: "NIP [c000000000abcdef] function+0x1/0x2"; the line "NIP:  c000... LR: ..." has none.
    let rest = text.strip_prefix("NIP ")?;
    rest.starts_with('[').then_some((rest, true))
}

/// Whether a program counter was told that is in no function: 0, or anything without a name.
fn is_nowhere(place: &str) -> bool {
    let address = place
        .rsplit([':', ' ', ']'])
        .find(|word| !word.is_empty())
        .unwrap_or("");
    let digits = address.trim_start_matches("0x");
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The value of a line of a register that holds the return address.
fn return_place(text: &str) -> Option<&str> {
    ["LR [", "LR is at ", "lr : ", "ra : ", "ra    : ", "ra: "]
        .iter()
        .find_map(|start| text.strip_prefix(start))
}

fn bare_or_symbolic(text: &str) -> Option<Frame> {
    let text = text.trim();
    if let Some(frame) = Frame::within(text) {
        return Some(frame);
    }
    let word = text.split_whitespace().next()?;
    let is_name = word
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.'))
        && word
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && word.len() > 2;
    // A word alone, so that a sentence is not taken for a function.
    (is_name && text.split_whitespace().count() <= 2).then(|| Frame {
        symbol: word.to_owned(),
        reliable: true,
        ..Frame::default()
    })
}

/// `dir/file.c:12` of the line of a warning or of `kernel BUG at`.
fn position(text: &str) -> Option<String> {
    text.split_whitespace()
        .map(|word| word.trim_end_matches(['!', ',']))
        .find(|word| {
            word.rsplit_once(':').is_some_and(|(file, line)| {
                file.contains('.') && !line.is_empty() && line.bytes().all(|b| b.is_ascii_digit())
            })
        })
        .map(str::to_owned)
}

fn after_number(text: &str, key: &str) -> Option<u32> {
    let (_, rest) = text.split_once(key)?;
    let rest = rest.trim_start();
    let end = rest
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(rest.len());
    rest.get(..end)?.parse().ok()
}

/// Task, taint and release from what stands behind `Comm: `.
fn identity(anatomy: &mut Anatomy, rest: &str, marks: &[&str]) {
    let Some((at, mark)) = marks
        .iter()
        .filter_map(|mark| rest.find(mark).map(|at| (at, *mark)))
        .min()
    else {
        return;
    };
    let task = rest.get(..at).unwrap_or("").trim();
    let task = task
        .strip_suffix("Kdump: loaded")
        .unwrap_or(task)
        .trim_end();
    anatomy.task = Some(task.to_owned());
    let after = rest.get(at + mark.len()..).unwrap_or("").trim();
    let words: Vec<&str> = after.split_whitespace().collect();
    if mark == "Tainted:" {
        let flags = words.iter().take_while(|word| is_taint(word));
        let count = flags.clone().count();
        let letters: String = flags.copied().collect();
        anatomy.taint = Some(letters.trim_matches(',').to_owned());
        anatomy.release = words.get(count).map(|word| (*word).to_owned());
    } else {
        anatomy.release = words.first().map(|word| (*word).to_owned());
    }
}

/// Words of capital letters, such as `G` and `OE`; a release has digits.
fn is_taint(word: &str) -> bool {
    word.bytes()
        .all(|b| b.is_ascii_uppercase() || b == b'-' || b == b',')
        && word.len() <= 20
}
