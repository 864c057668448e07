//! The menu of crashes: how each is brought about, and what a good dump of it shows.

use serde::{Deserialize, Serialize};

/// The ways to end a kernel.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Crash {
    /// `panic()` in process context.
    Panic,
    /// Alt-SysRq-c, by way of /proc/sysrq-trigger.
    Sysrq,
    /// A null pointer is written in process context.
    Null,
    /// A null pointer is written in a timer, so in softirq context.
    OopsSoftirq,
    /// A null pointer is written in a hardware interrupt.
    OopsHardirq,
    /// `BUG()` in process context.
    Bug,
    /// `WARN()` with `kernel.panic_on_warn`.
    Warn,
    /// `panic()` with interrupts off, on the last CPU.
    IrqsOff,
    /// `panic()` while every transmit lock of the NIC is held.
    NicLocked,
    /// `panic()` while the driver holds a lock of its own.
    DriverLocked,
    /// `panic()` in the driver's transmit function.
    InTransmit,
    /// `panic()` in the driver's poll.
    InPoll,
    /// `panic()` in the receive path, below the driver's poll.
    InReceive,
    /// `panic()` in a console's write, below `printk()`.
    InPrintk,
    /// `panic()` with RTNL held.
    Rtnl,
    /// `panic()` after the last free page has been taken.
    NoMemory,
    /// The out-of-memory killer with `vm.panic_on_oom`.
    Oom,
    /// `panic()` on the last CPU while all others spin with interrupts off, one with the page
    /// allocator's lock.
    Spinners,
    /// `panic()` on all CPUs at once.
    Together,
    /// A soft lockup with `kernel.softlockup_panic`.
    SoftLockup,
    /// A hard lockup with `kernel.hardlockup_panic`: needs a watchdog by NMI.
    HardLockup,
    /// A hung task with `kernel.hung_task_panic`.
    HungTask,
    /// An RCU stall with `kernel.panic_on_rcu_stall`.
    RcuStall,
    /// A stack that grows into its guard page.
    StackOverflow,
    /// A fault without a stack.
    DoubleFault,
    /// An unknown NMI with `kernel.unknown_nmi_panic`.
    Nmi,
    /// A fatal machine check.
    Mce,
    /// `panic()`, and the dump path faults while it polls the device.
    FaultInDump,
    /// `panic()`, and the State text faults.
    FaultInState,
    /// `panic()`, and the dump path hangs while it polls the device.
    HangInDump,
    /// `panic()`, and the State text hangs.
    HangInState,
    /// `panic()` while the link is down; it comes back.
    LinkDown,
    /// `panic()` after netdump's transmit pool was overwritten.
    Pool,
    /// `panic()` on a host with thousands of threads.
    ManyTasks,
    /// `panic()` with a crash kernel loaded that runs at once: no dump of ours.
    KdumpFirst,
    /// `panic()` with a crash kernel loaded that runs after our dump.
    KdumpLast,
    /// `panic()` with the module loaded but not armed, the network not configured.
    Unarmed,
}

/// Who makes it happen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum By {
    /// `crashme`, told the crash's name.
    Crashme,
    /// `crashme`, told another crash's name, while something else goes on.
    CrashmeAs(&'static str),
    /// /proc/sysrq-trigger.
    Sysrq,
    /// The first program, which takes all memory there is.
    Memory,
    /// QEMU, told this in its monitor, for each CPU if a `{cpu}` is in it.
    Monitor(&'static str),
}

/// Where the function that was made to crash is found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum On {
    /// On the stack of the first program, which crashed.
    Init,
    /// On the stack of whatever task crashed.
    Crashed,
    /// On the stack of another task than the one that found out and crashed.
    Other,
}

/// What is left when it is over.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum End {
    /// A whole dump, and the host reboots.
    #[default]
    Dump,
    /// Nothing is sent; the kernel's own `panic=` reboots.
    Nothing,
    /// Nothing is sent; a crash kernel runs, and reboots.
    Capture,
    /// A whole dump, and then a crash kernel runs, and reboots. Its start changes memory, so that is
    /// not compared.
    DumpThenCapture,
}

/// One line of the menu.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The name used on the command line, in reports, and for `crashme`.
    pub name: &'static str,
    /// Who makes it happen.
    pub by: By,
    /// The function that must be on a stack.
    pub function: &'static str,
    /// Whose stack.
    pub on: On,
    /// Below /proc/sys or /sys, what is written before.
    pub settings: &'static [(&'static str, &'static str)],
    /// What is left.
    pub end: End,
}

const fn facts(name: &'static str, function: &'static str, on: On) -> Facts {
    Facts {
        name,
        by: By::Crashme,
        function,
        on,
        settings: &[],
        end: End::Dump,
    }
}

const SOFT_LOCKUP: &[(&str, &str)] = &[
    ("/proc/sys/kernel/watchdog_thresh", "1"),
    ("/proc/sys/kernel/softlockup_panic", "1"),
];
/// The last one can be read back as 1 only where the watchdog has a counter that raises NMIs.
const HARD_LOCKUP: &[(&str, &str)] = &[
    ("/proc/sys/kernel/watchdog_thresh", "1"),
    ("/proc/sys/kernel/hardlockup_panic", "1"),
    ("/proc/sys/kernel/nmi_watchdog", "1"),
];
const HUNG_TASK: &[(&str, &str)] = &[
    ("/proc/sys/kernel/hung_task_timeout_secs", "2"),
    ("/proc/sys/kernel/hung_task_check_interval_secs", "1"),
    ("/proc/sys/kernel/hung_task_panic", "1"),
];
const RCU_STALL: &[(&str, &str)] = &[
    ("/proc/sys/kernel/soft_watchdog", "0"),
    ("/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout", "3"),
    ("/proc/sys/kernel/panic_on_rcu_stall", "1"),
];

/// The menu, in the order it is shown.
const MENU: &[(Crash, Facts)] = &[
    (Crash::Panic, facts("panic", "crashme_panic", On::Init)),
    (
        Crash::Sysrq,
        Facts {
            by: By::Sysrq,
            ..facts("sysrq", "sysrq_handle_crash", On::Init)
        },
    ),
    (Crash::Null, facts("null", "crashme_null", On::Init)),
    (
        Crash::OopsSoftirq,
        facts("oops-softirq", "crashme_softirq", On::Crashed),
    ),
    (
        Crash::OopsHardirq,
        facts("oops-hardirq", "crashme_hardirq", On::Crashed),
    ),
    (Crash::Bug, facts("bug", "crashme_bug", On::Init)),
    (
        Crash::Warn,
        Facts {
            settings: &[("/proc/sys/kernel/panic_on_warn", "1")],
            ..facts("warn", "crashme_warn", On::Init)
        },
    ),
    (
        Crash::IrqsOff,
        facts("irqs-off", "crashme_irqs_off", On::Crashed),
    ),
    (
        Crash::NicLocked,
        facts("nic-locked", "crashme_nic_locked", On::Init),
    ),
    (
        Crash::DriverLocked,
        facts("driver-locked", "crashme_probed", On::Crashed),
    ),
    (
        Crash::InTransmit,
        facts("in-transmit", "crashme_probed", On::Crashed),
    ),
    (
        Crash::InPoll,
        facts("in-poll", "crashme_probed", On::Crashed),
    ),
    (
        Crash::InReceive,
        facts("in-receive", "crashme_receive", On::Crashed),
    ),
    (
        Crash::InPrintk,
        facts("in-printk", "crashme_console", On::Crashed),
    ),
    (Crash::Rtnl, facts("rtnl", "crashme_rtnl", On::Init)),
    (
        Crash::NoMemory,
        facts("no-memory", "crashme_no_memory", On::Init),
    ),
    (
        Crash::Oom,
        Facts {
            by: By::Memory,
            settings: &[("/proc/sys/vm/panic_on_oom", "2")],
            ..facts("oom", "out_of_memory", On::Init)
        },
    ),
    (
        Crash::Spinners,
        facts("spinners", "crashme_among_spinners", On::Crashed),
    ),
    (
        Crash::Together,
        facts("together", "crashme_together", On::Crashed),
    ),
    (
        Crash::SoftLockup,
        Facts {
            settings: SOFT_LOCKUP,
            ..facts("soft-lockup", "crashme_soft_lockup", On::Crashed)
        },
    ),
    (
        Crash::HardLockup,
        Facts {
            settings: HARD_LOCKUP,
            ..facts("hard-lockup", "crashme_hard_lockup", On::Crashed)
        },
    ),
    (
        Crash::HungTask,
        Facts {
            settings: HUNG_TASK,
            ..facts("hung-task", "crashme_hung_task", On::Other)
        },
    ),
    (
        Crash::RcuStall,
        Facts {
            settings: RCU_STALL,
            ..facts("rcu-stall", "crashme_rcu_stall", On::Other)
        },
    ),
    (
        Crash::StackOverflow,
        facts("stack-overflow", "crashme_overflow", On::Crashed),
    ),
    (
        Crash::DoubleFault,
        facts("double-fault", "crashme_double_fault", On::Crashed),
    ),
    (
        Crash::Nmi,
        Facts {
            by: By::Monitor("nmi"),
            settings: &[("/proc/sys/kernel/unknown_nmi_panic", "1")],
            ..facts("nmi", "exc_nmi", On::Crashed)
        },
    ),
    (
        // Uncorrected, enabled, context corrupt; the machine check is in progress.
        Crash::Mce,
        Facts {
            by: By::Monitor("mce 0 9 0xba00000000000e0f 0x5 0x0 0x0"),
            ..facts("mce", "do_machine_check", On::Crashed)
        },
    ),
    (
        Crash::FaultInDump,
        facts("fault-in-dump", "crashme_panic_later", On::Init),
    ),
    (
        Crash::FaultInState,
        facts("fault-in-state", "crashme_panic_later", On::Init),
    ),
    (
        Crash::HangInDump,
        facts("hang-in-dump", "crashme_panic_later", On::Init),
    ),
    (
        Crash::HangInState,
        facts("hang-in-state", "crashme_panic_later", On::Init),
    ),
    (
        Crash::LinkDown,
        Facts {
            by: By::CrashmeAs("panic"),
            ..facts("link-down", "crashme_panic", On::Init)
        },
    ),
    (Crash::Pool, facts("pool", "crashme_pool", On::Init)),
    (
        Crash::ManyTasks,
        facts("many-tasks", "crashme_many_tasks", On::Init),
    ),
    (
        Crash::KdumpFirst,
        Facts {
            by: By::CrashmeAs("panic"),
            end: End::Capture,
            ..facts("kdump-first", "crashme_panic", On::Init)
        },
    ),
    (
        Crash::KdumpLast,
        Facts {
            by: By::CrashmeAs("panic"),
            end: End::DumpThenCapture,
            ..facts("kdump-last", "crashme_panic", On::Init)
        },
    ),
    (
        Crash::Unarmed,
        Facts {
            by: By::CrashmeAs("panic"),
            // Debian's kernels stay dead by themselves.
            settings: &[("/proc/sys/kernel/panic", "1")],
            end: End::Nothing,
            ..facts("unarmed", "crashme_panic", On::Init)
        },
    ),
];

impl Crash {
    /// What the menu says of it.
    #[must_use]
    pub fn facts(self) -> Facts {
        let found = MENU.iter().find(|(crash, _)| *crash == self);
        found.map_or(facts("", "", On::Crashed), |(_, facts)| *facts)
    }

    /// The name used on the command line, in reports, and for `crashme`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.facts().name
    }

    /// Whether the guest's first program is what crashes: other crashes take the task by surprise.
    #[must_use]
    pub fn is_in_process(self) -> bool {
        self.facts().on == On::Init
    }

    /// Whether the kernel panics at once when told: what is between is not netdump's time.
    #[must_use]
    pub fn is_immediate(self) -> bool {
        let waits = [
            Self::DriverLocked,
            Self::InTransmit,
            Self::InPoll,
            Self::InReceive,
            Self::NoMemory,
            Self::LinkDown,
            Self::Spinners,
            Self::Together,
            Self::ManyTasks,
        ];
        self.facts().settings.is_empty()
            && !waits.contains(&self)
            && !matches!(self.facts().by, By::Monitor(_))
    }

    /// When a crash kernel is to run, as `netdump arm --kdump` has it; `None` if there is none.
    #[must_use]
    pub const fn kdump(self) -> Option<&'static str> {
        if matches!(self, Self::KdumpFirst) {
            Some("first")
        } else if matches!(self, Self::KdumpLast) {
            Some("last")
        } else {
            None
        }
    }

    /// Threads that the State text must show at least; `None` if it is what fails.
    #[must_use]
    pub const fn threads_min(self) -> Option<u64> {
        if matches!(self, Self::FaultInState | Self::HangInState) {
            None
        } else if matches!(self, Self::ManyTasks) {
            Some(3000)
        } else {
            Some(30)
        }
    }

    /// Whether the dump path itself faults.
    #[must_use]
    pub const fn faults_in_dump(self) -> bool {
        matches!(self, Self::FaultInDump | Self::FaultInState)
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        for crash in Crash::value_variants() {
            let value = crash.to_possible_value().unwrap();
            assert_eq!(value.get_name(), crash.name());
        }
    }

    #[test]
    fn crashme_knows_each_crash_that_it_is_told() {
        let source = include_str!("../crashme/crashme.c");
        for crash in Crash::value_variants() {
            let name = match crash.facts().by {
                By::Crashme => crash.name(),
                By::CrashmeAs(name) => name,
                By::Sysrq | By::Memory | By::Monitor(_) => continue,
            };
            assert!(source.contains(&format!("{{ \"{name}\", ")), "{name}");
        }
    }
}
