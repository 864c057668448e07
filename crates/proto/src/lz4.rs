//! LZ4 block compression that cannot panic and needs no stack to speak of.
//!
//! The format is LZ4's block format (lz4_Block_format.md of the LZ4 project): sequences of literals
//! and a match at most 65535 bytes back, the last five bytes literals, the last match beginning at
//! least twelve bytes before the end. The matcher is greedy with one hash probe a position and
//! takes bigger strides the longer nothing matches, so incompressible blocks are given up cheaply.

use crate::record::BLOCK_BYTES;

const TABLE_BITS: u32 = 12;
const TABLE_ENTRIES: usize = 1 << TABLE_BITS;
/// Shortest match.
const MATCH_BYTES_MIN: usize = 4;
/// The last match begins at least this many bytes before the end of the block.
const MATCH_FREE_END: usize = 12;
/// The last bytes of a block are always literals.
const LITERAL_END: usize = 5;
/// Failed probes after which the stride grows by one (as a power of two).
const STRIDE_BITS: u32 = 5;
/// Where that stops: a stride of 513 bytes.
const MISSES_MAX: usize = 1 << 14;
const HASH_MULTIPLIER: u32 = 2_654_435_761;

/// The compressor's memory, 8 KiB, all-zero when new.
pub struct Table {
    /// Where each hash was last seen in this block; 0 if nowhere.
    seen: [u16; TABLE_ENTRIES],
    /// Probes that failed in a row, from block to block: memory that does not compress comes in
    /// stretches, and the longer one lasts the less is spent on it.
    misses: usize,
}

// A position is stored in 16 bits, so a block must be short enough.
const _: () = assert!(
    BLOCK_BYTES <= 1 << 16,
    "positions in a block must fit the table's entries"
);

impl Table {
    /// An empty table.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            seen: [0; TABLE_ENTRIES],
            misses: 0,
        }
    }

    /// Compresses `input` (at most [`BLOCK_BYTES`] bytes) into `output` and returns the length, or
    /// `None` if it does not fit: a caller that gives an output shorter than the input learns that
    /// the block does not shrink.
    #[must_use]
    pub fn compress(&mut self, input: &[u8], output: &mut [u8]) -> Option<usize> {
        if input.len() > BLOCK_BYTES {
            return None;
        }
        self.seen.fill(0);
        let mut out = Output {
            rest: output,
            written: 0,
        };
        let mut literals_from = 0;
        let last_match_start = input.len().saturating_sub(MATCH_FREE_END);
        let match_end_max = input.len().saturating_sub(LITERAL_END);
        // Position 0 stands for "never seen" in the table, so matches to it are given up.
        let mut at = 1;
        while at < last_match_start {
            let Some(word) = word_at(input, at) else {
                break;
            };
            let Some(candidate) = self.swap(word, at) else {
                break;
            };
            if candidate == 0 || word_at(input, candidate) != Some(word) {
                self.misses = self.misses.wrapping_add(1).min(MISSES_MAX);
                at = at.wrapping_add(1).wrapping_add(self.misses >> STRIDE_BITS);
                continue;
            }
            self.misses = 0;
            let (start, from) = extend_back(input, at, candidate, literals_from);
            let length = common_length(input, from, start, match_end_max)?;
            let literals = input.get(literals_from..start)?;
            out.sequence(
                literals,
                u16::try_from(start.wrapping_sub(from)).ok()?,
                length,
            )?;
            at = start.wrapping_add(length);
            literals_from = at;
            // The position just before the next probe is worth remembering: runs and repeats match
            // there.
            if let Some(word) = word_at(input, at.wrapping_sub(2)) {
                self.swap(word, at.wrapping_sub(2))?;
            }
        }
        out.last_literals(input.get(literals_from..)?)?;
        Some(out.written)
    }

    /// Remembers that `word` stands at `at`; returns where it, or one of the same hash, stood
    /// before.
    fn swap(&mut self, word: u32, at: usize) -> Option<usize> {
        let hash = word.wrapping_mul(HASH_MULTIPLIER) >> (u32::BITS - TABLE_BITS);
        let entry = self.seen.get_mut(usize::try_from(hash).ok()?)?;
        let before = core::mem::replace(entry, u16::try_from(at).ok()?);
        Some(usize::from(before))
    }
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

fn word_at(input: &[u8], at: usize) -> Option<u32> {
    input
        .get(at..)?
        .first_chunk()
        .map(|bytes| u32::from_le_bytes(*bytes))
}

/// Moves a match's begin back over equal bytes, not beyond `floor`.
fn extend_back(input: &[u8], mut at: usize, mut from: usize, floor: usize) -> (usize, usize) {
    while at > floor && from > 0 {
        let (before_at, before_from) = (at.wrapping_sub(1), from.wrapping_sub(1));
        if input.get(before_at) != input.get(before_from) {
            break;
        }
        (at, from) = (before_at, before_from);
    }
    (at, from)
}

/// Length of the common run of `input[from..]` and `input[at..end]`. `from` is before `at`.
fn common_length(input: &[u8], from: usize, at: usize, end: usize) -> Option<usize> {
    let target = input.get(at..end)?;
    let source = input.get(from..)?.get(..target.len())?;
    let (target_words, target_tail) = target.as_chunks::<8>();
    let (source_words, source_tail) = source.as_chunks::<8>();
    let mut length = 0_usize;
    for (a, b) in target_words.iter().zip(source_words) {
        let difference = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        if difference != 0 {
            let same = usize::try_from(difference.trailing_zeros() >> 3).ok()?;
            return Some(length.wrapping_add(same));
        }
        length = length.wrapping_add(8);
    }
    let tail = target_tail
        .iter()
        .zip(source_tail)
        .take_while(|(a, b)| a == b)
        .count();
    Some(length.wrapping_add(tail))
}

struct Output<'a> {
    rest: &'a mut [u8],
    written: usize,
}

impl Output<'_> {
    fn sequence(&mut self, literals: &[u8], offset: u16, length: usize) -> Option<()> {
        let extra = length.checked_sub(MATCH_BYTES_MIN)?;
        self.bytes(&[(nibble(literals.len()) << 4) | nibble(extra)])?;
        self.length_tail(literals.len())?;
        self.bytes(literals)?;
        self.bytes(&offset.to_le_bytes())?;
        self.length_tail(extra)
    }

    fn last_literals(&mut self, literals: &[u8]) -> Option<()> {
        self.bytes(&[nibble(literals.len()) << 4])?;
        self.length_tail(literals.len())?;
        self.bytes(literals)
    }

    /// What of `length` did not fit its nibble: bytes of 255, then the rest.
    fn length_tail(&mut self, length: usize) -> Option<()> {
        let Some(mut left) = length.checked_sub(15) else {
            return Some(());
        };
        while let Some(less) = left.checked_sub(255) {
            self.bytes(&[255])?;
            left = less;
        }
        self.bytes(&[u8::try_from(left).ok()?])
    }

    fn bytes(&mut self, bytes: &[u8]) -> Option<()> {
        let (head, rest) = core::mem::take(&mut self.rest).split_at_mut_checked(bytes.len())?;
        head.copy_from_slice(bytes);
        self.rest = rest;
        self.written = self.written.wrapping_add(bytes.len());
        Some(())
    }
}

fn nibble(length: usize) -> u8 {
    u8::try_from(length).map_or(15, |length| length.min(15))
}
