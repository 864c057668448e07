//! vmtest boots a stock kernel in QEMU, lets it arm itself with netdump, crashes it, and judges
//! what the server received.
//!
//! Nouns: the *guest* is the virtual host; its *orders* say what to do; it tells its *stages* on a
//! *port*; the *wire* is its network, with *faults*; the *oracle* compares the vmcore with the
//! guest's *memory*; *readers* are the programs people open a vmcore with; the *verdict* is the one
//! word at the end.
//!
//! One run: `initramfs` and `modules` make the guest's files -> `vm` starts QEMU ->
//! `bin/guest_init` goes through its stages -> `link` carries its session to a real `netdump serve`
//! (`server`) -> the guest reboots, QEMU pauses -> `oracle` and `readers` look at the vmcore ->
//! `verdict`. `run` is that sequence.

pub mod agreement;
pub mod batch;
pub mod console;
pub mod crash;
pub mod frame;
pub mod guest;
pub mod hardware;
pub mod initramfs;
pub mod kernel;
pub mod link;
pub mod matrix;
pub mod memory;
pub mod modules;
pub mod oracle;
pub mod pattern;
pub mod pcap;
pub mod peer;
pub mod proof;
pub mod qmp;
pub mod readers;
pub mod ring;
pub mod road;
pub mod rules;
pub mod run;
pub mod server;
pub mod stage;
pub mod stress;
pub mod symbols;
pub mod table;
pub mod verdict;
pub mod vm;
