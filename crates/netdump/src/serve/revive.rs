//! Taking sessions up again from their spools: after a restart of the server, or when the host of a
//! crash that was closed as incomplete is there again.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use proto::record::BLOCK_BYTES;
use proto::units::SessionId;

use super::closing;
use super::directory::{CrashDir, SessionFile, State};
use super::disk::{Disk, broken_client};
use super::events::{About, Event};
use super::hub::Hub;
use super::registry::{Entry, Over, Shared, lock};
use super::rest;
use super::session::{Came, Session};
use super::socket::Peer;
use super::verdict::{self, Want};
use super::writers;

/// Remembers the signatures and the sessions that are over, and takes up those that have spools and are not, in a
/// thread of its own.
pub fn recover(hub: &Arc<Hub>) -> Result<()> {
    let found = CrashDir::scan(&hub.dumpdir, |warning| hub.events.warn(warning))?;
    hub.signatures
        .load(&found, |warning| hub.events.warn(warning));
    let mut unfinished = Vec::new();
    for (dir, file) in found {
        let Some(id) = file.id() else { continue };
        let spools = dir.spools() > 0;
        // An incomplete crash that has its vmcore waits for its host, and then for nobody.
        let over = file.state == State::Incomplete && file.vmcore.is_some();
        if spools && !over {
            hub.registry.set(id, Entry::Recovering);
            unfinished.push((id, dir));
        } else {
            let mut over = file.over();
            over.spools = spools.then(|| dir.path().to_owned());
            hub.registry.set(id, Entry::Done(over));
        }
    }
    let there = Arc::clone(hub);
    hub.spawn(move || {
        for (id, dir) in unfinished {
            take_up(&there, id, dir);
        }
    });
    Ok(())
}

/// Goes on with session `id`, which is [`Entry::Recovering`], in `dir`. If its last spool cannot be
/// read, the host is to start over, and what the other spools hold is kept.
pub fn take_up(hub: &Arc<Hub>, id: SessionId, dir: CrashDir) {
    let path = dir.path().to_owned();
    let attempt = dir.session().map_or(0, |file| file.attempt);
    if let Err(error) = resume(hub, id, dir) {
        hub.events.warn(format!(
            "{} cannot be taken up again, its host is to send it once more: {error:#}",
            path.display()
        ));
        let over = Over {
            attempt,
            whole: false,
            spools: Some(path),
            broken: true,
        };
        if !hub.stopping() {
            hub.registry.set(id, Entry::Done(over));
        }
    }
}

fn resume(hub: &Arc<Hub>, id: SessionId, dir: CrashDir) -> Result<()> {
    let file = dir.session()?;
    let key = hub
        .key(id.key)
        .ok_or_else(|| anyhow!("the key {} of {} is not there", file.key, file.host))?;
    let number = dir.spools();
    let mut room = Box::new([0; BLOCK_BYTES]);
    let (disk, origin, fault) = Disk::resume(dir, number, &hub.stop, &mut room)?;
    let came = Came {
        peer: Peer {
            address: file.peer,
            local: None,
        },
        started: file.started.clone(),
        seconds: file.seconds,
    };
    let about = About {
        session: id,
        host: key.host.to_string(),
        directory: disk.dir().path().to_owned(),
    };
    let mut session = Session::new(&key, origin, disk.next(), about, came, &hub.held_bytes)?;
    session.goes_on(&file, true);
    session.learn(&disk, true);
    hub.events.tell(&Event::Session {
        about: session.about().clone(),
        peer: session.peer().address,
        attempt: origin.attempt,
        resumed_bytes: Some(disk.spool().bytes()),
    });
    drop(session.set_disk(disk));
    // The numbers of its pulls depend on how often it was taken up, so that is written first.
    session
        .write_file(State::Receiving, None)
        .context("it cannot be taken up")?;
    let ended = session.told().summary.ended.is_some();
    let known = session.told().crash.is_some();
    let shared = Arc::new(std::sync::Mutex::new(session));
    hub.registry.set(id, Entry::Live(Arc::clone(&shared)));
    go_on(hub, &shared, &file, known);
    if let Some(fault) = fault {
        writers::fail(hub, &shared, broken_client(fault));
    } else if ended {
        closing::start(hub, &shared, None);
    }
    Ok(())
}

/// Has the session wanted what it was wanted before.
fn go_on(hub: &Arc<Hub>, shared: &Shared, file: &SessionFile, known: bool) {
    match &file.verdict {
        Some(Want::Rest { .. }) if known => rest::begin(hub, shared),
        // Whoever waited, waits again, in the order of this call.
        Some(Want::Wait { filter } | Want::Full { filter }) => {
            verdict::set(hub, shared, Want::Full { filter: *filter });
        }
        Some(Want::Rest { .. }) => {}
        Some(want) => verdict::set(hub, shared, want.clone()),
        // Else the next write decides, or the clock.
        None if lock(shared).verdict_due() => verdict::decide(hub, shared),
        None => {}
    }
}
