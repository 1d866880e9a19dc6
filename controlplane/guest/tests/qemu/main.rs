//! Everything that is asked of QEMU, asked of real ones.
//!
//! `RAMFERRY_TEST_QEMUS` names the binaries, separated by colons; without it
//! the one of `$PATH` is used, and `target/qemu-10.0` where that was unpacked.

#![allow(clippy::unwrap_used, reason = "what a test cannot go on without")]

mod destination;
mod drain;
mod harness;
mod inspect;
mod source;
