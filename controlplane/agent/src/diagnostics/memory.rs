//! Memory that may be locked, files that may be open, huge pages, and what the control group allows.

use std::path::{Path, PathBuf};

use rustix::process::Resource;

use super::host::Host;
use super::kernel::Capabilities;
use super::verdict::{Verdict, bytes};

/// Largest window that is registered at once.
const WINDOW_BYTES: u64 = 64 << 20;
/// A budget of less makes windows of a few pages.
const LEAST_BUDGET_BYTES: u64 = 4 << 20;
/// Descriptors that an agent with its default of migrations stays below.
const OPEN_FILES: u64 = 1024;

/// What may be locked, and is.
#[derive(Clone, Debug)]
pub(super) struct Memlock {
    /// `None` without a limit.
    pub(super) limit_bytes: Option<u64>,
    /// With CAP_IPC_LOCK the limit does not hold.
    pub(super) is_exempt: bool,
    pub(super) pinned_bytes: Option<u64>,
    pub(super) memory_bytes: Option<u64>,
    /// Why nothing here pins memory; none where something may.
    pub(super) nothing_pins: Option<&'static str>,
}

impl Memlock {
    pub(super) fn read(host: &Host, capabilities: &Capabilities, nothing_pins: Option<&'static str>) -> Self {
        Self {
            limit_bytes: rustix::process::getrlimit(Resource::Memlock).current,
            is_exempt: capabilities.has("CAP_IPC_LOCK"),
            pinned_bytes: host.kib_field("/proc/self/status", "VmPin"),
            memory_bytes: host.kib_field("/proc/meminfo", "MemTotal"),
            nothing_pins,
        }
    }

    pub(super) fn judge(&self) -> Verdict {
        const REMEDY: &str = "set LimitMEMLOCK=infinity in the agent's unit (in a shell: ulimit -l unlimited) and \
                              restart it";
        let pinned = self.pinned_bytes.unwrap_or(0);
        let Some(limit) = self.limit_bytes else {
            return Verdict::ok(format!("RLIMIT_MEMLOCK is unlimited; {} pinned", bytes(pinned)));
        };
        let read = format!("RLIMIT_MEMLOCK is {} ({limit} bytes); {} pinned", bytes(limit), bytes(pinned));
        if self.is_exempt {
            return Verdict::ok(format!("{read}; the limit does not hold: CAP_IPC_LOCK"));
        }
        if let Some(why) = self.nothing_pins {
            return Verdict::ok(format!("{read}; {why}, and shm and tcp pin nothing"));
        }
        let left = limit.saturating_sub(pinned);
        if left < WINDOW_BYTES {
            let evidence =
                format!("{read}: {} left, less than one window of {}", bytes(left), bytes(WINDOW_BYTES));
            let meanwhile = if left < LEAST_BUDGET_BYTES {
                "migrate with --fabric tcp".to_owned()
            } else {
                format!("migrate with --fabric tcp, or with a --pin-budget below {}", bytes(left))
            };
            let remedy = format!("{REMEDY}; until then {meanwhile}");
            return Verdict::fail(evidence, remedy);
        }
        match self.memory_bytes {
            Some(memory) if limit < memory => Verdict::warn(
                format!(
                    "{read}; this host has {}, of which a guest may use more than the limit",
                    bytes(memory)
                ),
                format!("{REMEDY}, or give migrations a --pin-budget below {}", bytes(left)),
            ),
            _ => Verdict::ok(read),
        }
    }
}

/// How many files may be open.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenFiles {
    /// `None` without a limit.
    pub(super) limit: Option<u64>,
}

impl OpenFiles {
    pub(super) fn read() -> Self {
        Self { limit: rustix::process::getrlimit(Resource::Nofile).current }
    }

    pub(super) fn judge(self) -> Verdict {
        let read = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
        let evidence = format!("RLIMIT_NOFILE is {}", read(self.limit));
        match self.limit {
            Some(limit) if limit < OPEN_FILES => Verdict::warn(
                format!("{evidence}, less than {OPEN_FILES}"),
                "set LimitNOFILE=65536 in the agent's unit (in a shell: ulimit -n 65536) and restart it",
            ),
            _ => Verdict::ok(evidence),
        }
    }
}

/// Reserved huge pages of one size.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    pub(super) page_bytes: u64,
    pub(super) total: u64,
    pub(super) free: u64,
}

/// Huge pages of the host.
#[derive(Clone, Debug)]
pub(super) struct HugePages {
    pub(super) pools: Vec<Pool>,
    /// The chosen one of `shmem_enabled`.
    pub(super) shared: Option<String>,
}

impl HugePages {
    pub(super) fn read(host: &Host) -> Self {
        const POOLS: &str = "/sys/kernel/mm/hugepages";
        let pool = |name: String| {
            let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let directory = Path::new(POOLS).join(&name);
            Some(Pool {
                page_bytes: kib.checked_mul(1024)?,
                total: host.value(directory.join("nr_hugepages"))?,
                free: host.value(directory.join("free_hugepages"))?,
            })
        };
        let shared = host.text("/sys/kernel/mm/transparent_hugepage/shmem_enabled").and_then(|text| {
            let chosen =
                text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))?;
            Some(chosen.to_owned())
        });
        Self { pools: host.names(POOLS).into_iter().filter_map(pool).collect(), shared }
    }

    pub(super) fn judge(&self) -> Verdict {
        let shared = match &self.shared {
            Some(chosen) => format!("transparent huge pages for shared memory: {chosen}"),
            None => "no transparent huge pages".to_owned(),
        };
        let reserved: Vec<&Pool> = self.pools.iter().filter(|pool| pool.total > 0).collect();
        if reserved.is_empty() {
            return Verdict::skip(format!(
                "no huge pages are reserved, so no guest's RAM is on them; {shared}"
            ));
        }
        let told: Vec<String> = reserved
            .iter()
            .map(|pool| format!("{} of {} pages of {} free", pool.free, pool.total, bytes(pool.page_bytes)))
            .collect();
        let evidence = format!("{}; {shared}", told.join(", "));
        if reserved.iter().all(|pool| pool.free > 0) {
            return Verdict::ok(evidence);
        }
        Verdict::warn(
            format!("{evidence}: no VMM of another guest on hugetlbfs can be started to receive it"),
            "reserve more: sysctl vm.nr_hugepages=N, or the size's nr_hugepages in /sys/kernel/mm/hugepages",
        )
    }
}

/// What the control groups above this process let it use.
#[derive(Clone, Debug)]
pub(super) struct CgroupMemory {
    /// The group with the tightest limit, that limit, and what is used there.
    pub(super) tightest: Option<(PathBuf, u64, u64)>,
    /// Whether the process' groups were found.
    pub(super) is_known: bool,
}

impl CgroupMemory {
    pub(super) fn read(host: &Host) -> Self {
        let text = host.text("/proc/self/cgroup").unwrap_or_default();
        let memory_bytes = host.kib_field("/proc/meminfo", "MemTotal");
        let mut tightest: Option<(PathBuf, u64, u64)> = None;
        let mut is_known = false;
        for (mounted, group, limit, usage) in hierarchies(&text) {
            for above in Path::new(group).ancestors() {
                let directory = Path::new(mounted).join(above.strip_prefix("/").unwrap_or(above));
                let used = host.value(directory.join(usage));
                is_known |= used.is_some();
                // Where there is none, this is "max", or in version 1 a number of more than any memory.
                let limit: Option<u64> = host.value(directory.join(limit));
                let limit = limit.filter(|limit| memory_bytes.is_none_or(|memory| *limit < memory));
                if let (Some(limit), Some(used)) = (limit, used)
                    && tightest.as_ref().is_none_or(|(_, least, _)| limit < *least)
                {
                    tightest = Some((directory, limit, used));
                }
            }
        }
        Self { tightest, is_known }
    }

    pub(super) fn judge(&self) -> Verdict {
        const REMEDY: &str = "set MemoryMax=infinity and MemoryHigh=infinity in the agent's unit (container: no memory \
                              limit), for RAM that the agent places for an arriving guest counts as the agent's";
        let Some((group, limit, used)) = &self.tightest else {
            return match self.is_known {
                true => Verdict::ok("no control group above this process limits its memory"),
                false => Verdict::skip("no memory controller of control groups is found for this process"),
            };
        };
        let evidence = format!("{} of {} used in {}", bytes(*used), bytes(*limit), group.display());
        if *used > limit / 10 * 9 {
            return Verdict::fail(format!("{evidence}: more than nine tenths"), REMEDY);
        }
        Verdict::warn(
            format!("{evidence}: a guest that arrives with more RAM than is left gets the agent killed"),
            REMEDY,
        )
    }
}

/// Of each hierarchy that counts memory: where it is mounted, the group, the names of limit and usage.
fn hierarchies(text: &str) -> Vec<(&'static str, &str, &'static str, &'static str)> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(group)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        if number == "0" {
            for mounted in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                found.push((mounted, group, "memory.max", "memory.current"));
                found.push((mounted, group, "memory.high", "memory.current"));
            }
        } else if controllers.split(',').any(|controller| controller == "memory") {
            let (limit, usage) = ("memory.limit_in_bytes", "memory.usage_in_bytes");
            found.push(("/sys/fs/cgroup/memory", group, limit, usage));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::host::fake::Fake;
    use super::super::verdict::Status;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn memlock(limit_bytes: Option<u64>) -> Memlock {
        Memlock {
            limit_bytes,
            is_exempt: false,
            pinned_bytes: Some(16 * MIB),
            memory_bytes: Some(1024 * MIB),
            nothing_pins: None,
        }
    }

    #[test]
    fn memlock_without_room_for_a_window_fails_and_says_how_much_is_left() {
        let verdict = memlock(Some(24 * MIB)).judge();
        assert_eq!(verdict.status, Status::Fail);
        for part in ["24 MiB", "16 MiB pinned", "8 MiB left", "25165824"] {
            assert!(verdict.evidence.contains(part), "{verdict:?}");
        }
        assert!(verdict.remedy.contains("LimitMEMLOCK=infinity") && verdict.remedy.contains("ulimit -l"));
        assert!(verdict.remedy.ends_with("a --pin-budget below 8 MiB"), "{verdict:?}");
        let nothing_left = memlock(Some(65536)).judge();
        assert!(nothing_left.remedy.ends_with("--fabric tcp"), "{nothing_left:?}");
    }

    #[test]
    fn memlock_below_the_hosts_memory_warns_of_guests_that_are_larger() {
        let verdict = memlock(Some(512 * MIB)).judge();
        assert_eq!(verdict.status, Status::Warn);
        assert!(verdict.remedy.contains("--pin-budget below 496 MiB"), "{verdict:?}");
    }

    #[test]
    fn memlock_is_well_without_a_limit_or_where_it_does_not_hold() {
        assert_eq!(memlock(None).judge().status, Status::Ok);
        assert_eq!(Memlock { is_exempt: true, ..memlock(Some(65536)) }.judge().status, Status::Ok);
        let nothing =
            Memlock { nothing_pins: Some("there is no RDMA device"), ..memlock(Some(65536)) }.judge();
        assert!(nothing.status == Status::Ok && nothing.evidence.contains("no RDMA device"), "{nothing:?}");
    }

    #[test]
    fn few_open_files_warn() {
        assert_eq!(OpenFiles { limit: Some(256) }.judge().status, Status::Warn);
        assert_eq!(OpenFiles { limit: Some(1024) }.judge().status, Status::Ok);
        assert_eq!(OpenFiles { limit: None }.judge().status, Status::Ok);
    }

    #[test]
    fn a_pool_of_huge_pages_that_is_used_up_warns() {
        let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB";
        let fake = Fake::new(&[
            (&format!("{pool}/nr_hugepages"), "64\n"),
            (&format!("{pool}/free_hugepages"), "0\n"),
            ("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [never] deny\n"),
        ]);
        let verdict = HugePages::read(&fake.host()).judge();
        assert_eq!(verdict.status, Status::Warn);
        assert!(verdict.evidence.starts_with("0 of 64 pages of 2 MiB free; "), "{verdict:?}");
        assert!(verdict.evidence.contains("shared memory: never"), "{verdict:?}");
        fake.write(&format!("{pool}/free_hugepages"), "1");
        assert_eq!(HugePages::read(&fake.host()).judge().status, Status::Ok);
        fake.write(&format!("{pool}/nr_hugepages"), "0");
        assert_eq!(HugePages::read(&fake.host()).judge().status, Status::Skip);
    }

    #[test]
    fn the_tightest_control_group_above_the_agent_counts() {
        let fake = Fake::new(&[
            ("/proc/self/cgroup", "0::/system.slice/ramferry.service\n"),
            ("/proc/meminfo", "MemTotal: 8388608 kB\n"),
            ("/sys/fs/cgroup/system.slice/ramferry.service/memory.max", "max\n"),
            ("/sys/fs/cgroup/system.slice/ramferry.service/memory.current", "1048576\n"),
            ("/sys/fs/cgroup/system.slice/memory.max", "1073741824\n"),
            ("/sys/fs/cgroup/system.slice/memory.current", "536870912\n"),
        ]);
        let verdict = CgroupMemory::read(&fake.host()).judge();
        assert_eq!(verdict.status, Status::Warn);
        assert!(
            verdict.evidence.starts_with("512 MiB of 1 GiB used in /sys/fs/cgroup/system.slice"),
            "{verdict:?}"
        );
        fake.write("/sys/fs/cgroup/system.slice/memory.current", "1073000000");
        let verdict = CgroupMemory::read(&fake.host()).judge();
        assert!(
            verdict.status == Status::Fail && verdict.remedy.contains("MemoryMax=infinity"),
            "{verdict:?}"
        );
        fake.write("/sys/fs/cgroup/system.slice/memory.max", "max");
        assert_eq!(CgroupMemory::read(&fake.host()).judge().status, Status::Ok);
    }

    #[test]
    fn control_groups_of_the_first_version_are_read_too() {
        let fake = Fake::new(&[
            ("/proc/self/cgroup", "4:memory:/a\n0::/\n"),
            ("/proc/meminfo", "MemTotal: 8388608 kB\n"),
            ("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712"),
            ("/sys/fs/cgroup/memory/a/memory.usage_in_bytes", "4096"),
        ]);
        assert_eq!(CgroupMemory::read(&fake.host()).judge().status, Status::Ok);
        fake.write("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "65536");
        assert_eq!(CgroupMemory::read(&fake.host()).judge().status, Status::Warn);
        assert_eq!(CgroupMemory::read(&Fake::new(&[]).host()).judge().status, Status::Skip);
    }
}
