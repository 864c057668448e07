//! The support matrix: every crash of the menu by every network card, on every kernel of
//! `kernels.lock`, as a page for people made of results that are kept beside it, a JSON object a
//! line.

use std::collections::{BTreeMap, BTreeSet};
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
    /// As it should be.
    Good,
    /// The card cannot work, and that was said when arming.
    Refused,
    /// The machine cannot be crashed so.
    Impossible,
    Bad,
}

impl Cell {
    fn mark(&self) -> Mark {
        match self.verdict.as_str() {
            "Ok" => Mark::Good,
            "Refused" if self.nic == Nic::Rtl8139.name() => Mark::Refused,
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
         `Ok` is all of that and a reboot. `refused`: the module says when arming why it cannot use the card, so one crash shows it for all.\n\
         `-`: this machine cannot be crashed so (reasons below). An empty cell has not been run.\n",
    );
    totals(&mut text, kernels, cells);
    for kernel in kernels {
        table(&mut text, kernel, cells);
    }
    reasons(&mut text, "Not Ok", cells, Mark::Bad);
    reasons(&mut text, "Refused", cells, Mark::Refused);
    reasons(&mut text, "Not possible here", cells, Mark::Impossible);
    text
}

fn put(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    text.write_fmt(line).unwrap_or_default();
}

/// The cells of one kernel, as numbers.
#[derive(Debug, Default)]
struct Tally {
    good: usize,
    refused: usize,
    bad: usize,
    impossible: usize,
    not_run: usize,
    /// Milliseconds to the first packet of good cells whose kernel panics at once, sorted.
    first_packet_ms: Vec<u64>,
}

impl Tally {
    fn of(kernel: &str, cells: &[Cell]) -> Self {
        let mut tally = Self::default();
        for nic in Nic::value_variants() {
            for crash in Crash::value_variants() {
                tally.add(find(kernel, *nic, *crash, cells), *crash);
            }
        }
        tally.first_packet_ms.sort_unstable();
        tally
    }

    fn add(&mut self, cell: Option<&Cell>, crash: Crash) {
        match cell.map(Cell::mark) {
            Some(Mark::Good) => {
                self.good += 1;
                let time = cell.and_then(|cell| cell.first_packet_ms);
                let at_once = time.filter(|_| crash.is_immediate());
                self.first_packet_ms.extend(at_once);
            }
            Some(Mark::Refused) => self.refused += 1,
            Some(Mark::Bad) => self.bad += 1,
            Some(Mark::Impossible) => self.impossible += 1,
            None => self.not_run += 1,
        }
    }

    fn join(tallies: &[Self]) -> Self {
        let sum = |field: fn(&Self) -> usize| tallies.iter().map(field).sum();
        let times = tallies.iter().flat_map(|tally| &tally.first_packet_ms);
        let mut first_packet_ms: Vec<u64> = times.copied().collect();
        first_packet_ms.sort_unstable();
        Self {
            good: sum(|tally| tally.good),
            refused: sum(|tally| tally.refused),
            bad: sum(|tally| tally.bad),
            impossible: sum(|tally| tally.impossible),
            not_run: sum(|tally| tally.not_run),
            first_packet_ms,
        }
    }

    fn row(&self, name: &str, text: &mut String) {
        let share = |of: usize| match of {
            0 => "-".to_owned(),
            of => format!("{}.{} %", self.good * 100 / of, self.good * 1000 / of % 10),
        };
        let run = share(self.good + self.bad);
        let all = share(self.good + self.bad + self.not_run);
        let times = &self.first_packet_ms;
        let time = match (times.get(times.len() / 2), times.last()) {
            (Some(median), Some(worst)) => format!("{median} ms, {worst} ms"),
            _ => "-".to_owned(),
        };
        let (good, refused, bad) = (self.good, self.refused, self.bad);
        let (impossible, not_run) = (self.impossible, self.not_run);
        put(
            text,
            format_args!(
                "| {name} | {good} | {bad} | {refused} | {impossible} | {not_run} | {run} | {all} | {time} |\n"
            ),
        );
    }
}

/// What a cell has shown. A card that was refused on a kernel is so whatever the crash would be.
fn find<'a>(kernel: &str, nic: Nic, crash: Crash, cells: &'a [Cell]) -> Option<&'a Cell> {
    let of_card = |cell: &&Cell| cell.line == kernel && cell.nic == nic.name();
    let cell = cells
        .iter()
        .filter(of_card)
        .find(|cell| cell.crash == crash.name());
    cell.or_else(|| {
        let mut of_card = cells.iter().filter(of_card);
        of_card.find(|cell| cell.mark() == Mark::Refused)
    })
}

fn totals(text: &mut String, kernels: &[String], cells: &[Cell]) {
    text.push_str(
        "\n| kernel | Ok | not Ok | refused | not possible | not run | Ok of those run | Ok of all possible | panic to first packet: median, worst |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let tallies: Vec<Tally> = kernels
        .iter()
        .map(|kernel| Tally::of(kernel, cells))
        .collect();
    for (kernel, tally) in kernels.iter().zip(&tallies) {
        tally.row(kernel, text);
    }
    let all = Tally::join(&tallies);
    all.row("all", text);
    put(
        text,
        format_args!(
            "\nThe shares leave out what is refused or not possible. The time is that of {} cells whose kernel panics at once, on emulated\n\
             CPUs that share two real ones.\n",
            all.first_packet_ms.len()
        ),
    );
}

fn table(text: &mut String, kernel: &str, cells: &[Cell]) {
    let of_kernel = cells.iter().filter(|cell| cell.line == kernel);
    let releases: BTreeSet<&str> = of_kernel.map(|cell| cell.kernel.as_str()).collect();
    let releases = Vec::from_iter(releases).join(", ");
    put(text, format_args!("\n## {kernel} {releases}\n\n| crash |"));
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
            let found = find(kernel, *nic, *crash, cells);
            let word = found.map_or("", |cell| match cell.mark() {
                Mark::Refused => "refused",
                Mark::Impossible => "-",
                Mark::Good | Mark::Bad => &cell.verdict,
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

    fn line(verdict: &str) -> String {
        format!(
            "{{\"line\":\"6.1\",\"kernel\":\"6.1.0-1-amd64\",\"nic\":\"e1000\",\"crash\":\"panic\",\"verdict\":\"{verdict}\",\
             \"why\":\"{verdict}\",\"first_packet_ms\":7,\"pages_checked\":1,\"skipped\":0}}\n"
        )
    }

    #[test]
    fn a_card_that_is_refused_is_so_after_every_crash_and_another_is_not_ok() {
        let text = line("Refused") + &line("Refused").replace("e1000", "rtl8139");
        let page = page(&["6.1".to_owned()], &parse(&text).unwrap());
        let crashes = Crash::value_variants().len();
        // The heading of a column has the word, too.
        assert_eq!(page.matches("| refused |").count(), crashes + 1, "{page}");
        assert!(page.contains("| panic |  | Refused |"), "{page}");
        let row = format!("| 6.1 | 0 | 1 | {crashes} | 0 |");
        assert!(page.contains(&row), "{page}");
    }

    #[test]
    fn a_cell_that_was_run_again_replaces_the_first() {
        let cell = line;
        let cells = parse(&(cell("Stalled") + &cell("Ok"))).unwrap();
        assert_eq!(cells.len(), 1);
        let page = page(&["6.1".to_owned()], &cells);
        assert!(page.contains("| panic |  | Ok |"), "{page}");
        let rest = Crash::value_variants().len() * Nic::value_variants().len() - 1;
        let row = format!("| 6.1 | 1 | 0 | 0 | 0 | {rest} | 100.0 % | 0.4 % | 7 ms, 7 ms |");
        assert!(page.contains(&row), "{page}");
        let unknown = cell("Ok").replace("panic", "panik");
        assert!(parse(&unknown).is_err());
    }
}
