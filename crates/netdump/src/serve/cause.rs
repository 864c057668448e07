//! What killed a host, as far as its text tells: known before the first page is asked for.
//!
//! The end of the log is enough, so what is read is bounded. No dump waits for this: text comes
//! before pages in the stream.

use std::panic::catch_unwind;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use triage::{Class, Report};

use super::log;

/// So much of the log's end is looked at. An oops with the traces of all its CPUs has a tenth of it.
pub const TEXT_ENOUGH: usize = 256 << 10;
/// The verdict waits for the text no longer than this from the first packet on: a host that died
/// before it had sent its text is recorded all the same, and in a storm nobody's is that late.
pub const TEXT_WAIT: Duration = Duration::from_secs(5);

/// What killed a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// The name under which equal crashes meet: `s1:` and 16 hexadecimal digits.
    pub signature: String,
    /// The name under which similar crashes meet.
    pub family: String,
    /// Its kind, as `netdump triage` names it.
    pub class: String,
    /// What the kernel community would call it.
    pub title: String,
    /// The function it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
    /// That function's module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// The machine is at fault, not the kernel.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hardware: bool,
}

/// What killed the host whose spool is at `path`, as far as its text has arrived; `None` when the
/// text does not tell.
pub fn read(path: &Path) -> Result<Option<Cause>> {
    let text = log::read(path)?;
    let from = text.len().saturating_sub(TEXT_ENOUGH);
    Ok(text.get(from..).and_then(of))
}

/// What killed the host that said `text`.
#[must_use]
pub fn of(text: &[u8]) -> Option<Cause> {
    // The scanner is total and fuzzed; should it err all the same, the crash is taken without a
    // name instead of costing a thread that writes.
    let findings = catch_unwind(|| triage::scan(text)).ok()?;
    let boot = findings.reports.last()?.boot;
    let mut reports = findings.reports.iter().filter(|report| report.boot == boot);
    // A warning of long ago does not make two hosts die of the same.
    let fatal = reports.find(|report| report.class.is_crash() && !is_survived(report.class));
    fatal.or_else(|| findings.crash()).and_then(Cause::of)
}

/// Whether hosts go on after a report of this class, unless they are told to panic.
fn is_survived(class: Class) -> bool {
    matches!(
        class,
        Class::Warning
            | Class::RcuUsage
            | Class::Deadlock
            | Class::LockState
            | Class::Lock
            | Class::HungTask
            | Class::RcuStall
            | Class::SoftLockup
            | Class::WorkqueueLockup
            | Class::Atomic
            | Class::Kcsan
            | Class::Ubsan
            | Class::Leak
            | Class::NetDevice
            | Class::Unwinder
    )
}

impl Cause {
    fn of(report: &Report) -> Option<Self> {
        let signature = report.signature.as_ref()?;
        let class = serde_json::to_value(report.class).ok()?;
        Some(Self {
            signature: signature.signature.clone(),
            family: signature.family.clone(),
            class: class.as_str()?.to_owned(),
            title: report.title.clone(),
            function: report.function.clone(),
            module: report.module.clone(),
            hardware: report.class == Class::MachineCheck,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OOPS: &str = "\
[   12.000000] BUG: kernel NULL pointer dereference, address: 0000000000000000
[   12.000001] Oops: 0002 [#1] PREEMPT SMP NOPTI
[   12.000002] CPU: 1 PID: 100 Comm: sh Not tainted 6.1.0-56-amd64 #1  Debian 6.1.170-1
[   12.000003] RIP: 0010:frob_kick+0x14/0x60 [frob]
[   12.000004] Call Trace:
[   12.000005]  <TASK>
[   12.000006]  frob_ioctl+0x5a/0x110 [frob]
[   12.000007]  __x64_sys_ioctl+0x94/0xd0
[   12.000008]  </TASK>
[   12.000009] Kernel panic - not syncing: Fatal exception
";

    #[test]
    fn the_end_of_a_log_names_the_crash_and_boot_messages_do_not() {
        let cause = of(OOPS.as_bytes()).unwrap();
        assert_eq!(cause.function.as_deref(), Some("frob_kick"));
        assert_eq!(cause.module.as_deref(), Some("frob"));
        assert_eq!(cause.class, "null-dereference");
        assert!(cause.signature.starts_with("s1:") && !cause.hardware);
        assert_eq!(of(b"Linux version 6.1.0\neth0: link is up\n"), None);
        assert_eq!(of(b""), None);
    }

    #[test]
    fn a_warning_before_it_is_not_what_killed_the_host() {
        let warning = "[    6.000000] ------------[ cut here ]------------\n\
            [    6.000001] WARNING: CPU: 0 PID: 1 at net/core/dev.c:600 dev_add_pack+0x20/0x40\n\
            [    6.000002] RIP: 0010:dev_add_pack+0x20/0x40\n\
            [    6.000003] Call Trace:\n[    6.000004]  <TASK>\n\
            [    6.000005]  frob_init+0x5a/0x110\n[    6.000006]  </TASK>\n\
            [    6.000007] ---[ end trace 0000000000000000 ]---\n";
        let both = of([warning, OOPS].concat().as_bytes()).unwrap();
        assert_eq!(both.signature, of(OOPS.as_bytes()).unwrap().signature);
        let alone = of(warning.as_bytes()).unwrap();
        assert_eq!(alone.function.as_deref(), Some("dev_add_pack"));
    }

    #[test]
    fn a_machine_check_is_the_machines_fault() {
        let text = b"[    5.000000] mce: [Hardware Error]: CPU 1: Machine Check Exception: 5 Bank 4: b200000000070f0f\n\
            [    5.000001] Kernel panic - not syncing: Fatal machine check\n";
        assert!(of(text).unwrap().hardware);
    }
}
