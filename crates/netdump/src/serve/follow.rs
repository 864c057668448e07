//! A vmcore that grows while its pages arrive, so that little is left to do after the last one.
//!
//! A thread of low priority reads the spool behind the writer and does with it what
//! [`super::finish`] would do at the end. It is a courtesy to one session at a time: whatever is out
//! of the ordinary ends it, and the vmcore is made of the spools from their beginning, as that of
//! sessions which were never followed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::nice;

use super::content::RecordStream;
use super::directory::{CrashDir, VMCORE_GROWING_FILE};
use super::finish::{Format, Image};
use super::hub::{Hub, bytes_expected, free_bytes};
use super::registry::lock;
use super::spool::Reader;

/// What is to be followed.
pub struct Plan {
    /// The crash's directory, which has one spool.
    pub dir: CrashDir,
    /// Format of the vmcore.
    pub format: Format,
    /// Filter level of the dump.
    pub filter: u8,
}

/// A vmcore that grows. Dropped, it is given up and its file removed.
pub struct Follower {
    lead: Arc<Lead>,
    image: Receiver<Image>,
    filter: u8,
    _place: Place,
}

/// The place of the one session that is followed.
struct Place(Arc<AtomicBool>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// What the follower is told.
#[derive(Default)]
struct Lead {
    word: Mutex<Word>,
    said: Condvar,
}

#[derive(Clone, Copy, Default)]
struct Word {
    /// Stream bytes in whole frames of the spool.
    bytes: u64,
    /// No more will come.
    over: bool,
    /// What is there shall wait until no more comes.
    waits: bool,
    /// The file is not wanted any more.
    forsaken: bool,
}

impl Follower {
    /// Begins to follow a crash of `ram_pages` pages, unless another one is followed or there is
    /// no room for a vmcore beside the spool.
    pub fn begin(hub: &Arc<Hub>, plan: Plan, ram_pages: u64) -> Option<Self> {
        let place = Place::take(&hub.following)?;
        let twice = bytes_expected(ram_pages, plan.filter).saturating_mul(2);
        hub.room(twice.saturating_add(FREE_BYTES_MIN), 0).ok()?;
        let (lead, filter) = (Arc::<Lead>::default(), plan.filter);
        let (result, image) = sync_channel(1);
        let (there, hub_there) = (Arc::clone(&lead), Arc::clone(hub));
        hub.spawn(move || run(&hub_there, &plan, &there, &result));
        Some(Self {
            lead,
            image,
            filter,
            _place: place,
        })
    }

    /// The spool has grown to `bytes` stream bytes.
    pub fn grown(&self, bytes: u64) {
        self.lead.say(|word| word.bytes = bytes);
    }

    /// The disk is slow: what is written now would keep the host waiting.
    pub fn wait(&self) {
        self.lead.say(|word| word.waits = true);
    }

    /// The spool does not grow any more.
    pub fn over(&self) {
        self.lead.say(|word| word.over = true);
    }

    /// The image of the whole spool, which is over; none if it was given up or is of another filter
    /// level.
    #[must_use]
    pub fn image(self, filter: u8) -> Option<Image> {
        if self.filter != filter {
            return None;
        }
        self.image.recv().ok()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.lead.say(|word| word.forsaken = true);
        // Its thread may still write to the file, whose name the next one needs.
        while self.image.recv().is_ok() {}
    }
}

impl Place {
    fn take(taken: &Arc<AtomicBool>) -> Option<Self> {
        let was = taken.swap(true, Ordering::AcqRel);
        (!was).then(|| Self(Arc::clone(taken)))
    }
}

impl Lead {
    fn say(&self, change: impl FnOnce(&mut Word)) {
        change(&mut lock(&self.word));
        self.said.notify_one();
    }

    /// Waits until there is more than `read` bytes to read, or nothing more will come.
    fn hear(&self, hub: &Hub, read: u64) -> Result<Word> {
        let idle = |word: &mut Word| {
            let more = word.bytes > read && !word.waits;
            !(word.over || word.forsaken || more || hub.stopping())
        };
        let word = loop {
            let (word, waited) = self
                .said
                .wait_timeout_while(lock(&self.word), STOP_WAIT, idle)
                .unwrap_or_else(PoisonError::into_inner);
            if !waited.timed_out() {
                break *word;
            }
        };
        ensure!(!word.forsaken && !hub.stopping(), "it is given up");
        Ok(word)
    }
}

/// The thread. Why it gives up is nobody's concern: what is wrong with spool or disk is met again,
/// and told, when the vmcore is made of the spools.
fn run(hub: &Hub, plan: &Plan, lead: &Lead, result: &SyncSender<Image>) {
    match follow(hub, plan, lead) {
        Ok(image) => drop(result.send(image)),
        Err(_) => plan.dir.remove_growing(),
    }
}

fn follow(hub: &Hub, plan: &Plan, lead: &Lead) -> Result<Image> {
    nice(NICE).context("cannot lower the priority")?;
    let mut reader = Reader::open(&plan.dir.spool(1))?;
    let path = plan.dir.file(VMCORE_GROWING_FILE);
    let mut image = Image::new(path, plan.format, plan.filter);
    let mut stream = RecordStream::default();
    let (mut frame, mut looked_at) = (Vec::new(), 0);
    loop {
        let word = lead.hear(hub, reader.bytes())?;
        if word.over && reader.bytes() >= word.bytes {
            return Ok(image);
        }
        ensure!(
            reader.frame(&mut frame)?,
            "the spool is not as it was written"
        );
        let taken = stream.push(&frame, |record| image.record(record));
        ensure!(
            taken.is_ok(),
            "the stream is broken, or the vmcore cannot be written"
        );
        if reader.bytes() - looked_at >= LOOK_BYTES {
            looked_at = reader.bytes();
            let free = free_bytes(plan.dir.path())?;
            ensure!(free >= FREE_BYTES_MIN, "the spool needs the room");
        }
    }
}

/// The host's packets are more urgent.
const NICE: i32 = 10;
/// Bounds how late the end of the program is noticed.
const STOP_WAIT: Duration = Duration::from_millis(50);
/// How often the free space is looked at, and the least that must be left for spools.
const LOOK_BYTES: u64 = 64 << 20;
const FREE_BYTES_MIN: u64 = 512 << 20;
