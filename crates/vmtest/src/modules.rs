//! Kernel modules of an unpacked image package: which files a set of modules needs, in load order,
//! ready to load.
//!
//! Distribution packages carry no `modules.dep` (it is made on the installed machine), so the
//! closure comes from where `depmod` takes it too: the `depends=` entry in the `.modinfo` section
//! of each module.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

/// The module tree of one kernel.
#[derive(Debug)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
}

/// One module, decompressed: what `init_module(2)` takes.
#[derive(Debug)]
pub struct Module {
    /// Name with underscores, as the kernel prints it.
    pub name: String,
    /// The ELF file.
    pub image: Vec<u8>,
}

/// More than any module of a distribution needs; a deeper chain is a damaged package that depends
/// on itself.
const DEPTH_MAX: usize = 32;

impl Modules {
    /// Indexes the tree of kernel `release` below the unpacked package `image`.
    ///
    /// # Errors
    /// If the package has no module tree for that release, or it cannot be read.
    pub fn open(image: &Path, release: &str) -> Result<Self> {
        let tree = ["lib/modules", "usr/lib/modules"]
            .map(|folder| image.join(folder).join(release))
            .into_iter()
            .find(|path| path.is_dir())
            .with_context(|| {
                format!(
                    "{} has no lib/modules/{release}; is it an unpacked linux-image package?",
                    image.display()
                )
            })?;
        let mut files = BTreeMap::new();
        collect(&tree, &mut files)?;
        let builtin = fs::read_to_string(tree.join("modules.builtin"))
            .with_context(|| format!("cannot read modules.builtin in {}", tree.display()))?
            .lines()
            .map(|line| name_of(Path::new(line)))
            .collect();
        Ok(Self { files, builtin })
    }

    /// The modules `wanted` and all they depend on, each after its own dependencies; built-in ones
    /// are left out.
    ///
    /// # Errors
    /// If a module is neither in the tree nor built in, or its file is damaged.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        for name in wanted {
            self.visit(name, &mut order, 0)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<Module>, depth: usize) -> Result<()> {
        let name = name.replace('-', "_");
        if order.iter().any(|module| module.name == name) || self.builtin.contains(&name) {
            return Ok(());
        }
        ensure!(
            depth < DEPTH_MAX,
            "the dependencies of module {name} are more than {DEPTH_MAX} deep"
        );
        let path = self.files.get(&name).with_context(|| {
            format!("this kernel has no module {name}, neither as a file nor built in")
        })?;
        let image = read(path)?;
        for dependency in
            depends(&image).with_context(|| format!("module {} is damaged", path.display()))?
        {
            self.visit(&dependency, order, depth + 1)?;
        }
        order.push(Module { name, image });
        Ok(())
    }
}

/// Reads a module file, decompressing by its suffix.
///
/// # Errors
/// If it cannot be read or decompressed, or has a suffix nobody knows.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let stored =
        fs::read(path).with_context(|| format!("cannot read module {}", path.display()))?;
    let suffix = path
        .extension()
        .and_then(|suffix| suffix.to_str())
        .unwrap_or_default();
    let image = match suffix {
        "ko" => Ok(stored),
        "xz" => {
            let mut image = Vec::new();
            lzma_rust2::XzReader::new(stored.as_slice(), false)
                .read_to_end(&mut image)
                .map(|_| image)
        }
        "zst" => zstd::decode_all(stored.as_slice()),
        _ => bail!(
            "module {} is neither .ko, .ko.xz nor .ko.zst",
            path.display()
        ),
    };
    image.with_context(|| format!("cannot decompress module {}", path.display()))
}

fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if entry.file_name().to_string_lossy().contains(".ko") {
            files.insert(name_of(&entry.path()), entry.path());
        }
    }
    Ok(())
}

/// `kernel/net/key/af-key.ko.xz` is module `af_key`.
fn name_of(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    file.split(".ko")
        .next()
        .unwrap_or_default()
        .replace('-', "_")
}

/// The names in the `depends=` entry of a module's `.modinfo` section.
fn depends(image: &[u8]) -> Result<Vec<String>> {
    let modinfo = section(image, b".modinfo").context("no .modinfo section")?;
    let entry = modinfo
        .split(|&byte| byte == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="));
    let names = std::str::from_utf8(entry.unwrap_or_default()).context("depends= is not text")?;
    Ok(names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

/// The content of the ELF section `name`, of a 64-bit little-endian file.
fn section<'a>(image: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let number = |at: usize, size: usize| -> Option<usize> {
        let mut bytes = [0; 8];
        bytes
            .get_mut(..size)?
            .copy_from_slice(image.get(at..at.checked_add(size)?)?);
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let table = number(0x28, 8)?;
    let (entry_size, count, names_index) = (number(0x3a, 2)?, number(0x3c, 2)?, number(0x3e, 2)?);
    let header = |index: usize| table.checked_add(index.checked_mul(entry_size)?);
    let content = |header: usize| {
        let start = number(header.checked_add(0x18)?, 8)?;
        image.get(start..start.checked_add(number(header.checked_add(0x20)?, 8)?)?)
    };
    let names = content(header(names_index)?)?;
    (0..count).filter_map(header).find_map(|header| {
        let found = names
            .get(number(header, 4)?..)?
            .split(|&byte| byte == 0)
            .next()?;
        if found == name { content(header) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF file with a `.modinfo` section.
    fn module_file(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut file = vec![0; 64];
        let modinfo_at = file.len() as u64;
        file.extend_from_slice(modinfo);
        let names_at = file.len() as u64;
        file.extend_from_slice(names);
        let table_at = file.len() as u64;
        let sections = [
            (1u32, modinfo_at, modinfo.len() as u64),
            (10, names_at, names.len() as u64),
        ];
        for (name, start, size) in sections {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&start.to_le_bytes());
            header[0x20..0x28].copy_from_slice(&size.to_le_bytes());
            file.extend_from_slice(&header);
        }
        file[0x28..0x30].copy_from_slice(&table_at.to_le_bytes());
        file[0x3a..0x40].copy_from_slice(&[64, 0, 2, 0, 1, 0]);
        file
    }

    fn tree(modules: &[(&str, &str)]) -> (tempfile::TempDir, Modules) {
        let image = tempfile::tempdir().unwrap();
        let folder = image.path().join("lib/modules/9.9/kernel/net");
        fs::create_dir_all(&folder).unwrap();
        for (file, depends) in modules {
            let content =
                module_file(format!("license=GPL\0depends={depends}\0name=x\0").as_bytes());
            fs::write(folder.join(file), content).unwrap();
        }
        fs::write(
            image.path().join("lib/modules/9.9/modules.builtin"),
            "kernel/lib/crc-core.ko\n",
        )
        .unwrap();
        let modules = Modules::open(image.path(), "9.9").unwrap();
        (image, modules)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn closure_puts_dependencies_first_and_once() {
        let (_image, modules) = tree(&[
            ("virtio_net.ko", "net-failover,virtio"),
            ("net_failover.ko", "failover,virtio"),
            ("failover.ko", ""),
            ("virtio.ko", "crc_core"),
        ]);
        let closure = modules.closure(&["virtio-net", "virtio"]).unwrap();
        assert_eq!(
            names(&closure),
            ["failover", "virtio", "net_failover", "virtio_net"]
        );
    }

    #[test]
    fn compressed_modules_are_read() {
        let (image, _) = tree(&[]);
        let path = image.path().join("a.ko.zst");
        fs::write(
            &path,
            zstd::encode_all(module_file(b"depends=b\0").as_slice(), 1).unwrap(),
        )
        .unwrap();
        assert_eq!(depends(&read(&path).unwrap()).unwrap(), ["b"]);
    }

    #[test]
    fn a_missing_module_is_named() {
        let (_image, modules) = tree(&[("a.ko", "b")]);
        let error = modules.closure(&["a"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "this kernel has no module b, neither as a file nor built in"
        );
    }

    #[test]
    fn a_circle_ends() {
        let (_image, modules) = tree(&[("a.ko", "b"), ("b.ko", "a")]);
        assert!(modules.closure(&["a"]).is_err());
    }

    #[test]
    fn every_prefix_of_a_module_is_read_without_panic() {
        let file = module_file(b"depends=a,b\0");
        for end in 0..file.len() {
            // Cut in the unused tail of the last header, the file still says it all.
            assert!(
                depends(&file[..end]).map_or(true, |names| names == ["a", "b"]),
                "cut at {end}"
            );
        }
        assert_eq!(depends(&file).unwrap(), ["a", "b"]);
    }
}
