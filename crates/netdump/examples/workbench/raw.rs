//! Datagrams with no protocol around them: as fast as they can be sent, and as cheaply as they can
//! be received.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use netdump::send::Blaster;
use netdump::serve::socket::{Batch, open, prepare};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

/// Receives until nothing has come for a while. With `merged`, equal datagrams of one sender are
/// taken together (UDP generic receive offload), as the server takes them.
pub(crate) fn sink(address: SocketAddr, merged: bool) -> Result<()> {
    let socket = open(address, false).context("cannot open the sink's socket")?;
    if merged {
        prepare(&socket).context("cannot prepare the sink's socket")?;
    } else {
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES)
            .context("cannot enlarge the sink's buffer")?;
    }
    let mut batch = Batch::new();
    let (mut bytes, mut datagrams) = (0_u64, 0_u64);
    let (mut first, mut last) = (None, Instant::now());
    while first.is_none() || last.elapsed() < QUIET {
        let before = datagrams;
        batch
            .receive(&socket, Duration::from_millis(50))
            .context("cannot receive")?;
        batch.each(|_, datagram| {
            bytes += datagram.len() as u64;
            datagrams += 1;
        });
        if datagrams > before {
            last = Instant::now();
            first.get_or_insert(last);
        }
    }
    let seconds = first.map_or(0.0, |first| (last - first).as_secs_f64());
    let row = json!({
        "bytes": bytes,
        "datagrams": datagrams,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds(),
    });
    println!("{row}");
    Ok(())
}

/// Sends equal datagrams in trains for so long: as fast as it can, or not faster than so many bytes
/// a second.
pub(crate) fn blast(
    address: SocketAddr,
    datagram_bytes: usize,
    seconds: f64,
    bytes_per_second: Option<f64>,
) -> Result<()> {
    let mut blaster = Blaster::new(address, datagram_bytes)?;
    let begin = Instant::now();
    let mut bytes = 0;
    while begin.elapsed().as_secs_f64() < seconds {
        let early =
            bytes_per_second.map(|rate| bytes as f64 / rate - begin.elapsed().as_secs_f64());
        if let Some(early) = early.filter(|early| *early > 0.0) {
            std::thread::sleep(Duration::from_secs_f64(early));
        }
        match blaster.send() {
            Ok(sent) => bytes += sent,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).context("cannot send"),
        }
    }
    let row = json!({
        "bytes": bytes,
        "seconds": begin.elapsed().as_secs_f64(),
        "cpu_seconds": cpu_seconds(),
    });
    println!("{row}");
    Ok(())
}

/// CPU time of this process.
pub(crate) fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Sends `bytes` as datagrams of their own where trains would be taken apart anyway.
pub(crate) fn forward(socket: &UdpSocket, bytes: &[u8], to: Option<SocketAddr>) -> bool {
    match to {
        Some(to) => socket.send_to(bytes, to).is_ok(),
        None => socket.send(bytes).is_ok(),
    }
}

const QUIET: Duration = Duration::from_millis(500);
const BUFFER_BYTES: usize = 128 << 20;
