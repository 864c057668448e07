//! What a crash directory must hold.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use netdump::hardware::Hardware;
use netdump::serve::content::RecordStream;
use netdump::serve::spool::Reader;
use proto::record::{Malformed, Record};
use proto::reply::Action;

use crate::host::{Host, Sent, page};
use crate::server::session;

/// The log of a crash that arrived whole.
pub(crate) const LOG: &str = "Linux version 6.1.0-test\neth0: link is up\nKernel panic - not syncing: test\n\
                   task:init state:S\nMem-Info:\n";

/// The host was told to reboot, with everything acknowledged.
pub(crate) fn assert_rebooted(sent: &Sent) {
    let outcome = sent.outcome.unwrap();
    assert!(outcome.complete);
    assert_eq!(outcome.action, Action::Reboot);
}

/// Checks every page of a complete crash, its log, and that nothing else is left in its
/// directory.
pub(crate) fn assert_whole(crash: &Path, host: &Host) {
    let file = session(crash);
    assert_eq!(file["state"], "complete", "{file}");
    assert_eq!(file["pages"]["unreadable"], 1);
    assert_eq!(fs::read_to_string(crash.join("log")).unwrap(), LOG);
    let mut names: Vec<String> = fs::read_dir(crash)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    // The reports come after the end of the session, and not at all when the server ends then.
    names.retain(|name| !name.starts_with("report."));
    assert_eq!(names, ["hardware.json", "log", "session.json", "vmcore"]);
    assert_hardware(crash);
    let mut image = dump::Reader::open(&crash.join("vmcore")).unwrap();
    assert_eq!(image.cpus().len(), 2);
    assert!(!image.is_incomplete());
    let mut bytes = [0; 4096];
    for pfn in host
        .ram
        .iter()
        .flat_map(|&(first, pages)| first..first + pages)
    {
        let state = image.read_page(dump::Pfn(pfn), &mut bytes).unwrap();
        if pfn == 77 {
            assert_eq!(state, dump::PageState::Unreadable);
        } else {
            assert_eq!(state, dump::PageState::Data);
            assert!(bytes == page(pfn), "page {pfn}");
        }
    }
}

/// What the test's host sends of its hardware.
fn assert_hardware(crash: &Path) {
    let hardware = Hardware::read(crash).unwrap().unwrap();
    let cpus: Vec<u32> = hardware.cpus.iter().map(|cpu| cpu.cpu).collect();
    assert_eq!(cpus, [0, 1]);
    let registers = &hardware.cpus[1].registers;
    assert_eq!(registers["cr0"].0, 0x0807_0605_0403_0201);
    assert!(registers.contains_key("apic base"));
    let device = &hardware.devices[0];
    assert_eq!(
        (device.address.as_str(), device.id.as_str()),
        ("0000:00:03.0", "8086:100e")
    );
    assert_eq!((device.read, hardware.devices.len()), (256, 1));
}

/// Waits for the reports of a whole crash: the log names it, the memory of a test holds nothing.
pub(crate) fn assert_reported(crash: &Path) {
    let path = crash.join("report.json");
    let give_up = Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        assert!(Instant::now() < give_up, "no {}", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert!(report["file"].as_str().unwrap().ends_with("vmcore"));
    assert_eq!(report["cpus"], serde_json::json!([]));
    assert!(!report["unread"].as_array().unwrap().is_empty());
    let page = fs::read_to_string(crash.join("report.txt")).unwrap();
    assert!(page.contains("not read"), "{page}");
}

/// Waits until a crash is in this state.
pub(crate) fn wait_for_state(crash: &Path, state: &str) {
    let give_up = Instant::now() + Duration::from_secs(10);
    // The spool goes after the state is written.
    let spool = || state == "complete" && crash.join("spool").exists();
    while session(crash)["state"] != state || spool() {
        assert!(Instant::now() < give_up, "{}", session(crash));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The pages in a spool.
pub(crate) fn spooled(spool: &Path) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let (mut stream, mut frame) = (RecordStream::default(), Vec::new());
    let mut reader = Reader::open(spool).unwrap();
    while reader.frame(&mut frame).unwrap() {
        let read = stream.push(&frame, |record| {
            if let Record::Pages(block) = record {
                pages.extend(block.first.0..block.first.0 + u64::from(block.pages));
            } else if let Record::Run(run) = record {
                pages.extend(run.first.0..run.first.0 + run.pages);
            }
            Ok::<(), Malformed>(())
        });
        read.unwrap();
    }
    pages
}

/// The pages that a host read for attempt `attempt`; each is read once only.
pub(crate) fn read(sent: &Sent, attempt: u16) -> BTreeSet<u64> {
    let pages: Vec<u64> = sent
        .pages
        .iter()
        .filter(|(of, _)| *of == attempt)
        .map(|(_, pfn)| *pfn)
        .collect();
    let set: BTreeSet<u64> = pages.iter().copied().collect();
    assert_eq!(set.len(), pages.len(), "a page was read twice");
    set
}
