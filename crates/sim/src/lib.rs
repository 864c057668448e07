//! A world in which the real engines meet every fault of hosts, links and servers, on simulated
//! time, from one seed.
//!
//! Nouns: a **world** runs some **hosts** (the client engine with a made-up memory), one or more
//! **servers** (the server engine, a disk, and a reference model that knows that memory) and the
//! **links** between them. **Options** say how big and how bad everything is; [`Options::draw`]
//! draws them from a seed, so that a seed replays a run to the last bit.
//!
//! Order of events: time, then order of scheduling. Nothing here reads a clock, and nothing
//! iterates over a hash map.

pub mod counts;
pub mod disk;
pub mod host;
pub mod hostile;
pub mod link;
pub mod memory;
pub mod model;
pub mod options;
pub mod random;
pub mod server;
pub mod shrink;
pub mod store;
pub mod world;

pub use crate::options::Options;
pub use crate::world::{Failure, Report, World};

#[cfg(test)]
mod tests;
