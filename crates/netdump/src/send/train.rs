//! Trains: up to 64 packets of equal length for one system call, which the kernel (or the network
//! card) takes apart again (`UDP_SEGMENT`). Where the kernel refuses, the packets of a train leave
//! one by one with `sendmmsg`.
//!
//! All unsafe code of `netdump send` is here. The packets are sent from where the engine sealed
//! them; nothing is copied in user space.

use std::io;
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::ptr;

use proto::client::Pool;
use proto::wire::{DATAGRAM_BYTES_MAX, DATAGRAM_BYTES_MIN};
use rustix::net::sockopt::{
    set_socket_recv_buffer_size, set_socket_send_buffer_size, set_socket_send_buffer_size_force,
};

/// The transmit buffers of a session, back to back, so that packets of a train are one piece of
/// memory. One that waits in a train is not given out: a packet that is sent again may be
/// acknowledged meanwhile, and its buffer be the next one to be filled.
pub(super) struct Slots {
    bytes: Vec<u8>,
    each: usize,
    waiting: Vec<bool>,
}

/// Packets that wait to be sent together.
pub(super) struct Train {
    parts: Vec<Part>,
    bytes: usize,
    segmented: bool,
}

#[derive(Clone, Copy)]
struct Part {
    slot: u16,
    len: usize,
}

/// What a train has become.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Left {
    /// Bytes of UDP payload that the kernel took.
    pub(super) bytes: u64,
    /// System calls.
    pub(super) calls: u64,
}

/// Sends equal datagrams, trains of them, as fast as it is called: the limit that a dump is
/// measured against.
pub struct Blaster {
    socket: UdpSocket,
    slots: Slots,
    train: Train,
}

impl Blaster {
    /// A blaster of datagrams of so many bytes, whose contents have no meaning.
    pub fn new(address: SocketAddr, datagram_bytes: usize) -> io::Result<Self> {
        let (socket, _) = open(address, None)?;
        let count = u16::try_from(TRAIN_BYTES_MAX / datagram_bytes.max(1)).unwrap_or(1);
        let each = datagram_bytes.min(TRAIN_BYTES_MAX);
        Ok(Self {
            socket,
            slots: Slots::new(count.max(1), each),
            train: Train::new(),
        })
    }

    /// Sends one train and returns its bytes of UDP payload.
    pub fn send(&mut self) -> io::Result<u64> {
        let (mut slot, each) = (0, self.slots.each);
        while self.slots.buffer(slot).is_some() && self.train.has_room(each) {
            self.train.push(&mut self.slots, slot, each);
            slot += 1;
        }
        Ok(self.train.leave(&self.socket, &mut self.slots)?.bytes)
    }
}

impl Slots {
    pub(super) fn new(count: u16, each: usize) -> Self {
        Self {
            bytes: vec![0; usize::from(count) * each],
            each,
            waiting: vec![false; usize::from(count)],
        }
    }

    fn at(&self, slot: u16) -> usize {
        usize::from(slot) * self.each
    }
}

impl Pool for Slots {
    fn buffer(&mut self, slot: u16) -> Option<&mut [u8]> {
        let at = self.at(slot);
        let waits = *self.waiting.get(usize::from(slot))?;
        (!waits).then(|| &mut self.bytes[at..at + self.each])
    }
}

impl Train {
    pub(super) fn new() -> Self {
        Self {
            parts: Vec::with_capacity(PARTS_MAX),
            bytes: 0,
            segmented: true,
        }
    }

    /// Whether a packet of `len` bytes can follow: all but the last must be equally long.
    pub(super) fn has_room(&self, len: usize) -> bool {
        let (Some(first), Some(last)) = (self.parts.first(), self.parts.last()) else {
            return true;
        };
        self.parts.len() < PARTS_MAX
            && self.bytes + len <= TRAIN_BYTES_MAX
            && last.len == first.len
            && len <= first.len
    }

    pub(super) fn push(&mut self, slots: &mut Slots, slot: u16, len: usize) {
        slots.waiting[usize::from(slot)] = true;
        self.parts.push(Part { slot, len });
        self.bytes += len;
    }

    /// Sends what waits. A packet that cannot be sent is as good as lost: the engine sends it
    /// again. Only an error that will not pass is returned.
    pub(super) fn leave(&mut self, socket: &UdpSocket, slots: &mut Slots) -> io::Result<Left> {
        if self.parts.is_empty() {
            return Ok(Left::default());
        }
        let mut left = if self.segmented {
            self.send(socket, slots, true)
        } else {
            self.send(socket, slots, false)
        };
        if self.segmented
            && left
                .as_ref()
                .is_err_and(|error| refuses_segments(error, self.parts.len()))
        {
            self.segmented = false;
            left = self.send(socket, slots, false);
        }
        for part in self.parts.drain(..) {
            slots.waiting[usize::from(part.slot)] = false;
        }
        self.bytes = 0;
        match left {
            Err(error) if passes(&error) => Ok(Left { bytes: 0, calls: 1 }),
            left => left,
        }
    }

    fn send(&self, socket: &UdpSocket, slots: &Slots, segmented: bool) -> io::Result<Left> {
        let mut iovecs = [const { MaybeUninit::<libc::iovec>::zeroed() }; PARTS_MAX];
        let mut pieces = 0;
        let mut end = usize::MAX;
        for part in &self.parts {
            let at = slots.at(part.slot);
            let bytes = &slots.bytes[at..at + part.len];
            if segmented && at == end {
                // SAFETY: an earlier round wrote this element.
                let piece = unsafe { iovecs[pieces - 1].assume_init_mut() };
                piece.iov_len += part.len;
            } else {
                iovecs[pieces].write(libc::iovec {
                    iov_base: bytes.as_ptr().cast_mut().cast(),
                    iov_len: part.len,
                });
                pieces += 1;
            }
            end = at + part.len;
        }
        if segmented {
            send_segments(socket, &mut iovecs[..pieces], self.parts[0].len)
        } else {
            send_each(socket, &mut iovecs[..pieces])
        }
    }
}

/// Hands the kernel one message that is to be cut every `segment` bytes.
fn send_segments(
    socket: &UdpSocket,
    iovecs: &mut [MaybeUninit<libc::iovec>],
    segment: usize,
) -> io::Result<Left> {
    // SAFETY: all-zero bytes are a valid msghdr: integers and null pointers.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    let mut control = [0_u64; CONTROL_WORDS];
    message.msg_iov = iovecs.as_mut_ptr().cast();
    message.msg_iovlen = iovecs.len();
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_SPACE;
    let head = libc::cmsghdr {
        cmsg_len: CONTROL_LEN,
        cmsg_level: libc::SOL_UDP,
        cmsg_type: libc::UDP_SEGMENT,
    };
    // SAFETY: the control area is larger than a header, so this points to its begin, which is
    // 8-byte aligned.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: as above; `CONTROL_SPACE` bytes of the area are for this header and its data.
    unsafe { first.write(head) };
    // SAFETY: as above.
    let data = unsafe { libc::CMSG_DATA(first) };
    let segment = u16::try_from(segment).map_err(io::Error::other)?;
    // SAFETY: as above; the write asks for no alignment.
    unsafe { data.cast::<u16>().write_unaligned(segment) };
    // SAFETY: vector, bytes and control area are of the lengths given and outlive the call, which
    // only reads them.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) };
    let bytes = u64::try_from(sent).map_err(|_negative| io::Error::last_os_error())?;
    Ok(Left { bytes, calls: 1 })
}

/// Sends one datagram for each of `iovecs`.
fn send_each(socket: &UdpSocket, iovecs: &mut [MaybeUninit<libc::iovec>]) -> io::Result<Left> {
    let mut messages = [const { MaybeUninit::<libc::mmsghdr>::zeroed() }; PARTS_MAX];
    for (message, iovec) in messages.iter_mut().zip(iovecs.iter_mut()) {
        // SAFETY: all-zero bytes are a valid mmsghdr: integers and null pointers.
        let message = unsafe { message.assume_init_mut() };
        message.msg_hdr.msg_iov = iovec.as_mut_ptr();
        message.msg_hdr.msg_iovlen = 1;
    }
    let (mut from, mut left) = (0, Left::default());
    while from < iovecs.len() {
        let count = libc::c_uint::try_from(iovecs.len() - from).unwrap_or(0);
        let first = messages[from..].as_mut_ptr().cast();
        // SAFETY: `first` points to `count` headers, initialised above; their vectors and bytes are
        // of the lengths given and outlive the call.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), first, count, 0) };
        left.calls += 1;
        let sent = match usize::try_from(sent) {
            Ok(sent) => sent,
            Err(_) => {
                let error = io::Error::last_os_error();
                if !passes(&error) {
                    return Err(error);
                }
                // The first one is lost, the others have their chance.
                1
            }
        };
        for message in messages.iter().skip(from).take(sent) {
            // SAFETY: initialised above, then updated by the kernel.
            left.bytes += u64::from(unsafe { message.assume_init_ref() }.msg_len);
        }
        from += sent;
    }
    Ok(left)
}

/// Opens a socket towards the server. Returns with it the largest UDP payload that the path takes
/// in one packet.
pub(super) fn open(server: SocketAddr, mtu: Option<u16>) -> io::Result<(UdpSocket, usize)> {
    let any: SocketAddr = if server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    if set_socket_send_buffer_size_force(&socket, SEND_BUFFER_BYTES).is_err() {
        set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES)?;
    }
    set_socket_recv_buffer_size(&socket, REPLY_BUFFER_BYTES)?;
    let (path_mtu, headers) = if server.is_ipv4() {
        (option(&socket, libc::IPPROTO_IP, libc::IP_MTU)?, 28)
    } else {
        (option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU)?, 48)
    };
    let packet = mtu.map_or(path_mtu, |mtu| path_mtu.min(mtu.into()));
    let payload = packet.saturating_sub(headers);
    Ok((
        socket,
        payload.clamp(DATAGRAM_BYTES_MIN, DATAGRAM_BYTES_MAX),
    ))
}

fn option(socket: &UdpSocket, level: libc::c_int, option: libc::c_int) -> io::Result<usize> {
    let mut value: libc::c_int = 0;
    let mut length = INT_BYTES;
    let place = ptr::from_mut(&mut value).cast();
    // SAFETY: `value` has room for `length` bytes.
    match unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, place, &raw mut length) } {
        0 => Ok(usize::try_from(value).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a failed train may do better packet by packet: old kernels and some devices know no
/// segments, and a path that has become narrower refuses them.
fn refuses_segments(error: &io::Error, packets: usize) -> bool {
    let refused = matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EIO | libc::EOPNOTSUPP | libc::ENOPROTOOPT | libc::EMSGSIZE)
    );
    refused && packets > 1
}

/// Whether an error of sending is one that the engine's resending cures: full queues, and what
/// others said by ICMP while the server or the way to it was away.
fn passes(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EAGAIN
                | libc::EINTR
                | libc::ENOBUFS
                | libc::ENOMEM
                | libc::ECONNREFUSED
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::EHOSTDOWN
                | libc::ENETDOWN
                | libc::EPERM
                | libc::EMSGSIZE
        )
    )
}

/// What kernels take apart at most.
const PARTS_MAX: usize = 64;
/// A UDP datagram's limit less the largest headers.
const TRAIN_BYTES_MAX: usize = 65_535 - 48;
const SEND_BUFFER_BYTES: usize = 4 << 20;
const REPLY_BUFFER_BYTES: usize = 256 << 10;
const SEGMENT_BYTES: libc::c_uint = 2;
// SAFETY: both only compute.
const CONTROL_SPACE: usize = unsafe { libc::CMSG_SPACE(SEGMENT_BYTES) } as usize;
// SAFETY: as above.
const CONTROL_LEN: usize = unsafe { libc::CMSG_LEN(SEGMENT_BYTES) } as usize;
const CONTROL_WORDS: usize = CONTROL_SPACE.div_ceil(8);
#[expect(clippy::cast_possible_truncation, reason = "an int has four bytes")]
const INT_BYTES: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn pair() -> (UdpSocket, UdpSocket, usize) {
        let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
        sink.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let (socket, payload) = open(sink.local_addr().unwrap(), Some(1500)).unwrap();
        (sink, socket, payload)
    }

    /// Three packets out of order and a shorter one behind them.
    fn sent(segmented: bool) -> Vec<(u8, usize)> {
        let (sink, socket, payload) = pair();
        let mut slots = Slots::new(8, payload);
        let mut train = Train::new();
        train.segmented = segmented;
        for slot in [6, 7, 1] {
            slots.buffer(slot).unwrap().fill(slot.to_le_bytes()[0]);
            assert!(train.has_room(payload));
            train.push(&mut slots, slot, payload);
            assert!(slots.buffer(slot).is_none(), "it waits to leave");
        }
        train.push(&mut slots, 2, 100);
        assert!(!train.has_room(payload), "nothing follows a short packet");
        let left = train.leave(&socket, &mut slots).unwrap();
        assert!((0..8).all(|slot| slots.buffer(slot).is_some()));
        assert_eq!(left.bytes, 3 * payload as u64 + 100);
        let mut bytes = [0; 2000];
        (0..4)
            .map(|_| {
                let length = sink.recv(&mut bytes).unwrap();
                (bytes[0], length)
            })
            .collect()
    }

    #[test]
    fn a_train_arrives_as_its_packets_with_and_without_the_kernels_help() {
        let expected = [(6, 1472), (7, 1472), (1, 1472), (0, 100)];
        assert_eq!(sent(true), expected);
        assert_eq!(sent(false), expected);
    }

    #[test]
    fn loopback_takes_the_largest_datagram_the_protocol_has() {
        let server = "127.0.0.1:6666".parse().unwrap();
        assert_eq!(open(server, None).unwrap().1, DATAGRAM_BYTES_MAX);
        assert_eq!(
            open("[::1]:6666".parse().unwrap(), Some(1500)).unwrap().1,
            1452
        );
    }

    #[test]
    fn a_port_that_nobody_holds_is_no_error() {
        let (sink, socket, payload) = pair();
        drop(sink);
        let mut slots = Slots::new(8, payload);
        let mut train = Train::new();
        for _ in 0..3 {
            train.push(&mut slots, 0, payload);
            train.leave(&socket, &mut slots).unwrap();
        }
    }
}
