//! `ramferry check`

use ramferry_proto::v1;
use serde::Serialize;

use crate::args::connection::OutputFormat;
use crate::args::migration::CheckArgs;
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::summary::fabric_name;
use crate::output::{print, print_json, report};

#[derive(Serialize)]
struct Checked<'a> {
    fabric: Option<&'static str>,
    fabric_reason: &'a str,
    tracker: &'a str,
    ram_bytes: u64,
    present_bytes: u64,
    source_vmm: &'a str,
    destination_vmm: &'a str,
    recheck_reason: &'a str,
}

pub(super) async fn run(args: CheckArgs) -> Result<Exit, Failure> {
    let client = Client::connect(&args.connection).await?;
    let answer = client.check(args.spec.into_proto()).await?;
    match args.connection.output {
        OutputFormat::Text => print(&report::check(&answer))?,
        OutputFormat::Json => print_json(&checked(&answer))?,
    }
    Ok(Exit::Done)
}

fn checked(answer: &v1::CheckMigrationResponse) -> Checked<'_> {
    Checked {
        fabric: fabric_name(answer.fabric()),
        fabric_reason: &answer.fabric_reason,
        tracker: &answer.tracker,
        ram_bytes: answer.ram_bytes,
        present_bytes: answer.present_bytes,
        source_vmm: &answer.source_vmm,
        destination_vmm: &answer.destination_vmm,
        recheck_reason: &answer.recheck_reason,
    }
}
