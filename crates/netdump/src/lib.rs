//! netdump, the product: what a host runs to be armed and what a server runs to receive crashes.
//!
//! On a host: [`key`] files, the [`way`] to a server asked from the kernel over [`netlink`], the
//! kernel [`module`], and [`arm`], which brings them together. On a server: [`serve`], with hosts'
//! logs in [`console`] (shown by [`log`]), [`forward`], which gives them on, and its [`config`], and
//! [`operate`], which asks a running one. Of both: [`status`]. From a file to a server, as a host would: [`send`].
//! Anywhere: [`triage`], and [`hardware`], which it looks at too.

pub mod arm;
pub mod config;
pub mod console;
pub mod forward;
pub mod hardware;
pub mod key;
pub mod log;
pub mod module;
pub mod netlink;
pub mod operate;
pub mod records;
pub mod seal;
pub mod send;
pub mod serve;
pub mod status;
pub mod time;
pub mod triage;
pub mod way;
