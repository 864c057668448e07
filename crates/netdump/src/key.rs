//! Host keys: the long-lived secret a host and its server share, one file per host.
//!
//! A key file is one line of text, `netdump-key 1 HOST KEY-ID SECRET`, the last two in hexadecimal
//! (16 and 64 digits). The same file lies on the host and in the server's key directory.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use proto::keys::{KEY_BYTES, Secret};
use proto::units::KeyId;
use rustix::rand::{GetRandomFlags, getrandom};

/// The name of a host: 1 to [`HOST_NAME_BYTES_MAX`] letters, digits, `.`, `_`, `-`, the first a
/// letter or a digit. Safe as a path component by construction.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostName(String);

/// A host's key, as its file holds it.
#[derive(Clone)]
pub struct HostKey {
    /// The host that seals with it.
    pub host: HostName,
    /// Its public name, carried in the clear by every datagram.
    pub id: KeyId,
    /// What sessions' keys are derived from.
    pub secret: Secret,
}

/// The keys of a server's key directory, by key id.
#[derive(Default)]
pub struct Keyring {
    keys: HashMap<KeyId, HostKey>,
}

impl HostName {
    /// Checks a name. The error says which rule it breaks.
    pub fn new(name: &str) -> Result<Self> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        ensure!(
            (1..=HOST_NAME_BYTES_MAX).contains(&name.len())
                && name.chars().all(legal)
                && name.starts_with(|c: char| c.is_ascii_alphanumeric()),
            "host name {name:?} is not 1 to {HOST_NAME_BYTES_MAX} letters, digits, '.', '_' or \
            '-' that begin with a letter or digit"
        );
        Ok(Self(name.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Shows everything but the secret.
impl fmt::Debug for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostKey")
            .field("host", &self.host)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl HostKey {
    /// A new random key for `host`.
    pub fn random(host: HostName) -> Result<Self> {
        let mut id = [0; 8];
        let mut secret = [0; KEY_BYTES];
        fill_random(&mut id)?;
        fill_random(&mut secret)?;
        Ok(Self {
            host,
            id: KeyId(u64::from_le_bytes(id)),
            secret: Secret(secret),
        })
    }

    /// Reads a key file. Refuses one that users other than its owner may read.
    pub fn load(path: &Path) -> Result<Self> {
        let show = path.display();
        let file = File::open(path).with_context(|| match path.try_exists() {
            Ok(false) => {
                format!("no key file {show} (make one: netdump key new {show} --host NAME)")
            }
            Ok(true) | Err(_) => format!("cannot open the key file {show}"),
        })?;
        let mode = file
            .metadata()
            .with_context(|| format!("cannot stat {show}"))?
            .permissions()
            .mode();
        ensure!(
            mode & 0o077 == 0,
            "key file {show} has mode {:04o}, so others can read the secret: chmod 600 {show}",
            mode & 0o7777
        );
        let mut text = String::new();
        file.take(KEY_FILE_BYTES_MAX)
            .read_to_string(&mut text)
            .with_context(|| format!("cannot read the key file {show}"))?;
        Self::parse(&text).with_context(|| format!("{show} is not a key file"))
    }

    /// Writes the key to a new file of mode 0600. Fails when the file exists: a key is never
    /// overwritten.
    pub fn store(&self, path: &Path) -> Result<()> {
        let show = path.display();
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("cannot create the key file {show}"))?;
        file.write_all(self.line().as_bytes())
            .and_then(|()| file.sync_all())
            .with_context(|| format!("cannot write the key file {show}"))
    }

    fn line(&self) -> String {
        format!(
            "{MAGIC} {VERSION} {} {} {}\n",
            self.host,
            self.id,
            hex(&self.secret.0)
        )
    }

    fn parse(text: &str) -> Result<Self> {
        let line = text.strip_suffix('\n').unwrap_or(text);
        ensure!(!line.contains('\n'), "it has more than one line");
        let mut fields = line.split(' ');
        ensure!(
            fields.next() == Some(MAGIC),
            "its first word is not {MAGIC:?}"
        );
        let version = fields.next().unwrap_or_default();
        ensure!(
            version == VERSION,
            "it is of version {version:?}, this netdump reads version {VERSION}"
        );
        let fields: Vec<&str> = fields.collect();
        let [host, id, secret] = fields.as_slice() else {
            bail!(
                "it has {} fields after the version, not 3 (host, key id, secret)",
                fields.len()
            );
        };
        let id =
            unhex::<8>(id).ok_or_else(|| anyhow!("its key id is not 16 hexadecimal digits"))?;
        let secret =
            unhex(secret).ok_or_else(|| anyhow!("its secret is not 64 hexadecimal digits"))?;
        Ok(Self {
            host: HostName::new(host)?,
            id: KeyId(u64::from_be_bytes(id)),
            secret: Secret(secret),
        })
    }
}

impl Keyring {
    /// Reads every file of `dir`. A file that cannot be used is reported through `warn` and
    /// skipped, so that one bad file does not take the other hosts' crashes away. Hidden files are
    /// not looked at.
    pub fn scan(dir: &Path, mut warn: impl FnMut(String)) -> Result<Self> {
        let entries = fs::read_dir(dir).with_context(|| {
            let show = dir.display();
            format!(
                "cannot read the key directory {show} (make it, and a key for each host: \
            netdump key new)"
            )
        })?;
        let mut paths: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        paths.sort();
        let mut ring = Self::default();
        for path in paths {
            let hidden = path
                .file_name()
                .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            if hidden || path.is_dir() {
                continue;
            }
            if let Err(error) = HostKey::load(&path).and_then(|key| ring.add(key)) {
                warn(format!("skipped {}: {error:#}", path.display()));
            }
        }
        Ok(ring)
    }

    fn add(&mut self, key: HostKey) -> Result<()> {
        ensure!(
            self.keys.len() < KEYS_MAX,
            "there are {KEYS_MAX} keys already"
        );
        if let Some(other) = self.keys.get(&key.id) {
            bail!(
                "its key id {} is already that of host {}",
                key.id,
                other.host
            );
        }
        self.keys.insert(key.id, key);
        Ok(())
    }

    /// The key with this id.
    #[must_use]
    pub fn get(&self, id: KeyId) -> Option<&HostKey> {
        self.keys.get(&id)
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// There is no key at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// Fills `bytes` from the kernel's generator, waiting until it is seeded.
pub fn fill_random(bytes: &mut [u8]) -> Result<()> {
    // The kernel never cuts a request of up to 256 bytes short (man 2 getrandom).
    let got = getrandom(&mut *bytes, GetRandomFlags::empty()).context("getrandom failed")?;
    ensure!(
        got == bytes.len(),
        "getrandom gave {got} of {} bytes",
        bytes.len()
    );
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |c: u8| {
            char::from(c)
                .to_digit(16)
                .and_then(|value| u8::try_from(value).ok())
        };
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// The longest host name, in bytes: what Linux allows a host to call itself.
pub const HOST_NAME_BYTES_MAX: usize = 64;
/// More hosts than one server is meant for; bounds what a scan keeps in memory (about 10 MiB).
const KEYS_MAX: usize = 65_536;
/// A legal key file has at most 164 bytes; the rest of a longer one is not looked at.
const KEY_FILE_BYTES_MAX: u64 = 4096;
const MAGIC: &str = "netdump-key";
const VERSION: &str = "1";

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> HostKey {
        HostKey::random(HostName::new("web-1.example").unwrap()).unwrap()
    }

    #[test]
    fn a_stored_key_is_private_never_overwritten_and_loads_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        let key = key();
        key.store(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(format!("{:#}", key.store(&path).unwrap_err()).contains("exists"));
        let loaded = HostKey::load(&path).unwrap();
        assert_eq!(
            (loaded.id, &loaded.host, loaded.secret.0),
            (key.id, &key.host, key.secret.0)
        );
    }

    #[test]
    fn a_key_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        key().store(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = format!("{:#}", HostKey::load(&path).unwrap_err());
        assert!(
            error.contains("mode 0640") && error.contains("chmod 600"),
            "{error}"
        );
    }

    #[test]
    fn what_is_wrong_with_a_key_file_is_said() {
        let line = key().line();
        let check = |text: &str, expected: &str| {
            let error = format!("{:#}", HostKey::parse(text).unwrap_err());
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        };
        check("", "first word");
        check(&line.replace(" 1 ", " 2 "), "version \"2\"");
        check(&line[..line.len() - 3], "64 hexadecimal");
        check(&format!("{line}{line}"), "more than one line");
        check("netdump-key 1 host 00", "2 fields");
        check(&line.replace("web-1", "../we"), "host name");
    }

    #[test]
    fn host_names_are_safe_path_components() {
        for name in [
            "",
            ".",
            "..",
            "-x",
            "a/b",
            "a b",
            "a\0",
            "\u{e9}",
            &"a".repeat(65),
        ] {
            assert!(HostName::new(name).is_err(), "{name:?}");
        }
        assert!(HostName::new("db01.example.org").is_ok());
    }

    #[test]
    fn a_scan_skips_bad_files_with_a_word_and_keeps_the_good() {
        let dir = tempfile::tempdir().unwrap();
        let key = key();
        key.store(&dir.path().join("a")).unwrap();
        key.store(&dir.path().join("b-same-id")).unwrap();
        fs::write(dir.path().join("c-world-readable"), key.line()).unwrap();
        fs::write(dir.path().join(".hidden"), "x").unwrap();
        let mut warnings = Vec::new();
        let ring = Keyring::scan(dir.path(), |text| warnings.push(text)).unwrap();
        assert_eq!(ring.len(), 1);
        assert!(ring.get(key.id).is_some());
        assert_eq!(warnings.len(), 2, "{warnings:?}");
    }
}
