//! `vmtest peer`: one guest with its memory full of real files, crashed, and its dump brought to a
//! server, either by netdump or by kdump (a crash kernel, makedumpfile, and ssh or TCP).
//!
//! All ways have the same guest: kernel, disks, first program, network card, one CPU. They have
//! the same road too: a tap in a network namespace that lives as long as this process, on whose
//! counters the wire's bytes are read. The clock starts with the panic's line on the console and
//! stops with the finished file.

mod images;
mod receiver;
mod road;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::readers;
use images::Images;
use road::Road;

/// Words that begin a line of the guest's first program on its console: what is reserved, in KiB.
pub const RESERVED: &str = "peer_init: reserved";
/// And why it cannot go on.
pub const UNARMED: &str = "peer_init: cannot go on:";
/// Where programs lie in the capture system, each in a folder with its loader and libraries.
pub const CAPTURE_PROGRAMS: &str = "/programs";
/// The server's address.
pub const SERVER: &str = "10.0.2.2";
/// The port of the receiver of plain TCP.
pub const TCP_PORT: u16 = 5001;

const PANIC: &str = "Kernel panic - not syncing";
/// What the crash kernel reserves: 112M is the least that works with this capture system.
const CRASH_KERNEL: &str = "128M";
/// How long a guest may boot and fill its memory, and then dump it, without a word.
const PATIENCE: Duration = Duration::from_secs(300);
/// The kernel's unit in /proc/PID/stat; the same on every Linux that matters here.
const TICKS_PER_SECOND: f64 = 100.0;
const TURN: Duration = Duration::from_millis(2);

/// How a dump comes to the server.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Our module to our server.
    Netdump,
    /// kdump with makedumpfile -l through ssh: what people run.
    LzoSsh,
    /// kdump with makedumpfile, not compressed, over TCP, not sealed, by reads and writes of 64 KiB
    /// as the usual tools do it: its best time.
    NoneTcp,
    /// The same by splice(2), which spares the copies: better than any tool that people use.
    NoneSplice,
    /// kdump with makedumpfile -z through ssh: its fewest bytes.
    ZstdSsh,
}

/// What carries the bytes of a capture system.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Transport {
    /// ssh, to a makedumpfile that puts the file in order.
    Ssh,
    /// A TCP connection, to a file as it comes.
    Tcp {
        /// By splice(2).
        splice: bool,
    },
}

impl Way {
    /// The name in the rows.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Netdump => "netdump",
            Self::LzoSsh => "kdump lzo ssh",
            Self::NoneTcp => "kdump none tcp",
            Self::NoneSplice => "kdump none splice",
            Self::ZstdSsh => "kdump zstd ssh",
        }
    }

    /// makedumpfile's option and the transport of a way with a crash kernel.
    #[must_use]
    pub const fn dump(self) -> Option<(Option<&'static str>, Transport)> {
        match self {
            Self::Netdump => None,
            Self::LzoSsh => Some((Some("-l"), Transport::Ssh)),
            Self::NoneTcp => Some((None, Transport::Tcp { splice: false })),
            Self::NoneSplice => Some((None, Transport::Tcp { splice: true })),
            Self::ZstdSsh => Some((Some("-z"), Transport::Ssh)),
        }
    }
}

/// Which of the two systems the guest's first program is in.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The one that crashes.
    Host,
    /// The one that kdump boots then.
    Capture,
}

/// What the guest's first program is to do.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Orders {
    /// Where it is.
    pub role: Role,
    /// How the dump goes.
    pub way: Way,
    /// Filter level.
    pub level: u8,
    /// Memory of the guest.
    pub memory_mib: u64,
    /// Files below /modules, in load order.
    pub modules: Vec<String>,
    /// The capture system's kernel command line.
    pub capture_line: String,
    /// What ssh runs on the server.
    pub receive: String,
}

/// What to run. All paths exist already; nothing is fetched.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How the dump goes.
    pub way: Way,
    /// Filter level.
    pub level: u8,
    /// Memory of the guest.
    pub memory_mib: u64,
    /// The unpacked linux-image package.
    pub image: PathBuf,
    /// netdump.ko for that kernel.
    pub module: PathBuf,
    /// The static netdump program, run on both sides.
    pub netdump: PathBuf,
    /// The static peer_init program.
    pub peer_init: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// The QEMU program.
    pub qemu: String,
    /// The disk image with files.
    pub files: PathBuf,
    /// The words that start makedumpfile: loader, its option, libraries, program.
    pub makedumpfile: String,
    /// The kernel with symbols.
    pub vmlinux: PathBuf,
    /// A Python that has drgn.
    pub drgn: PathBuf,
    /// The words that start crash.
    pub crash_reader: String,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// [`Way::name`].
    pub config: &'static str,
    /// Filter level.
    pub level: u8,
    /// From the panic to the first frame of whoever dumps.
    pub first_packet_s: f64,
    /// From the panic to the finished file.
    pub seconds: f64,
    /// Bytes of the frames that the guest sent from the panic on.
    pub wire_bytes: u64,
    /// And of those that it was sent.
    pub wire_back_bytes: u64,
    /// CPU seconds of QEMU in that time: on a machine with other work, what to compare by.
    pub qemu_cpu_s: f64,
    /// Memory that was reserved while the host was healthy.
    pub reserved_kib: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Tasks that drgn finds in the file.
    pub drgn_tasks: usize,
    /// And that crash finds.
    pub crash_tasks: usize,
}

/// A guest that runs; ended when dropped.
struct Guest {
    child: Child,
    console: Receiver<(Instant, String)>,
}

/// Runs `plan` with all files in `folder`; `say` is told where it is.
///
/// # Errors
/// If anything does not do its part, or the file cannot be read.
pub fn run(plan: &Plan, folder: &Path, say: &mut dyn FnMut(&str)) -> Result<Outcome> {
    say("making disks");
    let road = Road::build()?;
    let receiver = receiver::start(plan, folder)?;
    let images = images::make(plan, folder, &receiver)?;
    say("booting and filling memory");
    let guest = Guest::start(plan, folder, &images)?;
    let reserved_kib = guest.reserved()?;
    let panic = guest.panic()?;
    let (before, cpu_before) = (road.traffic()?, guest.cpu_seconds()?);
    say("dumping");
    let (mut first, give_up) = (None, panic + PATIENCE);
    let file = loop {
        thread::sleep(TURN);
        if first.is_none() && road.traffic()?.sent > before.sent {
            first = Some(panic.elapsed());
        }
        guest.check()?;
        if let Some(file) = receiver.finished()? {
            break file;
        }
        if Instant::now() > give_up {
            bail!(
                "no vmcore in {} s; see {}",
                PATIENCE.as_secs(),
                folder.display()
            );
        }
    };
    let seconds = panic.elapsed().as_secs_f64();
    // What is still on its way says goodbye; it belongs to neither.
    let (after, cpu_after) = (road.traffic()?, guest.cpu_seconds()?);
    drop(guest);
    say("reading");
    let file = receiver.in_order(file)?;
    let (drgn_tasks, crash_tasks) = tasks(plan, &file)?;
    Ok(Outcome {
        config: plan.way.name(),
        level: plan.level,
        first_packet_s: first.map_or(seconds, |time| time.as_secs_f64()),
        seconds,
        wire_bytes: after.sent - before.sent,
        wire_back_bytes: after.received - before.received,
        qemu_cpu_s: cpu_after - cpu_before,
        reserved_kib,
        file_bytes: fs::metadata(&file)?.len(),
        drgn_tasks,
        crash_tasks,
    })
}

/// Tasks in the file, by drgn and by crash.
fn tasks(plan: &Plan, file: &Path) -> Result<(usize, usize)> {
    let count = "import sys, drgn, drgn.helpers.linux as linux\n\
        prog = drgn.Program()\n\
        prog.set_core_dump(sys.argv[1])\n\
        prog.load_debug_info([sys.argv[2]])\n\
        print(sum(1 for _ in linux.for_each_task(prog)))\n";
    let by_drgn = readers::script(
        Command::new(&plan.drgn)
            .args(["-c", count])
            .args([file, &plan.vmlinux]),
    )
    .context("drgn cannot read the vmcore")?;
    let listing = readers::converse(&plan.crash_reader, file, &plan.vmlinux, &["@ps", "ps"])
        .context("crash cannot read the vmcore")?;
    let first_word = |line: &str| {
        let word = line
            .trim_start_matches(['>', ' '])
            .split_ascii_whitespace()
            .next();
        word.and_then(|word| word.parse::<u64>().ok())
    };
    // The idle task is number 0 and none of drgn's.
    let by_crash = listing
        .lines()
        .filter_map(first_word)
        .filter(|pid| *pid > 0)
        .count();
    Ok((by_drgn, by_crash))
}

impl Guest {
    fn start(plan: &Plan, folder: &Path, images: &Images) -> Result<Self> {
        let reserve = match plan.way.dump() {
            Some(_) => format!(" crashkernel={CRASH_KERNEL}"),
            None => String::new(),
        };
        let line = format!("console=ttyS0 quiet{reserve}");
        let mut command = Command::new(&plan.qemu);
        command.args([
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-machine",
            "pc",
        ]);
        // As in vm.rs: TCG emulates `rep movsb` byte by byte.
        command.args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max,-erms,-fsrm",
            "-smp",
            "1",
        ]);
        command.args(["-m", &format!("{}M", plan.memory_mib), "-serial", "stdio"]);
        command.arg("-kernel").arg(&images.kernel);
        command
            .arg("-initrd")
            .arg(&images.initramfs)
            .args(["-append", &line]);
        for disk in [&images.boot, &plan.files] {
            let disk = disk.display();
            command.args([
                "-drive",
                &format!("file={disk},if=virtio,format=raw,readonly=on"),
            ]);
        }
        command.args([
            "-netdev",
            &road::netdev(),
            "-device",
            "virtio-net-pci,netdev=n,romfile=",
        ]);
        let errors = fs::File::create(folder.join("qemu.log"))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {}", plan.qemu))?;
        let output = child.stdout.take().context("QEMU has no output")?;
        let log = folder.join("serial.log");
        let (sender, console) = mpsc::channel();
        thread::spawn(move || {
            let mut text = String::new();
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let now = Instant::now();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                text += &format!("{line}\n");
                if sender.send((now, line)).is_err() || fs::write(&log, &text).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, console })
    }

    fn reserved(&self) -> Result<u64> {
        let (_, rest) = self.line(RESERVED)?;
        rest.trim()
            .parse()
            .with_context(|| format!("the guest reserved {rest:?}"))
    }

    fn panic(&self) -> Result<Instant> {
        Ok(self.line(PANIC)?.0)
    }

    /// Waits for a line with `words`; gives its time and what follows them.
    fn line(&self, words: &str) -> Result<(Instant, String)> {
        loop {
            let (when, line) = match self.console.recv_timeout(PATIENCE) {
                Ok(said) => said,
                Err(RecvTimeoutError::Timeout) => bail!("the guest says nothing any more"),
                Err(RecvTimeoutError::Disconnected) => bail!("the guest ended by itself"),
            };
            if let Some((_, rest)) = line.split_once(words) {
                return Ok((when, rest.to_owned()));
            }
            if let Some((_, why)) = line.split_once(UNARMED) {
                bail!("the guest cannot go on:{why}");
            }
        }
    }

    /// CPU seconds of QEMU so far.
    fn cpu_seconds(&self) -> Result<f64> {
        let path = format!("/proc/{}/stat", self.child.id());
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        // Behind the name, which may hold anything, user and system time are the 12th and 13th.
        let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields);
        let ticks = fields
            .split_ascii_whitespace()
            .skip(11)
            .take(2)
            .map(str::parse::<f64>);
        let ticks = ticks
            .sum::<Result<f64, _>>()
            .with_context(|| format!("{path} has no times"))?;
        Ok(ticks / TICKS_PER_SECOND)
    }

    /// Fails if the capture system has said that it cannot go on.
    fn check(&self) -> Result<()> {
        for (_, line) in self.console.try_iter() {
            if let Some((_, why)) = line.split_once(UNARMED) {
                bail!("the capture system cannot go on:{why}");
            }
            if line.contains(PANIC) {
                bail!("the crash kernel panicked: {line}");
            }
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        end(&mut self.child, "QEMU");
    }
}

/// Ends a program of this run.
fn end(child: &mut Child, name: &str) {
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        eprintln!(
            "vmtest: cannot end {name} (process {}): {error}",
            child.id()
        );
    }
}
