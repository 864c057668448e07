//! The files that a guest starts with: its kernel, the first file system of each of its two
//! systems, and the disk with what the run needs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::receiver::Receiver;
use super::{CAPTURE_PROGRAMS, Orders, Plan, Role, Transport};
use crate::guest::run;
use crate::initramfs::Initramfs;
use crate::modules::Modules;
use crate::run::kernel_of;

const NETWORK: [&str; 2] = ["virtio_pci", "virtio_net"];
const DISKS: [&str; 3] = ["virtio_blk", "crc32c_generic", "ext4"];
/// The loader of programs that bring none of their own.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
/// Small images leave a crash kernel more memory; a higher level costs minutes.
const ZSTD_LEVEL: i32 = 19;

/// What QEMU is given.
pub(super) struct Images {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) boot: PathBuf,
}

/// Makes them in `folder`.
pub(super) fn make(plan: &Plan, folder: &Path, receiver: &Receiver) -> Result<Images> {
    let (kernel, release) = kernel_of(&plan.image)?;
    let modules = Modules::open(&plan.image, &release)?;
    let orders = |role, modules| Orders {
        role,
        way: plan.way,
        level: plan.level,
        memory_mib: plan.memory_mib,
        modules,
        capture_line: "console=ttyS0 quiet reset_devices nr_cpus=1 irqpoll panic=5".to_owned(),
        receive: receiver.command(),
    };
    let wanted = [&NETWORK[..], &DISKS].concat();
    let (mut archive, names) = base(plan, &modules, &wanted)?;
    put_orders(&mut archive, &orders(Role::Host, names))?;
    let initramfs = folder.join("initramfs.img");
    fs::write(
        &initramfs,
        zstd::encode_all(archive.finish().as_slice(), 1)?,
    )?;

    let boot = folder.join("boot");
    fs::create_dir_all(&boot)?;
    let copies = [
        (&kernel, "vmlinuz"),
        (&plan.netdump, "netdump"),
        (&plan.module, "netdump.ko"),
        (&receiver.key, "key"),
    ];
    for (from, name) in copies {
        let copied = fs::copy(from, boot.join(name));
        copied.with_context(|| format!("cannot copy {}", from.display()))?;
    }
    if let Some((_, transport)) = plan.way.dump() {
        let (mut archive, names) = base(plan, &modules, &NETWORK)?;
        put_orders(&mut archive, &orders(Role::Capture, names))?;
        put_programs(&mut archive, plan, transport, &receiver.key)?;
        let packed = zstd::encode_all(archive.finish().as_slice(), ZSTD_LEVEL)?;
        fs::write(boot.join("capture.img"), packed)?;
    }
    let disk = folder.join("boot.img");
    let (from, to) = (boot.to_string_lossy(), disk.to_string_lossy());
    let options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0"];
    run(
        "mke2fs",
        &[&options[..], &["-d", &from, &to, "96M"]].concat(),
    )?;
    Ok(Images {
        kernel,
        initramfs,
        boot: disk,
    })
}

/// A first file system with the first program and modules; gives the modules' files in load order.
fn base(plan: &Plan, modules: &Modules, wanted: &[&str]) -> Result<(Initramfs, Vec<String>)> {
    let mut archive =
        Initramfs::system(&[("init", &plan.peer_init), ("bin/busybox", &plan.busybox)])?;
    for folder in ["etc", "tmp"] {
        archive.directory(folder);
    }
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/sh\n");
    let names = archive.modules(&modules.closure(wanted)?);
    Ok((archive, names))
}

fn put_orders(archive: &mut Initramfs, orders: &Orders) -> Result<()> {
    archive.file("orders.json", 0o600, &serde_json::to_vec(orders)?);
    Ok(())
}

fn put_programs(
    archive: &mut Initramfs,
    plan: &Plan,
    transport: Transport,
    key: &Path,
) -> Result<()> {
    archive.directory(CAPTURE_PROGRAMS.trim_start_matches('/'));
    let words: Vec<&str> = plan.makedumpfile.split_ascii_whitespace().collect();
    let [loader, option, libraries, program] = words.as_slice() else {
        anyhow::bail!(
            "makedumpfile is not started by a loader, its option, libraries and a program: {}",
            plan.makedumpfile
        );
    };
    put_program(
        archive,
        "makedumpfile",
        &[loader, option, libraries],
        program,
    )?;
    if transport == Transport::Ssh {
        put_program(archive, "ssh", &[LOADER], "/usr/bin/ssh")?;
        archive.file("key", 0o600, &fs::read(key).context("no key")?);
    }
    Ok(())
}

/// Puts a program into a folder of its own, with its loader and all libraries that the loader,
/// started by these words, finds for it.
fn put_program(archive: &mut Initramfs, name: &str, start: &[&str], program: &str) -> Result<()> {
    let (loader, rest) = start.split_first().context("no loader")?;
    let folder = format!("{}/{name}", CAPTURE_PROGRAMS.trim_start_matches('/'));
    let read = |path: &str| fs::read(path).with_context(|| format!("cannot read {path}"));
    archive.directory(&folder);
    archive.file(&format!("{folder}/loader"), 0o755, &read(loader)?);
    archive.file(&format!("{folder}/{name}"), 0o755, &read(program)?);
    let listing = run(loader, &[rest, &["--list", program]].concat())?;
    for (library, path) in libraries(&listing) {
        archive.file(&format!("{folder}/{library}"), 0o755, &read(path)?);
    }
    Ok(())
}

/// Names and paths in the loader's listing: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)`.
fn libraries(listing: &str) -> impl Iterator<Item = (&str, &str)> {
    listing.lines().filter_map(|line| {
        let (name, rest) = line.trim().split_once(" => ")?;
        let (path, _) = rest.split_once(" (")?;
        (!name.contains('/')).then_some((name, path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_the_loaders_listing() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\
            \tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f81)\n\
            \t/lib64/ld-linux-x86-64.so.2 => /x/ld-linux-x86-64.so.2 (0x00007f82)\n";
        let found: Vec<_> = libraries(listing).collect();
        assert_eq!(found, [("libz.so.1", "/lib/x86_64-linux-gnu/libz.so.1")]);
    }
}
