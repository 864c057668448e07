//! The types of a kernel in miniature, and their BTF.

use std::collections::HashMap;

/// Each structure the memory half reads: its name, then its members as `NAME:TYPE`, each of which
/// begins at a multiple of eight bytes. `TYPE*N` is an array, `TYPE@BIT/WIDTH` a bit field.
const STRUCTURES: &str = "
list_head next:u64 prev:u64
thread_info flags:u64 cpu:u32
sched_info run_delay:u64 last_arrival:u64
thread_struct sp:u64
task_struct thread_info:thread_info __state:u32 flags:u32 sched_info:sched_info tasks:list_head \
    exit_state:u32 pid:u32 tgid:u32 thread_node:list_head comm:u8*16 signal:u64 thread:thread_struct
signal_struct nr_threads:u32 thread_head:list_head
inactive_task_frame r15:u64 r14:u64 r13:u64 r12:u64 bx:u64 bp:u64 ret_addr:u64
pt_regs r15:u64 r14:u64 r13:u64 r12:u64 bp:u64 bx:u64 r11:u64 r10:u64 r9:u64 r8:u64 ax:u64 cx:u64 \
    dx:u64 si:u64 di:u64 orig_ax:u64 ip:u64 cs:u64 flags:u64 sp:u64 ss:u64
rq nr_running:u32 clock:u64 curr:u64
cpumask bits:u64
module_memory base:u64 size:u32
mod_kallsyms symtab:u64 num_symtab:u32 strtab:u64
mod_arch_specific num_orcs:u32 orc_unwind_ip:u64 orc_unwind:u64
module state:u32 list:list_head name:u8*56 taints:u64 mem:module_memory*7 kallsyms:u64 \
    arch:mod_arch_specific
new_utsname sysname:u8*64 nodename:u8*64 release:u8*64 version:u8*64
uts_namespace name:new_utsname
";
/// An entry of ORC as it is since 6.4: its members share six bytes.
const ORC_ENTRY: &str = "orc_entry sp_offset:u16@0/0 bp_offset:u16@16/0 sp_reg:u8@32/4 \
    bp_reg:u8@36/4 type:u8@40/3 signal:u8@43/1";
const ORC_ENTRY_BYTES: u64 = 6;
/// Counters by the place of each in its enumeration.
const ENUMERATIONS: [(&str, &[&str]); 2] = [
    (
        "node_stat_item",
        &[
            "NR_INACTIVE_ANON",
            "NR_ACTIVE_ANON",
            "NR_INACTIVE_FILE",
            "NR_ACTIVE_FILE",
            "NR_SHMEM",
            "NR_SLAB_RECLAIMABLE_B",
            "NR_SLAB_UNRECLAIMABLE_B",
            "NR_PAGETABLE",
            "NR_KERNEL_STACK_KB",
        ],
    ),
    ("zone_stat_item", &["NR_FREE_PAGES"]),
];

const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const ENUM: u32 = 6;
const BIT_FIELDS: u32 = 1 << 31;
const MAGIC: u32 = 0x0001_eb9f;
const HEADER_BYTES: u32 = 24;

/// A type that others may have members of.
#[derive(Clone, Default)]
struct Type {
    id: u32,
    bytes: u64,
    /// Members by name: where each begins.
    members: HashMap<String, u64>,
}

/// The types: where their members lie, and the section that says so.
#[derive(Default)]
pub(super) struct Types {
    types: HashMap<String, Type>,
    records: Vec<u8>,
    names: Vec<u8>,
    last_id: u32,
}

impl Types {
    pub(super) fn new() -> Self {
        let mut types = Self::default();
        types.names.push(0);
        for (name, bytes) in [("u8", 1), ("u16", 2), ("u32", 4), ("u64", 8)] {
            types.record(name, INT << 24, bytes);
            types.words(&[bytes * 8]);
            types.add(name, u64::from(bytes), HashMap::new());
        }
        for line in STRUCTURES.trim().lines() {
            types.structure(line, None);
        }
        types.structure(ORC_ENTRY, Some(ORC_ENTRY_BYTES));
        for (name, values) in ENUMERATIONS {
            let count = u32::try_from(values.len()).expect("values are few");
            types.record(name, ENUM << 24 | count, 4);
            for (value, name) in (0..).zip(values) {
                let at = types.name(name);
                types.words(&[at, value]);
            }
        }
        types
    }

    /// Bytes from the structure's begin to a member of it, given as `STRUCTURE.MEMBER`.
    pub(super) fn offset(&self, member: &str) -> u64 {
        let (name, member) = member.split_once('.').expect("a structure and its member");
        self.types[name].members[member]
    }

    pub(super) fn bytes(&self, name: &str) -> u64 {
        self.types[name].bytes
    }

    /// The contents of `.BTF`.
    pub(super) fn section(&self) -> Vec<u8> {
        let length = |part: &[u8]| u32::try_from(part.len()).unwrap_or(u32::MAX);
        let (records, names) = (length(&self.records), length(&self.names));
        let header = [MAGIC, HEADER_BYTES, 0, records, records, names];
        let mut section: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        section.extend_from_slice(&self.records);
        section.extend_from_slice(&self.names);
        section
    }

    fn structure(&mut self, line: &str, packed_bytes: Option<u64>) {
        let (name, members) = line.split_once(' ').expect("a name and members");
        let mut members_at = HashMap::new();
        let mut placed = Vec::new();
        let mut end = 0;
        for word in members.split_whitespace() {
            let (member, what) = word.split_once(':').expect("a member and its type");
            let (what, place) = what.split_once('@').unwrap_or((what, ""));
            let (bit, width) = place.split_once('/').map_or((end * 8, 0), |(bit, width)| {
                let number = |digits: &str| digits.parse().expect("a number");
                (number(bit), number(width))
            });
            let (id, bytes) = self.member_type(what);
            end += bytes.next_multiple_of(8);
            members_at.insert(member.to_owned(), bit / 8);
            let place = u32::try_from(bit | width << 24).expect("structures are small");
            placed.push([self.name(member), id, place]);
        }
        let bytes = packed_bytes.unwrap_or(end);
        let flag = packed_bytes.map_or(0, |_| BIT_FIELDS);
        let count = u32::try_from(placed.len()).expect("members are few");
        let size = u32::try_from(bytes).expect("structures are small");
        self.record(name, STRUCT << 24 | flag | count, size);
        self.words(placed.as_flattened());
        self.add(name, bytes, members_at);
    }

    /// The number of a type or of an array of one, and its bytes.
    fn member_type(&mut self, what: &str) -> (u32, u64) {
        let Some((element, count)) = what.split_once('*') else {
            let found = &self.types[what];
            return (found.id, found.bytes);
        };
        let (id, each) = self.member_type(element);
        let count: u32 = count.parse().expect("a count");
        self.record("", ARRAY << 24, 0);
        self.words(&[id, id, count]);
        (self.last_id, each * u64::from(count))
    }

    /// Gives the type that was recorded last its name.
    fn add(&mut self, name: &str, bytes: u64, members: HashMap<String, u64>) {
        let id = self.last_id;
        let found = Type { id, bytes, members };
        self.types.insert(name.to_owned(), found);
    }

    fn record(&mut self, name: &str, info: u32, value: u32) {
        let name = self.name(name);
        self.words(&[name, info, value]);
        self.last_id += 1;
    }

    fn name(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let at = u32::try_from(self.names.len()).expect("names are few");
        self.names.extend_from_slice(name.as_bytes());
        self.names.push(0);
        at
    }

    fn words(&mut self, words: &[u32]) {
        let bytes = words.iter().flat_map(|word| word.to_le_bytes());
        self.records.extend(bytes);
    }
}
