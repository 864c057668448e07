//! `cargo xtask test` and `cargo xtask ci`: everything that must hold, cheap first.
//!
//! A failing step does not hide later ones. Nothing is skipped silently: what is skipped is
//! counted and says why.

use std::ffi::OsStr;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::kmod::{self, Variant};
use crate::netconsole::{self, Messages};
use crate::vm::{self, Guest};
use crate::{cache, command, fuzz, kernels, output, packages, toolchain, tools};

/// Who asks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Lane {
    /// A person: everything.
    Test,
    /// The same, and the run must leave the tree as it was.
    Ci,
}

/// How many checks a step made, and what is worth saying about them.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    note: String,
}

struct Step {
    name: String,
    work: Box<dyn FnOnce() -> Result<Tally>>,
}

struct Done {
    name: String,
    tally: Tally,
    time: Duration,
}

/// Runs every step and prints the table and the closing line; `symbols` reads every guest's vmcore
/// with its kernel's symbols, not only one of each kernel's.
///
/// # Errors
/// A step failed.
pub(crate) fn run(lane: Lane, symbols: bool) -> Result<()> {
    let before = (lane == Lane::Ci).then(tree_state).transpose()?;
    let mut done: Vec<Done> = steps(symbols).into_iter().map(finish).collect();
    if let Some(before) = before {
        done.push(finish(step("tree unchanged", move || {
            tree_unchanged(&before)
        })));
    }
    println!("\n{}", output::table(&rows(&done)));
    let sum = |count: fn(&Tally) -> u64| done.iter().map(|done| count(&done.tally)).sum::<u64>();
    let failed = sum(|tally| tally.failed);
    let (passed, skipped) = (sum(|tally| tally.passed), sum(|tally| tally.skipped));
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    ensure!(
        failed == 0,
        "not everything holds: the table above names the steps"
    );
    Ok(())
}

fn steps(symbols: bool) -> Vec<Step> {
    let mut steps = vec![
        step("tools", prepare),
        step("fmt", || cargo(&["fmt", "--all", "--check"])),
        step("xtask and tidy", || tests(&["test", "-p", "xtask"])),
        step("clippy", || {
            cargo(&["clippy", "--workspace", "--all-targets", "--", "-Dwarnings"])
        }),
        step("clippy bare", clippy_bare),
        step("doc", doc),
        step("unit", unit),
        step("sim", || {
            tests(&["test", "--profile", "sim", "-p", "sim", "--no-fail-fast"])
        }),
        step("fuzz corpora", fuzz::replay),
    ];
    steps.push(step("forwarding", forwarding));
    steps.extend(corpus());
    match packages::kernels() {
        Ok(kernels) => steps.extend(kernels.into_iter().map(|kernel| {
            let name = format!("kmod {}", kernel.name);
            step(&name, move || {
                kmod::check(&kernel.release).map(|()| Tally::passed(""))
            })
        })),
        Err(error) => steps.push(step("kmod", move || Err(error))),
    }
    steps.extend(guests().into_iter().map(|guest| guest_step(guest, symbols)));
    steps.extend(senders().map(|(guest, messages)| messages_step(guest, messages)));
    steps
}

/// What the other steps run, and packages that can be had. Without a network what is cached must do.
fn prepare() -> Result<Tally> {
    tools::ensure()?;
    let mut tally = Tally::passed("");
    if let Err(error) = kernels::settle() {
        tally.note = format!("what is pinned was not looked for: {error:#}");
    }
    Ok(tally)
}

/// The fast lane: both kernels, four cards, a wire that loses with live messages, a filtered dump, and the crashes that
/// ask most of the dump path: held locks, the receive path, a fault of its own.
fn guests() -> [Guest; 7] {
    let guest = |kernel: &str, nic: &str, crash: &str| Guest {
        kernel: kernel.into(),
        nic: nic.into(),
        crash: crash.into(),
        memory: "512M".into(),
        cpus: 2,
        ..Guest::default()
    };
    [
        Guest {
            symbols: true,
            ..guest("6.1", "virtio-net", "panic")
        },
        guest("6.12", "e1000", "oops-softirq"),
        Guest {
            loss: Some(5.0),
            seed: Some(1),
            console: true,
            ..guest("6.1", "e1000e", "panic")
        },
        Guest {
            filter: Some(31),
            fill: Some("mixed".into()),
            ..guest("6.12", "virtio-net", "panic")
        },
        guest("6.12", "e1000e", "spinners"),
        guest("6.1", "e1000", "in-receive"),
        guest("6.1", "vmxnet3", "fault-in-dump"),
    ]
}

/// Messages of all three kernels, by each way they can be sent, over a wire that does what wires do.
fn senders() -> [(Guest, Messages); 3] {
    let sender = |kernel: &str, sender: &str| {
        let guest = Guest {
            kernel: kernel.into(),
            loss: Some(5.0),
            duplicate: Some(2.0),
            reorder: Some(3.0),
            seed: Some(1),
            ..Guest::default()
        };
        let messages = Messages {
            netconsole: Some(sender.into()),
            ..Messages::default()
        };
        (guest, messages)
    };
    [
        sender("6.1", "basic"),
        sender("7.3", "extended"),
        sender("6.12", "module"),
    ]
}

fn messages_step(guest: Guest, messages: Messages) -> Step {
    let sender = messages.netconsole.clone().unwrap_or_default();
    let name = format!("messages {} {sender}", guest.kernel);
    step(&name, move || {
        let (heard, folder) = netconsole::judge(&guest, &messages)?;
        ensure!(
            heard.verdict == "Ok",
            "verdict {} ({}): see {}",
            heard.verdict,
            heard.why.join("; "),
            folder.display()
        );
        fs::remove_dir_all(&folder)?;
        let mut note = format!(
            "{} messages, {} stored, {} of {} missing ones named, {} in rsyslog",
            heard.messages, heard.stored, heard.named, heard.missing, heard.syslog_stored
        );
        for reason in &heard.skipped {
            note += &format!("; skipped: {reason}");
        }
        Ok(Tally {
            passed: 1,
            failed: 0,
            skipped: heard.skipped.len().try_into()?,
            note,
        })
    })
}

fn guest_step(guest: Guest, symbols: bool) -> Step {
    let loss = guest
        .loss
        .map_or(String::new(), |percent| format!(" {percent}% loss"));
    let filter = guest
        .filter
        .map_or(String::new(), |level| format!(" level {level}"));
    let name = format!(
        "vm {} {} {}{loss}{filter}",
        guest.kernel, guest.nic, guest.crash
    );
    step(&name, move || {
        let guest = Guest {
            symbols: guest.symbols || symbols,
            ..guest
        };
        let (found, folder) = vm::judge(&guest, Variant::Product)?;
        ensure!(
            found.verdict == "Ok",
            "verdict {}: see {}",
            found.why,
            folder.display()
        );
        // Gigabytes in a few runs; a good run can be repeated by its options.
        fs::remove_dir_all(&folder)?;
        let (checked, listed) = (found.pages_checked, found.pages_listed);
        let mut note = format!(
            "{checked} pages checked, {listed} listed, {:.1} s",
            found.dump_s
        );
        for reason in &found.skipped {
            note += &format!("; skipped: {reason}");
        }
        let skipped = found.skipped.len().try_into()?;
        Ok(Tally {
            passed: 1,
            failed: 0,
            skipped,
            note,
        })
    })
}

fn step(name: &str, work: impl FnOnce() -> Result<Tally> + 'static) -> Step {
    Step {
        name: name.to_owned(),
        work: Box::new(work),
    }
}

fn finish(step: Step) -> Done {
    eprintln!("\n=== {}", step.name);
    let started = Instant::now();
    let tally = (step.work)().unwrap_or_else(|error| Tally {
        failed: 1,
        note: format!("{error:#}"),
        ..Tally::default()
    });
    let time = started.elapsed();
    let outcome = if tally.failed > 0 { "FAILED" } else { "ok" };
    eprintln!(
        "=== {}: {outcome} ({}) {}",
        step.name,
        output::seconds(time),
        tally.note
    );
    Done {
        name: step.name,
        tally,
        time,
    }
}

fn rows(done: &[Done]) -> Vec<Vec<String>> {
    let heading = ["step", "time", "passed", "failed", "skipped", ""]
        .map(str::to_owned)
        .to_vec();
    let row = |done: &Done| {
        let tally = &done.tally;
        let counts = [tally.passed, tally.failed, tally.skipped].map(|count| count.to_string());
        let mut row = vec![done.name.clone(), output::seconds(done.time)];
        row.extend(counts);
        row.push(shortened(&tally.note));
        row
    };
    std::iter::once(heading)
        .chain(done.iter().map(row))
        .collect()
}

/// The whole note stands above, where the step ended.
fn shortened(note: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 100;
    match note.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}...", note.get(..end).unwrap_or_default()),
        None => note.to_owned(),
    }
}

impl Tally {
    fn passed(note: &str) -> Self {
        Self {
            passed: 1,
            note: note.to_owned(),
            ..Self::default()
        }
    }
}

fn cargo(arguments: &[&str]) -> Result<Tally> {
    let mut cargo = Command::new("cargo");
    command::run(cargo.args(arguments).current_dir(cache::tree()))?;
    Ok(Tally::passed(""))
}

fn doc() -> Result<Tally> {
    let mut cargo = Command::new("cargo");
    cargo.args([
        "doc",
        "--workspace",
        "--no-deps",
        "--document-private-items",
    ]);
    command::run(
        cargo
            .env("RUSTDOCFLAGS", "-Dwarnings")
            .current_dir(cache::tree()),
    )?;
    Ok(Tally::passed(""))
}

/// `proto` must build where the kernel side runs: without `std`, and as kernel code is compiled.
fn clippy_bare() -> Result<Tally> {
    let flags = toolchain::flags()?.join("\x1f");
    let mut cargo = Command::new("cargo");
    cargo.args([
        "clippy",
        "-p",
        "proto",
        "--target",
        toolchain::TARGET,
        "--",
        "-Dwarnings",
    ]);
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env("RUSTC_BOOTSTRAP", "1");
    command::run(cargo.current_dir(cache::tree()))?;
    Ok(Tally::passed(""))
}

/// The figures of triage on the logs in the folder `NETDUMP_OOPS_CORPUS`, which lie outside the
/// repository; `None` where nobody names one, and the step `unit` tells the test as skipped and why.
fn corpus() -> Option<Step> {
    std::env::var_os("NETDUMP_OOPS_CORPUS")?;
    Some(step("oops corpus", || {
        tests(&["test", "-ptriage", "--test=corpus", "--", "--ignored"])
    }))
}

/// Messages to a real rsyslogd and to OpenTelemetry's own decoder; what is not there skips its part.
fn forwarding() -> Result<Tally> {
    let mut skipped = Vec::new();
    let syslog = tools::ensure_also(&["openssl", "rsyslog", "rsyslog-gnutls"]);
    let collector = packages::opentelemetry();
    let mut arguments = vec!["test", "-pnetdump", "--test=serve", "forward::", "--"];
    arguments.push("--ignored");
    if let Err(error) = &syslog {
        skipped.push(format!("no rsyslogd: {error:#}"));
        arguments.push("--skip=rsyslogd");
        arguments.push("--skip=another_name");
    }
    let mut environment = Vec::new();
    match &collector {
        Ok(python) => environment.push(("NETDUMP_OTLP_PYTHON", python.as_os_str())),
        Err(error) => {
            skipped.push(format!("no opentelemetry-proto: {error:#}"));
            arguments.push("--skip=collector");
        }
    }
    let mut tally = if skipped.len() < 2 {
        tests_with(&arguments, &environment)?
    } else {
        Tally::default()
    };
    tally.skipped += u64::try_from(skipped.len())?;
    if !skipped.is_empty() {
        tally.note = format!("skipped: {}", skipped.join("; "));
    }
    Ok(tally)
}

/// What the two steps beside this one do not run.
fn unit() -> Result<Tally> {
    tests(&[
        "test",
        "--workspace",
        "--exclude=sim",
        "--exclude=xtask",
        "--no-fail-fast",
    ])
}

pub(crate) fn tests(arguments: &[&str]) -> Result<Tally> {
    tests_with(arguments, &[])
}

fn tests_with(arguments: &[&str], environment: &[(&str, &OsStr)]) -> Result<Tally> {
    let mut cargo = Command::new("cargo");
    cargo.envs(environment.iter().copied());
    let (succeeded, text) = command::tee(cargo.args(arguments).current_dir(cache::tree()))?;
    let mut tally = count_tests(&text);
    if !succeeded && tally.failed == 0 {
        tally.failed = 1;
        tally.note = "the tests did not build or did not end".to_owned();
    }
    ensure!(tally.passed + tally.failed > 0, "no test ran");
    Ok(tally)
}

/// Sums the lines `test result: ok. 3 passed; 0 failed; 1 ignored; ...` and names what is ignored.
fn count_tests(text: &str) -> Tally {
    let mut tally = Tally::default();
    let mut ignored = Vec::new();
    for line in text.lines() {
        if let Some((test, reason)) = line.split_once(" ... ignored") {
            ignored.push(format!("{}{reason}", test.trim_start_matches("test ")));
        }
        let Some(result) = line.strip_prefix("test result: ") else {
            continue;
        };
        for part in result.split(['.', ';']) {
            let Some((count, what)) = part.trim().split_once(' ') else {
                continue;
            };
            let Ok(count) = count.parse::<u64>() else {
                continue;
            };
            match what {
                "passed" => tally.passed += count,
                "failed" => tally.failed += count,
                "ignored" => tally.skipped += count,
                _ => {}
            }
        }
    }
    if !ignored.is_empty() {
        tally.note = format!("skipped: {}", ignored.join("; "));
    }
    tally
}

fn tree_state() -> Result<String> {
    command::capture(
        Command::new("git")
            .args(["status", "--porcelain"])
            .current_dir(cache::tree()),
    )
}

fn tree_unchanged(before: &str) -> Result<Tally> {
    let after = tree_state()?;
    let changed: Vec<&str> = after
        .lines()
        .filter(|line| !before.contains(line))
        .collect();
    ensure!(
        changed.is_empty(),
        "the run changed the tree: {}",
        changed.join(", ")
    );
    Ok(Tally::passed(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_results_are_summed_and_ignored_tests_named() {
        let text = "test a::b ... ignored, needs a network\n\
                    test result: FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s\n\
                    noise 7 passed\n\
                    test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s\n";
        let expected = Tally {
            passed: 7,
            failed: 1,
            skipped: 1,
            note: "skipped: a::b, needs a network".to_owned(),
        };
        assert_eq!(count_tests(text), expected);
    }

    #[test]
    fn a_failing_step_is_counted_and_says_why() {
        let done = finish(step("x", || anyhow::bail!("because")));
        assert_eq!(
            (done.tally.failed, done.tally.note.as_str()),
            (1, "because")
        );
    }
}
