//! A link that loses datagrams: a UDP proxy between a sender and its server.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// A running proxy. It lives as long as the test's process.
pub(crate) struct Proxy {
    /// Where it stands for the server.
    pub(crate) address: SocketAddr,
    lost: Arc<AtomicU64>,
}

impl Proxy {
    /// Datagrams lost so far, both ways.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Starts a proxy for one sender that loses every `every`-th datagram each way.
pub(crate) fn start(server: SocketAddr, every: u64) -> Proxy {
    let near = UdpSocket::bind("127.0.0.1:0").unwrap();
    let far = UdpSocket::bind("127.0.0.1:0").unwrap();
    far.connect(server).unwrap();
    let (address, lost) = (near.local_addr().unwrap(), Arc::<AtomicU64>::default());
    let (near_back, far_back) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    let (count, count_back) = (Arc::clone(&lost), Arc::clone(&lost));
    let loses = move |number: u64, lost: &AtomicU64| {
        let loses = number % every == every - 1;
        lost.fetch_add(loses.into(), Ordering::Relaxed);
        loses
    };
    thread::spawn(move || {
        let mut bytes = [0; 65_536];
        for number in 0.. {
            let (length, sender) = near.recv_from(&mut bytes).unwrap();
            near.connect(sender).unwrap();
            if !loses(number, &count) {
                far.send(&bytes[..length]).unwrap();
            }
        }
    });
    thread::spawn(move || {
        let mut bytes = [0; 65_536];
        for number in 0.. {
            let Ok(length) = far_back.recv(&mut bytes) else {
                continue;
            };
            if !loses(number, &count_back) {
                // The sender may be gone already.
                drop(near_back.send(&bytes[..length]));
            }
        }
    });
    Proxy { address, lost }
}
