//! The one list of metrics: docs/metrics.md and the dashboards' checks are made
//! from it.

use crate::metrics::buckets::{self, Buckets};

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// A counter of seconds, with fractions.
    SecondsCounter,
    /// Goes up and down.
    Gauge,
    /// A gauge of one running migration: gone when the migration has ended.
    MigrationGauge,
    /// A gauge summed over running migrations.
    SummedGauge,
    /// Cumulative buckets of seconds.
    Histogram(Buckets),
}

impl MetricKind {
    /// The type in the exposition format.
    pub const fn exposed(self) -> &'static str {
        match self {
            Self::Counter | Self::SecondsCounter => "counter",
            Self::Gauge | Self::MigrationGauge | Self::SummedGauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// A metric as documented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricInfo {
    /// Its whole name.
    pub name: &'static str,
    /// What it is.
    pub kind: MetricKind,
    /// Unit of its value.
    pub unit: &'static str,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it tells.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($variant:ident: $kind:expr, $name:literal, $unit:literal, [$($label:literal),*], $help:literal;)*) => {
        /// Every metric of the agent.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum MetricName {
            $(#[doc = $help] $variant,)*
        }

        impl MetricName {
            /// All of them, in the order of docs/metrics.md.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The metric as documented.
            pub const fn info(self) -> MetricInfo {
                match self {
                    $(Self::$variant => MetricInfo {
                        name: $name,
                        kind: $kind,
                        unit: $unit,
                        labels: &[$($label),*],
                        help: $help,
                    },)*
                }
            }
        }
    };
}

use MetricKind::{Counter, Gauge, Histogram, MigrationGauge, SecondsCounter, SummedGauge};

metrics! {
    BuildInfo: Gauge, "ramferry_build_info", "1", ["version"],
        "Always 1; the agent's version is its label.";
    MemlockLimitBytes: Gauge, "ramferry_memlock_limit_bytes", "bytes", [],
        "RLIMIT_MEMLOCK of the agent; a fabric whose device pins memory can register no more. +Inf is no limit.";
    CertificateExpiry: Gauge, "ramferry_certificate_expiry_timestamp_seconds", "seconds", ["certificate"],
        "When the first certificate of the chain served, or of the authorities trusted, is no longer valid, since 1970. As read at the start: a renewed file counts after a restart.";
    RdmaDeviceInfo: Gauge, "ramferry_rdma_device_info", "1", ["device", "port", "link_layer", "transport", "firmware"],
        "Always 1, for each port of this host's RDMA devices.";
    RdmaPortActive: Gauge, "ramferry_rdma_port_active", "1", ["device", "port"],
        "Whether the port carries traffic: 1 or 0.";
    RdmaPortRateBytesPerSecond: Gauge, "ramferry_rdma_port_rate_bytes_per_second", "bytes per second",
        ["device", "port"],
        "What the port says it carries; 0 where that is not known.";
    RdmaPortTransmittedBytesTotal: Counter, "ramferry_rdma_port_transmitted_bytes_total", "bytes", ["device", "port"],
        "Bytes that the port sent, of anybody; soft-RoCE does not count them.";
    RdmaPortReceivedBytesTotal: Counter, "ramferry_rdma_port_received_bytes_total", "bytes", ["device", "port"],
        "Bytes that the port received, of anybody; soft-RoCE does not count them.";
    RdmaPortEventsTotal: Counter, "ramferry_rdma_port_events_total", "events", ["device", "port", "counter"],
        "Loss, congestion and errors at the port, of anybody. counter is the kernel's name; those that the device has.";

    MigrationsTotal: Counter, "ramferry_migrations_total", "migrations", ["role", "mode", "result", "reason"],
        "Migrations that ended. reason is empty when they succeeded.";
    MigrationsActive: SummedGauge, "ramferry_migrations_active", "migrations", ["role", "state"],
        "Migrations under way.";
    MigrationDurationSeconds: Histogram(buckets::LONG), "ramferry_migration_duration_seconds", "seconds",
        ["role", "result"],
        "From a migration's creation to its end.";
    MigrationPhaseDurationSeconds: Histogram(buckets::LONG), "ramferry_migration_phase_duration_seconds", "seconds",
        ["role", "phase"],
        "Time that migrations spent in each state.";
    MigrationDowntimeSeconds: Histogram(buckets::DOWNTIME), "ramferry_migration_downtime_seconds", "seconds", [],
        "From the source guest's pause to the destination guest's resume, seen by the source.";
    MigrationDowntimePartSeconds: Histogram(buckets::DOWNTIME), "ramferry_migration_downtime_part_seconds",
        "seconds", ["part"],
        "The parts that a downtime is made of.";
    MigrationsOverMaxDowntimeTotal: Counter, "ramferry_migrations_over_max_downtime_total", "migrations", [],
        "Migrations that succeeded with a downtime above their max_downtime. The time that verify took is not counted.";

    MigrationMemoryBytes: MigrationGauge, "ramferry_migration_memory_bytes", "bytes", ["migration", "role"],
        "RAM of the guest.";
    MigrationRemainingBytes: MigrationGauge, "ramferry_migration_remaining_bytes", "bytes", ["migration", "role"],
        "Bytes of the round under way that are not yet placed; in post-copy, those that the guest is still owed.";
    MigrationDirtyRate: MigrationGauge, "ramferry_migration_dirty_rate_bytes_per_second", "bytes per second",
        ["migration", "role"],
        "How fast the guest writes pages that were clean.";
    MigrationThroughput: MigrationGauge, "ramferry_migration_throughput_bytes_per_second", "bytes per second",
        ["migration", "role"],
        "Bytes moved over the time of the copy itself.";
    MigrationRound: MigrationGauge, "ramferry_migration_round", "rounds", ["migration", "role"],
        "The round under way, from 1.";
    MigrationExpectedDowntime: MigrationGauge, "ramferry_migration_expected_downtime_seconds", "seconds",
        ["migration", "role"],
        "The downtime if it switched over now; of sources, once it was measured, and until post-copy.";
    MigrationMaxDowntime: MigrationGauge, "ramferry_migration_max_downtime_seconds", "seconds", ["migration", "role"],
        "The downtime that is aimed at; of sources.";
    MigrationThrottleRatio: MigrationGauge, "ramferry_migration_throttle_ratio", "1", ["migration", "role"],
        "Share of its processor time that is taken from the guest so that the migration converges, from 0 to 1; of sources.";
    MigrationPostcopySeconds: MigrationGauge, "ramferry_migration_postcopy_seconds", "seconds", ["migration", "role"],
        "How long the guest has run at the destination on memory that has not all arrived: in post-copy only. An agent that was restarted counts anew.";

    PostcopyFaultDurationSeconds: Histogram(buckets::WORK_REQUEST), "ramferry_postcopy_fault_duration_seconds", "seconds",
        ["fabric"],
        "Accesses of guests that arrive here in post-copy which waited for the source: from the fault to the page.";
    PostcopyBytesTotal: Counter, "ramferry_postcopy_bytes_total", "bytes", ["fabric"],
        "RAM that this agent's destinations read from their sources after the guest's resume.";
    TransferBytesTotal: Counter, "ramferry_transfer_bytes_total", "bytes", ["fabric"],
        "RAM moved by this agent's sources.";
    TransferPagesTotal: Counter, "ramferry_transfer_pages_total", "pages", ["kind"],
        "Pages dealt with by this agent's sources: data was moved, zero was only named.";
    WorkRequestsTotal: Counter, "ramferry_work_requests_total", "operations", ["fabric", "opcode"],
        "Operations that links of this agent took: write and fence of its sources, read of its destinations.";
    CompletionsTotal: Counter, "ramferry_completions_total", "operations", ["fabric", "opcode", "status"],
        "Operations that ended. Those that a dying link did not carry out count under what killed the link.";
    PostToCompletionSeconds: Histogram(buckets::WORK_REQUEST), "ramferry_post_to_completion_seconds", "seconds",
        ["fabric", "opcode"],
        "From an operation's posting to its completion being taken.";
    SendQueueDepth: SummedGauge, "ramferry_send_queue_depth", "operations", [],
        "Operations posted and not completed now.";
    StallSecondsTotal: SecondsCounter, "ramferry_stall_seconds_total", "seconds", ["cause"],
        "Time in which a copy had pages to move and could not.";
    PollerBusySecondsTotal: SecondsCounter, "ramferry_poller_busy_seconds_total", "seconds", [],
        "Time of the data plane's threads with something to do.";
    PollerIdleSecondsTotal: SecondsCounter, "ramferry_poller_idle_seconds_total", "seconds", [],
        "Time of the data plane's threads without.";

    RegistrationDurationSeconds: Histogram(buckets::REGISTRATION), "ramferry_registration_duration_seconds",
        "seconds", ["side", "mode", "fabric"],
        "Time to register one region of memory.";
    DeregistrationDurationSeconds: Histogram(buckets::REGISTRATION), "ramferry_deregistration_duration_seconds",
        "seconds", ["side", "fabric"],
        "Time to deregister one region of memory while its migration is under way, as a pin budget has it done.";
    RegisteredBytesTotal: Counter, "ramferry_registered_bytes_total", "bytes", ["side", "mode", "fabric"],
        "Memory registered, each time anew.";
    RegistrationErrorsTotal: Counter, "ramferry_registration_errors_total", "errors", ["side", "errno"],
        "Regions that could not be registered. errno is none where the kernel was not asked.";
    Regions: SummedGauge, "ramferry_regions", "regions", ["side"],
        "Regions registered now.";
    PinnedBytes: SummedGauge, "ramferry_pinned_bytes", "bytes", ["side", "fabric"],
        "Memory in registered regions now; only over verbs is it locked, and counts against the limit.";

    TrackingHarvestDurationSeconds: Histogram(buckets::REGISTRATION), "ramferry_tracking_harvest_duration_seconds",
        "seconds", ["tracker"],
        "Time to read which pages were written, and to re-arm them.";
    TrackingDirtyPagesTotal: Counter, "ramferry_tracking_dirty_pages_total", "pages", ["tracker"],
        "Pages that harvests found written.";

    EbpfRegMrDurationSeconds: Histogram(buckets::REGISTRATION), "ramferry_ebpf_reg_mr_duration_seconds", "seconds",
        ["process"],
        "Time of ibv_reg_mr and its kin in any process of this host, failed calls too, by process name.";
    EbpfDeregMrDurationSeconds: Histogram(buckets::REGISTRATION), "ramferry_ebpf_dereg_mr_duration_seconds",
        "seconds", ["process"],
        "Time of ibv_dereg_mr, likewise.";
    EbpfPinDurationSeconds: Histogram(buckets::REGISTRATION), "ramferry_ebpf_pin_duration_seconds", "seconds",
        ["process"],
        "Time that the kernel took of it to pin pages.";
    EbpfPinnedBytesTotal: Counter, "ramferry_ebpf_pinned_bytes_total", "bytes", ["process"],
        "Memory that any process of this host registered, each time anew.";
    EbpfRegMrErrorsTotal: Counter, "ramferry_ebpf_reg_mr_errors_total", "errors", ["process", "errno"],
        "Registrations of any process of this host that failed. errno is unknown where only the library knew.";
    EbpfProbeAttached: Gauge, "ramferry_ebpf_probe_attached", "1", ["probe"],
        "1 where the eBPF probe is attached; doctor says why one is not. None where probes are off.";
    EbpfEventsDroppedTotal: Counter, "ramferry_ebpf_events_dropped_total", "events", [],
        "Calls that the probes saw and could not count: a table was full, or a return was never seen.";

    DoctorCheckStatus: Gauge, "ramferry_doctor_check_status", "1", ["check"],
        "What each check of docs/doctor.md found, at the start and every 3 minutes: 0 ok, 1 warn, 2 fail, -1 skipped.";

    GrpcRequestsTotal: Counter, "ramferry_grpc_requests_total", "requests", ["method", "code"],
        "gRPC calls that ended. method is other for one that is not served.";
    GrpcRequestDurationSeconds: Histogram(buckets::GRPC), "ramferry_grpc_request_duration_seconds", "seconds",
        ["method"],
        "From a call's arrival to its last byte; a stream counts when it ends.";
}

impl MetricName {
    /// Whether the eBPF probes count it: it is rendered from what they hold, exactly, not through the recorder.
    pub(super) const fn is_of_ebpf(self) -> bool {
        matches!(
            self,
            Self::EbpfRegMrDurationSeconds
                | Self::EbpfDeregMrDurationSeconds
                | Self::EbpfPinDurationSeconds
                | Self::EbpfPinnedBytesTotal
                | Self::EbpfRegMrErrorsTotal
                | Self::EbpfProbeAttached
                | Self::EbpfEventsDroppedTotal
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_follow_the_conventions() {
        let mut seen = HashSet::new();
        for metric in MetricName::ALL {
            let info = metric.info();
            assert!(seen.insert(info.name), "{} twice", info.name);
            assert!(info.name.starts_with("ramferry_"));
            assert_eq!(info.name.ends_with("_total"), info.kind.exposed() == "counter", "{}", info.name);
            assert!(!matches!(info.kind, Histogram(_)) || info.name.ends_with("_seconds"), "{}", info.name);
            for forbidden in ["pid", "qpn", "address", "key"] {
                assert!(!info.labels.contains(&forbidden), "{}", info.name);
            }
        }
    }
}
