//! What a stream tells while it arrives: who crashed, the log, how far the pages have come, how it
//! ended.
//!
//! Pages are decoded here only to check them and to compute their digest, so that the client learns
//! at once that everything has arrived whole; writing them is the business of [`super::finish`], and
//! the log's that of [`super::log`].

use std::mem;
use std::net::{IpAddr, SocketAddr};

use proto::arming::text;
use proto::record::{
    self, BLOCK_BYTES, Block, CPU_CAPTURED, CPU_CRASHING, Cpu, Ending, HELLO_VERSION, Hello, Kind,
    Malformed, RamRange, Record, Tally, Totals, decode,
};
use proto::units::{PAGE_BYTES, Pfn};
use serde::{Deserialize, Serialize};

use crate::hardware::Arrived as Hardware;

/// Cuts a stream that arrives in pieces into records.
#[derive(Default)]
pub struct RecordStream {
    /// The begin of a record whose end has not arrived: less than the longest record.
    pending: Vec<u8>,
}

/// What the client has told, as `session.json` has it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Summary {
    /// Kernel release.
    pub kernel: String,
    /// Kernel version.
    pub kernel_version: String,
    /// Why the kernel died, in its own words.
    pub reason: String,
    /// The process that crashed.
    pub task: Task,
    /// CPUs online at the crash.
    pub cpus: u32,
    /// CPUs whose registers arrived.
    pub cpus_captured: u32,
    /// Seconds from boot to crash.
    pub uptime_seconds: u64,
    /// Filter level that the host demands.
    pub filter_demanded: u8,
    /// Pages of System RAM, as announced.
    pub ram_pages: u64,
    /// Pages that arrived.
    pub pages: Pages,
    /// The stream ended, and how.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<End>,
    /// Runs of pages that the dump path itself wrote after the crash: first pfn, pages, kind
    /// (docs/protocol.md).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub written: Vec<(u64, u32, u32)>,
}

impl Summary {
    /// Release and version of the kernel: which build it is.
    #[must_use]
    pub fn build(&self) -> String {
        format!("{} {}", self.kernel, self.kernel_version)
    }
}

/// The process that ran on the CPU that crashed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its name.
    pub comm: String,
    /// Its number.
    pub pid: i32,
    /// The CPU.
    pub cpu: u32,
}

/// Pages by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// With contents.
    pub data: u64,
    /// All zero.
    pub zero: u64,
    /// That could not be read.
    pub unreadable: u64,
    /// Left out by the filter.
    pub excluded: u64,
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// With all that was asked for.
    Complete,
    /// All but the rest of the State text.
    StateFaulted,
}

/// A stream as far as it has come.
pub struct Content {
    stream: RecordStream,
    summary: Summary,
    crash: Option<Crash>,
    packet_bytes: u16,
    totals: Option<Totals>,
    /// Over the pages that came by themselves.
    walk: Tally,
    pull: Option<PullUnderWay>,
    /// The pull whose pages somebody waits for.
    wanted: u32,
    text_bytes: usize,
    text_over: bool,
    /// State text that [`Self::take_state`] has not taken yet.
    state: Vec<u8>,
    state_bytes: usize,
    hardware: Hardware,
    /// Some of it arrived that [`Self::hardware_news`] has not told of.
    hardware_new: bool,
}

/// Which crash a stream is about. Two streams of different crashes are never put together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crash {
    /// The kernel's boot id.
    pub boot: [u8; 16],
    /// Pages of System RAM.
    pub ram_pages: u64,
    /// The servers that the host was armed for, by their place.
    pub servers: Vec<(usize, SocketAddr)>,
    /// The place of this one.
    pub server: usize,
}

/// The room that decoding a block needs: one for each thread that decodes.
pub type BlockRoom = [u8; BLOCK_BYTES];

/// What a push has brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct News {
    /// The first record arrived: it is known who crashed.
    pub hello: bool,
    /// The last record arrived.
    pub ended: bool,
    /// Pulls that were answered.
    pub pulled: Vec<Pulled>,
}

/// The answer to a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// Its number.
    pub number: u32,
    /// What was asked for.
    pub ranges: Vec<RamRange>,
    /// Counts and digest are those that the client computed. If not, its pages are not to be
    /// trusted.
    pub right: bool,
    /// What arrived.
    pub pages: Pages,
    /// The pages, if [`Content::want_pull`] asked for them.
    pub contents: Vec<Piece>,
}

/// Pages that were pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// First page.
    pub first: u64,
    /// How many.
    pub pages: u64,
    /// Their kind: [`Kind::Pages`] for pages with contents.
    pub kind: Kind,
    /// The contents, of pages that have some.
    pub bytes: Vec<u8>,
}

struct PullUnderWay {
    number: u32,
    ranges: Vec<RamRange>,
    tally: Tally,
    contents: Vec<Piece>,
}

/// Why a stream cannot be what a client of this version sends. The client is broken; its packets
/// are genuine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Bytes that are no record.
    Malformed(Malformed),
    /// The first record is no Hello.
    NoHello,
    /// A second Hello.
    SecondHello,
    /// A Hello of a version that this server does not read; the version is given.
    HelloVersion(u16),
    /// A record after the last one.
    AfterEnd,
    /// The begin or the end of a pull where there can be none; its number is given.
    NotPulled(u32),
}

impl RecordStream {
    /// Adds the stream's next bytes and calls `record` for each record that they complete. After an
    /// error the stream is useless.
    pub fn push<E: From<Malformed>>(
        &mut self,
        bytes: &[u8],
        mut record: impl FnMut(Record<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.pending.is_empty() {
            let consumed = each_record(bytes, &mut record)?;
            self.pending
                .extend_from_slice(bytes.get(consumed..).unwrap_or_default());
        } else {
            self.pending.extend_from_slice(bytes);
            let consumed = each_record(&self.pending, &mut record)?;
            self.pending.drain(..consumed);
        }
        Ok(())
    }
}

impl Content {
    /// A stream of which nothing has arrived.
    #[must_use]
    pub fn new() -> Self {
        Self {
            stream: RecordStream::default(),
            summary: Summary::default(),
            crash: None,
            packet_bytes: 0,
            totals: None,
            walk: Tally::new(),
            pull: None,
            wanted: 0,
            text_bytes: 0,
            text_over: false,
            state: Vec::new(),
            state_bytes: 0,
            hardware: Hardware::default(),
            hardware_new: false,
        }
    }

    /// Takes the stream's next bytes.
    pub fn push(&mut self, bytes: &[u8], room: &mut BlockRoom) -> Result<News, Fault> {
        let mut news = News::default();
        let mut stream = mem::take(&mut self.stream);
        let result = stream.push(bytes, |record| self.record(record, room, &mut news));
        self.stream = stream;
        result.map(|()| news)
    }

    /// What the client has told so far.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Which crash it is, once that is known.
    #[must_use]
    pub fn crash(&self) -> Option<&Crash> {
        self.crash.as_ref()
    }

    /// Stream bytes a full packet of this client carries; 0 before the Hello.
    #[must_use]
    pub fn packet_bytes(&self) -> u16 {
        self.packet_bytes
    }

    /// Bytes of the kernel's log so far.
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        self.text_bytes
    }

    /// Whether all of the kernel's log has arrived.
    #[must_use]
    pub fn text_over(&self) -> bool {
        self.text_over
    }

    /// The State text that arrived since the last call.
    pub fn take_state(&mut self) -> Vec<u8> {
        mem::take(&mut self.state)
    }

    /// The hardware state, if more of it arrived since the last call.
    pub fn hardware_news(&mut self) -> Option<&Hardware> {
        mem::take(&mut self.hardware_new).then_some(&self.hardware)
    }

    /// The contents of the pages of pull `number` are wanted.
    pub fn want_pull(&mut self, number: u32) {
        self.wanted = number;
    }

    /// Compares what arrived with what the client counted. `Err` says what differs.
    pub fn verify(&self) -> Result<(), String> {
        let Some(totals) = self.totals else {
            return Err("the client sent no totals".to_owned());
        };
        let walk = self.walk.totals();
        let (sent, arrived) = (Pages::of(&totals), Pages::of(&walk));
        if sent != arrived {
            return Err(format!("the client counted {sent:?}, {arrived:?} arrived"));
        }
        if walk.digest != totals.digest {
            return Err(format!(
                "the digest of the {} pages with contents is {:016x}, the client's is {:016x}",
                arrived.data, walk.digest, totals.digest
            ));
        }
        if arrived.total() != self.summary.ram_pages {
            return Err(format!(
                "{} pages of {} arrived",
                arrived.total(),
                self.summary.ram_pages
            ));
        }
        Ok(())
    }

    fn record(
        &mut self,
        record: Record<'_>,
        room: &mut BlockRoom,
        news: &mut News,
    ) -> Result<(), Fault> {
        if self.crash.is_none() && !matches!(record, Record::Hello(_)) {
            return Err(Fault::NoHello);
        }
        let pulled = self.pull.is_some() || matches!(record, Record::PullBegin { .. });
        if self.summary.ended.is_some() && !pulled {
            return Err(Fault::AfterEnd);
        }
        self.text_over |= !matches!(record, Record::Hello(_) | Record::Text { .. });
        match record {
            Record::Hello(hello) => {
                self.hello(hello)?;
                news.hello = true;
            }
            Record::Text { text, .. } => self.text_bytes += text.len(),
            Record::Registers(cpu) => self.cpu(cpu),
            Record::Notes(_) | Record::MemoryMap(_) => {}
            Record::Pages(block) => self.block(&block, room)?,
            Record::Run(run) => self.run(&run),
            Record::Totals(totals) => self.totals = Some(totals),
            Record::Written(ranges) => {
                self.summary.written = ranges
                    .iter()
                    .map(|range| (range.first.get(), range.pages.get(), range.kind.get()))
                    .collect();
            }
            Record::State { text, .. } => self.state(text),
            Record::Processor(processor) => {
                self.hardware.cpu(&processor);
                self.hardware_new = true;
            }
            Record::Devices { devices, .. } => {
                devices.for_each(|device| self.hardware.device(&device));
                self.hardware_new = true;
            }
            Record::PullBegin { number, ranges } => self.pull_begin(number, ranges)?,
            Record::PullEnd { number, totals } => news.pulled.push(self.pull_end(number, &totals)?),
            Record::End(ending) => {
                self.summary.ended = Some(match ending {
                    Ending::Complete => End::Complete,
                    Ending::StateFaulted => End::StateFaulted,
                });
                news.ended = true;
            }
        }
        Ok(())
    }

    fn hello(&mut self, hello: &Hello) -> Result<(), Fault> {
        if self.crash.is_some() {
            return Err(Fault::SecondHello);
        }
        if hello.version.get() != HELLO_VERSION {
            return Err(Fault::HelloVersion(hello.version.get()));
        }
        self.crash = Some(Crash::of(hello));
        self.packet_bytes = hello.packet_bytes.get();
        let comm = printable(&hello.comm);
        self.summary.kernel = printable(&hello.release);
        self.summary.kernel_version = printable(&hello.kernel_version);
        self.summary.reason = printable(&hello.reason);
        self.summary.task = Task {
            comm,
            pid: hello.pid.get(),
            cpu: hello.crashing_cpu.get(),
        };
        self.summary.cpus = hello.cpus.get();
        self.summary.uptime_seconds = hello.uptime_ns.get() / 1_000_000_000;
        self.summary.ram_pages = hello.ram_pages.get();
        // A level has five bits; more than a client of this version can demand is not taken.
        self.summary.filter_demanded = u8::try_from(hello.filter.get() & 31).unwrap_or(0);
        Ok(())
    }

    fn state(&mut self, piece: &[u8]) {
        let room = STATE_BYTES_MAX
            .saturating_sub(self.state_bytes)
            .min(piece.len());
        self.state_bytes += room;
        self.state.extend_from_slice(&piece[..room]);
    }

    fn cpu(&mut self, cpu: &Cpu) {
        let flags = cpu.flags.get();
        if flags & CPU_CAPTURED != 0 {
            self.summary.cpus_captured += 1;
        }
        if flags & CPU_CRASHING != 0 {
            self.summary.task = Task {
                comm: printable(&cpu.comm),
                pid: cpu.pid.get(),
                cpu: cpu.cpu.get(),
            };
        }
    }

    fn block(&mut self, block: &Block<'_>, room: &mut BlockRoom) -> Result<(), Fault> {
        let bytes = block.decode(room)?;
        let Some(pull) = &mut self.pull else {
            self.walk.block(block.first, bytes);
            self.summary.pages.data += u64::from(block.pages);
            return Ok(());
        };
        pull.tally.block(block.first, bytes);
        let (first, pages) = (block.first, u64::from(block.pages));
        pull.keep(self.wanted, first, pages, Kind::Pages, bytes);
        Ok(())
    }

    fn run(&mut self, run: &record::Run) {
        let Some(pull) = &mut self.pull else {
            self.walk.run(run);
            self.summary.pages.add(run.why, run.pages);
            return;
        };
        pull.tally.run(run);
        pull.keep(self.wanted, run.first, run.pages, run.why, &[]);
    }

    fn pull_begin(&mut self, number: u32, ranges: &[RamRange]) -> Result<(), Fault> {
        if self.pull.is_some() {
            return Err(Fault::NotPulled(number));
        }
        self.pull = Some(PullUnderWay {
            number,
            ranges: ranges.to_vec(),
            tally: Tally::new(),
            contents: Vec::new(),
        });
        Ok(())
    }

    fn pull_end(&mut self, number: u32, totals: &Totals) -> Result<Pulled, Fault> {
        let pull = self.pull.take();
        let pull = pull
            .filter(|pull| pull.number == number)
            .ok_or(Fault::NotPulled(number))?;
        let arrived = pull.tally.totals();
        Ok(Pulled {
            number,
            ranges: pull.ranges,
            right: arrived == *totals,
            pages: Pages::of(&arrived),
            contents: pull.contents,
        })
    }
}

impl PullUnderWay {
    /// Keeps pages that somebody waits for. What is beyond the bound was not asked for by us.
    fn keep(&mut self, wanted: u32, first: Pfn, pages: u64, kind: Kind, bytes: &[u8]) {
        let kept: usize = self.contents.iter().map(|piece| piece.bytes.len()).sum();
        let bounded = kept + bytes.len() <= PULLED_BYTES_MAX && self.contents.len() < PIECES_MAX;
        if self.number == wanted && bounded {
            self.contents.push(Piece {
                first: first.0,
                pages,
                kind,
                bytes: bytes.to_vec(),
            });
        }
    }
}

impl Crash {
    /// As the first record tells it.
    #[must_use]
    pub fn of(hello: &Hello) -> Self {
        let server = |(place, name): (usize, &record::ServerName)| {
            let [a, b, c, d, ..] = name.address;
            let address = match name.family.get() {
                4 => IpAddr::from([a, b, c, d]),
                6 => IpAddr::from(name.address),
                _ => return None,
            };
            Some((place, SocketAddr::new(address, name.port.get())))
        };
        Self {
            boot: hello.boot,
            ram_pages: hello.ram_pages.get(),
            servers: hello
                .servers
                .iter()
                .enumerate()
                .filter_map(server)
                .collect(),
            server: hello.server.get().into(),
        }
    }

    /// Whether `other` is the same death of the same host, told once more.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        (self.boot, self.ram_pages) == (other.boot, other.ram_pages)
    }
}

impl Default for Content {
    fn default() -> Self {
        Self::new()
    }
}

impl Pages {
    /// Pages of all kinds.
    #[must_use]
    pub fn total(&self) -> u64 {
        [self.zero, self.unreadable, self.excluded]
            .iter()
            .fold(self.data, |sum, &pages| sum.saturating_add(pages))
    }

    /// Counts pages of a kind.
    pub fn add(&mut self, kind: Kind, pages: u64) {
        let count = if kind == Kind::Unreadable {
            &mut self.unreadable
        } else if kind == Kind::Excluded {
            &mut self.excluded
        } else if kind == Kind::Zero {
            &mut self.zero
        } else {
            &mut self.data
        };
        *count = count.saturating_add(pages);
    }

    fn of(totals: &Totals) -> Self {
        Self {
            data: totals.data.get(),
            zero: totals.zero.get(),
            unreadable: totals.unreadable.get(),
            excluded: totals.excluded.get(),
        }
    }
}

impl From<Malformed> for Fault {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

/// Calls `record` with each whole record at the begin of `bytes`; returns how many bytes these
/// take.
fn each_record<E: From<Malformed>>(
    bytes: &[u8],
    record: &mut impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<usize, E> {
    let mut rest = bytes;
    while let Some(decoded) = decode(rest)? {
        record(decoded.record)?;
        rest = rest.get(decoded.bytes..).unwrap_or_default();
    }
    Ok(bytes.len() - rest.len())
}

/// A zero-padded field as text that is safe to print: control characters become spaces, wrong UTF-8
/// is marked.
fn printable(field: &[u8]) -> String {
    let length = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    let lossy = text(field).map_or_else(|| String::from_utf8_lossy(&field[..length]), Into::into);
    lossy
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect::<String>()
        .trim()
        .to_owned()
}

/// Bounds the State text in the log.
const STATE_BYTES_MAX: usize = 32 << 20;
/// Pages that one pull may bring back to a person.
pub const PULLED_PAGES_MAX: u64 = 4096;
const PULLED_BYTES_MAX: usize = 4096 * PAGE_BYTES;
const PIECES_MAX: usize = 8192;

#[cfg(test)]
mod tests {
    use proto::record::PageDigest;
    use proto::record::{Codec, header};
    use zerocopy::{FromZeros as _, IntoBytes as _};

    use super::*;

    fn record(kind: Kind, pages: u16, argument: u64, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap();
        let mut bytes = header(kind, Codec::Raw, pages, length, argument).to_vec();
        bytes.extend_from_slice(body);
        bytes
    }

    fn hello(version: u16) -> Vec<u8> {
        let mut hello = Hello::new_zeroed();
        hello.version = version.into();
        hello.ram_pages = 5.into();
        hello.reason[..9].copy_from_slice(b"bad\x1b[31m\n");
        record(Kind::Hello, 0, 0, hello.as_bytes())
    }

    fn totals(digest: u64) -> Vec<u8> {
        let totals = Totals {
            data: 1.into(),
            zero: 4.into(),
            digest: digest.into(),
            ..Totals::default()
        };
        record(Kind::Totals, 0, 0, totals.as_bytes())
    }

    /// A whole stream: one page with contents, four zero pages, two pieces of log, one of State.
    fn stream(digest: u64) -> Vec<u8> {
        let end = record(Kind::End, 0, Ending::Complete.to_wire(), &[]);
        let parts = [
            hello(HELLO_VERSION),
            record(Kind::Text, 0, 0, b"new\n"),
            record(Kind::Text, 0, 1, b"old\n"),
            record(Kind::Pages, 1, 7, &[9; PAGE_BYTES]),
            record(Kind::Zero, 0, 8, &4_u64.to_le_bytes()),
            totals(digest),
            record(Kind::State, 0, 0, b"state\n"),
            end,
        ];
        parts.concat()
    }

    fn right_digest() -> u64 {
        let mut digest = PageDigest::new();
        digest.block(Pfn(7), &[9; PAGE_BYTES]);
        digest.value()
    }

    fn pushed(stream: &[u8], piece: usize) -> (Content, News) {
        let (mut content, mut news) = (Content::new(), News::default());
        for bytes in stream.chunks(piece) {
            let more = content.push(bytes, &mut [0; BLOCK_BYTES]).unwrap();
            news.hello |= more.hello;
            news.ended |= more.ended;
        }
        (content, news)
    }

    #[test]
    fn a_stream_tells_the_same_however_it_is_cut() {
        let stream = stream(right_digest());
        for piece in [1, 2, 15, 16, 17, 1424, stream.len()] {
            let (mut content, news) = pushed(&stream, piece);
            assert_eq!(
                news,
                News {
                    hello: true,
                    ended: true,
                    pulled: Vec::new()
                }
            );
            assert_eq!(content.verify(), Ok(()), "pieces of {piece}");
            assert!(content.text_over());
            assert_eq!(content.text_bytes(), 8);
            assert_eq!(content.take_state(), b"state\n");
            assert_eq!(content.summary().reason, "bad [31m");
        }
    }

    #[test]
    fn a_wrong_digest_or_count_is_told() {
        let (content, _) = pushed(&stream(right_digest() ^ 1), 100);
        assert!(content.verify().unwrap_err().contains("digest"));
        let short = [hello(HELLO_VERSION), totals(right_digest())].concat();
        let (content, _) = pushed(&short, 100);
        assert!(content.verify().unwrap_err().contains("the client counted"));
        let (content, _) = pushed(&hello(HELLO_VERSION), 100);
        assert_eq!(content.verify().unwrap_err(), "the client sent no totals");
    }

    #[test]
    fn what_no_client_sends_is_a_fault() {
        let check = |bytes: &[u8], fault| {
            assert_eq!(
                Content::new().push(bytes, &mut [0; BLOCK_BYTES]),
                Err(fault)
            );
        };
        check(&record(Kind::Text, 0, 0, b"x"), Fault::NoHello);
        check(&hello(99), Fault::HelloVersion(99));
        check(
            &[hello(HELLO_VERSION), hello(HELLO_VERSION)].concat(),
            Fault::SecondHello,
        );
        check(&[0xff; 16], Fault::Malformed(Malformed::Kind(0xff)));
        let after = [stream(right_digest()), record(Kind::Notes, 0, 0, b"")].concat();
        check(&after, Fault::AfterEnd);
        let body = Totals::default();
        let end = record(Kind::PullEnd, 0, 3, body.as_bytes());
        check(&[hello(HELLO_VERSION), end].concat(), Fault::NotPulled(3));
    }

    #[test]
    fn a_pull_counts_for_itself_even_after_the_end() {
        let range = RamRange {
            first: 7.into(),
            pages: 3.into(),
        };
        let totals = Totals {
            data: 1.into(),
            unreadable: 2.into(),
            digest: right_digest().into(),
            ..Totals::default()
        };
        let pull = [
            record(Kind::PullBegin, 0, 5, [range].as_bytes()),
            record(Kind::Pages, 1, 7, &[9; PAGE_BYTES]),
            record(Kind::Unreadable, 0, 8, &2_u64.to_le_bytes()),
            record(Kind::PullEnd, 0, 5, totals.as_bytes()),
        ]
        .concat();
        let (mut content, _) = pushed(&stream(right_digest()), 100);
        content.want_pull(5);
        let mut news = content.push(&pull, &mut [0; BLOCK_BYTES]).unwrap();
        let pulled = news.pulled.remove(0);
        assert!(pulled.right);
        assert_eq!((pulled.number, pulled.pages.total()), (5, 3));
        assert_eq!(pulled.contents[0].bytes, [9; PAGE_BYTES]);
        assert_eq!(pulled.contents[1].kind, Kind::Unreadable);
        assert_eq!(content.verify(), Ok(()));
    }
}
