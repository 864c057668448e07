//! The generator all draws come from: xorshift64*, written here so that its stream never changes.

/// A seeded generator. Each component has its own fork, so that one more draw in one does not
/// disturb another.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The generator of `seed`; every seed, zero included, gives another stream.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut generator = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..8 {
            generator.draw();
        }
        generator
    }

    /// A generator for the component called `label`, without a draw from this one.
    #[must_use]
    pub fn fork(&self, label: u64) -> Self {
        Self::new(self.0 ^ label.wrapping_mul(0xD134_2543_DE82_EF95))
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.draw() >> 16) % bound
    }

    /// True in `permille` of 1000 draws.
    pub fn chance(&mut self, permille: u64) -> bool {
        self.below(1000) < permille
    }

    /// An exponentially distributed number with the given mean, in integers: the number of fair
    /// 1-in-16 trials that fail, scaled. Never more than 12 times the mean.
    pub fn exponential(&mut self, mean: u64) -> u64 {
        let mut sixteenths = 0;
        while sixteenths < 192 && self.below(16) != 0 {
            sixteenths += 1;
        }
        mean * sixteenths / 16
    }
}
