//! One session on the server: engine, spool, log and what the client wants to know, kept in step.
//!
//! Order is everything here: datagrams go through the engine, what they completed is appended to
//! the spool and only then acknowledged. [`Session::commit`] does the middle part; a reply is made
//! only after it.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use proto::reply::{Action, Verdict};
use proto::server::Session as Engine;
use proto::time::Instant as EngineInstant;
use proto::units::{PAGE_BYTES, SessionId};
use proto::wire::{Header, INCARNATION_BYTES, Reject};
use serde::{Deserialize, Serialize};

use super::content::{Content, Fault, News};
use super::directory::{CrashDir, LOG_FILE, SESSION_FILE_VERSION, SessionFile, State};
use super::events::{About, Arrived};
use super::hold::Held;
use super::socket::Peer;
use super::spool::{Origin, Reader, SPOOL_FILE, Spool};
use crate::key::{HostKey, fill_random};
use crate::time::utc;

/// What the server wants of a crash, and why not everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Want {
    /// The memory.
    Full {
        /// Filter level: which pages are left out.
        filter: u8,
    },
    /// Text, registers and state, for this reason.
    LogOnly(String),
    /// What has arrived so far is enough, for this reason.
    Nothing(String),
}

/// Where a session stands in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The client sends.
    Receiving,
    /// A closing thread has taken it over; the engine goes on answering.
    Closing,
}

/// What a commit calls for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// Nothing.
    Nothing,
    /// It is known who crashed: decide what is wanted.
    Verdict,
    /// Everything that was asked for has arrived: close the session.
    Close,
    /// The session cannot go on, for this reason: close it.
    Fail(String),
}

/// A session under way.
pub struct Session {
    engine: Engine,
    held: Held,
    spool: Spool,
    content: Content,
    /// Stream bytes that the engine delivered and the spool does not have yet.
    pending: Vec<u8>,
    dir: CrashDir,
    about: About,
    came: Came,
    since: Instant,
    heard_at: Instant,
    log_written: usize,
    phase: Phase,
    want: Option<Want>,
}

/// Where and when a session came from.
struct Came {
    peer: Peer,
    /// UTC time of the first packet.
    started: String,
    /// Seconds it took before this process went on with it.
    seconds: f64,
}

impl Session {
    /// Begins a session at `header`, the header of a genuine first packet from `peer`.
    pub fn create(
        key: &HostKey,
        header: &Header,
        peer: Peer,
        dir: CrashDir,
        held_bytes: &Arc<AtomicUsize>,
    ) -> Result<Self> {
        let origin = Origin {
            session: header.session,
            attempt: header.attempt,
            first: header.number,
        };
        let path = dir.file(SPOOL_FILE);
        let spool = Spool::create(&path, origin)
            .with_context(|| format!("cannot create {}", path.display()))?;
        let came = Came {
            peer,
            started: utc(SystemTime::now()),
            seconds: 0.0,
        };
        let session = Self::assemble(key, origin, spool, Content::new(), dir, came, held_bytes)?;
        session.write_file(State::Receiving, None)?;
        Ok(session)
    }

    /// Takes a session up again from its spool, as far as that is whole, and writes its log anew.
    /// Also says what is due for it.
    pub fn resume(
        key: &HostKey,
        dir: CrashDir,
        file: &SessionFile,
        held_bytes: &Arc<AtomicUsize>,
        stop: &AtomicBool,
    ) -> Result<(Self, Due)> {
        let path = dir.file(SPOOL_FILE);
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
                fault = content.push(&frame).err();
            }
        }
        let origin = reader.origin();
        let spool = reader
            .into_writer(&path)
            .with_context(|| format!("cannot write {show}"))?;
        let due = match fault {
            Some(fault) => Due::Fail(broken_client(fault)),
            None if content.summary().ended.is_some() => Due::Close,
            None if content.summary().ram_pages > 0 && file.verdict.is_none() => Due::Verdict,
            None => Due::Nothing,
        };
        let came = Came {
            peer: Peer {
                address: file.peer,
                local: None,
            },
            started: file.started.clone(),
            seconds: file.seconds,
        };
        let mut session = Self::assemble(key, origin, spool, content, dir, came, held_bytes)?;
        session.write_log(true)?;
        if let Some(want) = &file.verdict {
            session.want(want.clone());
        }
        Ok((session, due))
    }

    fn assemble(
        key: &HostKey,
        origin: Origin,
        spool: Spool,
        content: Content,
        dir: CrashDir,
        came: Came,
        held_bytes: &Arc<AtomicUsize>,
    ) -> Result<Self> {
        let mut incarnation = [0; INCARNATION_BYTES];
        fill_random(&mut incarnation)?;
        let keys = key.secret.session_keys(origin.session);
        let engine = Engine::new(
            origin.session,
            keys,
            incarnation,
            origin.attempt,
            origin.first,
            spool.next(),
        );
        let (host, directory) = (key.host.to_string(), dir.path().to_owned());
        let now = Instant::now();
        Ok(Self {
            engine,
            held: Held::new(Arc::clone(held_bytes)),
            spool,
            content,
            pending: Vec::new(),
            about: About {
                session: origin.session,
                host,
                directory,
            },
            dir,
            came,
            since: now,
            heard_at: now,
            log_written: 0,
            phase: Phase::Receiving,
            want: None,
        })
    }

    /// Takes a datagram from `peer`. Refused ones change nothing. What comes after the end is
    /// answered, not kept.
    pub fn receive(
        &mut self,
        now: EngineInstant,
        peer: Peer,
        datagram: &mut [u8],
    ) -> Result<(), Reject> {
        let (pending, open) = (&mut self.pending, self.phase == Phase::Receiving);
        let mut deliver = |bytes: &[u8]| {
            if open {
                pending.extend_from_slice(bytes);
            }
        };
        self.engine
            .handle(now, datagram, &mut self.held, &mut deliver)?;
        self.came.peer = peer;
        self.heard_at = Instant::now();
        Ok(())
    }

    /// Writes what the engine delivered since the last call: spool first, then the log. Says what
    /// is due then.
    pub fn commit(&mut self) -> Due {
        let packets = self.engine.next().since(self.spool.next());
        if packets == 0 || self.phase == Phase::Closing {
            return Due::Nothing;
        }
        let packets = u32::try_from(packets).unwrap_or(u32::MAX);
        if let Err(error) = self.spool.append(packets, &self.pending) {
            return Due::Fail(format!("cannot write the spool: {error}"));
        }
        let news = self.content.push(&self.pending);
        self.pending.clear();
        match news {
            Err(fault) => Due::Fail(broken_client(fault)),
            Ok(news) => self.digest(news),
        }
    }

    /// Makes the reply in `out`; `None` while something that the engine delivered is not written.
    pub fn reply(&mut self, now: EngineInstant, out: &mut [u8]) -> Option<usize> {
        let written = self.engine.next() == self.spool.next() || self.phase == Phase::Closing;
        written.then(|| self.engine.reply(now, out)).flatten()
    }

    /// When a reply is due.
    #[must_use]
    pub fn reply_at(&self) -> Option<EngineInstant> {
        self.engine.reply_at()
    }

    /// Tells the client, from the next reply on, what is wanted of it.
    pub fn want(&mut self, want: Want) {
        match want {
            Want::Full { filter } => self.engine.set_verdict(Verdict::Full { filter }),
            Want::LogOnly(_) => self.engine.set_verdict(Verdict::LogOnly),
            Want::Nothing(_) => self.engine.set_verdict(Verdict::Nothing),
        }
        self.want = Some(want);
    }

    /// Tells the host, from the next reply on, to reboot: at once, if it has not come to its end.
    pub fn reboot(&mut self) {
        if self.content.summary().ended.is_none() {
            self.engine.set_verdict(Verdict::Nothing);
        }
        self.engine.set_action(Action::Reboot);
    }

    /// Lets the client send `packets` packets beyond the last one written.
    pub fn set_credit(&mut self, packets: u64) {
        self.engine.set_credit(packets);
    }

    /// What has arrived.
    #[must_use]
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// What was wanted, once that is decided.
    #[must_use]
    pub fn wanted(&self) -> Option<&Want> {
        self.want.as_ref()
    }

    /// Where the session stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Hands the session to a closing thread. `false` when another one has it.
    pub fn begin_closing(&mut self) -> bool {
        let first = self.phase == Phase::Receiving;
        self.phase = Phase::Closing;
        first
    }

    /// Which session this is.
    #[must_use]
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The session's name.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.engine.id()
    }

    /// The attempt that is being received.
    #[must_use]
    pub fn attempt(&self) -> u16 {
        self.engine.attempt()
    }

    /// Where its packets come from.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.came.peer
    }

    /// When a genuine packet came last.
    #[must_use]
    pub fn heard_at(&self) -> Instant {
        self.heard_at
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &CrashDir {
        &self.dir
    }

    /// What is spooled.
    #[must_use]
    pub fn spool(&self) -> &Spool {
        &self.spool
    }

    /// Seconds from the first packet to the last one.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.came.seconds + self.heard_at.duration_since(self.since).as_secs_f64()
    }

    /// How far it has come.
    #[must_use]
    pub fn arrived(&self) -> Arrived {
        let summary = self.content.summary();
        Arrived {
            pages: summary.pages.total(),
            ram_pages: summary.ram_pages,
            bytes: self.spool.bytes(),
            seconds: self.seconds(),
        }
    }

    /// Bytes of memory that have not arrived yet, if all is wanted: what the disk must have room
    /// for.
    #[must_use]
    pub fn bytes_to_come(&self) -> u64 {
        let summary = self.content.summary();
        let pages = summary.ram_pages.saturating_sub(summary.pages.total());
        if matches!(self.want, Some(Want::Full { .. })) {
            pages.saturating_mul(PAGE_BYTES as u64)
        } else {
            0
        }
    }

    /// Filter level of the dump: what either side leaves out.
    #[must_use]
    pub fn filter(&self) -> u8 {
        let asked = match self.want {
            Some(Want::Full { filter }) => filter,
            Some(Want::LogOnly(_) | Want::Nothing(_)) | None => 0,
        };
        asked | self.content.summary().filter_demanded
    }

    /// What `session.json` holds at this moment.
    #[must_use]
    pub fn file(&self, state: State, why: Option<String>) -> SessionFile {
        SessionFile {
            version: SESSION_FILE_VERSION,
            state,
            verdict: self.want.clone(),
            filter: self.filter(),
            why,
            host: self.about.host.clone(),
            key: self.id().key.to_string(),
            arming: self.id().arming.to_string(),
            attempt: self.attempt(),
            peer: self.came.peer.address,
            started: self.came.started.clone(),
            seconds: self.seconds(),
            bytes: self.spool.bytes(),
            summary: self.content.summary().clone(),
            vmcore: None,
        }
    }

    /// Replaces `session.json`.
    pub fn write_file(&self, state: State, why: Option<String>) -> Result<()> {
        self.dir.write_session(&self.file(state, why))
    }

    /// Brings the log file up to what has arrived. Unless `all`, a kernel log that grew by less
    /// than a quarter waits, so that a long one is not written over and over.
    pub fn write_log(&mut self, all: bool) -> Result<()> {
        let bytes = self.content.log_bytes();
        if bytes > self.log_written && (all || bytes >= self.log_written + self.log_written / 4) {
            self.dir.write_log(&self.content.log())?;
            self.log_written = bytes;
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

    fn digest(&mut self, news: News) -> Due {
        let text_over = self.content.summary().pages.total() > 0 || news.ended;
        if let Err(error) = self.write_log(text_over) {
            return Due::Fail(format!("{error:#}"));
        }
        if news.ended {
            Due::Close
        } else if news.hello {
            Due::Verdict
        } else {
            Due::Nothing
        }
    }
}

fn broken_client(fault: Fault) -> String {
    format!("the client sends what no client may: {fault:?}")
}
