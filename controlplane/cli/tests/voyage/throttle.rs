//! A guest that writes faster than it may be copied is throttled until it converges, and has its time back whatever comes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ramferry_lab::{Fill, Qemu, Workload, skipped};
use ramferry_proto::v1;
use ramferry_proto::v1::FabricKind::Tcp;
use ramferry_proto::v1::MigrationState::{Cancelled, Failed, Precopy, Succeeded};
use serde_json::json;

use crate::harness::{
    Agent, MIB, PATIENCE, Pair, assert_proves_itself, assert_runs_untraced, boot, parameters, proof,
};

/// Rewritten without pause, and on a busy machine, too, faster than [`slow`] lets it be copied.
pub(crate) fn hot() -> Workload {
    Workload { mib: 16, touch_mib: 0, rate_mib: 0, fill: Fill::Stamp, ..Workload::default() }
}

pub(crate) fn slow(throttle_max_percent: u32) -> v1::MigrationParameters {
    v1::MigrationParameters {
        bandwidth_limit_bits_per_second: 8 * 15 * MIB,
        timeout_action: v1::TimeoutAction::Cancel.into(),
        max_downtime: Some(Duration::from_millis(200).try_into().unwrap()),
        throttle_max_percent,
        ..parameters(Tcp)
    }
}

/// The threads of the guest's vCPUs, and the cgroups that each is in.
fn homes(guest: &Qemu) -> BTreeMap<u64, String> {
    let cpus = guest.qmp(&json!({"execute": "query-cpus-fast"})).unwrap();
    let threads = cpus.as_array().unwrap().iter().map(|cpu| cpu["thread-id"].as_u64().unwrap());
    let cgroups = |thread| std::fs::read_to_string(format!("/proc/{}/task/{thread}/cgroup", guest.pid()));
    threads.map(|thread| (thread, cgroups(thread).unwrap())).collect()
}

/// The quota of the cgroup that was made for migration `id`, with the file that it stands in.
fn quota(guest: &Qemu, id: &str) -> Option<(PathBuf, String)> {
    let name = format!("/ramferry-{id}");
    let threads = homes(guest);
    let line = threads.values().flat_map(|text| text.lines()).find(|line| line.ends_with(&name))?;
    let [_, controllers, path] = line.splitn(3, ':').collect::<Vec<_>>()[..] else { panic!("{line}") };
    let file = if controllers.is_empty() { "cpu.max" } else { "cpu.cfs_quota_us" };
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|mount| {
        let options = mount[3].split(',').collect::<Vec<_>>();
        if controllers.is_empty() {
            mount[2] == "cgroup2"
        } else {
            mount[2] == "cgroup" && options.contains(&"cpu")
        }
    });
    let path = Path::new(mount.unwrap()[1]).join(path.trim_start_matches('/')).join(file);
    let quota = std::fs::read_to_string(&path).unwrap();
    Some((path, quota.trim().to_owned()))
}

fn is_throttled(guest: &Qemu, id: &str) -> bool {
    quota(guest, id).is_some_and(|(_, quota)| !quota.starts_with("max") && quota != "-1")
}

/// Whether this host has the cpu controller at all.
pub(crate) fn has_controller() -> bool {
    let v1 = std::fs::read_to_string("/proc/self/cgroup").unwrap().contains("cpu:");
    let v2 = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    v1 || v2.split_whitespace().any(|name| name == "cpu")
}

/// A guest, one that is to take it over, and where its vCPUs are.
struct Stage {
    pair: Pair,
    guest: Qemu,
    receiver: Qemu,
    homes: BTreeMap<u64, String>,
}

impl Stage {
    fn set() -> Stage {
        let guest = boot(proof(hot()));
        let receiver = guest.destination().start().unwrap();
        Stage { pair: Pair::start(), homes: homes(&guest), guest, receiver }
    }

    /// Under way, with the guest throttled.
    async fn begin(&self, id: &str) {
        self.pair.create(id, &self.guest, &self.receiver, slow(99)).await.unwrap();
        let throttled = |migration: &v1::Migration| {
            migration.progress.as_ref().is_some_and(|progress| progress.throttle_percent > 0)
        };
        let seen = self.pair.source.wait(id, throttled).await;
        assert_eq!(seen.state(), Precopy);
        assert!(is_throttled(&self.guest, id), "{:?}", homes(&self.guest));
    }

    /// The guest is where it was before, and nothing is left.
    fn assert_freed(&self, id: &str) {
        assert_eq!(homes(&self.guest), self.homes);
        let kept = self.pair.source.directory().join("state/throttle").join(format!("{id}.json"));
        assert!(!kept.exists(), "{kept:?} is left");
        assert!(guards(&self.pair.source).is_empty());
    }
}

/// The guards that an agent has made.
fn guards(agent: &Agent) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", agent.pid())).into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let children: Vec<u32> = children
        .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    let is_guard = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.contains("throttle-guard"))
    };
    children.into_iter().filter(is_guard).collect()
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_that_does_not_converge_does_so_once_it_is_throttled() {
    if !has_controller() {
        return skipped("no cgroup has the cpu controller here");
    }
    let stage = Stage::set();
    let ended = stage.pair.run("without", &stage.guest, &stage.receiver, slow(0)).await;
    assert_eq!(ended.error.as_ref().unwrap().reason, "NOT_CONVERGING", "{ended:?}");
    assert_eq!(ended.progress.unwrap().throttle_peak_percent, 0);

    stage.begin("throttled").await;
    let exposed = stage.pair.source.scrape();
    let gauge = "ramferry_migration_throttle_ratio{migration=\"throttled\",role=\"source\"} 0.";
    assert!(exposed.contains(gauge), "{exposed}");
    let ended = stage.pair.source.wait_end("throttled").await;
    assert_eq!(ended.state(), Succeeded, "{:?}\n{}", ended.error, stage.pair.source.log());
    assert_eq!(stage.guest.status().unwrap(), "postmigrate");
    let progress = ended.progress.unwrap();
    assert_eq!(progress.throttle_percent, 0);
    assert!(progress.throttle_peak_percent >= 20);
    eprintln!(
        "throttled by {} %, {} rounds, downtime {:?}",
        progress.throttle_peak_percent, progress.round, progress.downtime
    );
    stage.assert_freed("throttled");
    assert_proves_itself(&stage.receiver);
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_has_its_time_back_after_a_cancel_a_change_and_a_failure() {
    if !has_controller() {
        return skipped("no cgroup has the cpu controller here");
    }
    let stage = Stage::set();
    stage.begin("cancelled").await;
    let mut client = stage.pair.source.client().await;
    client.cancel_migration(v1::CancelMigrationRequest { id: "cancelled".into() }).await.unwrap();
    assert_eq!(stage.pair.source.wait_end("cancelled").await.state(), Cancelled);
    stage.assert_freed("cancelled");
    assert_runs_untraced(&stage.guest);

    stage.begin("failing").await;
    let request = v1::UpdateMigrationParametersRequest {
        id: "failing".into(),
        parameters: Some(v1::MigrationParameters::default()),
        update_mask: Some(prost_types::FieldMask { paths: vec!["throttle_max_percent".into()] }),
    };
    client.update_migration_parameters(request).await.unwrap();
    until("its quota's end", || !is_throttled(&stage.guest, "failing"));
    stage.receiver.kill().unwrap();
    assert_eq!(stage.pair.source.wait_end("failing").await.state(), Failed);
    stage.assert_freed("failing");
    assert_runs_untraced(&stage.guest);
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_has_its_time_back_after_kill_9_of_the_agent_at_once_or_at_its_restart() {
    if !has_controller() {
        return skipped("no cgroup has the cpu controller here");
    }
    let mut stage = Stage::set();
    stage.begin("first").await;
    assert_eq!(guards(&stage.pair.source).len(), 1);
    stage.pair.source.kill();
    until("the guard's work", || homes(&stage.guest) == stage.homes);
    assert_runs_untraced(&stage.guest);
    stage.pair.source.restart();
    assert_eq!(stage.pair.source.wait_end("first").await.error.unwrap().reason, "AGENT_RESTARTED");
    stage.assert_freed("first");
    stage.pair.destination.wait_end("first").await;

    stage.begin("second").await;
    for guard in guards(&stage.pair.source) {
        let guard = rustix::process::Pid::from_raw(guard.try_into().unwrap()).unwrap();
        rustix::process::kill_process(guard, rustix::process::Signal::KILL).unwrap();
    }
    stage.pair.source.kill();
    assert!(is_throttled(&stage.guest, "second"), "nobody is left to free it");
    stage.pair.source.restart();
    assert_eq!(homes(&stage.guest), stage.homes, "before the agent serves anybody");
    stage.pair.source.wait_end("second").await;
    stage.assert_freed("second");
    assert_runs_untraced(&stage.guest);
}
