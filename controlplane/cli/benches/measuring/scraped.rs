//! Histograms of an agent's metrics.

use anyhow::{Context as _, Result};

use super::agents::Agent;

/// Times that an agent has measured, in buckets.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    /// Upper bounds in seconds, each with the number of times that were not longer.
    buckets: Vec<(f64, f64)>,
    sum_seconds: f64,
}

/// A quantile, as if times were spread evenly within each bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Quantile {
    pub(crate) seconds: f64,
    /// The bounds of its bucket.
    pub(crate) above_seconds: f64,
    pub(crate) at_most_seconds: f64,
}

fn series<'a>(
    text: &'a str,
    metric: &str,
    suffix: &str,
    fabric: &str,
) -> impl Iterator<Item = &'a str> + use<'a> {
    let (start, of_fabric) = (format!("{metric}_{suffix}{{"), format!("fabric=\"{fabric}\""));
    text.lines()
        .filter_map(move |line| line.strip_prefix(&start))
        .filter(move |line| line.contains(&of_fabric))
}

fn value(line: &str) -> Option<f64> {
    line.rsplit_once("} ")?.1.trim().parse().ok()
}

impl Histogram {
    /// What `agent` has measured since it started, of one fabric.
    pub(crate) fn read(agent: &Agent, metric: &str, fabric: &str) -> Result<Histogram> {
        let text = agent.scrape()?;
        let buckets = series(&text, metric, "bucket", fabric).map(|line| {
            let (bound, _) = line.split_once("le=\"")?.1.split_once('"')?;
            Some((bound.parse().ok()?, value(line)?))
        });
        let buckets: Option<Vec<_>> = buckets.collect();
        Ok(Histogram {
            buckets: buckets.with_context(|| format!("{metric} is not shown as a histogram"))?,
            sum_seconds: series(&text, metric, "sum", fabric).filter_map(value).sum(),
        })
    }

    /// What came after `before`.
    #[must_use]
    pub(crate) fn since(mut self, before: &Histogram) -> Histogram {
        for (bound, count) in &mut self.buckets {
            // There are none before the first time.
            let earlier = before.buckets.iter().find(|(earlier, _)| earlier == bound);
            *count -= earlier.map_or(0.0, |(_, count)| *count);
        }
        self.sum_seconds -= before.sum_seconds;
        self
    }

    pub(crate) fn count(&self) -> f64 {
        self.buckets.last().map_or(0.0, |(_, count)| *count)
    }

    pub(crate) fn mean_seconds(&self) -> f64 {
        self.sum_seconds / self.count().max(1.0)
    }

    pub(crate) fn buckets(&self) -> &[(f64, f64)] {
        &self.buckets
    }

    /// The time within which that share was; none where there was no time, or it was longer than the last bound.
    pub(crate) fn quantile(&self, share: f64) -> Option<Quantile> {
        let rank = share * self.count();
        let (mut above_seconds, mut counted) = (0.0, 0.0);
        for &(bound, count) in &self.buckets {
            if count >= rank && count > counted {
                let within = (rank - counted) / (count - counted);
                let seconds = above_seconds + (bound - above_seconds) * within;
                return bound.is_finite().then_some(Quantile {
                    seconds,
                    above_seconds,
                    at_most_seconds: bound,
                });
            }
            (above_seconds, counted) = (bound, count);
        }
        None
    }

    /// The share of those that took at most so long.
    pub(crate) fn share_within(&self, seconds: f64) -> f64 {
        let (mut above, mut counted) = (0.0, 0.0);
        for &(bound, count) in &self.buckets {
            if seconds < bound {
                counted += (seconds - above) / (bound - above) * (count - counted);
                break;
            }
            (above, counted) = (bound, count);
        }
        counted / self.count().max(1.0)
    }
}
