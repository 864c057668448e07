//! The way to a server: name -> address -> route -> next hop -> its Ethernet address.
//!
//! A crashed host asks nobody: it sends finished Ethernet frames. So the kernel's tables are read
//! when the host is armed, and what they say then is what a crash uses.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use proto::wire::{DATAGRAM_BYTES_MAX, DATAGRAM_BYTES_MIN, PORT};
use rustix::io::Errno;

use crate::netlink::{Link, Netlink};

/// Everything needed to address frames to one server.
#[derive(Debug, Clone)]
pub struct Way {
    /// The device they leave by.
    pub device: Link,
    /// The host's own address.
    pub local: IpAddr,
    /// The server.
    pub remote: SocketAddr,
    /// Who is handed the frames: a gateway, or the server itself.
    pub next_hop: IpAddr,
    /// The next hop's Ethernet address.
    pub next_hop_mac: [u8; 6],
    /// The largest UDP payload to send, in bytes.
    pub datagram_bytes: u16,
}

/// Finds the way to `server` (`HOST[:PORT]`), by `device` only when one is named.
///
/// Waits some seconds for the next hop to answer. Errors name the step that failed.
pub fn find(server: &str, device: Option<&str>) -> Result<Way> {
    let remote = resolve(server)?;
    ensure!(
        remote.is_ipv4(),
        "server {remote} is IPv6, the client speaks IPv4 only: name an IPv4 address"
    );
    let mut netlink = Netlink::open().context("cannot open a netlink socket")?;
    let wanted = device
        .map(|name| link_by_name(&mut netlink, name))
        .transpose()?;
    let route = match netlink.route(remote.ip(), wanted.as_ref().map(|link| link.index)) {
        Ok(route) => route,
        Err(error) => {
            let by = device
                .map(|name| format!(" by device {name}"))
                .unwrap_or_default();
            return Err(error).with_context(|| format!("no route to {}{by}", remote.ip()));
        }
    };
    ensure!(
        !route.local,
        "{} is this machine itself: a crash needs another machine as its server",
        remote.ip()
    );
    let device = netlink
        .link_by_index(route.device_index)
        .with_context(|| format!("cannot ask for device number {}", route.device_index))?;
    ensure!(
        device.up,
        "device {} is down: set it up first (ip link set {} up)",
        device.name,
        device.name
    );
    ensure!(
        device.mac.is_some(),
        "device {}, by which {} is reached, is not Ethernet: name another with --device",
        device.name,
        remote.ip()
    );
    let local = route
        .source
        .ok_or_else(|| anyhow!("device {} has no address of its own", device.name))?;
    let next_hop = route.gateway.unwrap_or_else(|| remote.ip());
    let next_hop_mac = neighbour(&mut netlink, next_hop, &device)?;
    let datagram_bytes = datagram_bytes(&device, local, route.gateway.is_some())?;
    Ok(Way {
        device,
        local,
        remote,
        next_hop,
        next_hop_mac,
        datagram_bytes,
    })
}

/// The server's address: a numeric one as it stands, else what the resolver says, IPv4 before IPv6.
pub(crate) fn resolve(server: &str) -> Result<SocketAddr> {
    if let Ok(address) = server.parse::<SocketAddr>() {
        return Ok(address);
    }
    let bare = server
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(server);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(SocketAddr::new(address, PORT));
    }
    let (name, port) = match server.rsplit_once(':') {
        Some((name, port)) => {
            let port = port.parse().ok().filter(|&port| port != 0);
            (
                name,
                port.ok_or_else(|| anyhow!("server {server:?} ends in no port (1 to 65535)"))?,
            )
        }
        None => (server, PORT),
    };
    let found: Vec<SocketAddr> = (name, port)
        .to_socket_addrs()
        .with_context(|| format!("cannot resolve the server's name {name:?}"))?
        .collect();
    let first = found
        .iter()
        .find(|address| address.is_ipv4())
        .or_else(|| found.first());
    first
        .copied()
        .ok_or_else(|| anyhow!("the server's name {name:?} has no address"))
}

fn link_by_name(netlink: &mut Netlink, name: &str) -> Result<Link> {
    netlink.link_by_name(name).map_err(|error| {
        if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) {
            anyhow!("no such device: {name}")
        } else {
            anyhow!(error).context(format!("cannot ask for device {name}"))
        }
    })
}

/// The neighbour's Ethernet address, resolved by the kernel if it is not known yet.
fn neighbour(netlink: &mut Netlink, address: IpAddr, device: &Link) -> Result<[u8; 6]> {
    let ask = |netlink: &mut Netlink| {
        netlink
            .neighbour(address, device.index)
            .with_context(|| format!("cannot ask for the neighbour {address}"))
    };
    if let Some(mac) = ask(netlink)? {
        return Ok(mac);
    }
    netlink.resolve(address, device.index).with_context(|| {
        format!(
            "cannot make the kernel resolve {address} on {} (are you root?)",
            device.name
        )
    })?;
    let give_up = Instant::now() + NEIGHBOUR_WAIT_MAX;
    while Instant::now() < give_up {
        thread::sleep(NEIGHBOUR_POLL);
        if let Some(mac) = ask(netlink)? {
            return Ok(mac);
        }
    }
    bail!(
        "{address} does not answer on {} ({} s waited): wrong server address, wrong device or a \
        cut cable",
        device.name,
        NEIGHBOUR_WAIT_MAX.as_secs()
    )
}

/// The largest UDP payload for frames by `device`.
fn datagram_bytes(device: &Link, local: IpAddr, routed: bool) -> Result<u16> {
    let mtu = if routed {
        device.mtu_bytes.min(ROUTED_MTU_BYTES_MAX)
    } else {
        device.mtu_bytes
    };
    let headers = if local.is_ipv4() { 20 + 8 } else { 40 + 8 };
    let fits = usize::try_from(mtu.saturating_sub(headers))
        .unwrap_or(usize::MAX)
        .min(DATAGRAM_BYTES_MAX);
    ensure!(
        fits >= DATAGRAM_BYTES_MIN,
        "device {} carries packets of {mtu} bytes, the least usable is {}",
        device.name,
        DATAGRAM_BYTES_MIN + 28
    );
    u16::try_from(fits).context("datagram size")
}

/// Three ARP requests a second apart, and a margin.
const NEIGHBOUR_WAIT_MAX: Duration = Duration::from_secs(4);
const NEIGHBOUR_POLL: Duration = Duration::from_millis(20);
/// Beyond a router nothing is known of the links, and a crashed host cannot discover their limit.
const ROUTED_MTU_BYTES_MAX: u32 = 1500;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_named_with_and_without_port() {
        let check =
            |text: &str, expected: &str| assert_eq!(resolve(text).unwrap().to_string(), expected);
        check("10.1.2.3", "10.1.2.3:6666");
        check("10.1.2.3:99", "10.1.2.3:99");
        check("fe80::1", "[fe80::1]:6666");
        check("[fe80::1]", "[fe80::1]:6666");
        check("[fe80::1]:7", "[fe80::1]:7");
        check("localhost:7", "127.0.0.1:7");
        for bad in ["localhost:0", "localhost:x", "no.such.name.invalid"] {
            assert!(resolve(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn this_machine_is_refused_as_its_own_server() {
        let error = format!("{:#}", find("127.0.0.1", None).unwrap_err());
        assert!(error.contains("this machine itself"), "{error}");
    }

    #[test]
    fn an_unknown_device_is_named() {
        let error = format!("{:#}", find("192.0.2.1", Some("nosuchdev0")).unwrap_err());
        assert_eq!(error, "no such device: nosuchdev0");
    }

    #[test]
    fn datagrams_fill_the_link_but_not_an_unknown_path() {
        let link = |mtu_bytes| Link {
            index: 1,
            name: "e".into(),
            mac: Some([2; 6]),
            mtu_bytes,
            up: true,
        };
        let v4 = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(datagram_bytes(&link(1500), v4, false).unwrap(), 1472);
        assert_eq!(datagram_bytes(&link(9000), v4, false).unwrap(), 8972);
        assert_eq!(datagram_bytes(&link(9000), v4, true).unwrap(), 1472);
        assert!(datagram_bytes(&link(400), v4, false).is_err());
    }
}
