//! Records: the typed pieces of the stream, their encoding, and the decoder that turns stream bytes
//! into them.
//!
//! ```text
//!  byte 0      1       2        4         8                16
//!       +------+-------+--------+---------+----------------+----------------+
//!       | kind | codec | pages  | length  | argument       | body (length)  |
//!       +------+-------+--------+---------+----------------+----------------+
//! ```
//! All integers are little-endian. Records follow each other without padding. What the argument is
//! depends on the kind: a pfn, a CPU, a piece number, or nothing (then zero).

use lz4_flex::block::decompress_into;
use xxhash_rust::xxh64::xxh64;
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::arming::{Address, SERVERS_MAX};
use crate::hardware::{Devices, Processor};
use crate::reply::PULL_RANGES_MAX;
use crate::units::{PAGE_BYTES, Pfn};

/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = size_of::<RawRecord>();
// The sizes that docs/protocol.md draws.
const _: () = assert!(RECORD_HEADER_BYTES == 16);
const _: () = assert!(size_of::<Hello>() == 712);
const _: () = assert!(size_of::<Cpu>() == 256);
/// Pages encoded together at most.
pub const BLOCK_PAGES: usize = 16;
/// Bytes of a full block before encoding.
pub const BLOCK_BYTES: usize = BLOCK_PAGES * PAGE_BYTES;
/// The longest body a record may have. A block that LZ4 does not shrink is sent raw, so nothing is
/// longer.
pub const BODY_BYTES_MAX: usize = BLOCK_BYTES;
/// Ranges of System RAM a memory map may hold.
pub const RAM_RANGES_MAX: usize = 512;
/// Pages of System RAM a memory map may hold: 64 TiB. A server keeps two bits for each.
pub const RAM_PAGES_MAX: u64 = 1 << 34;
/// Ranges that a list of written pages may hold.
pub const WRITTEN_RANGES_MAX: usize = 1024;
/// CPUs whose registers a session may carry.
pub const CPUS_MAX: u32 = 8192;
/// The largest page frame number: 52 bits of physical address.
pub const PFN_MAX: u64 = (1 << 40) - 1;

/// What a record is. The numbers are those of the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// Who crashed, of what, under which kernel: [`Hello`]. Always the first record of a stream,
    /// and only there.
    Hello = 1,
    /// A piece of the kernel log up to the crash. Argument: piece number, 0 the newest; later
    /// pieces are older.
    Text = 2,
    /// One CPU: [`Cpu`]. Argument: the CPU's number.
    Registers = 3,
    /// VMCOREINFO as the kernel has it: lines of text.
    Notes = 4,
    /// Ranges of System RAM: [`RamRange`]s, ascending and disjoint. All pages of all of them are
    /// accounted for in the stream, as one of the next four kinds.
    MemoryMap = 5,
    /// A block: `pages` pages from the argument's pfn on, raw or LZ4-compressed together.
    Pages = 6,
    /// Pages that are all zero. Argument: first pfn. Body: their number, 8 bytes.
    Zero = 7,
    /// Pages that could not be read (hardware error, offline, hole). As `Zero`.
    Unreadable = 8,
    /// Pages that were left out by the filter. As `Zero`.
    Excluded = 9,
    /// All pages are sent: [`Totals`].
    Totals = 10,
    /// Pages that the dump path itself writes, so that they may differ from what they held at the
    /// crash: [`WrittenRange`]s.
    Written = 11,
    /// A piece of task and memory state as text. Argument: piece number, ascending.
    State = 12,
    /// Nothing follows. Argument: the [`Ending`].
    End = 13,
    /// The pages of a pull follow, as `Pages`, `Zero`, `Unreadable` and `Excluded`, up to its
    /// `PullEnd`. Argument: the pull's number. Body: the [`RamRange`]s that were asked for.
    PullBegin = 14,
    /// The pull's pages are sent. Argument: its number. Body: [`Totals`] over them.
    PullEnd = 15,
    /// What a reboot destroys of one CPU: [`Processor`]. Argument: the CPU's number. Only for a
    /// server that says that it knows hardware state.
    Processor = 16,
    /// Configuration spaces of PCI devices: [`Devices`]. Argument: piece number, ascending. Only for
    /// such a server.
    Devices = 17,
}

impl Kind {
    const fn from_wire(kind: u8) -> Option<Self> {
        Some(match kind {
            1 => Self::Hello,
            2 => Self::Text,
            3 => Self::Registers,
            4 => Self::Notes,
            5 => Self::MemoryMap,
            6 => Self::Pages,
            7 => Self::Zero,
            8 => Self::Unreadable,
            9 => Self::Excluded,
            10 => Self::Totals,
            11 => Self::Written,
            12 => Self::State,
            13 => Self::End,
            14 => Self::PullBegin,
            15 => Self::PullEnd,
            16 => Self::Processor,
            17 => Self::Devices,
            _ => return None,
        })
    }
}

/// How a block's body is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 0,
    /// One LZ4 block (the block format, no frame).
    Lz4 = 1,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With all that was asked for.
    Complete,
    /// The kernel faulted while it wrote the State text; everything before it is whole.
    StateFaulted,
}

impl Ending {
    /// The record's argument for this ending.
    #[must_use]
    pub const fn to_wire(self) -> u64 {
        match self {
            Self::Complete => 0,
            Self::StateFaulted => 1,
        }
    }

    const fn from_wire(argument: u64) -> Option<Self> {
        match argument {
            0 => Some(Self::Complete),
            1 => Some(Self::StateFaulted),
            _ => None,
        }
    }
}

/// Who crashed, of what. Text fields are zero-padded; what did not fit is cut.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Hello {
    /// Version of the record formats: [`HELLO_VERSION`].
    pub version: U16,
    /// Architecture: 1 x86-64.
    pub arch: U16,
    /// Bytes a page has.
    pub page_bytes: U32,
    /// CPUs online at the crash.
    pub cpus: U32,
    /// The CPU that crashed.
    pub crashing_cpu: U32,
    /// The process that ran on it.
    pub pid: I32,
    /// Transmit buffers of the client, which is also the most packets it has in flight.
    pub pool_slots: U16,
    /// Stream bytes a full packet carries.
    pub packet_bytes: U16,
    /// Pages of System RAM.
    pub ram_pages: U64,
    /// Nanoseconds since boot.
    pub uptime_ns: U64,
    /// Seconds since 1970 by the host's clock.
    pub unix_seconds: U64,
    /// Virtual address of the direct map's begin (`page_offset_base`).
    pub page_offset: U64,
    /// Physical address of the kernel image less its link address (`phys_base`).
    pub phys_base: U64,
    /// First page of the kernel image.
    pub image_pfn: U64,
    /// Pages of the kernel image.
    pub image_pages: U64,
    /// The servers that the host was armed for, in its order.
    pub servers: [ServerName; SERVERS_MAX],
    /// The one of them that this session is with.
    pub server: U16,
    /// Filter level that the host demands: pages of these kinds are never sent, whatever the
    /// verdict says.
    pub filter: U16,
    /// Zero.
    pub reserved: U32,
    /// The kernel's boot id.
    pub boot: [u8; 16],
    /// Name of the process that crashed.
    pub comm: [u8; 16],
    /// The host's name.
    pub host: [u8; 64],
    /// Kernel release, as `uname -r`.
    pub release: [u8; 64],
    /// Kernel version, as `uname -v`.
    pub kernel_version: [u8; 128],
    /// Why the kernel died, in its own words.
    pub reason: [u8; 256],
}

/// Where a server listens.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(C)]
pub struct ServerName {
    /// 4 or 6; 0 when there is none.
    pub family: U16,
    /// UDP port.
    pub port: U16,
    /// Its address; an IPv4 address comes first and zeros follow.
    pub address: [u8; 16],
}

impl ServerName {
    /// The name of the server at `address` and `port`.
    #[must_use]
    pub const fn new(address: Address, port: u16) -> Self {
        let (family, address) = match address {
            Address::V4([a, b, c, d]) => (4, [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            Address::V6(address) => (6, address),
        };
        Self {
            family: U16::new(family),
            port: U16::new(port),
            address,
        }
    }
}

/// Version of the record formats that this crate speaks.
pub const HELLO_VERSION: u16 = 1;
/// `Hello::arch` of x86-64.
pub const ARCH_X86_64: u16 = 1;

/// Registers of one CPU.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Cpu {
    /// The CPU's number.
    pub cpu: U32,
    /// [`CPU_CRASHING`] | [`CPU_CAPTURED`].
    pub flags: U32,
    /// The process that ran on it.
    pub pid: I32,
    /// Zero.
    pub reserved: U32,
    /// Address of its `task_struct`.
    pub task: U64,
    /// Its name.
    pub comm: [u8; 16],
    /// General registers in the order of the kernel's `user_regs_struct` (r15 ... gs). Valid if
    /// captured.
    pub registers: [U64; 27],
}

/// This CPU crashed.
pub const CPU_CRASHING: u32 = 1;
/// This CPU's registers were captured.
pub const CPU_CAPTURED: u32 = 2;

/// A range of System RAM.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(C)]
pub struct RamRange {
    /// First page.
    pub first: U64,
    /// Number of pages, at least one.
    pub pages: U64,
}

/// A range of pages that the dump path itself writes.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(C)]
pub struct WrittenRange {
    /// First page.
    pub first: U64,
    /// Number of pages.
    pub pages: U32,
    /// What they are: 1 module, 2 transmit pool, 3 page reserve, 4 stacks, 5 per-CPU data, 6 log
    /// buffer, 7 network device, 8 other.
    pub kind: U32,
}

/// Counts over all pages of a stream, and their digest.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(C)]
pub struct Totals {
    /// Pages sent in blocks.
    pub data: U64,
    /// Zero pages.
    pub zero: U64,
    /// Unreadable pages.
    pub unreadable: U64,
    /// Excluded pages.
    pub excluded: U64,
    /// [`PageDigest`] over all blocks.
    pub digest: U64,
}

/// Digest over the contents of all blocks: 0 before the first, then for each block in stream order
/// XXH64 over its pages before compression, seeded with the digest so far XOR its first pfn.
/// Packets are authenticated one by one; this one proves that compression, storage and
/// decompression were faithful from the host's memory to the vmcore.
#[derive(Clone, Copy, Default)]
pub struct PageDigest(u64);

impl PageDigest {
    /// The digest of nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self(0)
    }

    /// Adds a block of raw `pages` that begins at `first`.
    pub fn block(&mut self, first: Pfn, pages: &[u8]) {
        self.0 = xxh64(pages, self.0 ^ first.0);
    }

    /// The digest of all blocks so far.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }
}

/// What was sent of a walk or a pull: counts and digest.
#[derive(Clone, Copy, Default)]
pub struct Tally {
    totals: Totals,
    digest: PageDigest,
}

impl Tally {
    /// Nothing was sent.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            totals: Totals {
                data: U64::ZERO,
                zero: U64::ZERO,
                unreadable: U64::ZERO,
                excluded: U64::ZERO,
                digest: U64::ZERO,
            },
            digest: PageDigest::new(),
        }
    }

    /// Adds a block of raw `pages` that begins at `first`.
    pub fn block(&mut self, first: Pfn, pages: &[u8]) {
        self.digest.block(first, pages);
        let count = u64::try_from(pages.len() >> 12).unwrap_or(0);
        self.totals.data = self.totals.data.get().saturating_add(count).into();
    }

    /// Adds a run.
    pub fn run(&mut self, run: &Run) {
        let total = if run.why == Kind::Zero {
            &mut self.totals.zero
        } else if run.why == Kind::Unreadable {
            &mut self.totals.unreadable
        } else {
            &mut self.totals.excluded
        };
        *total = total.get().saturating_add(run.pages).into();
    }

    /// Counts and digest as they go over the wire.
    #[must_use]
    pub fn totals(&self) -> Totals {
        Totals {
            digest: self.digest.value().into(),
            ..self.totals
        }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    kind: u8,
    codec: u8,
    pages: U16,
    length: U32,
    argument: U64,
}

/// The header that goes before a body of `length` bytes. `pages` and `codec` have a meaning for
/// blocks only.
#[must_use]
pub fn header(
    kind: Kind,
    codec: Codec,
    pages: u16,
    length: u32,
    argument: u64,
) -> [u8; RECORD_HEADER_BYTES] {
    let raw = RawRecord {
        kind: kind_number(kind),
        codec: codec_number(codec),
        pages: pages.into(),
        length: length.into(),
        argument: argument.into(),
    };
    zerocopy::transmute!(raw)
}

#[expect(
    clippy::as_conversions,
    reason = "the discriminants of a repr(u8) enum are its wire numbers"
)]
const fn kind_number(kind: Kind) -> u8 {
    kind as u8
}

#[expect(
    clippy::as_conversions,
    reason = "the discriminants of a repr(u8) enum are its wire numbers"
)]
const fn codec_number(codec: Codec) -> u8 {
    codec as u8
}

/// A legal record. Borrowed parts live in the decoder's input.
#[derive(Clone, Copy)]
pub enum Record<'a> {
    /// See [`Kind::Hello`].
    Hello(&'a Hello),
    /// See [`Kind::Text`].
    Text {
        /// 0 is the newest piece.
        piece: u64,
        /// Bytes of the log.
        text: &'a [u8],
    },
    /// See [`Kind::Registers`].
    Registers(&'a Cpu),
    /// See [`Kind::Notes`].
    Notes(&'a [u8]),
    /// See [`Kind::MemoryMap`].
    MemoryMap(&'a [RamRange]),
    /// See [`Kind::Pages`].
    Pages(Block<'a>),
    /// Pages without contents, and why.
    Run(Run),
    /// See [`Kind::Totals`].
    Totals(Totals),
    /// See [`Kind::Written`].
    Written(&'a [WrittenRange]),
    /// See [`Kind::State`].
    State {
        /// Ascending from 0.
        piece: u64,
        /// Bytes of text.
        text: &'a [u8],
    },
    /// See [`Kind::End`].
    End(Ending),
    /// See [`Kind::PullBegin`].
    PullBegin {
        /// The pull's number.
        number: u32,
        /// What was asked for.
        ranges: &'a [RamRange],
    },
    /// See [`Kind::PullEnd`].
    PullEnd {
        /// The pull's number.
        number: u32,
        /// Over the pull's pages.
        totals: Totals,
    },
    /// See [`Kind::Processor`].
    Processor(Processor<'a>),
    /// See [`Kind::Devices`].
    Devices {
        /// Ascending from 0.
        piece: u64,
        /// The devices.
        devices: Devices<'a>,
    },
}

/// A block as it was sent.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    /// First page.
    pub first: Pfn,
    /// Pages in the block: 1 to [`BLOCK_PAGES`].
    pub pages: u16,
    /// How `body` is encoded.
    pub codec: Codec,
    /// The encoded pages.
    pub body: &'a [u8],
}

impl Block<'_> {
    /// Decodes the block into `out` and returns the pages, `pages * PAGE_BYTES` bytes.
    pub fn decode<'o>(&self, out: &'o mut [u8; BLOCK_BYTES]) -> Result<&'o [u8], Malformed> {
        let bytes = usize::from(self.pages).saturating_mul(PAGE_BYTES);
        let wrong = Malformed::Block {
            first: self.first,
            body: self.body.len(),
        };
        let out = out.get_mut(..bytes).ok_or(wrong)?;
        match self.codec {
            Codec::Raw if self.body.len() == bytes => out.copy_from_slice(self.body),
            Codec::Raw => return Err(wrong),
            Codec::Lz4 => {
                if decompress_into(self.body, out).ok() != Some(bytes) {
                    return Err(wrong);
                }
            }
        }
        Ok(out)
    }
}

/// Pages without contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First page.
    pub first: Pfn,
    /// How many, at least one.
    pub pages: u64,
    /// Why they have none: [`Kind::Zero`], [`Kind::Unreadable`] or [`Kind::Excluded`].
    pub why: Kind,
}

/// Why stream bytes are no record: the client that sealed them is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The argument is out of its bounds.
    Argument {
        /// Kind on the wire.
        kind: u8,
        /// The argument.
        argument: u64,
    },
    /// A block whose body does not decode to its pages.
    Block {
        /// First page.
        first: Pfn,
        /// Bytes of the body.
        body: usize,
    },
    /// A codec this version does not know.
    Codec(u8),
    /// A kind this version does not know.
    Kind(u8),
    /// The body's length does not fit the kind.
    Length {
        /// Kind on the wire.
        kind: u8,
        /// The length.
        length: u32,
    },
    /// A block with no page or more than [`BLOCK_PAGES`].
    PageCount(u16),
}

/// Where in the stream a record lies, and what it is.
#[derive(Clone, Copy)]
pub struct Decoded<'a> {
    /// The record.
    pub record: Record<'a>,
    /// Bytes it takes, header included.
    pub bytes: usize,
}

/// Reads the record at the begin of `stream`. `Ok(None)` means that more bytes are needed.
pub fn decode(stream: &[u8]) -> Result<Option<Decoded<'_>>, Malformed> {
    let Ok((raw, rest)) = RawRecord::ref_from_prefix(stream) else {
        return Ok(None);
    };
    let kind = Kind::from_wire(raw.kind).ok_or(Malformed::Kind(raw.kind))?;
    let too_long = Malformed::Length {
        kind: raw.kind,
        length: raw.length.get(),
    };
    let length = usize::try_from(raw.length.get()).or(Err(too_long))?;
    if length > BODY_BYTES_MAX {
        return Err(too_long);
    }
    let Some(body) = rest.get(..length) else {
        return Ok(None);
    };
    let record = raw.record(kind, body)?;
    Ok(Some(Decoded {
        record,
        bytes: RECORD_HEADER_BYTES.saturating_add(length),
    }))
}

impl RawRecord {
    fn record<'a>(&self, kind: Kind, body: &'a [u8]) -> Result<Record<'a>, Malformed> {
        let argument = self.argument.get();
        let length = self.length_wrong();
        Ok(match kind {
            Kind::Hello => Record::Hello(Hello::ref_from_bytes(body).or(Err(length))?),
            Kind::Text => Record::Text {
                piece: argument,
                text: body,
            },
            Kind::Registers => Record::Registers(self.cpu(body)?),
            Kind::Notes => Record::Notes(body),
            Kind::MemoryMap => Record::MemoryMap(ram_map(body).ok_or(length)?),
            Kind::Pages => Record::Pages(self.block(body)?),
            Kind::Zero | Kind::Unreadable | Kind::Excluded => Record::Run(self.run(kind, body)?),
            Kind::Totals => Record::Totals(Totals::read_from_bytes(body).or(Err(length))?),
            Kind::Written => {
                let ranges = <[WrittenRange]>::ref_from_bytes(body).or(Err(length))?;
                if ranges.len() > WRITTEN_RANGES_MAX {
                    return Err(length);
                }
                Record::Written(ranges)
            }
            Kind::State => Record::State {
                piece: argument,
                text: body,
            },
            Kind::End if !body.is_empty() => return Err(length),
            Kind::End => {
                Record::End(Ending::from_wire(argument).ok_or_else(|| self.argument_wrong())?)
            }
            Kind::PullBegin => {
                let ranges = <[RamRange]>::ref_from_bytes(body).or(Err(length))?;
                if ranges.len() > PULL_RANGES_MAX {
                    return Err(length);
                }
                let number = self.pull_number()?;
                Record::PullBegin { number, ranges }
            }
            Kind::PullEnd => Record::PullEnd {
                number: self.pull_number()?,
                totals: Totals::read_from_bytes(body).or(Err(length))?,
            },
            Kind::Processor => Record::Processor(self.processor(body)?),
            Kind::Devices => Record::Devices {
                piece: argument,
                devices: Devices::decode(body).ok_or(length)?,
            },
        })
    }

    fn cpu<'a>(&self, body: &'a [u8]) -> Result<&'a Cpu, Malformed> {
        let cpu = Cpu::ref_from_bytes(body)
            .ok()
            .ok_or_else(|| self.length_wrong())?;
        let number = cpu.cpu.get();
        if number >= CPUS_MAX || u64::from(number) != self.argument.get() {
            return Err(self.argument_wrong());
        }
        Ok(cpu)
    }

    fn processor<'a>(&self, body: &'a [u8]) -> Result<Processor<'a>, Malformed> {
        let processor = Processor::decode(body).ok_or_else(|| self.length_wrong())?;
        if processor.cpu >= CPUS_MAX || u64::from(processor.cpu) != self.argument.get() {
            return Err(self.argument_wrong());
        }
        Ok(processor)
    }

    fn block<'a>(&self, body: &'a [u8]) -> Result<Block<'a>, Malformed> {
        let pages = self.pages.get();
        if pages == 0 || usize::from(pages) > BLOCK_PAGES {
            return Err(Malformed::PageCount(pages));
        }
        let first = self.argument.get();
        if first.saturating_add(u64::from(pages)) > PFN_MAX {
            return Err(self.argument_wrong());
        }
        let codec = match self.codec {
            0 => Codec::Raw,
            1 => Codec::Lz4,
            other => return Err(Malformed::Codec(other)),
        };
        Ok(Block {
            first: Pfn(first),
            pages,
            codec,
            body,
        })
    }

    fn run(&self, why: Kind, body: &[u8]) -> Result<Run, Malformed> {
        let pages = U64::read_from_bytes(body)
            .ok()
            .ok_or_else(|| self.length_wrong())?
            .get();
        let first = self.argument.get();
        if pages == 0 || first.saturating_add(pages) > PFN_MAX {
            return Err(self.argument_wrong());
        }
        Ok(Run {
            first: Pfn(first),
            pages,
            why,
        })
    }

    fn pull_number(&self) -> Result<u32, Malformed> {
        u32::try_from(self.argument.get())
            .ok()
            .ok_or_else(|| self.argument_wrong())
    }

    fn length_wrong(&self) -> Malformed {
        Malformed::Length {
            kind: self.kind,
            length: self.length.get(),
        }
    }

    fn argument_wrong(&self) -> Malformed {
        Malformed::Argument {
            kind: self.kind,
            argument: self.argument.get(),
        }
    }
}

/// The memory map in `body`, if it is legal: at least one range, ascending, disjoint, inside
/// [`PFN_MAX`].
#[must_use]
pub fn ram_map(body: &[u8]) -> Option<&[RamRange]> {
    let ranges = <[RamRange]>::ref_from_bytes(body).ok()?;
    let mut end = 0;
    let mut pages = 0_u64;
    for range in ranges {
        if range.pages.get() == 0 || range.first.get() < end {
            return None;
        }
        end = range.first.get().checked_add(range.pages.get())?;
        pages = pages.saturating_add(range.pages.get());
    }
    let bounded = ranges.len() <= RAM_RANGES_MAX && end <= PFN_MAX && pages <= RAM_PAGES_MAX;
    (!ranges.is_empty() && bounded).then_some(ranges)
}
