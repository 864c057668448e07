//! Poly1305 (RFC 8439, section 2.5) in 64-bit arithmetic, for messages of whole 16-byte blocks,
//! which is all that the seal has.
//!
//! Our own because a third of a page's cost was spent here: without vector registers, which the
//! kernel does not give us, the crate's portable code works in 32 bits, and its vector code is
//! called instruction by instruction unless the whole program is compiled for AVX2. A product of
//! two 64-bit limbs is one machine instruction, so this is faster than both. No branch and no index
//! depends on a secret. Tests hold it equal to the crate.
//!
//! Numbers are kept in three limbs of 44, 44 and 42 bits, the lowest first.

const LOW: u64 = (1 << 44) - 1;
const HIGH: u64 = (1 << 42) - 1;
/// The bit after a whole block's 128, as the third limb has it.
const BLOCK_END: u64 = 1 << 40;
pub(crate) const BLOCK_BYTES: usize = 16;

/// A computation under way.
pub(crate) struct Poly1305 {
    /// The sum so far; limbs may exceed their bits by a little.
    sum: [u64; 3],
    factor: Factor,
    /// The factor's square: two blocks are added at once with it.
    square: Factor,
    pad: u128,
}

#[derive(Clone, Copy)]
struct Factor {
    limbs: [u64; 3],
    /// The upper limbs times 20: what wraps past 2^130 counts five times, and a limb boundary lies
    /// two bits below it.
    wrapped: [u64; 2],
}

impl Poly1305 {
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        let (factor, pad) = key.split_at(BLOCK_BYTES);
        let number = |bytes: &[u8]| {
            bytes
                .first_chunk()
                .map_or(0, |bytes| u128::from_le_bytes(*bytes))
        };
        let factor = limbs(number(factor) & 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff);
        let (factor, square) = (
            Factor::new(factor),
            reduced(Factor::new(factor).times(factor)),
        );
        Self {
            sum: [0; 3],
            factor,
            square: Factor::new(carried(square)),
            pad: number(pad),
        }
    }

    /// Adds `bytes`, the last block filled up with zeros.
    pub(crate) fn update_padded(&mut self, bytes: &[u8]) {
        let (blocks, rest) = bytes.as_chunks::<BLOCK_BYTES>();
        let (pairs, single) = blocks.as_chunks::<2>();
        for [first, second] in pairs {
            let first = self.square.times(added(self.sum, first));
            let second = self.factor.times(added([0; 3], second));
            self.sum = reduced([
                first[0].wrapping_add(second[0]),
                first[1].wrapping_add(second[1]),
                first[2].wrapping_add(second[2]),
            ]);
        }
        for block in single {
            self.block(block);
        }
        if !rest.is_empty() {
            let mut block = [0; BLOCK_BYTES];
            for (to, from) in block.iter_mut().zip(rest) {
                *to = *from;
            }
            self.block(&block);
        }
    }

    /// Adds one block.
    pub(crate) fn block(&mut self, block: &[u8; BLOCK_BYTES]) {
        self.sum = reduced(self.factor.times(added(self.sum, block)));
    }

    /// The tag.
    pub(crate) fn finalize(self) -> [u8; BLOCK_BYTES] {
        let [h0, h1, h2] = carried(carried(self.sum));
        // The sum is below 2^130; it is reduced if adding five carries past that.
        let g0 = h0.wrapping_add(5);
        let g1 = h1.wrapping_add(g0 >> 44);
        let g2 = h2.wrapping_add(g1 >> 44);
        let reduced = 0_u64.wrapping_sub(g2 >> 42);
        let choose = |h: u64, g: u64| u128::from((h & !reduced) | (g & reduced));
        let number =
            choose(h0, g0 & LOW) | (choose(h1, g1 & LOW) << 44) | (choose(h2, g2 & HIGH) << 88);
        number.wrapping_add(self.pad).to_le_bytes()
    }
}

impl Factor {
    fn new(limbs: [u64; 3]) -> Self {
        let [_, r1, r2] = limbs;
        Self {
            limbs,
            wrapped: [r1.wrapping_mul(20), r2.wrapping_mul(20)],
        }
    }

    /// The product by limbs, each below 2^94.
    #[inline]
    fn times(&self, [h0, h1, h2]: [u64; 3]) -> [u128; 3] {
        let ([r0, r1, r2], [s1, s2]) = (self.limbs, self.wrapped);
        [
            sum(product(h0, r0), product(h1, s2), product(h2, s1)),
            sum(product(h0, r1), product(h1, r0), product(h2, s2)),
            sum(product(h0, r2), product(h1, r1), product(h2, r0)),
        ]
    }
}

/// A sum with a whole block added to it.
#[inline]
fn added([h0, h1, h2]: [u64; 3], block: &[u8; BLOCK_BYTES]) -> [u64; 3] {
    let [m0, m1, m2] = limbs(u128::from_le_bytes(*block));
    [
        h0.wrapping_add(m0),
        h1.wrapping_add(m1),
        h2.wrapping_add(m2 | BLOCK_END),
    ]
}

/// Limbs of about their size again.
#[inline]
fn reduced([d0, d1, d2]: [u128; 3]) -> [u64; 3] {
    let d1 = d1.wrapping_add(d0 >> 44);
    let d2 = d2.wrapping_add(d1 >> 44);
    let h0 = (low(d0) & LOW).wrapping_add(low(d2 >> 42).wrapping_mul(5));
    [
        h0 & LOW,
        (low(d1) & LOW).wrapping_add(h0 >> 44),
        low(d2) & HIGH,
    ]
}

/// The low 128 bits of a number as limbs.
#[inline]
fn limbs(number: u128) -> [u64; 3] {
    [
        low(number) & LOW,
        low(number >> 44) & LOW,
        low(number >> 88),
    ]
}

/// Moves what exceeds a limb's bits into the next one.
fn carried([h0, h1, h2]: [u64; 3]) -> [u64; 3] {
    let h1 = h1.wrapping_add(h0 >> 44);
    let h2 = h2.wrapping_add(h1 >> 44);
    let h0 = (h0 & LOW).wrapping_add((h2 >> 42).wrapping_mul(5));
    [h0 & LOW, (h1 & LOW).wrapping_add(h0 >> 44), h2 & HIGH]
}

#[inline]
fn product(a: u64, b: u64) -> u128 {
    u128::from(a).wrapping_mul(u128::from(b))
}

#[inline]
fn sum(a: u128, b: u128, c: u128) -> u128 {
    a.wrapping_add(b).wrapping_add(c)
}

#[inline]
#[expect(
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "the low half is what is wanted"
)]
const fn low(number: u128) -> u64 {
    number as u64
}
