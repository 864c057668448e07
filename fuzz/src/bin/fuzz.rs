//! The fuzzer: libFuzzer around the target that the environment names. `cargo xtask fuzz` builds it
//! with coverage and runs it.

#![no_main]

use std::sync::LazyLock;

static TARGET: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var(fuzz::TARGET_VARIABLE).unwrap_or_default();
    match fuzz::TARGETS.iter().find(|(known, _)| *known == name) {
        Some((_, target)) => *target,
        None => panic!("{} names no target: `{name}`", fuzz::TARGET_VARIABLE),
    }
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| TARGET(bytes));
