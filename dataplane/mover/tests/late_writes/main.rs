//! Pages that are filled after the tracker reported them reach the destination all the same.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up is to fail")]

mod direct_io;
mod migration;
mod scripted;
