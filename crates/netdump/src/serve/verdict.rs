//! What is wanted of a crash: decided when it is known who crashed, and again whenever a place
//! becomes free, the disk becomes full or a person says so.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Result, bail};
use proto::reply::{Action, Verdict};
use serde::{Deserialize, Serialize};

use super::cause;
use super::closing;
use super::directory::State;
use super::events::Event;
use super::hub::{Hub, bytes_expected};
use super::registry::{Shared, lock};
use super::rest;
use super::session::{Fate, Phase, Session};
use super::signatures::{Crash, Level, Ruling, Wanted};
use super::writers::speak;

/// What the server wants of a crash, and why not everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Want {
    /// The memory.
    Full {
        /// Filter level: which pages are left out.
        filter: u8,
    },
    /// The memory, when it is its turn.
    Wait {
        /// Filter level for then.
        filter: u8,
    },
    /// The pages that earlier attempts lack, then the state.
    Rest {
        /// Filter level, as for the pages that are there.
        filter: u8,
    },
    /// Text, registers and state, for this reason.
    LogOnly(String),
    /// Nothing until a person says more, for this reason.
    Hold(String),
    /// That it goes to another server.
    Redirect(Target),
    /// What has arrived so far is enough, for this reason.
    Nothing(String),
}

/// Another server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its place among those that the host was armed for.
    pub place: u8,
}

/// What a person can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Send the memory.
    Full {
        /// Filter level; the server's own if none.
        filter: Option<u8>,
    },
    /// Send no more pages, but the state.
    LogOnly,
    /// Send nothing more until told.
    Hold,
    /// Go to this server.
    Redirect(SocketAddr),
    /// Send nothing more, and do this.
    Over(Deed),
}

/// What a host does in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Deed {
    /// Reboot.
    Reboot,
    /// Stop and stay down.
    Halt,
    /// Go on as the kernel's own panic code does (`panic_timeout`).
    Stay,
}

impl Deed {
    /// As the protocol has it.
    #[must_use]
    pub fn action(self) -> Action {
        match self {
            Self::Reboot => Action::Reboot,
            Self::Halt => Action::Halt,
            Self::Stay => Action::Stay,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reboot => "reboot",
            Self::Halt => "halt",
            Self::Stay => "stay",
        }
    }
}

impl Want {
    /// As the client is told.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Full { filter } => Verdict::Full { filter: *filter },
            Self::Wait { .. } => Verdict::Wait {
                seconds: WAIT_SECONDS,
            },
            Self::LogOnly(_) => Verdict::LogOnly,
            Self::Rest { filter } => Verdict::Hold { filter: *filter },
            Self::Hold(_) => Verdict::Hold { filter: 0 },
            Self::Redirect(target) => Verdict::Redirect {
                server: target.place,
            },
            Self::Nothing(_) => Verdict::Nothing,
        }
    }

    /// Its name, and why it is not full.
    #[must_use]
    pub fn name(&self) -> (&'static str, Option<String>) {
        match self {
            Self::Full { .. } => ("full", None),
            Self::Wait { .. } => ("wait", Some("others send their pages first".to_owned())),
            Self::Rest { .. } => (
                "rest",
                Some("a part came with an earlier attempt".to_owned()),
            ),
            Self::LogOnly(why) => ("log-only", Some(why.clone())),
            Self::Hold(why) => ("hold", Some(why.clone())),
            Self::Redirect(Target { address, .. }) => ("redirect", Some(format!("to {address}"))),
            Self::Nothing(why) => ("nothing", Some(why.clone())),
        }
    }

    /// Filter level of the dump.
    #[must_use]
    pub fn filter(&self) -> u8 {
        self.asks_pages().unwrap_or(0)
    }

    /// Filter level, if pages are wanted, now or later.
    #[must_use]
    pub fn asks_pages(&self) -> Option<u8> {
        match self {
            Self::Full { filter } | Self::Wait { filter } | Self::Rest { filter } => Some(*filter),
            Self::LogOnly(_) | Self::Hold(_) | Self::Redirect(_) | Self::Nothing(_) => None,
        }
    }

    /// Filter level, if the whole memory is wanted now.
    #[must_use]
    pub fn asks_at_once(&self) -> Option<u8> {
        if let Self::Full { filter } = self {
            Some(*filter)
        } else {
            None
        }
    }

    /// The filter level of a session that waits for its turn.
    #[must_use]
    pub fn waits(&self) -> Option<u8> {
        if let Self::Wait { filter } = self {
            Some(*filter)
        } else {
            None
        }
    }

    /// Whether the client sends pages.
    #[must_use]
    pub fn takes_place(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::Rest { .. })
    }
}

/// It is known who crashed: decides what is wanted. Called by the one thread that writes the
/// session, with nothing locked.
pub fn decide(hub: &Arc<Hub>, shared: &Shared) {
    let (ram_pages, earlier, refused) = {
        let session = lock(shared);
        let refused = session.ruling().filter(|_| !session.asked_before());
        let ram_pages = session.told().summary.ram_pages;
        (ram_pages, session.earlier(), refused.and_then(refusal))
    };
    forget_other_lives(hub, shared);
    match refused {
        // The attempt before was told so, too.
        Some(want) if earlier > 0 => set(hub, shared, want),
        _ if earlier > 0 => rest::begin(hub, shared),
        _ => {
            let want = by_policy(hub, shared, ram_pages);
            set(hub, shared, want);
        }
    }
}

/// Decides as if nothing had come before.
pub fn anew(hub: &Arc<Hub>, shared: &Shared) {
    let ram_pages = lock(shared).told().summary.ram_pages;
    let want = by_policy(hub, shared, ram_pages);
    set(hub, shared, want);
}

/// A host that crashes in another life than before does not come back to what it was sending then.
fn forget_other_lives(hub: &Arc<Hub>, shared: &Shared) {
    let (id, boot) = {
        let session = lock(shared);
        let boot = session.told().crash.as_ref().map(|crash| crash.boot);
        (session.id(), boot)
    };
    let others = hub.registry.of_key(id.key);
    for other in others.iter().filter(|other| !Arc::ptr_eq(other, shared)) {
        let mut session = lock(other);
        let known = session.told().crash.as_ref().map(|crash| crash.boot);
        if known.is_some() && known != boot {
            session.set_fate(Fate::Gone);
            drop(session);
            closing::start(
                hub,
                other,
                Some("the host crashed again in a later life".to_owned()),
            );
        }
    }
}

fn by_policy(hub: &Arc<Hub>, shared: &Shared, ram_pages: u64) -> Want {
    if hub.hold {
        let want = Want::Hold("the server was started with --hold".to_owned());
        return by_signature(hub, shared, want);
    }
    if let Some(address) = hub.redirect {
        let session = lock(shared);
        match session.server_at(address) {
            // A host that comes back did not find the other one.
            Some(place) if session.attempt() == 0 => {
                return Want::Redirect(Target { address, place });
            }
            Some(_) => {}
            None => hub.events.warn(format!(
                "{} cannot be redirected to {address}: it was not armed for that server; its dump \
                is taken here",
                session.about()
            )),
        }
    }
    let want = hub.decide(ram_pages, promised(hub, shared));
    by_signature(hub, shared, want)
}

/// What is wanted of a crash, of which `want` would be wanted were it the first of its kind. The
/// crash is counted, and told if it is new.
fn by_signature(hub: &Hub, shared: &Shared, want: Want) -> Want {
    let asked = want.asks_at_once();
    if lock(shared).ruling().is_none() {
        let ruling = rule(hub, shared, asked.is_some());
        lock(shared).set_ruling(ruling);
    }
    let session = lock(shared);
    let Some((ruling, filter)) = session.ruling().zip(asked) else {
        return want;
    };
    match ruling.wanted {
        None => want,
        Some(Wanted::Filter(Level(level))) => Want::Full {
            filter: filter | level,
        },
        Some(Wanted::Only(_)) => Want::LogOnly(ruling.why.clone()),
    }
}

/// What follows from a ruling by itself, when no pages are wanted.
fn refusal(ruling: &Ruling) -> Option<Want> {
    let refused = matches!(ruling.wanted, Some(Wanted::Only(_)));
    refused.then(|| Want::LogOnly(ruling.why.clone()))
}

fn rule(hub: &Hub, shared: &Shared, asked: bool) -> Ruling {
    let disk = lock(shared).disk();
    let spool = disk.map(|disk| {
        let disk = lock(&disk);
        disk.dir().spool(disk.number())
    });
    let read = spool.map_or(Ok(None), |spool| cause::read(&spool));
    let cause = read.unwrap_or_else(|error| {
        hub.events.warn_rarely(format!("{error:#}"));
        None
    });
    let session = lock(shared);
    let (dir, kernel, after) = (session.dir(), session.told().summary.build(), session.age());
    let crash = Crash {
        cause: cause.as_ref(),
        host: &session.about().host,
        kernel: &kernel,
        name: dir.name(),
    };
    let now = SystemTime::now();
    let (ruling, notice) = hub.signatures.rule(&crash, asked, now, after);
    drop(session);
    if let Some(notice) = notice {
        hub.events.tell(&Event::Notice { notice });
    }
    ruling
}

/// Tells a session, and everybody else, what is wanted of it. What needs a place and finds none
/// free becomes a wait.
pub fn set(hub: &Arc<Hub>, shared: &Shared, want: Want) {
    let turn = lock(&hub.deciding);
    let want = match want.asks_at_once() {
        Some(filter) if !hub.admission.enter(shared) => Want::Wait { filter },
        Some(_) | None => want,
    };
    if matches!(want, Want::Rest { .. }) {
        hub.admission.enter_first(shared);
    }
    let free = !matches!(want, Want::Wait { .. }) && !want.takes_place();
    let over = tell(hub, shared, want);
    drop(turn);
    if free {
        leave(hub, shared);
    }
    if let Some(why) = over {
        closing::start(hub, shared, Some(why));
    }
}

/// Puts `want` into effect; gives the reason when the session is over by it.
fn tell(hub: &Hub, shared: &Shared, want: Want) -> Option<String> {
    let mut session = lock(shared);
    if session.phase() == Phase::Closing {
        return None;
    }
    let (verdict, why) = want.name();
    let summary = &session.told().summary;
    let ruling = session.ruling();
    hub.events.tell(&Event::Verdict {
        about: session.about().clone(),
        kernel: summary.kernel.clone(),
        reason: summary.reason.clone(),
        ram_pages: summary.ram_pages,
        verdict,
        why: why
            .clone()
            .or_else(|| ruling.map(|ruling| ruling.why.clone())),
        signature: ruling.and_then(Ruling::signature),
    });
    let over = if let Want::Nothing(why) = &want {
        Some(why.clone())
    } else {
        None
    };
    session.want(want);
    if over.is_some() {
        session.dismiss(hub.action);
    }
    let file = session.file(State::Receiving, why);
    let dir = session.dir();
    drop(session);
    speak(hub, shared);
    if let Err(error) = dir.write_session_soon(&file) {
        hub.events.warn(format!("{error:#}"));
    }
    over
}

/// A session needs its place no longer: those that wait are let in, in the order they came.
pub fn leave(hub: &Arc<Hub>, shared: &Shared) {
    hub.admission.leave(shared);
    let _turn = lock(&hub.deciding);
    while let Some(next) = hub.admission.next() {
        let (filter, ram_pages) = {
            let session = lock(&next);
            let open = session.phase() == Phase::Receiving;
            let filter = session.wanted().and_then(Want::waits).filter(|_| open);
            let Some(filter) = filter else {
                drop(session);
                hub.admission.leave(&next);
                continue;
            };
            (filter, session.told().summary.ram_pages)
        };
        let want = match hub.room(bytes_expected(ram_pages, filter), promised(hub, &next)) {
            Ok(()) => Want::Full { filter },
            Err(why) => Want::LogOnly(why),
        };
        let stays = want.takes_place();
        let _over = tell(hub, &next, want);
        if !stays {
            hub.admission.leave(&next);
        }
    }
}

/// Does what a person says of a session. Errors tell why it cannot be done.
pub fn order(hub: &Arc<Hub>, shared: &Shared, order: Order) -> Result<&'static str> {
    let (phase, name, rest, target, ram_pages) = {
        let session = lock(shared);
        let target = if let Order::Redirect(address) = order {
            session.server_at(address)
        } else {
            None
        };
        let told = session.told();
        (
            session.phase(),
            session.about().to_string(),
            session.rest().map(|_| session.filter()),
            target,
            told.summary.ram_pages,
        )
    };
    if phase == Phase::Closing {
        bail!("the crash of {name} is over: nothing can be told to the host any more");
    }
    let said = || "a person said so".to_owned();
    let want = match order {
        Order::Full { filter } => {
            let level = rest.or(filter).unwrap_or(hub.filter);
            let expected = bytes_expected(ram_pages, level);
            if let Err(why) = hub.room(expected, promised(hub, shared)) {
                bail!("no room for all of {name}: {why}");
            }
            match rest {
                Some(filter) => Want::Rest { filter },
                None => Want::Full {
                    filter: filter.unwrap_or(hub.filter),
                },
            }
        }
        Order::LogOnly => Want::LogOnly(said()),
        Order::Hold => Want::Hold(said()),
        Order::Redirect(address) => match target {
            Some(place) => Want::Redirect(Target { address, place }),
            None => bail!("{name} was not armed for a server at {address}: it cannot go there"),
        },
        Order::Over(deed) => {
            lock(shared).dismiss(deed);
            Want::Nothing(said())
        }
    };
    let name = want.name().0;
    set(hub, shared, want);
    if rest.is_some() && name == "rest" {
        rest::go_on(hub, shared);
    }
    Ok(lock(shared).wanted().map_or(name, |want| want.name().0))
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

/// The disk is nearly full: no session sends pages any more, so that there is room for what tells
/// most and takes least.
pub fn stop_pages(hub: &Arc<Hub>, why: &str) {
    for shared in hub.registry.live() {
        let takes = |session: &Session| {
            let open = session.phase() == Phase::Receiving;
            open && session.wanted().is_some_and(Want::takes_place)
        };
        if takes(&lock(&shared)) {
            set(hub, &shared, Want::LogOnly(why.to_owned()));
        }
    }
}

/// How soon a client that waits asks again. It is told without being asked when its turn comes;
/// this is for when that is lost.
const WAIT_SECONDS: u16 = 5;
