//! The way to a target: it takes messages, and says which of them the target has.
//!
//! Nobody acknowledges a syslog message. What can be known is used: a datagram that was refused, the
//! bytes that the other side's TCP has, and whether a connection ended in order. After an orderly
//! end everything that its TCP had was read. After any other, what was sent in the last second is
//! sent once more, and counted: better twice than never.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs as _, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv, sockopt};
use rustls::ClientConnection;

use super::settings::{Destination, Settings};
use super::tls;

/// How long a connection may take to come about, and an answer to come.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// How long a write waits before it is looked whether the server ends.
const WRITE_WAIT: Duration = Duration::from_millis(500);
/// How long the other side's TCP may be silent.
const SILENCE_MAX_MS: u32 = 20_000;
/// What was sent so long ago has been read by any target that is well.
const UNSURE: Duration = Duration::from_secs(1);
/// Messages that are remembered for being sent again.
const FLIGHTS_MAX: usize = 1 << 18;
/// Datagrams that are sent back to back, and the rest after them: a receiver's default buffer holds
/// some two hundred.
const BURST: usize = 16;
const BURST_REST: Duration = Duration::from_millis(1);

/// Messages of a spool, and the place where they begin.
pub(super) struct Batch {
    pub(super) begin: u64,
    pub(super) lines: Vec<u8>,
}

/// Why a link is of no use any more.
#[derive(Debug)]
pub(super) struct Broken {
    /// In words.
    pub(super) why: String,
    /// The place in the spool where the next link goes on.
    pub(super) back_to: u64,
    /// Messages from there on that the target may have.
    pub(super) repeated: u64,
}

/// Syslog by datagrams.
pub(super) struct Datagrams {
    socket: UdpSocket,
}

/// Syslog by a stream.
pub(super) struct Stream {
    socket: Socket,
    /// Bytes that were written to the socket.
    written: u64,
    /// What is to be written.
    wire: Vec<u8>,
    flights: VecDeque<Flight>,
    /// Of those, how many the other side's TCP has.
    arrived: usize,
    /// Messages that arrived since somebody asked.
    news: u64,
    /// The place behind the last message that it has.
    pub(super) acknowledged: u64,
    /// The place behind the last message that is not sent again whatever happens.
    pub(super) free: u64,
}

/// A connection, plain or by TLS.
pub(super) struct Socket {
    pub(super) tcp: TcpStream,
    pub(super) tls: Option<Box<ClientConnection>>,
}

/// A message under way.
struct Flight {
    /// Where it ends on the wire.
    wire_end: u64,
    /// Where it ends in the spool.
    end: u64,
    at: Instant,
}

impl Batch {
    /// Each message, and the place where it ends.
    pub(super) fn messages(&self) -> impl Iterator<Item = (&[u8], u64)> {
        let lines = self.lines.split_inclusive(|&byte| byte == b'\n');
        lines.scan(self.begin, |at, line| {
            *at += line.len() as u64;
            Some((&line[..line.len() - 1], *at))
        })
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.lines.iter().filter(|&&byte| byte == b'\n').count() as u64
    }
}

impl Datagrams {
    /// A socket for messages to `to`, which must not be our own port.
    pub(super) fn open(to: &Destination, own: SocketAddr) -> Result<Self> {
        let address = resolve(to)?.remove(0);
        refuse_own(to, address, own)?;
        let any: SocketAddr = if address.is_ipv4() {
            ([0, 0, 0, 0], 0).into()
        } else {
            ([0; 16], 0).into()
        };
        let cannot = || format!("cannot send to {to}");
        let socket = UdpSocket::bind(any).with_context(cannot)?;
        socket.connect(address).with_context(cannot)?;
        Ok(Self { socket })
    }

    /// Sends messages until one is refused; tells `sent` the place behind each.
    pub(super) fn send(&self, batch: &Batch, mut sent: impl FnMut(u64)) -> io::Result<()> {
        for (index, (message, end)) in batch.messages().enumerate() {
            if index % BURST == 0 && index > 0 {
                thread::sleep(BURST_REST);
            }
            self.socket.send(message)?;
            // Where nobody listens this machine says so at once, and another one a little later.
            if let Some(error) = self.socket.take_error()? {
                return Err(error);
            }
            sent(end);
        }
        Ok(())
    }
}

impl Socket {
    /// Connects.
    pub(super) fn open(settings: &Settings) -> Result<(Self, u64)> {
        let to = &settings.to;
        let mut last = None;
        for address in resolve(to)? {
            match TcpStream::connect_timeout(&address, ANSWER_WAIT) {
                Ok(tcp) => return Self::begin(tcp, settings),
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) => Err(error).with_context(|| format!("cannot connect to {to}")),
            None => bail!("{} has no address", to.host),
        }
    }

    fn begin(tcp: TcpStream, settings: &Settings) -> Result<(Self, u64)> {
        let to = &settings.to;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(ANSWER_WAIT))?;
        tcp.set_write_timeout(Some(ANSWER_WAIT))?;
        sockopt::set_socket_keepalive(&tcp, true)?;
        sockopt::set_tcp_user_timeout(&tcp, SILENCE_MAX_MS)?;
        let mut socket = Self { tcp, tls: None };
        let mut written = 0;
        if to.way.is_secure() {
            let mut tls = tls::connection(settings)?;
            while tls.is_handshaking() {
                let done = tls.complete_io(&mut socket.tcp);
                let (_, wrote) = done.with_context(|| format!("no TLS with {to}"))?;
                written += wrote as u64;
            }
            socket.tls = Some(Box::new(tls));
        }
        Ok((socket, written))
    }
}

impl Stream {
    /// Connects; the first message to come begins at `place`.
    pub(super) fn open(settings: &Settings, place: u64) -> Result<Self> {
        let (socket, written) = Socket::open(settings)?;
        socket.tcp.set_write_timeout(Some(WRITE_WAIT))?;
        Ok(Self {
            socket,
            written,
            wire: Vec::new(),
            flights: VecDeque::new(),
            arrived: 0,
            news: 0,
            acknowledged: place,
            free: place,
        })
    }

    /// Sends messages, each behind its length. Waits for a target that is slow, but not when
    /// `ending` says that the server ends.
    pub(super) fn send(&mut self, batch: &Batch, ending: impl Fn() -> bool) -> Result<(), Broken> {
        for (message, end) in batch.messages() {
            let length = format!("{} ", message.len());
            self.encode(length.as_bytes(), message)
                .map_err(|error| self.broken(&error))?;
            self.flights.push_back(Flight {
                wire_end: self.written + self.wire.len() as u64,
                end,
                at: Instant::now(),
            });
        }
        let mut begin = 0;
        while let Some(rest) = self.wire.get(begin..).filter(|rest| !rest.is_empty()) {
            match self.socket.tcp.write(rest) {
                Ok(0) => return Err(self.broken(&io::ErrorKind::WriteZero.into())),
                Ok(wrote) => {
                    begin += wrote;
                    self.written += wrote as u64;
                }
                Err(error) if is_wait(&error) && !ending() => {}
                Err(error) => return Err(self.broken(&error)),
            }
        }
        self.wire.clear();
        Ok(())
    }

    fn encode(&mut self, length: &[u8], message: &[u8]) -> io::Result<()> {
        match &mut self.socket.tls {
            None => {
                self.wire.extend_from_slice(length);
                self.wire.extend_from_slice(message);
            }
            Some(tls) => {
                tls.writer().write_all(&[length, message].concat())?;
                while tls.wants_write() {
                    tls.write_tls(&mut self.wire)?;
                }
            }
        }
        Ok(())
    }

    /// Hears what the other side has to say, and finds out which messages it has.
    pub(super) fn look(&mut self) -> Result<(), Broken> {
        let ended = self.hear().map_err(|error| self.broken(&error))?;
        self.count_arrived();
        if ended {
            return Err(Broken {
                why: "it closed the connection".to_owned(),
                back_to: self.acknowledged,
                repeated: 0,
            });
        }
        Ok(())
    }

    /// Reads without waiting; says whether the other side ended the connection in order.
    fn hear(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 4096];
        loop {
            let heard = match recv(&self.socket.tcp, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Ok(true),
                Ok((_, heard)) => heard.min(bytes.len()),
                Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            let Some(tls) = &mut self.socket.tls else {
                continue;
            };
            let mut rest = &bytes[..heard];
            while !rest.is_empty() {
                tls.read_tls(&mut rest)?;
                let state = tls.process_new_packets().map_err(io::Error::other)?;
                let mut plain = vec![0; state.plaintext_bytes_to_read()];
                tls.reader().read_exact(&mut plain)?;
            }
        }
    }

    fn count_arrived(&mut self) {
        let arrived = self.written - unacknowledged(&self.socket.tcp).min(self.written);
        while let Some(flight) = self.flights.get(self.arrived)
            && flight.wire_end <= arrived
        {
            self.acknowledged = flight.end;
            self.arrived += 1;
            self.news += 1;
        }
        while self.arrived > 0
            && let Some(flight) = self.flights.front()
            && (flight.at.elapsed() >= UNSURE || self.flights.len() > FLIGHTS_MAX)
        {
            self.free = flight.end;
            self.flights.pop_front();
            self.arrived -= 1;
        }
    }

    /// Messages that arrived since this was asked last.
    pub(super) fn take_arrived(&mut self) -> u64 {
        std::mem::take(&mut self.news)
    }

    /// We cannot go on ourselves.
    pub(super) fn stopped(&self, error: &anyhow::Error) -> Broken {
        Broken {
            why: format!("{error:#}"),
            back_to: self.acknowledged,
            repeated: 0,
        }
    }

    /// Everything that was sent has arrived.
    pub(super) fn is_idle(&self) -> bool {
        self.arrived == self.flights.len()
    }

    /// The connection ended out of order.
    fn broken(&mut self, error: &io::Error) -> Broken {
        self.count_arrived();
        Broken {
            why: error.to_string(),
            back_to: self.free,
            repeated: self.arrived as u64,
        }
    }
}

/// Bytes that the other side's TCP has not acknowledged.
fn unacknowledged(socket: &TcpStream) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes one int, to where the pointer points.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    // Where the system does not know, nothing counts as acknowledged.
    u64::try_from(bytes)
        .ok()
        .filter(|_| result == 0)
        .unwrap_or(u64::MAX)
}

fn is_wait(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

fn resolve(to: &Destination) -> Result<Vec<SocketAddr>> {
    let addresses = (to.host.as_str(), to.port).to_socket_addrs();
    let addresses: Vec<SocketAddr> = addresses
        .with_context(|| format!("cannot find the address of {}", to.host))?
        .collect();
    if addresses.is_empty() {
        bail!("{} has no address", to.host);
    }
    Ok(addresses)
}

/// Refuses a target that would send its messages to our own port.
pub(super) fn refuse_loop(to: &Destination, own: SocketAddr) -> Result<()> {
    // A name that cannot be resolved now is looked at again before anything is sent.
    for address in resolve(to).unwrap_or_default() {
        refuse_own(to, address, own)?;
    }
    Ok(())
}

fn refuse_own(to: &Destination, address: SocketAddr, own: SocketAddr) -> Result<()> {
    let (ip, own_ip) = (address.ip().to_canonical(), own.ip().to_canonical());
    // Only addresses of this machine can be bound to.
    let here = || ip.is_unspecified() || UdpSocket::bind((ip, 0)).is_ok();
    let reached = ip == own_ip || (own_ip.is_unspecified() && here()) || ip.is_unspecified();
    if address.port() == own.port() && reached {
        bail!(
            "{to} is this server's own port {own}: what is forwarded would come back for ever; name \
            the syslog server's port"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_port_is_refused_and_others_are_not() {
        let check = |to: &str, own: &str, refused: bool| {
            let to: Destination = to.parse().unwrap();
            let result = refuse_loop(&to, own.parse().unwrap());
            assert_eq!(result.is_err(), refused, "{to} {own}");
        };
        check("udp://127.0.0.1:6666", "127.0.0.1:6666", true);
        check("udp://127.0.0.1:6666", "[::]:6666", true);
        check("udp://[::ffff:127.0.0.1]:6666", "0.0.0.0:6666", true);
        check("udp://localhost:6666", "0.0.0.0:6666", true);
        check("udp://0.0.0.0:6666", "127.0.0.1:6666", true);
        check("udp://127.0.0.1:514", "127.0.0.1:6666", false);
        check("udp://192.0.2.1:6666", "0.0.0.0:6666", false);
        check("udp://127.0.0.2:6666", "127.0.0.1:6666", false);
    }

    #[test]
    fn a_batch_knows_where_each_message_ends() {
        let batch = Batch {
            begin: 10,
            lines: b"a\nbcd\n\n".to_vec(),
        };
        let all: Vec<(&[u8], u64)> = batch.messages().collect();
        assert_eq!(all, [(&b"a"[..], 12), (b"bcd", 16), (b"", 17)]);
        assert_eq!(batch.count(), 3);
    }
}
