//! Hosts that send console messages: extended netconsole from addresses of their own on loopback.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::json;

/// Sends lines of `hosts` hosts in turn for so long, at a steady rate, or as fast as it can at rate
/// 0.
pub(crate) fn run(address: SocketAddr, hosts: u32, rate: f64, seconds: f64) -> Result<()> {
    let sockets = (0..hosts)
        .map(|host| socket(address, host))
        .collect::<Result<Vec<_>>>()?;
    let begin = Instant::now();
    let (mut sent, mut text) = (0_u64, String::new());
    let mut sequence = 0;
    loop {
        let elapsed = begin.elapsed().as_secs_f64();
        if elapsed >= seconds {
            break;
        }
        if rate > 0.0 && sent as f64 >= elapsed * rate {
            thread::sleep(PAUSE);
            continue;
        }
        for socket in &sockets {
            line(&mut text, sequence, begin.elapsed())?;
            socket.send(text.as_bytes()).context("cannot send")?;
            sent += 1;
        }
        sequence += 1;
    }
    println!(
        "{}",
        json!({ "sent": sent, "seconds": begin.elapsed().as_secs_f64() })
    );
    Ok(())
}

/// Sends one line of each of `hosts` hosts.
pub(crate) fn once(address: SocketAddr, hosts: u32) -> Result<()> {
    let (begin, mut text) = (Instant::now(), String::new());
    for host in 0..hosts {
        line(&mut text, 0, begin.elapsed())?;
        socket(address, host)?
            .send(text.as_bytes())
            .context("cannot send")?;
        if host % PAUSE_EVERY == 0 {
            thread::sleep(PAUSE);
        }
    }
    println!("{}", json!({ "sent": hosts }));
    Ok(())
}

fn socket(address: SocketAddr, host: u32) -> Result<UdpSocket> {
    let own = Ipv4Addr::from_bits(FIRST_ADDRESS.to_bits() + host);
    let socket = UdpSocket::bind((own, 0)).with_context(|| format!("cannot bind to {own}"))?;
    socket
        .connect(address)
        .with_context(|| format!("cannot connect to {address}"))?;
    Ok(socket)
}

/// A line of about 120 bytes.
fn line(text: &mut String, sequence: u64, since: Duration) -> Result<()> {
    let time = UPTIME_MICROS + since.as_micros();
    text.clear();
    writeln!(
        text,
        "6,{sequence},{time},-,caller=T1;eth0: a message as drivers print them, some seventy bytes \
        long, {sequence:6}"
    )
    .context("cannot write a line")
}

const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 64, 0, 1);
const UPTIME_MICROS: u128 = 100_000_000;
const PAUSE: Duration = Duration::from_micros(500);
const PAUSE_EVERY: u32 = 16;
