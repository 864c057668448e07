//! The threads that write: each takes a session that has something to write, brings it onto the
//! disk, and has the engine acknowledge it. A disk that stalls stalls them, and with them the
//! acknowledgements; receive threads go on, and what they take in meanwhile is bounded by each
//! client's credit.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use proto::record::BLOCK_BYTES;
use proto::reply::REPLY_BYTES_MAX;

use super::closing;
use super::content::{BlockRoom, News};
use super::directory::{CrashDir, State};
use super::disk::Disk;
use super::events::Event;
use super::hub::Hub;
use super::registry::{Shared, lock};
use super::rest;
use super::session::{Phase, Task};
use super::verdict::{self, Want};

/// Threads that write. A new crash costs two syncs of small files, which threads can wait for
/// together.
pub const WRITERS: usize = 8;

/// Sessions that have something to write, in the order they came, and before all others those of
/// which nothing is known yet: what tells who crashed, of what, is worth more than pages. Each is in
/// it once, so its length is bounded by the sessions.
#[derive(Default)]
pub struct Queue {
    sessions: Mutex<Lines>,
    more: Condvar,
}

#[derive(Default)]
struct Lines {
    unknown: VecDeque<Shared>,
    known: VecDeque<Shared>,
}

impl Queue {
    /// Adds a session; it must not be in already ([`super::session::Session::queue`] sees to it).
    /// `known`: a verdict is given.
    pub fn push(&self, session: Shared, known: bool) {
        let mut lines = lock(&self.sessions);
        if known {
            lines.known.push_back(session);
        } else {
            lines.unknown.push_back(session);
        }
        drop(lines);
        self.more.notify_one();
    }

    /// The next session; waits for one for a while.
    fn pop(&self) -> Option<Shared> {
        let (mut lines, _) = self
            .more
            .wait_timeout_while(lock(&self.sessions), IDLE_WAIT, |lines| {
                lines.unknown.is_empty() && lines.known.is_empty()
            })
            .unwrap_or_else(PoisonError::into_inner);
        let Lines { unknown, known } = &mut *lines;
        unknown.pop_front().or_else(|| known.pop_front())
    }
}

/// Writes until the server ends and nothing is left to write.
pub fn run(hub: &Arc<Hub>) {
    let mut room = Box::new([0; BLOCK_BYTES]);
    loop {
        match hub.queue.pop() {
            Some(session) => write(hub, &session, &mut room),
            None if hub.stopping() => return,
            None => {}
        }
    }
}

/// Writes what a session has, then does what that calls for.
fn write(hub: &Arc<Hub>, shared: &Shared, room: &mut BlockRoom) {
    let Task {
        packets,
        bytes,
        disk,
        origin,
    } = lock(shared).take();
    let disk = match disk.map_or_else(|| create(hub, shared, origin), Ok) {
        Ok(disk) => disk,
        Err(error) => return give_up(hub, shared, &error),
    };
    let mut on_disk = lock(&disk);
    // One that is here for its verdict only has nothing to write.
    let news = if packets == 0 {
        Ok(News::default())
    } else {
        on_disk.write(packets, &bytes, room)
    };
    let mut session = lock(shared);
    session.learn(&on_disk, news.as_ref().is_ok_and(|news| news.hello));
    if news.is_ok() {
        session.written(on_disk.next(), bytes);
    }
    let ram_pages = session.told().summary.ram_pages;
    let wanted = session.sends_all().filter(|_| on_disk.is_alone());
    drop(session);
    if let Some(filter) = wanted {
        on_disk.follow(hub, hub.format, filter, ram_pages);
    }
    drop(on_disk);
    if let Err(why) = act(hub, shared, news) {
        fail(hub, shared, why);
    }
    conclude(hub, shared);
}

/// Does what news calls for; the error ends the session.
fn act(hub: &Arc<Hub>, shared: &Shared, news: Result<News>) -> Result<(), String> {
    let news = news.map_err(|error| format!("{error:#}"))?;
    if lock(shared).verdict_due() {
        verdict::decide(hub, shared);
    }
    if !news.pulled.is_empty() {
        rest::pulled(hub, shared, news.pulled)?;
    }
    if news.ended {
        closing::start(hub, shared, None);
    }
    Ok(())
}

/// The session cannot go on: the host is let go with what has arrived.
pub fn fail(hub: &Arc<Hub>, shared: &Shared, why: String) {
    verdict::set(hub, shared, Want::Nothing(why));
}

/// What is due after a write: the reply, the next write, or the closing that waited for it.
fn conclude(hub: &Arc<Hub>, shared: &Shared) {
    let mut session = lock(shared);
    session.release();
    if session.phase() == Phase::Closing {
        drop(session);
        return closing::take_over(hub, shared);
    }
    let again = session.queue();
    let known = session.wanted().is_some();
    let due = session.reply_at().is_some_and(|at| at <= hub.now());
    drop(session);
    if due {
        speak(hub, shared);
    }
    if again {
        hub.queue.push(Arc::clone(shared), known);
    }
}

/// Sends a session's reply now, asked or not. A lost one is made again when the client asks.
pub fn speak(hub: &Hub, shared: &Shared) {
    let mut reply = [0; REPLY_BYTES_MAX];
    let mut session = lock(shared);
    let length = session.reply(hub.now(), &mut reply).unwrap_or(0);
    let peer = session.peer();
    drop(session);
    if let Some(reply) = reply.get(..length).filter(|reply| !reply.is_empty()) {
        hub.send(reply, peer);
    }
}

/// Makes the place of a new session: a directory of its own, or the next spool in that of the
/// attempts before it.
fn create(hub: &Hub, shared: &Shared, origin: super::spool::Origin) -> Result<Arc<Mutex<Disk>>> {
    let (earlier, old) = {
        let session = lock(shared);
        (session.earlier(), session.dir())
    };
    let disk = if earlier > 0 {
        Disk::create(old, earlier + 1, origin)?
    } else {
        let key = hub.key(origin.session.key).context("its key is gone")?;
        let dir = CrashDir::create(&hub.dumpdir, &key.host, SystemTime::now())?;
        Disk::create(dir, 1, origin)?
    };
    let mut session = lock(shared);
    let disk = session.set_disk(disk);
    hub.events.tell(&Event::Session {
        about: session.about().clone(),
        peer: session.peer().address,
        resumed_bytes: None,
        attempt: session.attempt(),
    });
    let (file, dir) = (session.file(State::Receiving, None), session.dir());
    drop(session);
    dir.write_session_soon(&file)?;
    Ok(disk)
}

/// Not even a directory could be made. The host is told nothing: it may have another server.
fn give_up(hub: &Arc<Hub>, shared: &Shared, error: &anyhow::Error) {
    let mut session = lock(shared);
    session.release();
    let (id, about) = (session.id(), session.about().clone());
    drop(session);
    hub.events
        .warn_rarely(format!("a crash of {about} is not taken: {error:#}"));
    hub.registry.forget(id, shared);
}

/// Bounds how late the end of the program is noticed.
const IDLE_WAIT: Duration = Duration::from_millis(50);
