//! The page for people: what a vmcore says besides its reports, in short aligned tables.

use std::collections::BTreeMap;

use ::triage::memory::{Backtrace, Examination, MemoryUse, System, Task};

/// Frames that the short page shows of a backtrace.
const FRAMES_SHOWN: usize = 16;
/// Lines of problems, and of what could not be read, on the short page.
const LINES_SHOWN: usize = 12;
/// Names of modules in one line.
const MODULES_A_LINE: usize = 8;

/// The page; with `all`, every task and module.
pub(super) fn page(found: &Examination, all: bool) -> String {
    let mut page = system(&found.system);
    if let Some(memory) = &found.memory {
        page.push_str(&use_of(memory));
    }
    page.push_str(&cpus(found, all));
    page.push_str(&tasks(found, all));
    page.push_str(&modules(found, all));
    page.push_str(&lines("open problems", &found.problems, all));
    page.push_str(&lines("not read", &found.unread, all));
    page
}

fn row(page: &mut String, name: &str, value: &str) {
    if !value.is_empty() {
        page.push_str(&format!("  {name:<10} {value}\n"));
    }
}

fn system(system: &System) -> String {
    let mut page = "\n".to_owned();
    row(&mut page, "host", &system.node);
    let kernel = format!("{} {}", system.release, system.version);
    row(&mut page, "kernel", kernel.trim());
    row(&mut page, "started by", &system.command_line);
    row(
        &mut page,
        "panic",
        system.panic.as_deref().unwrap_or_default(),
    );
    let [one, five, fifteen] = system
        .load_hundredths
        .map(|load| format!("{}.{:02}", load / 100, load % 100));
    let up = system.uptime_s;
    let up = format!(
        "{} d {:02}:{:02}:{:02} by its log, load {one} {five} {fifteen}",
        up / 86_400,
        up / 3600 % 24,
        up / 60 % 60,
        up % 60
    );
    row(&mut page, "up", &up);
    let cpus = format!("{} of {} online", system.cpus_online, system.cpus_possible);
    row(&mut page, "CPUs", &cpus);
    let taint = if system.taint.is_empty() {
        "none"
    } else {
        &system.taint
    };
    row(&mut page, "taint", taint);
    page
}

fn use_of(memory: &MemoryUse) -> String {
    let mib = |kib: u64| kib / 1024;
    let mut page = String::new();
    let value = format!(
        "{} MiB, {} free, {} of processes, {} files, {} shared, {} slab ({} reclaimable), {} page tables, {} stacks",
        mib(memory.total_kib),
        mib(memory.free_kib),
        mib(memory.anonymous_kib),
        mib(memory.file_kib),
        mib(memory.shared_kib),
        mib(memory.slab_kib + memory.slab_reclaimable_kib),
        mib(memory.slab_reclaimable_kib),
        mib(memory.page_tables_kib),
        mib(memory.stacks_kib),
    );
    row(&mut page, "memory", &value);
    if memory.swap_total_kib > 0 {
        let (free, total) = (mib(memory.swap_free_kib), mib(memory.swap_total_kib));
        row(&mut page, "swap", &format!("{total} MiB, {free} free"));
    }
    page
}

fn backtrace(page: &mut String, trace: &Backtrace, all: bool) {
    let shown = if all { usize::MAX } else { FRAMES_SHOWN };
    for frame in trace.frames.iter().take(shown) {
        let mark = if frame.interrupted { '>' } else { ' ' };
        page.push_str(&format!("    {mark} {frame}\n"));
    }
    if let Some(more) = trace
        .frames
        .len()
        .checked_sub(shown)
        .filter(|&more| more > 0)
    {
        page.push_str(&format!("      and {more} more frames\n"));
    }
    if let Some(user) = trace.user {
        page.push_str(&format!("      user space at {user:#x}\n"));
    }
    if let Some(broken) = &trace.broken {
        page.push_str(&format!("      the rest cannot be read: {broken}\n"));
    }
}

fn cpus(found: &Examination, all: bool) -> String {
    let mut page = String::new();
    for cpu in &found.cpus {
        let crashed = if cpu.crashed { ", crashed here" } else { "" };
        page.push_str(&format!(
            "\nCPU {}: {} ({}){crashed}\n",
            cpu.cpu, cpu.task, cpu.pid
        ));
        backtrace(&mut page, &cpu.backtrace, all);
    }
    page
}

fn tasks(found: &Examination, all: bool) -> String {
    let mut states: BTreeMap<char, usize> = BTreeMap::new();
    for task in &found.tasks {
        *states.entry(task.state).or_default() += 1;
    }
    let states: Vec<String> = states
        .iter()
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    let mut page = format!("\n{} tasks: {}\n", found.tasks.len(), states.join(", "));
    for task in &found.tasks {
        if all || task.state == 'D' {
            one(&mut page, task, all);
        }
    }
    page
}

fn one(page: &mut String, task: &Task, all: bool) {
    let idle = match task.idle_s {
        Some(seconds) => format!(", last ran {seconds} s ago"),
        None => String::new(),
    };
    page.push_str(&format!(
        "  {:<16} {:>7} {} CPU {}{idle}\n",
        task.name, task.pid, task.state, task.cpu
    ));
    backtrace(page, &task.backtrace, all);
}

fn modules(found: &Examination, all: bool) -> String {
    let mut page = format!("\n{} modules\n", found.modules.len());
    if all {
        for module in &found.modules {
            page.push_str(&format!(
                "  {:<24} {:#018x} {:>9} {:<6} {}\n",
                module.name, module.address, module.bytes, module.state, module.taint
            ));
        }
        return page;
    }
    let names: Vec<String> = found
        .modules
        .iter()
        .map(|module| match module.taint.as_str() {
            "" => module.name.clone(),
            taint => format!("{}({taint})", module.name),
        })
        .collect();
    for names in names.chunks(MODULES_A_LINE) {
        page.push_str(&format!("  {}\n", names.join(" ")));
    }
    page
}

fn lines(title: &str, lines: &[String], all: bool) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let shown = if all { usize::MAX } else { LINES_SHOWN };
    let mut page = format!("\n{title}\n");
    for line in lines.iter().take(shown) {
        page.push_str(&format!("  {line}\n"));
    }
    if let Some(more) = lines.len().checked_sub(shown).filter(|&more| more > 0) {
        page.push_str(&format!("  and {more} more\n"));
    }
    page
}
