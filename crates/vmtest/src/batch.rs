//! Many datagrams in one system call, in buffers made once: `recvmmsg(2)` and `sendmmsg(2)`.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};

/// Datagrams a batch holds.
pub const CAPACITY: usize = COUNT as usize;
/// The same as the C interface wants it.
const COUNT: libc::c_uint = 128;
/// Bytes of one buffer: a frame of the largest MTU used here (9000) with its headers, and room.
pub const BUFFER_SIZE: usize = 9216;

/// Buffers for received datagrams.
pub struct Batch {
    buffers: Vec<[u8; BUFFER_SIZE]>,
    lengths: [usize; CAPACITY],
    received: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            buffers: vec![[0; BUFFER_SIZE]; CAPACITY],
            lengths: [0; CAPACITY],
            received: 0,
        }
    }
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch")
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

impl Batch {
    /// Receives what waits on `socket` without blocking, each datagram `headroom` bytes into its
    /// buffer; gives how many.
    ///
    /// # Errors
    /// Those of `recvmmsg(2)`, except that nothing waiting is no error.
    pub fn receive(&mut self, socket: &impl AsFd, headroom: usize) -> io::Result<usize> {
        assert!(headroom < BUFFER_SIZE, "no room behind {headroom} bytes");
        self.received = 0;
        let mut vectors: [libc::iovec; CAPACITY] = std::array::from_fn(|index| {
            let space = &mut self.buffers[index][headroom..];
            libc::iovec {
                iov_base: space.as_mut_ptr().cast(),
                iov_len: space.len(),
            }
        });
        let mut headers = vectors.each_mut().map(header);
        // SAFETY: each header points to one vector and each vector to a part of a buffer of ours
        // with its true length; all live until the call returns, and the count is the number of
        // headers.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                headers.as_mut_ptr(),
                COUNT,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock {
                Ok(0)
            } else {
                Err(error)
            };
        };
        for (length, header) in self.lengths.iter_mut().zip(&headers[..count]) {
            *length = headroom + usize::try_from(header.msg_len).unwrap_or(0);
        }
        self.received = count;
        Ok(count)
    }

    /// Datagram `index` with the headroom before it.
    #[must_use]
    pub fn get(&self, index: usize) -> &[u8] {
        &self.buffers[index][..self.lengths[index]]
    }

    /// The same, to write into the headroom.
    pub fn get_mut(&mut self, index: usize) -> &mut [u8] {
        &mut self.buffers[index][..self.lengths[index]]
    }
}

/// Sends all `datagrams` to whom `socket` is connected; gives how many it took before it was full.
///
/// # Errors
/// Those of `sendmmsg(2)`, except that a full socket is no error.
///
/// # Panics
/// If there are more than [`CAPACITY`].
pub fn send(socket: &impl AsFd, datagrams: &[&[u8]]) -> io::Result<usize> {
    assert!(
        datagrams.len() <= CAPACITY,
        "{} datagrams in one batch",
        datagrams.len()
    );
    let mut vectors: [libc::iovec; CAPACITY] = std::array::from_fn(|index| {
        let bytes = datagrams.get(index).copied().unwrap_or_default();
        libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        }
    });
    let mut headers = vectors.each_mut().map(header);
    let mut sent = 0;
    while sent < datagrams.len() {
        let rest = &mut headers[sent..datagrams.len()];
        // SAFETY: each header points to one vector and each vector to a datagram with its true
        // length, which is only read; all live until the call returns, and the count is the number
        // of headers.
        let count = unsafe {
            libc::sendmmsg(
                socket.as_fd().as_raw_fd(),
                rest.as_mut_ptr(),
                libc::c_uint::try_from(rest.len()).unwrap_or(0),
                libc::MSG_DONTWAIT,
            )
        };
        match usize::try_from(count) {
            Ok(count) => sent += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                return if error.kind() == io::ErrorKind::WouldBlock {
                    Ok(sent)
                } else {
                    Err(error)
                };
            }
        }
    }
    Ok(sent)
}

fn header(vector: &mut libc::iovec) -> libc::mmsghdr {
    // SAFETY: `mmsghdr` is a C structure of integers and pointers, for which zero bytes are a valid
    // value.
    let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
    header.msg_hdr.msg_iov = vector;
    header.msg_hdr.msg_iovlen = 1;
    header
}
