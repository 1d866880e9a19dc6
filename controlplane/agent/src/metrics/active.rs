//! Migrations under way. Their gauges are rendered from here and not through the
//! recorder, which cannot forget a gauge: they are gone with the migration.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ramferry_fabric::FabricKind;
use ramferry_proto::v1::MigrationState;

use super::text::Exposition;
use super::{MetricName, Metrics, MigrationMode, MigrationResult};
use crate::MigrationRole;

type Key = (String, MigrationRole);
/// A metric and where its value is.
type Field<T, V = u64> = (MetricName, fn(&T) -> V);

/// All migrations under way.
#[derive(Debug, Default)]
pub(super) struct Active(Mutex<BTreeMap<Key, Entry>>);

#[derive(Clone, Debug)]
struct Entry {
    owner: Arc<()>,
    state: MigrationState,
    state_entered: Instant,
    gauges: MigrationGauges,
    regions: u64,
    /// Of its fabric.
    pinned_bytes: (&'static str, u64),
    send_queue_depth: u64,
}

/// The gauges of one migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationGauges {
    /// RAM of the guest.
    pub memory_bytes: u64,
    /// Of the round under way.
    pub remaining_bytes: u64,
    /// Written by the guest.
    pub dirty_rate_bytes_per_second: u64,
    /// Of the copy itself.
    pub throughput_bytes_per_second: u64,
    /// From 1; 0 before the first.
    pub round: u32,
    /// If it switched over now; `None` before it was measured, in post-copy, and at a destination.
    pub expected_downtime: Option<Duration>,
    /// What is aimed at; `None` at a destination.
    pub max_downtime: Option<Duration>,
    /// Processor time that is taken from the guest; `None` at a destination.
    pub throttle_percent: Option<u8>,
}

/// A migration that is under way, to the metrics. Dropping it ends that.
#[derive(Debug)]
pub struct ActiveMigration {
    metrics: Metrics,
    key: Key,
    owner: Arc<()>,
    started: Instant,
    state_entered: Instant,
    state: MigrationState,
}

impl Metrics {
    /// A migration begins, in state PENDING.
    pub fn migration_started(&self, role: MigrationRole, id: &str) -> ActiveMigration {
        let now = Instant::now();
        let owner = Arc::new(());
        let state = MigrationState::Pending;
        let key = (id.to_owned(), role);
        let entry = Entry {
            owner: Arc::clone(&owner),
            state,
            state_entered: now,
            gauges: MigrationGauges::default(),
            regions: 0,
            pinned_bytes: ("unknown", 0),
            send_queue_depth: 0,
        };
        self.active().lock().insert(key.clone(), entry);
        ActiveMigration { metrics: self.clone(), key, owner, started: now, state_entered: now, state }
    }

    /// Migrations under way now, both roles together.
    pub fn migrations_active(&self) -> u32 {
        u32::try_from(self.active().lock().len()).unwrap_or(u32::MAX)
    }
}

impl ActiveMigration {
    /// It enters a state; the time in the one before is recorded.
    pub fn state(&mut self, state: MigrationState) {
        if state == self.state {
            return;
        }
        let now = Instant::now();
        self.metrics.phase(self.key.1, self.state, now - self.state_entered);
        self.state_entered = now;
        self.state = state;
        self.update(|entry| (entry.state, entry.state_entered) = (state, now));
    }

    /// Sets its gauges.
    pub fn set(&self, gauges: MigrationGauges) {
        self.update(|entry| entry.gauges = gauges);
    }

    /// Sets what its side has registered now.
    pub fn set_pinned(&self, fabric: &'static str, regions: u64, pinned_bytes: u64) {
        self.update(|entry| (entry.regions, entry.pinned_bytes) = (regions, (fabric, pinned_bytes)));
    }

    /// Sets how many operations are under way.
    pub fn set_send_queue_depth(&self, operations: u64) {
        self.update(|entry| entry.send_queue_depth = operations);
    }

    /// It ended: counts it, and takes its gauges away. `reason` is that of its
    /// error; `None` when it succeeded. Returns how long it took.
    pub fn ended(self, mode: MigrationMode, result: MigrationResult, reason: Option<&str>) -> Duration {
        let elapsed = self.started.elapsed();
        self.metrics.phase(self.key.1, self.state, self.state_entered.elapsed());
        self.metrics.migration_ended(self.key.1, mode, result, reason, elapsed);
        elapsed
    }

    fn update(&self, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.metrics.active().lock().get_mut(&self.key)
            && Arc::ptr_eq(&entry.owner, &self.owner)
        {
            change(entry);
        }
    }
}

impl Drop for ActiveMigration {
    fn drop(&mut self) {
        let mut entries = self.metrics.active().lock();
        if entries.get(&self.key).is_some_and(|entry| Arc::ptr_eq(&entry.owner, &self.owner)) {
            entries.remove(&self.key);
        }
    }
}

impl Active {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn render(&self, text: &mut Exposition) {
        let entries = self.lock().clone();
        render_counts(&entries, text);
        render_sums(&entries, text);
        let gauges: [Field<MigrationGauges>; 5] = [
            (MetricName::MigrationMemoryBytes, |gauges| gauges.memory_bytes),
            (MetricName::MigrationRemainingBytes, |gauges| gauges.remaining_bytes),
            (MetricName::MigrationDirtyRate, |gauges| gauges.dirty_rate_bytes_per_second),
            (MetricName::MigrationThroughput, |gauges| gauges.throughput_bytes_per_second),
            (MetricName::MigrationRound, |gauges| gauges.round.into()),
        ];
        for (metric, value) in gauges {
            if entries.is_empty() {
                continue;
            }
            text.family(metric);
            for ((id, role), entry) in &entries {
                text.sample(metric, &[id, role.as_str()], value(&entry.gauges));
            }
        }
        render_of_sources(&entries, text);
        render_postcopy(&entries, text);
    }
}

fn render_counts(entries: &BTreeMap<Key, Entry>, text: &mut Exposition) {
    let mut counts: BTreeMap<(MigrationRole, &str), u64> = BTreeMap::new();
    for role in [MigrationRole::Source, MigrationRole::Destination] {
        for state in super::ACTIVE_STATES {
            counts.insert((role, super::state_name(state)), 0);
        }
    }
    for ((_, role), entry) in entries {
        *counts.entry((*role, super::state_name(entry.state))).or_default() += 1;
    }
    text.family(MetricName::MigrationsActive);
    for ((role, state), count) in counts {
        text.sample(MetricName::MigrationsActive, &[role.as_str(), state], count);
    }
}

/// What only sources have.
fn render_of_sources(entries: &BTreeMap<Key, Entry>, text: &mut Exposition) {
    let of_sources: [Field<MigrationGauges, Option<f64>>; 3] = [
        (MetricName::MigrationExpectedDowntime, |gauges| gauges.expected_downtime.map(seconds)),
        (MetricName::MigrationMaxDowntime, |gauges| gauges.max_downtime.map(seconds)),
        (MetricName::MigrationThrottleRatio, |gauges| gauges.throttle_percent.map(ratio)),
    ];
    for (metric, value) in of_sources {
        let known = entries.iter().filter_map(|(key, entry)| Some((key, value(&entry.gauges)?)));
        for (index, ((id, role), value)) in known.enumerate() {
            if index == 0 {
                text.family(metric);
            }
            text.sample(metric, &[id, role.as_str()], value);
        }
    }
}

/// As of now, not of when it was last set: an agent that waits sets nothing.
fn render_postcopy(entries: &BTreeMap<Key, Entry>, text: &mut Exposition) {
    let metric = MetricName::MigrationPostcopySeconds;
    let in_postcopy = entries.iter().filter(|(_, entry)| entry.state == MigrationState::Postcopy);
    for (index, ((id, role), entry)) in in_postcopy.enumerate() {
        if index == 0 {
            text.family(metric);
        }
        text.sample(metric, &[id, role.as_str()], seconds(entry.state_entered.elapsed()));
    }
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

fn ratio(percent: u8) -> f64 {
    f64::from(percent) / 100.0
}

fn render_sums(entries: &BTreeMap<Key, Entry>, text: &mut Exposition) {
    const SIDES: [MigrationRole; 2] = [MigrationRole::Source, MigrationRole::Destination];
    text.family(MetricName::Regions);
    for side in SIDES {
        let of_side = entries.iter().filter(|((_, role), _)| *role == side);
        let sum: u64 = of_side.map(|(_, entry)| entry.regions).sum();
        text.sample(MetricName::Regions, &[side.as_str()], sum);
    }
    let fabrics = [FabricKind::Verbs, FabricKind::Shm, FabricKind::Tcp].map(FabricKind::as_str);
    let sides = SIDES.into_iter().flat_map(|side| fabrics.map(|fabric| ((side, fabric), 0)));
    let mut pinned: BTreeMap<(MigrationRole, &str), u64> = sides.collect();
    for ((_, role), entry) in entries {
        let (fabric, bytes) = entry.pinned_bytes;
        if bytes > 0 {
            *pinned.entry((*role, fabric)).or_default() += bytes;
        }
    }
    text.family(MetricName::PinnedBytes);
    for ((side, fabric), bytes) in pinned {
        text.sample(MetricName::PinnedBytes, &[side.as_str(), fabric], bytes);
    }
    let depth: u64 = entries.values().map(|entry| entry.send_queue_depth).sum();
    text.family(MetricName::SendQueueDepth);
    text.sample(MetricName::SendQueueDepth, &[], depth);
}
