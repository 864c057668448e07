//! One QEMU: started with everything inherited as open files (RAM, control channel, port, wire),
//! ended with the harness.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::memory::GuestMemory;
use crate::qmp::Qmp;
use crate::stage::PORT_NAME;

/// Network devices that QEMU has and stock kernels drive. Whether netdump can is for it to say.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub enum Nic {
    /// Paravirtual.
    VirtioNet,
    /// Intel 82540EM, PCI.
    E1000,
    /// Intel 82574L, PCI Express with MSI-X.
    E1000e,
    /// Paravirtual, of another hypervisor.
    Vmxnet3,
    /// Realtek 8139, PCI.
    Rtl8139,
    /// Intel 82576, PCI Express with a queue for each CPU; QEMU 8.0 and newer.
    Igb,
}

impl Nic {
    /// The name used on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::VirtioNet => "virtio-net",
            Self::E1000 => "e1000",
            Self::E1000e => "e1000e",
            Self::Vmxnet3 => "vmxnet3",
            Self::Rtl8139 => "rtl8139",
            Self::Igb => "igb",
        }
    }

    /// The kernel module that drives it.
    #[must_use]
    pub fn module(self) -> &'static str {
        match self {
            Self::VirtioNet => "virtio_net",
            Self::E1000 => "e1000",
            Self::E1000e => "e1000e",
            Self::Vmxnet3 => "vmxnet3",
            // QEMU's has the revision that 8139too leaves to 8139cp.
            Self::Rtl8139 => "8139cp",
            Self::Igb => "igb",
        }
    }

    fn device(self) -> &'static str {
        match self {
            Self::VirtioNet => "virtio-net-pci",
            Self::E1000 => "e1000",
            Self::E1000e => "e1000e",
            Self::Vmxnet3 => "vmxnet3",
            Self::Rtl8139 => "rtl8139",
            Self::Igb => "igb",
        }
    }
}

/// Long enough that what a busy host adds between two looks at clocks is little beside it.
const TSC_SAMPLE: Duration = Duration::from_millis(100);
/// The unit of times in /proc (`USER_HZ`), the same on every x86-64 kernel.
const TICKS_PER_SECOND: u64 = 100;

/// How QEMU runs the guest's instructions.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Accelerator {
    /// On this host's CPU.
    Kvm,
    /// By translation, several times slower.
    Tcg,
}

/// Where a guest's kernel writes unless a run wants it elsewhere.
pub const SERIAL_CONSOLE: &str = "console=ttyS0,115200";

/// What a guest is made of.
#[derive(Debug)]
pub struct Guest<'a> {
    /// The compressed kernel.
    pub kernel: &'a Path,
    /// The archive of its first file system.
    pub initramfs: &'a Path,
    /// Where its serial console is written.
    pub console: &'a Path,
    /// Where QEMU's own complaints are written.
    pub errors: &'a Path,
    /// CPUs.
    pub cpus: u32,
    /// Network device.
    pub nic: Nic,
    /// How many of them; several are on one wire.
    pub cards: usize,
    /// How to run it.
    pub accelerator: Accelerator,
    /// Words of the kernel's command line beyond those that every guest has.
    pub words: &'a str,
}

/// A running (or paused) machine.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    /// Its control channel.
    pub qmp: Qmp,
    /// How it runs.
    pub accelerator: Accelerator,
    /// The command line, for people who want to repeat it.
    pub command_line: String,
}

/// A kernel under KVM that works prints its first line in well under a second; nested KVM that does
/// not work hangs for good somewhere between firmware and kernel.
const KVM_PROBE_TIMEOUT: Duration = Duration::from_secs(4);
const PROBE_POLL: Duration = Duration::from_millis(20);
/// What every kernel prints first.
const FIRST_LINE: &[u8] = b"Linux version";

impl Accelerator {
    /// The name used in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// KVM if `kernel` prints its first line under it within four seconds, otherwise TCG.
    ///
    /// # Errors
    /// If QEMU itself cannot be started.
    pub fn probe(qemu: &str, kernel: &Path) -> Result<Self> {
        if rustix::fs::access(
            "/dev/kvm",
            rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK,
        )
        .is_err()
        {
            return Ok(Self::Tcg);
        }
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(qemu);
        command.args([
            "-nodefaults",
            "-display",
            "none",
            "-machine",
            "q35",
            "-accel",
            "kvm",
            "-cpu",
            "max",
        ]);
        command
            .args([
                "-m",
                "256M",
                "-no-reboot",
                "-append",
                "console=ttyS0 earlyprintk=serial",
                "-kernel",
            ])
            .arg(kernel);
        let console = inherit(&mut command, theirs.as_fd())?;
        command.args([
            "-chardev",
            &format!("socket,id=console,fd={console}"),
            "-serial",
            "chardev:console",
        ]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {qemu}; is it installed?"))?;
        drop((theirs, command));
        let start = Instant::now();
        let mut said = Vec::new();
        let mut ran = false;
        ours.set_read_timeout(Some(PROBE_POLL))?;
        while !ran && start.elapsed() < KVM_PROBE_TIMEOUT && child.try_wait()?.is_none() {
            let mut piece = [0; 1024];
            let length = io::Read::read(&mut &ours, &mut piece).unwrap_or(0);
            said.extend_from_slice(&piece[..length]);
            ran = said
                .windows(FIRST_LINE.len())
                .any(|words| words == FIRST_LINE);
        }
        child.kill()?;
        child.wait()?;
        Ok(if ran { Self::Kvm } else { Self::Tcg })
    }
}

impl Vm {
    /// Starts `guest`. `port` becomes the far end of its stages, `wire` of its network device; both
    /// are connected sockets.
    ///
    /// The machine stops, with its memory, when the guest reboots or powers off.
    ///
    /// # Errors
    /// If QEMU cannot be started or refuses the machine; the reason is in the error.
    pub fn start(
        qemu: &str,
        guest: &Guest<'_>,
        memory: &GuestMemory,
        port: OwnedFd,
        wire: OwnedFd,
    ) -> Result<Self> {
        let (control, qemu_control) = UnixStream::pair().context("cannot make a socket pair")?;
        let mut command = Command::new(qemu);
        command.args(machine_arguments(guest, memory.size()));
        let ram = inherit(&mut command, memory.as_fd())?;
        command.args([
            "-object",
            &format!(
                "memory-backend-file,id=ram,share=on,size={},mem-path=/proc/self/fd/{ram}",
                memory.size()
            ),
        ]);
        let control_number = inherit(&mut command, qemu_control.as_fd())?;
        command.args([
            "-chardev",
            &format!("socket,id=control,fd={control_number}"),
        ]);
        command.args(["-mon", "chardev=control,mode=control"]);
        let port_number = inherit(&mut command, port.as_fd())?;
        command.args([
            "-chardev",
            &format!("socket,id=port,fd={port_number}"),
            "-device",
            "virtio-serial-pci",
        ]);
        command.args([
            "-device",
            &format!("virtserialport,chardev=port,name={PORT_NAME}"),
        ]);
        let wire_number = inherit(&mut command, wire.as_fd())?;
        command.args([
            "-netdev",
            &format!("dgram,id=wire,local.type=fd,local.str={wire_number}"),
        ]);
        command.args(cards(guest));
        let errors = fs::File::create(guest.errors)
            .with_context(|| format!("cannot write {}", guest.errors.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        let command_line = format!("{command:?}");
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {qemu}; is it installed?"))?;
        drop((qemu_control, port, wire));
        let qmp = Qmp::new(control).with_context(|| {
            let said = fs::read_to_string(guest.errors).unwrap_or_default();
            format!(
                "QEMU refused the machine: {}",
                said.trim().replace('\n', "; ")
            )
        })?;
        Ok(Self {
            child,
            qmp,
            accelerator: guest.accelerator,
            command_line,
        })
    }

    /// The time that processors have spent on this machine, by the host's count (`man 5 proc`); 0
    /// when it is gone.
    #[must_use]
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        // The program's name, in parentheses, may hold anything.
        let fields = stat.unwrap_or_default();
        let fields = fields.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: u64 = fields
            .split_ascii_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
    }

    /// The page at physical address `address` as QEMU itself saves it, by way of the file
    /// `scratch`.
    ///
    /// # Errors
    /// If QEMU refuses or the file cannot be read.
    pub fn saved_page(&mut self, address: u64, scratch: &Path) -> Result<Vec<u8>> {
        let size = crate::pattern::PAGE_SIZE;
        self.qmp.command(
            "pmemsave",
            &json!({ "val": address, "size": size, "filename": scratch }),
        )?;
        let page =
            fs::read(scratch).with_context(|| format!("cannot read {}", scratch.display()))?;
        ensure!(
            page.len() == size,
            "QEMU saved {} bytes of a page at {address:#x}",
            page.len()
        );
        Ok(page)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!(
                "vmtest: cannot end QEMU (process {}): {error}",
                self.child.id()
            );
        }
    }
}

/// The rate of this host's time stamp counter, which is that of an emulated CPU too, by its own clock.
fn host_tsc_khz() -> u64 {
    // SAFETY: every x86-64 processor has the instruction; it reads a counter and nothing else.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, before) = (Instant::now(), ticks());
    std::thread::sleep(TSC_SAMPLE);
    let (passed, after) = (start.elapsed(), ticks());
    let microseconds = u64::try_from(passed.as_micros()).unwrap_or(u64::MAX);
    after.saturating_sub(before).saturating_mul(1000) / microseconds.max(1)
}

/// The name of the card of this number, where there are several.
#[must_use]
pub fn card_name(number: usize) -> String {
    format!("card{number}")
}

/// The cards on the wire: one on it itself, several by way of a hub.
fn cards(guest: &Guest<'_>) -> Vec<String> {
    let card = |wire: &str| {
        let device = format!("{},netdev={wire},romfile=", guest.nic.device());
        ["-device".to_owned(), device]
    };
    if guest.cards == 1 {
        return card("wire").into();
    }
    let port = |name: &str, wire: &str| {
        [
            "-netdev".to_owned(),
            format!("hubport,id={name},hubid=0{wire}"),
        ]
    };
    let mut arguments = port("uplink", ",netdev=wire").to_vec();
    for number in 0..guest.cards {
        let name = card_name(number);
        arguments.extend(port(&name, ""));
        arguments.extend(card(&name));
    }
    arguments
}

fn machine_arguments(guest: &Guest<'_>, memory_size: u64) -> Vec<String> {
    // As Debian has it, a kernel stays dead by itself: one that reboots was rebooted by netdump.
    // An emulated timer of a busy host fails the kernel's check of it, which hypervisors switch off.
    let mut kernel_command_line = format!("panic=0 printk.time=1 no_timer_check {}", guest.words);
    if guest.accelerator == Accelerator::Tcg {
        // What the guest measures on a busy host is wrong by several times, and all its times with it.
        kernel_command_line += &format!(" tsc_early_khz={}", host_tsc_khz());
    }
    // TCG emulates `rep movsb` byte by byte, several times slower than the word moves that the
    // kernel takes instead where a processor does not claim that it is fast.
    let (accelerator, cpu) = match guest.accelerator {
        Accelerator::Kvm => ("kvm", "max"),
        Accelerator::Tcg => ("tcg,thread=multi", "max,-erms,-fsrm"),
    };
    [
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "q35,memory-backend=ram",
        "-accel",
        accelerator,
        "-cpu",
        cpu,
        "-smp",
        &guest.cpus.to_string(),
        "-m",
        &format!("{memory_size}b"),
        "-action",
        "reboot=shutdown,shutdown=pause",
        "-kernel",
        &guest.kernel.to_string_lossy(),
        "-initrd",
        &guest.initramfs.to_string_lossy(),
        "-append",
        &kernel_command_line,
        "-serial",
        &format!("file:{}", guest.console.display()),
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Lets the child keep a copy of `file` open, and gives the number it will have there. The copy
/// dies with the child.
fn inherit(command: &mut Command, file: BorrowedFd<'_>) -> Result<RawFd> {
    let copy = file
        .try_clone_to_owned()
        .context("cannot duplicate a file for QEMU")?;
    let number = copy.as_raw_fd();
    let parent = rustix::process::getpid();
    // SAFETY: the closure runs between fork and exec and makes only system calls; it owns the file
    // it changes.
    unsafe {
        command.pre_exec(move || {
            rustix::io::fcntl_setfd(&copy, rustix::io::FdFlags::empty())?;
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // The harness may have died before the signal was asked for.
            if rustix::process::getppid() == Some(parent) {
                Ok(())
            } else {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        });
    }
    Ok(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_cards_are_on_one_wire_and_each_has_a_name_for_the_monitor() {
        let path = Path::new("/x");
        let guest = |cards: usize| Guest {
            kernel: path,
            initramfs: path,
            console: path,
            errors: path,
            cpus: 1,
            nic: Nic::E1000,
            cards,
            accelerator: Accelerator::Tcg,
            words: "",
        };
        assert_eq!(
            cards(&guest(1)).join(" "),
            "-device e1000,netdev=wire,romfile="
        );
        let two = cards(&guest(2)).join(" ");
        assert!(
            two.starts_with("-netdev hubport,id=uplink,hubid=0,netdev=wire "),
            "{two}"
        );
        for number in 0..2 {
            let name = card_name(number);
            assert!(
                two.contains(&format!("hubport,id={name},hubid=0 ")),
                "{two}"
            );
            assert!(two.contains(&format!("e1000,netdev={name},")), "{two}");
        }
    }
}
