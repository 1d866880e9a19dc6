//! What reads a monitor's bytes, for those who make such bytes up: `lab/fuzz`.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::UnixStream;

use crate::GuestError;
use crate::qmp::{QmpClient, result_in};

use super::replies::{
    BalloonInfo, BlockNode, Capability, HumanReadable, Memdev, MigrateInfo, NameInfo, ObjectProperty,
    Parameters, StatusInfo, YankInstance,
};
use super::{blocks, devices, inspect};

/// Reads a line of a monitor as every kind of reply that there is.
pub fn line(line: &[u8]) {
    let Some(result) = result_in(line) else { return };
    let is = |read: fn(&Value) -> bool| read(&result);
    let _ = [
        is(as_type::<StatusInfo>),
        is(as_type::<Option<MigrateInfo>>),
        is(as_type::<Vec<Memdev>>),
        is(as_type::<Vec<Capability>>),
        is(as_type::<Parameters>),
        is(as_type::<Vec<BlockNode>>),
        is(as_type::<NameInfo>),
        is(as_type::<Vec<ObjectProperty>>),
        is(as_type::<BalloonInfo>),
        is(as_type::<Vec<YankInstance>>),
    ];
    if let Ok(listing) = serde_json::from_value::<HumanReadable>(result.clone()) {
        ram_blocks(&listing.human_readable_text);
    }
    if let Some(text) = result.as_str() {
        text.lines().for_each(|line| drop(devices::network_backend(line)));
    }
}

/// Reads a listing of RAM blocks, and makes a layout of those that may be one.
pub fn ram_blocks(text: &str) {
    let Ok(listed) = blocks::parse(text) else { return };
    let _ = blocks::same(&listed, &listed);
    let _ = ramferry_ram::Layout::new(listed.iter().map(blocks::RamBlock::block).collect());
}

/// Connects to a monitor and asks it for what a migration must know, as far as
/// that is said on the connection.
///
/// # Errors
/// What the monitor's answers come to.
pub async fn survey(stream: UnixStream, limit: Duration) -> Result<(), GuestError> {
    let client = QmpClient::negotiate(stream, limit).await?;
    client.execute::<StatusInfo>("query-status", json!({})).await?;
    client.execute::<MigrateInfo>("query-migrate", json!({})).await?;
    inspect::check_parameters(&client).await?;
    devices::find(&client).await?;
    let listed = blocks::query(&client).await?;
    let shared = blocks::shared(&client, &listed).await?;
    ramferry_ram::Layout::new(shared.iter().map(|shared| shared.block.clone()).collect())?;
    inspect::machine(&client).await?;
    inspect::vcpus(&client).await?;
    inspect::vcpu_threads(&client).await?;
    devices::late_writers(&client, std::process::id()).await?;
    Ok(())
}

fn as_type<T: DeserializeOwned>(value: &Value) -> bool {
    T::deserialize(value).is_ok()
}
