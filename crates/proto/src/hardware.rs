//! Hardware state: what a warm reboot destroys and no page of memory holds.
//!
//! Two records carry it. One has the registers of one CPU, each named by where it lies, so that what
//! is read can grow without a new format. The other has configuration spaces of PCI devices, one
//! behind the other, without the zeros at their end.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Registers that one CPU may tell.
pub const PROCESSOR_REGISTERS_MAX: usize = 512;
/// Bytes of the largest configuration space.
pub const CONFIG_BYTES_MAX: usize = 4096;
// The sizes that docs/protocol.md draws.
const _: () = assert!(size_of::<ProcessorHead>() == 8);
const _: () = assert!(size_of::<HardwareRegister>() == 16);
const _: () = assert!(size_of::<DeviceHead>() == 12);

/// Where a register lies: the numbers of [`HardwareRegister::space`]. A reader passes over others.
pub mod space {
    /// A model-specific register; its number is its address.
    pub const MSR: u16 = 1;
    /// A control register.
    pub const CONTROL: u16 = 2;
    /// An extended control register.
    pub const EXTENDED_CONTROL: u16 = 3;
    /// A register of the local APIC; its number is its offset in the APIC's page.
    pub const APIC: u16 = 4;
    /// Where descriptors are: 0 base of the GDT, 1 its limit, 2 base of the IDT, 3 its limit, 4 the
    /// task register, 5 the LDT's selector.
    pub const TABLE: u16 = 5;
}

/// What is before the registers of a CPU.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ProcessorHead {
    /// The CPU's number.
    pub cpu: U32,
    /// Zero.
    pub reserved: U32,
}

/// A register and what was in it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct HardwareRegister {
    /// See [`space`].
    pub space: U16,
    /// Zero.
    pub reserved: U16,
    /// Its number in that space.
    pub number: U32,
    /// Its value.
    pub value: U64,
}

/// The registers of one CPU.
#[derive(Clone, Copy)]
pub struct Processor<'a> {
    /// The CPU's number.
    pub cpu: u32,
    /// Those that could be read; none if the CPU could not be stopped.
    pub registers: &'a [HardwareRegister],
}

impl<'a> Processor<'a> {
    /// The body of a record, if it is legal.
    #[must_use]
    pub fn decode(body: &'a [u8]) -> Option<Self> {
        let (head, rest) = ProcessorHead::ref_from_prefix(body).ok()?;
        let registers = <[HardwareRegister]>::ref_from_bytes(rest).ok()?;
        (registers.len() <= PROCESSOR_REGISTERS_MAX).then_some(Self {
            cpu: head.cpu.get(),
            registers,
        })
    }
}

/// What is before the configuration space of a device.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DeviceHead {
    /// PCI segment (domain).
    pub segment: U32,
    /// Bus.
    pub bus: u8,
    /// Device (five bits) and function (three).
    pub devfn: u8,
    /// Bytes that were read: 0 if the device could not be asked.
    pub read: U16,
    /// Bytes of them that follow; the rest is zero.
    pub length: U16,
    /// Zero.
    pub reserved: U16,
}

/// A PCI device and its configuration space.
#[derive(Clone, Copy)]
pub struct Device<'a> {
    /// Where it is, and how much of it was read.
    pub head: &'a DeviceHead,
    /// The configuration space without the zeros at its end.
    pub config: &'a [u8],
}

/// The devices of one record, which is legal.
#[derive(Clone, Copy)]
pub struct Devices<'a> {
    rest: &'a [u8],
}

impl<'a> Devices<'a> {
    /// The body of a record, if it is legal.
    #[must_use]
    pub fn decode(body: &'a [u8]) -> Option<Self> {
        let mut devices = Self { rest: body };
        while !devices.rest.is_empty() {
            devices.next()?;
        }
        Some(Self { rest: body })
    }
}

impl<'a> Iterator for Devices<'a> {
    type Item = Device<'a>;

    fn next(&mut self) -> Option<Device<'a>> {
        let (head, rest) = DeviceHead::ref_from_prefix(self.rest).ok()?;
        let (config, rest) = rest.split_at_checked(head.length.get().into())?;
        if head.length > head.read || usize::from(head.read.get()) > CONFIG_BYTES_MAX {
            return None;
        }
        self.rest = rest;
        Some(Device { head, config })
    }
}
