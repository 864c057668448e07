//! The end of a session: everything on disk, the host told to reboot, then the spool turned into a
//! vmcore.

use std::fs::{self, File};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result};
use proto::reply::REPLY_BYTES_MAX;

use super::directory::{CrashDir, LOG_FILE, State, Vmcore};
use super::events::Event;
use super::finish::{Job, finish};
use super::hub::Hub;
use super::registry::{Over, Shared, lock};
use super::session::{Session, Want};
use super::spool::SPOOL_FILE;

/// Starts the closing of `session` in a thread of its own, unless it is being closed already. `why`
/// tells what it lacks when it did not come to its own end.
pub fn start(hub: &Arc<Hub>, session: &Shared, why: Option<String>) {
    if lock(session).begin_closing() {
        let (hub_there, session) = (Arc::clone(hub), Arc::clone(session));
        hub.spawn(move || close(&hub_there, &session, why));
    }
}

fn close(hub: &Hub, shared: &Shared, why: Option<String>) {
    let why = why.or_else(|| lacks(&lock(shared)));
    let (dir, synced) = settle(shared);
    // A disk that fails now has the spool in memory at least; the host is dead either way.
    let why = why.or_else(|| synced.err().map(|error| format!("{error:#}")));
    dismiss(hub, shared);
    let (about, ended) = {
        let session = lock(shared);
        let about = session.about().clone();
        let ended = session.content().summary().ended.is_some();
        if ended {
            let (about, arrived) = (about.clone(), session.arrived());
            hub.events.tell(&Event::Received { about, arrived });
        }
        warn(hub, session.write_file(State::Finishing, why.clone()));
        (about, ended)
    };
    let only_log = matches!(lock(shared).wanted(), Some(Want::LogOnly(_))) && ended;
    let filter = lock(shared).filter();
    let turn = lock(&hub.finishing);
    let job = Job {
        dir: &dir,
        format: hub.format,
        filter,
        whole: why.is_none() && !only_log,
        stop: &hub.stop,
    };
    let finished = finish(&job);
    drop(turn);
    if hub.stop.load(Ordering::Relaxed) && finished.is_err() {
        return;
    }
    let over = conclude(hub, shared, &dir, finished, why);
    hub.registry.finished(about.session, shared, over);
}

/// What a session that came to its own end lacks.
fn lacks(session: &Session) -> Option<String> {
    match session.wanted() {
        Some(Want::Full { .. }) => session.content().verify().err(),
        Some(Want::LogOnly(_)) => None,
        Some(Want::Nothing(why)) => Some(why.clone()),
        None => Some("it ended before a verdict".to_owned()),
    }
}

/// Brings log and spool onto the disk.
fn settle(shared: &Shared) -> (CrashDir, Result<()>) {
    let (dir, log, spool) = {
        let mut session = lock(shared);
        (
            session.dir().clone(),
            session.write_log(true),
            session.spool().handle(),
        )
    };
    let path = dir.file(SPOOL_FILE);
    let synced = log
        .and_then(|()| {
            let synced = spool.and_then(|spool| spool.sync_data());
            synced.with_context(|| format!("cannot sync {}", path.display()))
        })
        .and_then(|()| sync_log(&dir))
        .and_then(|()| dir.sync());
    (dir, synced)
}

fn sync_log(dir: &CrashDir) -> Result<()> {
    let path = dir.file(LOG_FILE);
    if !path.exists() {
        return Ok(());
    }
    let synced = File::open(&path).and_then(|log| log.sync_all());
    synced.with_context(|| format!("cannot sync {}", path.display()))
}

/// Tells the host to reboot, at once: it need not ask first.
fn dismiss(hub: &Hub, shared: &Shared) {
    let mut session = lock(shared);
    session.reboot();
    let mut reply = [0; REPLY_BYTES_MAX];
    let length = session.reply(hub.now(), &mut reply).unwrap_or(0);
    let peer = session.peer();
    drop(session);
    if length > 0 {
        hub.send(&reply[..length], peer);
    }
}

/// Writes down and returns how it ended, and removes the spool if the vmcore has all of it.
fn conclude(
    hub: &Hub,
    shared: &Shared,
    dir: &CrashDir,
    finished: Result<Option<Vmcore>>,
    why: Option<String>,
) -> Over {
    let session = lock(shared);
    let summary = session.content().summary();
    let only_log = match session.wanted() {
        Some(Want::LogOnly(reason)) if summary.ended.is_some() => Some(reason.clone()),
        Some(Want::Full { .. } | Want::LogOnly(_) | Want::Nothing(_)) | None => None,
    };
    let (vmcore, failed) = match finished {
        Ok(vmcore) => (vmcore, None),
        Err(error) => (
            None,
            Some(format!(
                "cannot write the vmcore, the spool is kept: {error:#}"
            )),
        ),
    };
    let lost = vmcore
        .as_ref()
        .map_or(summary.ram_pages, |vmcore| vmcore.pages_lost);
    let keep_spool = failed.is_some();
    let why = failed.or(why).or_else(|| {
        (lost > 0 && only_log.is_none())
            .then(|| format!("{lost} pages of {} are missing", summary.ram_pages))
    });
    let (state, why) = match (why, only_log) {
        (Some(why), _) => (State::Incomplete, Some(why)),
        (None, Some(reason)) => (State::LogOnly, Some(reason)),
        (None, None) => (State::Complete, None),
    };
    let mut file = session.file(state, why.clone());
    let over = file.over();
    file.vmcore.clone_from(&vmcore);
    let (about, arrived) = (session.about().clone(), session.arrived());
    drop(session);
    warn(hub, dir.write_session(&file));
    if !keep_spool {
        let path = dir.file(SPOOL_FILE);
        warn(
            hub,
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display())),
        );
    }
    let vmcore_bytes = vmcore.map_or(0, |vmcore| vmcore.bytes);
    hub.events.tell(&match (state, why) {
        (State::Incomplete, Some(why)) => Event::Incomplete {
            about,
            arrived,
            why,
        },
        _ => Event::Complete {
            about,
            arrived,
            vmcore_bytes,
        },
    });
    over
}

fn warn(hub: &Hub, result: Result<()>) {
    if let Err(error) = result {
        hub.events.warn(format!("{error:#}"));
    }
}
