//! A private apt root in the cache, so that packages of several suites can be fetched and checked
//! without touching how the machine itself is set up.
//!
//! The mirror is the one the machine's own apt configuration names; nothing in the tree does.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{fmt, fs};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::lock::Package;
use crate::{cache, command, output};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where Debian's archives are, for this machine.
#[derive(Debug, PartialEq)]
struct Mirrors {
    main: String,
    security: String,
}

/// One version of a package that a suite has.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) version: String,
    pub(crate) suite: String,
}

/// Fetches those of `packages` that are not in the cache and checks all of them; returns their
/// files in the same order.
///
/// # Errors
/// The mirror cannot be reached, no longer has a pinned version, or has other bytes under it.
pub(crate) fn fetch(packages: &[&Package]) -> Result<Vec<PathBuf>> {
    let debs = cache::dir()?.join("debs");
    fs::create_dir_all(&debs)?;
    let mut missing = Vec::new();
    for package in packages {
        if !is_fetched(package)? {
            missing.push(*package);
        }
    }
    if !missing.is_empty() {
        download(&missing, &debs)?;
    }
    Ok(packages
        .iter()
        .map(|package| debs.join(package.file_name()))
        .collect())
}

/// Whether the package lies in the cache as it was fetched.
///
/// # Errors
/// The cache cannot be reached.
pub(crate) fn is_fetched(package: &Package) -> Result<bool> {
    let file = cache::dir()?.join("debs").join(package.file_name());
    Ok(is_intact(&file, &package.sha256))
}

/// The versions of a package that the suites have, as the lists were last read by this process.
///
/// # Errors
/// The lists cannot be fetched or read.
pub(crate) fn candidates(package: &str) -> Result<Vec<Candidate>> {
    update()?;
    Ok(parse_madison(&command::capture(
        apt("apt-cache")?.args(["madison", package]),
    )?))
}

/// Whether the suites have the pinned version.
///
/// # Errors
/// As [`candidates`].
pub(crate) fn has(package: &Package) -> Result<bool> {
    let there = candidates(&package.name)?;
    Ok(there
        .iter()
        .any(|candidate| candidate.version == package.version))
}

/// The fields of one version of a package, as the suite's index has them.
///
/// # Errors
/// There is no such version.
pub(crate) fn show(package: &str, version: &str) -> Result<String> {
    update()?;
    command::capture(
        apt("apt-cache")?
            .arg("show")
            .arg(format!("{package}={version}")),
    )
}

/// The value of a field in what [`show`] returned.
pub(crate) fn field<'a>(stanza: &'a str, name: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix(':').map(str::trim);
    stanza.lines().find_map(value)
}

fn download(packages: &[&Package], debs: &Path) -> Result<()> {
    update()?;
    let names: Vec<&str> = packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let _step = output::step(format!("fetching {}", names.join(", ")));
    let partial = debs.join("partial");
    fs::create_dir_all(&partial)?;
    let pins = packages
        .iter()
        .map(|package| format!("{}={}", package.name, package.version));
    let fetched = command::run(
        apt("apt-get")?
            .arg("--quiet")
            .arg("download")
            .args(pins)
            .current_dir(&partial),
    );
    if let Err(error) = fetched {
        packages
            .iter()
            .try_for_each(|package| explain_absence(package))?;
        return Err(
            error.context("fetching pinned packages failed: is the Debian mirror reachable?")
        );
    }
    for package in packages {
        let file = partial.join(package.file_name());
        let found = sha256(&file)?;
        if found != package.sha256 {
            let (name, version, pinned) = (&package.name, &package.version, &package.sha256);
            bail!(
                "the mirror's {name} {version} has sha256 {found} but kernels.lock pins {pinned}: \
                 do not use it; if Debian really replaced it, run `cargo xtask kernels update`"
            );
        }
        fs::rename(&file, debs.join(package.file_name()))?;
    }
    Ok(())
}

/// A pinned version that its suite no longer has, which is the usual reason for a download to fail
/// a few weeks after pinning: suites keep no old versions.
#[derive(Debug)]
pub(crate) struct Gone(String);

impl fmt::Display for Gone {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(&self.0)
    }
}

impl Error for Gone {}

/// An error if the suites no longer have the pinned version.
fn explain_absence(package: &Package) -> Result<()> {
    if has(package)? {
        return Ok(());
    }
    let there: Vec<String> = candidates(&package.name)?
        .into_iter()
        .map(|candidate| candidate.version)
        .collect();
    let now = if there.is_empty() {
        "no version".to_owned()
    } else {
        there.join(", ")
    };
    bail!(Gone(format!(
        "kernels.lock pins {} {} of {}, which the mirror no longer has (it has {now}): \
         run `cargo xtask kernels update`",
        package.name, package.version, package.suite
    )))
}

/// Reads the suites' indexes, once in a process.
fn update() -> Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.get().is_some() {
        return Ok(());
    }
    let root = root()?;
    let mirrors = mirrors()?;
    for folder in ["lists/partial", "archives/partial"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::write(root.join("sources.list"), sources(&mirrors))?;
    let _step = output::step("reading the package lists of Debian 12, 13 and their backports");
    command::run(apt("apt-get")?.args(["--quiet", "--quiet", "update"]))
        .context("cannot read Debian's package lists: is the mirror reachable?")?;
    DONE.get_or_init(|| ());
    Ok(())
}

fn root() -> Result<PathBuf> {
    Ok(cache::dir()?.join("apt"))
}

/// An apt program that works in the private root only.
fn apt(program: &str) -> Result<Command> {
    let root = root()?;
    let mut command = Command::new(program);
    let options = [
        ("Dir::Etc::SourceList", root.join("sources.list")),
        ("Dir::Etc::SourceParts", PathBuf::from("/dev/null")),
        ("Dir::State::Lists", root.join("lists")),
        ("Dir::Cache", root.clone()),
        ("Dir::Cache::Archives", root.join("archives")),
        // Some images turn this cache off, which makes every query read all lists again.
        ("Dir::Cache::pkgcache", PathBuf::from("pkgcache.bin")),
        ("APT::Sandbox::User", PathBuf::from("root")),
        ("Acquire::Languages", PathBuf::from("none")),
        (
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
            PathBuf::from("false"),
        ),
    ];
    for (name, value) in options {
        command.arg("-o").arg(format!("{name}={}", value.display()));
    }
    command.env("LC_ALL", "C");
    Ok(command)
}

fn mirrors() -> Result<Mirrors> {
    let mut command = Command::new("apt-get");
    command.args([
        "indextargets",
        "--format",
        "$(REPO_URI)",
        "Created-By: Packages",
    ]);
    let repositories = command::capture(&mut command)
        .context("cannot ask apt for this machine's mirror: is this Debian?")?;
    parse_mirrors(&repositories)
}

/// Debian's own layout: the main archive is `.../debian/`, the security archive is beside it
/// unless the machine names one.
fn parse_mirrors(repositories: &str) -> Result<Mirrors> {
    let ends = |end: &str| {
        let repository = repositories
            .lines()
            .map(str::trim)
            .find(|line| line.ends_with(end));
        repository.map(str::to_owned)
    };
    let main = ends("/debian/").context(
        "apt on this machine names no Debian archive (a repository that ends in /debian/): \
         add Debian 12's to /etc/apt/sources.list",
    )?;
    let beside = main.trim_end_matches('/').to_owned() + "-security/";
    Ok(Mirrors {
        security: ends("/debian-security/").unwrap_or(beside),
        main,
    })
}

fn sources(mirrors: &Mirrors) -> String {
    let suites = [
        (&mirrors.main, "bookworm"),
        (&mirrors.main, "bookworm-backports"),
        (&mirrors.security, "bookworm-security"),
        (&mirrors.main, "trixie"),
        (&mirrors.main, "trixie-backports"),
    ];
    let line =
        |(mirror, suite)| format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main\n");
    suites.map(line).concat()
}

/// Lines of `apt-cache madison`: `name | version | mirror suite/main amd64 Packages`.
fn parse_madison(text: &str) -> Vec<Candidate> {
    let candidate = |line: &str| {
        let mut columns = line.split('|').map(str::trim);
        let (_name, version, place) = (columns.next()?, columns.next()?, columns.next()?);
        let suite = place.split_whitespace().nth(1)?.split('/').next()?;
        place.ends_with("Packages").then(|| Candidate {
            version: version.into(),
            suite: suite.into(),
        })
    };
    text.lines().filter_map(candidate).collect()
}

fn is_intact(file: &Path, pinned: &str) -> bool {
    file.exists() && sha256(file).is_ok_and(|found| found == pinned)
}

fn sha256(path: &Path) -> Result<String> {
    let mut file =
        fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = std::io::Read::read(&mut file, &mut buffer)
            .with_context(|| format!("cannot read {}", path.display()))?;
        match buffer.get(..count) {
            Some(bytes) if count > 0 => digest.update(bytes),
            _ => break,
        }
    }
    Ok(digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_machines_own() {
        let both = "http://a.invalid/x/debian/\nhttp://b.invalid/debian-security/\n";
        let expected = Mirrors {
            main: "http://a.invalid/x/debian/".into(),
            security: "http://b.invalid/debian-security/".into(),
        };
        assert_eq!(parse_mirrors(both).unwrap(), expected);
    }

    #[test]
    fn security_is_beside_main_when_not_named() {
        let mirrors = parse_mirrors("http://a.invalid/debian/\n").unwrap();
        assert_eq!(mirrors.security, "http://a.invalid/debian-security/");
        assert!(parse_mirrors("http://a.invalid/other/\n").is_err());
    }

    #[test]
    fn madison_gives_versions_and_suites() {
        let text = "  crash |    8.0.6-1 | http://a.invalid/debian trixie/main amd64 Packages\n\
                    crash | 8.0.2-1 | http://a.invalid/debian bookworm/main Sources\n";
        let expected = Candidate {
            version: "8.0.6-1".into(),
            suite: "trixie".into(),
        };
        assert_eq!(parse_madison(text), [expected]);
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let stanza = "Package: x\nSHA256sums: no\nSHA256: ab\n";
        assert_eq!(field(stanza, "SHA256"), Some("ab"));
        assert_eq!(field(stanza, "Depends"), None);
    }

    #[test]
    fn a_changed_file_is_not_intact() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let of_nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert!(is_intact(file.path(), of_nothing));
        fs::write(file.path(), "x").unwrap();
        assert!(!is_intact(file.path(), of_nothing));
    }
}
