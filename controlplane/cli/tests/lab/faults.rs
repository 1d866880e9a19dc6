//! Agents, VMMs, cables and devices that are lost while RAM travels by RDMA.

#[path = "../voyage/faults/cut.rs"]
mod cut;
#[path = "../voyage/faults/leftovers.rs"]
pub(crate) mod leftovers;
#[path = "../voyage/faults/stage.rs"]
mod stage;
#[path = "../voyage/faults/steps.rs"]
mod steps;
mod strikes;
