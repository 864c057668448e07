//! `netdump serve`: receives crashes and puts each into a directory of its own.
//!
//! How a datagram travels: a [`reception`] thread takes a batch from its [`socket`], finds each
//! datagram's [`session`] in the [`registry`] and gives it to the session's engine. What became
//! complete of the stream a thread of [`writers`] brings to the session's [`disk`]: into the
//! [`spool`], then through [`content`] to the log; then the engine replies. When it is known who
//! crashed, and its text tells the [`cause`], [`verdict`] decides what is wanted, by what
//! [`signatures`] are known and as [`admission`] has places. At the end [`closing`]
//! syncs the spool, tells the host to reboot and has [`finish`] write the vmcore.
//!
//! A crash is a directory, whatever happens on the way: [`revive`] takes it up from its spools,
//! [`rest`] asks for what an attempt before did not bring. [`control`] is how people look and
//! interfere.

pub mod admission;
pub mod cause;
pub mod closing;
pub mod content;
pub mod control;
pub mod directory;
pub mod disk;
pub mod drops;
pub mod events;
pub mod finish;
pub mod follow;
pub mod hold;
pub mod hub;
pub mod log;
pub mod ranges;
pub mod reception;
pub mod registry;
mod report;
pub mod rest;
pub mod revive;
pub mod session;
pub mod signal;
pub mod signatures;
pub mod socket;
pub mod spool;
mod summary;
pub mod verdict;
pub mod writers;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use self::control::Control;
use self::directory::CrashDir;
use self::drops::DropCounts;
use self::events::{Event, Events};
use self::finish::Format;
use self::hub::{Hub, Parts, Policy, SPACE_LAST_BYTES, free_bytes};
use self::registry::{Shared, lock};
use self::session::{Phase, Session};
use self::verdict::{Deed, Want};
use self::writers::WRITERS;
use crate::console::Figures;
use crate::console::settings::Settings;
use crate::forward::Forward;
use crate::forward::settings::Settings as Target;
use crate::key::Keyring;

/// How a server is to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to receive. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where to put crashes; made when it does not exist.
    pub dumpdir: PathBuf,
    /// The directory with the hosts' key files.
    pub keys: PathBuf,
    /// Which vmcore to write.
    pub format: Format,
    /// What to want of crashes.
    pub policy: Policy,
    /// Filter level: which pages hosts leave out.
    pub filter: u8,
    /// Every crash is held until a person says what to do with it.
    pub hold: bool,
    /// Crashes go to this other server, if their host was armed for it.
    pub redirect: Option<SocketAddr>,
    /// What hosts do in the end.
    pub action: Deed,
    /// Sessions that send pages at a time.
    pub active: usize,
    /// Receive threads.
    pub threads: usize,
    /// A session that is silent for so long is over.
    pub silence: Duration,
    /// The spools of an incomplete crash wait for so long for its host to come back.
    pub linger: Duration,
    /// Hosts' logs.
    pub console: Settings,
    /// What is wanted of crashes that are known.
    pub signatures: signatures::Settings,
    /// Where their messages are forwarded to.
    pub forward: Vec<Target>,
    /// The `netdump` that writes the reports of crashes; `None` writes none.
    pub triage: Option<PathBuf>,
}

/// A session that is silent for so long is over: longer than a client looks for its server.
pub const SILENCE_MAX: Duration = Duration::from_secs(180);

/// The spools of an incomplete crash wait for so long for its host to come back: as long as a client
/// can be told to look for a server.
pub const LINGER: Duration = Duration::from_secs(proto::arming::GIVE_UP_SECONDS_MAX as u64);

/// A running server. Dropping it without [`Self::stop`] leaves its threads running.
pub struct Server {
    hub: Arc<Hub>,
    address: SocketAddr,
    threads: Vec<JoinHandle<()>>,
    /// Those that write logs; they end after those that receive.
    log_threads: Vec<JoinHandle<()>>,
    /// Those that forward; they end after those that write logs.
    forward_threads: Vec<JoinHandle<()>>,
    /// Locked, so that no second server works on the same spools.
    _lock: File,
}

impl Server {
    /// Starts a server: checks what can be wrong first, takes up unfinished sessions, then
    /// receives.
    pub fn start(options: &Options, events: Events) -> Result<Self> {
        let ring = Keyring::scan(&options.keys, |warning| events.warn(warning))?;
        ensure!(
            !ring.is_empty(),
            "no usable key in {}: make one for each host (netdump key new {}/HOST --host HOST)",
            options.keys.display(),
            options.keys.display()
        );
        let keys = ring.len();
        let claimed = claim(&options.dumpdir)?;
        let (sockets, buffer_bytes) = listen(options.listen, options.threads)?;
        let address = sockets[0]
            .local_addr()
            .context("cannot ask for the socket's address")?;
        let buffer_each = buffer_bytes / sockets.len();
        if buffer_each < BUFFER_BYTES_WANTED {
            events.warn(format!(
                "the kernel buffers {} KiB a socket instead of {} KiB: run as root, or raise \
                net.core.rmem_max",
                buffer_each >> 10,
                socket::RECEIVE_BUFFER_BYTES >> 10
            ));
        }
        let forward = Forward::open(&options.forward, &options.dumpdir, address)?;
        let hub = Arc::new(Hub::new(Parts {
            options,
            forward,
            ring,
            events,
            socket: sockets[0]
                .try_clone()
                .context("cannot duplicate a socket")?,
            buffer_bytes,
        }));
        let control = Control::open(&options.dumpdir)?;
        revive::recover(&hub)?;
        hub.events.tell(&Event::Listening {
            address,
            dumpdir: options.dumpdir.clone(),
            keys,
            threads: sockets.len(),
            buffer_bytes: buffer_each,
        });
        let mut threads = Vec::new();
        for socket in sockets {
            let hub = Arc::clone(&hub);
            threads.push(spawn("receive", move || reception::run(&hub, &socket))?);
        }
        for _ in 0..WRITERS {
            let there = Arc::clone(&hub);
            threads.push(spawn("write", move || writers::run(&there))?);
        }
        let there = Arc::clone(&hub);
        threads.push(spawn("housekeeping", move || keep_house(&there))?);
        let there = Arc::clone(&hub);
        threads.push(spawn("control", move || control.run(&there))?);
        let log_threads = start_logs(&hub)?;
        let forward_threads = start_forwarding(&hub)?;
        Ok(Self {
            hub,
            address,
            threads,
            log_threads,
            forward_threads,
            _lock: claimed,
        })
    }

    /// Where it receives.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Datagrams it did not take so far.
    #[must_use]
    pub fn drops(&self) -> DropCounts {
        self.hub.drops.counts()
    }

    /// Ends the server. Unfinished sessions stay in their spools; the next server goes on with
    /// them.
    pub fn stop(self) {
        self.hub.stop.store(true, Ordering::Relaxed);
        join(&self.hub, self.threads);
        self.hub.console.end();
        join(&self.hub, self.log_threads);
        self.hub.join();
        self.hub.forward.end();
        join(&self.hub, self.forward_threads);
        let counts = self.hub.drops.counts();
        if counts != DropCounts::default() {
            self.hub.events.tell(&Event::Drops { counts });
        }
        let figures = self.hub.console.figures();
        if figures != Figures::default() {
            self.hub.events.tell(&Event::Console { figures });
        }
        save_signatures(&self.hub);
        for target in self.hub.forward.rows() {
            self.hub.events.tell(&Event::Forward { target });
        }
        let live = self.hub.registry.live();
        for session in &live {
            let Some(disk) = lock(session).disk() else {
                continue;
            };
            let mut disk = lock(&disk);
            let written = disk.write_log();
            let mut session = lock(session);
            session.learn(&disk, true);
            if let Err(error) =
                written.and_then(|()| session.write_file(directory::State::Receiving, None))
            {
                self.hub.events.warn(format!("{error:#}"));
            }
        }
        self.hub.events.tell(&Event::Stopped {
            unfinished: live.len(),
        });
    }
}

/// Makes the dump directory, proves that it can be written, and locks it against a second server.
fn claim(dumpdir: &Path) -> Result<File> {
    let show = dumpdir.display();
    fs::create_dir_all(dumpdir)
        .with_context(|| format!("cannot make the dump directory {show}"))?;
    let path = dumpdir.join(LOCK_FILE);
    // The directory may be writable by all (Debian's /var/crash is): a link planted there is not
    // followed.
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path);
    let file = opened.with_context(|| format!("the dump directory {show} cannot be written"))?;
    let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
    ensure!(
        locked.is_ok(),
        "another netdump serve uses the dump directory {show}: stop it, or name another"
    );
    Ok(file)
}

/// Opens the sockets; returns also the bytes that the kernel buffers in all of them.
fn listen(address: SocketAddr, threads: usize) -> Result<(Vec<UdpSocket>, usize)> {
    let cannot = || format!("cannot listen on {address} (UDP)");
    // A shared socket would join another server's port without an error, so a lone one tries first.
    let address = match socket::open(address, false) {
        Ok(_) => address,
        // A machine without IPv6 has no such address; all of its addresses are these.
        Err(error) if no_ipv6(&error) && address.ip() == Ipv6Addr::UNSPECIFIED => {
            let all = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
            drop(socket::open(all, false).with_context(cannot)?);
            all
        }
        Err(error) => return Err(error).with_context(cannot),
    };
    let first = socket::open(address, true).with_context(cannot)?;
    let bound = first.local_addr().with_context(cannot)?;
    let mut sockets = vec![first];
    for _ in 1..threads.max(1) {
        sockets.push(socket::open(bound, true).with_context(cannot)?);
    }
    let mut buffer_bytes = 0;
    for socket in &sockets {
        buffer_bytes += socket::prepare(socket).with_context(cannot)?;
    }
    Ok((sockets, buffer_bytes))
}

/// Whether `error` says that this machine does without IPv6: not built in, or switched off.
fn no_ipv6(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

/// What is done by the clock: progress, logs, sessions that died, a disk that fills, counts.
fn keep_house(hub: &Arc<Hub>) {
    let mut told = DropCounts::default();
    let mut told_at = Instant::now();
    let mut saved_at = Instant::now();
    while !hub.stopping() {
        thread::sleep(HOUSEKEEPING_EVERY);
        for shared in hub.registry.live() {
            look_after(hub, &shared);
        }
        for path in hub.registry.expired(hub.linger) {
            closing::expire(hub, &CrashDir::at(path));
        }
        match free_bytes(&hub.dumpdir) {
            Ok(free) if free < SPACE_LAST_BYTES => {
                verdict::stop_pages(hub, &format!("the disk has {} MiB left", free >> 20));
            }
            Ok(_) => {}
            Err(error) => hub.events.warn_rarely(format!("{error:#}")),
        }
        if saved_at.elapsed() >= SIGNATURES_EVERY {
            saved_at = Instant::now();
            for notice in hub.signatures.notices(SystemTime::now()) {
                hub.events.tell(&Event::Notice { notice });
            }
            save_signatures(hub);
        }
        let counts = hub.drops.counts();
        if counts != told && told_at.elapsed() >= DROPS_EVERY {
            (told, told_at) = (counts, Instant::now());
            hub.events.tell(&Event::Drops { counts });
        }
    }
}

fn save_signatures(hub: &Hub) {
    if let Err(error) = hub.signatures.save() {
        hub.events.warn_rarely(format!("{error:#}"));
    }
}

fn look_after(hub: &Arc<Hub>, shared: &Shared) {
    let (disk, gone, decide) = {
        let mut session = lock(shared);
        if session.phase() == Phase::Closing {
            return;
        }
        tell_progress(hub, &session);
        let decide = session.verdict_due() && session.queue_for_verdict();
        (session.disk(), is_gone(hub, &session), decide)
    };
    if decide {
        hub.queue.push(Arc::clone(shared), false);
    }
    // A writer that has it, and may wait for the disk, writes the log itself.
    if let Some(disk) = disk
        && let Ok(mut disk) = disk.try_lock()
        && let Err(error) = disk.write_log()
    {
        hub.events.warn_rarely(format!("{error:#}"));
    }
    if let Some(why) = gone {
        closing::start(hub, shared, Some(why));
    }
}

/// Why nothing more is to come of a session, if that is so.
fn is_gone(hub: &Hub, session: &Session) -> Option<String> {
    let silent = session.heard_at().elapsed();
    if let Some(Want::Redirect(target)) = session.wanted()
        && silent >= REDIRECTED.min(hub.silence)
    {
        return Some(format!("the host went to {}", target.address));
    }
    let seconds = hub.silence.as_secs_f64();
    (silent >= hub.silence).then(|| format!("nothing was heard for {seconds} s"))
}

fn tell_progress(hub: &Hub, session: &Session) {
    let (about, arrived) = (session.about().clone(), session.arrived());
    if arrived.pages > 0 {
        hub.events.tell(&Event::Progress { about, arrived });
    }
}

/// Starts the threads that write hosts' logs and keep them in order.
fn start_logs(hub: &Arc<Hub>) -> Result<Vec<JoinHandle<()>>> {
    let there = Arc::clone(hub);
    let write = move || crate::console::write(&there);
    let there = Arc::clone(hub);
    let keep = move || there.console.keep(&there.events, || there.console.ends());
    Ok(vec![spawn("log", write)?, spawn("log keeper", keep)?])
}

/// Starts the threads that forward what is in logs.
fn start_forwarding(hub: &Arc<Hub>) -> Result<Vec<JoinHandle<()>>> {
    if hub.forward.is_empty() {
        return Ok(Vec::new());
    }
    let there = Arc::clone(hub);
    let take_in = move || there.forward.take_in(&there.events);
    let mut threads = vec![spawn("forward", take_in)?];
    for number in 0..hub.forward.len() {
        let there = Arc::clone(hub);
        let deliver = move || there.forward.deliver(number, &there.events);
        threads.push(spawn("deliver", deliver)?);
    }
    Ok(threads)
}

fn join(hub: &Hub, threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            hub.events.warn("a thread panicked".to_owned());
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .context("cannot start a thread")
}

const LOCK_FILE: &str = ".netdump.lock";
/// Below this a burst of a few clients is lost while the disk stalls for a tenth of a second.
const BUFFER_BYTES_WANTED: usize = 16 << 20;
const HOUSEKEEPING_EVERY: Duration = Duration::from_millis(250);
/// How often the file of signatures is written, and what is to be told of them looked for.
const SIGNATURES_EVERY: Duration = Duration::from_secs(1);
const DROPS_EVERY: Duration = Duration::from_secs(5);
/// A host that was sent to another server and is silent for so long is there.
const REDIRECTED: Duration = Duration::from_secs(3);
