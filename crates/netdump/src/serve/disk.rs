//! The disk side of a session: its directory, its spool, and what the stream tells. Only one thread
//! writes at a time, and it holds no lock that a receive thread needs.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proto::units::PacketNumber;

use super::content::{BlockRoom, Content, Fault, News};
use super::directory::{CrashDir, LOG_FILE};
use super::finish::Format;
use super::follow::{Follower, Plan};
use super::hub::Hub;
use super::log;
use super::spool::{Origin, Reader, Spool};
use crate::hardware::Hardware;

/// See the module's documentation.
pub struct Disk {
    dir: CrashDir,
    /// Which of the crash's spools this is.
    number: u32,
    spool: Spool,
    content: Content,
    /// Bytes of the kernel's log in the log file.
    log_written: usize,
    /// A vmcore that grows with the spool.
    follower: Option<Follower>,
}

impl Disk {
    /// Begins spool `number` in `dir`.
    pub fn create(dir: CrashDir, number: u32, origin: Origin) -> Result<Self> {
        let path = dir.spool(number);
        let spool = Spool::create(&path, origin)
            .with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self {
            dir,
            number,
            spool,
            content: Content::new(),
            log_written: 0,
            follower: None,
        })
    }

    /// Takes spool `number` in `dir` up again as far as it is whole, and writes the log anew. Also
    /// gives its origin, and what is wrong with the client that sent it.
    pub fn resume(
        dir: CrashDir,
        number: u32,
        stop: &AtomicBool,
        room: &mut BlockRoom,
    ) -> Result<(Self, Origin, Option<Fault>)> {
        let path = dir.spool(number);
        let show = path.display();
        let mut reader = Reader::open(&path).with_context(|| format!("cannot read {show}"))?;
        let mut content = Content::new();
        let (mut frame, mut fault) = (Vec::new(), None);
        while reader
            .frame(&mut frame)
            .with_context(|| format!("cannot read {show}"))?
        {
            ensure!(!stop.load(Ordering::Relaxed), "the server ends");
            if fault.is_none() {
                fault = content.push(&frame, room).err();
            }
        }
        let origin = reader.origin();
        let spool = reader
            .into_writer(&path)
            .with_context(|| format!("cannot write {show}"))?;
        let mut disk = Self {
            dir,
            number,
            spool,
            content,
            log_written: 0,
            follower: None,
        };
        disk.write_log()?;
        Ok((disk, origin, fault))
    }

    /// Writes the stream bytes of `packets` packets: spool first, then the log.
    pub fn write(&mut self, packets: u32, bytes: &[u8], room: &mut BlockRoom) -> Result<News> {
        self.append(packets, bytes)
            .context("cannot write the spool")?;
        let news = self
            .content
            .push(bytes, room)
            .map_err(|fault| anyhow::anyhow!(broken_client(fault)))?;
        if self.content.text_over() {
            self.write_log()?;
        }
        Ok(news)
    }

    /// Appends to the spool, and tells who follows it.
    fn append(&mut self, packets: u32, bytes: &[u8]) -> io::Result<()> {
        let begin = Instant::now();
        let result = self.spool.append(packets, bytes);
        if result.is_err() {
            self.follower = None;
        } else if let Some(follower) = &self.follower {
            follower.grown(self.spool.bytes());
            if begin.elapsed() >= SLOW_WRITE {
                follower.wait();
            }
        }
        result
    }

    /// Whether its vmcore could grow with it and does not: it is the crash's only spool.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.number == 1 && self.follower.is_none()
    }

    /// Begins to let its vmcore grow with it, if that can be.
    pub fn follow(&mut self, hub: &Arc<Hub>, format: Format, filter: u8, ram_pages: u64) {
        let plan = Plan {
            dir: self.dir.clone(),
            format,
            filter,
        };
        self.follower = Follower::begin(hub, plan, ram_pages);
        if let Some(follower) = &self.follower {
            follower.grown(self.spool.bytes());
        }
    }

    /// Takes away what has grown so far, and who lets it grow.
    pub fn take_follower(&mut self) -> Option<Follower> {
        self.follower.take()
    }

    /// Brings the log file, and the one of the hardware, up to what has arrived.
    pub fn write_log(&mut self) -> Result<()> {
        if self.content.text_bytes() > self.log_written {
            let log = log::read(&self.dir.spool(self.number))?;
            self.dir.write_log(&log)?;
            self.log_written = self.content.text_bytes();
        }
        if let Some(hardware) = self.content.hardware_news() {
            let json = serde_json::to_vec(&Hardware::of(hardware)).context("cannot write JSON")?;
            self.dir.write_hardware(&json)?;
        }
        let state = self.content.take_state();
        if !state.is_empty() {
            let path = self.dir.file(LOG_FILE);
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(&path)
                .and_then(|mut file| file.write_all(&state))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &CrashDir {
        &self.dir
    }

    /// Moves it into `dir`: the stream is of another crash than the directory it was begun in. The
    /// spool becomes the first one there.
    pub fn move_to(&mut self, dir: CrashDir) -> Result<()> {
        let (from, to) = (self.dir.spool(self.number), dir.spool(1));
        std::fs::rename(&from, &to)
            .with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))?;
        (self.dir, self.number, self.log_written) = (dir, 1, 0);
        Ok(())
    }

    /// Which of the crash's spools it is.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What is spooled.
    #[must_use]
    pub fn spool(&self) -> &Spool {
        &self.spool
    }

    /// The packet that is written next.
    #[must_use]
    pub fn next(&self) -> PacketNumber {
        self.spool.next()
    }

    /// What has arrived.
    #[must_use]
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// The contents of the pages of pull `number` are wanted.
    pub fn want_pull(&mut self, number: u32) {
        self.content.want_pull(number);
    }
}

/// A write that takes so long has waited for the disk and not for the page cache.
const SLOW_WRITE: Duration = Duration::from_millis(100);

/// A client that sends what none may is told so.
#[must_use]
pub fn broken_client(fault: Fault) -> String {
    format!("the client sends what no client may: {fault:?}")
}
