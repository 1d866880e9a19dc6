//! What a process holds, and what a migration may leave of that: nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ramferry_lab::Qemu;

use super::cut::descriptors;
use crate::harness::Agent;

/// What ends a migration may still be under way for so long after it ended.
const GRACE: Duration = Duration::from_secs(10);

/// What a process holds of what a migration makes.
#[derive(Clone, Debug)]
pub(crate) struct Holdings {
    /// Threads, by name, those of the runtime left out: they come and go.
    threads: BTreeMap<String, usize>,
    /// Descriptors by kind, connections left out: callers' come and go.
    descriptors: BTreeMap<String, usize>,
    locked_kib: u64,
    /// Mappings of guests' RAM.
    guest_mappings: usize,
}

impl Holdings {
    pub(crate) fn of(pid: u32) -> Holdings {
        let proc = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let threads = threads_by_name(pid);
        let mut kinds = BTreeMap::new();
        for (_, target) in descriptors(pid) {
            let kind = match target.split_once(':') {
                Some(("socket", _)) => continue,
                Some(("pipe", _)) => "pipe".to_owned(),
                Some(_) => target,
                None if target.contains("ramferry-lab-") => "guest file".to_owned(),
                None => target,
            };
            *kinds.entry(kind).or_default() += 1;
        }
        let status = proc("status");
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        Holdings {
            threads,
            descriptors: kinds,
            locked_kib: locked.trim().trim_end_matches(" kB").parse().unwrap(),
            guest_mappings: proc("maps").lines().filter(|line| line.contains("ramferry-lab-")).count(),
        }
    }
}

fn threads_by_name(pid: u32) -> BTreeMap<String, usize> {
    let deadline = Instant::now() + GRACE;
    let main = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    loop {
        let mut threads = BTreeMap::new();
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map_while(Result::ok) {
            let Ok(name) = std::fs::read_to_string(task.path().join("comm")) else { continue };
            if !name.starts_with("tokio") {
                *threads.entry(name.trim().to_owned()).or_default() += 1;
            }
        }
        // One that was just made has the name of the first thread until it runs.
        if threads.get(main.trim()).is_none_or(|count| *count == 1) || Instant::now() > deadline {
            return threads;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether of each thing there are at most as many.
fn are_within(now: &BTreeMap<String, usize>, before: &BTreeMap<String, usize>) -> bool {
    now.iter().all(|(name, count)| before.get(name).is_some_and(|before| count <= before))
}

/// Waits until `agent` holds nothing that it did not hold `before`. It may hold less: it looks its host over now and then.
pub(crate) fn assert_holds_no_more(agent: &Agent, before: &Holdings) {
    let deadline = Instant::now() + GRACE;
    loop {
        let now = Holdings::of(agent.pid());
        if are_within(&now.threads, &before.threads)
            && are_within(&now.descriptors, &before.descriptors)
            && now.locked_kib <= before.locked_kib
            && now.guest_mappings <= before.guest_mappings
        {
            return;
        }
        assert!(Instant::now() < deadline, "before: {before:#?}\nnow: {now:#?}\n{}", agent.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// No socket of a migration is left in the agent's directory: only its own are.
pub(crate) fn assert_no_sockets_left(agent: &Agent) {
    let names = std::fs::read_dir(agent.run_dir()).unwrap().map_while(Result::ok);
    let names: Vec<_> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(names, [format!("shm-{}.sock", agent.pid())]);
}

/// Nothing is kept of a migration that came to post-copy.
pub(crate) fn assert_nothing_kept(agent: &Agent) {
    let kept = std::fs::read_dir(agent.directory().join("state/postcopy")).into_iter().flatten();
    let kept: Vec<_> = kept.map(|entry| entry.unwrap().file_name()).collect();
    assert!(kept.is_empty(), "{kept:?}");
}

/// The VMM is neither traced nor stopped, and holds no userfaultfd of ours.
pub(crate) fn assert_unharmed(guest: &Qemu) {
    let pid = guest.pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("TracerPid:\t0"), "{status}");
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map_while(Result::ok) {
        let Ok(status) = std::fs::read_to_string(task.path().join("status")) else { continue };
        let state = status.lines().find(|line| line.starts_with("State:")).unwrap();
        assert!(!state.contains("T (") && !state.contains("t ("), "{status}");
    }
    let left = descriptors(pid).into_iter().find(|(_, target)| target.contains("userfaultfd"));
    assert_eq!(left, None);
}
