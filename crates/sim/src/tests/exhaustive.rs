//! Small worlds, all of them: every fate of the first packets of both directions.

use super::{WHOLE, with};
use crate::World;
use crate::link::Fate;

const FATES: [Fate; 4] = [Fate::Deliver, Fate::Drop, Fate::Duplicate, Fate::Delay];

/// The `n`-th of all sequences of `length` fates.
fn sequence(n: usize, length: u32) -> Vec<Fate> {
    (0..length)
        .map(|digit| FATES[n / 4_usize.pow(digit) % 4])
        .collect()
}

fn check(up: &[Fate], down: &[Fate]) {
    // Small packets, so that even three pages take several.
    let options = with("host.ram_pages=3 host.cpus=1 host.datagram_bytes=508");
    let context = format!("up {up:?}, down {down:?}");
    let report = World::scripted(&options, up, down)
        .run()
        .unwrap_or_else(|failure| panic!("{context}: {failure}"));
    assert_eq!(report.outcomes, [Some(WHOLE)], "{context}");
}

#[test]
fn every_fate_of_the_first_six_packets() {
    for n in 0..4_usize.pow(6) {
        check(&sequence(n, 6), &[]);
    }
}

#[test]
fn every_fate_of_the_first_three_packets_each_way() {
    for n in 0..4_usize.pow(3) {
        for m in 0..4_usize.pow(3) {
            check(&sequence(n, 3), &sequence(m, 3));
        }
    }
}
