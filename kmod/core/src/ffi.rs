//! The C boundary: the other half of `abi.h`. Every function turns pointers into references once
//! and calls safe code.
//!
//! # Safety
//! The shim calls these functions from one thread at a time (under `rtnl_lock` while the host is
//! healthy, from the one CPU that runs after the crash), never from inside each other, and with
//! pointers that are valid for what the parameter's type or length says. After a fault inside one
//! of them it calls none of them again.

use core::cell::UnsafeCell;
use core::slice;

use proto::arming::{Address, MESSAGE_BYTES, STATUS_BYTES, Status};
use proto::client::{PageStatus, Pass, SLOTS_MAX, Want};
use proto::console::{Caller, Clock, RecordHead, Ring, RingRead};
use proto::record::{
    BLOCK_BYTES, BLOCK_PAGES, Cpu, RAM_RANGES_MAX, RamRange, WRITTEN_RANGES_MAX, WrittenRange,
};
use proto::reply::Action;
use proto::time::Instant;
use zerocopy::IntoBytes as _;

use crate::console::{Console, Dying, Lane, LastWords, Todo};
use crate::driver::{Crash, Driver, Frames, Next, blank_hello};

const TEXT_BYTES: usize = 160;

const COMMAND_ARM: u32 = 0;
const COMMAND_DISARM: u32 = 1;
const COMMAND_REFUSED: u32 = 2;

const STEP_SEND: u32 = 0;
const STEP_TEXT: u32 = 1;
const STEP_REGISTERS: u32 = 2;
const STEP_NOTES: u32 = 3;
const STEP_MEMORY_MAP: u32 = 4;
const STEP_WRITTEN: u32 = 5;
const STEP_STATE: u32 = 6;
const STEP_PROCESSOR: u32 = 7;
const STEP_DEVICES: u32 = 8;
const STEP_PAGES: u32 = 9;
const STEP_WAIT: u32 = 10;
const STEP_FINISHED: u32 = 11;

const LANE_SEALED: u32 = 0;
const LANE_SYSLOG: u32 = 1;

const RING_RECORD: u32 = 0;
const RING_NOT_YET: u32 = 1;
const RING_OVERWRITTEN: u32 = 2;

const PAGE_READ: u8 = 0;
const PAGE_OTHER_PASS: u8 = 1;
const PAGE_EXCLUDED: u8 = 3;

/// `struct nd_arming`.
#[repr(C)]
struct NdArming {
    ifindex: u32,
    frame_bytes_max: u32,
    packet_bytes_max: u32,
    keep_user: u32,
    dumps: u32,
    kdump_first: u32,
    kdump_last: u32,
}

/// `struct nd_status`.
#[repr(C)]
struct NdStatus {
    armed_unix_seconds: u64,
    ram_pages: u64,
    module_bytes: u64,
    pool_bytes: u64,
    other_bytes: u64,
    state: u32,
    ifindex: u32,
    pool_slots: u32,
    ram_ranges: u32,
    cpus: u32,
    reserved: u32,
    device: [u8; 16],
    driver: [u8; 32],
    message: [u8; TEXT_BYTES],
}

/// `struct nd_crash`.
#[repr(C)]
struct NdCrash {
    ram_pages: u64,
    uptime_ns: u64,
    unix_seconds: u64,
    page_offset: u64,
    phys_base: u64,
    image_pfn: u64,
    image_pages: u64,
    cpus: u32,
    crashing_cpu: u32,
    pid: i32,
    pool_slots: u16,
    mac: [u8; 6],
    comm: [u8; 16],
    release: [u8; 64],
    version: [u8; 128],
    reason: [u8; 256],
}

/// `struct nd_step`.
#[derive(Default)]
#[repr(C)]
struct NdStep {
    kind: u32,
    slot: u32,
    a: u64,
    b: u64,
    filter: u32,
    reserved: u32,
}

/// `struct nd_way`.
#[repr(C)]
struct NdWay {
    family: u16,
    port: u16,
    ifindex: u32,
    address: [u8; 16],
}

/// `struct nd_dying`.
#[repr(C)]
struct NdDying {
    acked: u64,
    syslog_next: u64,
    pool_slots: u16,
    mac: [u8; 6],
    are_all: u64,
}

/// `struct nd_record`.
#[derive(Default)]
#[repr(C)]
struct NdRecord {
    time_us: u64,
    caller: u32,
    text: u32,
    dictionary: u32,
    level: u8,
    facility: u8,
    continued: u8,
    reserved: u8,
}

/// `struct nd_clock`.
#[repr(C)]
struct NdClock {
    now: u64,
    kernel_us: u64,
    unix_us: u64,
}

impl NdClock {
    const fn now(&self) -> Instant {
        Instant::from_micros(self.now)
    }

    const fn clock(&self) -> Clock {
        Clock {
            kernel_us: self.kernel_us,
            unix_us: self.unix_us,
        }
    }
}

// What abi.h asserts on its side.
const _: () = assert!(size_of::<NdRecord>() == 24);
const _: () = assert!(size_of::<NdWay>() == 24);
const _: () = assert!(size_of::<NdDying>() == 32);
const _: () = assert!(size_of::<NdClock>() == 24);
const _: () = assert!(size_of::<NdArming>() == 28);
const _: () = assert!(size_of::<NdStatus>() == 272);
const _: () = assert!(size_of::<NdCrash>() == 544);
const _: () = assert!(size_of::<NdStep>() == 32);
const _: () = assert!(size_of::<Cpu>() == 256);
const _: () = assert!(size_of::<RamRange>() == 16);
const _: () = assert!(size_of::<WrittenRange>() == 16);
const _: () = assert!(MESSAGE_BYTES == 872);
const _: () = assert!(STATUS_BYTES == 364);
const _: () = assert!(BLOCK_BYTES == 65536);
const _: () = assert!(BLOCK_PAGES == 16);
const _: () = assert!(SLOTS_MAX == 2048);
const _: () = assert!(RAM_RANGES_MAX == 512);
const _: () = assert!(WRITTEN_RANGES_MAX == 1024);

/// The one driver.
struct Shared(UnsafeCell<Driver>);

// SAFETY: only the exported functions touch it, and the shim calls them from one thread at a time
// (module's contract).
unsafe impl Sync for Shared {}

static DRIVER: Shared = Shared(UnsafeCell::new(Driver::new()));

fn driver() -> &'static mut Driver {
    // SAFETY: each exported function calls this once, and by the module's contract none runs while
    // another does, so this reference is the only one until that function returns.
    unsafe { &mut *DRIVER.0.get() }
}

/// The console's two lives. The shim's thread has the first; it is not running when another thread
/// opens or closes it. The CPU that runs after the crash has the second.
struct SharedConsole(UnsafeCell<Console>);
struct SharedLastWords(UnsafeCell<LastWords>);

// SAFETY: only the exported functions touch it, one at a time (module's contract for each of them).
unsafe impl Sync for SharedConsole {}
// SAFETY: as above.
unsafe impl Sync for SharedLastWords {}

static CONSOLE: SharedConsole = SharedConsole(UnsafeCell::new(Console::new()));
static LAST_WORDS: SharedLastWords = SharedLastWords(UnsafeCell::new(LastWords::new()));

fn console() -> &'static mut Console {
    // SAFETY: each exported function calls this once, and none that does runs while another does.
    unsafe { &mut *CONSOLE.0.get() }
}

fn last_words() -> &'static mut LastWords {
    // SAFETY: each exported function calls this once, and all that do run on the crashing CPU.
    unsafe { &mut *LAST_WORDS.0.get() }
}

unsafe extern "C" {
    /// The oldest record in the kernel's ring buffer.
    fn nd_ring_oldest() -> u64;
    /// Reads a record; an `nd_ring_read`.
    fn nd_ring_read(sequence: u64, room: *mut u8, bytes: usize, record: &mut NdRecord) -> u32;
    /// The buffer of a slot, or null; see `abi.h`.
    fn nd_frame(slot: u32) -> *mut u8;
    /// How long the buffers are.
    fn nd_frame_bytes() -> usize;
    /// Does not exist. If this reference survives linking, something in the core can panic.
    fn nd_core_panicked();
}

/// The shim's buffers.
struct ShimFrames;

impl Frames for ShimFrames {
    fn frame(&mut self, slot: u16) -> Option<&mut [u8]> {
        // SAFETY: the function takes any number.
        let frame = unsafe { nd_frame(slot.into()) };
        // SAFETY: the function has no preconditions.
        let bytes = unsafe { nd_frame_bytes() };
        if frame.is_null() {
            return None;
        }
        // SAFETY: the shim keeps the frame of `bytes` bytes for this alone, the device gets copies;
        // the borrow ends before the shim runs again.
        Some(unsafe { slice::from_raw_parts_mut(frame, bytes) })
    }
}

/// The kernel's ring buffer, as the shim reads it.
struct ShimRing;

impl Ring for ShimRing {
    fn oldest(&mut self) -> u64 {
        // SAFETY: the function has no preconditions.
        unsafe { nd_ring_oldest() }
    }

    fn read(&mut self, sequence: u64, room: &mut [u8]) -> RingRead {
        let mut record = NdRecord::default();
        // SAFETY: the function writes to `room` at most the bytes it has.
        let read = unsafe { nd_ring_read(sequence, room.as_mut_ptr(), room.len(), &mut record) };
        match read {
            RING_RECORD => RingRead::Record {
                head: RecordHead {
                    time_us: record.time_us,
                    level: record.level,
                    facility: record.facility,
                    caller: Caller::from_kernel(record.caller),
                    continued: record.continued != 0,
                    cut: false,
                },
                text: usize::try_from(record.text).unwrap_or(0),
                dictionary: usize::try_from(record.dictionary).unwrap_or(0),
            },
            RING_NOT_YET => RingRead::NotYet,
            RING_OVERWRITTEN => RingRead::Overwritten,
            _ => RingRead::Unreadable,
        }
    }
}

/// See [`Console::open`]; returns [`Console::buffer_bytes`], 0 if nothing is to be sent.
#[unsafe(no_mangle)]
extern "C" fn nd_core_console_open(now: u64) -> usize {
    let (console, arming) = (console(), driver().arming());
    let opened = arming.is_some_and(|arming| console.open(Instant::from_micros(now), arming));
    if opened { console.buffer_bytes() } else { 0 }
}

/// See [`Console::close`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_console_close() {
    console().close();
}

/// Where the messages of the arming go; false if there is no such lane.
#[unsafe(no_mangle)]
extern "C" fn nd_core_console_way(lane: u32, way: &mut NdWay) -> bool {
    let Some(arming) = driver().arming() else {
        return false;
    };
    let server = if lane == LANE_SEALED {
        let server = arming.servers.iter().flatten().next();
        server.filter(|_| arming.console.keys.is_some())
    } else {
        arming.console.syslog.as_ref().map(|(_, way)| way)
    };
    let Some(server) = server else {
        return false;
    };
    way.port = server.remote_port;
    way.ifindex = arming.ifindex;
    match server.remote {
        Address::V4([a, b, c, d]) => {
            way.family = 4;
            way.address = [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        }
        Address::V6(address) => {
            way.family = 6;
            way.address = address;
        }
    }
    true
}

/// See [`Console::poll`]: `slot` of the step is the lane.
///
/// # Safety
/// The module's contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn nd_core_console_poll(
    clock: &NdClock,
    buffer: *mut u8,
    bytes: usize,
    step: &mut NdStep,
) {
    // SAFETY: the shim gives its buffer of `bytes` bytes, which nobody else uses meanwhile.
    let buffer = unsafe { slice::from_raw_parts_mut(buffer, bytes) };
    *step = match console().poll(clock.now(), clock.clock(), &mut ShimRing, buffer) {
        Todo::Send(lane, bytes) => NdStep {
            kind: STEP_SEND,
            slot: lane_number(lane),
            a: u64::try_from(bytes).unwrap_or(0),
            ..NdStep::default()
        },
        Todo::Sleep(until) => NdStep {
            kind: STEP_WAIT,
            a: until.as_micros(),
            ..NdStep::default()
        },
    };
}

/// See [`Console::received`].
///
/// # Safety
/// The module's contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn nd_core_console_received(now: u64, datagram: *mut u8, bytes: usize) {
    // SAFETY: the shim gives what it received, `bytes` bytes, which nobody else uses meanwhile.
    let datagram = unsafe { slice::from_raw_parts_mut(datagram, bytes) };
    console().received(Instant::from_micros(now), datagram);
}

/// See [`Console::acked`] and [`Console::syslog_next`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_console_sent(acked: &mut u64, syslog_next: &mut u64) {
    let console = console();
    *acked = console.acked();
    *syslog_next = console.syslog_next();
}

/// See [`LastWords::start`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_last_words(now: u64, dying: &NdDying) {
    if let Some(arming) = driver().arming() {
        let are_all = dying.are_all != 0;
        let dying = Dying {
            mac: dying.mac,
            pool_slots: dying.pool_slots,
            acked: dying.acked,
            syslog_next: dying.syslog_next,
        };
        last_words().start(Instant::from_micros(now), arming, &dying, are_all);
    }
}

/// See [`LastWords::step`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_last_words_step(clock: &NdClock, step: &mut NdStep) {
    let mut frames = ShimFrames;
    let next = last_words().step(clock.now(), clock.clock(), &mut ShimRing, &mut frames);
    *step = c_step(next);
}

/// See [`LastWords::received`].
///
/// # Safety
/// The module's contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn nd_core_last_words_frame(now: u64, frame: *mut u8, bytes: usize) {
    // SAFETY: the shim gives its receive buffer, which holds `bytes` bytes and is not used by
    // anybody else meanwhile.
    let frame = unsafe { slice::from_raw_parts_mut(frame, bytes) };
    last_words().received(Instant::from_micros(now), frame);
}

const fn lane_number(lane: Lane) -> u32 {
    match lane {
        Lane::Sealed => LANE_SEALED,
        Lane::Syslog => LANE_SYSLOG,
    }
}

/// See [`Driver::bench`].
#[cfg(feature = "bench")]
#[unsafe(no_mangle)]
extern "C" fn nd_core_bench(slot: u32, number: u64, sealed: bool) -> u32 {
    let slot = u16::try_from(slot).unwrap_or(0);
    u32::try_from(driver().bench(&mut ShimFrames, slot, number, sealed)).unwrap_or(0)
}

/// See [`Driver::bench_payload`].
#[cfg(feature = "bench")]
#[unsafe(no_mangle)]
extern "C" fn nd_core_bench_payload() -> u32 {
    driver().bench_payload().into()
}

/// See [`Driver::accept`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_accept() {
    driver().accept();
}

/// Takes a message; see [`Driver::command`].
///
/// # Safety
/// The module's contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn nd_core_command(
    message: *const u8,
    bytes: usize,
    arming: &mut NdArming,
    text: &mut [u8; TEXT_BYTES],
) -> u32 {
    // SAFETY: the shim gives a message of `bytes` bytes.
    let message = unsafe { slice::from_raw_parts(message, bytes) };
    match driver().command(message) {
        Ok(Some(needs)) => {
            arming.ifindex = needs.ifindex;
            arming.frame_bytes_max = u32::try_from(needs.frame_bytes).unwrap_or(u32::MAX);
            arming.packet_bytes_max = u32::try_from(needs.packet_bytes).unwrap_or(u32::MAX);
            arming.keep_user = needs.keep_user.into();
            arming.dumps = needs.dumps.into();
            arming.kdump_first = needs.kdump_first.into();
            arming.kdump_last = needs.kdump_last.into();
            COMMAND_ARM
        }
        Ok(None) => COMMAND_DISARM,
        Err(why) => {
            for (to, from) in text.iter_mut().zip(why.bytes()) {
                *to = from;
            }
            COMMAND_REFUSED
        }
    }
}

/// See [`Driver::disarm`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_disarm() {
    driver().disarm();
}

/// See [`Driver::filled`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_filled(now: u64, bytes: usize) {
    driver().filled(Instant::from_micros(now), bytes);
}

/// See [`Driver::received`].
///
/// # Safety
/// The module's contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn nd_core_frame(now: u64, frame: *mut u8, bytes: usize) {
    // SAFETY: the shim gives its receive buffer, which holds `bytes` bytes and is not used by
    // anybody else meanwhile.
    let frame = unsafe { slice::from_raw_parts_mut(frame, bytes) };
    driver().received(Instant::from_micros(now), frame);
}

/// See [`Driver::pages`].
///
/// # Safety
/// The module's contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn nd_core_pages(now: u64, pages: *const u8, count: usize) {
    // SAFETY: the shim gives `count` statuses.
    let pages = unsafe { slice::from_raw_parts(pages, count) };
    let mut statuses = [PageStatus::Unreadable; BLOCK_PAGES];
    for (status, &page) in statuses.iter_mut().zip(pages) {
        *status = page_status(page);
    }
    let count = count.min(BLOCK_PAGES);
    if let Some(statuses) = statuses.get(..count) {
        driver().pages(Instant::from_micros(now), statuses);
    }
}

/// See [`Driver::run`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_run(now: u64, pages: u64, page: u8) {
    driver().run(Instant::from_micros(now), pages, page_status(page));
}

/// `enum nd_page`.
const fn page_status(page: u8) -> PageStatus {
    match page {
        PAGE_READ => PageStatus::Read,
        PAGE_OTHER_PASS => PageStatus::OtherPass,
        PAGE_EXCLUDED => PageStatus::Excluded,
        _ => PageStatus::Unreadable,
    }
}

/// See [`Driver::scratch`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_scratch() -> *mut u8 {
    driver().scratch().as_mut_ptr()
}

/// See [`Driver::start`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_start(now: u64, crash: &NdCrash) {
    let mut hello = blank_hello();
    hello.cpus = crash.cpus.into();
    hello.crashing_cpu = crash.crashing_cpu.into();
    hello.pid = crash.pid.into();
    hello.ram_pages = crash.ram_pages.into();
    hello.uptime_ns = crash.uptime_ns.into();
    hello.unix_seconds = crash.unix_seconds.into();
    hello.page_offset = crash.page_offset.into();
    hello.phys_base = crash.phys_base.into();
    hello.image_pfn = crash.image_pfn.into();
    hello.image_pages = crash.image_pages.into();
    hello.comm = crash.comm;
    hello.release = crash.release;
    hello.kernel_version = crash.version;
    hello.reason = crash.reason;
    let crash = Crash {
        hello,
        pool_slots: crash.pool_slots,
        mac: crash.mac,
    };
    driver().start(Instant::from_micros(now), &crash);
}

/// See [`Driver::state_faulted`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_state_faulted() {
    driver().state_faulted();
}

/// The status as user space gets it.
#[unsafe(no_mangle)]
extern "C" fn nd_core_status(from: &NdStatus, to: &mut [u8; STATUS_BYTES]) {
    let mut status = Status::idle();
    status.state = u16::try_from(from.state).unwrap_or(u16::MAX).into();
    status.ifindex = from.ifindex.into();
    status.pool_slots = from.pool_slots.into();
    status.armed_unix_seconds = from.armed_unix_seconds.into();
    status.ram_pages = from.ram_pages.into();
    status.ram_ranges = from.ram_ranges.into();
    status.cpus = from.cpus.into();
    status.module_bytes = from.module_bytes.into();
    status.pool_bytes = from.pool_bytes.into();
    status.other_bytes = from.other_bytes.into();
    status.device = from.device;
    status.driver = from.driver;
    status.message = from.message;
    driver().status(&mut status);
    to.copy_from_slice(status.as_bytes());
}

/// See [`Driver::step`].
#[unsafe(no_mangle)]
extern "C" fn nd_core_step(now: u64, step: &mut NdStep) {
    *step = c_step(driver().step(Instant::from_micros(now), &mut ShimFrames));
}

fn c_step(next: Next) -> NdStep {
    match next {
        Next::Send { slot, bytes, more } => NdStep {
            kind: STEP_SEND,
            slot: slot.into(),
            a: u64::try_from(bytes).unwrap_or(0),
            b: more.into(),
            ..NdStep::default()
        },
        Next::Read { want, from_start } => read_step(want, from_start),
        Next::Wait(until) => NdStep {
            kind: STEP_WAIT,
            a: until.as_micros(),
            ..NdStep::default()
        },
        Next::Finished(action) => NdStep {
            kind: STEP_FINISHED,
            a: action_number(action),
            ..NdStep::default()
        },
    }
}

fn read_step(want: Want, from_start: bool) -> NdStep {
    let step = |kind, a| NdStep {
        kind,
        a,
        ..NdStep::default()
    };
    match want {
        Want::Text => step(STEP_TEXT, from_start.into()),
        Want::Registers(index) => step(STEP_REGISTERS, index.into()),
        Want::Notes => step(STEP_NOTES, 0),
        Want::MemoryMap => step(STEP_MEMORY_MAP, 0),
        Want::Written => step(STEP_WRITTEN, 0),
        Want::Processor(index) => step(STEP_PROCESSOR, index.into()),
        Want::Devices => step(STEP_DEVICES, from_start.into()),
        Want::State => step(STEP_STATE, from_start.into()),
        Want::Pages {
            first,
            count,
            pass,
            filter,
        } => NdStep {
            slot: pass_number(pass),
            b: count.into(),
            filter: filter.into(),
            ..step(STEP_PAGES, first.0)
        },
    }
}

/// `enum nd_pass`.
const fn pass_number(pass: Pass) -> u32 {
    match pass {
        Pass::Precious => 0,
        Pass::Rest => 1,
        Pass::Both => 2,
    }
}

const fn action_number(action: Action) -> u64 {
    match action {
        Action::None => 0,
        Action::Reboot => 1,
        Action::Halt => 2,
        Action::Stay => 3,
    }
}

/// Never linked in: see [`nd_core_panicked`].
#[panic_handler]
fn panicked(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: never called: a module that holds this reference does not load.
    unsafe { nd_core_panicked() };
    loop {}
}
