//! The kernel's routing, neighbour and link tables, asked over rtnetlink (`man 7 rtnetlink`).
//!
//! Written by hand: arming needs four requests, each with one answer, and the netlink crates bring
//! hundreds of message types for them. Messages are native-endian, attributes are 4-byte aligned.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// How a datagram to one destination leaves this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Index of the device it leaves by.
    pub device_index: u32,
    /// Our address in such datagrams; `None` when the table names none.
    pub source: Option<IpAddr>,
    /// The router it is handed to; `None` when the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The destination is an address of this machine itself.
    pub local: bool,
    /// The largest IP packet of the path, in bytes, where the kernel knows it.
    pub mtu_bytes: Option<u32>,
}

/// One network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index, as routes and neighbours name it.
    pub index: u32,
    /// Its name, as people know it.
    pub name: String,
    /// Its Ethernet address; `None` for a device that is not Ethernet (`lo`, tunnels).
    pub mac: Option<[u8; 6]>,
    /// The largest IP packet it carries, in bytes.
    pub mtu_bytes: u32,
    /// It is set up (`IFF_UP`).
    pub up: bool,
    /// What it is if it is made of software: "vlan", "bond" and so on.
    pub kind: Option<String>,
    /// Index of the device below it, if it has one.
    pub below: Option<u32>,
    /// Its VLAN, if it is of that kind.
    pub vlan: Option<Vlan>,
}

/// What a VLAN device does to frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vlan {
    /// The VLAN's number.
    pub id: u16,
    /// The type of the tag: 0x8100 (802.1Q) or 0x88a8 (802.1ad).
    pub protocol: u16,
    /// The priority in the tag of ordinary traffic, 0 to 7.
    pub priority: u16,
}

/// Whether an address of ours can be used for long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usable {
    /// It can.
    Yes,
    /// It is not known yet, or known not to be so, that nobody else has it.
    Tentative,
    /// Its time is over but for what already uses it.
    Deprecated,
}

/// An open rtnetlink socket; requests are answered one at a time.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens the socket. Fails only when the process may not open sockets at all.
    pub fn open() -> io::Result<Self> {
        // NETLINK_ROUTE is protocol 0, which rustix spells None.
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// The route the kernel takes to `destination`, by `device` only when one is given (its index).
    ///
    /// Errors are the kernel's: `ENETUNREACH` when there is no route.
    pub fn route(&mut self, destination: IpAddr, device: Option<u32>) -> io::Result<Route> {
        let mut request = Request::new(RTM_GETROUTE);
        request.body(&[
            family(destination),
            prefix_bits(destination),
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
        request.address(RTA_DST, destination);
        if let Some(index) = device {
            request.attribute(RTA_OIF, &index.to_ne_bytes());
        }
        let answer = self.ask(request, RTM_NEWROUTE)?;
        parse_route(&answer).ok_or_else(|| malformed("route"))
    }

    /// The Ethernet address of `neighbour` on device `device`; `None` while the kernel does not
    /// know it.
    pub fn neighbour(&mut self, neighbour: IpAddr, device: u32) -> io::Result<Option<[u8; 6]>> {
        let mut request = Request::new(RTM_GETNEIGH);
        let index = device.to_ne_bytes();
        request.body(&[
            family(neighbour),
            0,
            0,
            0,
            index[0],
            index[1],
            index[2],
            index[3],
            0,
            0,
            0,
            0,
        ]);
        request.address(NDA_DST, neighbour);
        match self.ask(request, RTM_NEWNEIGH) {
            Ok(answer) => parse_neighbour(&answer).ok_or_else(|| malformed("neighbour")),
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether our own `address` can be used. Only IPv6 ever says no.
    pub fn usable(&mut self, address: IpAddr) -> io::Result<Usable> {
        if address.is_ipv4() {
            return Ok(Usable::Yes);
        }
        let mut request = Request::new(RTM_GETADDR);
        let (family, bits) = (family(address), prefix_bits(address));
        // No device is named: the address may be on another one than the route's.
        request.body(&[family, bits, 0, 0, 0, 0, 0, 0]);
        request.address(IFA_ADDRESS, address);
        let answer = self.ask(request, RTM_NEWADDR)?;
        parse_usable(&answer).ok_or_else(|| malformed("address"))
    }

    /// Makes the kernel resolve `neighbour` on device `device`, as traffic to it would. The answer,
    /// if any, arrives later: ask [`Self::neighbour`]. Needs `CAP_NET_ADMIN`.
    pub fn resolve(&mut self, neighbour: IpAddr, device: u32) -> io::Result<()> {
        let mut request = Request::new(RTM_NEWNEIGH);
        request.flags(NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE);
        let index = device.to_ne_bytes();
        let (family, flags) = (family(neighbour), NTF_USE);
        request.body(&[
            family, 0, 0, 0, index[0], index[1], index[2], index[3], 0, 0, flags, 0,
        ]);
        request.address(NDA_DST, neighbour);
        self.ask(request, NLMSG_ERROR).map(drop)
    }

    /// The device with this index. Errors are the kernel's: `ENODEV` when there is none.
    pub fn link_by_index(&mut self, index: u32) -> io::Result<Link> {
        let mut request = Request::new(RTM_GETLINK);
        let mut body = [0; IFINFOMSG_BYTES];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        request.body(&body);
        self.link(request)
    }

    /// The device with this name. Errors are the kernel's: `ENODEV` when there is none.
    pub fn link_by_name(&mut self, name: &str) -> io::Result<Link> {
        let mut request = Request::new(RTM_GETLINK);
        request.body(&[0; IFINFOMSG_BYTES]);
        let mut text = name.as_bytes().to_vec();
        text.push(0);
        request.attribute(IFLA_IFNAME, &text);
        self.link(request)
    }

    fn link(&mut self, request: Request) -> io::Result<Link> {
        let answer = self.ask(request, RTM_NEWLINK)?;
        parse_link(&answer).ok_or_else(|| malformed("link"))
    }

    /// Sends one request and returns the body of its one answer, which must be of type `expected`.
    fn ask(&mut self, request: Request, expected: u16) -> io::Result<Vec<u8>> {
        self.sequence += 1;
        send(
            &self.socket,
            &request.finish(self.sequence),
            SendFlags::empty(),
        )?;
        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        loop {
            let (length, _) = recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            let Some(message) = Message::parse(&buffer[..length.min(ANSWER_BYTES_MAX)]) else {
                return Err(malformed("header"));
            };
            // An answer to an earlier request that was given up is not ours.
            if message.sequence != self.sequence {
                continue;
            }
            // An error of number 0 is the acknowledgement of a request that has no other answer.
            if message.kind == NLMSG_ERROR {
                let code = message
                    .body
                    .first_chunk::<4>()
                    .ok_or_else(|| malformed("error"))?;
                match i32::from_ne_bytes(*code) {
                    0 if expected == NLMSG_ERROR => return Ok(Vec::new()),
                    code => return Err(io::Error::from_raw_os_error(code.saturating_neg())),
                }
            }
            if message.kind == expected {
                return Ok(message.body.to_vec());
            }
        }
    }
}

/// A request under construction.
struct Request {
    bytes: Vec<u8>,
}

impl Request {
    fn new(kind: u16) -> Self {
        let mut bytes = vec![0; NLMSGHDR_BYTES];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        let mut request = Self { bytes };
        request.flags(NLM_F_REQUEST);
        request
    }

    fn flags(&mut self, flags: u16) {
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
    }

    fn body(&mut self, body: &[u8]) {
        self.bytes.extend_from_slice(body);
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + value.len()).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn address(&mut self, kind: u16, address: IpAddr) {
        match address {
            IpAddr::V4(address) => self.attribute(kind, &address.octets()),
            IpAddr::V6(address) => self.attribute(kind, &address.octets()),
        }
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// A view of the first message in a received buffer.
struct Message<'a> {
    kind: u16,
    sequence: u32,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let body = bytes.get(NLMSGHDR_BYTES..length)?;
        Some(Self {
            kind: u16_at(bytes, 4)?,
            sequence: u32_at(bytes, 8)?,
            body,
        })
    }
}

/// The attributes that follow a body of `skip` bytes; ends at the first malformed one.
fn attributes(bytes: &[u8], skip: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes.get(skip..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & ATTRIBUTE_KIND_MASK;
        let value = rest.get(ATTRIBUTE_HEADER_BYTES..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn parse_route(body: &[u8]) -> Option<Route> {
    let kind = *body.get(7)?;
    let mut route = Route {
        device_index: 0,
        source: None,
        gateway: None,
        local: kind == RTN_LOCAL,
        mtu_bytes: None,
    };
    for (kind, value) in attributes(body, RTMSG_BYTES) {
        match kind {
            RTA_OIF => route.device_index = u32_at(value, 0)?,
            RTA_PREFSRC => route.source = address(value),
            RTA_GATEWAY => route.gateway = address(value),
            RTA_METRICS => {
                let mtu = attributes(value, 0).find(|(metric, _)| *metric == RTAX_MTU);
                route.mtu_bytes = mtu.and_then(|(_, bytes)| u32_at(bytes, 0));
            }
            // An IPv4 route through an IPv6 router: family (2 bytes), then the address.
            RTA_VIA => route.gateway = address(value.get(2..)?),
            _ => {}
        }
    }
    (route.device_index != 0).then_some(route)
}

/// `Some(None)`: the entry exists but holds no usable address yet.
fn parse_neighbour(body: &[u8]) -> Option<Option<[u8; 6]>> {
    let state = u16_at(body, 8)?;
    if state & NUD_VALID == 0 {
        return Some(None);
    }
    let lladdr = attributes(body, NDMSG_BYTES).find(|(kind, _)| *kind == NDA_LLADDR);
    Some(lladdr.and_then(|(_, value)| value.try_into().ok()))
}

fn parse_usable(body: &[u8]) -> Option<Usable> {
    let short = u32::from(*body.get(2)?);
    let long = attributes(body, IFADDRMSG_BYTES).find(|(kind, _)| *kind == IFA_FLAGS);
    let flags = long.map_or(Some(short), |(_, value)| u32_at(value, 0))?;
    Some(if flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED) != 0 {
        Usable::Tentative
    } else if flags & IFA_F_DEPRECATED != 0 {
        Usable::Deprecated
    } else {
        Usable::Yes
    })
}

/// The nested attributes that say what a device of software is.
fn parse_kind(link: &mut Link, info: &[u8]) -> Option<()> {
    for (kind, value) in attributes(info, 0) {
        match kind {
            IFLA_INFO_KIND => link.kind = Some(text(value)),
            IFLA_INFO_DATA if link.kind.as_deref() == Some("vlan") => {
                link.vlan = Some(parse_vlan(value)?);
            }
            _ => {}
        }
    }
    Some(())
}

fn parse_vlan(data: &[u8]) -> Option<Vlan> {
    let mut vlan = Vlan {
        id: 0,
        protocol: 0,
        priority: 0,
    };
    for (kind, value) in attributes(data, 0) {
        match kind {
            IFLA_VLAN_ID => vlan.id = u16_at(value, 0)?,
            IFLA_VLAN_PROTOCOL => vlan.protocol = u16::from_be(u16_at(value, 0)?),
            // Pairs of a packet's priority in the kernel, 0 for ordinary ones, and the tag's.
            IFLA_VLAN_EGRESS_QOS => {
                let pairs =
                    attributes(value, 0).map(|(_, pair)| (u32_at(pair, 0), u32_at(pair, 4)));
                let mut ordinary = pairs.filter(|(from, _)| *from == Some(0));
                if let Some((_, Some(to))) = ordinary.next() {
                    vlan.priority = u16::try_from(to & 7).ok()?;
                }
            }
            _ => {}
        }
    }
    Some(vlan)
}

fn text(value: &[u8]) -> String {
    let text = value.strip_suffix(&[0]).unwrap_or(value);
    String::from_utf8_lossy(text).into_owned()
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let ethernet = u16_at(body, 2)? == ARPHRD_ETHER;
    let up = u32_at(body, 8)? & IFF_UP != 0;
    let mut link = Link {
        index: u32_at(body, 4)?,
        name: String::new(),
        mac: None,
        mtu_bytes: 0,
        up,
        kind: None,
        below: None,
        vlan: None,
    };
    for (kind, value) in attributes(body, IFINFOMSG_BYTES) {
        match kind {
            IFLA_ADDRESS if ethernet => link.mac = value.try_into().ok(),
            IFLA_IFNAME => link.name = text(value),
            IFLA_LINK => link.below = u32_at(value, 0).filter(|&below| below != 0),
            IFLA_LINKINFO => parse_kind(&mut link, value)?,
            IFLA_MTU => link.mtu_bytes = u32_at(value, 0)?,
            _ => {}
        }
    }
    Some(link)
}

fn address(value: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(value) {
        return Some(IpAddr::V4(Ipv4Addr::from(octets)));
    }
    let octets = <[u8; 16]>::try_from(value).ok()?;
    Some(IpAddr::V6(Ipv6Addr::from(octets)))
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

fn prefix_bits(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the kernel's netlink {what} answer is malformed"),
    )
}

// linux/netlink.h, linux/rtnetlink.h, linux/neighbour.h, linux/if_link.h, linux/if_addr.h,
// linux/if_arp.h: kernel ABI.
const NLMSGHDR_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
const RTMSG_BYTES: usize = 12;
const NDMSG_BYTES: usize = 12;
const IFINFOMSG_BYTES: usize = 16;
const IFADDRMSG_BYTES: usize = 8;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_VIA: u16 = 18;
const RTAX_MTU: u16 = 2;
const RTN_LOCAL: u8 = 2;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
// NUD_REACHABLE | NUD_STALE | NUD_DELAY | NUD_PROBE | NUD_PERMANENT.
const NUD_VALID: u16 = 0x02 | 0x04 | 0x08 | 0x10 | 0x80;
const NTF_USE: u8 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_VLAN_EGRESS_QOS: u16 = 3;
const IFLA_VLAN_PROTOCOL: u16 = 5;
const IFA_ADDRESS: u16 = 1;
const IFA_FLAGS: u16 = 8;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_DEPRECATED: u32 = 0x20;
const IFA_F_TENTATIVE: u32 = 0x40;
const ARPHRD_ETHER: u16 = 1;
const IFF_UP: u32 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
// The two highest bits say "nested" and "network byte order".
const ATTRIBUTE_KIND_MASK: u16 = 0x3fff;
// A link with many virtual functions answers with tens of kilobytes.
const ANSWER_BYTES_MAX: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_by_name_and_index_and_is_not_ethernet() {
        let mut netlink = Netlink::open().unwrap();
        let lo = netlink.link_by_name("lo").unwrap();
        assert_eq!(lo.mac, None);
        assert_eq!(netlink.link_by_index(lo.index).unwrap(), lo);
    }

    #[test]
    fn route_to_ourselves_is_local() {
        let route = Netlink::open()
            .unwrap()
            .route(IpAddr::V4(Ipv4Addr::LOCALHOST), None)
            .unwrap();
        assert!(route.local);
        assert_eq!(route.source, Some(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }

    #[test]
    fn unknown_device_is_enodev() {
        let error = Netlink::open()
            .unwrap()
            .link_by_name("nosuchdev0")
            .unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NODEV.raw_os_error()));
    }

    #[test]
    fn route_answer_through_a_router_is_read() {
        let mut request = Request::new(RTM_NEWROUTE);
        request.body(&[AF_INET, 32, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0]);
        request.attribute(RTA_OIF, &7_u32.to_ne_bytes());
        request.attribute(RTA_PREFSRC, &[10, 0, 2, 15]);
        request.attribute(RTA_GATEWAY, &[10, 0, 2, 2]);
        // The one metric of interest behind another: 8 bytes each.
        let metrics = [8_u16, 9, 1, 0, 8, RTAX_MTU, 1400, 0].map(u16::to_ne_bytes);
        request.attribute(RTA_METRICS, metrics.as_flattened());
        let bytes = request.finish(1);
        let route = parse_route(Message::parse(&bytes).unwrap().body).unwrap();
        let expected = Route {
            device_index: 7,
            source: Some(IpAddr::from([10, 0, 2, 15])),
            gateway: Some(IpAddr::from([10, 0, 2, 2])),
            local: false,
            mtu_bytes: Some(1400),
        };
        assert_eq!(route, expected);
    }

    /// Attributes as bytes, to be nested in another.
    fn nested(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut request = Request { bytes: Vec::new() };
        for (kind, value) in attributes {
            request.attribute(*kind, value);
        }
        request.bytes
    }

    #[test]
    fn a_vlan_device_is_read_with_its_priority() {
        let pair = |from: u32, to: u32| [from.to_ne_bytes(), to.to_ne_bytes()].concat();
        let map = nested(&[(1, &pair(3, 7)), (1, &pair(0, 5))]);
        let data = nested(&[
            (IFLA_VLAN_PROTOCOL, &0x8100_u16.to_be_bytes()),
            (IFLA_VLAN_ID, &100_u16.to_ne_bytes()),
            (IFLA_VLAN_EGRESS_QOS, &map),
        ]);
        let info = nested(&[(IFLA_INFO_KIND, b"vlan\0"), (IFLA_INFO_DATA, &data)]);
        let mut body = vec![0; IFINFOMSG_BYTES];
        body.extend(nested(&[
            (IFLA_IFNAME, b"eth0.100\0"),
            (IFLA_LINK, &2_u32.to_ne_bytes()),
            (IFLA_LINKINFO, &info),
        ]));
        let link = parse_link(&body).unwrap();
        let vlan = Vlan {
            id: 100,
            protocol: 0x8100,
            priority: 5,
        };
        assert_eq!((link.below, link.vlan), (Some(2), Some(vlan)));
        assert_eq!(link.kind.as_deref(), Some("vlan"));
    }

    #[test]
    fn addresses_that_cannot_be_used_are_told_by_their_flags() {
        let with = |flags: u32| {
            let mut body = vec![AF_INET6, 64, 0x80, 0, 2, 0, 0, 0];
            body.extend(nested(&[(IFA_FLAGS, &flags.to_ne_bytes())]));
            parse_usable(&body)
        };
        assert_eq!(with(0x80), Some(Usable::Yes));
        assert_eq!(with(0xa0), Some(Usable::Deprecated));
        assert_eq!(with(0xc0), Some(Usable::Tentative));
        assert_eq!(with(0x88), Some(Usable::Tentative));
        assert_eq!(parse_usable(&[AF_INET6, 64, 0x40]), Some(Usable::Tentative));
        assert_eq!(parse_usable(&[AF_INET6]), None);
    }

    #[test]
    fn any_cut_of_an_answer_is_refused_or_read_without_panic() {
        let mut request = Request::new(RTM_NEWNEIGH);
        request.body(&[AF_INET, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
        request.attribute(NDA_LLADDR, &[1, 2, 3, 4, 5, 6]);
        let bytes = request.finish(1);
        for length in 0..bytes.len() {
            assert!(Message::parse(&bytes[..length]).is_none());
            let body = bytes.get(NLMSGHDR_BYTES..length).unwrap_or_default();
            // The last two bytes are padding; nothing shorter may read as an address.
            let whole = length >= bytes.len() - 2;
            assert_eq!(
                parse_neighbour(body) == Some(Some([1, 2, 3, 4, 5, 6])),
                whole
            );
        }
        assert_eq!(
            parse_neighbour(&bytes[NLMSGHDR_BYTES..]),
            Some(Some([1, 2, 3, 4, 5, 6]))
        );
    }
}
