//! Log records of our own clients: opened with the host's key, put in order by the protocol's engine,
//! and acknowledged when they are in the log. What is missing is asked for again.

use std::collections::HashMap;

use netconsole::{Body, BootStart, Caller, Note, Record, Sink as _};
use proto::console::{
    Caller as From, Entry, LOG_REPLY_BYTES_MAX, Log, Range, Reason as Skipped, Server, Taken,
};
use proto::keys::SessionKeys;
use proto::time::Instant;
use proto::units::{KeyId, PacketNumber};
use proto::wire::{Header, INCARNATION_BYTES, Kind, open_client, seal_server};

use super::Writer;
use crate::console::host::Host;
use crate::console::inbox::{Sealed, now_us};
use crate::key::{HostName, fill_random};
use crate::serve::drops::Reason;
use crate::serve::socket::Peer;

/// Boots of our own clients, and what replies are sealed with.
#[derive(Default)]
pub(super) struct Boots {
    boots: HashMap<BootId, Boot>,
    /// The places of each key's boots in the table of hosts.
    by_key: HashMap<KeyId, Vec<u32>>,
    incarnation: Option<[u8; INCARNATION_BYTES]>,
    replies: u64,
}

/// A host's key and what its kernel calls the boot.
type BootId = (KeyId, [u8; 16]);

struct Boot {
    /// Its place in the table of hosts.
    host: u32,
    engine: Server,
    /// Opened datagrams that came early.
    kept: Vec<Vec<u8>>,
    /// What of them is written already.
    early: Early,
    /// Who is answered, and how.
    peer: Peer,
    header: Header,
    keys: SessionKeys,
}

/// What of a boot is written although something before it is missing.
#[derive(Default)]
struct Early {
    /// Runs that are written.
    written: Vec<Range>,
    /// All below this is written, or told to be missing.
    told: u64,
    /// All that is kept is among it.
    done: bool,
}

impl Early {
    fn has(&self, sequence: u64) -> bool {
        let mut runs = self.written.iter();
        runs.any(|run| (run.first..run.end).contains(&sequence))
    }

    /// Forgets what is below `next`: all of that has been dealt with.
    fn forget(&mut self, next: u64) {
        self.written.retain(|run| run.end > next);
    }
}

impl Writer<'_> {
    /// Takes a datagram of kind 4.
    pub(super) fn take_sealed(&mut self, letter: Sealed) -> Result<(), Reason> {
        let Sealed {
            peer,
            at_us,
            mut datagram,
        } = letter;
        let header = Header::parse(&datagram)?;
        let key = self.hub.key(header.session.key).ok_or(Reason::UnknownKey)?;
        let keys = key.secret.log_keys(header.session);
        let body: &[u8] = open_client(&keys.client, &header, &mut datagram)?;
        let log = Log::decode(body).ok_or(Reason::NotOurs)?;
        let id = (header.session.key, log.head.boot);
        let mut boot = match self.boots.boots.remove(&id) {
            Some(boot) => Boot {
                peer,
                header,
                keys,
                ..boot
            },
            None => {
                let (host, engine) = self.begin_boot(id, &key.host)?;
                Boot {
                    host,
                    engine,
                    kept: Vec::new(),
                    early: Early::default(),
                    peer,
                    header,
                    keys,
                }
            }
        };
        let now = self.hub.now();
        let begin = self.pass.text.len();
        match boot.engine.handle(now, &log.head) {
            Taken::Write(from) => {
                self.pass.counts.datagrams += 1;
                self.ensure_file(boot.host, at_us, from);
                self.entries(at_us, &log, from, &boot.early);
                self.release(&mut boot, now, at_us);
            }
            Taken::Keep => {
                self.pass.counts.datagrams += 1;
                boot.early.done = false;
                boot.kept.push(body.to_vec());
            }
            Taken::Known | Taken::NoRoom => {}
        }
        self.close(boot.host, begin);
        self.boots.boots.insert(id, boot);
        Ok(())
    }

    /// A boot that this process has not met; an earlier one may have.
    fn begin_boot(&mut self, (key, id): BootId, name: &HostName) -> Result<(u32, Server), Reason> {
        let of_key = self.boots.by_key.entry(key).or_default();
        let full = self.hosts.len() >= self.console.settings.hosts_max;
        if of_key.len() >= BOOTS_PER_KEY_MAX || full {
            return Err(Reason::OverLimit);
        }
        // Little more comes of them, and a file that is open is neither packed nor removed.
        for &before in of_key.iter() {
            self.hosts[before as usize].log.close();
        }
        let short = u32::from_be_bytes([id[0], id[1], id[2], id[3]]);
        let (mut host, position) = Host::open(&self.console.dir, name.as_str(), Some(short));
        host.told = (self.console.lost(), now_us());
        let next = position
            .and_then(|position| position.seq)
            .map(|seq| seq.saturating_add(1));
        let number = u32::try_from(self.hosts.len()).or(Err(Reason::OverLimit))?;
        of_key.push(number);
        self.hosts.push(host);
        Ok((number, Server::new(next)))
    }

    /// A log begins with its boot.
    fn ensure_file(&mut self, host: u32, at_us: u64, first: u64) {
        if !self.hosts[host as usize].log.has_boot() {
            self.hosts[host as usize].log.expect_boot();
            self.pass.boot(&BootStart {
                at_us,
                first: Some(first),
                release: None,
            });
        }
    }

    /// Writes what was kept and is in order now.
    fn release(&mut self, boot: &mut Boot, now: Instant, at_us: u64) {
        while let Some((index, log)) = lowest(&boot.kept) {
            let Some(from) = boot.engine.release(now, &log.head) else {
                break;
            };
            self.entries(at_us, &log, from, &boot.early);
            boot.kept.swap_remove(index);
        }
        boot.early.forget(boot.engine.next());
    }

    /// Writes what is kept of a host that may be dead, with what is missing before each named. What
    /// comes all the same is written behind it.
    fn write_early(&mut self, boot: &mut Boot, at_us: u64) {
        let mut order: Vec<Log<'_>> = boot
            .kept
            .iter()
            .filter_map(|kept| Log::decode(kept))
            .collect();
        order.sort_by_key(|log| log.head.covers.first);
        let mut at = boot.engine.next();
        for log in &order {
            let Range { first, end } = log.head.covers;
            self.ensure_file(boot.host, at_us, at);
            self.miss(
                at_us,
                Range {
                    first: at.max(boot.early.told),
                    end: first,
                },
            );
            self.entries(at_us, log, at, &boot.early);
            boot.early.written.push(Range {
                first: first.max(at),
                end,
            });
            at = at.max(end);
        }
        boot.early.told = boot.early.told.max(at);
        boot.early.done = true;
    }

    fn miss(&mut self, at_us: u64, range: Range) {
        let count = range.count();
        if count == 0 {
            return;
        }
        self.pass.counts.gaps += count;
        let (first, last) = (range.first, range.end - 1);
        let text = format_args!("{count} records, {first} to {last}, have not come yet");
        self.pass.note(at_us, (Note::Gap, &[first, last]), text);
    }

    /// Writes a datagram's entries from sequence number `from` on, but for those that are written.
    fn entries(&mut self, at_us: u64, log: &Log<'_>, from: u64, early: &Early) {
        for entry in log.entries() {
            let covers = entry.covers();
            if covers.end <= from || early.has(covers.first.max(from)) {
                continue;
            }
            match entry {
                Entry::Record(seq, record) => {
                    self.pass.counts.records += 1;
                    self.pass.counts.late += u64::from(seq < early.told);
                    let head = record.head;
                    let mut dictionary = record.dictionary;
                    let told;
                    if head.cut {
                        told = [dictionary, b"\ncut=1"].concat();
                        dictionary = &told;
                    }
                    self.pass.record(
                        at_us,
                        &Record {
                            prefix: Some(u16::from(head.facility) * 8 + u16::from(head.level & 7)),
                            seq: Some(seq),
                            time_us: Some(head.time_us),
                            flag: if head.continued { b'c' } else { b'-' },
                            caller: Some(match head.caller {
                                From::Task(number) => Caller::Task(number),
                                From::Cpu(number) => Caller::Cpu(number),
                            }),
                            body: Body::Plain(record.text, dictionary),
                        },
                    );
                }
                Entry::Skip(range, Skipped::Overwritten) => {
                    let first = range.first.max(from);
                    let told = early.told;
                    let range = Range { first, ..range };
                    self.lose(at_us, range, told, "overwritten in the host");
                }
                Entry::Skip(_, Skipped::Level | Skipped::Unreadable) => {}
            }
        }
    }

    /// Tells that records are lost. Those below `told` count as passed over already.
    fn lose(&mut self, at_us: u64, range: Range, told: u64, why: &str) {
        let count = range.count();
        if count == 0 {
            return;
        }
        self.pass.counts.gaps += range.end.saturating_sub(range.first.max(told));
        self.pass.counts.lost += count;
        let (first, last) = (range.first, range.end - 1);
        let text = format_args!("{count} records, {first} to {last}, are lost: {why}");
        self.pass
            .note(at_us, (Note::Lost, &[first, last, count]), text);
    }

    /// Gives up what has been missing for too long, or, as the server ends, all that is missing.
    pub(super) fn give_up_sealed(&mut self, all: bool) {
        let now = self.hub.now();
        let mut boots = std::mem::take(&mut self.boots.boots);
        for boot in boots.values_mut() {
            let (at_us, begin) = (now_us(), self.pass.text.len());
            if boot.engine.is_overdue(now) && !boot.early.done {
                self.write_early(boot, at_us);
            }
            loop {
                let lost = if all {
                    boot.engine.abandon(now)
                } else {
                    boot.engine.give_up(now)
                };
                let Some(lost) = lost else {
                    break;
                };
                self.ensure_file(boot.host, at_us, lost.first);
                self.lose(at_us, lost, boot.early.told, "asked for in vain");
                self.release(boot, now, at_us);
            }
            self.close(boot.host, begin);
        }
        self.boots.boots = boots;
    }

    /// What is in order is written: sends the replies that are due.
    pub(super) fn answer_sealed(&mut self) {
        let now = self.hub.now();
        let mut incarnation = self.boots.incarnation;
        for boot in self.boots.boots.values_mut() {
            let next = boot.engine.next();
            boot.engine.written(now, next);
            let Some(reply) = boot.engine.reply(now) else {
                continue;
            };
            let mut random = [0; INCARNATION_BYTES];
            if incarnation.is_none() && fill_random(&mut random).is_ok() {
                incarnation = Some(random);
            }
            let Some(incarnation) = &incarnation else {
                continue;
            };
            let mut buffer = [0; LOG_REPLY_BYTES_MAX];
            let header = Header {
                kind: Kind::LogReply,
                attempt: 0,
                number: PacketNumber(self.boots.replies),
                ..boot.header
            };
            self.boots.replies += 1;
            let length = reply.encode(&mut buffer).and_then(|payload| {
                seal_server(
                    &boot.keys.server,
                    &header,
                    incarnation,
                    &mut buffer,
                    payload,
                )
            });
            if let Some(datagram) = length.and_then(|length| buffer.get(..length)) {
                self.hub.send(datagram, boot.peer);
            }
        }
        self.boots.incarnation = incarnation;
    }

    /// A host waits for a reply, or something for a host.
    pub(super) fn sealed_waits(&self) -> bool {
        self.boots
            .boots
            .values()
            .any(|boot| boot.engine.wake_at().is_some())
    }
}

/// The datagram that begins first, of those that came early.
fn lowest(kept: &[Vec<u8>]) -> Option<(usize, Log<'_>)> {
    let logs = kept.iter().enumerate();
    let logs = logs.filter_map(|(index, bytes)| Some((index, Log::decode(bytes)?)));
    logs.min_by_key(|(_, log)| log.head.covers.first)
}

/// Boots of one key while this server runs: a host that restarts in a loop is told by then.
const BOOTS_PER_KEY_MAX: usize = 1024;
