//! What kinds of report there are, and which line begins one.
//!
//! The formats are those of the kernel's own sources, 2.6.32 to 7.x. A pattern stands at the
//! beginning of a message: the kernel writes it there, and quotations of it do not.

use serde::Serialize;

/// A kind of report.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// `mm/kasan`: a bad access that the address sanitizer saw.
    Kasan,
    /// `mm/kmsan`: uninitialised memory.
    Kmsan,
    /// `kernel/kcsan`: a data race.
    Kcsan,
    /// `mm/kfence`: a bad access that sampling saw.
    Kfence,
    /// `lib/ubsan.c`: undefined behaviour.
    Ubsan,
    /// A null pointer was followed.
    NullDereference,
    /// A page fault, translation fault or abort at any other address.
    PageFault,
    /// x86's general protection fault.
    GeneralProtection,
    /// Every other exception: division, invalid opcode, stack segment, double fault, abort.
    Trap,
    /// `BUG()`.
    Bug,
    /// `WARN()`.
    Warning,
    /// `lib/list_debug.c`.
    ListCorruption,
    /// `lib/refcount.c`.
    Refcount,
    /// `mm/usercopy.c`.
    Usercopy,
    /// Control-flow integrity.
    Cfi,
    /// `kernel/locking/lockdep.c`: a possible deadlock.
    Deadlock,
    /// `kernel/locking/lockdep.c`: a lock used in two kinds of context.
    LockState,
    /// `kernel/locking`: any other wrong use of a lock.
    Lock,
    /// `kernel/rcu`: RCU used without protection.
    RcuUsage,
    /// `kernel/rcu/tree_stall.h`.
    RcuStall,
    /// `kernel/watchdog.c`.
    SoftLockup,
    /// `kernel/watchdog.c`.
    HardLockup,
    /// `kernel/workqueue.c`.
    WorkqueueLockup,
    /// `kernel/hung_task.c`.
    HungTask,
    /// `kernel/sched/core.c`: slept or scheduled where that is forbidden.
    Atomic,
    /// `mm/slub.c`, `mm/slab.c`: damaged objects.
    Slab,
    /// `mm`: damaged page state.
    BadPage,
    /// The end of a stack was reached or overwritten.
    StackOverflow,
    /// kmemleak.
    Leak,
    /// `net/core/dev.c`: a network device that never becomes free.
    NetDevice,
    /// Any other line that begins with `BUG:`, and other kernel inconsistencies.
    Kernel,
    /// The unwinder found a stack that it cannot follow.
    Unwinder,
    /// `panic()` for its own reason.
    Panic,
    /// The root file system or init was not found.
    Boot,
    /// An uncorrected machine check.
    MachineCheck,
    /// A corrected hardware error, EDAC's or the machine check handler's.
    Hardware,
    /// `mm/oom_kill.c`.
    OutOfMemory,
    /// A file system found itself damaged.
    Filesystem,
    /// A block device failed to read or write.
    Block,
}

impl Class {
    /// Whether a report of this class says that the kernel, or the machine, went wrong. The others
    /// are told beside it: a full disk or a killed process is no crash.
    #[must_use]
    pub fn is_crash(self) -> bool {
        !matches!(
            self,
            Self::Hardware | Self::OutOfMemory | Self::Filesystem | Self::Block
        )
    }

    /// Whether a report of this class is one line, with no trace to wait for.
    pub(crate) fn is_one_line(self) -> bool {
        matches!(
            self,
            Self::Hardware | Self::OutOfMemory | Self::Filesystem | Self::Block | Self::NetDevice
        )
    }

    /// An exception: its first line is followed by one with `[#1]`.
    pub(crate) fn is_exception(self) -> bool {
        matches!(
            self,
            Self::NullDereference | Self::PageFault | Self::GeneralProtection | Self::Trap
        )
    }

    /// A line of the kernel that no rule knows and that may still begin a report: it does if a call
    /// trace follows at once.
    pub(crate) fn is_doubtful(text: &str) -> bool {
        let text = without_subsystem(text.trim_start());
        (text.starts_with("WARNING: ") || text.starts_with("INFO: "))
            && !text.starts_with("INFO: Freed")
            && !text.starts_with("INFO: Allocated")
            && !text.starts_with("INFO: lockdep is turned off")
    }

    /// A message that only leads to the `BUG()` or `WARN()` behind it.
    pub(crate) fn is_prelude(self) -> bool {
        matches!(
            self,
            Self::ListCorruption | Self::Refcount | Self::Usercopy | Self::Kernel | Self::Cfi
        )
    }

    /// A message about the damage that a `BUG()` or `WARN()` was for.
    pub(crate) fn is_damage(self) -> bool {
        matches!(self, Self::ListCorruption | Self::Refcount | Self::Usercopy)
    }

    /// A report in which other CPUs and tasks are shown as well.
    pub(crate) fn shows_others(self) -> bool {
        matches!(
            self,
            Self::RcuStall | Self::SoftLockup | Self::HardLockup | Self::HungTask
        )
    }

    /// The class that `text`, a message without its prefix, begins a report of.
    #[must_use]
    pub fn of_line(text: &str) -> Option<Self> {
        let text = without_subsystem(text.trim_start());
        let first = *text.as_bytes().first()?;
        let class = match first {
            b'B' => bug(text),
            b'W' => warning(text),
            b'I' => info(text),
            b'U' => unable(text),
            b'O' => oops(text),
            b'K' | b'k' => kernel(text),
            b'[' => bracketed(text),
            _ => None,
        };
        class.or_else(|| by_beginning(text, first))
    }

    /// The class of a report that `text` is in the middle of: lines that nothing else writes. They
    /// count only where the first line was lost.
    pub(crate) fn of_middle(text: &str) -> Option<Self> {
        let text = without_subsystem(text.trim());
        let starts = |beginning: &str| text.starts_with(beginning);
        match *text.as_bytes().first()? {
            b'#' if starts("#PF: ") => Some(Self::PageFault),
            b'"' if starts("\"echo 0 > /proc/sys/kernel/hung_task") => Some(Self::HungTask),
            b'(' if starts("(detected by ") || (starts("(t=") && text.contains("jiffies")) => {
                Some(Self::RcuStall)
            }
            b'U' if starts("Uninit was ") => Some(Self::Kmsan),
            b'T' if starts("The buggy address belongs to") => Some(Self::Kasan),
            b'R' if starts("Read of size ") && text.contains(" by task ") => Some(Self::Kasan),
            b'W' if starts("Write of size ") && text.contains(" by task ") => Some(Self::Kasan),
            b'-' if starts("---[ end trace ") => Some(Self::Kernel),
            _ if text.ends_with(" is trying to acquire lock:") => Some(Self::Deadlock),
            _ if text.ends_with(", with a lock still held there!") => Some(Self::Lock),
            _ => None,
        }
    }

    /// The class that begins in the middle of `text`, after what another writer put before it.
    /// Only beginnings that nobody else writes count.
    pub(crate) fn within_line(text: &str) -> Option<(usize, Self)> {
        const SURE: [&str; 26] = [
            "BUG: KASAN: ",
            "BUG: KCSAN: ",
            "BUG: KMSAN: ",
            "BUG: kernel NULL pointer dereference",
            "BUG: scheduling while atomic: ",
            "BUG: sleeping function called from invalid context",
            "BUG: soft lockup - CPU#",
            "BUG: spinlock bad magic",
            "BUG: unable to handle ",
            "BUG: workqueue lockup",
            "INFO: rcu_",
            "INFO: task ",
            "INFO: trying to register non-static key",
            "Internal error: Oops",
            "Kernel panic - not syncing: ",
            "Unable to handle kernel ",
            "WARNING: CPU: ",
            "WARNING: bad unlock balance detected",
            "WARNING: inconsistent lock state",
            "WARNING: possible circular locking dependency",
            "WARNING: possible irq lock inversion",
            "WARNING: possible recursive locking",
            "WARNING: suspicious RCU usage",
            "general protection fault, probably for",
            "general protection fault: 0000 [#",
            "kernel BUG at ",
        ];
        let bytes = text.as_bytes();
        let sure_at = |at: usize| {
            let rest = text.get(at..)?;
            SURE.iter().find(|sure| rest.starts_with(**sure))?;
            Some((at, Self::of_line(rest)?))
        };
        let from = bytes.get(1..)?;
        memchr::memchr3_iter(b'B', b'W', b'K', from)
            .chain(memchr::memchr3_iter(b'I', b'U', b'g', from))
            .chain(memchr::memchr_iter(b'k', from))
            .find_map(|at| sure_at(at + 1))
    }
}

/// Prefixes of `pr_fmt` and printk wrappers that stand before the beginning of a report.
const SUBSYSTEMS: [&str; 12] = [
    "rcu: ",
    "watchdog: ",
    "NMI watchdog: ",
    "lockdep: ",
    "kasan: ",
    "usercopy: ",
    "traps: ",
    "mce: ",
    "kernel: ",
    "page_alloc: ",
    "skbuff: ",
    "rcu-torture: ",
];

pub(crate) fn without_subsystem(mut text: &str) -> &str {
    while let Some(rest) = SUBSYSTEMS.iter().find_map(|name| text.strip_prefix(name)) {
        text = rest;
    }
    text
}

fn bug(text: &str) -> Option<Class> {
    if let Some(rest) = text.strip_prefix("BUG ") {
        return slab(rest);
    }
    let rest = text.strip_prefix("BUG: ")?;
    let of = [
        ("KASAN: ", Class::Kasan),
        ("KASan: ", Class::Kasan),
        ("KMSAN: ", Class::Kmsan),
        ("KCSAN: ", Class::Kcsan),
        ("KFENCE: ", Class::Kfence),
        ("unable to handle kernel NULL", Class::NullDereference),
        ("Unable to handle kernel NULL", Class::NullDereference),
        ("kernel NULL pointer dereference", Class::NullDereference),
        ("Kernel NULL pointer dereference", Class::NullDereference),
        ("unable to handle ", Class::PageFault),
        ("Unable to handle ", Class::PageFault),
        ("soft lockup", Class::SoftLockup),
        ("workqueue lockup", Class::WorkqueueLockup),
        ("scheduling while atomic", Class::Atomic),
        ("sleeping function called from", Class::Atomic),
        ("using ", Class::Atomic),
        ("Bad page ", Class::BadPage),
        ("memory leak", Class::Leak),
        ("stack guard page was hit", Class::StackOverflow),
        ("IRQ stack guard page was hit", Class::StackOverflow),
        ("TASK stack guard page was hit", Class::StackOverflow),
        ("spinlock ", Class::Lock),
        ("rwlock ", Class::Lock),
        ("rwlock-", Class::Lock),
        ("looking up invalid subclass", Class::Lock),
        ("Invalid wait context", Class::Lock),
        ("held lock freed", Class::Lock),
    ];
    let class = of
        .iter()
        .find(|(beginning, _)| rest.starts_with(beginning))
        .map(|(_, class)| *class);
    Some(class.unwrap_or(Class::Kernel))
}

/// `kmalloc-64 (Not tainted): Redzone overwritten`, and before 3.4 without the taint; KASAN's own use
/// of that line is no beginning.
fn slab(rest: &str) -> Option<Class> {
    let Some((_, what)) = rest.split_once("): ") else {
        let (cache, what) = rest.split_once(": ")?;
        let is_slab = !cache.contains(' ')
            && [
                "Redzone",
                "Poison",
                "Freechain",
                "Object",
                "Freepointer",
                "Wrong",
                "Left",
                "Alignment",
                "Padding",
            ]
            .iter()
            .any(|damage| what.starts_with(damage));
        return is_slab.then_some(Class::Slab);
    };
    let is_slab = rest.contains(" (Not tainted): ") || rest.contains(" (Tainted: ");
    (is_slab && !what.contains("kasan: bad access")).then_some(Class::Slab)
}

fn warning(text: &str) -> Option<Class> {
    if text.starts_with("Watchdog detected hard LOCKUP") {
        return Some(Class::HardLockup);
    }
    let rest = text.strip_prefix("WARNING: ")?;
    let of = [
        ("CPU: ", Class::Warning),
        ("at ", Class::Warning),
        ("kernel stack ", Class::Unwinder),
        ("stack recursion", Class::Unwinder),
        ("stack going in the wrong", Class::Unwinder),
        ("unwind stack type", Class::Unwinder),
        ("can't dereference registers", Class::Unwinder),
        ("can't access registers", Class::Unwinder),
        ("unrecognized unwind", Class::Unwinder),
    ];
    let class = of
        .iter()
        .find(|(beginning, _)| rest.starts_with(beginning))
        .map(|(_, class)| *class);
    class
        .or_else(|| lock_report(rest))
        .or_else(|| is_new_warning(rest).then_some(Class::Warning))
}

/// Since 6.18: `[condition] dir/file.c:12 at function+0x1/0x2, CPU#0: comm/pid`.
fn is_new_warning(rest: &str) -> bool {
    let Some((before, after)) = rest.split_once(" at ") else {
        return false;
    };
    let position = before.rsplit(' ').next().unwrap_or("");
    let is_position = position.rsplit_once(':').is_some_and(|(file, line)| {
        file.contains('.') && !line.is_empty() && line.bytes().all(|b| b.is_ascii_digit())
    });
    is_position && (after.contains("+0x") || after.contains("CPU#"))
}

/// The beginnings of lockdep, with `WARNING: ` before them or in brackets with `INFO: ` or `BUG: `.
fn lock_report(rest: &str) -> Option<Class> {
    let of = [
        ("possible circular locking dependency", Class::Deadlock),
        ("possible recursive locking", Class::Deadlock),
        ("possible irq lock inversion", Class::Deadlock),
        ("possible circular lock", Class::Deadlock),
        ("circular locking deadlock", Class::Deadlock),
        ("inconsistent lock state", Class::LockState),
        ("suspicious RCU usage", Class::RcuUsage),
        ("suspicious rcu_dereference_check() usage", Class::RcuUsage),
        ("bad unlock balance", Class::Lock),
        ("bad contention", Class::Lock),
        ("held lock freed", Class::Lock),
        ("lock held when returning", Class::Lock),
        ("lock held at task exit", Class::Lock),
        ("Nested lock was not taken", Class::Lock),
        ("nested lock was not taken", Class::Lock),
        ("Invalid wait context", Class::Lock),
    ];
    if let Some((_, class)) = of.iter().find(|(beginning, _)| rest.starts_with(beginning)) {
        return Some(*class);
    }
    // "SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected" and its relatives.
    let is_order = rest.contains("-safe -> ") && rest.contains("-unsafe lock order detected");
    if is_order {
        return Some(Class::Deadlock);
    }
    rest.contains(" still has locks held!")
        .then_some(Class::Lock)
}

fn bracketed(text: &str) -> Option<Class> {
    let inside = text.strip_prefix("[ ")?;
    let rest = inside
        .strip_prefix("INFO: ")
        .or_else(|| inside.strip_prefix("BUG: "))
        .or_else(|| inside.strip_prefix("WARNING: "))?;
    lock_report(rest)
}

fn info(text: &str) -> Option<Class> {
    if let Some(rest) = text.strip_prefix("Internal error: ") {
        // Since 6.6 the kernels of arm64 and riscv can trap instead of calling a handler.
        return Some(match rest {
            _ if rest.contains("BUG: 0") => Class::Bug,
            _ if rest.starts_with("UBSAN: ") => Class::Ubsan,
            _ => Class::Trap,
        });
    }
    if text.starts_with("Insufficient stack space to handle exception") {
        return Some(Class::StackOverflow);
    }
    let rest = text.strip_prefix("INFO: ")?;
    if rest.starts_with("task ") || rest.starts_with("lockdown: ") {
        let hung = rest.contains(" blocked for more than ")
            || rest.contains(" blocked in I/O wait for more than ")
            || rest.contains(" can't die for more");
        return hung.then_some(Class::HungTask);
    }
    if rest.starts_with("rcu") || rest.starts_with("RCU") {
        let stall = rest.contains("detected stall")
            || rest.contains("self-detected stall")
            || rest.contains("detected expedited stall")
            || (rest.contains("detected CPU") && rest.contains("stall"));
        return stall.then_some(Class::RcuStall);
    }
    if rest.starts_with("trying to register non-static key") {
        return Some(Class::Lock);
    }
    lock_report(rest)
}

fn unable(text: &str) -> Option<Class> {
    if text.starts_with("Unable to handle kernel ") {
        let null = text.contains("kernel NULL pointer");
        return Some(if null {
            Class::NullDereference
        } else {
            Class::PageFault
        });
    }
    let of = [
        ("UBSAN: ", Class::Ubsan),
        ("Unhandled fault: ", Class::PageFault),
        ("Unhandled prefetch abort: ", Class::PageFault),
        ("Unexpected kernel BRK exception", Class::Trap),
        ("Unexpected kernel single-step exception", Class::Trap),
        ("Unrecoverable exception ", Class::Trap),
        ("Unhandled 32-bit el1", Class::Trap),
        ("Unhandled 64-bit el1", Class::Trap),
        ("Unhandled kernel unaligned access", Class::PageFault),
    ];
    of.iter()
        .find(|(beginning, _)| text.starts_with(beginning))
        .map(|(_, class)| *class)
}

/// `Oops: 0000 [#1]`, and since 6.10 `Oops: general protection fault, ...: 0000 [#1]`.
fn oops(text: &str) -> Option<Class> {
    let of = [
        ("Out of memory: ", Class::OutOfMemory),
        ("Oops: general protection fault", Class::GeneralProtection),
        ("Oops: ", Class::Trap),
        ("Oops - BUG: ", Class::Bug),
        ("Oops - ", Class::Trap),
    ];
    if text.starts_with("Oops [#") {
        return Some(Class::Trap);
    }
    let class = of
        .iter()
        .find(|(beginning, _)| text.starts_with(beginning))
        .map(|(_, class)| *class)?;
    let is_die = text.contains("[#") || begins_with_code(text.strip_prefix("Oops: ").unwrap_or(""));
    (class == Class::OutOfMemory || is_die).then_some(class)
}

fn kernel(text: &str) -> Option<Class> {
    if let Some(why) = text.strip_prefix("Kernel panic - not syncing") {
        return Some(panic(why.trim_start_matches(':').trim_start()));
    }
    let of = [
        ("kernel BUG at ", Class::Bug),
        ("Kernel BUG at ", Class::Bug),
        ("Kernel BUG [#", Class::Bug),
        ("Kernel stack overflow", Class::StackOverflow),
        ("kernel stack overflow", Class::StackOverflow),
        ("kmemleak: unreferenced", Class::Leak),
    ];
    of.iter()
        .find(|(beginning, _)| text.starts_with(beginning))
        .map(|(_, class)| *class)
}

/// The class of a panic by its message.
fn panic(why: &str) -> Class {
    let of = [
        ("stack-protector: ", Class::StackOverflow),
        ("corrupted stack end", Class::StackOverflow),
        ("kernel stack overflow", Class::StackOverflow),
        ("VFS: Unable to mount root fs", Class::Boot),
        ("No working init found", Class::Boot),
        ("No init found", Class::Boot),
        ("Requested init ", Class::Boot),
        ("Hard LOCKUP", Class::HardLockup),
        ("Watchdog detected hard LOCKUP", Class::HardLockup),
        ("softlockup", Class::SoftLockup),
        ("RCU Stall", Class::RcuStall),
        ("Fatal machine check", Class::MachineCheck),
        ("Fatal Machine check", Class::MachineCheck),
        ("Uncorrected machine check", Class::MachineCheck),
        (
            "Timeout: Not all CPUs entered broadcast",
            Class::MachineCheck,
        ),
        ("Machine check", Class::MachineCheck),
        ("MCE: ", Class::MachineCheck),
        ("Fatal hardware error", Class::MachineCheck),
        ("NMI: ", Class::MachineCheck),
    ];
    of.iter()
        .find(|(beginning, _)| why.starts_with(beginning))
        .map_or(Class::Panic, |(_, class)| *class)
}

fn by_beginning(text: &str, first: u8) -> Option<Class> {
    if let Some((_, class)) = BEGINNINGS.iter().find(|(beginning, _)| {
        beginning.as_bytes().first() == Some(&first) && text.starts_with(beginning)
    }) {
        return Some(*class);
    }
    if let Some(class) = trap(text) {
        return Some(class);
    }
    contains(text, first)
}

const BEGINNINGS: [(&str, Class); 64] = [
    ("general protection fault: ", Class::GeneralProtection),
    (
        "general protection fault, probably",
        Class::GeneralProtection,
    ),
    ("general protection fault, maybe", Class::GeneralProtection),
    ("PANIC: double fault", Class::Trap),
    ("PANIC: early exception", Class::Trap),
    ("Bad mode in ", Class::Trap),
    ("SError Interrupt on CPU", Class::Trap),
    ("Data bus error, epc == ", Class::Trap),
    ("Instruction bus error, epc == ", Class::Trap),
    ("Kernel Fault: Code=", Class::PageFault),
    ("Kernel addr fault: Code=", Class::PageFault),
    ("Badness at ", Class::Warning),
    ("Slab corruption", Class::Slab),
    ("slab error in ", Class::Slab),
    ("kmem_cache_destroy ", Class::Slab),
    ("trusty: panic (", Class::Panic),
    ("BTRFS: error", Class::Filesystem),
    ("OCFS2: ERROR", Class::Filesystem),
    ("UBIFS error", Class::Filesystem),
    ("Machine check in kernel mode", Class::MachineCheck),
    ("Missing ENDBR: ", Class::Cfi),
    ("CFI failure ", Class::Cfi),
    ("list_add corruption", Class::ListCorruption),
    ("list_del corruption", Class::ListCorruption),
    ("list_add double add", Class::ListCorruption),
    ("refcount_t: ", Class::Refcount),
    ("skb_over_panic: ", Class::Kernel),
    ("skb_under_panic: ", Class::Kernel),
    ("Kernel memory exposure attempt", Class::Usercopy),
    ("kernel memory exposure attempt", Class::Usercopy),
    ("kernel memory overwrite attempt", Class::Usercopy),
    ("Alignment trap: not handling", Class::Trap),
    ("Kernel memory overwrite attempt", Class::Usercopy),
    ("rcu_sched kthread starved", Class::RcuStall),
    ("rcu_preempt kthread starved", Class::RcuStall),
    ("unreferenced object 0x", Class::Leak),
    ("unregister_netdevice: waiting for ", Class::NetDevice),
    ("VFS: Busy inodes after unmount", Class::Kernel),
    ("VFS: Cannot open root device", Class::Boot),
    ("Gave up waiting for root", Class::Boot),
    ("Memory cgroup out of memory: ", Class::OutOfMemory),
    ("HARDWARE ERROR", Class::MachineCheck),
    ("Uhhuh. NMI received for unknown", Class::Hardware),
    ("EDAC MC", Class::Hardware),
    ("Memory failure: ", Class::Hardware),
    ("MCE: ", Class::Hardware),
    ("EXT2-fs error", Class::Filesystem),
    ("EXT3-fs error", Class::Filesystem),
    ("EXT4-fs error", Class::Filesystem),
    ("EXT4-fs (", Class::Filesystem),
    ("Aborting journal on device", Class::Filesystem),
    ("BTRFS error", Class::Filesystem),
    ("BTRFS critical", Class::Filesystem),
    ("XFS (", Class::Filesystem),
    ("F2FS-fs (", Class::Filesystem),
    ("FAT-fs (", Class::Filesystem),
    ("gfs2: ", Class::Filesystem),
    ("REISERFS error", Class::Filesystem),
    ("Buffer I/O error on", Class::Block),
    ("I/O error, dev ", Class::Block),
    ("blk_update_request: ", Class::Block),
    ("print_req_error: ", Class::Block),
    ("end_request: ", Class::Block),
    ("critical medium error, dev ", Class::Block),
];

/// Lines of file systems and drivers that are about an error only if they say so.
pub(crate) fn is_error_of_its_kind(class: Class, text: &str) -> bool {
    let words: &[&str] = match class {
        Class::Filesystem => &[
            "error",
            "rror:",
            "orrupt",
            "critical",
            "fatal",
            "Shutting down",
            "shut down",
            "Aborting journal",
            "withdraw",
            "Internal error",
        ],
        Class::Block => &["error", "timeout"],
        Class::Hardware => &["CE ", "UE ", "memory", "Memory", "NMI", "Hardware Error"],
        _ => return true,
    };
    words.iter().any(|word| text.contains(word))
}

/// x86 names of traps, and other architectures' die messages: all carry `[#1]`.
fn trap(text: &str) -> Option<Class> {
    let is_cut_x86 = X86_TRAPS
        .iter()
        .find_map(|name| text.strip_prefix(name))
        .is_some_and(|rest| begins_with_code(rest.trim_start_matches(": ")));
    if is_cut_x86 {
        return Some(Class::Trap);
    }
    let (before, after) = text.split_once("[#")?;
    let is_counter = after.bytes().next().is_some_and(|b| b.is_ascii_digit());
    // What an older kernel wrote without a line feed stands before the name of the trap.
    let is_glued = before.contains("general protection fault: ");
    if !is_counter || before.len() > TRAP_MAX || is_glued {
        return None;
    }
    // x86: "divide error: 0000 [#1]"; s390: "specification exception: 0006 ilc:2 [#1]"; mips:
    // "Kernel bug detected[#1]:".
    let name = before.trim_end();
    let dies = name.strip_suffix("): Oops");
    if dies.is_some_and(|who| !who.contains(": ")) {
        // sparc: "comm(12): Oops [#1]".
        return Some(Class::Trap);
    }
    let has_code = name
        .rsplit_once(": ")
        .is_some_and(|(_, code)| code.len() == 4 && code.bytes().all(|b| b.is_ascii_hexdigit()));
    let is_named = [
        "Oops",
        "Kernel ",
        "Reserved instruction",
        "Unhandled ",
        "Break instruction",
    ]
    .iter()
    .any(|start| name.starts_with(start));
    if !has_code && !is_named && !name.contains(" ilc:") {
        return None;
    }
    let is_bug = name.starts_with("Kernel BUG") || name.starts_with("Kernel bug");
    Some(if is_bug { Class::Bug } else { Class::Trap })
}

/// arch/x86/kernel/traps.c; their names are enough where the line was cut before `[#1]`.
const X86_TRAPS: [&str; 8] = [
    "divide error",
    "divide_error",
    "invalid opcode",
    "stack segment",
    "double fault",
    "bounds",
    "int3",
    "alignment check",
];

/// Whether `text` begins with the four digits of an error code and nothing longer.
fn begins_with_code(text: &str) -> bool {
    let word = text.split_whitespace().next().unwrap_or("");
    word.len() == 4 && word.bytes().all(|b| b.is_ascii_hexdigit())
}

/// `die()` is called with short texts.
const TRAP_MAX: usize = 120;

/// Beginnings that are not at the very beginning.
fn contains(text: &str, first: u8) -> Option<Class> {
    if first == b'[' || text.contains("[Hardware Error]") {
        return hardware(text);
    }
    if text.contains(" invoked oom-killer: ") {
        return Some(Class::OutOfMemory);
    }
    if first == b'C' {
        if text.starts_with("CPU") && text.contains("Watchdog detected hard LOCKUP") {
            return Some(Class::HardLockup);
        }
        if text.starts_with("CPU ") && text.contains(" detected hard LOCKUP") {
            return Some(Class::HardLockup);
        }
        if text.starts_with("CPU ") && text.contains(": Machine Check Exception: ") {
            return Some(Class::MachineCheck);
        }
    }
    if first == b'C' && text.starts_with("CPU ") && text.contains(" Unable to handle kernel ") {
        // mips and loongarch: "CPU 0 Unable to handle kernel paging request at virtual address ...".
        return Some(Class::PageFault);
    }
    if first == b'c' && text.starts_with("cpu 0x") && text.contains(": Vector: ") {
        // The first line of ppc64's xmon.
        return Some(Class::Trap);
    }
    if first == b'm' && text.starts_with("mm/") && BAD_ENTRIES.iter().any(|bad| text.contains(bad))
    {
        return Some(Class::BadPage);
    }
    let is_tasks = text.starts_with("rcu_tasks") && text.contains(" detected stalls");
    is_tasks.then_some(Class::RcuStall)
}

/// mm/pgtable-generic.c: an entry of a page table that cannot be.
const BAD_ENTRIES: [&str; 4] = [": bad pgd ", ": bad p4d ", ": bad pud ", ": bad pmd "];

/// `mce: [Hardware Error]: CPU 0: Machine Check Exception: 5 Bank 4: ...` has stopped the machine;
/// `Machine Check: 0 Bank ...` and the lines of APEI have not.
fn hardware(text: &str) -> Option<Class> {
    let (_, rest) = text.split_once("[Hardware Error]")?;
    Some(if rest.contains("Machine Check Exception: ") {
        Class::MachineCheck
    } else {
        Class::Hardware
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_of_all_architectures() {
        for (text, class) in [
            ("BUG: KASAN: use-after-free in f+0x1/0x2", Class::Kasan),
            (
                "rcu: INFO: rcu_preempt self-detected stall on CPU",
                Class::RcuStall,
            ),
            (
                "INFO: rcu_sched_state detected stalls on CPUs/tasks: {",
                Class::RcuStall,
            ),
            (
                "watchdog: BUG: soft lockup - CPU#1 stuck for 134s! [a:4]",
                Class::SoftLockup,
            ),
            (
                "NMI watchdog: Watchdog detected hard LOCKUP on cpu 3",
                Class::HardLockup,
            ),
            ("Oops: 0002 [#1] SMP", Class::Trap),
            (
                "Oops: general protection fault, probably for x: 0000 [#1]",
                Class::GeneralProtection,
            ),
            ("divide error: 0000 [#1] SMP", Class::Trap),
            ("divide error: 0000", Class::Trap),
            ("Oops: 0002", Class::Trap),
            ("invalid opcode: 0000 [#1] SMP", Class::Trap),
            ("specification exception: 0006 ilc:2 [#1] SMP", Class::Trap),
            ("Oops: Kernel access of bad area, sig: 11 [#1]", Class::Trap),
            (
                "Internal error: Oops: 96000004 [#1] PREEMPT SMP",
                Class::Trap,
            ),
            (
                "Unable to handle kernel paging request at virtual address 0",
                Class::PageFault,
            ),
            (
                "WARNING: CPU: 0 PID: 1 at a/b.c:1 f+0x1/0x2",
                Class::Warning,
            ),
            ("WARNING: at a/b.c:1 f+0x1/0x2()", Class::Warning),
            (
                "WARNING: [x > 1] a/b.c:1 at f+0x1/0x2, CPU#0: a/1",
                Class::Warning,
            ),
            ("WARNING: a/b.c:1 at f+0x1/0x2, CPU#0: a/1", Class::Warning),
            (
                "[ INFO: possible circular locking dependency detected ]",
                Class::Deadlock,
            ),
            ("[ BUG: Invalid wait context ]", Class::Lock),
            (
                "mce: [Hardware Error]: CPU 0: Machine Check Exception: 5 Bank 4: b2",
                Class::MachineCheck,
            ),
            (
                "BUG kmalloc-64 (Tainted: G    B): Redzone overwritten",
                Class::Slab,
            ),
            ("Kernel panic - not syncing: Fatal exception", Class::Panic),
            (
                "Kernel panic - not syncing: VFS: Unable to mount root fs on x",
                Class::Boot,
            ),
        ] {
            assert_eq!(Class::of_line(text), Some(class), "{text}");
        }
    }

    #[test]
    fn beginnings_of_rarer_architectures_and_older_kernels() {
        for (text, class) in [
            (
                "INFO: task a:4 blocked in I/O wait for more than 120 seconds.",
                Class::HungTask,
            ),
            (
                "CPU 1 Unable to handle kernel paging request at virtual address 8",
                Class::PageFault,
            ),
            ("cpu 0x2: Vector: 300 (Data Access) at [c0]", Class::Trap),
            ("frobd(812): Oops [#1]", Class::Trap),
            ("BUG kmalloc-64: Redzone overwritten", Class::Slab),
            ("mm/pgtable-generic.c:33: bad pmd f(1)", Class::BadPage),
            (
                "[ BUG: circular locking deadlock detected! ]",
                Class::Deadlock,
            ),
        ] {
            assert_eq!(Class::of_line(text), Some(class), "{text}");
        }
    }

    #[test]
    fn what_only_looks_like_a_report_is_none() {
        for text in [
            "WARNING: the mand mount option is being deprecated and",
            "WARNING: workqueue cpumask: online intersect > possible intersect",
            "Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on, data leaks",
            "BUG UNIX (Not tainted): kasan: bad access detected",
            "INFO: lockdep is turned off.",
            "INFO: rcu_preempt Stall ended before state dump start",
            "sh[1]: segfault at 0 ip 0 sp 0 error 4 in sh[0+1]",
            "traps: sh[1] general protection fault ip:0 sp:0 error:0 in sh[0+1]",
            "usb 1-1: config [#1] is odd",
            "BUG report: see the manual",
            "User process fault: interruption code 0010 ilc:3 in frobd[1+2]",
            "trusty: panic notifier - trusty version 1",
            "softdog: initialized. soft_noboot=0 soft_margin=60 sec soft_panic=0",
            "",
        ] {
            assert_eq!(Class::of_line(text), None, "{text}");
        }
    }

    #[test]
    fn a_beginning_behind_other_text_is_seen_only_if_sure() {
        assert_eq!(
            Class::within_line("abcBUG: KASAN: x in f"),
            Some((3, Class::Kasan))
        );
        assert_eq!(
            Class::within_line("x INFO: task a:4 blocked for more than 120 seconds."),
            Some((2, Class::HungTask))
        );
        assert_eq!(Class::within_line("abc BUG: maybe"), None);
        assert_eq!(Class::within_line("see INFO: task list"), None);
    }
}
