//! `cargo xtask bench engine`: what a page costs in the two engines alone, in memory, per core.

use std::process::Command;

use anyhow::{Context as _, Result};

use super::stage::{self, Row};
use crate::command;

/// Runs it and prints the rows.
///
/// # Errors
/// The build or the measurement fails.
pub(crate) fn run(json: bool) -> Result<()> {
    let programs = stage::programs()?;
    let text = command::capture(Command::new(&programs.workbench).arg("engine"))?;
    let rows: Vec<Row> = text
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("`{line}` is no row")))
        .collect::<Result<_>>()?;
    stage::print(&rows, json)
}
