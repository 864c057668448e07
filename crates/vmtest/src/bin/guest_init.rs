//! The guest's first program. It loads the drivers, configures the network, arms netdump, places
//! the pattern, and crashes the kernel as ordered, telling the harness each stage by one line on a
//! virtio-serial port.
//!
//! Build it static: `RUSTFLAGS="-C target-feature=+crt-static" cargo build -p vmtest --bin
//! guest_init --target x86_64-unknown-linux-gnu`.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::mm::MapFlags;
use vmtest::crash::{By, Crash, End};
use vmtest::guest::{
    configure_network, find_port, load_crash_kernel, load_module, map, memory, mount_basics,
    mount_here, run, tell, wait_for,
};
use vmtest::pattern::{self, PAGE_SIZE};
use vmtest::stage::{
    CAPTURE_INITRAMFS, CAPTURE_KERNEL, CAPTURE_WORD, CAPTURED, CRASH_DELAY, DEVICE, FLOOD_BYTES,
    FLOOD_PORT, Fill, IMAGE_SYMBOLS, Kernel, Network, ORDERS_PATH, Orders, PatternRun, SERVER_PORT,
    Stage,
};
use vmtest::stress::stress;

/// Pages of the pattern in user memory: 8 MiB.
const USER_PATTERN_PAGES: usize = 2048;
/// Bytes of each kind of page of [`Fill::Mixed`], more or less.
const MIXED_BYTES: usize = 16 << 20;
/// Slab caches that network buffers and their data come from, on all kernels; 6.3 has the small
/// heads (bf9f1baa279f).
const NETWORK_CACHES: [&str; 7] = [
    "skbuff_head_cache",
    "skbuff_fclone_cache",
    "skbuff_small_head",
    "kmalloc-512",
    "kmalloc-1k",
    "kmalloc-2k",
    "kmalloc-4k",
];
/// How long a kernel that was told to crash may still run this program.
const CRASH_TIMEOUT: Duration = Duration::from_secs(60);

/// What the module says of a device that it would not be able to drive after a crash.
const UNFIT: &str = "cannot be polled";

fn main() {
    if let Err(error) = guest() {
        let why = format!("{error:#}").replace('\n', " ");
        eprintln!("guest_init: {why}");
        let told = find_port().and_then(|mut port| tell(&mut port, &Stage::Failed { why }));
        if let Err(error) = told {
            eprintln!("guest_init: cannot tell the harness: {error:#}");
        }
    }
    if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
        eprintln!("guest_init: cannot power off: {error}");
    }
}

fn guest() -> Result<()> {
    mount_basics()?;
    if fs::read_to_string("/proc/cmdline")?.contains(CAPTURE_WORD) {
        return capture();
    }
    let orders = fs::read(ORDERS_PATH).context("cannot read the orders")?;
    let orders: Orders = serde_json::from_slice(&orders).context("the orders are damaged")?;
    for module in &orders.modules {
        load_module(&format!("/modules/{module}"), "")?;
    }
    let mut port = wait_for("the virtio-serial port", find_port)?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned();
    tell(&mut port, &Stage::Booted { kernel })?;
    if orders.crash.kdump().is_some() {
        let words = "console=ttyS0,115200 reset_devices nr_cpus=1 irqpoll panic=1";
        let line = format!("{words} {CAPTURE_WORD}");
        load_crash_kernel(CAPTURE_KERNEL, CAPTURE_INITRAMFS, &line)?;
    }
    if orders.crash.facts().end == End::Nothing {
        load_module("/netdump.ko", "")?;
    } else if !configure_and_arm(&mut port, &orders)? {
        return Ok(());
    }
    if orders.stress > 0 {
        let again = || arm(&orders.arm, orders.network).map(|_| ());
        let found = stress(orders.network, orders.stress, &again)?;
        println!("guest_init: {found:?}");
        tell(&mut port, &Stage::Stressed(found))?;
    }
    let filled = fill_memory(&orders)?;
    let user = place_user_pattern(orders.seed)?;
    let kernel = place_kernel_pattern(orders.seed)?;
    tell(
        &mut port,
        &Stage::Pattern {
            pages: [user.runs, kernel].concat(),
        },
    )?;
    tell(&mut port, &Stage::Kernel(kernel_facts()?))?;
    fs::write("/proc/sys/kernel/panic_on_oops", "1").context("cannot set panic_on_oops")?;
    fs::write("/proc/sys/kernel/sysrq", "1").context("cannot allow sysrq")?;
    if !prepare(&mut port, orders.crash)? {
        return Ok(());
    }
    if orders.network.traffic {
        flood(orders.network)?;
    }
    tell(&mut port, &Stage::Crashing)?;
    thread::sleep(CRASH_DELAY);
    crash(&mut port, orders.crash)?;
    let failures = stir(CRASH_TIMEOUT);
    bail!(
        "the kernel lives {} s after crash {} was asked for ({failures} datagrams not sent, {} MiB of filler, {} bytes of pattern in use)",
        CRASH_TIMEOUT.as_secs(),
        orders.crash.name(),
        filled.map_or(0, |memory| memory.len() >> 20),
        user.memory.len()
    )
}

/// In a crash kernel: says that it runs, and what of, and reboots.
fn capture() -> Result<()> {
    let memory = fs::metadata("/proc/vmcore").context("no memory of another kernel")?;
    println!("{CAPTURED} {} bytes", memory.len());
    rustix::system::reboot(rustix::system::RebootCommand::Restart).context("cannot reboot")
}

/// Configures the network and arms; `false` if the module refused, which has been told.
fn configure_and_arm(port: &mut File, orders: &Orders) -> Result<bool> {
    let mac = configure_network(orders.network)?;
    tell(port, &Stage::Configured { mac })?;
    match arm(&orders.arm, orders.network) {
        Ok(status) => tell(port, &Stage::Armed { status }).map(|()| true),
        Err(error) => {
            let why = format!("{error:#}").replace('\n', " ");
            if !why.contains(UNFIT) {
                return Err(error);
            }
            tell(port, &Stage::Refused { why }).map(|()| false)
        }
    }
}

/// Sends as fast as it can, from two threads, until the end.
fn flood(network: Network) -> Result<()> {
    for _ in 0..2 {
        let any: IpAddr = if network.ip6 {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        let socket = UdpSocket::bind((any, 0)).context("cannot make a socket for the flood")?;
        socket.connect((network.server(), FLOOD_PORT))?;
        thread::spawn(move || {
            loop {
                // A full queue is what a flood is for; nothing else can fail before the crash.
                std::hint::black_box(socket.send(&[b'f'; FLOOD_BYTES]).is_ok());
            }
        });
    }
    Ok(())
}

/// Keeps the network card and its statistics busy, for the crashes that wait for that; gives how
/// often that failed.
fn stir(time: Duration) -> u32 {
    let start = Instant::now();
    let mut failures = 0;
    let statistics = format!("/sys/class/net/{DEVICE}/statistics/rx_bytes");
    while start.elapsed() < time {
        let read = fs::read_to_string(&statistics);
        let sent = UdpSocket::bind("0.0.0.0:0")
            .and_then(|socket| socket.send_to(b"stir", ("10.0.2.2", 9)));
        failures += u32::from(read.is_err() || sent.is_err());
        thread::sleep(Duration::from_millis(100));
    }
    failures
}

fn arm(options: &[String], network: Network) -> Result<serde_json::Value> {
    let server = SocketAddr::new(network.server(), SERVER_PORT).to_string();
    let nobody = SocketAddr::new(network.nobody(), SERVER_PORT).to_string();
    let mut arguments = vec!["arm", "--key", "/key", "--module", "/netdump.ko"];
    if network.dead_server {
        arguments.extend(["--server", &nobody]);
    }
    arguments.extend(["--server", &server]);
    arguments.extend(options.iter().map(String::as_str));
    println!("{}", run("/bin/netdump", &arguments)?);
    let status = run("/bin/netdump", &["status", "--json"])?;
    serde_json::from_str(&status)
        .with_context(|| format!("netdump status --json printed {status:?}"))
}

fn fill_memory(orders: &Orders) -> Result<Option<&'static [u8]>> {
    match orders.fill {
        Fill::Booted => return Ok(None),
        Fill::Mixed => return fill_mixed(orders.seed).map(Some),
        Fill::Ordinary | Fill::Random => {}
    }
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let available_kib: usize = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .context("/proc/meminfo has no MemAvailable")?;
    let filler = memory(available_kib * 1024 / 5 * 4)?;
    if orders.fill == Fill::Random {
        pattern::fill(pattern::seed_of(orders.seed, "filler"), 0, filler);
        return Ok(Some(filler));
    }
    let mut ordinary = Vec::new();
    for path in [
        "/bin/netdump",
        "/proc/kallsyms",
        "/bin/busybox",
        "/netdump.ko",
        "/crashme.ko",
        "/init",
    ] {
        File::open(path)
            .and_then(|mut file| file.read_to_end(&mut ordinary))
            .with_context(|| format!("cannot read {path} to fill memory"))?;
    }
    for chunk in filler.chunks_mut(ordinary.len()) {
        chunk.copy_from_slice(&ordinary[..chunk.len()]);
    }
    Ok(Some(filler))
}

/// Makes some of every kind of page: see [`Fill::Mixed`].
fn fill_mixed(seed: u64) -> Result<&'static [u8]> {
    let words = |kind: &str, to: &mut [u8]| pattern::fill(pattern::seed_of(seed, kind), 0, to);
    let mut content = vec![0; MIXED_BYTES];
    words("tmpfs", &mut content);
    mount_here("tmpfs", "/tmp")?;
    fs::write("/tmp/file", &content).context("cannot write to the tmpfs")?;
    words("disk", &mut content);
    let mut disk = OpenOptions::new()
        .write(true)
        .open("/dev/ram0")
        .context("no disk in memory")?;
    disk.write_all(&content[..MIXED_BYTES / 2])
        .context("cannot write to the disk in memory")?;
    // Open to the end: the last one who closes a disk takes its page cache along.
    Box::leak(Box::new(disk));
    Command::new("/bin/busybox")
        .args(["sleep", "1000000"])
        .spawn()
        .context("cannot start another process")?;
    fs::write("/proc/sys/vm/nr_hugepages", "8").context("cannot have huge pages")?;
    words("hugetlb", map(MIXED_BYTES / 2, MapFlags::HUGETLB)?);
    fs::write("/sys/kernel/mm/transparent_hugepage/enabled", "always")
        .context("cannot have transparent huge pages")?;
    let huge = map(MIXED_BYTES, MapFlags::empty())?;
    words("huge", huge);
    let given_back = map(4 * MIXED_BYTES, MapFlags::POPULATE)?;
    words("given back", given_back);
    // SAFETY: this is the whole of a mapping that nothing refers to any more.
    unsafe { rustix::mm::munmap(given_back.as_mut_ptr().cast(), given_back.len()) }
        .context("cannot give memory back")?;
    Ok(huge)
}

/// The pattern in this program's memory; it must live until the crash.
struct UserPattern {
    memory: &'static [u8],
    runs: Vec<PatternRun>,
}

fn place_user_pattern(seed: u64) -> Result<UserPattern> {
    let memory = memory(USER_PATTERN_PAGES * PAGE_SIZE)?;
    pattern::fill(pattern::seed_of(seed, "user"), 0, memory);
    let pagemap = File::open("/proc/self/pagemap").context("cannot open pagemap")?;
    let first = memory.as_ptr().addr() / PAGE_SIZE;
    let mut runs = Vec::new();
    for index in 0..USER_PATTERN_PAGES {
        let mut entry = [0; 8];
        pagemap
            .read_exact_at(&mut entry, ((first + index) * 8) as u64)
            .context("cannot read pagemap")?;
        let entry = u64::from_le_bytes(entry);
        ensure!(
            entry >> 63 == 1,
            "page {index} of the pattern is not in memory"
        );
        extend(&mut runs, "user", index as u64, entry & ((1 << 55) - 1));
    }
    Ok(UserPattern { memory, runs })
}

/// Adds one page, joining it to the last run where it continues that.
fn extend(runs: &mut Vec<PatternRun>, kind: &str, index: u64, pfn: u64) {
    if let Some(last) = runs.last_mut()
        && last.kind == kind
        && (last.index + last.pages, last.pfn + last.pages) == (index, pfn)
    {
        last.pages += 1;
        return;
    }
    runs.push(PatternRun {
        kind: kind.to_owned(),
        index,
        pfn,
        pages: 1,
    });
}

fn place_kernel_pattern(seed: u64) -> Result<Vec<PatternRun>> {
    let (slab, vmalloc) = (
        pattern::seed_of(seed, "slab"),
        pattern::seed_of(seed, "vmalloc"),
    );
    load_module(
        "/crashme.ko",
        &format!("seed_slab={slab} seed_vmalloc={vmalloc}"),
    )?;
    let listing =
        fs::read_to_string("/proc/crashme_pages").context("cannot read the pattern of crashme")?;
    let mut runs = Vec::new();
    for line in listing.lines() {
        let mut words = line.split(' ');
        let mut number = || -> Option<(&str, u64, u64)> {
            Some((
                words.next()?,
                words.next()?.parse().ok()?,
                words.next()?.parse().ok()?,
            ))
        };
        let (kind, index, pfn) =
            number().with_context(|| format!("/proc/crashme_pages says {line:?}"))?;
        extend(&mut runs, kind, index, pfn);
    }
    Ok(runs)
}

fn kernel_facts() -> Result<Kernel> {
    let mut facts = Kernel::default();
    for line in fs::read_to_string("/proc/iomem")
        .context("cannot read iomem")?
        .lines()
    {
        let Some((range, what)) = line.split_once(" : ") else {
            continue;
        };
        let Some((start, end)) = range.trim().split_once('-') else {
            continue;
        };
        let (start, end) = (
            u64::from_str_radix(start, 16)?,
            u64::from_str_radix(end, 16)?,
        );
        match what {
            "System RAM" => facts.ram.push((start, end)),
            "Kernel code" => facts.code = start,
            _ => {}
        }
    }
    for line in fs::read_to_string("/proc/kallsyms")
        .context("cannot read kallsyms")?
        .lines()
    {
        let mut words = line.split_ascii_whitespace();
        let (Some(address), Some(kind), Some(name)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        // Data, bss, absolute (per-CPU offsets), and what says where the image lies.
        if matches!(kind, "d" | "D" | "b" | "B" | "a" | "A") || IMAGE_SYMBOLS.contains(&name) {
            facts
                .symbols
                .push((u64::from_str_radix(address, 16)?, name.to_owned()));
        }
    }
    facts.symbols.sort();
    facts.slabs = NETWORK_CACHES
        .iter()
        .filter_map(|name| slab(name))
        .collect();
    Ok(facts)
}

/// Object to object in a slab cache, and where a free object has the pointer to the next:
/// `calculate_sizes` of mm/slub.c puts it in the middle (3202fa62fb43, 5.7). `None` if this kernel
/// has no such cache.
fn slab(name: &str) -> Option<(u64, u64)> {
    let number = |file: &str| -> Option<u64> {
        let path = format!("/sys/kernel/slab/{name}/{file}");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    Some((number("slab_size")?, number("object_size")? / 2 / 8 * 8))
}

/// Writes what the crash needs; `false` if the machine has been told to be impossible to crash so.
fn prepare(port: &mut File, crash: Crash) -> Result<bool> {
    for (path, word) in crash.facts().settings {
        let written = fs::write(path, word)
            .and_then(|()| fs::read_to_string(path))
            .with_context(|| format!("cannot write {word} to {path}"));
        let why = match written {
            Ok(read) if read.trim() == *word => continue,
            Ok(read) => format!("{path} stays {} when {word} is written to it", read.trim()),
            Err(error) => format!("{error:#}"),
        };
        tell(port, &Stage::Impossible { why })?;
        return Ok(false);
    }
    Ok(true)
}

/// Takes pages until there are none.
fn take_all_memory() -> Result<()> {
    const PIECE: usize = 4 << 20;
    loop {
        std::hint::black_box(memory(PIECE)?);
    }
}

/// Brings the crash about; what does not end the kernel at once may end it later.
fn crash(port: &mut File, crash: Crash) -> Result<()> {
    let name = match crash.facts().by {
        By::Sysrq => {
            return fs::write("/proc/sysrq-trigger", "c").context("cannot use sysrq");
        }
        By::Monitor(_) => return Ok(()),
        By::Memory => return take_all_memory(),
        By::Crashme => crash.name(),
        By::CrashmeAs(name) => name,
    };
    let path = "/sys/module/crashme/parameters/crash";
    match fs::write(path, name) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let why = format!("crashme finds no place for {name} in this kernel and driver");
            tell(port, &Stage::Impossible { why })
        }
        written => written.with_context(|| format!("cannot write {name} to {path}")),
    }
}
