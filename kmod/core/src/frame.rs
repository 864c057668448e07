//! Frames: what goes around a UDP payload on an Ethernet, and what of the frames that arrive is for
//! us.
//!
//! ```text
//!  0         14     18                 38 or 58  46 or 66
//!  +---------+------+------------------+---------+-----------------+
//!  |Ethernet | tag  | IPv4 or IPv6     | UDP     | payload ...     |
//!  +---------+------+------------------+---------+-----------------+
//! ```
//! The tag (802.1Q) is there only on a VLAN; without it everything behind it lies 4 bytes earlier.
//! All integers are big-endian. `ipv4` and `ipv6` know what is behind the Ethernet header.

mod ipv4;
mod ipv6;
mod sum;

use proto::arming::{Address, Server, VLAN_MASK};
use zerocopy::big_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The least and the most bytes before a payload.
pub const HEADER_BYTES_MIN: usize = size_of::<Ethernet>() + ipv4::HEADER_BYTES;
/// See [`HEADER_BYTES_MIN`].
pub const HEADER_BYTES_MAX: usize = size_of::<Ethernet>() + size_of::<Tag>() + ipv6::HEADER_BYTES;
/// Bytes of the longest frame that is not a datagram's: a question or an answer about addresses.
pub const NEIGHBOUR_BYTES_MAX: usize =
    size_of::<Ethernet>() + size_of::<Tag>() + ipv6::NEIGHBOUR_BYTES;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const BROADCAST: Mac = [0xff; 6];
const PROTOCOL_UDP: u8 = 17;

/// The way between this host and one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    own_mac: Mac,
    /// `None` while nobody has told.
    next_hop: Option<Mac>,
    tag: Option<u16>,
    ends: Ends,
    ports: Ports,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    V4(ipv4::Ends),
    V6(ipv6::Ends),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ports {
    local: u16,
    remote: u16,
}

/// What an arriving frame is to us.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// A UDP payload from the server to our port.
    Payload(&'a mut [u8]),
    /// Somebody asks for our Ethernet address.
    Question(Asker),
    /// The next hop told its Ethernet address.
    NextHop(Mac),
    /// Something else.
    Other,
}

/// Who asked for our Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    mac: Mac,
    address: Address,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Ethernet {
    to: Mac,
    from: Mac,
    ethertype: U16,
}

/// What an 802.1Q tag puts behind the Ethernet header, whose own type says that it is there.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Tag {
    tag: U16,
    ethertype: U16,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Udp {
    from: U16,
    to: U16,
    bytes: U16,
    checksum: U16,
}

impl Route {
    /// The way from the device with address `own_mac` to `server`, on the VLAN that `tag` names if
    /// there is one. `None` if the server's addresses are of different families.
    #[must_use]
    pub fn new(own_mac: Mac, tag: Option<u16>, server: &Server) -> Option<Self> {
        let ends = match (server.local, server.remote, server.next_hop) {
            (Address::V4(local), Address::V4(remote), Address::V4(next_hop)) => {
                Ends::V4(ipv4::Ends {
                    local,
                    remote,
                    next_hop,
                })
            }
            (Address::V6(local), Address::V6(remote), Address::V6(next_hop)) => {
                Ends::V6(ipv6::Ends {
                    local,
                    remote,
                    next_hop,
                })
            }
            _ => return None,
        };
        Some(Self {
            own_mac,
            next_hop: Some(server.next_hop_mac).filter(|mac| *mac != [0; 6]),
            tag,
            ends,
            ports: Ports {
                local: server.local_port,
                remote: server.remote_port,
            },
        })
    }

    /// Bytes before the payload.
    #[must_use]
    pub const fn header_bytes(&self) -> usize {
        self.link_bytes().saturating_add(match self.ends {
            Ends::V4(_) => ipv4::HEADER_BYTES,
            Ends::V6(_) => ipv6::HEADER_BYTES,
        })
    }

    /// Bytes before the IP header.
    #[must_use]
    pub const fn link_bytes(&self) -> usize {
        match self.tag {
            None => size_of::<Ethernet>(),
            Some(_) => size_of::<Ethernet>().saturating_add(size_of::<Tag>()),
        }
    }

    /// Whether datagrams can be addressed: the next hop's Ethernet address is known.
    #[must_use]
    pub const fn is_resolved(&self) -> bool {
        self.next_hop.is_some()
    }

    /// From now on frames go to `mac`.
    pub const fn learn(&mut self, mac: Mac) {
        self.next_hop = Some(mac);
    }

    /// Writes the headers before `payload` bytes that lie at [`Route::header_bytes`] of `frame`.
    /// Returns the frame's length, or `None` if it does not fit into `frame` or into IP, or the
    /// next hop is not known.
    pub fn finish(&self, frame: &mut [u8], payload: usize) -> Option<usize> {
        let bytes = self.header_bytes().checked_add(payload)?;
        let frame = frame.get_mut(..bytes)?;
        let next_hop = self.next_hop?;
        match &self.ends {
            Ends::V4(ends) => {
                ends.finish(self.link(frame, next_hop, ETHERTYPE_IPV4)?, self.ports)?;
            }
            Ends::V6(ends) => {
                ends.finish(self.link(frame, next_hop, ETHERTYPE_IPV6)?, self.ports)?;
            }
        }
        Some(bytes)
    }

    /// What `frame` is to us. A tag's priority does not matter, and a tag that names no VLAN is none.
    pub fn receive<'a>(&self, frame: &'a mut [u8]) -> Received<'a> {
        let Some((from, ethertype, packet)) = self.unwrap(frame) else {
            return Received::Other;
        };
        let received = match (&self.ends, ethertype) {
            (Ends::V4(ends), ETHERTYPE_ARP) => ends.neighbour(packet),
            (Ends::V4(ends), ETHERTYPE_IPV4) => {
                ends.payload(packet, self.ports).map(Received::Payload)
            }
            (Ends::V6(ends), ETHERTYPE_IPV6) if ipv6::is_neighbour(packet) => {
                ends.neighbour(packet, from)
            }
            (Ends::V6(ends), ETHERTYPE_IPV6) => {
                ends.payload(packet, self.ports).map(Received::Payload)
            }
            _ => None,
        };
        received.unwrap_or(Received::Other)
    }

    /// Writes the answer to `asker` into `frame`. Returns its length, or `None` if `frame` is too
    /// small.
    pub fn answer(&self, asker: &Asker, frame: &mut [u8]) -> Option<usize> {
        let bytes = match (&self.ends, asker.address) {
            (Ends::V4(ends), Address::V4(address)) => {
                let packet = self.link(frame, asker.mac, ETHERTYPE_ARP)?;
                ends.answer(packet, self.own_mac, asker.mac, address)?
            }
            (Ends::V6(ends), Address::V6(address)) => {
                let (to, to_mac) = ipv6::answer_to(address, asker.mac);
                let packet = self.link(frame, to_mac, ETHERTYPE_IPV6)?;
                ends.answer(packet, self.own_mac, to, to == address)?
            }
            _ => return None,
        };
        self.link_bytes().checked_add(bytes)
    }

    /// Writes into `frame` the question who the next hop is. Returns its length, or `None` if
    /// `frame` is too small.
    pub fn ask(&self, frame: &mut [u8]) -> Option<usize> {
        let bytes = match &self.ends {
            Ends::V4(ends) => {
                let packet = self.link(frame, BROADCAST, ETHERTYPE_ARP)?;
                ends.ask(packet, self.own_mac)?
            }
            Ends::V6(ends) => {
                let packet = self.link(frame, ends.asked_mac(), ETHERTYPE_IPV6)?;
                ends.ask(packet, self.own_mac)?
            }
        };
        self.link_bytes().checked_add(bytes)
    }

    /// Writes the Ethernet header, with the tag if there is one; returns what is behind it.
    fn link<'a>(&self, frame: &'a mut [u8], to: Mac, ethertype: u16) -> Option<&'a mut [u8]> {
        let ethernet = |ethertype: u16| Ethernet {
            to,
            from: self.own_mac,
            ethertype: ethertype.into(),
        };
        let (head, packet) = frame.split_at_mut_checked(self.link_bytes())?;
        match self.tag {
            None => ethernet(ethertype).write_to(head).ok()?,
            Some(tag) => {
                ethernet(ETHERTYPE_VLAN).write_to_prefix(head).ok()?;
                let ethertype = ethertype.into();
                let tag = tag.into();
                Tag { tag, ethertype }.write_to_suffix(head).ok()?;
            }
        }
        Some(packet)
    }

    /// The sender, the type and the contents of a frame on our VLAN, or outside of any if we are.
    fn unwrap<'a>(&self, frame: &'a mut [u8]) -> Option<(Mac, u16, &'a mut [u8])> {
        let (ethernet, _) = Ethernet::read_from_prefix(frame).ok()?;
        let (_, behind) = frame.split_at_mut_checked(size_of::<Ethernet>())?;
        let (vlan, ethertype, packet) = if ethernet.ethertype.get() == ETHERTYPE_VLAN {
            let (tag, _) = Tag::read_from_prefix(behind).ok()?;
            let (_, packet) = behind.split_at_mut_checked(size_of::<Tag>())?;
            (tag.tag.get() & VLAN_MASK, tag.ethertype.get(), packet)
        } else {
            (0, ethernet.ethertype.get(), behind)
        };
        let ours = self.tag.unwrap_or(0) & VLAN_MASK;
        (vlan == ours).then_some((ethernet.from, ethertype, packet))
    }
}

/// The payload of the UDP `datagram`, if its ports are ours.
fn udp_payload(datagram: &mut [u8], ports: Ports) -> Option<&mut [u8]> {
    let (udp, _) = Udp::read_from_prefix(datagram).ok()?;
    if udp.from.get() != ports.remote || udp.to.get() != ports.local {
        return None;
    }
    datagram.get_mut(size_of::<Udp>()..usize::from(udp.bytes.get()))
}

#[cfg(test)]
#[expect(
    clippy::arithmetic_side_effects,
    reason = "a test that overflows fails"
)]
mod tests;
