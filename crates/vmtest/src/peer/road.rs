//! The road between guest and server: a tap in a network namespace of this process's own.

use std::fs;

use anyhow::{Context as _, Result};
use rustix::thread::UnshareFlags;

use super::SERVER;
use crate::guest::run;

const TAP: &str = "netdump0";

/// The road; it is gone with the process.
pub(super) struct Road;

/// Bytes of frames so far.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Traffic {
    /// By the guest.
    pub(super) sent: u64,
    /// To the guest.
    pub(super) received: u64,
}

/// QEMU's word for its end of the road.
pub(super) fn netdev() -> String {
    format!("tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off")
}

impl Road {
    /// Builds it. All programs that this process starts from now on are in its namespace, so there
    /// must be no other thread yet.
    pub(super) fn build() -> Result<Self> {
        // SAFETY: a network namespace of its own shares no memory or file that code relies on.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
            .context("cannot have a network namespace: run this as root")?;
        let address = format!("{SERVER}/24");
        let commands: [&[&str]; 4] = [
            &["link", "set", "lo", "up"],
            &["tuntap", "add", "dev", TAP, "mode", "tap"],
            &["addr", "add", &address, "dev", TAP],
            &["link", "set", TAP, "up"],
        ];
        for command in commands {
            run("ip", command).context("is iproute2 installed?")?;
        }
        Ok(Self)
    }

    pub(super) fn traffic(&self) -> Result<Traffic> {
        let text = fs::read_to_string("/proc/self/net/dev").context("cannot read net/dev")?;
        traffic(&text).with_context(|| format!("net/dev has no {TAP}"))
    }
}

/// What the guest sends the tap receives.
fn traffic(text: &str) -> Option<Traffic> {
    let mark = format!("{TAP}:");
    let counts = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(&mark))?;
    let mut counts = counts.split_ascii_whitespace().map(str::parse);
    Some(Traffic {
        sent: counts.next()?.ok()?,
        received: counts.nth(7)?.ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_are_read() {
        let text = "Inter-| Receive | Transmit\n    lo: 1 2 3 4 5 6 7 8 9 10\n\
                    netdump0: 100 2 0 0 0 0 0 0 900 10 0 0 0 0 0 0\n";
        let expected = Traffic {
            sent: 100,
            received: 900,
        };
        assert_eq!(traffic(text), Some(expected));
        assert_eq!(traffic("lo: 1\n"), None);
    }
}
