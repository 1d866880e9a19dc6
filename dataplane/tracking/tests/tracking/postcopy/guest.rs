//! The guest that proves itself, in an unmodified QEMU, on RAM that is brought to it page by page.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use ramferry_lab::{Accel, Backing, HugePages, Qemu, RamBlock, Workload};
use ramferry_ram::{BlockRange, Owed, PageSets};
use ramferry_tracking::postcopy::RemoteFaults;

use super::{RAM, kernel_has_it};
use crate::destination::{self, Destination, MIGRATION, run};
use crate::file::PAGE;
use crate::huge::{HUGE, Pool};

const TIMEOUT: Duration = Duration::from_secs(120);
const RAM_BYTES: u64 = 64 << 20;
const WORK_MIB: u64 = 16;
/// Ticks of the guest before what it has not asked for is brought.
const TICKS_BEFORE_REST: u32 = 10;

#[test]
fn an_emulated_guest_finds_all_of_its_memory() -> Result<()> {
    finds_all_of_its_memory(Accel::Tcg, Backing::Tmpfs, PAGE)
}

#[test]
fn a_kvm_guest_finds_all_of_its_memory() -> Result<()> {
    if Accel::best() != Accel::Kvm {
        eprintln!("SKIPPED: there is no KVM here");
        return Ok(());
    }
    finds_all_of_its_memory(Accel::Kvm, Backing::Tmpfs, PAGE)
}

#[test]
fn a_guest_on_huge_pages_finds_all_of_its_memory() -> Result<()> {
    // Held so that no other test changes the number of huge pages meanwhile.
    let alone = Pool::grow(0);
    let huge_pages = alone.as_ref().map_err(Clone::clone).and_then(|_| HugePages::reserve(RAM_BYTES));
    match huge_pages {
        Ok(huge_pages) => {
            let backing = Backing::HugeTlbfs(huge_pages.mount().to_owned());
            finds_all_of_its_memory(Accel::best(), backing, HUGE)
        }
        Err(reason) => {
            eprintln!("SKIPPED: {reason}");
            Ok(())
        }
    }
}

fn finds_all_of_its_memory(accel: Accel, backing: Backing, page_bytes: u64) -> Result<()> {
    if !kernel_has_it() {
        return Ok(());
    }
    let workload = Workload { mib: WORK_MIB, touch_mib: WORK_MIB, tick_ms: 20, ..Workload::default() };
    let block = RamBlock::node(RAM_BYTES).on(backing);
    let qemu = Qemu::builder().accel(accel).block(block).proof(workload).start()?;
    qemu.wait_ready(TIMEOUT)?;
    qemu.next_tick(TIMEOUT)?;
    qemu.stop()?;

    // What the source has, and at the destination something else.
    let path = qemu.ram_files()[0].as_ref().unwrap();
    let mut source = vec![0; RAM_BYTES as usize];
    File::open(path)?.read_exact_at(&mut source, 0)?;
    let pages = RAM_BYTES / page_bytes;
    let layout = destination::layout(&[(pages, page_bytes)]);
    let memory = destination::memory(&layout, &[path]);
    let range = BlockRange { block: RAM, offset: 0, length: RAM_BYTES };
    memory.span(range)?.write_from(&vec![0xa5; RAM_BYTES as usize]);

    let faults = RemoteFaults::arm(qemu.pid(), Arc::clone(&memory), &[])?;
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let mut all = PageSets::new(&layout);
    all.block_mut(RAM).insert_run(run(0, pages));
    let owed = Owed::create(&directory.path().join("owed"), MIGRATION, &layout, &all)?;
    let bring = |_, page: u64, bytes: &mut [u8]| {
        bytes.copy_from_slice(&source[(page * page_bytes) as usize..][..page_bytes as usize]);
    };
    Destination::new(&memory, &owed, &faults, &bring).serve(2, || {
        qemu.cont().unwrap();
        for _ in 0..TICKS_BEFORE_REST {
            qemu.next_tick(TIMEOUT).unwrap();
        }
        faults.recheck().unwrap();
    });
    faults.end()?;
    assert_eq!(qemu.verify(TIMEOUT)?.errors, 0);
    Ok(())
}
