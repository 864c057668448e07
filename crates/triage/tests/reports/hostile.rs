//! Damaged and endless logs: findings come out of any bytes, in bounded memory.

use triage::{Scanner, scan};

use crate::logs;
use crate::random::Random;

/// Damaged logs a run, unless `NETDUMP_FUZZ_ROUNDS` says otherwise; that number is part of the seed,
/// so a longer run is also another one.
const ROUNDS: u32 = 3000;
/// Reports that a log can give at most.
const REPORTS_MAX: usize = 64;

#[test]
fn damaged_logs_give_findings() {
    let rounds = std::env::var("NETDUMP_FUZZ_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(ROUNDS);
    let mut random = Random::new(&format!("damaged logs {rounds}"));
    let all: Vec<&str> = logs().map(|(_, log)| log).collect();
    for _ in 0..rounds {
        let mut log = Vec::new();
        for _ in 0..=random.below(3) {
            log.extend_from_slice(pick(&mut random, &all).as_bytes());
        }
        for _ in 0..=random.below(20) {
            damage(&mut random, &mut log);
        }
        let findings = scan(&log);
        assert!(findings.reports.len() <= REPORTS_MAX);
        for report in &findings.reports {
            assert!(report.title.len() < 1000, "{}", report.title);
            let _page = report.to_string();
        }
    }
}

fn pick<'a>(random: &mut Random, all: &[&'a str]) -> &'a str {
    let at = usize::try_from(random.below(all.len() as u64)).unwrap();
    all[at]
}

fn at(random: &mut Random, log: &[u8]) -> usize {
    usize::try_from(random.below(log.len().max(1) as u64)).unwrap()
}

/// One change: a bit, a byte, a piece that is lost, doubled or moved, or a piece of syntax.
fn damage(random: &mut Random, log: &mut Vec<u8>) {
    const SYNTAX: [&str; 14] = [
        "\n",
        "+0x",
        "/0x",
        " [",
        "]",
        "[   12.345678] ",
        "[  T1] ",
        "6,1,2,-,ncfrag=0/99999999999;",
        "6,18446744073709551615,18446744073709551615,-;",
        " in ",
        "BUG: ",
        "\u{20ac}",
        "_Z999",
        "\\x",
    ];
    let from = at(random, log);
    let to = (from + at(random, log) / 8).min(log.len());
    match random.below(6) {
        0 if !log.is_empty() => log[from] ^= 1 << random.below(8),
        1 => drop(log.drain(from..to)),
        2 => {
            let piece = log[from..to].to_vec();
            log.splice(from..from, piece);
        }
        3 => {
            let piece: Vec<u8> = log.drain(from..to).collect();
            let place = at(random, log);
            log.splice(place..place, piece);
        }
        4 => drop(log.splice(from..from, pick(random, &SYNTAX).bytes())),
        _ => log.truncate(to),
    }
}

#[test]
fn random_bytes_give_findings() {
    let mut random = Random::new("random bytes");
    for _ in 0..200 {
        let length = random.below(4096);
        let log: Vec<u8> = (0..length)
            .map(|_| u8::try_from(random.below(256)).unwrap())
            .collect();
        assert!(scan(&log).reports.len() <= REPORTS_MAX);
    }
}

#[test]
fn endless_reports_are_counted_not_kept() {
    let mut scanner = Scanner::new();
    for number in 0..20_000_u32 {
        // Letters, because numbers do not make another report.
        let name: String = number
            .to_string()
            .bytes()
            .map(|b| char::from(b + 49))
            .collect();
        let line = format!("BUG: KASAN: use-after-free in f{name}+0x1/0x2\n");
        scanner.push(line.as_bytes());
    }
    let findings = scanner.finish();
    assert_eq!(findings.reports.len(), REPORTS_MAX);
    assert_eq!(findings.reports_dropped, 20_000 - 64);
}
