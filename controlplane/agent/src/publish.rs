//! From what the data plane counts to the metrics: the one place that does so.

use ramferry_engine::{Progress, Reason};
use ramferry_mover::{Counted, DestinationSnapshot, Registered, SourceSnapshot, Stall};
use ramferry_proto::v1;

use crate::MigrationRole;
use crate::metrics::{
    ActiveMigration, DowntimePart, Metrics, MigrationGauges, MigrationMode, MigrationResult,
};

/// The metrics of one migration on one side.
pub(crate) struct Publisher {
    metrics: Metrics,
    active: Option<ActiveMigration>,
    role: MigrationRole,
    mode: &'static str,
    fabric: &'static str,
    counted: Counted,
    harvests: u64,
}

impl Publisher {
    pub(crate) fn new(
        metrics: &Metrics,
        role: MigrationRole,
        id: &str,
        mode: &'static str,
        fabric: &'static str,
    ) -> Self {
        Self {
            active: Some(metrics.migration_started(role, id)),
            metrics: metrics.clone(),
            role,
            mode,
            fabric,
            counted: Counted::default(),
            harvests: 0,
        }
    }

    pub(crate) fn source(&mut self, snapshot: &SourceSnapshot, view: &v1::MigrationProgress) {
        self.count(&snapshot.counted, &snapshot.registrations);
        if let (Some((elapsed, pages)), Some(tracker), true) =
            (snapshot.last_harvest, snapshot.tracker, snapshot.harvests > self.harvests)
        {
            self.harvests = snapshot.harvests;
            self.metrics.harvest(tracker.as_str(), elapsed, pages);
        }
        if let Some(active) = &mut self.active {
            if !snapshot.state.is_final() {
                active.state(crate::source::state_on_the_wire(snapshot.state));
            }
            active.set(MigrationGauges {
                memory_bytes: view.ram_bytes,
                remaining_bytes: view.remaining_bytes,
                dirty_rate_bytes_per_second: view.dirty_rate_bytes_per_second,
                throughput_bytes_per_second: view.throughput_bits_per_second / 8,
                round: view.round,
            });
            active.set_pinned(snapshot.regions, snapshot.pinned_bytes);
        }
    }

    pub(crate) fn destination(&mut self, snapshot: &DestinationSnapshot) {
        self.count(&snapshot.counted, &snapshot.registrations);
        if let Some(active) = &mut self.active {
            if !snapshot.state.is_final() {
                active.state(crate::source::state_on_the_wire(snapshot.state));
            }
            active.set(MigrationGauges { memory_bytes: snapshot.ram_bytes, ..Default::default() });
            active.set_pinned(snapshot.regions, snapshot.pinned_bytes);
        }
    }

    pub(crate) fn downtime(&self, progress: &Progress) {
        const PARTS: [DowntimePart; 10] = [
            DowntimePart::Pause,
            DowntimePart::Harvest,
            DowntimePart::Recheck,
            DowntimePart::Copy,
            DowntimePart::Fence,
            DowntimePart::Acknowledge,
            DowntimePart::Verify,
            DowntimePart::DeviceState,
            DowntimePart::Journal,
            DowntimePart::Commit,
        ];
        let parts = progress.downtime_parts.named();
        let parts: Vec<_> = PARTS
            .into_iter()
            .filter_map(|part| {
                let named = parts.iter().find(|(name, _)| *name == part.as_str())?;
                Some((part, named.1))
            })
            .collect();
        self.metrics.downtime(progress.downtime.unwrap_or_default(), &parts);
    }

    pub(crate) fn ended(&mut self, state: v1::MigrationState, reason: Option<&str>) {
        let result = match state {
            v1::MigrationState::Succeeded => MigrationResult::Succeeded,
            v1::MigrationState::Cancelled => MigrationResult::Cancelled,
            _ => MigrationResult::Failed,
        };
        if reason == Some(Reason::RegistrationFailed.as_str()) {
            self.metrics.registration_error(self.role, None);
        }
        if let Some(active) = self.active.take() {
            active.ended(MigrationMode::Precopy, result, reason);
        }
    }

    fn count(&mut self, now: &Counted, registrations: &[Registered]) {
        let before = std::mem::replace(&mut self.counted, *now);
        if self.role == MigrationRole::Source {
            self.metrics.transfer(
                self.fabric,
                now.data_bytes - before.data_bytes,
                now.data_pages - before.data_pages,
                now.zero_pages - before.zero_pages,
            );
            for (cause, (now, before)) in Stall::ALL.iter().zip(now.stalled.iter().zip(before.stalled)) {
                self.metrics.stall(cause.as_str(), now.saturating_sub(before));
            }
            self.metrics.poller(
                now.poller_busy.saturating_sub(before.poller_busy),
                now.poller_idle.saturating_sub(before.poller_idle),
            );
        }
        for registered in registrations {
            self.metrics.registration(
                self.role,
                self.mode,
                self.fabric,
                registered.elapsed,
                registered.bytes,
            );
        }
    }
}
