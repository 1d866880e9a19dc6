//! What the agent measures, for Prometheus.
//!
//! One [`Metrics`] an agent, cloned to whoever measures; nothing is global, so
//! that two agents in one process stay apart. Every label has few values: no
//! pid, address or key is ever one, and a reason from a peer is one only while
//! there are few.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::metrics::{Key, Label, Level, Metadata, Recorder as _};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use ramferry_engine::Reason;
use ramferry_proto::v1::MigrationState;
use rustix::io::Errno;

use crate::MigrationRole;
use crate::diagnostics::Finding;

use active::Active;
use ebpf::Ebpf;
use text::Exposition;

pub use active::{ActiveMigration, MigrationGauges};
pub use buckets::Buckets;
pub use docs::markdown;
pub use endpoint::{Endpoint, EndpointError};
pub use grpc::MeasureCalls;
pub use names::{MetricInfo, MetricKind, MetricName};

mod active;
mod buckets;
mod docs;
mod ebpf;
mod endpoint;
mod grpc;
mod names;
mod operations;
mod rdma_ports;
mod text;

/// Most distinct reasons; later ones are counted as `OTHER`.
const REASONS_LIMIT: usize = 128;

static METADATA: Metadata<'static> = Metadata::new("ramferry", Level::INFO, None);

const ACTIVE_STATES: [MigrationState; 6] = [
    MigrationState::Pending,
    MigrationState::Preparing,
    MigrationState::Precopy,
    MigrationState::SwitchingOver,
    MigrationState::Postcopy,
    MigrationState::Cancelling,
];

/// What registering may fail with, by name.
const ERRNOS: [(Errno, &str); 12] = [
    (Errno::NOMEM, "ENOMEM"),
    (Errno::PERM, "EPERM"),
    (Errno::ACCESS, "EACCES"),
    (Errno::AGAIN, "EAGAIN"),
    (Errno::BUSY, "EBUSY"),
    (Errno::INVAL, "EINVAL"),
    (Errno::FAULT, "EFAULT"),
    (Errno::HWPOISON, "EHWPOISON"),
    (Errno::IO, "EIO"),
    (Errno::NODEV, "ENODEV"),
    (Errno::NOSPC, "ENOSPC"),
    (Errno::OPNOTSUPP, "EOPNOTSUPP"),
];

/// The metrics of one agent.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    active: Active,
    operations: operations::OperationTotals,
    rdma_ports: Mutex<Vec<rdma_ports::Port>>,
    ebpf: Mutex<Ebpf>,
    seconds: Mutex<BTreeMap<(MetricName, &'static str), Duration>>,
    reasons: Mutex<BTreeSet<String>>,
}

/// How a migration moved the RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationMode {
    /// In rounds, before the switchover.
    Precopy,
    /// The rest of it behind the switchover.
    Postcopy,
}

impl MigrationMode {
    /// The label's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
        }
    }
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationResult {
    /// The guest runs at the destination.
    Succeeded,
    /// The guest runs at the source; where memory was lost in post-copy, nowhere.
    Failed,
    /// The guest runs at the source, because that was asked for.
    Cancelled,
}

impl MigrationResult {
    /// The label's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A part of a downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names of migration.proto's DowntimePart")]
pub enum DowntimePart {
    Pause,
    Harvest,
    Recheck,
    Copy,
    Fence,
    Acknowledge,
    Verify,
    Owed,
    DeviceState,
    Journal,
    Commit,
}

impl DowntimePart {
    /// The name in the API and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Harvest => "harvest",
            Self::Recheck => "recheck",
            Self::Copy => "copy",
            Self::Fence => "fence",
            Self::Acknowledge => "acknowledge",
            Self::Verify => "verify",
            Self::Owed => "owed",
            Self::DeviceState => "device_state",
            Self::Journal => "journal",
            Self::Commit => "commit",
        }
    }
}

impl Metrics {
    /// Metrics that begin at zero, with the buckets of each histogram.
    pub fn new() -> Self {
        let mut builder = PrometheusBuilder::new();
        for metric in MetricName::ALL {
            let info = metric.info();
            if let MetricKind::Histogram(buckets) = info.kind
                && !metric.is_of_ebpf()
            {
                builder = builder
                    .set_buckets_for_metric(Matcher::Full(info.name.to_owned()), &buckets.bounds())
                    .expect("every histogram has buckets");
            }
        }
        let recorder = builder.build_recorder();
        for metric in MetricName::ALL {
            let info = metric.info();
            match info.kind {
                _ if metric.is_of_ebpf() => {}
                MetricKind::Counter => recorder.describe_counter(info.name.into(), None, info.help.into()),
                MetricKind::Gauge => recorder.describe_gauge(info.name.into(), None, info.help.into()),
                MetricKind::Histogram(_) => {
                    recorder.describe_histogram(info.name.into(), None, info.help.into());
                }
                // Rendered from here, not by the recorder.
                MetricKind::SecondsCounter | MetricKind::MigrationGauge | MetricKind::SummedGauge => {}
            }
        }
        let metrics = Self(Arc::new(Inner {
            handle: recorder.handle(),
            recorder,
            active: Active::default(),
            operations: operations::OperationTotals::default(),
            rdma_ports: Mutex::default(),
            ebpf: Mutex::default(),
            seconds: Mutex::default(),
            reasons: Mutex::default(),
        }));
        metrics.gauge(MetricName::BuildInfo, &[env!("CARGO_PKG_VERSION")], 1.0);
        metrics.poller(Duration::ZERO, Duration::ZERO);
        metrics.refresh_limits();
        metrics.begin_at_zero();
        metrics
    }

    /// Everything, in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut text = Exposition::after(self.0.handle.render());
        let seconds = self.0.seconds.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut family = None;
        for ((metric, label), total) in seconds {
            if family.replace(metric) != Some(metric) {
                text.family(metric);
            }
            let labels = [label];
            text.sample(metric, &labels[..metric.info().labels.len()], total.as_secs_f64());
        }
        self.0.active.render(&mut text);
        self.0.operations.render(&mut text);
        rdma_ports::render(&self.0.rdma_ports.lock().unwrap_or_else(PoisonError::into_inner), &mut text);
        self.0.ebpf.lock().unwrap_or_else(PoisonError::into_inner).render(&mut text);
        text.finish()
    }

    /// Moves recorded observations into their buckets; to be called every few
    /// seconds, or their memory grows while nobody scrapes.
    pub fn upkeep(&self) {
        self.0.handle.run_upkeep();
    }

    /// Reads the process' limits again.
    pub fn refresh_limits(&self) {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        #[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
        self.gauge(MetricName::MemlockLimitBytes, &[], limit.map_or(f64::INFINITY, |bytes| bytes as f64));
    }

    /// Reads what the kernel tells of this host again. Blocks on files.
    pub fn refresh_host(&self) {
        self.refresh_limits();
        self.refresh_rdma_ports(Path::new(rdma_ports::SYSFS));
    }

    fn refresh_rdma_ports(&self, sysfs: &Path) {
        let ports = rdma_ports::read(sysfs);
        *self.0.rdma_ports.lock().unwrap_or_else(PoisonError::into_inner) = ports;
    }

    /// When a certificate is no longer valid, in seconds since 1970.
    pub(crate) fn certificate(&self, certificate: &'static str, expiry_seconds: i64) {
        #[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
        self.gauge(MetricName::CertificateExpiry, &[certificate], expiry_seconds as f64);
    }

    /// Counts that alerts watch are there before there is anything to count: the first would
    /// otherwise be no increase.
    fn begin_at_zero(&self) {
        self.counter(MetricName::MigrationsOverMaxDowntimeTotal, &[], 0);
        for role in [MigrationRole::Source, MigrationRole::Destination] {
            for errno in ERRNOS.iter().map(|(_, name)| *name).chain(["other", "none"]) {
                self.counter(MetricName::RegistrationErrorsTotal, &[role.as_str(), errno], 0);
            }
            for reason in Reason::ALL.into_iter().filter(|reason| *reason != Reason::Cancelled) {
                let labels = [role.as_str(), "precopy", MigrationResult::Failed.as_str(), reason.as_str()];
                self.counter(MetricName::MigrationsTotal, &labels, 0);
            }
            let (mode, lost) = (MigrationMode::Postcopy.as_str(), Reason::MemoryLost.as_str());
            let labels = [role.as_str(), mode, MigrationResult::Failed.as_str(), lost];
            self.counter(MetricName::MigrationsTotal, &labels, 0);
            for result in [MigrationResult::Succeeded, MigrationResult::Failed, MigrationResult::Cancelled] {
                let key = key(MetricName::MigrationDurationSeconds, &[role.as_str(), result.as_str()]);
                let _ = self.0.recorder.register_histogram(&key, &METADATA);
            }
        }
    }

    /// A state that a migration has left; [`ActiveMigration::state`] calls it.
    pub fn phase(&self, role: MigrationRole, phase: MigrationState, duration: Duration) {
        let labels = [role.as_str(), state_name(phase)];
        self.histogram(MetricName::MigrationPhaseDurationSeconds, &labels, duration);
    }

    /// A migration that ended; [`ActiveMigration::ended`] calls it.
    pub fn migration_ended(
        &self,
        role: MigrationRole,
        mode: MigrationMode,
        result: MigrationResult,
        reason: Option<&str>,
        duration: Duration,
    ) {
        let reason = reason.map(|reason| self.bounded_reason(reason)).unwrap_or_default();
        self.counter(
            MetricName::MigrationsTotal,
            &[role.as_str(), mode.as_str(), result.as_str(), &reason],
            1,
        );
        self.histogram(MetricName::MigrationDurationSeconds, &[role.as_str(), result.as_str()], duration);
    }

    /// Bytes that a guest in post-copy was owed and has.
    pub(crate) fn pulled(&self, fabric: &'static str, bytes: u64) {
        if bytes > 0 {
            self.counter(MetricName::PostcopyBytesTotal, &[fabric], bytes);
        }
    }

    /// The downtime of a migration, and its parts.
    pub fn downtime(&self, total: Duration, parts: &[(DowntimePart, Duration)]) {
        self.histogram(MetricName::MigrationDowntimeSeconds, &[], total);
        for (part, duration) in parts {
            self.histogram(MetricName::MigrationDowntimePartSeconds, &[part.as_str()], *duration);
        }
    }

    /// A guest stood still for longer than was asked for.
    pub fn over_max_downtime(&self) {
        self.counter(MetricName::MigrationsOverMaxDowntimeTotal, &[], 1);
    }

    /// A region that was registered.
    pub fn registration(
        &self,
        side: MigrationRole,
        mode: &'static str,
        fabric: &'static str,
        duration: Duration,
        bytes: u64,
    ) {
        let labels = [side.as_str(), mode, fabric];
        self.histogram(MetricName::RegistrationDurationSeconds, &labels, duration);
        self.counter(MetricName::RegisteredBytesTotal, &labels, bytes);
    }

    /// A region that could not be registered; `None` where the kernel was not asked.
    pub fn registration_error(&self, side: MigrationRole, errno: Option<i32>) {
        let errno = errno.map_or("none", errno_name);
        self.counter(MetricName::RegistrationErrorsTotal, &[side.as_str(), errno], 1);
    }

    /// A region that was deregistered.
    pub fn deregistration(&self, side: MigrationRole, fabric: &'static str, duration: Duration) {
        self.histogram(MetricName::DeregistrationDurationSeconds, &[side.as_str(), fabric], duration);
    }

    /// RAM moved since the last call: bytes, pages with data, pages that were only named as zero.
    pub fn transfer(&self, fabric: &'static str, bytes: u64, data_pages: u64, zero_pages: u64) {
        self.counter(MetricName::TransferBytesTotal, &[fabric], bytes);
        self.counter(MetricName::TransferPagesTotal, &["data"], data_pages);
        self.counter(MetricName::TransferPagesTotal, &["zero"], zero_pages);
    }

    /// Time in which a copy had pages to move and could not, since the last call.
    pub fn stall(&self, cause: &'static str, duration: Duration) {
        self.seconds(MetricName::StallSecondsTotal, cause, duration);
    }

    /// Time of the data plane's threads since the last call.
    pub fn poller(&self, busy: Duration, idle: Duration) {
        self.seconds(MetricName::PollerBusySecondsTotal, "", busy);
        self.seconds(MetricName::PollerIdleSecondsTotal, "", idle);
    }

    /// A harvest.
    pub fn harvest(&self, tracker: &'static str, duration: Duration, dirty_pages: u64) {
        self.histogram(MetricName::TrackingHarvestDurationSeconds, &[tracker], duration);
        self.counter(MetricName::TrackingDirtyPagesTotal, &[tracker], dirty_pages);
    }

    /// A gRPC call that ended; `method` must be one of a bounded set.
    fn grpc(&self, method: &str, code: &'static str, duration: Duration) {
        self.counter(MetricName::GrpcRequestsTotal, &[method, code], 1);
        self.histogram(MetricName::GrpcRequestDurationSeconds, &[method], duration);
    }

    /// What the checks of this host found.
    pub(crate) fn diagnosed(&self, findings: &[Finding]) {
        for Finding { check, verdict } in findings {
            self.gauge(MetricName::DoctorCheckStatus, &[check.info().id], verdict.status.gauge());
        }
    }

    fn active(&self) -> &Active {
        &self.0.active
    }

    fn counter(&self, metric: MetricName, labels: &[&str], count: u64) {
        self.0.recorder.register_counter(&key(metric, labels), &METADATA).increment(count);
    }

    fn gauge(&self, metric: MetricName, labels: &[&str], value: f64) {
        self.0.recorder.register_gauge(&key(metric, labels), &METADATA).set(value);
    }

    fn histogram(&self, metric: MetricName, labels: &[&str], duration: Duration) {
        self.0.recorder.register_histogram(&key(metric, labels), &METADATA).record(duration.as_secs_f64());
    }

    fn seconds(&self, metric: MetricName, label: &'static str, duration: Duration) {
        let mut seconds = self.0.seconds.lock().unwrap_or_else(PoisonError::into_inner);
        let total = seconds.entry((metric, label)).or_default();
        *total = total.saturating_add(duration);
    }

    /// A reason may be a peer's: only well-formed ones, and only so many.
    fn bounded_reason(&self, reason: &str) -> String {
        let mut reasons = self.0.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if reasons.contains(reason) {
            return reason.to_owned();
        }
        if !crate::status::is_reason(reason) || reasons.len() >= REASONS_LIMIT {
            return "OTHER".to_owned();
        }
        reasons.insert(reason.to_owned());
        reason.to_owned()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").field("active", &self.0.active).finish_non_exhaustive()
    }
}

fn key(metric: MetricName, labels: &[&str]) -> Key {
    let info = metric.info();
    assert_eq!(labels.len(), info.labels.len(), "{} has other labels", info.name);
    let labels: Vec<Label> =
        info.labels.iter().zip(labels).map(|(&name, &value)| Label::new(name, value.to_owned())).collect();
    Key::from_parts(info.name, labels)
}

/// A state's name in labels: "switching_over".
fn state_name(state: MigrationState) -> &'static str {
    match state {
        MigrationState::Unspecified => "unspecified",
        MigrationState::Pending => "pending",
        MigrationState::Preparing => "preparing",
        MigrationState::Precopy => "precopy",
        MigrationState::SwitchingOver => "switching_over",
        MigrationState::Postcopy => "postcopy",
        MigrationState::Cancelling => "cancelling",
        MigrationState::Succeeded => "succeeded",
        MigrationState::Failed => "failed",
        MigrationState::Cancelled => "cancelled",
    }
}

/// An errno's name in labels; `other` for those that registering gives rarely.
pub fn errno_name(raw: i32) -> &'static str {
    let errno = Errno::from_raw_os_error(raw);
    ERRNOS.iter().find(|(known, _)| *known == errno).map_or("other", |(_, name)| name)
}

#[cfg(test)]
mod tests;
