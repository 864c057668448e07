//! The thread that puts datagrams into order and into their hosts' logs.
//!
//! It takes all that waits, pass by pass: the busier the hosts, the larger the passes, and the fewer
//! writes a line. A disk that is full stops it; then the inbox fills, and only what does not fit
//! there is lost, and counted.

mod sealed;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use netconsole::{Counts, Note, Room};

use self::sealed::Boots;
use super::host::Host;
use super::inbox::{Letters, now_us};
use super::pass::{Pass, Piece};
use super::{Console, Tally};
use crate::serve::events::Events;
use crate::serve::hub::Hub;
use crate::serve::registry::lock;

/// See the module's documentation.
pub(super) struct Writer<'a> {
    hub: &'a Hub,
    console: &'a Console,
    events: &'a Events,
    by_address: HashMap<IpAddr, u32>,
    hosts: Vec<Host>,
    boots: Boots,
    pass: Pass,
    room: Room,
    tally: Tally,
    /// What the hosts' own counts add up to.
    shared: Counts,
    /// When the pass began.
    now_us: u64,
    /// Hosts whose streams wait for something.
    waiting: Vec<u32>,
    /// Hosts with an open file, the one opened first at the front.
    open: VecDeque<u32>,
    open_max: usize,
    sync: SyncSender<File>,
}

/// Writes logs until the server ends, and then what is left.
pub fn run(hub: &Hub) {
    let (console, events) = (&hub.console, &hub.events);
    let (sync, syncing) = syncer();
    let mut writer = Writer {
        hub,
        console,
        events,
        by_address: HashMap::new(),
        hosts: Vec::new(),
        boots: Boots::default(),
        pass: Pass::default(),
        room: Room::new(WAITING_BYTES_MAX),
        tally: Tally::default(),
        shared: Counts::default(),
        now_us: now_us(),
        waiting: Vec::new(),
        open: VecDeque::new(),
        open_max: open_files_max(),
        sync,
    };
    let mut letters = Letters::default();
    while !console.ends() {
        console.inbox.wait(writer.patience());
        // What comes in the meantime shares this pass's writes.
        thread::sleep(if letters.len() > BUSY_DATAGRAMS {
            BUSY_WAIT
        } else {
            CALM_WAIT
        });
        letters = console.inbox.swap(letters);
        writer.take(&mut letters);
        writer.write();
        console.answer(&writer.hosts);
    }
    loop {
        letters = console.inbox.swap(letters);
        if letters.is_empty() {
            break;
        }
        writer.take(&mut letters);
    }
    writer.finish();
    drop(writer);
    if syncing.is_some_and(|thread| thread.join().is_err()) {
        events.warn("the thread that syncs logs panicked".to_owned());
    }
}

/// A thread that brings files onto the disk, so that nobody else waits for it.
fn syncer() -> (SyncSender<File>, Option<JoinHandle<()>>) {
    let (sender, receiver) = sync_channel::<File>(SYNCS_WAITING_MAX);
    let work = move || {
        for file in receiver {
            // A disk that fails is told by the writes that follow.
            drop(file.sync_data());
        }
    };
    let thread = thread::Builder::new()
        .name("log sync".to_owned())
        .spawn(work);
    (sender, thread.ok())
}

impl Writer<'_> {
    /// How long the thread sleeps when nothing comes.
    fn patience(&self) -> Duration {
        if self.waiting.is_empty() && !self.sealed_waits() {
            IDLE_WAIT
        } else {
            HOLE_WAIT
        }
    }

    fn take(&mut self, letters: &mut Letters) {
        self.now_us = now_us();
        for letter in letters.take_sealed() {
            if let Err(reason) = self.take_sealed(letter) {
                self.hub.drops.add(reason);
            }
        }
        self.give_up_sealed(false);
        letters.each(|from, at_us, datagram| self.take_one(from, at_us, datagram));
        let now_us = self.now_us;
        let mut index = 0;
        while let Some(&id) = self.waiting.get(index) {
            let host = &mut self.hosts[id as usize];
            if host
                .stream
                .due()
                .is_some_and(|due| due <= now_us || due > now_us + DUE_MICROS_MAX)
            {
                let begin = self.pass.text.len();
                host.stream.expire(now_us, &mut self.room, &mut self.pass);
                self.close(id, begin);
            }
            let host = &mut self.hosts[id as usize];
            host.waits = host.stream.due().is_some();
            if host.waits {
                index += 1;
            } else {
                self.waiting.swap_remove(index);
            }
        }
    }

    fn take_one(&mut self, from: IpAddr, at_us: u64, datagram: &[u8]) {
        let Some(id) = self.find(from, at_us) else {
            self.tally.refused += 1;
            return;
        };
        if !self.admit(id, at_us) {
            return;
        }
        let begin = self.pass.text.len();
        let host = &mut self.hosts[id as usize];
        host.stream
            .take(at_us, datagram, &mut self.room, &mut self.pass);
        if !host.waits && host.stream.due().is_some() {
            host.waits = true;
            self.waiting.push(id);
        }
        self.close(id, begin);
    }

    /// The host with this address, if its messages are taken.
    fn find(&mut self, from: IpAddr, at_us: u64) -> Option<u32> {
        if let Some(&id) = self.by_address.get(&from) {
            return Some(id);
        }
        let settings = &self.console.settings;
        if !settings.allows(from) || self.hosts.len() >= settings.hosts_max {
            return None;
        }
        let name = settings.name(from).ok()?;
        let (mut host, before) = Host::open(&self.console.dir, name.as_str(), None);
        host.told = (self.console.lost(), at_us);
        let id = u32::try_from(self.hosts.len()).ok()?;
        self.hosts.push(host);
        self.by_address.insert(from, id);
        if before.is_some() {
            let begin = self.pass.text.len();
            let text = format_args!("the server was started again; what came before is missing");
            self.pass.note(at_us, (Note::Resumed, &[]), text);
            self.close(id, begin);
        }
        Some(id)
    }

    /// Whether the host keeps to its limit.
    fn admit(&mut self, id: u32, at_us: u64) -> bool {
        let limit = self.console.settings.datagrams_per_second;
        if limit == 0 {
            return true;
        }
        let host = &mut self.hosts[id as usize];
        let second = at_us / 1_000_000;
        if host.allowance.1 != second {
            host.allowance = (limit, second);
            self.tell_limited(id, at_us);
        }
        let host = &mut self.hosts[id as usize];
        if host.allowance.0 == 0 {
            host.limited += 1;
            self.tally.limited += 1;
            return false;
        }
        host.allowance.0 -= 1;
        true
    }

    fn tell_limited(&mut self, id: u32, at_us: u64) {
        let limit = self.console.settings.datagrams_per_second;
        let limited = std::mem::take(&mut self.hosts[id as usize].limited);
        if limited > 0 {
            let begin = self.pass.text.len();
            let text = format_args!("{limited} datagrams were over the limit of {limit} a second");
            self.pass.note(at_us, (Note::Limited, &[limited]), text);
            self.close(id, begin);
        }
    }

    /// What was put into the pass from `begin` on, and counted since this was called last, is this
    /// host's.
    fn close(&mut self, id: u32, begin: usize) {
        let host = &mut self.hosts[id as usize];
        let (now, before) = (self.pass.counts, self.shared);
        if now.datagrams > before.datagrams {
            host.heard.at_us = self.now_us;
        }
        host.heard.records += now.records - before.records;
        host.heard.gaps += now.gaps - before.gaps;
        host.heard.lost += now.lost - before.lost;
        self.shared = now;
        let first = host.lines.is_none();
        self.pass.close(begin, &mut host.lines);
        if first && host.lines.is_some() {
            self.pass.hosts.push(id);
        }
    }

    /// Writes the pass.
    fn write(&mut self) {
        let hosts = std::mem::take(&mut self.pass.hosts);
        let lost = self.console.lost();
        for &id in &hosts {
            self.write_host(id, lost);
            // One pass may be of more hosts than files may be open.
            while self.open.len() > self.open_max {
                self.close_one();
            }
        }
        self.pass.hosts = hosts;
        self.pass.clear();
        self.answer_sealed();
        self.tally.counts = self.pass.counts;
        self.tally.hosts = self.hosts.len() as u64;
        *lock(&self.console.tally) = self.tally;
    }

    fn write_host(&mut self, id: u32, lost: u64) {
        let host = &mut self.hosts[id as usize];
        let dir = self.console.dir.join(&*host.name);
        let mut note = Vec::new();
        tell_lost(host, lost, &mut note);
        let mut slices = Vec::new();
        if !note.is_empty() {
            self.hub
                .forward
                .lines(&host.name, host.log.boot(), &note, 0);
            slices.push(note.as_slice());
        }
        let (mut records, mut urgent) = (0, false);
        let was_open = host.log.is_open();
        let mut next = host.lines.take().map(|(first, _)| first);
        let mut job = Job {
            console: self.console,
            events: self.events,
            tally: &mut self.tally,
            dir: &dir,
        };
        while let Some(piece) = next.and_then(|at| self.pass.pieces.get(at as usize)) {
            let Piece { begin, end, .. } = *piece;
            if slices.len() == SLICES_MAX || (piece.boot.is_some() && !slices.is_empty()) {
                job.append(host, &mut slices, std::mem::take(&mut records));
            }
            if let Some(at_us) = piece.boot {
                host.log.begin(at_us);
            }
            let lines = &self.pass.text[begin..end];
            self.hub
                .forward
                .lines(&host.name, host.log.boot(), lines, piece.records);
            slices.push(lines);
            records += piece.records;
            urgent |= piece.urgent;
            next = piece.next;
        }
        job.append(host, &mut slices, records);
        if urgent && let Some(file) = host.log.clone_file() {
            // With so many crashes at once the disk is busy with them anyway.
            drop(self.sync.try_send(file));
        }
        if !was_open && host.log.is_open() {
            self.open.push_back(id);
        }
    }

    /// Closes the file that was opened first of those that are not in use.
    fn close_one(&mut self) {
        for _ in 0..self.open.len() {
            let Some(id) = self.open.pop_front() else {
                return;
            };
            let log = &mut self.hosts[id as usize].log;
            if !std::mem::take(&mut log.used) {
                log.close();
                return;
            }
            self.open.push_back(id);
        }
        if let Some(id) = self.open.pop_front() {
            self.hosts[id as usize].log.close();
        }
    }

    /// The server ends: nothing is waited for any more.
    fn finish(&mut self) {
        self.give_up_sealed(true);
        for id in 0..self.hosts.len() {
            let begin = self.pass.text.len();
            self.hosts[id].stream.finish(&mut self.room, &mut self.pass);
            if let Ok(id) = u32::try_from(id) {
                self.close(id, begin);
                self.tell_limited(id, now_us());
            }
        }
        self.write();
    }
}

/// Writes to one host's log.
struct Job<'a> {
    console: &'a Console,
    events: &'a Events,
    tally: &'a mut Tally,
    dir: &'a Path,
}

impl Job<'_> {
    /// Appends `lines`, which hold so many records, and empties them.
    fn append(&mut self, host: &mut Host, lines: &mut Vec<&[u8]>, records: u64) {
        let mut slices: Vec<IoSlice<'_>> = lines.iter().map(|lines| IoSlice::new(lines)).collect();
        let mut rest = slices.as_mut_slice();
        let begin = Instant::now();
        while let Err(error) = host.log.append(self.dir, &mut rest) {
            let full = matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            );
            // What is received until there is room again waits in the inbox.
            let patience = match (full && !self.console.ends(), host.log.fails) {
                (true, _) => Duration::MAX,
                (false, false) => PATIENCE,
                // One host's directory must not hold up all others again and again.
                (false, true) => Duration::ZERO,
            };
            let show = self.dir.display();
            if begin.elapsed() >= patience {
                let left = rest.iter().map(|slice| slice.len()).sum();
                let (kept, torn) = written_of(lines, left);
                if torn {
                    host.log.tear();
                }
                host.log.fails = true;
                let lost = records.saturating_sub(kept);
                self.tally.written += kept;
                self.tally.unwritten += lost;
                self.events.warn_rarely(format!(
                    "{lost} records are lost: cannot write to {show}: {error}"
                ));
                lines.clear();
                return;
            }
            self.events
                .warn_rarely(format!("cannot write to {show}: {error}; trying again"));
            thread::sleep(RETRY_WAIT);
        }
        lines.clear();
        host.log.fails = false;
        self.tally.written += records;
        if host.log.turn(self.console.settings.part_mib << 20) {
            self.console.turned(self.dir.to_owned());
        }
    }
}

/// How many records of `pieces`, whose last `left` bytes were not written, are whole, and whether one
/// is cut.
fn written_of(pieces: &[&[u8]], left: usize) -> (u64, bool) {
    let all: usize = pieces.iter().map(|piece| piece.len()).sum();
    let mut written = all.saturating_sub(left);
    let mut records = 0;
    let lines = pieces
        .iter()
        .flat_map(|piece| piece.split_inclusive(|&byte| byte == b'\n'));
    for line in lines {
        if line.len() > written {
            break;
        }
        written -= line.len();
        let what = line.splitn(2, |&byte| byte == b' ').nth(1);
        // Malformed datagrams are notes, but count as records.
        let counts = what.is_some_and(|what| !what.starts_with(b"!") || what.starts_with(b"!raw,"));
        records += u64::from(counts);
    }
    (records, written > 0)
}

/// A note about what the server lost since this host's log told of it, once a second at most.
fn tell_lost(host: &mut Host, lost: u64, note: &mut Vec<u8>) {
    let (told, at_us) = host.told;
    if lost == told {
        return;
    }
    let now_us = now_us();
    if now_us.saturating_sub(at_us) < TELL_MICROS && now_us >= at_us {
        return;
    }
    let datagrams = lost.saturating_sub(told);
    host.told = (lost, now_us);
    let text =
        format_args!("the server had no room for {datagrams} datagrams, of this host or of others");
    let stamp = &mut netconsole::Stamp::default();
    netconsole::write_note(note, stamp, now_us, (Note::Dropped, &[datagrams]), text);
}

/// How many files may be open at a time: half of what the system lets this process have.
fn open_files_max() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limits = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limits.maximum,
        maximum: limits.maximum,
    };
    let now = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limits.maximum,
        Err(_) => limits.current,
    };
    let half = now.and_then(|files| usize::try_from(files / 2).ok());
    half.unwrap_or(OPEN_FILES_MAX).min(OPEN_FILES_MAX)
}

impl Console {
    /// Datagrams that the server had no room for, whoever sent them.
    fn lost(&self) -> u64 {
        self.socket_drops.load(Ordering::Relaxed) + self.inbox.overflows()
    }

    fn turned(&self, dir: PathBuf) {
        lock(&self.full_dirs).push(dir);
    }
}

/// Bytes of all hosts together that wait for their turn.
const WAITING_BYTES_MAX: usize = 64 << 20;
/// Slices of one write; the kernel takes 1024.
const SLICES_MAX: usize = 1024;
const OPEN_FILES_MAX: usize = 4096;
const SYNCS_WAITING_MAX: usize = 64;
/// How long the thread sleeps when nothing comes.
const IDLE_WAIT: Duration = Duration::from_millis(50);
/// The same while something is out of order.
const HOLE_WAIT: Duration = Duration::from_millis(20);
/// A pass of more datagrams than this is followed by a longer wait.
const BUSY_DATAGRAMS: usize = 256;
const BUSY_WAIT: Duration = Duration::from_millis(10);
const CALM_WAIT: Duration = Duration::from_millis(1);
/// A due time further ahead shows that the clock was set back.
const DUE_MICROS_MAX: u64 = 1_000_000;
const RETRY_WAIT: Duration = Duration::from_millis(100);
/// How long a write is tried that fails for anything but a full disk.
const PATIENCE: Duration = Duration::from_secs(1);
const TELL_MICROS: u64 = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_lines_that_were_written_in_part_the_whole_records_count() {
        let pieces: [&[u8]; 2] = [
            b"time !boot,1;a boot begins\ntime 6,1,2,-;! a record\n",
            b"time !raw,3;xyz\ntime 6,2,3,-;another\n",
        ];
        let all: usize = pieces.iter().map(|piece| piece.len()).sum();
        let check = |written, expected| {
            assert_eq!(written_of(&pieces, all - written), expected, "{written}");
        };
        check(0, (0, false));
        check(27, (0, false));
        check(28, (0, true));
        check(pieces[0].len(), (1, false));
        check(all - 1, (2, true));
        check(all, (3, false));
    }
}
