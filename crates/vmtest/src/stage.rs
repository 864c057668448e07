//! What the guest and the harness tell each other: the guest's orders (a file in its initramfs) and
//! its stages (one JSON line each on a virtio-serial port, which the kernel never prints to).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::crash::Crash;
use crate::frame::Format;
use crate::stress::Stress;

/// Name of the virtio-serial port that carries the stages.
pub const PORT_NAME: &str = "vmtest";
/// Where the orders lie in the initramfs.
pub const ORDERS_PATH: &str = "/orders.json";
/// The UDP port, of nobody, that floods go to.
pub const FLOOD_PORT: u16 = 9;
/// Bytes of a flood's datagrams.
pub const FLOOD_BYTES: usize = 1000;
/// The UDP port the guest sends its session to.
pub const SERVER_PORT: u16 = 6666;

/// How long the guest waits between saying that it crashes and crashing, so that the harness, which
/// may share few CPUs with it, has heard it before.
pub const CRASH_DELAY: Duration = Duration::from_millis(200);

/// The network between the guest and the harness, which is gateway and server in one.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Network {
    /// Guest and server speak IPv6.
    pub ip6: bool,
    /// They are on this VLAN.
    pub vlan: Option<u16>,
    /// The MTU of the guest's device; `None` leaves it as it is.
    pub mtu: Option<u32>,
    /// The guest is armed with a first server that does not exist, before the one that does.
    pub dead_server: bool,
    /// What the guest's address is on, if not on its network card.
    pub over: Option<Over>,
    /// Guest and server flood each other from the guest's word that it crashes on, the server until
    /// the end.
    pub traffic: bool,
}

/// A device of software that is made of network cards.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Over {
    /// A bridge whose one port is the card.
    Bridge,
    /// A bond of two cards, of which one is in use.
    Bond,
    /// A bond of two cards by 802.3ad, whose partner does not speak its protocol.
    #[value(name = "bond-8023ad")]
    #[serde(rename = "bond-8023ad")]
    Bond8023ad,
    /// A macvlan on the card.
    Macvlan,
}

impl Over {
    /// The name of the device in the guest.
    #[must_use]
    pub const fn device(self) -> &'static str {
        match self {
            Self::Bridge => "br0",
            Self::Bond | Self::Bond8023ad => "bond0",
            Self::Macvlan => "macvlan0",
        }
    }

    /// The kernel's module for it.
    #[must_use]
    pub const fn module(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Bond | Self::Bond8023ad => "bonding",
            Self::Macvlan => "macvlan",
        }
    }

    /// The mode of a bond, as the kernel calls it.
    #[must_use]
    pub const fn bond_mode(self) -> Option<&'static str> {
        match self {
            Self::Bond => Some("active-backup"),
            Self::Bond8023ad => Some("802.3ad"),
            Self::Bridge | Self::Macvlan => None,
        }
    }
}

impl Network {
    /// The guest's address.
    #[must_use]
    pub fn guest(self) -> IpAddr {
        self.address(15)
    }

    /// The server's address.
    #[must_use]
    pub fn server(self) -> IpAddr {
        self.address(2)
    }

    /// The address of the server that does not exist.
    #[must_use]
    pub fn nobody(self) -> IpAddr {
        self.address(3)
    }

    /// What frames look like.
    #[must_use]
    pub fn format(self) -> Format {
        Format {
            ip6: self.ip6,
            vlan: self.vlan,
        }
    }

    /// The guest's device that has the address.
    #[must_use]
    pub fn device(self) -> String {
        let vlan = self.vlan.map(|vlan| format!(".{vlan}"));
        format!("{}{}", self.base(), vlan.unwrap_or_default())
    }

    /// The same without its VLAN.
    #[must_use]
    pub fn base(self) -> &'static str {
        self.over.map_or(DEVICE, Over::device)
    }

    /// The guest's network cards.
    #[must_use]
    pub fn cards(self) -> &'static [&'static str] {
        let bond = self.over.and_then(Over::bond_mode);
        if bond.is_some() {
            &[DEVICE, "eth1"]
        } else {
            &[DEVICE]
        }
    }

    fn address(self, last: u8) -> IpAddr {
        if self.ip6 {
            Ipv6Addr::new(0xfd6e, 0x64, 0, 0, 0, 0, 0, last.into()).into()
        } else {
            Ipv4Addr::new(10, 0, 2, last).into()
        }
    }
}

/// What a crash kernel is told, so that the first program knows that it is in one.
pub const CAPTURE_WORD: &str = "vmtest.capture";
/// What the first program says there, on the serial console.
pub const CAPTURED: &str = "guest_init: captured";
/// Where crash kernel and its initramfs lie in the guest's own.
pub const CAPTURE_KERNEL: &str = "/capture/vmlinuz";
/// See [`CAPTURE_KERNEL`].
pub const CAPTURE_INITRAMFS: &str = "/capture/initramfs";
/// Memory kept for a crash kernel: Debian's need more than 112 MiB.
pub const CRASH_KERNEL: &str = "crashkernel=160M";

/// The guest's network card.
pub const DEVICE: &str = "eth0";

/// What the guest is to do.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Orders {
    /// Files below /modules, in load order.
    pub modules: Vec<String>,
    /// How the kernel is to end.
    pub crash: Crash,
    /// What to put into memory before.
    pub fill: Fill,
    /// Seed of the pattern and of random memory.
    pub seed: u64,
    /// Options for `netdump arm` beyond those that every run has.
    pub arm: Vec<String>,
    /// What it is connected to.
    pub network: Network,
    /// Cycles of loading, arming and unloading before it crashes.
    pub stress: u32,
}

/// What lies in the guest's memory when it crashes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fill {
    /// Only what booting left there; most pages are zero.
    #[default]
    Booted,
    /// Four fifths of the available memory hold copies of programs, modules and text, as on a host
    /// at work.
    Ordinary,
    /// Four fifths of the available memory hold incompressible words.
    Random,
    /// Some of every kind of page that a filter tells apart: files in a tmpfs and on a disk, another
    /// process, huge pages of both sorts, and memory that was given back.
    Mixed,
}

/// Symbols that are not data but say where parts of the kernel's image begin and end.
pub const IMAGE_SYMBOLS: [&str; 7] = [
    "_text",
    "_etext",
    "__start_rodata",
    "__end_rodata",
    "_sdata",
    "__init_begin",
    "__init_end",
];

/// One line on the port.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", tag = "stage")]
pub enum Stage {
    /// The first program runs.
    Booted {
        /// `uname -r`.
        kernel: String,
    },
    /// The network device is up with its address.
    Configured {
        /// Hardware address as the kernel prints it.
        mac: String,
    },
    /// `netdump arm` succeeded.
    Armed {
        /// What `netdump status --json` printed.
        status: serde_json::Value,
    },
    /// The pattern is in memory.
    Pattern {
        /// Where each page of it is.
        pages: Vec<PatternRun>,
    },
    /// What the kernel says about its memory.
    Kernel(Kernel),
    /// The cycles are over.
    Stressed(Stress),
    /// The guest crashes when [`CRASH_DELAY`] is over.
    Crashing,
    /// The module refused to arm for this device.
    Refused {
        /// Its reason, on one line.
        why: String,
    },
    /// This machine cannot be crashed in the way that was ordered.
    Impossible {
        /// Why, on one line.
        why: String,
    },
    /// The guest cannot go on.
    Failed {
        /// What went wrong, on one line.
        why: String,
    },
}

/// Consecutive pages of one kind of pattern that are also consecutive in physical memory.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PatternRun {
    /// "user", "slab" or "vmalloc".
    pub kind: String,
    /// Number of the first page in the pattern.
    pub index: u64,
    /// Page frame number of the first page.
    pub pfn: u64,
    /// How many.
    pub pages: u64,
}

/// Facts about the running kernel, from /proc/iomem, /proc/kallsyms and /sys/kernel/slab.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Kernel {
    /// "System RAM": first and last byte of each range.
    pub ram: Vec<(u64, u64)>,
    /// Physical address of the first byte of the kernel's code.
    pub code: u64,
    /// Data symbols: address, size up to the next symbol is left to the reader, name.
    pub symbols: Vec<(u64, String)>,
    /// The slab caches that buffers of the network come from: bytes from object to object, and
    /// where in a free one the pointer to the next lies.
    pub slabs: Vec<(u64, u64)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_on_the_topmost_device() {
        let device = |over, vlan| {
            let network = Network {
                over,
                vlan,
                ..Network::default()
            };
            (network.device(), network.cards().len())
        };
        assert_eq!(device(None, None), ("eth0".to_owned(), 1));
        assert_eq!(device(Some(Over::Bridge), Some(7)), ("br0.7".to_owned(), 1));
        assert_eq!(device(Some(Over::Bond), None), ("bond0".to_owned(), 2));
    }
}
