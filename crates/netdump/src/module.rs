//! Loading the kernel module and taking it out again, with errors that say what is wrong with it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use rustix::io::Errno;
use rustix::system::{delete_module, finit_module, uname};

/// Where the module answers while it is loaded.
pub const DEVICE_PATH: &str = "/dev/netdump";

/// Loads the module unless it is loaded, from `path` or from where packages put it.
///
/// Fails, in words that name the file and both kernels, when there is no module for the running
/// kernel, when the kernel refuses it, or when the caller may not load modules.
pub fn load(path: Option<&Path>) -> Result<()> {
    if Path::new(DEVICE_PATH).exists() {
        return Ok(());
    }
    let release = running_release();
    let path = match path {
        Some(path) => path.to_owned(),
        None => find(&release)?,
    };
    let show = path.display();
    let image = fs::read(&path).with_context(|| format!("cannot read the module {show}"))?;
    let built_for = built_for(&image).ok_or_else(|| {
        anyhow!("{show} is not an uncompressed kernel module (no vermagic in it)")
    })?;
    ensure!(
        built_for == release,
        "module {show} was built for kernel {built_for}, this kernel is {release}: build it for \
        {release} or name another with --module"
    );
    let file = File::open(&path).with_context(|| format!("cannot open the module {show}"))?;
    match finit_module(&file, c"", 0) {
        // Another `netdump arm` may have been faster.
        Ok(()) | Err(Errno::EXIST) => wait_for_device(),
        Err(errno) => Err(refusal(&path, errno)),
    }
}

/// Takes the module out. It is no error when it is not loaded.
pub fn unload() -> Result<()> {
    match delete_module(MODULE_NAME, libc::O_NONBLOCK) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(io::Error::from(errno)).with_context(|| match errno {
            Errno::PERM => "cannot unload the module: only root may".to_owned(),
            Errno::AGAIN => {
                format!("cannot unload the module: another process holds {DEVICE_PATH} open")
            }
            _ => "cannot unload the module".to_owned(),
        }),
    }
}

/// The running kernel's release, as `uname -r` prints it.
#[must_use]
pub fn running_release() -> String {
    uname().release().to_string_lossy().into_owned()
}

/// The device appears a moment after the load when udev or devtmpfs is slow.
fn wait_for_device() -> Result<()> {
    let give_up = Instant::now() + DEVICE_WAIT_MAX;
    while !Path::new(DEVICE_PATH).exists() {
        if Instant::now() >= give_up {
            bail!(
                "the module is loaded but {DEVICE_PATH} did not appear within {} s: is devtmpfs \
                mounted on /dev?",
                DEVICE_WAIT_MAX.as_secs()
            );
        }
        thread::sleep(DEVICE_POLL);
    }
    Ok(())
}

/// Why the kernel refused the module, in words a person can act on.
fn refusal(path: &Path, errno: Errno) -> Error {
    let show = path.display();
    let advice = match errno {
        Errno::PERM if lockdown_active() => {
            "kernel lockdown (secure boot) allows signed modules only: sign it with an enrolled key"
                .to_owned()
        }
        Errno::PERM => {
            "only root may load modules (and not while kernel.modules_disabled = 1)".to_owned()
        }
        Errno::KEYREJECTED | Errno::NOKEY => {
            "the kernel wants a signature it trusts: sign the module with an enrolled key"
                .to_owned()
        }
        Errno::NOEXEC => format!(
            "it does not fit this kernel ({}), though its release does: see dmesg, then build it \
            anew",
            running_release()
        ),
        Errno::NOENT => "the kernel lacks a symbol it needs: see dmesg".to_owned(),
        _ => "see dmesg".to_owned(),
    };
    anyhow!(io::Error::from(errno)).context(format!("cannot load the module {show}: {advice}"))
}

fn lockdown_active() -> bool {
    fs::read_to_string("/sys/kernel/security/lockdown").is_ok_and(|text| !text.contains("[none]"))
}

fn find(release: &str) -> Result<PathBuf> {
    let tried: Vec<PathBuf> = MODULE_FOLDERS
        .iter()
        .map(|folder| PathBuf::from(format!("/lib/modules/{release}/{folder}/netdump.ko")))
        .collect();
    let found = tried.iter().find(|path| path.exists()).cloned();
    found.ok_or_else(|| {
        anyhow!(
            "no netdump.ko for this kernel ({release}) in /lib/modules/{release}/{{{}}}: build \
            it or name it with --module",
            MODULE_FOLDERS.join(",")
        )
    })
}

/// The kernel release a module was built for: the first word of its vermagic.
///
/// The kernel itself compares this text, so it decides; finding it needs no reading of ELF
/// sections.
fn built_for(image: &[u8]) -> Option<&str> {
    const KEY: &[u8] = b"vermagic=";
    let start = image.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let text = image
        .get(start..)?
        .split(|&byte| byte == 0 || byte == b' ')
        .next()?;
    std::str::from_utf8(text)
        .ok()
        .filter(|text| !text.is_empty())
}

const MODULE_NAME: &std::ffi::CStr = c"netdump";
/// DKMS (Debian, others), DKMS elsewhere, `make modules_install`, hand-made.
const MODULE_FOLDERS: [&str; 4] = ["updates/dkms", "extra", "updates", "kernel/drivers/net"];
const DEVICE_WAIT_MAX: Duration = Duration::from_secs(5);
const DEVICE_POLL: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_a_module_was_built_for_is_its_vermagics_first_word() {
        let image = b"\x7fELF..\0license=GPL\0vermagic=6.1.0-56-amd64 SMP preempt mod_unload \0x";
        assert_eq!(built_for(image), Some("6.1.0-56-amd64"));
        assert_eq!(built_for(b"no such thing"), None);
        assert_eq!(built_for(b"vermagic="), None);
    }

    #[test]
    fn a_module_for_another_kernel_is_refused_with_both_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("netdump.ko");
        fs::write(&path, b"vermagic=1.2.3-other SMP").unwrap();
        let error = format!("{:#}", load(Some(&path)).unwrap_err());
        assert!(
            error.contains("1.2.3-other") && error.contains(&running_release()),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_is_no_module_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("netdump.ko");
        fs::write(&path, b"gzip or so").unwrap();
        assert!(
            format!("{:#}", load(Some(&path)).unwrap_err())
                .contains("not an uncompressed kernel module")
        );
    }
}
