//! Real migrations: unmodified QEMUs with running guests, two agents as
//! processes of their own, driven over gRPC and by the command line.

mod cancel;
mod crash;
mod downtime;
mod harness;
mod moves;
mod orchestrator;
mod refusals;
