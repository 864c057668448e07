//! How big and how bad a world is.

use std::fmt;

use crate::random::Random;

/// The faults of one direction of the link. All zero: a perfect link without delay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkOptions {
    /// One-way delay of every packet, in microseconds.
    pub delay_us: u64,
    /// Mean of an exponential delay on top, in microseconds: what makes packets overtake each
    /// other.
    pub jitter_us: u64,
    /// Packets lost, of 1000.
    pub loss_permille: u32,
    /// Packets delivered twice, of 1000.
    pub duplicate_permille: u32,
    /// Packets with one bit flipped, of 1000.
    pub corrupt_permille: u32,
    /// Packets cut short, of 1000.
    pub truncate_permille: u32,
}

/// How big and how bad everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where all draws come from.
    pub seed: u64,
    /// Pages of System RAM.
    pub ram_pages: u64,
    /// CPUs.
    pub cpus: u32,
    /// Transmit buffers.
    pub pool_slots: u16,
    /// Largest UDP payload, in bytes.
    pub datagram_bytes: usize,
    /// How long the NIC owns a buffer after each send, in microseconds.
    pub nic_us: u64,
    /// What one step of the client costs, in microseconds.
    pub step_us: u64,
    /// Packets the server lets the client have under way.
    pub credit: u64,
    /// From the host to the server.
    pub up: LinkOptions,
    /// From the server to the host.
    pub down: LinkOptions,
    /// Simulated time after which a run has failed, in microseconds.
    pub limit_us: u64,
    /// A mutant that must fail: the host never sends anything twice.
    pub resends_off: bool,
}

impl Options {
    /// A small world without faults.
    #[must_use]
    pub const fn calm(seed: u64) -> Self {
        let link = LinkOptions {
            delay_us: 100,
            jitter_us: 0,
            loss_permille: 0,
            duplicate_permille: 0,
            corrupt_permille: 0,
            truncate_permille: 0,
        };
        Self {
            seed,
            ram_pages: 2000,
            cpus: 4,
            pool_slots: 256,
            datagram_bytes: 1472,
            nic_us: 20,
            step_us: 5,
            credit: 512,
            up: link,
            down: link,
            limit_us: 600_000_000,
            resends_off: false,
        }
    }

    /// The world of `seed`: each fault sometimes absent, otherwise of wildly different strength.
    #[must_use]
    pub fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed).fork(1);
        let slots = [1, 2, 16, 64, 256, 512];
        let datagrams = [508, 1472, 1472, 1472, 8972];
        Self {
            ram_pages: 1 + random.below(3000),
            cpus: 1 + u32::try_from(random.below(8)).unwrap_or(0),
            pool_slots: pick(&mut random, &slots),
            datagram_bytes: pick(&mut random, &datagrams),
            nic_us: pick(&mut random, &[0, 10, 300, 5000]),
            step_us: pick(&mut random, &[0, 5, 50]),
            credit: pick(&mut random, &[1, 20, 256, 4096]),
            up: LinkOptions::draw(&mut random),
            down: LinkOptions::draw(&mut random),
            ..Self::calm(seed)
        }
    }
}

impl LinkOptions {
    fn draw(random: &mut Random) -> Self {
        Self {
            delay_us: pick(random, &[0, 50, 1000, 25_000]),
            jitter_us: pick(random, &[0, 0, 20, 500, 5000]),
            loss_permille: pick(random, &[0, 0, 1, 10, 50, 200]),
            duplicate_permille: pick(random, &[0, 0, 5, 100]),
            corrupt_permille: pick(random, &[0, 0, 5, 50]),
            truncate_permille: pick(random, &[0, 0, 5, 50]),
        }
    }
}

fn pick<T: Copy>(random: &mut Random, choices: &[T]) -> T {
    let index = random.below(u64::try_from(choices.len()).unwrap_or(1));
    choices[usize::try_from(index).unwrap_or(0)]
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#?}")
    }
}
