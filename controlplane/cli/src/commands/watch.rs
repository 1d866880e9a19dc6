//! `ramferry watch`

use ramferry_proto::v1::Migration;

use crate::args::connection::OutputFormat;
use crate::args::migration::WatchArgs;
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::follow::{Followed, Following, Interrupts, Observer, OnInterrupt, follow};
use crate::output::summary::Details;
use crate::output::{print, print_json, report};
use crate::progress::Progress;

/// Every update as an object of its own on stdout; notes on stderr.
struct JsonLines {
    progress: Progress,
    result: Result<(), Failure>,
}

impl Observer for JsonLines {
    fn update(&mut self, migration: &Migration) {
        if self.result.is_ok() {
            self.result = print_json(&Details::new(migration));
        }
    }

    fn note(&mut self, text: &str) {
        self.progress.note(text);
    }
}

pub(super) async fn run(args: WatchArgs) -> Result<Exit, Failure> {
    let mut interrupts = Interrupts::new()?;
    let client = Client::connect(&args.connection).await?;
    let mut progress = Progress::new(args.follow.quiet);
    let following = Following {
        interval: args.interval.unwrap_or(progress.interval()),
        patience: args.follow.reconnect_timeout,
        on_interrupt: OnInterrupt::Leave,
    };
    let followed = match args.connection.output {
        OutputFormat::Json => {
            let mut lines = JsonLines { progress, result: Ok(()) };
            let followed = follow(&client, &args.id, following, &mut interrupts, &mut lines).await?;
            lines.result?;
            followed
        }
        OutputFormat::Text => {
            let followed = follow(&client, &args.id, following, &mut interrupts, &mut progress).await;
            progress.finish();
            let followed = followed?;
            if let Followed::Ended(migration, _) = &followed {
                print(&report::ending(migration))?;
            }
            followed
        }
    };
    match followed {
        Followed::Ended(_, exit) => Ok(exit),
        Followed::Left(_) => Ok(Exit::Left),
    }
}
