use std::path::Path;

use ramferry_engine::SourceAction;
use ramferry_guest::{Guest, GuestFuture, GuestStatus, Paused, Resumed};
use ramferry_mover::{SourceOutside, SourceSnapshot};

use super::*;

/// What happened, in its order.
type Happened = Arc<Mutex<Vec<&'static str>>>;

/// A guest that notes its resume.
struct Noting(Happened);

type Result<T> = std::result::Result<T, GuestError>;

impl Guest for Noting {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn resume_source(&self) -> GuestFuture<'_, Result<Resumed>> {
        self.0.lock().unwrap().push("resumed");
        Box::pin(std::future::ready(Ok(Resumed::Running)))
    }

    fn lost(&self) -> GuestFuture<'_, GuestError> {
        Box::pin(std::future::pending())
    }

    fn prepare_source(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn vcpu_threads(&self) -> GuestFuture<'_, Result<Vec<u32>>> {
        unreachable!()
    }

    fn drain_io(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn pause_for_switchover<'a>(&'a self, _: &'a Path) -> GuestFuture<'a, Result<Paused>> {
        unreachable!()
    }

    fn move_device_state(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn prepare_destination(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn start_incoming<'a>(&'a self, _: &'a Path) -> GuestFuture<'a, Result<()>> {
        unreachable!()
    }

    fn wait_loaded(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn resume_destination(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn settle_destination(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn stop_destination(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn end_destination(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn discard(&self) -> GuestFuture<'_, Result<()>> {
        unreachable!()
    }

    fn status(&self) -> GuestFuture<'_, Result<GuestStatus>> {
        unreachable!()
    }
}

/// Leaves everything undone.
struct Idle;

impl SourceOutside for Idle {
    fn act(&mut self, _: SourceAction) {}

    fn publish(&mut self, _: &SourceSnapshot) {}
}

/// Notes that what holds it ended.
struct Ends(Happened);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.lock().unwrap().push("ended");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_panic_nothing_is_ordered_of_a_guest_that_was_resumed() {
    let directory = tempfile::tempdir().unwrap();
    let agent = crate::core::tests::agent(directory.path());
    let (handle, _driver) = spawn_source(Source::new(Default::default()).unwrap(), |_| Idle);
    let (queue, incoming) = device_stream::queue();
    let setup = PeerSetup {
        channel: Err(Status::unavailable("there is no peer")),
        id: "a".into(),
        token: Bytes::new(),
        layout: None,
        fabric: "unknown",
        mode: "unknown",
    };
    let happened = Happened::default();
    let throttle = Arc::new(Throttle::new(&agent.config, "a"));
    let session = Session {
        agent,
        entry: Entry::new(String::new(), MigrationRole::Source, v1::Migration::default()),
        peer: Peer::new(setup, handle.clone(), queue),
        handle,
        guest: GuestCell::found(Arc::new(Noting(Arc::clone(&happened)))),
        handed_over: AtomicBool::new(false),
        tasks: Mutex::default(),
        ordering: Mutex::default(),
        incoming: tokio::sync::Mutex::new(incoming),
        device_state_held: watch::Sender::default(),
        plan: Mutex::new(None),
        reads: Mutex::default(),
        reconnecting: tokio::sync::Mutex::default(),
        throttle,
        called: std::time::Instant::now(),
        started: std::time::Instant::now(),
    };
    let ends = Ends(Arc::clone(&happened));
    session.keep_ordering(tokio::spawn(async move {
        let _ends = ends;
        std::future::pending::<()>().await;
    }));
    let entry = Arc::clone(&session.entry);
    tokio::task::spawn_blocking(move || session.driver_panicked()).await.unwrap();
    assert_eq!(*happened.lock().unwrap(), ["ended", "resumed"]);
    assert!(entry.has_ended());
}
