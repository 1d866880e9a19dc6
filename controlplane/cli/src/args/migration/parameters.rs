//! How a migration goes: its parameters as options, and as the protocol has them.

use std::time::Duration;

use clap::{Args, ValueEnum};
use ramferry_proto::v1;

use crate::args::units::{BandwidthLimit, PinBudget, Throttle, Timeout, duration};

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Parameters")]
pub(crate) struct ParameterArgs {
    /// How memory travels; auto: shm on one host, else verbs where both have a device, else tcp.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) fabric: Fabric,
    /// What is registered: windows ahead of the copy, or every block whole.
    #[arg(long, value_enum, value_name = "MODE", default_value = "dynamic")]
    pub(crate) registration: Registration,
    /// Most that is registered at once on each side: 4GiB, or none; a quarter of it is kept for the reads of --postcopy
    /// [default: none].
    #[arg(long, value_name = "SIZE")]
    pub(crate) pin_budget: Option<PinBudget>,
    /// Streams (tcp), queue pairs (verbs) or copy threads (shm) [default: the agents choose].
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) streams: Option<u32>,
    /// Longest pause that is aimed at [default: 100ms].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) max_downtime: Option<Duration>,
    /// Most that is sent: 10Gbit, 800MiB/s, or none [default: none].
    #[arg(long, value_name = "RATE")]
    pub(crate) bandwidth_limit: Option<BandwidthLimit>,
    /// Longest time from the call to the switchover, or none [default: none].
    #[arg(long, value_name = "DURATION")]
    pub(crate) timeout: Option<Timeout>,
    /// What is done at the timeout, and when rounds bring no progress [default: cancel].
    #[arg(long, value_enum, value_name = "ACTION")]
    pub(crate) on_timeout: Option<OnTimeout>,
    /// Rounds that bring no progress for this long are not converging; with --postcopy allow one such round is enough [default: 5s].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) no_progress_timeout: Option<Duration>,
    /// Whether the guest may be resumed at the destination before all of its memory is there: a guest that writes faster
    /// than the link carries moves all the same, with a short pause. Until its last page has come it needs both hosts;
    /// where the source's memory is lost meanwhile, so is the guest.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "never")]
    pub(crate) postcopy: Postcopy,
    /// Where rounds bring no progress, take processor time from the guest's vCPUs: 20 percent, then 10 more at a time, up to
    /// this many, 1 to 99, or 99 where no number is given. It has all of it back at its pause and at any other end, also
    /// where the agent is killed. Not used where --postcopy is not never. Or none [default: none].
    #[arg(long, value_name = "PERCENT", num_args = 0..=1, default_missing_value = "99", require_equals = true)]
    pub(crate) throttle: Option<Throttle>,
    /// Compare digests of all memory on both sides while both guests stand still; lengthens the downtime. Not after
    /// post-copy: the guest runs before its memory is whole.
    #[arg(long)]
    pub(crate) verify: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fabric {
    /// Let the agents choose.
    Auto,
    /// RDMA.
    Verbs,
    /// Shared memory, where both agents run on one host.
    Shm,
    /// TCP streams.
    Tcp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Registration {
    /// Windows ahead of the copy, only where memory was touched.
    Dynamic,
    /// Every block whole.
    PinAll,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnTimeout {
    /// End the migration; the guest runs on at the source.
    Cancel,
    /// Switch over, with a pause longer than --max-downtime.
    Force,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Postcopy {
    /// Not before all of it is there.
    Never,
    /// Where rounds do not converge, at the timeout, and where a forced switchover would take longer than --max-downtime.
    Allow,
    /// After the first round.
    Always,
}

impl ParameterArgs {
    pub(super) fn into_proto(self) -> v1::MigrationParameters {
        let registration = match self.registration {
            Registration::Dynamic => v1::RegistrationMode::Dynamic,
            Registration::PinAll => v1::RegistrationMode::PinAll,
        };
        let fabric = match self.fabric {
            Fabric::Auto => v1::FabricKind::Unspecified,
            Fabric::Verbs => v1::FabricKind::Verbs,
            Fabric::Shm => v1::FabricKind::Shm,
            Fabric::Tcp => v1::FabricKind::Tcp,
        };
        v1::MigrationParameters {
            max_downtime: proto_duration(self.max_downtime),
            bandwidth_limit_bits_per_second: self.bandwidth_limit.map_or(0, BandwidthLimit::bits_per_second),
            timeout: proto_duration(self.timeout.and_then(|timeout| timeout.0)),
            timeout_action: timeout_action(self.on_timeout),
            no_progress_timeout: proto_duration(self.no_progress_timeout),
            registration_mode: registration.into(),
            pin_budget_bytes: self.pin_budget.map_or(0, PinBudget::bytes),
            fabric: fabric.into(),
            streams: self.streams.unwrap_or(0),
            verify: self.verify,
            postcopy: self.postcopy.into_proto().into(),
            throttle_max_percent: self.throttle.map_or(0, Throttle::max_percent),
        }
    }
}

impl Postcopy {
    pub(super) fn into_proto(self) -> v1::Postcopy {
        match self {
            Self::Never => v1::Postcopy::Never,
            Self::Allow => v1::Postcopy::Allow,
            Self::Always => v1::Postcopy::Always,
        }
    }
}

pub(super) fn timeout_action(action: Option<OnTimeout>) -> i32 {
    let action = match action {
        None => v1::TimeoutAction::Unspecified,
        Some(OnTimeout::Cancel) => v1::TimeoutAction::Cancel,
        Some(OnTimeout::Force) => v1::TimeoutAction::Force,
    };
    action.into()
}

/// Every duration that was parsed is of a year at most, so it fits.
pub(crate) fn proto_duration(duration: Option<Duration>) -> Option<prost_types::Duration> {
    duration.map(|duration| {
        prost_types::Duration::try_from(duration)
            .expect("durations of the command line are bounded by a year")
    })
}
