//! The simulated server: the server engine, and a reference model that knows what must come.

use std::collections::BTreeMap;

use proto::client::Pass;
use proto::record::{self, BLOCK_BYTES, Ending, Kind, PageDigest, Record, Run, Totals};
use proto::reply::{Action, REPLY_BYTES_MAX, Verdict};
use proto::server::{Hold, Session};
use proto::time::Instant;
use proto::units::{PAGE_BYTES, PacketNumber, Pfn};
use proto::wire::{Header, Kind as Packet};
use zerocopy::IntoBytes;

use crate::host::{self, LOG, SESSION, STATE};
use crate::memory::{Content, Memory};
use crate::options::Options;

/// Packets that wait for their turn.
#[derive(Default)]
struct Waiting {
    packets: BTreeMap<PacketNumber, Vec<u8>>,
    most: usize,
}

impl Hold for Waiting {
    fn keep(&mut self, number: PacketNumber, bytes: &[u8]) -> bool {
        self.packets.insert(number, bytes.to_vec());
        self.most = self.most.max(self.packets.len());
        true
    }

    fn release<R>(&mut self, number: PacketNumber, with: impl FnOnce(&[u8]) -> R) -> Option<R> {
        self.packets.remove(&number).map(|bytes| with(&bytes))
    }
}

/// What the stream has told so far, checked against what the host's memory really holds.
struct Model {
    memory: Memory,
    cpus: u32,
    stream: Vec<u8>,
    hello: bool,
    text: Vec<(u64, Vec<u8>)>,
    state: Vec<u8>,
    registers: u32,
    pages: BTreeMap<Pfn, Kind>,
    rest_begun: bool,
    totals: Totals,
    digest: PageDigest,
    told: Option<Totals>,
    ending: Option<Ending>,
}

/// A server.
pub struct Server {
    session: Option<Session>,
    waiting: Waiting,
    model: Model,
    options: Options,
    /// What it tells every crash.
    pub verdict: Verdict,
    /// Replies made, refusals met.
    pub refused: u64,
}

impl Server {
    /// A server that knows the session's key and, as a reference, the host's memory.
    #[must_use]
    pub fn new(options: &Options, memory: Memory) -> Self {
        let model = Model {
            memory,
            cpus: options.cpus,
            stream: Vec::new(),
            hello: false,
            text: Vec::new(),
            state: Vec::new(),
            registers: 0,
            pages: BTreeMap::new(),
            rest_begun: false,
            totals: Totals::default(),
            digest: PageDigest::new(),
            told: None,
            ending: None,
        };
        Self {
            session: None,
            waiting: Waiting::default(),
            model,
            options: *options,
            verdict: Verdict::Full { filter: 0 },
            refused: 0,
        }
    }

    /// The engine, once a session has begun.
    #[must_use]
    pub fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    /// The most packets that ever waited for their turn.
    #[must_use]
    pub fn most_waiting(&self) -> usize {
        self.waiting.most
    }

    /// Takes a datagram.
    pub fn receive(&mut self, now_us: u64, mut bytes: Vec<u8>) -> Result<(), String> {
        let Ok(header) = Header::parse(&bytes) else {
            self.refused += 1;
            return Ok(());
        };
        let fresh = self.session.is_none();
        if fresh && header.kind == Packet::First && header.session == SESSION {
            let (first, attempt) = (header.number, header.attempt);
            let mut session = Session::new(SESSION, host::keys(), [4; 16], attempt, first, first);
            session.set_credit(self.options.credit);
            self.session = Some(session);
        }
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        let stream = &mut self.model.stream;
        let now = Instant::from_micros(now_us);
        let mut deliver = |bytes: &[u8]| stream.extend_from_slice(bytes);
        let taken = session.handle(now, &mut bytes, &mut self.waiting, &mut deliver);
        if taken.is_err() {
            self.refused += 1;
            if fresh {
                self.session = None;
            }
            return Ok(());
        }
        self.model.decode()?;
        if self.model.hello {
            session.set_verdict(self.verdict);
        }
        if self.model.ending.is_some() || self.verdict == Verdict::Nothing {
            session.set_action(Action::Reboot);
        }
        Ok(())
    }

    /// When it wants to reply.
    #[must_use]
    pub fn reply_at_us(&self) -> Option<u64> {
        self.session.as_ref()?.reply_at().map(Instant::as_micros)
    }

    /// Makes the reply.
    pub fn reply(&mut self, now_us: u64) -> Option<Vec<u8>> {
        let mut out = [0; REPLY_BYTES_MAX];
        let length = self
            .session
            .as_mut()?
            .reply(Instant::from_micros(now_us), &mut out)?;
        Some(out[..length].to_vec())
    }

    /// Whether all that the verdict asked for has come, and nothing else.
    pub fn judge(&self) -> Result<(), String> {
        self.model.judge(self.verdict)
    }

    /// How the stream ended.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.model.ending
    }
}

impl Model {
    fn decode(&mut self) -> Result<(), String> {
        let stream = std::mem::take(&mut self.stream);
        let mut rest = &stream[..];
        while let Some(decoded) =
            record::decode(rest).map_err(|malformed| format!("the stream has {malformed:?}"))?
        {
            self.record(decoded.record)?;
            rest = &rest[decoded.bytes..];
        }
        self.stream = rest.to_vec();
        Ok(())
    }

    fn record(&mut self, record: Record<'_>) -> Result<(), String> {
        if self.ending.is_some() {
            return Err("a record follows the end".into());
        }
        if self.hello == matches!(record, Record::Hello(_)) {
            return Err("a stream begins with its only hello".into());
        }
        match record {
            Record::Hello(_) => self.hello = true,
            Record::Text { piece, text } => self.text.push((piece, text.to_vec())),
            Record::Registers(cpu) => {
                if cpu.as_bytes() != host::cpu(self.registers).as_bytes() {
                    return Err(format!("CPU {} came with other registers", self.registers));
                }
                self.registers += 1;
            }
            Record::Notes(notes) if notes != b"OSRELEASE=simulated\n" => {
                return Err("the notes are not the host's".into());
            }
            Record::MemoryMap(map) if map != self.memory.ranges() => {
                return Err("the memory map is not the host's".into());
            }
            Record::Notes(_) | Record::MemoryMap(_) | Record::Written(_) => {}
            Record::Pages(block) => {
                let mut out = [0; BLOCK_BYTES];
                let pages = block
                    .decode(&mut out)
                    .map_err(|malformed| format!("{malformed:?}"))?;
                self.digest.block(block.first, pages);
                for (pfn, page) in (block.first.0..).map(Pfn).zip(pages.chunks(PAGE_BYTES)) {
                    self.page(pfn, page)?;
                }
            }
            Record::Run(run) => self.run(run)?,
            Record::Totals(totals) => self.told = Some(totals),
            Record::State { text, .. } => self.state.extend_from_slice(text),
            Record::End(ending) => self.ending = Some(ending),
            Record::PullBegin { .. } | Record::PullEnd { .. } => {
                return Err("nothing was pulled".into());
            }
        }
        Ok(())
    }

    fn page(&mut self, pfn: Pfn, bytes: &[u8]) -> Result<(), String> {
        if self.memory.page(pfn).is_none_or(|page| page != bytes) {
            return Err(format!("{pfn:?} arrived with other bytes than the host's"));
        }
        self.account(pfn, Kind::Pages)
    }

    fn run(&mut self, run: Run) -> Result<(), String> {
        for pfn in (run.first.0..)
            .map(Pfn)
            .take(usize::try_from(run.pages).unwrap_or(0))
        {
            let content = self.memory.content(pfn);
            let right = (run.why == Kind::Zero && content == Content::Zero)
                || (run.why == Kind::Unreadable && content == Content::Unreadable);
            if !right {
                return Err(format!(
                    "{pfn:?} is {content:?} and was told as {:?}",
                    run.why
                ));
            }
            self.account(pfn, run.why)?;
        }
        Ok(())
    }

    fn account(&mut self, pfn: Pfn, kind: Kind) -> Result<(), String> {
        let rest = self.memory.pass(pfn) == Pass::Rest;
        if self.rest_begun && !rest && kind == Kind::Pages {
            return Err(format!("precious {pfn:?} came after ordinary pages"));
        }
        self.rest_begun |= rest;
        if self.pages.insert(pfn, kind).is_some() {
            return Err(format!("{pfn:?} came twice"));
        }
        let total = if kind == Kind::Pages {
            &mut self.totals.data
        } else if kind == Kind::Zero {
            &mut self.totals.zero
        } else {
            &mut self.totals.unreadable
        };
        *total = (total.get() + 1).into();
        Ok(())
    }

    fn judge(&self, verdict: Verdict) -> Result<(), String> {
        let mut text = self.text.clone();
        text.sort_by_key(|(piece, _)| std::cmp::Reverse(*piece));
        let text: Vec<u8> = text.into_iter().flat_map(|(_, text)| text).collect();
        let full = matches!(verdict, Verdict::Full { .. });
        let expected_state = match self.ending {
            Some(Ending::Complete) => STATE.concat(),
            _ => String::new(),
        };
        let checks = [
            (text == LOG.concat().as_bytes(), "the log is not the host's"),
            (self.registers == self.cpus, "registers are missing"),
            (self.ending.is_some(), "the end is missing"),
            (
                self.state == expected_state.as_bytes(),
                "the State text is not the host's",
            ),
            (
                self.told.is_some() == full,
                "totals came without pages, or pages without totals",
            ),
        ];
        if let Some((_, wrong)) = checks.iter().find(|(right, _)| !right) {
            return Err((*wrong).into());
        }
        let Some(told) = self.told else { return Ok(()) };
        if let Some(missing) = self.memory.pfns().find(|pfn| !self.pages.contains_key(pfn)) {
            return Err(format!("{missing:?} is missing"));
        }
        let counted = Totals {
            digest: self.digest.value().into(),
            ..self.totals
        };
        if told != counted {
            return Err(format!("totals told {told:?}, counted {counted:?}"));
        }
        Ok(())
    }
}
