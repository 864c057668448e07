//! Where things lie: the cache of downloads, which survives `cargo clean`, the tree and its builds.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};

/// The cache directory, `$NETDUMP_CACHE` or `~/.cache/netdump`, made when missing.
///
/// # Errors
/// Neither variable nor home directory is known, or the directory cannot be made.
pub(crate) fn dir() -> Result<PathBuf> {
    let dir = match std::env::var_os("NETDUMP_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => std::env::home_dir()
            .context("no home directory for the cache: set NETDUMP_CACHE to a directory")?
            .join(".cache/netdump"),
    };
    fs::create_dir_all(&dir)
        .with_context(|| format!("cannot make the cache {}: set NETDUMP_CACHE", dir.display()))?;
    Ok(dir)
}

/// Holds the cache for one writer until the returned file is dropped, because two runs at once
/// would otherwise unpack into the same place.
///
/// # Errors
/// The lock file cannot be made or locked.
pub(crate) fn hold() -> Result<File> {
    let path = dir()?.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.lock()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// The root of the source tree.
pub(crate) fn tree() -> PathBuf {
    let package = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    package
        .ancestors()
        .nth(2)
        .map_or_else(|| package.clone(), PathBuf::from)
}

/// Where the tree's own builds go: cargo's target directory.
///
/// # Errors
/// It cannot be made.
pub(crate) fn built() -> Result<PathBuf> {
    let dir = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| tree().join("target"), |dir| tree().join(dir));
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// Makes a fresh directory `out/<kind>/<words>-<seconds since 1970>` for the artefacts of one run.
///
/// # Errors
/// The directory cannot be made.
pub(crate) fn artefacts(kind: &str, words: &str) -> Result<PathBuf> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis();
    let dir = tree().join("out").join(kind).join(format!("{words}-{now}"));
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}
