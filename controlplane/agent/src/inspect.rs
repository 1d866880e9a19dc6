//! Finding a guest: its socket and its RAM files are where the configuration
//! allows, and the VMM says that it can be migrated. Nothing is changed.

use std::path::Path;

use ramferry_guest::{GuestError, GuestInfo, Qemu, Side, Timeouts};
use ramferry_ram::RamFile;
use tonic::Status;

use crate::config::GuestPathError;
use crate::core::Agent;
use crate::migrations::Claim;
use crate::source::refused;
use crate::status::{Violation, causes, precondition};

/// The guest at the QMP socket `path`, and its RAM files in the layout's order. The
/// socket becomes the claim's, before anything is said on it: QMP serves one client.
pub(crate) async fn inspect(
    agent: &Agent,
    path: &Path,
    side: Side,
    claim: Option<&mut Claim>,
) -> Result<(Qemu, GuestInfo, Vec<RamFile>), Status> {
    let dirs = &agent.config.guest_dirs;
    let socket = dirs.open_socket(path).map_err(|error| not_allowed(side, path, &error))?;
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let claimed = claim.map_or_else(|| agent.registry.check_socket(&real), |claim| claim.claim_socket(&real));
    claimed.map_err(|refusal| refused(&refusal))?;
    let inspected = Qemu::inspect(socket, side, Timeouts::default()).await;
    let (guest, info, files) = inspected.map_err(|error| refusal(side, &error))?;
    for (block, file) in info.layout.blocks().iter().zip(&files) {
        dirs.check_ram(&block.name, file).map_err(|error| not_allowed(side, path, &error))?;
    }
    Ok((guest, info, files))
}

fn word(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}

fn not_allowed(side: Side, path: &Path, error: &GuestPathError) -> Status {
    let side = word(side);
    let violation =
        Violation { kind: "GUEST".into(), subject: path.display().to_string(), description: causes(error) };
    let message = format!("the {side} guest: {}", causes(error));
    precondition(error.reason(), message, [violation], [("side", side.to_owned())])
}

/// A guest's refusal as a status: which side, why, and the remedy.
fn refusal(side: Side, error: &GuestError) -> Status {
    let side = word(side);
    let remedy = error.remedy();
    let message = format!("the {side} guest cannot be migrated: {}; {remedy}", causes(error));
    let violation = Violation { kind: "GUEST".into(), subject: side.to_owned(), description: remedy };
    precondition(error.reason(), message, [violation], [("side", side.to_owned())])
}
