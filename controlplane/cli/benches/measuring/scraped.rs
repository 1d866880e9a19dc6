//! Histograms of an agent's metrics.

use anyhow::{Context as _, Result};

use super::agents::Agent;

/// Upper bounds in seconds, each with the number of times that were not longer.
#[derive(Debug, Default)]
pub(crate) struct Histogram(Vec<(f64, f64)>);

impl Histogram {
    /// What `agent` has measured since it started, of one fabric.
    pub(crate) fn read(agent: &Agent, metric: &str, fabric: &str) -> Result<Histogram> {
        let text = agent.scrape()?;
        let of_metric = format!("{metric}_bucket{{");
        let of_fabric = format!("fabric=\"{fabric}\"");
        let lines = text.lines().filter_map(|line| line.strip_prefix(&of_metric));
        let buckets = lines.filter(|line| line.contains(&of_fabric)).map(|line| {
            let (bound, rest) = line.split_once("le=\"")?.1.split_once('"')?;
            Some((bound.parse().ok()?, rest.split_once("} ")?.1.trim().parse().ok()?))
        });
        let buckets: Option<Vec<_>> = buckets.collect();
        Ok(Histogram(buckets.with_context(|| format!("{metric} is not shown as a histogram"))?))
    }

    /// What came after `before`.
    #[must_use]
    pub(crate) fn since(mut self, before: &Histogram) -> Histogram {
        for (bound, count) in &mut self.0 {
            // There are none before the first time.
            let earlier = before.0.iter().find(|(earlier, _)| earlier == bound);
            *count -= earlier.map_or(0.0, |(_, count)| *count);
        }
        self
    }

    pub(crate) fn count(&self) -> f64 {
        self.0.iter().map(|(_, count)| *count).fold(0.0, f64::max)
    }

    /// Within its bucket as if times were spread evenly; none where it is longer than the last bound.
    pub(crate) fn median_seconds(&self) -> Option<f64> {
        let rank = self.count() / 2.0;
        let mut below = (0.0, 0.0);
        for &(bound, count) in &self.0 {
            if count >= rank && count > below.1 {
                let share = (rank - below.1) / (count - below.1);
                return bound.is_finite().then_some(below.0 + (bound - below.0) * share);
            }
            below = (bound, count);
        }
        None
    }
}
