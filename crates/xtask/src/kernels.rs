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
    let old = Lock::read()?;
    let mut new = old.clone();
    for (before, kernel) in old.kernels.iter().zip(&mut new.kernels) {
        kernel.release = newest_release(before)?;
        let flavour = format!("-{}", before.flavour());
        let abi = |release: &str| release.trim_end_matches(&flavour).to_owned();
        let (from, to) = (abi(&before.release), abi(&kernel.release));
        for package in &mut new.packages {
            if package.kernel.as_ref() == Some(&before.name) {
                package.name = package.name.replace(&from, &to);
            }
        }
    }
    new.packages.iter_mut().try_for_each(pin_newest)?;
    fs::write(Lock::path(), new.text()?)?;
    match old.difference(&new).as_str() {
        "" => println!("kernels.lock already pins what the suites have"),
        difference => print!("{difference}"),
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
