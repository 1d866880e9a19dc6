//! A guest that is to be throttled, and what is seen of that in its cgroups.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ramferry_lab::{Fill, Qemu, Workload};
use ramferry_proto::v1;
use ramferry_proto::v1::FabricKind::Tcp;
use ramferry_proto::v1::MigrationState::Precopy;
use serde_json::json;

use crate::harness::{Agent, MIB, PATIENCE, Pair, boot, parameters, proof};

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
pub(crate) fn homes(guest: &Qemu) -> BTreeMap<u64, String> {
    let cpus = guest.qmp(&json!({"execute": "query-cpus-fast"})).unwrap();
    let threads = cpus.as_array().unwrap().iter().map(|cpu| cpu["thread-id"].as_u64().unwrap());
    let cgroups = |thread| std::fs::read_to_string(format!("/proc/{}/task/{thread}/cgroup", guest.pid()));
    threads.map(|thread| (thread, cgroups(thread).unwrap())).collect()
}

/// The quota of the cgroup that was made for migration `id`, with the file that it stands in.
pub(crate) fn quota(guest: &Qemu, id: &str) -> Option<(PathBuf, String)> {
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

pub(crate) fn is_throttled(guest: &Qemu, id: &str) -> bool {
    quota(guest, id).is_some_and(|(_, quota)| !quota.starts_with("max") && quota != "-1")
}

/// Whether this host has the cpu controller at all.
pub(crate) fn has_controller() -> bool {
    let v1 = std::fs::read_to_string("/proc/self/cgroup").unwrap().contains("cpu:");
    let v2 = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    v1 || v2.split_whitespace().any(|name| name == "cpu")
}

/// A guest, one that is to take it over, and where its vCPUs are.
pub(crate) struct Stage {
    pub(crate) pair: Pair,
    pub(crate) guest: Qemu,
    pub(crate) receiver: Qemu,
    pub(crate) homes: BTreeMap<u64, String>,
}

impl Stage {
    pub(crate) fn set() -> Stage {
        Stage::set_for(boot(proof(hot())))
    }

    pub(crate) fn set_for(guest: Qemu) -> Stage {
        let receiver = guest.destination().start().unwrap();
        Stage { pair: Pair::start(), homes: homes(&guest), guest, receiver }
    }

    /// Under way, with the guest throttled.
    pub(crate) async fn begin(&self, id: &str) {
        self.begin_with(id, slow(99)).await;
    }

    pub(crate) async fn begin_with(&self, id: &str, parameters: v1::MigrationParameters) {
        self.pair.create(id, &self.guest, &self.receiver, parameters).await.unwrap();
        let throttled = |migration: &v1::Migration| {
            migration.progress.as_ref().is_some_and(|progress| progress.throttle_percent > 0)
        };
        let seen = self.pair.source.wait(id, throttled).await;
        assert_eq!(seen.state(), Precopy);
        assert!(is_throttled(&self.guest, id), "{:?}", homes(&self.guest));
    }

    /// The guest is where it was before, and nothing is left.
    pub(crate) fn assert_freed(&self, id: &str) {
        assert_eq!(homes(&self.guest), self.homes);
        let kept = self.pair.source.directory().join("state/throttle").join(format!("{id}.json"));
        assert!(!kept.exists(), "{kept:?} is left");
        assert!(guards(&self.pair.source).is_empty());
    }
}

/// The guards that an agent has made.
pub(crate) fn guards(agent: &Agent) -> Vec<u32> {
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

pub(crate) fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}
