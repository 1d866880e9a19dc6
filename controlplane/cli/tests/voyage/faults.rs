//! Agents and VMMs that are killed, and links that are cut, before every step
//! of a migration; and what becomes of the guest.

mod cancel;
pub(crate) mod cut;
mod gaps;
pub(crate) mod leftovers;
mod postcopy;
mod silence;
pub(crate) mod stage;
pub(crate) mod steps;
mod table;
