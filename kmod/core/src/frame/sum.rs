//! The Internet checksum (RFC 1071), which IPv4 headers and everything on IPv6 need.

/// A sum under way. All pieces but the last have an even number of bytes.
#[derive(Clone, Copy, Default)]
pub(super) struct Sum(u64);

impl Sum {
    /// Adds `bytes`, four at a time: the sum of longer words folds to the sum of the halves. 64
    /// bits do not overflow before 16 GiB.
    pub(super) fn add(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        let sum = words.iter().fold(self.0, |sum, word| {
            sum.wrapping_add(u64::from(u32::from_be_bytes(*word)))
        });
        let mut last = [0; 4];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        Self(sum.wrapping_add(u64::from(u32::from_be_bytes(last))))
    }

    /// The checksum: 0 over something that holds its own right checksum.
    pub(super) const fn checksum(self) -> u16 {
        let folded = (self.0 >> 32).wrapping_add(self.0 & 0xffff_ffff);
        let folded = (folded >> 16).wrapping_add(folded & 0xffff);
        let folded = (folded >> 16).wrapping_add(folded & 0xffff);
        let folded = (folded >> 16).wrapping_add(folded & 0xffff);
        let [.., high, low] = folded.to_be_bytes();
        !u16::from_be_bytes([high, low])
    }
}
