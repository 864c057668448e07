//! What is fuzzed: one function a decoder, each of which takes any bytes and must neither panic nor
//! take memory or time out of proportion, and one that runs a whole simulated world.
//!
//! `cargo xtask fuzz NAME --minutes M` runs one of them under libFuzzer; `cargo test` in this folder
//! replays what is in `corpus`, without libFuzzer.

#![expect(
    clippy::missing_panics_doc,
    reason = "a target panics when it has found something; that is what it is for"
)]

mod console;
mod engines;
mod files;
mod formats;
mod lzo;
mod memory;
mod netconsole;
mod text;
mod world;

/// The environment variable that names the target.
pub const TARGET_VARIABLE: &str = "NETDUMP_FUZZ_TARGET";

/// Every target and its name, which is also that of its corpus.
pub const TARGETS: [(&str, fn(&[u8])); 17] = [
    ("arming", formats::arming),
    ("client", engines::client),
    ("console", console::console),
    ("content", files::content),
    ("dump", files::dump),
    ("key", files::key),
    ("lz4", formats::lz4),
    ("lzo", lzo::lzo),
    ("memory", memory::memory),
    ("netconsole", netconsole::netconsole),
    ("record", formats::record),
    ("reply", formats::reply),
    ("server", engines::server),
    ("spool", files::spool),
    ("text", text::text),
    ("wire", formats::wire),
    ("world", world::world),
];

/// Takes a value off the begin of `bytes`, with zeros where they end.
fn number(bytes: &mut &[u8]) -> u64 {
    let mut value = [0; 8];
    let taken = bytes.len().min(8);
    let (head, rest) = bytes.split_at(taken);
    value[..taken].copy_from_slice(head);
    *bytes = rest;
    u64::from_le_bytes(value)
}

/// Takes one byte off the begin of `bytes`, zero where they end.
fn byte(bytes: &mut &[u8]) -> u8 {
    match bytes.split_first() {
        Some((first, rest)) => {
            *bytes = rest;
            *first
        }
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::TARGETS;

    #[test]
    fn the_corpora_find_nothing() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
        for (name, target) in TARGETS {
            let folder = fs::read_dir(corpora.join(name)).expect("every target has a corpus");
            let mut inputs = 0;
            for entry in folder {
                let path = entry.expect("a folder can be listed").path();
                let bytes = fs::read(&path).expect("an input can be read");
                println!("{}", path.display());
                target(&bytes);
                inputs += 1;
            }
            assert!(inputs > 0, "the corpus of {name} is empty");
        }
    }
}
