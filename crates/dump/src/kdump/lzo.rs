//! LZO1X, which every reader of kdump-compressed files has: pages made from the LZ4 blocks in which
//! they came, token by token, and pages unpacked again.
//!
//! LZ4 and LZO1X say the same in other codes: copy so many bytes as they are, then so many from
//! some way back. So a page needs no search for what repeats: that was done by whoever made the LZ4
//! block. What repeats bytes of an earlier page of the block becomes bytes as they are, because
//! readers unpack each page alone.
//!
//! The codes used here, by their first byte (the lowest two bits of a match's first offset byte say
//! how many literals, up to 3, follow it):
//!
//! ```text
//! 18..=255  only at the begin: this less 17 literals
//! 0..=15    this plus 3 literals; 0: the length goes on behind it
//! 64..=255  M2: 3 to 8 bytes from 1 to 2048 back
//! 32..=63   M3: bytes from 1 to 16384 back; a length of 0 goes on behind it
//! 16..=31   M4: bytes from further back; with distance 16384 and length 3, the end
//! ```

use crate::page::PAGE_SIZE;

/// Room behind a page's packed bytes for copies of whole words.
const SLACK: usize = 64;
/// What a match, the head of its literals and the end can take beside the literals themselves: a
/// page's length in bytes of 255 each is at most 17 bytes long.
const HEADS: usize = 48;
/// Bytes that are copied at once, wanted or not.
const STRIDE: usize = 16;
const M2_LENGTH_MAX: usize = 8;
const M2_DISTANCE_MAX: usize = 2048;
const MATCH_MIN: usize = 3;
const END: [u8; 3] = [0x11, 0, 0];

/// A page on its way into its packed form.
struct Packer {
    packed: [u8; PAGE_SIZE + SLACK],
    used: usize,
    /// Where the page begins in the block.
    start: usize,
    /// From here on nothing is packed yet.
    literals: usize,
    /// Where the last match says how many literals follow it.
    state: Option<usize>,
    /// It would not shrink.
    grows: bool,
}

/// Packs all pages of a block, whose LZ4 form is `lz4`: calls `page` with each, packed or, if it
/// does not shrink, `None`. `pages` are what `lz4` unpacks to; false when its lengths are not those
/// of the pages, as when it is cut, and then the pages given until there are right all the same.
pub(super) fn transcode(lz4: &[u8], pages: &[u8], mut page: impl FnMut(Option<&[u8]>)) -> bool {
    let mut packer = Packer::new();
    let (mut rest, mut at) = (lz4, 0_usize);
    while let Some((&token, behind)) = rest.split_first() {
        rest = behind;
        let Some(count) = length(usize::from(token >> 4), &mut rest) else {
            return false;
        };
        let Some((_, behind)) = rest.split_at_checked(count) else {
            return false;
        };
        rest = behind;
        at += count;
        if at > pages.len() {
            return false;
        }
        packer.close_until(at, pages, &mut page);
        let Some((offset, behind)) = rest.split_first_chunk() else {
            return rest.is_empty() && packer.start == pages.len();
        };
        rest = behind;
        let distance = usize::from(u16::from_le_bytes(*offset));
        let Some(count) = length(usize::from(token & 15), &mut rest) else {
            return false;
        };
        let end = at + count + 4;
        if end > pages.len() || distance == 0 {
            return false;
        }
        while at < end {
            let piece = end.min(packer.start + PAGE_SIZE);
            packer.repeat(at, piece, distance, pages);
            at = piece;
            packer.close_until(at, pages, &mut page);
        }
    }
    false
}

/// A length of LZ4: a nibble, and bytes behind it when it is full.
fn length(nibble: usize, rest: &mut &[u8]) -> Option<usize> {
    let mut length = nibble;
    if nibble == 15 {
        loop {
            let (&more, behind) = rest.split_first()?;
            *rest = behind;
            length += usize::from(more);
            if more != 255 {
                break;
            }
        }
    }
    Some(length)
}

impl Packer {
    const fn new() -> Self {
        Self {
            packed: [0; PAGE_SIZE + SLACK],
            used: 0,
            start: 0,
            literals: 0,
            state: None,
            grows: false,
        }
    }

    /// Gives away the pages that end at `at` or before.
    fn close_until(&mut self, at: usize, pages: &[u8], page: &mut impl FnMut(Option<&[u8]>)) {
        while self.start + PAGE_SIZE <= at {
            let end = self.start + PAGE_SIZE;
            self.put_literals(end, pages);
            if !self.grows {
                self.put(&END);
            }
            let packed = self.packed.get(..self.used);
            page(packed.filter(|packed| !self.grows && packed.len() < PAGE_SIZE));
            (self.start, self.literals) = (end, end);
            (self.used, self.state, self.grows) = (0, None, false);
        }
    }

    /// The bytes from `at` to `end`, all in this page, are those `distance` before.
    fn repeat(&mut self, at: usize, end: usize, distance: usize, pages: &[u8]) {
        // What lies before the page is not there when it is unpacked.
        let at = at.max(self.start + distance);
        if self.grows || at + MATCH_MIN > end {
            return;
        }
        self.put_literals(at, pages);
        if self.grows {
            return;
        }
        let (count, back) = (end - at, distance - 1);
        if count <= M2_LENGTH_MAX && distance <= M2_DISTANCE_MAX {
            self.state = Some(self.used);
            self.put(&[
                low_byte((count - 1) << 5 | (back & 7) << 2),
                low_byte(back >> 3),
            ]);
        } else {
            if count <= 33 {
                self.put(&[low_byte(32 | (count - 2))]);
            } else {
                self.put(&[32]);
                self.put_length(count - 33);
            }
            self.state = Some(self.used);
            self.put(&[low_byte(back << 2), low_byte(back >> 6)]);
        }
        self.literals = end;
    }

    /// Puts what is not packed before `end`.
    fn put_literals(&mut self, end: usize, pages: &[u8]) {
        let (from, count) = (self.literals, end - self.literals);
        if self.grows || self.used + count + HEADS > PAGE_SIZE {
            self.grows = true;
            return;
        }
        match (count, self.state) {
            (0, _) => return,
            (1..=3, Some(state)) => {
                if let Some(byte) = self.packed.get_mut(state) {
                    *byte |= low_byte(count);
                }
            }
            (1..=238, None) => self.put(&[low_byte(17 + count)]),
            (..=18, _) => self.put(&[low_byte(count - 3)]),
            _ => {
                self.put(&[0]);
                self.put_length(count - 18);
            }
        }
        self.copy(pages, from, count);
    }

    fn copy(&mut self, pages: &[u8], from: usize, count: usize) {
        let short = count <= STRIDE;
        let (to, source) = if short {
            (
                self.packed.get_mut(self.used..self.used + STRIDE),
                pages.get(from..from + STRIDE),
            )
        } else {
            (None, None)
        };
        if let (Some(to), Some(source)) = (to, source) {
            to.copy_from_slice(source);
        } else if let (Some(to), Some(source)) = (
            self.packed.get_mut(self.used..self.used + count),
            pages.get(from..from + count),
        ) {
            to.copy_from_slice(source);
        }
        self.used += count;
    }

    /// What of a length did not fit its code: a zero for each 255, then the rest, which is never 0.
    fn put_length(&mut self, mut count: usize) {
        while count > 255 {
            self.put(&[0]);
            count -= 255;
        }
        self.put(&[low_byte(count)]);
    }

    fn put(&mut self, bytes: &[u8]) {
        // There is room: `put_literals` asked for that of all heads before the next literals.
        if let Some(to) = self.packed.get_mut(self.used..self.used + bytes.len()) {
            to.copy_from_slice(bytes);
        }
        self.used += bytes.len();
    }
}

fn low_byte(number: usize) -> u8 {
    number.to_le_bytes()[0]
}

/// What is being unpacked.
struct Unpacker<'a> {
    packed: &'a [u8],
    page: &'a mut [u8; PAGE_SIZE],
    used: usize,
}

/// Unpacks a page; gives the bytes it has, or `None` when `packed` is damaged or makes more than a
/// page.
pub(super) fn unpack(packed: &[u8], page: &mut [u8; PAGE_SIZE]) -> Option<usize> {
    let mut unpacker = Unpacker {
        packed,
        page,
        used: 0,
    };
    unpacker.run()?;
    unpacker.packed.is_empty().then_some(unpacker.used)
}

impl Unpacker<'_> {
    fn run(&mut self) -> Option<()> {
        // How many literals came just before, if fewer than four; 4 for more.
        let mut before = 0;
        if let Some(&first) = self.packed.first()
            && first > 17
        {
            self.byte()?;
            let count = usize::from(first) - 17;
            self.literals(count)?;
            before = count.min(4);
        }
        loop {
            let code = usize::from(self.byte()?);
            if code < 16 && before == 0 {
                let count = self.length(code, 15)? + 3;
                self.literals(count)?;
                before = 4;
                continue;
            }
            let (count, distance, state) = match code {
                64.. => {
                    let high = usize::from(self.byte()?);
                    ((code >> 5) + 1, 1 + (code >> 2 & 7) + (high << 3), code)
                }
                32.. => {
                    let count = self.length(code & 31, 31)? + 2;
                    let low = self.word()?;
                    (count, 1 + (low >> 2), low)
                }
                16.. => {
                    let count = self.length(code & 7, 7)? + 2;
                    let low = self.word()?;
                    let distance = ((code & 8) << 11) + (low >> 2);
                    if distance == 0 {
                        return (count == 3).then_some(());
                    }
                    (count, 0x4000 + distance, low)
                }
                // M1: after four literals or more three bytes from beyond M2's reach, else two.
                _ => {
                    let high = usize::from(self.byte()?);
                    let near = 1 + (code >> 2) + (high << 2);
                    if before == 4 {
                        (3, M2_DISTANCE_MAX + near, code)
                    } else {
                        (2, near, code)
                    }
                }
            };
            self.repeat(count, distance)?;
            before = state & 3;
            self.literals(before)?;
        }
    }

    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.packed.split_first()?;
        self.packed = rest;
        Some(byte)
    }

    fn word(&mut self) -> Option<usize> {
        let (word, rest) = self.packed.split_first_chunk()?;
        self.packed = rest;
        Some(u16::from_le_bytes(*word).into())
    }

    /// A length that goes on behind its code when `count` is 0.
    fn length(&mut self, count: usize, base: usize) -> Option<usize> {
        if count > 0 {
            return Some(count);
        }
        let mut length = base;
        loop {
            match self.byte()? {
                // More than a page is damage, whatever follows.
                0 if length <= PAGE_SIZE => length += 255,
                0 => return None,
                last => return Some(length + usize::from(last)),
            }
        }
    }

    fn literals(&mut self, count: usize) -> Option<()> {
        let (literals, rest) = self.packed.split_at_checked(count)?;
        let to = self.page.get_mut(self.used..self.used + count)?;
        to.copy_from_slice(literals);
        self.packed = rest;
        self.used += count;
        Some(())
    }

    fn repeat(&mut self, count: usize, distance: usize) -> Option<()> {
        let from = self.used.checked_sub(distance)?;
        let end = self.used + count;
        if end > PAGE_SIZE {
            return None;
        }
        if distance >= count {
            self.page.copy_within(from..from + count, self.used);
        } else {
            for at in from..from + count {
                self.page[at + distance] = self.page[at];
            }
        }
        self.used = end;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::Random;

    /// Memory of which parts repeat, within pages and across them.
    fn memory(random: &mut Random, pages: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = Vec::new();
        while bytes.len() < pages * PAGE_SIZE {
            let bits = random.below(13);
            let count = usize::try_from(1 + random.below(1 << bits)).unwrap();
            if random.below(3) == 0 || bytes.is_empty() {
                bytes.extend((0..count).map(|_| random.next().to_le_bytes()[3]));
            } else {
                let back = 1 + usize::try_from(random.below(bytes.len() as u64)).unwrap();
                let from = bytes.len() - back;
                (from..from + count).for_each(|at| bytes.push(bytes[at]));
            }
        }
        bytes.truncate(pages * PAGE_SIZE);
        bytes
    }

    fn lz4_of(pages: &[u8]) -> Vec<u8> {
        let mut lz4 = vec![0; lz4_flex::block::get_maximum_output_size(pages.len())];
        let used = lz4_flex::block::compress_into(pages, &mut lz4).unwrap();
        lz4.truncate(used);
        lz4
    }

    fn packed(lz4: &[u8], pages: &[u8]) -> (bool, Vec<Option<Vec<u8>>>) {
        let mut all = Vec::new();
        let whole = transcode(lz4, pages, |page| all.push(page.map(<[u8]>::to_vec)));
        (whole, all)
    }

    #[test]
    fn pages_come_back_from_what_their_block_became() {
        for seed in 1..400 {
            let mut random = Random(seed);
            let count = usize::try_from(1 + random.below(16)).unwrap();
            let pages = memory(&mut random, count);
            let lz4 = lz4_of(&pages);
            let (whole, all) = packed(&lz4, &pages);
            assert!(whole && all.len() == count, "seed {seed}");
            for (page, packed) in pages.chunks(PAGE_SIZE).zip(&all) {
                let Some(packed) = packed else { continue };
                let mut back = [7; PAGE_SIZE];
                assert_eq!(unpack(packed, &mut back), Some(PAGE_SIZE), "seed {seed}");
                assert!(back == *page, "seed {seed}");
            }
        }
    }

    #[test]
    fn pages_that_repeat_shrink_and_noise_does_not() {
        let pages: Vec<u8> = (0..2 * PAGE_SIZE).map(|at| b"netdump "[at % 8]).collect();
        let (whole, all) = packed(&lz4_of(&pages), &pages);
        assert!(whole && all.iter().all(|page| page.as_ref().unwrap().len() < 64));
        let mut random = Random(5);
        let noise: Vec<u8> = (0..PAGE_SIZE)
            .map(|_| random.next().to_le_bytes()[3])
            .collect();
        assert_eq!(packed(&lz4_of(&noise), &noise), (true, vec![None]));
    }

    #[test]
    fn lz4_of_other_pages_is_refused_and_damage_is_met() {
        let mut random = Random(9);
        let pages = memory(&mut random, 4);
        let lz4 = lz4_of(&pages);
        for cut in 0..lz4.len() {
            assert!(!transcode(&lz4[..cut], &pages, |_| {}), "cut at {cut}");
        }
        assert!(!transcode(&lz4, &pages[PAGE_SIZE..], |_| {}));
        let (_, all) = packed(&lz4, &pages);
        let mut back = [0; PAGE_SIZE];
        for page in all.into_iter().flatten() {
            for cut in 0..page.len() {
                assert_eq!(unpack(&page[..cut], &mut back), None);
            }
            for at in 0..page.len() {
                let mut broken = page.clone();
                broken[at] ^= 1 << random.below(8);
                // It is some page or none; what matters is that there is an answer.
                assert!(unpack(&broken, &mut back).is_none_or(|bytes| bytes <= PAGE_SIZE));
            }
        }
    }

    /// Codes that we never write and makedumpfile does: M1 of both kinds, and M4 never fits a page.
    #[test]
    fn short_matches_of_others_are_read() {
        let mut back = [0; PAGE_SIZE];
        // "abcd", two bytes from 2 back after one literal: M2 (3 from 4), one literal, M1.
        let packed = [
            17 + 4,
            b'a',
            b'b',
            b'c',
            b'd',
            0x40 | 3 << 2 | 1,
            0,
            b'x',
            1 << 2,
            0,
            0x11,
            0,
            0,
        ];
        assert_eq!(unpack(&packed, &mut back), Some(10));
        assert_eq!(&back[..10], b"abcdabcxcx");
    }
}
