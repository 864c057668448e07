//! The reference model of one crash at one server: what its streams have told, over all attempts,
//! checked record by record against what the host's memory really holds.

mod pull;

use std::collections::BTreeMap;

use proto::client::Pass;
use proto::record::{self, BLOCK_BYTES, Ending, Kind, RamRange, Record, Run, Tally, Totals};
use proto::units::{PAGE_BYTES, Pfn};
use zerocopy::IntoBytes;

use crate::host::{self, LOG, NOTES, STATE};
use crate::memory::{Content, Memory};
use crate::model::pull::Answer;

/// What a record begins with takes 16 bytes; with the longest body this is what may wait.
const PENDING_BYTES_MAX: usize = record::RECORD_HEADER_BYTES + record::BODY_BYTES_MAX;

/// What is known of one crash.
#[derive(Clone)]
pub struct Model {
    memory: Memory,
    cpus: u64,
    /// Whether the host may be taken at its word; what a hostile one sends is only decoded.
    honest: bool,
    /// Pages that are known, from any attempt.
    pages: BTreeMap<Pfn, Kind>,
    /// The pulls that were asked for, by number.
    asked: BTreeMap<u32, Vec<RamRange>>,
    /// The largest number of a pull whose answer has arrived.
    pub answered: u32,
    /// Pulls that were answered.
    pub pulls_answered: u64,
    attempt: Attempt,
}

/// What the stream of one attempt has told.
#[derive(Clone, Default)]
struct Attempt {
    pending: Vec<u8>,
    hello: bool,
    map: bool,
    text: Vec<(u64, Vec<u8>)>,
    state: Vec<u8>,
    registers: u64,
    walked: BTreeMap<Pfn, Kind>,
    rest_begun: bool,
    tally: Tally,
    told: Option<Totals>,
    pull: Option<Answer>,
    last_pull: u32,
    ending: Option<Ending>,
}

/// What is wrong with a stream.
#[derive(Clone, Debug)]
pub enum Wrong {
    /// A client that holds the key sends what no client may.
    Stream(String),
    /// What a host that is to be trusted said is not so.
    Untrue(String),
}

impl Model {
    /// A crash of which nothing has arrived.
    #[must_use]
    pub fn new(memory: Memory, cpus: u64, honest: bool) -> Self {
        Self {
            memory,
            cpus,
            honest,
            pages: BTreeMap::new(),
            asked: BTreeMap::new(),
            answered: 0,
            pulls_answered: 0,
            attempt: Attempt::default(),
        }
    }

    /// Another attempt begins. What is known of pages stays known.
    pub fn start_over(&mut self) {
        self.attempt = Attempt::default();
    }

    /// Pull `number` is asked for.
    pub fn ask(&mut self, number: u32, ranges: Vec<RamRange>) {
        self.asked.insert(number, ranges);
    }

    /// Whether the first record has arrived.
    #[must_use]
    pub const fn hello(&self) -> bool {
        self.attempt.hello
    }

    /// Whether the memory map has arrived.
    #[must_use]
    pub const fn map(&self) -> bool {
        self.attempt.map
    }

    /// How the stream ended.
    #[must_use]
    pub const fn ending(&self) -> Option<Ending> {
        self.attempt.ending
    }

    /// Pages of System RAM that are not known.
    pub fn missing(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.memory
            .pfns()
            .filter(|pfn| !self.pages.contains_key(pfn))
    }

    /// Whether anything is known of any page.
    #[must_use]
    pub fn has_pages(&self) -> bool {
        !self.pages.is_empty()
    }

    /// Takes the stream's next bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Wrong> {
        let mut pending = std::mem::take(&mut self.attempt.pending);
        pending.extend_from_slice(bytes);
        let mut rest = &pending[..];
        while let Some(decoded) =
            record::decode(rest).map_err(|malformed| Wrong::Stream(format!("{malformed:?}")))?
        {
            self.record(decoded.record)?;
            rest = &rest[decoded.bytes..];
        }
        if rest.len() > PENDING_BYTES_MAX {
            return Err(Wrong::Untrue(format!(
                "{} bytes wait for the end of a record",
                rest.len()
            )));
        }
        self.attempt.pending = rest.to_vec();
        Ok(())
    }

    fn record(&mut self, record: Record<'_>) -> Result<(), Wrong> {
        let attempt = &mut self.attempt;
        if attempt.ending.is_some()
            && !matches!(record, Record::PullBegin { .. })
            && attempt.pull.is_none()
        {
            return Err(Wrong::Stream("a record follows the end".into()));
        }
        if attempt.hello == matches!(record, Record::Hello(_)) {
            return Err(Wrong::Stream("a stream begins with its only hello".into()));
        }
        match record {
            Record::Hello(_) => attempt.hello = true,
            Record::Text { piece, text } => attempt.text.push((piece, text.to_vec())),
            Record::Registers(cpu) => {
                let expected = u32::try_from(attempt.registers).unwrap_or(0);
                attempt.registers += 1;
                let right = cpu.as_bytes() == host::cpu(expected).as_bytes();
                self.expect(right, || format!("CPU {expected} has other registers"))?;
            }
            Record::Notes(notes) => {
                self.expect(notes == NOTES.as_bytes(), || "the notes are others".into())?;
            }
            Record::MemoryMap(map) => {
                attempt.map = true;
                self.expect(map == self.memory.ranges(), || {
                    "the memory map is another".into()
                })?;
            }
            // Its hosts have no hardware.
            Record::Written(_) | Record::Processor(_) | Record::Devices { .. } => {}
            Record::Pages(block) => {
                let mut out = [0; BLOCK_BYTES];
                let pages = block
                    .decode(&mut out)
                    .map_err(|malformed| Wrong::Stream(format!("{malformed:?}")))?;
                self.block(block.first, pages)?;
            }
            Record::Run(run) => self.run(run)?,
            Record::Totals(totals) => attempt.told = Some(totals),
            Record::State { text, .. } => attempt.state.extend_from_slice(text),
            Record::End(ending) => attempt.ending = Some(ending),
            Record::PullBegin { number, ranges } => self.begin_pull(number, ranges)?,
            Record::PullEnd { number, totals } => self.end_pull(number, totals)?,
        }
        Ok(())
    }

    fn begin_pull(&mut self, number: u32, ranges: &[RamRange]) -> Result<(), Wrong> {
        let known = self
            .asked
            .get(&number)
            .is_some_and(|asked| &asked[..] == ranges);
        if !known || number <= self.attempt.last_pull || self.attempt.pull.is_some() {
            return Err(Wrong::Stream(format!("pull {number} was not asked for")));
        }
        self.attempt.last_pull = number;
        self.attempt.pull = Some(Answer::new(number, ranges.to_vec()));
        Ok(())
    }

    fn end_pull(&mut self, number: u32, totals: Totals) -> Result<(), Wrong> {
        let answer = self.attempt.pull.take();
        let Some(answer) = answer.filter(|answer| answer.number() == number) else {
            return Err(Wrong::Stream(format!("pull {number} ends without a begin")));
        };
        self.answered = self.answered.max(number);
        self.pulls_answered += 1;
        let end = answer.end(totals);
        self.expect(end.is_ok(), || end.err().unwrap_or_default())
    }

    fn block(&mut self, first: Pfn, pages: &[u8]) -> Result<(), Wrong> {
        match &mut self.attempt.pull {
            Some(answer) => answer.tally.block(first, pages),
            None => self.attempt.tally.block(first, pages),
        }
        if !self.honest {
            return Ok(());
        }
        for (pfn, page) in (first.0..).map(Pfn).zip(pages.chunks(PAGE_BYTES)) {
            if self.memory.page(pfn).is_none_or(|right| right != page) {
                return Err(Wrong::Untrue(format!("{pfn:?} came with other bytes")));
            }
            self.account(pfn, 1, Kind::Pages)?;
        }
        Ok(())
    }

    fn run(&mut self, run: Run) -> Result<(), Wrong> {
        match &mut self.attempt.pull {
            Some(answer) => answer.tally.run(&run),
            None => self.attempt.tally.run(&run),
        }
        if !self.honest {
            return Ok(());
        }
        let end = run.first.plus(run.pages);
        // Runs outside System RAM may be as long as the address space; only its pages are looked at.
        let mut in_ram = 0;
        for pfn in self.memory.pfns_between(run.first, end) {
            in_ram += 1;
            let content = self.memory.content(pfn);
            let right = (run.why == Kind::Zero && content == Content::Zero)
                || (run.why == Kind::Unreadable && content == Content::Unreadable)
                || (run.why == Kind::Excluded && self.memory.excluded(pfn, u8::MAX));
            if !right {
                let why = run.why;
                return Err(Wrong::Untrue(format!(
                    "{pfn:?} is {content:?} and was told as {why:?}"
                )));
            }
        }
        if in_ram < run.pages && (run.why != Kind::Unreadable || self.attempt.pull.is_none()) {
            return Err(Wrong::Untrue(format!("{run:?} is not System RAM")));
        }
        self.account(run.first, run.pages, run.why)
    }

    /// Books pages that were told, as part of a pull or of the walk.
    fn account(&mut self, first: Pfn, pages: u64, kind: Kind) -> Result<(), Wrong> {
        if let Some(answer) = &mut self.attempt.pull {
            answer.told(first, pages).map_err(Wrong::Untrue)?;
        }
        let walking = self.attempt.pull.is_none();
        let end = first.plus(pages);
        for pfn in self.memory.pfns_between(first, end) {
            if walking {
                let rest = self.memory.pass(pfn) == Pass::Rest;
                if self.attempt.rest_begun && !rest && kind == Kind::Pages {
                    return Err(Wrong::Untrue(format!("precious {pfn:?} came late")));
                }
                self.attempt.rest_begun |= rest;
                if self.attempt.walked.insert(pfn, kind).is_some() {
                    return Err(Wrong::Untrue(format!("{pfn:?} came twice")));
                }
            }
            self.pages.insert(pfn, kind);
        }
        Ok(())
    }

    fn expect(&self, right: bool, wrong: impl FnOnce() -> String) -> Result<(), Wrong> {
        if right || !self.honest {
            return Ok(());
        }
        Err(Wrong::Untrue(wrong()))
    }

    /// Whether everything has come: all pages too if `pages`.
    pub fn judge(&self, pages: bool) -> Result<(), String> {
        let attempt = &self.attempt;
        let mut text = attempt.text.clone();
        text.sort_by_key(|(piece, _)| std::cmp::Reverse(*piece));
        let text: Vec<u8> = text.into_iter().flat_map(|(_, text)| text).collect();
        let state = match attempt.ending {
            Some(Ending::Complete) => STATE.concat(),
            _ => String::new(),
        };
        let checks = [
            (text == LOG.concat().as_bytes(), "the log is not the host's"),
            (attempt.registers == self.cpus, "registers are missing"),
            (attempt.ending.is_some(), "the end is missing"),
            (
                attempt.state == state.as_bytes(),
                "the State text is not the host's",
            ),
        ];
        if let Some((_, wrong)) = checks.iter().find(|(right, _)| !right) {
            return Err((*wrong).into());
        }
        if let Some(told) = attempt.told
            && told != attempt.tally.totals()
        {
            let counted = attempt.tally.totals();
            return Err(format!("totals told {told:?}, counted {counted:?}"));
        }
        match self.missing().next().filter(|_| pages) {
            Some(missing) => Err(format!("{missing:?} is missing")),
            None => Ok(()),
        }
    }
}
