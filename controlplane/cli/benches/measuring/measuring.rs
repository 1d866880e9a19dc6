//! What the benchmarks measure with.

pub(crate) mod agents;
pub(crate) mod costs;
pub(crate) mod lost;
pub(crate) mod own;
pub(crate) mod ram;
pub(crate) mod rates;
pub(crate) mod report;
pub(crate) mod scraped;

use anyhow::{Context as _, Result, ensure};

/// Whether a case takes part: `BENCH_ONLY` may hold parts of names, with `|` between them.
pub(crate) fn takes_part(name: &str) -> bool {
    std::env::var("BENCH_ONLY").map_or(true, |only| only.split('|').any(|part| name.contains(part.trim())))
}

/// How often to measure, as `BENCH_RUNS` says, and which of the parts: those that are named, else all.
pub(crate) fn asked<'a>(
    arguments: &[String],
    parts: &[&'a str],
    default_runs: usize,
) -> Result<(usize, Vec<&'a str>)> {
    let runs = std::env::var("BENCH_RUNS").map_or(Ok(default_runs), |runs| {
        runs.parse().with_context(|| format!("BENCH_RUNS is a number, not {runs:?}"))
    })?;
    for argument in arguments {
        ensure!(parts.contains(&argument.as_str()), "{argument:?} is none of {}", parts.join(", "));
    }
    let wanted = |part: &&str| arguments.is_empty() || arguments.iter().any(|argument| argument == part);
    Ok((runs, parts.iter().copied().filter(wanted).collect()))
}
