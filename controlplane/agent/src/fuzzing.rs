//! What reads bytes of peers, callers, files and users, for those who make such
//! bytes up: `lab/fuzz`.

use prost::Message as _;
use ramferry_mover::{DestinationInput, SourceInput};
use ramferry_proto::v1;
use ramferry_ram::{Layout, PageSets};

pub use crate::journal::fuzzing as journal;

use crate::Config;
use crate::config::ConfigError;
use crate::journal::{Created, Record, SpecRecord};
use crate::request::Request;

/// What a destination's driver is told of the orders of a source.
pub fn orders(messages: &[&[u8]]) -> Vec<DestinationInput> {
    let decoded = messages.iter().filter_map(|message| v1::ExchangeControlRequest::decode(*message).ok());
    decoded.filter_map(|request| crate::peer_service::input(request.order?).ok()?).collect()
}

/// What a source makes of the answers of a destination.
#[derive(Debug)]
pub struct Answers {
    /// As told so far; `None` once all of it was.
    so_far: Option<PageSets>,
    /// All of the presence.
    pub presence: Option<PageSets>,
}

impl Answers {
    /// Of a destination of a guest with this layout.
    pub fn new(layout: &Layout) -> Self {
        Self { so_far: Some(PageSets::new(layout)), presence: None }
    }

    /// What the driver is told of one answer.
    ///
    /// # Errors
    /// Why the answer is refused.
    pub fn take(&mut self, message: &[u8]) -> Result<Option<SourceInput>, String> {
        use v1::exchange_control_response::Answer;
        let response = v1::ExchangeControlResponse::decode(message).map_err(|error| error.to_string())?;
        match response.answer {
            Some(Answer::Presence(part)) => {
                if let Some(presence) = crate::source::take_presence(&part, &mut self.so_far)? {
                    self.presence = Some(presence);
                }
                Ok(None)
            }
            Some(answer) => crate::source::input(answer),
            None => Ok(None),
        }
    }
}

/// The layout in a source's proposal of a session, if it is one.
pub fn proposal(message: &[u8]) -> Option<Layout> {
    let request = v1::NegotiateSessionRequest::decode(message).ok()?;
    let _ = crate::request::registration_mode(request.registration_mode);
    let _ = crate::request::fabric(request.fabric);
    crate::destination::layout(&request.blocks).ok()
}

/// Reads a caller's order of a migration. What is accepted can be recorded and shown.
///
/// # Panics
/// When what was recorded is not what was asked for.
pub fn creation(message: &[u8]) -> Option<()> {
    let request = v1::CreateMigrationRequest::decode(message).ok()?;
    let _ = crate::journal::is_migration_id(&request.id);
    let accepted = Request::try_from(request.spec).ok()?;
    let recorded = SpecRecord::try_from(&accepted.spec).expect("what was accepted can be recorded");
    let shown = v1::MigrationSpec::from(&recorded);
    let again = Request::try_from(Some(shown)).expect("what was recorded is accepted");
    assert_eq!(again.parameters, accepted.parameters, "what was recorded is what was asked for");
    assert_eq!(
        (again.fabric, again.registration, again.streams, again.pin_budget_bytes),
        (accepted.fabric, accepted.registration, accepted.streams, accepted.pin_budget_bytes),
    );
    Some(())
}

/// Reads a caller's change of a migration's parameters.
pub fn change(message: &[u8]) -> Option<()> {
    let request = v1::UpdateMigrationParametersRequest::decode(message).ok()?;
    let paths = request.update_mask.unwrap_or_default().paths;
    let change = request.parameters.unwrap_or_default();
    let merged = crate::request::apply(&v1::MigrationParameters::default(), &change, &paths).ok()?;
    crate::request::engine_parameters(&merged).ok().map(drop)
}

/// What a restarted agent shows of a migration.
pub fn shown(created: &Created, records: &[Record]) -> v1::Migration {
    crate::summary::shown(created, records)
}

/// Reads the text of a configuration file.
///
/// # Errors
/// Why it is not a configuration.
pub fn config(text: &str) -> Result<Config, ConfigError> {
    crate::config::of_text(text)
}
