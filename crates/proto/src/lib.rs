#![no_std]
//! proto.
