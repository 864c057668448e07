//! What the first programs of guests have in common: mounts, modules, memory of their own, waiting.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::mount::{MountFlags, mount};
use serde::Serialize;

use crate::stage::{DEVICE, Network, PORT_NAME};

/// How long devices may take to appear; generous because an emulated CPU can be slow.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(60);

/// Mounts what every program expects.
///
/// # Errors
/// If the kernel refuses.
pub fn mount_basics() -> Result<()> {
    let basics = [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")];
    basics
        .iter()
        .try_for_each(|(kind, path)| mount_here(kind, path))
}

/// Mounts a file system without a device on `path`, which is made.
///
/// # Errors
/// If the kernel refuses.
pub fn mount_here(kind: &str, path: &str) -> Result<()> {
    mount_device(kind, kind, path, MountFlags::empty())
}

/// Mounts a file system of `kind` that is on `device`.
///
/// # Errors
/// If the kernel refuses.
pub fn mount_device(kind: &str, device: &str, path: &str, flags: MountFlags) -> Result<()> {
    fs::create_dir_all(path)?;
    mount(device, path, kind, flags, None)
        .with_context(|| format!("cannot mount {kind} of {device} on {path}"))
}

/// Has the kernel load a crash kernel, which is told `line`.
///
/// # Errors
/// If the kernel refuses.
pub fn load_crash_kernel_of(kernel: &File, initramfs: &File, line: &str) -> Result<()> {
    const KEXEC_FILE_ON_CRASH: libc::c_ulong = 2;
    let line = CString::new(line)?;
    // SAFETY: two open files and a string with its NUL and its length; the kernel copies all of it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            line.as_bytes_with_nul().len(),
            line.as_ptr(),
            KEXEC_FILE_ON_CRASH,
        )
    };
    ensure!(
        result == 0,
        "cannot load the crash kernel: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// Loads a module with its parameters.
///
/// # Errors
/// If the kernel refuses it.
pub fn load_module(path: &str, parameters: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open module {path}"))?;
    let parameters = CString::new(parameters)?;
    rustix::system::finit_module(&file, &parameters, 0)
        .with_context(|| format!("cannot load module {path}"))
}

/// Asks again until `find` succeeds.
///
/// # Errors
/// The last error of `find` when a minute is over.
pub fn wait_for<T>(what: &str, find: impl Fn() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match find() {
            Ok(found) => return Ok(found),
            Err(error) if start.elapsed() > DEVICE_TIMEOUT => {
                return Err(error)
                    .with_context(|| format!("{what} did not appear in {DEVICE_TIMEOUT:?}"));
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Waits for the carrier of a network device.
///
/// # Errors
/// If it does not come.
pub fn wait_for_carrier(device: &str) -> Result<()> {
    wait_for("the carrier", || {
        let carrier = fs::read_to_string(format!("/sys/class/net/{device}/carrier"))
            .context("no carrier file")?;
        ensure!(carrier.trim() == "1", "{device} has no carrier");
        Ok(())
    })
}

/// The hardware address of the network card, once it is there.
///
/// # Errors
/// If it does not come.
pub fn hardware_address() -> Result<String> {
    let address = wait_for("the network device", || {
        fs::read_to_string(format!("/sys/class/net/{DEVICE}/address"))
            .with_context(|| format!("no {DEVICE}; was its driver loaded?"))
    })?;
    Ok(address.trim().to_owned())
}

/// Runs a program to its end and gives its standard output.
///
/// # Errors
/// If it cannot be run or fails; what it said is in the error.
pub fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure!(
        output.status.success(),
        "{program} {} failed ({}): {}",
        arguments.join(" "),
        output.status,
        text(&[output.stderr, output.stdout].concat())
    );
    Ok(text(&output.stdout))
}

/// Anonymous memory that stays where it is until the kernel ends.
///
/// # Errors
/// If the kernel has not so much.
pub fn memory(bytes: usize) -> Result<&'static mut [u8]> {
    map(bytes, MapFlags::POPULATE)
}

/// Anonymous memory of one's own.
///
/// # Errors
/// If the kernel refuses.
pub fn map(bytes: usize, flags: MapFlags) -> Result<&'static mut [u8]> {
    // SAFETY: a null hint and no MAP_FIXED: the kernel chooses an address where nothing is mapped.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | flags,
        )
    }
    .with_context(|| format!("cannot have {bytes} bytes of memory"))?;
    // SAFETY: the mapping is `bytes` long, readable and writable, zeroed, known to nobody else, and
    // not unmapped as long as anybody uses it.
    Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), bytes) })
}

/// Tells the harness something, on one line of the port.
///
/// # Errors
/// If the port is gone.
pub fn tell(port: &mut File, what: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    port.write_all(&line).context("cannot write to the port")
}

/// The port to the harness.
///
/// # Errors
/// If it is not there yet.
pub fn find_port() -> Result<File> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("no virtio-serial port")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))
            .unwrap_or_default()
            .trim()
            == PORT_NAME
        {
            let device = PathBuf::from("/dev").join(entry.file_name());
            return OpenOptions::new()
                .write(true)
                .open(device)
                .context("cannot open the port");
        }
    }
    bail!("no virtio-serial port is called {PORT_NAME}")
}

/// Gives the guest its address, and what belongs to that; the hardware address of its network card.
///
/// # Errors
/// If the card does not come, or the kernel refuses something.
pub fn configure_network(network: Network) -> Result<String> {
    let mac = hardware_address()?;
    // Nobody else is on this wire, so nobody need be asked whether an address is free.
    for conf in ["all", "default", DEVICE] {
        fs::write(format!("/proc/sys/net/ipv6/conf/{conf}/accept_dad"), "0")
            .context("cannot switch the search for duplicate addresses off")?;
    }
    let (mtu, vlan) = (network.mtu.map(|mtu| mtu.to_string()), network.vlan);
    let (device, vlan) = (network.device(), vlan.map(|vlan| vlan.to_string()));
    let prefix = if network.ip6 { 64 } else { 24 };
    let address = format!("{}/{prefix}", network.guest());
    let mut commands = vec![vec!["link", "set", "lo", "up"]];
    if let Some(mtu) = &mtu {
        commands.push(vec!["link", "set", DEVICE, "mtu", mtu]);
    }
    commands.push(vec!["link", "set", DEVICE, "up"]);
    if let Some(vlan) = &vlan {
        let above = ["link", "add", "link", DEVICE, "name", &device];
        commands.push([&above[..], &["type", "vlan", "id", vlan]].concat());
        commands.push(vec!["link", "set", &device, "up"]);
    }
    commands.push(vec!["addr", "add", &address, "dev", &device]);
    for command in commands {
        run("/bin/busybox", &[&["ip"], &command[..]].concat())?;
    }
    wait_for_carrier(&device)?;
    Ok(mac)
}
