//! `ramferry agent`

use std::time::Duration;

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
