//! Real migrations: unmodified QEMUs with running guests, two agents as
//! processes of their own, driven over gRPC and by the command line.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod authority;
mod cancel;
mod crash;
mod dashboards;
mod disk;
mod doctor;
mod downtime;
mod drill;
mod faults;
mod harness;
mod hostile;
mod late_writes;
#[allow(dead_code, reason = "in the lab's VM more of it is used")]
mod limited;
mod moves;
mod orchestrator;
mod peer;
mod postcopy;
mod probes;
mod refusals;
mod secrets;
mod secured;
mod soak;
mod strangers;
mod throttle;
mod transcript;
mod truncated;
