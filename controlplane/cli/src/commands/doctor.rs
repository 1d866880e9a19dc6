//! `ramferry doctor`

use ramferry_agent::diagnostics::{Doctor, Finding, Status};
use ramferry_agent::{AgentError, Config};
use ramferry_proto::v1;

use crate::args::connection::OutputFormat;
use crate::args::doctor::DoctorArgs;
use crate::client::run_diagnostics;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::doctor::{Check, Examination};
use crate::output::{print, print_json};

pub(super) async fn run(args: DoctorArgs) -> Result<Exit, Failure> {
    let peer = args.peer.as_ref().map(ToString::to_string);
    let (agent, checks) = match args.connection() {
        Some(connection) => {
            let results = run_diagnostics(&connection, peer.unwrap_or_default()).await?;
            (Some(connection.agent.to_string()), results.into_iter().map(told).collect())
        }
        None => {
            let config = Config::load(&args.options()).map_err(AgentError::from)?;
            let findings = Doctor::new(config).examine(peer.as_deref()).await;
            let findings = findings.map_err(|source| AgentError::Panicked { source })?;
            (None, findings.into_iter().map(found).collect())
        }
    };
    let examination = Examination::new(agent, checks);
    match args.output {
        OutputFormat::Text => print(&examination.text())?,
        OutputFormat::Json => print_json(&examination)?,
    }
    Ok(if examination.has_failed() { Exit::Unfit } else { Exit::Done })
}

fn found(finding: Finding) -> Check {
    Check {
        id: finding.check.info().id.to_owned(),
        status: finding.verdict.status.as_str(),
        evidence: finding.verdict.evidence,
        remedy: finding.verdict.remedy,
    }
}

fn told(result: v1::DiagnosticResult) -> Check {
    let status = match result.status() {
        v1::DiagnosticStatus::Ok => Status::Ok,
        v1::DiagnosticStatus::Warn => Status::Warn,
        v1::DiagnosticStatus::Fail => Status::Fail,
        // Of a newer agent: what is not understood is not taken for sound.
        v1::DiagnosticStatus::Unspecified | v1::DiagnosticStatus::Skip => Status::Skip,
    };
    Check { id: result.id, status: status.as_str(), evidence: result.evidence, remedy: result.remedy }
}
