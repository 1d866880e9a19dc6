//! Commands that make one call about one migration: `ramferry get`, `cancel`,
//! `set`, `switchover`, and `delete`.

use ramferry_proto::v1::Migration;
use serde::Serialize;

use crate::args::connection::OutputFormat;
use crate::args::migration::{DeleteArgs, IdArgs, SetArgs};
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::summary::{Details, state_name};
use crate::output::{print, print_json, report};

#[derive(Serialize)]
struct Deleted {
    deleted: Vec<String>,
}

pub(super) async fn get(args: IdArgs) -> Result<Exit, Failure> {
    let client = Client::connect(&args.connection).await?;
    let migration = client.get(&args.id).await?;
    show(&migration, args.connection.output, report::details)
}

pub(super) async fn cancel(args: IdArgs) -> Result<Exit, Failure> {
    let client = Client::connect(&args.connection).await?;
    let migration = client.cancel(&args.id).await?;
    show(&migration, args.connection.output, state)
}

pub(super) async fn switchover(args: IdArgs) -> Result<Exit, Failure> {
    let client = Client::connect(&args.connection).await?;
    let migration = client.force_switchover(&args.id).await?;
    show(&migration, args.connection.output, state)
}

pub(super) async fn set(args: SetArgs) -> Result<Exit, Failure> {
    let client = Client::connect(&args.connection).await?;
    let (parameters, mask) = args.changes();
    let migration = client.update(&args.id, parameters, mask).await?;
    show(&migration, args.connection.output, report::details)
}

pub(super) async fn delete(args: DeleteArgs) -> Result<Exit, Failure> {
    let client = Client::connect(&args.connection).await?;
    let mut deleted = Vec::new();
    for id in &args.ids {
        client.delete(id).await?;
        if args.connection.output == OutputFormat::Text {
            print(&format!("migration {id} is forgotten\n"))?;
        }
        deleted.push(id.to_string());
    }
    if args.connection.output == OutputFormat::Json {
        print_json(&Deleted { deleted })?;
    }
    Ok(Exit::Done)
}

fn show(
    migration: &Migration,
    output: OutputFormat,
    text: fn(&Migration) -> String,
) -> Result<Exit, Failure> {
    match output {
        OutputFormat::Text => print(&text(migration))?,
        OutputFormat::Json => print_json(&Details::new(migration))?,
    }
    Ok(Exit::Done)
}

fn state(migration: &Migration) -> String {
    format!("migration {} {}\n", migration.id, state_name(migration.state()))
}
