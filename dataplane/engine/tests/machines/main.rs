//! Both machines, one at a time: every step against every event, and the cases that matter by name.
#![allow(clippy::unwrap_used, reason = "tests")]

mod destination_cases;
mod destination_harness;
mod destination_postcopy_cases;
mod destination_table;
mod source_cases;
mod source_harness;
mod source_late_cases;
mod source_postcopy_cases;
mod source_table;
mod source_throttle_cases;
