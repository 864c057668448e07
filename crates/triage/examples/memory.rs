//! The memory half on a vmcore, timed, and on the same vmcore damaged in many ways.
//!
//! `cargo run --release -p triage --example memory -- FILE` prints the CPU's milliseconds for the
//! log alone and for everything. `-- FILE ROUNDS` examines so many copies in which pages are
//! damaged as they are read; nothing may panic, and the slowest round is told.

use std::path::Path;
use std::time::{Duration, Instant};

use dump::{DumpError, PAGE_SIZE, PageState, Pfn, Reader};
use triage::memory::{Source, examine, log};

/// One page in so many is damaged, by the round.
const RARITIES: [u64; 4] = [4, 32, 256, 2048];

/// A vmcore whose pages are damaged on the way.
struct Damaged {
    reader: Reader,
    seed: u64,
    rarity: u64,
}

/// A number that follows from another; splitmix64.
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

impl Source for Damaged {
    fn page(&mut self, pfn: Pfn, page: &mut [u8; PAGE_SIZE]) -> Result<PageState, DumpError> {
        let state = self.reader.read_page(pfn, page)?;
        let mut chance = mixed(self.seed ^ mixed(pfn.0));
        if !chance.is_multiple_of(self.rarity) {
            return Ok(state);
        }
        for _ in 0..=chance >> 60 {
            chance = mixed(chance);
            let words = page.as_chunks_mut::<8>().0;
            let at = usize::try_from(chance >> 32).unwrap_or(0) % words.len();
            let other = words[usize::try_from(chance & 511).unwrap_or(0)];
            words[at] = match chance >> 10 & 7 {
                0 => [0; 8],
                1 => [0xff; 8],
                2 => other,
                3 => mixed(chance).to_le_bytes(),
                4 => (mixed(chance) >> 40).to_le_bytes(),
                _ => (u64::from_le_bytes(words[at]) ^ 1 << (chance >> 14 & 63)).to_le_bytes(),
            };
        }
        Ok(state)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let file = words.next().ok_or("give a vmcore")?;
    let rounds: u64 = words.next().map_or(Ok(0), |rounds| rounds.parse())?;
    let file = Path::new(&file);
    if rounds == 0 {
        let start = Instant::now();
        let mut reader = Reader::open(file)?;
        let machine = reader.machine().clone();
        let records = log(&mut reader, &machine)
            .map_err(|error| error.to_string())?
            .records;
        let of_log = start.elapsed();
        let start = Instant::now();
        let mut reader = Reader::open(file)?;
        let found = examine(&mut reader, &machine);
        println!(
            "log {records} records in {of_log:?}; {} tasks, {} modules, {} not read in {:?}",
            found.tasks.len(),
            found.modules.len(),
            found.unread.len(),
            start.elapsed()
        );
        return Ok(());
    }
    let mut slowest = (Duration::ZERO, 0);
    let mut tasks = 0;
    for seed in 0..rounds {
        let reader = Reader::open(file)?;
        let machine = reader.machine().clone();
        let rarity = RARITIES[usize::try_from(seed % 4)?];
        let start = Instant::now();
        let mut source = Damaged {
            reader,
            seed: mixed(seed),
            rarity,
        };
        let found = examine(&mut source, &machine);
        slowest = slowest.max((start.elapsed(), seed));
        tasks += found.tasks.len();
    }
    println!("{rounds} rounds, {tasks} tasks in all, slowest {slowest:?}");
    Ok(())
}
