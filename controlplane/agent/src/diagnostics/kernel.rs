//! What the kernel is, what it can do, and what it lets this process do.

use std::io;

use ramferry_tracking::{TrackerKind, features, self_test};

use super::host::Host;
use super::verdict::{Verdict, bytes};
use crate::status::causes;

/// Asynchronous write-protection and `PAGEMAP_SCAN`.
const UFFD_WP: (u32, u32) = (6, 7);
/// `pidfd_getfd`.
const PIDFD_GETFD: (u32, u32) = (5, 6);
/// Pins, for reading, memory that is mapped for reading only.
const PINS_READ_ONLY: (u32, u32) = (6, 2);

/// Capabilities that the agent uses, with their numbers.
const USED: [(&str, u32); 5] = [
    ("CAP_IPC_LOCK", 14),
    ("CAP_SYS_PTRACE", 19),
    ("CAP_SYS_ADMIN", 21),
    ("CAP_PERFMON", 38),
    ("CAP_BPF", 39),
];

/// What an agent is to be given.
const ASKED_FOR: [&str; 3] = ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_IPC_LOCK"];

/// The effective capabilities of this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capabilities {
    /// `None` where /proc does not say.
    pub(super) effective: Option<u64>,
    /// Whether system calls of this process are filtered.
    pub(super) is_under_seccomp: bool,
}

impl Capabilities {
    pub(super) fn read(host: &Host) -> Self {
        let status = host.text("/proc/self/status").unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        Self {
            effective: field("CapEff:").and_then(|mask| u64::from_str_radix(mask, 16).ok()),
            is_under_seccomp: field("Seccomp:").is_some_and(|mode| mode != "0"),
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        let mask = self.effective.unwrap_or(0);
        USED.iter().any(|(used, number)| *used == name && mask & (1 << number) != 0)
    }

    pub(super) fn judge(&self) -> Verdict {
        let Some(mask) = self.effective else {
            return Verdict::skip("/proc/self/status has no CapEff: is /proc mounted?");
        };
        let (held, lacking): (Vec<&str>, Vec<&str>) =
            USED.iter().map(|(name, _)| *name).partition(|name| self.has(name));
        let list = |names: &[&str]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let evidence = format!("CapEff is {mask:016x}; has {}; lacks {}", list(&held), list(&lacking));
        let grant =
            |names: &str| format!("run as root, or set AmbientCapabilities={names} in the agent's unit");
        if !self.has("CAP_SYS_PTRACE") {
            return Verdict::fail(
                format!("{evidence}: without CAP_SYS_PTRACE guests of other users cannot be tracked"),
                grant(&ASKED_FOR.join(" ")),
            );
        }
        // The kernel takes CAP_SYS_ADMIN for CAP_BPF and CAP_PERFMON as well.
        match (self.has("CAP_SYS_ADMIN"), self.is_under_seccomp) {
            (true, false) => return Verdict::ok(evidence),
            (true, true) => {
                return Verdict::warn(
                    format!(
                        "{evidence}; and it runs under seccomp: who does may not lift that of a VMM, and none that is \
                         under it can be tracked"
                    ),
                    "take SystemCallFilter=, SystemCallArchitectures=, RestrictAddressFamilies= and what else is made of \
                     seccomp out of the agent's unit (container: seccompProfile Unconfined)",
                );
            }
            (false, _) => {}
        }
        Verdict::warn(
            format!(
                "{evidence}: a VMM that runs under seccomp cannot be tracked, and no eBPF probe attached"
            ),
            grant("CAP_SYS_ADMIN"),
        )
    }
}

/// The kernel's release.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    pub(super) release: Option<String>,
}

impl Kernel {
    pub(super) fn read(host: &Host) -> Self {
        Self { release: host.text("/proc/sys/kernel/osrelease") }
    }

    pub(super) fn version(&self) -> Option<(u32, u32)> {
        let mut numbers =
            self.release.as_deref()?.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    pub(super) fn judge(&self) -> Verdict {
        let Some((release, version)) = self.release.as_ref().zip(self.version()) else {
            return Verdict::skip("/proc/sys/kernel/osrelease does not name a version");
        };
        let evidence = format!("Linux {release}");
        if version < PIDFD_GETFD {
            return Verdict::fail(
                format!("{evidence}: older than 5.6, which has pidfd_getfd"),
                "boot Linux 6.7 or newer",
            );
        }
        if version >= UFFD_WP {
            return Verdict::ok(evidence);
        }
        let leaves =
            if version < PINS_READ_ONLY { "; and over RDMA a guest can arrive but not leave" } else { "" };
        Verdict::warn(
            format!("{evidence}: older than 6.7, so guests are tracked by soft-dirty, or not at all{leaves}"),
            "boot Linux 6.7 or newer",
        )
    }
}

/// What one part of uffd_wp answered.
pub(super) type Tried = Result<(), String>;

/// The kernel's parts that uffd_wp is made of.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    /// Features that userfaultfd lacks.
    pub(super) userfaultfd: Result<Vec<&'static str>, String>,
    pub(super) pagemap_scan: Tried,
    pub(super) pidfd_getfd: Tried,
}

impl Parts {
    pub(super) fn read() -> Self {
        let said = |error: io::Error| error.to_string();
        Self {
            userfaultfd: features::userfaultfd_lacks().map_err(said),
            pagemap_scan: features::pagemap_scan().map_err(said),
            pidfd_getfd: features::pidfd_getfd().map_err(said),
        }
    }

    pub(super) fn judge_userfaultfd(&self) -> Verdict {
        const BOOT: &str = "boot Linux 6.7 or newer with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP";
        match &self.userfaultfd {
            Ok(lacking) if lacking.is_empty() => {
                Verdict::ok("userfaultfd has WP_ASYNC, WP_UNPOPULATED and WP_HUGETLBFS_SHMEM")
            }
            Ok(lacking) => Verdict::warn(format!("userfaultfd lacks {}", lacking.join(", ")), BOOT),
            Err(why) => Verdict::warn(
                format!("userfaultfd(2): {why}"),
                format!("{BOOT}; where a seccomp profile (container) forbids the call, allow it"),
            ),
        }
    }

    pub(super) fn judge_pagemap_scan(&self) -> Verdict {
        match &self.pagemap_scan {
            Ok(()) => Verdict::ok("PAGEMAP_SCAN is known to the kernel"),
            Err(why) => {
                Verdict::warn(format!("PAGEMAP_SCAN on /proc/self/pagemap: {why}"), "boot Linux 6.7 or newer")
            }
        }
    }

    pub(super) fn judge_pidfd_getfd(&self) -> Verdict {
        match &self.pidfd_getfd {
            Ok(()) => Verdict::ok("pidfd_getfd(2) took a descriptor of this process"),
            Err(why) => Verdict::warn(
                format!("pidfd_getfd(2): {why}"),
                "boot Linux 5.6 or newer; where a seccomp profile (container) forbids the call, allow it",
            ),
        }
    }
}

/// Whom the kernel lets trace others.
#[derive(Clone, Debug)]
pub(super) struct PtraceScope {
    /// `None` where the kernel has no such setting.
    pub(super) scope: Option<u32>,
    pub(super) may_trace_all: bool,
}

impl PtraceScope {
    pub(super) fn read(host: &Host, capabilities: &Capabilities) -> Self {
        Self {
            scope: host.value("/proc/sys/kernel/yama/ptrace_scope"),
            may_trace_all: capabilities.has("CAP_SYS_PTRACE"),
        }
    }

    pub(super) fn judge(&self) -> Verdict {
        let Some(scope) = self.scope else {
            return Verdict::ok("the kernel has no kernel.yama.ptrace_scope, and so no restriction by it");
        };
        let evidence = format!("kernel.yama.ptrace_scope is {scope}");
        match scope {
            0 => Verdict::ok(evidence),
            1 | 2 if self.may_trace_all => {
                Verdict::ok(format!("{evidence}; it does not hold: CAP_SYS_PTRACE"))
            }
            1 | 2 => Verdict::fail(
                format!(
                    "{evidence}: a VMM that this process did not start cannot be traced without CAP_SYS_PTRACE"
                ),
                "run the agent as root or with CAP_SYS_PTRACE, or: sysctl kernel.yama.ptrace_scope=0",
            ),
            _ => Verdict::fail(
                format!("{evidence}: nobody may trace, whatever their rights, until the next boot"),
                "set kernel.yama.ptrace_scope=1 or lower in /etc/sysctl.d and reboot",
            ),
        }
    }
}

/// What the self-tests of both trackers said.
#[derive(Clone, Debug)]
pub(super) struct Trackers {
    pub(super) uffd_wp: Tried,
    pub(super) soft_dirty: Tried,
}

impl Trackers {
    pub(super) fn read() -> Self {
        let test = |kind| self_test(kind).map_err(|error| causes(&error));
        Self { uffd_wp: test(TrackerKind::UffdWp), soft_dirty: test(TrackerKind::SoftDirty) }
    }

    pub(super) fn judge_uffd_wp(&self) -> Verdict {
        const REMEDY: &str = "see kernel, userfaultfd, pagemap_scan, pidfd_getfd, ptrace_scope and capabilities in this \
                              list: whichever is not ok is why";
        match (&self.uffd_wp, &self.soft_dirty) {
            (Ok(()), _) => Verdict::ok("every page that a child wrote was reported, and no other"),
            (Err(why), Ok(())) => Verdict::warn(format!("{why}; soft_dirty is used in its place"), REMEDY),
            (Err(why), Err(_)) => Verdict::fail(
                format!("{why}; nor does soft_dirty work, so that no guest can leave this host"),
                REMEDY,
            ),
        }
    }

    pub(super) fn judge_soft_dirty(&self) -> Verdict {
        match (&self.soft_dirty, &self.uffd_wp) {
            (Ok(()), _) => Verdict::ok("every page that a child wrote was reported, and no other"),
            (Err(why), Ok(())) => Verdict::skip(format!("not needed, for uffd_wp works ({why})")),
            (Err(why), Err(_)) => Verdict::fail(
                why,
                "boot Linux 6.7 or newer, where uffd_wp works, or a kernel with CONFIG_MEM_SOFT_DIRTY",
            ),
        }
    }
}

/// The kernel's description of its types, for probes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Btf {
    pub(super) bytes: Option<u64>,
}

impl Btf {
    pub(super) const PATH: &'static str = "/sys/kernel/btf/vmlinux";

    pub(super) fn read(host: &Host) -> Self {
        Self { bytes: std::fs::metadata(host.path(Self::PATH)).ok().map(|metadata| metadata.len()) }
    }

    pub(super) fn judge(self) -> Verdict {
        match self.bytes {
            Some(length) => Verdict::ok(format!("{} has {}", Self::PATH, bytes(length))),
            None => Verdict::warn(
                format!("{} is not there: eBPF probes in the kernel cannot be used", Self::PATH),
                "boot a kernel built with CONFIG_DEBUG_INFO_BTF; migrations do not need it",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::super::host::fake::Fake;
    use super::super::verdict::Status;
    use super::*;

    fn capabilities(names: &[&str]) -> Capabilities {
        let bits = USED.iter().filter(|(name, _)| names.contains(name)).map(|(_, number)| 1 << number);
        Capabilities { effective: Some(bits.fold(0, |mask, bit: u64| mask | bit)), is_under_seccomp: false }
    }

    #[test]
    fn capabilities_are_those_of_the_status_and_those_that_lack_are_named() {
        let fake = Fake::new(&[("/proc/self/status", "Name:\tx\nCapEff:\t0000000000000000\n")]);
        let verdict = Capabilities::read(&fake.host()).judge();
        assert_eq!(verdict.status, Status::Fail);
        assert!(verdict.remedy.contains("AmbientCapabilities=CAP_SYS_PTRACE"), "{verdict:?}");
        fake.write("/proc/self/status", "CapEff:\t000001ffffffffff\n");
        assert_eq!(Capabilities::read(&fake.host()).judge().status, Status::Ok);
        fake.write("/proc/self/status", "CapEff:\t000001ffffffffff\nSeccomp:\t2\nSeccomp_filters:\t31\n");
        let verdict = Capabilities::read(&fake.host()).judge();
        assert!(
            verdict.status == Status::Warn && verdict.remedy.contains("SystemCallFilter="),
            "{verdict:?}"
        );
        fake.write("/proc/self/status", "CapEff:\t000001ffffffffff\nSeccomp:\t0\nSeccomp_filters:\t0\n");
        assert_eq!(Capabilities::read(&fake.host()).judge().status, Status::Ok);
        fake.write("/proc/self/status", "");
        assert_eq!(Capabilities::read(&fake.host()).judge().status, Status::Skip);
    }

    #[test]
    fn what_is_deployed_has_the_capabilities_that_are_asked_for_and_no_limit_of_memory() {
        let deployed = |file: &str| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy").join(file);
            std::fs::read_to_string(path).unwrap()
        };
        let unit = deployed("ramferry-agent.service");
        let lines = |key: &str| unit.lines().filter_map(|line| line.strip_prefix(key)).collect::<Vec<_>>();
        let [given] = lines("CapabilityBoundingSet=")[..] else { panic!("{unit}") };
        let given: BTreeSet<&str> = given.split(' ').collect();
        assert!(ASKED_FOR.iter().all(|name| given.contains(name)), "{given:?}");
        for name in &given {
            assert!(unit.contains(&format!("\n# {name} ")), "{name} does not say what for");
        }
        assert_eq!(lines("LimitMEMLOCK="), ["infinity"]);
        assert_eq!(lines("MemoryMax="), ["infinity"]);
        assert_eq!(lines("SystemCallFilter="), [] as [&str; 0]);

        let manifest = deployed("kubernetes/daemonset.yaml");
        let added = manifest.lines().find_map(|line| line.trim().strip_prefix("add: [")?.strip_suffix(']'));
        let added: BTreeSet<String> = added.unwrap().split(", ").map(|name| format!("CAP_{name}")).collect();
        assert_eq!(added.iter().map(String::as_str).collect::<BTreeSet<_>>(), given);
        for line in ["hostPID: true", "hostNetwork: true", "type: Unconfined"] {
            assert!(manifest.lines().any(|written| written.trim() == line), "{line}");
        }
        assert!(!manifest.contains("limits:"), "RAM of arriving guests counts as the agent's");
    }

    #[test]
    fn without_sys_admin_what_only_some_guests_and_probes_need_warns() {
        let verdict = capabilities(&["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_IPC_LOCK"]).judge();
        assert_eq!(verdict.status, Status::Ok, "{verdict:?}");
        let verdict = capabilities(&["CAP_SYS_PTRACE", "CAP_BPF", "CAP_PERFMON"]).judge();
        assert!(verdict.status == Status::Warn && verdict.evidence.contains("seccomp"), "{verdict:?}");
        assert!(verdict.remedy.contains("AmbientCapabilities=CAP_SYS_ADMIN"), "{verdict:?}");
    }

    #[test]
    fn kernels_are_judged_by_what_their_version_has() {
        let judged = |release: &str| Kernel { release: Some(release.into()) }.judge();
        for (release, status) in [
            ("6.18.44-fc", Status::Ok),
            ("6.7.0", Status::Ok),
            ("6.6.1", Status::Warn),
            ("6.1.0-42-amd64", Status::Warn),
            ("5.4.0", Status::Fail),
            ("unknown", Status::Skip),
        ] {
            assert_eq!(judged(release).status, status, "{release}");
        }
        assert!(judged("6.1.0").evidence.contains("not leave"));
        assert!(!judged("6.6.1").evidence.contains("not leave"));
        let fake = Fake::new(&[("/proc/sys/kernel/osrelease", "6.1.0-42-amd64\n")]);
        assert_eq!(Kernel::read(&fake.host()).version(), Some((6, 1)));
    }

    #[test]
    fn each_part_of_uffd_wp_that_is_missing_is_told_by_its_name() {
        let refused = || Err("Operation not permitted (os error 1)".to_owned());
        let parts = Parts {
            userfaultfd: refused().map(|()| vec![]),
            pagemap_scan: refused(),
            pidfd_getfd: refused(),
        };
        for verdict in [parts.judge_userfaultfd(), parts.judge_pagemap_scan(), parts.judge_pidfd_getfd()] {
            assert!(verdict.status == Status::Warn && verdict.evidence.contains("os error 1"), "{verdict:?}");
        }
        let old = Parts {
            userfaultfd: Ok(vec!["UFFD_FEATURE_WP_ASYNC"]),
            pagemap_scan: Ok(()),
            pidfd_getfd: Ok(()),
        };
        assert!(old.judge_userfaultfd().evidence.contains("WP_ASYNC"));
        assert_eq!(old.judge_userfaultfd().status, Status::Warn);
        assert_eq!(
            (old.judge_pagemap_scan().status, old.judge_pidfd_getfd().status),
            (Status::Ok, Status::Ok)
        );
    }

    #[test]
    fn ptrace_scope_holds_unless_the_capability_lifts_it() {
        let fake = Fake::new(&[("/proc/sys/kernel/yama/ptrace_scope", "1\n")]);
        let (root, nobody) = (capabilities(&["CAP_SYS_PTRACE"]), capabilities(&[]));
        let judged = |scope: &str, capabilities| {
            fake.write("/proc/sys/kernel/yama/ptrace_scope", scope);
            PtraceScope::read(&fake.host(), capabilities).judge().status
        };
        assert_eq!(judged("1", &root), Status::Ok);
        assert_eq!(judged("1", &nobody), Status::Fail);
        assert_eq!(judged("0", &nobody), Status::Ok);
        assert_eq!(judged("3", &root), Status::Fail);
        assert_eq!(PtraceScope::read(&Fake::new(&[]).host(), &nobody).judge().status, Status::Ok);
    }

    #[test]
    fn one_tracker_is_enough_and_none_fails() {
        let broken = || Err("does not work here".to_owned());
        let judged = |uffd_wp: Tried, soft_dirty: Tried| {
            let trackers = Trackers { uffd_wp, soft_dirty };
            (trackers.judge_uffd_wp().status, trackers.judge_soft_dirty().status)
        };
        assert_eq!(judged(Ok(()), Ok(())), (Status::Ok, Status::Ok));
        assert_eq!(judged(Ok(()), broken()), (Status::Ok, Status::Skip));
        assert_eq!(judged(broken(), Ok(())), (Status::Warn, Status::Ok));
        assert_eq!(judged(broken(), broken()), (Status::Fail, Status::Fail));
    }

    #[test]
    fn a_kernel_without_btf_warns() {
        let fake = Fake::new(&[(Btf::PATH, "0123")]);
        let verdict = Btf::read(&fake.host()).judge();
        assert_eq!(verdict, Verdict::ok("/sys/kernel/btf/vmlinux has 4 B"));
        assert_eq!(Btf::read(&Fake::new(&[]).host()).judge().status, Status::Warn);
    }
}
