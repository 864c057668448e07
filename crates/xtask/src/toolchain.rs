//! The Rust side of the kernel build: a `core` library compiled the way the kernel compiles code.
//!
//! A precompiled `core` for `x86_64-unknown-none`, which rustup offers, is not used: its functions
//! return without the kernel's return thunk and call through a global offset table, which kernels
//! mitigate and refuse. Compiling `core` takes a quarter of a minute, once a toolchain.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::{cache, command, output, packages};

/// The target whose code may run inside a kernel: no floating point, no red zone.
pub(crate) const TARGET: &str = "x86_64-unknown-none";

/// How kernel code is generated, for `core` and ours alike: addresses in the upper 2 GiB, frame
/// pointers, no jump tables, calls that the module loader can relocate, and the mitigations for
/// speculative execution that the kernel's own code has.
const CODEGEN: [&str; 14] = [
    "-Crelocation-model=static",
    "-Ccode-model=kernel",
    "-Cforce-frame-pointers=y",
    "-Cjump-tables=n",
    "-Cpanic=abort",
    "-Zfunction-sections=y",
    "-Zplt=yes",
    "-Zdirect-access-external-data=yes",
    "-Zretpoline",
    "-Zretpoline-external-thunk",
    "-Zindirect-branch-cs-prefix",
    "-Zfunction-return=thunk-extern",
    "-Zcf-protection=branch",
    "-Cforce-unwind-tables=n",
];

/// The ciphers must not choose SSE or AVX at run time.
const CIPHERS: [&str; 4] = [
    "--cfg",
    "chacha20_backend=\"soft\"",
    "--cfg",
    "poly1305_backend=\"soft\"",
];

/// What rustc needs to compile our crates for the kernel, `core` included.
///
/// # Errors
/// As for [`sysroot`].
pub(crate) fn flags() -> Result<Vec<String>> {
    let sysroot = sysroot()?.to_string_lossy().into_owned();
    let mut flags = vec!["--sysroot".to_owned(), sysroot];
    flags.extend(CODEGEN.iter().chain(&CIPHERS).map(ToString::to_string));
    Ok(flags)
}

/// The folder to give rustc as `--sysroot` when it compiles for the kernel; made when missing.
///
/// # Errors
/// rustc is missing, there is no library source of its version, or `core` does not compile.
pub(crate) fn sysroot() -> Result<PathBuf> {
    let about = command::capture(Command::new("rustc").arg("-vV").current_dir(cache::tree()))?;
    let version = about
        .lines()
        .find_map(|line| line.strip_prefix("release: "))
        .with_context(|| format!("rustc -vV names no release: {about}"))?;
    let key = format!("{about}{}\n", CODEGEN.join(" "));
    // Cargo does not look into a sysroot, only at its name: another one must have another name.
    let sysroot = cache::dir()?.join(format!("sysroot-{version}-{}", digest(&key)));
    let seal = sysroot.join(".seal");
    if fs::read_to_string(&seal).is_ok_and(|found| found == key) {
        return Ok(sysroot);
    }
    let library = library(version)?;
    let _only_writer = cache::hold()?;
    let _step = output::step(format!("compiling core of Rust {version} for the kernel"));
    compile(&sysroot, &library)?;
    fs::write(&seal, key).with_context(|| format!("cannot write {}", seal.display()))?;
    Ok(sysroot)
}

/// The source of the standard library that belongs to rustc `version`: rustup's if it is installed,
/// else the pinned package's.
fn library(version: &str) -> Result<PathBuf> {
    let root = command::capture(
        Command::new("rustc")
            .args(["--print", "sysroot"])
            .current_dir(cache::tree()),
    )?;
    let installed = Path::new(root.trim()).join("lib/rustlib/src/rust/library");
    if installed.join("core/src/lib.rs").is_file() {
        return Ok(installed);
    }
    let packaged = packages::rust_src()?;
    let folder = format!("rustc-{version}");
    ensure!(
        packaged
            .parent()
            .is_some_and(|parent| parent.ends_with(&folder)),
        "rustc is {version}, the pinned library source is {}: use the toolchain of rust-toolchain.toml, or install \
         the source (rustup component add rust-src)",
        packaged.display()
    );
    Ok(packaged)
}

/// Eight digits that stand for `text`.
fn digest(text: &str) -> String {
    let digest = Sha256::digest(text);
    digest
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Compiles `core`, and an empty `compiler_builtins` whose functions the kernel itself has.
fn compile(sysroot: &Path, library: &Path) -> Result<()> {
    let place = sysroot.join("lib/rustlib").join(TARGET).join("lib");
    if sysroot.exists() {
        fs::remove_dir_all(sysroot)
            .with_context(|| format!("cannot remove {}", sysroot.display()))?;
    }
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    let builtins = sysroot.join("compiler_builtins.rs");
    fs::write(
        &builtins,
        "#![feature(compiler_builtins)]\n#![compiler_builtins]\n#![no_std]\n",
    )?;
    let core = library.join("core/src/lib.rs");
    command::run(rustc("core", &place).arg("--sysroot=/dev/null").arg(core))?;
    command::run(
        rustc("compiler_builtins", &place)
            .arg("--sysroot")
            .arg(sysroot)
            .arg(builtins),
    )
}

fn rustc(name: &str, place: &Path) -> Command {
    let mut rustc = Command::new("rustc");
    rustc
        .args(["--edition=2024", "--crate-type=rlib", "--crate-name", name])
        .args(["--target", TARGET, "--cap-lints=allow"])
        .args([
            "-Copt-level=2",
            "-Cembed-bitcode=yes",
            "-Zforce-unstable-if-unmarked",
        ])
        .args(CODEGEN)
        .arg("-o")
        .arg(place.join(format!("lib{name}.rlib")))
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(cache::tree());
    rustc
}
