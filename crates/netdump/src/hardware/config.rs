//! A PCI device's configuration space: what it is, and which errors it has noted.
//!
//! The bytes come from a host, and may be anything: walks are bounded, and what lies beyond the
//! bytes is zero.

/// The status register, and the bits of it that are errors.
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const STATUS_ERRORS: &[(u32, &str)] = &[
    (1 << 8, "master data parity error"),
    (1 << 11, "target abort signalled"),
    (1 << 12, "target abort received"),
    (1 << 13, "master abort received"),
    (1 << 14, "system error signalled"),
    (1 << 15, "parity error detected"),
];
const FIRST_CAPABILITY: usize = 0x34;
const CAPABILITIES_MAX: usize = 48;
/// The capability of PCI Express; its device status lies ten bytes in.
const EXPRESS: u8 = 0x10;
const EXPRESS_STATUS: usize = 10;
const EXPRESS_ERRORS: &[(u32, &str)] = &[
    (1 << 0, "corrected error"),
    (1 << 1, "non-fatal error"),
    (1 << 2, "fatal error"),
    (1 << 3, "unsupported request"),
];
const EXTENDED: usize = 0x100;
const EXTENDED_MAX: usize = 96;
/// The extended capability of advanced error reporting.
const ADVANCED: u32 = 1;
const UNCORRECTABLE: usize = 0x04;
const CORRECTABLE: usize = 0x10;
const UNCORRECTABLE_ERRORS: &[(u32, &str)] = &[
    (1 << 4, "data link protocol error"),
    (1 << 5, "surprise down"),
    (1 << 12, "poisoned packet"),
    (1 << 13, "flow control error"),
    (1 << 14, "completion timeout"),
    (1 << 15, "completer abort"),
    (1 << 16, "unexpected completion"),
    (1 << 17, "receiver overflow"),
    (1 << 18, "malformed packet"),
    (1 << 19, "ECRC error"),
    (1 << 20, "unsupported request"),
    (1 << 21, "access control violation"),
    (1 << 22, "uncorrectable internal error"),
];
const CORRECTABLE_ERRORS: &[(u32, &str)] = &[
    (1 << 0, "receiver error"),
    (1 << 6, "bad packet"),
    (1 << 7, "bad link packet"),
    (1 << 8, "replay counter rolled over"),
    (1 << 12, "replay timeout"),
    (1 << 14, "corrected internal error"),
    (1 << 15, "header log full"),
];

/// The two bytes at `at`.
pub(super) fn word(config: &[u8], at: usize) -> u16 {
    let byte = |at| config.get(at).copied().unwrap_or(0);
    u16::from_le_bytes([byte(at), byte(at + 1)])
}

fn double(config: &[u8], at: usize) -> u32 {
    u32::from(word(config, at)) | u32::from(word(config, at + 2)) << 16
}

/// What kind of device it is, in the words of PCI's base classes.
pub(super) fn class(config: &[u8]) -> String {
    let code = double(config, 8) >> 8;
    let name = match code >> 16 {
        0x01 => "storage",
        0x02 => "network",
        0x03 => "display",
        0x04 => "multimedia",
        0x05 => "memory",
        0x06 => "bridge",
        0x07 => "communication",
        0x08 => "system",
        0x09 => "input",
        0x0c => "serial bus",
        _ => "other",
    };
    format!("{name} ({code:06x})")
}

/// The errors that the device has noted.
pub(super) fn errors(config: &[u8]) -> Vec<&'static str> {
    let status = word(config, STATUS);
    let mut errors = set(STATUS_ERRORS, status.into());
    if status & STATUS_CAPABILITIES != 0
        && let Some(at) = capability(config)
    {
        errors.extend(set(
            EXPRESS_ERRORS,
            word(config, at + EXPRESS_STATUS).into(),
        ));
    }
    if let Some(at) = advanced(config) {
        errors.extend(set(
            UNCORRECTABLE_ERRORS,
            double(config, at + UNCORRECTABLE),
        ));
        errors.extend(set(CORRECTABLE_ERRORS, double(config, at + CORRECTABLE)));
    }
    errors
}

fn set(names: &[(u32, &'static str)], bits: u32) -> Vec<&'static str> {
    let set = names.iter().filter(|(bit, _)| bits & bit != 0);
    set.map(|(_, name)| *name).collect()
}

/// Where the capability of PCI Express is.
fn capability(config: &[u8]) -> Option<usize> {
    let mut at = usize::from(*config.get(FIRST_CAPABILITY)? & !3);
    for _ in 0..CAPABILITIES_MAX {
        if at < 0x40 {
            return None;
        }
        if *config.get(at)? == EXPRESS {
            return Some(at);
        }
        at = usize::from(*config.get(at + 1)? & !3);
    }
    None
}

/// Where the extended capability of advanced error reporting is.
fn advanced(config: &[u8]) -> Option<usize> {
    let mut at = EXTENDED;
    for _ in 0..EXTENDED_MAX {
        let head = double(config, at);
        if head & 0xffff == ADVANCED {
            return Some(at);
        }
        at = usize::try_from(head >> 20).ok()? & !3;
        if at < EXTENDED {
            return None;
        }
    }
    None
}
