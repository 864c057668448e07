//! Judges what the server kept of the guest's hardware: every CPU, every PCI device that QEMU says it
//! has, and the machine check that was injected.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::crash::Crash;

/// Registers that each CPU must tell.
const REGISTERS: &[&str] = &[
    "cr0",
    "cr3",
    "cr4",
    "efer",
    "gdt",
    "idt",
    "gs base",
    "mcg cap",
    "apic version",
];
/// What QEMU's monitor is told for [`Crash::Mce`]: CPU, bank and status.
const INJECTED: (u64, u64, &str) = (0, 9, "0xba00000000000e0f");

/// What must be there.
pub struct Wanted<'a> {
    /// The server's program, which shows it too.
    pub netdump: &'a Path,
    /// The server's directory of the crash.
    pub crash_dir: &'a Path,
    /// How the guest died.
    pub crash: Crash,
    /// Its CPUs.
    pub cpus: u32,
    /// QEMU's answer to `query-pci`.
    pub pci: &'a Value,
    /// The name of its network card's driver, for complaints.
    pub nic: &'a str,
}

/// What is wrong with the hardware state.
///
/// # Errors
/// If it cannot be looked at.
pub fn judge(wanted: &Wanted<'_>) -> Result<Vec<String>> {
    let path = wanted.crash_dir.join("hardware.json");
    let Ok(text) = fs::read(&path) else {
        return Ok(vec!["hardware.json is missing".to_owned()]);
    };
    let hardware: Value = serde_json::from_slice(&text)
        .with_context(|| format!("{} is malformed", path.display()))?;
    let mut complaints = of_cpus(&hardware, wanted.cpus);
    complaints.extend(of_devices(&hardware, wanted));
    let shown = show(wanted)?;
    if wanted.crash == Crash::Mce {
        complaints.extend(of_machine_check(&hardware, &shown));
    }
    for heading in ["machine checks", "control registers", "PCI devices"] {
        if !shown.contains(heading) {
            complaints.push(format!("netdump show says nothing of {heading}"));
        }
    }
    Ok(complaints)
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}

fn of_cpus(hardware: &Value, cpus: u32) -> Vec<String> {
    let told: Vec<u64> = list(hardware, "cpus")
        .iter()
        .filter_map(|cpu| cpu["cpu"].as_u64())
        .collect();
    let expected: Vec<u64> = (0..u64::from(cpus)).collect();
    if told != expected {
        return vec![format!("CPUs {told:?} are told of {cpus}")];
    }
    let lacks = |cpu: &Value| {
        let missing = REGISTERS
            .iter()
            .find(|name| cpu["registers"][**name].is_null());
        let number = &cpu["cpu"];
        match missing {
            Some(name) => Some(format!("CPU {number} does not tell its register {name}")),
            None if list(cpu, "banks").is_empty() => {
                Some(format!("CPU {number} has no machine-check bank"))
            }
            None => None,
        }
    };
    list(hardware, "cpus").iter().filter_map(lacks).collect()
}

/// A device's place on its bus, and what it is.
type Place = (u64, u64, String);

fn of_devices(hardware: &Value, wanted: &Wanted<'_>) -> Vec<String> {
    let mut expected = BTreeSet::new();
    for bus in wanted.pci.as_array().into_iter().flatten() {
        known_to_qemu(list(bus, "devices"), &mut expected);
    }
    let told: BTreeSet<Place> = list(hardware, "devices")
        .iter()
        .filter_map(of_device)
        .collect();
    let mut complaints: Vec<String> = expected
        .difference(&told)
        .map(|(slot, function, id)| format!("device {slot:02x}.{function} {id} is not told"))
        .collect();
    complaints.extend(
        told.difference(&expected)
            .map(|(slot, function, id)| format!("QEMU has no device {slot:02x}.{function} {id}")),
    );
    let network = |device: &&Value| {
        let config = device["config"].as_str().unwrap_or_default();
        config.get(22..24) == Some("02") && device["read"].as_u64() >= Some(256)
    };
    if !list(hardware, "devices")
        .iter()
        .any(|device| network(&device))
    {
        complaints.push(format!("no network card is told, {} is there", wanted.nic));
    }
    complaints
}

/// Devices below bridges too.
fn known_to_qemu(devices: &[Value], to: &mut BTreeSet<Place>) {
    for device in devices {
        let number = |name: &str| device[name].as_u64().unwrap_or(u64::MAX);
        let id = |name: &str| device["id"][name].as_u64().unwrap_or(u64::MAX);
        let name = format!("{:04x}:{:04x}", id("vendor"), id("device"));
        to.insert((number("slot"), number("function"), name));
        known_to_qemu(list(&device["pci_bridge"], "devices"), to);
    }
}

/// Of `0000:00:1f.2` the slot and the function.
fn of_device(device: &Value) -> Option<Place> {
    let (_, place) = device["address"].as_str()?.rsplit_once(':')?;
    let (slot, function) = place.split_once('.')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    let id = device["id"].as_str()?.to_owned();
    Some((number(slot)?, number(function)?, id))
}

fn of_machine_check(hardware: &Value, shown: &str) -> Vec<String> {
    let (number, bank, status) = INJECTED;
    let cpus = list(hardware, "cpus").iter();
    let injected = cpus
        .filter(|cpu| cpu["cpu"].as_u64() == Some(number))
        .flat_map(|cpu| list(cpu, "banks"))
        .find(|told| told["bank"].as_u64() == Some(bank));
    let told = injected.map(|told| told["status"].as_str().unwrap_or_default());
    let mut complaints = Vec::new();
    if told != Some(status) {
        complaints.push(format!(
            "CPU {number}, bank {bank}: {told:?} is told, {status} was injected"
        ));
    }
    let line = format!("CPU {number}, bank {bank}: uncorrected");
    if !shown.contains(&line) {
        complaints.push(format!("netdump show does not say {line:?}"));
    }
    complaints
}

/// What `netdump show` says.
fn show(wanted: &Wanted<'_>) -> Result<String> {
    let dumpdir = wanted.crash_dir.parent().context("no dump directory")?;
    let name = wanted.crash_dir.file_name().context("no crash directory")?;
    let output = Command::new(wanted.netdump)
        .arg("show")
        .arg(name)
        .arg("--dumpdir")
        .arg(dumpdir)
        .output()
        .with_context(|| format!("cannot run {}", wanted.netdump.display()))?;
    let (out, error) = (&output.stdout, &output.stderr);
    Ok(format!(
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(error)
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hardware() -> Value {
        let registers: serde_json::Map<String, Value> = REGISTERS
            .iter()
            .map(|name| ((*name).to_owned(), json!("0x1")))
            .collect();
        json!({
            "cpus": [{
                "cpu": 0,
                "banks": [{ "bank": 9, "control": "0x0", "status": INJECTED.2 }],
                "registers": registers,
            }],
            "devices": [{
                "address": "0000:00:02.0",
                "id": "8086:100e",
                "read": 256,
                "config": "86800e1007000000000000020000",
            }],
        })
    }

    /// What is wrong with `hardware`, and whether it names the machine check.
    fn complaints(hardware: &Value) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let id = json!({ "vendor": 0x8086, "device": 0x100e });
        let device = json!({ "slot": 2, "function": 0, "id": id });
        let wanted = Wanted {
            netdump: Path::new("unused"),
            crash_dir: folder.path(),
            crash: Crash::Mce,
            cpus: 1,
            pci: &json!([{ "devices": [device] }]),
            nic: "e1000",
        };
        let mut complaints = of_cpus(hardware, wanted.cpus);
        complaints.extend(of_devices(hardware, &wanted));
        complaints.extend(of_machine_check(hardware, "CPU 0, bank 9: uncorrected"));
        complaints
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(complaints(&hardware()), [""; 0]);
        let mut none = hardware();
        none["devices"] = json!([]);
        let told = complaints(&none).join("; ");
        assert!(told.contains("02.0 8086:100e is not told"), "{told}");
        assert!(told.contains("no network card"), "{told}");
        let mut other = hardware();
        other["cpus"][0]["banks"][0]["status"] = json!("0x0");
        assert!(complaints(&other)[0].contains("was injected"));
        let mut unread = hardware();
        unread["cpus"][0]["registers"] = json!({});
        assert!(complaints(&unread)[0].contains("register cr0"));
        unread["cpus"] = json!([]);
        assert!(complaints(&unread)[0].contains("are told of 1"));
    }
}
