//! The proof of the filter: that it left out what its level says, no more and no less, and that
//! nobody misses it.
//!
//! The full dump is the vmcore with every excluded page put back from QEMU's memory. On it drgn
//! tells what each page is, and makedumpfile makes its own choice; then drgn and crash read all
//! that a debugger of the kernel needs from both files, and must find the same.

use std::collections::BTreeMap;
use std::fs;
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use dump::{
    Compression, Format, Machine, PAGE_SIZE, Page, PageState, Pfn, RamRange, Reader, Writer,
};
use serde::{Deserialize, Serialize};

use crate::memory::GuestMemory;
use crate::oracle::Written;
use crate::readers::{Complaints, converse, script};

const CLASSES_SCRIPT: &str = include_str!("classes.py");
const WALK_SCRIPT: &str = include_str!("walk.py");
/// What crash shows of a kernel without a page of user memory.
const CRASH_COMMANDS: [&str; 6] = ["foreach bt", "ps", "mod", "log", "kmem -s", "kmem -v"];
/// The bit of a level that stands for zero pages, which are told as such and not as excluded.
const LEVEL_ZERO: u8 = 1;
const LEVEL_USER: u8 = 8;
/// The bits of a level that exclude a page of each class of `classes.py`; no others ever are.
const LEVELS: [(&str, u8); 5] = [
    ("free", 16),
    ("cache", 2 | 4),
    ("private cache", 4),
    ("anonymous", LEVEL_USER),
    ("hugetlb", LEVEL_USER),
];

/// Differences to makedumpfile that are its own, by class: it sends pages that netdump leaves out.
/// Kernels that have this line in VMCOREINFO number the types of pages (since 6.11), and
/// makedumpfile 1.7.6, which still takes them for bits, holds free pages for slabs.
const NUMBERED_TYPES: &str = "NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)=";
const SENT_BY_MAKEDUMPFILE: &str = "free";

/// What the proof works on.
pub struct Case<'a> {
    /// The filtered vmcore.
    pub vmcore: &'a Path,
    /// Where the proof's files go.
    pub folder: &'a Path,
    /// The memory of the dead guest.
    pub memory: &'a GuestMemory,
    /// Pages that the dump path writes.
    pub written: &'a Written,
    /// The level that was used.
    pub level: u8,
    /// Whether the crashing task's user memory was kept.
    pub keep_user: bool,
    /// The kernel with symbols.
    pub vmlinux: &'a Path,
    /// A Python that has drgn.
    pub drgn: &'a Path,
    /// The words that start crash.
    pub crash: &'a str,
    /// The words that start makedumpfile.
    pub makedumpfile: &'a str,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Proof {
    /// Pages by class.
    pub classes: BTreeMap<String, Choice>,
    /// Pages that the dump path writes, whose class changes meanwhile.
    pub changing: Choice,
    /// Pages of which makedumpfile made the same choice.
    pub agree: Choice,
    /// Pages by class that only netdump left out.
    pub only_netdump: BTreeMap<String, u64>,
    /// Pages by class that only makedumpfile left out.
    pub only_makedumpfile: BTreeMap<String, u64>,
    /// What drgn read from both files alike: how many things of each kind.
    pub walked: BTreeMap<String, u64>,
    /// Lines that crash printed of both files alike.
    pub crash_lines: usize,
}

/// How many pages were sent and how many left out.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Choice {
    /// In the dump.
    pub sent: u64,
    /// Not in the dump.
    pub excluded: u64,
}

impl AddAssign<bool> for Choice {
    fn add_assign(&mut self, excluded: bool) {
        self.sent += u64::from(!excluded);
        self.excluded += u64::from(excluded);
    }
}

/// Proves the filter on one vmcore; gives what was found and what contradicts it.
///
/// # Errors
/// If a file cannot be made or a program cannot be run.
pub fn prove(case: &Case<'_>) -> Result<(Proof, Complaints)> {
    let full = case.folder.join("full");
    let machine = complete(case, &full)?;
    let (names, classes) = classify(case, &full, &machine)?;
    let other = other_choice(case, &full)?;
    let (mut ours, mut theirs) = (Reader::open(case.vmcore)?, Reader::open(&other)?);
    let mut proof = Proof::default();
    for (pfn, class) in pages(&machine).zip(classes) {
        let name = names
            .get(usize::from(class))
            .context("classes.py names a class that it does not list")?;
        let excluded = is_excluded(&mut ours, pfn)?;
        if case.written.kind(pfn.0).is_some() {
            proof.changing += excluded;
            continue;
        }
        *proof.classes.entry(name.clone()).or_default() += excluded;
        match (excluded, is_excluded(&mut theirs, pfn)?) {
            (ours, theirs) if ours == theirs => proof.agree += ours,
            (true, _) => *proof.only_netdump.entry(name.clone()).or_default() += 1,
            (false, _) => *proof.only_makedumpfile.entry(name.clone()).or_default() += 1,
        }
    }
    let mut complaints = judge(&proof, case.level, case.keep_user);
    let text = String::from_utf8_lossy(&machine.vmcoreinfo);
    if !case.keep_user {
        complaints.extend(compare(&proof, text.contains(NUMBERED_TYPES)));
    }
    complaints.extend(walk(case, &full, &mut proof)?);
    complaints.extend(show(case, &full, &mut proof)?);
    for file in [full, other] {
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))?;
    }
    Ok((proof, complaints))
}

fn pages(machine: &Machine) -> impl Iterator<Item = Pfn> {
    let ranges = machine.ram.iter();
    ranges.flat_map(|range| (range.first.0..range.end()).map(Pfn))
}

fn is_excluded(reader: &mut Reader, pfn: Pfn) -> Result<bool> {
    Ok(reader.read_page(pfn, &mut [0; PAGE_SIZE])? == PageState::Excluded)
}

/// Writes the full dump, and gives what it says of the machine.
fn complete(case: &Case<'_>, full: &Path) -> Result<Machine> {
    let mut reader = Reader::open(case.vmcore)?;
    let machine = Machine {
        filter: 0,
        ..reader.machine().clone()
    };
    // Of the same format, because readers find registers in others by other ways.
    let format = Format::Kdump(Compression::None);
    let mut writer = Writer::create(full, machine.clone(), format)?;
    let mut page = [0; PAGE_SIZE];
    for pfn in pages(&machine) {
        if reader.read_page(pfn, &mut page)? != PageState::Data {
            let truth = case.memory.page(pfn.0);
            page.copy_from_slice(truth.context("the vmcore has a page that the guest has not")?);
        }
        writer.page(pfn, Page::Data(&page))?;
    }
    writer.finish()?;
    Ok(machine)
}

/// The names of classes, and each page's as an index into them.
fn classify(case: &Case<'_>, full: &Path, machine: &Machine) -> Result<(Vec<String>, Vec<u8>)> {
    let out = case.folder.join("classes");
    let range = |range: &RamRange| format!("{}:{}", range.first.0, range.pages);
    let names = script(
        Command::new(case.drgn)
            .args(["-c", CLASSES_SCRIPT])
            .args([full, case.vmlinux, &out])
            .args(machine.ram.iter().map(range)),
    )
    .context("classes.py")?;
    let classes = fs::read(&out).with_context(|| format!("cannot read {}", out.display()))?;
    let expected = machine.pages();
    ensure!(
        classes.len() as u64 == expected,
        "classes.py told the class of {} pages instead of {expected}",
        classes.len()
    );
    Ok((names, classes))
}

/// Has makedumpfile filter the full dump by the same level, and gives its file.
fn other_choice(case: &Case<'_>, full: &Path) -> Result<PathBuf> {
    let file = case.folder.join("makedumpfile");
    let level = case.level & !LEVEL_ZERO;
    let mut words = case.makedumpfile.split_ascii_whitespace();
    let program = words
        .next()
        .context("the command of makedumpfile is empty")?;
    let output = Command::new(program)
        .args(words)
        .args(["-d", &level.to_string(), "-x"])
        .args([case.vmlinux, full, &file])
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "makedumpfile failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(file)
}

/// A page is excluded if and only if its class is one of the level's.
fn judge(proof: &Proof, level: u8, keep_user: bool) -> Complaints {
    let mut complaints = Vec::new();
    for (class, choice) in &proof.classes {
        let bits = LEVELS.iter().find(|(name, _)| name == class);
        let bits = bits.map_or(0, |(_, bits)| *bits);
        let kept = keep_user && bits & (LEVEL_USER | 2 | 4) != 0;
        let wrong = if bits & level == 0 {
            choice.excluded
        } else if kept {
            0
        } else {
            choice.sent
        };
        if wrong > 0 {
            complaints.push(format!(
                "level {level}: {} pages of class {class:?} were sent and {} excluded",
                choice.sent, choice.excluded
            ));
        }
    }
    complaints
}

/// Whoever chooses otherwise than makedumpfile must have a reason.
fn compare(proof: &Proof, numbered_types: bool) -> Complaints {
    let unexplained = |class: &str| !(numbered_types && class == SENT_BY_MAKEDUMPFILE);
    let only_netdump = proof.only_netdump.iter();
    let only_netdump = only_netdump.filter(|(class, _)| unexplained(class));
    let say = |who: &'static str| {
        move |(class, count): (&String, &u64)| {
            format!("only {who} leaves out {count} pages of class {class:?}")
        }
    };
    only_netdump
        .map(say("netdump"))
        .chain(proof.only_makedumpfile.iter().map(say("makedumpfile")))
        .collect()
}

/// What `walk.py` says of one kind of thing.
#[derive(Debug, Deserialize, Eq, PartialEq)]
struct Section {
    count: u64,
    missing: u64,
    digest: String,
}

/// Has drgn read both files, and complains of what differs.
fn walk(case: &Case<'_>, full: &Path, proof: &mut Proof) -> Result<Complaints> {
    let read = |dump: &Path| -> Result<BTreeMap<String, Section>> {
        let mut command = Command::new(case.drgn);
        command.args(["-c", WALK_SCRIPT]).args([dump, case.vmlinux]);
        script(&mut command).context("walk.py")
    };
    let (ours, whole) = (read(case.vmcore)?, read(full)?);
    let mut complaints = Vec::new();
    for (name, section) in &whole {
        proof.walked.insert(name.clone(), section.count);
        let found = ours.get(name);
        if found != Some(section) || section.count == 0 {
            complaints.push(format!(
                "drgn finds other {name} in the full dump ({section:?}) than in this one ({found:?})"
            ));
        }
    }
    Ok(complaints)
}

/// Has crash read both files, and complains of the first line that differs.
fn show(case: &Case<'_>, full: &Path, proof: &mut Proof) -> Result<Complaints> {
    let read = |dump: &Path| converse(case.crash, dump, case.vmlinux, &CRASH_COMMANDS);
    let (ours, whole) = (read(case.vmcore)?, read(full)?);
    proof.crash_lines = whole.lines().count();
    let differs = ours.lines().zip(whole.lines()).find(|(a, b)| a != b);
    let shorter = ours.lines().count() != proof.crash_lines;
    Ok(match differs {
        Some((a, b)) => vec![format!("crash prints {a:?}, of the full dump {b:?}")],
        None if shorter => vec!["crash prints not as many lines as of the full dump".to_owned()],
        None => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(class: &str, sent: u64, excluded: u64) -> Proof {
        Proof {
            classes: [(class.to_owned(), Choice { sent, excluded })].into(),
            ..Proof::default()
        }
    }

    #[test]
    fn a_class_is_excluded_by_its_bits_only() {
        assert!(judge(&proof("free", 0, 5), 16, false).is_empty());
        assert_eq!(judge(&proof("free", 1, 5), 31, false).len(), 1);
        assert_eq!(judge(&proof("free", 0, 5), 15, false).len(), 1);
        assert!(judge(&proof("cache", 0, 5), 4, false).is_empty());
        assert_eq!(judge(&proof("private cache", 0, 5), 2, false).len(), 1);
        assert_eq!(judge(&proof("slab", 5, 1), 31, false).len(), 1);
    }

    #[test]
    fn only_one_difference_to_makedumpfile_is_explained() {
        let count = |class: &str| [(class.to_owned(), 3)].into();
        let mut proof = Proof {
            only_netdump: count("free"),
            ..Proof::default()
        };
        assert!(compare(&proof, true).is_empty());
        assert_eq!(compare(&proof, false).len(), 1);
        proof.only_makedumpfile = count("free");
        assert_eq!(compare(&proof, true).len(), 1);
        proof.only_netdump = count("cache");
        assert_eq!(compare(&proof, true).len(), 2);
    }

    #[test]
    fn a_kept_task_excuses_pages_that_were_sent() {
        assert!(judge(&proof("anonymous", 3, 5), 31, true).is_empty());
        assert_eq!(judge(&proof("anonymous", 3, 5), 31, false).len(), 1);
        assert_eq!(judge(&proof("free", 3, 5), 31, true).len(), 1);
    }
}
