//! The one list of checks: docs/doctor.md is made from it.

/// A check as documented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckInfo {
    /// Its id, which never changes.
    pub id: &'static str,
    /// What it reads.
    pub reads: &'static str,
    /// When it warns; empty where it never does.
    pub warns: &'static str,
    /// When it fails; empty where it never does.
    pub fails: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

macro_rules! checks {
    ($($variant:ident: $id:literal, reads $reads:literal, warns $warns:literal, fails $fails:literal, remedy $remedy:literal;)*) => {
        /// Every check.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Check {
            $(#[doc = $reads] $variant,)*
        }

        impl Check {
            /// All of them, in the order in which they are told.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The check as documented.
            pub const fn info(self) -> CheckInfo {
                match self {
                    $(Self::$variant => CheckInfo {
                        id: $id,
                        reads: $reads,
                        warns: $warns,
                        fails: $fails,
                        remedy: $remedy,
                    },)*
                }
            }
        }
    };
}

checks! {
    Memlock: "memlock",
        reads "RLIMIT_MEMLOCK, VmPin, CAP_IPC_LOCK",
        warns "the limit is below the host's memory",
        fails "less than a window of 64 MiB is left of it, and an RDMA device pins",
        remedy "`LimitMEMLOCK=infinity` in the agent's unit, or a `--pin-budget`";
    OpenFiles: "open_files",
        reads "RLIMIT_NOFILE",
        warns "it is below 1024",
        fails "",
        remedy "`LimitNOFILE=65536` in the agent's unit";
    Capabilities: "capabilities",
        reads "CapEff and Seccomp of /proc/self/status",
        warns "CAP_SYS_ADMIN is not there, or the process runs under seccomp",
        fails "CAP_SYS_PTRACE is not there",
        remedy "root, or `AmbientCapabilities=` in the agent's unit, and nothing there that is made of seccomp (deploy/)";
    Kernel: "kernel",
        reads "/proc/sys/kernel/osrelease",
        warns "it is older than 6.7",
        fails "it is older than 5.6",
        remedy "a newer kernel";
    Userfaultfd: "userfaultfd",
        reads "userfaultfd(2) and its features",
        warns "it cannot be had, or lacks WP_ASYNC, WP_UNPOPULATED, WP_HUGETLBFS_SHMEM or PAGEFAULT_FLAG_WP",
        fails "",
        remedy "Linux 6.7 or newer; allow the call in the container's seccomp profile";
    PagemapScan: "pagemap_scan",
        reads "PAGEMAP_SCAN on a page of its own",
        warns "the kernel does not know it",
        fails "",
        remedy "Linux 6.7 or newer";
    PidfdGetfd: "pidfd_getfd",
        reads "pidfd_getfd(2) on itself",
        warns "it is refused",
        fails "",
        remedy "Linux 5.6 or newer; allow the call in the container's seccomp profile";
    PtraceScope: "ptrace_scope",
        reads "kernel.yama.ptrace_scope",
        warns "",
        fails "it is 3; or 1 or 2 without CAP_SYS_PTRACE",
        remedy "CAP_SYS_PTRACE, or a lower value";
    TrackerUffdWp: "tracker_uffd_wp",
        reads "the self-test of tracker uffd_wp, on a child of its own",
        warns "it fails, and soft_dirty passes",
        fails "both trackers fail",
        remedy "whichever of the checks above is not ok";
    TrackerSoftDirty: "tracker_soft_dirty",
        reads "the self-test of tracker soft_dirty, on a child of its own",
        warns "",
        fails "both trackers fail",
        remedy "Linux 6.7 or newer, or CONFIG_MEM_SOFT_DIRTY";
    Btf: "btf",
        reads "/sys/kernel/btf/vmlinux",
        warns "it is not there",
        fails "",
        remedy "a kernel with CONFIG_DEBUG_INFO_BTF; only eBPF probes need it";
    EbpfProbes: "ebpf_probes",
        reads "which of the agent's eBPF probes are attached; without an agent, which can be",
        warns "one is absent; the evidence says why",
        fails "",
        remedy "of each reason its own: capabilities, /sys, a kernel with BTF and kprobes, lockdown, rdma-core; only figures need probes";
    Hugepages: "hugepages",
        reads "/sys/kernel/mm/hugepages, shmem_enabled",
        warns "a pool is reserved and used up",
        fails "",
        remedy "`sysctl vm.nr_hugepages=N`";
    CgroupMemory: "cgroup_memory",
        reads "memory.max, memory.high, memory.current (version 1: their like) of every group above the process",
        warns "there is a limit",
        fails "nine tenths of it are used",
        remedy "`MemoryMax=infinity` in the agent's unit: RAM of arriving guests counts as the agent's";
    CpuGovernor: "cpu_governor",
        reads "scaling_governor and scaling_driver of every processor",
        warns "it is powersave (but of intel_pstate and amd-pstate-epp), conservative or userspace",
        fails "",
        remedy "`cpupower frequency-set -g performance`";
    ForkSafety: "fork_safety",
        reads "RDMAV_FORK_SAFE, IBV_FORK_SAFE, RDMAV_HUGEPAGES_SAFE",
        warns "one of the first two is set",
        fails "",
        remedy "take them out of the agent's environment";
    RdmaDevices: "rdma_devices",
        reads "/sys/class/infiniband, and each device through libibverbs",
        warns "there is no device, and rdma_listen is not off",
        fails "rdma_device is not there; rdma_listen is an address and there is no device; a device cannot be opened",
        remedy "the driver's modules, rights on /dev/infiniband, or `rdma_listen = \"off\"`";
    RdmaPort: "rdma_port",
        reads "state and phys_state of every port",
        warns "a port is not ACTIVE",
        fails "none is, and rdma_device or rdma_listen names one",
        remedy "`ip link set DEV up`, the cable, the switch's port, the subnet manager";
    RdmaRate: "rdma_rate",
        reads "rate of every active port, the interface's speed",
        warns "an adapter has less than 10 Gbit/s, or InfiniBand has one lane",
        fails "",
        remedy "the cable, the switch's port";
    RdmaPcie: "rdma_pcie",
        reads "current and greatest link speed and width of every adapter",
        warns "it has fewer lanes, or slower ones, than it could",
        fails "",
        remedy "another slot";
    RdmaMtu: "rdma_mtu",
        reads "active and greatest MTU of every active port, the interface's MTU",
        warns "the active one is not the greatest",
        fails "",
        remedy "`ip link set dev DEV mtu 9000` here, at the peer and on every switch between";
    RdmaGid: "rdma_gid",
        reads "the address table (GIDs) of every active Ethernet port, with the RoCE version of each entry",
        warns "it has no entry of an IP address, or none of RoCE v2",
        fails "",
        remedy "`ip address add`; `cma_roce_mode`";
    RdmaListen: "rdma_listen",
        reads "rdma_listen, data_listen and the devices' addresses",
        warns "no address is found for guests to arrive at",
        fails "rdma_listen is an address that no device has",
        remedy "`rdma_listen = \"ADDRESS:PORT\"`";
    RdmaNuma: "rdma_numa",
        reads "numa_node of every adapter, the nodes' CPUs, poller_cpus",
        warns "there are several nodes, and poller_cpus are not at the adapter's",
        fails "",
        remedy "`poller_cpus`";
    RdmaFlowControl: "rdma_flow_control",
        reads "PFC (DCB) and pause frames (ethtool) of a RoCE adapter's interface over netlink, ecn/roce_np/enable, counters of congestion",
        warns "ECN is off for every priority; or it is not to be seen, and neither PFC nor pause frames are on",
        fails "",
        remedy "ECN and PFC on adapter and switches; skipped where the driver tells of neither, as soft-RoCE";
    RdmaErrors: "rdma_errors",
        reads "counters and hw_counters of every port",
        warns "more than one error in a million packets was counted",
        fails "",
        remedy "cable, switch, flow control, MTU along the way";
    StateDir: "state_dir",
        reads "rights, mode and free space of state_dir",
        warns "less than 100 MiB is free",
        fails "it cannot be written, others could change it, or less than 8 MiB is free",
        remedy "`chown`, `chmod go-w`, free space";
    Journal: "journal",
        reads "the logs in state_dir/journal, /proc/locks",
        warns "migrations have not ended and no agent runs; or one was handed over ten minutes ago and the peer is silent",
        fails "a log is damaged; or a migration was handed over and no agent runs",
        remedy "start the agent, here or at the peer";
    Certificate: "certificate",
        reads "tls_cert and tls_ca: time and roles",
        warns "less than 14 days are left",
        fails "it expired, is not valid yet, cannot be read, or lacks the role of a peer",
        remedy "a new certificate, and a restart; the clock";
    PeerAgent: "peer_agent",
        reads "a TCP connection to --peer",
        warns "",
        fails "it cannot be made within 5 s",
        remedy "start it; firewalls; routes";
    PeerCertificate: "peer_certificate",
        reads "a TLS handshake with --peer, and the certificate that it shows",
        warns "less than 14 days are left, or it lacks the role of a peer",
        fails "the handshake fails, it expired or is not valid yet",
        remedy "a new certificate on the peer; tls_ca; the clocks";
    PeerVersion: "peer_version",
        reads "the peer's version and protocol (PeerService.GetPeerInfo)",
        warns "it is another version",
        fails "it speaks another protocol, or does not answer",
        remedy "the same version on both hosts";
    PeerClock: "peer_clock",
        reads "the peer's clock against this one's",
        warns "they differ by more than 2 s",
        fails "they differ by more than 5 min",
        remedy "one source of time for both";
    PeerData: "peer_data",
        reads "a TCP connection to the peer's tcp fabric; where its RDMA listens",
        warns "the peer listens at a loopback address",
        fails "it cannot be made within 5 s",
        remedy "`data_listen` of the peer; firewalls";
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_are_apart_and_fit_for_a_label() {
        let mut seen = HashSet::new();
        for check in Check::ALL {
            let info = check.info();
            assert!(seen.insert(info.id), "{} twice", info.id);
            assert!(info.id.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{}", info.id);
            assert!(!(info.warns.is_empty() && info.fails.is_empty()), "{} tells nothing", info.id);
        }
    }
}
