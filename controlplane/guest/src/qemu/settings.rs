//! QEMU's migration capabilities and parameters: set for our purpose, and put
//! back as they were.

use serde_json::{Value, json};

use crate::GuestError;
use crate::guest::Side;
use crate::qmp::{QmpClient, QmpError};

use super::replies::{Capability, Parameters};

/// Needed on both sides.
const BOTH: [&str; 2] = ["x-ignore-shared", "return-path"];
const SOURCE: &str = "pause-before-switchover";
const DESTINATION: &str = "late-block-activate";

/// Wanted, and always on where it is not a capability any more.
const EVENTS: &str = "events";

/// What would change the form of the stream, or slow the guest down.
const OFF: [&str; 13] = [
    "multifd",
    "compress",
    "xbzrle",
    "postcopy-ram",
    "postcopy-preempt",
    "x-colo",
    "background-snapshot",
    "zero-copy-send",
    "block",
    "mapped-ram",
    "auto-converge",
    "dirty-limit",
    "release-ram",
];

/// Bytes per second that QEMU may send. No limit in effect, and a number that
/// nobody else sets, so that it is known for ours after a restart of the agent.
const OUR_BANDWIDTH: u64 = (1 << 40) + 0x7261_6d66;

/// QEMU's default.
const DEFAULT_BANDWIDTH: u64 = 128 << 20;

/// What was found before it was changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Saved {
    capabilities: Vec<(String, bool)>,
    bandwidth: Option<u64>,
    /// Whether a destination would have run by itself.
    pub(super) autostart: bool,
}

impl Saved {
    /// For a guest that another process of ours may have changed: ours are
    /// turned off, which is QEMU's default for each.
    pub(super) fn unknown() -> Self {
        let ours = [BOTH[0], BOTH[1], SOURCE, DESTINATION, EVENTS];
        Self {
            capabilities: ours.map(|name| (name.to_owned(), false)).to_vec(),
            bandwidth: Some(DEFAULT_BANDWIDTH),
            autostart: false,
        }
    }
}

/// Sets what `side` needs, and returns what was there.
pub(super) async fn apply(client: &QmpClient, side: Side) -> Result<Saved, GuestError> {
    let found: Vec<Capability> = client.execute("query-migrate-capabilities", json!({})).await?;
    let of_side = match side {
        Side::Source => SOURCE,
        Side::Destination => DESTINATION,
    };
    let mut wanted = vec![(EVENTS, true)];
    for capability in [BOTH[0], BOTH[1], of_side] {
        if !found.iter().any(|found| found.capability == capability) {
            return Err(GuestError::NoCapability { capability, version: client.version() });
        }
        wanted.push((capability, true));
    }
    wanted.extend(OFF.map(|name| (name, false)));
    let changed = wanted.iter().filter_map(|(name, state)| {
        let found = found.iter().find(|found| found.capability == *name)?;
        (found.state != *state).then(|| (found.capability.clone(), found.state))
    });
    let mut saved = Saved { capabilities: changed.collect(), ..Saved::default() };
    let inverse: Vec<_> = saved.capabilities.iter().map(|(name, state)| (name.clone(), !state)).collect();
    set_capabilities(client, &inverse).await?;
    if side == Side::Source {
        let parameters: Parameters = client.execute("query-migrate-parameters", json!({})).await?;
        saved.bandwidth = parameters.max_bandwidth;
        set_bandwidth(client, OUR_BANDWIDTH).await?;
    }
    Ok(saved)
}

/// Puts back what was there. There must be no migration.
pub(super) async fn restore(client: &QmpClient, saved: &Saved) -> Result<(), QmpError> {
    let found: Vec<Capability> = client.execute("query-migrate-capabilities", json!({})).await?;
    let differs = |(name, state): &&(String, bool)| {
        found.iter().any(|found| found.capability == *name && found.state != *state)
    };
    let changes: Vec<_> = saved.capabilities.iter().filter(differs).cloned().collect();
    set_capabilities(client, &changes).await?;
    let Some(bandwidth) = saved.bandwidth else { return Ok(()) };
    let parameters: Parameters = client.execute("query-migrate-parameters", json!({})).await?;
    if parameters.max_bandwidth == Some(OUR_BANDWIDTH) {
        set_bandwidth(client, bandwidth).await?;
    }
    Ok(())
}

async fn set_capabilities(client: &QmpClient, states: &[(String, bool)]) -> Result<(), QmpError> {
    if states.is_empty() {
        return Ok(());
    }
    let states: Vec<Value> =
        states.iter().map(|(name, state)| json!({ "capability": name, "state": state })).collect();
    client.run("migrate-set-capabilities", json!({ "capabilities": states })).await
}

async fn set_bandwidth(client: &QmpClient, bandwidth: u64) -> Result<(), QmpError> {
    client.run("migrate-set-parameters", json!({ "max-bandwidth": bandwidth })).await
}
