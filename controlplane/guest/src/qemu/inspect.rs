//! What a guest is, and whether it can be migrated. Nothing is changed here.

use std::collections::BTreeSet;

use ramferry_ram::{Access, Layout, RamFile};
use serde_json::json;

use crate::guest::{GuestInfo, GuestStatus, Side};
use crate::qmp::{QmpClient, QmpError, Version};
use crate::{GuestError, Qemu};

use super::blocks::{self, RamBlock};
use super::devices::LateWriters;
use super::replies::{CpuInfo, MigrateInfo, NameInfo, Parameters};
use super::{devices, goes_on};

/// From this version `query-migrate` tells what blocks a migration.
const OLDEST: (u32, u32) = (6, 0);

pub(super) struct Found {
    pub(super) info: GuestInfo,
    pub(super) blocks: Vec<RamBlock>,
    pub(super) late: LateWriters,
    /// Of the layout's blocks, in their order.
    pub(super) files: Vec<RamFile>,
}

pub(super) async fn inspect(qemu: &Qemu, side: Side) -> Result<Found, GuestError> {
    let client = qemu.client();
    check_version(client.version())?;
    let (status, migration) = qemu.status_by(&client).await?;
    check_state(side, &status, &migration)?;
    check_parameters(&client).await?;
    devices::check(&client).await?;
    check_blockers(&migration)?;
    let blocks = blocks::query(&client).await?;
    let shared = blocks::shared(&client, &blocks).await?;
    let layout = Layout::new(shared.iter().map(|shared| shared.block.clone()).collect())?;
    let access = match side {
        Side::Source => Access::Read,
        Side::Destination => Access::ReadWrite,
    };
    let files = blocks::open_files(qemu.pid(), &shared, access)?;
    let late = devices::late_writers(&client, qemu.pid()).await?;
    let private = blocks.iter().filter(|block| !layout.blocks().contains(&block.block()));
    let info = GuestInfo {
        pid: qemu.pid(),
        vmm: format!("QEMU {}", client.version()),
        machine: machine(&client).await?,
        private_bytes: private.map(|block| block.used_bytes).sum(),
        layout,
        running: status.running,
        vcpus: vcpus(&client).await?,
        direct_io_disks: late.direct_io_disks.clone(),
        undrainable_devices: late.undrainable_devices.clone(),
        pinning_disks: late.pinning_disks.clone(),
        name: client.execute::<NameInfo>("query-name", json!({})).await?.name,
    };
    Ok(Found { info, blocks, late, files })
}

/// Whether a source's guest may be migrated as it is now.
pub(super) fn check_source_state(status: &GuestStatus) -> Result<(), GuestError> {
    if let Some(migration) = status.migration.as_deref().filter(|status| goes_on(Some(status))) {
        return Err(GuestError::AlreadyMigrating { status: migration.to_owned() });
    }
    match status.run_state.as_str() {
        "running" | "paused" | "prelaunch" => Ok(()),
        run_state => Err(GuestError::RunState { side: Side::Source, run_state: run_state.to_owned() }),
    }
}

fn check_version(version: Version) -> Result<(), GuestError> {
    if (version.major, version.minor) < OLDEST { Err(GuestError::TooOld { version }) } else { Ok(()) }
}

fn check_state(side: Side, status: &GuestStatus, migration: &MigrateInfo) -> Result<(), GuestError> {
    match side {
        Side::Source => check_source_state(status)?,
        Side::Destination if status.run_state != "inmigrate" => {
            return Err(GuestError::RunState { side, run_state: status.run_state.clone() });
        }
        Side::Destination if migration.incoming_started() => return Err(GuestError::IncomingStarted),
        Side::Destination => {}
    }
    Ok(())
}

/// What QEMU itself knows of, after what is better named by us.
fn check_blockers(migration: &MigrateInfo) -> Result<(), GuestError> {
    if migration.blocked_reasons.is_empty() {
        Ok(())
    } else {
        Err(GuestError::Blocked { reasons: migration.blocked_reasons.clone() })
    }
}

pub(super) async fn check_parameters(client: &QmpClient) -> Result<(), GuestError> {
    let Parameters { tls_creds, .. } = client.execute("query-migrate-parameters", json!({})).await?;
    if tls_creds.is_empty() { Ok(()) } else { Err(GuestError::TlsCredentials { credentials: tls_creds }) }
}

pub(super) async fn machine(client: &QmpClient) -> Result<String, QmpError> {
    let kind: String = blocks::property(client, "/machine", "type").await?;
    Ok(kind.strip_suffix("-machine").unwrap_or(&kind).to_owned())
}

pub(super) async fn vcpu_threads(client: &QmpClient) -> Result<Vec<u32>, QmpError> {
    let cpus: Vec<CpuInfo> = client.execute("query-cpus-fast", json!({})).await?;
    let threads: BTreeSet<u32> = cpus.into_iter().map(|cpu| cpu.thread).collect();
    Ok(threads.into_iter().collect())
}

pub(super) async fn vcpus(client: &QmpClient) -> Result<u32, QmpError> {
    let cpus: Vec<serde::de::IgnoredAny> = client.execute("query-cpus-fast", json!({})).await?;
    Ok(u32::try_from(cpus.len()).unwrap_or(u32::MAX))
}
