//! The programs people open a vmcore with, run on it and judged: drgn, crash, and the reader of the
//! plain log.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// What must be found, whoever reads.
#[derive(Debug)]
pub struct Expected<'a> {
    /// Function on the crashed thread's stack.
    pub function: &'a str,
    /// It may be on any task's stack instead: who found out is who crashed.
    pub anywhere: bool,
    /// Number of CPUs that were online.
    pub cpus: u32,
    /// Kernel messages that were on the serial console before the machine died.
    pub console: &'a [String],
}

/// The part of `console` that was printed before the first page was sent, so that a vmcore must
/// hold it: what the client has the kernel print after the memory (tasks, memory figures) goes into
/// the crash's log only.
#[must_use]
pub fn before_state(console: &[String]) -> &[String] {
    let end = console
        .iter()
        .position(|line| line.starts_with("sysrq: Show "))
        .unwrap_or(console.len());
    &console[..end]
}

/// What a reader found wrong; nothing when all is there.
pub type Complaints = Vec<String>;

/// No stock kernel runs with fewer tasks: kthreadd alone starts more.
const TASKS_MIN: usize = 30;
/// Titles of the two lists of tasks at the end of a crash's log.
const BLOCKED_TASKS: &str = "netdump: blocked tasks";
const ALL_TASKS: &str = "netdump: all tasks";
/// How a kernel begins the message of its end.
const PANIC: &str = "Kernel panic - not syncing";
const DRGN_SCRIPT: &str = include_str!("drgn.py");

#[derive(Deserialize)]
struct DrgnView {
    tasks: Vec<(i64, String)>,
    crashed: Vec<String>,
    /// Functions that are on any task's stack.
    all: Vec<String>,
    cpus: Vec<DrgnCpu>,
    log: String,
}

#[derive(Deserialize)]
struct DrgnCpu {
    cpu: u32,
    #[serde(default)]
    frames: Vec<String>,
    #[serde(default)]
    rip: u64,
    #[serde(default)]
    rsp: u64,
    error: Option<String>,
}

/// Has `python` (with drgn) read `vmcore` with the symbols in `symbols`; gives its complaints and
/// the number of tasks.
///
/// # Errors
/// If drgn cannot be run or fails outright.
pub fn drgn(
    python: &Path,
    vmcore: &Path,
    symbols: &[&Path],
    expected: &Expected<'_>,
) -> Result<(Complaints, usize)> {
    let view: DrgnView = script(
        Command::new(python)
            .args(["-c", DRGN_SCRIPT])
            .arg(vmcore)
            .args(symbols),
    )?;
    Ok((judge_drgn(&view, expected), view.tasks.len()))
}

/// Runs a script that prints one JSON value.
///
/// # Errors
/// If it cannot be run, fails, or prints something else.
pub fn script<T: DeserializeOwned>(command: &mut Command) -> Result<T> {
    script_with(command, &[])
}

/// As [`script`], for one that reads `input`.
///
/// # Errors
/// If it cannot be run, fails, or prints something else.
pub fn script_with<T: DeserializeOwned>(command: &mut Command, input: &[u8]) -> Result<T> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let mut stdin = child.stdin.take().context("it has no input")?;
    // A script that fails early reads nothing; its own words say why.
    let told = stdin.write_all(input);
    drop(stdin);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "it failed: {}",
        said.lines().last().unwrap_or("no word why")
    );
    told.context("cannot tell it what to do")?;
    serde_json::from_slice(&output.stdout).context("its answer is malformed")
}

fn judge_drgn(view: &DrgnView, expected: &Expected<'_>) -> Complaints {
    let mut complaints = judge_tasks(
        &view
            .tasks
            .iter()
            .map(|(_, name)| name.as_str())
            .collect::<Vec<_>>(),
    );
    let stack = if expected.anywhere {
        &view.all
    } else {
        &view.crashed
    };
    if !stack.iter().any(|frame| frame == expected.function) {
        complaints.push(format!(
            "{} is not on the stack: {}",
            expected.function,
            view.crashed.join(" ")
        ));
    }
    for cpu in &view.cpus {
        match &cpu.error {
            Some(error) => complaints.push(format!("CPU {}: {error}", cpu.cpu)),
            None if cpu.rip == 0 || cpu.rsp == 0 || cpu.frames.is_empty() => {
                complaints.push(format!("CPU {} has no registers", cpu.cpu));
            }
            None => {}
        }
    }
    if view.cpus.len() != usize::try_from(expected.cpus).unwrap_or(usize::MAX) {
        complaints.push(format!(
            "{} CPUs are online instead of {}",
            view.cpus.len(),
            expected.cpus
        ));
    }
    complaints.extend(judge_log(&view.log, expected.console));
    complaints
}

/// Has crash, started by the words of `reader`, read `vmcore` with the kernel `vmlinux`; gives what
/// it prints. A command that begins with an `@` is a line of its own in the output.
///
/// # Errors
/// If crash cannot be run, fails, or does not come to the end of `commands`.
pub fn converse(reader: &str, vmcore: &Path, vmlinux: &Path, commands: &[&str]) -> Result<String> {
    const END: &str = "@end";
    let mut words = reader.split_ascii_whitespace();
    let program = words.next().context("the command of crash is empty")?;
    let mut child = Command::new(program)
        .args(words)
        .arg("-s")
        .args([vmlinux, vmcore])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let mut input = child.stdin.take().context("crash has no input")?;
    let mut lines = "set scroll off\n".to_owned();
    for command in commands.iter().chain(&[END]) {
        let echo = if command.starts_with('@') {
            "!echo "
        } else {
            ""
        };
        lines += &format!("{echo}{command}\n");
    }
    input
        .write_all((lines + "quit\n").as_bytes())
        .context("cannot tell crash what to do")?;
    drop(input);
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && text.contains(END),
        "it failed ({}): {}",
        output.status,
        said.lines()
            .chain(text.lines())
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("no word why")
    );
    Ok(text)
}

/// Has crash, started by the words of `reader`, read `vmcore` with the kernel `vmlinux`. Same
/// result as [`drgn`].
///
/// # Errors
/// If crash cannot be run or fails outright.
pub fn crash(
    reader: &str,
    vmcore: &Path,
    vmlinux: &Path,
    expected: &Expected<'_>,
) -> Result<(Complaints, usize)> {
    // Each command's output begins behind a line that only `echo` of crash prints.
    let text = converse(
        reader,
        vmcore,
        vmlinux,
        &[
            "@bt",
            if expected.anywhere {
                "foreach bt"
            } else {
                "bt"
            },
            "@all",
            "bt -a",
            "@ps",
            "ps",
            "@log",
            "log",
        ],
    )?;
    Ok(judge_crash(&text, expected))
}

fn judge_crash(text: &str, expected: &Expected<'_>) -> (Complaints, usize) {
    let part = |name: &str| {
        let rest = text
            .split_once(&format!("@{name}\n"))
            .map_or("", |(_, rest)| rest);
        rest.split("\n@").next().unwrap_or_default()
    };
    // A line of ps: an optional mark, PID, PPID, CPU, task, state, memory figures, and the name in
    // the last column. The idle threads are all number 0.
    let tasks: Vec<&str> = part("ps")
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line
                .trim_start_matches(['>', ' '])
                .split_ascii_whitespace()
                .collect();
            let pid: u64 = words.first()?.parse().ok()?;
            if pid == 0 {
                None
            } else {
                Some(words.last()?.trim_matches(['[', ']']))
            }
        })
        .collect();
    let mut complaints = judge_tasks(&tasks);
    if !part("bt").contains(expected.function) {
        let stack: Vec<&str> = part("bt").lines().map(str::trim).take(12).collect();
        complaints.push(format!(
            "{} is not on the crashed stack: {}",
            expected.function,
            stack.join(" / ")
        ));
    }
    let mut seen = 0;
    for block in part("all").split("PID: ").skip(1) {
        seen += 1;
        if !block.contains("RIP") && !block.contains(" at ffff") {
            complaints.push(format!(
                "no registers in: {}",
                block.lines().next().unwrap_or_default()
            ));
        }
    }
    if seen != expected.cpus {
        complaints.push(format!(
            "bt -a shows {seen} CPUs instead of {}",
            expected.cpus
        ));
    }
    complaints.extend(judge_log(part("log"), expected.console));
    (complaints, tasks.len())
}

fn judge_tasks(names: &[&str]) -> Complaints {
    let mut complaints = Vec::new();
    if names.len() < TASKS_MIN {
        complaints.push(format!("only {} tasks are listed", names.len()));
    }
    for name in ["init", "kthreadd"] {
        if !names.contains(&name) {
            complaints.push(format!("task {name} is not listed"));
        }
    }
    complaints
}

/// The tasks at the end of the log: first the blocked ones, then as many as the text itself says,
/// `threads_min` at least.
#[must_use]
pub fn judge_state(log: &str, threads_min: u64) -> Complaints {
    let mut complaints = Vec::new();
    let Some((_, state)) = log.split_once(BLOCKED_TASKS) else {
        return vec![format!("the log does not say {BLOCKED_TASKS:?}")];
    };
    let (blocked, all) = state.split_once(ALL_TASKS).unwrap_or((state, ""));
    let shown = |line: &str| -> Option<u64> {
        let (before, _) = line.split_once(" threads shown")?;
        before.rsplit(' ').next()?.parse().ok()
    };
    // What was cut by a limit says so in another line with the same words.
    match all.lines().find_map(shown) {
        None => complaints.push("the tasks do not end with their number".to_owned()),
        Some(shown) if shown < threads_min => {
            complaints.push(format!(
                "{shown} threads are shown, at least {threads_min} exist"
            ));
        }
        Some(shown) => {
            let told = all.lines().filter(|line| line.contains(" state:")).count();
            if u64::try_from(told).unwrap_or(0) != shown {
                complaints.push(format!(
                    "{told} tasks are in the log, {shown} are said to be"
                ));
            }
        }
    }
    if blocked.lines().any(|line| line.contains(" state:S")) {
        complaints.push("a task that sleeps is among the blocked ones".to_owned());
    }
    complaints
}

/// Every kernel message of the console must be in the log.
#[must_use]
pub fn judge_log(log: &str, console: &[String]) -> Complaints {
    let mut complaints = Vec::new();
    if console.is_empty() {
        complaints.push("the console itself has no line to compare with".to_owned());
    }
    // A panic in an NMI or with the console's lock held does not reach the console.
    if !log.contains(PANIC) {
        complaints.push(format!("the log does not say {PANIC:?}"));
    }
    let lost: Vec<&String> = console
        .iter()
        .filter(|line| !log.contains(line.as_str()))
        .collect();
    if let Some(first) = lost.first() {
        complaints.push(format!(
            "{} of {} console lines are not in the log, first {first:?}",
            lost.len(),
            console.len()
        ));
    }
    complaints
}

/// Every kernel message of the serial console must be in the server's log of the host's live
/// messages, and nothing may be told missing in it.
#[must_use]
pub fn judge_streamed(streamed: &str, console: &[String]) -> Complaints {
    let mut complaints = Vec::new();
    let mut texts = BTreeSet::new();
    for line in streamed.lines() {
        let Some((_utc, told)) = line.split_once(' ') else {
            complaints.push(format!("no line of a log: {line:?}"));
            continue;
        };
        if told.starts_with("!gap") || told.starts_with("!lost") || told.starts_with("!dropped") {
            complaints.push(format!("the live messages are not whole: {told:?}"));
        } else if let Some((_, text)) = told.split_once(';') {
            // Behind a tab is the record's dictionary.
            let text = unescaped(text.split('\t').next().unwrap_or(text));
            texts.extend(text.lines().map(|line| line.trim_end().to_owned()));
        }
    }
    let lost: Vec<&String> = console
        .iter()
        .filter(|line| !texts.contains(line.as_str()))
        .collect();
    if let Some(first) = lost.first() {
        complaints.push(format!(
            "{} of {} console lines did not come live, first {first:?}",
            lost.len(),
            console.len()
        ));
    }
    complaints
}

/// A record's text as a console shows it: its `\xHH` are characters again.
fn unescaped(text: &str) -> String {
    let mut pieces = text.split("\\x");
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let digits = piece.get(..2);
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                plain.push(char::from(byte));
                plain.push_str(&piece[2..]);
            }
            None => {
                plain.push_str("\\x");
                plain.push_str(piece);
            }
        }
    }
    plain
}

/// The kernel's messages in what a serial console wrote: the text behind the time, in the order
/// printed.
///
/// Lines that do not begin with a time come from the firmware or from programs.
#[must_use]
pub fn console_messages(console: &str) -> Vec<String> {
    console
        .lines()
        .filter_map(|line| {
            let (time, text) = line.trim_end().strip_prefix('[')?.split_once("] ")?;
            time.trim().parse::<f64>().ok()?;
            Some(text.to_owned())
        })
        .filter(|text| !text.trim().is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_that_are_not_told_are_missed() {
        let text = |shown: u32, second: &str| {
            format!(
                "[ 1.0] netdump: blocked tasks\n[ 1.1] task:x state:D stack:0\n[ 1.1] netdump: all tasks\n\
                 [ 1.1] task:x state:D stack:0\n[ 1.2] task:y {second} stack:0\n[ 1.3] netdump: {shown} \
                 threads shown, 1 of them blocked\n"
            )
        };
        assert_eq!(judge_state(&text(2, "state:S"), 2), [""; 0]);
        assert_eq!(judge_state(&text(2, "state:S"), 3).len(), 1);
        assert_eq!(judge_state(&text(3, "state:S"), 2).len(), 1);
        assert_eq!(judge_state(&text(2, ""), 2).len(), 1);
        let sleeps = text(2, "state:S").replacen("state:D", "state:S", 1);
        assert_eq!(judge_state(&sleeps, 2).len(), 1);
        let cut = text(2, "state:S").replace("netdump: 2 threads shown, 1 of them blocked", "");
        assert_eq!(judge_state(&cut, 2).len(), 1);
        assert_eq!(judge_state("nothing", 2).len(), 1);
    }

    #[test]
    fn console_messages_are_told_from_other_text() {
        let console = "SeaBIOS\r\n[    0.000000] Linux version 6.1\r\nguest_init: hello\r\n[   12.5] Kernel panic\r\n";
        assert_eq!(
            console_messages(console),
            ["Linux version 6.1", "Kernel panic"]
        );
    }

    #[test]
    fn a_log_that_lacks_a_line_is_refused() {
        let console = ["a".to_owned(), "Kernel panic - not syncing: b".to_owned()];
        assert!(judge_log("[1] a\n[2] Kernel panic - not syncing: b\n", &console).is_empty());
        assert_eq!(judge_log("[1] a\n", &console).len(), 2);
        assert_eq!(judge_log("[1] a\n", &console[..1]).len(), 1);
        let panic = "[2] Kernel panic - not syncing: b\n";
        assert!(judge_log(&format!("[1] a\n{panic}"), &console[..1]).is_empty());
        assert_eq!(judge_log(panic, &[]).len(), 1);
    }

    #[test]
    fn live_messages_must_be_whole() {
        let console = ["a".to_owned(), "b\\c".to_owned()];
        let whole = "2026-01-01T00:00:00Z 4,1,10,-;a  \tSUBSYSTEM=x\n\
                     2026-01-01T00:00:00Z 4,2,11,-;0\\x0ab\\x5cc\n";
        assert!(judge_streamed(whole, &console).is_empty());
        let gap = format!("{whole}2026-01-01T00:00:00Z !gap,3,4;\n");
        assert_eq!(judge_streamed(&gap, &console).len(), 1);
        assert_eq!(judge_streamed(whole, &["d".to_owned()]).len(), 1);
        assert_eq!(judge_streamed("", &console).len(), 1);
    }

    #[test]
    fn the_output_of_crash_is_judged() {
        let mut text = String::from(
            "@bt\nPID: 1 CPU: 0\n #0 [ffff] crashme_panic at ffffffff\n\
             @all\nPID: 1 CPU: 0\n RIP: 1\nPID: 0 CPU: 1\n RIP: 2\n\
             @ps\n PID PPID CPU TASK ST %MEM VSZ RSS COMM\n> 0 0 0 ffff RU 0.0 0 0 [swapper/0]\n",
        );
        for pid in 1..40 {
            let name = if pid == 1 { "init" } else { "[kthreadd]" };
            text.push_str(&format!("  {pid} 0 0 ffff IN 0.0 0 0 {name}\n"));
        }
        text.push_str("@log\n[ 1.0] Kernel panic - not syncing: x\n");
        let console = ["Kernel panic - not syncing: x".to_owned()];
        let mut expected = Expected {
            function: "crashme_panic",
            anywhere: false,
            cpus: 2,
            console: &console,
        };
        assert_eq!(judge_crash(&text, &expected), (vec![], 39));
        expected.function = "crashme_null";
        expected.cpus = 3;
        assert_eq!(judge_crash(&text, &expected).0.len(), 2);
    }
}
