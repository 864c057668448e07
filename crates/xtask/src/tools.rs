//! The Debian packages whose programs builds and guests need, installed when they are missing.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{command, output};

/// What every task here needs: a C compiler, the pinned kernels' own (`gcc-12`), and what their
/// build programs and this crate run.
const TOOLS: [&str; 10] = [
    "binutils",
    "busybox-static",
    "ca-certificates",
    "gcc",
    "gcc-12",
    "libc6-dev",
    "libelf-dev",
    "make",
    "python3-venv",
    "qemu-system-x86",
];

/// Installs what is missing of [`TOOLS`]; does nothing when all is there.
///
/// # Errors
/// This is not Debian with apt, or not root, and something is missing: the error lists it.
pub(crate) fn ensure() -> Result<()> {
    ensure_also(&[])
}

/// As [`ensure`], with the packages that one task needs besides.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn ensure_also(more: &[&'static str]) -> Result<()> {
    if !Path::new("/usr/bin/dpkg-query").exists() {
        bail!(
            "this is not Debian: use Debian 12, or install the likes of {}",
            TOOLS.join(" ")
        );
    }
    let missing = missing(&installed()?, more);
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !is_root()? {
        bail!("not root, and these packages are missing: run `apt-get install {list}` as root");
    }
    let _step = output::step(format!("installing {list}"));
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive")
            .arg("--quiet")
            .args(arguments);
        command::run(&mut apt)
    };
    apt(&["update"])
        .and_then(|()| apt(&[&["install", "--yes", "--no-install-recommends"], &*missing].concat()))
        .with_context(|| format!("cannot install what is missing: {list}"))
}

fn is_root() -> Result<bool> {
    Ok(command::capture(Command::new("id").arg("-u"))?.trim() == "0")
}

/// The packages that are installed, one `name status` line each.
fn installed() -> Result<String> {
    let format = "${Package} ${db:Status-Status}\n";
    command::capture(Command::new("dpkg-query").args(["--show", "--showformat", format]))
}

fn missing(installed: &str, more: &[&'static str]) -> Vec<&'static str> {
    let is_there = |tool: &str| {
        installed
            .lines()
            .any(|line| line == format!("{tool} installed"))
    };
    let wanted = TOOLS.into_iter().chain(more.iter().copied());
    wanted.filter(|tool| !is_there(tool)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_installed() {
        let all_but_two: String = TOOLS
            .iter()
            .filter(|tool| **tool != "make")
            .map(|tool| {
                let status = if *tool == "gcc-12" {
                    "config-files"
                } else {
                    "installed"
                };
                format!("{tool} {status}\n")
            })
            .collect();
        assert_eq!(missing(&all_but_two, &[]), ["gcc-12", "make"]);
        assert_eq!(
            missing(&all_but_two, &["nc", "gcc"]),
            ["gcc-12", "make", "nc"]
        );
    }
}
