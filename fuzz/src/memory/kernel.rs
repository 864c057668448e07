//! A kernel in miniature: 64 KiB of memory with page tables, a log, symbols, types, a module, ORC
//! tables, two CPUs and three tasks, and the VMCOREINFO that leads to them.

use dump::{Cpu, GREGS, Machine, PAGE_SIZE, Pfn, RamRange};

use super::types::Types;

/// Where the kernel's image is linked; physical memory lies there from its begin on.
pub(super) const LINKED: u64 = 0xffff_ffff_8000_0000;
const MEMORY_BYTES: usize = 64 << 10;
/// The page tables of four levels; the last entry is of 2 MiB.
const TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];
const TABLE_PLACES: [u64; 3] = [511, 510, 0];
const LARGE_PAGE: u64 = 1 << 7 | 1;
/// What comes behind the page tables.
const DATA: u64 = 0x4000;
/// Code, of which there is none: only its addresses count.
const CODE: u64 = LINKED + 0x10_0000;
const MODULE_CODE: u64 = LINKED + 0x18_0000;
const FUNCTION_BYTES: u64 = 0x100;
const STACK_BYTES: u64 = 0x200;

/// How `kallsyms` has the addresses: in three ways, by the kernel's age.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Form {
    AbsolutePercpu,
    Relative,
    Place,
}

/// The kernel.
#[derive(Clone)]
pub(super) struct Kernel {
    pub(super) memory: Vec<u8>,
    pub(super) machine: Machine,
}

/// What is being laid out.
struct Builder {
    memory: Vec<u8>,
    types: Types,
    end: u64,
    symbols: Vec<(char, &'static str, u64)>,
    info: String,
}

impl Kernel {
    pub(super) fn new(form: Form) -> Self {
        let mut builder = Builder {
            memory: vec![0; MEMORY_BYTES],
            types: Types::new(),
            end: LINKED + DATA,
            symbols: Vec::new(),
            info: String::new(),
        };
        builder.page_tables();
        builder.log();
        builder.code();
        builder.module();
        builder.facts();
        let machine_cpus = builder.cpus_and_tasks();
        let section = builder.types.section();
        let begin = builder.put(&section);
        builder.symbols.push(('r', "__start_BTF", begin));
        let end = begin + section.len() as u64;
        builder.symbols.push(('r', "__stop_BTF", end));
        builder.kallsyms(form);
        let pages = MEMORY_BYTES / PAGE_SIZE;
        Self {
            machine: Machine {
                ram: vec![RamRange {
                    first: Pfn(0),
                    pages: pages as u64,
                }],
                vmcoreinfo: builder.info.into_bytes(),
                cpus: machine_cpus,
                ..Machine::default()
            },
            memory: builder.memory,
        }
    }
}

impl Builder {
    fn write(&mut self, address: u64, bytes: &[u8]) {
        let at = usize::try_from(address - LINKED).expect("an address of this kernel");
        self.memory[at..][..bytes.len()].copy_from_slice(bytes);
    }

    fn word(&mut self, address: u64, value: u64) {
        self.write(address, &value.to_le_bytes());
    }

    fn half(&mut self, address: u64, value: u32) {
        self.write(address, &value.to_le_bytes());
    }

    /// Room for so many bytes, zeroed.
    fn room(&mut self, bytes: u64) -> u64 {
        let at = self.end.next_multiple_of(16);
        self.end = at + bytes;
        at
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.room(bytes.len() as u64);
        self.write(at, bytes);
        at
    }

    /// Room for a structure.
    fn structure(&mut self, name: &str) -> u64 {
        self.room(self.types.bytes(name))
    }

    /// Writes a member of the structure at `at`.
    fn set(&mut self, at: u64, member: &str, value: u64) {
        self.word(at + self.types.offset(member), value);
    }

    /// A ring of list heads.
    fn link(&mut self, places: &[u64]) {
        for (at, place) in places.iter().enumerate() {
            let next = places[(at + 1) % places.len()];
            self.word(*place, next);
            self.word(next + 8, *place);
        }
    }

    fn symbol(&mut self, name: &'static str, address: u64) {
        self.symbols.push(('D', name, address));
    }

    fn says(&mut self, line: &str) {
        self.info.push_str(line);
        self.info.push('\n');
    }

    fn page_tables(&mut self) {
        self.says("OSRELEASE=6.12.0-miniature");
        self.says("PAGESIZE=4096");
        self.says("NUMBER(phys_base)=0");
        self.says("NUMBER(pgtable_l5_enabled)=0");
        let top = LINKED + TABLES[0];
        self.says(&format!("SYMBOL(init_top_pgt)={top:x}"));
        let targets = [TABLES[1] | 1, TABLES[2] | 1, LARGE_PAGE];
        for ((table, place), target) in TABLES.iter().zip(TABLE_PLACES).zip(targets) {
            self.word(LINKED + table + place * 8, target);
        }
    }

    /// A log of three records in a ring for four.
    fn log(&mut self) {
        const LINES: [&str; 3] = [
            "Linux version 6.12.0-miniature",
            "BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "Kernel panic - not syncing: Fatal exception",
        ];
        const FINAL: u64 = 2 << 62;
        let text = self.room(256);
        let descriptors = self.room(4 * 24);
        let infos = self.room(4 * 32);
        let mut begin = 0;
        for ((id, slot), line) in (4..).zip(0..).zip(LINES) {
            let bytes = (8 + line.len() as u64).next_multiple_of(8);
            self.word(text + begin, id);
            self.write(text + begin + 8, line.as_bytes());
            let descriptor = descriptors + slot * 24;
            self.word(descriptor, id | FINAL);
            self.word(descriptor + 8, begin);
            self.word(descriptor + 16, begin + bytes);
            self.word(infos + slot * 32 + 8, slot * 1_000_000_000);
            let length = u32::try_from(line.len()).expect("lines are short");
            self.half(infos + slot * 32 + 16, length);
            begin += bytes;
        }
        let ring = self.room(128);
        self.half(ring, 2);
        for (at, value) in [(8, descriptors), (16, infos), (24, 6), (32, 4), (72, text)] {
            self.word(ring + at, value);
        }
        self.half(ring + 64, 8);
        let pointer = self.room(8);
        self.word(pointer, ring);
        self.says(&format!("SYMBOL(prb)={pointer:x}"));
        for line in [
            "OFFSET(printk_ringbuffer.desc_ring)=0",
            "OFFSET(printk_ringbuffer.text_data_ring)=64",
            "OFFSET(atomic_long_t.counter)=0",
            "OFFSET(prb_desc_ring.count_bits)=0",
            "OFFSET(prb_desc_ring.descs)=8",
            "OFFSET(prb_desc_ring.infos)=16",
            "OFFSET(prb_desc_ring.head_id)=24",
            "OFFSET(prb_desc_ring.tail_id)=32",
            "OFFSET(prb_data_ring.size_bits)=0",
            "OFFSET(prb_data_ring.data)=8",
            "SIZE(prb_desc)=24",
            "SIZE(printk_info)=32",
            "OFFSET(prb_desc.state_var)=0",
            "OFFSET(prb_desc.text_blk_lpos)=8",
            "OFFSET(prb_data_blk_lpos.begin)=0",
            "OFFSET(prb_data_blk_lpos.next)=8",
            "OFFSET(printk_info.ts_nsec)=8",
            "OFFSET(printk_info.text_len)=16",
        ] {
            self.says(line);
        }
    }

    /// Functions and, for each, an entry of ORC: one that calls, one that was interrupted, and the
    /// first of every stack.
    fn code(&mut self) {
        const NAMES: [&str; 4] = [
            "_stext",
            "__schedule",
            "asm_exc_page_fault",
            "ret_from_fork",
        ];
        let begins = (CODE..).step_by(usize::try_from(FUNCTION_BYTES).expect("it is small"));
        let begins: Vec<u64> = begins.take(NAMES.len()).collect();
        for (name, begin) in NAMES.into_iter().zip(&begins) {
            self.symbols.push(('T', name, *begin));
        }
        self.symbols
            .push(('T', "_etext", CODE + FUNCTION_BYTES * 4));
        let (ip, end, entries) = self.orc(&begins);
        self.symbol("__start_orc_unwind_ip", ip);
        self.symbol("__stop_orc_unwind_ip", end);
        self.symbol("__start_orc_unwind", entries);
        self.says(&format!("SYMBOL(_stext)={CODE:x}"));
    }

    /// ORC tables for functions: where the addresses begin and end, and the entries.
    fn orc(&mut self, functions: &[u64]) -> (u64, u64, u64) {
        // A call: the caller's frame is 16 bytes up, where the frame pointer is, too. Registers: the
        // stack pointer is at them. The end.
        const KINDS: [[u8; 6]; 4] = [
            [16, 0, 0xf0, 0xff, 0x15, 2],
            [16, 0, 0xf0, 0xff, 0x15, 2],
            [0, 0, 0, 0, 0x05, 3],
            [0, 0, 0, 0, 0, 1],
        ];
        let ip = self.room(4 * functions.len() as u64);
        let entries = self.room(6 * functions.len() as u64);
        for ((place, at), function) in (ip..).step_by(4).zip(0_usize..).zip(functions) {
            let distance = function.wrapping_sub(place).to_le_bytes();
            self.write(place, &distance[..4]);
            self.write(entries + 6 * at as u64, &KINDS[at % KINDS.len()]);
        }
        (ip, ip + 4 * functions.len() as u64, entries)
    }

    fn module(&mut self) {
        let at = self.structure("module");
        let names = self.put(b"\0mini_open\0");
        let mut symbol = [0; 24];
        symbol[0] = 1;
        symbol[6] = 1;
        symbol[8..16].copy_from_slice(&MODULE_CODE.to_le_bytes());
        let symbols = self.put(&symbol);
        let table = self.structure("mod_kallsyms");
        for (member, value) in [
            ("mod_kallsyms.symtab", symbols),
            ("mod_kallsyms.num_symtab", 1),
            ("mod_kallsyms.strtab", names),
        ] {
            self.set(table, member, value);
        }
        let (ip, _, entries) = self.orc(&[MODULE_CODE]);
        let name = at + self.types.offset("module.name");
        self.write(name, b"mini");
        let memory = at + self.types.offset("module.mem");
        self.set(memory, "module_memory.base", MODULE_CODE);
        self.set(memory, "module_memory.size", FUNCTION_BYTES);
        self.set(at, "module.kallsyms", table);
        let arch = at + self.types.offset("module.arch");
        for (member, value) in [
            ("mod_arch_specific.num_orcs", 1),
            ("mod_arch_specific.orc_unwind_ip", ip),
            ("mod_arch_specific.orc_unwind", entries),
        ] {
            self.set(arch, member, value);
        }
        let head = self.structure("list_head");
        self.symbol("modules", head);
        let link = at + self.types.offset("module.list");
        self.link(&[head, link]);
    }

    fn facts(&mut self) {
        let names = self.structure("uts_namespace");
        for (member, text) in [
            ("new_utsname.nodename", "mini"),
            ("new_utsname.release", "6.12.0-miniature"),
            ("new_utsname.version", "#1 SMP"),
        ] {
            let place = names + self.types.offset(member);
            self.write(place, text.as_bytes());
        }
        self.symbol("init_uts_ns", names);
        let line = self.put(b"ro quiet\0");
        let pointer = self.room(8);
        self.word(pointer, line);
        self.symbol("saved_command_line", pointer);
        for name in ["tainted_mask", "avenrun", "vm_node_stat", "vm_zone_stat"] {
            let place = self.room(64);
            self.symbol(name, place);
        }
        for name in ["_totalram_pages", "total_swap_pages", "nr_swap_pages"] {
            let place = self.room(8);
            self.word(place, 16);
            self.symbol(name, place);
        }
        for name in ["__cpu_online_mask", "__cpu_possible_mask"] {
            let place = self.room(8);
            self.word(place, 3);
            self.symbol(name, place);
        }
    }

    /// Two CPUs, the first of which crashed in the module; its task has a thread that sleeps.
    fn cpus_and_tasks(&mut self) -> Vec<Cpu> {
        let init = self.task(0, "swapper/0");
        let crasher = self.task(100, "crasher");
        let sleeper = self.task(101, "sleeper");
        let signal = self.structure("signal_struct");
        let threads = signal + self.types.offset("signal_struct.thread_head");
        let node = self.types.offset("task_struct.thread_node");
        self.link(&[threads, crasher + node, sleeper + node]);
        for task in [crasher, sleeper] {
            self.set(task, "task_struct.signal", signal);
        }
        self.set(sleeper, "task_struct.__state", 2);
        let scheduling = sleeper + self.types.offset("task_struct.sched_info");
        self.set(scheduling, "sched_info.last_arrival", 2_000_000_000);
        let link = self.types.offset("task_struct.tasks");
        self.link(&[init + link, crasher + link]);
        self.symbol("init_task", init);
        let offsets = self.room(16);
        self.symbol("__per_cpu_offset", offsets);
        let queue = self.structure("rq");
        self.symbol("runqueues", queue);
        let other = self.structure("rq");
        self.word(offsets + 8, other - queue);
        for (queue, task) in [(queue, crasher), (other, init)] {
            self.set(queue, "rq.curr", task);
            self.set(queue, "rq.clock", 9_000_000_000);
        }
        // In the module, called from the handler of a page fault that interrupted its caller.
        let stack = self.room(STACK_BYTES);
        let fault = stack + 16;
        self.word(stack + 8, CODE + 2 * FUNCTION_BYTES + 8);
        let above = fault + self.types.bytes("pt_regs");
        for (member, value) in [
            ("pt_regs.ip", MODULE_CODE + 4),
            ("pt_regs.cs", 0x10),
            ("pt_regs.sp", above),
        ] {
            self.set(fault, member, value);
        }
        self.word(above + 8, CODE + 3 * FUNCTION_BYTES + 8);
        vec![
            cpu(0, 100, MODULE_CODE + 8, stack),
            cpu(1, 0, CODE + 3 * FUNCTION_BYTES + 4, stack),
        ]
    }

    /// A task that sleeps in the scheduler.
    fn task(&mut self, pid: u64, name: &str) -> u64 {
        let task = self.structure("task_struct");
        self.set(task, "task_struct.pid", pid);
        self.set(task, "task_struct.tgid", pid.min(100));
        let comm = task + self.types.offset("task_struct.comm");
        self.write(comm, name.as_bytes());
        let stack = self.room(STACK_BYTES);
        let thread = task + self.types.offset("task_struct.thread");
        self.word(thread, stack);
        self.set(
            stack,
            "inactive_task_frame.ret_addr",
            CODE + FUNCTION_BYTES + 8,
        );
        let behind = stack + self.types.bytes("inactive_task_frame");
        self.word(behind + 8, CODE + 3 * FUNCTION_BYTES + 8);
        task
    }

    /// Names are packed with the tokens that are single letters.
    fn kallsyms(&mut self, form: Form) {
        let mut symbols = std::mem::take(&mut self.symbols);
        symbols.sort_by_key(|&(_, _, address)| address);
        let mut names = Vec::new();
        for (kind, name, _) in &symbols {
            names.extend(u8::try_from(name.len() + 1).ok());
            names.extend(u8::try_from(*kind).ok());
            names.extend_from_slice(name.as_bytes());
        }
        let names = self.put(&names);
        let tokens: Vec<u8> = (0..=u8::MAX).flat_map(|letter| [letter, 0]).collect();
        let tokens = self.put(&tokens);
        let index: Vec<u8> = (0..256_u16).flat_map(|at| (at * 2).to_le_bytes()).collect();
        let index = self.put(&index);
        let offsets = self.room(4 * symbols.len() as u64);
        for (place, (_, _, address)) in (offsets..).step_by(4).zip(&symbols) {
            let offset = match form {
                Form::AbsolutePercpu => (LINKED - 1).wrapping_sub(*address),
                Form::Relative => *address - LINKED,
                Form::Place => address.wrapping_sub(place),
            };
            self.write(place, &offset.to_le_bytes()[..4]);
        }
        let count = self.room(8);
        self.word(count, symbols.len() as u64);
        for (name, address) in [
            ("num_syms", count),
            ("names", names),
            ("token_table", tokens),
            ("token_index", index),
            ("offsets", offsets),
        ] {
            self.says(&format!("SYMBOL(kallsyms_{name})={address:x}"));
        }
        if form != Form::Place {
            let base = self.room(8);
            self.word(base, LINKED);
            self.says(&format!("SYMBOL(kallsyms_relative_base)={base:x}"));
        }
    }
}

fn cpu(number: u32, pid: u32, ip: u64, sp: u64) -> Cpu {
    let mut registers = [0; GREGS];
    (registers[16], registers[17], registers[19]) = (ip, 0x10, sp);
    Cpu {
        number,
        pid,
        registers: Some(registers),
        crashed: number == 0,
    }
}
