//! Small facts about other processes.
#![allow(unsafe_code, reason = "kcmp(2) has no safe binding")]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// What `/proc/PID/task/TID/status` says that matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadStatus {
    /// Whether the thread has ended and only waits to be reaped.
    pub(crate) ended: bool,
    /// Process that traces it; 0 for none.
    pub(crate) tracer: u32,
    /// 0: none, 1: strict, 2: filter.
    pub(crate) seccomp: u32,
    /// Whether the kernel runs it, for io_uring, vhost or KVM: it never comes to user mode.
    pub(crate) is_worker: bool,
}

/// `PF_IO_WORKER` and `PF_USER_WORKER` in the flags of `/proc/PID/stat`.
const WORKER_FLAGS: u64 = 0x10 | 0x4000;

/// Status of one thread of `pid`.
pub(crate) fn thread_status(pid: u32, tid: u32) -> io::Result<ThreadStatus> {
    let status = fs::read(format!("/proc/{pid}/task/{tid}/status"))?;
    let stat = fs::read(format!("/proc/{pid}/task/{tid}/stat"))?;
    let parsed = parse_status(&String::from_utf8_lossy(&status), &String::from_utf8_lossy(&stat));
    parsed.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_status(text: &str, stat: &str) -> Option<ThreadStatus> {
    // The name, in parentheses, may hold anything; flags are the seventh field after it.
    let flags = stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse::<u64>().ok()?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    Some(ThreadStatus {
        ended: field("State:")?.starts_with(['Z', 'X', 'x']),
        tracer: field("TracerPid:")?.parse().ok()?,
        // Not there on a kernel that has no seccomp.
        seccomp: field("Seccomp:").map_or(Some(0), |mode| mode.parse().ok())?,
        is_worker: flags & WORKER_FLAGS != 0,
    })
}

/// The process that thread `tid` belongs to.
pub(crate) fn process_of(tid: u32) -> io::Result<u32> {
    let text = fs::read(format!("/proc/{tid}/status"))?;
    let text = String::from_utf8_lossy(&text);
    let process = text.lines().find_map(|line| line.strip_prefix("Tgid:"));
    process.and_then(|pid| pid.trim().parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Threads of `pid`, that one first.
pub(crate) fn threads_of(pid: u32) -> io::Result<Vec<u32>> {
    let mut threads = numbered_entries(&format!("/proc/{pid}/task"))?;
    threads.sort_unstable_by_key(|tid| (*tid != pid, *tid));
    Ok(threads)
}

/// Every process that this one can see, itself excepted.
pub(crate) fn other_processes() -> io::Result<Vec<u32>> {
    let ours = std::process::id();
    let mut processes = numbered_entries("/proc")?;
    processes.retain(|pid| *pid != ours);
    processes.sort_unstable();
    Ok(processes)
}

fn numbered_entries(directory: &str) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory)? {
        if let Some(number) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

/// The name of process `pid`, for messages.
pub(crate) fn comm_of(pid: u32) -> String {
    fs::read(format!("/proc/{pid}/comm"))
        .map(|comm| String::from_utf8_lossy(comm.trim_ascii_end()).into_owned())
        .unwrap_or_else(|_| "?".to_owned())
}

/// Whether this process has the capability of that number.
pub(crate) fn have_capability(number: u32) -> bool {
    has_capability("self", number)
}

/// Whether process `pid` has the capability of that number, in whatever user namespace it is.
pub(crate) fn has_capability(pid: &str, number: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << number) != 0
}

/// Whether two processes are one address space, as a process and the child it
/// made with `vfork` are. `false` where the kernel cannot tell.
pub(crate) fn share_address_space(one: u32, other: u32) -> bool {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: kcmp takes five numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) == 0 }
}

/// Whether descriptor `theirs` of process `pid` is the open file that `ours` is; `None` where
/// the kernel cannot tell.
pub(crate) fn is_same_open_file(ours: BorrowedFd<'_>, pid: u32, theirs: u32) -> Option<bool> {
    const KCMP_FILE: libc::c_int = 0;
    let (us, ours) = (std::process::id(), ours.as_raw_fd());
    // SAFETY: kcmp takes five numbers and touches no memory of ours.
    match unsafe {
        libc::syscall(libc::SYS_kcmp, us, pid, KCMP_FILE, ours as libc::c_long, theirs as libc::c_long)
    } {
        -1 => None,
        order => Some(order == 0),
    }
}

/// Descriptors of process `pid` that are userfaultfds, by their numbers.
pub(crate) fn userfaultfds_of(pid: u32) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_one =
            fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]");
        let number = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        found.extend(number.filter(|_| is_one));
    }
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_of_a_traced_filtered_thread_is_understood() {
        let text =
            "Name:\tqemu\nState:\tt (tracing stop)\nTracerPid:\t77\nSeccomp:\t2\nSeccomp_filters:\t3\n";
        let stat = |flags| format!("9 (a) b)) S 1 2 3 0 -1 {flags} 0 0");
        let status = ThreadStatus { ended: false, tracer: 77, seccomp: 2, is_worker: false };
        assert_eq!(parse_status(text, &stat("4194304")), Some(status));
        let worker = ThreadStatus { is_worker: true, ..status };
        assert_eq!(parse_status(text, &stat("4210752")), Some(worker));
        assert_eq!(parse_status(text, "9 (a)"), None);
        let dead = "State:\tZ (zombie)\nTracerPid:\t0\n";
        let status = ThreadStatus { ended: true, tracer: 0, seccomp: 0, is_worker: false };
        assert_eq!(parse_status(dead, &stat("0")), Some(status));
        assert_eq!(parse_status("State:\tS\nTracerPid:\tx\n", &stat("0")), None);
    }

    #[test]
    fn we_are_not_among_the_other_processes() {
        let ours = std::process::id();
        let others = other_processes().unwrap();
        assert!(!others.contains(&ours) && others.contains(&1));
        assert_eq!(threads_of(ours).unwrap()[0], ours);
        assert!(!share_address_space(ours, 1));
        assert!(!comm_of(ours).is_empty());
    }
}
