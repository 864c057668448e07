//! A world in which the real engines meet every fault of a link, on simulated time, from one seed.
//!
//! Nouns: a **world** runs one **host** (the client engine with a made-up memory), one **server**
//! (the server engine with a reference model that knows that memory) and the **link** between them.
//! **Options** say how big and how bad everything is; [`Options::draw`] draws them from a seed, so
//! that a seed replays a run to the last bit.
//!
//! Order of events: time, then order of scheduling. Nothing here reads a clock, and nothing
//! iterates over a hash map.

pub mod host;
pub mod link;
pub mod memory;
pub mod options;
pub mod random;
pub mod server;
pub mod world;

pub use crate::options::Options;
pub use crate::world::{Failure, Report, World};

#[cfg(test)]
mod tests;
