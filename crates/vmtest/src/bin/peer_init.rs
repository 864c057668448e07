//! The first program of the guest that `vmtest peer` crashes, and of the crash kernel that kdump
//! boots in it. Static, like `guest_init`.
//!
//! As a host it fills memory with the content of real files, arms netdump or loads the crash
//! kernel, and crashes. As the capture system it has the network up and pipes makedumpfile into ssh
//! or a TCP connection: no distribution's capture system can do with less.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::mount::MountFlags;
use rustix::pipe::SpliceFlags;
use vmtest::guest::{
    hardware_address, load_crash_kernel_of, load_module, map, memory, mount_basics, mount_device,
    mount_here, run, wait_for, wait_for_carrier,
};
use vmtest::peer::{
    CAPTURE_PROGRAMS, Orders, RESERVED, Role, SERVER, TCP_PORT, Transport, UNARMED,
};
use vmtest::stage::{DEVICE, SERVER_PORT};

/// The disk with what this run needs, and the one with files to fill memory with.
const BOOT_DISK: &str = "/dev/vda";
const FILES_DISK: &str = "/dev/vdb";
const MIB: u64 = 1 << 20;
/// The part of the disk whose bytes are file content for certain.
const CONTENT_MIB: std::ops::Range<u64> = 32..1700;
/// Smaller files say little about reading.
const CACHED_BYTES_MIN: u64 = 32 << 10;
/// How long a kernel that was told to crash may still run this program.
const CRASH_TIMEOUT: Duration = Duration::from_secs(60);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.as_slice() {
        [word, mib, from] if word == "dirty" => hold(mib, from).map(|_| ()),
        [word, mib, from] if word == "keep" => keep(mib, from),
        _ => system(),
    };
    let Err(error) = result else { return };
    println!("{UNARMED} {}", format!("{error:#}").replace('\n', " "));
    if std::process::id() == 1 {
        power_off();
    }
}

fn power_off() {
    if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
        println!("peer_init: cannot power off: {error}");
    }
}

fn system() -> Result<()> {
    mount_basics()?;
    let orders = fs::read("/orders.json").context("cannot read the orders")?;
    let orders: Orders = serde_json::from_slice(&orders).context("the orders are damaged")?;
    for module in &orders.modules {
        load_module(&format!("/modules/{module}"), "")?;
    }
    hardware_address()?;
    let busybox = "/bin/busybox";
    run(busybox, &["ip", "link", "set", "lo", "up"])?;
    run(
        busybox,
        &["ip", "addr", "add", "10.0.2.15/24", "dev", DEVICE],
    )?;
    run(busybox, &["ip", "link", "set", DEVICE, "up"])?;
    wait_for_carrier(DEVICE)?;
    match orders.role {
        Role::Host => host(&orders),
        Role::Capture => capture(&orders),
    }
}

fn host(orders: &Orders) -> Result<()> {
    wait_for("the disks", || {
        ensure!(Path::new(FILES_DISK).exists(), "no {FILES_DISK}");
        Ok(())
    })?;
    mount_device("ext4", BOOT_DISK, "/boot", MountFlags::RDONLY)?;
    mount_device("ext4", FILES_DISK, "/mnt", MountFlags::RDONLY)?;
    mount_here("tmpfs", "/fill")?;
    fill(orders.memory_mib)?;
    let reserved_kib = match orders.way.dump() {
        None => arm()?,
        Some(_) => load_crash_kernel(orders)?,
    };
    println!("{RESERVED} {reserved_kib}");
    thread::sleep(Duration::from_secs(1));
    fs::write("/proc/sysrq-trigger", "c").context("cannot crash")?;
    thread::sleep(CRASH_TIMEOUT);
    bail!(
        "the kernel lives {} s after it was told to crash",
        CRASH_TIMEOUT.as_secs()
    )
}

/// Fills memory as a host at work has it: of all memory 15 % was used and given back, 25 % is
/// anonymous, 10 % in a tmpfs, and 30 % is page cache.
fn fill(memory_mib: u64) -> Result<()> {
    let share = |percent: u64| (memory_mib * percent / 100).to_string();
    run("/init", &["dirty", &share(15), "400"])?;
    let mut keeper = Command::new("/init")
        .args(["keep", &share(25), "32"])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the process with anonymous memory")?;
    let mut line = String::new();
    BufReader::new(keeper.stdout.take().context("it has no output")?).read_line(&mut line)?;
    ensure!(
        line == "kept\n",
        "the process with anonymous memory said {line:?}"
    );
    fill_tmpfs(memory_mib * 10 / 100)?;
    fill_cache(memory_mib * 30 / 100)
}

/// Memory of so many MiB with the disk's content from a place on.
fn hold(mib: &str, from: &str) -> Result<&'static [u8]> {
    let (mib, from): (usize, u64) = (mib.parse()?, from.parse()?);
    let memory = map(mib << 20, rustix::mm::MapFlags::empty())?;
    let disk = direct()?;
    for (piece, place) in memory.chunks_mut(1 << 20).zip(places(from)) {
        disk.read_exact_at(piece, place)
            .context("cannot read the disk")?;
    }
    Ok(memory)
}

fn keep(mib: &str, from: &str) -> Result<()> {
    let memory = hold(mib, from)?;
    println!("kept");
    std::io::stdout().flush()?;
    loop {
        thread::sleep(Duration::from_secs(3600));
        ensure!(!memory.is_empty(), "the memory is gone");
    }
}

/// The disk, past the page cache.
fn direct() -> Result<File> {
    let mut options = OpenOptions::new();
    let disk = options
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(FILES_DISK);
    disk.with_context(|| format!("cannot open {FILES_DISK}"))
}

/// The bytes at which the pieces of 1 MiB begin, from a MiB on, around and around.
fn places(from: u64) -> impl Iterator<Item = u64> {
    let content = CONTENT_MIB.end - CONTENT_MIB.start;
    (from - CONTENT_MIB.start..).map(move |at| (CONTENT_MIB.start + at % content) * MIB)
}

fn fill_tmpfs(mib: u64) -> Result<()> {
    let disk = direct()?;
    let piece = memory(1 << 20)?;
    for (at, place) in (0..mib).zip(places(900)) {
        disk.read_exact_at(piece, place)
            .context("cannot read the disk")?;
        let mut options = OpenOptions::new();
        let mut file = options
            .append(true)
            .create(true)
            .open(format!("/fill/f{}", at / 16))?;
        file.write_all(piece).context("cannot write to the tmpfs")?;
    }
    Ok(())
}

/// Looks at all files, and reads some of them, in an order that mixes their kinds.
fn fill_cache(mib: u64) -> Result<()> {
    let mut files = Vec::new();
    collect(Path::new("/mnt"), &mut files)?;
    files.sort();
    let mut state = 88_172_645_463_325_252_u64;
    for last in (1..files.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        files.swap(last, usize::try_from(state % (last as u64 + 1))?);
    }
    let (mut piece, mut read) = (vec![0; 1 << 20], 0);
    let large = files.iter().filter(|(_, bytes)| *bytes >= CACHED_BYTES_MIN);
    for (path, _) in large {
        let mut file = File::open(path).with_context(|| format!("no {}", path.display()))?;
        loop {
            match file.read(&mut piece)? {
                0 => break,
                bytes => read += bytes as u64,
            }
        }
        if read >= mib * MIB {
            return Ok(());
        }
    }
    bail!(
        "the disk has only {} MiB of files, and {mib} are wanted",
        read / MIB
    )
}

fn collect(folder: &Path, files: &mut Vec<(PathBuf, u64)>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let about = entry.metadata()?;
        if about.is_dir() {
            collect(&entry.path(), files)?;
        } else if about.is_file() {
            files.push((entry.path(), about.len()));
        }
    }
    Ok(())
}

/// Arms netdump; gives the KiB that it holds.
fn arm() -> Result<u64> {
    let (netdump, server) = ("/boot/netdump", format!("{SERVER}:{SERVER_PORT}"));
    let files = ["arm", "--key", "/boot/key", "--module", "/boot/netdump.ko"];
    println!(
        "{}",
        run(netdump, &[&files[..], &["--server", &server]].concat())?
    );
    let status: serde_json::Value = serde_json::from_str(&run(netdump, &["status", "--json"])?)?;
    let bytes = status
        .pointer("/arming/memory/total")
        .and_then(serde_json::Value::as_u64);
    Ok(bytes
        .with_context(|| format!("no memory in the status: {status}"))?
        .div_ceil(1024))
}

/// Loads the crash kernel; gives the KiB that are reserved for it.
fn load_crash_kernel(orders: &Orders) -> Result<u64> {
    let kernel = File::open("/boot/vmlinuz").context("no crash kernel")?;
    let initramfs = File::open("/boot/capture.img").context("no capture system")?;
    load_crash_kernel_of(&kernel, &initramfs, &orders.capture_line)?;
    let bytes = fs::read_to_string("/sys/kernel/kexec_crash_size")?;
    Ok(bytes.trim().parse::<u64>()? / 1024)
}

fn capture(orders: &Orders) -> Result<()> {
    let (compress, transport) = orders.way.dump().context("no way for a crash kernel")?;
    let level = orders.level.to_string();
    let mut dump = packed("makedumpfile");
    // Of its messages the errors only.
    dump.args(["-F", "--message-level", "4", "-d", &level])
        .args(compress);
    let mut dump = dump.arg("/proc/vmcore").stdout(Stdio::piped()).spawn()?;
    let output = dump.stdout.take().context("makedumpfile has no output")?;
    rustix::pipe::fcntl_setpipe_size(&output, 1 << 20).context("cannot have a large pipe")?;
    match transport {
        Transport::Ssh => {
            let mut ssh = packed("ssh");
            ssh.args([
                "-F",
                "none",
                "-i",
                "/key",
                "-p",
                "22022",
                "-o",
                "LogLevel=ERROR",
            ]);
            ssh.args([
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
            ]);
            ssh.arg(format!("root@{SERVER}")).arg(&orders.receive);
            let status = ssh.stdin(output).status().context("cannot start ssh")?;
            ensure!(status.success(), "ssh ended with {status}");
        }
        Transport::Tcp { splice } => {
            let mut stream = TcpStream::connect((SERVER, TCP_PORT)).context("no receiver")?;
            send(output, &mut stream, splice).context("cannot send")?;
            stream.shutdown(Shutdown::Write)?;
            stream.read_to_end(&mut Vec::new())?;
        }
    }
    let status = dump.wait()?;
    ensure!(status.success(), "makedumpfile ended with {status}");
    power_off();
    Ok(())
}

fn send(mut from: impl Read + AsFd, to: &mut TcpStream, splice: bool) -> Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        let bytes = if splice {
            rustix::pipe::splice(&from, None, &*to, None, 1 << 20, SpliceFlags::MORE)?
        } else {
            let bytes = from.read(&mut piece)?;
            to.write_all(&piece[..bytes])?;
            bytes
        };
        if bytes == 0 {
            return Ok(());
        }
    }
}

/// A program that was packed with its own loader and libraries.
fn packed(name: &str) -> Command {
    let folder = format!("{CAPTURE_PROGRAMS}/{name}");
    let mut command = Command::new(format!("{folder}/loader"));
    command
        .args(["--library-path", &folder])
        .arg(format!("{folder}/{name}"));
    command
}
