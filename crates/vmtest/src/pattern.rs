//! The seeded pattern: pages whose content anybody who knows the seed can compute, so that a page
//! found in a vmcore can be judged without trusting the guest's or QEMU's memory.
//!
//! Word `w` of page `p` is the SplitMix64 output function of `seed + 512 p + w` times the golden
//! gamma. `crashme.c` holds the same three lines in C.

/// Bytes in a page of x86-64.
pub const PAGE_SIZE: usize = 4096;
/// Words of eight bytes in a page.
const WORDS: u64 = 512;
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Pages of one kind of memory have their own seed, so that a page of one kind never equals a page
/// of another.
#[must_use]
pub fn seed_of(seed: u64, kind: &str) -> u64 {
    kind.bytes()
        .fold(seed, |hash, byte| mix(hash ^ u64::from(byte)))
}

/// Fills `page` with page number `index` of the pattern; the buffer may be any length, the pattern
/// then goes on.
pub fn fill(seed: u64, index: u64, page: &mut [u8]) {
    let first = seed.wrapping_add(index.wrapping_mul(WORDS));
    for (word, chunk) in (0u64..).zip(page.chunks_mut(8)) {
        let bytes = mix(first.wrapping_add(word).wrapping_mul(GOLDEN_GAMMA)).to_le_bytes();
        let length = chunk.len();
        chunk.copy_from_slice(&bytes[..length]);
    }
}

/// Whether `page` is page number `index` of the pattern.
#[must_use]
pub fn matches(seed: u64, index: u64, page: &[u8]) -> bool {
    let mut expected = [0; PAGE_SIZE];
    fill(seed, index, &mut expected);
    page == expected
}

/// The output function of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64-bit words.
pub(crate) fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_differ_by_seed_kind_and_index() {
        let page = |seed, index| {
            let mut page = [0; PAGE_SIZE];
            fill(seed, index, &mut page);
            page
        };
        assert_eq!(page(1, 2), page(1, 2));
        assert_ne!(page(1, 2), page(1, 3));
        assert_ne!(page(1, 2), page(2, 2));
        assert_ne!(seed_of(1, "slab"), seed_of(1, "user"));
        assert!(matches(1, 2, &page(1, 2)));
        assert!(!matches(1, 2, &page(1, 3)));
    }
}
