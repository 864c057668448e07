//! `cargo xtask sim`: the simulator, built with every assertion on.

use std::process::Command;

use anyhow::Result;

use crate::{cache, command};

/// Runs the simulator with these arguments.
///
/// # Errors
/// A world did not end well; the simulator has said which.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["run", "--quiet", "--profile", "sim", "-p", "sim", "--"])
        .args(arguments);
    command::pass(cargo.current_dir(cache::tree()))
}
