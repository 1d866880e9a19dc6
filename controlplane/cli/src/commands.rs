//! What each command does.

use std::future::Future;

use crate::args::Command;
use crate::exit::Exit;
use crate::failure::Failure;

mod agent;
mod bench;
mod check;
mod doctor;
mod documents;
mod list;
mod migrate;
mod one;
mod probe;
mod watch;

/// Carries out `command`.
pub(crate) fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Agent(args) => agent::run(*args),
        Command::Migrate(args) => block_on(migrate::run(*args)),
        Command::Check(args) => block_on(check::run(*args)),
        Command::List(args) => block_on(list::run(args)),
        Command::Get(args) => block_on(one::get(args)),
        Command::Watch(args) => block_on(watch::run(args)),
        Command::Cancel(args) => block_on(one::cancel(args)),
        Command::Set(args) => block_on(one::set(args)),
        Command::Switchover(args) => block_on(one::switchover(args)),
        Command::Delete(args) => block_on(one::delete(args)),
        Command::Bench(args) => bench::run(args),
        Command::Probe(args) => block_on(probe::run(args)),
        Command::Doctor(args) => block_on(doctor::run(args)),
        Command::ThrottleGuard { record } => agent::guard(&record),
        Command::Completions { shell } => documents::completions(shell),
        Command::Man(args) => documents::man(&args),
    }
}

/// A client needs one thread.
fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Failure::System { what: "cannot start", source })?;
    runtime.block_on(command)
}
