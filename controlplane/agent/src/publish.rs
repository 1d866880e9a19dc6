//! From what the data plane counts to the metrics: the one place that does so.

use std::time::Duration;

use ramferry_engine::State;
use ramferry_mover::{
    Counted, DestinationSnapshot, Opcode, OperationCounts, RegistrationEvents, SourceSnapshot, Stall,
};
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
    /// It came to post-copy.
    postcopy: bool,
}

impl Publisher {
    pub(crate) fn new(
        metrics: &Metrics,
        role: MigrationRole,
        id: &str,
        mode: &'static str,
        fabric: &'static str,
    ) -> Self {
        if role == MigrationRole::Destination {
            metrics.reads_begin(fabric);
        }
        Self {
            active: Some(metrics.migration_started(role, id)),
            metrics: metrics.clone(),
            role,
            mode,
            fabric,
            counted: Counted::default(),
            harvests: 0,
            postcopy: false,
        }
    }

    pub(crate) fn source(&mut self, snapshot: &SourceSnapshot, view: &v1::MigrationProgress) {
        self.postcopy |= snapshot.progress.postcopy;
        self.count(&snapshot.counted, &snapshot.recent);
        if let (Some((elapsed, pages)), Some(tracker), true) =
            (snapshot.last_harvest, snapshot.tracker, snapshot.harvests > self.harvests)
        {
            self.harvests = snapshot.harvests;
            self.metrics.harvest(tracker.as_str(), elapsed, pages);
        }
        if let Some(active) = &mut self.active {
            // Before the state: what there is none of in it is gone when it begins.
            active.set(MigrationGauges {
                memory_bytes: view.ram_bytes,
                remaining_bytes: view.remaining_bytes,
                dirty_rate_bytes_per_second: view.dirty_rate_bytes_per_second,
                throughput_bytes_per_second: view.throughput_bits_per_second / 8,
                round: view.round,
                expected_downtime: expected_downtime(snapshot),
                max_downtime: Some(snapshot.max_downtime),
                throttle_percent: Some(snapshot.progress.throttle.0),
            });
            if !snapshot.state.is_final() {
                active.state(crate::source::state_on_the_wire(snapshot.state));
            }
            active.set_pinned(self.fabric, snapshot.regions, snapshot.pinned_bytes);
            let in_flight = snapshot.counted.operations.iter().map(OperationCounts::in_flight);
            active.set_send_queue_depth(in_flight.sum());
        }
    }

    pub(crate) fn destination(&mut self, snapshot: &DestinationSnapshot) {
        self.count(&snapshot.counted, &snapshot.recent);
        if let Some(active) = &mut self.active {
            if !snapshot.state.is_final() {
                active.state(crate::source::state_on_the_wire(snapshot.state));
            }
            let remaining_bytes = snapshot.owed_bytes.unwrap_or_default();
            self.postcopy |= snapshot.owed_bytes.is_some() || snapshot.state == State::Postcopy;
            let memory_bytes = snapshot.ram_bytes;
            active.set(MigrationGauges { memory_bytes, remaining_bytes, ..Default::default() });
            active.set_pinned(self.fabric, snapshot.regions, snapshot.pinned_bytes);
        }
    }

    pub(crate) fn downtime(&self, snapshot: &SourceSnapshot) {
        const PARTS: [DowntimePart; 11] = [
            DowntimePart::Pause,
            DowntimePart::Harvest,
            DowntimePart::Recheck,
            DowntimePart::Copy,
            DowntimePart::Fence,
            DowntimePart::Acknowledge,
            DowntimePart::Verify,
            DowntimePart::Owed,
            DowntimePart::DeviceState,
            DowntimePart::Journal,
            DowntimePart::Commit,
        ];
        let progress = &snapshot.progress;
        let parts = progress.downtime_parts.named();
        let parts: Vec<_> = PARTS
            .into_iter()
            .filter_map(|part| {
                let named = parts.iter().find(|(name, _)| *name == part.as_str())?;
                Some((part, named.1))
            })
            .collect();
        let downtime = progress.downtime.unwrap_or_default();
        self.metrics.downtime(downtime, &parts);
        if downtime.saturating_sub(progress.downtime_parts.verify) > snapshot.max_downtime {
            self.metrics.over_max_downtime();
        }
    }

    pub(crate) fn ended(&mut self, state: v1::MigrationState, reason: Option<&str>) {
        let result = match state {
            v1::MigrationState::Succeeded => MigrationResult::Succeeded,
            v1::MigrationState::Cancelled => MigrationResult::Cancelled,
            _ => MigrationResult::Failed,
        };
        if let Some(active) = self.active.take() {
            let mode = if self.postcopy { MigrationMode::Postcopy } else { MigrationMode::Precopy };
            active.ended(mode, result, reason);
        }
    }

    fn count(&mut self, now: &Counted, recent: &RegistrationEvents) {
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
            for (opcode, (now, before)) in
                Opcode::ALL.into_iter().zip(now.operations.iter().zip(&before.operations))
            {
                self.metrics.operations(self.fabric, opcode, &now.since(before));
            }
        }
        if self.role == MigrationRole::Destination {
            self.metrics.pulled(self.fabric, now.data_bytes - before.data_bytes);
            let (now_reads, before_reads) =
                (Opcode::Read as usize, &before.operations[Opcode::Read as usize]);
            let reads = now.operations[now_reads].since(before_reads);
            if reads.posted > 0 || reads.completed.iter().any(|count| *count > 0) {
                self.metrics.operations(self.fabric, Opcode::Read, &reads);
            }
            self.metrics.postcopy_faults(self.fabric, &now.faults.since(&before.faults));
        }
        for errno in &recent.failed {
            self.metrics.registration_error(self.role, *errno);
        }
        for elapsed in &recent.deregistered {
            self.metrics.deregistration(self.role, self.fabric, *elapsed);
        }
        for registered in &recent.registered {
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

/// Once the guest has switched over there is none to come: what was measured last would look as if it did not converge.
fn expected_downtime(snapshot: &SourceSnapshot) -> Option<Duration> {
    snapshot.progress.expected_downtime.filter(|_| snapshot.state != State::Postcopy)
}
