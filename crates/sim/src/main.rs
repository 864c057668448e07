//! `cargo xtask sim`: runs worlds by seed. One seed prints its options and its report; many print a
//! line of progress.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use sim::{Options, World};

/// Run simulated worlds, each drawn from a seed.
#[derive(Parser)]
struct Arguments {
    /// Replay this seed and print its world.
    #[arg(long)]
    seed: Option<u64>,
    /// Run seeds from here.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Run seeds for so many minutes.
    #[arg(long, default_value_t = 1)]
    minutes: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.seed {
        Some(seed) => one(seed),
        None => many(arguments.from, Duration::from_secs(60 * arguments.minutes)),
    }
}

fn one(seed: u64) -> ExitCode {
    let options = Options::draw(seed);
    println!("{options}");
    match World::new(&options).run() {
        Ok(report) => {
            println!("{report:#?}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn many(from: u64, time: Duration) -> ExitCode {
    let begun = Instant::now();
    let mut seed = from;
    while begun.elapsed() < time {
        match World::new(&Options::draw(seed)).run() {
            Ok(report) if report.outcome.complete => seed += 1,
            Ok(_) => {
                eprintln!(
                    "seed {seed}: the dump is not complete\nreplay: cargo xtask sim --seed {seed}"
                );
                return ExitCode::FAILURE;
            }
            Err(failure) => {
                eprintln!("seed {seed}: {failure}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("seeds {from} to {seed}: every world ended with the whole dump");
    ExitCode::SUCCESS
}
