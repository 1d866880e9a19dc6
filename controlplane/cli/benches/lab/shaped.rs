//! The link between the hosts, held to a rate.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::hosts::SOURCE;

const MIB: u64 = 1 << 20;
/// Takes what the kernel hands over at once, and is small beside a second of any rate.
const BURST_BYTES: u64 = 64 << 10;
/// More than all connections together have under way: what is held up must not be dropped, for soft-RoCE sends it again
/// only after half a second.
const QUEUE_BYTES: u64 = 64 << 20;

/// All that the source host sends, RDMA or not, goes at a rate, until this is dropped.
pub(crate) struct Shaped(());

impl Shaped {
    pub(crate) fn to(mib_per_second: u64) -> Result<Shaped> {
        let rate = format!("{}bit", mib_per_second * MIB * 8);
        let (burst, limit) = (BURST_BYTES.to_string(), QUEUE_BYTES.to_string());
        let shape = ["root", "tbf", "rate", &rate, "burst", &burst, "limit", &limit];
        tc(&[&["qdisc", "add", "dev", SOURCE.network], &shape[..]].concat())?;
        Ok(Shaped(()))
    }

    /// Packets that it did not take, since it was made.
    pub(crate) fn dropped_packets(&self) -> Result<u64> {
        let shown = tc(&["-s", "-j", "qdisc", "show", "dev", SOURCE.network, "root"])?;
        let shown: Value = serde_json::from_str(&shown).context("tc does not show what it has made")?;
        shown[0]["drops"].as_u64().with_context(|| format!("no number of drops in {shown}"))
    }
}

impl Drop for Shaped {
    fn drop(&mut self) {
        if let Err(error) = tc(&["qdisc", "del", "dev", SOURCE.network, "root"]) {
            eprintln!("the link stays slow: {error:#}");
        }
    }
}

fn tc(arguments: &[&str]) -> Result<String> {
    let output = Command::new("tc")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("cannot run tc: install iproute2")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tc {}: {}", arguments.join(" "), said.trim());
    Ok(String::from_utf8(output.stdout)?)
}

/// Gives a cgroup that nobody is in a quota. A machine's first one has its kernel patch its own code, which may end an
/// emulated kernel that has guests (docs/lab.md, "Traps"), and so does the end of its last: this one stays.
pub(crate) fn keep_a_quota() -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let kept = root.join("quota.slice");
    let write = |path: &Path, text: &str| {
        fs::write(path, text).with_context(|| format!("cannot write {text} into {}", path.display()))
    };
    write(&root.join("cgroup.subtree_control"), "+cpu")?;
    fs::create_dir_all(&kept).with_context(|| format!("cannot make {}", kept.display()))?;
    write(&kept.join("cpu.max"), "50000 100000")
}
