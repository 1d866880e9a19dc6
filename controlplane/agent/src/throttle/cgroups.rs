//! Processor time taken from threads: a child of the cgroup that they are in, with a quota, for as long as it is wanted.
//!
//! Only vCPU threads are moved: the VMM's own, which pauses the guest and sends its device state, are never held back,
//! and memory, devices and whatever else the VMM's cgroup accounts for stay there. On cgroup v1 a thread may be in
//! another cgroup of the cpu controller than its process. On v2 it may where the child is threaded, which turns the
//! VMM's cgroup into a threaded domain until the child is removed again.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ramferry_engine::Percent;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Of a child's name, before the migration's id.
const PREFIX: &str = "ramferry-";
/// How long vCPUs stand still at a time: the shorter, the sooner they come to their pause.
const PERIOD_US: u64 = 10_000;
/// The kernel's least quota and longest period.
const LEAST_QUOTA_US: u64 = 1_000;
const LONGEST_PERIOD_US: u64 = 1_000_000;
/// Threads that end are counted for a moment longer.
const REMOVALS: u32 = 50;
const REMOVAL_INTERVAL: Duration = Duration::from_millis(10);

/// What is asked of the kernel: its files, and a stand-in for them in tests.
pub(crate) trait Files {
    fn read(&self, path: &Path) -> io::Result<String>;
    /// One write, into a file that is there.
    fn write(&self, path: &Path, text: &str) -> io::Result<()>;
    fn make(&self, directory: &Path) -> io::Result<()>;
    fn remove(&self, directory: &Path) -> io::Result<()>;
    fn names(&self, directory: &Path) -> io::Result<Vec<String>>;
}

/// The kernel's own.
pub(crate) struct Kernel;

impl Files for Kernel {
    fn read(&self, path: &Path) -> io::Result<String> {
        fs::read_to_string(path)
    }

    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
    }

    fn make(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir(directory)
    }

    fn remove(&self, directory: &Path) -> io::Result<()> {
        fs::remove_dir(directory)
    }

    fn names(&self, directory: &Path) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(directory)?.flatten();
        Ok(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    }
}

/// Why the guest cannot be throttled.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// There is no such controller to be had.
    #[error(
        "the cpu controller is not to be had for the guest's vCPUs ({path}); mount it (cgroup v1), or enable it above \
         their cgroup (v2: systemctl set-property --runtime UNIT CPUWeight=100 of the VMM's unit, or echo +cpu > \
         cgroup.subtree_control of its parent)"
    )]
    NoController {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The agent sees cgroups through a namespace or a mount that leaves the guest's out.
    #[error(
        "the guest's cgroup {path} is not below what the agent has mounted; run the agent in the host's cgroup namespace"
    )]
    OutOfSight {
        /// The cgroup, as the kernel names it.
        path: PathBuf,
    },
    /// The VMM's cgroup can have no child for some of its threads.
    #[error(
        "the guest's cgroup {home} takes no child for its vCPUs: another controller is enabled for its children, or they \
         hold processes; give the VMM a cgroup of its own"
    )]
    NoChild {
        /// The cgroup.
        home: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of a cgroup refused what it was asked.
    #[error(
        "cannot {what} {path}; the agent has to be root, and cgroups writable (systemd: ProtectControlGroups=no, and \
         ReadWritePaths=/sys/fs/cgroup where /sys is read-only)"
    )]
    File {
        /// What was to be done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A real-time thread, or a cpuset without processors.
    #[error(
        "vCPU thread {thread} cannot be moved to {path}: it may have a real-time policy, or no processor there"
    )]
    Thread {
        /// The thread.
        thread: u32,
        /// The cgroup.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Version {
    V1,
    V2,
}

impl Version {
    fn threads(self) -> &'static str {
        match self {
            Self::V1 => "tasks",
            Self::V2 => "cgroup.threads",
        }
    }
}

/// One cgroup that vCPU threads are in, and the child that is made there to hold them back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hold {
    version: Version,
    home: PathBuf,
    child: PathBuf,
    /// Thousandths of a processor that the threads can have otherwise.
    capacity_millis: u64,
    /// Whether children of `home` have the cpu controller for our sake only.
    enables_cpu: bool,
    threads: Vec<u32>,
}

/// What it takes to hold these threads of `pid` back, for the migration `id`, while the agent has the `others`. Changes
/// nothing.
pub(crate) fn plan(
    files: &dyn Files,
    pid: u32,
    threads: &[u32],
    id: &str,
    others: &[Hold],
) -> Result<Vec<Hold>, CgroupError> {
    let mountinfo = PathBuf::from("/proc/self/mountinfo");
    let mounts = files.read(&mountinfo).map_err(|source| file("read", &mountinfo, source))?;
    let mut homes: BTreeMap<(Version, PathBuf), (PathBuf, Vec<u32>)> = BTreeMap::new();
    for thread in threads {
        let path = PathBuf::from(format!("/proc/{pid}/task/{thread}/cgroup"));
        let text = files.read(&path).map_err(|source| file("read", &path, source))?;
        let (version, home, mount) = home_of(&text, &mounts).map_err(|error| match error {
            CgroupError::NoController { .. } => CgroupError::NoController { path },
            error => error,
        })?;
        homes.entry((version, home)).or_insert((mount, Vec::new())).1.push(*thread);
    }
    let online = online_processors(files);
    let hold = |((version, home), (mount, threads)): ((Version, PathBuf), (PathBuf, Vec<u32>))| {
        let mut enables_cpu = false;
        if version == Version::V2 {
            if !has_cpu(files, &home.join("cgroup.controllers")) {
                return Err(CgroupError::NoController { path: home });
            }
            let is_for_us = others.iter().any(|other| other.home == home && other.enables_cpu);
            enables_cpu = is_for_us || !has_cpu(files, &home.join("cgroup.subtree_control"));
        }
        let most = (threads.len() as u64).min(online).saturating_mul(1000);
        let capacity_millis = most.min(quota_above(files, version, &home, &mount)).max(1);
        let child = home.join(format!("{PREFIX}{id}"));
        Ok(Hold { version, home, child, capacity_millis, enables_cpu, threads })
    };
    homes.into_iter().map(hold).collect()
}

impl Hold {
    /// Makes the child, takes `percent` of what the threads could have, and moves them there.
    pub(crate) fn begin(&self, files: &dyn Files, percent: Percent) -> Result<(), CgroupError> {
        match files.make(&self.child) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(file("make", &self.child, error));
            }
            _ => {}
        }
        if self.version == Version::V2 {
            let no_child = |source| CgroupError::NoChild { home: self.home.clone(), source };
            files.write(&self.child.join("cgroup.type"), "threaded").map_err(no_child)?;
            if self.enables_cpu {
                files.write(&self.home.join("cgroup.subtree_control"), "+cpu").map_err(no_child)?;
            }
        }
        self.set(files, percent)?;
        let list = self.child.join(self.version.threads());
        for &thread in &self.threads {
            match files.write(&list, &thread.to_string()) {
                Err(error) if !has_ended(&error) => {
                    return Err(CgroupError::Thread { thread, path: self.child.clone(), source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes `percent` from now on; none for 0.
    pub(crate) fn set(&self, files: &dyn Files, percent: Percent) -> Result<(), CgroupError> {
        let write = |name: &str, text: &str| {
            let path = self.child.join(name);
            files.write(&path, text).map_err(|source| file("write", &path, source))
        };
        let quota = (percent > Percent(0)).then(|| quota(self.capacity_millis, percent));
        match (self.version, quota) {
            (Version::V1, None) => write("cpu.cfs_quota_us", "-1"),
            (Version::V1, Some((quota_us, period_us))) => {
                // In between the two may be more than the cgroup above allows.
                write("cpu.cfs_quota_us", "-1")?;
                write("cpu.cfs_period_us", &period_us.to_string())?;
                write("cpu.cfs_quota_us", &quota_us.to_string())
            }
            (Version::V2, None) => write("cpu.max", "max"),
            (Version::V2, Some((quota_us, period_us))) => {
                write("cpu.max", &format!("{quota_us} {period_us}"))
            }
        }
    }

    /// Puts everything back. Idempotent, and right beside another that does the same.
    pub(crate) fn undo(&self, files: &dyn Files) -> Result<(), CgroupError> {
        // It frees the threads at once; they are moved all the same where it fails.
        let _ = self.set(files, Percent(0));
        for left in (0..REMOVALS).rev() {
            // One that was never made, where cgroups are read-only, could not be removed either.
            let Some(is_empty) = self.move_home(files)? else { break };
            match files.remove(&self.child) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) if is_empty && left == 0 => return Err(file("remove", &self.child, error)),
                Err(_) => std::thread::sleep(REMOVAL_INTERVAL),
            }
        }
        let path = self.home.join("cgroup.subtree_control");
        if self.enables_cpu && has_cpu(files, &path) && !has_ours(files, &self.home) {
            match files.write(&path, "-cpu") {
                // The cgroup is gone; or others have come to need the controller below it.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy) => {}
                result => result.map_err(|source| file("write", &path, source))?,
            }
        }
        Ok(())
    }

    /// Moves the child's threads home; whether there was none, if there is a child.
    fn move_home(&self, files: &dyn Files) -> Result<Option<bool>, CgroupError> {
        let list = self.child.join(self.version.threads());
        let threads = match files.read(&list) {
            Ok(threads) => threads,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(file("read", &list, error)),
        };
        let home = self.home.join(self.version.threads());
        for thread in threads.split_whitespace() {
            match files.write(&home, thread) {
                Err(error) if !has_ended(&error) => return Err(file("write", &home, error)),
                _ => {}
            }
        }
        Ok(Some(threads.trim().is_empty()))
    }
}

/// Quota and period that leave threads which can have so much `100 - percent` of it.
fn quota(capacity_millis: u64, percent: Percent) -> (u64, u64) {
    let left = 100 - u64::from(percent.0.min(99));
    let quota_us = capacity_millis.saturating_mul(PERIOD_US / 1000).saturating_mul(left) / 100;
    if quota_us >= LEAST_QUOTA_US {
        return (quota_us, PERIOD_US);
    }
    (LEAST_QUOTA_US, (PERIOD_US * LEAST_QUOTA_US / quota_us.max(1)).min(LONGEST_PERIOD_US))
}

/// The cgroup that decides on a thread's processor time: its version, its directory and that of its mount.
fn home_of(text: &str, mounts: &str) -> Result<(Version, PathBuf, PathBuf), CgroupError> {
    let lines = || text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let v1 = lines().find(|(controllers, _)| controllers.split(',').any(|name| name == "cpu"));
    let found = match v1 {
        Some((_, path)) => Some((Version::V1, path)),
        None => lines().find(|(controllers, _)| controllers.is_empty()).map(|(_, path)| (Version::V2, path)),
    };
    let no_controller = || CgroupError::NoController { path: PathBuf::new() };
    let (version, path) = found.ok_or_else(no_controller)?;
    let path = Path::new(path);
    let mut places = mounts_of(version, mounts).peekable();
    places.peek().ok_or_else(no_controller)?;
    let in_sight = |(root, mount): (PathBuf, PathBuf)| {
        let below = path.strip_prefix(&root).ok()?;
        let is_above = below.components().any(|part| part == std::path::Component::ParentDir);
        (!is_above).then(|| (version, mount.join(below), mount.clone()))
    };
    places.find_map(in_sight).ok_or_else(|| CgroupError::OutOfSight { path: path.to_owned() })
}

/// Roots and places of the mounts that have the cpu controller, out of a `mountinfo`: a part of the tree may be mounted
/// elsewhere, too.
fn mounts_of(version: Version, mounts: &str) -> impl Iterator<Item = (PathBuf, PathBuf)> {
    mounts.lines().filter_map(move |line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let place = (PathBuf::from(mount.next()?), PathBuf::from(mount.next()?));
        let mut kind = kind.split(' ');
        let is_it = match (version, kind.next()?) {
            (Version::V1, "cgroup") => kind.nth(1)?.split(',').any(|option| option == "cpu"),
            (Version::V2, "cgroup2") => true,
            _ => false,
        };
        is_it.then_some(place)
    })
}

/// The least quota of `home` and the cgroups above it, in thousandths of a processor.
fn quota_above(files: &dyn Files, version: Version, home: &Path, mount: &Path) -> u64 {
    let read = |path: PathBuf| files.read(&path).ok();
    let quota_of = |cgroup: &Path| {
        let text = match version {
            Version::V1 => {
                let quota = read(cgroup.join("cpu.cfs_quota_us"))?;
                format!("{} {}", quota.trim(), read(cgroup.join("cpu.cfs_period_us"))?)
            }
            Version::V2 => read(cgroup.join("cpu.max"))?,
        };
        let (quota, period) = text.trim().split_once(' ')?;
        // No quota is "max", or -1.
        let (quota, period) = (quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?);
        quota.saturating_mul(1000).checked_div(period)
    };
    let above = home.ancestors().take_while(|cgroup| cgroup.starts_with(mount));
    above.filter_map(quota_of).min().unwrap_or(u64::MAX)
}

/// Whether a list of controllers has this one.
fn has_cpu(files: &dyn Files, list: &Path) -> bool {
    let listed = files.read(list).unwrap_or_default();
    listed.split_whitespace().any(|controller| controller == "cpu")
}

/// Whether `home` has a child that some agent made to throttle a guest.
fn has_ours(files: &dyn Files, home: &Path) -> bool {
    files.names(home).is_ok_and(|names| names.iter().any(|name| name.starts_with(PREFIX)))
}

/// Where that is not known, no bound.
fn online_processors(files: &dyn Files) -> u64 {
    let Ok(list) = files.read(Path::new("/sys/devices/system/cpu/online")) else { return u64::MAX };
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<u64>().ok()?.checked_sub(first.parse().ok()?)?.saturating_add(1))
    };
    list.trim().split(',').map(count).sum::<Option<u64>>().filter(|count| *count > 0).unwrap_or(u64::MAX)
}

fn has_ended(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
}

fn file(what: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::File { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;
