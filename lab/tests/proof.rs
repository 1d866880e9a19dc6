//! The guest that proves itself must be right about it: it finds what was
//! lost, and finds nothing where nothing was.

use std::time::Duration;

use anyhow::Result;
use ramferry_lab::{
    Accel, Backing, Fill, HugePages, Lost, Machine, PAGE_BYTES, Place, Qemu, QemuVersion, RamBlock, Workload,
    qemu_binary, skipped,
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIMEOUT: Duration = Duration::from_secs(60);

fn small() -> Workload {
    Workload { mib: 8, tick_ms: 10, place: Place::Packed, ..Workload::default() }
}

fn started(workload: Workload) -> Result<Qemu> {
    let qemu = Qemu::builder().proof(workload).start()?;
    qemu.wait_ready(TIMEOUT)?;
    Ok(qemu)
}

/// Waits until each page was checked twice more, so that what is wrong was found.
fn two_more_passes(qemu: &Qemu) -> Result<()> {
    let now = qemu.next_tick(TIMEOUT)?.pass;
    let from = qemu.line_count();
    qemu.wait_value(from, TIMEOUT, |line| {
        ramferry_lab::Tick::parse(&line.text).filter(|tick| tick.pass >= now + 2)
    })?;
    Ok(())
}

fn lost(qemu: &Qemu) -> Vec<Lost> {
    qemu.lines().iter().filter_map(|line| Lost::parse(&line.text)).collect()
}

/// Every page of the 8 MiB from 4 MiB on is of the working set.
const A_PAGE: u64 = 6 * MIB + 3 * PAGE_BYTES;

#[test]
fn nothing_is_found_where_nothing_was_lost() -> Result<()> {
    for fill in [Fill::Random, Fill::Stamp, Fill::Zero] {
        let qemu = started(Workload { fill, touch_mib: 4, ..small() })?;
        two_more_passes(&qemu)?;
        let verified = qemu.verify(TIMEOUT)?;
        assert_eq!(verified.pages, (8 + 4) * MIB / PAGE_BYTES);
        assert_eq!(verified.errors, 0, "{fill:?}: {:?}", qemu.lines());
        assert_eq!(qemu.next_tick(TIMEOUT)?.errors, 0);
        assert_eq!(lost(&qemu), []);
    }
    Ok(())
}

#[test]
fn a_lost_write_is_found_and_told_from_other_damage() -> Result<()> {
    for fill in [Fill::Random, Fill::Stamp] {
        let qemu = started(Workload { fill, ..small() })?;
        qemu.pause_writing(TIMEOUT)?;
        let old = qemu.read_page(A_PAGE)?;
        // The page as it was a pass ago is what a destination has whose last write was lost.
        qemu.resume_writing(TIMEOUT)?;
        two_more_passes(&qemu)?;
        qemu.pause_writing(TIMEOUT)?;
        assert_ne!(qemu.read_page(A_PAGE)?, old, "every pass writes something else");
        qemu.write_ram(A_PAGE, &old)?;
        assert_eq!(qemu.verify(TIMEOUT)?.errors, 1);

        let found = lost(&qemu);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].guest_address(), A_PAGE);
        assert!(["stale", "foreign"].contains(&found[0].kind.as_str()), "{found:?}");
        assert_eq!((found[0].set.as_str(), found[0].words, found[0].offset), ("work", 512, 0));
        assert_eq!(found[0].have.to_le_bytes(), old[..8], "it names what it found");

        // The guest counts it in its ordinary way too, and goes on.
        qemu.resume_writing(TIMEOUT)?;
        two_more_passes(&qemu)?;
        assert_eq!(qemu.next_tick(TIMEOUT)?.errors, 2, "once by `v`, once by the pass");
        assert_eq!(qemu.verify(TIMEOUT)?.errors, 0, "the page was written anew");
    }
    Ok(())
}

#[test]
fn a_page_one_pass_old_is_called_stale() -> Result<()> {
    // Slowly, so that a pass takes longer than what the test does in it.
    let qemu = started(Workload { mib: 8, rate_mib: 4, ..small() })?;
    qemu.pause_writing(TIMEOUT)?;
    let pass = qemu.next_tick(TIMEOUT)?.pass;
    let old = qemu.read_page(A_PAGE)?;
    qemu.resume_writing(TIMEOUT)?;
    qemu.wait_value(0, TIMEOUT, |line| {
        ramferry_lab::Tick::parse(&line.text).filter(|tick| tick.pass == pass + 1)
    })?;
    qemu.pause_writing(TIMEOUT)?;
    qemu.write_ram(A_PAGE, &old)?;
    qemu.verify(TIMEOUT)?;
    let found = lost(&qemu);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].kind.as_str(), found[0].age), ("stale", 1), "{found:?}");
    Ok(())
}

#[test]
fn a_torn_page_is_found() -> Result<()> {
    let qemu = started(Workload { mib: 8, rate_mib: 4, ..small() })?;
    qemu.pause_writing(TIMEOUT)?;
    let pass = qemu.next_tick(TIMEOUT)?.pass;
    let old = qemu.read_page(A_PAGE)?;
    qemu.resume_writing(TIMEOUT)?;
    qemu.wait_value(0, TIMEOUT, |line| {
        ramferry_lab::Tick::parse(&line.text).filter(|tick| tick.pass == pass + 1)
    })?;
    qemu.pause_writing(TIMEOUT)?;
    // Its last 100 words are a pass old.
    let torn_at = 4096 - 800;
    qemu.write_ram(A_PAGE + torn_at as u64, &old[torn_at..])?;
    assert_eq!(qemu.verify(TIMEOUT)?.errors, 1);
    let found = lost(&qemu);
    assert_eq!((found[0].kind.as_str(), found[0].words), ("torn", 100), "{found:?}");
    assert_eq!(found[0].offset, torn_at as u64);
    Ok(())
}

#[test]
fn one_wrong_bit_is_found() -> Result<()> {
    let qemu = started(small())?;
    qemu.pause_writing(TIMEOUT)?;
    let page = qemu.read_page(A_PAGE)?;
    qemu.write_ram(A_PAGE + 4095, &[page[4095] ^ 1])?;
    assert_eq!(qemu.verify(TIMEOUT)?.errors, 1);
    let found = lost(&qemu);
    assert_eq!((found[0].words, found[0].offset, found[0].want ^ found[0].have), (1, 4088, 1 << 56));
    Ok(())
}

#[test]
fn a_page_that_came_as_zero_is_found_while_the_guest_runs() -> Result<()> {
    let qemu = started(Workload { rate_mib: 100, ..small() })?;
    qemu.stop()?;
    qemu.write_ram(A_PAGE, &[0; 4096])?;
    qemu.cont()?;
    let found = qemu.wait_value(0, TIMEOUT, |line| Lost::parse(&line.text))?;
    assert_eq!((found.kind.as_str(), found.guest_address()), ("zero", A_PAGE));
    Ok(())
}

#[test]
fn memory_that_is_written_once_is_checked_in_rotation() -> Result<()> {
    // With no working set the first 8 MiB are the memory written once.
    let qemu = started(Workload { mib: 0, touch_mib: 8, verify_rate_mib: 100, ..small() })?;
    let page = qemu.read_page(A_PAGE)?;
    qemu.write_ram(A_PAGE, &[page[0] ^ 0xff])?;
    let found = qemu.wait_value(0, TIMEOUT, |line| Lost::parse(&line.text))?;
    assert_eq!((found.set.as_str(), found.guest_address(), found.words), ("idle", A_PAGE, 1));
    qemu.write_ram(A_PAGE, &page)?;
    assert_eq!(qemu.verify(TIMEOUT)?.errors, 0);
    Ok(())
}

#[test]
fn it_writes_at_the_rate_it_is_told() -> Result<()> {
    let qemu = started(Workload { mib: 16, rate_mib: 20, tick_ms: 50, ..Workload::default() })?;
    let first = qemu.next_tick(TIMEOUT)?;
    let last = qemu.wait_value(0, TIMEOUT, |line| {
        ramferry_lab::Tick::parse(&line.text).filter(|tick| tick.us > first.us + 1_500_000)
    })?;
    let seconds = (last.us - first.us) as f64 / 1e6;
    let mib_per_second = ((last.pages_checked - first.pages_checked) * PAGE_BYTES / MIB) as f64 / seconds;
    assert!((5.0..=21.0).contains(&mib_per_second), "{mib_per_second} MiB/s");
    assert!(last.n - first.n >= 10, "it ticks on meanwhile: {first:?} {last:?}");
    Ok(())
}

#[test]
fn it_ticks_on_while_it_writes_flat_out_and_while_it_verifies() -> Result<()> {
    let qemu = started(Workload { mib: 64, touch_mib: 64, ..Workload::default() })?;
    let first = qemu.next_tick(TIMEOUT)?;
    qemu.verify(TIMEOUT)?;
    let ticks: Vec<_> = qemu.ticks().into_iter().filter(|(_, tick)| tick.n >= first.n).collect();
    for pair in ticks.windows(2) {
        assert_eq!(pair[1].1.n, pair[0].1.n + 1, "no tick is missing");
    }
    Ok(())
}

#[test]
fn every_accelerator_machine_and_qemu_boots_it() -> Result<()> {
    for version in QemuVersion::ALL {
        let Some(binary) = qemu_binary(version) else {
            skipped(format!("no QEMU {version:?}: run scripts/setup test"));
            continue;
        };
        for accel in Accel::available() {
            for machine in [Machine::Q35, Machine::Pc] {
                let builder = Qemu::builder().binary(&binary).accel(accel).machine(machine).vcpus(2);
                let qemu = builder.proof(small()).start()?;
                qemu.wait_ready(TIMEOUT)?;
                assert_eq!(qemu.verify(TIMEOUT)?.errors, 0, "{version:?} {accel:?} {machine:?}");
            }
        }
    }
    Ok(())
}

/// The blocks whose files hold data that is not zero.
fn blocks_written(qemu: &Qemu) -> Result<Vec<bool>> {
    use std::os::unix::fs::MetadataExt;
    let written = |file: &Option<std::path::PathBuf>| {
        let metadata = std::fs::metadata(file.as_ref().expect("a file with a name"))?;
        Ok(metadata.blocks() * 512 > MIB)
    };
    qemu.ram_files().iter().map(written).collect()
}

#[test]
fn numa_nodes_and_dimms_above_4_gib_are_all_proved() -> Result<()> {
    for machine in [Machine::Q35, Machine::Pc] {
        let qemu = Qemu::builder()
            .machine(machine)
            .vcpus(2)
            .block(RamBlock::node(2 * GIB))
            .block(RamBlock::node(2 * GIB))
            .block(RamBlock::dimm(256 * MIB))
            .block(RamBlock::dimm(256 * MIB))
            .proof(Workload { mib: 64, touch_mib: 64, ..Workload::default() })
            .start()?;
        qemu.wait_ready(TIMEOUT)?;
        assert_eq!(blocks_written(&qemu)?, [true; 4]);

        let last_node_mib = qemu.locate(4 * GIB + 16 * MIB).expect("RAM above the hole");
        assert_eq!(last_node_mib.0, 1, "the second node is above 4 GiB too");
        qemu.pause_writing(TIMEOUT)?;
        let damaged = damage_one_page_in_each_file(&qemu)?;
        assert_eq!(qemu.verify(TIMEOUT)?.errors, 4);
        let mut found: Vec<_> =
            lost(&qemu).iter().map(|lost| qemu.locate(lost.guest_address()).expect("RAM")).collect();
        found.sort_unstable();
        // The guest's own rotation may have come upon one of them before.
        found.dedup();
        assert_eq!(found, damaged, "{machine:?}: each page is where the fixture says");
    }
    Ok(())
}

/// Flips a byte of the last page with data in it of each file: above 4 GiB, as far as there is any.
fn damage_one_page_in_each_file(qemu: &Qemu) -> Result<Vec<(usize, u64)>> {
    use std::os::unix::fs::FileExt;
    let mut damaged = Vec::new();
    for (block, path) in qemu.ram_files().iter().enumerate() {
        let path = path.as_ref().expect("a file with a name");
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
        let mut page = vec![0; PAGE_BYTES as usize];
        let mut offset = file.metadata()?.len();
        loop {
            offset -= PAGE_BYTES;
            file.read_exact_at(&mut page, offset)?;
            // The firmware's own tables at the top of low RAM are mostly zero; patterns are not.
            if page.iter().filter(|byte| **byte == 0).count() < 256 {
                break;
            }
        }
        file.write_all_at(&[page[7] ^ 0x10], offset + 7)?;
        damaged.push((block, offset));
    }
    Ok(damaged)
}

#[test]
fn it_runs_on_huge_pages() -> Result<()> {
    let huge = match HugePages::reserve(64 * MIB) {
        Ok(huge) => huge,
        Err(reason) => {
            skipped(reason);
            return Ok(());
        }
    };
    let block = RamBlock::node(64 * MIB).on(Backing::HugeTlbfs(huge.mount().to_owned()));
    let qemu = Qemu::builder().block(block).proof(small()).start()?;
    qemu.wait_ready(TIMEOUT)?;
    two_more_passes(&qemu)?;
    assert_eq!(qemu.verify(TIMEOUT)?.errors, 0);
    Ok(())
}

#[test]
fn what_it_cannot_do_it_refuses() -> Result<()> {
    let qemu = Qemu::builder().block(RamBlock::node(64 * MIB)).proof(Workload::default()).start()?;
    let error = qemu.wait_ready(TIMEOUT).expect_err("64 MiB of work do not fit beside the image");
    assert!(error.to_string().contains("not_enough_memory"), "{error:#}");
    Ok(())
}
