//! `ramferry migrate`

use ramferry_proto::v1::{CreateMigrationRequest, Migration};

use crate::args::connection::OutputFormat;
use crate::args::migration::MigrateArgs;
use crate::args::names::MigrationId;
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::follow::{Followed, Following, Interrupts, Observer as _, OnInterrupt, follow, persist};
use crate::output::summary::Summary;
use crate::output::{print, print_json, report};
use crate::progress::{Progress, write_line};

pub(super) async fn run(args: MigrateArgs) -> Result<Exit, Failure> {
    let output = args.connection.output;
    let mut interrupts = Interrupts::new()?;
    let client = Client::connect(&args.connection).await?;
    let id = name(args.id)?;
    let request = CreateMigrationRequest {
        id: id.to_string(),
        request_id: name(args.request_id)?.to_string(),
        spec: Some(args.spec.into_proto()),
        validate_only: false,
    };
    let mut progress = Progress::new(args.follow.quiet);
    let following = Following {
        interval: progress.interval(),
        patience: args.follow.reconnect_timeout,
        on_interrupt: OnInterrupt::Cancel,
    };
    let created = create(&client, request, following, &mut interrupts, &mut progress).await;
    let created = match created {
        Ok(Some(created)) => created,
        Ok(None) => {
            write_line(&may_go_on(&id));
            return Ok(Exit::Left);
        }
        Err(failure) => {
            if failure.is_unanswered() {
                write_line(&may_go_on(&id));
            }
            return Err(failure);
        }
    };
    if args.detach {
        return detached(&created, output);
    }
    progress.note(&format!("migration {id} is created"));
    let followed = follow(&client, &id, following, &mut interrupts, &mut progress).await;
    progress.finish();
    match followed {
        Ok(Followed::Ended(migration, exit)) => {
            match output {
                OutputFormat::Text => print(&report::ending(&migration))?,
                OutputFormat::Json => print_json(&Summary::new(&migration))?,
            }
            Ok(exit)
        }
        Ok(Followed::Left(last)) => {
            write_line(&may_go_on(&id));
            if output == OutputFormat::Json {
                print_json(&Summary::new(last.as_deref().unwrap_or(&created)))?;
            }
            Ok(Exit::Left)
        }
        Err(failure) => {
            write_line(&may_go_on(&id));
            Err(failure)
        }
    }
}

fn name(given: Option<MigrationId>) -> Result<MigrationId, Failure> {
    let made = || {
        MigrationId::random().map_err(|source| Failure::System {
            what: "no random numbers for an id",
            source: std::io::Error::other(source.to_string()),
        })
    };
    given.map_or_else(made, Ok)
}

/// Creates the migration; none when the caller left before the answer.
///
/// The call is repeated where no answer came: the agent knows it by its request id.
async fn create(
    client: &Client,
    request: CreateMigrationRequest,
    following: Following,
    interrupts: &mut Interrupts,
    progress: &mut Progress,
) -> Result<Option<Migration>, Failure> {
    let creation = persist(following.patience, || client.create(request.clone()));
    tokio::pin!(creation);
    let mut asked = false;
    loop {
        tokio::select! {
            created = &mut creation => {
                if asked {
                    interrupts.put_back();
                }
                return created.map(Some);
            }
            () = interrupts.next() => {
                if asked {
                    return Ok(None);
                }
                asked = true;
                progress.note("cancelling once the migration is created; Ctrl-C again leaves");
            }
        }
    }
}

fn detached(created: &Migration, output: OutputFormat) -> Result<Exit, Failure> {
    match output {
        OutputFormat::Text => {
            print(&format!(
                "migration {id} is created; `ramferry watch {id}` follows it\n",
                id = created.id
            ))?;
        }
        OutputFormat::Json => print_json(&Summary::new(created))?,
    }
    Ok(Exit::Done)
}

fn may_go_on(id: &MigrationId) -> String {
    format!("migration {id} may go on: `ramferry watch {id}` follows it, `ramferry cancel {id}` ends it")
}
