//! How well triage does on real logs with expected titles, clean and corrupted apart, plain and as
//! netconsole: `cargo run --release -p triage --example evaluate [-- --speed | [--misses]
//! [NAMES-FILE]] [--json]`.
//!
//! With a file of names, one a line, only those logs are measured. With `--speed`, how fast a log
//! without a report is read. `--json` prints a row a line.

#[path = "../tests/evaluation/mod.rs"]
mod evaluation;

use evaluation::{Case, Dress, Figures, folder, load, measure};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |option: &str| arguments.iter().any(|argument| argument == option);
    let (json, with_misses) = (has("--json"), has("--misses"));
    if has("--speed") {
        return speed(json);
    }
    let names = arguments
        .iter()
        .find(|argument| !argument.starts_with("--"))
        .map(|file| std::fs::read_to_string(file).unwrap_or_default());
    let all = load(&folder());
    if all.is_empty() {
        eprintln!(
            "evaluate: no logs in \"{}\"; set NETDUMP_OOPS_CORPUS to the corpus's folder",
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
            if json {
                println!("{}", row(&format!("text: {dress:?}, {what}"), &figures));
                continue;
            }
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

fn row(config: &str, figures: &Figures) -> serde_json::Value {
    serde_json::json!({
        "config": config,
        "files": figures.positive + figures.negative,
        "detection": figures.detection(),
        "false_alarms": figures.alarms,
        "logs_without_a_crash": figures.negative,
        "class": figures.class(),
        "culprit": figures.culprit(),
        "pair_f1_exact": figures.exact,
        "pair_f1_family": figures.family,
    })
}

/// Reads 100 MB of boot messages three times.
#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn speed(json: bool) {
    let mut log = String::new();
    for number in 0_u32.. {
        if log.len() > SPEED_BYTES {
            break;
        }
        let (second, fraction) = (number / 1000, number % 1000);
        log.push_str(&format!(
            "[{second:5}.{fraction:03}000][    T1] usb 1-{}: New USB device found, idVendor=0627, idProduct=0001\n\
             [{second:5}.{fraction:03}500][  T312] EXT4-fs (sda1): mounted filesystem with ordered data mode. Opts: (null)\n\
             [{second:5}.{fraction:03}900][    T1] pci 0000:00:03.0: reg 0x14: [mem 0xfebfe000-0xfebfe07f]\n",
            number % 8
        ));
    }
    for _ in 0..3 {
        let start = std::time::Instant::now();
        let findings = triage::scan(log.as_bytes());
        let seconds = start.elapsed().as_secs_f64();
        let rate = log.len() as f64 / 1e6 / seconds;
        if json {
            let config = "text: boot messages";
            println!("{}", serde_json::json!({"config": config, "mb_s": rate}));
            return;
        }
        println!(
            "{} lines, {} reports, {rate:.0} MB/s",
            findings.lines,
            findings.reports.len()
        );
    }
}

const SPEED_BYTES: usize = 100_000_000;
