//! Many seeds, each another world.

use super::complete;
use crate::Options;

#[test]
fn every_seed_ends_with_the_whole_dump() {
    for seed in 0..200 {
        complete(&Options::draw(seed));
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in [3, 77] {
        let options = Options::draw(seed);
        assert_eq!(complete(&options), complete(&options));
    }
}

#[test]
fn another_seed_is_another_run() {
    assert_ne!(
        complete(&Options::draw(1)).trace,
        complete(&Options::draw(2)).trace
    );
}
