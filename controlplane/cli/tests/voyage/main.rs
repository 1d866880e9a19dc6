//! Real migrations: unmodified QEMUs with running guests, two agents as
//! processes of their own, driven over gRPC and by the command line.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod cancel;
mod crash;
mod downtime;
mod faults;
mod harness;
mod moves;
mod orchestrator;
mod refusals;
mod secured;
mod soak;
