use std::ops::RangeInclusive;
use std::time::Duration;

use thiserror::Error;

/// A rate of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BytesPerSecond(pub u64);

/// A share of processor time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Percent(pub u8);

/// What is done when a migration takes longer than its timeout, or does not converge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TimeoutAction {
    /// It ends; the guest runs on at the source.
    #[default]
    Cancel,
    /// It switches over after the round under way, whatever the downtime will be.
    Force,
}

/// Whether the guest may run at the destination before all of its memory is there. From its resume there until the last
/// page has arrived it needs both hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Postcopy {
    /// No.
    #[default]
    Never,
    /// Where rounds do not converge, at the timeout, and where a switchover that is forced would take longer than
    /// `max_downtime`. Goes before `timeout_action`.
    Allow,
    /// After the first round.
    Always,
}

/// What the caller asks of a migration. Can be changed while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// The downtime that is aimed at.
    pub max_downtime: Duration,
    /// Bound on what is sent while the guest runs. The last round, with the guest paused, is not held to it.
    pub bandwidth_limit: Option<BytesPerSecond>,
    /// Longest time from the start to the switchover.
    pub timeout: Option<Duration>,
    /// What is done at the timeout, and when the migration does not converge.
    pub timeout_action: TimeoutAction,
    /// Whether the guest may run at the destination before all of its memory is there.
    pub postcopy: Postcopy,
    /// The most processor time that may be taken from the guest where rounds do not converge; none without. Only with
    /// [`Postcopy::Never`]: post-copy goes before it.
    pub throttle: Option<Percent>,
    /// Rounds that bring no progress for this long do not converge; with post-copy allowed, one such round.
    pub no_progress_timeout: Duration,
    /// Whether RAM is compared on both sides while both guests stand still. The time that takes is not
    /// counted in the expected downtime. After a switchover into post-copy there is nothing to compare.
    pub verify: bool,
}

impl Parameters {
    /// Bounds of `max_downtime`.
    pub const MAX_DOWNTIME: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(3600);
    /// Least `bandwidth_limit`.
    pub const LEAST_BANDWIDTH: BytesPerSecond = BytesPerSecond(64 * 1024);
    /// Bounds of `timeout`.
    pub const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(30 * 86400);
    /// Bounds of `no_progress_timeout`.
    pub const NO_PROGRESS_TIMEOUT: RangeInclusive<Duration> =
        Duration::from_millis(1)..=Duration::from_secs(86400);

    /// Bounds of `throttle`: a guest that gets nothing cannot be told from one that hangs.
    pub const THROTTLE: RangeInclusive<Percent> = Percent(1)..=Percent(99);

    /// Checks each parameter against its bounds.
    ///
    /// # Errors
    /// The first parameter that is out of bounds.
    pub fn check(&self) -> Result<(), ParameterError> {
        let within = |name, value: Duration, bounds: RangeInclusive<Duration>| {
            if bounds.contains(&value) {
                return Ok(());
            }
            Err(ParameterError::Duration { name, value, least: *bounds.start(), most: *bounds.end() })
        };
        within("max_downtime", self.max_downtime, Self::MAX_DOWNTIME)?;
        within("no_progress_timeout", self.no_progress_timeout, Self::NO_PROGRESS_TIMEOUT)?;
        if let Some(timeout) = self.timeout {
            within("timeout", timeout, Self::TIMEOUT)?;
        }
        if let Some(throttle) = self.throttle.filter(|throttle| !Self::THROTTLE.contains(throttle)) {
            return Err(ParameterError::Throttle(throttle));
        }
        match self.bandwidth_limit {
            Some(limit) if limit < Self::LEAST_BANDWIDTH => Err(ParameterError::Bandwidth(limit)),
            _ => Ok(()),
        }
    }
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            max_downtime: Duration::from_millis(100),
            bandwidth_limit: None,
            timeout: None,
            timeout_action: TimeoutAction::default(),
            postcopy: Postcopy::default(),
            throttle: None,
            no_progress_timeout: Duration::from_secs(5),
            verify: false,
        }
    }
}

/// A parameter that is out of bounds.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ParameterError {
    /// A time is too short or too long.
    #[error("{name} is {value:?}; it must be from {least:?} to {most:?}")]
    Duration {
        /// Of the parameter.
        name: &'static str,
        /// What it is.
        value: Duration,
        /// The least it may be.
        least: Duration,
        /// The most it may be.
        most: Duration,
    },
    /// The bandwidth limit is too low.
    #[error(
        "bandwidth_limit is {} bytes per second; it must be at least {}, or not be given",
        .0.0,
        Parameters::LEAST_BANDWIDTH.0
    )]
    Bandwidth(BytesPerSecond),
    /// The guest would be left nothing, or lose nothing.
    #[error(
        "throttle is {} %; it must be from {} % to {} %, or not be given",
        .0.0,
        Parameters::THROTTLE.start().0,
        Parameters::THROTTLE.end().0
    )]
    Throttle(Percent),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_within_bounds() {
        assert_eq!(Parameters::default().check(), Ok(()));
    }

    #[test]
    fn a_parameter_out_of_bounds_is_named() {
        let named = |parameters: Parameters| parameters.check().unwrap_err().to_string();
        let defaults = Parameters::default;
        assert!(named(Parameters { max_downtime: Duration::ZERO, ..defaults() }).starts_with("max_downtime"));
        let parameters = Parameters { timeout: Some(Duration::MAX), ..defaults() };
        assert!(named(parameters).starts_with("timeout"));
        let parameters = Parameters { no_progress_timeout: Duration::ZERO, ..defaults() };
        assert!(named(parameters).starts_with("no_progress_timeout"));
        let parameters = Parameters { bandwidth_limit: Some(BytesPerSecond(0)), ..defaults() };
        assert!(named(parameters).starts_with("bandwidth_limit"));
        for percent in [0, 100] {
            let parameters = Parameters { throttle: Some(Percent(percent)), ..defaults() };
            assert!(named(parameters).starts_with("throttle"));
        }
    }
}
