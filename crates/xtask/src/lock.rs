//! `kernels.lock`: which exact packages every build and test uses, as data.
//!
//! A **kernel** is a line of Debian kernels we support (`6.1`) and the release of it that is
//! pinned. A **package** is one pinned `.deb` with its **role**; the packages of one role and
//! kernel form a **set**, which is unpacked into one directory named after the set's first
//! package. A **wheel** is a pinned Python package.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::cache;

const HEADING: &str = "\
# The exact packages that builds and tests use. `cargo xtask kernels update` rewrites this file
# with what the suites have now and shows the difference; nothing else changes it. A machine whose mirror no longer has
# something takes what it has now, and says so.
";

/// The whole lock file.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    #[serde(rename = "kernel")]
    pub(crate) kernels: Vec<Kernel>,
    #[serde(rename = "package")]
    pub(crate) packages: Vec<Package>,
    #[serde(rename = "wheel")]
    pub(crate) wheels: Vec<Wheel>,
}

/// One supported line of kernels.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kernel {
    /// The line, which people type: `6.1`, or with a flavour `6.1-rt`.
    pub(crate) name: String,
    /// The pinned release, as `uname -r` prints it.
    pub(crate) release: String,
    /// Where `kernels update` looks for a newer release of the line.
    pub(crate) suite: String,
}

/// One pinned Debian package.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// `kernels update` keeps to versions that start with this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) line: Option<String>,
    pub(crate) architecture: String,
    pub(crate) suite: String,
    pub(crate) sha256: String,
    pub(crate) role: Role,
    /// The kernel the package belongs to, for roles that are per kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kernel: Option<String>,
}

/// What a package is for.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    /// The kernel and its modules, booted in guests.
    Image,
    /// What a module is built against.
    Headers,
    /// The kernel with symbols, for `drgn` and `crash`.
    Debug,
    /// The source of `core`, compiled for the kernel.
    RustSrc,
    /// The `crash` utility and the libraries it needs.
    CrashReader,
    /// `makedumpfile`, whose choice of pages the filter is compared with, and its libraries.
    Makedumpfile,
    /// A newer QEMU than the machine's, for network cards that that one has not, and its firmware.
    Qemu,
}

/// One pinned Python package.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wheel {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) sha256: String,
}

impl Kernel {
    /// The flavour as package names end in it: `amd64`, `rt-amd64`.
    pub(crate) fn flavour(&self) -> String {
        match self.name.split_once('-') {
            Some((_, flavour)) => format!("{flavour}-amd64"),
            None => "amd64".to_owned(),
        }
    }

    /// Whether a release is of this line and flavour.
    pub(crate) fn continues(&self, release: &str) -> bool {
        let version = self
            .name
            .split_once('-')
            .map_or(self.name.as_str(), |(version, _)| version);
        let rest = release.strip_prefix(version);
        let abi = rest.and_then(|rest| rest.strip_suffix(&format!("-{}", self.flavour())));
        // What is left of another flavour is not an ABI: it has letters where that has digits.
        abi.is_some_and(|abi| {
            let last = abi.rsplit(['-', '.', '+']).next().unwrap_or_default();
            abi.starts_with('.') && last.ends_with(|digit: char| digit.is_ascii_digit())
        })
    }
}

impl Lock {
    /// Where the lock file is.
    pub(crate) fn path() -> PathBuf {
        cache::tree().join("kernels.lock")
    }

    /// Reads the lock file that counts on this machine: the tree's, or what stands in for it since
    /// the mirror lost something that is pinned there.
    ///
    /// # Errors
    /// It cannot be read or does not make sense.
    pub(crate) fn read() -> Result<Self> {
        let stand_in = Self::stand_in()?;
        if stand_in.exists() {
            return Self::read_from(&stand_in);
        }
        Self::tree()
    }

    /// Reads the tree's lock file.
    ///
    /// # Errors
    /// It cannot be read or does not make sense.
    pub(crate) fn tree() -> Result<Self> {
        Self::read_from(&Self::path())
    }

    /// Makes this lock stand in for the tree's on this machine, until the tree's changes.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(crate) fn stand_for_tree(&self) -> Result<()> {
        let path = Self::stand_in()?;
        std::fs::write(&path, self.text()?)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Where the stand-in of the tree's present lock file is, if there is one.
    fn stand_in() -> Result<PathBuf> {
        let path = Self::path();
        let text =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let digest = Sha256::digest(&text);
        let name: String = digest
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(cache::dir()?.join(format!("kernels.lock-{name}")))
    }

    fn read_from(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text, path)
    }

    /// Parses a lock file; `path` is for messages.
    ///
    /// # Errors
    /// It is not TOML of this shape, or breaks a rule that is checked here.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self> {
        let lock: Self =
            toml::from_str(text).with_context(|| format!("{} is malformed", path.display()))?;
        lock.check()
            .with_context(|| format!("{} contradicts itself", path.display()))?;
        Ok(lock)
    }

    /// The file's text.
    ///
    /// # Errors
    /// A bug in this program only.
    pub(crate) fn text(&self) -> Result<String> {
        Ok(format!("{HEADING}\n{}", toml::to_string(self)?))
    }

    /// The packages of one role, first the one that names their directory.
    ///
    /// # Errors
    /// The lock file has none.
    pub(crate) fn set(&self, role: Role, kernel: Option<&str>) -> Result<Vec<&Package>> {
        let belongs =
            |package: &&Package| package.role == role && package.kernel.as_deref() == kernel;
        let set: Vec<&Package> = self.packages.iter().filter(belongs).collect();
        let wanted = kernel.unwrap_or("any kernel");
        ensure!(
            !set.is_empty(),
            "kernels.lock has no package with role {role:?} for {wanted}"
        );
        Ok(set)
    }

    /// Finds a kernel by its line (`6.1`) or its release.
    ///
    /// # Errors
    /// There is none; the error lists what there is.
    pub(crate) fn kernel(&self, wanted: &str) -> Result<&Kernel> {
        let known = |kernel: &&Kernel| kernel.name == wanted || kernel.release == wanted;
        self.kernels.iter().find(known).with_context(|| {
            let names: Vec<&str> = self
                .kernels
                .iter()
                .map(|kernel| kernel.name.as_str())
                .collect();
            format!(
                "no kernel `{wanted}` in kernels.lock; it has {}",
                names.join(", ")
            )
        })
    }

    /// The lines that differ between two locks, `-` for what goes and `+` for what comes.
    pub(crate) fn difference(&self, newer: &Self) -> String {
        let (old, new) = (self.facts(), newer.facts());
        let mut text = String::new();
        for (mark, lines, other) in [("-", &old, &new), ("+", &new, &old)] {
            for line in lines.iter().filter(|line| !other.contains(line)) {
                text += &format!("{mark} {line}\n");
            }
        }
        text
    }

    fn facts(&self) -> Vec<String> {
        let kernels = self
            .kernels
            .iter()
            .map(|kernel| format!("{} = {}", kernel.name, kernel.release));
        let packages = self.packages.iter().map(Package::fact);
        kernels.chain(packages).collect()
    }

    fn check(&self) -> Result<()> {
        for kernel in &self.kernels {
            let (name, release) = (&kernel.name, &kernel.release);
            ensure!(
                kernel.continues(release),
                "kernel {name}: release {release} is of another line"
            );
            for role in [Role::Image, Role::Headers, Role::Debug] {
                self.set(role, Some(name))?;
            }
        }
        for package in &self.packages {
            check_sha256(&package.name, &package.sha256)?;
            if let Some(name) = &package.kernel {
                self.kernel(name)
                    .with_context(|| format!("package {}", package.name))?;
            }
            if let Some(line) = &package.line
                && !package.version.starts_with(line.as_str())
            {
                bail!(
                    "package {}: {} is not of line {line}",
                    package.name,
                    package.version
                );
            }
        }
        self.wheels
            .iter()
            .try_for_each(|wheel| check_sha256(&wheel.name, &wheel.sha256))
    }
}

impl Package {
    /// What makes two pins of a package the same.
    pub(crate) fn fact(&self) -> String {
        format!(
            "{} {} {} {}",
            self.name, self.version, self.suite, self.sha256
        )
    }

    /// The name `apt-get download` gives the file.
    pub(crate) fn file_name(&self) -> String {
        let version = self.version.replace(':', "%3a");
        format!("{}_{version}_{}.deb", self.name, self.architecture)
    }
}

fn check_sha256(name: &str, sha256: &str) -> Result<()> {
    let digits = sha256
        .bytes()
        .filter(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        .count();
    let right = digits == 64 && sha256.len() == 64;
    ensure!(
        right,
        "{name}: sha256 must be 64 lower-case hex digits, not `{sha256}`"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(role: &str, version: &str) -> String {
        let sha256 = "0a".repeat(32);
        format!(
            "[[package]]\nname = \"linux-{role}-6.1\"\nversion = \"{version}\"\narchitecture = \"amd64\"\n\
             suite = \"bookworm\"\nsha256 = \"{sha256}\"\nrole = \"{role}\"\nkernel = \"6.1\"\n"
        )
    }

    fn text(release: &str, version: &str) -> String {
        let kernel =
            format!("[[kernel]]\nname = \"6.1\"\nrelease = \"{release}\"\nsuite = \"bookworm\"\n");
        let packages = ["image", "headers", "debug"]
            .map(|role| package(role, version))
            .concat();
        let wheel = format!(
            "[[wheel]]\nname = \"drgn\"\nversion = \"1\"\nsha256 = \"{}\"\n",
            "b1".repeat(32)
        );
        kernel + &packages + &wheel
    }

    fn parse(text: &str) -> Result<Lock> {
        Lock::parse(text, Path::new("test.lock"))
    }

    #[test]
    fn the_tree_has_a_sound_lock_file_in_its_own_format() {
        let lock = Lock::tree().unwrap();
        assert_eq!(
            lock.text().unwrap(),
            std::fs::read_to_string(Lock::path()).unwrap()
        );
    }

    #[test]
    fn what_is_written_reads_back() {
        let lock = parse(&text("6.1.0-9-amd64", "6.1.1-1")).unwrap();
        assert_eq!(parse(&lock.text().unwrap()).unwrap(), lock);
    }

    #[test]
    fn a_kernel_is_found_by_line_and_by_release() {
        let lock = parse(&text("6.1.0-9-amd64", "6.1.1-1")).unwrap();
        assert_eq!(
            lock.kernel("6.1").unwrap(),
            lock.kernel("6.1.0-9-amd64").unwrap()
        );
        let error = lock.kernel("5.10").unwrap_err().to_string();
        assert_eq!(error, "no kernel `5.10` in kernels.lock; it has 6.1");
    }

    #[test]
    fn contradictions_are_refused() {
        let sound = text("6.1.0-9-amd64", "6.1.1-1");
        let cases = [
            (text("6.12.0-9-amd64", "6.1.1-1"), "of another line"),
            (sound.replace("0a0a", "0A0A"), "64 lower-case hex digits"),
            (
                sound.replace("role = \"debug\"", "role = \"rust-src\""),
                "role Debug for 6.1",
            ),
            (sound.replace("role", "rolle"), "unknown field `rolle`"),
        ];
        for (text, reason) in cases {
            let error = format!("{:#}", parse(&text).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn the_difference_shows_what_goes_and_what_comes() {
        let old = parse(&text("6.1.0-9-amd64", "6.1.1-1")).unwrap();
        let new = parse(&text("6.1.0-10-amd64", "6.1.1-1")).unwrap();
        assert_eq!(
            old.difference(&new),
            "- 6.1 = 6.1.0-9-amd64\n+ 6.1 = 6.1.0-10-amd64\n"
        );
        let newer = parse(&text("6.1.0-10-amd64", "6.1.2-1")).unwrap();
        assert_eq!(new.difference(&newer).lines().count(), 6);
        assert_eq!(new.difference(&new), "");
    }
}
