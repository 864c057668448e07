//! What a machine-check bank's status says, in words: the bits and codes that all x86 CPUs share.

/// The bank has something to report.
const VALID: u64 = 1 << 63;
const OVERFLOW: u64 = 1 << 62;
const UNCORRECTED: u64 = 1 << 61;
const ENABLED: u64 = 1 << 60;
const CONTEXT_CORRUPT: u64 = 1 << 57;

/// Whether the bank has something to report.
pub(super) const fn is_valid(status: u64) -> bool {
    status & VALID != 0
}

/// Whether what it reports was not corrected.
pub(super) const fn is_uncorrected(status: u64) -> bool {
    is_valid(status) && status & UNCORRECTED != 0
}

/// The status in words.
pub(super) fn words(status: u64) -> String {
    let corrected = if is_uncorrected(status) {
        "uncorrected"
    } else {
        "corrected"
    };
    let bits = [
        (ENABLED, "enabled"),
        (CONTEXT_CORRUPT, "context corrupt"),
        (OVERFLOW, "others before it lost"),
    ];
    let set = bits.iter().filter(|(bit, _)| status & bit != 0);
    let mut words = vec![corrected];
    words.extend(set.map(|(_, word)| *word));
    let code = u16::try_from(status & 0xffff).unwrap_or(0);
    format!("{} {} (code {code:#06x})", words.join(" "), meaning(code))
}

/// What an error code means. Bit 12 says that a filter is on, and nothing of the error.
const fn meaning(code: u16) -> &'static str {
    match code & !0x1000 {
        0 => "no error",
        1 => "unclassified error",
        2 => "parity error of the microcode ROM",
        3 => "error signalled from outside",
        4 => "disagreement of redundant CPUs",
        5 => "internal parity error",
        6 => "error in the system management mode",
        0x400 => "internal timer error",
        0x0e0b => "I/O error",
        code if code & 0xfc00 == 0x0400 => "internal error",
        code if code & 0xfffc == 0x000c => "error in the cache hierarchy",
        code if code & 0xfff0 == 0x0010 => "error of a translation buffer",
        code if code & 0xff80 == 0x0080 => "error of the memory controller",
        code if code & 0xff00 == 0x0100 => "error of a cache",
        code if code & 0xf800 == 0x0800 => "error of bus or interconnect",
        _ => "error of an unknown kind",
    }
}
