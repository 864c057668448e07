//! Titles as the kernel community writes them: `KASAN: slab-use-after-free Read in f`, `WARNING in
//! f`, `INFO: task hung in f`.

use crate::anatomy::Anatomy;
use crate::class::{Class, without_subsystem};
use crate::frame::Frame;
use crate::guilt::system_call;

/// All that is known of a report of which only the end came.
const LOST: &str = "kernel report without its beginning";

/// Titles are one short line.
const TEXT_MAX: usize = 120;

/// The culprit's name as it is shown: a system call by its plain name, whatever the architecture.
pub(crate) fn shown(frame: &Frame) -> String {
    let function = frame.function();
    let is_entry = !function.starts_with("__sys_") && !function.starts_with("sys_");
    match system_call(function) {
        Some(name) if is_entry => name,
        _ => function.to_owned(),
    }
}

pub(crate) fn of(class: Class, anatomy: &Anatomy, culprit: Option<&Frame>) -> String {
    let kind = kind(class, anatomy);
    // The message of a panic says more than who called it.
    let Some(culprit) = culprit.filter(|_| class != Class::Panic) else {
        return kind;
    };
    let function = shown(culprit);
    match &anatomy.second {
        Some(second) => format!("{kind} in {function} / {}", second.function()),
        None => format!("{kind} in {function}"),
    }
}

/// The title before ` in `.
fn kind(class: Class, anatomy: &Anatomy) -> String {
    let topic = topic(class, anatomy);
    match class {
        Class::Kasan => {
            let access = anatomy.access.unwrap_or("");
            let access = if topic.ends_with("free") && !topic.contains("use-after") {
                ""
            } else {
                access
            };
            format!("KASAN: {topic} {access}").trim_end().to_owned()
        }
        Class::Kmsan => format!("KMSAN: {topic}"),
        Class::Kcsan => format!("KCSAN: {topic}"),
        Class::Kfence => format!("KFENCE: {topic}"),
        Class::Ubsan => format!("UBSAN: {topic}"),
        Class::NullDereference => {
            "BUG: unable to handle kernel NULL pointer dereference".to_owned()
        }
        Class::PageFault => match topic.as_str() {
            "" => "BUG: unable to handle kernel paging request".to_owned(),
            topic => topic.to_owned(),
        },
        Class::GeneralProtection => "general protection fault".to_owned(),
        Class::Bug | Class::ListCorruption | Class::Usercopy => bug(class, &topic),
        Class::Warning | Class::Refcount | Class::Cfi | Class::Lock | Class::RcuUsage => {
            warning(class, &topic)
        }
        Class::Deadlock => "possible deadlock".to_owned(),
        Class::LockState => "inconsistent lock state".to_owned(),
        Class::RcuStall => "INFO: rcu detected stall".to_owned(),
        Class::SoftLockup => "BUG: soft lockup".to_owned(),
        Class::HardLockup => "BUG: hard lockup".to_owned(),
        Class::WorkqueueLockup => "BUG: workqueue lockup".to_owned(),
        Class::HungTask if topic.is_empty() => "INFO: task hung".to_owned(),
        Class::HungTask => format!("INFO: task {topic}"),
        Class::StackOverflow if topic.starts_with("stack guard") => format!("BUG: {topic}"),
        Class::Panic | Class::Boot | Class::StackOverflow => format!("kernel panic: {topic}"),
        Class::Trap
        | Class::Atomic
        | Class::Slab
        | Class::BadPage
        | Class::Leak
        | Class::NetDevice
        | Class::Kernel
        | Class::Unwinder
        | Class::MachineCheck
        | Class::Hardware
        | Class::OutOfMemory
        | Class::Filesystem
        | Class::Block => topic,
    }
}

fn bug(class: Class, topic: &str) -> String {
    match (class, topic) {
        (Class::ListCorruption, "WARNING") => "WARNING: corrupted list".to_owned(),
        (Class::ListCorruption, _) => "BUG: corrupted list".to_owned(),
        (Class::Usercopy, _) => "BUG: bad usercopy".to_owned(),
        (_, topic) => format!("kernel BUG{topic}"),
    }
}

fn warning(class: Class, topic: &str) -> String {
    match class {
        Class::Refcount => "WARNING: refcount bug".to_owned(),
        Class::RcuUsage => "WARNING: suspicious RCU usage".to_owned(),
        Class::Cfi => "CFI failure".to_owned(),
        Class::Lock => topic.to_owned(),
        _ if topic.is_empty() => "WARNING".to_owned(),
        _ => format!("WARNING: {topic}"),
    }
}

/// What a report is about beside its class, with everything that varies taken out. Part of the
/// signature, so it must not depend on a build.
pub(crate) fn topic(class: Class, anatomy: &Anatomy) -> String {
    let head = without_subsystem(anatomy.head.trim_start());
    match class {
        Class::Kasan | Class::Kmsan | Class::Kcsan | Class::Kfence => sanitizer(head),
        Class::Ubsan => ubsan(head),
        Class::PageFault => page_fault(head),
        Class::Trap => trap(head),
        Class::Warning | Class::Bug => machinery_bug(anatomy),
        Class::Lock => lock(head),
        Class::ListCorruption if list_warned(anatomy) => "WARNING".to_owned(),
        Class::Atomic => atomic(head),
        Class::Panic | Class::Boot | Class::StackOverflow => panic(head, anatomy),
        Class::Unwinder => unwinder(head),
        Class::Leak => "memory leak".to_owned(),
        Class::NetDevice => "unregister_netdevice: waiting for DEV to become free".to_owned(),
        Class::Slab => slab(head),
        Class::HungTask if head.contains(" can't die ") => "can't die".to_owned(),
        Class::MachineCheck => machine_check(head),
        Class::OutOfMemory => "Out of memory".to_owned(),
        Class::Kernel if is_lost(anatomy) => LOST.to_owned(),
        Class::Kernel => kernel(head),
        Class::BadPage => bad_page(head),
        Class::Hardware => match head.split_once("[Hardware Error]: ") {
            Some((_, what)) => format!("Hardware Error: {}", masked(what)),
            None => masked(head),
        },
        Class::Filesystem | Class::Block => masked(head),
        _ => String::new(),
    }
}

/// Whether only the end of a report came.
pub(crate) fn is_lost(anatomy: &Anatomy) -> bool {
    anatomy.head.trim_start().starts_with("---[ end trace")
}

/// Whether the text alone identifies a report that has no culprit.
pub(crate) fn identifies(class: Class, anatomy: &Anatomy) -> bool {
    match class {
        Class::Panic => {
            let topic = topic(class, anatomy);
            !(topic.is_empty()
                || topic.starts_with("Fatal exception")
                || topic.contains("panic_on_warn"))
        }
        Class::Kernel => !is_lost(anatomy),
        Class::BadPage
        | Class::WorkqueueLockup
        | Class::Slab
        | Class::Unwinder
        | Class::NetDevice
        | Class::Boot
        | Class::MachineCheck
        | Class::Hardware
        | Class::OutOfMemory
        | Class::Filesystem
        | Class::Block => true,
        _ => false,
    }
}

/// `use-after-free` of `BUG: KASAN: use-after-free in f+0x1/0x2`.
fn sanitizer(head: &str) -> String {
    let rest = head.splitn(3, ": ").nth(2).unwrap_or("");
    let rest = rest.split(" in ").next().unwrap_or("");
    let rest = rest.split(" on address").next().unwrap_or("");
    let rest = rest.split(" access").next().unwrap_or("");
    let rest = rest.trim();
    // 4.0 to 4.3 wrote words.
    match rest {
        "use after free" => "use-after-free".to_owned(),
        "out of bounds" => "out-of-bounds".to_owned(),
        other => masked(other),
    }
}

fn ubsan(head: &str) -> String {
    let head = head.strip_prefix("Internal error: ").unwrap_or(head);
    let rest = head.strip_prefix("UBSAN: ").unwrap_or("");
    let what = rest.split(" in ").next().unwrap_or("");
    // Kernels that trap write "UBSAN: array index out of bounds at f+0x1/0x2".
    let what = what.split(" at ").next().unwrap_or(what);
    match what.split(':').next().unwrap_or(what) {
        "Undefined behaviour" => "undefined-behaviour".to_owned(),
        other => masked(other),
    }
}

fn page_fault(head: &str) -> String {
    if head.starts_with("Unhandled fault") || head.starts_with("Unhandled prefetch") {
        return "Unhandled fault".to_owned();
    }
    if head.contains("access to user memory") {
        return "BUG: unable to handle kernel access to user memory".to_owned();
    }
    String::new()
}

/// What is wrong with an object of a slab, without the name of its cache.
fn slab(head: &str) -> String {
    let what = if head.starts_with("Slab corruption") {
        "corruption"
    } else if head.starts_with("kmem_cache_destroy") {
        "cache still has objects"
    } else if let Some((_, what)) = head.rsplit_once("): ").filter(|_| head.starts_with("BUG ")) {
        what
    } else {
        head.rsplit(": ").next().unwrap_or(head)
    };
    format!("BUG: slab: {}", masked(what))
}

/// The kernel's own inconsistencies without what names this boot's objects.
fn kernel(head: &str) -> String {
    if head.contains("still in use") {
        return "BUG: Dentry still in use".to_owned();
    }
    let known = [
        "BUG: Bad rss-counter state",
        "BUG: workqueue leaked atomic, lock or RCU",
        "BUG: workqueue leaked lock or atomic",
        "BUG: non-zero pgtables_bytes on freeing mm",
        "BUG: non-zero nr_ptes on freeing mm",
        "BUG: non-zero nr_pmds on freeing mm",
        "VFS: Busy inodes after unmount",
    ];
    known
        .iter()
        .find(|known| head.starts_with(**known))
        .map_or_else(|| masked(head), |known| (*known).to_owned())
}

/// `BUG: Bad page state` of `BUG: Bad page state in process frobd  pfn:08000`.
fn bad_page(head: &str) -> String {
    if let Some((_, entry)) = head.split_once(": bad ") {
        let entry = entry.split(' ').next().unwrap_or("");
        return format!("bad {entry}");
    }
    let what = head.split(" in process").next().unwrap_or(head);
    masked(what.split(": page").next().unwrap_or(what))
}

/// `divide error` of `divide error: 0000 [#1] SMP`.
fn trap(head: &str) -> String {
    if head.starts_with("Internal error") {
        return "Internal error".to_owned();
    }
    if head.contains("double fault") {
        return "PANIC: double fault".to_owned();
    }
    if head.starts_with("Bad mode in ") {
        return "kernel panic: bad mode".to_owned();
    }
    if head.starts_with("Unhandled ") && head.contains(" exception on CPU") {
        return "kernel panic: Unhandled exception".to_owned();
    }
    if head.starts_with("SError Interrupt") {
        return "SError Interrupt".to_owned();
    }
    if let Some((_, vector)) = head.split_once(": Vector: ") {
        let (_, name) = vector.split_once('(').unwrap_or(("", vector));
        return name.split(')').next().unwrap_or(name).to_owned();
    }
    if head.starts_with("Unrecoverable exception") {
        return "Unrecoverable exception".to_owned();
    }
    if head.contains("): Oops") {
        return "Oops".to_owned();
    }
    let rest = head
        .strip_prefix("Oops: ")
        .or_else(|| head.strip_prefix("Oops - "))
        .unwrap_or(head);
    let name = rest.split(['[', ':', ',']).next().unwrap_or("").trim();
    match name {
        "divide_error" => "divide error".to_owned(),
        "int3" => "int3".to_owned(),
        other => masked(other),
    }
}

/// What the helper that warned is for, so that its callers are told apart by more than the name.
fn machinery_bug(anatomy: &Anatomy) -> String {
    let notes = || std::iter::once(&anatomy.head).chain(&anatomy.notes);
    let has = |text: &str| notes().any(|note| note.contains(text));
    let named = anatomy.named.as_ref().map_or("", Frame::function);
    let topic = if has("lib/debugobjects.c") {
        "ODEBUG bug"
    } else if has("kernel/locking/") && !has("rtmutex") {
        "locking bug"
    } else if has("fs/proc/generic.c") {
        "proc registration bug"
    } else if has("lib/kobject.c") {
        "kobject bug"
    } else if named.starts_with("__vmalloc_node_range") {
        "zero-size vmalloc"
    } else if named == "kmalloc_slab" || named == "kmalloc_array" {
        "kmalloc bug"
    } else {
        ""
    };
    topic.to_owned()
}

/// Whether a corrupted list was told by a warning, not by a `BUG()`.
fn list_warned(anatomy: &Anatomy) -> bool {
    let mut notes = std::iter::once(&anatomy.head).chain(&anatomy.notes);
    notes.any(|note| Class::of_line(note) == Some(Class::Warning))
}

fn lock(head: &str) -> String {
    let inside = head.trim_matches(['[', ']', ' ']);
    let known = [
        ("bad unlock balance", "WARNING: bad unlock balance"),
        ("held lock freed", "WARNING: held lock freed"),
        ("a lock still held there", "WARNING: held lock freed"),
        (
            "lock held when returning",
            "WARNING: lock held when returning to user space",
        ),
        ("still has locks held", "WARNING: still has locks held"),
        (
            "ested lock was not taken",
            "WARNING: nested lock was not taken",
        ),
        ("bad contention", "WARNING: bad contention"),
        ("Invalid wait context", "WARNING: locking bug"),
        ("non-static key", "INFO: trying to register non-static key"),
        ("spinlock bad magic", "BUG: spinlock bad magic"),
        ("spinlock lockup", "BUG: spinlock lockup suspected"),
        ("spinlock recursion", "BUG: spinlock recursion"),
        (
            "spinlock already unlocked",
            "BUG: spinlock already unlocked",
        ),
        ("spinlock wrong", "BUG: spinlock wrong owner"),
        ("rwlock", "BUG: rwlock misuse"),
        ("invalid subclass", "BUG: looking up invalid subclass"),
    ];
    known
        .iter()
        .find(|(words, _)| inside.contains(words))
        .map_or_else(|| masked(inside), |(_, title)| (*title).to_owned())
}

fn atomic(head: &str) -> String {
    if head.contains("scheduling while atomic") {
        "BUG: scheduling while atomic".to_owned()
    } else if head.contains("sleeping function") {
        "BUG: sleeping function called from invalid context".to_owned()
    } else {
        // "BUG: using __this_cpu_add() in preemptible [00000000] code: sh/1"
        let what = head.split(" in preemptible").next().unwrap_or(head);
        format!("{} in preemptible code", masked(what))
    }
}

fn panic(head: &str, anatomy: &Anatomy) -> String {
    if head.contains("stack guard page") {
        return "stack guard page was hit".to_owned();
    }
    if head.contains("ernel stack overflow") {
        return "stack overflow".to_owned();
    }
    if head.contains("Insufficient stack space") {
        return "stack overflow".to_owned();
    }
    let why = anatomy.panic.as_deref().unwrap_or("");
    if why.starts_with("stack-protector") {
        return "stack is corrupted".to_owned();
    }
    if why.starts_with("corrupted stack end") {
        return "corrupted stack end".to_owned();
    }
    if why.is_empty() {
        return masked(head);
    }
    // "Attempted to kill init! exitcode=0x00000009"
    let why = why.split(" exitcode").next().unwrap_or(why);
    masked(why)
}

fn unwinder(head: &str) -> String {
    // "WARNING: kernel stack regs at 0 in sh:1 has bad 'bp' value 0"
    let what = head.split(" at ").next().unwrap_or(head);
    if what.contains("kernel stack") {
        format!("{} has bad value", masked(what))
    } else {
        masked(what)
    }
}

/// Bank and the architectural bits of the status: what is broken, not where and how often.
fn machine_check(head: &str) -> String {
    if let Some(why) = head.strip_prefix("Kernel panic - not syncing: ") {
        return format!("kernel panic: {}", masked(why));
    }
    let Some((_, rest)) = head.split_once(" Bank ") else {
        return masked(head);
    };
    let (bank, status) = rest.split_once(": ").unwrap_or((rest, ""));
    let status = status.split_whitespace().next().unwrap_or("");
    let code = u64::from_str_radix(status, 16).map_or(0, |status| status & 0xffff);
    let bank: String = bank.chars().take_while(char::is_ascii_digit).collect();
    format!("Machine Check Exception: bank {bank} code {code:#06x}")
}

/// `text` with numbers, addresses and names of devices and tasks taken out.
pub(crate) fn masked(text: &str) -> String {
    let mut out = String::new();
    for word in text.split_whitespace() {
        let core = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
        let digits = core.bytes().filter(u8::is_ascii_digit).count();
        let is_number =
            core.starts_with("0x") || (digits > 0 && core.bytes().all(|b| b.is_ascii_hexdigit()));
        // "loop0:", "sh/123", "idx:3": a name with a number. "EXT4-fs" is a name as a whole.
        let is_name =
            digits > 0 && core.bytes().any(|b| b.is_ascii_alphabetic()) && !core.ends_with("-fs");
        if out.len() > TEXT_MAX {
            break;
        }
        if !out.is_empty() {
            out.push(' ');
        }
        if is_number {
            out.push('N');
        } else if is_name {
            out.extend(word.chars().filter(|c| !c.is_ascii_digit()));
        } else {
            out.push_str(word);
        }
    }
    out
}
