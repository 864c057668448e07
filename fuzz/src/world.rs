//! A simulated world in which the input says what goes wrong.

use sim::link::Fate;
use sim::{Options, World};

use crate::byte;

/// A world whose options, and the fates of whose first packets, are the input's.
pub(crate) fn world(mut bytes: &[u8]) {
    let seed = u64::from(byte(&mut bytes));
    let fates = |bytes: &mut &[u8]| -> Vec<Fate> {
        let count = byte(bytes) % 32;
        let fate = |bits: u8| match bits & 3 {
            0 => Fate::Deliver,
            1 => Fate::Drop,
            2 => Fate::Duplicate,
            _ => Fate::Delay,
        };
        (0..count).map(|_| fate(byte(bytes))).collect()
    };
    let (up, down) = (fates(&mut bytes), fates(&mut bytes));
    let mut options = Options::draw_from(seed, &mut |bound| {
        let high = u64::from(byte(&mut bytes));
        (high << 8 | u64::from(byte(&mut bytes))) % bound.max(1)
    });
    // Small ones are over sooner, so that more of them are tried.
    options.host.ram_pages = options.host.ram_pages.min(100);
    if let Err(failure) = World::scripted(&options, &up, &down).run() {
        panic!("{failure}");
    }
}
