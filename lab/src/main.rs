//! `ramferry-lab`: runs commands in a VM with a real RDMA stack, and guests that prove themselves.

mod cli;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    match cli::Cli::parse().command.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ramferry-lab: {error:#}");
            ExitCode::from(cli::FAILED)
        }
    }
}
