//! The descriptor rings of the guest's network device, as QEMU knows them: memory that driver and
//! device write with each frame, wherever the driver put it.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::memory::GuestMemory;
use crate::pattern::PAGE_SIZE;
use crate::qmp::Qmp;
use crate::rules::word_at;
use crate::vm::Nic;

/// Physical addresses, start and end.
pub type Range = (u64, u64);

/// Receive, transmit and control queue of a virtio network device.
const VIRTIO_QUEUES: u16 = 3;
/// Registers of the e1000 family: low and high half of the ring's address, and its length, one
/// after the other.
const E1000_RECEIVE: u64 = 0x2800;
const E1000_TRANSMIT: u64 = 0x3800;
/// The same of the first queue of igb, and from one queue to the next.
const IGB_RECEIVE: u64 = 0xc000;
const IGB_TRANSMIT: u64 = 0xe000;
const IGB_QUEUE: u64 = 0x40;
const IGB_QUEUES: u64 = 16;
/// What QEMU shows as the address of registers that nobody mapped, as igb's virtual functions are.
const UNMAPPED: u64 = u64::MAX;

/// Where the rings of the network devices, all of kind `nic`, lie.
///
/// # Errors
/// If QEMU does not say.
pub fn rings(qmp: &mut Qmp, nic: Nic, memory: &GuestMemory) -> Result<Vec<Range>> {
    match nic {
        Nic::VirtioNet => virtio_rings(qmp),
        Nic::E1000 | Nic::E1000e => intel_rings(qmp, &[E1000_RECEIVE, E1000_TRANSMIT]),
        Nic::Igb => {
            let queues = (0..IGB_QUEUES).map(|queue| queue * IGB_QUEUE);
            let rings = queues.flat_map(|at| [IGB_RECEIVE + at, IGB_TRANSMIT + at]);
            intel_rings(qmp, &rings.collect::<Vec<u64>>())
        }
        Nic::Vmxnet3 => vmxnet3_rings(memory),
        // The module never drives it.
        Nic::Rtl8139 => Ok(Vec::new()),
    }
}

/// `struct Vmxnet3_DriverShared` of the kernel's vmxnet3_defs.h begins with this; so do its pages.
const VMXNET3_MAGIC: u64 = 0xbabe_fee1;
/// In it: address of the queues' descriptions, and numbers of transmit and receive queues.
const VMXNET3_QUEUES: usize = 40;
const VMXNET3_COUNTS: usize = 62;
/// Bytes of one queue's description.
const VMXNET3_QUEUE: u64 = 256;
/// In a transmit queue's description, where the address and the number of entries of a ring are,
/// and the bytes of an entry: descriptors, data, completions.
const VMXNET3_TRANSMIT: [(usize, usize, u64); 3] = [(16, 56, 16), (24, 60, 128), (32, 64, 16)];
/// The same in a receive queue's: two rings of descriptors, and completions.
const VMXNET3_RECEIVE: [(usize, usize, u64); 3] = [(16, 56, 16), (24, 60, 16), (32, 64, 16)];

/// QEMU does not say, but the driver told the device in memory that it shares with it.
fn vmxnet3_rings(memory: &GuestMemory) -> Result<Vec<Range>> {
    let pages = memory
        .ranges()
        .into_iter()
        .flat_map(|(start, end)| start / PAGE_SIZE as u64..end / PAGE_SIZE as u64);
    let shared: Vec<&[u8]> = pages
        .filter_map(|pfn| memory.page(pfn))
        .filter(|page| word_at(page, 0) & 0xffff_ffff == VMXNET3_MAGIC)
        .collect();
    ensure!(
        !shared.is_empty(),
        "no page of the guest is what vmxnet3 shares with its device"
    );
    // A page that a driver gave back may look like one still.
    let rings = shared
        .into_iter()
        .map(|page| vmxnet3_rings_of(memory, page));
    let found: Vec<Range> = rings.filter_map(Result::ok).flatten().collect();
    ensure!(
        !found.is_empty(),
        "what vmxnet3 shares with its device names no rings in RAM"
    );
    Ok(found)
}

fn vmxnet3_rings_of(memory: &GuestMemory, shared: &[u8]) -> Result<Vec<Range>> {
    let queues = word_at(shared, VMXNET3_QUEUES);
    let counts = [VMXNET3_COUNTS, VMXNET3_COUNTS + 1].map(|at| u64::from(shared[at]));
    let mut rings = vec![(queues, queues + VMXNET3_QUEUE * (counts[0] + counts[1]))];
    for queue in 0..counts[0] + counts[1] {
        let at = queues + queue * VMXNET3_QUEUE;
        let bytes = usize::try_from(VMXNET3_QUEUE)?;
        let description = memory
            .read(at, bytes)
            .context("vmxnet3's queues are outside RAM")?;
        let parts = if queue < counts[0] {
            VMXNET3_TRANSMIT
        } else {
            VMXNET3_RECEIVE
        };
        for (address, count, entry) in parts {
            let start = word_at(description, address);
            let entries = word_at(description, count) & 0xffff_ffff;
            rings.push((start, start + entries * entry));
        }
    }
    Ok(rings)
}

fn virtio_rings(qmp: &mut Qmp) -> Result<Vec<Range>> {
    let devices = qmp.command("x-query-virtio", &json!({}))?;
    let cards = devices.as_array().into_iter().flatten();
    let paths: Vec<&str> = cards
        .filter(|device| device["name"] == "virtio-net")
        .filter_map(|device| device["path"].as_str())
        .collect();
    ensure!(!paths.is_empty(), "QEMU lists no virtio-net device");
    let mut rings = Vec::new();
    for (path, queue) in paths
        .iter()
        .flat_map(|path| (0..VIRTIO_QUEUES).map(move |queue| (path, queue)))
    {
        let arguments = json!({ "path": path, "queue": queue });
        let status = qmp.command("x-query-virtio-queue-status", &arguments)?;
        let field = |name: &str| {
            status[name]
                .as_u64()
                .with_context(|| format!("QEMU does not say {name}"))
        };
        let entries = field("vring-num")?;
        // Sizes by the virtio specification 1.1, section 2.6.
        let parts = [
            ("vring-desc", 16 * entries),
            ("vring-avail", 6 + 2 * entries),
            ("vring-used", 6 + 8 * entries),
        ];
        for (name, size) in parts {
            let start = field(name)?;
            rings.push((start, start + size));
        }
    }
    Ok(rings)
}

fn intel_rings(qmp: &mut Qmp, offsets: &[u64]) -> Result<Vec<Range>> {
    let buses = qmp.command("query-pci", &json!({}))?;
    let registers: Vec<u64> = buses
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|bus| bus["devices"].as_array().into_iter().flatten())
        .filter(|device| device.pointer("/class_info/class") == Some(&json!(0x0200)))
        .filter_map(|device| {
            let mut regions = device["regions"].as_array()?.iter();
            let memory = regions.find(|region| region["type"] == "memory")?;
            memory["address"].as_u64()
        })
        .filter(|address| *address != UNMAPPED)
        .collect();
    ensure!(
        !registers.is_empty(),
        "QEMU lists no Ethernet device with memory"
    );
    registers
        .iter()
        .flat_map(|registers| offsets.iter().map(move |offset| registers + offset))
        .map(|address| intel_ring(qmp, address))
        .collect()
}

fn intel_ring(qmp: &mut Qmp, address: u64) -> Result<Range> {
    let arguments = json!({ "command-line": format!("xp /3wx {address:#x}") });
    let answer = qmp.command("human-monitor-command", &arguments)?;
    let words: Vec<u64> = answer
        .as_str()
        .and_then(|text| text.split_once(": "))
        .into_iter()
        .flat_map(|(_, words)| words.split_ascii_whitespace())
        .filter_map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok())
        .collect();
    let [low, high, length] = words[..] else {
        anyhow::bail!("QEMU shows registers at {address:#x} as {answer}")
    };
    let start = high << 32 | low;
    Ok((start, start + length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    /// A control channel that answers with `replies`, whatever is asked.
    fn qmp(replies: &[Value]) -> (Qmp, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for reply in [&[json!({})], replies].concat() {
            theirs
                .write_all(format!("{}\n", json!({ "return": reply })).as_bytes())
                .unwrap();
        }
        (Qmp::new(ours).unwrap(), theirs)
    }

    fn none() -> GuestMemory {
        GuestMemory::new(2 << 20).unwrap()
    }

    #[test]
    fn virtio_rings_have_three_parts() {
        let status = |at: u64| json!({ "vring-num": 256, "vring-desc": at, "vring-avail": at + 4096, "vring-used": at + 8192 });
        let devices = json!([{ "name": "virtio-serial", "path": "/a" }, { "name": "virtio-net", "path": "/b" }]);
        let (mut qmp, _open) = qmp(&[devices, status(0x10000), status(0x20000), status(0x30000)]);
        let rings = rings(&mut qmp, Nic::VirtioNet, &none()).unwrap();
        assert_eq!(
            rings[..3],
            [(0x10000, 0x11000), (0x11000, 0x11206), (0x12000, 0x12806)]
        );
        assert_eq!(rings.len(), 9);
    }

    #[test]
    fn e1000_rings_come_from_registers() {
        let device = json!({ "class_info": { "class": 512 }, "regions": [{ "type": "io", "address": 1 },
            { "type": "memory", "address": 0xfeb0_0000_u64 }] });
        let (mut qmp, _open) = qmp(&[
            json!([{ "devices": [{ "class_info": { "class": 256 } }, device] }]),
            json!("00000000feb02800: 0x02a30000 0x00000001 0x00001000\r\n"),
            json!("00000000feb03800: 0x02a40000 0x00000000 0x00001000\r\n"),
        ]);
        let rings = rings(&mut qmp, Nic::E1000, &none()).unwrap();
        assert_eq!(
            rings,
            [(0x1_02a3_0000, 0x1_02a3_1000), (0x02a4_0000, 0x02a4_1000)]
        );
    }
}
