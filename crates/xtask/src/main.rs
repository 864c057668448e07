//! `cargo xtask`: the one entry for people and CI to build, test, measure and show netdump.
//!
//! It knows the workspace only from outside: it runs cargo, make, and the workspace's own
//! binaries, and imports none of our packages.

mod apt;
mod bench;
mod cache;
mod command;
mod demo;
mod fuzz;
mod kernels;
mod kmod;
mod lock;
mod matrix;
mod netconsole;
mod output;
mod packages;
mod sim;
mod test;
#[cfg(test)]
mod tidy;
mod toolchain;
mod tools;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::fuzz::Fuzz;
use crate::kmod::Variant;
use crate::matrix::Part;
use crate::netconsole::Messages;
use crate::test::Lane;
use crate::vm::Guest;

/// Builds, tests, measures and shows netdump.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what is missing, boots a guest, crashes it, and shows what arrives.
    Demo,
    /// Everything that must hold, cheap first.
    Test {
        /// Read every guest's vmcore with its kernel's symbols, not only one.
        #[arg(long)]
        symbols: bool,
    },
    /// The same as test, and the tree must stay as it was.
    Ci,
    /// The kernel module for the supported kernels.
    Kmod {
        #[command(subcommand)]
        task: Kmod,
    },
    /// Boots one guest with a stock kernel, or all of them, arms it, crashes it, and judges what
    /// arrived.
    Vm {
        #[command(flatten)]
        guest: Box<Guest>,
        #[command(flatten)]
        messages: Messages,
        #[command(flatten)]
        part: Part,
        /// Print one JSON object as the last line of standard output, with --all one a cell.
        #[arg(long)]
        json: bool,
    },
    /// Measurements.
    Bench {
        #[command(subcommand)]
        task: Bench,
    },
    /// The pinned Debian packages: what they are, fetching all of them, pinning newer ones.
    Kernels {
        #[command(subcommand)]
        task: Kernels,
    },
    /// Runs simulated worlds by seed; `cargo xtask sim --help` is the simulator's own help.
    #[command(disable_help_flag = true)]
    Sim {
        /// The simulator's arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Fuzzes a decoder, an engine or the simulated world with libFuzzer.
    Fuzz(Fuzz),
}

#[derive(Subcommand)]
enum Kmod {
    /// Builds the module and prints where it is.
    Build {
        /// Line or release of the kernel; all when not given.
        #[arg(long)]
        kernel: Option<String>,
    },
    /// Builds the module and proves what can be proved about it without running it.
    Check {
        /// Line or release of the kernel; all when not given.
        #[arg(long)]
        kernel: Option<String>,
    },
}

#[derive(Subcommand)]
enum Bench {
    /// The two engines in memory, per core: sealing, compressing, and pages of all kinds.
    Engine {
        /// Print one JSON object a row instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// A dump over loopback against raw datagrams, `nc` and `ssh`.
    Loopback {
        /// Print one JSON object a row instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// 1 to 1000 sessions at once: rate, fairness, the server's memory.
    Storm {
        /// Print one JSON object a row instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Goodput over loss and round trip, as a share of what the link carries.
    Loss {
        /// Instead, that of a guest that panics, as a ratio to the limit measured in the same guest.
        #[arg(long)]
        panic: bool,
        /// Print one JSON object a row instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Console messages into logs with none lost, against a sink; memory per host; delay.
    Console {
        /// Print one JSON object a row instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// A real guest's core file to a finished vmcore, against makedumpfile and ssh.
    Native {
        /// Print one JSON object a row instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// From the panic to the finished vmcore of a guest in use, against kdump on the same guest.
    Peer {
        /// Filter level: 31, 0 or both.
        #[arg(long, default_value = "both")]
        level: bench::peer::Levels,
        /// Print one JSON object a row instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Log and report of a real guest's memory, against makedumpfile and drgn; scores on logs.
    Triage {
        /// Print one JSON object a row instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Goodput of a dump, as a ratio to the limit measured in the same guest.
    Dump {
        #[command(flatten)]
        guest: Box<Guest>,
        /// Print one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum Kernels {
    /// Shows what is pinned.
    List,
    /// Fetches and unpacks everything pinned, so that all else works without a network.
    Fetch,
    /// Pins what the suites have now, in the same lines, and shows the difference.
    Update,
}

fn main() -> ExitCode {
    match run_settled() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the task, and once more if it needed something that is pinned and gone from the mirror.
fn run_settled() -> Result<()> {
    let outcome = run(Arguments::parse().task);
    match outcome {
        Err(error) if error.is::<apt::Gone>() => {
            kernels::settle()?;
            run(Arguments::parse().task)
        }
        outcome => outcome,
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Demo => demo::run(),
        Task::Test { symbols } => test::run(Lane::Test, symbols),
        Task::Ci => test::run(Lane::Ci, false),
        Task::Kmod {
            task: Kmod::Build { kernel },
        } => for_kernels(kernel.as_deref(), |release| {
            let modules = kmod::build(release, Variant::Product)?;
            println!(
                "{}\n{}",
                modules.netdump.display(),
                modules.crashme.display()
            );
            Ok(())
        }),
        Task::Kmod {
            task: Kmod::Check { kernel },
        } => for_kernels(kernel.as_deref(), kmod::check),
        Task::Vm { part, json, .. } if part.all => matrix::run(&part, json),
        Task::Vm { part, .. } if part.page => matrix::page(),
        Task::Vm {
            guest,
            messages,
            json,
            ..
        } if messages.netconsole.is_some() => netconsole::run(&guest, &messages, json),
        Task::Vm { guest, json, .. } => vm::run(&guest, json),
        Task::Bench {
            task: Bench::Dump { guest, json },
        } => bench::dump(&guest, json),
        Task::Bench {
            task: Bench::Engine { json },
        } => bench::engine::run(json),
        Task::Bench {
            task: Bench::Loopback { json },
        } => bench::loopback::run(json),
        Task::Bench {
            task: Bench::Console { json },
        } => bench::console::run(json),
        Task::Bench {
            task: Bench::Storm { json },
        } => bench::storm::run(json),
        Task::Bench {
            task: Bench::Loss { panic, json },
        } if panic => bench::loss::panic(json),
        Task::Bench {
            task: Bench::Loss { json, .. },
        } => bench::loss::run(json),
        Task::Bench {
            task: Bench::Native { json },
        } => bench::native::run(json),
        Task::Bench {
            task: Bench::Triage { json },
        } => bench::triage::run(json),
        Task::Bench {
            task: Bench::Peer { level, json },
        } => bench::peer::run(level, json),
        Task::Kernels {
            task: Kernels::List,
        } => kernels::list(),
        Task::Kernels {
            task: Kernels::Fetch,
        } => kernels::fetch(),
        Task::Kernels {
            task: Kernels::Update,
        } => kernels::update(),
        Task::Sim { arguments } => sim::run(&arguments),
        Task::Fuzz(fuzz) => fuzz::run(&fuzz),
    }
}

/// Does the work for the kernel that was asked for, or for all.
fn for_kernels(wanted: Option<&str>, work: impl Fn(&str) -> Result<()>) -> Result<()> {
    tools::ensure()?;
    let kernels = match wanted {
        Some(wanted) => vec![packages::kernel(wanted)?],
        None => packages::kernels()?,
    };
    kernels.iter().try_for_each(|kernel| work(&kernel.release))
}
