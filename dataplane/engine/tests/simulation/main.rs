//! Whole migrations: both machines over a virtual clock, with toy guests, RAM, a network and journals, and every
//! fault that can be put in. [`checker`] has what must hold; [`sabotage`] shows that it can fail.
#![allow(clippy::unwrap_used, reason = "tests")]

mod checker;
mod destination_agent;
mod faults;
mod journal;
mod network;
mod sabotage;
mod schedules;
mod source_agent;
mod world;
