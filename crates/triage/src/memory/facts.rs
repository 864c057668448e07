//! What kind of machine it was and how it stood: names, load, memory.

use dump::{Machine, PAGE_SIZE};
use serde::Serialize;

use super::image::{Unread, text};
use super::kernel::Kernel;
use super::log::Log;
use super::modules;

/// Bytes of a field of `uname`.
const NAME_BYTES_MAX: u64 = 256;
/// Bytes of the command line; the kernel's limit on x86 is 2048.
const COMMAND_LINE_MAX: usize = 4096;
/// Bits behind the point of a load average.
const LOAD_SHIFT: u32 = 11;
const PAGE_KIB: u64 = PAGE_SIZE as u64 / 1024;

/// The machine.
#[derive(Clone, Debug, Default, Serialize)]
pub struct System {
    /// The host's own name.
    pub node: String,
    /// The kernel's release.
    pub release: String,
    /// The kernel's version.
    pub version: String,
    /// The kernel's command line.
    pub command_line: String,
    /// When it crashed, in seconds since 1970; 0 when unknown.
    pub crash_time_s: u64,
    /// Seconds it ran, by the time of the last message in its log.
    pub uptime_s: u64,
    /// What it said when it panicked, behind `Kernel panic - not syncing: `.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub panic: Option<String>,
    /// Letters of its taint flags; empty when it is not tainted.
    pub taint: String,
    /// CPUs that were online.
    pub cpus_online: usize,
    /// CPUs it could have had.
    pub cpus_possible: usize,
    /// Load averages of 1, 5 and 15 minutes, in hundredths.
    pub load_hundredths: [u64; 3],
}

/// Memory in KiB, as the kernel's own counters have it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MemoryUse {
    /// What the kernel manages.
    pub total_kib: u64,
    /// What nobody had.
    pub free_kib: u64,
    /// Memory of processes.
    pub anonymous_kib: u64,
    /// Cached files.
    pub file_kib: u64,
    /// Shared memory and tmpfs.
    pub shared_kib: u64,
    /// Kernel objects that can be given up.
    pub slab_reclaimable_kib: u64,
    /// Kernel objects that cannot.
    pub slab_kib: u64,
    /// Page tables.
    pub page_tables_kib: u64,
    /// Kernel stacks.
    pub stacks_kib: u64,
    /// Swap.
    pub swap_total_kib: u64,
    /// Swap that nobody had.
    pub swap_free_kib: u64,
}

/// What the headers of the vmcore and its log say, without symbols.
pub(crate) fn outside(machine: &Machine, log: Option<&Log>) -> System {
    System {
        node: machine.node.clone(),
        release: machine.release.clone(),
        version: machine.version.clone(),
        crash_time_s: machine.crash_time_s,
        uptime_s: log.map_or(0, |log| log.end_ns / 1_000_000_000),
        panic: log.and_then(|log| {
            let (_, said) = log.text.rsplit_once("Kernel panic - not syncing: ")?;
            Some(said.lines().next().unwrap_or_default().to_owned())
        }),
        cpus_online: machine.cpus.len(),
        ..System::default()
    }
}

/// Adds what the kernel's memory says.
pub(crate) fn inside(kernel: &mut Kernel<'_>, system: &mut System) {
    let names = names(kernel, system);
    kernel.kept("names of the system", names);
    let line = command_line(kernel);
    system.command_line = kernel.kept("command line", line).unwrap_or_default();
    let taint = unsigned(kernel, "tainted_mask");
    let taint = kernel.kept("taint flags", taint).unwrap_or(0);
    system.taint = modules::taint(taint);
    let online = kernel.mask("__cpu_online_mask");
    if let Some(online) = kernel.kept("online CPUs", online) {
        system.cpus_online = online.len();
    }
    let possible = kernel.mask("__cpu_possible_mask");
    system.cpus_possible = kernel
        .kept("possible CPUs", possible)
        .map_or(0, |cpus| cpus.len());
    let load = load(kernel);
    system.load_hundredths = kernel.kept("load averages", load).unwrap_or_default();
}

fn unsigned(kernel: &mut Kernel<'_>, symbol: &str) -> Result<u64, Unread> {
    let at = kernel.symbols.address(symbol)?;
    kernel.image.u64(at)
}

fn names(kernel: &mut Kernel<'_>, system: &mut System) -> Result<(), Unread> {
    let at = kernel.symbols.address("init_uts_ns")?;
    let parts = [
        (&mut system.node, "nodename"),
        (&mut system.release, "release"),
        (&mut system.version, "version"),
    ];
    for (part, name) in parts {
        let field = kernel.btf.field("uts_namespace", &format!("name.{name}"))?;
        let place = at.wrapping_add(field.offset);
        let found = text(&kernel.image.bytes(place, field.size.min(NAME_BYTES_MAX))?);
        if !found.is_empty() {
            *part = found;
        }
    }
    Ok(())
}

fn command_line(kernel: &mut Kernel<'_>) -> Result<String, Unread> {
    let at = unsigned(kernel, "saved_command_line")?;
    kernel.image.text(at, COMMAND_LINE_MAX)
}

fn load(kernel: &mut Kernel<'_>) -> Result<[u64; 3], Unread> {
    let at = kernel.symbols.address("avenrun")?;
    let mut load = [0; 3];
    for (value, offset) in load.iter_mut().zip([0, 8, 16]) {
        // The address is the file's word, and may be the last one there is.
        let place = at.wrapping_add(offset);
        *value = kernel.image.u64(place)?.saturating_mul(100) >> LOAD_SHIFT;
    }
    Ok(load)
}

/// Reads the counters of memory.
pub(crate) fn memory(kernel: &mut Kernel<'_>) -> Result<MemoryUse, Unread> {
    let kib = |pages: u64| pages.saturating_mul(PAGE_KIB);
    let mut node = |names: &[&str]| -> Result<u64, Unread> {
        let mut sum = 0u64;
        for name in names {
            sum = sum.saturating_add(counter(kernel, "vm_node_stat", "node_stat_item", name)?);
        }
        Ok(sum)
    };
    let anonymous = node(&["NR_ACTIVE_ANON", "NR_INACTIVE_ANON"])?;
    let file = node(&["NR_ACTIVE_FILE", "NR_INACTIVE_FILE"])?;
    let shared = node(&["NR_SHMEM"])?;
    let reclaimable = node(&["NR_SLAB_RECLAIMABLE_B"])?;
    let slab = node(&["NR_SLAB_UNRECLAIMABLE_B"])?;
    let page_tables = node(&["NR_PAGETABLE"])?;
    let stacks = node(&["NR_KERNEL_STACK_KB"])?;
    Ok(MemoryUse {
        total_kib: kib(unsigned(kernel, "_totalram_pages")?),
        free_kib: kib(counter(
            kernel,
            "vm_zone_stat",
            "zone_stat_item",
            "NR_FREE_PAGES",
        )?),
        anonymous_kib: kib(anonymous),
        file_kib: kib(file),
        shared_kib: kib(shared),
        slab_reclaimable_kib: kib(reclaimable),
        slab_kib: kib(slab),
        page_tables_kib: kib(page_tables),
        stacks_kib: stacks,
        swap_total_kib: kib(unsigned(kernel, "total_swap_pages")?),
        swap_free_kib: kib(unsigned(kernel, "nr_swap_pages")?),
    })
}

/// One of the kernel's counters of pages, without what CPUs have not added yet. A sum of parts may
/// be below zero for a moment.
fn counter(kernel: &mut Kernel<'_>, array: &str, kind: &str, name: &str) -> Result<u64, Unread> {
    let place = kernel
        .btf
        .enumerator(kind, name)
        .ok_or_else(|| Unread::Strange(format!("enum {kind} has no {name}")))?;
    let at = kernel.symbols.address(array)?;
    let value = kernel.image.u64(at.wrapping_add(place * 8))?;
    Ok(u64::try_from(value.cast_signed()).unwrap_or(0))
}
