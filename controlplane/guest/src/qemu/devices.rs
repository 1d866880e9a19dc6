//! Devices that reach guest RAM in ways that cannot be followed.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::sleep;

use crate::GuestError;
use crate::qmp::{QmpClient, QmpError, QmpEvent};

use super::blocks::property;
use super::replies::{BalloonInfo, BlockNode, ObjectProperty};

/// Between two looks at the balloon. A driver moves it by 1 MiB in less.
const BALLOON_INTERVAL: Duration = Duration::from_millis(100);

/// Where QEMU keeps the devices that it was told to make.
const CONTAINERS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Block drivers that map guest RAM for their device once and for all.
const PINNING_DRIVERS: [&str; 6] = [
    "io_uring",
    "nvme",
    "nvme-io_uring",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
];

/// Who fills guest RAM by DMA, and is migrated all the same or refused by the agent.
#[derive(Clone, Debug)]
pub(super) struct LateWriters {
    pub(super) direct_io_disks: Vec<String>,
    pub(super) undrainable_devices: Vec<String>,
    pub(super) pinning_disks: Vec<String>,
}

impl LateWriters {
    /// Those that were not there at an `earlier` look.
    pub(super) fn since(&self, earlier: &LateWriters) -> Vec<String> {
        let all =
            |of: &LateWriters| [&of.direct_io_disks[..], &of.undrainable_devices, &of.pinning_disks].concat();
        let known = all(earlier);
        all(self).into_iter().filter(|writer| !known.contains(writer)).collect()
    }
}

/// Whether reads from a file may fill the reader's pages by pinning them, although
/// it was not opened with `O_DIRECT`: the file systems of `linux/magic.h` that do.
/// So does one that cannot be told.
fn may_pin(pid: u32, file: &str) -> bool {
    const PINNING: [u64; 5] = [0x6573_5546, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x00c3_6400];
    let path = format!("/proc/{pid}/root/{}", file.trim_start_matches('/'));
    rustix::fs::statfs(path).map_or(true, |found| PINNING.contains(&(found.f_type as u64)))
}

#[derive(Debug)]
pub(super) struct Device {
    path: String,
    kind: String,
}

/// Refuses every device that the agent cannot follow.
pub(super) async fn check(client: &QmpClient) -> Result<(), GuestError> {
    let (devices, backends) = find(client).await?;
    let of = |kinds: &[&str]| -> Vec<String> {
        let devices = devices.iter().chain(&backends);
        let found = devices.filter(|device| kinds.iter().any(|kind| device.kind.starts_with(kind)));
        found.map(|device| format!("{} ({})", device.path, device.kind)).collect()
    };
    let refuse = |devices: Vec<String>, refusal: fn(Vec<String>) -> GuestError| {
        if devices.is_empty() { Ok(()) } else { Err(refusal(devices)) }
    };
    refuse(of(&["vfio-", "vhost-vdpa"]), |devices| GuestError::Passthrough { devices })?;
    refuse(of(&["vhost-user"]), |devices| GuestError::VhostUser { devices })?;
    refuse(of(&["virtio-mem"]), |devices| GuestError::VirtioMem { devices })?;
    let balloons = devices.iter().filter(|device| device.kind.starts_with("virtio-balloon"));
    check_balloon(client, balloons).await
}

/// Devices, and network back ends.
pub(super) async fn find(client: &QmpClient) -> Result<(Vec<Device>, Vec<Device>), QmpError> {
    let devices = devices(client).await?;
    let backends = network_backends(client).await?;
    Ok((devices, backends))
}

async fn devices(client: &QmpClient) -> Result<Vec<Device>, QmpError> {
    let mut devices = Vec::new();
    for container in CONTAINERS {
        devices.extend(children(client, container).await?);
    }
    Ok(devices)
}

/// Everybody who fills guest RAM by DMA.
pub(super) async fn late_writers(client: &QmpClient, pid: u32) -> Result<LateWriters, QmpError> {
    let nodes: Vec<BlockNode> = client.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let (pinning, others): (Vec<_>, Vec<_>) =
        nodes.into_iter().partition(|node| PINNING_DRIVERS.contains(&node.drv.as_str()));
    let names = |nodes: Vec<BlockNode>| nodes.into_iter().filter_map(|node| node.node_name);
    let devices = devices(client).await?;
    let of = |kind: &str| -> Vec<String> {
        let found = devices.iter().filter(|device| device.kind.starts_with(kind));
        found.map(|device| format!("{} ({})", device.path, device.kind)).collect()
    };
    let late = |node: &BlockNode| node.cache.direct || node.drv == "file" && may_pin(pid, &node.file);
    let direct = others.into_iter().filter(late).collect();
    Ok(LateWriters {
        // The host's SCSI layer fills the guest's pages whatever the cache mode is.
        direct_io_disks: names(direct).chain(of("scsi-block")).collect(),
        undrainable_devices: of("vhost-scsi"),
        pinning_disks: names(pinning).collect(),
    })
}

/// Resolves when a `BALLOON_CHANGE` arrives.
pub(super) async fn balloon_moves(events: &mut Receiver<QmpEvent>) -> GuestError {
    loop {
        match events.recv().await {
            Ok(event) if event.name == "BALLOON_CHANGE" => {
                let after_bytes = event.data.get("actual").and_then(Value::as_u64).unwrap_or(0);
                return GuestError::BalloonMoved { after_bytes };
            }
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            // The connection's end is seen by whoever holds it.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

async fn check_balloon<'a>(
    client: &QmpClient,
    balloons: impl Iterator<Item = &'a Device>,
) -> Result<(), GuestError> {
    for Device { path, .. } in balloons {
        match property(client, path, "free-page-reporting").await {
            Ok(false) => {}
            Ok(true) => return Err(GuestError::FreePageReporting { device: path.clone() }),
            // Before 5.1 there was none.
            Err(QmpError::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let Some(before_bytes) = balloon_bytes(client).await? else { return Ok(()) };
    sleep(BALLOON_INTERVAL).await;
    match balloon_bytes(client).await? {
        Some(after_bytes) if after_bytes != before_bytes => {
            Err(GuestError::BalloonMoving { before_bytes, after_bytes })
        }
        _ => Ok(()),
    }
}

/// RAM left to the guest; `None` where there is no balloon.
async fn balloon_bytes(client: &QmpClient) -> Result<Option<u64>, QmpError> {
    match client.execute::<BalloonInfo>("query-balloon", json!({})).await {
        Ok(balloon) => Ok(Some(balloon.actual)),
        Err(QmpError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

async fn children(client: &QmpClient, container: &str) -> Result<Vec<Device>, QmpError> {
    let properties: Vec<ObjectProperty> = client.execute("qom-list", json!({ "path": container })).await?;
    let devices = properties.into_iter().filter_map(|property| {
        let kind = property.kind.strip_prefix("child<")?.strip_suffix('>')?;
        Some(Device { path: format!("{container}/{}", property.name), kind: kind.to_owned() })
    });
    Ok(devices.collect())
}

/// Network back ends are not objects; only the human monitor lists them.
async fn network_backends(client: &QmpClient) -> Result<Vec<Device>, QmpError> {
    let arguments = json!({ "command-line": "info network" });
    match client.execute::<String>("human-monitor-command", arguments).await {
        Ok(text) => Ok(text.lines().filter_map(network_backend).collect()),
        Err(error) if error.is_class("CommandNotFound") => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// ` \ net0: index=0,type=vhost-user,...`
pub(super) fn network_backend(line: &str) -> Option<Device> {
    let (name, rest) = line.trim_start_matches([' ', '\\']).split_once(": ")?;
    let kind = rest.split(',').find_map(|pair| pair.strip_prefix("type="))?;
    Some(Device { path: name.to_owned(), kind: kind.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_backends_are_told_from_nics() {
        let backend = |line| network_backend(line).map(|device| (device.path, device.kind));
        let found = |path: &str, kind: &str| Some((path.to_owned(), kind.to_owned()));
        assert_eq!(backend("d: index=0,type=nic,model=virtio-net-pci,macaddr=52:54"), found("d", "nic"));
        assert_eq!(backend(" \\ n0: index=0,type=vhost-user,chr=c connected."), found("n0", "vhost-user"));
        assert_eq!(backend("n1: index=0,type=vhost-vdpa"), found("n1", "vhost-vdpa"));
        assert_eq!(backend("hub 0"), None);
    }
}
