//! What is checked of a guest that is to leave, before anything is changed.

use std::sync::Arc;

use ramferry_engine::LateWrites;
use ramferry_guest::{Guest, GuestInfo, Side};
use ramferry_proto::v1;
use ramferry_ram::RamFile;
use ramferry_tracking::{TrackedFile, TrackerKind};
use tonic::{Code, Status};

use super::negotiate::negotiate;
use super::{blocking, peer};
use crate::core::Agent;
use crate::migrations::Claim;
use crate::request::Request;
use crate::status::{Violation, causes, precondition, status};

/// Makes every check of a migration and changes nothing.
pub(crate) async fn check(
    agent: &Arc<Agent>,
    request: &Request,
) -> Result<v1::CheckMigrationResponse, Status> {
    let (guest, info, files) = inspect(agent, request, None).await?;
    let tracked = tracked_files(&info, &files);
    let pid = info.pid;
    let others = check_tracking(pid, tracked).await?;
    let works = |kind| ramferry_tracking::self_test(kind).map(|()| kind);
    let tracker = blocking(move || works(TrackerKind::UffdWp).or_else(|_| works(TrackerKind::SoftDirty)))
        .await?
        .map_err(|error| precondition("TRACKING_UNAVAILABLE", causes(&error), [], []))?;
    let channel = peer::channel(&request.destination_agent, agent.config.tls.as_ref())?;
    let response = negotiate(agent, channel, "check", request, &info, true).await?;
    let fabric = v1::FabricKind::try_from(response.fabric).unwrap_or_default();
    let mut present_bytes = 0;
    for (block, file) in info.layout.blocks().iter().zip(&files) {
        let present = file.presence(block.pages()).map_err(|error| guest_status("RAM", &error))?;
        present_bytes += present.count() * block.page_bytes;
    }
    drop(guest);
    Ok(v1::CheckMigrationResponse {
        fabric: fabric.into(),
        fabric_reason: response.fabric_reason,
        tracker: tracker.as_str().into(),
        ram_bytes: info.layout.total_bytes(),
        present_bytes,
        source_vmm: format!("{} ({})", info.vmm, info.machine),
        destination_vmm: response.vmm_version,
        recheck_reason: recheck_reason(&info, &others),
    })
}

pub(super) async fn inspect(
    agent: &Agent,
    request: &Request,
    claim: Option<&mut Claim>,
) -> Result<(Arc<dyn Guest>, GuestInfo, Vec<RamFile>), Status> {
    let (guest, info, files) =
        crate::inspect::inspect(agent, &request.source_qmp, Side::Source, claim).await?;
    if !info.pinning_disks.is_empty() {
        return Err(direct_io(&info.pinning_disks));
    }
    Ok((Arc::new(guest), info, files))
}

pub(crate) fn tracked_files(info: &GuestInfo, files: &[RamFile]) -> Vec<TrackedFile> {
    let tracked = |(block, file): (&ramferry_ram::Block, &RamFile)| TrackedFile {
        identity: file.identity(),
        pages: block.pages(),
        page_bytes: block.page_bytes,
    };
    info.layout.blocks().iter().zip(files).map(tracked).collect()
}

/// Refuses a guest whose RAM a process writes that cannot be tracked, by that process' name. Names those that can
/// be, beside the guest's own.
pub(super) async fn check_tracking(guest: u32, files: Vec<TrackedFile>) -> Result<Vec<String>, Status> {
    let refuse = |why: String, violations: Vec<Violation>| {
        let message = format!("the source guest's writes cannot be tracked: {why}");
        precondition("TRACKING_UNAVAILABLE", message, violations, [])
    };
    let writers = blocking(move || ramferry_tracking::check(guest, &files)).await?;
    let mut others = Vec::new();
    for writer in writers.map_err(|error| refuse(causes(&error), Vec::new()))? {
        let subject = format!("process {} ({})", writer.pid, writer.comm);
        if let Some(obstacle) = writer.obstacle {
            let description = format!("{subject} writes to its RAM: {}", causes(&obstacle));
            let violation = Violation { kind: "HOST".into(), subject, description: description.clone() };
            return Err(refuse(description, vec![violation]));
        }
        if writer.pid != guest {
            others.push(subject);
        }
    }
    Ok(others)
}

/// Whether the guest's devices fill pages after they were reported.
pub(super) fn late_writes(info: &GuestInfo) -> LateWrites {
    if !info.undrainable_devices.is_empty() {
        LateWrites::Undrainable
    } else if !info.direct_io_disks.is_empty() {
        LateWrites::Drainable
    } else {
        LateWrites::None
    }
}

/// Why what was sent is rechecked; empty when it is not.
pub(super) fn recheck_reason(info: &GuestInfo, others: &[String]) -> String {
    let reasons = [
        ("direct I/O of", &info.direct_io_disks[..]),
        ("transfers of", &info.undrainable_devices),
        ("writes of", others),
    ];
    let named = reasons.iter().filter(|(_, names)| !names.is_empty());
    let named: Vec<String> = named.map(|(what, names)| format!("{what} {}", names.join(", "))).collect();
    named.join("; ")
}

/// Pages that a disk keeps pinned are filled again and again without a mark, so that even what was compared may have
/// changed back and forth since.
pub(super) fn direct_io(disks: &[String]) -> Status {
    let remedy = "attach these disks by another block driver, such as host_device or file";
    let violation = |disk: &String| Violation {
        kind: "GUEST".into(),
        subject: disk.clone(),
        description: format!("it keeps guest RAM pinned; {remedy}"),
    };
    let message = format!(
        "the source guest cannot be migrated: its disks {} keep guest RAM pinned, and what they write there cannot be tracked; {remedy}",
        disks.join(", ")
    );
    precondition("DIRECT_IO", message, disks.iter().map(violation), [])
}

pub(super) fn guest_status(subject: &str, error: &dyn std::error::Error) -> Status {
    status(Code::FailedPrecondition, "GUEST_MEMORY", causes(error), [("subject", subject.to_owned())])
}
