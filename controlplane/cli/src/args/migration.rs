//! Options of the commands about migrations, and the requests made from them.

mod parameters;

use std::time::Duration;

use clap::{ArgGroup, Args, ValueEnum};
use ramferry_proto::v1;

pub(crate) use self::parameters::proto_duration;
use self::parameters::{OnTimeout, ParameterArgs, Postcopy, timeout_action};
use super::EXIT_CODES;
use super::connection::ConnectionArgs;
use super::names::{AgentAddress, MigrationId, RemotePath};
use super::units::{BandwidthLimit, Throttle, Timeout, duration};

const MIGRATE_EXAMPLES: &str = "\
Examples:
  Migrate a guest from this host:
    ramferry migrate --to 10.0.0.2:7050 --source-qmp /run/vm1.qmp --destination-qmp /run/vm1.qmp

  For at most 10 Gbit/s and five minutes, then switch over even with a longer pause:
    ramferry migrate --to 10.0.0.2:7050 --source-qmp /run/vm1.qmp --destination-qmp /run/vm1.qmp \\
        --bandwidth-limit 10Gbit --timeout 5m --on-timeout force

  From a script: a name of one's own, one JSON object on stdout:
    ramferry migrate --id vm1-2 --to 10.0.0.2:7050 --source-qmp /run/vm1.qmp \\
        --destination-qmp /run/vm1.qmp --output json --quiet | jq .downtime_seconds

The destination guest must be a QEMU started with -S and -incoming defer, with the same machine, and
both guests with their RAM in a memory-backend-file with share=on. `ramferry check` says what is
missing.

Ctrl-C asks the agent to cancel, and waits for the end; a second Ctrl-C leaves the migration to the
agent.";

const CHECK_EXAMPLES: &str = "\
Example:
  ramferry check --to 10.0.0.2:7050 --source-qmp /run/vm1.qmp --destination-qmp /run/vm1.qmp";

const SET_EXAMPLES: &str = "\
Examples:
  ramferry set vm1-2 --bandwidth-limit 25Gbit
  ramferry set vm1-2 --bandwidth-limit none --max-downtime 50ms
  ramferry set vm1-2 --timeout 2m --on-timeout force";

const LIST_EXAMPLES: &str = "\
Examples:
  ramferry list
  ramferry list --state precopy --state switching-over
  ramferry list --output json | jq -r '.migrations[].id'";

const WATCH_EXAMPLES: &str = "\
Examples:
  ramferry watch vm1-2
  ramferry watch vm1-2 --output json --interval 500ms     one object a line, the last one is the end

Ctrl-C leaves; the migration goes on (`ramferry cancel` ends it).";

const ID_EXAMPLES: &str = "The ids are those that `ramferry list` shows.";

#[derive(Debug, Args)]
#[command(after_help = format!("{MIGRATE_EXAMPLES}\n\n{EXIT_CODES}"))]
pub(crate) struct MigrateArgs {
    /// The migration's name, 1 to 64 of A-Z, a-z, 0-9, `.`, `_`, `-`; made up when it is not given.
    #[arg(long)]
    pub(crate) id: Option<MigrationId>,
    /// Makes a repeated call recognisable: with the same --id and --request-id it follows the migration that is
    /// there instead of being refused.
    #[arg(long, value_name = "ID", requires = "id")]
    pub(crate) request_id: Option<MigrationId>,
    /// Return once the migration is created.
    #[arg(long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) follow: FollowArgs,
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

#[derive(Debug, Args)]
#[command(after_help = format!("{CHECK_EXAMPLES}\n\n{EXIT_CODES}"))]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

#[derive(Debug, Args)]
#[command(after_help = LIST_EXAMPLES)]
pub(crate) struct ListArgs {
    /// Only migrations in this state; may be repeated.
    #[arg(long = "state", value_enum, value_name = "STATE")]
    pub(crate) states: Vec<State>,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

#[derive(Debug, Args)]
#[command(after_help = ID_EXAMPLES)]
pub(crate) struct IdArgs {
    /// The migration.
    pub(crate) id: MigrationId,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

#[derive(Debug, Args)]
#[command(after_help = ID_EXAMPLES)]
pub(crate) struct DeleteArgs {
    /// The migrations.
    #[arg(required = true, value_name = "ID")]
    pub(crate) ids: Vec<MigrationId>,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

#[derive(Debug, Args)]
#[command(after_help = format!("{WATCH_EXAMPLES}\n\n{EXIT_CODES}"))]
pub(crate) struct WatchArgs {
    /// The migration.
    pub(crate) id: MigrationId,
    /// Between two updates, 100ms to 60s.
    #[arg(long, value_name = "DURATION", value_parser = interval)]
    pub(crate) interval: Option<Duration>,
    #[command(flatten)]
    pub(crate) follow: FollowArgs,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

/// How a migration is followed.
#[derive(Debug, Args)]
pub(crate) struct FollowArgs {
    /// Show no progress on stderr.
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// How long an agent that went away is waited for.
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = duration)]
    pub(crate) reconnect_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(after_help = SET_EXAMPLES, group = ArgGroup::new("change").required(true).multiple(true))]
pub(crate) struct SetArgs {
    /// The migration.
    pub(crate) id: MigrationId,
    /// Longest pause that is aimed at.
    #[arg(long, value_name = "DURATION", value_parser = duration, group = "change")]
    pub(crate) max_downtime: Option<Duration>,
    /// Most that is sent: 10Gbit, 800MiB/s, or none.
    #[arg(long, value_name = "RATE", group = "change")]
    pub(crate) bandwidth_limit: Option<BandwidthLimit>,
    /// Longest time from the migration's creation to the switchover, or none.
    #[arg(long, value_name = "DURATION", group = "change")]
    pub(crate) timeout: Option<Timeout>,
    /// What is done at the timeout, and when rounds bring no progress.
    #[arg(long, value_enum, value_name = "ACTION", group = "change")]
    pub(crate) on_timeout: Option<OnTimeout>,
    /// Rounds that bring no progress for this long are not converging; with --postcopy allow one such round is enough.
    #[arg(long, value_name = "DURATION", value_parser = duration, group = "change")]
    pub(crate) no_progress_timeout: Option<Duration>,
    /// Whether the guest may be resumed before all of its memory is there; see `migrate --help`.
    #[arg(long, value_enum, value_name = "WHEN", group = "change")]
    pub(crate) postcopy: Option<Postcopy>,
    /// Most processor time that may be taken from the guest, in percent, or none; see `migrate --help`.
    #[arg(long, value_name = "PERCENT", group = "change")]
    pub(crate) throttle: Option<Throttle>,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

/// What is migrated, to where, and how.
#[derive(Debug, Clone, Args)]
pub(crate) struct SpecArgs {
    /// The agent of the destination host, as the source's agent reaches it.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) to: AgentAddress,
    /// QMP socket of the guest, on the source host.
    #[arg(long, value_name = "PATH")]
    pub(crate) source_qmp: RemotePath,
    /// QMP socket of the guest that takes over, on the destination host.
    #[arg(long, value_name = "PATH")]
    pub(crate) destination_qmp: RemotePath,
    #[command(flatten)]
    pub(crate) parameters: ParameterArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum State {
    Pending,
    Preparing,
    Precopy,
    SwitchingOver,
    Postcopy,
    Cancelling,
    Succeeded,
    Failed,
    Cancelled,
}

fn interval(value: &str) -> Result<Duration, String> {
    let interval = duration(value).map_err(|error| error.to_string())?;
    if interval < Duration::from_millis(100) || interval > Duration::from_secs(60) {
        return Err("an agent sends updates every 100ms to 60s".to_owned());
    }
    Ok(interval)
}

impl SpecArgs {
    /// The specification, as the protocol has it.
    pub(crate) fn into_proto(self) -> v1::MigrationSpec {
        v1::MigrationSpec {
            source_qmp_path: self.source_qmp.into_string(),
            destination_qmp_path: self.destination_qmp.into_string(),
            destination_agent: self.to.to_string(),
            parameters: Some(self.parameters.into_proto()),
        }
    }
}

impl SetArgs {
    /// The parameters that were given, and the mask that names them.
    pub(crate) fn changes(&self) -> (v1::MigrationParameters, prost_types::FieldMask) {
        let given = [
            (self.max_downtime.is_some(), "max_downtime"),
            (self.bandwidth_limit.is_some(), "bandwidth_limit_bits_per_second"),
            (self.timeout.is_some(), "timeout"),
            (self.on_timeout.is_some(), "timeout_action"),
            (self.no_progress_timeout.is_some(), "no_progress_timeout"),
            (self.postcopy.is_some(), "postcopy"),
            (self.throttle.is_some(), "throttle_max_percent"),
        ];
        let paths = given.iter().filter(|(given, _)| *given).map(|(_, path)| (*path).to_owned()).collect();
        let parameters = v1::MigrationParameters {
            max_downtime: proto_duration(self.max_downtime),
            bandwidth_limit_bits_per_second: self.bandwidth_limit.map_or(0, BandwidthLimit::bits_per_second),
            timeout: proto_duration(self.timeout.and_then(|timeout| timeout.0)),
            timeout_action: timeout_action(self.on_timeout),
            no_progress_timeout: proto_duration(self.no_progress_timeout),
            postcopy: self.postcopy.map_or(0, |postcopy| postcopy.into_proto().into()),
            throttle_max_percent: self.throttle.map_or(0, Throttle::max_percent),
            ..Default::default()
        };
        (parameters, prost_types::FieldMask { paths })
    }
}

impl State {
    /// The state, as the protocol has it.
    pub(crate) fn into_proto(self) -> v1::MigrationState {
        match self {
            Self::Pending => v1::MigrationState::Pending,
            Self::Preparing => v1::MigrationState::Preparing,
            Self::Precopy => v1::MigrationState::Precopy,
            Self::SwitchingOver => v1::MigrationState::SwitchingOver,
            Self::Postcopy => v1::MigrationState::Postcopy,
            Self::Cancelling => v1::MigrationState::Cancelling,
            Self::Succeeded => v1::MigrationState::Succeeded,
            Self::Failed => v1::MigrationState::Failed,
            Self::Cancelled => v1::MigrationState::Cancelled,
        }
    }
}
