//! LZ4: what we compress, the reference decompresses to the same bytes.

use std::boxed::Box;
use std::vec;
use std::vec::Vec;

use lz4_flex::block::decompress_into;

use super::Random;
use crate::lz4::Table;
use crate::record::BLOCK_BYTES;

fn check(name: &str, input: &[u8]) -> Option<usize> {
    let mut table = Box::new(Table::new());
    let mut output = vec![0; input.len() + input.len() / 250 + 32];
    let length = table
        .compress(input, &mut output)
        .unwrap_or_else(|| panic!("{name}: did not fit"));
    let mut back = vec![0; input.len()];
    let decoded = decompress_into(&output[..length], &mut back);
    assert_eq!(
        decoded.ok(),
        Some(input.len()),
        "{name}: {} bytes",
        input.len()
    );
    assert!(
        back == input,
        "{name}: {} bytes came back different",
        input.len()
    );
    // A table that has seen nothing but noise must not spoil a block.
    let mut noise = vec![0; BLOCK_BYTES];
    Random(9).fill(&mut noise);
    assert_eq!(table.compress(&noise, &mut vec![0; BLOCK_BYTES - 1]), None);
    let mut again = vec![0; output.len()];
    let after_noise = table.compress(input, &mut again).expect("fits");
    let decoded = decompress_into(&again[..after_noise], &mut back);
    assert_eq!(decoded.ok(), Some(input.len()), "{name}: after noise");
    assert!(back == input, "{name}: other bytes after noise");
    // One byte less is refused.
    assert_eq!(
        Table::new().compress(input, &mut again[..length - 1]),
        None,
        "{name}: wrote past its output"
    );
    Some(length)
}

#[test]
fn round_trips_at_every_short_length() {
    let mut random = Random(1);
    for length in 0..200 {
        let mut noise = vec![0; length];
        random.fill(&mut noise);
        check("noise", &noise);
        check("zeros", &vec![0; length]);
        check(
            "pairs",
            &[1, 2]
                .iter()
                .copied()
                .cycle()
                .take(length)
                .collect::<Vec<_>>(),
        );
        let few: Vec<u8> = noise.iter().map(|byte| byte & 1).collect();
        check("few symbols", &few);
    }
}

#[test]
fn round_trips_blocks_of_all_kinds() {
    let mut random = Random(2);
    for round in 0..300 {
        let length = if round % 3 == 0 {
            BLOCK_BYTES
        } else {
            random.below(BLOCK_BYTES as u64) as usize
        };
        let mut block: Vec<u8> = Vec::new();
        while block.len() < length {
            let run = 1 + random.below(600) as usize;
            match random.below(4) {
                0 => block.extend((0..run).map(|_| random.next().to_le_bytes()[3])),
                1 => block.extend(vec![random.next().to_le_bytes()[3]; run]),
                2 if !block.is_empty() => {
                    let from = random.below(block.len() as u64) as usize;
                    let copy: Vec<u8> = block[from..].iter().copied().cycle().take(run).collect();
                    block.extend(copy);
                }
                _ => block.extend(b"struct task_struct ".iter().copied().cycle().take(run)),
            }
        }
        block.truncate(length);
        check("mixture", &block);
    }
}

#[test]
fn compresses_what_can_be_compressed() {
    let zeros = check("zeros", &vec![0; BLOCK_BYTES]).expect("fits");
    assert!(zeros < BLOCK_BYTES / 200, "zeros took {zeros} bytes");
    let text: Vec<u8> = b"kernel panic - not syncing: "
        .iter()
        .copied()
        .cycle()
        .take(BLOCK_BYTES)
        .collect();
    let text = check("text", &text).expect("fits");
    assert!(text < BLOCK_BYTES / 100, "text took {text} bytes");
}

#[test]
fn incompressible_blocks_are_given_up() {
    let mut block = vec![0; BLOCK_BYTES];
    Random(3).fill(&mut block);
    let mut output = vec![0; BLOCK_BYTES - 1];
    assert_eq!(Table::new().compress(&block, &mut output), None);
}

#[test]
fn a_stretch_of_noise_does_not_hide_what_follows() {
    let mut table = Box::new(Table::new());
    let mut noise = vec![0; BLOCK_BYTES];
    Random(4).fill(&mut noise);
    let mut output = vec![0; BLOCK_BYTES - 1];
    for _ in 0..4 {
        assert_eq!(table.compress(&noise, &mut output), None);
    }
    let text: Vec<u8> = (0..BLOCK_BYTES / 32)
        .flat_map(|n| std::format!("task {n:8} state 0 flags 0x0000 ").into_bytes())
        .take(BLOCK_BYTES)
        .collect();
    let length = table.compress(&text, &mut output).expect("fits");
    assert!(
        length < BLOCK_BYTES / 2,
        "ordinary memory took {length} bytes"
    );
}

#[test]
fn too_long_a_block_is_refused() {
    let block = vec![0; BLOCK_BYTES + 1];
    let mut output = vec![0; BLOCK_BYTES];
    assert_eq!(Table::new().compress(&block, &mut output), None);
}
