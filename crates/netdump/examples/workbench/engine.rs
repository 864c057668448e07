//! Engine to engine in memory: what a page costs with no kernel between the two.

use std::time::Instant as Clock;

use crate::raw::cpu_seconds;
use anyhow::{Result, ensure};
use netdump::seal::RingKey;
use netdump::send::{Origin, Synthetic};
use proto::client::{Client, Input, PageStatus, Pool, Start, Step, Want};
use proto::keys::{KEY_BYTES, Secret, SessionKeys};
use proto::lz4::Table;
use proto::record::{BLOCK_BYTES, BLOCK_PAGES, Hello, RamRange};
use proto::reply::{Action, REPLY_BYTES_MAX, Verdict};
use proto::server::{Hold, Session};
use proto::time::{Instant, Micros};
use proto::units::{ArmingId, KeyId, PAGE_BYTES, PacketNumber, SessionId};
use proto::wire::{HEADER_BYTES, Header, Kind, PacketKey, TAG_BYTES, open_client, seal_client};
use serde_json::json;
use zerocopy::{FromZeros as _, IntoBytes as _};

/// Large enough that the first and the last packet do not count.
const PAGES: u64 = 1 << 16;
const SLOTS: u16 = 1024;
/// Packets that are sealed, then opened.
const TRAIN: usize = 1024;
const SEALED_BYTES: u64 = 512 << 20;
const DATAGRAM_BYTES: usize = 1472;
const SESSION: SessionId = SessionId {
    key: KeyId(1),
    arming: ArmingId(2),
};

pub(crate) fn run() -> Result<()> {
    for datagram_bytes in [1472, 8972] {
        let ring = seal::<RingKey>(datagram_bytes)?;
        let portable = seal::<[u8; KEY_BYTES]>(datagram_bytes)?;
        for ((sealing, opening), whose) in [(ring, ""), (portable, "portable ")] {
            print(&format!("{whose}seal {datagram_bytes}"), sealing, None);
            print(&format!("{whose}open {datagram_bytes}"), opening, None);
        }
    }
    print("lz4", lz4(), None);
    for (name, wish) in [
        ("random pages", "zero=0,text=0,random=100"),
        ("text pages", "zero=0,text=100,random=0"),
        ("zero pages", "zero=100,text=0,random=0"),
        ("mixed pages", "zero=30,text=40,random=30"),
    ] {
        let (both, client_share) = engines(wish)?;
        print(name, both, Some(client_share));
    }
    Ok(())
}

/// A row: decimal gigabytes per second of CPU time, and the client's share of that time where two
/// engines ran.
fn print(name: &str, gb_s: f64, client_share: Option<f64>) {
    let row = json!({
        "config": format!("netdump engine {name}"),
        "gb_s": gb_s,
        "client_share": client_share,
    });
    println!("{row}");
}

fn keys() -> SessionKeys {
    Secret([7; 32]).session_keys(SESSION)
}

/// Sealing and opening datagrams, in bytes of payload.
fn seal<K: PacketKey>(datagram_bytes: usize) -> Result<(f64, f64)> {
    let payload = datagram_bytes - HEADER_BYTES - TAG_BYTES;
    let key = K::prepare(&keys().client);
    let mut buffers = vec![vec![0x5a; datagram_bytes]; TRAIN];
    let header = |number| Header {
        kind: Kind::Data,
        attempt: 0,
        session: SESSION,
        number: PacketNumber(number),
    };
    let (mut sealing, mut opening) = (0.0, 0.0);
    let rounds = SEALED_BYTES / (TRAIN * payload) as u64;
    for _ in 0..rounds {
        let begin = cpu_seconds();
        for (number, buffer) in (0..).zip(&mut buffers) {
            let sealed = seal_client(&key, &header(number), buffer, payload);
            ensure!(sealed.is_some(), "a packet is not sealed");
        }
        let between = cpu_seconds();
        for (number, buffer) in (0..).zip(&mut buffers) {
            let opened = open_client(&key, &header(number), buffer);
            ensure!(opened.is_ok(), "a packet does not open again");
        }
        sealing += between - begin;
        opening += cpu_seconds() - between;
    }
    let gigabytes = (rounds * (TRAIN * payload) as u64) as f64 / 1e9;
    Ok((gigabytes / sealing, gigabytes / opening))
}

/// Compressing blocks of text pages.
fn lz4() -> f64 {
    let (blocks, mut output) = (memory("zero=0,text=100,random=0"), vec![0; BLOCK_BYTES]);
    let mut table = Table::new();
    let begin = cpu_seconds();
    let mut packed = 0;
    for block in &blocks {
        packed += table.compress(block, &mut output).unwrap_or(block.len());
    }
    let seconds = cpu_seconds() - begin;
    std::hint::black_box(packed);
    (blocks.len() * BLOCK_BYTES) as f64 / 1e9 / seconds
}

/// Blocks of synthetic memory, which the engines then meet again and again.
fn memory(shares: &str) -> Vec<Vec<u8>> {
    let wish = format!("synthetic:64M,{shares}");
    let Ok(Origin::Synthetic(wish)) = wish.parse() else {
        return Vec::new();
    };
    blocks(wish)
}

fn blocks(wish: Synthetic) -> Vec<Vec<u8>> {
    let pages = usize::try_from(wish.pages).unwrap_or(0);
    let mut all = vec![[0; PAGE_BYTES]; pages];
    wish.fill(0x100, &mut all);
    all.chunks_exact(BLOCK_PAGES)
        .map(|block| block.as_flattened().to_vec())
        .collect()
}

struct Slots(Vec<Vec<u8>>);

impl Pool for Slots {
    fn buffer(&mut self, slot: u16) -> Option<&mut [u8]> {
        self.0.get_mut(usize::from(slot)).map(Vec::as_mut_slice)
    }
}

/// Nothing arrives out of order here.
struct Nowhere;

impl Hold for Nowhere {
    fn keep(&mut self, _: PacketNumber, _: &[u8]) -> bool {
        false
    }

    fn release<R>(&mut self, _: PacketNumber, _: impl FnOnce(&[u8]) -> R) -> Option<R> {
        None
    }
}

/// Sends memory from a client engine to a server engine: bytes of memory per CPU second of both
/// together, and the client's share of the time.
fn engines(shares: &str) -> Result<(f64, f64)> {
    let blocks = memory(shares);
    let (mut client, mut slots) = start();
    let first = PacketNumber(0);
    let mut server = Session::<RingKey>::with_packet_key(SESSION, keys(), [9; 16], 0, first, first);
    server.set_verdict(Verdict::Full { filter: 0 });
    server.set_action(Action::Reboot);
    let (cpu_before, begin) = (cpu_seconds(), Clock::now());
    let (mut serving, mut stream_bytes) = (0.0, 0_u64);
    let (mut reply, mut arrived) = ([0; REPLY_BYTES_MAX], [0; DATAGRAM_BYTES]);
    let complete = loop {
        let now = micros(begin);
        match client.poll(now, &mut slots) {
            Step::Send { slot, len, .. } => {
                let from = Clock::now();
                // A copy, as a network makes one: what is opened in place could not be sent again
                // when the machine is so busy that the client thinks it lost.
                let datagram = &mut arrived[..len];
                datagram.copy_from_slice(&slots.0[usize::from(slot)][..len]);
                let taken = server.handle(now, datagram, &mut Nowhere, &mut |bytes| {
                    stream_bytes += bytes.len() as u64;
                });
                ensure!(taken.is_ok(), "the server engine refused {taken:?}");
                server.set_credit(4096);
                serving += from.elapsed().as_secs_f64();
            }
            Step::Read(want) => answer(&mut client, now, want, &blocks),
            Step::WaitUntil(_) => {}
            Step::Finished(outcome) => break outcome.complete,
        }
        let due = server.reply_at().is_some_and(|at| at <= micros(begin));
        if let Some(length) = due
            .then(|| server.reply(micros(begin), &mut reply))
            .flatten()
        {
            let taken = client.handle(micros(begin), Input::Datagram(&mut reply[..length]));
            ensure!(taken.is_ok(), "the client engine refused {taken:?}");
        }
    };
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(
        complete && stream_bytes > 0,
        "the stream did not come to its end"
    );
    let memory_gb = (PAGES * PAGE_BYTES as u64) as f64 / 1e9;
    Ok((
        memory_gb / (cpu_seconds() - cpu_before),
        (seconds - serving) / seconds,
    ))
}

fn start() -> (Box<Client<RingKey>>, Slots) {
    let mut client = Box::new(Client::with_packet_key());
    let none = proto::arming::Address::V4([0; 4]);
    let server = proto::arming::Server {
        local: none,
        local_port: 0,
        remote: none,
        remote_port: 0,
        next_hop: none,
        next_hop_mac: [0; 6],
        session: SESSION,
        keys: keys(),
    };
    let start = Start {
        server: &server,
        datagram_bytes: DATAGRAM_BYTES,
        pool_slots: SLOTS,
        give_up: Micros::from_secs(10),
        first: PacketNumber(0),
        attempt: 0,
    };
    let mut hello = Hello::new_zeroed();
    hello.ram_pages = PAGES.into();
    client.start(Instant::from_micros(0), &start, &hello);
    let slots = Slots(vec![vec![0; DATAGRAM_BYTES]; usize::from(SLOTS)]);
    (client, slots)
}

fn answer(client: &mut Client<RingKey>, now: Instant, want: Want, blocks: &[Vec<u8>]) {
    let scratch = client.scratch();
    let taken = match want {
        Want::Pages { first, count, .. } => {
            let at = usize::try_from(first.0).unwrap_or(0) / BLOCK_PAGES % blocks.len();
            scratch.copy_from_slice(&blocks[at]);
            let statuses = [PageStatus::Read; BLOCK_PAGES];
            client.handle(now, Input::Pages(&statuses[..usize::from(count)]))
        }
        Want::MemoryMap => {
            let range = RamRange {
                first: 0.into(),
                pages: PAGES.into(),
            };
            let bytes = range.as_bytes();
            scratch[..bytes.len()].copy_from_slice(bytes);
            client.handle(now, Input::Filled(bytes.len()))
        }
        Want::Text
        | Want::Registers(_)
        | Want::Notes
        | Want::Written
        | Want::Processor(_)
        | Want::Devices
        | Want::State => client.handle(now, Input::Filled(0)),
    };
    debug_assert!(taken.is_ok(), "only datagrams are refused");
}

fn micros(begin: Clock) -> Instant {
    Instant::from_micros(u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX))
}
