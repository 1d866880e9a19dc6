//! The guest that proves itself, in an unmodified QEMU: what it writes is found, all of it, and it is none the worse.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::Result;
use ramferry_lab::{Accel, Qemu, RamBlock, Workload};
use ramferry_tracking::{TrackerKind, arm};

use crate::file::{PAGE, RamFile, members, sets};
use crate::kinds::works;

const TIMEOUT: Duration = Duration::from_secs(120);
const RAM_BYTES: u64 = 64 << 20;
const WORK_MIB: u64 = 8;
const WORK_PAGES: usize = (WORK_MIB << 20) as usize / PAGE as usize;
/// Passes over its memory that are followed.
const PASSES: u64 = 4;

#[test]
fn uffd_wp_finds_all_that_a_running_guest_writes() -> Result<()> {
    finds_all_that_a_running_guest_writes(TrackerKind::UffdWp)
}

#[test]
fn soft_dirty_finds_all_that_a_running_guest_writes() -> Result<()> {
    finds_all_that_a_running_guest_writes(TrackerKind::SoftDirty)
}

fn finds_all_that_a_running_guest_writes(kind: TrackerKind) -> Result<()> {
    if !works(kind) {
        return Ok(());
    }
    let workload = Workload { mib: WORK_MIB, touch_mib: WORK_MIB, tick_ms: 20, ..Workload::default() };
    let qemu = Qemu::builder().accel(Accel::Tcg).block(RamBlock::node(RAM_BYTES)).proof(workload).start()?;
    qemu.wait_ready(TIMEOUT)?;
    let path = qemu.ram_files()[0].as_ref().unwrap();
    let ram = RamFile { file: File::open(path)?, pages: RAM_BYTES / PAGE, page_bytes: PAGE };

    let mut tracker = arm(Some(kind), qemu.pid(), &[ram.tracked()])?;
    let first = qemu.next_tick(TIMEOUT)?;
    let mut replica = vec![0; RAM_BYTES as usize];
    ram.file.read_exact_at(&mut replica, 0)?;
    let mut harvest = |replica: &mut Vec<u8>| -> Result<Vec<u64>> {
        let mut written = sets(&[&ram]);
        tracker.recheck(&mut written)?;
        tracker.harvest(&mut written)?;
        let pages = members(&written, 0);
        for page in &pages {
            let place = (page * PAGE) as usize;
            ram.file.read_exact_at(&mut replica[place..place + PAGE as usize], page * PAGE)?;
        }
        Ok(pages)
    };
    let mut found = BTreeSet::new();
    loop {
        let pass = qemu.next_tick(TIMEOUT)?.pass;
        found.extend(harvest(&mut replica)?);
        if pass >= first.pass + PASSES {
            break;
        }
    }
    assert!(found.len() >= WORK_PAGES, "{} of {WORK_PAGES} pages", found.len());
    // What it only reads it does not write: nor is it found.
    let most = WORK_PAGES + WORK_PAGES / 2;
    assert!(found.len() < most, "{} pages, of {WORK_PAGES} that it writes to", found.len());

    qemu.stop()?;
    harvest(&mut replica)?;
    let mut now = vec![0; RAM_BYTES as usize];
    ram.file.read_exact_at(&mut now, 0)?;
    let page_at = |bytes: &[u8], page: u64| bytes[(page * PAGE) as usize..][..PAGE as usize].to_vec();
    let lost: Vec<u64> =
        (0..ram.pages).filter(|page| page_at(&now, *page) != page_at(&replica, *page)).collect();
    assert_eq!(lost, [0; 0]);
    drop(tracker);
    qemu.cont()?;
    assert_eq!(qemu.verify(TIMEOUT)?.errors, 0);
    Ok(())
}
