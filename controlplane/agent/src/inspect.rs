//! Finding a guest: its socket and its RAM files are where the configuration
//! allows, and the VMM says that it can be migrated. Nothing is changed.

use std::path::Path;
use std::time::{Duration, Instant};

use ramferry_guest::{GuestError, GuestInfo, Qemu, Side, Timeouts};
use ramferry_ram::RamFile;
use tonic::Status;

use crate::config::GuestPathError;
use crate::core::Agent;
use crate::migrations::{Claim, Refusal};
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
    take_socket(agent, &real, claim).await.map_err(|refusal| refused(&refusal))?;
    let inspected = Qemu::inspect(socket, side, Timeouts::default()).await;
    let (guest, info, files) = inspected.map_err(|error| refusal(side, &error))?;
    for (block, file) in info.layout.blocks().iter().zip(&files) {
        dirs.check_ram(&block.name, file).map_err(|error| not_allowed(side, path, &error))?;
    }
    Ok((guest, info, files))
}

/// Waits for a migration that is over but has not let go yet: whoever heard that the
/// guest arrived may send it on at once.
async fn take_socket(agent: &Agent, socket: &Path, mut claim: Option<&mut Claim>) -> Result<(), Refusal> {
    const PATIENCE: Duration = Duration::from_secs(10);
    const INTERVAL: Duration = Duration::from_millis(10);
    let started = Instant::now();
    loop {
        let taken = match &mut claim {
            Some(claim) => claim.claim_socket(socket),
            None => agent.registry.check_socket(socket),
        };
        match taken {
            Err(Refusal::SocketBusy { is_over: true, .. }) if started.elapsed() < PATIENCE => {
                tokio::time::sleep(INTERVAL).await;
            }
            other => return other,
        }
    }
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
