//! `cargo xtask vm --all`: a guest for each cell of the support matrix, crash x kernel x network
//! card, and the page in docs that is made of what they showed.
//!
//! Results are kept a line a cell in docs/matrix.jsonl, which `vmtest` reads and turns into
//! docs/matrix.md. A cell that is run again replaces its line, so a matrix can be run in parts.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use crate::kmod::Variant;
use crate::vm::{self, Guest, Judgement};
use crate::{cache, command, output, packages};

/// Which part of the matrix is run; everything that is not named is.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Part {
    /// Runs every crash on every kernel with every network card, and writes docs/matrix.md.
    #[arg(long)]
    pub(crate) all: bool,
    /// With --all: these lines of kernels.
    #[arg(long, value_delimiter = ',', requires = "all")]
    kernels: Vec<String>,
    /// With --all: these network cards.
    #[arg(long, value_delimiter = ',', requires = "all")]
    nics: Vec<String>,
    /// With --all: these crashes.
    #[arg(long, value_delimiter = ',', requires = "all")]
    crashes: Vec<String>,
    /// With --all: only cells that have not been run yet.
    #[arg(long, requires = "all")]
    missing: bool,
    /// Writes docs/matrix.md from the results that are there, and runs nothing.
    #[arg(long, conflicts_with = "all")]
    pub(crate) page: bool,
}

/// One line of docs/matrix.jsonl; `vmtest` has the same.
#[derive(Debug, Serialize)]
struct Cell<'a> {
    line: &'a str,
    kernel: &'a str,
    nic: &'a str,
    crash: &'a str,
    verdict: &'a str,
    why: &'a str,
    first_packet_ms: Option<u64>,
    pages_checked: u64,
    skipped: usize,
}

/// A cell's name: line of the kernel, network card, crash.
type Name = [String; 3];

fn results() -> PathBuf {
    cache::tree().join("docs/matrix.jsonl")
}

/// Runs the cells of `part` one after the other and writes the page after each.
///
/// # Errors
/// Something cannot be fetched or built, or a name is on no menu. A bad verdict is a result.
pub(crate) fn run(part: &Part, json: bool) -> Result<()> {
    let cells = cells(part)?;
    for (number, cell) in (1..).zip(&cells) {
        let [line, nic, crash] = cell;
        if part.missing && is_refused(&fs::read_to_string(results())?, cell) {
            continue;
        }
        let started = Instant::now();
        let guest = Guest {
            kernel: line.clone(),
            nic: nic.clone(),
            crash: crash.clone(),
            memory: "512M".into(),
            cpus: 2,
            symbols: true,
            drgn_only: true,
            ..Guest::default()
        };
        let (found, folder) = vm::judge(&guest, Variant::Product)?;
        let line = record(&guest, &found)?;
        if found.verdict == "Ok" {
            fs::remove_dir_all(&folder)?;
        }
        eprintln!(
            "{number}/{} {}: {} ({})",
            cells.len(),
            cell.join(" "),
            found.why,
            output::seconds(started.elapsed())
        );
        if json {
            println!("{line}");
        }
        page()?;
    }
    Ok(())
}

/// Adds a result, and returns its line.
fn record(guest: &Guest, found: &Judgement) -> Result<String> {
    let cell = Cell {
        line: &guest.kernel,
        kernel: &packages::kernel(&guest.kernel)?.release,
        nic: &guest.nic,
        crash: &guest.crash,
        verdict: &found.verdict,
        why: &found.why,
        first_packet_ms: found.first_packet_ms,
        pages_checked: found.pages_checked,
        skipped: found.skipped.len(),
    };
    let line = serde_json::to_string(&cell)?;
    let path = results();
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    writeln!(file, "{line}")?;
    Ok(line)
}

/// Writes docs/matrix.md from the results.
///
/// # Errors
/// `vmtest` cannot be built, or does not take the results.
pub(crate) fn page() -> Result<()> {
    let kernels: Vec<String> = packages::kernels()?
        .into_iter()
        .map(|kernel| kernel.name)
        .collect();
    let mut vmtest = Command::new(vm::binaries()?.vmtest);
    vmtest.arg("matrix").arg(results());
    let text = command::capture(vmtest.arg("--kernels").arg(kernels.join(",")))?;
    fs::write(cache::tree().join("docs/matrix.md"), text)?;
    Ok(())
}

/// The names of the cells to run. Crashes come outermost, so that a matrix cut short has seen most
/// kernels and cards.
fn cells(part: &Part) -> Result<Vec<Name>> {
    let menu = command::capture(Command::new(vm::binaries()?.vmtest).arg("menu"))?;
    let kernels: Vec<String> = packages::kernels()?
        .into_iter()
        .map(|kernel| kernel.name)
        .collect();
    let kernels = chosen(&part.kernels, kernels, "kernel")?;
    let nics = chosen(&part.nics, of_kind(&menu, "nic "), "network card")?;
    let crashes = chosen(&part.crashes, of_kind(&menu, "crash "), "crash")?;
    let there = if part.missing {
        fs::read_to_string(results()).unwrap_or_default()
    } else {
        String::new()
    };
    let mut cells = Vec::new();
    for crash in &crashes {
        for kernel in &kernels {
            for nic in &nics {
                let name = [kernel.clone(), nic.clone(), crash.clone()];
                if !is_there(&there, &name) {
                    cells.push(name);
                }
            }
        }
    }
    Ok(cells)
}

fn of_kind(menu: &str, kind: &str) -> Vec<String> {
    let names = menu.lines().filter_map(|line| line.strip_prefix(kind));
    names.map(str::to_owned).collect()
}

fn chosen(wanted: &[String], all: Vec<String>, what: &str) -> Result<Vec<String>> {
    for name in wanted {
        ensure!(
            all.contains(name),
            "there is no {what} {name}; there are {}",
            all.join(", ")
        );
    }
    Ok(if wanted.is_empty() {
        all
    } else {
        wanted.to_vec()
    })
}

/// Whether the results have a cell of this name.
fn is_there(results: &str, [line, nic, crash]: &Name) -> bool {
    has(results, &[("line", line), ("nic", nic), ("crash", crash)])
}

/// Whether the card of this cell was refused on its kernel: then it is so whatever the crash.
fn is_refused(results: &str, [line, nic, _]: &Name) -> bool {
    has(
        results,
        &[("line", line), ("nic", nic), ("verdict", "Refused")],
    )
}

/// Whether a line of the results has all these words.
fn has(results: &str, fields: &[(&str, &str)]) -> bool {
    results.lines().any(|result| {
        fields
            .iter()
            .all(|(field, value)| result.contains(&format!("\"{field}\":\"{value}\"")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_menu_is_read_by_kind_and_wrong_names_list_it() {
        let menu = "crash panic\ncrash null\nnic e1000\n";
        let crashes = of_kind(menu, "crash ");
        assert_eq!(crashes, ["panic", "null"]);
        let error = chosen(&["panik".into()], crashes, "crash").unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no crash panik; there are panic, null"
        );
    }

    #[test]
    fn a_result_is_found_by_its_whole_name() {
        let results =
            "{\"line\":\"6.1\",\"kernel\":\"6.1.0\",\"nic\":\"e1000\",\"crash\":\"oom\"}\n";
        let name = |line: &str, crash: &str| [line.to_owned(), "e1000".into(), crash.to_owned()];
        assert!(is_there(results, &name("6.1", "oom")));
        assert!(!is_there(results, &name("6.12", "oom")));
        assert!(!is_there(results, &name("6.1", "oo")));
        let refused = results.replace('}', ",\"verdict\":\"Refused\"}");
        assert!(is_refused(&refused, &name("6.1", "panic")));
        assert!(!is_refused(&refused, &name("6.12", "panic")));
        assert!(!is_refused(results, &name("6.1", "oom")));
    }
}
