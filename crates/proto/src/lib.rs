//! The netdump protocol: how a crashed host's client and a server talk, as two engines without
//! input or output.
//!
//! Nouns. A **host** can crash; its **client** has one **session** with a server, which carries one
//! **stream** of **records**; the server answers with **replies** that acknowledge, steer by
//! **credit** and carry its **verdict**. Pages travel in **blocks** of up to sixteen.
//!
//! How a page travels here: [`client`] asks its caller for a block of pages, elides zero pages,
//! compresses, wraps the block into a [`record`], cuts the stream into datagrams and seals each
//! ([`wire`]) into a transmit buffer of the caller's pool, which is also the retransmission buffer.
//! [`server`] opens datagrams, puts them in order and hands the stream to its caller, which stores
//! it and decodes it with [`record::decode`]. [`console`] carries kernel messages while the host lives.
//!
//! Rules of this crate: no clock, no randomness, no allocation, no unsafe code, nothing that can
//! panic. Time and memory contents are arguments; what to do next is a return value. Everything
//! from the network is bounded before it is used as a length, an index or a count.

#![no_std]
#![forbid(unsafe_code)]
#![warn(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]

pub mod arming;
pub mod client;
pub mod console;
pub mod hardware;
pub mod keys;
pub mod lz4;
pub mod record;
pub mod reply;
mod seal;
pub mod server;
pub mod time;
pub mod units;
pub mod wire;

#[cfg(test)]
extern crate std;
#[cfg(test)]
#[expect(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::cast_possible_truncation,
    reason = "a test that overflows fails, which is what it is for"
)]
mod tests;
