#![no_std]
//! The module core.
