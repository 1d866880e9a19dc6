use std::path::PathBuf;
use std::time::{Duration, Instant};

use ramferry_guest::{Qemu, Side, Timeouts};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::harness::{Vm, carry, cut_qmp, qemus};

/// `vm` as a destination that waits for device state, and where it does.
async fn listening(vm: &Vm) -> (Qemu, PathBuf) {
    let (destination, _, _) = vm.inspect(Side::Destination).await.unwrap();
    destination.prepare_destination().await.unwrap();
    let arriving = vm.path("arriving");
    destination.start_incoming(&arriving).await.unwrap();
    (destination, arriving)
}

/// Moves `source`'s guest to `destination` up to where it is loaded there, and
/// returns the destination.
pub(crate) async fn arrive(source_vm: &Vm, source: &Qemu, destination_vm: &Vm) -> Qemu {
    let (destination, arriving) = listening(destination_vm).await;
    let (path, listener) = source_vm.listen();
    let carrier = carry(listener, arriving);
    let ordered = Instant::now();
    source.pause_for_switchover(&path).await.unwrap();
    let paused = Instant::now();
    std::fs::copy(source_vm.path("ram"), destination_vm.path("ram.copy")).unwrap();
    let copied = Instant::now();
    let (sent, loaded) = tokio::join!(source.move_device_state(), destination.wait_loaded());
    let moved = Instant::now();
    sent.unwrap();
    loaded.unwrap_or_else(|error| panic!("{error}: {}", destination_vm.log()));
    println!(
        "{}: pause ordered to paused {:?}, device state moved in {:?}, {} bytes in all",
        source.version(),
        paused - ordered,
        moved - copied,
        carrier.await.unwrap()
    );
    destination
}

#[tokio::test]
async fn a_guest_arrives_and_stands_still_until_it_is_resumed() {
    for binary in qemus() {
        for option in ["", "-S"] {
            let vm = Vm::guest(&binary, "").await;
            let source = vm.source().await;
            let arrived = vm.destination(option).await;
            let before = arrived.settings().await;
            let destination = arrive(&vm, &source, &arrived).await;
            assert_eq!(arrived.run_state().await, "paused");
            // QEMU says that it has sent everything a moment before it says what became of its guest.
            let sent = Instant::now();
            while vm.run_state().await != "postmigrate" {
                assert!(sent.elapsed() < Duration::from_secs(10), "{}", vm.run_state().await);
            }
            destination.wait_loaded().await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(arrived.run_state().await, "paused");
            let started = Instant::now();
            destination.resume_destination().await.unwrap();
            println!("{}: destination resumed in {:?}", source.version(), started.elapsed());
            assert_eq!(arrived.run_state().await, "running");
            destination.resume_destination().await.unwrap();
            destination.settle_destination().await.unwrap();
            destination.settle_destination().await.unwrap();
            assert_eq!(arrived.settings().await, before);
            let error = destination.discard().await.unwrap_err();
            assert_eq!(error.reason(), "DESTINATION_RUNS");
            assert_eq!(arrived.run_state().await, "running");
            // The copy that stays behind is never migrated by mistake.
            assert_eq!(vm.inspect_again(&source).await, "GUEST_STATE");
        }
    }
}

#[tokio::test]
async fn a_paused_guest_arrives_paused() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        vm.ask("stop", json!({})).await;
        let source = vm.source().await;
        let arrived = vm.destination("").await;
        arrive(&vm, &source, &arrived).await;
        assert_eq!(arrived.run_state().await, "paused");
    }
}

#[tokio::test]
async fn a_destination_that_was_only_prepared_is_left_as_it_was() {
    for binary in qemus() {
        let mut waiting = Vm::guest(&binary, "-incoming defer").await;
        let before = waiting.settings().await;
        let (qemu, _, _) = waiting.inspect(Side::Destination).await.unwrap();
        qemu.discard().await.unwrap();
        qemu.prepare_destination().await.unwrap();
        qemu.prepare_destination().await.unwrap();
        assert_ne!(waiting.settings().await, before);
        qemu.discard().await.unwrap();
        qemu.discard().await.unwrap();
        assert!(waiting.is_alive());
        assert_eq!((waiting.settings().await, waiting.run_state().await), (before, "inmigrate".to_owned()));
        drop(qemu);
        // It takes another migration, and runs by itself after it as it would have.
        let vm = Vm::guest(&binary, "").await;
        let capability = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
        let incoming = json!({ "uri": format!("unix:{}", waiting.path("arriving").display()) });
        for side in [&vm, &waiting] {
            side.ask("migrate-set-capabilities", capability.clone()).await;
        }
        waiting.ask("migrate-incoming", incoming.clone()).await;
        vm.ask("migrate", incoming).await;
        waiting.reaches("running").await;
    }
}

#[tokio::test]
async fn a_destination_that_listens_is_ended_when_it_is_given_up() {
    for binary in qemus() {
        for connected in [false, true] {
            let mut waiting = Vm::guest(&binary, "-incoming defer").await;
            let (qemu, arriving) = listening(&waiting).await;
            assert_eq!(qemu.start_incoming(&arriving).await.unwrap_err().reason(), "INCOMING_STARTED");
            let stream = if connected { Some(UnixStream::connect(&arriving).await.unwrap()) } else { None };
            let error = qemu.resume_destination().await.unwrap_err();
            assert_eq!(error.reason(), "GUEST_NOT_LOADED");
            qemu.discard().await.unwrap();
            assert!(waiting.has_ended().await);
            qemu.discard().await.unwrap();
            drop(stream);
        }
    }
}

#[tokio::test]
async fn a_stream_that_is_none_ends_the_load_and_can_be_given_up() {
    for binary in qemus() {
        for bytes in [&b""[..], b"this is no migration stream, not at all", b"QEVM\0\0\0\x03\x07"] {
            let waiting = Vm::guest(&binary, "-incoming defer").await;
            let (qemu, arriving) = listening(&waiting).await;
            let mut stream = UnixStream::connect(arriving).await.unwrap();
            let _ = stream.write_all(bytes).await;
            drop(stream);
            let error = qemu.wait_loaded().await.unwrap_err();
            // A busy host takes its time to end a process that has closed its sockets.
            assert!(matches!(error.reason(), "VMM_GONE" | "DEVICE_STATE_FAILED" | "QMP_LOST"), "{error}");
            qemu.discard().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_load_that_never_ends_is_given_up_in_time() {
    for binary in qemus() {
        let mut waiting = Vm::guest(&binary, "-incoming defer").await;
        let (qemu, arriving) = listening(&waiting).await;
        let qemu = qemu.with_timeouts(Timeouts { load: Duration::from_millis(100), ..Timeouts::default() });
        let _stream = UnixStream::connect(arriving).await.unwrap();
        assert_eq!(qemu.wait_loaded().await.unwrap_err().reason(), "GUEST_STEP_TIMEOUT");
        qemu.discard().await.unwrap();
        assert!(waiting.has_ended().await);
    }
}

#[tokio::test]
async fn a_later_process_of_ours_takes_up_a_destination() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let source = vm.source().await;
        let arrived = vm.destination("").await;
        drop(arrive(&vm, &source, &arrived).await);
        let later = Qemu::attach(&arrived.path("qmp"), true).await.unwrap();
        later.resume_destination().await.unwrap();
        assert_eq!(arrived.run_state().await, "running");
        assert_eq!(later.discard().await.unwrap_err().reason(), "DESTINATION_RUNS");

        let mut waiting = vm.destination("").await;
        let (qemu, _) = listening(&waiting).await;
        drop(qemu);
        let later = Qemu::attach(&waiting.path("qmp"), true).await.unwrap();
        assert_eq!(later.resume_source().await.unwrap_err().reason(), "GUEST_STATE");
        later.discard().await.unwrap();
        assert!(waiting.has_ended().await);

        let mut prepared = vm.destination("").await;
        let before = prepared.settings().await;
        let (qemu, _, _) = prepared.inspect(Side::Destination).await.unwrap();
        qemu.prepare_destination().await.unwrap();
        drop(qemu);
        let later = Qemu::attach(&prepared.path("qmp"), true).await.unwrap();
        later.discard().await.unwrap();
        assert!(prepared.is_alive());
        assert_eq!(prepared.settings().await, before);
    }
}

#[tokio::test]
async fn a_destination_whose_connection_broke_is_resumed_and_given_up_all_the_same() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let source = vm.source().await;
        let arrived = vm.destination("").await;
        let destination = arrive(&vm, &source, &arrived).await;
        cut_qmp(&arrived);
        assert_eq!(destination.lost().await.reason(), "QMP_LOST");
        destination.resume_destination().await.unwrap();
        assert_eq!(arrived.run_state().await, "running");

        let mut given_up = vm.destination("").await;
        let (qemu, _) = listening(&given_up).await;
        cut_qmp(&given_up);
        assert_eq!(qemu.lost().await.reason(), "QMP_LOST");
        qemu.discard().await.unwrap();
        assert!(given_up.has_ended().await);
    }
}

#[tokio::test]
async fn a_destination_that_is_gone_is_given_up() {
    for binary in qemus() {
        let mut waiting = Vm::guest(&binary, "-incoming defer").await;
        let (qemu, _, _) = waiting.inspect(Side::Destination).await.unwrap();
        qemu.prepare_destination().await.unwrap();
        waiting.kill();
        qemu.discard().await.unwrap();
        assert_eq!(qemu.resume_destination().await.unwrap_err().reason(), "VMM_GONE");
    }
}

#[tokio::test]
async fn a_destination_that_somebody_else_starts_is_stopped() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let source = vm.source().await;
        let arrived = vm.destination("").await;
        let destination = arrive(&vm, &source, &arrived).await;
        arrived.ask("cont", json!({})).await;
        assert_eq!(destination.wait_loaded().await.unwrap_err().reason(), "GUEST_RAN_TOO_EARLY");
        assert_eq!(arrived.run_state().await, "paused");
    }
}

#[tokio::test]
async fn a_destination_that_somebody_else_lets_run_once_it_is_loaded_is_stopped() {
    for binary in qemus() {
        let vm = Vm::guest(&binary, "").await;
        let source = vm.source().await;
        let arrived = vm.destination("").await;
        let (destination, arriving) = listening(&arrived).await;
        arrived.ask("cont", json!({})).await;
        let (path, listener) = vm.listen();
        let _carrier = carry(listener, arriving);
        let leaves = async {
            source.pause_for_switchover(&path).await.unwrap();
            std::fs::copy(vm.path("ram"), arrived.path("ram.copy")).unwrap();
            source.move_device_state().await
        };
        let (loaded, _) = tokio::join!(destination.wait_loaded(), leaves);
        assert_eq!(loaded.unwrap_err().reason(), "GUEST_RAN_TOO_EARLY");
        assert_eq!(arrived.run_state().await, "paused");
    }
}
