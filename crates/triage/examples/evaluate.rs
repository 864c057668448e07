//! `cargo run --release -p triage --example evaluate [-- [--misses] [NAMES-FILE]]`: how well triage does
//! on real logs with expected titles, clean and corrupted apart, plain and as netconsole.
//!
//! With a file of names, one a line, only those logs are measured.

#[path = "../tests/evaluation/mod.rs"]
mod evaluation;

use evaluation::{Case, Dress, folder, load, measure};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let with_misses = arguments.iter().any(|argument| argument == "--misses");
    let names = arguments
        .iter()
        .find(|argument| !argument.starts_with("--"))
        .map(|file| std::fs::read_to_string(file).unwrap_or_default());
    let all = load(&folder());
    if all.is_empty() {
        eprintln!(
            "evaluate: {} has no logs; set NETDUMP_OOPS_CORPUS to the corpus's folder",
            folder().display()
        );
        std::process::exit(1);
    }
    let chosen: Vec<&Case> = all
        .iter()
        .filter(|case| {
            names
                .as_ref()
                .is_none_or(|names| names.split_whitespace().any(|name| name == case.name))
        })
        .collect();
    let clean: Vec<&Case> = chosen
        .iter()
        .copied()
        .filter(|case| !case.is_corrupted())
        .collect();
    let corrupted: Vec<&Case> = chosen
        .iter()
        .copied()
        .filter(|case| case.is_corrupted())
        .collect();
    for dress in [Dress::Plain, Dress::Netconsole] {
        for (what, cases) in [
            ("all", &chosen),
            ("clean", &clean),
            ("corrupted", &corrupted),
        ] {
            let figures = measure(cases, dress);
            println!(
                "{dress:?} {what} {} files: {}",
                cases.len(),
                figures.table()
            );
            if with_misses && what == "all" {
                print!("{}", figures.misses);
            }
        }
    }
}
