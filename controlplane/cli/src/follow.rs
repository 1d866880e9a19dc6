//! Following a migration to its end, through restarts of its agent.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

use ramferry_proto::v1::Migration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::names::MigrationId;
use crate::backoff::Backoff;
use crate::client::Client;
use crate::exit::Exit;
use crate::failure::Failure;

/// A stream that says nothing for this long, or for ten intervals, is taken for broken.
const SILENCE: Duration = Duration::from_secs(30);
/// Updates on their way from the agent to the terminal.
const EVENTS: usize = 16;

/// What Ctrl-C means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnInterrupt {
    /// The first asks the agent to cancel, the second leaves.
    Cancel,
    /// The first leaves.
    Leave,
}

/// How following ended.
#[derive(Debug)]
pub(crate) enum Followed {
    /// The migration has ended.
    Ended(Box<Migration>, Exit),
    /// The caller left; the migration goes on. With the last update.
    Left(Option<Box<Migration>>),
}

/// Ctrl-C, from the moment this is made: it no longer ends the process by itself.
#[derive(Debug)]
pub(crate) struct Interrupts {
    signal: Signal,
    is_put_back: bool,
}

impl Interrupts {
    /// Takes over Ctrl-C.
    pub(crate) fn new() -> Result<Self, Failure> {
        let signal = signal(SignalKind::interrupt())
            .map_err(|source| Failure::System { what: "cannot listen for Ctrl-C", source })?;
        Ok(Self { signal, is_put_back: false })
    }

    /// The next Ctrl-C.
    pub(crate) async fn next(&mut self) {
        if std::mem::take(&mut self.is_put_back) {
            return;
        }
        if self.signal.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }

    /// Leaves a Ctrl-C to whoever asks next.
    pub(crate) fn put_back(&mut self) {
        self.is_put_back = true;
    }
}

/// How a migration is followed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Following {
    /// Between two updates.
    pub(crate) interval: Duration,
    /// How long an agent that went away is waited for.
    pub(crate) patience: Duration,
    pub(crate) on_interrupt: OnInterrupt,
}

/// Who is told what happens meanwhile.
pub(crate) trait Observer {
    /// The migration now.
    fn update(&mut self, migration: &Migration);
    /// Something that is not the migration's own: a lost connection, a refused cancellation.
    fn note(&mut self, text: &str);
}

#[derive(Debug)]
enum Event {
    Update(Box<Migration>),
    Lost(Failure),
    GaveUp(Failure),
}

/// Follows migration `id` to its end.
///
/// An agent that goes away is asked again for `patience`; what it refuses is final.
pub(crate) async fn follow(
    client: &Client,
    id: &MigrationId,
    following: Following,
    interrupts: &mut Interrupts,
    observer: &mut dyn Observer,
) -> Result<Followed, Failure> {
    let (sender, mut events) = mpsc::channel(EVENTS);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(watch(client.clone(), id.clone(), following, sender));
    let mut cancellation: Option<Call<'_>> = None;
    let mut asked = false;
    let mut last = None;
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(Event::Update(migration)) => {
                    observer.update(&migration);
                    if let Some(exit) = Exit::of(&migration) {
                        return Ok(Followed::Ended(migration, exit));
                    }
                    last = Some(migration);
                }
                Some(Event::Lost(failure)) => observer.note(&format!("{failure}; trying again")),
                Some(Event::GaveUp(failure)) => return Err(failure),
                None => return Err(client.stream_ended()),
            },
            () = interrupts.next() => {
                if asked || following.on_interrupt == OnInterrupt::Leave {
                    return Ok(Followed::Left(last));
                }
                asked = true;
                observer.note("cancelling; Ctrl-C again leaves the migration to the agent");
                cancellation = Some(Box::pin(persist(following.patience, || client.cancel(id))));
            }
            answer = settled(&mut cancellation) => {
                cancellation = None;
                if let Err(failure) = answer {
                    observer.note(&format!("not cancelled: {failure}"));
                }
            }
        }
    }
}

/// Repeats an idempotent call that no answer came to, for `patience`.
pub(crate) async fn persist<T, F, R>(patience: Duration, mut call: F) -> Result<T, Failure>
where
    F: FnMut() -> R,
    R: Future<Output = Result<T, Failure>>,
{
    let began = Instant::now();
    let mut backoff = Backoff::new(patience);
    loop {
        let failure = match call().await {
            Err(failure) if failure.is_unanswered() => failure,
            settled => return settled,
        };
        let Some(delay) = backoff.delay(began.elapsed()) else { return Err(failure) };
        tokio::time::sleep(delay).await;
    }
}

type Call<'a> = Pin<Box<dyn Future<Output = Result<Migration, Failure>> + Send + 'a>>;

/// The answer of a call under way; for ever pending without one.
async fn settled(call: &mut Option<Call<'_>>) -> Result<Migration, Failure> {
    match call {
        Some(call) => call.await,
        None => std::future::pending().await,
    }
}

async fn watch(client: Client, id: MigrationId, following: Following, events: mpsc::Sender<Event>) {
    let mut backoff = Backoff::new(following.patience);
    // Since when there was no update; none while there are updates.
    let mut away: Option<Instant> = None;
    loop {
        let failure = match watch_once(&client, &id, following.interval, &events, &mut away).await {
            Ok(()) => return,
            Err(failure) => failure,
        };
        let is_news = away.is_none();
        if is_news {
            backoff.reset();
        }
        let since = *away.get_or_insert_with(Instant::now);
        let delay = if failure.is_passing() { backoff.delay(since.elapsed()) } else { None };
        // Sending fails where whoever followed has left: then nobody is to be told.
        let Some(delay) = delay else {
            let _ = events.send(Event::GaveUp(failure)).await;
            return;
        };
        if is_news && events.send(Event::Lost(failure)).await.is_err() {
            return;
        }
        tokio::time::sleep(delay).await;
    }
}

/// One stream: `Ok` when the migration has ended, or nobody listens any more.
async fn watch_once(
    client: &Client,
    id: &MigrationId,
    interval: Duration,
    events: &mpsc::Sender<Event>,
    away: &mut Option<Instant>,
) -> Result<(), Failure> {
    let silence = SILENCE.max(interval * 10);
    let mut stream = client.watch(id, interval).await?;
    loop {
        let answer = tokio::time::timeout(silence, stream.message())
            .await
            .map_err(|_| client.silent(silence))?
            .map_err(|status| client.failure(status))?
            .ok_or_else(|| client.stream_ended())?;
        *away = None;
        let migration = answer.migration.ok_or(Failure::Incomplete("migration"))?;
        let ended = Exit::of(&migration).is_some();
        if events.send(Event::Update(Box::new(migration))).await.is_err() || ended {
            return Ok(());
        }
    }
}
