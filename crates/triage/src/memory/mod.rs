//! The memory half of triage: what a vmcore says without any debug package.
//!
//! From VMCOREINFO alone come the page tables (`image`) and the kernel's log (`log`). Its symbol
//! table (`kallsyms`) leads to its types (`btf`), with which everything else is read: modules,
//! ORC tables (`orc`), tasks and the backtraces of all (`unwind`), facts and memory (`facts`). No
//! offset of a kernel structure is written down here; constants of the kernel that BTF does not
//! have are named where they are used.
//!
//! Total: any vmcore gives a report in bounded time and memory, with what could not be read and
//! why. Every loop has a limit, and all reads together have one.

mod btf;
mod facts;
mod image;
mod kallsyms;
mod kernel;
mod list;
mod log;
mod modules;
mod orc;
mod tasks;
mod unwind;

use dump::{Machine, Vmcoreinfo};
use serde::Serialize;

pub use facts::{MemoryUse, System};
pub use image::{Source, Unread};
pub use log::Log;
pub use modules::Module;
pub use tasks::{CpuState, Task};
pub use unwind::{Backtrace, Frame};

use image::Image;
use kernel::Kernel;

/// Reasons that are kept of why something could not be read.
const UNREAD_MAX: usize = 200;

/// What a vmcore says.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Examination {
    /// The machine.
    pub system: System,
    /// The kernel's log; `None` when it could not be read.
    #[serde(skip)]
    pub log: Option<Log>,
    /// What each CPU did.
    pub cpus: Vec<CpuState>,
    /// All tasks but the idle ones.
    pub tasks: Vec<Task>,
    /// Loaded modules.
    pub modules: Vec<Module>,
    /// How memory was used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryUse>,
    /// What is wrong besides the crash, one line each.
    pub problems: Vec<String>,
    /// What could not be read, and why.
    pub unread: Vec<String>,
}

/// Reads only the kernel's log.
///
/// # Errors
/// VMCOREINFO or the memory does not have it; the text says what is missing.
pub fn log(source: &mut dyn Source, machine: &Machine) -> Result<Log, Unread> {
    let info = Vmcoreinfo::new(&machine.vmcoreinfo);
    log::read(&mut Image::new(source, info)?, info)
}

/// Reads all that is known how to read.
pub fn examine(source: &mut dyn Source, machine: &Machine) -> Examination {
    let info = Vmcoreinfo::new(&machine.vmcoreinfo);
    let mut found = Examination::default();
    let mut image = match Image::new(source, info) {
        Ok(image) => image,
        Err(error) => {
            found.unread.push(format!("memory: {error}"));
            found.system = facts::outside(machine, None);
            return found;
        }
    };
    match log::read(&mut image, info) {
        Ok(log) => found.log = Some(log),
        Err(error) => found.unread.push(format!("log: {error}")),
    }
    found.system = facts::outside(machine, found.log.as_ref());
    match Kernel::new(image, info) {
        Ok(kernel) => inside(kernel, machine, &mut found),
        Err(error) => found
            .unread
            .push(format!("tasks, backtraces, modules, facts: {error}")),
    }
    found.problems = problems(&found);
    found.unread.truncate(UNREAD_MAX);
    found
}

/// Everything that needs symbols and types.
fn inside(mut kernel: Kernel<'_>, machine: &Machine, found: &mut Examination) {
    facts::inside(&mut kernel, &mut found.system);
    found.cpus = tasks::cpus(&mut kernel, &machine.cpus);
    let tasks = tasks::tasks(&mut kernel, &found.cpus);
    found.tasks = kernel.kept("tasks", tasks).unwrap_or_default();
    let memory = facts::memory(&mut kernel);
    found.memory = kernel.kept("memory use", memory);
    if !kernel.btf.has("task_struct", "held_locks") {
        let why = "held locks: this kernel does not record them (no lockdep)";
        kernel.unread.push(why.to_owned());
    }
    found.modules = kernel.modules;
    found.unread.append(&mut kernel.unread);
}

/// What is wrong besides the crash.
fn problems(found: &Examination) -> Vec<String> {
    let silent = found.cpus.iter().filter(|cpu| cpu.registers.is_none());
    let silent = silent.map(|cpu| format!("CPU {} did not answer when it was stopped", cpu.cpu));
    let blocked = found.tasks.iter().filter(|task| task.state == 'D');
    let blocked = blocked.map(|task| {
        let time = task
            .idle_s
            .map(|seconds| format!(" for {seconds} s"))
            .unwrap_or_default();
        let place = task
            .backtrace
            .frames
            .iter()
            .filter_map(|frame| frame.function.as_deref())
            .find(|name| !is_scheduler(name))
            .unwrap_or("an unknown place");
        format!(
            "task {} ({}) is blocked{time} in {place}",
            task.name, task.pid
        )
    });
    silent.chain(blocked).collect()
}

/// What every sleeping task has on top of its stack.
fn is_scheduler(name: &str) -> bool {
    [
        "schedule",
        "__schedule",
        "schedule_timeout",
        "io_schedule",
        "__switch_to",
    ]
    .contains(&name)
}
