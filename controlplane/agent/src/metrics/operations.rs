//! Operations of the data plane, counted there in exact buckets: the recorder
//! would take each of them one by one.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ramferry_mover::{CompletionStatus, Opcode, OperationCounts};

use super::text::Exposition;
use super::{MetricKind, MetricName, Metrics};

/// What all migrations of an agent posted, by fabric and opcode.
#[derive(Debug, Default)]
pub(super) struct OperationTotals {
    operations: Mutex<BTreeMap<(&'static str, &'static str), OperationCounts>>,
    /// Of guests in post-copy, by fabric.
    faults: Mutex<BTreeMap<&'static str, OperationCounts>>,
}

impl Metrics {
    /// A destination begins. What it may have to read in post-copy is there before there is any: post-copy can be over
    /// before the second scrape, and the first would be no increase.
    pub(crate) fn reads_begin(&self, fabric: &'static str) {
        self.operations(fabric, Opcode::Read, &OperationCounts::default());
        self.0.operations.lock_faults().entry(fabric).or_default();
        self.counter(MetricName::PostcopyBytesTotal, &[fabric], 0);
    }

    /// Operations since the last call.
    pub(crate) fn operations(&self, fabric: &'static str, opcode: Opcode, counts: &OperationCounts) {
        let mut totals = self.0.operations.operations.lock().unwrap_or_else(PoisonError::into_inner);
        totals.entry((fabric, opcode.as_str())).or_default().add(counts);
    }

    /// Accesses of guests in post-copy that waited for the source, since the last call.
    pub(crate) fn postcopy_faults(&self, fabric: &'static str, counts: &OperationCounts) {
        if counts.posted > 0 {
            self.0.operations.lock_faults().entry(fabric).or_default().add(counts);
        }
    }
}

impl OperationTotals {
    fn lock_faults(&self) -> MutexGuard<'_, BTreeMap<&'static str, OperationCounts>> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn render(&self, text: &mut Exposition) {
        self.render_operations(text);
        let totals = self.lock_faults().clone();
        if totals.is_empty() {
            return;
        }
        let metric = MetricName::PostcopyFaultDurationSeconds;
        text.family(metric);
        for (fabric, counts) in &totals {
            text.histogram(
                metric,
                &[fabric],
                &bounds(metric),
                &counts.latency,
                counts.latency_sum.as_secs_f64(),
            );
        }
    }

    fn render_operations(&self, text: &mut Exposition) {
        let totals = self.operations.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if totals.is_empty() {
            return;
        }
        text.family(MetricName::WorkRequestsTotal);
        for ((fabric, opcode), counts) in &totals {
            text.sample(MetricName::WorkRequestsTotal, &[fabric, opcode], counts.posted);
        }
        text.family(MetricName::CompletionsTotal);
        for ((fabric, opcode), counts) in &totals {
            for (status, count) in CompletionStatus::ALL.into_iter().zip(counts.completed) {
                let labels = [*fabric, *opcode, status.as_str()];
                text.sample(MetricName::CompletionsTotal, &labels, count);
            }
        }
        let metric = MetricName::PostToCompletionSeconds;
        text.family(metric);
        for ((fabric, opcode), counts) in &totals {
            let sum_seconds = counts.latency_sum.as_secs_f64();
            text.histogram(metric, &[fabric, opcode], &bounds(metric), &counts.latency, sum_seconds);
        }
    }
}

fn bounds(metric: MetricName) -> Vec<f64> {
    let MetricKind::Histogram(buckets) = metric.info().kind else {
        unreachable!("{metric:?} is listed as a histogram");
    };
    buckets.bounds()
}
