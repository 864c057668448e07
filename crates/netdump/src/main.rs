//! netdump.
fn main() {}
