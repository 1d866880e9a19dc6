//! What the lab VM must be. Runs in it only: `scripts/lab-test`.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod hosts;
mod machine;
