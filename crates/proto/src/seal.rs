//! The seal: ChaCha20-Poly1305 as RFC 8439 composes it, and its extended-nonce variant.
//!
//! Composed here from the two primitives because the finished construction in `chacha20poly1305`
//! keeps a panic path (its keystream position is unwrapped), which the module must not link. A test
//! holds both equal. Where unsafe code and processor features are to be had, a caller may bring a
//! faster implementation of the same construction ([`PacketKey`]).

use chacha20::cipher::{KeyIvInit, StreamCipher, StreamCipherSeek};
use chacha20::{ChaCha20, XChaCha20};
use poly1305::universal_hash::{KeyInit, UniversalHash};
use poly1305::{Block, Poly1305, Tag};

use crate::keys::KEY_BYTES;

/// Bytes of the Poly1305 tag.
pub const TAG_BYTES: usize = 16;

/// A key of client packets, ready for use: ChaCha20-Poly1305 of RFC 8439. The portable
/// implementation is that of the key's bytes themselves; every other must give the same bytes.
pub trait PacketKey {
    /// Prepares the key.
    fn prepare(key: &[u8; KEY_BYTES]) -> Self;

    /// Encrypts `body` in place and returns the tag over `clear` and it. `None` if `body` is longer
    /// than the construction allows.
    fn seal(&self, nonce: &[u8; 12], clear: &[u8], body: &mut [u8]) -> Option<[u8; TAG_BYTES]>;

    /// Checks the tag over `clear` and `body` and decrypts `body` in place. With a wrong tag what
    /// `body` holds afterwards is of no use.
    fn open(
        &self,
        nonce: &[u8; 12],
        clear: &[u8],
        body: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Option<()>;
}

impl PacketKey for [u8; KEY_BYTES] {
    fn prepare(key: &[u8; KEY_BYTES]) -> Self {
        *key
    }

    fn seal(&self, nonce: &[u8; 12], clear: &[u8], body: &mut [u8]) -> Option<[u8; TAG_BYTES]> {
        seal(self, Nonce::Short(*nonce), clear, body)
    }

    fn open(
        &self,
        nonce: &[u8; 12],
        clear: &[u8],
        body: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Option<()> {
        open(self, Nonce::Short(*nonce), clear, body, tag)
    }
}

/// Position of the first keystream byte that encrypts; the block before it keys Poly1305.
const BODY_POSITION: u64 = 64;

/// A nonce, which selects the construction by its length.
#[derive(Clone, Copy)]
pub(crate) enum Nonce {
    /// RFC 8439, 12 bytes: client packets.
    Short([u8; 12]),
    /// XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03), 24 bytes: replies.
    Long([u8; 24]),
}

/// Encrypts `body` in place and returns the tag over `clear` and it. `None` only past 256 GiB of
/// keystream.
#[must_use]
pub(crate) fn seal(
    key: &[u8; KEY_BYTES],
    nonce: Nonce,
    clear: &[u8],
    body: &mut [u8],
) -> Option<[u8; TAG_BYTES]> {
    match nonce {
        Nonce::Short(nonce) => seal_with(ChaCha20::new(key.into(), (&nonce).into()), clear, body),
        Nonce::Long(nonce) => seal_with(XChaCha20::new(key.into(), (&nonce).into()), clear, body),
    }
}

/// Checks the tag over `clear` and `body`, then decrypts `body` in place. A wrong tag leaves `body`
/// as it was.
#[must_use]
pub(crate) fn open(
    key: &[u8; KEY_BYTES],
    nonce: Nonce,
    clear: &[u8],
    body: &mut [u8],
    tag: &[u8; TAG_BYTES],
) -> Option<()> {
    match nonce {
        Nonce::Short(n) => open_with(ChaCha20::new(key.into(), (&n).into()), clear, body, tag),
        Nonce::Long(n) => open_with(XChaCha20::new(key.into(), (&n).into()), clear, body, tag),
    }
}

fn seal_with<C: StreamCipher + StreamCipherSeek>(
    mut cipher: C,
    clear: &[u8],
    body: &mut [u8],
) -> Option<[u8; TAG_BYTES]> {
    let mac = mac(&mut cipher)?;
    cipher.try_seek(BODY_POSITION).ok()?;
    cipher.try_apply_keystream(body).ok()?;
    Some(tag_over(mac, clear, body)?.into())
}

fn open_with<C: StreamCipher + StreamCipherSeek>(
    mut cipher: C,
    clear: &[u8],
    body: &mut [u8],
    tag: &[u8; TAG_BYTES],
) -> Option<()> {
    let mac = mac(&mut cipher)?;
    let expected = tag_over(mac, clear, body)?;
    // Without an early exit: the time must not tell how many bytes of a forged tag are right.
    let difference = expected
        .iter()
        .zip(tag)
        .fold(0, |acc, (a, b)| acc | (a ^ b));
    if core::hint::black_box(difference) != 0 {
        return None;
    }
    cipher.try_seek(BODY_POSITION).ok()?;
    cipher.try_apply_keystream(body).ok()
}

fn mac<C: StreamCipher>(cipher: &mut C) -> Option<Poly1305> {
    let mut key = [0; 32];
    cipher.try_apply_keystream(&mut key).ok()?;
    Some(Poly1305::new((&key).into()))
}

fn tag_over(mut mac: Poly1305, clear: &[u8], body: &[u8]) -> Option<Tag> {
    mac.update_padded(clear);
    mac.update_padded(body);
    let clear = u64::try_from(clear.len()).ok()?.to_le_bytes();
    let body = u64::try_from(body.len()).ok()?.to_le_bytes();
    let mut lengths = Block::default();
    for (to, from) in lengths.iter_mut().zip(clear.iter().chain(&body)) {
        *to = *from;
    }
    mac.update(&[lengths]);
    Some(mac.finalize())
}
