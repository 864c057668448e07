//! A receive thread: batches of datagrams in, to the sessions they belong to; replies that need no
//! write out. It waits for no disk.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use proto::reply::{REPLY_BYTES_MAX, Verdict};
use proto::server::{Hold, Session as Engine};
use proto::time::{Instant as EngineInstant, Micros};
use proto::units::PacketNumber;
use proto::wire::{Header, INCARNATION_BYTES, Kind, MAGIC, open_client};

use super::directory::{CrashDir, SPOOLS_MAX};
use super::drops::Reason;
use super::events::About;
use super::hub::Hub;
use super::registry::{Entry, Over, Shared, lock};
use super::session::{Came, Fate, Phase, Session};
use super::socket::{Batch, Peer, drops, send};
use super::spool::Origin;
use super::{closing, revive};
use crate::key::{HostKey, fill_random};

/// Receives until the server ends. Whatever arrives, this does not return before.
pub fn run(hub: &Arc<Hub>, socket: &UdpSocket) {
    let mut batch = Batch::new();
    let mut touched: Vec<Shared> = Vec::new();
    let mut overflows = 0;
    while !hub.stopping() {
        if let Err(error) = batch.receive(socket, wait(hub, &touched)) {
            hub.events.warn(format!("cannot receive: {error}"));
            std::thread::sleep(IDLE_WAIT);
        }
        let now = hub.now();
        let mut console = hub.console.inbox.delivery();
        batch.each(|peer, datagram| {
            if is_console(datagram) {
                console.push(peer.address.ip(), datagram);
            } else if is_log(datagram) {
                console.push_sealed(peer, datagram);
            } else if let Err(reason) = take(hub, now, peer, datagram, &mut touched) {
                hub.drops.add(reason);
            }
        });
        drop(console);
        // What was thrown away after the last datagram came is told by no datagram.
        let total = if batch.is_empty() {
            drops(socket).unwrap_or(overflows)
        } else {
            batch.overflows()
        };
        count_overflows(hub, &mut overflows, total);
        answer(hub, socket, &mut touched);
    }
    let total = drops(socket).unwrap_or(overflows);
    count_overflows(hub, &mut overflows, total);
}

/// In-tree netconsole sends text; ours does not begin like any.
fn is_console(datagram: &[u8]) -> bool {
    datagram.first().is_some_and(|first| *first != MAGIC[0])
}

/// Log records of our own clients.
fn is_log(datagram: &[u8]) -> bool {
    Header::parse(datagram).is_ok_and(|header| header.kind == Kind::Log)
}

/// Counts what the kernel threw away since `before`, which becomes `total`.
fn count_overflows(hub: &Hub, before: &mut u32, total: u32) {
    let datagrams = u64::from(total.wrapping_sub(*before));
    *before = total;
    if datagrams > 0 {
        hub.drops.add_many(Reason::BufferFull, datagrams);
        hub.console.add_socket_drops(datagrams);
    }
}

/// How long the next receive may wait: until the first reply is due. A session that a writer has is
/// looked at again soon, because the writer leaves replies that are not due to this thread.
fn wait(hub: &Hub, touched: &[Shared]) -> Duration {
    let now = hub.now();
    let due = touched.iter().filter_map(|session| {
        let session = lock(session);
        let soon = now + WRITER_WAIT;
        let at = session.reply_at();
        if session.queued() {
            Some(at.map_or(soon, |at| at.max(soon)))
        } else {
            at
        }
    });
    due.min().map_or(IDLE_WAIT, |at| {
        Duration::from_micros(at.since(now).get()).min(IDLE_WAIT)
    })
}

/// Takes one datagram; a session that took it is added to `touched`.
fn take(
    hub: &Arc<Hub>,
    now: EngineInstant,
    peer: Peer,
    datagram: &mut [u8],
    touched: &mut Vec<Shared>,
) -> Result<(), Reason> {
    let header = Header::parse(datagram)?;
    let is_first = header.kind == Kind::First;
    let session = match hub.registry.get(header.session) {
        Some(Entry::Live(session)) => {
            let later = header.attempt > lock(&session).attempt();
            match (later, is_first) {
                (true, true) => begin(hub, now, &header, peer, datagram)?,
                // The spool of its attempt was lost, those of earlier ones were not.
                (true, false) => {
                    return answer_alone(hub, now, &header, peer, datagram, Alone::StartOver);
                }
                (false, _) => session,
            }
        }
        Some(Entry::Done(over)) if over.whole => {
            return answer_alone(hub, now, &header, peer, datagram, Alone::Dismiss);
        }
        Some(Entry::Done(over)) if is_first && header.attempt > over.attempt => {
            begin(hub, now, &header, peer, datagram)?
        }
        Some(Entry::Done(over)) => return come_back(hub, now, &header, peer, datagram, &over),
        Some(Entry::Recovering) => return Err(Reason::UnknownSession),
        None if is_first => begin(hub, now, &header, peer, datagram)?,
        // It was refused, and only its first packet can be answered with that.
        None if !hub.registry.has_room(header.session.key) => return Err(Reason::OverLimit),
        // Its spool is not here: another disk, another machine. Its memory still is.
        None => return answer_alone(hub, now, &header, peer, datagram, Alone::StartOver),
    };
    lock(&session).receive(now, peer, datagram)?;
    if !touched.iter().any(|other| Arc::ptr_eq(other, &session)) {
        touched.push(session);
    }
    Ok(())
}

/// The host of a session that was closed as incomplete is there again, in the same attempt: goes on
/// with its spool, or has it start over.
fn come_back(
    hub: &Arc<Hub>,
    now: EngineInstant,
    header: &Header,
    peer: Peer,
    datagram: &mut [u8],
    over: &Over,
) -> Result<(), Reason> {
    let same = header.attempt == over.attempt && !over.broken;
    let Some(path) = over.spools.clone().filter(|_| same) else {
        return answer_alone(hub, now, header, peer, datagram, Alone::StartOver);
    };
    genuine(hub, header, datagram)?;
    let _creating = lock(&hub.creating);
    if matches!(hub.registry.get(header.session), Some(Entry::Done(_))) {
        hub.registry.set(header.session, Entry::Recovering);
        let there = Arc::clone(hub);
        let id = header.session;
        hub.spawn(move || revive::take_up(&there, id, CrashDir::at(path)));
    }
    Ok(())
}

/// The key of a datagram whose seal is right.
fn genuine(hub: &Hub, header: &Header, datagram: &[u8]) -> Result<HostKey, Reason> {
    let key = hub.key(header.session.key).ok_or(Reason::UnknownKey)?;
    let keys = key.secret.session_keys(header.session);
    open_client(&keys.client, header, &mut datagram.to_vec())?;
    Ok(key)
}

/// Begins the session of a first packet, once that has proved genuine. It follows earlier attempts
/// in their directory, so that what they brought is not sent again.
fn begin(
    hub: &Arc<Hub>,
    now: EngineInstant,
    header: &Header,
    peer: Peer,
    datagram: &mut [u8],
) -> Result<Shared, Reason> {
    let key = genuine(hub, header, datagram)?;
    let creating = lock(&hub.creating);
    let room = hub.registry.has_room(header.session.key);
    let before = match hub.registry.get(header.session) {
        Some(Entry::Live(session)) => match supersede(hub, &session, header) {
            Ok(before) => before,
            Err(Some(same)) => return Ok(same),
            Err(None) => {
                drop(creating);
                answer_alone(hub, now, header, peer, datagram, Alone::Wait)?;
                return Err(Reason::UnknownSession);
            }
        },
        Some(Entry::Recovering) => return Err(Reason::UnknownSession),
        _ if !room => {
            drop(creating);
            answer_alone(hub, now, header, peer, datagram, Alone::Wait)?;
            return Err(Reason::OverLimit);
        }
        Some(Entry::Done(over)) => over.spools.map(CrashDir::at),
        None => None,
    };
    let before = before.map(|dir| (dir.spools(), dir));
    if before
        .as_ref()
        .is_some_and(|(spools, _)| *spools >= SPOOLS_MAX)
    {
        drop(creating);
        answer_alone(hub, now, header, peer, datagram, Alone::Dismiss)?;
        return Err(Reason::OverLimit);
    }
    let session = follow(hub, &key, header, peer, before).map_err(|error| {
        hub.events
            .warn_rarely(format!("a crash of {} is not taken: {error:#}", key.host));
        Reason::OverLimit
    })?;
    let session = Arc::new(std::sync::Mutex::new(session));
    hub.registry
        .set(header.session, Entry::Live(Arc::clone(&session)));
    Ok(session)
}

/// Ends the attempt before the one that `header` begins; gives its directory, if it has one. The
/// error is the session to use instead, or none when the attempt is just being closed.
fn supersede(
    hub: &Arc<Hub>,
    session: &Shared,
    header: &Header,
) -> Result<Option<CrashDir>, Option<Shared>> {
    let mut before = lock(session);
    // Another thread was faster.
    if before.attempt() >= header.attempt {
        drop(before);
        return Err(Some(Arc::clone(session)));
    }
    if before.phase() == Phase::Closing {
        return Err(None);
    }
    if before.disk().is_none() {
        drop(before);
        closing::start(hub, session, Some("the client started over".to_owned()));
        return Ok(None);
    }
    before.set_fate(Fate::Superseded);
    let dir = before.dir();
    drop(before);
    closing::start(hub, session, None);
    Ok(Some(dir))
}

/// A session at `header`, in the directory of the attempts before it, if there were any.
fn follow(
    hub: &Hub,
    key: &HostKey,
    header: &Header,
    peer: Peer,
    before: Option<(u32, CrashDir)>,
) -> anyhow::Result<Session> {
    let origin = Origin {
        session: header.session,
        attempt: header.attempt,
        first: header.number,
    };
    let directory = match &before {
        Some((_, dir)) => dir.path().to_owned(),
        None => hub.dumpdir.clone(),
    };
    let about = About {
        session: header.session,
        host: key.host.to_string(),
        directory,
    };
    let came = Came::now(peer);
    let mut session = Session::new(key, origin, header.number, about, came, &hub.held_bytes)?;
    if let Some((spools, dir)) = before {
        session.follows(spools);
        session.goes_on(&dir.session()?, false);
    }
    Ok(session)
}

/// What a host is told whose packet belongs to no session that is under way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Alone {
    /// All is here: do in the end what hosts do.
    Dismiss,
    /// There is no room now: ask again.
    Wait,
    /// Nothing of it is here: send it again, as another attempt.
    StartOver,
}

/// Answers a packet for which nothing is kept.
fn answer_alone(
    hub: &Hub,
    now: EngineInstant,
    header: &Header,
    peer: Peer,
    datagram: &mut [u8],
    alone: Alone,
) -> Result<(), Reason> {
    let key = genuine(hub, header, datagram)?;
    let mut incarnation = [0; INCARNATION_BYTES];
    fill_random(&mut incarnation).or(Err(Reason::OverLimit))?;
    let keys = key.secret.session_keys(header.session);
    let number = header.number;
    // An engine for this one packet. A client that is dismissed has every packet acknowledged, one
    // that waits none, and one that starts over is told that nothing ever arrived.
    let (first, written) = match alone {
        Alone::Dismiss if header.kind == Kind::First => (number, number.plus(1)),
        Alone::Dismiss => (PacketNumber(number.0.saturating_sub(1)), number.plus(1)),
        Alone::Wait => (number, number),
        Alone::StartOver => (PacketNumber(0), PacketNumber(0)),
    };
    let next = if alone == Alone::StartOver {
        first
    } else {
        number
    };
    let mut engine = Engine::new(
        header.session,
        keys,
        incarnation,
        header.attempt,
        first,
        next,
    );
    engine.set_written(written);
    if alone != Alone::StartOver {
        engine.handle(now, datagram, &mut Nowhere, &mut |_| {})?;
    }
    match alone {
        Alone::Dismiss => {
            engine.set_verdict(Verdict::Nothing);
            engine.set_action(hub.action.action());
        }
        Alone::Wait => engine.set_verdict(Verdict::Wait {
            seconds: REFUSED_SECONDS,
        }),
        Alone::StartOver => {}
    }
    let mut reply = [0; REPLY_BYTES_MAX];
    let length = engine.reply(now, &mut reply);
    if let Some(reply) = length.and_then(|length| reply.get(..length)) {
        hub.send(reply, peer);
    }
    Ok(())
}

/// Keeps no packet.
struct Nowhere;

impl Hold for Nowhere {
    fn keep(&mut self, _: PacketNumber, _: &[u8]) -> bool {
        false
    }

    fn release<R>(&mut self, _: PacketNumber, _: impl FnOnce(&[u8]) -> R) -> Option<R> {
        None
    }
}

/// Hands what the batch brought to the writers and sends the replies that need none; sessions whose
/// reply is due later stay in `touched`.
fn answer(hub: &Arc<Hub>, socket: &UdpSocket, touched: &mut Vec<Shared>) {
    if touched.is_empty() {
        return;
    }
    let sessions = hub.sending();
    touched.retain(|shared| {
        let mut session = lock(shared);
        let credit = hub.credit(session.told().packet_bytes, sessions);
        session.set_credit(credit);
        if session.queue() {
            hub.queue
                .push(Arc::clone(shared), session.wanted().is_some());
        }
        if session.queued() {
            return true;
        }
        let now = hub.now();
        match session.reply_at() {
            Some(at) if at <= now => {
                let mut reply = [0; REPLY_BYTES_MAX];
                let length = session.reply(now, &mut reply).unwrap_or(0);
                let peer = session.peer();
                drop(session);
                if length > 0 {
                    // A reply that cannot be sent is as good as lost: the client asks again.
                    drop(send(socket, &reply[..length], peer));
                }
                false
            }
            Some(_) => true,
            None => false,
        }
    });
}

/// Bounds how late the end of the program is noticed.
const IDLE_WAIT: Duration = Duration::from_millis(50);
/// How soon a session that a writer has is looked at again.
const WRITER_WAIT: Micros = Micros::from_millis(2);
/// How soon a host asks again for which there is no room at all.
const REFUSED_SECONDS: u16 = 10;
