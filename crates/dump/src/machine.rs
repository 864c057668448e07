//! What a vmcore says of a machine besides its pages.

use crate::page::{Pfn, RamRange};

/// Registers in a [`Gregs`].
pub const GREGS: usize = 27;

/// General registers in the kernel's `elf_gregset_t` order (`struct user_regs_struct`): r15 r14 r13
/// r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds
/// es fs gs.
pub type Gregs = [u64; GREGS];

/// One CPU that was online when the host crashed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cpu {
    /// The kernel's number of the CPU.
    pub number: u32,
    /// Process id of the task it ran; 0 is the idle task.
    pub pid: u32,
    /// Its registers, or `None` when the CPU did not answer.
    pub registers: Option<Gregs>,
    /// Whether the crash began here.
    pub crashed: bool,
}

/// What a vmcore says besides pages.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Machine {
    /// RAM, sorted by page number, not overlapping.
    pub ram: Vec<RamRange>,
    /// The text of the kernel's VMCOREINFO note as the kernel has it.
    pub vmcoreinfo: Vec<u8>,
    /// All CPUs that were online, sorted by number. Readers give the registers to the online CPUs
    /// by order, so an online CPU that did not answer must be listed too, and an offline one must
    /// not.
    pub cpus: Vec<Cpu>,
    /// The kernel's `nodename`; at most 64 bytes are kept, like in the two below.
    pub node: String,
    /// The kernel's `release`, as in `6.1.0-56-amd64`.
    pub release: String,
    /// The kernel's `version`, as in `#1 SMP PREEMPT_DYNAMIC Debian ...`.
    pub version: String,
    /// When the host crashed, in seconds since 1970 UTC.
    pub crash_time_s: u64,
    /// Virtual address at which the kernel maps physical address 0 (`page_offset_base`). KASLR
    /// moves it and VMCOREINFO does not have it; only ELF needs it. 0 when unknown.
    pub page_offset: u64,
    /// Where the kernel image (text, data, bss) lies in RAM, for the ELF segment that maps it at
    /// its link address. `None` leaves that segment out; readers then walk the page tables.
    pub kernel_image: Option<RamRange>,
    /// Kinds of pages that were left out on purpose: makedumpfile's dump level, 0 to 31. Only
    /// kdump-compressed files have it.
    pub filter: u8,
}

impl Machine {
    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.ram
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.pages))
    }

    /// The page number after the last page of RAM.
    pub fn end(&self) -> Pfn {
        Pfn(self.ram.iter().map(|range| range.end()).max().unwrap_or(0))
    }
}
