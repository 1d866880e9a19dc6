//! QEMU's own migration, all of the guest's RAM through its own stream.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use ramferry_lab::Qemu;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);

/// How it is done.
#[derive(Debug)]
pub(crate) struct Way<'a> {
    /// What the destination listens at. Port 0 of a `tcp:` address is one that is free.
    pub(crate) listen: &'a str,
    /// The one capability that is on.
    pub(crate) capability: Option<&'a str>,
    pub(crate) parameters: Value,
}

/// What it took.
#[derive(Debug)]
pub(crate) struct Moved {
    /// When it was asked for.
    pub(crate) called: SystemTime,
    /// What `query-migrate` says at the source.
    pub(crate) status: Value,
}

impl Moved {
    pub(crate) fn transferred_bytes(&self) -> Result<u64> {
        self.status["ram"]["transferred"].as_u64().context("QEMU does not say what it transferred")
    }

    /// One of the times it gives in milliseconds.
    pub(crate) fn seconds(&self, key: &str) -> Result<f64> {
        let milliseconds = self.status[key].as_u64();
        Ok(milliseconds.with_context(|| format!("QEMU does not say {key}: {}", self.status))? as f64 / 1e3)
    }
}

/// Has QEMU move its guest to a QEMU that waits for one, looking whether it is done at every `interval`.
pub(crate) fn migrate(guest: &Qemu, destination: &Qemu, way: &Way<'_>, interval: Duration) -> Result<Moved> {
    let called = begin(guest, destination, way)?;
    Ok(Moved { called, status: wait_migrated(guest, interval)? })
}

/// Begins it; when.
pub(crate) fn begin(guest: &Qemu, destination: &Qemu, way: &Way<'_>) -> Result<SystemTime> {
    for side in [guest, destination] {
        // A migration before this one may have left any of them on.
        let off = [
            "x-ignore-shared",
            "pause-before-switchover",
            "return-path",
            "multifd",
            "rdma-pin-all",
            "auto-converge",
            "postcopy-ram",
        ];
        let on = ["events"].into_iter().chain(way.capability);
        let capabilities: Vec<Value> = off
            .into_iter()
            .map(|capability| (capability, false))
            .chain(on.map(|capability| (capability, true)))
            .map(|(capability, state)| json!({ "capability": capability, "state": state }))
            .collect();
        side.qmp(
            &json!({ "execute": "migrate-set-capabilities", "arguments": { "capabilities": capabilities } }),
        )?;
        side.qmp(&json!({ "execute": "migrate-set-parameters", "arguments": way.parameters }))?;
    }
    destination.qmp(&json!({ "execute": "migrate-incoming", "arguments": { "uri": way.listen } }))?;
    let uri = match way.listen.strip_suffix(":0") {
        Some(host) => format!("{host}:{}", listening_port(destination)?),
        None => way.listen.to_owned(),
    };
    let called = SystemTime::now();
    guest.qmp(&json!({ "execute": "migrate", "arguments": { "uri": uri } }))?;
    Ok(called)
}

/// When a QEMU reported an event of that name, the last time, of those that it reported until now.
pub(crate) fn event_time(events: &[Value], wanted: impl Fn(&Value) -> bool) -> Option<SystemTime> {
    let event = events.iter().rev().find(|event| wanted(event))?;
    let part = |unit: &str| event["timestamp"][unit].as_u64();
    Some(UNIX_EPOCH + Duration::from_secs(part("seconds")?) + Duration::from_micros(part("microseconds")?))
}

fn listening_port(destination: &Qemu) -> Result<String> {
    let status = destination.qmp(&json!({ "execute": "query-migrate" }))?;
    let address = status["socket-address"].as_array().and_then(|addresses| addresses.first()).cloned();
    let address = address.context("the destination does not say where it listens")?;
    Ok(address["port"].as_str().context("an address without a port")?.to_owned())
}

fn wait_migrated(guest: &Qemu, interval: Duration) -> Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = guest.qmp(&json!({ "execute": "query-migrate" }))?;
        match status["status"].as_str() {
            // It is completed a moment before the time that it took is known.
            Some("completed") if status["total-time"] != 0 => return Ok(status),
            Some("failed" | "cancelled") => bail!("QEMU's own migration failed: {status}"),
            _ if Instant::now() > deadline => bail!("QEMU's own migration does not end: {status}"),
            _ => std::thread::sleep(interval),
        }
    }
}
