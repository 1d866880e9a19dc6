//! Throttling on cgroup v2 as the kernel has it, with its threaded cgroups, its processes in leaves only and its controllers
//! that parents grant. Runs in the lab's VM (`make lab-test`), and nowhere else: hosts may have the cpu controller on v1.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]
#![allow(dead_code, reason = "what is shared with the other migrations has more than is used here")]

mod cgroup;
#[path = "../voyage/harness.rs"]
mod harness;
#[path = "../voyage/throttle/stage.rs"]
mod stage;

use std::collections::BTreeSet;
use std::time::Duration;

use ramferry_lab::{Qemu, RamBlock, Workload};
use ramferry_proto::v1;
use ramferry_proto::v1::MigrationState::{Cancelled, Succeeded};

use cgroup::{Cgroup, Idler};
use harness::{MIB, assert_proves_itself, assert_runs_untraced, boot};
use stage::{Stage, guards, homes, hot, is_throttled, slow, until};

/// An emulated guest of an emulated machine, and all the same faster than [`unhurried`] lets it be copied.
fn guest() -> Qemu {
    boot(Qemu::builder().block(RamBlock::node(64 * MIB)).proof(Workload { mib: 6, ..hot() }))
}

/// So long a pause that what it costs at least, in a VM, does not make throttling pointless.
fn unhurried(throttle_max_percent: u32) -> v1::MigrationParameters {
    v1::MigrationParameters {
        bandwidth_limit_bits_per_second: 8 * 3 * MIB,
        max_downtime: Some(Duration::from_secs(1).try_into().unwrap()),
        no_progress_timeout: Some(Duration::from_secs(600).try_into().unwrap()),
        ..slow(throttle_max_percent)
    }
}

/// Held back, and not so far that it converges.
fn endless() -> v1::MigrationParameters {
    unhurried(20)
}

/// The threads of its vCPUs, and all of them.
fn threads(guest: &Qemu) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap().map(Result::unwrap);
    let all = tasks.map(|task| task.file_name().to_string_lossy().parse().unwrap()).collect();
    (homes(guest).into_keys().collect(), all)
}

async fn cancel(stage: &Stage, id: &str) {
    let request = v1::CancelMigrationRequest { id: id.into() };
    stage.pair.source.client().await.cancel_migration(request).await.unwrap();
    assert_eq!(stage.pair.source.wait_end(id).await.state(), Cancelled);
    stage.pair.destination.wait_end(id).await;
}

/// The destination of a migration that did not come to its end may have ended.
fn renew(stage: &mut Stage) {
    if !stage.receiver.is_alive() {
        stage.receiver = stage.guest.destination().start().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn vcpus_of_a_guest_in_a_scope_of_its_own_are_held_back_until_it_converges() {
    let slice = Cgroup::slice("converging.slice");
    slice.enable_all();
    let scope = slice.make("guest.scope");
    let guest = guest();
    scope.take(guest.pid());
    let stage = Stage::set_for(guest);
    let before = scope.state();

    stage.begin_with("throttled", unhurried(99)).await;
    let child = scope.child("ramferry-throttled");
    assert_eq!(child.read("cgroup.type"), "threaded");
    assert_eq!(scope.read("cgroup.type"), "domain threaded");
    assert_eq!(scope.read("cgroup.subtree_control"), "cpu");
    let (vcpus, all) = threads(&stage.guest);
    assert_eq!(child.threads(), vcpus);
    assert!(all.is_subset(&(&scope.threads() | &vcpus)), "the VMM's own threads stay: {all:?}");
    let left_millis = child.quota_millis();
    assert!(left_millis > 0 && left_millis <= 800, "of one vCPU: {left_millis}");
    until("a time for which the guest stands still", || child.cpu_stat("nr_throttled") > 0);

    let ended = stage.pair.source.wait_end("throttled").await;
    assert_eq!(ended.state(), Succeeded, "{:?}\n{}", ended.error, stage.pair.source.log());
    let progress = ended.progress.unwrap();
    eprintln!("throttled by {} %, {} rounds", progress.throttle_peak_percent, progress.round);
    assert_eq!(scope.state(), before);
    stage.assert_freed("throttled");
    assert_proves_itself(&stage.receiver);
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_in_a_scope_has_its_time_back_after_a_cancel_and_after_kill_9_of_the_agent() {
    let slice = Cgroup::slice("ending.slice");
    slice.enable_all();
    let scope = slice.make("guest.scope");
    let guest = guest();
    scope.take(guest.pid());
    let mut stage = Stage::set_for(guest);
    let before = scope.state();

    stage.begin_with("cancelled", endless()).await;
    cancel(&stage, "cancelled").await;
    assert_eq!(scope.state(), before);
    stage.assert_freed("cancelled");
    assert_runs_untraced(&stage.guest);
    renew(&mut stage);

    stage.begin_with("killed", endless()).await;
    assert_eq!(guards(&stage.pair.source).len(), 1);
    stage.pair.source.kill();
    until("the guard's work", || scope.state() == before);
    assert_eq!(homes(&stage.guest), stage.homes);
    assert_runs_untraced(&stage.guest);
    stage.pair.source.restart();
    assert_eq!(stage.pair.source.wait_end("killed").await.error.unwrap().reason, "AGENT_RESTARTED");
    stage.assert_freed("killed");
    stage.pair.destination.wait_end("killed").await;
    renew(&mut stage);

    // Neither is left to free it: the next agent does, before it serves anybody.
    stage.begin_with("both", endless()).await;
    for guard in guards(&stage.pair.source) {
        let guard = rustix::process::Pid::from_raw(guard.cast_signed()).unwrap();
        rustix::process::kill_process(guard, rustix::process::Signal::KILL).unwrap();
    }
    stage.pair.source.kill();
    assert!(is_throttled(&stage.guest, "both"));
    stage.pair.source.restart();
    assert_eq!(scope.state(), before);
    stage.pair.source.wait_end("both").await;
    stage.assert_freed("both");
    assert_runs_untraced(&stage.guest);
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_whose_cgroup_is_not_fit_is_left_alone_with_what_to_do_and_throttled_once_that_is_done() {
    let slice = Cgroup::slice("unfit.slice");
    let scope = slice.make("guest.scope");
    let guest = guest();
    scope.take(guest.pid());
    let mut stage = Stage::set_for(guest);

    refused(&mut stage, &scope, "without", "CPUWeight=100").await;
    slice.enable(&["cpu"]);
    let beside = scope.make("beside");
    let idler = Idler::start_in(&beside);
    refused(&mut stage, &scope, "beside", "give the VMM a cgroup of its own").await;
    drop((idler, beside));

    let before = scope.state();
    stage.begin_with("fit", endless()).await;
    cancel(&stage, "fit").await;
    assert_eq!(scope.state(), before);
    stage.assert_freed("fit");
    assert_runs_untraced(&stage.guest);
}

/// The guest is not throttled, for a reason that says `part`; and its cgroup is not changed.
async fn refused(stage: &mut Stage, scope: &Cgroup, id: &str, part: &str) {
    let before = scope.state();
    stage.pair.create(id, &stage.guest, &stage.receiver, endless()).await.unwrap();
    let seen = stage.pair.source.wait(id, |migration| !migration.trouble.is_empty()).await;
    assert!(seen.trouble.contains(part), "{} does not say {part}", seen.trouble);
    assert_eq!(scope.state(), before);
    cancel(stage, id).await;
    stage.assert_freed(id);
    assert_runs_untraced(&stage.guest);
    renew(stage);
}

/// As libvirt has it: the VMM's own threads in one threaded cgroup, each vCPU in another, which may have a quota.
#[tokio::test(flavor = "multi_thread")]
async fn vcpus_in_threaded_cgroups_are_held_back_there_within_the_quota_that_they_have() {
    let slice = Cgroup::slice("libvirt.slice");
    slice.enable_all();
    let scope = slice.make("guest.scope");
    scope.enable_all();
    let domain = scope.make("libvirt");
    let guest = guest();
    domain.take(guest.pid());
    let (emulator, vcpu) = (domain.make("emulator"), domain.make("vcpu0"));
    for part in [&emulator, &vcpu] {
        part.write("cgroup.type", "threaded");
    }
    domain.enable(&["cpu", "cpuset"]);
    let (vcpus, all) = threads(&guest);
    for thread in &all {
        let part = if vcpus.contains(thread) { &vcpu } else { &emulator };
        part.write("cgroup.threads", &thread.to_string());
    }
    vcpu.write("cpu.max", "80000 100000");
    let stage = Stage::set_for(guest);
    let before = (domain.state(), vcpu.state());

    stage.begin_with("threaded", endless()).await;
    let child = vcpu.child("ramferry-threaded");
    assert_eq!(child.read("cgroup.type"), "threaded");
    assert_eq!(child.threads(), vcpus);
    let left_millis = child.quota_millis();
    assert!(left_millis > 0 && left_millis <= 640, "of four fifths: {left_millis}");
    cancel(&stage, "threaded").await;
    assert_eq!((domain.state(), vcpu.state()), before);
    assert_eq!(vcpu.read("cpu.max"), "80000 100000");
    assert!(!child.is_there());
    stage.assert_freed("threaded");
    assert_runs_untraced(&stage.guest);
}

/// The root's children have the controller before, and keep it.
#[tokio::test(flavor = "multi_thread")]
async fn guests_in_the_root_are_held_back_beside_each_other_and_others_keep_the_controller() {
    let slice = Cgroup::slice("others.slice");
    slice.write("cpu.weight", "77");
    let root = Cgroup::root();
    let before = root.state();
    let stage = Stage::set_for(guest());
    stage.begin_with("first", endless()).await;
    let second = guest();
    let receiver = second.destination().start().unwrap();
    stage.pair.create("second", &second, &receiver, endless()).await.unwrap();
    let is_held = |migration: &v1::Migration| {
        migration.progress.as_ref().is_some_and(|progress| progress.throttle_percent > 0)
    };
    stage.pair.source.wait("second", is_held).await;
    assert!(root.child("ramferry-first").is_there() && root.child("ramferry-second").is_there());
    for id in ["first", "second"] {
        cancel(&stage, id).await;
        assert!(!root.child(&format!("ramferry-{id}")).is_there());
    }
    assert_eq!(root.state(), before);
    assert_eq!(slice.read("cpu.weight"), "77");
    stage.assert_freed("first");
    assert_runs_untraced(&stage.guest);
    assert_runs_untraced(&second);
}
