//! Probes that cannot be attached. What a kernel with kprobes does is seen in the lab's VM (`tests/probes`, `tests/lockdown`).

use std::path::Path;

use ramferry_lab::skipped;

use crate::limited::{Absent, Traveller, kernel, library, without, without_capabilities};

/// Whether probes on libibverbs can be attached by root here.
fn has_uprobes() -> bool {
    let has = Path::new("/sys/bus/event_source/devices/uprobe").exists();
    if !has {
        skipped("this kernel has no uprobes");
    }
    has
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_capabilities_no_probe_is_attached_and_a_guest_moves() {
    if !has_uprobes() {
        return;
    }
    let reason = "this process lacks CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN";
    let absent = Absent { probes: library(), reason, remedy: "give it CAP_SYS_ADMIN" };
    Traveller::boot().leaves(without_capabilities(), &[], &[absent]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_tracefs_every_probe_on_libibverbs_is_attached_and_a_guest_moves() {
    if !has_uprobes() {
        return;
    }
    Traveller::boot().leaves(without("/sys/kernel/tracing /sys/kernel/debug"), &library(), &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_sys_is_empty_no_probe_is_attached_and_a_guest_moves() {
    let sys = without("/sys/bus/event_source /sys/kernel/btf /sys/kernel/tracing /sys/kernel/debug");
    let remedy = "mount /sys here";
    let absent = [
        Absent { probes: library(), reason: "this kernel has no uprobes", remedy },
        Absent { probes: kernel(), reason: "this kernel has no kprobes", remedy },
    ];
    Traveller::boot().leaves(sys, &[], &absent).await;
}
