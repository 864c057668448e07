//! What `netdump triage` reads in a vmcore without symbols, held against drgn with symbols: every
//! task, and every function of every backtrace; and the signature against that of the plain log.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::readers::{Complaints, Expected, script_with};

/// Complaints that are listed one by one; the others are counted.
const LISTED_MAX: usize = 10;
/// What this kernel does not have is no complaint.
const NO_LOCKDEP: &str = "held locks: ";
const SCRIPT: &str = include_str!("agreement.py");

/// What `netdump triage --json` says of one file.
#[derive(Deserialize)]
struct Told {
    crash: bool,
    signature: Option<String>,
    family: Option<String>,
    title: Option<String>,
    #[serde(default)]
    tasks: Vec<Task>,
    #[serde(default)]
    cpus: Vec<Cpu>,
    #[serde(default)]
    unread: Vec<String>,
}

#[derive(Deserialize)]
struct Task {
    pid: u64,
    name: String,
    backtrace: Backtrace,
}

#[derive(Deserialize)]
struct Cpu {
    cpu: u64,
    backtrace: Backtrace,
}

#[derive(Deserialize)]
struct Backtrace {
    frames: Vec<Frame>,
}

#[derive(Deserialize)]
struct Frame {
    address: u64,
    function: Option<String>,
    offset: u64,
}

#[derive(Deserialize)]
struct DrgnView {
    tasks: Vec<DrgnTask>,
    cpus: Vec<DrgnCpu>,
    symbols: BTreeMap<String, Vec<u64>>,
}

#[derive(Deserialize)]
struct DrgnTask {
    pid: u64,
    name: String,
    frames: Option<Vec<DrgnFrame>>,
}

#[derive(Deserialize)]
struct DrgnCpu {
    cpu: u64,
    frames: Option<Vec<DrgnFrame>>,
}

/// Address, name, whether debug information names it.
#[derive(Deserialize)]
struct DrgnFrame(u64, String, bool);

/// What was compared.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Agreement {
    /// Tasks that triage lists.
    pub tasks: usize,
    /// Frames that were compared with drgn's; 0 without drgn.
    pub frames: usize,
}

/// Has `netdump` triage `vmcore` and `log`, and compares with drgn's view if `drgn` names its
/// Python and the files with symbols.
///
/// # Errors
/// If a program cannot be run or fails outright.
pub fn triage(
    netdump: &Path,
    vmcore: &Path,
    log: &Path,
    drgn: Option<(&Path, &[&Path])>,
    expected: &Expected<'_>,
) -> Result<(Complaints, Agreement)> {
    let of = |file: &Path| -> Result<Told> {
        let output = Command::new(netdump)
            .args(["triage", "--json"])
            .arg(file)
            .output()
            .with_context(|| format!("cannot run {}", netdump.display()))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "it failed: {said}");
        serde_json::from_slice(&output.stdout).context("its answer is malformed")
    };
    let (core, text) = (of(vmcore)?, of(log)?);
    let mut complaints = judge(&core, &text, expected);
    let mut agreement = Agreement {
        tasks: core.tasks.len(),
        frames: 0,
    };
    if let Some((python, symbols)) = drgn {
        let names = serde_json::to_vec(&names(&core))?;
        let mut command = Command::new(python);
        command.args(["-c", SCRIPT]).arg(vmcore).args(symbols);
        let view: DrgnView = script_with(&mut command, &names)?;
        let (disagreements, frames) = compare(&core, &view);
        complaints.extend(disagreements);
        agreement.frames = frames;
    }
    Ok((complaints, agreement))
}

/// What must hold without drgn.
fn judge(core: &Told, text: &Told, expected: &Expected<'_>) -> Complaints {
    let mut complaints = Vec::new();
    if !core.crash {
        complaints.push("no crash is found in the vmcore's log".to_owned());
    }
    let names = |told: &Told| {
        (
            told.signature.clone(),
            told.family.clone(),
            told.title.clone(),
        )
    };
    if names(core) != names(text) {
        complaints.push(format!(
            "the vmcore's signature is {:?}, that of the log {:?}",
            names(core),
            names(text)
        ));
    }
    let unread = core
        .unread
        .iter()
        .filter(|why| !why.starts_with(NO_LOCKDEP));
    complaints.extend(unread.map(|why| format!("not read: {why}")));
    let mut stacks: Vec<&Backtrace> = core.cpus.iter().map(|cpu| &cpu.backtrace).collect();
    if expected.anywhere {
        stacks.extend(core.tasks.iter().map(|task| &task.backtrace));
    }
    let is_there = stacks
        .iter()
        .flat_map(|stack| &stack.frames)
        .any(|frame| frame.function.as_deref() == Some(expected.function));
    if !is_there {
        complaints.push(format!("{} is on no stack", expected.function));
    }
    complaints
}

/// Every function that triage names.
fn names(core: &Told) -> BTreeSet<&str> {
    let tasks = core.tasks.iter().map(|task| &task.backtrace);
    tasks
        .chain(core.cpus.iter().map(|cpu| &cpu.backtrace))
        .flat_map(|stack| &stack.frames)
        .filter_map(|frame| frame.function.as_deref())
        .collect()
}

/// Every disagreement, and how many frames were compared.
fn compare(core: &Told, view: &DrgnView) -> (Complaints, usize) {
    let mut complaints = Vec::new();
    let mut compared = 0;
    let mut stack = |who: String, ours: &Backtrace, theirs: &Option<Vec<DrgnFrame>>| {
        let Some(theirs) = theirs else {
            return;
        };
        compared += theirs.len();
        let is_equal = ours.frames.len() == theirs.len()
            && ours
                .frames
                .iter()
                .zip(theirs)
                .all(|(ours, theirs)| is_same(ours, theirs, &view.symbols));
        if !is_equal {
            complaints.push(difference(&who, &ours.frames, theirs, &view.symbols));
        }
    };
    for theirs in &view.cpus {
        match core.cpus.iter().find(|ours| ours.cpu == theirs.cpu) {
            Some(ours) => stack(format!("CPU {}", ours.cpu), &ours.backtrace, &theirs.frames),
            None => stack(format!("CPU {}", theirs.cpu), &NOTHING, &theirs.frames),
        }
    }
    let ours: BTreeMap<u64, &Task> = core.tasks.iter().map(|task| (task.pid, task)).collect();
    let mut missing = Vec::new();
    for theirs in &view.tasks {
        match ours.get(&theirs.pid) {
            Some(task) if task.name == theirs.name => {
                let who = format!("task {} ({})", task.name, task.pid);
                stack(who, &task.backtrace, &theirs.frames);
            }
            _ => missing.push(format!(
                "task {} ({}) is not listed",
                theirs.name, theirs.pid
            )),
        }
    }
    if core.tasks.len() != view.tasks.len() {
        let (ours, theirs) = (core.tasks.len(), view.tasks.len());
        missing.push(format!("{ours} tasks are listed, drgn lists {theirs}"));
    }
    complaints.extend(missing);
    let more = complaints.len().saturating_sub(LISTED_MAX);
    complaints.truncate(LISTED_MAX);
    if more > 0 {
        complaints.push(format!("and {more} more disagreements with drgn"));
    }
    (complaints, compared)
}

const NOTHING: Backtrace = Backtrace { frames: Vec::new() };

/// Whether both name the same place. Where debug information names the function, so must we, but
/// for what the compiler appends; in assembly, where drgn takes the largest symbol and the kernel
/// the nearest, drgn's own table must have our name at our place.
fn is_same(ours: &Frame, theirs: &DrgnFrame, symbols: &BTreeMap<String, Vec<u64>>) -> bool {
    let DrgnFrame(address, name, is_known) = theirs;
    let Some(function) = &ours.function else {
        return ours.address == *address && !is_known;
    };
    let begin = ours.address.wrapping_sub(ours.offset);
    let is_symbol = || {
        symbols
            .get(function)
            .is_some_and(|places| places.contains(&begin))
    };
    // In a module whose debug information was not given, drgn has no name at all.
    let is_nameless = name.starts_with("0x");
    let agrees = plain(function) == plain(name) || is_nameless || !is_known && is_symbol();
    ours.address == *address && agrees
}

fn plain(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

fn difference(
    who: &str,
    ours: &[Frame],
    theirs: &[DrgnFrame],
    symbols: &BTreeMap<String, Vec<u64>>,
) -> String {
    let same = ours
        .iter()
        .zip(theirs)
        .take_while(|(ours, theirs)| is_same(ours, theirs, symbols))
        .count();
    let ours = ours.get(same).map_or("the end", |frame| {
        frame.function.as_deref().unwrap_or("no name")
    });
    let theirs = theirs.get(same).map_or("the end", |frame| frame.1.as_str());
    format!("{who}: frame {same} is {ours}, for drgn {theirs}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(function: &str, offset: u64) -> Told {
        let json = serde_json::json!({
            "crash": true, "signature": "s1:1", "family": "f1:1", "title": "t",
            "tasks": [{"pid": 1, "name": "init", "backtrace": {"frames": [
                {"address": 0x1010, "function": function, "offset": offset}]}}],
        });
        serde_json::from_value(json).unwrap()
    }

    fn view(name: &str, is_known: bool) -> DrgnView {
        let json = serde_json::json!({
            "tasks": [{"pid": 1, "name": "init", "frames": [[0x1010, name, is_known]]}],
            "cpus": [], "symbols": {"label": [0x1008]},
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn names_are_equal_but_for_what_the_compiler_appends() {
        assert_eq!(compare(&told("f.part.0", 16), &view("f", true)).0, [""; 0]);
        assert_eq!(compare(&told("g", 16), &view("f", true)).0.len(), 1);
    }

    #[test]
    fn where_drgn_has_no_name_the_address_decides() {
        assert_eq!(
            compare(&told("f", 16), &view("0xffffffffc0260708", false)).0,
            [""; 0]
        );
    }

    #[test]
    fn a_label_in_assembly_must_be_where_drgn_has_it() {
        assert_eq!(compare(&told("label", 8), &view("f", false)).0, [""; 0]);
        assert_eq!(compare(&told("label", 9), &view("f", false)).0.len(), 1);
        assert_eq!(compare(&told("label", 8), &view("f", true)).0.len(), 1);
    }

    #[test]
    fn a_task_or_a_frame_too_few_is_told() {
        let mut ours = told("f", 16);
        ours.tasks[0].backtrace.frames.clear();
        assert_eq!(compare(&ours, &view("f", true)).0.len(), 1);
        ours.tasks.clear();
        assert_eq!(compare(&ours, &view("f", true)).0.len(), 2);
    }

    #[test]
    fn another_signature_is_told() {
        let expected = Expected {
            function: "f",
            anywhere: true,
            cpus: 1,
            console: &[],
        };
        let (core, mut log) = (told("f", 16), told("f", 16));
        assert_eq!(judge(&core, &log, &expected), [""; 0]);
        log.signature = None;
        assert_eq!(judge(&core, &log, &expected).len(), 1);
    }
}
