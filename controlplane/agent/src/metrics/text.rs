//! Prometheus' text format, for what the recorder cannot hold.

use std::fmt::{Display, Write as _};

use super::MetricName;

/// Text under construction.
#[derive(Debug, Default)]
pub(super) struct Exposition(String);

impl Exposition {
    /// Goes on behind text that ends with a line.
    pub(super) fn after(text: String) -> Self {
        Self(text)
    }

    /// Begins a metric; its samples must follow.
    pub(super) fn family(&mut self, metric: MetricName) {
        let info = metric.info();
        self.line(format_args!("# HELP {} {}", info.name, info.help));
        self.line(format_args!("# TYPE {} {}", info.name, info.kind.exposed()));
    }

    /// One value, with the labels that the metric has, in their order.
    pub(super) fn sample(&mut self, metric: MetricName, labels: &[&str], value: impl Display) {
        let info = metric.info();
        assert_eq!(labels.len(), info.labels.len(), "{} has other labels", info.name);
        let mut pairs = String::new();
        for (name, value) in info.labels.iter().zip(labels) {
            let comma = if pairs.is_empty() { "" } else { "," };
            write!(pairs, "{comma}{name}=\"{}\"", escaped(value)).expect("a String takes all text");
        }
        if pairs.is_empty() {
            self.line(format_args!("{} {value}", info.name));
        } else {
            self.line(format_args!("{}{{{pairs}}} {value}", info.name));
        }
    }

    /// A histogram of one set of labels, from the number of observations up to each bound and above the one before; the
    /// last number, one more than there are bounds, is of those above all.
    pub(super) fn histogram(
        &mut self,
        metric: MetricName,
        labels: &[&str],
        bounds: &[f64],
        counts: &[u64],
        sum_seconds: f64,
    ) {
        let info = metric.info();
        assert_eq!(labels.len(), info.labels.len(), "{} has other labels", info.name);
        assert_eq!(counts.len(), bounds.len() + 1, "{} has other buckets", info.name);
        let pairs: Vec<_> = info
            .labels
            .iter()
            .zip(labels)
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
            .collect();
        let pairs = pairs.join(",");
        let comma = if pairs.is_empty() { "" } else { "," };
        let mut total = 0;
        let bounds = bounds.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(counts) {
            total += count;
            self.line(format_args!("{}_bucket{{{pairs}{comma}le=\"{bound}\"}} {total}", info.name));
        }
        let braced = if pairs.is_empty() { pairs } else { format!("{{{pairs}}}") };
        self.line(format_args!("{}_sum{braced} {sum_seconds}", info.name));
        self.line(format_args!("{}_count{braced} {total}", info.name));
    }

    pub(super) fn finish(self) -> String {
        self.0
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("a String takes all text");
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_cannot_break_out() {
        let mut text = Exposition::default();
        text.sample(MetricName::MigrationRound, &["a\"} 1\nb\\", "source"], 3);
        assert_eq!(
            text.finish(),
            "ramferry_migration_round{migration=\"a\\\"} 1\\nb\\\\\",role=\"source\"} 3\n"
        );
    }

    #[test]
    fn buckets_of_a_histogram_are_cumulative() {
        let mut text = Exposition::default();
        let metric = MetricName::GrpcRequestDurationSeconds;
        text.histogram(metric, &["Get"], &[0.001, 0.002], &[2, 0, 1], 0.5);
        let name = metric.info().name;
        let expected = [
            format!("{name}_bucket{{method=\"Get\",le=\"0.001\"}} 2\n"),
            format!("{name}_bucket{{method=\"Get\",le=\"0.002\"}} 2\n"),
            format!("{name}_bucket{{method=\"Get\",le=\"+Inf\"}} 3\n"),
            format!("{name}_sum{{method=\"Get\"}} 0.5\n"),
            format!("{name}_count{{method=\"Get\"}} 3\n"),
        ];
        assert_eq!(text.finish(), expected.concat());
    }
}
