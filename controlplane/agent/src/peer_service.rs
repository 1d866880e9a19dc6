//! `PeerService`: the calls of a migration's source to this agent, its destination.

use std::sync::Arc;

use ramferry_engine::{DestinationEvent, Failure, Reason};
use ramferry_fabric::windows::WindowId;
use ramferry_fabric::{FabricKind, SessionToken};
use ramferry_mover::DestinationInput;
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use ramferry_proto::v1::exchange_control_response::Answer;
use ramferry_proto::v1::peer_service_server::PeerService;
use ramferry_ram::{BlockIndex, PageRun};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::MigrationRole;
use crate::core::{Agent, EXCHANGE_TIMEOUT, PROTOCOL_VERSION};
use crate::destination::{self, DestinationSession};
use crate::device_stream::MESSAGE_BYTES;
use crate::journal::is_migration_id;
use crate::migrations::{Entry, is_final};
use crate::source::{ORDER_ITEMS, failure_of, settled, windows};
use crate::status::{invalid_argument, shortened, status};

/// Serves `ramferry.v1.PeerService`.
pub(crate) struct Peers {
    pub(crate) agent: Arc<Agent>,
}

type Answers = ReceiverStream<Result<v1::ExchangeControlResponse, Status>>;

#[tonic::async_trait]
impl PeerService for Peers {
    async fn get_peer_info(
        &self,
        _: Request<v1::GetPeerInfoRequest>,
    ) -> Result<Response<v1::GetPeerInfoResponse>, Status> {
        let agent = Arc::clone(&self.agent);
        // Asks the RDMA devices, which blocks.
        let verbs = tokio::task::spawn_blocking(move || agent.fabrics.verbs_address()).await;
        let verbs = verbs.map_err(|error| crate::status::internal("INTERNAL", &error))?;
        let (verbs_address, verbs_unavailable) = match verbs {
            Ok(address) => (address, String::new()),
            Err(why) => (String::new(), shortened(why)),
        };
        Ok(Response::new(v1::GetPeerInfoResponse {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_version: PROTOCOL_VERSION,
            boot_id: self.agent.boot_id.clone(),
            tcp_address: self.agent.fabrics.address(FabricKind::Tcp),
            verbs_address,
            verbs_unavailable,
            time: Some(std::time::SystemTime::now().into()),
        }))
    }

    async fn negotiate_session(
        &self,
        request: Request<v1::NegotiateSessionRequest>,
    ) -> Result<Response<v1::NegotiateSessionResponse>, Status> {
        // A source that goes away must not leave half a session behind.
        let (agent, call) = (Arc::clone(&self.agent), request.into_inner());
        let negotiating = tokio::spawn(async move { destination::negotiate(&agent, call).await });
        let response = negotiating.await.map_err(|error| crate::status::internal("INTERNAL", &error))??;
        Ok(Response::new(response))
    }

    type ExchangeControlStream = Answers;

    async fn exchange_control(
        &self,
        request: Request<Streaming<v1::ExchangeControlRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let peer = request.remote_addr().map(|address| address.ip());
        let mut orders = request.into_inner();
        let first = tokio::time::timeout(EXCHANGE_TIMEOUT, orders.message()).await;
        let first =
            first.map_err(|_| invalid_argument("order", "OPEN_MISSING", "no order came: send open first"))?;
        let Some(Order::Open(open)) = first?.and_then(|request| request.order) else {
            return Err(invalid_argument("order", "OPEN_MISSING", "the first order must be open"));
        };
        if !is_migration_id(&open.migration_id) {
            return Err(invalid_argument(
                "migration_id",
                "MIGRATION_ID_INVALID",
                "an id is 1 to 64 of [A-Za-z0-9._-]",
            ));
        }
        let Some(session) = self.agent.session(&open.migration_id) else {
            return Ok(Response::new(self.serve_outcome(open.migration_id, orders)));
        };
        let full = authorize(&session, &open.session_token)?;
        if !full && session.token.is_some() && session.is_connected() {
            let message = "the session has its source connected; only with its token can that be replaced";
            return Err(status(Code::PermissionDenied, "SESSION_TOKEN", message, []));
        }
        session.note_peer(peer);
        let (answers, number) = session.attach();
        session.answer_soon(Answer::Opened(v1::SessionOpened {}));
        session.handle.send(DestinationEvent::PeerBack);
        tokio::spawn(serve(session, number, full, orders));
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

/// Whether the caller has the session's token, and so every right to it. With
/// none it may ask for the outcome; with a wrong one, nothing.
fn authorize(session: &DestinationSession, token: &[u8]) -> Result<bool, Status> {
    if token.is_empty() {
        return Ok(false);
    }
    let given = <[u8; SessionToken::BYTES]>::try_from(token).ok().map(SessionToken::from_bytes);
    match (&session.token, given) {
        (Some(token), Some(given)) if *token == given => Ok(true),
        // After a restart only its digest is known.
        (None, Some(given)) => Ok(session.token_digest.as_ref() == Some(&destination::token_digest(&given))),
        _ => Err(status(Code::PermissionDenied, "SESSION_TOKEN", "the session's token is another", [])),
    }
}

impl Peers {
    /// Answers for a migration that has no driver: it ended, or never was.
    fn serve_outcome(&self, id: String, mut orders: Streaming<v1::ExchangeControlRequest>) -> Answers {
        let (sender, answers) = mpsc::channel(4);
        let agent = Arc::clone(&self.agent);
        tokio::spawn(async move {
            let respond = async |answer| {
                sender.send(Ok(v1::ExchangeControlResponse { answer: Some(answer) })).await.is_ok()
            };
            respond(Answer::Opened(v1::SessionOpened {})).await;
            // A source that comes for a session that was given up asks nothing: it waits for presence.
            let ended = agent.registry.get(MigrationRole::Destination, &id);
            let mut told = match ended.and_then(|entry| destination::outcome(&entry)) {
                Some(answer @ Answer::Aborted(_)) => respond(answer).await,
                _ => false,
            };
            loop {
                let order = match orders.message().await {
                    Ok(Some(request)) => request.order,
                    // The source closed; it does so when it has heard the final answer.
                    Ok(None) if told => break,
                    Ok(None) | Err(_) => return,
                };
                if !matches!(order, Some(Order::AskOutcome(_) | Order::Commit(_) | Order::Abort(_))) {
                    continue;
                }
                let known = agent.registry.get(MigrationRole::Destination, &id);
                let answer = match &known {
                    Some(entry) => destination::outcome(entry).ok_or_else(destination::undecided),
                    None => destination::abort_unknown(&agent, &id).await,
                };
                match answer {
                    Ok(answer) => told = respond(answer).await,
                    Err(status) => return drop(sender.send(Err(status)).await),
                }
            }
            if let Some(entry) = agent.registry.get(MigrationRole::Destination, &id) {
                entry.settle();
            }
        });
        ReceiverStream::new(answers)
    }
}

/// Hands the source's orders to the driver until the stream ends.
async fn serve(
    session: Arc<DestinationSession>,
    number: u64,
    full: bool,
    mut orders: Streaming<v1::ExchangeControlRequest>,
) {
    let outstayed = outstay(Arc::clone(&session.entry));
    tokio::pin!(outstayed);
    loop {
        let message = tokio::select! {
            message = orders.message() => message,
            // This task keeps the session, and so the guest's QMP socket.
            () = &mut outstayed => break,
        };
        let order = match message {
            Ok(Some(request)) => request.order,
            Ok(None) => {
                // The source closed; it does so when it has heard the final answer.
                if session.has_told(number) {
                    session.entry.settle();
                }
                break;
            }
            Err(status) => {
                tracing::info!(id = session.entry.id, error = status.message(), "the control stream ended");
                break;
            }
        };
        let allowed = full || matches!(order, Some(Order::AskOutcome(_) | Order::Abort(_)));
        match order {
            Some(order) if allowed => {
                // An order that waits for room must not keep the end of its source from being
                // seen, nor that of its migration.
                tokio::select! {
                    () = take(&session, order) => {}
                    () = session.unheard(number) => break,
                    () = &mut outstayed => break,
                }
            }
            Some(_) => {
                tracing::warn!(id = session.entry.id, "an order without the session's token was refused");
            }
            None => {}
        }
    }
    session.detach(number);
}

/// Resolves when a migration has ended and its source has had time to close the stream.
async fn outstay(entry: Arc<Entry>) {
    // Fails only when the entry is gone, and this holds it.
    let _ = entry.subscribe().wait_for(|view| is_final(view.state())).await;
    tokio::time::sleep(EXCHANGE_TIMEOUT).await;
}

/// The source breaks the protocol: its migration ends.
fn breach(session: &DestinationSession, what: &str) {
    let message = format!("the source's order was refused: {what}; are both agents of one version?");
    session.handle.send(DestinationEvent::Failed(Failure::new(Reason::PeerRefused, message)));
}

/// How many windows or runs of pages an order is about.
fn items(order: &Order) -> usize {
    match order {
        Order::RegisterWindows(order) => order.windows.len(),
        Order::ReleaseWindows(order) => order.ids.len(),
        Order::ZeroPages(order) => order.runs.len() / 2,
        Order::WindowsRegistered(answer) => answer.windows.len(),
        Order::WindowsReleased(answer) => answer.ids.len(),
        Order::OwedPages(order) => order.pages.iter().map(|runs| runs.runs.len() / 2).sum(),
        _ => 1,
    }
}

async fn take(session: &Arc<DestinationSession>, order: Order) {
    let items = items(&order);
    if items > ORDER_ITEMS {
        return breach(session, "it is about more windows or pages than one order may be");
    }
    match order {
        // The driver has ended, or is about to, and would not answer.
        Order::Commit(_) | Order::AskOutcome(_) | Order::Abort(_) | Order::MemoryLost(_)
            if session.entry.has_ended() =>
        {
            if let Some(answer) = destination::outcome(&session.entry) {
                session.answer(answer).await;
            }
        }
        Order::DeviceState(state) => {
            if state.data.len() > MESSAGE_BYTES {
                return breach(session, "it sent device state in messages that are too long");
            }
            // The VMM reads guest RAM while it loads, and zero pages may still wait for the driver.
            session.orders_carried_out().await;
            // Without a VMM that reads there is nobody to give it to.
            let _ = session.device_state.send(state).await;
        }
        Order::ServeReads(offer) => session.take_offer(offer),
        Order::WindowsRegistered(answer) => {
            session.settle_windows(|driver| driver.windows_registered(settled(answer.windows))).await;
        }
        Order::WindowsReleased(answer) => {
            let ids: Vec<WindowId> = answer.ids.into_iter().map(WindowId).collect();
            session.settle_windows(move |driver| driver.windows_released(&ids)).await;
        }
        Order::PrepareIncoming(v1::PrepareIncoming { postcopy: true }) => {
            let event = match session.prepare_reads().await {
                Ok(()) => DestinationEvent::PrepareIncoming { postcopy: true },
                Err(failure) => DestinationEvent::Failed(failure),
            };
            session.order(event, 1).await;
        }
        Order::OwedPages(part) => match session.take_owed(&part) {
            Ok(Some(pages)) => session.order(DestinationEvent::Owed { pages }, 1).await,
            Ok(None) => {}
            Err(what) => breach(session, &what),
        },
        order => match input(order) {
            Ok(Some(input)) => session.order(input, items).await,
            Ok(None) => {}
            Err(what) => breach(session, what),
        },
    }
}

/// What the driver is told of an order; `None` for what is not the driver's.
pub(crate) fn input(order: Order) -> Result<Option<DestinationInput>, &'static str> {
    Ok(Some(match order {
        // A second one says nothing new.
        Order::Open(_)
        | Order::DeviceState(_)
        | Order::ServeReads(_)
        | Order::OwedPages(_)
        | Order::WindowsRegistered(_)
        | Order::WindowsReleased(_) => return Ok(None),
        Order::MemoryLost(order) => {
            let failure = Failure::new(Reason::MemoryLost, shortened(order.message));
            DestinationEvent::MemoryLost(failure).into()
        }
        Order::RegisterWindows(order) => DestinationInput::RegisterWindows(windows(order)),
        Order::ReleaseWindows(order) => {
            DestinationInput::ReleaseWindows(order.ids.into_iter().map(WindowId).collect())
        }
        Order::ZeroPages(order) if !order.runs.len().is_multiple_of(2) => {
            return Err("it sent half a run of pages");
        }
        Order::ZeroPages(order) => {
            let runs = order.runs.chunks_exact(2).map(|pair| PageRun { first: pair[0], count: pair[1] });
            DestinationInput::ZeroPages { block: BlockIndex(order.block), runs: runs.collect() }
        }
        Order::EndRound(order) => DestinationEvent::EndRound { round: order.round }.into(),
        Order::PrepareIncoming(order) => {
            DestinationEvent::PrepareIncoming { postcopy: order.postcopy }.into()
        }
        Order::Verify(_) => DestinationEvent::Verify.into(),
        Order::Commit(_) => DestinationEvent::Commit.into(),
        Order::AskOutcome(_) => DestinationEvent::AskOutcome.into(),
        Order::Abort(order) => DestinationEvent::Abort(failure_of(&order.reason, order.message)).into(),
    }))
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::process::{Child, Command};
    use std::time::Duration;

    use super::*;
    use crate::core::tests::agent;
    use crate::journal::{Created, Recovered, SpecRecord};

    /// A process that ends with the test.
    struct Vmm(Child);

    impl Drop for Vmm {
        fn drop(&mut self) {
            // It fails when the process has ended by itself.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn order_that_waits_ends_with_its_migration() {
        let directory = tempfile::tempdir().unwrap();
        let agent = agent(directory.path());
        // While it lives its guest has to be discarded, and cannot be reached: the migration does not end.
        let vmm = Vmm(Command::new("sleep").arg("600").spawn().unwrap());
        let created = Created {
            id: "a".into(),
            request_id: String::new(),
            role: MigrationRole::Destination,
            spec: SpecRecord::default(),
            guest_pid: vmm.0.id(),
            created_unix_ms: 0,
            guest_was_running: true,
            session: None,
        };
        let log = agent.journal.create(MigrationRole::Destination, "a", &created).unwrap();
        destination::recover(&agent, Recovered { created, records: Vec::new(), log });
        let session = agent.session("a").unwrap();
        let state = || Order::DeviceState(v1::DeviceState { data: b"state"[..].into(), end: false });
        // No VMM reads it.
        while session.device_state.capacity() > 0 {
            take(&session, state()).await;
        }
        let mut waiting = pin!(take(&session, state()));
        assert!(tokio::time::timeout(Duration::ZERO, waiting.as_mut()).await.is_err(), "there is no room");
        drop(vmm);
        tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("it ends with the migration");
        let late = tokio::spawn(std::future::pending::<()>());
        session.keep(late.abort_handle());
        let late = tokio::time::timeout(Duration::from_secs(30), late).await;
        assert!(late.expect("nor does what begins later outlast it").unwrap_err().is_cancelled());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn migration_that_never_ran_is_aborted_for_good_and_counted_apart() {
        let directory = tempfile::tempdir().unwrap();
        let first = agent(directory.path());
        for _ in 0..2 {
            let answer = destination::abort_unknown(&first, "a").await.unwrap();
            assert!(matches!(answer, Answer::Aborted(_)), "{answer:?}");
        }
        drop(first);
        let restarted = agent(directory.path());
        let entry = restarted.registry.get(MigrationRole::Destination, "a").unwrap();
        assert!(entry.never_ran && matches!(destination::outcome(&entry), Some(Answer::Aborted(_))));
    }

    #[test]
    fn zero_pages_with_half_a_run_are_refused() {
        let order = |runs: &[u64]| Order::ZeroPages(v1::PageRuns { block: 1, runs: runs.to_vec() });
        let Ok(Some(DestinationInput::ZeroPages { runs, .. })) = input(order(&[3, 4])) else {
            panic!("a run")
        };
        assert_eq!(runs, [PageRun { first: 3, count: 4 }]);
        assert!(input(order(&[3, 4, 5])).is_err());
    }
}
