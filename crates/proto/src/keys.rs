//! From a host's long-lived secret to the two keys of one session. Runs when a host is armed and
//! when the server meets a session; never after the crash.

use hkdf::Hkdf;
use sha2::Sha256;

use crate::units::SessionId;

/// Bytes of a secret and of every key derived from it.
pub const KEY_BYTES: usize = 32;

/// The HKDF salt: separates this version of the protocol from every other use of the same secret.
const SALT: &[u8] = b"netdump/1";
/// Purpose of the keys of client packets. A further purpose gets a label of its own.
const CLIENT_LABEL: &[u8] = b"dump client";
/// Purpose of the keys of server packets.
const SERVER_LABEL: &[u8] = b"dump server";
/// Purpose of the keys of log datagrams.
const LOG_CLIENT_LABEL: &[u8] = b"log client";
/// Purpose of the keys of their replies.
const LOG_SERVER_LABEL: &[u8] = b"log server";

/// A host's long-lived secret. It stays in user space: the kernel is given session keys only.
#[derive(Clone)]
pub struct Secret(pub [u8; KEY_BYTES]);

/// The keys of one session, one a direction.
#[derive(Clone)]
pub struct SessionKeys {
    /// Seals what the client sends.
    pub client: [u8; KEY_BYTES],
    /// Seals what the server sends.
    pub server: [u8; KEY_BYTES],
}

impl Secret {
    /// The keys of session `id`: HKDF-SHA256 (RFC 5869) over the secret, a fixed salt, the
    /// direction's label and the identifiers as 16 little-endian bytes (key, then arming).
    #[must_use]
    pub fn session_keys(&self, id: SessionId) -> SessionKeys {
        SessionKeys {
            client: self.derive(CLIENT_LABEL, id),
            server: self.derive(SERVER_LABEL, id),
        }
    }

    /// The keys of the log records of the same arming. They are not the session's, so the packet
    /// numbers of both never meet under one key.
    #[must_use]
    pub fn log_keys(&self, id: SessionId) -> SessionKeys {
        SessionKeys {
            client: self.derive(LOG_CLIENT_LABEL, id),
            server: self.derive(LOG_SERVER_LABEL, id),
        }
    }

    fn derive(&self, label: &[u8], id: SessionId) -> [u8; KEY_BYTES] {
        let mut key = [0; KEY_BYTES];
        let info: [&[u8]; 3] = [label, &id.key.0.to_le_bytes(), &id.arming.0.to_le_bytes()];
        let expanded = Hkdf::<Sha256>::new(Some(SALT), &self.0).expand_multi_info(&info, &mut key);
        debug_assert!(
            expanded.is_ok(),
            "32 bytes are below HKDF-SHA256's limit of 8160"
        );
        key
    }
}
