//! The way to a server: name -> address -> route -> next hop -> its Ethernet address.
//!
//! A crashed host asks nobody: it sends finished Ethernet frames. So the kernel's tables are read
//! when the host is armed, and what they say then is what a crash uses.

use std::fs;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use proto::wire::{DATAGRAM_BYTES_MAX, DATAGRAM_BYTES_MIN, PORT};
use rustix::io::Errno;

use crate::netlink::{Link, Netlink, Route, Usable};

/// Everything needed to address frames to one server.
#[derive(Debug, Clone)]
pub struct Way {
    /// The device whose Ethernet address they carry: a network card, or the bond, bridge or macvlan
    /// that the module finds its cards below.
    pub device: Link,
    /// The 802.1Q tag they need there: priority and VLAN.
    pub tag: Option<u16>,
    /// The host's own address.
    pub local: IpAddr,
    /// The server.
    pub remote: SocketAddr,
    /// Who is handed the frames: a gateway, or the server itself.
    pub next_hop: IpAddr,
    /// The next hop's Ethernet address; `None` if it does not answer now.
    pub next_hop_mac: Option<[u8; 6]>,
    /// The largest UDP payload to send, in bytes.
    pub datagram_bytes: u16,
}

/// Finds the way to `server` (`HOST[:PORT]`), by `device` only when one is named, with packets of
/// `mtu` bytes at most if that is given.
///
/// Waits some seconds for the next hop to answer. Errors name the step that failed.
pub fn find(server: &str, device: Option<&str>, mtu: Option<u32>) -> Result<Way> {
    let Named { remote, scope } = resolve(server)?;
    let device = device.or(scope.as_deref());
    ensure!(
        device.is_some() || !is_link_local(remote.ip()),
        "server {} is a link-local address, which each device has its own of: name it with its \
         device ({}%DEVICE) or give --device",
        remote.ip(),
        remote.ip()
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
    let by = netlink
        .link_by_index(route.device_index)
        .with_context(|| format!("cannot ask for device number {}", route.device_index))?;
    let (device, tag) = below(&mut netlink, by.clone(), remote.ip())?;
    let local = source(&mut netlink, &route, &by)?;
    let next_hop = route.gateway.unwrap_or_else(|| remote.ip());
    let next_hop_mac = neighbour(&mut netlink, next_hop, &by)?;
    let datagram_bytes = datagram_bytes(&by, &route, local, mtu)?;
    Ok(Way {
        device,
        tag,
        local,
        remote,
        next_hop,
        next_hop_mac,
        datagram_bytes,
    })
}

/// Says that nobody answered for the next hop of `way`.
#[must_use]
pub fn unanswered(way: &Way) -> String {
    format!(
        "{} does not answer on {} ({} s waited): wrong server address, wrong device or a cut cable",
        way.next_hop,
        way.device.name,
        NEIGHBOUR_WAIT_MAX.as_secs()
    )
}

/// A server as it was named.
pub(crate) struct Named {
    pub(crate) remote: SocketAddr,
    /// The device that a link-local address was named with.
    scope: Option<String>,
}

/// The server's address: a numeric one as it stands, else what the resolver says, IPv4 before IPv6.
pub(crate) fn resolve(server: &str) -> Result<Named> {
    let (plain, scope) = split_scope(server);
    let named = |remote| Named {
        remote,
        scope: scope.clone(),
    };
    if let Ok(address) = plain.parse::<SocketAddr>() {
        return Ok(named(address));
    }
    let bare = plain
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(&plain);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(named(SocketAddr::new(address, PORT)));
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
        .map(|&remote| Named {
            remote,
            scope: None,
        })
        .ok_or_else(|| anyhow!("the server's name {name:?} has no address"))
}

/// Takes the device out of `fe80::1%eth0` or `[fe80::1%eth0]:6666`.
fn split_scope(server: &str) -> (String, Option<String>) {
    let Some((address, rest)) = server.split_once('%') else {
        return (server.to_owned(), None);
    };
    let (scope, port) = match rest.split_once(']') {
        Some((scope, port)) => (scope, format!("]{port}")),
        None => (rest, String::new()),
    };
    (format!("{address}{port}"), Some(scope.to_owned()))
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Whether frames can be sent by `device` after a crash, as far as its kind tells.
fn check(device: &Link, remote: IpAddr) -> Result<()> {
    let name = &device.name;
    ensure!(
        device.up,
        "device {name} is down: set it up first (ip link set {name} up)"
    );
    ensure!(
        device.mac.is_some(),
        "device {name}, by which {remote} is reached, is not Ethernet: name another with --device"
    );
    if let Some(kind) = device
        .kind
        .as_deref()
        .filter(|kind| UNUSABLE.contains(kind))
    {
        bail!(
            "device {name}, by which {remote} is reached, is a {kind}: netdump cannot send by the \
             devices it is made of; use a server that is reached by a network card, or by a VLAN, \
             bond, bridge or macvlan on one"
        );
    }
    Ok(())
}

/// The device whose Ethernet address the frames of `device` carry, and the tag they have where they
/// leave. What is between the two is followed down to a card or to a bond of cards.
fn below(netlink: &mut Netlink, device: Link, remote: IpAddr) -> Result<(Link, Option<u16>)> {
    let (mut top, mut tag, mut at) = (None, None, device);
    for _ in 0..DEPTH_MAX {
        check(&at, remote)?;
        let next = match (at.kind.as_deref(), at.vlan) {
            (_, Some(vlan)) => {
                let below = below_vlan(netlink, &at, top.is_none())?;
                ensure!(
                    vlan.protocol == ETHERTYPE_VLAN && tag.is_none(),
                    "device {} needs two tags or one of 802.1ad (QinQ): netdump sends one 802.1Q tag",
                    at.name
                );
                tag = Some(vlan.priority << 13 | vlan.id);
                below
            }
            (Some("macvlan"), _) => {
                let below = link_below(netlink, &at)?;
                top.get_or_insert(at);
                below
            }
            (Some("bridge"), _) => {
                let below = only_port(netlink, &at)?;
                top.get_or_insert(at);
                below
            }
            (Some("bond"), _) => {
                check_bond(netlink, &at)?;
                return Ok((top.unwrap_or(at), tag));
            }
            _ => return Ok((top.unwrap_or(at), tag)),
        };
        at = next;
    }
    bail!(
        "device {} is {DEPTH_MAX} devices above its network card: name one nearer to it",
        at.name
    )
}

/// The device that `device` names as the one below it.
fn link_below(netlink: &mut Netlink, device: &Link) -> Result<Link> {
    let name = &device.name;
    let index = device
        .below
        .with_context(|| format!("device {name} has no device below it"))?;
    netlink
        .link_by_index(index)
        .with_context(|| format!("cannot ask for the device below {name}"))
}

/// The same for a VLAN device. If nothing above it has an address of its own, frames carry that of
/// the device below, so it must be the VLAN device's too.
fn below_vlan(netlink: &mut Netlink, device: &Link, is_top: bool) -> Result<Link> {
    let below = link_below(netlink, device)?;
    ensure!(
        !is_top || device.mac == below.mac,
        "VLAN device {} and {} below it have different Ethernet addresses: give them one",
        device.name,
        below.name
    );
    Ok(below)
}

/// The one port of a bridge that leads to a network card.
fn only_port(netlink: &mut Netlink, bridge: &Link) -> Result<Link> {
    let name = &bridge.name;
    let filters = setting(name, "bridge/vlan_filtering")?;
    ensure!(
        filters == "0",
        "bridge {name} filters VLANs (vlan_filtering {filters}): what tag a port gives a frame is \
         not known to netdump; use a server that is reached without this bridge"
    );
    let mut ports = Vec::new();
    for port in lower_names(name)? {
        let link = link_by_name(netlink, &port)?;
        let leads_on = matches!(link.kind.as_deref(), Some("bond" | "vlan"));
        if leads_on || is_hardware(&port) {
            ports.push(link);
        }
    }
    let names: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
    let names = names.join(", ");
    let count = ports.len();
    match (ports.pop(), count) {
        (Some(port), 1) => Ok(port),
        _ => bail!(
            "bridge {name} has {count} ports that lead to network cards ({names}): netdump can send \
             by a bridge that has one"
        ),
    }
}

/// Whether a bond sends one flow by one card, with its own address on all of them, and is made of
/// nothing but cards.
fn check_bond(netlink: &mut Netlink, bond: &Link) -> Result<()> {
    let name = &bond.name;
    let mode = setting(name, "bonding/mode")?;
    let mode = mode.split(' ').next().unwrap_or_default();
    ensure!(
        BOND_MODES.contains(&mode),
        "bond {name} is of mode {mode}: netdump can send by {}",
        BOND_MODES.join(", ")
    );
    if mode == "active-backup" {
        let moves = setting(name, "bonding/fail_over_mac")?;
        ensure!(
            moves.starts_with("none"),
            "bond {name} changes its Ethernet address with its active card (fail_over_mac {moves}): \
             set fail_over_mac to none"
        );
    }
    for slave in lower_names(name)? {
        let link = link_by_name(netlink, &slave)?;
        if let Some(kind) = link.kind {
            bail!("device {slave} of bond {name} is a {kind}: netdump can send by bonds of cards");
        }
    }
    Ok(())
}

/// What the kernel says of a device in sysfs.
fn setting(device: &str, file: &str) -> Result<String> {
    let path = format!("/sys/class/net/{device}/{file}");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(text.trim().to_owned())
}

/// The names of the devices that `device` is made of.
fn lower_names(device: &str) -> Result<Vec<String>> {
    let path = format!("/sys/class/net/{device}");
    let entries = fs::read_dir(&path).with_context(|| format!("cannot list {path}"))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_prefix("lower_").map(str::to_owned)
        })
        .collect();
    names.sort();
    Ok(names)
}

/// Whether a device has hardware, or a hypervisor's idea of it, behind it.
fn is_hardware(device: &str) -> bool {
    Path::new(&format!("/sys/class/net/{device}/device")).exists()
}

/// The host's own address in datagrams that take `route`, if it will stay one.
fn source(netlink: &mut Netlink, route: &Route, device: &Link) -> Result<IpAddr> {
    let name = &device.name;
    // The kernel names ::1 where the device has only tentative addresses.
    let source = route.source.filter(|source| !source.is_loopback());
    let source = source.ok_or_else(|| {
        anyhow!(
            "device {name} has no address that can be used yet: give it one, or arm again in some \
             seconds"
        )
    })?;
    let usable = netlink
        .usable(source)
        .with_context(|| format!("cannot ask for the address {source} of {name}"))?;
    match usable {
        Usable::Yes => Ok(source),
        Usable::Tentative => bail!(
            "the address {source} of {name} is tentative: nobody knows yet whether another \
             machine has it; arm again in some seconds"
        ),
        Usable::Deprecated => bail!(
            "the address {source} of {name} is deprecated and will go: give the device another"
        ),
    }
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

/// The neighbour's Ethernet address, resolved by the kernel if it is not known yet; `None` if it
/// does not answer.
fn neighbour(netlink: &mut Netlink, address: IpAddr, device: &Link) -> Result<Option<[u8; 6]>> {
    let ask = |netlink: &mut Netlink| {
        netlink
            .neighbour(address, device.index)
            .with_context(|| format!("cannot ask for the neighbour {address}"))
    };
    if let Some(mac) = ask(netlink)? {
        return Ok(Some(mac));
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
            return Ok(Some(mac));
        }
    }
    Ok(None)
}

/// The largest UDP payload for frames by `device` on `route`: what the device carries, the path
/// where it is known, and the person who arms allow.
fn datagram_bytes(device: &Link, route: &Route, local: IpAddr, wanted: Option<u32>) -> Result<u16> {
    let name = &device.name;
    let mut mtu = device.mtu_bytes;
    if local.is_ipv6() {
        mtu = mtu.min(announced_mtu(name).unwrap_or(mtu));
    }
    mtu = match (route.mtu_bytes, route.gateway) {
        (Some(path), _) => mtu.min(path),
        (None, Some(_)) => mtu.min(ROUTED_MTU_BYTES_MAX),
        (None, None) => mtu,
    };
    if let Some(wanted) = wanted {
        ensure!(
            wanted <= mtu,
            "packets of {wanted} bytes do not pass: device {name} and the path carry {mtu}"
        );
        mtu = wanted;
    }
    let headers = if local.is_ipv4() { 20 + 8 } else { 40 + 8 };
    let fits = usize::try_from(mtu.saturating_sub(headers))
        .unwrap_or(usize::MAX)
        .min(DATAGRAM_BYTES_MAX);
    ensure!(
        fits >= DATAGRAM_BYTES_MIN,
        "packets by {name} are of {mtu} bytes, the least usable is {}",
        DATAGRAM_BYTES_MIN + usize::try_from(headers).unwrap_or(0)
    );
    u16::try_from(fits).context("datagram size")
}

/// What a router has announced to be the limit of the link, which netlink does not tell.
fn announced_mtu(device: &str) -> Option<u32> {
    let path = format!("/proc/sys/net/ipv6/conf/{device}/mtu");
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Three ARP requests a second apart, and a margin.
const NEIGHBOUR_WAIT_MAX: Duration = Duration::from_secs(4);
const NEIGHBOUR_POLL: Duration = Duration::from_millis(20);
/// Beyond a router nothing is known of the links, and a crashed host cannot discover their limit.
const ROUTED_MTU_BYTES_MAX: u32 = 1500;
const ETHERTYPE_VLAN: u16 = 0x8100;
/// As many devices one above the other as the module follows.
const DEPTH_MAX: u32 = 4;
/// Modes of a bond whose choice of a card needs nothing but the frame, by the kernel's names.
const BOND_MODES: [&str; 4] = ["active-backup", "802.3ad", "balance-xor", "balance-rr"];
/// Kinds of devices that send by others in ways that a crash cannot follow.
const UNUSABLE: [&str; 4] = ["ipvlan", "ipvtap", "macvtap", "team"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_named_with_and_without_port() {
        let check = |text: &str, expected: &str| {
            assert_eq!(resolve(text).unwrap().remote.to_string(), expected);
        };
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
        let error = format!("{:#}", find("127.0.0.1", None, None).unwrap_err());
        assert!(error.contains("this machine itself"), "{error}");
    }

    #[test]
    fn an_unknown_device_is_named() {
        let error = format!(
            "{:#}",
            find("192.0.2.1", Some("nosuchdev0"), None).unwrap_err()
        );
        assert_eq!(error, "no such device: nosuchdev0");
    }

    #[test]
    fn a_link_local_server_needs_a_device() {
        for (text, remote, scope) in [
            ("fe80::1%eth0", "[fe80::1]:6666", "eth0"),
            ("[fe80::1%eth0]", "[fe80::1]:6666", "eth0"),
            ("[fe80::1%eth0.100]:7", "[fe80::1]:7", "eth0.100"),
        ] {
            let named = resolve(text).unwrap();
            assert_eq!(named.remote.to_string(), remote);
            assert_eq!(named.scope.as_deref(), Some(scope));
        }
        let error = format!("{:#}", find("fe80::1", None, None).unwrap_err());
        assert!(error.contains("fe80::1%DEVICE"), "{error}");
        let error = format!("{:#}", find("fe80::1%nosuchdev0", None, None).unwrap_err());
        assert_eq!(error, "no such device: nosuchdev0");
    }

    fn link(mtu_bytes: u32) -> Link {
        Link {
            index: 1,
            name: "e".into(),
            mac: Some([2; 6]),
            mtu_bytes,
            up: true,
            kind: None,
            below: None,
            vlan: None,
        }
    }

    #[test]
    fn devices_made_of_others_are_refused_with_the_reason() {
        let team = Link {
            kind: Some("team".into()),
            ..link(1500)
        };
        let error = check(&team, IpAddr::from([10, 0, 0, 1])).unwrap_err();
        assert!(error.to_string().contains("is a team"), "{error}");
        check(&link(1500), IpAddr::from([10, 0, 0, 1])).unwrap();
    }

    #[test]
    fn datagrams_fill_the_link_but_not_an_unknown_path() {
        let route = |gateway, mtu_bytes| Route {
            device_index: 1,
            source: None,
            gateway,
            local: false,
            mtu_bytes,
        };
        let router = Some(IpAddr::from([10, 0, 0, 9]));
        let (direct, routed) = (route(None, None), route(router, None));
        let known = route(router, Some(1400));
        let v4 = IpAddr::from([10, 0, 0, 1]);
        let v6 = IpAddr::from([1; 16]);
        let bytes = |mtu, route: &Route, local, wanted| {
            datagram_bytes(&link(mtu), route, local, wanted).ok()
        };
        assert_eq!(bytes(1500, &direct, v4, None), Some(1472));
        assert_eq!(bytes(9000, &direct, v4, None), Some(8972));
        assert_eq!(bytes(9000, &direct, v6, None), Some(8952));
        assert_eq!(bytes(65535, &direct, v4, None), Some(8972));
        assert_eq!(bytes(9000, &routed, v4, None), Some(1472));
        assert_eq!(bytes(9000, &known, v4, None), Some(1372));
        assert_eq!(bytes(1280, &direct, v6, None), Some(1232));
        assert_eq!(bytes(9000, &direct, v4, Some(576)), Some(548));
        assert_eq!(bytes(1500, &direct, v4, Some(1501)), None);
        assert_eq!(bytes(400, &direct, v4, None), None);
    }
}
