//! What a guest does before it crashes, if it is told to: it loads, arms, disarms and unloads again and
//! again, with traffic, and takes the network card away meanwhile. What that leaves behind is measured.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::guest::{configure_network, run, wait_for, wait_for_carrier};
use crate::stage::{DEVICE, Network};

/// Cycles after which what a kernel allocates once has been allocated.
const WARM_UP: u32 = 20;
/// The card is taken off its bus in each cycle of so many.
const REMOVE_EVERY: u32 = 40;
/// What a cycle may leave behind on average. The smallest thing that the module takes in an arming
/// is a page; less is what the kernel's own caches breathe.
const LEFT_BYTES_MAX: u64 = 2048;
/// What they breathe in all.
const BREATH_KIB: u64 = 1024;
/// How the kernel's complaints begin.
const SPLATS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "Call Trace:",
    "INFO: ",
    "refcount_t:",
    "unregister_netdevice: waiting",
];

/// Kernel memory in KiB that a leak would show in, with the module unloaded.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Memory {
    /// Slab memory that cannot be reclaimed.
    pub slab: u64,
    /// Virtually mapped memory.
    pub vmalloc: u64,
    /// Per-CPU memory.
    pub percpu: u64,
    /// Neither free nor a cache nor a process's nor any of the above.
    pub unaccounted: u64,
}

/// What was found.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Stress {
    /// Cycles.
    pub cycles: u32,
    /// How often the host was armed.
    pub armed: u32,
    /// How often an armed host lost its card or its link, and said so.
    pub lost: u32,
    /// How often the card was taken off its bus.
    pub removed: u32,
    /// Seconds they took.
    pub seconds: u64,
    /// Datagrams sent meanwhile.
    pub datagrams: u64,
    /// After the first cycles.
    pub before: Memory,
    /// At the end.
    pub after: Memory,
}

impl Memory {
    fn read() -> Result<Self> {
        fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop caches")?;
        // What is freed after a grace period is freed then.
        thread::sleep(Duration::from_millis(500));
        let text = fs::read_to_string("/proc/meminfo")?;
        Self::of(&text).context("/proc/meminfo lacks something")
    }

    fn of(text: &str) -> Option<Self> {
        let number = |name: &str| -> Option<u64> {
            let mut lines = text.lines();
            let rest = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            rest.trim().trim_end_matches(" kB").parse().ok()
        };
        let used = [
            "MemFree",
            "Buffers",
            "Cached",
            "AnonPages",
            "Slab",
            "KernelStack",
            "PageTables",
            "VmallocUsed",
            "Percpu",
        ];
        let mut known = 0;
        for name in used {
            known += number(name)?;
        }
        Some(Self {
            slab: number("SUnreclaim")?,
            vmalloc: number("VmallocUsed")?,
            percpu: number("Percpu")?,
            unaccounted: number("MemTotal")?.saturating_sub(known),
        })
    }

    /// How much more of each there is than `before`.
    fn grown(self, before: Self) -> [(&'static str, u64); 4] {
        [
            ("slab", self.slab.saturating_sub(before.slab)),
            ("vmalloc", self.vmalloc.saturating_sub(before.vmalloc)),
            ("per-CPU", self.percpu.saturating_sub(before.percpu)),
            (
                "unaccounted",
                self.unaccounted.saturating_sub(before.unaccounted),
            ),
        ]
    }
}

/// Does `cycles` cycles; `arm` arms, and loads the module if it is not. The host is armed afterwards.
///
/// # Errors
/// Something fails, is left behind, or the kernel complains.
pub fn stress(network: Network, cycles: u32, arm: &dyn Fn() -> Result<()>) -> Result<Stress> {
    ensure!(!network.ip6, "an IPv6 address does not survive its link");
    let begin = Instant::now();
    let quiet = splats()?.len();
    let (stop, traffic) = blast(network.server());
    let mut found = Stress {
        cycles,
        ..Stress::default()
    };
    for number in 0..cycles + WARM_UP {
        if number == WARM_UP {
            found.before = at_rest()?;
            arm()?;
        }
        cycle(network, number, arm, &mut found)
            .with_context(|| format!("cycle {number} of {}", cycles + WARM_UP))?;
    }
    found.after = at_rest()?;
    stop.store(true, Ordering::Relaxed);
    found.datagrams = traffic.join().unwrap_or(0);
    arm()?;
    found.seconds = begin.elapsed().as_secs();
    let complaints = splats()?;
    ensure!(
        complaints.len() <= quiet,
        "the kernel complains: {}",
        complaints.last().map_or("", String::as_str)
    );
    judge(&found)?;
    Ok(found)
}

fn judge(found: &Stress) -> Result<()> {
    let allowed = u64::from(found.cycles) * LEFT_BYTES_MAX / 1024 + BREATH_KIB;
    for (name, grown) in found.after.grown(found.before) {
        ensure!(
            grown <= allowed,
            "{name} memory grew by {grown} KiB in {} cycles: {found:?}",
            found.cycles
        );
    }
    Ok(())
}

fn at_rest() -> Result<Memory> {
    run("/bin/netdump", &["disarm"])?;
    Memory::read()
}

fn cycle(
    network: Network,
    number: u32,
    arm: &dyn Fn() -> Result<()>,
    found: &mut Stress,
) -> Result<()> {
    if number % REMOVE_EVERY == REMOVE_EVERY - 1 {
        remove_card(network)?;
        found.removed += 1;
        found.lost += 1;
    } else {
        match number % 5 {
            0 => drop(run("/bin/netdump", &["disarm"])?),
            // Over the arming that there is.
            1 => {}
            2 => {
                down_and_up(&[])?;
                found.lost += 1;
            }
            3 => {
                down_and_up(&["name", "renamed"])?;
                found.lost += 1;
            }
            // Unloaded as it is, armed.
            _ => drop(run("/bin/busybox", &["rmmod", "netdump"])?),
        }
    }
    found.armed += 1;
    arm()
}

/// The link goes down under an armed host, which must notice; with words of `ip link set` done
/// meanwhile.
fn down_and_up(meanwhile: &[&str]) -> Result<()> {
    let link = |words: &[&str]| run("/bin/busybox", &[&["ip", "link", "set"], words].concat());
    link(&[DEVICE, "down"])?;
    must_be_lost()?;
    if let [verb, name] = meanwhile {
        link(&[DEVICE, verb, name])?;
        link(&[name, verb, DEVICE])?;
    }
    link(&[DEVICE, "up"])?;
    wait_for_carrier(DEVICE)
}

fn remove_card(network: Network) -> Result<()> {
    let device = fs::canonicalize(format!("/sys/class/net/{DEVICE}/device"))
        .context("the card is on no bus")?;
    // virtio's devices lie below one on the PCI bus.
    let mut on_bus = device.as_path();
    while !on_bus.join("config").exists() {
        on_bus = on_bus.parent().context("the card is not on the PCI bus")?;
    }
    fs::write(on_bus.join("remove"), "1").context("cannot take the card off its bus")?;
    ensure!(
        !Path::new("/sys/class/net").join(DEVICE).exists(),
        "{DEVICE} is still there"
    );
    must_be_lost()?;
    fs::write("/sys/bus/pci/rescan", "1").context("cannot look for the card again")?;
    wait_for("the card", || {
        ensure!(Path::new("/sys/class/net").join(DEVICE).exists(), "no card");
        Ok(())
    })?;
    configure_network(network).map(|_| ())
}

fn must_be_lost() -> Result<()> {
    let status = run("/bin/netdump", &["status"])?;
    let first = status.lines().next().unwrap_or_default().to_owned();
    ensure!(
        status.contains("arm again"),
        "an armed host that lost its card says {first:?}"
    );
    Ok(())
}

/// Sends datagrams to nobody until told to stop; gives how many.
fn blast(server: std::net::IpAddr) -> (Arc<AtomicBool>, thread::JoinHandle<u64>) {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let thread = thread::spawn(move || {
        let mut sent = 0;
        while !seen.load(Ordering::Relaxed) {
            // It fails while the link is down, which is what is wanted.
            let socket = UdpSocket::bind("0.0.0.0:0");
            for _ in 0..20 {
                let to = SocketAddr::new(server, 9);
                sent += u64::from(
                    socket
                        .as_ref()
                        .is_ok_and(|socket| socket.send_to(&[0x5a; 1000], to).is_ok()),
                );
            }
            thread::sleep(Duration::from_millis(2));
        }
        sent
    });
    (stop, thread)
}

/// The kernel's complaints so far.
fn splats() -> Result<Vec<String>> {
    let log = run("/bin/busybox", &["dmesg"])?;
    let complains = |line: &&str| SPLATS.iter().any(|splat| line.contains(splat));
    Ok(log.lines().filter(complains).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal: 1000 kB\nMemFree: 400 kB\nBuffers: 10 kB\nCached: 90 kB\nAnonPages: 50 kB\n\
        Slab: 100 kB\nSUnreclaim: 60 kB\nKernelStack: 10 kB\nPageTables: 10 kB\nVmallocUsed: 30 kB\nPercpu: 20 kB\n";

    #[test]
    fn a_leak_is_seen_wherever_it_is() {
        let before = Memory::of(MEMINFO).unwrap();
        assert_eq!(
            (
                before.slab,
                before.vmalloc,
                before.percpu,
                before.unaccounted
            ),
            (60, 30, 20, 280)
        );
        let stress = |after: Memory| Stress {
            cycles: 1000,
            before,
            after,
            ..Stress::default()
        };
        assert!(judge(&stress(before)).is_ok());
        // A page each cycle.
        for text in [
            MEMINFO.replace("MemFree: 400", "MemFree: 40"),
            MEMINFO.replace("SUnreclaim: 60", "SUnreclaim: 4060"),
            MEMINFO.replace("VmallocUsed: 30", "VmallocUsed: 4030"),
            MEMINFO.replace("Percpu: 20", "Percpu: 4020"),
        ] {
            let mut after = Memory::of(&text).unwrap();
            after.unaccounted *= if text.contains("MemFree: 40 ") { 10 } else { 1 };
            assert!(judge(&stress(after)).is_err(), "{text}");
        }
        assert!(Memory::of("MemTotal: 1 kB\n").is_none());
    }
}
