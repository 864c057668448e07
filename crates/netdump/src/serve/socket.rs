//! UDP sockets that receive many datagrams with one system call (`recvmmsg`, and UDP generic
//! receive offload).
//!
//! All unsafe code of this program that talks to sockets is here. Replies are sent one by one: a
//! batch of datagrams is answered with one reply a session, and one system call for several replies
//! was measured to gain nothing.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::ptr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{
    set_ipv6_v6only, set_socket_recv_buffer_size, set_socket_recv_buffer_size_force,
    set_socket_reuseport, socket_recv_buffer_size,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

/// Opens a socket at `address`. `shared` lets further sockets of this process bind there too; the
/// kernel then keeps each client with one of them. Without it the call fails when anybody holds the
/// port. At an IPv6 address that is all addresses it receives over IPv4 too, whatever
/// `net.ipv6.bindv6only` says.
pub fn open(address: SocketAddr, shared: bool) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    if shared {
        set_socket_reuseport(&socket, true)?;
    }
    if address.is_ipv6() {
        set_ipv6_v6only(&socket, false)?;
    }
    bind(&socket, &address)?;
    Ok(UdpSocket::from(socket))
}

/// Prepares a socket for [`Batch::receive`]. Returns the bytes the kernel buffers for it, which
/// without root is bounded by `net.core.rmem_max`.
pub fn prepare(socket: &UdpSocket) -> io::Result<usize> {
    if set_socket_recv_buffer_size_force(socket, RECEIVE_BUFFER_BYTES).is_err() {
        set_socket_recv_buffer_size(socket, RECEIVE_BUFFER_BYTES)?;
    }
    set_option(socket, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1)?;
    set_option(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
    if socket.local_addr()?.is_ipv6() {
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
    }
    // Kernels before 5.0 lack it and deliver datagrams one by one.
    if let Err(error) = set_option(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
        && error.raw_os_error() != Some(libc::ENOPROTOOPT)
    {
        return Err(error);
    }
    // The kernel doubles what it is asked for, to account for its own bookkeeping.
    Ok(socket_recv_buffer_size(socket)? / 2)
}

/// Who sent a datagram, and to which of our addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The client. One that came over IPv4 has an IPv4 address, whatever the socket calls it.
    pub address: SocketAddr,
    /// The address it knows us by, of the same family. A reply from another one would be taken for
    /// somebody else's. `None` leaves the choice to the routing table.
    pub local: Option<IpAddr>,
}

/// Sends a datagram to `peer` from the address that it knows us by.
pub fn send(socket: &UdpSocket, bytes: &[u8], peer: Peer) -> io::Result<()> {
    let (mut name, name_bytes) = name_for(socket, peer.address)?;
    let mut control = Control::default();
    match peer.local {
        None => {}
        Some(IpAddr::V4(local)) => control.put(
            (libc::IPPROTO_IP, libc::IP_PKTINFO),
            libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: in_addr(local),
                ipi_addr: in_addr(local),
            },
        ),
        // The name of a link-local client says which device.
        Some(IpAddr::V6(local)) => control.put(
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO),
            libc::in6_pktinfo {
                ipi6_addr: in6_addr(local),
                ipi6_ifindex: 0,
            },
        ),
    }
    let mut part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero bytes are a valid msghdr: integers and null pointers.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_name = (&raw mut name).cast();
    message.msg_namelen = name_bytes;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if control.used > 0 {
        message.msg_control = control.words.as_mut_ptr().cast();
        message.msg_controllen = control.used;
    }
    // SAFETY: name, part, bytes and control area are of the lengths given and outlive the call,
    // which only reads them.
    match unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The control area of a message to send.
#[derive(Default)]
struct Control {
    words: [u64; CONTROL_WORDS],
    /// In bytes.
    used: usize,
}

impl Control {
    /// Makes it hold one note, of this level and type.
    fn put<T: Copy>(&mut self, (level, kind): (libc::c_int, libc::c_int), note: T) {
        const { assert!(size_of::<T>() <= size_of::<libc::in6_pktinfo>()) };
        // SAFETY: it only computes.
        let space = unsafe { libc::CMSG_SPACE(socklen::<T>()) } as usize;
        // SAFETY: as above.
        let length = unsafe { libc::CMSG_LEN(socklen::<T>()) } as usize;
        let first = self.words.as_mut_ptr().cast::<libc::cmsghdr>();
        // SAFETY: the area is aligned and large enough for a header and the largest note (asserted
        // above against the one that CONTROL_WORDS has room for twice).
        unsafe {
            first.write(libc::cmsghdr {
                cmsg_len: length,
                cmsg_level: level,
                cmsg_type: kind,
            });
        }
        // SAFETY: as above.
        let data = unsafe { libc::CMSG_DATA(first) };
        // SAFETY: as above; the write asks for no alignment.
        unsafe { data.cast::<T>().write_unaligned(note) };
        self.used = space;
    }
}

/// The name by which `socket` knows `address`: an IPv6 socket knows IPv4 addresses as mapped ones.
fn name_for(
    socket: &UdpSocket,
    address: SocketAddr,
) -> io::Result<(libc::sockaddr_storage, libc::socklen_t)> {
    let mut name = MaybeUninit::<libc::sockaddr_storage>::zeroed();
    let length = match (socket.local_addr()?, address) {
        (SocketAddr::V4(_), SocketAddr::V4(address)) => {
            let v4 = libc::sockaddr_in {
                sin_family: AF_INET,
                sin_port: address.port().to_be(),
                sin_addr: in_addr(*address.ip()),
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage is large and aligned enough for every family's name.
            unsafe { name.as_mut_ptr().cast::<libc::sockaddr_in>().write(v4) };
            socklen::<libc::sockaddr_in>()
        }
        (_, address) => {
            let (ip, scope) = match address {
                SocketAddr::V4(address) => (address.ip().to_ipv6_mapped(), 0),
                SocketAddr::V6(address) => (*address.ip(), address.scope_id()),
            };
            let v6 = libc::sockaddr_in6 {
                sin6_family: AF_INET6,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: in6_addr(ip),
                sin6_scope_id: scope,
            };
            // SAFETY: as above.
            unsafe { name.as_mut_ptr().cast::<libc::sockaddr_in6>().write(v6) };
            socklen::<libc::sockaddr_in6>()
        }
    };
    // SAFETY: all-zero bytes are a valid sockaddr_storage, and what was written are integers.
    Ok((unsafe { name.assume_init() }, length))
}

/// Room for what one system call receives.
pub struct Batch {
    bytes: Vec<u8>,
    received: Vec<Received>,
    overflows: u32,
}

/// Datagrams of one client that arrived together, back to back in the batch's bytes.
#[derive(Debug, Clone, Copy)]
struct Received {
    peer: Peer,
    length: usize,
    /// Length of each datagram but the last, which may be shorter.
    segment: usize,
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self {
            bytes: vec![0; MESSAGES * MESSAGE_BYTES],
            received: Vec::with_capacity(MESSAGES),
            overflows: 0,
        }
    }

    /// Takes all datagrams that are there, up to the batch's room; if there is none, waits for one,
    /// for `wait` at most.
    pub fn receive(&mut self, socket: &UdpSocket, wait: Duration) -> io::Result<()> {
        self.take(socket)?;
        if self.received.is_empty() {
            let wait = Timespec::try_from(wait).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&wait)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => self.take(socket)?,
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn take(&mut self, socket: &UdpSocket) -> io::Result<()> {
        self.received.clear();
        let mut parts: [MaybeUninit<libc::iovec>; MESSAGES] =
            [const { MaybeUninit::uninit() }; MESSAGES];
        let mut names = [const { MaybeUninit::<libc::sockaddr_storage>::zeroed() }; MESSAGES];
        let mut controls = [[0_u64; CONTROL_WORDS]; MESSAGES];
        let mut messages = [const { MaybeUninit::<libc::mmsghdr>::zeroed() }; MESSAGES];
        for (index, chunk) in self.bytes.chunks_exact_mut(MESSAGE_BYTES).enumerate() {
            let part = parts[index].write(libc::iovec {
                iov_base: chunk.as_mut_ptr().cast(),
                iov_len: MESSAGE_BYTES,
            });
            // SAFETY: all-zero bytes are a valid mmsghdr: integers and null pointers.
            let message = unsafe { messages[index].assume_init_mut() };
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_name = names[index].as_mut_ptr().cast();
            message.msg_hdr.msg_namelen = NAME_BYTES;
            message.msg_hdr.msg_control = controls[index].as_mut_ptr().cast();
            message.msg_hdr.msg_controllen = CONTROL_BYTES;
        }
        let (first, count) = (messages.as_mut_ptr().cast(), MESSAGES_UINT);
        // SAFETY: `first` points to `count` headers, all initialised above; their buffers, names
        // and control areas are distinct, of the lengths given, and outlive the call.
        let got = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                first,
                count,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        let Ok(got) = usize::try_from(got) else {
            return nothing(io::Error::last_os_error());
        };
        for (message, name) in messages.iter().zip(&names).take(got) {
            // SAFETY: initialised above, then updated by the kernel.
            let message = unsafe { message.assume_init_ref() };
            // SAFETY: zeroed at first, which is a valid sockaddr_storage, then written by the
            // kernel.
            let name = unsafe { name.assume_init_ref() };
            let notes = Notes::of(&message.msg_hdr);
            self.overflows = notes.overflows.unwrap_or(self.overflows);
            let length = usize::try_from(message.msg_len)
                .unwrap_or(0)
                .min(MESSAGE_BYTES);
            let segment = notes
                .segment
                .filter(|&segment| segment > 0)
                .unwrap_or_else(|| length.max(1));
            self.received.push(Received {
                peer: Peer {
                    address: address(name),
                    local: notes.local,
                },
                length,
                segment,
            });
        }
        Ok(())
    }

    /// Calls `datagram` with each datagram of the batch and who sent it, in the order of arrival.
    pub fn each(&mut self, mut datagram: impl FnMut(Peer, &mut [u8])) {
        for (received, bytes) in self
            .received
            .iter()
            .zip(self.bytes.chunks_exact_mut(MESSAGE_BYTES))
        {
            let used = &mut bytes[..received.length];
            if used.is_empty() {
                datagram(received.peer, &mut []);
            }
            for segment in used.chunks_mut(received.segment) {
                datagram(received.peer, segment);
            }
        }
    }

    /// There is no datagram in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// Datagrams the kernel has thrown away since the socket was opened because its buffer was
    /// full.
    #[must_use]
    pub fn overflows(&self) -> u32 {
        self.overflows
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

fn in_addr(address: Ipv4Addr) -> libc::in_addr {
    libc::in_addr {
        s_addr: u32::from(address).to_be(),
    }
}

const fn in6_addr(address: Ipv6Addr) -> libc::in6_addr {
    libc::in6_addr {
        s6_addr: address.octets(),
    }
}

/// What the kernel says beside a message.
#[derive(Default)]
struct Notes {
    segment: Option<usize>,
    overflows: Option<u32>,
    local: Option<IpAddr>,
}

impl Notes {
    fn of(header: &libc::msghdr) -> Self {
        let mut notes = Self::default();
        // SAFETY: the kernel has set control area and length; both are still in place.
        let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
        while !control.is_null() {
            // SAFETY: not null, so it points to a whole header inside the control area, which is
            // 8-byte aligned.
            let head = unsafe { *control };
            // SAFETY: as above; the kernel puts at least 4 bytes of data behind each kind of header
            // asked for.
            let data = unsafe { libc::CMSG_DATA(control) };
            // SAFETY: as above; the read asks for no alignment.
            let value = unsafe { data.cast::<u32>().read_unaligned() };
            match (head.cmsg_level, head.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => notes.segment = usize::try_from(value).ok(),
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => notes.overflows = Some(value),
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    // SAFETY: as above; behind this kind of header lies a whole in_pktinfo.
                    let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                    let local = Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr));
                    notes.local = Some(local.into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    // SAFETY: as above; behind this kind of header lies a whole in6_pktinfo.
                    let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                    let local = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                    // Of a datagram over IPv4 it holds the sender; the other note is right.
                    if local.to_ipv4_mapped().is_none() {
                        notes.local = Some(local.into());
                    }
                }
                _ => {}
            }
            // SAFETY: `control` came from this header's control area.
            control = unsafe { libc::CMSG_NXTHDR(header, control) };
        }
        notes
    }
}

/// A receive error that only means that there is nothing to receive.
fn nothing(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        // ECONNREFUSED is an ICMP answer to an earlier reply: the client is gone, which is no fault
        // of the socket.
        Some(libc::EAGAIN | libc::EINTR | libc::ECONNREFUSED) => Ok(()),
        _ => Err(error),
    }
}

fn set_option(
    socket: &UdpSocket,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let (value, length) = (ptr::from_ref(&value).cast(), socklen::<libc::c_int>());
    // SAFETY: `value` points to `length` bytes that outlive the call.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Datagrams the kernel has thrown away since the socket was opened, as of now.
pub fn drops(socket: &UdpSocket) -> io::Result<u32> {
    let mut figures = [0_u32; SK_MEMINFO_FIGURES];
    let mut length = socklen::<[u32; SK_MEMINFO_FIGURES]>();
    let value = figures.as_mut_ptr().cast();
    let (level, option) = (libc::SOL_SOCKET, libc::SO_MEMINFO);
    // SAFETY: `value` points to `length` writable bytes, and both outlive the call.
    let got =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, value, &raw mut length) };
    match got {
        0 => Ok(figures[SK_MEMINFO_DROPS]),
        _ => Err(io::Error::last_os_error()),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "sizes of socket structures are below 1 KiB"
)]
const fn socklen<T>() -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}

fn address(name: &libc::sockaddr_storage) -> SocketAddr {
    let name: *const libc::sockaddr_storage = name;
    // SAFETY: a sockaddr_storage is large and aligned enough for every address family, and
    // all-integer.
    let v4 = unsafe { *name.cast::<libc::sockaddr_in>() };
    if libc::c_int::from(v4.sin_family) == libc::AF_INET {
        let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
        return SocketAddr::new(IpAddr::V4(ip), u16::from_be(v4.sin_port));
    }
    // SAFETY: as above; for another family the bytes would be meaningless, not invalid.
    let v6 = unsafe { *name.cast::<libc::sockaddr_in6>() };
    let (ip, port) = (
        Ipv6Addr::from(v6.sin6_addr.s6_addr),
        u16::from_be(v6.sin6_port),
    );
    match ip.to_ipv4_mapped() {
        Some(ip) => SocketAddr::new(ip.into(), port),
        None => SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into(),
    }
}

/// A second of 1 Gbit/s while the disk stalls.
pub const RECEIVE_BUFFER_BYTES: usize = 128 << 20;
/// Figures of `SO_MEMINFO`, and which of them counts drops (linux/sock_diag.h).
const SK_MEMINFO_FIGURES: usize = 9;
const SK_MEMINFO_DROPS: usize = 8;
/// Messages of one batch.
const MESSAGES: usize = 32;
const MESSAGES_UINT: libc::c_uint = 32;
/// The longest message: a full train of merged datagrams.
const MESSAGE_BYTES: usize = 1 << 16;
/// Two notes of 4 bytes, one of 12 and one of 20 take 120 bytes; the rest is margin.
const CONTROL_WORDS: usize = 20;
const CONTROL_BYTES: usize = CONTROL_WORDS * 8;
const AF_INET: libc::sa_family_t = 2;
const AF_INET6: libc::sa_family_t = 10;
const NAME_BYTES: libc::socklen_t = socklen::<libc::sockaddr_storage>();

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const WAIT: Duration = Duration::from_millis(100);

    fn local() -> (UdpSocket, SocketAddr) {
        let socket = open("127.0.0.1:0".parse().unwrap(), true).unwrap();
        prepare(&socket).unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    #[test]
    fn datagrams_arrive_in_order_with_their_sender_the_empty_one_too() {
        let (socket, address) = local();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for length in [1400, 1400, 3, 0, 9000] {
            sender.send_to(&vec![7; length], address).unwrap();
        }
        let (mut batch, mut lengths) = (Batch::new(), Vec::new());
        while lengths.len() < 5 {
            batch.receive(&socket, WAIT).unwrap();
            batch.each(|peer, datagram| {
                assert_eq!(peer.address, sender.local_addr().unwrap());
                lengths.push(datagram.len());
            });
        }
        assert_eq!(lengths, [1400, 1400, 3, 0, 9000]);
    }

    #[test]
    fn a_reply_comes_from_the_address_that_was_asked() {
        let socket = open("0.0.0.0:0".parse().unwrap(), true).unwrap();
        prepare(&socket).unwrap();
        let asked = SocketAddr::new([127, 0, 0, 5].into(), socket.local_addr().unwrap().port());
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"ask", asked).unwrap();
        let mut batch = Batch::new();
        batch.receive(&socket, WAIT).unwrap();
        batch.each(|peer, _| send(&socket, b"reply", peer).unwrap());
        let mut bytes = [0; 16];
        client.set_read_timeout(Some(WAIT * 20)).unwrap();
        assert_eq!(client.recv_from(&mut bytes).unwrap(), (5, asked));
    }

    #[test]
    fn one_socket_serves_both_families_and_names_each_client_by_its_own() {
        let socket = open("[::]:0".parse().unwrap(), true).unwrap();
        prepare(&socket).unwrap();
        let port = socket.local_addr().unwrap().port();
        for (from, asked) in [
            ("127.0.0.1:0", IpAddr::from([127, 0, 0, 5])),
            ("[::1]:0", Ipv6Addr::LOCALHOST.into()),
        ] {
            let client = UdpSocket::bind(from).unwrap();
            client.send_to(b"ask", (asked, port)).unwrap();
            let mut batch = Batch::new();
            batch.receive(&socket, WAIT).unwrap();
            batch.each(|peer, _| {
                assert_eq!(peer.address, client.local_addr().unwrap());
                assert_eq!(peer.local, Some(asked));
                send(&socket, b"reply", peer).unwrap();
                // As after a restart of the server, which forgets how it was asked.
                let forgotten = Peer {
                    local: None,
                    ..peer
                };
                send(&socket, b"again", forgotten).unwrap();
            });
            let mut bytes = [0; 16];
            client.set_read_timeout(Some(WAIT * 20)).unwrap();
            let asked = SocketAddr::new(asked, port);
            assert_eq!(client.recv_from(&mut bytes).unwrap(), (5, asked));
            assert_eq!(client.recv_from(&mut bytes).unwrap().0, 5);
        }
    }

    #[test]
    fn a_train_of_equal_datagrams_is_taken_apart_again() {
        let (socket, address) = local();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        set_option(&sender, libc::SOL_UDP, libc::UDP_SEGMENT, 1000).unwrap();
        let train: Vec<u8> = (0..10_500_usize)
            .map(|at| u8::try_from(at / 1000).unwrap())
            .collect();
        sender.send_to(&train, address).unwrap();
        let (mut batch, mut got) = (Batch::new(), Vec::new());
        batch.receive(&socket, WAIT).unwrap();
        batch.each(|_, datagram| got.push((datagram[0], datagram.len())));
        let expected: Vec<(u8, usize)> = (0..=10)
            .map(|n| (n, if n < 10 { 1000 } else { 500 }))
            .collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn nothing_to_receive_is_no_error_and_ends_in_time() {
        let (socket, _) = local();
        let start = Instant::now();
        let mut batch = Batch::new();
        batch.receive(&socket, WAIT).unwrap();
        batch.each(|_, _| panic!("nothing was sent"));
        assert!((WAIT..WAIT * 20).contains(&start.elapsed()));
    }

    #[test]
    fn a_port_that_another_holds_is_refused_unless_shared() {
        let (_socket, address) = local();
        assert_eq!(
            open(address, false).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        open(address, true).unwrap();
    }
}
