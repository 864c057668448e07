//! `vmtest run`: boot, arm, crash, judge. Every path is given; nothing is downloaded.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, Parser, ValueEnum as _};
use indicatif::{ProgressBar, ProgressStyle};
use vmtest::console::{self, Sender, Task};
use vmtest::crash::Crash;
use vmtest::peer::{self, Way};
use vmtest::road::Faults;
use vmtest::run::{Plan, Progress, run};
use vmtest::stage::{Fill, Network, Over};
use vmtest::table::Table;
use vmtest::vm::Nic;

/// Boots a stock kernel in QEMU, crashes it, and judges what netdump received.
#[derive(Debug, Parser)]
#[command(name = "vmtest")]
enum Command {
    /// One virtual machine, one crash, one verdict.
    Run(Box<Options>),
    /// The crashes and the network cards that there are, a line each: what it is, and its name.
    Menu,
    /// The support matrix as a page, of results in the given file.
    Matrix {
        /// Results, a JSON object a line; rewritten in their order, each cell once.
        results: PathBuf,
        /// Lines of kernels, in the order shown.
        #[arg(long, value_delimiter = ',')]
        kernels: Vec<String>,
    },
    /// One guest full of real files, whose dump goes by netdump or by kdump, timed.
    Peer(Box<Peer>),
    /// One guest whose kernel messages go to a server, by in-tree netconsole or by netdump.
    Console(Box<Console>),
}

#[derive(Args, Debug)]
struct Console {
    /// Who sends the messages
    #[arg(long, value_enum)]
    sender: Sender,
    /// Folder of an unpacked linux-image package
    #[arg(long)]
    image: PathBuf,
    /// netdump.ko built for that kernel
    #[arg(long)]
    module: PathBuf,
    /// Static netdump program
    #[arg(long)]
    netdump: PathBuf,
    /// Static console_init program
    #[arg(long)]
    console_init: PathBuf,
    /// Static busybox
    #[arg(long, default_value = "/bin/busybox")]
    busybox: PathBuf,
    /// QEMU program
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: String,
    /// rsyslogd; without it only netdump receives
    #[arg(long)]
    rsyslogd: Option<PathBuf>,
    /// How netdump's module speaks to rsyslogd
    #[arg(long, default_value = "5424", value_parser = ["5424", "3164"])]
    syslog_format: String,
    /// Network device of the guest
    #[arg(long, value_enum, default_value = "virtio-net")]
    nic: Nic,
    /// The kernel does not crash after its messages
    #[arg(long)]
    no_crash: bool,
    /// A crash kernel is loaded, which runs first
    #[arg(long)]
    kdump: bool,
    /// Time what a message costs who prints it, with each way of sending in turn
    #[arg(long)]
    costs: bool,
    #[command(flatten)]
    wire: Wire,
    /// Keep all files of the run in this new folder
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Print the report as one JSON object on the last line
    #[arg(long)]
    json: bool,
}

/// What goes wrong on the wire.
#[derive(Args, Debug)]
struct Wire {
    /// Percent of frames lost on the wire, in each direction
    #[arg(long, default_value = "0", value_parser = parse_percent)]
    loss: f64,
    /// Percent of frames that arrive twice
    #[arg(long, default_value = "0", value_parser = parse_percent)]
    duplicate: f64,
    /// Percent of frames that later ones overtake
    #[arg(long, default_value = "0", value_parser = parse_percent)]
    reorder: f64,
    /// Percent of frames in which a bit changes
    #[arg(long, default_value = "0", value_parser = parse_percent)]
    corrupt: f64,
    /// Percent of frames that are cut short
    #[arg(long, default_value = "0", value_parser = parse_percent)]
    truncate: f64,
    /// Milliseconds that each frame takes from one end to the other
    #[arg(long, default_value = "0", value_parser = parse_milliseconds)]
    delay: Duration,
    /// Seed of the pattern and the faults; a new one each time if not given
    #[arg(long)]
    seed: Option<u64>,
}

impl Wire {
    fn faults(&self) -> Faults {
        let seed = self.seed.unwrap_or_else(|| {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            u64::from(now.subsec_nanos())
        });
        Faults {
            loss_percent: self.loss,
            duplicate_percent: self.duplicate,
            reorder_percent: self.reorder,
            corrupt_percent: self.corrupt,
            truncate_percent: self.truncate,
            delay: self.delay,
            seed,
        }
    }
}

#[derive(Args, Debug)]
struct Peer {
    /// How the dump comes to the server
    #[arg(long, value_enum)]
    way: Way,
    /// Filter level
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=31))]
    level: u8,
    /// MiB of guest RAM
    #[arg(long, default_value = "2048")]
    memory_mib: u64,
    /// Folder of an unpacked linux-image package
    #[arg(long)]
    image: PathBuf,
    /// netdump.ko built for that kernel
    #[arg(long)]
    module: PathBuf,
    /// Static netdump program
    #[arg(long)]
    netdump: PathBuf,
    /// Static peer_init program
    #[arg(long)]
    peer_init: PathBuf,
    /// Static busybox
    #[arg(long, default_value = "/bin/busybox")]
    busybox: PathBuf,
    /// QEMU program
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: String,
    /// Image of a disk with an ext4 full of files
    #[arg(long)]
    files: PathBuf,
    /// Command that starts makedumpfile 1.7.6 or newer: loader, its option, libraries, program
    #[arg(long)]
    makedumpfile: String,
    /// The kernel with symbols
    #[arg(long)]
    vmlinux: PathBuf,
    /// Command that starts crash 8.0.6 or newer, with leading arguments
    #[arg(long)]
    crash_reader: String,
    /// Python interpreter that has drgn
    #[arg(long)]
    drgn: PathBuf,
    /// A new folder for all files of the run
    #[arg(long)]
    keep: PathBuf,
}

#[derive(Args, Debug)]
struct Options {
    /// Folder of an unpacked linux-image package
    #[arg(long)]
    image: PathBuf,
    /// netdump.ko built for that kernel
    #[arg(long)]
    module: PathBuf,
    /// crashme.ko built for that kernel
    #[arg(long)]
    crashme: PathBuf,
    /// Static netdump program, the server on this host and the client's tool in the guest
    #[arg(long)]
    netdump: PathBuf,
    /// Static guest_init program
    #[arg(long)]
    guest_init: PathBuf,
    /// Static busybox
    #[arg(long, default_value = "/bin/busybox")]
    busybox: PathBuf,
    /// QEMU program
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: String,
    /// Network device of the guest
    #[arg(long, value_enum, default_value = "virtio-net")]
    nic: Nic,
    /// How the kernel dies
    #[arg(long, value_enum, default_value = "panic")]
    crash: Crash,
    /// What the guest's memory holds
    #[arg(long, value_enum, default_value = "booted")]
    fill: Fill,
    /// Guest RAM, in bytes or with the suffix M or G
    #[arg(long, default_value = "768M", value_parser = parse_size)]
    memory: u64,
    /// CPUs of the guest
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Guest and server speak IPv6
    #[arg(long)]
    ip6: bool,
    /// Guest and server are on this VLAN
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4094))]
    vlan: Option<u16>,
    /// MTU of the guest's network device
    #[arg(long, value_parser = clap::value_parser!(u32).range(68..=9000))]
    mtu: Option<u32>,
    /// Arm the guest with a first server that does not exist
    #[arg(long)]
    dead_server: bool,
    /// The guest's address is on a device made of its network card, or of two
    #[arg(long, value_enum)]
    over: Option<Over>,
    /// Guest and server flood each other when it crashes
    #[arg(long)]
    traffic: bool,
    #[command(flatten)]
    wire: Wire,
    /// Format of the vmcore
    #[arg(long, default_value = "kdump", value_parser = ["kdump", "elf"])]
    format: String,
    /// Filter level that the server asks for
    #[arg(long, default_value = "0", value_parser = clap::value_parser!(u8).range(0..=31))]
    filter: u8,
    /// Filter level that the guest demands
    #[arg(long, default_value = "0", value_parser = clap::value_parser!(u8).range(0..=31))]
    arm_filter: u8,
    /// The guest keeps the crashing task's user memory; for crashes in process context
    #[arg(long)]
    keep_user: bool,
    /// The guest sends its kernel messages live, and they must all be in the server's log of it
    #[arg(long)]
    console: bool,
    /// So many cycles of loading, arming and unloading the module before the crash, with traffic, and
    /// with the network card going down and away
    #[arg(long, default_value_t = 0)]
    stress: u32,
    /// The kernel with symbols; without it drgn and crash cannot read
    #[arg(long)]
    vmlinux: Option<PathBuf>,
    /// Command that starts crash 8.0.6 or newer, with leading arguments
    #[arg(long)]
    crash_reader: Option<String>,
    /// Command that starts makedumpfile 1.7.6 or newer, with leading arguments; with it and the
    /// readers the filter is proved
    #[arg(long)]
    makedumpfile: Option<String>,
    /// Python interpreter that has drgn
    #[arg(long)]
    drgn: Option<PathBuf>,
    /// Keep all files of the run in this new folder
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Print the report as one JSON object on the last line
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Run(options) => execute(&options),
        Command::Peer(options) => compare(*options).map(|()| true),
        Command::Console(options) => hear(*options),
        Command::Menu => {
            menu();
            Ok(true)
        }
        Command::Matrix { results, kernels } => matrix(&results, &kernels).map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vmtest: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Measures one way and prints the outcome as one JSON object.
fn compare(options: Peer) -> Result<()> {
    let folder = Folder::new(Some(&options.keep))?;
    let plan = peer::Plan {
        way: options.way,
        level: options.level,
        memory_mib: options.memory_mib,
        image: options.image,
        module: options.module,
        netdump: options.netdump,
        peer_init: options.peer_init,
        busybox: options.busybox,
        qemu: options.qemu,
        files: options.files,
        makedumpfile: options.makedumpfile,
        vmlinux: options.vmlinux,
        drgn: options.drgn,
        crash_reader: options.crash_reader,
    };
    let start = Instant::now();
    let outcome = peer::run(&plan, folder.path(), &mut |stage| {
        eprintln!("vmtest: {:6.1} s {stage}", start.elapsed().as_secs_f64());
    })?;
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

/// Runs a guest whose messages are to be kept, and reports; whether the verdict is Ok.
fn hear(options: Console) -> Result<bool> {
    let folder = Folder::new(options.keep.as_deref())?;
    let plan = console::Plan {
        task: if options.costs {
            Task::Measure
        } else {
            Task::Speak
        },
        kdump: options.kdump,
        sender: options.sender,
        image: options.image,
        module: options.module,
        netdump: options.netdump,
        console_init: options.console_init,
        busybox: options.busybox,
        qemu: options.qemu,
        rsyslogd: options.rsyslogd,
        syslog_format: options.syslog_format,
        nic: options.nic,
        crash: !options.no_crash,
        faults: options.wire.faults(),
    };
    let start = Instant::now();
    let mut report = console::run(&plan, folder.path(), &mut |stage| {
        eprintln!("vmtest: {:6.1} s {stage}", start.elapsed().as_secs_f64());
    })?;
    let good = report.verdict == "Ok";
    report.folder = folder.close(good)?;
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(good)
}

fn menu() {
    for crash in Crash::value_variants() {
        println!("crash {}", crash.name());
    }
    for nic in Nic::value_variants() {
        println!("nic {}", nic.name());
    }
}

fn matrix(results: &Path, kernels: &[String]) -> Result<()> {
    let text = std::fs::read_to_string(results)
        .with_context(|| format!("cannot read {}", results.display()))?;
    let cells = vmtest::matrix::parse(&text)?;
    std::fs::write(results, vmtest::matrix::lines(&cells)?)
        .with_context(|| format!("cannot write {}", results.display()))?;
    print!("{}", vmtest::matrix::page(kernels, &cells));
    Ok(())
}

/// Runs and reports; whether the verdict is Ok.
fn execute(options: &Options) -> Result<bool> {
    let faults = options.wire.faults();
    ensure!(
        !options.keep_user || options.crash.is_in_process(),
        "--keep-user needs a crash in process context: with {} the crashing task is any",
        options.crash.name()
    );
    let folder = Folder::new(options.keep.as_deref())?;
    let (plan, seed) = (plan(options, faults), faults.seed);
    let bar = bar(options.memory);
    let mut shown = Shown::default();
    let mut report = run(&plan, seed, folder.path(), &mut |progress| {
        shown.show(&bar, progress)
    })?;
    bar.finish_and_clear();
    let good = report.verdict == "Ok";
    report.folder = folder.close(good)?;
    print!("{}", Table(&report));
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    }
    Ok(good)
}

fn plan(options: &Options, faults: Faults) -> Plan {
    Plan {
        image: options.image.clone(),
        module: options.module.clone(),
        crashme: options.crashme.clone(),
        netdump: options.netdump.clone(),
        guest_init: options.guest_init.clone(),
        busybox: options.busybox.clone(),
        qemu: options.qemu.clone(),
        nic: options.nic,
        crash: options.crash,
        fill: options.fill,
        memory: options.memory,
        cpus: options.cpus,
        network: Network {
            ip6: options.ip6,
            vlan: options.vlan,
            mtu: options.mtu,
            dead_server: options.dead_server,
            over: options.over,
            traffic: options.traffic,
        },
        faults,
        format: options.format.clone(),
        filter: options.filter,
        arm_filter: options.arm_filter,
        keep_user: options.keep_user,
        console: options.console,
        stress: options.stress,
        vmlinux: options.vmlinux.clone(),
        drgn: options.drgn.clone(),
        makedumpfile: options.makedumpfile.clone(),
        crash_reader: options.crash_reader.clone(),
    }
}

fn parse_percent(text: &str) -> Result<f64, String> {
    let percent: f64 = text
        .parse()
        .map_err(|error| format!("{text:?} is no number: {error}"))?;
    if (0.0..=100.0).contains(&percent) {
        Ok(percent)
    } else {
        Err(format!("{text} is not from 0 to 100"))
    }
}

fn parse_milliseconds(text: &str) -> Result<Duration, String> {
    let milliseconds: f64 = text
        .parse()
        .map_err(|error| format!("{text:?} is no number: {error}"))?;
    Duration::try_from_secs_f64(milliseconds / 1000.0).map_err(|error| format!("{text}: {error}"))
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['M', 'G']) {
        Some(digits) if text.ends_with('M') => (digits, 20),
        Some(digits) => (digits, 30),
        None => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|error| format!("{text:?} is no size like 768M or 5G: {error}"))?;
    let bytes = number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text} is too large"))?;
    // Less does not boot a stock kernel; the rest keeps the map of RAM in whole huge pages.
    if bytes < 256 << 20 || bytes % (2 << 20) != 0 {
        return Err(format!("{text} is not at least 256M and a multiple of 2M"));
    }
    Ok(bytes)
}

/// Where the files of a run are: a new folder that stays, or one that goes when the verdict is Ok.
enum Folder {
    Kept(PathBuf),
    Temporary(tempfile::TempDir),
}

impl Folder {
    fn new(keep: Option<&Path>) -> Result<Self> {
        let Some(path) = keep else {
            return Ok(Self::Temporary(
                tempfile::Builder::new().prefix("vmtest-").tempdir()?,
            ));
        };
        std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        let empty = std::fs::read_dir(path)?.next().is_none();
        ensure!(
            empty,
            "{} is not empty; give --keep a new folder",
            path.display()
        );
        Ok(Self::Kept(path.canonicalize()?))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(folder) => folder.path(),
        }
    }

    /// Removes a temporary folder after a good run; gives the folder if it stays.
    fn close(self, good: bool) -> Result<Option<PathBuf>> {
        match self {
            Self::Kept(path) => Ok(Some(path)),
            Self::Temporary(folder) if good => {
                folder
                    .close()
                    .context("cannot remove the files of the run")?;
                Ok(None)
            }
            Self::Temporary(folder) => Ok(Some(folder.keep())),
        }
    }
}

fn bar(memory: u64) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    let style = "{spinner} {elapsed_precise} {msg}";
    bar.set_style(
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar.set_message(format!("guest of {} MiB", memory >> 20));
    bar
}

/// What people have been shown: a line that changes on a terminal, a line a stage elsewhere.
#[derive(Default)]
struct Shown {
    stage: &'static str,
    sample: Option<(Instant, u64)>,
    rate: u64,
}

impl Shown {
    fn show(&mut self, bar: &ProgressBar, progress: &Progress) {
        if progress.stage != self.stage {
            self.stage = progress.stage;
            if !std::io::stderr().is_terminal() {
                eprintln!(
                    "vmtest: {:6.1} s {}",
                    progress.elapsed.as_secs_f64(),
                    progress.stage
                );
            }
        }
        let (since, bytes) = *self
            .sample
            .get_or_insert_with(|| (Instant::now(), progress.wire_bytes));
        let passed = since.elapsed();
        if passed > Duration::from_millis(500) {
            let milliseconds = u64::try_from(passed.as_millis()).unwrap_or(1);
            self.rate = progress.wire_bytes.saturating_sub(bytes) / 1000 / milliseconds;
            self.sample = Some((Instant::now(), progress.wire_bytes));
        }
        let wire = if progress.wire_bytes == 0 {
            String::new()
        } else {
            format!(
                ", {} MB on the wire, {} MB/s",
                progress.wire_bytes / 1_000_000,
                self.rate
            )
        };
        bar.set_message(format!("{}{wire}", progress.stage));
        bar.tick();
    }
}
