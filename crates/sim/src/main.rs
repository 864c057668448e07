//! `cargo xtask sim`: runs worlds by seed. One seed prints its options and what happened; many print
//! how often each thing happened over all of them.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser;
use sim::Options;
use sim::counts::Counts;
use sim::shrink::{kind, run, shrink};

/// Run simulated worlds, each drawn from a seed.
#[derive(Parser)]
#[command(name = "cargo xtask sim")]
struct Arguments {
    /// Replay this seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Instead of the world drawn from the seed: a calm one in which only these options differ, as
    /// "name=value name=value".
    #[arg(long, requires = "seed")]
    only: Option<String>,
    /// Options that differ from what was drawn, as "name=value name=value".
    #[arg(long)]
    set: Option<String>,
    /// Make a failing world as small as it can be.
    #[arg(long, requires = "seed")]
    shrink: bool,
    /// Kill every server at every so-manieth event, and read its store there.
    #[arg(long)]
    kill_every: Option<u64>,
    /// Run so many seeds.
    #[arg(long)]
    seeds: Option<u64>,
    /// Run seeds for so many minutes.
    #[arg(long)]
    minutes: Option<u64>,
    /// Run seeds from here.
    #[arg(long, default_value_t = 0)]
    from: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.seed {
        Some(seed) => one(&arguments, seed),
        None => many(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("{what}");
            ExitCode::FAILURE
        }
    }
}

/// The world of a seed, as the arguments change it.
fn world(arguments: &Arguments, seed: u64) -> Result<Options, String> {
    let mut options = match &arguments.only {
        Some(_) => Options::calm(seed),
        None => Options::draw(seed),
    };
    let changes = [&arguments.only, &arguments.set];
    for assignment in changes
        .into_iter()
        .flatten()
        .flat_map(|list| list.split_whitespace())
    {
        options.set(assignment)?;
    }
    if let Some(every) = arguments.kill_every {
        options.server.kill_every = every;
        options.server.read_store = 1;
    }
    Ok(options)
}

fn one(arguments: &Arguments, seed: u64) -> Result<(), String> {
    let mut options = world(arguments, seed)?;
    println!("revision {}", revision());
    if arguments.shrink {
        let Err(what) = run(&options) else {
            return Err(format!(
                "nothing to shrink: this world ends well\n{options}"
            ));
        };
        let same = |options: &Options| run(options).is_err_and(|other| kind(&other) == kind(&what));
        options = shrink(&options, same);
    }
    println!("{}", options.differences().join("\n"));
    let report = run(&options)?;
    for (host, outcome) in report.outcomes.iter().enumerate() {
        match outcome {
            Some(outcome) => println!("host {host}: {outcome:?}"),
            None => println!("host {host}: died"),
        }
    }
    println!("{} us, trace {:016x}", report.time_us, report.trace);
    for (name, count) in report.counts.iter() {
        println!("{count:>10} {name}");
    }
    Ok(())
}

fn many(arguments: &Arguments) -> Result<(), String> {
    let begun = Instant::now();
    let minutes = arguments.minutes.unwrap_or(1);
    let (mut counts, mut worlds) = (Counts::default(), Counts::default());
    let mut seed = arguments.from;
    loop {
        let enough = match arguments.seeds {
            Some(seeds) => seed >= arguments.from.saturating_add(seeds),
            None => begun.elapsed() >= Duration::from_secs(60 * minutes),
        };
        if enough {
            break;
        }
        let options = world(arguments, seed)?;
        let report = run(&options)
            .map_err(|what| format!("seed {seed}: {what}\nto make it smaller: --shrink"))?;
        counts.take_in("", &report.counts);
        for (name, count) in report.counts.iter() {
            worlds.add(name, u64::from(count > 0));
        }
        seed += 1;
    }
    println!("   happened | in worlds | what");
    for (name, count) in counts.iter() {
        println!("{count:>11} | {:>9} | {name}", worlds.get(name));
    }
    println!(
        "revision {}, seeds {} to {seed}: every world ended well",
        revision(),
        arguments.from
    );
    Ok(())
}

/// The commit that was built, as far as git knows.
fn revision() -> String {
    let output = Command::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .output();
    output.map_or_else(
        |_| "unknown".to_owned(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}
