//! The module's core: everything the kernel module does that is not the kernel's business.
//!
//! [`driver`] turns the client engine's steps into frames and requests for the C shim, [`frame`]
//! knows Ethernet, VLANs, IPv4, IPv6 and UDP, and `ffi` is the shim's door: the only unsafe code, and
//! nothing else in it.
//!
//! Everything here may run after the kernel has died: no allocation, no blocking, and nothing that
//! can panic, which `cargo xtask kmod check` proves by linking.

#![no_std]
#![deny(unsafe_code)]
#![warn(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

#[cfg(test)]
extern crate std;

pub mod console;
pub mod driver;
#[cfg(target_os = "none")]
#[expect(unsafe_code, reason = "the C boundary")]
mod ffi;
pub mod frame;
