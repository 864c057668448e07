//! Hardware state of a crashed host: kept as `hardware.json`, told in words by `netdump show` and, if
//! it may have killed the host, by triage.

mod config;
mod machine_check;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use proto::hardware::{Device as Sent, DeviceHead, HardwareRegister, Processor, space};
use serde::{Deserialize, Serialize};

/// Name of the file in a crash directory.
pub const HARDWARE_FILE: &str = "hardware.json";
/// Version of the `hardware.json` written here.
const VERSION: u32 = 1;
/// Bytes of records that one session keeps: 1200 CPUs, or 1000 devices with all of their
/// configuration space.
const BYTES_MAX: usize = 4 << 20;
/// The first machine-check register: control of bank 0. Each bank has four.
const BANKS_BEGIN: u32 = 0x400;
/// As many banks as an x86 CPU can number.
const BANKS_MAX: u32 = 64;

/// What arrived, as it was sent.
#[derive(Clone, Default)]
pub struct Arrived {
    cpus: Vec<(u32, Vec<HardwareRegister>)>,
    devices: Vec<(DeviceHead, Vec<u8>)>,
    bytes: usize,
    /// CPUs and devices beyond the bound.
    left_out: u64,
}

/// The contents of `hardware.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// Version of this file's format. Fields may be added without raising it.
    pub version: u32,
    /// CPUs that were online.
    pub cpus: Vec<Cpu>,
    /// PCI devices, as the host's kernel lists them.
    pub devices: Vec<Device>,
    /// CPUs and devices that were sent and not kept.
    #[serde(default)]
    pub left_out: u64,
}

/// One CPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Its number.
    pub cpu: u32,
    /// Its machine-check banks that were read.
    pub banks: Vec<Bank>,
    /// Its other registers. None: it could not be stopped, or its hypervisor has them.
    pub registers: BTreeMap<String, Hex>,
}

/// A machine-check bank.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bank {
    /// Its number.
    pub bank: u32,
    /// What it reports.
    pub control: Hex,
    /// What it has to report.
    pub status: Hex,
    /// Where, if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Hex>,
    /// What else, if there is something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub misc: Option<Hex>,
}

/// A PCI device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Segment, bus, device and function, as Linux writes them.
    pub address: String,
    /// Vendor and device, four hexadecimal digits each; empty if it could not be asked.
    pub id: String,
    /// Bytes of its configuration space that were read.
    pub read: u16,
    /// Those bytes in hexadecimal, without the zeros at the end.
    pub config: String,
}

/// A number that JSON has as text in hexadecimal, because its own numbers have 53 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Hex(pub u64);

impl Arrived {
    /// Whether nothing arrived.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cpus.is_empty() && self.devices.is_empty() && self.left_out == 0
    }

    /// A CPU arrived.
    pub fn cpu(&mut self, processor: &Processor<'_>) {
        if self.has_room(size_of_val(processor.registers)) {
            self.cpus
                .push((processor.cpu, processor.registers.to_vec()));
        }
    }

    /// A device arrived.
    pub fn device(&mut self, device: &Sent<'_>) {
        if self.has_room(device.config.len()) {
            self.devices.push((*device.head, device.config.to_vec()));
        }
    }

    fn has_room(&mut self, bytes: usize) -> bool {
        let used = self.bytes + bytes + size_of::<DeviceHead>();
        let fits = used <= BYTES_MAX;
        if fits {
            self.bytes = used;
        } else {
            self.left_out += 1;
        }
        fits
    }
}

impl Hardware {
    /// What arrived, with names.
    #[must_use]
    pub fn of(arrived: &Arrived) -> Self {
        Self {
            version: VERSION,
            cpus: arrived.cpus.iter().map(Cpu::of).collect(),
            devices: arrived.devices.iter().map(Device::of).collect(),
            left_out: arrived.left_out,
        }
    }

    /// Reads `hardware.json` in `folder`; nothing where there is none, as of a host whose client
    /// sends no hardware state.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(HARDWARE_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let hardware = serde_json::from_str(&text);
        hardware
            .map(Some)
            .with_context(|| format!("{} is malformed", path.display()))
    }

    /// Banks that have something to report, and whose they are.
    fn reports(&self) -> impl Iterator<Item = (u32, &Bank)> {
        self.cpus
            .iter()
            .flat_map(|cpu| cpu.banks.iter().map(move |bank| (cpu.cpu, bank)))
            .filter(|(_, bank)| machine_check::is_valid(bank.status.0))
    }

    /// A line for each error that the hardware itself calls uncorrected: what may have killed the
    /// host.
    #[must_use]
    pub fn suspicions(&self) -> Vec<String> {
        self.reports()
            .filter(|(_, bank)| machine_check::is_uncorrected(bank.status.0))
            .map(|(cpu, bank)| format!("CPU {cpu}, machine-check bank {bank}"))
            .collect()
    }
}

impl Cpu {
    fn of((cpu, registers): &(u32, Vec<HardwareRegister>)) -> Self {
        let mut told = Self {
            cpu: *cpu,
            ..Self::default()
        };
        for register in registers {
            let value = Hex(register.value.get());
            let (place, number) = (register.space.get(), register.number.get());
            match number.checked_sub(BANKS_BEGIN) {
                Some(offset) if place == space::MSR && offset < 4 * BANKS_MAX => {
                    told.bank_register(offset, value);
                }
                _ => {
                    told.registers.insert(register_name(place, number), value);
                }
            }
        }
        told
    }

    fn bank_register(&mut self, offset: u32, value: Hex) {
        let number = offset / 4;
        let at = self.banks.iter().position(|bank| bank.bank == number);
        let at = at.unwrap_or_else(|| {
            self.banks.push(Bank {
                bank: number,
                ..Bank::default()
            });
            self.banks.len() - 1
        });
        let bank = &mut self.banks[at];
        match offset % 4 {
            0 => bank.control = value,
            1 => bank.status = value,
            2 => bank.address = Some(value),
            _ => bank.misc = Some(value),
        }
    }
}

/// A register's name: the one that manuals use, or where it lies.
fn register_name(place: u16, number: u32) -> String {
    let known = NAMES
        .iter()
        .find(|(space, of, _)| (*space, *of) == (place, number));
    match (known, place) {
        (Some((_, _, name)), _) => (*name).to_owned(),
        (None, space::MSR) => format!("msr {number:#x}"),
        (None, space::CONTROL) => format!("cr{number}"),
        (None, space::EXTENDED_CONTROL) => format!("xcr{number}"),
        (None, space::APIC) => format!("apic {number:#x}"),
        (None, _) => format!("space {place} {number:#x}"),
    }
}

const NAMES: &[(u16, u32, &str)] = &[
    (space::TABLE, 0, "gdt"),
    (space::TABLE, 1, "gdt limit"),
    (space::TABLE, 2, "idt"),
    (space::TABLE, 3, "idt limit"),
    (space::TABLE, 4, "tr"),
    (space::TABLE, 5, "ldt"),
    (space::MSR, 0x1b, "apic base"),
    (space::MSR, 0x8b, "microcode"),
    (space::MSR, 0x179, "mcg cap"),
    (space::MSR, 0x17a, "mcg status"),
    (space::MSR, 0x17b, "mcg ctl"),
    (space::MSR, 0x19c, "thermal status"),
    (space::MSR, 0x1a0, "misc enable"),
    (space::MSR, 0x1b1, "package thermal status"),
    (space::MSR, 0x1d9, "debugctl"),
    (space::MSR, 0xc000_0080, "efer"),
    (space::MSR, 0xc000_0082, "lstar"),
    (space::MSR, 0xc000_0100, "fs base"),
    (space::MSR, 0xc000_0101, "gs base"),
    (space::MSR, 0xc000_0102, "kernel gs base"),
    (space::APIC, 0x20, "apic id"),
    (space::APIC, 0x30, "apic version"),
    (space::APIC, 0x80, "apic tpr"),
    (space::APIC, 0x280, "apic error status"),
];

impl Device {
    fn of((head, config): &(DeviceHead, Vec<u8>)) -> Self {
        let (device, function) = (head.devfn >> 3, head.devfn & 7);
        let segment = head.segment.get();
        let id = |at| config::word(config, at);
        let known = head.read.get() >= 4;
        Self {
            address: format!("{segment:04x}:{:02x}:{device:02x}.{function}", head.bus),
            id: if known {
                format!("{:04x}:{:04x}", id(0), id(2))
            } else {
                String::new()
            },
            read: head.read.get(),
            config: config.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    /// The configuration space; nothing if somebody edited it into something else.
    fn bytes(&self) -> Vec<u8> {
        let digits = self.config.as_bytes().chunks(2);
        let byte = |digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
        digits.map(byte).collect::<Option<_>>().unwrap_or_default()
    }
}

impl From<Hex> for String {
    fn from(hex: Hex) -> Self {
        hex.to_string()
    }
}

impl TryFrom<String> for Hex {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.strip_prefix("0x");
        let value = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        value
            .map(Self)
            .ok_or_else(|| format!("{text} is no hexadecimal number"))
    }
}

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Bank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = machine_check::words(self.status.0);
        write!(f, "{}: {words}, status {}", self.bank, self.status)?;
        for (name, value) in [("address", self.address), ("misc", self.misc)] {
            if let Some(value) = value {
                write!(f, ", {name} {value}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "machine checks")?;
        if self.reports().next().is_none() {
            writeln!(f, "  none in any bank of {} CPUs", self.cpus.len())?;
        }
        for (cpu, bank) in self.reports() {
            writeln!(f, "  CPU {cpu}, bank {bank}")?;
        }
        writeln!(f, "control registers")?;
        for cpu in &self.cpus {
            write!(f, "  CPU {}", cpu.cpu)?;
            for name in SHOWN {
                match cpu.registers.get(*name) {
                    Some(value) => write!(f, "  {name} {value}")?,
                    None if cpu.registers.is_empty() => return writeln!(f, "  not read"),
                    None => {}
                }
            }
            writeln!(f)?;
        }
        write!(f, "PCI devices")?;
        for device in &self.devices {
            write!(f, "\n  {}  ", device.address)?;
            if device.read == 0 {
                write!(f, "could not be asked")?;
                continue;
            }
            let bytes = device.bytes();
            write!(f, "{}  {}", device.id, config::class(&bytes))?;
            let errors = config::errors(&bytes);
            if !errors.is_empty() {
                write!(f, "  {}", errors.join(", "))?;
            }
        }
        if self.left_out > 0 {
            write!(f, "\n  {} CPUs and devices were not kept", self.left_out)?;
        }
        Ok(())
    }
}

/// Registers on the page for people.
const SHOWN: &[&str] = &["cr0", "cr2", "cr3", "cr4", "efer", "mcg status"];

#[cfg(test)]
mod tests;
