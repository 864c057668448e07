//! Poly1305 against the crate of that name, where its carries are at their limits too.

use poly1305::universal_hash::{KeyInit as _, UniversalHash as _};
use std::vec::Vec;

use crate::poly1305::Poly1305;

fn both(key: &[u8; 32], message: &[u8]) -> ([u8; 16], [u8; 16]) {
    let mut ours = Poly1305::new(key);
    ours.update_padded(message);
    let mut theirs = poly1305::Poly1305::new(key.into());
    theirs.update_padded(message);
    (ours.finalize(), theirs.finalize().into())
}

#[test]
fn tags_are_those_of_the_crate() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Extremes often, because carries live there.
        match state >> 40 & 7 {
            0 | 1 => 0xff,
            2 => 0,
            3 => 0xfb,
            _ => (state >> 16) as u8,
        }
    };
    for round in 0..20_000 {
        let key: [u8; 32] = core::array::from_fn(|_| byte());
        let message: Vec<u8> = (0..round % 97).map(|_| byte()).collect();
        let (ours, theirs) = both(&key, &message);
        assert_eq!(ours, theirs, "key {key:02x?}, message {message:02x?}");
    }
}

#[test]
fn sums_around_the_modulus_are_reduced() {
    // With a factor of 1 or 2 the blocks themselves are the sum: RFC 8439, appendix A.3, has these.
    for factor in [1, 2, 4] {
        for last in 0xf0..=0xff_u8 {
            for top in [0, 1, 0xfe, 0xff] {
                let mut key = [0xff; 32];
                key[..16].fill(0);
                key[0] = factor;
                let mut message = [0xff; 48];
                message[0] = last;
                message[31] = top;
                for blocks in 1..=3 {
                    let (ours, theirs) = both(&key, &message[..16 * blocks]);
                    assert_eq!(ours, theirs, "{factor} {last} {top} {blocks}");
                }
            }
        }
    }
}
