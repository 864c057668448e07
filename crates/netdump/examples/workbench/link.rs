//! A link between a sender and its server: a rate, a delay, a queue and random loss, both ways.
//!
//! In user space, because not every kernel has `sch_netem`. Loss and timing are those of one link:
//! a datagram that finds the queue full is dropped, and order is kept.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use netdump::serve::socket::{Batch, open, prepare};

use crate::raw::forward;

/// One link.
pub(crate) struct Link {
    pub(crate) listen: SocketAddr,
    pub(crate) server: SocketAddr,
    /// Share of the datagrams that are lost, each way.
    pub(crate) loss: f64,
    /// Each way.
    pub(crate) delay_us: u64,
    pub(crate) bytes_per_second: u64,
}

/// One direction.
struct Way {
    from: UdpSocket,
    to: UdpSocket,
    loss: f64,
    delay: Duration,
    bytes_per_second: u64,
    /// When the wire is free again.
    free_at: Instant,
    under_way: VecDeque<(Instant, Vec<u8>)>,
    random: u64,
}

/// Who the sender is, learned from what it sends.
type Sender = Arc<Mutex<Option<SocketAddr>>>;

/// Carries datagrams until it is killed.
pub(crate) fn run(link: &Link) -> Result<()> {
    let near = open(link.listen, false).context("cannot open the link's socket")?;
    let far = UdpSocket::bind("127.0.0.1:0").context("cannot open the link's socket")?;
    far.connect(link.server).context("cannot connect")?;
    prepare(&near)
        .and_then(|_| prepare(&far))
        .context("cannot prepare the link's sockets")?;
    let way = |from: &UdpSocket, to: &UdpSocket, random| -> Result<Way> {
        Ok(Way {
            from: from.try_clone()?,
            to: to.try_clone()?,
            loss: link.loss,
            delay: Duration::from_micros(link.delay_us),
            bytes_per_second: link.bytes_per_second.max(1),
            free_at: Instant::now(),
            under_way: VecDeque::new(),
            random,
        })
    };
    let sender = Sender::default();
    let (mut there, mut back) = (way(&near, &far, 1)?, way(&far, &near, 2)?);
    let learned = Arc::clone(&sender);
    let other = thread::spawn(move || back.carry(|_| (), || *known(&learned)));
    there.carry(|from| *known(&sender) = Some(from), || None)?;
    other
        .join()
        .map_err(|_panic| anyhow!("the way back panicked"))?
}

impl Way {
    fn carry(
        &mut self,
        mut learn: impl FnMut(SocketAddr),
        to: impl Fn() -> Option<SocketAddr>,
    ) -> Result<()> {
        let mut batch = Batch::new();
        loop {
            let now = Instant::now();
            let due = self.under_way.front().map(|(at, _)| *at);
            let wait = due.map_or(IDLE, |at| at.saturating_duration_since(now));
            batch
                .receive(&self.from, wait.min(IDLE))
                .context("cannot receive")?;
            batch.each(|peer, datagram| {
                learn(peer.address);
                self.enqueue(datagram);
            });
            let now = Instant::now();
            while let Some((_, bytes)) = self.under_way.pop_front_if(|(at, _)| *at <= now) {
                // Nobody there is a loss too.
                forward(&self.to, &bytes, to());
            }
        }
    }

    fn enqueue(&mut self, datagram: &[u8]) {
        let now = Instant::now();
        let begin = self.free_at.max(now);
        if begin - now > QUEUE || self.loses() {
            return;
        }
        let on_wire = (datagram.len() + FRAME_BYTES) as f64;
        self.free_at = begin + Duration::from_secs_f64(on_wire / self.bytes_per_second as f64);
        self.under_way
            .push_back((self.free_at + self.delay, datagram.to_vec()));
    }

    fn loses(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let dice = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
        (dice as f64) < self.loss * (1_u64 << 53) as f64
    }
}

fn known(sender: &Sender) -> std::sync::MutexGuard<'_, Option<SocketAddr>> {
    sender.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ethernet, IPv4 and UDP headers, preamble and gap.
pub(crate) const FRAME_BYTES: usize = 66;
/// What waits longer than this for the wire is dropped: a switch's buffer.
const QUEUE: Duration = Duration::from_millis(4);
const IDLE: Duration = Duration::from_millis(50);
