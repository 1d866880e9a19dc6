//! Real migrations over RDMA: unmodified QEMUs with running guests, two agents
//! with an RDMA device each. Runs in the lab's VM (`make lab-test`), and nowhere else.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(dead_code, reason = "what is shared with the other migrations has more than is used here")]

#[path = "../voyage/authority.rs"]
mod authority;
mod deploy;
mod doctor;
mod drill;
mod faults;
#[path = "../voyage/harness.rs"]
mod harness;
mod limits;
mod moves;
#[path = "../voyage/dashboards/prometheus.rs"]
mod prometheus;
mod rdma;
#[path = "../voyage/transcript.rs"]
mod transcript;
