//! Files and streams that the product reads: vmcores, spools, key files, records as the server
//! takes them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::LazyLock;

use dump::{
    Compression, Cpu, Format, GREGS, Machine, PAGE_SIZE, Page, Pfn, RamRange, Reader, Writer,
};
use netdump::key::HostKey;
use netdump::serve::content::Content;
use netdump::serve::spool;
use proto::record::{BLOCK_BYTES, BODY_BYTES_MAX};

use crate::byte;

/// Pages that are read of a vmcore, which may claim terabytes.
const PAGES_READ: usize = 64;

/// A file with these contents, of this process alone.
pub(crate) fn file(bytes: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("netdump-fuzz-{}", std::process::id()));
    fs::write(&path, bytes).expect("a temporary file can be written");
    let owner_only = fs::Permissions::from_mode(0o600);
    fs::set_permissions(&path, owner_only).expect("its mode can be set");
    path
}

/// A vmcore as our own writer makes it.
fn vmcore(format: Format) -> Vec<u8> {
    let path = file(&[]);
    let machine = Machine {
        ram: vec![RamRange {
            first: Pfn(2),
            pages: 3,
        }],
        vmcoreinfo: b"OSRELEASE=fuzzed\nPAGESIZE=4096\n".to_vec(),
        cpus: vec![Cpu {
            number: 0,
            pid: 1,
            registers: Some([1; GREGS]),
            crashed: true,
        }],
        ..Machine::default()
    };
    let mut writer = Writer::create(&path, machine, format).expect("a vmcore can be written");
    let pages = [Page::Data(&[7; PAGE_SIZE]), Page::Unreadable];
    for (pfn, page) in (2..).map(Pfn).zip(pages) {
        writer.page(pfn, page).expect("the page is RAM");
    }
    writer.finish().expect("the vmcore can be finished");
    fs::read(&path).expect("the vmcore can be read")
}

static ELF: LazyLock<Vec<u8>> = LazyLock::new(|| vmcore(Format::Elf));
static KDUMP: LazyLock<Vec<u8>> = LazyLock::new(|| vmcore(Format::Kdump(Compression::default())));

/// vmcores. The first byte says what is altered: an ELF file, a kdump file, or nothing, and then
/// the input is the file. Alterations are an offset (3 bytes), a length and so many bytes.
pub(crate) fn dump(mut bytes: &[u8]) {
    let mut contents = match byte(&mut bytes) % 3 {
        0 => std::mem::take(&mut bytes).to_vec(),
        1 => ELF.clone(),
        _ => KDUMP.clone(),
    };
    while !bytes.is_empty() {
        let offset = [byte(&mut bytes), byte(&mut bytes), byte(&mut bytes)].map(usize::from);
        let at = (offset[0] | offset[1] << 8 | offset[2] << 16) % contents.len();
        let length = usize::from(byte(&mut bytes) % 9).min(bytes.len());
        let (new, rest) = bytes.split_at(length);
        bytes = rest;
        if new.is_empty() {
            contents.truncate(at + 1);
        }
        for (to, from) in contents[at..].iter_mut().zip(new) {
            *to = *from;
        }
    }
    let path = file(&contents);
    let Ok(mut reader) = Reader::open(&path) else {
        return;
    };
    let mut page = [0; PAGE_SIZE];
    let claimed = reader.ram().iter().flat_map(|range| {
        let end = range.first.0.saturating_add(range.pages);
        (range.first.0..end).map(Pfn)
    });
    let claimed: Vec<Pfn> = claimed.take(PAGES_READ).collect();
    for pfn in claimed.into_iter().chain([Pfn(0), Pfn(u64::MAX)]) {
        let _ = reader.read_page(pfn, &mut page);
    }
    let _ = (reader.vmcoreinfo().osrelease(), reader.summary());
}

/// Spools: what is whole is read, what follows is cut off, and both ways agree how far that is.
pub(crate) fn spool(bytes: &[u8]) {
    let path = file(bytes);
    let mut frames = 0;
    for _ in 0..2 {
        let Ok(mut reader) = spool::Reader::open(&path) else {
            return;
        };
        let (mut frame, mut count) = (Vec::new(), 0);
        while reader.frame(&mut frame).is_ok_and(|whole| whole) {
            count += 1;
        }
        assert!(
            frames == 0 || frames == count,
            "{frames} frames, then {count}"
        );
        frames = count;
        let _ = reader.into_writer(&path);
    }
}

/// Key files.
pub(crate) fn key(bytes: &[u8]) {
    let path = file(bytes);
    if let Ok(key) = HostKey::load(&path) {
        fs::remove_file(&path).expect("the file is ours");
        key.store(&path).expect("a key can be stored");
        let again = HostKey::load(&path).expect("a stored key can be loaded");
        assert!(again.id == key.id && again.secret.0 == key.secret.0);
    }
}

/// The stream as the server takes it, cut into pieces of any size.
pub(crate) fn content(mut bytes: &[u8]) {
    let mut content = Content::new();
    let mut room = Box::new([0; BLOCK_BYTES]);
    content.want_pull(1);
    while !bytes.is_empty() {
        let length = (usize::from(byte(&mut bytes)) * 16).clamp(1, bytes.len().max(1));
        let (piece, rest) = bytes.split_at(length.min(bytes.len()));
        bytes = rest;
        if content.push(piece, &mut room).is_err() {
            return;
        }
        assert!(content.take_state().len() <= BODY_BYTES_MAX);
    }
    let _ = (content.text_over(), content.verify());
}
