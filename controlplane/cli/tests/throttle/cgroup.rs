//! Cgroups of version 2, made as a service manager makes them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Once;
use std::time::{Duration, Instant};

const ROOT: &str = "/sys/fs/cgroup";
/// Processes that have ended are counted for a moment longer.
const EMPTIED: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);

/// A cgroup; removed when it is dropped, unless it is another's.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    is_ours: bool,
}

/// What throttling changes of the cgroup that it makes a child in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct State {
    kind: String,
    /// Controllers that its children have.
    below: String,
    children: BTreeSet<String>,
}

/// The machine has had a quota, and keeps it.
static QUOTA: Once = Once::new();

impl Cgroup {
    pub(crate) fn root() -> Cgroup {
        let root = Cgroup { path: ROOT.into(), is_ours: false };
        let release = std::env::var("RAMFERRY_LAB");
        assert!(release.is_ok(), "this runs in the lab's VM only: make lab-test");
        assert!(root.read("cgroup.controllers").contains("cpu"), "{release:?} has no cpu controller");
        QUOTA.call_once(|| root.keep_a_quota());
        root
    }

    /// A machine's first quota has its kernel patch its own code, and the end of its last one patch it back. An emulated
    /// processor may still run what was there in between, and the kernel then panics (docs/lab.md, "Traps"): so it is done
    /// once, before there are guests.
    fn keep_a_quota(&self) {
        self.enable(&["cpu"]);
        let kept = self.child("quota.slice");
        std::fs::create_dir_all(&kept.path).unwrap();
        kept.write("cpu.max", "50000 100000");
    }

    /// In the root, with every controller that there is.
    pub(crate) fn slice(name: &str) -> Cgroup {
        let root = Cgroup::root();
        root.enable_all();
        root.make(name)
    }

    pub(crate) fn make(&self, name: &str) -> Cgroup {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path).unwrap();
        Cgroup { path, is_ours: true }
    }

    /// One that somebody else made.
    pub(crate) fn child(&self, name: &str) -> Cgroup {
        Cgroup { path: self.path.join(name), is_ours: false }
    }

    /// Lets its children have every controller that it has.
    pub(crate) fn enable_all(&self) {
        let all = self.read("cgroup.controllers");
        self.enable(&all.split(' ').collect::<Vec<_>>());
    }

    pub(crate) fn enable(&self, controllers: &[&str]) {
        let enabled: Vec<_> = controllers.iter().map(|controller| format!("+{controller}")).collect();
        self.write("cgroup.subtree_control", &enabled.join(" "));
    }

    pub(crate) fn read(&self, name: &str) -> String {
        let path = self.path.join(name);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        text.trim().to_owned()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path.join(name);
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{text} into {path:?}: {error}"));
    }

    pub(crate) fn take(&self, process: u32) {
        self.write("cgroup.procs", &process.to_string());
    }

    pub(crate) fn threads(&self) -> BTreeSet<u64> {
        self.read("cgroup.threads").lines().map(|thread| thread.parse().unwrap()).collect()
    }

    pub(crate) fn is_there(&self) -> bool {
        self.path.exists()
    }

    /// A line of its `cpu.stat`.
    pub(crate) fn cpu_stat(&self, name: &str) -> u64 {
        let text = self.read("cpu.stat");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    /// Thousandths of a processor that its quota leaves.
    pub(crate) fn quota_millis(&self) -> u64 {
        let text = self.read("cpu.max");
        let (quota, period) = text.split_once(' ').unwrap();
        quota.parse::<u64>().unwrap() * 1000 / period.parse::<u64>().unwrap()
    }

    pub(crate) fn state(&self) -> State {
        let entries = std::fs::read_dir(&self.path).unwrap().map(Result::unwrap);
        let directories = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        State {
            // The root has none.
            kind: if self.path == Path::new(ROOT) { String::new() } else { self.read("cgroup.type") },
            below: self.read("cgroup.subtree_control"),
            children: directories.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect(),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + EMPTIED;
        while self.is_ours
            && let Err(error) = std::fs::remove_dir(&self.path)
        {
            if Instant::now() > deadline {
                assert!(std::thread::panicking(), "{:?} cannot be removed: {error}", self.path);
                return;
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// A process that does nothing, in a cgroup; killed and reaped when it is dropped.
pub(crate) struct Idler(Child);

impl Idler {
    pub(crate) fn start_in(cgroup: &Cgroup) -> Idler {
        let idler = Idler(std::process::Command::new("sleep").arg("infinity").spawn().unwrap());
        cgroup.take(idler.0.id());
        idler
    }
}

impl Drop for Idler {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
