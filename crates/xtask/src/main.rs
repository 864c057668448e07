//! `cargo xtask`: the one entry for people and CI to build, test, measure and show netdump.
//!
//! It knows the workspace only from outside: it runs cargo, make, and the workspace's own
//! binaries, and imports none of our packages.

mod apt;
mod cache;
mod command;
mod kernels;
mod lock;
mod output;
mod packages;
#[cfg(test)]
mod tidy;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, tests, measures and shows netdump.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// The pinned Debian packages: what they are, fetching all of them, pinning newer ones.
    Kernels {
        #[command(subcommand)]
        task: Kernels,
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
    let result = match Arguments::parse().task {
        Task::Kernels {
            task: Kernels::List,
        } => kernels::list(),
        Task::Kernels {
            task: Kernels::Fetch,
        } => kernels::fetch(),
        Task::Kernels {
            task: Kernels::Update,
        } => kernels::update(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
