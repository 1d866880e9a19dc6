//! `ramferry`: the agent of a host, and the command line that talks to agents.
//!
//! Every command ends in an [`exit::Exit`], or in a [`failure::Failure`] that is
//! told on stderr, and with `--output json` as an object on stdout too.

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::Cli;
use crate::args::connection::OutputFormat;
use crate::refusal::ErrorObject;

mod args;
mod backoff;
mod bench;
mod client;
mod commands;
mod exit;
mod failure;
mod follow;
mod output;
mod progress;
mod refusal;

#[derive(serde::Serialize)]
struct ErrorAnswer {
    error: ErrorObject,
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let is_json = command.output() == Some(OutputFormat::Json);
    match commands::run(command) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            failure.print_text();
            if is_json && let Err(unprinted) = output::print_json(&ErrorAnswer { error: failure.to_object() })
            {
                unprinted.print_text();
            }
            failure.exit().into()
        }
    }
}
