//! One run, from an unpacked kernel package to a verdict.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use dump::{Pfn, Reader};
use serde::Serialize;

use crate::agreement;
use crate::crash::{By, Crash, End, On};
use crate::frame::Mac;
use crate::hardware;
use crate::initramfs::Initramfs;
use crate::kernel::KernelView;
use crate::link::{Door, Link, Marker};
use crate::memory::GuestMemory;
use crate::modules::{self, Modules};
use crate::oracle::{self, Comparison, FIRMWARE_PAGES_MAX, Written};
use crate::proof::{Case, Proof, prove};
use crate::readers::{self, Expected};
use crate::ring::rings;
use crate::road::{Faults, Mishaps};
use crate::rules::{Rules, bounce_buffers, buffer_blocks};
use crate::server::{self, Listen, Server, Session};
use crate::stage::{
    CAPTURE_INITRAMFS, CAPTURE_KERNEL, CAPTURED, CRASH_DELAY, CRASH_KERNEL, Fill, Kernel, Network,
    ORDERS_PATH, Orders, Over, PatternRun, Stage,
};
use crate::stress::Stress;
use crate::symbols;
use crate::verdict::{Observations, Verdict};
use crate::vm::{self, Accelerator, Guest, Nic, SERIAL_CONSOLE, Vm};

/// What to run. All paths exist already; nothing is fetched.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The unpacked linux-image package.
    pub image: PathBuf,
    /// netdump.ko for that kernel.
    pub module: PathBuf,
    /// crashme.ko for that kernel.
    pub crashme: PathBuf,
    /// The static netdump program, run on both sides.
    pub netdump: PathBuf,
    /// The static guest_init program.
    pub guest_init: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// The QEMU program.
    pub qemu: String,
    /// The guest's network device.
    pub nic: Nic,
    /// How it dies.
    pub crash: Crash,
    /// What is in its memory.
    pub fill: Fill,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its CPUs.
    pub cpus: u32,
    /// What it is connected to.
    pub network: Network,
    /// What goes wrong on the wire.
    pub faults: Faults,
    /// "kdump" or "elf".
    pub format: String,
    /// Filter level that the server asks for.
    pub filter: u8,
    /// Filter level that the guest demands.
    pub arm_filter: u8,
    /// Whether the guest keeps the crashing task's user memory.
    pub keep_user: bool,
    /// Whether the guest sends its kernel messages live.
    pub console: bool,
    /// Cycles of loading, arming and unloading before it crashes.
    pub stress: u32,
    /// The kernel with symbols, for the readers.
    pub vmlinux: Option<PathBuf>,
    /// The words that start makedumpfile, to prove the filter.
    pub makedumpfile: Option<String>,
    /// A Python that has drgn.
    pub drgn: Option<PathBuf>,
    /// The words that start crash.
    pub crash_reader: Option<String>,
}

/// What a run has shown; `--json` prints it as the last line.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// "Ok" or the stage that failed.
    pub verdict: String,
    /// The verdict with its reason, for people.
    pub why: String,
    /// Kernel release.
    pub kernel: String,
    /// Network device.
    pub nic: String,
    /// Crash kind.
    pub crash: String,
    /// "kvm" or "tcg".
    pub accel: String,
    /// Seed of the pattern and the faults.
    pub seed: u64,
    /// Loss asked for on the wire, percent.
    pub loss_percent: f64,
    /// Delay asked for in each direction, milliseconds.
    pub delay_ms: f64,
    /// How guest and server are connected.
    pub network: Network,
    /// Bytes of guest RAM.
    pub memory_bytes: u64,
    /// Milliseconds from the start of QEMU to the guest's first program.
    pub boot_ms: u64,
    /// Milliseconds from the crash to its first datagram.
    pub first_packet_ms: Option<u64>,
    /// Seconds from the first datagram to the last.
    pub dump_s: f64,
    /// Bytes of the guest's frames from the crash on.
    pub wire_bytes: u64,
    /// Guest RAM divided by the time of the dump, in 10^6 bytes a second.
    pub memory_mb_s: f64,
    /// Memory the module holds while armed, as it says itself.
    pub armed_kib: Option<u64>,
    /// Pages compared.
    pub pages_checked: u64,
    /// Pages that differ and are not listed.
    pub pages_different: u64,
    /// Pages on the client's list.
    pub pages_listed: u64,
    /// Pages that differ and are listed.
    pub listed_different: u64,
    /// The same by kind.
    pub listed_different_kinds: BTreeMap<String, u64>,
    /// Filter level of the dump.
    pub filter: u8,
    /// Pages that the filter left out.
    pub excluded_pages: u64,
    /// What the proof of the filter has shown, if it was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proof>,
    /// Pages of the seeded pattern that were checked.
    pub pattern_pages: u64,
    /// Tasks each reader listed.
    pub tasks: BTreeMap<String, usize>,
    /// Frames of backtraces that `netdump triage` and drgn were compared in; 0 without symbols.
    pub frames_compared: usize,
    /// What `netdump triage` reads otherwise than drgn and the log.
    pub disagreements: usize,
    /// Readers that were not run, with the reason.
    pub skipped: Vec<String>,
    /// Frames lost by the faults, both directions.
    pub frames_lost: u64,
    /// Frames that arrived twice, both directions; so are the following ones.
    pub frames_duplicated: u64,
    /// Frames that later ones overtook.
    pub frames_reordered: u64,
    /// Frames with a wrong bit.
    pub frames_corrupted: u64,
    /// Frames cut short.
    pub frames_truncated: u64,
    /// Frames that took the delay.
    pub frames_delayed: u64,
    /// Datagrams of the guest with a wrong checksum.
    pub datagrams_damaged: u64,
    /// Questions of the guest for the server's hardware address, from its boot on.
    pub asked_by_guest: u64,
    /// Questions to the crashed guest for its hardware address, and its answers.
    pub asked: u64,
    /// The answers.
    pub answered: u64,
    /// Frames of the flood that the guest was given.
    pub flooded: u64,
    /// Frames by which the cards of a crashed guest's 802.3ad bond kept their place in it.
    pub signs_of_life: u64,
    /// Frames lost because there was none in time.
    pub given_up: u64,
    /// Frames lost because a socket of the harness was full.
    pub overruns: u64,
    /// Bytes of the vmcore.
    pub vmcore_bytes: u64,
    /// What cycles of loading, arming and unloading have shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stress: Option<Stress>,
    /// The folder with everything, if it is kept.
    pub folder: Option<PathBuf>,
}

/// The module of the disk that [`Fill::Mixed`] writes to.
const RAM_DISK: &str = "brd";
/// A stage is given up when nothing moves for this long: the larger of the two, so that slow hosts
/// get their time.
const QUIET_MIN: Duration = Duration::from_secs(20);
const QUIET_BOOTS: u32 = 4;
/// The same before it is known how slow this host is.
const QUIET_BEFORE_BOOT: Duration = Duration::from_secs(120);
/// Of that time a machine that does something has had this part of a processor, on a host that is not
/// overloaded. On one that is, it is waited for longer, but not for ever: one that halts has none.
const SHARE_MIN: u32 = 2;
const QUIET_TIMES_MAX: u32 = 6;
/// A port or a reboot can lag behind the memory it belongs to by one turn of this loop.
const TURN: Duration = Duration::from_millis(20);

impl Report {
    fn compared(&mut self, comparison: &Comparison) {
        self.pages_checked = comparison.checked;
        self.pages_different = comparison.different;
        self.excluded_pages = comparison.excluded;
        self.pages_listed = comparison.listed;
        self.listed_different = comparison.listed_different_pages();
        self.listed_different_kinds
            .clone_from(&comparison.listed_different);
    }
}

impl Plan {
    fn arm_options(&self) -> Vec<String> {
        let mut options = vec!["--filter".to_owned(), self.arm_filter.to_string()];
        options.extend(self.keep_user.then(|| "--keep-user".to_owned()));
        options.extend(self.console.then(|| "--console".to_owned()));
        let kdump = self.crash.kdump();
        options.extend(kdump.map(|when| format!("--kdump={when}")));
        options
    }

    /// What the guest's kernel is told.
    fn words(&self) -> String {
        let reserved = self.crash.kdump().map_or("", |_| CRASH_KERNEL);
        format!("{SERIAL_CONSOLE} {reserved}")
    }

    /// The level of the dump: what either side leaves out.
    const fn level(&self) -> u8 {
        self.filter | self.arm_filter
    }

    /// Whether the pattern in the crashing task's memory is to be left out.
    const fn leaves_out_user(&self) -> bool {
        self.level() & FILTER_USER != 0 && !self.keep_user
    }
}

/// The bit of a filter level that stands for user memory.
const FILTER_USER: u8 = 8;

/// Where a run is; shown to people while it goes on.
#[derive(Clone, Debug)]
pub struct Progress {
    /// What is happening.
    pub stage: &'static str,
    /// Since the start of QEMU.
    pub elapsed: Duration,
    /// Bytes of the guest's frames since the crash began.
    pub wire_bytes: u64,
}

/// Everything that exists while the guest runs. Fields are dropped in this order: QEMU first.
struct Machine {
    vm: Vm,
    link: Link,
    server: Server,
    memory: GuestMemory,
    stages: Receiver<(Instant, String)>,
    started: Instant,
}

/// What the guest has said, and when things happened.
#[derive(Default)]
struct Story {
    seen: Observations,
    boot: Option<Duration>,
    kernel: String,
    status: serde_json::Value,
    mac: Mac,
    pattern: Vec<PatternRun>,
    facts: Kernel,
    crash_dir: Option<PathBuf>,
    session: Option<Session>,
    stress: Option<Stress>,
    /// What is done from outside, and how long after the guest said that it crashes; the last first.
    outside: Vec<(Duration, String)>,
    crashing: Option<Instant>,
}

/// How long a link stays down that the crash finds down.
const LINK_DOWN: Duration = Duration::from_secs(3);

/// What is typed into QEMU's monitor for a crash, and when, the last first.
fn outside(crash: Crash, network: Network) -> Vec<(Duration, String)> {
    match (crash, crash.facts().by) {
        // The bond has another card.
        (Crash::LinkDown, _) if network.cards().len() > 1 => {
            vec![(Duration::ZERO, format!("set_link {} off", vm::card_name(0)))]
        }
        (Crash::LinkDown, _) => vec![
            (LINK_DOWN, "set_link wire on".to_owned()),
            (Duration::ZERO, "set_link wire off".to_owned()),
        ],
        (_, By::Monitor(command)) => vec![(CRASH_DELAY, command.to_owned())],
        _ => Vec::new(),
    }
}

/// Runs `plan` with all files in `folder`.
///
/// # Errors
/// If the run could not be made at all: a file is missing, QEMU does not start. What the guest, the
/// module or the server do wrong is a verdict.
pub fn run(
    plan: &Plan,
    seed: u64,
    folder: &Path,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Report> {
    let mut machine = start(plan, seed, folder)?;
    fs::write(folder.join("qemu.txt"), &machine.vm.command_line)?;
    let mut story = Story::default();
    story.seen.end = plan.crash.facts().end;
    story.outside = outside(plan.crash, plan.network);
    follow(&mut machine, &mut story, folder, progress)?;
    story.seen.captured = console(folder).contains(CAPTURED);
    let mut report = Report {
        seed,
        ..describe(plan, &story, &machine)
    };
    if story.seen.session_final && story.seen.end == End::Dump {
        progress(&Progress {
            stage: "judging",
            elapsed: machine.started.elapsed(),
            wire_bytes: report.wire_bytes,
        });
        if let Some(vmlinux) = &plan.vmlinux {
            symbols::add(&mut story.facts, vmlinux)?;
        }
        judge(plan, seed, &mut machine, &mut story, folder, &mut report)?;
    }
    if story.seen.end == End::DumpThenCapture {
        story.seen.missing = story.session.as_ref().and_then(lacking);
    }
    let verdict = story.seen.verdict();
    report.verdict = verdict.name().to_owned();
    report.why = verdict.to_string();
    if verdict != Verdict::Ok {
        fs::write(
            folder.join("observations.txt"),
            format!("{:#?}\n", story.seen),
        )?;
    }
    Ok(report)
}

fn start(plan: &Plan, seed: u64, folder: &Path) -> Result<Machine> {
    let (kernel, release) = kernel_of(&plan.image)?;
    let how = Listen {
        filter: plan.filter,
        ip6: plan.network.ip6,
        events: false,
    };
    let server = Server::start(&plan.netdump, folder, &plan.format, how)?;
    let initramfs = folder.join("initramfs.cpio");
    fs::write(&initramfs, archive(plan, &release, seed, &server.key)?)
        .context("cannot write the initramfs")?;
    let accelerator = Accelerator::probe(&plan.qemu, &kernel)?;
    let memory = GuestMemory::new(plan.memory)?;
    let capture = folder.join("wire.pcap");
    let (link, wire) = Link::start(
        plan.network,
        &[Door::server(server.port)],
        plan.faults,
        &capture,
    )?;
    let (port, guest_port) = UnixStream::pair().context("cannot make the guest's port")?;
    let guest = Guest {
        kernel: &kernel,
        initramfs: &initramfs,
        console: &folder.join("serial.log"),
        errors: &folder.join("qemu.log"),
        cpus: plan.cpus,
        nic: plan.nic,
        cards: plan.network.cards().len(),
        accelerator,
        words: &plan.words(),
    };
    let started = Instant::now();
    let vm = Vm::start(&plan.qemu, &guest, &memory, OwnedFd::from(guest_port), wire)?;
    let stages = listen(port, link.marker())?;
    Ok(Machine {
        vm,
        link,
        server,
        memory,
        stages,
        started,
    })
}

/// The one kernel of an image package, and its release: in /boot under its release's name, or
/// beside its modules, as Debian has it from 7.3 on.
pub(crate) fn kernel_of(image: &Path) -> Result<(PathBuf, String)> {
    let names = |folder: PathBuf| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| {
            (
                entry.path(),
                entry.file_name().to_string_lossy().into_owned(),
            )
        })
    };
    let in_boot = names(image.join("boot"))
        .filter_map(|(path, name)| Some((path, name.strip_prefix("vmlinuz-")?.to_owned())));
    let beside = names(image.join("usr/lib/modules"))
        .map(|(path, release)| (path.join("vmlinuz"), release))
        .filter(|(path, _)| path.exists());
    let mut found: Vec<(PathBuf, String)> = in_boot.chain(beside).collect();
    ensure!(
        found.len() == 1,
        "{} holds {} kernels instead of one; is it an unpacked linux-image package?",
        image.display(),
        found.len()
    );
    found.pop().context("no kernel")
}

fn archive(plan: &Plan, release: &str, seed: u64, key: &Path) -> Result<Vec<u8>> {
    let modules = Modules::open(&plan.image, release)?;
    let mut needed = vec!["virtio_pci", "virtio_console", plan.nic.module()];
    needed.extend((plan.fill == Fill::Mixed).then_some(RAM_DISK));
    needed.extend(plan.network.vlan.map(|_| "8021q"));
    needed.extend(plan.network.over.map(Over::module));
    let modules = modules.closure(&needed)?;
    let mut archive = Initramfs::system(&[
        ("init", &plan.guest_init),
        ("bin/busybox", &plan.busybox),
        ("bin/netdump", &plan.netdump),
    ])?;
    archive.file("netdump.ko", 0o600, &modules::read(&plan.module)?);
    archive.file("crashme.ko", 0o600, &modules::read(&plan.crashme)?);
    archive.copy("key", key)?;
    if plan.crash.kdump().is_some() {
        put_crash_kernel(plan, &mut archive)?;
    }
    let names = archive.modules(&modules);
    let orders = Orders {
        modules: names,
        crash: plan.crash,
        fill: plan.fill,
        seed,
        arm: plan.arm_options(),
        network: plan.network,
        stress: plan.stress,
    };
    archive.file(
        ORDERS_PATH.trim_start_matches('/'),
        0o600,
        &serde_json::to_vec(&orders)?,
    );
    Ok(archive.finish())
}

/// A crash kernel, which is the guest's own, and a system for it that has nothing but the first
/// program.
fn put_crash_kernel(plan: &Plan, archive: &mut Initramfs) -> Result<()> {
    let (kernel, _) = kernel_of(&plan.image)?;
    let system = Initramfs::system(&[("init", &plan.guest_init)])?;
    archive.directory("capture");
    archive.copy(CAPTURE_KERNEL.trim_start_matches('/'), &kernel)?;
    let initramfs = CAPTURE_INITRAMFS.trim_start_matches('/');
    archive.file(initramfs, 0o600, &system.finish());
    Ok(())
}

/// Reads the port in a thread, so that each line has the time it was told. The thread does not
/// decode lines, because the one about the kernel takes long and the one about the crash comes soon
/// after it.
fn listen(port: UnixStream, marker: Marker) -> Result<Receiver<(Instant, String)>> {
    let crashing = serde_json::to_string(&Stage::Crashing)?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(port).lines().map_while(Result::ok) {
            let now = Instant::now();
            if line == crashing {
                marker.mark(CRASH_DELAY);
            }
            if sender.send((now, line)).is_err() {
                break;
            }
        }
    });
    Ok(receiver)
}

/// Follows the guest until its session is over and it has rebooted, or nothing moves any more.
fn follow(
    machine: &mut Machine,
    story: &mut Story,
    folder: &Path,
    progress: &mut dyn FnMut(&Progress),
) -> Result<()> {
    let mut moved = (Instant::now(), (0, 0, 0));
    let mut ran = machine.vm.cpu_time();
    loop {
        machine.server.check()?;
        let told = hear(machine, story)?;
        let stopped = [
            &story.seen.failure,
            &story.seen.refused,
            &story.seen.impossible,
        ];
        if stopped.iter().any(|why| why.is_some()) {
            return Ok(());
        }
        act(machine, story)?;
        look(machine, story)?;
        if story.seen.rebooted && (story.seen.session_final || story.seen.end != End::Dump) {
            return Ok(());
        }
        if story.seen.rebooted && !story.seen.armed {
            story.seen.failure = Some("the guest ended by itself".to_owned());
            return Ok(());
        }
        let marks = (
            machine.link.counters.guest_frames.load(Ordering::Relaxed),
            fs::metadata(folder.join("serial.log")).map_or(0, |file| file.len()),
            story.crash_dir.as_deref().map_or(0, folder_bytes),
        );
        if told || marks != moved.1 {
            moved = (Instant::now(), marks);
            ran = machine.vm.cpu_time();
        }
        let quiet = story
            .boot
            .map_or(QUIET_BEFORE_BOOT, |boot| QUIET_MIN.max(boot * QUIET_BOOTS));
        let had_time = machine.vm.cpu_time().saturating_sub(ran) * SHARE_MIN > quiet;
        if moved.0.elapsed() > quiet * if had_time { 1 } else { QUIET_TIMES_MAX } {
            return Ok(());
        }
        progress(&Progress {
            stage: stage_name(&story.seen),
            elapsed: machine.started.elapsed(),
            wire_bytes: machine.link.bytes_since_mark(),
        });
        thread::sleep(TURN);
    }
}

/// "52:54:00:12:34:56" as bytes; what is no such address is no address of a frame either.
fn mac_of(text: &str) -> Mac {
    let mut mac = Mac::default();
    for (byte, digits) in mac.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(digits, 16).unwrap_or(0);
    }
    mac
}

fn stage_name(seen: &Observations) -> &'static str {
    match seen {
        Observations { booted: false, .. } => "booting",
        Observations { armed: false, .. } => "arming",
        Observations {
            first_packet: false,
            ..
        } => "crashed, waiting for the first packet",
        Observations {
            session_final: false,
            ..
        } => "receiving",
        _ => "waiting for the reboot",
    }
}

/// Takes what the guest has told; whether there was anything.
fn hear(machine: &Machine, story: &mut Story) -> Result<bool> {
    let mut told = false;
    loop {
        let (when, line) = match machine.stages.try_recv() {
            Ok(told) => told,
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(told),
        };
        told = true;
        let stage = serde_json::from_str(&line).unwrap_or_else(|error| Stage::Failed {
            why: format!("a garbled line on the port ({error}): {line:?}"),
        });
        match stage {
            Stage::Booted { kernel } => {
                story.seen.booted = true;
                story.boot = Some(when - machine.started);
                story.kernel = kernel;
            }
            Stage::Configured { mac } => story.mac = mac_of(&mac),
            Stage::Armed { status } => story.status = status,
            Stage::Pattern { pages } => story.pattern = pages,
            Stage::Kernel(facts) => story.facts = facts,
            Stage::Stressed(found) => story.stress = Some(found),
            Stage::Crashing => {
                story.seen.armed = true;
                story.crashing = Some(when);
            }
            Stage::Refused { why } => {
                story.seen.refused = Some(why);
                return Ok(told);
            }
            Stage::Impossible { why } => {
                story.seen.impossible = Some(why);
                return Ok(told);
            }
            Stage::Failed { why } => {
                story.seen.failure = Some(why);
                return Ok(told);
            }
        }
    }
}

/// Does what is to be done from outside, when it is time.
fn act(machine: &mut Machine, story: &mut Story) -> Result<()> {
    let Some(crashing) = story.crashing else {
        return Ok(());
    };
    while let Some((_, command)) = story
        .outside
        .pop_if(|(after, _)| crashing.elapsed() >= *after)
    {
        let arguments = serde_json::json!({ "command-line": command });
        let answer = machine
            .vm
            .qmp
            .command("human-monitor-command", &arguments)?;
        let said = answer.as_str().unwrap_or_default().trim();
        ensure!(said.is_empty(), "QEMU answers {command} with: {said}");
    }
    Ok(())
}

/// Looks at the wire, at QEMU and at the server.
fn look(machine: &mut Machine, story: &mut Story) -> Result<()> {
    story.seen.first_packet |= story.seen.armed && machine.link.first_datagram().is_some();
    story.seen.wire_mb = machine.link.bytes_since_mark() / 1_000_000;
    story.seen.rebooted = machine.vm.qmp.shutdown()? == Some("guest-reset");
    if story.seen.first_packet && story.crash_dir.is_none() {
        story.crash_dir = machine.server.crash_dir()?;
    }
    if let Some(folder) = &story.crash_dir {
        let session = Server::session(folder)?;
        story.seen.session_final = session.is_final();
        story.session = Some(session);
    }
    Ok(())
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .map(|file| file.len())
        .sum()
}

fn describe(plan: &Plan, story: &Story, machine: &Machine) -> Report {
    let counters = &machine.link.counters;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mishaps = |which: fn(&Mishaps) -> &AtomicU64| -> u64 {
        let both = counters.mishaps.iter();
        both.map(|mishaps| count(which(mishaps))).sum()
    };
    let dump_s = machine
        .link
        .session_time()
        .map_or(0.0, |time| time.as_secs_f64());
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Report {
        kernel: story.kernel.clone(),
        nic: plan.nic.name().to_owned(),
        crash: plan.crash.name().to_owned(),
        accel: machine.vm.accelerator.name().to_owned(),
        loss_percent: plan.faults.loss_percent,
        delay_ms: plan.faults.delay.as_secs_f64() * 1000.0,
        network: plan.network,
        memory_bytes: plan.memory,
        boot_ms: story.boot.map_or(0, milliseconds),
        first_packet_ms: machine.link.first_datagram().map(milliseconds),
        dump_s,
        wire_bytes: machine.link.bytes_since_mark(),
        memory_mb_s: if dump_s > 0.0 {
            megabytes(plan.memory) / dump_s
        } else {
            0.0
        },
        armed_kib: armed_kib(&story.status),
        frames_lost: mishaps(|mishaps| &mishaps.lost),
        frames_duplicated: mishaps(|mishaps| &mishaps.duplicated),
        frames_reordered: mishaps(|mishaps| &mishaps.reordered),
        frames_corrupted: mishaps(|mishaps| &mishaps.corrupted),
        frames_truncated: mishaps(|mishaps| &mishaps.truncated),
        frames_delayed: mishaps(|mishaps| &mishaps.delayed),
        datagrams_damaged: count(&counters.damaged),
        asked_by_guest: count(&counters.asked_by_guest),
        asked: count(&counters.asked),
        answered: count(&counters.answered),
        flooded: count(&counters.flooded),
        signs_of_life: count(&counters.signs_of_life),
        given_up: count(&counters.given_up),
        overruns: count(&counters.overruns),
        stress: story.stress.clone(),
        ..Report::default()
    }
}

/// Memory the armed module holds, from what `netdump status --json` printed.
fn armed_kib(status: &serde_json::Value) -> Option<u64> {
    Some(
        status
            .pointer("/arming/memory/total")?
            .as_u64()?
            .div_ceil(1024),
    )
}

fn megabytes(bytes: u64) -> f64 {
    let exact = u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
    f64::from(exact) * 1024.0 / 1e6
}

/// What a session lacks in the server's own words; nothing if it is complete.
fn lacking(session: &Session) -> Option<String> {
    let why = session.why.as_deref();
    let why = why.unwrap_or("the server does not say why");
    (session.state != "complete").then(|| format!("the server calls it {}: {why}", session.state))
}

/// Compares and reads the vmcore, with the machine paused.
fn judge(
    plan: &Plan,
    seed: u64,
    machine: &mut Machine,
    story: &mut Story,
    folder: &Path,
    report: &mut Report,
) -> Result<()> {
    let (Some(session), Some(crash_dir)) = (&story.session, &story.crash_dir) else {
        bail!("a session without files")
    };
    story.seen.missing = lacking(session);
    if story.seen.missing.is_some() {
        return Ok(());
    }
    if !story.seen.rebooted {
        machine.vm.qmp.command("stop", &serde_json::json!({}))?;
    }
    check_map(machine, folder)?;
    let vmcore = crash_dir.join("vmcore");
    report.vmcore_bytes = fs::metadata(&vmcore).map_or(0, |file| file.len());
    let mut reader = match Reader::open(&vmcore) {
        Ok(reader) => reader,
        Err(error) => {
            story
                .seen
                .unreadable
                .push(("dump".to_owned(), error.to_string()));
            return Ok(());
        }
    };
    let mut page = |pfn: u64, page: &mut oracle::Page| Ok(reader.read_page(Pfn(pfn), page)?);
    let kernel = KernelView::new(&machine.memory, &story.facts, plan.cpus);
    let written = Written::new(&session.written);
    let rings = rings(&mut machine.vm.qmp, plan.nic, &machine.memory)?;
    let buffers = buffer_blocks(&machine.memory, &rings);
    let rules = Rules {
        memory: &machine.memory,
        kernel: &kernel,
        mac: story.mac,
        rings: &rings,
        buffers: &buffers,
        bounce: bounce_buffers(&console(folder)),
        faults: plan.crash.faults_in_dump(),
    };
    let comparison = oracle::compare(&story.facts.ram, &written, &rules, &mut page)?;
    let damage = oracle::pattern_damage(&story.pattern, seed, plan.leaves_out_user(), &mut page)?;
    write_differences(folder, &comparison)?;
    report.compared(&comparison);
    report.filter = session.filter;
    report.pattern_pages = story.pattern.iter().map(|run| run.pages).sum();
    story.seen.missing = missing(&comparison, report, plan.level());
    let spoiled = damage
        .first()
        .map(|what| (0, format!("{} of the pattern, first: {what}", damage.len())));
    story.seen.mismatch = comparison.examples.first().cloned().or(spoiled);
    let mut unreadable = read(plan, session, &vmcore, crash_dir, folder, report)?;
    unreadable.extend(judge_hardware(plan, machine, crash_dir)?);
    unreadable.extend(prove_filter(
        plan,
        &vmcore,
        &machine.memory,
        &written,
        folder,
        report,
    )?);
    story.seen.unreadable.append(&mut unreadable);
    Ok(())
}

/// Judges what the server kept of the hardware.
fn judge_hardware(
    plan: &Plan,
    machine: &mut Machine,
    crash_dir: &Path,
) -> Result<Vec<(String, String)>> {
    let nothing = serde_json::json!({});
    let pci = machine.vm.qmp.command("query-pci", &nothing)?;
    let complaints = hardware::judge(&hardware::Wanted {
        netdump: &plan.netdump,
        crash_dir,
        crash: plan.crash,
        cpus: plan.cpus,
        pci: &pci,
        nic: plan.nic.name(),
    })?;
    let named = |why| ("hardware".to_owned(), why);
    Ok(complaints.into_iter().map(named).collect())
}

/// What the guest's serial console wrote.
fn console(folder: &Path) -> String {
    let bytes = fs::read(folder.join("serial.log")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Proves the filter, if all that takes is there.
fn prove_filter(
    plan: &Plan,
    vmcore: &Path,
    memory: &GuestMemory,
    written: &Written,
    folder: &Path,
    report: &mut Report,
) -> Result<Vec<(String, String)>> {
    let (Some(makedumpfile), Some(vmlinux), Some(drgn), Some(crash)) = (
        &plan.makedumpfile,
        &plan.vmlinux,
        &plan.drgn,
        &plan.crash_reader,
    ) else {
        return Ok(Vec::new());
    };
    let (proof, complaints) = prove(&Case {
        vmcore,
        folder,
        memory,
        written,
        level: plan.level(),
        keep_user: plan.keep_user,
        vmlinux,
        drgn,
        crash,
        makedumpfile,
    })?;
    report.proof = Some(proof);
    let named = |why| ("filter".to_owned(), why);
    Ok(complaints.into_iter().map(named).collect())
}

/// What the vmcore or the test itself lacks.
fn missing(comparison: &Comparison, report: &Report, level: u8) -> Option<String> {
    let Comparison {
        checked,
        absent,
        excluded,
        unreadable,
        firmware,
        ..
    } = comparison;
    if report.filter != level {
        let used = report.filter;
        return Some(format!("filter level {used} was used instead of {level}"));
    }
    if (level == 0) != (*excluded == 0) {
        return Some(format!(
            "{excluded} pages are excluded at filter level {level}"
        ));
    }
    if *absent + *unreadable > 0 {
        return Some(format!(
            "{absent} pages are absent and {unreadable} unreadable, of {checked}"
        ));
    }
    if *firmware > FIRMWARE_PAGES_MAX {
        return Some(format!(
            "{firmware} pages of QEMU's RAM are not System RAM; the firmware needs fewer"
        ));
    }
    (report.pattern_pages == 0).then(|| "the guest placed no pattern".to_owned())
}

/// The harness's map of the guest's RAM must be QEMU's: first and last page of each range.
fn check_map(machine: &mut Machine, folder: &Path) -> Result<()> {
    let scratch = folder.join("page");
    for (start, end) in machine.memory.ranges() {
        for address in [start, start + (1 << 20), end - 4096] {
            let saved = machine.vm.saved_page(address, &scratch)?;
            let mapped = machine.memory.read(address, saved.len());
            ensure!(
                mapped == Some(&saved),
                "QEMU's page at {address:#x} is not the mapped one; memory.rs has the wrong map"
            );
        }
    }
    fs::remove_file(&scratch).context("cannot remove the scratch page")
}

fn write_differences(folder: &Path, comparison: &Comparison) -> Result<()> {
    let lines: Vec<String> = comparison
        .examples
        .iter()
        .map(|(pfn, what)| format!("{pfn:#x}: {what}\n"))
        .collect();
    fs::write(folder.join("differences.txt"), lines.concat())
        .context("cannot write the differences")
}

/// Reads the server's log of the live messages; gives who complains and why.
fn read_streamed(crash_dir: &Path, console: &[String]) -> Result<Vec<(String, String)>> {
    let streamed = server::console_log(crash_dir)?;
    let complaints = readers::judge_streamed(&streamed, console).into_iter();
    Ok(complaints
        .map(|why| ("console log".to_owned(), why))
        .collect())
}

/// Lets everybody who reads vmcores and logs read; gives who complains and why.
fn read(
    plan: &Plan,
    session: &Session,
    vmcore: &Path,
    crash_dir: &Path,
    folder: &Path,
    report: &mut Report,
) -> Result<Vec<(String, String)>> {
    let serial = fs::read(folder.join("serial.log")).context("cannot read the serial console")?;
    let console = readers::console_messages(&String::from_utf8_lossy(&serial));
    let facts = plan.crash.facts();
    let expected = Expected {
        function: facts.function,
        anywhere: facts.on == On::Other,
        cpus: plan.cpus,
        console: readers::before_state(&console),
    };
    let mut found = Vec::new();
    let log = fs::read(crash_dir.join("log")).context("cannot read the log of the crash")?;
    found.extend(
        readers::judge_log(&String::from_utf8_lossy(&log), &console)
            .into_iter()
            .map(|why| ("log".to_owned(), why)),
    );
    let threads_min = plan.crash.threads_min();
    found.extend(
        threads_min
            .map(|least| readers::judge_state(&String::from_utf8_lossy(&log), least))
            .into_iter()
            .flatten()
            .map(|why| ("state".to_owned(), why)),
    );
    if plan.console {
        found.extend(read_streamed(crash_dir, expected.console)?);
    }
    if (session.cpus, session.cpus_captured) != (plan.cpus, plan.cpus) {
        let why = format!(
            "{} of {} CPUs captured, {} exist",
            session.cpus_captured, session.cpus, plan.cpus
        );
        found.push(("session.json".to_owned(), why));
    }
    found.extend(debuggers(plan, vmcore, &expected, report));
    found.extend(triage(
        plan,
        vmcore,
        &crash_dir.join("log"),
        &expected,
        report,
    ));
    Ok(found)
}

/// Lets drgn and crash read, where they and the kernel's symbols are given; gives who complains and
/// why.
fn debuggers(
    plan: &Plan,
    vmcore: &Path,
    expected: &Expected<'_>,
    report: &mut Report,
) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for name in ["drgn", "crash"] {
        let result = match (name, &plan.vmlinux, &plan.drgn, &plan.crash_reader) {
            ("drgn", Some(vmlinux), Some(python), _) => readers::drgn(
                python,
                vmcore,
                &[vmlinux, &plan.crashme, &plan.module],
                expected,
            ),
            ("crash", Some(vmlinux), _, Some(reader)) => {
                readers::crash(reader, vmcore, vmlinux, expected)
            }
            _ => {
                report.skipped.push(format!(
                    "{name}: no kernel with symbols or no path to {name} was given"
                ));
                continue;
            }
        };
        match result {
            Ok((complaints, tasks)) => {
                report.tasks.insert(name.to_owned(), tasks);
                found.extend(complaints.into_iter().map(|why| (name.to_owned(), why)));
            }
            Err(error) => found.push((name.to_owned(), format!("{error:#}"))),
        }
    }
    found
}

/// What `netdump triage` reads in the vmcore, compared with its log and with drgn.
fn triage(
    plan: &Plan,
    vmcore: &Path,
    log: &Path,
    expected: &Expected<'_>,
    report: &mut Report,
) -> Vec<(String, String)> {
    let symbols = plan.vmlinux.as_ref().map(|vmlinux| {
        let files: [&Path; 3] = [vmlinux, &plan.crashme, &plan.module];
        files
    });
    let drgn = match (&plan.drgn, &symbols) {
        (Some(python), Some(symbols)) => Some((python.as_path(), symbols.as_slice())),
        _ => None,
    };
    let named = |why| ("triage".to_owned(), why);
    match agreement::triage(&plan.netdump, vmcore, log, drgn, expected) {
        Ok((complaints, agreement)) => {
            report.tasks.insert("triage".to_owned(), agreement.tasks);
            report.frames_compared = agreement.frames;
            report.disagreements = complaints.len();
            complaints.into_iter().map(named).collect()
        }
        Err(error) => vec![named(format!("{error:#}"))],
    }
}
