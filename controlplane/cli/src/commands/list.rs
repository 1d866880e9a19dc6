//! `ramferry list`

use serde::Serialize;

use crate::args::connection::OutputFormat;
use crate::args::migration::{ListArgs, State};
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::summary::Details;
use crate::output::{print, print_json, report};

#[derive(Serialize)]
struct List {
    migrations: Vec<Details>,
}

pub(super) async fn run(args: ListArgs) -> Result<Exit, Failure> {
    let client = Client::connect(&args.connection).await?;
    let states: Vec<_> = args.states.into_iter().map(State::into_proto).collect();
    let migrations = client.list(&states).await?;
    match args.connection.output {
        OutputFormat::Text => print(&report::list(&migrations))?,
        OutputFormat::Json => {
            print_json(&List { migrations: migrations.iter().map(Details::new).collect() })?;
        }
    }
    Ok(Exit::Done)
}
