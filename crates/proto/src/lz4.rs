//! LZ4 block compression that cannot panic and needs no stack to speak of.
//!
//! The format is LZ4's block format (lz4_Block_format.md of the LZ4 project): sequences of literals
//! and a match at most 65535 bytes back, the last five bytes literals, the last match beginning at
//! least twelve bytes before the end. The matcher is greedy with one hash probe a position, which
//! must find five equal bytes, and takes bigger strides the longer nothing matches, so
//! incompressible blocks are given up cheaply.

use core::ops::Range;

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
const STRIDE_BITS: u32 = 4;
/// Where that stops: a stride of 513 bytes.
const MISSES_MAX: usize = 1 << 13;
/// Literals of a sequence that is written at once, and the room that it needs: a token, these, and
/// two bytes of offset.
const SHORT_LITERALS_MAX: usize = 8;
const SHORT_BYTES_MAX: usize = 1 + SHORT_LITERALS_MAX + 2;
/// Bytes that must be equal for a match to be taken. One more than the format allows: matches of
/// four save a byte and cost as much time as long ones.
const PROBE_BYTES: u32 = 5;
const PROBE_SHIFT: u32 = u64::BITS - 8 * PROBE_BYTES;
const HASH_MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

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
        let mut misses = self.misses;
        let last_match_start = input.len().saturating_sub(MATCH_FREE_END);
        let match_end_max = input.len().saturating_sub(LITERAL_END);
        // Position 0 stands for "never seen" in the table, so matches to it are given up.
        let mut at = 1;
        while at < last_match_start {
            let word = word_at(input, at)?;
            let candidate = self.swap(word, at)?;
            if candidate == 0 || (word_at(input, candidate)? ^ word) << PROBE_SHIFT != 0 {
                misses = misses.wrapping_add(1).min(MISSES_MAX);
                at = at.wrapping_add(1).wrapping_add(misses >> STRIDE_BITS);
                continue;
            }
            // Without strides the bytes before have been probed already.
            let (start, from) = if misses >> STRIDE_BITS == 0 {
                (at, candidate)
            } else {
                extend_back(input, at, candidate, literals_from)
            };
            misses = 0;
            let length = common_length(input, from, start, match_end_max)?;
            let literals = literals_from..start;
            if !out.sequence(input, literals, start.wrapping_sub(from), length)? {
                self.misses = misses;
                return None;
            }
            at = start.wrapping_add(length);
            literals_from = at;
            // The position just before the next probe is worth remembering: runs and repeats match
            // there.
            let before = at.wrapping_sub(2);
            if let Some(word) = word_at(input, before) {
                self.swap(word, before)?;
            }
        }
        self.misses = misses;
        out.last_literals(input.get(literals_from..)?)?;
        Some(out.written)
    }

    /// Remembers that the first bytes of `word` stand at `at`; returns where they, or others of the
    /// same hash, stood before.
    fn swap(&mut self, word: u64, at: usize) -> Option<usize> {
        let hash = (word << PROBE_SHIFT).wrapping_mul(HASH_MULTIPLIER) >> (u64::BITS - TABLE_BITS);
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

fn word_at(input: &[u8], at: usize) -> Option<u64> {
    input
        .get(at..)?
        .first_chunk()
        .map(|bytes| u64::from_le_bytes(*bytes))
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
    // Most runs are short.
    let (source, target) = (word_at(input, from)?, word_at(input, at)?);
    let difference = source ^ target;
    if difference != 0 {
        return usize::try_from(difference.trailing_zeros() >> 3).ok();
    }
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
    /// Whether the sequence fits.
    fn sequence(
        &mut self,
        input: &[u8],
        literals: Range<usize>,
        offset: usize,
        length: usize,
    ) -> Option<bool> {
        let extra = length.checked_sub(MATCH_BYTES_MIN)?;
        let count = literals.end.checked_sub(literals.start)?;
        let offset = u16::try_from(offset).ok()?;
        if self.short_sequence(input.get(literals.start..)?, count, offset, extra) {
            return Some(true);
        }
        let literals = input.get(literals)?;
        Some(self.long_sequence(literals, offset, extra).is_some())
    }

    fn long_sequence(&mut self, literals: &[u8], offset: u16, extra: usize) -> Option<()> {
        self.bytes(&[(nibble(literals.len()) << 4) | nibble(extra)])?;
        self.length_tail(literals.len())?;
        self.bytes(literals)?;
        self.bytes(&offset.to_le_bytes())?;
        self.length_tail(extra)
    }

    /// Most sequences have few literals and a short match. As much is written at once as such a one
    /// can have; what is not its own will be overwritten by the next one.
    fn short_sequence(&mut self, literals: &[u8], count: usize, offset: u16, extra: usize) -> bool {
        if count > SHORT_LITERALS_MAX || extra >= 15 {
            return false;
        }
        let Some(literals) = literals.first_chunk::<SHORT_LITERALS_MAX>() else {
            return false;
        };
        let Some(to) = self.rest.first_chunk_mut::<SHORT_BYTES_MAX>() else {
            return false;
        };
        let [token, body @ ..] = to;
        *token = (nibble(count) << 4) | nibble(extra);
        if let Some(to) = body.first_chunk_mut() {
            *to = *literals;
        }
        if let Some(to) = body.get_mut(count..).and_then(<[u8]>::first_chunk_mut) {
            *to = offset.to_le_bytes();
        }
        self.advance(count.wrapping_add(3))
    }

    fn advance(&mut self, bytes: usize) -> bool {
        let Some((_, rest)) = core::mem::take(&mut self.rest).split_at_mut_checked(bytes) else {
            return false;
        };
        self.rest = rest;
        self.written = self.written.wrapping_add(bytes);
        true
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
