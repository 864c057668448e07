//! Console messages as they come over the network and as they lie in a log; pure.
//!
//! Nouns:
//! - **datagram**: what in-tree netconsole sends, basic or extended ([`Datagram`]).
//! - **record**: one kernel message, whoever brought it ([`Record`]).
//! - **fragment**: a part of an extended record that did not fit into one datagram.
//! - **source**: who sends; its datagrams go through one [`Stream`], which puts them in order.
//! - **boot**: one life of one kernel. Records of two boots are never mixed.
//! - **gap**: records whose sequence numbers were never seen. Not all of them were lost: a kernel
//!   gives numbers to what its log level holds back, too.
//! - **note**: what the log says of itself: where a boot begins, what is missing ([`Note`]).
//!
//! Flow: bytes -> [`Datagram::parse`] -> [`Stream::take`] -> [`Sink`] -> [`Line`] of a log, which
//! reads back as what it was written from.
//!
//! Total: any bytes give records, notes or counts, in bounded memory. What is malformed is kept as
//! it came, escaped.

#![forbid(unsafe_code)]

mod boot;
mod datagram;
mod line;
mod number;
mod stream;
mod time;

pub use datagram::{BODY_BYTES_MAX, Caller, Datagram, Extended, Flaw, Fragment};
pub use line::{Body, Line, Note, Record, Stamp, Stored, write_note, write_record};
pub use stream::{
    BootStart, Counts, Gap, HOLE_MICROS, Part, Position, Room, Sink, Stream, Unfinished,
};
pub use time::{from_utc, utc};
