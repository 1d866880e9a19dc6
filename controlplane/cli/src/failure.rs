//! Why a command could not do its work, as a person and as a program reads it.

use std::error::Error;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use ramferry_agent::AgentError;
use tonic::Status;

use crate::args::names::AgentAddress;
use crate::bench::BenchError;
use crate::exit::Exit;
use crate::output::printable;
use crate::refusal::{ErrorObject, Refusal, code_name};

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Failure {
    /// The connection could not be made, or broke.
    #[error("cannot reach the agent at {agent}: {}", deepest(.source.as_ref()))]
    Unreachable { agent: Box<AgentAddress>, has_tls: bool, source: Box<dyn Error + Send + Sync> },
    /// The agent did not answer in time.
    #[error("the agent at {agent} gave no answer within {}", humantime::format_duration(*.waited))]
    Silent { agent: Box<AgentAddress>, waited: Duration },
    /// The agent ended the stream of a migration that had not ended.
    #[error("the agent at {agent} stopped reporting before the migration's end")]
    StreamEnded { agent: Box<AgentAddress> },
    /// The agent answered with an error.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The agent's answer lacks what the protocol says is in it.
    #[error("the agent's answer has no {0}; is it of another version than this command?")]
    Incomplete(&'static str),
    /// A file of the command line is not usable.
    #[error("{option} {}: {source}", .path.display())]
    File { option: &'static str, path: PathBuf, source: io::Error },
    /// The files of TLS do not make a usable identity.
    #[error("the TLS files are not usable: {}", deepest(.0))]
    Tls(#[source] tonic::transport::Error),
    /// The system refused what every command needs.
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
    /// The agent of `ramferry agent` ended with an error.
    #[error("{}", chain(.0.as_ref()))]
    Agent(Box<AgentError>),
    /// `ramferry bench` could not measure.
    #[error("{}", chain(.0.as_ref()))]
    Bench(Box<BenchError>),
}

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        Self::Agent(Box::new(error))
    }
}

impl From<BenchError> for Failure {
    fn from(error: BenchError) -> Self {
        Self::Bench(Box::new(error))
    }
}

impl Failure {
    /// What went wrong with a call to `agent`.
    pub(crate) fn from_status(agent: &AgentAddress, has_tls: bool, status: Status) -> Self {
        // A status that came over the wire has no source; one that tonic made because the wire failed has.
        if status.source().is_some() && !Refusal::is_from_agent(&status) {
            return Self::Unreachable { agent: Box::new(agent.clone()), has_tls, source: Box::new(status) };
        }
        Self::Refused(Box::new(Refusal::new(&status)))
    }

    /// Whether the agent may answer when it is asked again: it restarts, or the network comes back.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Silent { .. } | Self::StreamEnded { .. } => true,
            Self::Refused(refusal) => refusal.is_passing(),
            Self::Incomplete(_)
            | Self::File { .. }
            | Self::Tls(_)
            | Self::System { .. }
            | Self::Agent(_)
            | Self::Bench(_) => false,
        }
    }

    /// Whether the call may have been carried out, or not: no answer came.
    pub(crate) fn is_unanswered(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Silent { .. })
    }

    /// The exit code.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Unreachable { .. } | Self::Silent { .. } | Self::StreamEnded { .. } => Exit::Unreachable,
            Self::Refused(_) => Exit::Refused,
            Self::File { .. } | Self::Tls(_) => Exit::Usage,
            Self::Agent(error) if matches!(**error, AgentError::Config(_)) => Exit::Usage,
            Self::Incomplete(_) | Self::System { .. } | Self::Agent(_) => Exit::Failed,
            Self::Bench(error) => match **error {
                BenchError::Share { .. } => Exit::Usage,
                BenchError::Unreachable { .. } => Exit::Unreachable,
                BenchError::Refused(_) => Exit::Refused,
                _ => Exit::Failed,
            },
        }
    }

    /// Tells a person, on stderr. Nothing is left to do when stderr is gone.
    pub(crate) fn print_text(&self) {
        let mut lines = vec![format!("error: {}", printable(&self.to_string()))];
        lines.extend(self.notes().into_iter().map(|(name, text)| format!("  {name}: {}", printable(&text))));
        let _ = writeln!(io::stderr().lock(), "{}", lines.join("\n"));
    }

    /// As a program reads it.
    pub(crate) fn to_object(&self) -> ErrorObject {
        match self {
            Self::Refused(refusal) => refusal.to_object(),
            other => {
                let (code, reason) = other.code_and_reason();
                ErrorObject {
                    code: code_name(code),
                    reason: Some(reason.to_owned()),
                    message: other.to_string(),
                    violations: Vec::new(),
                }
            }
        }
    }

    fn notes(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Refused(refusal) => refusal.notes(),
            Self::Unreachable { agent, has_tls, source } => {
                let hint = ramferry_agent::auth::tls_hint(source.as_ref()).map(in_words_of_the_client);
                vec![("remedy", hint.unwrap_or_else(|| unreachable_remedy(agent, *has_tls)))]
            }
            Self::Silent { .. } | Self::StreamEnded { .. } => {
                vec![("remedy", "see the agent's log; `ramferry list` shows what it is doing".to_owned())]
            }
            _ => Vec::new(),
        }
    }

    fn code_and_reason(&self) -> (tonic::Code, &'static str) {
        use tonic::Code;
        match self {
            Self::Unreachable { .. } => (Code::Unavailable, "AGENT_UNREACHABLE"),
            Self::Silent { .. } => (Code::DeadlineExceeded, "AGENT_SILENT"),
            Self::StreamEnded { .. } => (Code::Unavailable, "AGENT_STREAM_ENDED"),
            Self::File { .. } => (Code::InvalidArgument, "FILE_UNUSABLE"),
            Self::Tls(_) => (Code::InvalidArgument, "TLS_UNUSABLE"),
            Self::Refused(_) | Self::Incomplete(_) => (Code::Internal, "ANSWER_INCOMPLETE"),
            Self::System { .. } => (Code::Internal, "SYSTEM"),
            Self::Agent(_) => (Code::Internal, "AGENT_FAILED"),
            Self::Bench(error) => match **error {
                BenchError::Share { .. } => (Code::InvalidArgument, "BENCH_MEMORY"),
                BenchError::Memory { .. } => (Code::ResourceExhausted, "BENCH_MEMORY"),
                BenchError::Unreachable { .. } => (Code::Unavailable, "BENCH_UNREACHABLE"),
                BenchError::Refused(_) => (Code::FailedPrecondition, "BENCH_REFUSED"),
                BenchError::TimedOut(_) | BenchError::NobodyCame(_) => {
                    (Code::DeadlineExceeded, "BENCH_TIMEOUT")
                }
                _ => (Code::Internal, "BENCH_FAILED"),
            },
        }
    }
}

/// The client's options have the names of the agent's keys, written as options.
fn in_words_of_the_client(hint: &str) -> String {
    let own = [
        ("certificate in tls_cert", "certificate in --tls-cert"),
        ("in tls_ca signed", "in --tls-ca signed"),
    ];
    let own = own.iter().fold(hint.to_owned(), |text, (key, option)| text.replace(key, option));
    own.replace("set tls_server_name", "give --tls-server-name")
}

fn unreachable_remedy(agent: &AgentAddress, has_tls: bool) -> String {
    if !has_tls && !agent.is_loopback() {
        return "check that `ramferry agent` listens there; an agent serves other hosts only with mutual TLS: give \
                --tls-ca, --tls-cert and --tls-key"
            .to_owned();
    }
    if has_tls {
        return "check that `ramferry agent` listens there with TLS, that its certificate names this host (or give \
                --tls-server-name), that its authorities signed yours, and that yours has not expired"
            .to_owned();
    }
    "check that `ramferry agent` runs there (--agent or RAMFERRY_AGENT names the address; with TLS give --tls-ca, \
     --tls-cert and --tls-key)"
        .to_owned()
}

/// The message at the end of a chain of causes: layers above it say "transport error".
fn deepest(error: &(dyn Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(cause) = deepest.source() {
        deepest = cause;
    }
    match deepest.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => deepest.to_string(),
    }
}

/// An error's message and those of its causes, each once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
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
