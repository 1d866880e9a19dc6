//! What processes cost while something runs.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// What one process cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) cpu_seconds: f64,
    /// Most anonymous memory at once, beyond what it had before.
    pub(crate) memory_bytes: u64,
    /// Most memory pinned for devices at once.
    pub(crate) pinned_bytes: u64,
}

/// Runs something, and says what each of the processes cost meanwhile. Looks at their memory
/// at every `interval`.
pub(crate) fn watch<T>(
    processes: &[u32],
    interval: Duration,
    run: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<Cost>)> {
    let before = processes.iter().map(|&process| Ok((cpu_seconds(process)?, memory(process)?)));
    let before = before.collect::<Result<Vec<_>>>()?;
    let done = AtomicBool::new(false);
    let (outcome, peaks) = std::thread::scope(|scope| {
        let peaks = scope.spawn(|| {
            let mut peaks = vec![Memory::default(); processes.len()];
            while !done.load(Ordering::Acquire) {
                for (&process, peak) in processes.iter().zip(&mut peaks) {
                    let now = memory(process).unwrap_or_default();
                    peak.anonymous_bytes = peak.anonymous_bytes.max(now.anonymous_bytes);
                    peak.pinned_bytes = peak.pinned_bytes.max(now.pinned_bytes);
                }
                std::thread::park_timeout(interval);
            }
            peaks
        });
        let outcome = run();
        done.store(true, Ordering::Release);
        peaks.thread().unpark();
        (outcome, peaks.join())
    });
    let peaks = peaks.map_err(|_| anyhow::anyhow!("the watch over the processes panicked"))?;
    let outcome = outcome?;
    let costs = processes.iter().zip(&before).zip(&peaks).map(|((&process, before), peak)| {
        Ok(Cost {
            cpu_seconds: cpu_seconds(process)? - before.0,
            memory_bytes: peak.anonymous_bytes.saturating_sub(before.1.anonymous_bytes),
            pinned_bytes: peak.pinned_bytes,
        })
    });
    Ok((outcome, costs.collect::<Result<_>>()?))
}

/// Processor time of the whole machine since its boot, interrupts included.
pub(crate) fn machine_cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let fields = stat
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("cpu "))
        .context("no line of all processors")?;
    let ticks = fields.split_whitespace().map(str::parse::<u64>).collect::<Result<Vec<_>, _>>()?;
    // user, nice, system, idle, iowait, irq, softirq of proc_stat(5); what follows is another's or counted already.
    let busy = ticks.iter().take(7).enumerate().filter(|(field, _)| !matches!(field, 3 | 4));
    Ok(seconds(busy.map(|(_, ticks)| ticks).sum()))
}

#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    anonymous_bytes: u64,
    pinned_bytes: u64,
}

fn cpu_seconds(process: u32) -> Result<f64> {
    let stat = read(process, "stat")?;
    let (_, fields) = stat.rsplit_once(')').context("no command in /proc/PID/stat")?;
    // User and system time are fields 14 and 15 of proc_pid_stat(5); the state is field 3.
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    Ok(seconds(ticks.sum::<Result<u64, _>>()?))
}

fn memory(process: u32) -> Result<Memory> {
    let status = read(process, "status")?;
    let bytes = |key: &str| -> Result<u64> {
        let line =
            status.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no {key}"))?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    };
    Ok(Memory { anonymous_bytes: bytes("RssAnon:")?, pinned_bytes: bytes("VmPin:")? })
}

fn read(process: u32, file: &str) -> Result<String> {
    let path = Path::new("/proc").join(process.to_string()).join(file);
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn seconds(ticks: u64) -> f64 {
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}
