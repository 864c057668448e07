//! The first program of the guest of `vmtest console`. Static, like `guest_init`.
//!
//! It has the kernel's messages sent by in-tree netconsole or by our module, prints a known variety
//! of them through `/dev/kmsg`, has the kernel print some of its own, tells the harness what the
//! kernel's log then holds, and crashes if it is ordered to. In a crash kernel it says only that it
//! runs.

mod cost;

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use vmtest::console::{
    BEGIN, CAPTURE_LINE, CAPTURE_WORDS, CRASH_KERNEL, Orders, SYSDATA, SYSLOG_PORT, Sender, Task,
    Told, USERDATA,
};
use vmtest::frame::HARNESS_MAC;
use vmtest::guest::{
    configure_network, find_port, load_crash_kernel, load_module, mount_basics, mount_here, run,
    tell, wait_for,
};
use vmtest::stage::{DEVICE, Network, ORDERS_PATH, SERVER_PORT};

/// Lines of each of the two threads that print as fast as they can.
const BURST_LINES: u32 = 800;
/// The longest text that every kernel takes in one write to `/dev/kmsg`, its priority included.
const TEXT_BYTES_MAX: usize = 970;
/// Characters of two bytes each that `/dev/kmsg` shows whole: in newer kernels it cuts what
/// is longer than 2048 bytes with its escapes, as netconsole does.
const ESCAPED_CHARS: usize = 230;
/// The ends of texts about here lie on both sides of a datagram's end.
const EDGE_BYTES: std::ops::RangeInclusive<usize> = 940..=TEXT_BYTES_MAX;
/// What has been printed is on its way when this is over, whoever sends it.
const SETTLE: Duration = Duration::from_secs(2);
/// More than any record in `/dev/kmsg`.
const RECORD_BYTES_MAX: usize = 32 << 10;
/// PCI class of a System Management Bus: every machine of QEMU has one, and no driver of it is here.
const SMBUS_CLASS: &str = "0x0c0500";
/// How long a kernel that was told to crash may still run this program.
const CRASH_TIMEOUT: Duration = Duration::from_secs(60);
/// The target of netconsole that this program makes.
const TARGET: &str = "/sys/kernel/config/netconsole/vmtest";

fn main() {
    let result = find_orders().and_then(|orders| guest(&orders));
    if let Err(error) = result {
        let why = format!("{error:#}").replace('\n', " ");
        eprintln!("console_init: {why}");
        let told = find_port().and_then(|mut port| tell(&mut port, &Told::Failed { why }));
        if let Err(error) = told {
            eprintln!("console_init: cannot tell the harness: {error:#}");
        }
    }
    // Not to end: the kernel would panic, and its messages are not wanted.
    loop {
        thread::sleep(CRASH_TIMEOUT);
    }
}

fn find_orders() -> Result<Orders> {
    mount_basics()?;
    let orders = fs::read(ORDERS_PATH).context("cannot read the orders")?;
    let orders: Orders = serde_json::from_slice(&orders).context("the orders are damaged")?;
    for module in &orders.modules {
        load_module(&format!("/modules/{module}"), "")?;
    }
    Ok(orders)
}

fn guest(orders: &Orders) -> Result<()> {
    if orders.task == Task::Capture {
        println!("{CAPTURE_WORDS}");
        return Ok(());
    }
    let mut port = wait_for("the virtio-serial port", find_port)?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned();
    tell(&mut port, &Told::Booted { kernel })?;
    configure_network(Network::default())?;
    // Nothing is held back: levels are not what is tested, and neither is a limit on this program.
    for (path, word) in [
        ("/proc/sys/kernel/printk", "8 4 1 8"),
        ("/proc/sys/kernel/printk_devkmsg", "on\n"),
        ("/proc/sys/kernel/sysrq", "1"),
    ] {
        fs::write(path, word).with_context(|| format!("cannot write {word:?} to {path}"))?;
    }
    if orders.task == Task::Measure {
        let costs = cost::measure(orders)?;
        return tell(&mut port, &Told::Measured { costs });
    }
    if orders.kdump {
        let [kernel, initramfs] = CRASH_KERNEL;
        load_crash_kernel(kernel, initramfs, CAPTURE_LINE)?;
    }
    let features = match orders.sender {
        Sender::Basic => load_netconsole(orders, &basic_targets(orders.syslog.is_some()))?,
        Sender::Extended => {
            load_netconsole(orders, "")?;
            make_target()?
        }
        Sender::Module => arm(orders)?,
    };
    tell(&mut port, &Told::Sending { features })?;
    speak(orders)?;
    have_the_kernel_speak()?;
    thread::sleep(SETTLE);
    let records = read_log()?;
    tell(&mut port, &Told::Printed { records })?;
    if orders.crash {
        thread::sleep(SETTLE);
        fs::write("/proc/sysrq-trigger", "c").context("cannot crash")?;
        thread::sleep(CRASH_TIMEOUT);
        bail!(
            "the kernel lives {} s after it was told to crash",
            CRASH_TIMEOUT.as_secs()
        );
    }
    Ok(())
}

fn load_netconsole(orders: &Orders, targets: &str) -> Result<Vec<String>> {
    for module in &orders.netconsole {
        let netconsole = module == "netconsole.ko" && !targets.is_empty();
        let parameters = netconsole.then(|| format!("netconsole={targets}"));
        load_module(
            &format!("/modules/{module}"),
            &parameters.unwrap_or_default(),
        )?;
    }
    Ok(Vec::new())
}

fn server_mac() -> String {
    HARNESS_MAC.map(|byte| format!("{byte:02x}")).join(":")
}

/// The parameter for a target at the server, and one at rsyslog if that listens.
fn basic_targets(syslog: bool) -> String {
    let (network, mac) = (Network::default(), server_mac());
    let (own, server) = (network.guest(), network.server());
    let target = |from: u16, to: u16| format!("{from}@{own}/{DEVICE},{to}@{server}/{mac}");
    let mut targets = target(SERVER_PORT - 1, SERVER_PORT);
    if syslog {
        targets += &format!(";{}", target(SERVER_PORT - 2, SYSLOG_PORT));
    }
    targets
}

/// Points a target at the server.
fn point(target: &Path, extended: bool) -> Result<()> {
    let network = Network::default();
    let values = [
        ("extended", u8::from(extended).to_string()),
        ("dev_name", DEVICE.to_owned()),
        ("local_port", (SERVER_PORT - 1).to_string()),
        ("local_ip", network.guest().to_string()),
        ("remote_port", SERVER_PORT.to_string()),
        ("remote_ip", network.server().to_string()),
        ("remote_mac", server_mac()),
    ];
    for (name, value) in values {
        fs::write(target.join(name), &value)
            .with_context(|| format!("cannot write {value} to netconsole's {name}"))?;
    }
    Ok(())
}

/// Makes an extended target with all that this kernel's netconsole can add; says what that is.
fn make_target() -> Result<Vec<String>> {
    mount_here("configfs", "/sys/kernel/config")?;
    let target = Path::new(TARGET);
    fs::create_dir(target).context("cannot make a target of netconsole")?;
    let set = |name: &str, value: &str| {
        fs::write(target.join(name), value)
            .with_context(|| format!("cannot write {value} to netconsole's {name}"))
    };
    point(target, true)?;
    let mut features = Vec::new();
    if target.join("release").exists() {
        set("release", "1")?;
        features.push("release".to_owned());
    }
    if target.join("userdata").exists() {
        for (key, value) in USERDATA.iter() {
            fs::create_dir(target.join("userdata").join(key))?;
            set(&format!("userdata/{key}/value"), value)?;
        }
        features.push("userdata".to_owned());
    }
    for (feature, _) in SYSDATA {
        let switch = feature.trim_start_matches("sysdata_");
        let file = format!("userdata/{switch}_enabled");
        if target.join(&file).exists() {
            set(&file, "1")?;
            features.push(feature.to_owned());
        }
    }
    set("enabled", "1")?;
    Ok(features)
}

/// Has our module send to the server, and to rsyslog if that listens.
fn arm(orders: &Orders) -> Result<Vec<String>> {
    let network = Network::default();
    let server = format!("{}:{SERVER_PORT}", network.server());
    let syslog = format!("{}:{SYSLOG_PORT}", network.server());
    let mut arguments = vec!["arm", "--key", "/key", "--module", "/netdump.ko"];
    arguments.extend(["--server", &server, "--console"]);
    if let Some(format) = &orders.syslog {
        arguments.extend(["--syslog", &syslog, "--syslog-format", format]);
    }
    println!("{}", run("/bin/netdump", &arguments)?);
    Ok(Vec::new())
}

/// Prints one message of every kind that a program can have printed.
fn speak(orders: &Orders) -> Result<()> {
    let mut kmsg = open_kmsg()?;
    let mut say = |prefix: u32, text: &[u8]| print(&mut kmsg, prefix, text);
    say(13, BEGIN.as_bytes())?;
    for level in 0..8 {
        say(level, format!("a message of level {level}").as_bytes())?;
    }
    for facility in [1, 3, 10, 23, 24, 31, 255] {
        say(
            facility * 8 + 6,
            format!("a message of facility {facility}").as_bytes(),
        )?;
    }
    say(14, b"")?;
    say(14, b" spaces around ")?;
    say(
        14,
        b"commas, semicolons; equals=signs \\ backslashes \\x41 \"quotes\" % | # [1.5]",
    )?;
    say(14, b"7,1234,5678,-;a text like a header")?;
    say(
        12,
        b"several lines:\nthe second one\n\tand a third one with a TAB",
    )?;
    say(
        12,
        "Gr\u{fc}\u{df}e, \u{43c}\u{438}\u{440}, \u{4e16}\u{754c}".as_bytes(),
    )?;
    say(12, b"bytes that are no text at all: \x80\xc3\xff.")?;
    if orders.sender != Sender::Basic {
        // Basic netconsole passes control characters on, and no receiver can tell that from noise.
        say(12, b"control characters: \x01\x1b[31m\x7f.")?;
    }
    if orders.long_lines {
        for length in EDGE_BYTES {
            let text: Vec<u8> = (b'!'..=b'~').cycle().take(length).collect();
            say(14, &text)?;
        }
        say(14, "\u{fc}".repeat(ESCAPED_CHARS).as_bytes())?;
    }
    burst()
}

fn open_kmsg() -> Result<File> {
    let file = OpenOptions::new().write(true).open("/dev/kmsg");
    file.context("cannot open /dev/kmsg")
}

fn print(kmsg: &mut File, prefix: u32, text: &[u8]) -> Result<()> {
    let record = [format!("<{prefix}>").as_bytes(), text].concat();
    kmsg.write_all(&record)
        .with_context(|| format!("cannot print {} bytes", record.len()))
}

/// Two threads print as fast as they can.
fn burst() -> Result<()> {
    let lines = |name: &str| -> Result<()> {
        let mut kmsg = open_kmsg()?;
        for line in 0..BURST_LINES {
            let text = format!("burst {name}: line {line}, as long as most messages are");
            print(&mut kmsg, 8 + line % 8, text.as_bytes())?;
        }
        Ok(())
    };
    thread::scope(|threads| {
        let other = threads.spawn(|| lines("one"));
        let own = lines("two");
        let ended = other.join().map_err(|_panic| ());
        ensure!(
            ended.is_ok_and(|printed| printed.is_ok()),
            "a burst ended early"
        );
        own
    })
}

/// Has the kernel print messages of its own: in pieces, with dictionaries, very many at once.
fn have_the_kernel_speak() -> Result<()> {
    let sysrq = |key: &str| fs::write("/proc/sysrq-trigger", key).context("cannot use sysrq");
    for key in ["h", "m", "w", "t"] {
        sysrq(key)?;
    }
    let devices = fs::read_dir("/sys/bus/pci/devices").context("no PCI devices")?;
    for device in devices.flatten().map(|device| device.path()) {
        let class = fs::read_to_string(device.join("class")).unwrap_or_default();
        if class.trim() == SMBUS_CLASS {
            fs::write(device.join("remove"), "1").context("cannot remove a PCI device")?;
        }
    }
    fs::write("/sys/bus/pci/rescan", "1").context("cannot look for PCI devices")
}

/// Everything in the kernel's log, a record each.
fn read_log() -> Result<Vec<String>> {
    let mut kmsg = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .context("cannot open /dev/kmsg")?;
    let (mut records, mut record) = (Vec::new(), vec![0; RECORD_BYTES_MAX]);
    loop {
        match kmsg.read(&mut record) {
            Ok(bytes) => {
                let text = std::str::from_utf8(&record[..bytes]);
                records.push(text.context("the kernel's log is not ASCII")?.to_owned());
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(records),
            Err(error) => return Err(error).context("the kernel's log is not whole"),
        }
    }
}
