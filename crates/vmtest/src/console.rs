//! `vmtest console`: a guest whose kernel messages go to a real `netdump serve` and, if there is
//! one, to a real rsyslogd, by in-tree netconsole or by our module, over a wire with faults.
//!
//! The guest prints a known variety of messages and has its kernel print some, tells the harness
//! what its own `/dev/kmsg` then holds, and crashes if it is to. The wire keeps every datagram on
//! both of its ends, so what was lost is known exactly, not estimated. `judge` holds against each
//! other what was printed, sent, received and kept.

mod judge;
pub mod message;
mod syslog;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use self::judge::Tally;

use self::judge::{Evidence, judge};
use self::message::{Entry, Message};
use self::syslog::Rsyslog;
use crate::initramfs::Initramfs;
use crate::link::{Door, Link};
use crate::memory::GuestMemory;
use crate::modules::{self, Modules};
use crate::readers;
use crate::road::{Faults, Mishaps};
use crate::run::kernel_of;
use crate::server::{Figures, HOST_NAME, Listen, Server};
use crate::stage::{Network, ORDERS_PATH, SERVER_PORT};
use crate::vm::{Accelerator, Guest, Nic, SERIAL_CONSOLE, Vm};

/// The UDP port of syslog, as the guest sees it.
pub const SYSLOG_PORT: u16 = 514;
/// The first message of the variety.
pub const BEGIN: &str = "vmtest: the messages begin";
/// What the guest adds to each message where netconsole can: the second is so long that many
/// messages come in fragments.
pub static USERDATA: LazyLock<[(&str, String); 2]> = LazyLock::new(|| {
    [
        ("rack", "r 12".to_owned()),
        ("note", "0123456789".repeat(16)),
    ]
});
/// What the kernel adds where it can: netconsole's name for it, and the key in a message.
pub const SYSDATA: [(&str, &str); 4] = [
    ("cpu_nr", "cpu"),
    ("taskname", "taskname"),
    ("sysdata_release", "release"),
    ("msgid", "msgid"),
];
/// Where a crash kernel and its first file system lie in the guest.
pub const CRASH_KERNEL: [&str; 2] = ["/vmlinuz", "/capture.cpio"];
/// Its command line.
pub const CAPTURE_LINE: &str =
    "console=ttyS0,115200 printk.time=1 reset_devices nr_cpus=1 irqpoll panic=5";
/// What the first program of a crash kernel says.
pub const CAPTURE_WORDS: &str = "console_init: the crash kernel runs";
/// Memory of the guest: what boots in little time, and what a crash kernel takes beside that.
const MEMORY_BYTES: u64 = 384 << 20;
const CAPTURE_MIB: u64 = 192;
const CPUS: u32 = 2;
/// Messages that the guest times with each way of sending, and how many ways end at our server.
pub const MEASURED_MESSAGES: u32 = 1000;
const MEASURED_SENDERS: u64 = 3;
/// A log buffer that holds everything, so that the guest's own log is whole.
const LOG_BUFFER: &str = "log_buf_len=8M";
/// The guest is given up when it has not come to its crash after this.
const PATIENCE: Duration = Duration::from_secs(240);
/// The same when it is timed what messages cost: tens of thousands, a millisecond apart.
const PATIENCE_MEASURING: Duration = Duration::from_secs(600);
/// It is over when the wire and the console have been quiet for this long.
const QUIET: Duration = Duration::from_secs(3);
/// What may still be waited for in the server when the wire is quiet: holes in the order.
const SETTLE: Duration = Duration::from_secs(1);
const TURN: Duration = Duration::from_millis(20);

/// Who sends the guest's messages.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Sender {
    /// In-tree netconsole, by its module parameter: lines as a console shows them.
    Basic,
    /// In-tree netconsole, by configfs, with all that this kernel's can add.
    Extended,
    /// Our module: sealed to the server, and as syslog.
    Module,
}

/// What the guest is there for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// Messages are printed, sent and compared.
    #[default]
    Speak,
    /// It is timed what a message costs who prints it.
    Measure,
    /// It is the system of a crash kernel, which has only to say that it runs.
    Capture,
}

/// What to run. All paths exist already; nothing is fetched.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the guest is there for.
    pub task: Task,
    /// A crash kernel is loaded, which runs first when the kernel panics.
    pub kdump: bool,
    /// Who sends.
    pub sender: Sender,
    /// The unpacked linux-image package.
    pub image: PathBuf,
    /// netdump.ko for that kernel.
    pub module: PathBuf,
    /// The static netdump program, run on both sides.
    pub netdump: PathBuf,
    /// The static console_init program.
    pub console_init: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// The QEMU program.
    pub qemu: String,
    /// rsyslogd, if it is to take part.
    pub rsyslogd: Option<PathBuf>,
    /// The RFC by which our module speaks to it: "5424" or "3164".
    pub syslog_format: String,
    /// The guest's network device.
    pub nic: Nic,
    /// The kernel panics after the messages.
    pub crash: bool,
    /// What goes wrong on the wire.
    pub faults: Faults,
}

/// What the guest is to do.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Orders {
    /// What for.
    pub task: Task,
    /// Load the crash kernel.
    pub kdump: bool,
    /// Files below /modules, in load order.
    pub modules: Vec<String>,
    /// The same for netconsole; loaded when the network is up.
    pub netconsole: Vec<String>,
    /// Who sends.
    pub sender: Sender,
    /// Somebody listens for syslog, and in this format our module speaks.
    pub syslog: Option<String>,
    /// Lines may be longer than a datagram of basic netconsole.
    pub long_lines: bool,
    /// Panic in the end.
    pub crash: bool,
}

/// A line of the guest on its port.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", tag = "told")]
pub enum Told {
    /// Its first program runs.
    Booted {
        /// `uname -r`.
        kernel: String,
    },
    /// Messages are sent from here on.
    Sending {
        /// What of netconsole was there to be switched on.
        features: Vec<String>,
    },
    /// All messages are printed; what the kernel's log holds.
    Printed {
        /// What each read(2) of `/dev/kmsg` gave.
        records: Vec<String>,
    },
    /// All is timed.
    Measured {
        /// What was found.
        costs: Vec<Cost>,
    },
    /// It cannot go on.
    Failed {
        /// Why, on one line.
        why: String,
    },
}

/// What it costs to print, with one way of sending.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Cost {
    /// The way.
    pub config: String,
    /// Each way has its turn in each round.
    pub round: u32,
    /// Microseconds of a write to `/dev/kmsg`: the median, and what nine of ten take at most.
    pub printk_us: f64,
    /// The second.
    pub printk_p90_us: f64,
}

/// What a run has shown.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// "Ok", "Mismatch", or "NotSent" if the guest did not come so far.
    pub verdict: String,
    /// What is wrong, the first ten things.
    pub why: Vec<String>,
    /// Kernel release.
    pub kernel: String,
    /// Network device.
    pub nic: String,
    /// "basic", "extended" or "module".
    pub sender: String,
    /// What of netconsole was switched on.
    pub features: Vec<String>,
    /// "kvm" or "tcg".
    pub accel: String,
    /// The kernel panicked.
    pub crash: bool,
    /// A crash kernel ran then.
    pub kdump: bool,
    /// What it costs to print, if that was measured.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub costs: Vec<Cost>,
    /// Seed of the faults.
    pub seed: u64,
    /// How much was compared.
    #[serde(flatten)]
    pub tally: Tally,
    /// What the server counted.
    pub figures: Figures,
    /// Frames of the guest that the wire lost, doubled and put out of order.
    pub frames_lost: u64,
    /// Doubled.
    pub frames_duplicated: u64,
    /// Out of order.
    pub frames_reordered: u64,
    /// Seconds of it all.
    pub seconds: f64,
    /// What did not take part, and why.
    pub skipped: Vec<String>,
    /// The folder with everything, if it is kept.
    pub folder: Option<PathBuf>,
}

/// Everything that exists while the guest runs. Fields are dropped in this order: QEMU first.
struct Machine {
    vm: Vm,
    link: Link,
    doors: Vec<Door>,
    server: Server,
    rsyslog: Option<Rsyslog>,
    told: Receiver<String>,
    /// The guest is to crash, and what its console says then.
    crash: Option<&'static str>,
    /// The guest is given up then.
    patience: Duration,
}

impl Plan {
    fn memory_bytes(&self) -> u64 {
        MEMORY_BYTES + if self.kdump { CAPTURE_MIB << 20 } else { 0 }
    }

    /// Words of the kernel's command line.
    fn words(&self) -> String {
        let console = match self.task {
            // The serial line would take longer than all that is measured.
            Task::Measure => "console=tty0",
            Task::Speak | Task::Capture => SERIAL_CONSOLE,
        };
        let reserve = if self.kdump {
            format!(" crashkernel={CAPTURE_MIB}M")
        } else {
            String::new()
        };
        format!("{console} {LOG_BUFFER}{reserve}")
    }

    /// rsyslogd, for a sender that it understands: extended netconsole is no syslog.
    fn rsyslogd(&self) -> Option<&Path> {
        let program = self.rsyslogd.as_deref();
        program.filter(|_| self.sender != Sender::Extended)
    }
}

/// Runs `plan` with all files in `folder`; `say` is told where it is.
///
/// # Errors
/// If the run could not be made at all. What guest, module or server do wrong is in the report.
pub fn run(plan: &Plan, folder: &Path, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let started = Instant::now();
    let mut machine = start(plan, folder)?;
    say("booting");
    let mut evidence = Evidence {
        faults: plan.faults.is_some(),
        ..Evidence::default()
    };
    let mut report = Report {
        nic: plan.nic.name().to_owned(),
        sender: name(plan.sender),
        accel: machine.vm.accelerator.name().to_owned(),
        crash: plan.crash,
        kdump: plan.kdump,
        seed: plan.faults.seed,
        ..Report::default()
    };
    let why = follow(&mut machine, &mut evidence, folder, say)?;
    report.kernel.clone_from(&evidence.kernel);
    report.features.clone_from(&evidence.features);
    if let Some(why) = why {
        report.verdict = "NotSent".to_owned();
        report.why.push(why);
        return Ok(report);
    }
    say("judging");
    report.costs = std::mem::take(&mut evidence.costs);
    if plan.task == Task::Measure {
        let count = report.costs.len();
        report.figures = machine.server.end()?;
        report.verdict = judge_costs(&report).to_owned();
        report.why.push(format!("{count} ways and rounds"));
        report.seconds = started.elapsed().as_secs_f64();
        return Ok(report);
    }
    finish(plan, machine, folder, &mut evidence, &mut report)?;
    keep_datagrams(folder, &evidence.server.sent)?;
    let (tally, found) = judge(plan.sender, &evidence);
    report.verdict = if found.is_empty() { "Ok" } else { "Mismatch" }.to_owned();
    fs::write(folder.join("differences.txt"), found.join("\n"))?;
    report.why.extend(found.into_iter().take(10));
    (report.tally, report.figures) = (tally, evidence.figures);
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Whether what was timed was sent: a sender that sends nothing costs nothing.
fn judge_costs(report: &Report) -> &'static str {
    let rounds = report.costs.iter().map(|cost| cost.round + 1).max();
    // In each round as many as the guest prints, by each of the ways that end at our server.
    let wanted = u64::from(rounds.unwrap_or(0)) * u64::from(MEASURED_MESSAGES) * MEASURED_SENDERS;
    let is_sent = report.figures.written >= wanted && wanted > 0;
    if is_sent { "Ok" } else { "Mismatch" }
}

/// The name of a choice on the command line.
fn name(choice: impl ValueEnum) -> String {
    let value = choice.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

fn start(plan: &Plan, folder: &Path) -> Result<Machine> {
    let (kernel, release) = kernel_of(&plan.image)?;
    let how = Listen {
        filter: 31,
        ip6: false,
        events: true,
    };
    let server = Server::start(&plan.netdump, folder, "kdump", how)?;
    let rsyslog = plan
        .rsyslogd()
        .map(|program| Rsyslog::start(program, folder))
        .transpose()?;
    let initramfs = folder.join("initramfs.cpio");
    fs::write(&initramfs, archive(plan, (&kernel, &release), &server.key)?)
        .context("cannot write the initramfs")?;
    let accelerator = Accelerator::probe(&plan.qemu, &kernel)?;
    let memory = GuestMemory::new(plan.memory_bytes())?;
    let mut doors = vec![Door::tapped(SERVER_PORT, server.port)];
    doors.extend(
        rsyslog
            .as_ref()
            .map(|to| Door::tapped(SYSLOG_PORT, to.port)),
    );
    let capture = folder.join("wire.pcap");
    let (link, wire) = Link::start(Network::default(), &doors, plan.faults, &capture)?;
    let (port, guest_port) = UnixStream::pair().context("cannot make the guest's port")?;
    let guest = Guest {
        kernel: &kernel,
        initramfs: &initramfs,
        console: &folder.join("serial.log"),
        errors: &folder.join("qemu.log"),
        cpus: CPUS,
        nic: plan.nic,
        cards: 1,
        accelerator,
        words: &plan.words(),
    };
    let vm = Vm::start(&plan.qemu, &guest, &memory, OwnedFd::from(guest_port), wire)?;
    fs::write(folder.join("qemu.txt"), &vm.command_line)?;
    let (sender, told) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(port).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    Ok(Machine {
        vm,
        link,
        doors,
        server,
        rsyslog,
        told,
        crash: match (plan.crash, plan.kdump) {
            (false, _) => None,
            (true, false) => Some(CRASH_WORDS),
            (true, true) => Some(CAPTURE_WORDS),
        },
        patience: match plan.task {
            Task::Measure => PATIENCE_MEASURING,
            Task::Speak | Task::Capture => PATIENCE,
        },
    })
}

fn archive(plan: &Plan, (kernel, release): (&Path, &str), key: &Path) -> Result<Vec<u8>> {
    let tree = Modules::open(&plan.image, release)?;
    let mut archive = Initramfs::system(&[
        ("init", &plan.console_init),
        ("bin/busybox", &plan.busybox),
        ("bin/netdump", &plan.netdump),
    ])?;
    archive.file("netdump.ko", 0o600, &modules::read(&plan.module)?);
    archive.copy("key", key)?;
    let first = tree.closure(&["virtio_pci", "virtio_console", plan.nic.module()])?;
    let mut later = tree.closure(&["configfs", "netconsole"])?;
    later.retain(|module| first.iter().all(|there| there.name != module.name));
    let orders = Orders {
        task: plan.task,
        kdump: plan.kdump,
        modules: archive.modules(&first),
        netconsole: archive.modules(&later),
        sender: plan.sender,
        syslog: plan
            .rsyslogd()
            .is_some()
            .then(|| plan.syslog_format.clone()),
        long_lines: plan.sender != Sender::Basic || !plan.faults.is_some(),
        crash: plan.crash,
    };
    put_orders(&mut archive, &orders)?;
    if plan.kdump {
        let [to, capture] = CRASH_KERNEL.map(|path| path.trim_start_matches('/'));
        archive.copy(to, kernel)?;
        archive.file(capture, 0o600, &capture_archive(plan, &orders)?);
    }
    Ok(archive.finish())
}

/// The first file system of the crash kernel.
fn capture_archive(plan: &Plan, orders: &Orders) -> Result<Vec<u8>> {
    let mut archive = Initramfs::system(&[("init", &plan.console_init)])?;
    let orders = Orders {
        task: Task::Capture,
        modules: Vec::new(),
        ..orders.clone()
    };
    put_orders(&mut archive, &orders)?;
    Ok(archive.finish())
}

fn put_orders(archive: &mut Initramfs, orders: &Orders) -> Result<()> {
    let path = ORDERS_PATH.trim_start_matches('/');
    archive.file(path, 0o600, &serde_json::to_vec(orders)?);
    Ok(())
}

/// Follows the guest until all is quiet after its messages, and its crash if there is to be one;
/// says why it did not come so far, if it did not.
fn follow(
    machine: &mut Machine,
    evidence: &mut Evidence,
    folder: &Path,
    say: &mut dyn FnMut(&str),
) -> Result<Option<String>> {
    let begin = Instant::now();
    let (mut printed, mut moved) = (false, (Instant::now(), (0, 0)));
    loop {
        machine.server.check()?;
        while let Ok(line) = machine.told.try_recv() {
            let told = serde_json::from_str(&line)
                .with_context(|| format!("a garbled line of the guest: {line:.200?}"))?;
            match told {
                Told::Booted { kernel } => evidence.kernel = kernel,
                Told::Sending { features } => {
                    say("sending");
                    evidence.features = features;
                }
                Told::Printed { records } => {
                    fs::write(folder.join("kmsg.txt"), records.concat())?;
                    let parsed = records.iter().filter_map(|record| Message::parse(record));
                    evidence.truth = parsed.collect();
                    let (all, read) = (records.len(), evidence.truth.len());
                    ensure!(
                        read == all,
                        "{} of {all} records cannot be read",
                        all - read
                    );
                    printed = true;
                }
                Told::Measured { costs } => {
                    evidence.costs = costs;
                    thread::sleep(SETTLE);
                    return Ok(None);
                }
                Told::Failed { why } => return Ok(Some(why)),
            }
        }
        let marks = (
            machine.link.counters.guest_frames.load(Ordering::Relaxed),
            fs::metadata(folder.join("serial.log")).map_or(0, |file| file.len()),
        );
        if marks != moved.1 {
            moved = (Instant::now(), marks);
        }
        let is_over = || {
            machine
                .crash
                .is_none_or(|words| said(folder).contains(words))
        };
        if printed && moved.0.elapsed() > QUIET && is_over() {
            return Ok(None);
        }
        if begin.elapsed() > machine.patience {
            let seconds = machine.patience.as_secs();
            return Ok(Some(format!(
                "the guest did not end in {seconds} s: see serial.log"
            )));
        }
        thread::sleep(TURN);
    }
}

/// Ends everything in order, and gathers what each has.
fn finish(
    plan: &Plan,
    machine: Machine,
    folder: &Path,
    evidence: &mut Evidence,
    report: &mut Report,
) -> Result<()> {
    let Machine {
        vm,
        link,
        doors,
        mut server,
        rsyslog,
        told,
        crash,
        patience: _,
    } = machine;
    drop((vm, told));
    let count = |which: fn(&Mishaps) -> &AtomicU64| {
        which(&link.counters.mishaps[0]).load(Ordering::Relaxed)
    };
    report.frames_lost = count(|mishaps| &mishaps.lost);
    report.frames_duplicated = count(|mishaps| &mishaps.duplicated);
    report.frames_reordered = count(|mishaps| &mishaps.reordered);
    let overruns = link.counters.overruns.load(Ordering::Relaxed);
    ensure!(
        overruns == 0,
        "the harness itself lost {overruns} datagrams: run it again"
    );
    link.stop()?;
    thread::sleep(SETTLE);
    evidence.figures = server.end()?;
    evidence.server = doors.first().map(Door::passed).unwrap_or_default();
    let to_rsyslog = doors.get(1).map(Door::passed).unwrap_or_default();
    match rsyslog {
        Some(rsyslog) => evidence.syslog = Some((to_rsyslog, rsyslog.end()?)),
        None if plan.sender == Sender::Extended => {}
        None => report
            .skipped
            .push("rsyslogd: no path to it was given".to_owned()),
    }
    let host = match plan.sender {
        Sender::Module => HOST_NAME,
        Sender::Basic | Sender::Extended => "127.0.0.1",
    };
    evidence.log = log_of(&plan.netdump, server.dumpdir(), host)?;
    if crash.is_some() {
        let lines = readers::console_messages(&said(folder));
        let from = lines.iter().position(|line| line.contains(CRASH_WORDS));
        let crash = &lines[from.context("the guest did not crash")?..];
        // The crash kernel's own messages are none of this one's.
        let other = crash.iter().position(|line| line.starts_with(FIRST_WORDS));
        let crash = &crash[..other.unwrap_or(crash.len())];
        evidence.crash = readers::before_state(crash).to_vec();
    }
    Ok(())
}

/// What the guest wrote to its serial console.
fn said(folder: &Path) -> String {
    let serial = fs::read(folder.join("serial.log")).unwrap_or_default();
    String::from_utf8_lossy(&serial).into_owned()
}

/// How the kernel announces the crash that the guest asks for.
const CRASH_WORDS: &str = "sysrq: Trigger a crash";

/// How a kernel begins.
const FIRST_WORDS: &str = "Linux version ";

/// The server's log of a host, as programs read it.
fn log_of(netdump: &Path, dumpdir: &Path, host: &str) -> Result<Vec<Entry>> {
    let output = Command::new(netdump)
        .args(["log", host, "--json", "--dumpdir"])
        .arg(dumpdir)
        .output()
        .with_context(|| format!("cannot run {}", netdump.display()))?;
    if !output.status.success() {
        bail!(
            "netdump log: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let text = String::from_utf8(output.stdout).context("netdump log does not print UTF-8")?;
    let entry = |line| serde_json::from_str(line).context("a line of netdump log is no object");
    text.lines().map(entry).collect()
}

/// Keeps what a real kernel sent, each datagram behind its length in two bytes: the fuzzer's corpus
/// has some of it.
fn keep_datagrams(folder: &Path, sent: &[Vec<u8>]) -> Result<()> {
    let mut file = fs::File::create(folder.join("datagrams"))?;
    for datagram in sent {
        let length = u16::try_from(datagram.len()).unwrap_or(u16::MAX);
        file.write_all(&length.to_le_bytes())?;
        file.write_all(datagram)?;
    }
    Ok(())
}
