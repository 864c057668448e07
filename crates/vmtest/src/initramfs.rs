//! Writer of the guest's first file system: a cpio archive in the "newc" format, which every Linux
//! kernel unpacks.
//!
//! A member is a 110-byte header of ASCII hexadecimal fields, the name with its NUL, and the
//! content; header with name and content are each padded to four bytes. The archive ends with a
//! member called `TRAILER!!!`. Source of the format: the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::modules::Module;

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    members: u32,
}

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_DEVICE: u32 = 0o020_000;
const TYPE_FILE: u32 = 0o100_000;

/// What the header of one member says beyond its name and size.
#[derive(Clone, Copy, Default)]
struct Member {
    mode: u32,
    device: (u32, u32),
}

impl Initramfs {
    /// An archive with what every guest has: folders to mount on, a console, and programs.
    ///
    /// # Errors
    /// If a program cannot be read.
    pub fn system(programs: &[(&str, &Path)]) -> Result<Self> {
        let mut archive = Self::default();
        for folder in ["bin", "dev", "modules", "proc", "sys"] {
            archive.directory(folder);
        }
        archive.device("dev/console", 5, 1);
        for (name, path) in programs {
            archive.file(name, 0o755, &read(path)?);
        }
        Ok(archive)
    }

    /// Adds a file of this machine, for its owner only.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn copy(&mut self, name: &str, path: &Path) -> Result<()> {
        self.file(name, 0o600, &read(path)?);
        Ok(())
    }

    /// Adds modules below /modules; gives their file names, in load order.
    pub fn modules(&mut self, modules: &[Module]) -> Vec<String> {
        let add = |module: &Module| {
            let name = format!("{}.ko", module.name);
            self.file(&format!("modules/{name}"), 0o600, &module.image);
            name
        };
        modules.iter().map(add).collect()
    }

    /// Adds a directory; parents must be added before their children.
    pub fn directory(&mut self, path: &str) {
        self.member(
            path,
            &[],
            Member {
                mode: TYPE_DIRECTORY | 0o755,
                device: (0, 0),
            },
        );
    }

    /// Adds a regular file with the permission bits `mode`.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.member(
            path,
            content,
            Member {
                mode: TYPE_FILE | mode,
                device: (0, 0),
            },
        );
    }

    /// Adds a character device, readable and writable by its owner only.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.member(
            path,
            &[],
            Member {
                mode: TYPE_DEVICE | 0o600,
                device: (major, minor),
            },
        );
    }

    /// Ends the archive and gives its bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.member("TRAILER!!!", &[], Member::default());
        self.bytes
    }

    fn member(&mut self, path: &str, content: &[u8], member: Member) {
        self.members += 1;
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        assert!(
            content.len() < 0xffff_ffff,
            "a newc member holds less than 4 GiB: {path}"
        );
        let fields = [
            self.members,           // inode: any number unique in the archive
            member.mode,            // type and permissions
            0,                      // owner
            0,                      // group
            1,                      // links
            0,                      // modification time
            length(content.len()),  // size of the content
            0,                      // device of the archive's file system: major
            0,                      // and minor
            member.device.0,        // the device a device node stands for: major
            member.device.1,        // and minor
            length(path.len()) + 1, // size of the name with its NUL
            0,                      // checksum: not used by this variant
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_as_the_format_says() {
        let mut archive = Initramfs::default();
        archive.directory("dev");
        archive.device("dev/console", 5, 1);
        archive.file("init", 0o755, b"hello");
        let expected = [
            "070701 00000001 000041ED 00000000 00000000 00000001 00000000 00000000",
            "00000000 00000000 00000000 00000000 00000004 00000000 dev...",
            "070701 00000002 00002180 00000000 00000000 00000001 00000000 00000000",
            "00000000 00000000 00000005 00000001 0000000C 00000000 dev/console...",
            "070701 00000003 000081ED 00000000 00000000 00000001 00000000 00000005",
            "00000000 00000000 00000000 00000000 00000005 00000000 init..hello...",
            "070701 00000004 00000000 00000000 00000000 00000001 00000000 00000000",
            "00000000 00000000 00000000 00000000 0000000B 00000000 TRAILER!!!....",
        ];
        let text = String::from_utf8(archive.finish()).unwrap();
        assert_eq!(text.replace('\0', "."), expected.concat().replace(' ', ""));
    }
}
