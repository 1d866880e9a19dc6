//! `ramferry agent`

use std::path::Path;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::args::agent::AgentArgs;
use crate::exit::Exit;
use crate::failure::Failure;

/// What the agent left running when it ended is waited for no longer.
const LEFTOVERS: Duration = Duration::from_secs(5);

pub(super) fn run(args: AgentArgs) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::System { what: "cannot start", source })?;
    let result = runtime.block_on(ramferry_agent::run(args.into_options()));
    runtime.shutdown_timeout(LEFTOVERS);
    result.map_err(|error| Failure::Agent(Box::new(error)))?;
    Ok(Exit::Done)
}

/// Ended by nothing but the agent's end: a service manager tells both to end, and the agent may then be killed.
pub(super) fn guard(record: &Path) -> Result<Exit, Failure> {
    let cannot = |source| Failure::System { what: "cannot guard a throttled guest", source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    let _runtime = runtime.enter();
    let ignored = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
    let _ignored = ignored.map(signal).into_iter().collect::<Result<Vec<_>, _>>().map_err(cannot)?;
    ramferry_agent::throttle::stand_guard(record).map_err(|error| cannot(std::io::Error::other(error)))?;
    Ok(Exit::Done)
}
