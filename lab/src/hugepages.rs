//! Huge pages, borrowed from the kernel for one test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

const COUNT: &str = "/proc/sys/vm/nr_hugepages";
const MIB: u64 = 1 << 20;

/// Huge pages of 2 MiB that were reserved, and where to make files of them.
/// Given back on drop.
#[derive(Debug)]
pub struct HugePages {
    pages: u64,
    mount: PathBuf,
    /// Mounted by us; unmounted before it is removed.
    mounted: Option<TempDir>,
}

impl HugePages {
    /// Reserves room for `bytes`. The error says why a test that needs it must be skipped.
    pub fn reserve(bytes: u64) -> Result<HugePages, String> {
        if meminfo("Hugepagesize") != Some(2048) {
            return Err("huge pages are not of 2 MiB here".to_owned());
        }
        let pages = bytes.div_ceil(2 * MIB);
        add_pages(pages)?;
        match mount() {
            Ok((mount, mounted)) => Ok(HugePages { pages, mount, mounted }),
            Err(reason) => {
                remove_pages(pages);
                Err(reason)
            }
        }
    }

    /// The hugetlbfs they are on, for [`Backing::HugeTlbfs`](crate::Backing::HugeTlbfs).
    pub fn mount(&self) -> &Path {
        &self.mount
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.mounted.is_some() {
            // Lazily: a QEMU that still exits may hold a file there.
            let _ = Command::new("umount").arg("-l").arg(&self.mount).status();
        }
        remove_pages(self.pages);
    }
}

/// Tests in other processes change the count too.
fn locked() -> Option<File> {
    let lock = File::create("/dev/shm/ramferry-lab-hugepages.lock").ok()?;
    lock.lock().ok()?;
    Some(lock)
}

fn add_pages(pages: u64) -> Result<(), String> {
    let _lock = locked();
    let free = || meminfo("HugePages_Free").unwrap_or(0);
    let (before, free_before) = (count(), free());
    fs::write(COUNT, (before + pages).to_string())
        .map_err(|error| format!("cannot write {COUNT}: {error}"))?;
    let gained = free().saturating_sub(free_before);
    if gained < pages {
        let _ = fs::write(COUNT, before.to_string());
        return Err(format!("the kernel gave {gained} of {pages} huge pages"));
    }
    Ok(())
}

fn remove_pages(pages: u64) {
    let _lock = locked();
    let _ = fs::write(COUNT, count().saturating_sub(pages).to_string());
}

fn count() -> u64 {
    fs::read_to_string(COUNT).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse().ok()
}

fn mount() -> Result<(PathBuf, Option<TempDir>), String> {
    let mounts = fs::read_to_string("/proc/mounts").map_err(|error| format!("/proc/mounts: {error}"))?;
    let found = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| {
        fields.len() > 3
            && fields[2] == "hugetlbfs"
            && fields[3].split(',').any(|option| option == "pagesize=2M")
    });
    if let Some(fields) = found {
        return Ok((PathBuf::from(fields[1]), None));
    }
    let directory = tempfile::tempdir().map_err(|error| format!("cannot make a directory: {error}"))?;
    let output = Command::new("mount")
        .args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"])
        .arg(directory.path())
        .output()
        .map_err(|error| format!("cannot run mount: {error}"))?;
    if !output.status.success() {
        return Err(format!("cannot mount hugetlbfs: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok((directory.path().to_owned(), Some(directory)))
}
