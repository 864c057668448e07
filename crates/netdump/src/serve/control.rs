//! How people look into a running server and say what is wanted of a crash: a socket in the dump
//! directory, which only its owner can open. One request, one answer, a line of JSON each; pages
//! follow their line as they are.

use std::fs::{self, Permissions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use proto::record::{Kind, RamRange};
use proto::reply::PULL_RANGES_MAX;
use serde::{Deserialize, Serialize};

use super::content::{PULLED_PAGES_MAX, Piece, Pulled};
use super::hub::Hub;
use super::registry::{Shared, lock};
use super::session::{Phase, Session};
use super::signatures::Entries;
use super::verdict::{Order, order};
use super::writers::speak;
use crate::status::Server as Status;

/// Name of the socket in the dump directory.
pub const CONTROL_FILE: &str = ".control";
/// Bytes of a request.
pub const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// Requests that are answered at a time.
const REQUESTS_MAX: usize = 16;
const REQUEST_WAIT: Duration = Duration::from_secs(5);
/// How long a host may take to answer a pull.
const PULL_WAIT: Duration = Duration::from_secs(60);
const IDLE_WAIT: Duration = Duration::from_millis(50);

/// What is asked of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Which sessions are under way?
    List,
    /// How do hosts' logs and targets stand?
    Status,
    /// Which signatures are known?
    Signatures,
    /// Take the next crash with this signature in full.
    WantNext {
        /// The signature.
        signature: String,
    },
    /// Have this crash do that.
    Verdict {
        /// The name of its directory.
        crash: String,
        /// What.
        order: Order,
    },
    /// Get pages of a crash whose host is there.
    Pull {
        /// The name of its directory.
        crash: String,
        /// First page and number of pages.
        ranges: Vec<(u64, u64)>,
    },
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The sessions under way.
    Sessions(Vec<Row>),
    /// How hosts' logs and targets stand.
    Status(Box<Status>),
    /// The signatures.
    Signatures(Entries),
    /// It is done; this is the verdict now.
    Done(String),
    /// Pages; the bytes of those with contents follow the line.
    Pages(Vec<PagesRow>),
    /// It cannot be done, for this reason.
    Refused(String),
}

/// A session under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The name of the crash's directory.
    pub crash: String,
    /// The host.
    pub host: String,
    /// Where its packets come from.
    pub peer: String,
    /// `full`, `wait`, ...; `closing` when the vmcore is being written.
    pub state: String,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The crash's signature, if its text tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
    /// The title that goes with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// Why the kernel died.
    pub reason: String,
    /// How often the client had started over.
    pub attempt: u16,
    /// Pages that arrived.
    pub pages: u64,
    /// Pages of memory.
    pub ram_pages: u64,
    /// Stream bytes that arrived.
    pub bytes: u64,
    /// Seconds from the first packet to the last one.
    pub seconds: f64,
    /// Seconds since the last packet.
    pub silent_seconds: f64,
}

/// Pages that were pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesRow {
    /// First page.
    pub first: u64,
    /// How many.
    pub pages: u64,
    /// `data`, `zero`, `unreadable` or `excluded`.
    pub kind: String,
}

/// The server's end of the socket.
pub struct Control {
    listener: UnixListener,
}

impl Control {
    /// Makes the socket, in the place of one that a server left behind that was killed. The caller
    /// holds the dump directory's lock.
    pub fn open(dumpdir: &Path) -> Result<Self> {
        let path = dumpdir.join(CONTROL_FILE);
        let cannot = || format!("cannot make the control socket {}", path.display());
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error).with_context(cannot);
        }
        // Others may look into the directory, so the socket appears there only when it is closed
        // to them.
        let aside = dumpdir.join(format!("{CONTROL_FILE}.new"));
        drop(fs::remove_file(&aside));
        let listener = UnixListener::bind(&aside).with_context(cannot)?;
        fs::set_permissions(&aside, Permissions::from_mode(0o600)).with_context(cannot)?;
        fs::rename(&aside, &path).with_context(cannot)?;
        listener.set_nonblocking(true).with_context(cannot)?;
        Ok(Self { listener })
    }

    /// Answers requests until the server ends.
    pub fn run(&self, hub: &Arc<Hub>) {
        let under_way = Arc::new(AtomicUsize::new(0));
        while !hub.stopping() {
            match self.listener.accept() {
                Ok((stream, _)) if under_way.load(Ordering::Relaxed) < REQUESTS_MAX => {
                    under_way.fetch_add(1, Ordering::Relaxed);
                    let (hub, under_way) = (Arc::clone(hub), Arc::clone(&under_way));
                    // Not waited for: it ends by its own time limits.
                    let _thread = thread::spawn(move || {
                        // Whoever asked may be gone.
                        drop(serve(&hub, stream));
                        under_way.fetch_sub(1, Ordering::Relaxed);
                    });
                }
                // Too many at a time: the stream is closed, and whoever asked sees that.
                Ok(_) => {}
                Err(_) => thread::sleep(IDLE_WAIT),
            }
        }
    }
}

fn serve(hub: &Arc<Hub>, mut stream: UnixStream) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(REQUEST_WAIT))?;
    stream.set_write_timeout(Some(REQUEST_WAIT))?;
    let mut line = String::new();
    BufReader::new((&stream).take(REQUEST_BYTES_MAX)).read_line(&mut line)?;
    let answered = serde_json::from_str(&line)
        .context("the request is malformed; is this netdump of the server's version?")
        .and_then(|request| answer(hub, request));
    let (answer, pieces) = answered.unwrap_or_else(|error| {
        let refused = Answer::Refused(format!("{error:#}"));
        (refused, Vec::new())
    });
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    for piece in pieces {
        stream.write_all(&piece.bytes)?;
    }
    Ok(())
}

fn answer(hub: &Arc<Hub>, request: Request) -> Result<(Answer, Vec<Piece>)> {
    match request {
        Request::List => {
            let mut rows: Vec<Row> = hub
                .registry
                .live()
                .iter()
                .map(|session| row(&lock(session)))
                .collect();
            rows.sort_by(|one, other| one.crash.cmp(&other.crash));
            Ok((Answer::Sessions(rows), Vec::new()))
        }
        Request::Status => {
            let status = Status {
                console: hub.console.figures(),
                hosts: hub.console.hosts(),
                forward: hub.forward.rows(),
                looped: hub.forward.looped(),
            };
            Ok((Answer::Status(Box::new(status)), Vec::new()))
        }
        Request::Signatures => Ok((Answer::Signatures(hub.signatures.entries()), Vec::new())),
        Request::WantNext { signature } => {
            hub.signatures.want_next(&signature)?;
            let done = "the next one is wanted in full".to_owned();
            Ok((Answer::Done(done), Vec::new()))
        }
        Request::Verdict { crash, order: said } => {
            let done = order(hub, &find(hub, &crash)?, said)?;
            Ok((Answer::Done(done.to_owned()), Vec::new()))
        }
        Request::Pull { crash, ranges } => {
            let pulled = pull(hub, &find(hub, &crash)?, &ranges)?;
            let rows = pulled.contents.iter().map(pages_row).collect();
            Ok((Answer::Pages(rows), pulled.contents))
        }
    }
}

fn find(hub: &Hub, crash: &str) -> Result<Shared> {
    let live = hub.registry.live();
    let found = live
        .into_iter()
        .find(|session| lock(session).dir().name() == crash);
    found.with_context(|| {
        format!("no crash {crash} is under way here: netdump list names those that are")
    })
}

fn row(session: &Session) -> Row {
    let (told, arrived) = (session.told(), session.arrived());
    let (state, why) = match (session.phase(), session.wanted()) {
        (Phase::Closing, _) => ("closing", session.close_why()),
        (Phase::Receiving, Some(want)) => want.name(),
        (Phase::Receiving, None) => ("undecided", None),
    };
    let ruling = session.ruling();
    let cause = ruling.and_then(|ruling| ruling.cause.as_ref());
    Row {
        crash: session.dir().name().to_owned(),
        host: session.about().host.clone(),
        peer: session.peer().address.to_string(),
        state: state.to_owned(),
        why: why.or_else(|| ruling.map(|ruling| ruling.why.clone())),
        signature: cause.map(|cause| cause.signature.clone()),
        title: cause.map(|cause| cause.title.clone()),
        reason: told.summary.reason.clone(),
        attempt: session.attempt(),
        pages: arrived.pages,
        ram_pages: arrived.ram_pages,
        bytes: arrived.bytes,
        seconds: arrived.seconds,
        silent_seconds: session.heard_at().elapsed().as_secs_f64(),
    }
}

fn pages_row(piece: &Piece) -> PagesRow {
    let kind = if piece.kind == Kind::Pages {
        "data"
    } else if piece.kind == Kind::Zero {
        "zero"
    } else if piece.kind == Kind::Excluded {
        "excluded"
    } else {
        "unreadable"
    };
    PagesRow {
        first: piece.first,
        pages: piece.pages,
        kind: kind.to_owned(),
    }
}

/// Asks a host for pages and waits for them.
fn pull(hub: &Hub, shared: &Shared, ranges: &[(u64, u64)]) -> Result<Pulled> {
    let total = ranges
        .iter()
        .fold(0_u64, |sum, (_, pages)| sum.saturating_add(*pages));
    ensure!(
        (1..=PULL_RANGES_MAX).contains(&ranges.len()) && (1..=PULLED_PAGES_MAX).contains(&total),
        "1 to {PULL_RANGES_MAX} ranges of 1 to {PULLED_PAGES_MAX} pages together can be asked for \
        at a time"
    );
    let asked: Vec<RamRange> = ranges
        .iter()
        .map(|&(first, pages)| RamRange {
            first: first.into(),
            pages: pages.into(),
        })
        .collect();
    let disk = lock(shared).disk().context("it has not begun yet")?;
    let (answer, answers) = sync_channel(1);
    {
        let mut disk = lock(&disk);
        let mut session = lock(shared);
        if session.phase() == Phase::Closing {
            bail!("the crash is over: its host answers no more, its vmcore has the pages");
        }
        if session.rest().is_some_and(|rest| rest.missing() > 0) {
            bail!("pages of an earlier attempt are being pulled; ask again when they are here");
        }
        disk.want_pull(session.next_pull());
        session
            .pull_for(&asked, answer)
            .context("other pages are being pulled; ask again when they are here")?;
    }
    speak(hub, shared);
    let pulled = answers.recv_timeout(PULL_WAIT);
    lock(shared).forget_waiter();
    pulled.map_err(|wait| {
        anyhow!(
            "{wait}: the host did not answer within {} s; netdump list says when it was heard last",
            PULL_WAIT.as_secs()
        )
    })
}
