//! The command line.

mod guest;
mod run;
mod signals;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The lab itself failed, whatever the command would have done.
pub(crate) const FAILED: u8 = 125;

/// A VM with a real RDMA stack, and guests that prove themselves.
#[derive(Debug, Parser)]
#[command(name = "ramferry-lab", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(run::RunArgs),
    Guest(guest::GuestArgs),
    /// The first process of the VM.
    #[command(hide = true)]
    Inside,
}

impl Command {
    pub(crate) fn run(self) -> Result<ExitCode> {
        match self {
            Command::Run(arguments) => arguments.run(),
            Command::Guest(arguments) => arguments.run(),
            Command::Inside => ramferry_lab::inside::run().map(|()| ExitCode::SUCCESS),
        }
    }
}
