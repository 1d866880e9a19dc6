use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use ramferry_guest::{GuestError, Qemu, Resumed, Timeouts};
use serde_json::json;
use tempfile::TempDir;

use crate::harness::{FarEnd, Stream, Vm, carry, cut_qmp, large_devices, qemus};

/// From the call to a guest that runs: the aim, for most of many times.
const RESUME_AIM: Duration = Duration::from_millis(100);

/// And at the worst, on a machine that is busy with other tests.
const RESUME_LIMIT: Duration = Duration::from_secs(2);

/// Resumes, and checks everything that must be so after it. Returns the time
/// from the call to vCPUs that run; to its return, where they never stopped.
async fn resumes(vm: &Vm, qemu: &Qemu, what: &str) -> Duration {
    let mut events = vm.control().events();
    let (called, started) = (SystemTime::now(), Instant::now());
    let resumed = qemu.resume_source().await.unwrap_or_else(|error| panic!("{what}: {error}: {}", vm.log()));
    let elapsed = started.elapsed();
    assert_eq!(resumed, Resumed::Running, "{what}");
    assert_eq!(vm.run_state().await, "running", "{what}");
    assert!(elapsed < RESUME_LIMIT, "{what}: {elapsed:?}");
    assert_eq!(qemu.resume_source().await.unwrap(), Resumed::Running, "{what}: again");
    let mut running_after = elapsed;
    while let Ok(event) = events.try_recv() {
        if event.name == "RESUME" {
            running_after = event.timestamp.duration_since(called).unwrap_or_default();
        }
    }
    println!("{what}: running after {running_after:?}, settled after {elapsed:?}");
    running_after
}

/// A guest that was resumed can be paused again, and resumed again.
async fn leaves_again(vm: &Vm, qemu: &Qemu, what: &str) {
    qemu.prepare_source().await.unwrap();
    let (path, listener) = vm.listen();
    let _stream = Stream::accept(listener, FarEnd::Reads);
    let paused = qemu
        .pause_for_switchover(&path)
        .await
        .unwrap_or_else(|error| panic!("{what}: {error}: {}", vm.log()));
    assert!(paused.was_running);
    resumes(vm, qemu, &format!("{what}, a second time")).await;
}

/// A disk that a guest may write, and the option that gives it to one.
fn drive() -> (TempDir, String) {
    let disk = TempDir::new_in("/dev/shm").unwrap();
    let image = disk.path().join("disk");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("-drive if=virtio,format=raw,file={}", image.display());
    (disk, drive)
}

/// `RAMFERRY_TEST_INSTANTS` is how many to try.
fn instants() -> u64 {
    std::env::var("RAMFERRY_TEST_INSTANTS").map_or(40, |count| count.parse().unwrap())
}

fn mostly_fast(mut times: Vec<Duration>, what: &str) {
    times.sort_unstable();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{what}: resumed from {} instants in {median:?} (median), {worst:?} (worst)", times.len());
    assert!(median < RESUME_AIM, "{what}: {median:?}");
}

#[tokio::test]
async fn a_guest_that_was_never_paused_runs_on() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let before = vm.settings().await;
        let qemu = vm.source().await;
        assert_ne!(vm.settings().await, before);
        resumes(&vm, &qemu, "prepared").await;
        assert_eq!(vm.settings().await, before);
        // Its owner pauses it; that is not ours to undo.
        qemu.prepare_source().await.unwrap();
        vm.ask("stop", json!({})).await;
        assert_eq!(qemu.resume_source().await.unwrap(), Resumed::LeftPaused);
        assert_eq!(vm.run_state().await, "paused");
    }
}

#[tokio::test]
async fn the_pause_is_timed_and_undone() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let before = vm.settings().await;
        let qemu = vm.source().await;
        let (path, listener) = vm.listen();
        let _stream = Stream::accept(listener, FarEnd::Reads);
        let called = SystemTime::now();
        let paused = qemu.pause_for_switchover(&path).await.unwrap();
        let returned = SystemTime::now();
        assert!(paused.was_running && paused.stop_time >= called && paused.stop_time <= returned);
        assert_eq!(vm.run_state().await, "finish-migrate");
        println!(
            "{}: running {:?} after the order, seen to stand still {:?} later",
            qemu.version(),
            paused.stop_time.duration_since(called).unwrap(),
            returned.duration_since(paused.stop_time).unwrap()
        );
        resumes(&vm, &qemu, "pre-switchover").await;
        assert_eq!(vm.settings().await, before);
        leaves_again(&vm, &qemu, "pre-switchover").await;
    }
}

#[tokio::test]
async fn a_stream_that_nobody_reads_before_the_pause_does_not_keep_the_guest() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, &large_devices()).await;
        let qemu = vm.source().await;
        let timeouts = Timeouts { pause: Duration::from_millis(300), ..Timeouts::default() };
        let qemu = qemu.with_timeouts(timeouts);
        let (path, listener) = vm.listen();
        let _stream = Stream::accept(listener, FarEnd::Stuck);
        let error = qemu.pause_for_switchover(&path).await.unwrap_err();
        assert_eq!(error.reason(), "GUEST_STEP_TIMEOUT", "{error}");
        vm.migration_reaches("active").await;
        resumes(&vm, &qemu, "active, stuck").await;
        leaves_again(&vm, &qemu, "active, stuck").await;
    }
}

#[tokio::test]
async fn a_stream_that_nobody_accepts_does_not_keep_the_guest() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, &large_devices()).await;
        let timeouts = Timeouts { pause: Duration::from_millis(100), ..Timeouts::default() };
        let qemu = vm.source().await.with_timeouts(timeouts);
        let (path, _listener) = vm.listen();
        assert_eq!(qemu.pause_for_switchover(&path).await.unwrap_err().reason(), "GUEST_STEP_TIMEOUT");
        resumes(&vm, &qemu, "not accepted").await;
    }
}

#[tokio::test]
async fn a_stream_that_is_not_there_fails_the_pause_and_the_guest_runs_on() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let qemu = vm.source().await;
        let error = qemu.pause_for_switchover(&vm.path("nobody")).await.unwrap_err();
        assert!(matches!(error.reason(), "DEVICE_STATE_FAILED" | "QMP_REFUSED"), "{error}");
        resumes(&vm, &qemu, "no stream").await;
        let long = PathBuf::from(format!("/{}", "x".repeat(107)));
        assert_eq!(qemu.pause_for_switchover(&long).await.unwrap_err().reason(), "STREAM_PATH");
        leaves_again(&vm, &qemu, "no stream").await;
    }
}

#[tokio::test]
async fn a_stream_that_closes_in_the_pause_does_not_keep_the_guest() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let qemu = vm.source().await;
        let (path, listener) = vm.listen();
        let stream = Stream::accept(listener, FarEnd::Reads);
        qemu.pause_for_switchover(&path).await.unwrap();
        stream.close().await;
        resumes(&vm, &qemu, "pre-switchover, closed").await;
        leaves_again(&vm, &qemu, "pre-switchover, closed").await;
    }
}

#[tokio::test]
async fn device_state_that_nobody_reads_is_cut_off_and_the_guest_runs_on() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, &large_devices()).await;
        let qemu = vm.source().await;
        let timeouts = Timeouts { device_state: Duration::from_millis(300), ..Timeouts::default() };
        let qemu = qemu.with_timeouts(timeouts);
        let (path, listener) = vm.listen();
        let stream = Stream::accept(listener, FarEnd::Gate);
        qemu.pause_for_switchover(&path).await.unwrap();
        stream.shut();
        let error = qemu.move_device_state().await.unwrap_err();
        assert_eq!(error.reason(), "GUEST_STEP_TIMEOUT", "{error}");
        resumes(&vm, &qemu, "device, stuck").await;
        leaves_again(&vm, &qemu, "device, stuck").await;
    }
}

#[tokio::test]
async fn device_state_that_nobody_acknowledges_does_not_keep_the_guest() {
    for binary in qemus() {
        let (_disk, drive) = drive();
        let vm = Vm::guest(&binary, &drive).await;
        let timeouts = Timeouts { device_state: Duration::from_millis(300), ..Timeouts::default() };
        let qemu = vm.source().await.with_timeouts(timeouts);
        let (path, listener) = vm.listen();
        let _stream = Stream::accept(listener, FarEnd::Reads);
        qemu.pause_for_switchover(&path).await.unwrap();
        assert_eq!(qemu.move_device_state().await.unwrap_err().reason(), "GUEST_STEP_TIMEOUT");
        vm.migration_reaches("device").await;
        resumes(&vm, &qemu, "device, silent").await;
        leaves_again(&vm, &qemu, "device, silent").await;
    }
}

#[tokio::test]
async fn a_guest_that_stood_still_does_so_when_its_device_state_is_taken_back() {
    for binary in qemus() {
        let (_disk, drive) = drive();
        let vm = Vm::guest(&binary, &drive).await;
        vm.ask("stop", json!({})).await;
        let timeouts = Timeouts { device_state: Duration::from_millis(300), ..Timeouts::default() };
        let qemu = vm.source().await.with_timeouts(timeouts);
        let (path, listener) = vm.listen();
        let _stream = Stream::accept(listener, FarEnd::Reads);
        assert!(!qemu.pause_for_switchover(&path).await.unwrap().was_running);
        assert_eq!(qemu.move_device_state().await.unwrap_err().reason(), "GUEST_STEP_TIMEOUT");
        assert_eq!(qemu.resume_source().await.unwrap(), Resumed::LeftPaused);
        vm.ask("cont", json!({})).await;
        assert_eq!(vm.run_state().await, "running");
        leaves_again(&vm, &qemu, "device, stood still").await;
    }
}

#[tokio::test]
async fn device_state_whose_stream_closes_fails_and_the_guest_runs_on() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let qemu = vm.source().await;
        let (path, listener) = vm.listen();
        let stream = Stream::accept(listener, FarEnd::Reads);
        qemu.pause_for_switchover(&path).await.unwrap();
        stream.close().await;
        let error = qemu.move_device_state().await.unwrap_err();
        assert!(matches!(error, GuestError::Failed { .. }), "{error}");
        resumes(&vm, &qemu, "failed").await;
        leaves_again(&vm, &qemu, "failed").await;
    }
}

#[tokio::test]
async fn a_guest_whose_device_state_has_left_can_still_be_taken_back() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let qemu = vm.source().await;
        let mut arrived = vm.destination("").await;
        let other = crate::destination::arrive(&vm, &qemu, &arrived).await;
        vm.reaches("postmigrate").await;
        other.discard().await.unwrap();
        assert!(arrived.has_ended().await);
        resumes(&vm, &qemu, "completed").await;
        leaves_again(&vm, &qemu, "completed").await;
    }
}

#[tokio::test]
async fn a_disk_is_free_for_the_source_until_the_destination_runs() {
    for binary in qemus() {
        let (_disk, drive) = drive();
        let vm = Vm::guest(&binary, &drive).await;
        let qemu = vm.source().await;
        let arrived = vm.destination(&drive).await;
        // Loaded, not given up: it must not have locked the image.
        crate::destination::arrive(&vm, &qemu, &arrived).await;
        resumes(&vm, &qemu, "completed, with a disk").await;
        drop(arrived);
        qemu.prepare_source().await.unwrap();
        let arrived = vm.destination(&drive).await;
        let other = crate::destination::arrive(&vm, &qemu, &arrived).await;
        other.resume_destination().await.unwrap();
        assert_eq!(arrived.run_state().await, "running");
    }
}

#[tokio::test]
async fn a_pause_is_undone_from_every_instant_of_it() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let qemu = vm.source().await;
        let mut times = Vec::new();
        let instants = instants();
        for step in 0..instants {
            qemu.prepare_source().await.unwrap();
            let (path, listener) = vm.listen();
            let _stream = Stream::accept(listener, FarEnd::Reads);
            let after = Duration::from_micros(20_000 * step / instants);
            let _ = tokio::time::timeout(after, qemu.pause_for_switchover(&path)).await;
            times.push(resumes(&vm, &qemu, &format!("pause dropped after {after:?}")).await);
        }
        mostly_fast(times, &format!("{}: pause", qemu.version()));
    }
}

#[tokio::test]
async fn device_state_is_taken_back_from_every_instant_of_it() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let qemu = vm.source().await;
        let mut times = Vec::new();
        for step in 0..12 {
            let arriving = vm.destination("").await;
            let other = arriving.inspect(ramferry_guest::Side::Destination).await.unwrap().0;
            other.prepare_destination().await.unwrap();
            other.start_incoming(&arriving.path("arriving")).await.unwrap();
            qemu.prepare_source().await.unwrap();
            let (path, listener) = vm.listen();
            let carrier = carry(listener, arriving.path("arriving"));
            qemu.pause_for_switchover(&path).await.unwrap();
            let after = Duration::from_micros(step * 700);
            let _ = tokio::time::timeout(after, qemu.move_device_state()).await;
            times.push(resumes(&vm, &qemu, &format!("device state dropped after {after:?}")).await);
            other.discard().await.unwrap();
            carrier.abort();
        }
        mostly_fast(times, &format!("{}: device state", qemu.version()));
        leaves_again(&vm, &qemu, "every instant").await;
    }
}

#[tokio::test]
async fn a_migration_that_somebody_else_cancels_fails_the_pause() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let qemu = vm.source().await;
        let (path, listener) = vm.listen();
        let _stream = Stream::accept(listener, FarEnd::Reads);
        qemu.pause_for_switchover(&path).await.unwrap();
        vm.ask("migrate_cancel", json!({})).await;
        vm.migration_reaches("cancelled").await;
        assert!(qemu.move_device_state().await.is_err());
        resumes(&vm, &qemu, "cancelled").await;
    }
}

#[tokio::test]
async fn a_connection_that_broke_is_opened_again_to_resume() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let qemu = vm.source().await;
        let (path, listener) = vm.listen();
        let _stream = Stream::accept(listener, FarEnd::Reads);
        qemu.pause_for_switchover(&path).await.unwrap();
        cut_qmp(&vm);
        let lost = qemu.lost().await;
        assert_eq!(lost.reason(), "QMP_LOST", "{lost}");
        resumes(&vm, &qemu, "connection broken").await;
        leaves_again(&vm, &qemu, "connection broken").await;
    }
}

#[tokio::test]
async fn a_later_process_of_ours_resumes_what_an_earlier_one_left() {
    for binary in qemus() {
        for state in ["pre-switchover", "device", "completed", "nothing"] {
            let vm = Vm::guest(&binary, "").await;
            let before = vm.settings().await;
            let qemu = vm.source().await;
            let (path, listener) = vm.listen();
            let mut arrived = None;
            match state {
                "nothing" => {}
                "completed" => {
                    let arriving = vm.destination("").await;
                    drop(listener);
                    crate::destination::arrive(&vm, &qemu, &arriving).await;
                    arrived = Some(arriving);
                }
                _ => {
                    let _stream = Stream::accept(listener, FarEnd::Reads);
                    qemu.pause_for_switchover(&path).await.unwrap();
                    if state == "device" {
                        let sent = tokio::time::timeout(Duration::from_millis(50), qemu.move_device_state());
                        assert!(sent.await.is_err());
                    }
                }
            }
            drop(qemu);
            drop(arrived);
            let later = Qemu::attach(&vm.path("qmp"), true).await.unwrap();
            assert_eq!(later.pid(), vm.pid());
            resumes(&vm, &later, &format!("attached in {state}")).await;
            assert_eq!(vm.settings().await, before, "{state}");
            leaves_again(&vm, &later, &format!("attached in {state}")).await;
        }
    }
}

#[tokio::test]
async fn a_guest_that_stood_still_before_stands_still_after() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        vm.ask("stop", json!({})).await;
        let qemu = vm.source().await;
        let (path, listener) = vm.listen();
        let _stream = Stream::accept(listener, FarEnd::Reads);
        let paused = qemu.pause_for_switchover(&path).await.unwrap();
        assert!(!paused.was_running);
        assert_eq!(qemu.resume_source().await.unwrap(), Resumed::LeftPaused);
        println!("{}: a paused guest is left in {}", qemu.version(), vm.run_state().await);
        vm.ask("cont", json!({})).await;
        vm.reaches("running").await;
        leaves_again(&vm, &qemu, "paused before").await;
    }
}

#[tokio::test]
async fn a_guest_that_stopped_itself_is_not_started() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "-no-shutdown -no-reboot").await;
        let qemu = vm.source().await;
        vm.ask("system_reset", json!({})).await;
        vm.reaches("shutdown").await;
        assert_eq!(vm.inspect_again(&qemu).await, "GUEST_STATE");
        let stopped = Resumed::StoppedItself { run_state: "shutdown".to_owned() };
        assert_eq!(qemu.resume_source().await.unwrap(), stopped);
    }
}

#[tokio::test]
async fn a_qemu_that_dies_is_told_from_one_that_hangs_up() {
    for binary in qemus() {
        let mut vm = Vm::guest(&binary, "").await;
        let qemu = vm.source().await;
        vm.kill();
        let lost = qemu.lost().await;
        assert_eq!(lost.reason(), "VMM_GONE", "{lost}");
        assert_eq!(qemu.resume_source().await.unwrap_err().reason(), "VMM_GONE");
        assert_eq!(qemu.status().await.unwrap_err().reason(), "VMM_GONE");
    }
}

#[tokio::test]
async fn a_qemu_that_hangs_is_not_waited_for_beyond_the_limit() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let timeouts = Timeouts { resume: Duration::from_millis(300), ..Timeouts::default() };
        let qemu = vm.source().await.with_timeouts(timeouts);
        let (path, listener) = vm.listen();
        let _stream = Stream::accept(listener, FarEnd::Reads);
        qemu.pause_for_switchover(&path).await.unwrap();
        vm.signal(rustix::process::Signal::STOP);
        let started = Instant::now();
        assert_eq!(qemu.resume_source().await.unwrap_err().reason(), "GUEST_STEP_TIMEOUT");
        assert!(started.elapsed() < RESUME_LIMIT, "{:?}", started.elapsed());
        vm.signal(rustix::process::Signal::CONT);
        let qemu = qemu.with_timeouts(Timeouts::default());
        resumes(&vm, &qemu, "hung for a while").await;
    }
}

#[tokio::test]
async fn ram_that_was_plugged_in_meanwhile_stops_the_pause() {
    for binary in qemus() {
        let vm = Vm::start(
            &binary,
            "-machine q35,memory-backend=ram0 -m 64M,slots=2,maxmem=1G \
             -object memory-backend-file,id=ram0,size=64M,mem-path=@/ram,share=on",
        )
        .await;
        let qemu = vm.source().await;
        let more = vm.path("more").display().to_string();
        vm.ask("object-add", json!({ "qom-type": "memory-backend-file", "id": "more", "size": 128 << 20, "mem-path": more, "share": true })).await;
        vm.ask("device_add", json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "more" })).await;
        let (path, _listener) = vm.listen();
        assert_eq!(qemu.pause_for_switchover(&path).await.unwrap_err().reason(), "LAYOUT_CHANGED");
        resumes(&vm, &qemu, "plugged").await;
    }
}

#[tokio::test]
async fn a_disk_that_turned_to_direct_io_meanwhile_stops_the_pause() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    for binary in qemus() {
        let memory = "-object memory-backend-file,id=ram0,size=64M,mem-path=@/ram,share=on";
        let vm = Vm::start(&binary, &format!("-machine q35,memory-backend=ram0 -m 64M {memory}")).await;
        let qemu = vm.source().await;
        let node = |name: &str, direct: bool| {
            let cache = json!({ "direct": direct });
            json!({ "driver": "file", "node-name": name, "filename": disk.path(), "cache": cache, "read-only": true })
        };
        vm.ask("blockdev-add", node("cached", false)).await;
        vm.ask("blockdev-add", node("direct", true)).await;
        let (path, _listener) = vm.listen();
        let refused = qemu.pause_for_switchover(&path).await.unwrap_err();
        assert_eq!(refused.reason(), "DISKS_CHANGED");
        assert!(refused.to_string().contains(": direct use direct I/O now"), "{refused}");
        resumes(&vm, &qemu, "a disk changed").await;
    }
}
