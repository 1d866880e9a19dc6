//! Errors as `google.rpc.Status`: every one carries an ErrorInfo with a
//! reason, and PreconditionFailure where something must be changed first.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, PreconditionViolation, StatusExt as _};

/// The domain of every ErrorInfo that the agent makes.
pub const DOMAIN: &str = "ramferry";

/// Longest text of a peer or a caller that is kept and shown: a journal's record and
/// a gRPC header have room for several.
pub(crate) const TEXT_BYTES: usize = 1536;

/// `text`, cut at [`TEXT_BYTES`].
pub(crate) fn shortened(text: impl Into<String>) -> String {
    let mut text = text.into();
    if text.len() > TEXT_BYTES {
        text.truncate(text.floor_char_boundary(TEXT_BYTES));
        text.push('…');
    }
    text
}

/// A status with ErrorInfo: `reason` is UPPER_SNAKE_CASE, `message` says what
/// happened and what to do, `metadata` holds what a program would parse from it.
pub fn status<'a>(
    code: Code,
    reason: &str,
    message: impl Into<String>,
    metadata: impl IntoIterator<Item = (&'a str, String)>,
) -> Status {
    Status::with_error_details(code, shortened(message), details(reason, metadata))
}

/// FAILED_PRECONDITION with ErrorInfo and one violation for each thing that must be changed.
pub fn precondition<'a>(
    reason: &str,
    message: impl Into<String>,
    violations: impl IntoIterator<Item = Violation>,
    metadata: impl IntoIterator<Item = (&'a str, String)>,
) -> Status {
    let mut details = details(reason, metadata);
    let violations = violations.into_iter().map(|violation| {
        PreconditionViolation::new(
            violation.kind,
            shortened(violation.subject),
            shortened(violation.description),
        )
    });
    details.set_precondition_failure(violations.collect::<Vec<_>>());
    Status::with_error_details(Code::FailedPrecondition, shortened(message), details)
}

/// INVALID_ARGUMENT with ErrorInfo and the field that is wrong.
pub fn invalid_argument(field: &str, reason: &str, message: impl Into<String>) -> Status {
    let message = shortened(message);
    let mut details = details(reason, [("field", field.to_owned())]);
    details.add_bad_request_violation(field, message.clone());
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// INTERNAL with ErrorInfo for an error of ours: its message and those of its causes.
pub fn internal(reason: &str, error: &dyn std::error::Error) -> Status {
    status(Code::Internal, reason, causes(error), [])
}

/// One thing that must be changed before a call can succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which kind of thing: "GUEST", "HOST", "PEER".
    pub kind: String,
    /// Which one: a path, a device, a block's name.
    pub subject: String,
    /// What is wrong and what to do.
    pub description: String,
}

/// An error's message followed by those of its causes.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.ends_with(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    text
}

/// The reason of a status' ErrorInfo.
pub fn reason_of(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

fn details<'a>(reason: &str, metadata: impl IntoIterator<Item = (&'a str, String)>) -> ErrorDetails {
    // A reason may be a peer's.
    let reason = if is_reason(reason) { reason } else { "UNKNOWN" };
    let metadata: HashMap<String, String> =
        metadata.into_iter().map(|(key, value)| (key.to_owned(), shortened(value))).collect();
    ErrorDetails::with_error_info(reason, DOMAIN, metadata)
}

/// Whether `text` is a reason: 1 to 63 of `A-Z0-9_`, a letter first.
pub fn is_reason(text: &str) -> bool {
    text.len() <= 63
        && text.starts_with(|c: char| c.is_ascii_uppercase())
        && text.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_any_length_makes_a_status_that_fits_a_header() {
        let long = "é".repeat(1 << 20);
        let violation = Violation { kind: "GUEST".into(), subject: long.clone(), description: long.clone() };
        let refused = precondition("REFUSED", long.clone(), [violation], [("path", long.clone())]);
        let wrong = invalid_argument("id", "WRONG", long.clone());
        for status in [refused, wrong, status(Code::NotFound, "NONE", long, [])] {
            assert!(status.message().len() <= TEXT_BYTES + 3);
            assert!(status.details().len() <= 7 << 10, "{}", status.details().len());
        }
    }

    #[test]
    fn status_carries_reason_domain_and_metadata() {
        let status = status(Code::NotFound, "MIGRATION_NOT_FOUND", "no such", [("id", "m1".to_owned())]);
        let info = status.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("MIGRATION_NOT_FOUND", DOMAIN));
        assert_eq!(info.metadata["id"], "m1");
        assert_eq!(reason_of(&status).as_deref(), Some("MIGRATION_NOT_FOUND"));
    }

    #[test]
    fn reason_of_a_peer_that_is_none_becomes_unknown() {
        assert_eq!(reason_of(&status(Code::Internal, "<b>", "", [])).as_deref(), Some("UNKNOWN"));
    }

    #[test]
    fn precondition_lists_each_violation() {
        let violation = |subject: &str| Violation {
            kind: "GUEST".into(),
            subject: subject.into(),
            description: "start it with share=on".into(),
        };
        let status =
            precondition("PRIVATE_MEMORY", "not shared", [violation("pc.ram"), violation("dimm0")], []);
        assert_eq!(status.code(), Code::FailedPrecondition);
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "PRIVATE_MEMORY");
        let subjects: Vec<_> =
            details.precondition_failure().unwrap().violations.iter().map(|v| v.subject.as_str()).collect();
        assert_eq!(subjects, ["pc.ram", "dimm0"]);
    }

    #[test]
    fn invalid_argument_names_the_field() {
        let status = invalid_argument("spec.source_qmp_path", "FIELD_MISSING", "give a path");
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "spec.source_qmp_path");
        assert_eq!(details.error_info().unwrap().metadata["field"], "spec.source_qmp_path");
    }

    #[test]
    fn causes_are_joined_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("disk on fire"));
        assert_eq!(causes(&error), "cannot open: disk on fire");
    }

    #[test]
    fn reasons_are_upper_snake_case() {
        assert!(is_reason("LINK_LOST_2"));
        for bad in ["", "lower", "2FAST", "A B", &"A".repeat(64)] {
            assert!(!is_reason(bad), "{bad}");
        }
    }
}
