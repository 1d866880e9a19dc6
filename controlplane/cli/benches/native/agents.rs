//! Two agents in processes of their own, and what they cost.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ramferry_lab::Qemu;
use serde_json::Value;
use tempfile::TempDir;

/// Between two looks at an agent's memory.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// An agent; killed and reaped when it is dropped.
pub(crate) struct Agent {
    child: Child,
    grpc: String,
    _directory: TempDir,
}

/// What a migration was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order<'a> {
    pub(crate) fabric: &'a str,
    pub(crate) registration: &'a str,
    pub(crate) more: &'a [&'a str],
}

/// What a migration took.
#[derive(Debug)]
pub(crate) struct Voyage {
    /// What `ramferry migrate --output json` printed.
    pub(crate) summary: Value,
    pub(crate) source: Cost,
    pub(crate) destination: Cost,
}

/// What a migration cost one agent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    pub(crate) cpu_seconds: f64,
    /// Most anonymous memory at once, beyond what it had before.
    pub(crate) memory_bytes: u64,
}

impl Voyage {
    pub(crate) fn number(&self, key: &str) -> Result<f64> {
        self.summary[key].as_f64().with_context(|| format!("the summary has no {key}: {}", self.summary))
    }

    pub(crate) fn downtime_part(&self, part: &str) -> Result<f64> {
        self.summary["downtime_parts"][part]
            .as_f64()
            .with_context(|| format!("no part {part} of the downtime"))
    }

    pub(crate) fn transferred_bytes(&self) -> Result<u64> {
        self.summary["transferred_bytes"].as_u64().context("the summary has no transferred_bytes")
    }

    /// Time of the copy itself: of all rounds.
    pub(crate) fn copy_seconds(&self) -> Result<f64> {
        let rounds = self.summary["rounds"].as_array().context("the summary has no rounds")?;
        Ok(rounds.iter().filter_map(|round| round["seconds"].as_f64()).sum())
    }
}

impl Agent {
    pub(crate) fn start() -> Result<Agent> {
        let directory = tempfile::tempdir()?;
        let mut child = Command::new(env!("CARGO_BIN_EXE_ramferry"))
            .args(["agent", "--listen", "127.0.0.1:0", "--data-listen", "127.0.0.1:0"])
            .args(["--metrics-listen", "127.0.0.1:0", "--log-format", "json"])
            .arg("--state-dir")
            .arg(directory.path().join("state"))
            .arg("--run-dir")
            .arg(directory.path().join("run"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start an agent")?;
        let mut lines = BufReader::new(child.stderr.take().context("the agent has no stderr")?).lines();
        let mut agent = Agent { child, grpc: String::new(), _directory: directory };
        let mut said = Vec::new();
        for line in lines.by_ref() {
            let line = line?;
            let entry: Value = serde_json::from_str(&line).unwrap_or_default();
            if entry["message"] == "agent started" {
                agent.grpc = entry["grpc"].as_str().context("the agent does not say where it is")?.to_owned();
                // Its log must not fill the pipe.
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(agent);
            }
            said.push(line);
        }
        anyhow::bail!("the agent did not start: {}", said.join("\n"))
    }

    fn proc(&self, file: &str) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string()).join(file)
    }

    fn cpu_seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(self.proc("stat"))?;
        let (_, fields) = stat.rsplit_once(')').context("no command in /proc/PID/stat")?;
        // User and system time are fields 14 and 15 of proc_pid_stat(5); the state is field 3.
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let ticks: u64 = ticks.sum::<Result<u64, _>>()?;
        Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    fn memory_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(self.proc("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Moves a guest from the one agent to the other.
pub(crate) fn migrate(
    (source, destination): (&Agent, &Agent),
    (from, to): (&Qemu, &Qemu),
    order: Order<'_>,
) -> Result<Voyage> {
    let before = [
        (source.cpu_seconds()?, source.memory_bytes()?),
        (destination.cpu_seconds()?, destination.memory_bytes()?),
    ];
    let done = AtomicBool::new(false);
    let peaks = [AtomicU64::new(0), AtomicU64::new(0)];
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                for (agent, peak) in [source, destination].into_iter().zip(&peaks) {
                    peak.fetch_max(agent.memory_bytes().unwrap_or_default(), Ordering::Relaxed);
                }
                std::thread::sleep(LOOK_INTERVAL);
            }
        });
        let output = Command::new(env!("CARGO_BIN_EXE_ramferry"))
            .args(["migrate", "--output", "json", "--agent", &source.grpc, "--to", &destination.grpc])
            .args(["--fabric", order.fabric, "--registration", order.registration])
            .args(order.more)
            .arg("--source-qmp")
            .arg(from.qmp_path())
            .arg("--destination-qmp")
            .arg(to.qmp_path())
            .stdin(Stdio::null())
            .output();
        done.store(true, Ordering::Release);
        output
    })?;
    let said = || String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "the migration failed: {}", said());
    let summary = serde_json::from_slice(&output.stdout).with_context(said)?;
    let cost = |agent: &Agent, before: (f64, u64), peak: &AtomicU64| -> Result<Cost> {
        Ok(Cost {
            cpu_seconds: agent.cpu_seconds()? - before.0,
            memory_bytes: peak.load(Ordering::Relaxed).saturating_sub(before.1),
        })
    };
    Ok(Voyage {
        summary,
        source: cost(source, before[0], &peaks[0])?,
        destination: cost(destination, before[1], &peaks[1])?,
    })
}
