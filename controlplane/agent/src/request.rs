//! What a caller asks for, checked: `MigrationSpec` parsed into the types that
//! the engine and the data plane take.

use std::path::PathBuf;
use std::time::Duration;

use ramferry_engine::{BytesPerSecond, Parameters, Percent, Postcopy, TimeoutAction};
use ramferry_fabric::FabricKind;
use ramferry_fabric::windows::RegistrationMode;
use ramferry_proto::v1;
use ramferry_ram::Layout;
use tonic::Status;

use crate::status::invalid_argument;

/// Most streams of one migration.
pub(crate) const MAX_STREAMS: u32 = 64;

/// A checked [`v1::MigrationSpec`].
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) source_qmp: PathBuf,
    pub(crate) destination_qmp: String,
    pub(crate) destination_agent: String,
    pub(crate) parameters: Parameters,
    pub(crate) registration: RegistrationMode,
    pub(crate) pin_budget_bytes: Option<u64>,
    /// `None` lets the agents choose.
    pub(crate) fabric: Option<FabricKind>,
    /// 0 lets the agents choose.
    pub(crate) streams: u32,
    pub(crate) spec: v1::MigrationSpec,
}

impl TryFrom<Option<v1::MigrationSpec>> for Request {
    type Error = Status;

    fn try_from(spec: Option<v1::MigrationSpec>) -> Result<Self, Status> {
        let spec = spec.ok_or_else(|| missing("spec", "what to migrate, from where, and to where"))?;
        let source_qmp = absolute("spec.source_qmp_path", &spec.source_qmp_path)?;
        absolute("spec.destination_qmp_path", &spec.destination_qmp_path)?;
        let (host, port) = spec.destination_agent.rsplit_once(':').unwrap_or(("", ""));
        if host.is_empty() || port.parse::<u16>().is_err() {
            let message = format!(
                "destination_agent is {:?}: give the host and port of the destination's agent, as in \"10.0.0.2:7050\"",
                spec.destination_agent
            );
            return Err(invalid_argument("spec.destination_agent", "ADDRESS_INVALID", message));
        }
        let given = spec.parameters.unwrap_or_default();
        if given.streams > MAX_STREAMS {
            let message = format!("streams is {}: give at most {MAX_STREAMS}", given.streams);
            return Err(invalid_argument("spec.parameters.streams", "OUT_OF_RANGE", message));
        }
        Ok(Self {
            source_qmp,
            destination_qmp: spec.destination_qmp_path.clone(),
            destination_agent: spec.destination_agent.clone(),
            parameters: engine_parameters(&given)?,
            registration: registration_mode(given.registration_mode)?,
            pin_budget_bytes: (given.pin_budget_bytes > 0).then_some(given.pin_budget_bytes),
            fabric: fabric(given.fabric)?,
            streams: given.streams,
            spec,
        })
    }
}

/// The parameters that can be changed while a migration runs.
pub(crate) const CHANGEABLE: [&str; 7] = [
    "max_downtime",
    "bandwidth_limit_bits_per_second",
    "timeout",
    "timeout_action",
    "no_progress_timeout",
    "postcopy",
    "throttle_max_percent",
];

/// Takes the fields that `paths` names over from `change`.
pub(crate) fn apply(
    current: &v1::MigrationParameters,
    change: &v1::MigrationParameters,
    paths: &[String],
) -> Result<v1::MigrationParameters, Status> {
    let mut merged = *current;
    if paths.is_empty() {
        return Err(missing("update_mask", &format!("the parameters to change: {}", CHANGEABLE.join(", "))));
    }
    for path in paths {
        match path.as_str() {
            "max_downtime" => merged.max_downtime = change.max_downtime,
            "bandwidth_limit_bits_per_second" => {
                merged.bandwidth_limit_bits_per_second = change.bandwidth_limit_bits_per_second;
            }
            "timeout" => merged.timeout = change.timeout,
            "timeout_action" => merged.timeout_action = change.timeout_action,
            "no_progress_timeout" => merged.no_progress_timeout = change.no_progress_timeout,
            "postcopy" => merged.postcopy = with_its_budget(current, change.postcopy)?,
            "throttle_max_percent" => merged.throttle_max_percent = change.throttle_max_percent,
            _ => {
                let message = format!(
                    "{path:?} cannot be changed while a migration runs; these can: {}",
                    CHANGEABLE.join(", ")
                );
                return Err(invalid_argument("update_mask", "NOT_CHANGEABLE", message));
            }
        }
    }
    Ok(merged)
}

/// Post-copy as it is changed to: the copy has all of a pin budget where it was not allowed, and nothing is left to read by.
fn with_its_budget(current: &v1::MigrationParameters, changed: i32) -> Result<i32, Status> {
    let never = |value| Ok::<_, Status>(postcopy(value)? == Postcopy::Never);
    if current.pin_budget_bytes > 0 && never(current.postcopy)? && !never(changed)? {
        let message = "post-copy cannot be allowed later where there is a pin budget: a part of that is kept for it \
                       from the start. Cancel, and migrate again with post-copy allowed";
        return Err(invalid_argument("update_mask", "NOT_CHANGEABLE", message));
    }
    Ok(changed)
}

/// What of a pin budget is kept for the windows that post-copy reads by: those of the copy are still there when its own come.
pub(crate) fn reading_budget(pin_budget_bytes: u64, layout: &Layout) -> u64 {
    let longest_page = layout.blocks().iter().map(|block| block.page_bytes).max().unwrap_or(0);
    (pin_budget_bytes / 4).max(2 * longest_page)
}

/// The engine's part of `given`, with defaults where nothing is given.
pub(crate) fn engine_parameters(given: &v1::MigrationParameters) -> Result<Parameters, Status> {
    let defaults = Parameters::default();
    let timeout_action = match v1::TimeoutAction::try_from(given.timeout_action) {
        Ok(v1::TimeoutAction::Unspecified) => defaults.timeout_action,
        Ok(v1::TimeoutAction::Cancel) => TimeoutAction::Cancel,
        Ok(v1::TimeoutAction::Force) => TimeoutAction::Force,
        Err(_) => return Err(unknown("spec.parameters.timeout_action", given.timeout_action)),
    };
    let bits = given.bandwidth_limit_bits_per_second;
    let parameters = Parameters {
        max_downtime: duration("max_downtime", given.max_downtime)?.unwrap_or(defaults.max_downtime),
        bandwidth_limit: (bits > 0).then_some(BytesPerSecond(bits / 8)),
        timeout: duration("timeout", given.timeout)?,
        timeout_action,
        no_progress_timeout: duration("no_progress_timeout", given.no_progress_timeout)?
            .unwrap_or(defaults.no_progress_timeout),
        verify: given.verify,
        postcopy: postcopy(given.postcopy)?,
        // What does not fit is out of bounds all the same.
        throttle: (given.throttle_max_percent > 0)
            .then(|| Percent(u8::try_from(given.throttle_max_percent).unwrap_or(u8::MAX))),
    };
    parameters
        .check()
        .map_err(|error| invalid_argument("spec.parameters", "OUT_OF_RANGE", error.to_string()))?;
    Ok(parameters)
}

pub(crate) fn postcopy(value: i32) -> Result<Postcopy, Status> {
    match v1::Postcopy::try_from(value) {
        Ok(v1::Postcopy::Unspecified | v1::Postcopy::Never) => Ok(Postcopy::Never),
        Ok(v1::Postcopy::Allow) => Ok(Postcopy::Allow),
        Ok(v1::Postcopy::Always) => Ok(Postcopy::Always),
        Err(_) => Err(unknown("spec.parameters.postcopy", value)),
    }
}

pub(crate) fn registration_mode(value: i32) -> Result<RegistrationMode, Status> {
    match v1::RegistrationMode::try_from(value) {
        Ok(v1::RegistrationMode::Unspecified | v1::RegistrationMode::Dynamic) => {
            Ok(RegistrationMode::Dynamic)
        }
        Ok(v1::RegistrationMode::PinAll) => Ok(RegistrationMode::PinAll),
        Err(_) => Err(unknown("spec.parameters.registration_mode", value)),
    }
}

/// `None` for UNSPECIFIED.
pub(crate) fn fabric(value: i32) -> Result<Option<FabricKind>, Status> {
    match v1::FabricKind::try_from(value) {
        Ok(v1::FabricKind::Unspecified) => Ok(None),
        Ok(v1::FabricKind::Verbs) => Ok(Some(FabricKind::Verbs)),
        Ok(v1::FabricKind::Shm) => Ok(Some(FabricKind::Shm)),
        Ok(v1::FabricKind::Tcp) => Ok(Some(FabricKind::Tcp)),
        Err(_) => Err(unknown("spec.parameters.fabric", value)),
    }
}

pub(crate) fn fabric_on_the_wire(kind: FabricKind) -> v1::FabricKind {
    match kind {
        FabricKind::Verbs => v1::FabricKind::Verbs,
        FabricKind::Shm => v1::FabricKind::Shm,
        FabricKind::Tcp => v1::FabricKind::Tcp,
    }
}

fn duration(name: &str, value: Option<prost_types::Duration>) -> Result<Option<Duration>, Status> {
    let parsed = value.map(Duration::try_from).transpose();
    parsed.map_err(|_| {
        let field = format!("spec.parameters.{name}");
        let message = format!("{name} is negative or out of range; give a duration of at least 0");
        invalid_argument(&field, "OUT_OF_RANGE", message)
    })
}

fn absolute(field: &str, path: &str) -> Result<PathBuf, Status> {
    if path.is_empty() {
        return Err(missing(field, "the path of the guest's QMP socket on its host"));
    }
    if !path.starts_with('/') {
        let message = format!("{field} is {path:?}: give an absolute path");
        return Err(invalid_argument(field, "PATH_RELATIVE", message));
    }
    Ok(path.into())
}

fn missing(field: &str, what: &str) -> Status {
    invalid_argument(field, "FIELD_MISSING", format!("{field} is missing: give {what}"))
}

fn unknown(field: &str, value: i32) -> Status {
    invalid_argument(field, "VALUE_UNKNOWN", format!("{field} is {value}, which this version does not know"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> v1::MigrationSpec {
        v1::MigrationSpec {
            source_qmp_path: "/run/a.qmp".into(),
            destination_qmp_path: "/run/b.qmp".into(),
            destination_agent: "[::1]:7050".into(),
            parameters: None,
        }
    }

    #[test]
    fn a_spec_without_parameters_gets_the_defaults() {
        let request = Request::try_from(Some(spec())).unwrap();
        assert_eq!(request.parameters, Parameters::default());
        assert_eq!(request.registration, RegistrationMode::Dynamic);
        assert_eq!(request.fabric, None);
    }

    #[test]
    fn what_is_wrong_with_a_spec_is_named() {
        let refused =
            |spec: Option<v1::MigrationSpec>| Request::try_from(spec).unwrap_err().message().to_owned();
        assert!(refused(None).contains("spec is missing"));
        assert!(
            refused(Some(v1::MigrationSpec { source_qmp_path: "x".into(), ..spec() })).contains("absolute")
        );
        for address in ["", "host", "host:", ":1", "host:99999"] {
            let spec = v1::MigrationSpec { destination_agent: address.into(), ..spec() };
            assert!(refused(Some(spec)).contains("host and port"));
        }
        let parameters = v1::MigrationParameters { fabric: 99, ..Default::default() };
        assert!(refused(Some(v1::MigrationSpec { parameters: Some(parameters), ..spec() })).contains("99"));
    }

    #[test]
    fn only_named_and_changeable_parameters_change() {
        let current = v1::MigrationParameters { streams: 3, ..Default::default() };
        let change = v1::MigrationParameters {
            streams: 9,
            bandwidth_limit_bits_per_second: 8_000_000,
            ..Default::default()
        };
        let merged = apply(&current, &change, &["bandwidth_limit_bits_per_second".into()]).unwrap();
        assert_eq!((merged.streams, merged.bandwidth_limit_bits_per_second), (3, 8_000_000));
        assert!(apply(&current, &change, &["streams".into()]).is_err());
        assert!(apply(&current, &change, &[]).is_err());
    }

    #[test]
    fn post_copy_is_not_allowed_later_where_a_pin_budget_left_it_nothing() {
        let allow = v1::MigrationParameters { postcopy: v1::Postcopy::Allow.into(), ..Default::default() };
        let never = v1::MigrationParameters::default();
        let budget = |parameters| v1::MigrationParameters { pin_budget_bytes: 64 << 20, ..parameters };
        let change = |current, change| apply(&current, &change, &["postcopy".into()]);
        assert!(change(budget(never), allow).unwrap_err().message().contains("pin budget"));
        assert_eq!(change(never, allow).unwrap().postcopy, allow.postcopy);
        assert_eq!(change(budget(allow), never).unwrap().postcopy, never.postcopy);
    }
}
