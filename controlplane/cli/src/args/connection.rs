//! How an agent is reached, and how its answers are printed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::names::AgentAddress;
use super::units::duration;

/// How answers are printed on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Text,
    /// For programs: errors too are an object on stdout.
    Json,
}

/// Options of every command that calls an agent.
#[derive(Debug, Args)]
#[command(next_help_heading = "Agent")]
pub(crate) struct ConnectionArgs {
    /// The agent to call; of a migration: the source's.
    #[arg(
        long,
        env = "RAMFERRY_AGENT",
        hide_env_values = true,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:7050"
    )]
    pub(crate) agent: AgentAddress,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Longest wait for a connection.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub(crate) connect_timeout: Duration,
    /// What is printed on stdout.
    #[arg(long, short, value_enum, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: OutputFormat,
}

/// How this client and an agent know one another.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Agent")]
pub(crate) struct TlsArgs {
    /// PEM file of the authorities that the agent's certificate must come from; turns TLS on.
    #[arg(long, env = "RAMFERRY_TLS_CA", hide_env_values = true, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// PEM file of this client's certificate.
    #[arg(long, env = "RAMFERRY_TLS_CERT", hide_env_values = true, value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    pub(crate) tls_cert: Option<PathBuf>,
    /// PEM file of this client's private key.
    #[arg(long, env = "RAMFERRY_TLS_KEY", hide_env_values = true, value_name = "FILE", requires_all = ["tls_cert", "tls_ca"])]
    pub(crate) tls_key: Option<PathBuf>,
    /// The name in the agent's certificate, where it is not the host of --agent.
    #[arg(
        long,
        env = "RAMFERRY_TLS_SERVER_NAME",
        hide_env_values = true,
        value_name = "NAME",
        requires = "tls_ca"
    )]
    pub(crate) tls_server_name: Option<String>,
}
