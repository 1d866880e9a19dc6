//! An error that an agent answered with: `google.rpc.Status` and its details.

use std::fmt;

use serde::Serialize;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// An error that an agent answered with.
#[derive(Debug)]
pub(crate) struct Refusal {
    code: Code,
    /// Of ErrorInfo: UPPER_SNAKE_CASE.
    reason: Option<String>,
    message: String,
    violations: Vec<Violation>,
    /// Of ErrorInfo's metadata, by name.
    metadata: Vec<(String, String)>,
}

/// An error as a program reads it, under the key `error`.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorObject {
    pub(crate) code: &'static str,
    pub(crate) reason: Option<String>,
    pub(crate) message: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) violations: Vec<Violation>,
}

/// One thing that must be changed first.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Violation {
    #[serde(rename = "type")]
    kind: String,
    subject: String,
    description: String,
}

impl Refusal {
    /// Whether the details say that an agent, not the way to it, made this status.
    pub(crate) fn is_from_agent(status: &Status) -> bool {
        status.get_details_error_info().is_some()
    }

    /// Reads the status and its details.
    pub(crate) fn new(status: &Status) -> Self {
        let details = status.get_error_details();
        let preconditions = details.precondition_failure().map_or(&[][..], |failure| &failure.violations);
        let fields = details.bad_request().map_or(&[][..], |request| &request.field_violations);
        let preconditions = preconditions.iter().map(|violation| Violation {
            kind: violation.r#type.clone(),
            subject: violation.subject.clone(),
            description: violation.description.clone(),
        });
        let fields = fields.iter().map(|violation| Violation {
            kind: "FIELD".to_owned(),
            subject: violation.field.clone(),
            description: violation.description.clone(),
        });
        let violations = preconditions.chain(fields).collect();
        let info = details.error_info();
        let mut metadata: Vec<(String, String)> = info
            .map(|info| info.metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect())
            .unwrap_or_default();
        metadata.sort_unstable();
        let message = match status.message() {
            "" => format!("the agent answered {}", code_name(status.code())),
            message => message.to_owned(),
        };
        Self {
            code: status.code(),
            reason: info.map(|info| info.reason.clone()),
            message,
            violations,
            metadata,
        }
    }

    /// Whether the same call may be answered otherwise in a moment.
    pub(crate) fn is_passing(&self) -> bool {
        match self.code {
            Code::Unavailable => true,
            // Without a reason these come from proxies and broken connections, not from an agent.
            Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded => {
                self.reason.is_none()
            }
            _ => false,
        }
    }

    /// As a program reads it.
    pub(crate) fn to_object(&self) -> ErrorObject {
        ErrorObject {
            code: code_name(self.code),
            reason: self.reason.clone(),
            message: self.message.clone(),
            violations: self.violations.clone(),
        }
    }

    /// What a person is told below the message.
    pub(crate) fn notes(&self) -> Vec<(&'static str, String)> {
        let code = code_name(self.code);
        let mut notes = vec![match &self.reason {
            Some(reason) => ("reason", format!("{reason} ({code})")),
            None => ("code", code.to_owned()),
        }];
        for violation in &self.violations {
            if violation.description == self.message {
                notes.push(("where", violation.subject.clone()));
            } else {
                notes.push(("change", format!("{}: {}", violation.subject, violation.description)));
            }
        }
        let told = |value: &String| {
            self.message.contains(value.as_str())
                || self.violations.iter().any(|violation| violation.subject == *value)
        };
        for (name, value) in self.metadata.iter().filter(|(_, value)| !told(value)) {
            match name.as_str() {
                "remedy" => notes.push(("remedy", value.clone())),
                _ => notes.push(("detail", format!("{name} = {value}"))),
            }
        }
        if self.reason.is_none() && self.code == Code::Unimplemented {
            let remedy = "check that --agent is a ramferry agent, and of a version that knows this command";
            notes.push(("remedy", remedy.to_owned()));
        }
        notes
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// A code's name in the gRPC specification.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn precondition_shows_reason_code_and_each_change() {
        let mut details = ErrorDetails::with_error_info("PRIVATE_MEMORY", "ramferry", HashMap::new());
        details.add_precondition_failure_violation("GUEST", "pc.ram", "start QEMU with share=on");
        let status = Status::with_error_details(Code::FailedPrecondition, "RAM is private", details);
        let refusal = Refusal::new(&status);
        assert_eq!(refusal.to_string(), "RAM is private");
        assert_eq!(
            refusal.notes(),
            [
                ("reason", "PRIVATE_MEMORY (FAILED_PRECONDITION)".to_owned()),
                ("change", "pc.ram: start QEMU with share=on".to_owned()),
            ]
        );
        assert_eq!(
            serde_json::to_string(&refusal.to_object()).expect("plain data"),
            "{\"code\":\"FAILED_PRECONDITION\",\"reason\":\"PRIVATE_MEMORY\",\"message\":\"RAM is private\",\
             \"violations\":[{\"type\":\"GUEST\",\"subject\":\"pc.ram\",\
             \"description\":\"start QEMU with share=on\"}]}"
        );
    }

    #[test]
    fn wrong_field_is_told_once() {
        let metadata = HashMap::from([("field".to_owned(), "spec.fabric".to_owned())]);
        let mut details = ErrorDetails::with_error_info("FIELD_INVALID", "ramferry", metadata);
        details.add_bad_request_violation("spec.fabric", "no such fabric");
        let status = Status::with_error_details(Code::InvalidArgument, "no such fabric", details);
        assert_eq!(
            Refusal::new(&status).notes(),
            [("reason", "FIELD_INVALID (INVALID_ARGUMENT)".to_owned()), ("where", "spec.fabric".to_owned()),]
        );
    }

    #[test]
    fn metadata_is_shown_and_remedy_by_its_name() {
        let metadata = HashMap::from([
            ("remedy".to_owned(), "raise LimitMEMLOCK".to_owned()),
            ("limit_bytes".to_owned(), "65536".to_owned()),
        ]);
        let details = ErrorDetails::with_error_info("MEMLOCK", "ramferry", metadata);
        let status = Status::with_error_details(Code::ResourceExhausted, "cannot pin", details);
        assert_eq!(
            Refusal::new(&status).notes()[1..],
            [("detail", "limit_bytes = 65536".to_owned()), ("remedy", "raise LimitMEMLOCK".to_owned())]
        );
    }

    #[test]
    fn status_without_details_still_has_code_and_message() {
        let refusal = Refusal::new(&Status::new(Code::Unimplemented, ""));
        assert_eq!(refusal.to_string(), "the agent answered UNIMPLEMENTED");
        let notes = refusal.notes();
        assert_eq!(notes[0], ("code", "UNIMPLEMENTED".to_owned()));
        assert!(notes[1].1.contains("is a ramferry agent"), "{notes:?}");
        assert_eq!(
            serde_json::to_string(&refusal.to_object()).expect("plain data"),
            "{\"code\":\"UNIMPLEMENTED\",\"reason\":null,\"message\":\"the agent answered UNIMPLEMENTED\"}"
        );
    }

    #[test]
    fn only_what_a_restart_may_heal_is_passing() {
        let is_passing = |code| Refusal::new(&Status::new(code, "")).is_passing();
        assert!(is_passing(Code::Unavailable) && is_passing(Code::Unknown) && is_passing(Code::Cancelled));
        assert!(!is_passing(Code::NotFound) && !is_passing(Code::PermissionDenied));
        let details = ErrorDetails::with_error_info("JOURNAL", "ramferry", HashMap::new());
        assert!(!Refusal::new(&Status::with_error_details(Code::Internal, "", details)).is_passing());
    }
}
