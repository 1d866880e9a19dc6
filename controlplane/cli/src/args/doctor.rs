//! Options of `ramferry doctor`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::connection::{ConnectionArgs, OutputFormat, TlsArgs};
use super::names::AgentAddress;
use super::units::duration;

const EXAMPLES: &str = "\
Examples:
  ramferry doctor --agent 127.0.0.1:7050                        ask the running agent: its limits count
  ramferry doctor --agent 127.0.0.1:7050 --peer 10.0.0.2:7050   and whether it reaches that one
  ramferry doctor --config /etc/ramferry.toml                   where no agent runs; as the agent's user
  ramferry doctor --output json

Exit codes: 0 where nothing failed (warnings count as nothing), 6 where a check failed, 4 and 5 where the agent did
not answer or refused. docs/doctor.md tells of each check.";

/// Without --agent the checks are made in this process, for the agent's configuration.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DoctorArgs {
    /// The agent's TOML file, for checks in this process; an agent that is asked has its own.
    #[arg(long, env = "RAMFERRY_CONFIG", hide_env_values = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// A running agent to ask.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) agent: Option<AgentAddress>,
    /// Another agent, to be reached from this host as a migration's destination would be.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) peer: Option<AgentAddress>,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Longest wait for a connection to --agent.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub(crate) connect_timeout: Duration,
    /// What is printed on stdout.
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: OutputFormat,
}

impl DoctorArgs {
    /// The connection to the agent to ask, where one is to be asked.
    pub(crate) fn connection(&self) -> Option<ConnectionArgs> {
        Some(ConnectionArgs {
            agent: self.agent.clone()?,
            tls: self.tls.clone(),
            connect_timeout: self.connect_timeout,
            output: self.output,
        })
    }

    /// The agent's options, for checks in this process.
    pub(crate) fn options(&self) -> ramferry_agent::Options {
        ramferry_agent::Options {
            config: self.config.clone(),
            tls_ca: self.tls.tls_ca.clone(),
            tls_cert: self.tls.tls_cert.clone(),
            tls_key: self.tls.tls_key.clone(),
            tls_server_name: self.tls.tls_server_name.clone(),
            ..ramferry_agent::Options::default()
        }
    }
}
