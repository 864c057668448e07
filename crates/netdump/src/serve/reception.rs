//! A receive thread: batches of datagrams in, replies out.

use std::net::UdpSocket;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use proto::reply::{Action, REPLY_BYTES_MAX, Verdict};
use proto::server::{Hold, Session as Engine};
use proto::time::Instant as EngineInstant;
use proto::units::PacketNumber;
use proto::wire::{Header, INCARNATION_BYTES, Kind, open_client};

use super::closing;
use super::directory::{CrashDir, State};
use super::drops::Reason;
use super::events::Event;
use super::hub::Hub;
use super::registry::{Entry, Over, Shared, lock};
use super::session::{Due, Phase, Session, Want};
use super::socket::{Batch, Peer, send};
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
        batch.each(|peer, datagram| {
            if let Err(reason) = take(hub, now, peer, datagram, &mut touched) {
                hub.drops.add(reason);
            }
        });
        hub.drops.add_many(
            Reason::BufferFull,
            u64::from(batch.overflows().wrapping_sub(overflows)),
        );
        overflows = batch.overflows();
        answer(hub, socket, &mut touched);
    }
}

/// How long the next receive may wait: until the first reply is due.
fn wait(hub: &Hub, touched: &[Shared]) -> Duration {
    let now = hub.now();
    let due = touched
        .iter()
        .filter_map(|session| lock(session).reply_at())
        .min();
    due.map_or(IDLE_WAIT, |at| {
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
    let session = match hub.registry.get(header.session) {
        Some(Entry::Live(session)) => {
            let newer = header.kind == Kind::First && header.attempt > lock(&session).attempt();
            if newer {
                begin(hub, &header, peer, datagram)?
            } else {
                session
            }
        }
        Some(Entry::Done(over)) if welcome(over, &header) => begin(hub, &header, peer, datagram)?,
        Some(Entry::Done(_)) => return dismiss(hub, now, &header, peer, datagram),
        Some(Entry::Recovering) => return Err(Reason::UnknownSession),
        None if header.kind == Kind::First => begin(hub, &header, peer, datagram)?,
        None if hub.key(header.session.key).is_none() => return Err(Reason::UnknownKey),
        None => return Err(Reason::UnknownSession),
    };
    lock(&session).receive(now, peer, datagram)?;
    if !touched.iter().any(|other| Arc::ptr_eq(other, &session)) {
        touched.push(session);
    }
    Ok(())
}

/// Whether a packet is the first of a later attempt of a session that ended without all that was
/// wanted: the network was cut for long, and the host is still there.
fn welcome(over: Over, header: &Header) -> bool {
    header.kind == Kind::First && header.attempt > over.attempt && !over.whole
}

/// Begins the session of a first packet, once that has proved genuine. An earlier attempt of the
/// same session is closed as far as it came: it keeps its directory, so that nothing is lost.
fn begin(hub: &Arc<Hub>, header: &Header, peer: Peer, datagram: &[u8]) -> Result<Shared, Reason> {
    let key = hub.key(header.session.key).ok_or(Reason::UnknownKey)?;
    let keys = key.secret.session_keys(header.session);
    open_client(&keys.client, header, &mut datagram.to_vec())?;
    let _creating = lock(&hub.creating);
    match hub.registry.get(header.session) {
        // Another thread was faster.
        Some(Entry::Live(session)) if lock(&session).attempt() >= header.attempt => {
            return Ok(session);
        }
        Some(Entry::Live(session)) => {
            closing::start(hub, &session, Some("the client started over".to_owned()))
        }
        Some(Entry::Done(over)) if !welcome(over, header) => return Err(Reason::UnknownSession),
        Some(Entry::Recovering) => return Err(Reason::UnknownSession),
        Some(Entry::Done(_)) | None if hub.registry.has_room(header.session.key) => {}
        Some(Entry::Done(_)) | None => return Err(Reason::OverLimit),
    }
    let session = create(hub, &key, header, peer).map_err(|error| {
        hub.events
            .warn_rarely(format!("a crash of {} is not taken: {error:#}", key.host));
        Reason::OverLimit
    })?;
    let about = session.about().clone();
    let session = Arc::new(std::sync::Mutex::new(session));
    hub.registry
        .set(header.session, Entry::Live(Arc::clone(&session)));
    hub.events.tell(&Event::Session {
        about,
        peer: peer.address,
        resumed_bytes: None,
    });
    Ok(session)
}

fn create(hub: &Hub, key: &HostKey, header: &Header, peer: Peer) -> Result<Session> {
    let dir = CrashDir::create(&hub.dumpdir, &key.host, SystemTime::now())?;
    Session::create(key, header, peer, dir, &hub.held_bytes)
}

/// Answers a packet of a session that is over: the host may reboot. Keeps nothing.
fn dismiss(
    hub: &Hub,
    now: EngineInstant,
    header: &Header,
    peer: Peer,
    datagram: &mut [u8],
) -> Result<(), Reason> {
    let key = hub.key(header.session.key).ok_or(Reason::UnknownKey)?;
    let mut incarnation = [0; INCARNATION_BYTES];
    fill_random(&mut incarnation).or(Err(Reason::OverLimit))?;
    let keys = key.secret.session_keys(header.session);
    // An engine for this one packet: every packet before it counts as received.
    let before = header
        .number
        .0
        .saturating_sub(u64::from(header.kind != Kind::First));
    let mut engine = Engine::new(
        header.session,
        keys,
        incarnation,
        header.attempt,
        PacketNumber(before),
        header.number,
    );
    engine.handle(now, datagram, &mut Nowhere, &mut |_| {})?;
    engine.set_verdict(Verdict::Nothing);
    engine.set_action(Action::Reboot);
    let mut reply = [0; REPLY_BYTES_MAX];
    if let Some(reply) = engine
        .reply(now, &mut reply)
        .and_then(|length| reply.get(..length))
    {
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

/// Commits what the batch brought and sends the replies that are due; sessions whose reply is due
/// later stay in `touched`.
fn answer(hub: &Arc<Hub>, socket: &UdpSocket, touched: &mut Vec<Shared>) {
    if touched.is_empty() {
        return;
    }
    let sessions = hub.registry.open();
    touched.retain(|shared| {
        let mut session = lock(shared);
        let credit = hub.credit(session.content().packet_bytes(), sessions);
        session.set_credit(credit);
        let due = session.commit();
        let mut session = act(hub, shared, session, due);
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

/// Does what is due for a session.
pub fn act<'a>(
    hub: &Arc<Hub>,
    shared: &'a Shared,
    mut session: MutexGuard<'a, Session>,
    due: Due,
) -> MutexGuard<'a, Session> {
    let close = match due {
        Due::Nothing => return session,
        Due::Verdict => {
            drop(session);
            let promised = promised(hub, shared);
            session = lock(shared);
            match verdict(hub, &mut session, promised) {
                Want::Nothing(why) => Some(why),
                Want::Full { .. } | Want::LogOnly(_) => return session,
            }
        }
        Due::Close => None,
        Due::Fail(why) => {
            session.want(Want::Nothing(why.clone()));
            session.reboot();
            Some(why)
        }
    };
    drop(session);
    closing::start(hub, shared, close);
    lock(shared)
}

/// Decides what is wanted of a crash and tells everybody.
fn verdict(hub: &Hub, session: &mut Session, promised: u64) -> Want {
    let summary = session.content().summary();
    let want = hub.decide(summary.ram_pages, promised);
    let (name, why) = match &want {
        Want::Full { .. } => ("full", None),
        Want::LogOnly(why) => ("log-only", Some(why.clone())),
        Want::Nothing(why) => ("reboot", Some(why.clone())),
    };
    hub.events.tell(&Event::Verdict {
        about: session.about().clone(),
        kernel: summary.kernel.clone(),
        reason: summary.reason.clone(),
        ram_pages: summary.ram_pages,
        verdict: name,
        why: why.clone(),
    });
    session.want(want.clone());
    if matches!(want, Want::Nothing(_)) {
        session.reboot();
    }
    if let Err(error) = session.write_file(State::Receiving, why) {
        hub.events.warn(format!("{error:#}"));
    }
    want
}

/// Bytes still to come in other sessions.
fn promised(hub: &Hub, this: &Shared) -> u64 {
    let others = hub.registry.live();
    let others = others.iter().filter(|other| !Arc::ptr_eq(other, this));
    others.fold(0, |sum, other| {
        let session = lock(other);
        let open = session.phase() == Phase::Receiving;
        sum.saturating_add(if open { session.bytes_to_come() } else { 0 })
    })
}

/// Bounds how late the end of the program is noticed.
const IDLE_WAIT: Duration = Duration::from_millis(50);
