//! The end of a session: everything on disk, the host told what to do, then the spools turned into
//! a vmcore.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result};

use super::directory::{CrashDir, LOG_FILE, State, Vmcore};
use super::events::Event;
use super::finish::{Job, finish};
use super::hub::Hub;
use super::registry::{Over, Shared, lock};
use super::session::{Fate, Session};
use super::verdict::{self, Want};
use super::writers::speak;
use super::{report, summary};
use crate::hardware::HARDWARE_FILE;

/// Starts the closing of `session`, unless it is being closed already. `why` tells what it lacks
/// when it did not come to its own end.
pub fn start(hub: &Arc<Hub>, session: &Shared, why: Option<String>) {
    if lock(session).begin_closing(why) {
        take_over(hub, session);
    }
    verdict::leave(hub, session);
}

/// Closes a session in a thread of its own. Its last writer calls this, or, if no writer has it,
/// who started the closing.
pub fn take_over(hub: &Arc<Hub>, session: &Shared) {
    let (fate, id, there) = {
        let session = lock(session);
        (session.fate(), session.id(), session.disk().is_some())
    };
    if fate == Fate::Superseded {
        let disk = lock(session).disk();
        drop(disk.and_then(|disk| lock(&disk).take_follower()));
        return;
    }
    if !there {
        return hub.registry.forget(id, session);
    }
    let (hub_there, session) = (Arc::clone(hub), Arc::clone(session));
    hub.spawn(move || close(&hub_there, &session));
}

fn close(hub: &Hub, shared: &Shared) {
    let Some(disk) = lock(shared).disk() else {
        return;
    };
    let followed = lock(&disk).take_follower();
    if let Some(follower) = &followed {
        follower.over();
    }
    let why = {
        let disk = lock(&disk);
        let mut session = lock(shared);
        session.learn(&disk, true);
        let lacks = || lacks(&session, disk.content().verify());
        session.close_why().or_else(lacks)
    };
    let synced = settle(&disk);
    // A disk that fails now has the spool in memory at least; the host is dead either way.
    let why = why.or_else(|| synced.err().map(|error| format!("{error:#}")));
    let final_word = {
        let session = lock(shared);
        session.told().summary.ended.is_some() || is_nothing(&session)
    };
    if final_word {
        let mut session = lock(shared);
        session.acknowledge_all();
        session.dismiss(hub.action);
        drop(session);
        speak(hub, shared);
    }
    let (about, ended, dir) = {
        let session = lock(shared);
        let about = session.about().clone();
        let ended = session.told().summary.ended.is_some();
        if ended {
            let (about, arrived) = (about.clone(), session.arrived());
            hub.events.tell(&Event::Received { about, arrived });
        }
        warn(hub, session.write_file(State::Finishing, why.clone()));
        (about, ended, session.dir())
    };
    let (only_log, filter) = {
        let session = lock(shared);
        let only_log = matches!(session.wanted(), Some(Want::LogOnly(_))) && ended;
        (only_log, session.filter())
    };
    let turn = lock(&hub.finishing);
    let job = Job {
        dir: &dir,
        format: hub.format,
        filter,
        whole: why.is_none() && !only_log,
        stop: &hub.stop,
    };
    let finished = finish(&job, followed);
    drop(turn);
    if hub.stop.load(Ordering::Relaxed) && finished.is_err() {
        return;
    }
    let vmcore = finished.as_ref().ok().and_then(Option::as_ref);
    let vmcore = vmcore.map(|vmcore| vmcore.file.clone());
    let over = conclude(hub, shared, &dir, finished, why);
    hub.registry.finished(about.session, shared, over);
    warn(hub, report::write(hub, &dir, vmcore.as_deref()));
    warn(hub, summary::tell(hub, &dir));
}

fn is_nothing(session: &Session) -> bool {
    matches!(session.wanted(), Some(Want::Nothing(_)))
}

/// What a session that came to its own end lacks; `walk` tells whether all pages came by
/// themselves.
fn lacks(session: &Session, walk: Result<(), String>) -> Option<String> {
    match session.wanted() {
        Some(Want::Full { .. } | Want::Wait { .. } | Want::Hold(_)) => walk.err(),
        Some(Want::Rest { .. }) => match session.rest().map(super::rest::Rest::missing) {
            Some(0) => None,
            Some(pages) => Some(format!("{pages} pages were not pulled")),
            None => walk.err(),
        },
        Some(Want::LogOnly(_)) => None,
        Some(Want::Redirect(target)) => Some(format!("the host went to {}", target.address)),
        Some(Want::Nothing(why)) => Some(why.clone()),
        None => Some("it ended before a verdict".to_owned()),
    }
}

/// Brings log and spool onto the disk.
fn settle(disk: &std::sync::Mutex<super::disk::Disk>) -> Result<()> {
    let (dir, path, spool) = {
        let mut disk = lock(disk);
        disk.write_log()?;
        let path = disk.dir().spool(disk.number());
        (disk.dir().clone(), path, disk.spool().handle())
    };
    let synced = spool.and_then(|spool| spool.sync_data());
    synced.with_context(|| format!("cannot sync {}", path.display()))?;
    for name in [LOG_FILE, HARDWARE_FILE] {
        sync_file(&dir, name)?;
    }
    dir.sync()
}

fn sync_file(dir: &CrashDir, name: &'static str) -> Result<()> {
    let path = dir.file(name);
    if !path.exists() {
        return Ok(());
    }
    let synced = File::open(&path).and_then(|file| file.sync_all());
    synced.with_context(|| format!("cannot sync {}", path.display()))
}

/// Writes down and returns how it ended, and removes the spools if the vmcore has all of them.
fn conclude(
    hub: &Hub,
    shared: &Shared,
    dir: &CrashDir,
    finished: Result<Option<Vmcore>>,
    why: Option<String>,
) -> Over {
    let session = lock(shared);
    let summary = &session.told().summary;
    let only_log = match session.wanted() {
        Some(Want::LogOnly(reason)) if summary.ended.is_some() => Some(reason.clone()),
        _ => None,
    };
    let (vmcore, failed) = written(finished);
    let lost = vmcore
        .as_ref()
        .map_or(summary.ram_pages, |vmcore| vmcore.pages_lost);
    let kept = failed.is_some();
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
    file.vmcore.clone_from(&vmcore);
    let mut over = file.over();
    // The host of an incomplete crash may come back and go on; its spools wait for it.
    let waits = !over.whole && session.fate() == Fate::Open;
    over.spools = waits.then(|| dir.path().to_owned());
    over.whole |= session.fate() == Fate::Gone;
    let (about, arrived) = (session.about().clone(), session.arrived());
    drop(session);
    warn(hub, dir.write_session(&file));
    if !kept && !waits {
        warn(hub, dir.remove_spools());
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

fn written(finished: Result<Option<Vmcore>>) -> (Option<Vmcore>, Option<String>) {
    match finished {
        Ok(vmcore) => (vmcore, None),
        Err(error) => (
            None,
            Some(format!(
                "cannot write the vmcore, the spool is kept: {error:#}"
            )),
        ),
    }
}

/// Closes a directory that no session writes to any more, as far as its spools go.
pub fn close_dir(hub: &Hub, dir: &CrashDir, why: &str) {
    let result = dir.session().and_then(|mut file| {
        let turn = lock(&hub.finishing);
        let job = Job {
            dir,
            format: hub.format,
            filter: file.verdict.as_ref().map_or(0, Want::filter),
            whole: false,
            stop: &hub.stop,
        };
        file.vmcore = finish(&job, None)?;
        drop(turn);
        file.state = State::Incomplete;
        file.why = Some(why.to_owned());
        dir.write_session(&file)?;
        dir.remove_spools()?;
        summary::tell(hub, dir)
    });
    warn(hub, result);
}

/// The spools of a crash that nobody came back to are given up; the vmcore has what they held.
pub fn expire(hub: &Hub, dir: &CrashDir) {
    warn(hub, dir.remove_spools());
}

fn warn(hub: &Hub, result: Result<()>) {
    if let Err(error) = result {
        hub.events.warn(format!("{error:#}"));
    }
}
