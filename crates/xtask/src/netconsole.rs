//! `cargo xtask vm --netconsole ...`: one guest that sends its kernel's messages, by in-tree
//! netconsole or by our module, to a real server and a real rsyslogd, held against its own log.
//!
//! Gathers what `vmtest console` needs, as [`crate::vm`] does it for `vmtest run`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::kmod::{self, Variant};
use crate::vm::{self, Guest};
use crate::{cache, command, packages, tools};

/// Where Debian has it.
const RSYSLOGD: &str = "/usr/sbin/rsyslogd";

/// Whose messages, and what becomes of the guest.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Messages {
    /// Not a dump, but the guest's messages: by in-tree netconsole, basic or extended, or by our
    /// module.
    #[arg(long, value_name = "SENDER", value_parser = ["basic", "extended", "module"])]
    pub(crate) netconsole: Option<String>,
    /// How our module speaks to rsyslogd: 5424 unless told otherwise.
    #[arg(long, requires = "netconsole", value_parser = ["5424", "3164"])]
    pub(crate) syslog_format: Option<String>,
    /// The kernel does not crash after its messages.
    #[arg(long, requires = "netconsole")]
    pub(crate) no_crash: bool,
    /// A crash kernel is loaded, which runs first when the kernel panics.
    #[arg(long, requires = "netconsole", conflicts_with = "no_crash")]
    pub(crate) kdump: bool,
    /// Not messages, but what it costs to print them.
    #[arg(skip)]
    pub(crate) costs: bool,
}

/// What a message costs who prints it, with one way of sending, in one round.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Cost {
    /// The way.
    pub(crate) config: String,
    /// Microseconds, the median.
    pub(crate) printk_us: f64,
    /// What nine of ten take at most.
    pub(crate) printk_p90_us: f64,
}

/// What `vmtest console` found, of which only what is used here.
#[derive(Debug, Deserialize)]
pub(crate) struct Heard {
    /// `Ok`, or what is wrong in a word.
    pub(crate) verdict: String,
    /// What is wrong.
    pub(crate) why: Vec<String>,
    /// Messages in the guest's own log.
    pub(crate) messages: u64,
    /// Records in the server's.
    pub(crate) stored: u64,
    /// Messages that did not arrive.
    pub(crate) missing: u64,
    /// Of those, what the server's log names.
    pub(crate) named: u64,
    /// Lines that rsyslog wrote.
    pub(crate) syslog_stored: u64,
    /// Checks that were not made, with the reason.
    pub(crate) skipped: Vec<String>,
    /// What it costs to print.
    #[serde(default)]
    pub(crate) costs: Vec<Cost>,
}

/// Runs a guest; standard output is `vmtest`'s own.
///
/// # Errors
/// Something cannot be fetched or built, or the verdict is not Ok.
pub(crate) fn run(guest: &Guest, messages: &Messages, json: bool) -> Result<()> {
    let (mut command, folder) = prepare(guest, messages)?;
    command.args(json.then_some("--json"));
    let result = command::pass(&mut command);
    eprintln!("artefacts: {}", folder.display());
    result.context("the guest's messages are not as they should be")
}

/// Runs a guest and returns what was found, good or bad.
///
/// # Errors
/// Something cannot be fetched or built, or `vmtest` gives no judgement.
pub(crate) fn judge(guest: &Guest, messages: &Messages) -> Result<(Heard, PathBuf)> {
    let (mut command, folder) = prepare(guest, messages)?;
    let (_status, text) = command::tee(command.arg("--json"))?;
    let line = text.lines().next_back().unwrap_or_default();
    let heard = serde_json::from_str(line)
        .with_context(|| format!("vmtest's last line is not its judgement: `{line}`"))?;
    Ok((heard, folder))
}

fn prepare(guest: &Guest, messages: &Messages) -> Result<(Command, PathBuf)> {
    tools::ensure()?;
    let sender = messages.netconsole.as_deref().context("nobody sends")?;
    let kernel = packages::kernel(&guest.kernel)?;
    let image = packages::image(&kernel.release)?;
    let modules = kmod::build(&kernel.release, Variant::Product)?;
    let binaries = vm::binaries()?;
    let name = format!("{}-{}-{sender}", kernel.name, guest.nic);
    let folder = cache::artefacts("console", &name)?;
    let mut command = Command::new(&binaries.vmtest);
    command.args(["console", "--sender", sender, "--nic", &guest.nic]);
    command.arg("--image").arg(image);
    command.arg("--module").arg(modules.netdump);
    command.arg("--netdump").arg(&binaries.netdump);
    command.arg("--console-init").arg(&binaries.console_init);
    command.arg("--keep").arg(&folder).args(guest.wire());
    if Path::new(RSYSLOGD).exists() {
        command.args(["--rsyslogd", RSYSLOGD]);
    }
    if let Some(format) = &messages.syslog_format {
        command.args(["--syslog-format", format]);
    }
    command.args(messages.no_crash.then_some("--no-crash"));
    command.args(messages.kdump.then_some("--kdump"));
    command.args(messages.costs.then_some("--costs"));
    Ok((command, folder))
}
