//! The pinned packages, fetched, checked and unpacked in the cache, ready for use.
//!
//! A set of packages becomes one directory `unpacked/<first package>_<version>/`. Its seal, which
//! repeats the pins, is written last, so a directory with the right seal is whole. With everything
//! sealed nothing here touches the network.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::lock::{Kernel, Lock, Package, Role};
use crate::{apt, cache, command, output};

const SEAL: &str = ".seal";

/// The supported kernels.
///
/// # Errors
/// `kernels.lock` cannot be read.
pub(crate) fn kernels() -> Result<Vec<Kernel>> {
    Ok(Lock::read()?.kernels)
}

/// The kernel of a line (`6.1`) or release.
///
/// # Errors
/// There is none in `kernels.lock`; the error lists what there is.
pub(crate) fn kernel(wanted: &str) -> Result<Kernel> {
    Ok(Lock::read()?.kernel(wanted)?.clone())
}

/// The unpacked image package of a kernel: `boot/vmlinuz-<release>` and `lib/modules/<release>`.
///
/// # Errors
/// It is not cached and cannot be fetched.
pub(crate) fn image(release: &str) -> Result<PathBuf> {
    ensure_set(Role::Image, Some(release), |_| Ok(()))
}

/// The directory to build a module of this release in (`make -C`).
///
/// # Errors
/// The packages are not cached and cannot be fetched, or are laid out in a way we do not know.
pub(crate) fn headers(release: &str) -> Result<PathBuf> {
    let (_, loader) = loader(Role::Makedumpfile)?;
    let root = ensure_set(Role::Headers, Some(release), |dir| {
        relocate_headers(dir, release)?;
        adapt_tools(dir, &loader)
    })?;
    Ok(root.join(headers_dir(release)))
}

/// The kernel with symbols.
///
/// # Errors
/// It is not cached and its package (about a gigabyte) cannot be fetched.
pub(crate) fn vmlinux(release: &str) -> Result<PathBuf> {
    let lock = Lock::read()?;
    let set = set(&lock, Role::Debug, Some(release))?;
    let (folder, file, seal) = vmlinux_place(release)?;
    if is_sealed(&seal, &set) && file.exists() {
        return Ok(file);
    }
    // It lies where the kernel itself does: in /boot, or beside the modules, as Debian has it from 7.3 on.
    let member = if image(release)?.join("boot").exists() {
        format!("boot/vmlinux-{release}")
    } else {
        format!("lib/modules/{release}/vmlinux")
    };
    let _only_writer = cache::hold()?;
    fs::create_dir_all(&folder)?;
    let debs = apt::fetch(&set)?;
    let [deb] = debs.as_slice() else {
        bail!("{release}: expected one debug package, got {debs:?}")
    };
    let _step = output::step(format!("unpacking vmlinux of {release}"));
    let partial = folder.join(format!("{release}.partial"));
    extract_one(deb, &format!("./usr/lib/debug/{member}"), &partial)?;
    fs::rename(&partial, &file)?;
    fs::write(&seal, seal_text(&set))?;
    fs::remove_file(deb).with_context(|| format!("cannot remove {}", deb.display()))?;
    Ok(file)
}

/// Where the kernel with symbols lies: its folder, the file and its seal.
fn vmlinux_place(release: &str) -> Result<(PathBuf, PathBuf, PathBuf)> {
    let folder = cache::dir()?.join("vmlinux");
    let (file, seal) = (
        folder.join(release),
        folder.join(format!("{release}{SEAL}")),
    );
    Ok((folder, file, seal))
}

/// The packages of `lock` that would have to be fetched if they were needed now.
///
/// # Errors
/// The cache cannot be reached.
pub(crate) fn missing(lock: &Lock) -> Result<Vec<&Package>> {
    let mut missing = Vec::new();
    for package in &lock.packages {
        let set = lock.set(package.role, package.kernel.as_deref())?;
        let here = match (&package.kernel, package.role) {
            (Some(kernel), Role::Debug) => {
                let (_, file, seal) = vmlinux_place(&lock.kernel(kernel)?.release)?;
                is_sealed(&seal, &set) && file.exists()
            }
            _ => is_sealed(&unpacked_place(&set)?.join(SEAL), &set),
        };
        if !here && !apt::is_fetched(package)? {
            missing.push(package);
        }
    }
    Ok(missing)
}

/// Where a set is unpacked.
fn unpacked_place(set: &[&Package]) -> Result<PathBuf> {
    let first = set.first().context("the set has no packages")?;
    // No colon (epochs have one): it separates the directories of a library path.
    let version = first.version.replace(':', "%3a");
    let unpacked = cache::dir()?.join("unpacked");
    Ok(unpacked.join(format!("{}_{version}", first.name)))
}

/// The folder `library` of the Rust source whose `core` the kernel side is built from.
///
/// # Errors
/// The package is not cached and cannot be fetched, or does not hold exactly one source.
pub(crate) fn rust_src() -> Result<PathBuf> {
    let sources = ensure_set(Role::RustSrc, None, |_| Ok(()))?.join("usr/src");
    let entries =
        fs::read_dir(&sources).with_context(|| format!("cannot read {}", sources.display()))?;
    let libraries: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path().join("library"))
        .filter(|path| path.is_dir())
        .collect();
    match libraries.as_slice() {
        [library] => Ok(library.clone()),
        other => bail!(
            "{}: expected one Rust source, found {other:?}",
            sources.display()
        ),
    }
}

/// The command that runs `crash`: the loader and the libraries of its own suite, because the
/// machine's are older.
///
/// # Errors
/// The packages are not cached and cannot be fetched.
pub(crate) fn crash_reader() -> Result<Vec<String>> {
    with_libraries(Role::CrashReader, "usr/bin/crash")
}

/// The command that runs `makedumpfile`, likewise: older ones do not know the page types of 6.12.
///
/// # Errors
/// The packages are not cached and cannot be fetched.
pub(crate) fn makedumpfile() -> Result<Vec<String>> {
    with_libraries(Role::Makedumpfile, "usr/bin/makedumpfile")
}

/// A QEMU newer than Debian 12's, which has igb. It is used beside the machine's own, so it is
/// told where its firmware lies.
///
/// # Errors
/// The packages are not cached and cannot be fetched.
pub(crate) fn newer_qemu() -> Result<PathBuf> {
    let root = ensure_set(Role::Qemu, None, |_| Ok(()))?;
    let script = root.join("qemu");
    let inside = |path: &str| root.join(path).display().to_string();
    let text = format!(
        "#!/bin/sh\nexec {} -L {} -L {} \"$@\"\n",
        inside("usr/bin/qemu-system-x86_64"),
        inside("usr/share/qemu"),
        inside("usr/share/seabios")
    );
    if fs::read_to_string(&script).is_ok_and(|found| found == text) {
        return Ok(script);
    }
    fs::write(&script, text).with_context(|| format!("cannot write {}", script.display()))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script)
}

/// The command that runs a program of a set with the set's own loader and libraries.
fn with_libraries(role: Role, program: &str) -> Result<Vec<String>> {
    let (root, mut words) = loader(role)?;
    words.push(root.join(program).to_string_lossy().into_owned());
    Ok(words)
}

/// The directory of a set, and the words before a program that run it with the set's libraries.
fn loader(role: Role) -> Result<(PathBuf, Vec<String>)> {
    let root = ensure_set(role, None, |_| Ok(()))?;
    let path = |inside: &str| root.join(inside).to_string_lossy().into_owned();
    let words = vec![
        path("usr/lib64/ld-linux-x86-64.so.2"),
        "--library-path".into(),
        path("usr/lib/x86_64-linux-gnu"),
    ];
    Ok((root, words))
}

/// The Python of a virtual environment that has `drgn`.
///
/// # Errors
/// It is not cached and the environment cannot be made or filled.
pub(crate) fn drgn() -> Result<PathBuf> {
    python(&["drgn"])
}

/// The Python of a virtual environment that has OpenTelemetry's definitions.
///
/// # Errors
/// As [`drgn`].
pub(crate) fn opentelemetry() -> Result<PathBuf> {
    python(&["opentelemetry-proto", "protobuf"])
}

/// The Python of a virtual environment that has these wheels; the first one names it.
fn python(names: &[&str]) -> Result<PathBuf> {
    let lock = Lock::read()?;
    let mut pin = String::new();
    let mut title = String::new();
    for name in names {
        let wheel = lock.wheels.iter().find(|wheel| wheel.name == *name);
        let wheel = wheel.with_context(|| format!("kernels.lock pins no {name}"))?;
        let (version, sha256) = (&wheel.version, &wheel.sha256);
        pin += &format!("{name}=={version} --hash=sha256:{sha256}\n");
        if title.is_empty() {
            title = format!("{name}-{version}");
        }
    }
    let dir = cache::dir()?.join(&title);
    let (python, seal) = (dir.join("bin/python3"), dir.join(SEAL));
    if fs::read_to_string(&seal).is_ok_and(|found| found == pin) && python.exists() {
        return Ok(python);
    }
    let _only_writer = cache::hold()?;
    let _step = output::step(format!("installing {title} in the cache"));
    remove_dir(&dir)?;
    command::run(
        Command::new("/usr/bin/python3")
            .args(["-m", "venv"])
            .arg(&dir),
    )
    .context("cannot make a Python environment: is python3-venv installed?")?;
    let requirements = dir.join("requirements.txt");
    fs::write(&requirements, &pin)?;
    let install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--requirement",
    ];
    command::run(Command::new(&python).args(install).arg(&requirements))?;
    fs::write(&seal, pin)?;
    Ok(python)
}

fn set<'a>(lock: &'a Lock, role: Role, release: Option<&str>) -> Result<Vec<&'a Package>> {
    match release {
        Some(release) => lock.set(role, Some(&lock.kernel(release)?.name)),
        None => lock.set(role, None),
    }
}

/// The set's directory, fetched and unpacked when it is not there; `prepare` changes the unpacked
/// files before the seal goes on.
fn ensure_set(
    role: Role,
    release: Option<&str>,
    prepare: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let lock = Lock::read()?;
    let set = set(&lock, role, release)?;
    let Some(first) = set.first() else {
        bail!("role {role:?} has no packages")
    };
    let dir = unpacked_place(&set)?;
    if is_sealed(&dir.join(SEAL), &set) {
        return Ok(dir);
    }
    let _only_writer = cache::hold()?;
    if is_sealed(&dir.join(SEAL), &set) {
        return Ok(dir);
    }
    let debs = apt::fetch(&set)?;
    let _step = output::step(format!("unpacking {} {}", first.name, first.version));
    let partial = cache::dir()?.join("unpacked/partial");
    remove_dir(&partial)?;
    fs::create_dir_all(&partial)?;
    for deb in &debs {
        command::run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&partial))?;
    }
    remove_dir(&dir)?;
    fs::rename(&partial, &dir)?;
    prepare(&dir)?;
    fs::write(dir.join(SEAL), seal_text(&set))?;
    Ok(dir)
}

/// Makes unpacked headers work where they are. They refer to their place on an installed machine
/// in the Makefile only, which includes the common Makefile by its absolute path. All other
/// references are relative links, which hold because the set shares one directory.
fn relocate_headers(dir: &Path, release: &str) -> Result<()> {
    let makefile = dir.join(headers_dir(release)).join("Makefile");
    let text = fs::read_to_string(&makefile)
        .with_context(|| format!("cannot read {}", makefile.display()))?;
    let included = text
        .lines()
        .find_map(|line| line.strip_prefix("include /usr/src/"))
        .with_context(|| {
            format!(
                "{}: expected a line `include /usr/src/...`, found `{text}`",
                makefile.display()
            )
        })?;
    let included = dir.join("usr/src").join(included);
    ensure!(
        included.is_file(),
        "{}: {} is missing",
        makefile.display(),
        included.display()
    );
    let here = dir.join("usr/src").display().to_string() + "/";
    fs::write(&makefile, text.replace("/usr/src/", &here))?;
    Ok(())
}

/// The programs that the build of a module runs. Of those that only choose among variants the one
/// for this machine is given too.
const BUILD_TOOLS: [(&str, &str); 4] = [
    ("scripts/basic/fixdep", "scripts/basic/fixdep"),
    ("scripts/mod/modpost", "scripts/mod/modpost.real-lsb-64"),
    ("scripts/genksyms/genksyms", "scripts/genksyms/genksyms"),
    (OBJTOOL, OBJTOOL_VARIANT),
];
const OBJTOOL: &str = "tools/objtool/objtool";
const OBJTOOL_VARIANT: &str = "tools/objtool/objtool.real-x86";

/// Headers of a suite newer than this machine bring programs that need a newer C library: each
/// becomes a script that runs it with the libraries of that suite, by the words of `loader`.
fn adapt_tools(dir: &Path, loader: &[String]) -> Result<()> {
    let found = fs::read_dir(dir.join("usr/lib"))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.join(OBJTOOL).exists());
    let Some(tools) = found else {
        return Ok(());
    };
    // Told nothing to do it prints its usage, if it runs at all.
    let objtool = Command::new(tools.join(OBJTOOL_VARIANT)).output();
    if !objtool.is_ok_and(|said| String::from_utf8_lossy(&said.stderr).contains("GLIBC_")) {
        return Ok(());
    }
    for (name, program) in BUILD_TOOLS {
        let moved = tools.join(format!("{name}.elf"));
        fs::rename(tools.join(program), &moved)
            .with_context(|| format!("cannot move {program} of {}", tools.display()))?;
        let (words, moved) = (loader.join(" "), moved.display());
        let file = tools.join(name);
        fs::write(&file, format!("#!/bin/sh\nexec {words} {moved} \"$@\"\n"))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn headers_dir(release: &str) -> String {
    format!("usr/src/linux-headers-{release}")
}

/// Writes one member of a package to a file and reads no further than that member, which takes a
/// tenth of the time of reading a debug package to its end.
fn extract_one(deb: &Path, member: &str, file: &Path) -> Result<()> {
    let mut dpkg = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start dpkg-deb")?;
    let tarfile = dpkg.stdout.take().context("dpkg-deb has no output")?;
    let output =
        fs::File::create(file).with_context(|| format!("cannot write {}", file.display()))?;
    let status = Command::new("tar")
        .args(["--occurrence=1", "-xO", member])
        .stdin(tarfile)
        .stdout(output)
        .status()
        .context("cannot start tar")?;
    // Its own status says nothing: it usually dies of the pipe that tar closed early.
    dpkg.wait().context("cannot wait for dpkg-deb")?;
    ensure!(status.success(), "{} has no {member}", deb.display());
    // The name may be that of a link, of which tar gives nothing.
    let bytes = fs::metadata(file)?.len();
    ensure!(
        bytes > 0,
        "{member} of {} is empty or a link",
        deb.display()
    );
    Ok(())
}

fn is_sealed(seal: &Path, set: &[&Package]) -> bool {
    fs::read_to_string(seal).is_ok_and(|text| text == seal_text(set))
}

fn seal_text(set: &[&Package]) -> String {
    set.iter().map(|package| package.fact() + "\n").collect()
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_relocated_to_where_they_lie() {
        let dir = tempfile::tempdir().unwrap();
        let headers = dir.path().join(headers_dir("6.1.0-9-amd64"));
        let common = dir.path().join("usr/src/linux-headers-6.1.0-9-common");
        for folder in [&headers, &common] {
            fs::create_dir_all(folder).unwrap();
        }
        let makefile = headers.join("Makefile");
        fs::write(
            &makefile,
            "include /usr/src/linux-headers-6.1.0-9-common/Makefile\n",
        )
        .unwrap();
        assert!(
            relocate_headers(dir.path(), "6.1.0-9-amd64").is_err(),
            "common is missing"
        );
        fs::write(common.join("Makefile"), "").unwrap();
        relocate_headers(dir.path(), "6.1.0-9-amd64").unwrap();
        let expected = format!("include {}\n", common.join("Makefile").display());
        assert_eq!(fs::read_to_string(&makefile).unwrap(), expected);
    }
}
