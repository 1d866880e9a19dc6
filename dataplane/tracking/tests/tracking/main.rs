//! Trackers against real processes: this test program, run again as a helper
//! that maps files and writes to them on command, and QEMU.
//!
//! `conformance` is one suite over every kind of tracker; where a kind fails
//! its self-test it prints `SKIPPED: reason`, but for the lab VM (`scripts/lab-test`), where both kinds must work as far
//! as the kernel has them.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![allow(unsafe_code, reason = "a helper that maps memory, forks and installs seccomp filters")]

mod conformance;
mod crash;
mod destination;
mod file;
mod helper;
mod huge;
mod kinds;
mod postcopy;
mod remote_call;
mod running_guest;
mod strangers;
mod vmm;
