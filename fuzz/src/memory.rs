//! The memory half of triage: a kernel in miniature, altered in every way, gives a report in
//! bounded time and memory.

mod kernel;
mod types;

use std::sync::LazyLock;

use dump::{DumpError, Machine, PAGE_SIZE, PageState, Pfn};
use triage::memory::{Examination, Source, examine, log};

use crate::byte;
use kernel::{Form, Kernel, LINKED};

/// Reads of the source for one report. A page that cannot be had is not kept, so it may be asked for
/// again; this is what `triage` allows of work, divided by what it takes for one read.
const READS_MAX: usize = 1 << 20;
const TASKS_MAX: usize = 65_536;
const FRAMES_MAX: usize = 256;
const MODULES_MAX: usize = 4096;
const UNREAD_MAX: usize = 200;
/// All text of a log; a ring of text has half of it at most.
const LOG_BYTES_MAX: usize = 256 << 20;

static KERNELS: LazyLock<[Kernel; 3]> =
    LazyLock::new(|| [Form::AbsolutePercpu, Form::Relative, Form::Place].map(Kernel::new));

/// The kernel's memory, some of which may be gone.
struct Memory {
    bytes: Vec<u8>,
    gone: Option<(u64, PageState)>,
    reads: usize,
}

impl Source for Memory {
    fn page(&mut self, pfn: Pfn, page: &mut [u8; PAGE_SIZE]) -> Result<PageState, DumpError> {
        self.reads += 1;
        assert!(self.reads <= READS_MAX, "it reads on and on");
        if let Some((gone, state)) = self.gone
            && gone == pfn.0
        {
            return Ok(state);
        }
        let pages = self.bytes.as_chunks::<PAGE_SIZE>().0;
        let Some(found) = usize::try_from(pfn.0).ok().and_then(|at| pages.get(at)) else {
            return Ok(PageState::NotRam);
        };
        *page = *found;
        Ok(PageState::Data)
    }
}

/// Alterations, each of a kind, a place and what the kind needs; then everything is read.
pub(crate) fn memory(mut bytes: &[u8]) {
    let kernel = &KERNELS[usize::from(byte(&mut bytes)) % KERNELS.len()];
    let mut machine = kernel.machine.clone();
    let mut memory = Memory {
        bytes: kernel.memory.clone(),
        gone: None,
        reads: 0,
    };
    while !bytes.is_empty() {
        alter(&mut bytes, &mut memory, &mut machine);
    }
    let found = examine(&mut memory, &machine);
    check(&found, &machine);
    memory.reads = 0;
    if let Ok(log) = log(&mut memory, &machine) {
        assert_eq!(found.log, Some(log));
    }
}

fn alter(input: &mut &[u8], memory: &mut Memory, machine: &mut Machine) {
    let kind = byte(input) % 8;
    let words = memory.bytes.as_chunks_mut::<8>().0;
    let place = number(input);
    let at = place % words.len();
    match kind {
        0 => words[at] = [0xff; 8],
        // A pointer, most often to what is there.
        1 => words[at] = (LINKED + number(input) as u64).to_le_bytes(),
        // An entry of a page table: some page, mapped here, too.
        2 => words[at] = ((number(input) as u64 % 32) << 12 | 1).to_le_bytes(),
        3 => words[at] = words[number(input) % words.len()],
        4 => words[at][usize::from(byte(input) % 8)] = byte(input),
        5 => words[at] = (1_u64 << (byte(input) % 64)).to_le_bytes(),
        6 => {
            let end = machine.vmcoreinfo.len();
            machine.vmcoreinfo[place % end] = byte(input);
        }
        _ => {
            const STATES: [PageState; 3] = [
                PageState::Excluded,
                PageState::Unreadable,
                PageState::Missing,
            ];
            let state = STATES[usize::from(byte(input)) % STATES.len()];
            memory.gone = Some((place as u64 % 32, state));
        }
    }
}

/// A number of two bytes.
fn number(input: &mut &[u8]) -> usize {
    usize::from(byte(input)) | usize::from(byte(input)) << 8
}

/// What holds for any memory.
fn check(found: &Examination, machine: &Machine) {
    assert!(found.tasks.len() <= TASKS_MAX, "{}", found.tasks.len());
    assert!(found.modules.len() <= MODULES_MAX);
    assert!(found.unread.len() <= UNREAD_MAX);
    assert!(found.cpus.len() <= machine.cpus.len());
    let stacks = found.tasks.iter().map(|task| &task.backtrace);
    for stack in stacks.chain(found.cpus.iter().map(|cpu| &cpu.backtrace)) {
        assert!(stack.frames.len() <= FRAMES_MAX);
    }
    let log = found.log.as_ref().map_or(0, |log| log.text.len());
    assert!(log <= LOG_BYTES_MAX, "a log of {log} bytes");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_miniature_is_read_whole() {
        for kernel in KERNELS.iter() {
            let mut memory = Memory {
                bytes: kernel.memory.clone(),
                gone: None,
                reads: 0,
            };
            let found = examine(&mut memory, &kernel.machine);
            let why = "held locks: this kernel does not record them (no lockdep)";
            assert_eq!(found.unread, [why]);
            assert_eq!(found.system.node, "mini");
            assert_eq!(found.system.panic.as_deref(), Some("Fatal exception"));
            assert_eq!(found.log.as_ref().map(|log| log.records), Some(3));
            let names: Vec<&str> = found.tasks.iter().map(|task| task.name.as_str()).collect();
            assert_eq!(names, ["crasher", "sleeper"]);
            let trace = |frames: &[triage::memory::Frame]| -> Vec<String> {
                frames.iter().map(ToString::to_string).collect()
            };
            assert_eq!(
                trace(&found.cpus[0].backtrace.frames),
                [
                    "mini_open+0x8 [mini]",
                    "asm_exc_page_fault+0x8",
                    "mini_open+0x4 [mini]",
                    "ret_from_fork+0x8"
                ]
            );
            assert_eq!(
                trace(&found.tasks[1].backtrace.frames),
                ["__schedule+0x8", "ret_from_fork+0x8"]
            );
            assert_eq!(
                found.problems,
                ["task sleeper (101) is blocked for 7 s in ret_from_fork"]
            );
        }
    }
}
