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
}
