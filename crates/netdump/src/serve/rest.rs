//! The rest of a crash that came in part with earlier attempts: the client started over, because
//! the server had lost packets or the network was cut. What has arrived is not sent twice: the host
//! is held, the pages that are missing are pulled, and then it goes on to the State text.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, ensure};
use proto::record::{Hello, Malformed, Record};
use proto::reply::PULL_RANGES_MAX;
use proto::units::Pfn;

use super::closing;
use super::content::{Crash, Pages, Pulled, RecordStream};
use super::directory::CrashDir;
use super::events::Event;
use super::hub::Hub;
use super::ranges::Ranges;
use super::registry::{Shared, lock};
use super::spool::Reader;
use super::verdict::{self, Want};
use super::writers::speak;

/// Pages of one pull: a change of mind takes effect after it.
const PULL_PAGES: u64 = 16_384;

/// What is missing, and what is there.
pub struct Rest {
    missing: Ranges,
    had: Pages,
    got: Pages,
}

impl Rest {
    /// Takes the answer of a pull. Its pages are not missing any more.
    fn take(&mut self, pulled: &Pulled) {
        let count = |range: &proto::record::RamRange| {
            let (first, pages) = (Pfn(range.first.get()), range.pages.get());
            (first, pages, self.missing.overlap(first, pages))
        };
        let ranges: Vec<_> = pulled.ranges.iter().map(count).collect();
        let fresh: u64 = ranges.iter().map(|(_, _, fresh)| fresh).sum();
        for (first, pages, _) in ranges {
            self.missing.remove(first, pages);
        }
        // A pull of another life of this server may bring some pages twice.
        if fresh == pulled.pages.total() {
            self.got.data += pulled.pages.data;
            self.got.zero += pulled.pages.zero;
            self.got.unreadable += pulled.pages.unreadable;
            self.got.excluded += pulled.pages.excluded;
        } else {
            self.got.data += fresh;
        }
    }

    /// Pages that are missing.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.missing.pages()
    }

    /// Puts the pages of all attempts in the place of those of the last one.
    pub fn count(&self, pages: &mut Pages) {
        *pages = Pages {
            data: self.had.data + self.got.data,
            zero: self.had.zero + self.got.zero,
            unreadable: self.had.unreadable + self.got.unreadable,
            excluded: self.had.excluded + self.got.excluded,
        };
    }
}

/// Begins to complete what earlier attempts brought, in a thread of its own, because their spools
/// are read.
pub fn begin(hub: &Arc<Hub>, shared: &Shared) {
    let filter = lock(shared).filter_before(hub.filter);
    verdict::set(hub, shared, Want::Rest { filter });
    let (hub_there, shared) = (Arc::clone(hub), Arc::clone(shared));
    hub.spawn(move || {
        if let Err(error) = plan(&hub_there, &shared) {
            let about = lock(&shared).about().clone();
            hub_there.events.warn(format!(
                "{about}: what arrived before cannot be read, all is sent again: {error:#}"
            ));
            verdict::anew(&hub_there, &shared);
        }
    });
}

/// Finds out what is missing and begins to pull it.
fn plan(hub: &Arc<Hub>, shared: &Shared) -> Result<()> {
    let (crash, dir, disk) = {
        let session = lock(shared);
        (session.told().crash.clone(), session.dir(), session.disk())
    };
    let disk = disk.context("it has no spool")?;
    let number = lock(&disk).number();
    let before = Before::read(hub, &dir, number)?;
    if before.crash.is_some() && !same(before.crash.as_ref(), crash.as_ref()) {
        return stand_alone(hub, shared, &dir);
    }
    if before.arrived.is_empty() {
        verdict::anew(hub, shared);
        return Ok(());
    }
    let mut missing = before.ram;
    let mut had = before.pages;
    // Holes that were pulled are no memory.
    let all = missing.pages();
    for range in before.arrived.front(usize::MAX, u64::MAX) {
        missing.remove(Pfn(range.first.get()), range.pages.get());
    }
    let there = all - missing.pages();
    if had.total() != there {
        let others = had.zero + had.unreadable + had.excluded;
        had.data = there.saturating_sub(others);
    }
    let rest = Rest {
        missing,
        had,
        got: Pages::default(),
    };
    {
        let mut session = lock(shared);
        hub.events.tell(&Event::Rest {
            about: session.about().clone(),
            pages: there,
            missing: rest.missing(),
        });
        session.set_rest(rest);
    }
    go_on(hub, shared);
    Ok(())
}

fn same(one: Option<&Crash>, other: Option<&Crash>) -> bool {
    one.zip(other).is_some_and(|(one, other)| one.is(other))
}

/// Another crash under the same name: it gets a directory of its own, and nothing is put together.
fn stand_alone(hub: &Arc<Hub>, shared: &Shared, old: &CrashDir) -> Result<()> {
    let disk = lock(shared).disk().context("it has no spool")?;
    let host = hub
        .key(lock(shared).id().key)
        .context("its key is gone")?
        .host;
    {
        let mut disk = lock(&disk);
        let dir = CrashDir::create(&hub.dumpdir, &host, std::time::SystemTime::now())?;
        disk.move_to(dir)?;
        let mut session = lock(shared);
        session.stands_alone(&disk);
        disk.write_log()?;
    }
    closing::close_dir(
        hub,
        old,
        "the host told of another crash under the same name",
    );
    verdict::anew(hub, shared);
    Ok(())
}

/// Asks for the next missing pages, or, if there are none, for the end.
pub fn go_on(hub: &Arc<Hub>, shared: &Shared) {
    {
        let mut session = lock(shared);
        if !matches!(session.wanted(), Some(Want::Rest { .. })) {
            return;
        }
        let Some(rest) = session.rest() else { return };
        let ranges = rest.missing.front(PULL_RANGES_MAX, PULL_PAGES);
        if ranges.is_empty() {
            session.go_on_to_state();
        } else {
            session.pull(&ranges);
        }
    }
    speak(hub, shared);
}

/// Pulls were answered: those of a person go to that person, the others bring the rest.
pub fn pulled(hub: &Arc<Hub>, shared: &Shared, answers: Vec<Pulled>) -> Result<(), String> {
    let mut ours = false;
    for answer in answers {
        if !answer.right {
            return Err(format!(
                "the pages of pull {} are not those that the client counted",
                answer.number
            ));
        }
        let mut session = lock(shared);
        if let Some(rest) = session.rest_mut() {
            rest.take(&answer);
            ours = true;
        }
        session.hand_over(answer);
    }
    if ours {
        go_on(hub, shared);
    }
    Ok(())
}

/// What the spools of a crash hold.
#[derive(Default)]
struct Before {
    crash: Option<Crash>,
    ram: Ranges,
    arrived: Ranges,
    pages: Pages,
}

impl Before {
    /// Reads spools 1 to `last`.
    fn read(hub: &Hub, dir: &CrashDir, last: u32) -> Result<Self> {
        let mut before = Self::default();
        for number in 1..=last {
            let path = dir.spool(number);
            let show = path.display();
            // A spool that lost its begin holds nothing.
            let Ok(mut spool) = Reader::open(&path) else {
                continue;
            };
            let (mut stream, mut frame) = (RecordStream::default(), Vec::new());
            while spool
                .frame(&mut frame)
                .with_context(|| format!("cannot read {show}"))?
            {
                ensure!(!hub.stop.load(Ordering::Relaxed), "the server ends");
                let first = number < last;
                let read = stream.push(&frame, |record| before.take(&record, first));
                if read.is_err() {
                    break;
                }
            }
        }
        Ok(before)
    }

    fn take(&mut self, record: &Record<'_>, earlier: bool) -> Result<(), Malformed> {
        if let Record::Hello(hello) = record {
            self.hello(hello, earlier);
        } else if let Record::MemoryMap(map) = record
            && self.ram.is_empty()
        {
            self.ram = Ranges::of(map);
        } else if let Record::Pages(block) = record {
            self.add(proto::record::Kind::Pages, block.first, block.pages.into());
        } else if let Record::Run(run) = record {
            self.add(run.why, run.first, run.pages);
        }
        Ok(())
    }

    fn hello(&mut self, hello: &Hello, earlier: bool) {
        if earlier && self.crash.is_none() {
            self.crash = Some(Crash::of(hello));
        }
    }

    fn add(&mut self, kind: proto::record::Kind, first: Pfn, pages: u64) {
        let twice = self.arrived.overlap(first, pages);
        self.arrived.add(first, pages);
        self.pages.add(kind, pages - twice);
    }
}
