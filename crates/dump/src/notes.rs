//! ELF notes: registers of the CPUs, VMCOREINFO, and our own note with what has no other place.

use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::error::DumpError;
use crate::file::Input;
use crate::machine::{Cpu, GREGS, Gregs, Machine};
use crate::page::{Pfn, RamRange};
use crate::writer::Summary;

/// A header and what follows it, each padded to this many bytes.
const NOTE_ALIGN: usize = 4;
/// Most bytes of notes that are read into memory. QEMU writes about 800 a CPU; device dumps
/// (VMCOREDD) can add megabytes.
const NOTES_BYTES_MAX: u64 = 256 << 20;

const NT_PRSTATUS: u32 = 1;
const VMCOREINFO_NAME: &[u8] = b"VMCOREINFO\0";
const CORE_NAME: &[u8] = b"CORE\0";
const OWN_NAME: &[u8] = b"NETDUMP\0";
/// `crash` looks at a note's type before its name, so this is none of the types it knows.
const OWN_TYPE: u32 = 0x4e44;
const OWN_VERSION: u32 = 1;

/// Runs of unreadable and of missing pages that are listed in our note; the counts are always
/// whole.
pub(crate) const LISTED_RUNS_MAX: usize = 4096;

const CPU_CAPTURED: u32 = 1;
const CPU_CRASHED: u32 = 2;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    name_bytes: U32,
    desc_bytes: U32,
    kind: U32,
}

/// The kernel's `struct elf_prstatus` on x86-64.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PrStatus {
    signal: [u8; 32],
    pid: U32,
    ids_and_times: [u8; 76],
    registers: [U64; GREGS],
    fp_valid: [u8; 8],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Run {
    first: U64,
    pages: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CpuEntry {
    number: U32,
    pid: U32,
    flags: U32,
}

/// The fixed part of our note; CPU entries and three lists of runs follow in this order.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Own {
    version: U32,
    cpus: U32,
    ram_runs: U32,
    unreadable_runs: U32,
    missing_runs: U32,
    has_kernel_image: U32,
    data: U64,
    zero: U64,
    excluded: U64,
    unreadable: U64,
    missing: U64,
    crash_time_s: U64,
    page_offset: U64,
    kernel_image: Run,
    node: [u8; 65],
    release: [u8; 65],
    kernel_version: [u8; 65],
    pad: [u8; 5],
}

/// What a writer knows of the pages when it writes the notes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct PageFacts {
    pub(crate) summary: Summary,
    pub(crate) unreadable: Vec<RamRange>,
    pub(crate) missing: Vec<RamRange>,
}

/// All notes of a machine, and where in them the VMCOREINFO text lies.
#[derive(Debug)]
pub(crate) struct Notes {
    pub(crate) bytes: Vec<u8>,
    pub(crate) text_at: u64,
    pub(crate) text_bytes: u64,
}

impl Notes {
    /// One NT_PRSTATUS for each online CPU in the order of their numbers, then VMCOREINFO, then
    /// ours.
    pub(crate) fn encode(machine: &Machine, facts: &PageFacts) -> Self {
        let mut bytes = Vec::new();
        for cpu in &machine.cpus {
            push(&mut bytes, CORE_NAME, NT_PRSTATUS, prstatus(cpu).as_bytes());
        }
        let text = without_crash_time(&machine.vmcoreinfo);
        let header = size_of::<Header>() + VMCOREINFO_NAME.len().next_multiple_of(NOTE_ALIGN);
        let text_at = (bytes.len() + header) as u64;
        push(&mut bytes, VMCOREINFO_NAME, 0, &text);
        push(&mut bytes, OWN_NAME, OWN_TYPE, &own(machine, facts));
        Self {
            bytes,
            text_at,
            text_bytes: text.len() as u64,
        }
    }

    /// The most bytes [`Notes::encode`] can need for this machine.
    pub(crate) fn bytes_max(machine: &Machine) -> usize {
        let facts = PageFacts::default();
        Self::encode(machine, &facts).bytes.len() + 2 * LISTED_RUNS_MAX * size_of::<Run>()
    }
}

/// What the notes of a file say.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    pub(crate) machine: Machine,
    /// From our own note; `None` in files of others.
    pub(crate) facts: Option<PageFacts>,
}

/// Reads the notes of a file.
pub(crate) fn read(input: &Input, offset: u64, count: u64) -> Result<Parsed, DumpError> {
    if count > NOTES_BYTES_MAX {
        let what = format!("{count} bytes of notes; at most {NOTES_BYTES_MAX} are read");
        return Err(DumpError::malformed(input.path(), offset, what));
    }
    let bytes = input.bytes("the notes", offset, count)?;
    parse(&bytes).map_err(|(at, what)| DumpError::malformed(input.path(), offset + at as u64, what))
}

/// Reads notes; the error is the place in `bytes` and a sentence.
fn parse(bytes: &[u8]) -> Result<Parsed, (usize, String)> {
    let mut parsed = Parsed::default();
    let mut registers = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let at = bytes.len() - rest.len();
        // QEMU and makedumpfile may leave less than a header of padding at the end.
        let Ok((header, body)) = Header::ref_from_prefix(rest) else {
            break;
        };
        let note = split(header, body).ok_or_else(|| {
            (
                at,
                format!(
                    "note with {} name bytes and {} text bytes, but {} bytes are left",
                    header.name_bytes,
                    header.desc_bytes,
                    body.len()
                ),
            )
        })?;
        rest = note.rest;
        match (note.name, header.kind.get()) {
            (CORE_NAME, NT_PRSTATUS) => {
                let (status, _) = PrStatus::ref_from_prefix(note.desc).map_err(|_short| {
                    (
                        at,
                        format!(
                            "NT_PRSTATUS note has {} bytes, 336 are needed",
                            note.desc.len()
                        ),
                    )
                })?;
                registers.push(status.registers.map(U64::get));
            }
            (VMCOREINFO_NAME, _) => parsed.machine.vmcoreinfo = note.desc.to_vec(),
            (OWN_NAME, OWN_TYPE) => {
                parsed.facts =
                    parse_own(note.desc, &mut parsed.machine).map_err(|what| (at, what))?;
            }
            _ => {}
        }
    }
    assign_registers(&mut parsed.machine.cpus, registers);
    Ok(parsed)
}

/// Gives registers to CPUs by order, as they were written; without our note CPUs are numbered by
/// it.
fn assign_registers(cpus: &mut Vec<Cpu>, registers: Vec<Gregs>) {
    if cpus.is_empty() {
        cpus.extend((0..).zip(registers).map(|(number, registers)| Cpu {
            number,
            pid: 0,
            registers: Some(registers),
            crashed: false,
        }));
        return;
    }
    for (cpu, saved) in cpus.iter_mut().zip(registers) {
        if cpu.registers.is_some() {
            cpu.registers = Some(saved);
        }
    }
}

/// `drgn` finds registers by pid = CPU number + 1 when VMCOREINFO has no CRASHTIME; `crash` gives
/// the notes to the online CPUs by order. So a CPU that did not answer keeps its place with zeros,
/// under pid 0, where `drgn` looks for no CPU.
fn prstatus(cpu: &Cpu) -> PrStatus {
    let mut status = PrStatus::new_zeroed();
    if let Some(registers) = cpu.registers {
        status.pid = U32::new(cpu.number.wrapping_add(1));
        status.registers = registers.map(U64::new);
    }
    status
}

/// A CRASHTIME line tells `drgn` to look for registers in the kernel's per-CPU `crash_notes`, which
/// only kexec fills; without the line it takes the NT_PRSTATUS notes.
fn without_crash_time(text: &[u8]) -> Vec<u8> {
    text.split_inclusive(|&byte| byte == b'\n')
        .filter(|line| !line.starts_with(b"CRASHTIME="))
        .collect::<Vec<_>>()
        .concat()
}

fn push(bytes: &mut Vec<u8>, name: &[u8], kind: u32, desc: &[u8]) {
    let header = Header {
        name_bytes: U32::new(small(name.len())),
        desc_bytes: U32::new(small(desc.len())),
        kind: U32::new(kind),
    };
    bytes.extend_from_slice(header.as_bytes());
    for part in [name, desc] {
        bytes.extend_from_slice(part);
        bytes.resize(bytes.len().next_multiple_of(NOTE_ALIGN), 0);
    }
}

/// A count as the notes store it. Writers bound VMCOREINFO and CPUs, so nothing is ever cut here.
fn small(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

struct Note<'a> {
    name: &'a [u8],
    desc: &'a [u8],
    rest: &'a [u8],
}

fn split<'a>(header: &Header, body: &'a [u8]) -> Option<Note<'a>> {
    let (name, body) = split_padded(body, header.name_bytes)?;
    let (desc, rest) = split_padded(body, header.desc_bytes)?;
    Some(Note { name, desc, rest })
}

/// Takes `count` bytes and the padding behind them, which the last note of a file may lack.
fn split_padded(bytes: &[u8], count: U32) -> Option<(&[u8], &[u8])> {
    let count = usize::try_from(count.get()).ok()?;
    let (taken, _) = bytes.split_at_checked(count)?;
    let padded = count.checked_next_multiple_of(NOTE_ALIGN)?.min(bytes.len());
    Some((taken, bytes.get(padded..)?))
}

fn own(machine: &Machine, facts: &PageFacts) -> Vec<u8> {
    let summary = &facts.summary;
    let unreadable = listed(&facts.unreadable);
    let missing = listed(&facts.missing);
    let fixed = Own {
        version: U32::new(OWN_VERSION),
        cpus: U32::new(small(machine.cpus.len())),
        ram_runs: U32::new(small(machine.ram.len())),
        unreadable_runs: U32::new(small(unreadable.len())),
        missing_runs: U32::new(small(missing.len())),
        has_kernel_image: U32::new(u32::from(machine.kernel_image.is_some())),
        data: U64::new(summary.data),
        zero: U64::new(summary.zero),
        excluded: U64::new(summary.excluded),
        unreadable: U64::new(summary.unreadable),
        missing: U64::new(summary.missing),
        crash_time_s: U64::new(machine.crash_time_s),
        page_offset: U64::new(machine.page_offset),
        kernel_image: run(&machine.kernel_image.unwrap_or(RamRange {
            first: Pfn(0),
            pages: 0,
        })),
        node: name_field(&machine.node),
        release: name_field(&machine.release),
        kernel_version: name_field(&machine.version),
        pad: [0; 5],
    };
    let mut bytes = fixed.as_bytes().to_vec();
    for cpu in &machine.cpus {
        let captured = if cpu.registers.is_some() {
            CPU_CAPTURED
        } else {
            0
        };
        let crashed = if cpu.crashed { CPU_CRASHED } else { 0 };
        let entry = CpuEntry {
            number: U32::new(cpu.number),
            pid: U32::new(cpu.pid),
            flags: U32::new(captured | crashed),
        };
        bytes.extend_from_slice(entry.as_bytes());
    }
    for range in machine.ram.iter().chain(unreadable).chain(missing) {
        bytes.extend_from_slice(run(range).as_bytes());
    }
    bytes
}

fn listed(runs: &[RamRange]) -> &[RamRange] {
    runs.get(..LISTED_RUNS_MAX).unwrap_or(runs)
}

const fn run(range: &RamRange) -> Run {
    Run {
        first: U64::new(range.first.0),
        pages: U64::new(range.pages),
    }
}

/// A name as `struct new_utsname` keeps it: 64 bytes at most and a zero.
pub(crate) fn name_field(name: &str) -> [u8; 65] {
    let mut field = [0; 65];
    for (to, from) in field.iter_mut().take(64).zip(name.bytes()) {
        *to = from;
    }
    field
}

/// The text of a [`name_field`] up to its first zero.
pub(crate) fn field_name(field: &[u8]) -> String {
    let text = field.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

fn parse_own(desc: &[u8], machine: &mut Machine) -> Result<Option<PageFacts>, String> {
    let cut = || format!("NETDUMP note with {} bytes is cut short", desc.len());
    let (own, lists) = Own::ref_from_prefix(desc).map_err(|_short| cut())?;
    if own.version.get() != OWN_VERSION {
        // A later layout: the standard notes still say enough to read the file.
        return Ok(None);
    }
    let (cpus, lists) = list::<CpuEntry>(lists, own.cpus).ok_or_else(cut)?;
    let (ram, lists) = list::<Run>(lists, own.ram_runs).ok_or_else(cut)?;
    let (unreadable, lists) = list::<Run>(lists, own.unreadable_runs).ok_or_else(cut)?;
    let (missing, _) = list::<Run>(lists, own.missing_runs).ok_or_else(cut)?;
    machine.cpus = cpus.iter().map(cpu).collect();
    machine.ram = ranges(ram);
    machine.crash_time_s = own.crash_time_s.get();
    machine.page_offset = own.page_offset.get();
    machine.kernel_image = (own.has_kernel_image.get() != 0).then(|| range(&own.kernel_image));
    machine.node = field_name(&own.node);
    machine.release = field_name(&own.release);
    machine.version = field_name(&own.kernel_version);
    let summary = Summary {
        data: own.data.get(),
        zero: own.zero.get(),
        excluded: own.excluded.get(),
        unreadable: own.unreadable.get(),
        missing: own.missing.get(),
        file_bytes: 0,
    };
    Ok(Some(PageFacts {
        summary,
        unreadable: ranges(unreadable),
        missing: ranges(missing),
    }))
}

fn list<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    bytes: &[u8],
    count: U32,
) -> Option<(&[T], &[u8])> {
    let count = usize::try_from(count.get()).ok()?;
    <[T]>::ref_from_prefix_with_elems(bytes, count).ok()
}

fn ranges(runs: &[Run]) -> Vec<RamRange> {
    runs.iter().map(range).collect()
}

const fn range(run: &Run) -> RamRange {
    RamRange {
        first: Pfn(run.first.get()),
        pages: run.pages.get(),
    }
}

/// The registers are filled in from the NT_PRSTATUS notes afterwards.
fn cpu(entry: &CpuEntry) -> Cpu {
    let flags = entry.flags.get();
    Cpu {
        number: entry.number.get(),
        pid: entry.pid.get(),
        registers: (flags & CPU_CAPTURED != 0).then_some([0; GREGS]),
        crashed: flags & CPU_CRASHED != 0,
    }
}

const _: () = assert!(size_of::<PrStatus>() == 336);
