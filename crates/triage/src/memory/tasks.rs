//! All tasks: the list of processes, and of each its threads.

use dump::Gregs;
use serde::Serialize;

use super::btf::Field;
use super::image::{Unread, text};
use super::kernel::Kernel;
use super::list;
use super::unwind::{Backtrace, Registers, backtrace};

/// Tasks that are listed; the rest is told to be more.
const TASKS_MAX: usize = 65_536;
/// Bytes of a task's name that are looked at; kernels have 16.
const NAME_BYTES_MAX: u64 = 64;

// Bits of a task's state. They are macros, so BTF does not have them; their values have not moved
// since 4.14.
const INTERRUPTIBLE: u64 = 0x1;
const UNINTERRUPTIBLE: u64 = 0x2;
const STOPPED: u64 = 0x4;
const TRACED: u64 = 0x8;
const EXIT_DEAD: u64 = 0x10;
const EXIT_ZOMBIE: u64 = 0x20;
const PARKED: u64 = 0x40;
const DEAD: u64 = 0x80;
const NO_LOAD: u64 = 0x400;
/// `PF_KTHREAD`, among the flags of a task.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// A task.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Task {
    /// The number of the thread.
    pub pid: u64,
    /// The number of its process.
    pub tgid: u64,
    /// Its name.
    pub name: String,
    /// The letter of its state, as `ps` has it: R, S, D, T, t, X, Z, P, I.
    pub state: char,
    /// The CPU it is on, or was on last.
    pub cpu: u32,
    /// Whether it was running when the machine stopped.
    pub running: bool,
    /// Whether it has no user space.
    pub kernel: bool,
    /// Seconds since it last ran, if it does not run and the kernel keeps count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_s: Option<u64>,
    /// Its stack.
    pub backtrace: Backtrace,
    /// Where the kernel keeps it.
    pub address: u64,
}

/// What a CPU was doing.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CpuState {
    /// Its number.
    pub cpu: u32,
    /// Whether the crash began here; `false` if the vmcore does not say.
    pub crashed: bool,
    /// The number of its task; 0 is the idle task.
    pub pid: u64,
    /// The name of its task.
    pub task: String,
    /// Its registers in the order of `dump::Gregs`; absent when it did not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registers: Option<Gregs>,
    /// Its stack.
    pub backtrace: Backtrace,
    #[serde(skip)]
    address: u64,
}

/// Where the members of a task lie.
struct Places {
    pid: Field,
    tgid: Field,
    name: Field,
    state: Field,
    exit_state: Field,
    flags: Field,
    cpu: Field,
    stack: Field,
    /// When it last came to run, in the nanoseconds of the scheduler's clock.
    arrival: Option<Field>,
}

impl Places {
    fn new(kernel: &Kernel<'_>) -> Result<Self, Unread> {
        let field = |path: &str| kernel.btf.field("task_struct", path);
        Ok(Self {
            pid: field("pid")?,
            tgid: field("tgid")?,
            name: field("comm")?,
            state: field("__state")?,
            exit_state: field("exit_state")?,
            flags: field("flags")?,
            cpu: field("thread_info.cpu").or_else(|_| field("cpu"))?,
            stack: field("thread.sp")?,
            arrival: field("sched_info.last_arrival").ok(),
        })
    }
}

/// What the online CPUs did, with the registers that the vmcore has.
pub(crate) fn cpus(kernel: &mut Kernel<'_>, noted: &[dump::Cpu]) -> Vec<CpuState> {
    let crashed = crashed_cpu(kernel, noted);
    let mut states = Vec::new();
    for cpu in noted {
        let mut state = CpuState {
            cpu: cpu.number,
            crashed: crashed == Some(cpu.number),
            registers: cpu.registers,
            ..CpuState::default()
        };
        let current = current(kernel, &mut state);
        kernel.kept(&format!("task of CPU {}", cpu.number), current);
        match &cpu.registers {
            Some(registers) => {
                state.backtrace = backtrace(kernel, Registers::of_cpu(registers));
            }
            None => state.backtrace.broken = Some("the CPU did not answer".to_owned()),
        }
        states.push(state);
    }
    states
}

fn crashed_cpu(kernel: &mut Kernel<'_>, noted: &[dump::Cpu]) -> Option<u32> {
    if let Some(cpu) = noted.iter().find(|cpu| cpu.crashed) {
        return Some(cpu.number);
    }
    // Both are -1 until a CPU panics.
    ["panic_cpu", "crashing_cpu"].iter().find_map(|name| {
        let at = kernel.symbols.address(name).ok()?;
        u32::try_from(kernel.image.i32(at).ok()?).ok()
    })
}

fn current(kernel: &mut Kernel<'_>, state: &mut CpuState) -> Result<(), Unread> {
    let queue = kernel.percpu("runqueues", state.cpu)?;
    state.address = kernel.member(queue, "rq", "curr")?;
    state.pid = kernel.member(state.address, "task_struct", "pid")?;
    let name = kernel.btf.field("task_struct", "comm")?;
    state.task = task_name(kernel, state.address, name)?;
    Ok(())
}

fn task_name(kernel: &mut Kernel<'_>, at: u64, name: Field) -> Result<String, Unread> {
    let bytes = kernel
        .image
        .bytes(at.wrapping_add(name.offset), name.size.min(NAME_BYTES_MAX))?;
    Ok(text(&bytes))
}

/// All tasks but the idle ones.
pub(crate) fn tasks(kernel: &mut Kernel<'_>, cpus: &[CpuState]) -> Result<Vec<Task>, Unread> {
    let places = Places::new(kernel)?;
    let clock = clock(kernel, cpus);
    let mut tasks = Vec::new();
    for at in addresses(kernel)? {
        match task(kernel, &places, at, cpus, clock) {
            Ok(task) => tasks.push(task),
            Err(error) => kernel.note(&format!("task at {at:#x}"), &error),
        }
    }
    Ok(tasks)
}

/// The scheduler's latest time, in nanoseconds.
fn clock(kernel: &mut Kernel<'_>, cpus: &[CpuState]) -> u64 {
    let times = cpus.iter().filter_map(|cpu| {
        let queue = kernel.percpu("runqueues", cpu.cpu).ok()?;
        kernel.member(queue, "rq", "clock").ok()
    });
    times.max().unwrap_or(0)
}

/// Where all tasks lie: processes, and of each its threads.
fn addresses(kernel: &mut Kernel<'_>) -> Result<Vec<u64>, Unread> {
    let link = kernel.btf.offset("task_struct", "tasks")?;
    let signal = kernel.btf.offset("task_struct", "signal")?;
    let threads = kernel.btf.offset("signal_struct", "thread_head")?;
    let node = kernel.btf.offset("task_struct", "thread_node")?;
    let first = kernel.symbols.address("init_task")?;
    let (leaders, ended) = list::walk(&mut kernel.image, first.wrapping_add(link), TASKS_MAX);
    if let Some(error) = ended {
        kernel.note("list of processes", &error);
    }
    let mut found = Vec::new();
    for leader in leaders {
        let leader = leader.wrapping_sub(link);
        let head = kernel.image.u64(leader.wrapping_add(signal));
        let (nodes, ended) = match head {
            Ok(head) => {
                let room = TASKS_MAX.saturating_sub(found.len());
                list::walk(&mut kernel.image, head.wrapping_add(threads), room)
            }
            Err(error) => (vec![leader.wrapping_add(node)], Some(error)),
        };
        found.extend(nodes.iter().map(|place| place.wrapping_sub(node)));
        if let Some(error) = ended {
            kernel.note(&format!("threads of the process at {leader:#x}"), &error);
        }
        if found.len() >= TASKS_MAX || kernel.unread.len() >= super::UNREAD_MAX {
            break;
        }
    }
    Ok(found)
}

fn task(
    kernel: &mut Kernel<'_>,
    places: &Places,
    at: u64,
    cpus: &[CpuState],
    clock: u64,
) -> Result<Task, Unread> {
    let state = kernel.value(at, places.state)? | kernel.value(at, places.exit_state)?;
    let on_cpu = cpus.iter().find(|cpu| cpu.address == at);
    let mut task = Task {
        pid: kernel.value(at, places.pid)?,
        tgid: kernel.value(at, places.tgid)?,
        name: task_name(kernel, at, places.name)?,
        state: letter(state),
        cpu: u32::try_from(kernel.value(at, places.cpu)?).unwrap_or(u32::MAX),
        running: on_cpu.is_some(),
        kernel: kernel.value(at, places.flags)? & KERNEL_THREAD != 0,
        address: at,
        ..Task::default()
    };
    if let Some(cpu) = on_cpu {
        task.backtrace = cpu.backtrace.clone();
        return Ok(task);
    }
    task.idle_s = match places.arrival {
        Some(arrival) => idle_seconds(clock, kernel.value(at, arrival)?),
        None => None,
    };
    let stack = kernel.value(at, places.stack)?;
    task.backtrace = match Registers::of_sleeper(kernel, stack) {
        // The stack of a task that is dead may be gone already.
        Err(_) if state & (EXIT_DEAD | EXIT_ZOMBIE | DEAD) != 0 => Backtrace::default(),
        Ok(registers) => backtrace(kernel, registers),
        Err(error) => Backtrace {
            broken: Some(error.to_string()),
            ..Backtrace::default()
        },
    };
    Ok(task)
}

fn idle_seconds(clock: u64, arrival: u64) -> Option<u64> {
    (arrival != 0 && clock != 0).then(|| clock.saturating_sub(arrival) / 1_000_000_000)
}

/// The letter of a state, as the kernel itself prints it.
fn letter(state: u64) -> char {
    let letters = [
        (EXIT_DEAD, 'X'),
        (EXIT_ZOMBIE, 'Z'),
        (DEAD, 'X'),
        (PARKED, 'P'),
        (TRACED, 't'),
        (STOPPED, 'T'),
        (UNINTERRUPTIBLE, 'D'),
        (INTERRUPTIBLE, 'S'),
    ];
    if state & (UNINTERRUPTIBLE | NO_LOAD) == UNINTERRUPTIBLE | NO_LOAD {
        return 'I';
    }
    letters
        .iter()
        .find(|(bit, _)| state & bit != 0)
        .map_or('R', |&(_, letter)| letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_letters_of_ps() {
        for (state, expected) in [
            (0, 'R'),
            (1, 'S'),
            (2, 'D'),
            (0x102, 'D'),
            (0x402, 'I'),
            (0x20, 'Z'),
            (0x40, 'P'),
            (0x90, 'X'),
            (0x2001, 'S'),
        ] {
            assert_eq!(letter(state), expected, "{state:#x}");
        }
    }
}
