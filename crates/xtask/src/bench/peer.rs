//! `cargo xtask bench peer`: from the panic to the finished vmcore of a guest of 2 GiB, half of it
//! in use, by netdump and by kdump with makedumpfile on the same guest.
//!
//! `vmtest peer` does one guest and one way; here is what it needs, the order, and the comparison.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::stage::{self, Place, Row};
use crate::kmod::{self, Variant};
use crate::{cache, command, output, packages, tools, vm};

const KERNEL: &str = "6.1";
const OURS: &str = "netdump";
/// What people run, and what is compared with on the wire.
const USUAL: &str = "lzo-ssh";
/// The best times of makedumpfile: not compressed and not sealed.
const BEST: &str = "none-tcp";
/// Better times than any tool people use has.
const SPLICED: &str = "none-splice";
/// The fewest bytes of makedumpfile.
const SMALLEST: &str = "zstd-ssh";

/// Where the files come from that fill the guest's memory; what follows is for machines that have
/// little installed.
const SOURCES: [&str; 4] = ["/usr/bin", "/usr/include", "/usr/share", "/usr/lib"];
/// As much as the disk holds of them.
const CONTENT_BYTES: u64 = 2_000_000_000;
/// And at least: the guest reads that far.
const CONTENT_BYTES_MIN: u64 = 1_800_000_000;
const DISK_SIZE: &str = "2300M";

/// Which levels to run.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Levels {
    /// All that can be left out is left out.
    #[value(name = "31")]
    Least,
    /// Everything is dumped.
    #[value(name = "0")]
    All,
    /// One after the other.
    Both,
}

/// Runs all ways and prints the rows.
///
/// # Errors
/// Something cannot be fetched or built, or a way does not end in a readable vmcore.
pub(crate) fn run(levels: Levels, json: bool) -> Result<()> {
    tools::ensure_also(&["e2fsprogs", "iproute2", "openssh-client", "openssh-server"])?;
    let place = Place::new("peer")?;
    let guest = guest()?;
    let levels: &[u8] = match levels {
        Levels::Least => &[31],
        Levels::All => &[0],
        Levels::Both => &[31, 0],
    };
    let mut rows = Vec::new();
    for level in levels {
        // Its fewest bytes are of interest only where bytes are left out.
        let ways: &[&str] = match level {
            0 => &[USUAL, BEST, SPLICED, OURS],
            _ => &[USUAL, BEST, SPLICED, SMALLEST, OURS],
        };
        let outcomes = ways.iter().map(|way| one(&guest, &place, way, *level));
        rows.extend(compare(outcomes.collect::<Result<_>>()?)?);
    }
    stage::print(&rows, json)
}

/// The program and options that all ways share.
fn guest() -> Result<Vec<String>> {
    let release = packages::kernel(KERNEL)?.release;
    let modules = kmod::build(&release, Variant::Product)?;
    let binaries = vm::binaries()?;
    let paths = [
        ("--image", packages::image(&release)?),
        ("--module", modules.netdump),
        ("--netdump", binaries.netdump),
        ("--peer-init", binaries.peer_init),
        ("--files", files()?),
        ("--vmlinux", packages::vmlinux(&release)?),
        ("--drgn", packages::drgn()?),
    ];
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let mut words = vec![text(binaries.vmtest), "peer".to_owned()];
    for (option, path) in paths {
        words.extend([option.to_owned(), text(path)]);
    }
    let readers = [
        ("--crash-reader", packages::crash_reader()?),
        ("--makedumpfile", packages::makedumpfile()?),
    ];
    for (option, command) in readers {
        words.extend([option.to_owned(), command.join(" ")]);
    }
    Ok(words)
}

fn one(guest: &[String], place: &Place, way: &str, level: u8) -> Result<Row> {
    let _step = output::step(format!("{way}, level {level}"));
    let (program, options) = guest.split_first().context("no program")?;
    let folder = place.dir.join(format!("{way}-{level}"));
    let mut command = Command::new(program);
    command
        .args(options)
        .args(["--way", way, "--level", &level.to_string()]);
    let result = command::capture(command.arg("--keep").arg(&folder))?;
    // Images and vmcores are large, and there are many of them.
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    let outcome: Value = stage::last_object(&result)?;
    outcome
        .as_object()
        .cloned()
        .context("vmtest's outcome is no object")
}

/// Adds to the rows of one level how much faster and smaller ours is than each.
fn compare(mut rows: Vec<Row>) -> Result<Vec<Row>> {
    let figure = |row: &Row, name: &str| {
        let figure = row.get(name).and_then(Value::as_f64);
        figure.with_context(|| format!("vmtest did not say {name}"))
    };
    let ours = rows.last().context("no rows")?;
    let (seconds, cpu) = (figure(ours, "seconds")?, figure(ours, "qemu_cpu_s")?);
    let wire = figure(ours, "wire_bytes")?;
    for row in &mut rows {
        let ratios = [
            ("ratio", figure(row, "seconds")? / seconds),
            ("ratio_cpu", figure(row, "qemu_cpu_s")? / cpu),
            ("ratio_wire", figure(row, "wire_bytes")? / wire),
        ];
        for (name, ratio) in ratios {
            row.insert(name.to_owned(), json!(ratio));
        }
    }
    Ok(rows)
}

/// A disk with real files, made once and kept in the cache.
fn files() -> Result<PathBuf> {
    let folder = cache::dir()?.join("bench");
    let path = folder.join("peer-files.img");
    if path.exists() {
        return Ok(path);
    }
    let _step = output::step(format!("making {}", path.display()));
    let tree = folder.join("peer-files");
    fs::create_dir_all(&tree)?;
    let unpacked = cache::dir()?.join("unpacked");
    let mut room = CONTENT_BYTES;
    for source in SOURCES
        .map(Path::new)
        .into_iter()
        .chain([unpacked.as_path()])
    {
        let name = source.file_name().context("a source without a name")?;
        copy(source, &tree.join(name), &mut room)?;
    }
    let bytes = CONTENT_BYTES - room;
    ensure!(
        bytes >= CONTENT_BYTES_MIN,
        "{bytes} bytes of files on this machine, and {CONTENT_BYTES_MIN} are needed to fill a \
         guest: run `cargo xtask kernels fetch`"
    );
    let partial = path.with_extension("partial");
    let mut mke2fs = Command::new("mke2fs");
    mke2fs
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-d"])
        .arg(&tree)
        .arg(&partial);
    command::run(mke2fs.arg(DISK_SIZE))?;
    fs::remove_dir_all(&tree)?;
    fs::rename(&partial, &path)?;
    Ok(path)
}

/// Copies the regular files of a tree in the order of their names, until there is no room.
fn copy(from: &Path, to: &Path, room: &mut u64) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))?;
    let mut entries = entries.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    fs::create_dir_all(to)?;
    for entry in entries {
        let (kind, to) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            copy(&entry.path(), &to, room)?;
        } else if kind.is_file() && entry.metadata()?.len() <= *room {
            *room -= fs::copy(entry.path(), &to)
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_the_measure_of_all_rows() {
        let row = |config: &str, seconds, wire| {
            stage::row(
                config,
                [
                    ("seconds", seconds),
                    ("qemu_cpu_s", 2.0),
                    ("wire_bytes", wire),
                ],
            )
        };
        let rows = compare(vec![row("kdump", 20.0, 70.0), row("netdump", 4.0, 35.0)]).unwrap();
        let ratio = |at: usize, name: &str| rows[at][name].as_f64().unwrap();
        assert!((ratio(0, "ratio") - 5.0).abs() < 1e-9);
        assert!((ratio(0, "ratio_wire") - 2.0).abs() < 1e-9);
        assert!((ratio(1, "ratio") - 1.0).abs() < 1e-9);
        assert!(compare(vec![Row::new()]).is_err());
    }

    #[test]
    fn no_more_is_copied_than_there_is_room_for() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("folder")).unwrap();
        for (name, bytes) in [("folder/b", 60), ("a", 50), ("c", 20)] {
            fs::write(from.path().join(name), vec![0; bytes]).unwrap();
        }
        let mut room = 80;
        copy(from.path(), to.path(), &mut room).unwrap();
        assert_eq!(room, 10);
        assert!(!to.path().join("folder/b").exists() && to.path().join("c").exists());
    }
}
