//! What probes have seen, as a table and as an object.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ramferry_agent::metrics::errno_name;
use ramferry_probes::{
    Activity, BOUNDS_US, Histogram, Operation, Probe, ProbeState, SizeClass, Snapshot, absences,
};
use serde::Serialize;

use super::table::columns;
use super::{bytes, duration, three_digits};

/// All there is to show at one moment.
pub(crate) struct View<'a> {
    pub(crate) probes: &'a BTreeMap<Probe, ProbeState>,
    pub(crate) libraries: &'a [PathBuf],
    pub(crate) snapshot: &'a Snapshot,
    /// Since the probes were attached.
    pub(crate) elapsed: Duration,
    /// Since `earlier`; not zero.
    pub(crate) interval: Duration,
    pub(crate) earlier: &'a Snapshot,
    pub(crate) is_final: bool,
}

/// As a program reads it.
#[derive(Debug, Serialize)]
pub(crate) struct ProbeObject {
    #[serde(rename = "final")]
    is_final: bool,
    elapsed_seconds: f64,
    interval_seconds: f64,
    libraries: Vec<String>,
    probes: Vec<StateObject>,
    lost_calls: u64,
    processes: Vec<ProcessObject>,
}

#[derive(Debug, Serialize)]
struct StateObject {
    probe: &'static str,
    attached: bool,
    /// A word, where it is not attached.
    reason: Option<&'static str>,
    detail: Option<String>,
    remedy: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct ProcessObject {
    process: String,
    calls: Vec<CallsObject>,
    errors: Vec<ErrorsObject>,
    /// Of the time of its registrations; none where the kernel is not probed.
    kernel_share: Option<f64>,
    pin_share: Option<f64>,
    minor_faults: u64,
    major_faults: u64,
    compactions: u64,
    compaction_seconds: f64,
}

#[derive(Debug, Serialize)]
struct CallsObject {
    operation: &'static str,
    /// The smallest size of the class; none where it is not known.
    size_bytes: Option<u64>,
    count: u64,
    count_per_second: f64,
    bytes: u64,
    bytes_per_second: f64,
    sum_seconds: f64,
    p50_seconds: f64,
    p99_seconds: f64,
    max_seconds: f64,
    /// Where calls are: those that took at most `le_seconds` and longer than the bound before it; none is no bound.
    buckets: Vec<BucketObject>,
}

#[derive(Debug, Serialize)]
struct BucketObject {
    le_seconds: Option<f64>,
    count: u64,
}

#[derive(Debug, Serialize)]
struct ErrorsObject {
    operation: &'static str,
    errno: i32,
    name: &'static str,
    count: u64,
}

impl View<'_> {
    /// The table, with what could not be seen below it.
    pub(crate) fn text(&self) -> String {
        let attached = self.probes.values().filter(|state| state.is_attached()).count();
        let mut text =
            format!("{} of {} probes attached, {}\n", attached, self.probes.len(), duration(self.elapsed));
        let rows: Vec<Vec<String>> = self.rows().into_iter().map(|row| self.cells(&row)).collect();
        if rows.is_empty() {
            text.push_str("no registrations yet\n");
        } else {
            text.push_str(&columns(
                &[
                    "PROCESS",
                    "CALL",
                    "SIZE",
                    "COUNT",
                    "PER SECOND",
                    "BYTES",
                    "P50",
                    "P99",
                    "MAX",
                    "IN KERNEL",
                    "PINNING",
                ],
                &rows,
            ));
        }
        for (process, activity) in &self.snapshot.processes {
            for ((operation, errno), count) in &activity.failures {
                if matches!(operation, Operation::Register | Operation::Deregister) {
                    text.push_str(&format!(
                        "failed: {process} {}: {} {count}\n",
                        operation.as_str(),
                        name(*errno)
                    ));
                }
            }
        }
        if self.snapshot.lost > 0 {
            text.push_str(&format!("not counted: {} calls\n", self.snapshot.lost));
        }
        for absent in absences(self.probes) {
            text.push_str(&format!("absent: {absent}\n"));
            if !absent.absence.remedy().is_empty() {
                text.push_str(&format!("        -> {}\n", absent.absence.remedy()));
            }
        }
        super::printable(&text)
    }

    /// The object.
    pub(crate) fn object(&self) -> ProbeObject {
        ProbeObject {
            is_final: self.is_final,
            elapsed_seconds: self.elapsed.as_secs_f64(),
            interval_seconds: self.interval.as_secs_f64(),
            libraries: self.libraries.iter().map(|path| path.display().to_string()).collect(),
            probes: self
                .probes
                .iter()
                .map(|(probe, state)| StateObject {
                    probe: probe.as_str(),
                    attached: state.is_attached(),
                    reason: state.absence().map(|absence| absence.code()),
                    detail: state.absence().map(ToString::to_string),
                    remedy: state.absence().map(|absence| absence.remedy()),
                })
                .collect(),
            lost_calls: self.snapshot.lost,
            processes: self
                .snapshot
                .processes
                .iter()
                .map(|(name, activity)| self.process(name, activity))
                .collect(),
        }
    }

    fn process(&self, process: &str, activity: &Activity) -> ProcessObject {
        let share = |operation| {
            share(&activity.total(operation), &activity.total(Operation::Register), self.sees(operation))
        };
        ProcessObject {
            process: process.to_owned(),
            calls: activity
                .calls
                .iter()
                .map(|(&(operation, size), histogram)| self.calls(process, operation, size, histogram))
                .collect(),
            errors: activity
                .failures
                .iter()
                .map(|(&(operation, errno), &count)| ErrorsObject {
                    operation: operation.as_str(),
                    errno,
                    name: name(errno),
                    count,
                })
                .collect(),
            kernel_share: share(Operation::Kernel),
            pin_share: share(Operation::Pin),
            minor_faults: activity.pressure.minor_faults,
            major_faults: activity.pressure.major_faults,
            compactions: activity.pressure.compactions,
            compaction_seconds: activity.pressure.compaction.as_secs_f64(),
        }
    }

    fn calls(
        &self,
        process: &str,
        operation: Operation,
        size: SizeClass,
        histogram: &Histogram,
    ) -> CallsObject {
        let earlier = self.earlier(process, operation, size);
        let seconds = self.interval.as_secs_f64();
        let quantile = |share| histogram.quantile(share).unwrap_or_default().as_secs_f64();
        let bound = |slot| BOUNDS_US.get(slot).map(|&us| us as f64 / 1e6);
        let buckets = histogram.slots.iter().enumerate().filter(|(_, count)| **count > 0);
        CallsObject {
            operation: operation.as_str(),
            size_bytes: size.smallest_bytes(),
            count: histogram.count(),
            count_per_second: histogram.count().saturating_sub(earlier.count()) as f64 / seconds,
            bytes: histogram.bytes,
            bytes_per_second: histogram.bytes.saturating_sub(earlier.bytes) as f64 / seconds,
            sum_seconds: histogram.sum.as_secs_f64(),
            p50_seconds: quantile(0.5),
            p99_seconds: quantile(0.99),
            max_seconds: histogram.max.as_secs_f64(),
            buckets: buckets.map(|(slot, &count)| BucketObject { le_seconds: bound(slot), count }).collect(),
        }
    }

    /// Calls of libibverbs; what the kernel does of them is a column.
    fn rows(&self) -> Vec<Row<'_>> {
        // Where libibverbs cannot be probed, the kernel's own counts are all there is.
        let has_library = self.sees(Operation::Register);
        let is_row = |operation| match operation {
            Operation::Register | Operation::Deregister => true,
            Operation::Kernel | Operation::Pin => !has_library,
        };
        let mut rows = Vec::new();
        for (process, activity) in &self.snapshot.processes {
            for (&(operation, size), histogram) in &activity.calls {
                if is_row(operation) {
                    rows.push(Row { process, activity, operation, size, histogram });
                }
            }
        }
        rows
    }

    fn cells(&self, row: &Row<'_>) -> Vec<String> {
        let calls = self.calls(row.process, row.operation, row.size, row.histogram);
        let seconds = |seconds| duration(Duration::from_secs_f64(seconds));
        let part = |operation| {
            let part = row.activity.calls.get(&(operation, row.size)).copied().unwrap_or_default();
            let is_seen = row.operation == Operation::Register && self.sees(operation);
            share(&part, row.histogram, is_seen)
                .map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", share * 100.0))
        };
        vec![
            row.process.to_owned(),
            row.operation.as_str().to_owned(),
            row.size.smallest_bytes().map_or_else(|| "?".to_owned(), bytes),
            calls.count.to_string(),
            three_digits(calls.count_per_second),
            bytes(calls.bytes),
            seconds(calls.p50_seconds),
            seconds(calls.p99_seconds),
            seconds(calls.max_seconds),
            part(Operation::Kernel),
            part(Operation::Pin),
        ]
    }

    fn earlier(&self, process: &str, operation: Operation, size: SizeClass) -> Histogram {
        let activity = self.earlier.processes.get(process);
        activity.and_then(|activity| activity.calls.get(&(operation, size))).copied().unwrap_or_default()
    }

    /// Whether an operation can be seen here at all.
    fn sees(&self, operation: Operation) -> bool {
        let probe = match operation {
            Operation::Register => Probe::IbvRegMr,
            Operation::Deregister => Probe::IbvDeregMr,
            Operation::Kernel => Probe::IbUverbsRegMr,
            Operation::Pin => Probe::IbUmemGet,
        };
        self.probes.get(&probe).is_some_and(ProbeState::is_attached)
    }
}

struct Row<'a> {
    process: &'a str,
    activity: &'a Activity,
    operation: Operation,
    size: SizeClass,
    histogram: &'a Histogram,
}

fn name(errno: i32) -> &'static str {
    if errno == 0 { "unknown" } else { errno_name(errno) }
}

/// Of the time of `whole`; none of nothing, and where the part is not seen.
fn share(part: &Histogram, whole: &Histogram, is_seen: bool) -> Option<f64> {
    let whole = whole.sum.as_secs_f64();
    (is_seen && whole > 0.0).then(|| part.sum.as_secs_f64() / whole)
}

#[cfg(test)]
mod tests {
    use ramferry_probes::Absence;

    use super::*;

    fn snapshot(calls: u64) -> Snapshot {
        let mut activity = Activity::default();
        let mut register = Histogram {
            sum: Duration::from_micros(100 * calls),
            max: Duration::from_micros(120),
            bytes: calls << 20,
            ..Histogram::default()
        };
        register.slots[7] = calls;
        let kernel = Histogram { sum: register.sum.mul_f64(0.9), ..register };
        let pin = Histogram { sum: register.sum / 2, ..register };
        let size = SizeClass::of(1 << 20);
        activity.calls.insert((Operation::Register, size), register);
        activity.calls.insert((Operation::Kernel, size), kernel);
        activity.calls.insert((Operation::Pin, size), pin);
        activity.failures.insert((Operation::Register, 12), 2);
        Snapshot { processes: BTreeMap::from([("ib_write_bw".to_owned(), activity)]), lost: 0 }
    }

    fn states(kernel: ProbeState) -> BTreeMap<Probe, ProbeState> {
        BTreeMap::from([
            (Probe::IbvRegMr, ProbeState::Attached),
            (Probe::IbUverbsRegMr, kernel.clone()),
            (Probe::IbUmemGet, kernel),
        ])
    }

    fn view<'a>(
        probes: &'a BTreeMap<Probe, ProbeState>,
        snapshot: &'a Snapshot,
        earlier: &'a Snapshot,
    ) -> View<'a> {
        View {
            probes,
            libraries: &[],
            snapshot,
            elapsed: Duration::from_secs(3),
            interval: Duration::from_secs(2),
            earlier,
            is_final: false,
        }
    }

    #[test]
    fn table_has_rates_of_the_interval_and_shares_of_the_kernel() {
        let (probes, now, before) = (states(ProbeState::Attached), snapshot(10), snapshot(4));
        assert_eq!(
            view(&probes, &now, &before).text(),
            "3 of 3 probes attached, 3.00 s\n\
             PROCESS      CALL      SIZE      COUNT  PER SECOND  BYTES     P50      P99     MAX     IN KERNEL  PINNING\n\
             ib_write_bw  register  1.00 MiB  10     3.00        10.0 MiB  96.0 us  120 us  120 us  90 %       50 %\n\
             failed: ib_write_bw register: ENOMEM 2\n"
        );
    }

    #[test]
    fn absent_probes_are_told_with_their_reason_and_their_columns_are_empty() {
        let probes = states(ProbeState::Absent(Absence::NoKprobes));
        let (now, before) = (snapshot(10), Snapshot::default());
        let text = view(&probes, &now, &before).text();
        assert!(text.contains("120 us  -          -\n"), "{text}");
        assert!(text.contains("or /sys is not mounted here\n        -> mount /sys here"), "{text}");
        assert_eq!(text.matches("absent: ib_uverbs_reg_mr, ib_umem_get: ").count(), 1, "{text}");
    }

    #[test]
    fn object_has_exact_counts_and_the_reasons() {
        let probes = states(ProbeState::Absent(Absence::NoBtf));
        let (now, before) = (snapshot(10), snapshot(4));
        let object = serde_json::to_value(view(&probes, &now, &before).object()).expect("JSON");
        assert_eq!((&object["final"], &object["interval_seconds"]), (&false.into(), &2.0.into()));
        assert_eq!(object["probes"][1]["reason"], "no_btf");
        let process = &object["processes"][0];
        assert_eq!(
            (&process["process"], &process["pin_share"]),
            (&"ib_write_bw".into(), &None::<f64>.into())
        );
        let calls = &process["calls"][0];
        assert_eq!((&calls["operation"], &calls["size_bytes"]), (&"register".into(), &(1 << 20).into()));
        assert_eq!((&calls["count"], &calls["bytes"]), (&10.into(), &(10 << 20).into()));
        assert_eq!((&calls["count_per_second"], &calls["sum_seconds"]), (&3.0.into(), &0.001.into()));
        assert_eq!(calls["buckets"], serde_json::json!([{"le_seconds": 0.000128, "count": 10}]));
        let error = serde_json::json!({"operation": "register", "errno": 12, "name": "ENOMEM", "count": 2});
        assert_eq!(process["errors"], serde_json::json!([error]));
    }

    #[test]
    fn names_of_processes_cannot_drive_the_terminal() {
        let probes = states(ProbeState::Attached);
        let mut now = snapshot(1);
        let activity = now.processes.remove("ib_write_bw").expect("it was put there");
        now.processes.insert("a\u{1b}[2Jb\nc".to_owned(), activity);
        let text = view(&probes, &now, &Snapshot::default()).text();
        assert!(!text.contains('\u{1b}') && text.contains("\\u{1b}[2Jb"), "{text}");
    }
}
