//! The fixture leaves nothing behind, and moves a guest by QEMU's own means.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use ramferry_lab::{
    Backing, DebianGuest, Guest, Lost, Qemu, QemuVersion, RamBlock, Tick, Workload, downtime_seen,
    joined_lines, qemu_binary, skipped,
};
use serde_json::json;

const TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn a_dropped_fixture_leaves_no_process_and_no_file() -> Result<()> {
    let qemu = Qemu::builder().start()?;
    let (pid, directory) = (qemu.pid(), qemu.directory().to_owned());
    let ram = qemu.ram_files()[0].clone().expect("a file with a name");
    assert!(ram.exists() && Path::new(&format!("/proc/{pid}")).exists());
    drop(qemu);
    assert!(!ram.exists() && !ram.parent().expect("in a directory").exists());
    assert!(!directory.exists());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    Ok(())
}

#[test]
fn a_qemu_that_cannot_start_says_why() {
    let error = Qemu::builder().arg("-no-such-option").start().expect_err("QEMU refuses it");
    assert!(format!("{error:#}").contains("no-such-option"), "{error:#}");
    let error = Qemu::builder().binary("/no/such/qemu").start().expect_err("there is none");
    assert!(format!("{error:#}").contains("/no/such/qemu"), "{error:#}");
}

#[test]
fn qmp_answers_beside_the_socket_that_the_product_has() -> Result<()> {
    let qemu = Qemu::builder().paused(true).start()?;
    let _product = std::os::unix::net::UnixStream::connect(qemu.qmp_path())?;
    assert_eq!(qemu.status()?, "prelaunch");
    qemu.cont()?;
    assert_eq!(qemu.status()?, "running");
    assert!(qemu.qmp_events()?.iter().any(|event| event["event"] == "RESUME"));
    assert!(qemu.qmp(&json!({ "execute": "no-such-command" })).is_err());
    Ok(())
}

#[test]
fn every_backing_starts() -> Result<()> {
    for backing in [Backing::Tmpfs, Backing::TmpfsUnlinked, Backing::Private, Backing::Memfd] {
        let qemu = Qemu::builder().block(RamBlock::node(64 << 20).on(backing.clone())).start()?;
        let memdev = &qemu.qmp(&json!({ "execute": "query-memdev" }))?[0];
        assert_eq!(memdev["share"], json!(backing != Backing::Private), "{backing:?}");
    }
    Ok(())
}

/// Moves a guest with QEMU's own migration, up to where the destination may resume.
fn move_by_qemu(source: &Qemu, destination: &Qemu) -> Result<()> {
    let uri = format!("unix:{}", destination.directory().join("migration").display());
    destination.qmp(&json!({ "execute": "migrate-incoming", "arguments": { "uri": uri } }))?;
    source.qmp(&json!({ "execute": "migrate", "arguments": { "uri": uri } }))?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let answer = source.qmp(&json!({ "execute": "query-migrate" }))?;
        match answer["status"].as_str() {
            Some("completed") => break,
            Some("failed") => anyhow::bail!("the migration failed: {answer}"),
            _ if Instant::now() > deadline => anyhow::bail!("the migration does not end: {answer}"),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    while destination.status()? != "paused" {
        anyhow::ensure!(Instant::now() < deadline, "the destination is {}", destination.status()?);
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[test]
fn a_guest_that_was_moved_ticks_on_and_has_lost_nothing() -> Result<()> {
    for version in QemuVersion::ALL {
        let Some(binary) = qemu_binary(version) else {
            skipped(format!("no QEMU {version:?}: run scripts/setup test"));
            continue;
        };
        let workload = Workload { mib: 16, touch_mib: 16, rate_mib: 10, tick_ms: 10, ..Workload::default() };
        let source = Qemu::builder().binary(binary).vcpus(2).proof(workload).start()?;
        source.wait_ready(TIMEOUT)?;
        let destination = source.destination().start()?;
        assert_eq!(destination.status()?, "inmigrate");
        source.next_tick(TIMEOUT)?;
        move_by_qemu(&source, &destination)?;
        assert!(destination.ticks().is_empty(), "it resumes only when told to");
        destination.cont()?;

        destination.next_tick(TIMEOUT)?;
        assert_eq!(destination.verify(TIMEOUT)?.errors, 0);
        let ticks: Vec<Tick> =
            joined_lines(&source, &destination).iter().filter_map(|line| Tick::parse(&line.text)).collect();
        for pair in ticks.windows(2) {
            assert_eq!(pair[1].n, pair[0].n + 1, "no tick was lost in the move");
            assert!(pair[1].tsc > pair[0].tsc, "its clock does not go back");
        }
        let downtime = downtime_seen(&source, &destination).expect("it ticks again");
        assert!(downtime < Duration::from_secs(30), "{downtime:?}");
    }
    Ok(())
}

fn leave_shared_ram_out(qemu: &Qemu) -> Result<()> {
    let capabilities = json!([{ "capability": "x-ignore-shared", "state": true }]);
    let arguments = json!({ "capabilities": capabilities });
    qemu.qmp(&json!({ "execute": "migrate-set-capabilities", "arguments": arguments })).map(drop)
}

#[test]
fn a_page_that_was_not_carried_over_is_found_at_the_destination() -> Result<()> {
    let workload = Workload { mib: 16, touch_mib: 16, rate_mib: 10, tick_ms: 10, ..Workload::default() };
    let source = Qemu::builder()
        .block(RamBlock::node(64 << 20))
        .block(RamBlock::node(64 << 20))
        .block(RamBlock::dimm(64 << 20))
        .proof(workload)
        .start()?;
    source.wait_ready(TIMEOUT)?;
    let destination = source.destination().start()?;
    source.next_tick(TIMEOUT)?;

    // RAM is carried by the test, all but one page of the DIMM; the rest by QEMU.
    source.stop()?;
    let dimm_address = 4 << 30;
    let forgotten = (0..64 << 20)
        .step_by(4096)
        .map(|offset| dimm_address + offset)
        .find(|address| source.read_page(*address).is_ok_and(|page| page.iter().any(|byte| *byte != 0)))
        .expect("the guest works in the DIMM too");
    for (from, to) in source.ram_files().iter().zip(destination.ram_files()) {
        std::fs::copy(from.as_ref().expect("a name"), to.as_ref().expect("a name"))?;
    }
    destination.write_ram(forgotten, &[0; 4096])?;
    leave_shared_ram_out(&source)?;
    leave_shared_ram_out(&destination)?;
    move_by_qemu(&source, &destination)?;
    destination.cont()?;

    destination.verify(TIMEOUT)?;
    let lost: Vec<Lost> = destination.lines().iter().filter_map(|line| Lost::parse(&line.text)).collect();
    assert!(!lost.is_empty() && lost.iter().all(|lost| lost.guest_address() == forgotten), "{lost:?}");
    assert_eq!(lost[0].kind, "zero");
    Ok(())
}

#[test]
fn debian_ticks_under_stress() -> Result<()> {
    let guest = match DebianGuest::find() {
        Ok(guest) => guest,
        Err(reason) => {
            skipped(reason);
            return Ok(());
        }
    };
    let qemu = Qemu::builder().accel(ramferry_lab::Accel::Tcg).guest(Guest::Debian(guest)).start()?;
    qemu.wait_line(|line| line.starts_with("tick 30 "), Duration::from_secs(120))?;
    assert!(qemu.lines().iter().any(|line| line.text.contains("stress: info")), "{:?}", qemu.lines());
    Ok(())
}
