//! The support matrix: every crash of the menu by every network card, on every kernel of
//! `kernels.lock`, as a page for people made of results that are kept beside it, a JSON object a
//! line.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum as _;
use serde::{Deserialize, Serialize};

use crate::crash::Crash;
use crate::vm::Nic;

/// What one run has shown.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// Line of the kernel, as in `kernels.lock`.
    pub line: String,
    /// Its release.
    pub kernel: String,
    /// Network card.
    pub nic: String,
    /// Crash kind.
    pub crash: String,
    /// The verdict alone.
    pub verdict: String,
    /// The verdict with its reason.
    pub why: String,
    /// Milliseconds from the crash to its first datagram.
    pub first_packet_ms: Option<u64>,
    /// Pages compared with QEMU's memory.
    pub pages_checked: u64,
    /// Readers that were not run.
    pub skipped: u64,
}

/// Reasons are cut to so many characters.
const WHY_CHARS_MAX: usize = 200;

/// What a cell counts as.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mark {
    /// As it should be; a card that cannot work is refused when arming.
    Good,
    /// The machine cannot be crashed so.
    Impossible,
    Bad,
}

impl Cell {
    fn mark(&self) -> Mark {
        match self.verdict.as_str() {
            "Ok" => Mark::Good,
            "Refused" if self.nic == Nic::Rtl8139.name() => Mark::Good,
            "Impossible" => Mark::Impossible,
            _ => Mark::Bad,
        }
    }
}

/// Reads results, a cell a line; a later line replaces an earlier one of the same cell.
///
/// # Errors
/// If a line is no cell, or names a crash or a card that does not exist.
pub fn parse(text: &str) -> Result<Vec<Cell>> {
    let mut cells = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        let cell: Cell = serde_json::from_str(line)
            .with_context(|| format!("line {number} of the results is no cell: {line}"))?;
        for (known, name) in [
            (Crash::from_str(&cell.crash, false).is_ok(), &cell.crash),
            (Nic::from_str(&cell.nic, false).is_ok(), &cell.nic),
        ] {
            ensure!(
                known,
                "line {number} of the results names {name}, which does not exist"
            );
        }
        let key = (cell.line.clone(), cell.nic.clone(), cell.crash.clone());
        cells.insert(key, cell);
    }
    Ok(cells.into_values().collect())
}

/// The same as lines.
///
/// # Errors
/// Never for cells that [`parse`] gave.
pub fn lines(cells: &[Cell]) -> Result<String> {
    let mut text = String::new();
    for cell in cells {
        let why = cell.why.chars().take(WHY_CHARS_MAX).collect();
        let cell = Cell {
            why,
            ..cell.clone()
        };
        text += &(serde_json::to_string(&cell)? + "\n");
    }
    Ok(text)
}

/// The page: for each kernel a table, then every cell that is not good with its reason.
#[must_use]
pub fn page(kernels: &[String], cells: &[Cell]) -> String {
    let mut text = String::from(
        "# Support matrix: crash x kernel x network card\n\n\
         Made by `cargo xtask vm --all`, which keeps its results in matrix.jsonl; not edited by hand, and a test holds it to them. Each cell\n\
         is one guest in QEMU (docs/testing.md): booted, armed, crashed in this way, its vmcore compared with QEMU's memory page by page, and\n\
         the function that was made to crash found by drgn on the stack of the task that crashed.\n\n\
         `Ok` is all of that and a reboot. `refused`: the module says when arming why it cannot use the card. `-`: this machine cannot be\n\
         crashed so (reasons below). An empty cell has not been run.\n",
    );
    totals(&mut text, kernels, cells);
    for kernel in kernels {
        table(&mut text, kernel, cells);
    }
    reasons(&mut text, "Not Ok", cells, Mark::Bad);
    reasons(&mut text, "Not possible here", cells, Mark::Impossible);
    text
}

fn put(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    text.write_fmt(line).unwrap_or_default();
}

fn totals(text: &mut String, kernels: &[String], cells: &[Cell]) {
    let all = kernels.len() * Nic::value_variants().len() * Crash::value_variants().len();
    let count = |mark| cells.iter().filter(|cell| cell.mark() == mark).count();
    let (good, bad) = (count(Mark::Good), count(Mark::Bad));
    let impossible = count(Mark::Impossible);
    put(
        text,
        format_args!(
            "\n{good} cells are as they should be, {bad} are not, {impossible} are not possible here, {} of {all} have not been run.\n",
            all - cells.len()
        ),
    );
    let mut times: Vec<u64> = cells
        .iter()
        .filter(|cell| {
            cell.mark() == Mark::Good
                && Crash::from_str(&cell.crash, false).is_ok_and(Crash::is_immediate)
        })
        .filter_map(|cell| cell.first_packet_ms)
        .collect();
    times.sort_unstable();
    if let (Some(median), Some(worst)) = (times.get(times.len() / 2), times.last()) {
        put(
            text,
            format_args!(
                "From the crash to its first datagram: median {median} ms, worst {worst} ms, over {} cells whose kernel panics at once (emulated CPUs).\n",
                times.len()
            ),
        );
    }
}

fn table(text: &mut String, kernel: &str, cells: &[Cell]) {
    let of_kernel: Vec<&Cell> = cells.iter().filter(|cell| cell.line == kernel).collect();
    let release = of_kernel.first().map_or("", |cell| cell.kernel.as_str());
    put(text, format_args!("\n## {kernel} {release}\n\n| crash |"));
    for nic in Nic::value_variants() {
        put(text, format_args!(" {} |", nic.name()));
    }
    put(
        text,
        format_args!(
            "\n| --- |{}\n",
            " --- |".repeat(Nic::value_variants().len())
        ),
    );
    for crash in Crash::value_variants() {
        put(text, format_args!("| {} |", crash.name()));
        for nic in Nic::value_variants() {
            let found = of_kernel.iter().find(|cell| {
                (cell.nic.as_str(), cell.crash.as_str()) == (nic.name(), crash.name())
            });
            let word = found.map_or("", |cell| match (cell.mark(), cell.verdict.as_str()) {
                (Mark::Good, "Refused") => "refused",
                (Mark::Impossible, _) => "-",
                (_, verdict) => verdict,
            });
            put(text, format_args!(" {word} |"));
        }
        text.push('\n');
    }
}

fn reasons(text: &mut String, heading: &str, cells: &[Cell], mark: Mark) {
    put(text, format_args!("\n## {heading}\n\n"));
    let mut by_reason: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for cell in cells.iter().filter(|cell| cell.mark() == mark) {
        let name = format!("{} {} {}", cell.line, cell.nic, cell.crash);
        by_reason.entry(&cell.why).or_default().push(name);
    }
    for (why, names) in &by_reason {
        let why = why.replace('|', "/").replace('<', "(").replace('>', ")");
        put(text, format_args!("- {}: {why}\n", names.join(", ")));
    }
    if by_reason.is_empty() {
        text.push_str("None.\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULTS: &str = include_str!("../../../docs/matrix.jsonl");
    const LOCK: &str = include_str!("../../../kernels.lock");

    /// The lines of kernels in `kernels.lock`: the name that follows each `[[kernel]]`.
    fn kernels() -> Vec<String> {
        let entries = LOCK.split("[[kernel]]").skip(1);
        let name = |entry: &str| entry.split('"').nth(1).unwrap().to_owned();
        entries.map(name).collect()
    }

    #[test]
    fn the_page_is_what_the_results_say() {
        let cells = parse(RESULTS).unwrap();
        let page = page(&kernels(), &cells);
        assert_eq!(
            page,
            include_str!("../../../docs/matrix.md"),
            "run cargo xtask vm --page"
        );
        assert_eq!(lines(&cells).unwrap(), RESULTS);
        for crash in Crash::value_variants() {
            let rows = page.matches(&format!("\n| {} |", crash.name())).count();
            assert_eq!(rows, kernels().len(), "{}", crash.name());
        }
        for cell in &cells {
            assert!(
                kernels().contains(&cell.line),
                "{} is not pinned",
                cell.line
            );
        }
    }

    #[test]
    fn nearly_all_cells_that_were_run_are_good() {
        let cells = parse(RESULTS).unwrap();
        for kernel in ["6.1", "6.12"] {
            let count = |mark: Mark| {
                let of = |cell: &&Cell| cell.line == kernel && cell.mark() == mark;
                cells.iter().filter(of).count()
            };
            let (good, bad) = (count(Mark::Good), count(Mark::Bad));
            assert!(
                good * 100 >= (good + bad) * 95,
                "{kernel}: {bad} of {}",
                good + bad
            );
        }
    }

    #[test]
    fn a_cell_that_was_run_again_replaces_the_first() {
        let cell = |verdict: &str| {
            format!(
                "{{\"line\":\"6.1\",\"kernel\":\"6.1.0-1-amd64\",\"nic\":\"e1000\",\"crash\":\"panic\",\"verdict\":\"{verdict}\",\
                 \"why\":\"{verdict}\",\"first_packet_ms\":7,\"pages_checked\":1,\"skipped\":0}}\n"
            )
        };
        let cells = parse(&(cell("Stalled") + &cell("Ok"))).unwrap();
        assert_eq!(cells.len(), 1);
        let page = page(&["6.1".to_owned()], &cells);
        assert!(page.contains("| panic |  | Ok |"), "{page}");
        assert!(
            page.contains("median 7 ms, worst 7 ms, over 1 cells"),
            "{page}"
        );
        let unknown = cell("Ok").replace("panic", "panik");
        assert!(parse(&unknown).is_err());
    }
}
