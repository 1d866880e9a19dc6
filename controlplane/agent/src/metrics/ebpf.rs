//! What the eBPF probes see. Their histograms are exact, and have the metrics' buckets: through
//! the recorder each call would have to be observed again.

use std::collections::BTreeMap;

use ramferry_probes::{BOUNDS_US, Histogram, Operation, Probe, ProbeState, Snapshot};

use super::text::Exposition;
use super::{MetricName, Metrics, errno_name};

/// The last that was read.
#[derive(Debug, Default)]
pub(super) struct Ebpf {
    /// Of each probe; of none where they are turned off, or are being attached.
    attached: BTreeMap<Probe, bool>,
    snapshot: Snapshot,
}

impl Metrics {
    /// Sets what the probes have seen since they were attached.
    pub fn set_ebpf(&self, states: &BTreeMap<Probe, ProbeState>, snapshot: Snapshot) {
        let attached = states.iter().map(|(&probe, state)| (probe, state.is_attached())).collect();
        *self.0.ebpf.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Ebpf { attached, snapshot };
    }
}

impl Ebpf {
    pub(super) fn render(&self, text: &mut Exposition) {
        if !self.attached.is_empty() {
            text.family(MetricName::EbpfProbeAttached);
        }
        for (probe, is_attached) in &self.attached {
            text.sample(MetricName::EbpfProbeAttached, &[probe.as_str()], u8::from(*is_attached));
        }
        text.family(MetricName::EbpfEventsDroppedTotal);
        text.sample(MetricName::EbpfEventsDroppedTotal, &[], self.snapshot.lost);
        let durations = [
            (MetricName::EbpfRegMrDurationSeconds, Operation::Register),
            (MetricName::EbpfDeregMrDurationSeconds, Operation::Deregister),
            (MetricName::EbpfPinDurationSeconds, Operation::Pin),
        ];
        for (metric, operation) in durations {
            self.render_durations(text, metric, operation);
        }
        let registered = self.totals(Operation::Register);
        if !registered.is_empty() {
            text.family(MetricName::EbpfPinnedBytesTotal);
        }
        for (process, histogram) in registered {
            text.sample(MetricName::EbpfPinnedBytesTotal, &[process], histogram.bytes);
        }
        self.render_errors(text);
    }

    fn render_durations(&self, text: &mut Exposition, metric: MetricName, operation: Operation) {
        let totals = self.totals(operation);
        if !totals.is_empty() {
            text.family(metric);
        }
        for (process, histogram) in totals {
            let bounds: Vec<_> = BOUNDS_US.iter().map(|&us| us as f64 / 1e6).collect();
            text.histogram(metric, &[process], &bounds, &histogram.slots, histogram.sum.as_secs_f64());
        }
    }

    fn render_errors(&self, text: &mut Exposition) {
        let mut errors: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        for (process, activity) in &self.snapshot.processes {
            for (&(operation, errno), count) in &activity.failures {
                if operation == Operation::Register {
                    let errno = if errno == 0 { "unknown" } else { errno_name(errno) };
                    *errors.entry((process, errno)).or_default() += count;
                }
            }
        }
        if !errors.is_empty() {
            text.family(MetricName::EbpfRegMrErrorsTotal);
        }
        for ((process, errno), count) in errors {
            text.sample(MetricName::EbpfRegMrErrorsTotal, &[process, errno], count);
        }
    }

    /// By process name; those that did it.
    fn totals(&self, operation: Operation) -> Vec<(&str, Histogram)> {
        let totals = self.snapshot.processes.iter();
        let totals = totals.map(|(process, activity)| (process.as_str(), activity.total(operation)));
        totals.filter(|(_, histogram)| histogram.count() > 0).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use ramferry_probes::{Absence, Activity, SizeClass};

    use super::super::buckets;
    use super::*;

    pub(in super::super) fn states() -> BTreeMap<Probe, ProbeState> {
        let absent = (Probe::IbUmemGet, ProbeState::Absent(Absence::NoKprobes));
        BTreeMap::from([(Probe::IbvRegMr, ProbeState::Attached), absent])
    }

    /// Three registrations of two sizes, two that failed, and one of each other operation.
    pub(in super::super) fn snapshot() -> Snapshot {
        let mut activity = Activity::default();
        let mut small = Histogram {
            sum: Duration::from_micros(11),
            max: Duration::from_micros(8),
            bytes: 12_288,
            ..Histogram::default()
        };
        (small.slots[0], small.slots[3]) = (1, 1);
        let mut large = Histogram { sum: Duration::from_secs(70), bytes: 1 << 30, ..Histogram::default() };
        large.slots[27] = 1;
        activity.calls.insert((Operation::Register, SizeClass::of(4096)), small);
        activity.calls.insert((Operation::Register, SizeClass::of(1 << 30)), large);
        activity.calls.insert((Operation::Deregister, SizeClass::of(4096)), small);
        activity.calls.insert((Operation::Pin, SizeClass::of(4096)), small);
        activity.failures.insert((Operation::Register, 12), 2);
        activity.failures.insert((Operation::Kernel, 12), 2);
        activity.failures.insert((Operation::Register, 0), 1);
        Snapshot { processes: BTreeMap::from([("a\"b".to_owned(), activity)]), lost: 3 }
    }

    #[test]
    fn bounds_of_the_probes_are_those_of_the_metrics() {
        let bounds: Vec<f64> = BOUNDS_US.iter().map(|&us| us as f64 / 1e6).collect();
        assert_eq!(bounds, buckets::REGISTRATION.bounds());
    }

    #[test]
    fn histograms_of_the_probes_are_exposed_to_the_last_call() {
        let metrics = Metrics::new();
        assert!(!metrics.render().contains("ramferry_ebpf_probe_attached{"), "they may be turned off");
        metrics.set_ebpf(&states(), snapshot());
        let text = metrics.render();
        let name = "ramferry_ebpf_reg_mr_duration_seconds";
        for line in [
            "ramferry_ebpf_probe_attached{probe=\"ibv_reg_mr\"} 1".to_owned(),
            "ramferry_ebpf_probe_attached{probe=\"ib_umem_get\"} 0".to_owned(),
            "ramferry_ebpf_events_dropped_total 3".to_owned(),
            format!("{name}_bucket{{process=\"a\\\"b\",le=\"0.000001\"}} 1"),
            format!("{name}_bucket{{process=\"a\\\"b\",le=\"0.000004\"}} 1"),
            format!("{name}_bucket{{process=\"a\\\"b\",le=\"0.000008\"}} 2"),
            format!("{name}_bucket{{process=\"a\\\"b\",le=\"67.108864\"}} 2"),
            format!("{name}_bucket{{process=\"a\\\"b\",le=\"+Inf\"}} 3"),
            format!("{name}_sum{{process=\"a\\\"b\"}} 70.000011"),
            format!("{name}_count{{process=\"a\\\"b\"}} 3"),
            format!("ramferry_ebpf_pinned_bytes_total{{process=\"a\\\"b\"}} {}", (1_u64 << 30) + 12_288),
            "ramferry_ebpf_reg_mr_errors_total{process=\"a\\\"b\",errno=\"ENOMEM\"} 2".to_owned(),
            "ramferry_ebpf_reg_mr_errors_total{process=\"a\\\"b\",errno=\"unknown\"} 1".to_owned(),
        ] {
            assert_eq!(text.matches(&format!("{line}\n")).count(), 1, "{line} in {text}");
        }
    }
}
