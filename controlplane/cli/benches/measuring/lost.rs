//! Pages that a move lost.

use std::time::Duration;

use anyhow::{Result, bail};
use ramferry_lab::{PAGE_BYTES, Qemu};

/// Pages that do not hold what the guest wrote there: it is asked to look at all of them.
///
/// That ours loses one is an error. QEMU's own migration is known to lose some over soft-RoCE; its time counts all the same.
/// A guest that does not answer any more has lost all of them.
pub(crate) fn lost_pages(guest: &Qemu, is_ours: bool, guest_bytes: u64, patience: Duration) -> Result<u64> {
    match (is_ours, ask(guest, patience)) {
        (_, Ok(0)) => Ok(0),
        (false, Ok(lost_pages)) => Ok(lost_pages),
        (false, Err(error)) => {
            eprintln!("the guest is broken: {error:#}");
            Ok(guest_bytes / PAGE_BYTES)
        }
        (true, Ok(lost_pages)) => bail!("the guest lost {lost_pages} pages of what it wrote"),
        (true, Err(error)) => Err(error),
    }
}

fn ask(guest: &Qemu, patience: Duration) -> Result<u64> {
    let tick = guest.next_tick(patience)?;
    let lost_pages = tick.errors + guest.verify(patience)?.errors;
    if let Some(line) = guest.lines().into_iter().find(|line| line.text.starts_with("LOST")) {
        eprintln!("{lost_pages} pages are lost, the first: {}", line.text);
    }
    Ok(lost_pages)
}
