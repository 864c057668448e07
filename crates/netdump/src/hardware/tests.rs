//! Names, words, and what edited or hostile bytes make of them.

use proto::hardware::{Devices, Processor};
use zerocopy::IntoBytes as _;

use super::*;

/// What QEMU's `mce 0 9 0xba00000000000e0f 0x5 0x0 0x0` leaves.
const STATUS: u64 = 0xba00_0000_0000_0e0f;

fn register(space: u16, number: u32, value: u64) -> HardwareRegister {
    HardwareRegister {
        space: space.into(),
        reserved: 0.into(),
        number: number.into(),
        value: value.into(),
    }
}

fn arrived(registers: &[HardwareRegister], devices: &[u8]) -> Arrived {
    let mut arrived = Arrived::default();
    arrived.cpu(&Processor { cpu: 1, registers });
    for device in Devices::decode(devices).unwrap() {
        arrived.device(&device);
    }
    arrived
}

/// A network card that has PCI Express with a fatal error and advanced error reporting with a
/// completion timeout.
fn card() -> Vec<u8> {
    let mut config = vec![0; 0x118];
    config[..4].copy_from_slice(&[0x86, 0x80, 0xd3, 0x10]);
    config[0x06..0x08].copy_from_slice(&(1_u16 << 4 | 1 << 13).to_le_bytes());
    config[0x08..0x0c].copy_from_slice(&0x0200_0000_u32.to_le_bytes());
    config[0x34] = 0x40;
    config[0x40..0x42].copy_from_slice(&[0x05, 0x50]);
    config[0x50] = 0x10;
    config[0x5a] = 0b100;
    config[0x100..0x104].copy_from_slice(&0x0001_0001_u32.to_le_bytes());
    config[0x104..0x108].copy_from_slice(&(1_u32 << 14).to_le_bytes());
    let length = u16::try_from(config.len()).unwrap();
    let head = DeviceHead {
        segment: 0.into(),
        bus: 3,
        devfn: 2 << 3 | 1,
        read: 4096.into(),
        length: length.into(),
        reserved: 0.into(),
    };
    [head.as_bytes(), &config].concat()
}

#[test]
fn banks_registers_and_devices_are_told_in_words() {
    let registers = [
        register(space::CONTROL, 0, 0x8005_0033),
        register(space::MSR, 0x179, 0x010a),
        register(space::MSR, 0x400 + 4 * 9, u64::MAX),
        register(space::MSR, 0x401 + 4 * 9, STATUS),
        register(space::MSR, 0x403 + 4 * 9, 7),
        register(space::MSR, 0x401, 0),
        register(space::APIC, 0x320, 0x1_00ec),
        register(77, 3, 1),
    ];
    let hardware = Hardware::of(&arrived(&registers, &card()));
    let cpu = &hardware.cpus[0];
    assert_eq!((cpu.cpu, cpu.banks.len()), (1, 2));
    assert_eq!(cpu.banks[0].bank, 9);
    let names: Vec<&str> = cpu.registers.keys().map(String::as_str).collect();
    assert_eq!(names, ["apic 0x320", "cr0", "mcg cap", "space 77 0x3"]);
    let words = "bank 9: uncorrected enabled context corrupt error of bus or interconnect (code 0x0e0f), \
                 status 0xba00000000000e0f, misc 0x7";
    assert_eq!(hardware.suspicions().len(), 1);
    assert!(hardware.suspicions()[0].ends_with(words), "{hardware}");
    let page = hardware.to_string();
    assert!(page.contains(&format!("CPU 1, {words}")), "{page}");
    let line = "0000:03:02.1  8086:10d3  network (020000)  master abort received, fatal error, \
                completion timeout";
    assert!(page.ends_with(line), "{page}");
}

#[test]
fn a_corrected_error_is_no_suspicion() {
    let register = register(space::MSR, 0x401, STATUS & !(1 << 61));
    let hardware = Hardware::of(&arrived(&[register], &[]));
    assert!(hardware.suspicions().is_empty());
    assert!(hardware.to_string().contains("bank 0: corrected"));
}

#[test]
fn the_file_reads_back_and_an_edited_one_is_told() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(Hardware::read(folder.path()).unwrap(), None);
    let hardware = Hardware::of(&arrived(&[register(space::MSR, 0x401, STATUS)], &card()));
    let path = folder.path().join(HARDWARE_FILE);
    fs::write(&path, serde_json::to_string(&hardware).unwrap()).unwrap();
    assert_eq!(Hardware::read(folder.path()).unwrap(), Some(hardware));
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("0xba", "xba")).unwrap();
    let error = format!("{:#}", Hardware::read(folder.path()).unwrap_err());
    assert!(error.contains("malformed"), "{error}");
}

#[test]
fn capabilities_in_a_circle_end() {
    let mut config = vec![0; 4096];
    config[0x06] = 1 << 4;
    config[0x34] = 0x40;
    config[0x41] = 0x40;
    // The extended ones name each other.
    config[0x100..0x104].copy_from_slice(&0x2000_0003_u32.to_le_bytes());
    config[0x200..0x204].copy_from_slice(&0x1000_0003_u32.to_le_bytes());
    assert!(config::errors(&config).is_empty());
    // What a device that is gone reads as: every error of the status register, and lists that lead nowhere.
    assert_eq!(config::errors(&[0xff; 4096]).len(), 6);
    assert!(config::errors(&[]).is_empty());
    let edited = Device {
        config: "zz\u{fc}".to_owned(),
        ..Device::default()
    };
    assert!(edited.bytes().is_empty());
}

#[test]
fn what_is_beyond_the_bound_is_counted() {
    let mut kept = Arrived::default();
    let registers = vec![register(space::MSR, 1, 1); 512];
    let processor = Processor {
        cpu: 0,
        registers: &registers,
    };
    for _ in 0..1000 {
        kept.cpu(&processor);
    }
    assert!(kept.bytes <= BYTES_MAX);
    let kept_count = u64::try_from(kept.cpus.len()).unwrap();
    assert_eq!(kept.left_out, 1000 - kept_count);
    assert!(Hardware::of(&kept).to_string().contains("were not kept"));
}
