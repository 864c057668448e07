//! Log records: the kernel's messages, live from a host to its server, while it is healthy and when
//! it crashes.
//!
//! The kernel's own ring buffer is the only buffer. Every record in it has a sequence number, which
//! counts from zero at boot. A [`Client`] sends the records in that order in datagrams of the kind
//! [`crate::wire::Kind::Log`], each of which covers a run of sequence numbers without a hole: a
//! record, or a word why it is not sent, for each of them ([`Log`]). A [`Server`] puts the datagrams
//! in order and says in its [`LogReply`] how far it has written and which runs it asks for again; the
//! client reads those from the ring buffer once more, while they are still there.
//!
//! Nobody waits for anybody: the kernel writes its ring buffer whether or not somebody reads it, and
//! what was overwritten before it could be sent is told as such. So every sequence number ends as a
//! record, as a skip with its reason, or as lost, and the three are never mixed up.
//!
//! [`Syslog`] sends the same records to servers that speak syslog only, as [`Message`]s.

mod client;
mod datagram;
mod server;
mod syslog;

pub use client::{Budget, Client, Clock, RingRead, Setup, Step};
pub use client::{
    KEEPALIVE, RECORDS_BURST, RECORDS_PER_SECOND, RESEND_FIRST, RESEND_MAX, Ring, WINDOW_RECORDS,
};
pub use datagram::{
    ASK_RANGES_MAX, Caller, DICTIONARY_BYTES_MAX, Entries, Entry, Head, LOG_HEAD_BYTES,
    LOG_RECORD_HEADER_BYTES, LOG_REPLY_BYTES_MAX, LOG_SKIP_BYTES, Log, LogReply, LogWriter, Range,
    Reason, Record, RecordHead, TEXT_BYTES_MAX,
};
pub use server::{
    AHEAD_DATAGRAMS_MAX, ASK_EVERY, HOLE_MAX, HOLE_SILENCE, REPLY_DELAY, Server, Taken,
};
pub use syslog::{Format, Message, SYSLOG_BYTES, Syslog};
