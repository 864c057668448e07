//! `cargo xtask fuzz`: libFuzzer on the pinned stable toolchain, without helpers: the coverage that
//! it needs is a flag of the compiler, and its runtime is in the fuzz workspace's dependencies.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::test::{self, Tally};
use crate::{cache, command, output};

/// Inserts the counters and comparisons that libFuzzer steers by.
const COVERAGE_FLAGS: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The longest input that is tried and kept.
const INPUT_BYTES_MAX: usize = 4096;
/// The committed corpora may have so many bytes in all.
const CORPORA_BYTES_MAX: u64 = 1 << 20;

/// What to fuzz.
#[derive(clap::Args)]
pub(crate) struct Fuzz {
    /// The target, or all of them one after the other.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    name: Option<String>,
    /// Every target.
    #[arg(long)]
    all: bool,
    /// For how many minutes each.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// Put what was found to be new into the committed corpus, as few inputs as give the same
    /// coverage.
    #[arg(long)]
    keep: bool,
}

/// Fuzzes.
///
/// # Errors
/// A target has found something: the message names the input.
pub(crate) fn run(fuzz: &Fuzz) -> Result<()> {
    let names = names()?;
    let wanted: Vec<&String> = match &fuzz.name {
        Some(name) => names.iter().filter(|known| *known == name).collect(),
        None => names.iter().collect(),
    };
    if wanted.is_empty() {
        bail!("no such target; there are {}", names.join(", "));
    }
    let program = build()?;
    let mut rows = vec![["target", "result"].map(str::to_owned).to_vec()];
    let mut found = 0;
    for name in wanted {
        let result = one(&program, name, fuzz);
        found += u32::from(result.is_err());
        rows.push(vec![
            name.clone(),
            result.unwrap_or_else(|error| format!("{error:#}")),
        ]);
    }
    println!("{}", output::table(&rows));
    ensure!(found == 0, "{found} targets have found something");
    let bytes = corpora_bytes()?;
    ensure!(
        bytes <= CORPORA_BYTES_MAX,
        "the corpora have {bytes} bytes, more than {CORPORA_BYTES_MAX}: drop some inputs"
    );
    Ok(())
}

/// Replays the committed corpora, without the fuzzer.
///
/// # Errors
/// The test cannot be run.
pub(crate) fn replay() -> Result<Tally> {
    let built = cache::built()?.join("fuzz");
    test::tests(&[
        "test",
        "--manifest-path",
        "fuzz/Cargo.toml",
        "--lib",
        "--target-dir",
        &built.to_string_lossy(),
    ])
}

/// The targets: each has a corpus of its name.
fn names() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(corpora()).context("cannot list the corpora")? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn corpora() -> PathBuf {
    cache::tree().join("fuzz/corpus")
}

fn corpora_bytes() -> Result<u64> {
    let mut bytes = 0;
    for name in names()? {
        for entry in fs::read_dir(corpora().join(name))? {
            bytes += entry?.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// Builds the fuzzer; only for a named target, so that build scripts are built without coverage.
fn build() -> Result<PathBuf> {
    let target = cache::built()?.join("fuzz");
    let mut cargo = Command::new("cargo");
    cargo
        .args(["build", "--release", "--features", "runtime", "--bin"])
        .args(["fuzz", "--target", TARGET, "--target-dir"])
        .arg(&target)
        .current_dir(cache::tree().join("fuzz"))
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE_FLAGS.join("\x1f"));
    command::run(&mut cargo)?;
    Ok(target.join(TARGET).join("release/fuzz"))
}

fn one(program: &Path, name: &str, fuzz: &Fuzz) -> Result<String> {
    let grown = cache::built()?.join("fuzz/corpus").join(name);
    let found = cache::built()?.join("fuzz/found").join(name);
    fs::create_dir_all(&grown)?;
    fs::create_dir_all(&found)?;
    let seconds = 60 * fuzz.minutes;
    let mut libfuzzer = Command::new(program);
    libfuzzer
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .args(["-timeout=30", "-rss_limit_mb=2048", "-verbosity=0"])
        .args(["-print_final_stats=1", "-use_value_profile=1"])
        .arg(format!("-artifact_prefix={}/", found.display()))
        .args([&grown, &corpora().join(name)]);
    let statistics = statistics(with_target(&mut libfuzzer, name));
    let statistics = statistics
        .with_context(|| format!("found something: the input is in {}", found.display()))?;
    if fuzz.keep {
        keep(program, name, &grown)?;
    }
    Ok(statistics)
}

/// Names the target, and keeps the files that targets write in memory.
fn with_target<'a>(libfuzzer: &'a mut Command, name: &str) -> &'a mut Command {
    libfuzzer
        .env("NETDUMP_FUZZ_TARGET", name)
        .env("TMPDIR", "/dev/shm")
}

/// Runs the fuzzer and returns what it says of its work, in one line.
fn statistics(libfuzzer: &mut Command) -> Result<String> {
    let output = libfuzzer.output().context("cannot start the fuzzer")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let last: Vec<&str> = said.lines().rev().take(60).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        eprintln!("{}", last.join("\n"));
        bail!("it ended with {}", output.status);
    }
    let wanted = ["number_of_executed_units", "new_units_added", "peak_rss_mb"];
    let figures = said.lines().filter_map(|line| {
        let (name, value) = line.strip_prefix("stat::")?.split_once(':')?;
        wanted
            .contains(&name)
            .then(|| format!("{name} {}", value.trim()))
    });
    Ok(figures.collect::<Vec<_>>().join(", "))
}

/// Replaces the committed corpus by the fewest inputs that cover all that it and the grown one do.
fn keep(program: &Path, name: &str, grown: &Path) -> Result<()> {
    let (corpus, fewest) = (corpora().join(name), grown.with_extension("fewest"));
    if fewest.exists() {
        fs::remove_dir_all(&fewest)?;
    }
    fs::create_dir_all(&fewest)?;
    let mut merge = Command::new(program);
    merge
        .args(["-merge=1", "-verbosity=0"])
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .args([fewest.as_path(), corpus.as_path(), grown]);
    command::run(with_target(&mut merge, name))?;
    fs::remove_dir_all(&corpus)?;
    fs::create_dir_all(&corpus)?;
    for entry in fs::read_dir(&fewest)? {
        let entry = entry?;
        fs::copy(entry.path(), corpus.join(entry.file_name()))?;
    }
    Ok(())
}
