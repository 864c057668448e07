//! Triage: what killed a kernel, where, and under which name it is known.
//!
//! Nouns:
//! - **report**: what a kernel writes when something is wrong, from its first line on.
//! - **class**: the kind of report ([`Class`]).
//! - **culprit**: the function a report is about, after what is on every stack was passed over.
//! - **signature**: the name under which equal crashes meet, in two levels ([`Signature`]).
//!
//! Flow of the text half: bytes -> messages (`input`, `line`) -> open reports (`scan`, `class`) ->
//! their parts (`anatomy`, `frame`) -> culprit (`guilt`, `innocence`) -> title and signature
//! (`title`, `signature`) -> [`Report`].
//!
//! Pure: no file, clock or network. Total: any bytes give findings, in memory that does not grow
//! with the input and in time that grows with it linearly.

#![forbid(unsafe_code)]
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "there are forty classes and most of them share the default"
)]

mod anatomy;
mod class;
mod frame;
mod guilt;
mod innocence;
mod input;
mod line;
pub mod memory;
mod report;
mod scan;
mod signature;
mod title;

pub use anatomy::{Stack, StackKind};
pub use class::Class;
pub use frame::{Frame, plain_name};
pub use guilt::Considered;
pub use innocence::Reason;
pub use line::{Caller, Line};
pub use report::{Report, Role};
pub use scan::{Findings, Scanner, scan};
pub use signature::{Signature, VERSION};
