//! docs/metrics.md.

use std::fmt::Write as _;

use super::{MetricKind, MetricName};

/// The text of docs/metrics.md.
pub fn markdown() -> String {
    let mut text = String::from(HEAD);
    for metric in MetricName::ALL {
        let info = metric.info();
        let labels = match info.labels {
            [] => "-".to_owned(),
            labels => labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", "),
        };
        writeln!(
            text,
            "| `{}` | {} | {} | {labels} | {} |",
            info.name,
            info.kind.exposed(),
            info.unit,
            help(info.kind, info.help)
        )
        .expect("a String takes all text");
    }
    text
}

const HEAD: &str = "\
# Metrics

Made from `MetricName` in `controlplane/agent/src/metrics/names.rs`; to make it again:
`UPDATE=1 cargo test -p ramferry-agent docs_list_every_metric`.

The agent serves them at `http://127.0.0.1:9750/metrics` (key `metrics_listen`; `off` serves none). On an
address other than loopback the endpoint is `https`, and asks for a certificate that `tls_ca` signed.

Histograms have classic buckets, in powers of two. Labels have few values; `migration` is a label only of
migrations under way, at most `max_migrations` of them. Counters that alerts watch are there from the start, at 0.

Dashboards and alerts made of these are under `dashboards/`
([operations.md](operations.md)).

| name | type | unit | labels | what it tells |
|---|---|---|---|---|
";

fn help(kind: MetricKind, help: &str) -> String {
    match kind {
        MetricKind::Histogram(buckets) => {
            let bounds = buckets.bounds();
            let (first, last) = (bounds[0], bounds[bounds.len() - 1]);
            format!("{help} Buckets: {first} to {last} s.")
        }
        MetricKind::MigrationGauge => format!("{help} Gone when the migration has ended."),
        _ => help.to_owned(),
    }
}
