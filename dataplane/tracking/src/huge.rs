//! Whether the kernel may map a RAM file on tmpfs with huge pages of its own.
//!
//! Splitting a huge mapping of tmpfs leaves its page table empty, and what soft-dirty
//! bits told of it is forgotten: where that can happen, a page without an entry
//! must be taken for written.

use std::fs;
use std::path::Path;

use rustix::fs::MemfdFlags;

const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";

/// Whether files on `device`, as process `pid` has it mounted, may be mapped
/// with transparent huge pages. `true` where it cannot be told.
pub(crate) fn possible(pid: u32, device: u64) -> bool {
    if !Path::new(SETTINGS).exists() {
        return false;
    }
    let setting = |name: &str| fs::read_to_string(format!("{SETTINGS}/{name}")).ok();
    let shmem = setting("shmem_enabled");
    let Some(shmem) = shmem.as_deref().and_then(selected) else { return true };
    match shmem {
        "deny" => return false,
        "force" => return true,
        _ => {}
    }
    if is_internal_mount(device) {
        let sized = setting("hugepages-2048kB/shmem_enabled");
        let sized_never = match sized.as_deref() {
            None => true,
            Some(text) => matches!(selected(text), Some("never" | "inherit")),
        };
        return !(shmem == "never" && sized_never);
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    mounted_with_huge_pages(&mounts, device).unwrap_or(true)
}

/// The setting that a `[selected]` one among several is.
fn selected(text: &str) -> Option<&str> {
    text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

/// Whether `device` is where the kernel keeps memfds and shared anonymous memory.
fn is_internal_mount(device: u64) -> bool {
    rustix::fs::memfd_create("ramferry-which-mount", MemfdFlags::CLOEXEC)
        .and_then(rustix::fs::fstat)
        .is_ok_and(|stat| stat.st_dev == device)
}

/// What the line of `device` in a `mountinfo` says; `None` when it has none.
fn mounted_with_huge_pages(mountinfo: &str, device: u64) -> Option<bool> {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let line = mountinfo.lines().find(|line| line.split(' ').nth(2) == Some(&number))?;
    let (_, file_system) = line.split_once(" - ")?;
    let options = file_system.split(' ').next_back()?;
    Some(options.split(',').any(|option| option.starts_with("huge=") && option != "huge=never"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_options_are_found_by_device() {
        let mounts = "\
22 27 0:21 / /proc rw,relatime - proc proc rw\n\
30 24 0:25 / /dev/shm rw,nosuid shared:4 - tmpfs tmpfs rw,size=24684084k\n\
31 24 0:26 / /huge rw - tmpfs tmpfs rw,huge=within_size\n\
32 24 259:300 / /never rw master:2 - tmpfs tmpfs rw,huge=never\n";
        let on = |major, minor| mounted_with_huge_pages(mounts, rustix::fs::makedev(major, minor));
        assert_eq!(on(0, 25), Some(false));
        assert_eq!(on(0, 26), Some(true));
        assert_eq!(on(259, 300), Some(false));
        assert_eq!(on(0, 99), None);
        assert_eq!(selected("always inherit [within_size] never"), Some("within_size"));
        assert_eq!(selected("1"), None);
    }

    #[test]
    fn the_mount_of_memfds_is_recognised() {
        let memfd = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
        assert!(is_internal_mount(rustix::fs::fstat(memfd).unwrap().st_dev));
        assert!(!is_internal_mount(rustix::fs::stat("/proc").unwrap().st_dev));
    }
}
