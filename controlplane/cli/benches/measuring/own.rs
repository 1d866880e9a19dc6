//! QEMU's own migration, all of the guest's RAM through its own stream.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use ramferry_lab::Qemu;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// How it is done.
#[derive(Debug)]
pub(crate) struct Way<'a> {
    /// What the destination listens at. Port 0 of a `tcp:` address is one that is free.
    pub(crate) listen: &'a str,
    /// The one capability that is on.
    pub(crate) capability: Option<&'a str>,
    pub(crate) parameters: Value,
}

/// What an operator does about a migration that does not end by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Help {
    /// Begins post-copy, after the first pass over all memory.
    BeginPostcopy,
    /// Allows any downtime, after so long.
    AllowDowntime(Duration),
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
    Ok(Moved { called, status: wait_migrated(guest, None, interval)? })
}

/// The same, of a guest that may write faster than it is copied: with what an operator does about that.
pub(crate) fn migrate_helped(
    guest: &Qemu,
    destination: &Qemu,
    way: &Way<'_>,
    help: Help,
    interval: Duration,
) -> Result<Moved> {
    let called = begin(guest, destination, way)?;
    Ok(Moved { called, status: wait_migrated(guest, Some(help), interval)? })
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

/// When a QEMU reported what is `wanted`, which it is about to.
pub(crate) fn wait_event(
    guest: &Qemu,
    wanted: impl Fn(&Value) -> bool,
    interval: Duration,
) -> Result<SystemTime> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(time) = event_time(&guest.qmp_events()?, &wanted) {
            return Ok(time);
        }
        ensure!(Instant::now() < deadline, "QEMU does not end its migration");
        std::thread::sleep(interval);
    }
}

/// A guest's pause between two QEMUs, as they report it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pause {
    pub(crate) stopped: SystemTime,
    pub(crate) resumed: SystemTime,
    /// When the source said that its migration had completed: where it was QEMU's own post-copy, after the last page.
    pub(crate) completed: Option<SystemTime>,
}

impl Pause {
    /// Of a move that has just been made. Events before it have to have been taken.
    pub(crate) fn of(from: &Qemu, to: &Qemu, interval: Duration) -> Result<Pause> {
        let events = from.qmp_events()?;
        let stopped = event_time(&events, |event| event["event"] == "STOP");
        let has_completed =
            |event: &Value| event["event"] == "MIGRATION" && event["data"]["status"] == "completed";
        Ok(Pause {
            stopped: stopped.context("the source did not report that it stopped")?,
            resumed: wait_event(to, |event| event["event"] == "RESUME", interval)?,
            completed: event_time(&events, has_completed),
        })
    }

    pub(crate) fn seconds(&self) -> Result<f64> {
        between(self.stopped, self.resumed)
    }
}

pub(crate) fn between(from: SystemTime, to: SystemTime) -> Result<f64> {
    Ok(to.duration_since(from).context("the clock was set back")?.as_secs_f64())
}

fn listening_port(destination: &Qemu) -> Result<String> {
    let status = destination.qmp(&json!({ "execute": "query-migrate" }))?;
    let address = status["socket-address"].as_array().and_then(|addresses| addresses.first()).cloned();
    let address = address.context("the destination does not say where it listens")?;
    Ok(address["port"].as_str().context("an address without a port")?.to_owned())
}

fn wait_migrated(guest: &Qemu, mut help: Option<Help>, interval: Duration) -> Result<Value> {
    let started = Instant::now();
    loop {
        let status = guest.qmp(&json!({ "execute": "query-migrate" }))?;
        match status["status"].as_str() {
            // It is completed a moment before the time that it took is known.
            Some("completed") if status["total-time"] != 0 => return Ok(status),
            Some("failed" | "cancelled") => bail!("QEMU's own migration failed: {status}"),
            _ if started.elapsed() > PATIENCE => bail!("QEMU's own migration does not end: {status}"),
            _ => {}
        }
        match help {
            Some(Help::BeginPostcopy) if status["ram"]["dirty-sync-count"].as_u64() > Some(1) => {
                guest.qmp(&json!({ "execute": "migrate-start-postcopy" }))?;
                help = None;
            }
            Some(Help::AllowDowntime(after)) if started.elapsed() > after => {
                let arguments = json!({ "downtime-limit": u64::try_from(PATIENCE.as_millis())? });
                guest.qmp(&json!({ "execute": "migrate-set-parameters", "arguments": arguments }))?;
                help = None;
            }
            _ => {}
        }
        std::thread::sleep(interval);
    }
}
