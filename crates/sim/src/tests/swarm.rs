//! Many seeds, each another world.

use super::run;
use crate::Options;

#[test]
fn every_seed_ends_well() {
    for seed in 0..200 {
        run(&Options::draw(seed));
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in [3, 77] {
        let options = Options::draw(seed);
        assert_eq!(run(&options), run(&options));
    }
}

#[test]
fn another_seed_is_another_run() {
    assert_ne!(run(&Options::draw(1)).trace, run(&Options::draw(2)).trace);
}
