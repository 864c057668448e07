//! A run's report as people read it: a row a fact.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use crate::proof::{Choice, Proof};
use crate::run::Report;

/// Prints as rows of a name and a value; what a run did not get to has no row.
#[derive(Debug)]
pub struct Table<'a>(pub &'a Report);

impl Display for Table<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(report) = self;
        row(f, "verdict", &report.why)?;
        row(
            f,
            "kernel",
            &format!("{} ({})", report.kernel, report.accel),
        )?;
        let (loss, seed) = (report.loss_percent, report.seed);
        row(
            f,
            "crash",
            &format!(
                "{} on {}, {loss} % loss, seed {seed}",
                report.crash, report.nic
            ),
        )?;
        row(f, "boot", &format!("{} ms", report.boot_ms))?;
        if let Some(time) = report.first_packet_ms {
            row(f, "first packet", &format!("{time} ms after the crash"))?;
            dump_rows(f, report)?;
        }
        if report.pages_checked > 0 {
            page_rows(f, report)?;
        }
        row(f, "not run", &report.skipped.join("; "))?;
        let folder = report
            .folder
            .as_ref()
            .map(|path| path.display().to_string());
        row(f, "files", &folder.unwrap_or_default())
    }
}

fn row(f: &mut Formatter<'_>, name: &str, value: &str) -> fmt::Result {
    if value.is_empty() {
        Ok(())
    } else {
        writeln!(f, "{name:>13}  {value}")
    }
}

fn dump_rows(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    row(
        f,
        "dump",
        &format!(
            "{:.2} s, {:.0} MB/s of memory",
            report.dump_s, report.memory_mb_s
        ),
    )?;
    let (lost, overruns) = (report.frames_lost, report.overruns);
    row(
        f,
        "wire",
        &format!(
            "{} bytes, {lost} frames lost, {overruns} overrun",
            report.wire_bytes
        ),
    )?;
    let happened = [
        (report.frames_duplicated, "duplicated"),
        (report.frames_reordered, "reordered"),
        (report.frames_corrupted, "corrupted"),
        (report.frames_truncated, "truncated"),
        (report.frames_delayed, "delayed"),
    ];
    let happened: Vec<String> = happened
        .iter()
        .filter(|(frames, _)| *frames > 0)
        .map(|(frames, what)| format!("{frames} {what}"))
        .collect();
    row(f, "faults", &happened.join(", "))?;
    let (asked, answered) = (report.asked, report.answered);
    let neighbour = format!("asked {asked} times after the crash, answered {answered} times");
    row(f, "address", &neighbour)?;
    row(f, "vmcore", &format!("{} bytes", report.vmcore_bytes))
}

fn proof_rows(f: &mut Formatter<'_>, proof: &Proof) -> fmt::Result {
    for (class, choice) in &proof.classes {
        let (sent, excluded) = (choice.sent, choice.excluded);
        row(f, class, &format!("{sent} sent, {excluded} excluded"))?;
    }
    let counts = |counts: &BTreeMap<String, u64>| {
        let of = |(class, count): (&String, &u64)| format!("{count} {class}");
        counts.iter().map(of).collect::<Vec<_>>().join(", ")
    };
    let Choice { sent, excluded } = proof.agree;
    row(
        f,
        "makedumpfile",
        &format!("agrees on {sent} sent and {excluded} excluded"),
    )?;
    row(f, "only netdump", &counts(&proof.only_netdump))?;
    row(f, "only it", &counts(&proof.only_makedumpfile))?;
    row(f, "read alike", &counts(&proof.walked))
}

fn page_rows(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let (checked, different) = (report.pages_checked, report.pages_different);
    row(
        f,
        "pages",
        &format!("{checked} compared, {different} different"),
    )?;
    let kinds: Vec<String> = report
        .listed_different_kinds
        .iter()
        .map(|(kind, pages)| format!("{kind} {pages}"))
        .collect();
    let (listed, changed) = (report.pages_listed, report.listed_different);
    row(
        f,
        "listed",
        &format!("{listed} pages, {changed} different: {}", kinds.join(", ")),
    )?;
    if report.excluded_pages > 0 {
        let (excluded, level) = (report.excluded_pages, report.filter);
        row(f, "filter", &format!("level {level}, {excluded} excluded"))?;
    }
    if let Some(proof) = &report.proof {
        proof_rows(f, proof)?;
    }
    row(f, "pattern", &format!("{} pages", report.pattern_pages))?;
    let tasks: Vec<String> = report
        .tasks
        .iter()
        .map(|(reader, tasks)| format!("{reader} {tasks}"))
        .collect();
    row(f, "tasks", &tasks.join(", "))?;
    let (frames, disagreements) = (report.frames_compared, report.disagreements);
    if frames + disagreements > 0 {
        let told = format!("{frames} frames compared with drgn, {disagreements} disagreements");
        row(f, "triage", &told)?;
    }
    Ok(())
}
