//! A receiver of log records, for tests of the client: it takes what one host sends, loses as many
//! datagrams in either direction as it is told, and prints each record as a line.
//!
//! `console_sink KEYFILE PORT LOSS_PERCENT`: lines are `SEQUENCE MICROSECONDS LEVEL DELAY_US C|- TEXT`
//! (delay: from the host's print to this line, by the host's clock at sending; C: sent by a crash),
//! and `skip FIRST END REASON`, `lost FIRST END`.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netdump::key::HostKey;
use proto::console::{Entry, LOG_REPLY_BYTES_MAX, Log, Server, Taken};
use proto::time::Instant;
use proto::units::{PacketNumber, SessionId};
use proto::wire::{DATAGRAM_BYTES_MAX, Header, Kind, open_client, seal_server};

/// One boot of the host.
struct Boot {
    server: Server,
    session: SessionId,
    peer: SocketAddr,
    kept: BTreeMap<u64, Vec<u8>>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [key, port, loss] = arguments.as_slice() else {
        anyhow::bail!("console_sink KEYFILE PORT LOSS_PERCENT");
    };
    let key = HostKey::load(Path::new(key))?;
    let port: u16 = port.parse().context("no port")?;
    let loss: u64 = loss.parse().context("no percentage")?;
    let socket = UdpSocket::bind(("127.0.0.1", port))?;
    socket.set_read_timeout(Some(Duration::from_millis(5)))?;
    let started = std::time::Instant::now();
    let mut sink = Sink {
        key,
        socket,
        loss,
        random: 88_172_645_463_325_252,
        replies: 0,
        boots: HashMap::new(),
    };
    let mut datagram = [0; DATAGRAM_BYTES_MAX];
    loop {
        let received = sink.socket.recv_from(&mut datagram);
        let now = Instant::from_micros(u64::try_from(started.elapsed().as_micros())?);
        if let Ok((bytes, peer)) = received
            && !sink.loses()
        {
            sink.take(now, peer, &mut datagram[..bytes])?;
        }
        sink.tick(now)?;
        std::io::stdout().flush()?;
    }
}

struct Sink {
    key: HostKey,
    socket: UdpSocket,
    loss: u64,
    random: u64,
    replies: u64,
    boots: HashMap<[u8; 16], Boot>,
}

impl Sink {
    fn loses(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 100 < self.loss
    }

    fn take(&mut self, now: Instant, peer: SocketAddr, datagram: &mut [u8]) -> Result<()> {
        let Ok(header) = Header::parse(datagram) else {
            return Ok(());
        };
        if header.kind != Kind::Log || header.session.key != self.key.id {
            return Ok(());
        }
        let keys = self.key.secret.log_keys(header.session);
        let Ok(payload) = open_client(&keys.client, &header, datagram) else {
            println!("bad seal");
            return Ok(());
        };
        let log = Log::decode(payload).context("a sealed datagram is not legal")?;
        let boot = self.boots.entry(log.head.boot).or_insert_with(|| Boot {
            server: Server::new(None),
            session: header.session,
            peer,
            kept: BTreeMap::new(),
        });
        (boot.session, boot.peer) = (header.session, peer);
        match boot.server.handle(now, &log.head) {
            Taken::Write(from) => {
                print(&log, from);
                boot.release(now)?;
            }
            Taken::Keep => {
                boot.kept.insert(log.head.covers.first, payload.to_vec());
            }
            Taken::Known | Taken::NoRoom => {}
        }
        boot.server.written(now, boot.server.next());
        Ok(())
    }

    fn tick(&mut self, now: Instant) -> Result<()> {
        let mut replies = Vec::new();
        for boot in self.boots.values_mut() {
            if let Some(lost) = boot.server.give_up(now) {
                println!("lost {} {}", lost.first, lost.end);
                boot.release(now)?;
                boot.server.written(now, boot.server.next());
            }
            if let Some(reply) = boot.server.reply(now) {
                replies.push((boot.session, boot.peer, reply));
            }
        }
        for (session, peer, reply) in replies {
            let mut out = [0; LOG_REPLY_BYTES_MAX];
            let payload = reply.encode(&mut out).context("a reply does not fit")?;
            let header = Header {
                kind: Kind::LogReply,
                attempt: 0,
                session,
                number: PacketNumber(self.replies),
            };
            self.replies += 1;
            let keys = self.key.secret.log_keys(session);
            let incarnation = std::process::id().to_le_bytes();
            let mut whole = [0; 16];
            whole[..4].copy_from_slice(&incarnation);
            let bytes = seal_server(&keys.server, &header, &whole, &mut out, payload);
            let bytes = bytes.context("a reply does not fit")?;
            if !self.loses() {
                let sent = self.socket.send_to(&out[..bytes], peer)?;
                ensure!(sent == bytes, "a reply was cut");
            }
        }
        Ok(())
    }
}

impl Boot {
    fn release(&mut self, now: Instant) -> Result<()> {
        while let Some((first, payload)) = self.kept.pop_first() {
            let log = Log::decode(&payload).context("was legal before")?;
            match self.server.release(now, &log.head) {
                Some(from) => print(&log, from),
                None => {
                    self.kept.insert(first, payload);
                    break;
                }
            }
        }
        Ok(())
    }
}

fn print(log: &Log<'_>, from: u64) {
    for entry in log.entries() {
        match entry {
            Entry::Record(sequence, record) if sequence >= from => {
                let time = record.head.time_us;
                println!(
                    "{sequence} {time} {} {} {} {}",
                    record.head.level,
                    log.head.kernel_us.saturating_sub(time),
                    if log.head.crash { 'C' } else { '-' },
                    record.text.escape_ascii()
                );
            }
            Entry::Skip(range, reason) if range.end > from => {
                println!("skip {} {} {reason:?}", range.first.max(from), range.end);
            }
            Entry::Record(..) | Entry::Skip(..) => {}
        }
    }
}
