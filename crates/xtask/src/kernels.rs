//! `cargo xtask kernels`: shows what `kernels.lock` pins, or pins what the suites have now.

use std::fs;

use anyhow::{Context as _, Result, bail, ensure};

use crate::lock::{Kernel, Lock, Package};
use crate::{apt, output, packages, tools};

/// The package that depends on the newest kernel of a suite, but for its flavour.
const META_PACKAGE: &str = "linux-image-";

/// Prints the supported kernels and every pinned package.
///
/// # Errors
/// `kernels.lock` cannot be read.
pub(crate) fn list() -> Result<()> {
    let lock = Lock::read()?;
    let heading = ["kernel", "role", "package", "version", "suite"]
        .map(str::to_owned)
        .to_vec();
    let row = |package: &Package| {
        let kernel = package.kernel.clone().unwrap_or_else(|| "all".into());
        let role = format!("{:?}", package.role);
        vec![
            kernel,
            role,
            package.name.clone(),
            package.version.clone(),
            package.suite.clone(),
        ]
    };
    let rows: Vec<Vec<String>> = std::iter::once(heading)
        .chain(lock.packages.iter().map(row))
        .collect();
    print!("{}", output::table(&rows));
    Ok(())
}

/// Fetches and unpacks everything that is pinned.
///
/// # Errors
/// Something cannot be fetched or unpacked.
pub(crate) fn fetch() -> Result<()> {
    tools::ensure()?;
    for kernel in packages::kernels()? {
        for path in [
            packages::image(&kernel.release)?,
            packages::headers(&kernel.release)?,
            packages::vmlinux(&kernel.release)?,
        ] {
            println!("{}", path.display());
        }
    }
    println!("{}", packages::rust_src()?.display());
    println!("{}", packages::crash_reader()?.join(" "));
    println!("{}", packages::makedumpfile()?.join(" "));
    println!("{}", packages::drgn()?.display());
    Ok(())
}

/// Pins what the suites have now, keeping the lines, and prints the difference.
///
/// # Errors
/// The package lists cannot be read, or a suite no longer has a kernel of a line we support.
pub(crate) fn update() -> Result<()> {
    let old = Lock::tree()?;
    let mut new = old.clone();
    for name in old.kernels.iter().map(|kernel| &kernel.name) {
        renew(&mut new, name)?;
    }
    new.packages.iter_mut().try_for_each(pin_newest)?;
    fs::write(Lock::path(), new.text()?)?;
    match old.difference(&new).as_str() {
        "" => println!("kernels.lock already pins what the suites have"),
        difference => print!("{difference}"),
    }
    Ok(())
}

/// Sees to it that what is pinned can be had. Suites keep no old versions: what is neither in the
/// cache nor on the mirror any more is replaced, for this machine, by what its suite has now, and
/// that is said. A kernel whose line is gone keeps its pins, and who needs it is told.
///
/// # Errors
/// The lock file or the package lists cannot be read, or the cache cannot be written.
pub(crate) fn settle() -> Result<()> {
    let old = Lock::read()?;
    let missing = packages::missing(&old)?;
    let mut gone = Vec::new();
    for package in missing {
        if !apt::has(package)? {
            gone.push(package);
        }
    }
    let Some(first) = gone.first() else {
        return Ok(());
    };
    let mut new = old.clone();
    for name in gone.iter().filter_map(|package| package.kernel.as_ref()) {
        if let Err(error) = renew(&mut new, name) {
            eprintln!("xtask: kernel {name} cannot be had: {error:#}");
        }
    }
    // A renewed kernel needs all of its packages anew.
    let affected = |package: &Package| {
        gone.iter().any(|lost| {
            let kernel = lost.kernel.is_some() && lost.kernel == package.kernel;
            kernel || lost.fact() == package.fact()
        })
    };
    for package in new.packages.iter_mut().filter(|package| affected(package)) {
        if let Err(error) = pin_newest(package) {
            eprintln!("xtask: {error:#}");
        }
    }
    new.stand_for_tree()?;
    eprintln!(
        "xtask: kernels.lock pins {} packages that the mirror no longer has, first {} {}; what it has \
         now stands in for them on this machine (`cargo xtask kernels update` pins it):\n{}",
        gone.len(),
        first.name,
        first.version,
        old.difference(&new)
    );
    Ok(())
}

/// Makes a kernel of `lock` the newest of its line, and names its packages accordingly; their
/// versions are still the old ones.
fn renew(lock: &mut Lock, name: &str) -> Result<()> {
    let before = lock.kernel(name)?.clone();
    let release = newest_release(&before)?;
    let flavour = format!("-{}", before.flavour());
    let abi = |release: &str| release.trim_end_matches(&flavour).to_owned();
    let (from, to) = (abi(&before.release), abi(&release));
    for package in &mut lock.packages {
        if package.kernel.as_deref() == Some(name) {
            package.name = package.name.replace(&from, &to);
        }
    }
    for kernel in lock.kernels.iter_mut().filter(|kernel| kernel.name == name) {
        kernel.release.clone_from(&release);
    }
    Ok(())
}

fn newest_release(kernel: &Kernel) -> Result<String> {
    let (name, suite) = (&kernel.name, &kernel.suite);
    let meta = format!("{META_PACKAGE}{}", kernel.flavour());
    let newest = apt::candidates(&meta)?
        .into_iter()
        .find(|found| &found.suite == suite);
    let newest = newest.with_context(|| format!("{suite} has no {meta}"))?;
    let stanza = apt::show(&meta, &newest.version)?;
    let release = release_in(&stanza)
        .with_context(|| format!("{meta} {} depends on no kernel", newest.version))?;
    ensure!(
        kernel.continues(release),
        "{suite} has moved on to {release} and no longer has line {name}: decide by hand which \
         line replaces it in kernels.lock"
    );
    Ok(release.to_owned())
}

/// The release in a meta package's `Depends: linux-image-<release> (= <version>)`.
fn release_in(stanza: &str) -> Option<&str> {
    let depends = apt::field(stanza, "Depends")?;
    depends
        .split(',')
        .find_map(|one| one.trim().strip_prefix("linux-image-")?.split(' ').next())
}

fn pin_newest(package: &mut Package) -> Result<()> {
    let (name, suite) = (&package.name, &package.suite);
    let line = package.line.clone().unwrap_or_default();
    let candidates = apt::candidates(name)?;
    let fits = |version: &str| version.starts_with(&line);
    let newest = candidates
        .iter()
        .find(|found| &found.suite == suite && fits(&found.version));
    let Some(newest) = newest else {
        bail!("{suite} has no {name} {line}: decide by hand what replaces it in kernels.lock")
    };
    let stanza = apt::show(name, &newest.version)?;
    let sha256 = apt::field(&stanza, "SHA256").with_context(|| format!("{name} has no SHA256"))?;
    let architecture = apt::field(&stanza, "Architecture")
        .with_context(|| format!("{name} has no Architecture"))?;
    package.sha256 = sha256.to_owned();
    package.architecture = architecture.to_owned();
    package.version.clone_from(&newest.version);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_read_from_the_dependency() {
        let stanza =
            "Package: linux-image-amd64\nDepends: linux-image-6.1.0-57-amd64 (= 6.1.200-1)\n";
        assert_eq!(release_in(stanza), Some("6.1.0-57-amd64"));
        assert_eq!(release_in("Package: x\n"), None);
    }

    #[test]
    fn a_flavour_is_a_line_of_its_own() {
        let kernel = |name: &str| Kernel {
            name: name.to_owned(),
            release: String::new(),
            suite: String::new(),
        };
        assert!(kernel("6.1").continues("6.1.0-56-amd64"));
        assert!(kernel("6.12").continues("6.12.95+deb12-amd64"));
        assert!(!kernel("6.1").continues("6.1.0-56-rt-amd64"));
        assert!(kernel("6.1-rt").continues("6.1.0-56-rt-amd64"));
        assert!(!kernel("6.1-rt").continues("6.1.0-56-amd64"));
        assert!(!kernel("6.1").continues("6.12.95+deb12-amd64"));
    }
}
