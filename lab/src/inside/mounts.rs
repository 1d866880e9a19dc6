//! The file systems of a running machine.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind};

use crate::vm::job::OUT_TAG;

/// Kind, where, options.
const MOUNTS: [(&str, &str, &str); 8] = [
    ("devpts", "/dev/pts", "ptmxmode=666,mode=620"),
    ("tmpfs", "/dev/shm", "size=100%,mode=1777"),
    ("hugetlbfs", "/dev/hugepages", "pagesize=2M"),
    ("mqueue", "/dev/mqueue", ""),
    ("debugfs", "/sys/kernel/debug", ""),
    ("tracefs", "/sys/kernel/tracing", ""),
    ("bpf", "/sys/fs/bpf", ""),
    ("cgroup2", "/sys/fs/cgroup", ""),
];
/// What programs expect in `/dev` beside devices.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];
/// As much as a message may hold.
const OUT_OPTIONS: &str = "trans=virtio,version=9p2000.L,msize=512000,cache=mmap";

/// Mounts what a machine has mounted, and `modules` where the kernel looks for modules.
pub(super) fn make(modules: &Path) -> Result<()> {
    let place = Path::new("/lib/modules");
    fs::create_dir_all(place).with_context(|| format!("cannot make {}", place.display()))?;
    mount_bind(modules, place).context("the kernel's modules cannot be mounted")?;
    for (kind, place, options) in MOUNTS {
        // Those of the kernel's own are there, or the kernel has not that feature.
        let _ = fs::create_dir(place);
        match mount_one(kind, kind, Path::new(place), options) {
            Err(error) if is_absent(&error) => {}
            result => result?,
        }
    }
    for (target, link) in LINKS {
        // The kernel may have made it.
        let _ = symlink(target, link);
    }
    Ok(())
}

/// Mounts the directory of the host's that may be written to.
pub(super) fn make_out(place: &Path) -> Result<()> {
    fs::create_dir_all(place).with_context(|| format!("cannot make {}", place.display()))?;
    mount_one("9p", OUT_TAG, place, OUT_OPTIONS)
}

fn mount_one(kind: &str, source: &str, place: &Path, options: &str) -> Result<()> {
    let options = CString::new(options).expect("options of our own");
    mount(source, place, kind, MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("{kind} cannot be mounted at {}", place.display()))
}

fn is_absent(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<Errno>(), Some(&(Errno::NODEV | Errno::NOENT)))
}
