//! The source's connection to the destination's agent.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ramferry_engine::{Failure, Reason, SourceEvent};
use ramferry_fabric::windows::{Window, WindowId};
use ramferry_fabric::{RegionKey, SessionToken};
use ramferry_mover::{PeerOrder, Place, SourceHandle, SourceInput};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use ramferry_proto::v1::exchange_control_response::Answer;
use ramferry_proto::v1::peer_service_client::PeerServiceClient;
use ramferry_ram::{BlockIndex, BlockRange, Digest, Layout, PageRun, PageSets};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::config::TlsConfig;
use crate::core::EXCHANGE_TIMEOUT;
use crate::device_stream::{Incoming, MESSAGE_BYTES};
use crate::status::shortened;

/// Orders that wait for the network.
const ORDERS: usize = 1024;
/// Orders of the destination that wait or are being carried out, by windows.
const PLACES: usize = 1 << 20;
/// Most windows, or runs of pages, that one order carries: less than 1 MiB of them.
pub(crate) const ORDER_ITEMS: usize = 16 * 1024;
/// After so long a silence the peer is asked whether it is there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// A peer that does not answer that for so long is lost. The guest may be paused
/// meanwhile; but a busy host is not to be taken for a dead one.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// A channel to the agent at `address`. Connects when it is first used.
pub(crate) fn channel(address: &str, tls: Option<&TlsConfig>) -> Result<Channel, Status> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let unusable = |error: &dyn std::error::Error| {
        let message =
            format!("destination_agent {address:?} is not usable: {}", crate::status::causes(error));
        crate::status::invalid_argument("spec.destination_agent", "ADDRESS_INVALID", message)
    };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
        .map_err(|error| unusable(&error))?
        .connect_timeout(EXCHANGE_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    if let Some(tls) = tls {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let config = crate::auth::client_tls(tls, host).map_err(|error| unusable(&error))?;
        endpoint = endpoint.tls_config(config).map_err(|error| unusable(&error))?;
    }
    Ok(endpoint.connect_lazy())
}

/// What the destination has said so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    pub(crate) opened: bool,
    /// The control stream ended after it was opened.
    lost: bool,
    pub(crate) incoming_ready: bool,
    pub(crate) device_state_loaded: bool,
    pub(crate) aborted: bool,
    pub(crate) presence: Option<Arc<PageSets>>,
    /// What the destination's part of the commit took.
    pub(crate) running: Option<v1::DestinationRunning>,
}

/// The destination's agent, for one migration.
pub(crate) struct Peer {
    client: Result<PeerServiceClient<Channel>, Status>,
    id: String,
    token: Bytes,
    orders: Mutex<Option<mpsc::Sender<v1::ExchangeControlRequest>>>,
    opening: tokio::sync::Mutex<()>,
    said: watch::Sender<Said>,
    layout: Option<Layout>,
    handle: SourceHandle,
    device_state: Incoming,
    /// For what a destination orders in post-copy, by the windows that it is about.
    places: Arc<Semaphore>,
}

/// What [`Peer::new`] needs.
pub(crate) struct PeerSetup {
    pub(crate) channel: Result<Channel, Status>,
    pub(crate) id: String,
    /// Empty: only the outcome can be asked.
    pub(crate) token: Bytes,
    /// Of the source's guest; `None` where only the outcome can be asked.
    pub(crate) layout: Option<Layout>,
    pub(crate) fabric: &'static str,
    pub(crate) mode: &'static str,
}

impl Peer {
    pub(crate) fn new(setup: PeerSetup, handle: SourceHandle, device_state: Incoming) -> Arc<Self> {
        Arc::new(Self {
            client: setup.channel.map(PeerServiceClient::new),
            id: setup.id,
            token: setup.token,
            orders: Mutex::new(None),
            opening: tokio::sync::Mutex::default(),
            said: watch::Sender::default(),
            layout: setup.layout,
            handle,
            device_state,
            places: Arc::new(Semaphore::new(PLACES)),
        })
    }

    /// Opens the control stream, unless it is open.
    pub(crate) async fn open(self: &Arc<Self>) -> Result<(), Status> {
        let _opening = self.opening.lock().await;
        if self.sender().is_some_and(|orders| !orders.is_closed()) {
            return Ok(());
        }
        self.said.send_modify(|said| (said.opened, said.lost) = (false, false));
        let (orders, queue) = mpsc::channel(ORDERS);
        let open = v1::OpenSession { migration_id: self.id.clone(), session_token: self.token.to_vec() };
        let open = v1::ExchangeControlRequest { order: Some(Order::Open(open)) };
        orders.try_send(open).expect("a new queue has room");
        let mut client = self.client.clone()?;
        let calling = client.exchange_control(ReceiverStream::new(queue));
        let late = |_| Status::deadline_exceeded("the destination's agent did not open the control stream");
        let answers = tokio::time::timeout(EXCHANGE_TIMEOUT, calling).await.map_err(late)??.into_inner();
        tokio::spawn(Arc::clone(self).read(answers, orders.downgrade()));
        *self.orders.lock().expect("no panic while it is held") = Some(orders);
        let opened = self.wait(|said| said.opened);
        tokio::time::timeout(EXCHANGE_TIMEOUT, opened).await.map_err(late)?
    }

    /// Sends an order from a thread that may block; `false` when the stream is lost.
    pub(crate) fn send_blocking(&self, order: Order) -> bool {
        let request = v1::ExchangeControlRequest { order: Some(order) };
        self.sender().is_some_and(|orders| orders.blocking_send(request).is_ok())
    }

    /// Sends an order; `false` when the stream is lost.
    pub(crate) async fn send(&self, order: Order) -> bool {
        let request = v1::ExchangeControlRequest { order: Some(order) };
        match self.sender() {
            Some(orders) => orders.send(request).await.is_ok(),
            None => false,
        }
    }

    /// Waits for the destination to have said something; fails when the stream ends first.
    pub(crate) async fn wait(&self, what: impl Fn(&Said) -> bool) -> Result<(), Status> {
        let lost = || Status::unavailable("the control stream to the destination's agent was lost");
        let mut said = self.said.subscribe();
        let said = said.wait_for(|said| said.lost || what(said)).await.map_err(|_| lost())?;
        if what(&said) { Ok(()) } else { Err(lost()) }
    }

    pub(crate) fn said(&self) -> Said {
        self.said.borrow().clone()
    }

    /// The session's, if it is known.
    pub(super) fn token(&self) -> Option<SessionToken> {
        <[u8; SessionToken::BYTES]>::try_from(&*self.token).ok().map(SessionToken::from_bytes)
    }

    /// Room for an order about so many windows.
    async fn place(&self, windows: usize) -> Result<Place, String> {
        if windows > ORDER_ITEMS {
            return Err("the destination's order is about more windows than one may be".into());
        }
        let permits = u32::try_from(windows.max(1)).expect("ORDER_ITEMS fits");
        let place = Arc::clone(&self.places).acquire_many_owned(permits).await;
        place.map(|place| Arc::new(place) as Place).map_err(|_| "the migration has ended".into())
    }

    /// Ends the control stream.
    pub(crate) fn close(&self) {
        self.places.close();
        self.orders.lock().expect("no panic while it is held").take();
    }

    fn sender(&self) -> Option<mpsc::Sender<v1::ExchangeControlRequest>> {
        self.orders.lock().expect("no panic while it is held").clone()
    }

    async fn read(
        self: Arc<Self>,
        mut answers: tonic::Streaming<v1::ExchangeControlResponse>,
        orders: mpsc::WeakSender<v1::ExchangeControlRequest>,
    ) {
        let mut presence = self.layout.as_ref().map(PageSets::new);
        loop {
            let answer = match answers.message().await {
                Ok(Some(response)) => response.answer,
                Ok(None) => break,
                Err(status) => {
                    tracing::info!(error = status.message(), "the control stream ended");
                    break;
                }
            };
            let Some(answer) = answer else {
                continue;
            };
            if let Err(message) = self.take(answer, &mut presence).await {
                let failure = Failure::new(Reason::PeerRefused, message);
                self.handle.send(SourceEvent::Failed(failure));
                break;
            }
        }
        drop(answers);
        {
            // Only its own orders: a newer stream may have taken their place.
            let mut current = self.orders.lock().expect("no panic while it is held");
            let ours = orders.upgrade();
            if ours.zip(current.as_ref()).is_some_and(|(ours, others)| ours.same_channel(others)) {
                *current = None;
            }
        }
        self.said.send_modify(|said| said.lost = true);
        self.handle.send(SourceEvent::PeerLost);
    }

    async fn take(&self, answer: Answer, presence: &mut Option<PageSets>) -> Result<(), String> {
        match answer {
            Answer::Opened(_) => self.said.send_modify(|said| said.opened = true),
            Answer::Presence(part) => {
                if let Some(presence) = take_presence(&part, presence)? {
                    self.said.send_modify(|said| said.presence = Some(Arc::new(presence)));
                }
            }
            Answer::IncomingReady(_) => self.said.send_modify(|said| said.incoming_ready = true),
            Answer::DeviceState(state) => {
                if state.data.len() > MESSAGE_BYTES {
                    return Err("the destination sent device state in messages that are too long".into());
                }
                // Without a VMM that reads there is nobody to give it to.
                let _ = self.device_state.send(state).await;
            }
            Answer::DeviceStateLoaded(_) => self.said.send_modify(|said| said.device_state_loaded = true),
            Answer::RegisterWindows(order) => {
                let place = self.place(order.windows.len()).await?;
                self.handle.send(SourceInput::RegisterWindows(windows(order), place));
            }
            Answer::ReleaseWindows(order) => {
                let place = self.place(order.ids.len()).await?;
                let ids = order.ids.into_iter().map(WindowId).collect();
                self.handle.send(SourceInput::ReleaseWindows(ids, place));
            }
            answer => {
                match &answer {
                    // What came with the resume; later ones have no news of it.
                    Answer::Running(running) if self.said.borrow().running.is_none() => {
                        self.said.send_modify(|said| said.running = Some(*running));
                    }
                    Answer::Aborted(_) => self.said.send_modify(|said| said.aborted = true),
                    _ => {}
                }
                if let Some(input) = input(answer)? {
                    self.handle.send(input);
                }
            }
        }
        Ok(())
    }
}

/// What the driver is told of an answer; `None` for what is not the driver's.
pub(crate) fn input(answer: Answer) -> Result<Option<SourceInput>, String> {
    Ok(Some(match answer {
        Answer::WindowsRegistered(answer) => SourceInput::WindowsRegistered(settled(answer.windows)),
        Answer::WindowsReleased(answer) => {
            SourceInput::WindowsReleased(answer.ids.into_iter().map(WindowId).collect())
        }
        Answer::RoundEnded(answer) => SourceEvent::RoundEnded { round: answer.round }.into(),
        Answer::Digests(answer) => {
            let digest = |bytes: Vec<u8>| <[u8; 32]>::try_from(bytes).map(Digest::from_bytes);
            let digests: Result<_, _> = answer.blocks.into_iter().map(digest).collect();
            let digests = digests.map_err(|_| "a digest of the destination is not 32 bytes long")?;
            SourceInput::PeerDigests(digests)
        }
        Answer::Running(running) => {
            SourceEvent::DestinationRunning { memory_owed: running.memory_owed }.into()
        }
        Answer::OwedAccepted(_) => SourceEvent::OwedAccepted.into(),
        Answer::StillOwed(answer) => SourceEvent::StillOwed { bytes: answer.bytes }.into(),
        Answer::ReadsLost(answer) => {
            let message = format!("the destination's links are lost: {}", shortened(answer.message));
            SourceEvent::Failed(Failure::new(Reason::LinkLost, message)).into()
        }
        Answer::Lost(answer) => {
            SourceEvent::DestinationLost(Failure::new(Reason::MemoryLost, shortened(answer.message))).into()
        }
        Answer::Aborted(aborted) => {
            SourceEvent::DestinationAborted(failure_of(&aborted.reason, aborted.message)).into()
        }
        Answer::Opened(_)
        | Answer::Presence(_)
        | Answer::IncomingReady(_)
        | Answer::DeviceState(_)
        | Answer::DeviceStateLoaded(_)
        | Answer::RegisterWindows(_)
        | Answer::ReleaseWindows(_) => return Ok(None),
    }))
}

/// The windows of an order.
pub(crate) fn windows(order: v1::RegisterWindows) -> Vec<Window> {
    let window = |window: v1::Window| Window {
        id: WindowId(window.id),
        range: BlockRange { block: BlockIndex(window.block), offset: window.offset, length: window.length },
    };
    order.windows.into_iter().map(window).collect()
}

/// What became of windows at the other side.
pub(crate) fn settled(windows: Vec<v1::RegisteredWindow>) -> Vec<(WindowId, Result<RegionKey, String>)> {
    let settled = windows.into_iter().map(|window| {
        let id = WindowId(window.id);
        if window.error.is_empty() {
            let elapsed = Duration::from_nanos(window.nanoseconds);
            tracing::trace!(id = window.id, ?elapsed, "registered at the other side");
            (id, Ok(RegionKey(window.remote_key)))
        } else {
            (id, Err(shortened(window.error)))
        }
    });
    settled.collect()
}

/// Adds a part of the destination's presence to what came before it; all of it after the last.
pub(crate) fn take_presence(
    part: &v1::DestinationPresence,
    so_far: &mut Option<PageSets>,
) -> Result<Option<PageSets>, String> {
    let pages = so_far.as_mut().ok_or("the destination told of its presence again")?;
    for runs in &part.pages {
        add_runs(pages, runs)?;
    }
    Ok(if part.last { so_far.take() } else { None })
}

/// Ends a session that was negotiated and is not to be used, or its guest and
/// its id would stay taken until the destination gives it up by itself.
pub(super) async fn give_up(channel: Channel, id: &str, token: Bytes, why: &str) {
    let open = v1::OpenSession { migration_id: id.to_owned(), session_token: token.to_vec() };
    let abort = v1::AbortSession {
        reason: Reason::PeerRefused.as_str().into(),
        message: format!("the source's agent does not begin the migration: {why}"),
    };
    let orders = [Order::Open(open), Order::Abort(abort)];
    let orders = orders.map(|order| v1::ExchangeControlRequest { order: Some(order) });
    let told = async {
        let mut client = PeerServiceClient::new(channel);
        let mut answers = client.exchange_control(tokio_stream::iter(orders)).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            if matches!(answer.answer, Some(Answer::Aborted(_))) {
                break;
            }
        }
        Ok::<(), Status>(())
    };
    match tokio::time::timeout(EXCHANGE_TIMEOUT, told).await {
        Ok(Ok(())) => {}
        Ok(Err(status)) => tracing::warn!(id, error = status.message(), "a session was not given up"),
        Err(_) => tracing::warn!(id, "a session was not given up in time"),
    }
}

/// A failure that came from a peer.
pub(crate) fn failure_of(reason: &str, message: String) -> Failure {
    Failure { reason: reason.parse().unwrap_or(Reason::DestinationAborted), message: shortened(message) }
}

/// Adds a peer's runs to `pages`.
pub(crate) fn add_runs(pages: &mut PageSets, runs: &v1::PageRuns) -> Result<(), String> {
    let blocks = pages.iter().count();
    if runs.block as usize >= blocks || !runs.runs.len().is_multiple_of(2) {
        return Err(format!("pages of block {} were named, of {blocks}", runs.block));
    }
    let set = pages.block_mut(BlockIndex(runs.block));
    for pair in runs.runs.chunks_exact(2) {
        let run = PageRun { first: pair[0], count: pair[1] };
        if !set.admits(run) {
            return Err(format!("pages {run:?} of block {} were named: there are none", runs.block));
        }
        set.insert_run(run);
    }
    Ok(())
}

/// An order of the data plane as it goes over the wire, in as many messages as
/// it takes: with pin-all, the windows of a large guest are too many for one.
pub(crate) fn orders(order: &PeerOrder) -> Vec<Order> {
    match order {
        PeerOrder::RegisterWindows(windows) => {
            let window = |window: &Window| v1::Window {
                id: window.id.0,
                block: window.range.block.0,
                offset: window.range.offset,
                length: window.range.length,
            };
            let some = |some: &[Window]| v1::RegisterWindows { windows: some.iter().map(window).collect() };
            windows.chunks(ORDER_ITEMS).map(|windows| Order::RegisterWindows(some(windows))).collect()
        }
        PeerOrder::ReleaseWindows(ids) => {
            let some = |some: &[WindowId]| v1::ReleaseWindows { ids: some.iter().map(|id| id.0).collect() };
            ids.chunks(ORDER_ITEMS).map(|ids| Order::ReleaseWindows(some(ids))).collect()
        }
        PeerOrder::ZeroPages { block, runs } => {
            let some = |some: &[PageRun]| v1::PageRuns {
                block: block.0,
                runs: some.iter().flat_map(|run| [run.first, run.count]).collect(),
            };
            runs.chunks(ORDER_ITEMS).map(|runs| Order::ZeroPages(some(runs))).collect()
        }
    }
}

/// Metadata of a layout as it goes over the wire.
pub(crate) fn blocks(layout: &Layout) -> Vec<v1::MemoryBlock> {
    let block = |block: &ramferry_ram::Block| v1::MemoryBlock {
        name: block.name.clone(),
        guest_address: block.guest_address,
        length_bytes: block.length_bytes,
        page_bytes: block.page_bytes,
    };
    layout.blocks().iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use ramferry_ram::Block;

    use prost::Message as _;

    use super::*;

    /// The encoded length of `order` as a message.
    fn encoded_bytes(order: Order) -> usize {
        v1::ExchangeControlRequest { order: Some(order) }.encoded_len()
    }

    #[test]
    fn orders_for_the_largest_guest_fit_into_messages() {
        const WINDOW_BYTES: u64 = 64 << 20;
        const WINDOWS: u64 = 1 << 20;
        // Ids and places as large as they come.
        let id = |index: u64| WindowId(u64::MAX - index);
        let window = |index: u64| Window {
            id: id(index),
            range: BlockRange {
                block: BlockIndex(1 << 20),
                offset: index * WINDOW_BYTES,
                length: WINDOW_BYTES,
            },
        };
        let windows: Vec<Window> = (0..WINDOWS).map(window).collect();
        let mut ordered = 0;
        for order in orders(&PeerOrder::RegisterWindows(windows.clone())) {
            let Order::RegisterWindows(part) = &order else { panic!("{order:?}") };
            for found in &part.windows {
                let wanted = &windows[ordered];
                assert_eq!((found.id, found.offset), (wanted.id.0, wanted.range.offset));
                ordered += 1;
            }
            assert!(encoded_bytes(order) < crate::server::MESSAGE_LIMIT_BYTES / 4);
        }
        assert_eq!(ordered, windows.len());

        let mut released = 0;
        for order in orders(&PeerOrder::ReleaseWindows((0..WINDOWS).map(id).collect())) {
            let Order::ReleaseWindows(part) = &order else { panic!("{order:?}") };
            released += part.ids.len();
            assert!(encoded_bytes(order) < crate::server::MESSAGE_LIMIT_BYTES / 4);
        }
        assert_eq!(released, windows.len());

        let runs: Vec<PageRun> =
            (0..WINDOWS).map(|n| PageRun { first: (1 << 40) + 2 * n, count: 1 }).collect();
        let mut zeroed = 0;
        for order in orders(&PeerOrder::ZeroPages { block: BlockIndex(0), runs }) {
            let Order::ZeroPages(part) = &order else { panic!("{order:?}") };
            zeroed += part.runs.len() / 2;
            assert!(encoded_bytes(order) < crate::server::MESSAGE_LIMIT_BYTES / 4);
        }
        assert_eq!(zeroed, windows.len());
    }

    #[test]
    fn endless_text_of_a_peer_is_cut_between_characters() {
        let failure = failure_of("NO_SUCH_REASON", "ä".repeat(1 << 20));
        assert_eq!(failure.reason, Reason::DestinationAborted);
        assert!(failure.message.len() < crate::status::TEXT_BYTES + 4);
        assert!(failure.message.ends_with('…'));
        assert_eq!(failure_of("LINK_LOST", "short".into()).message, "short");
    }

    #[test]
    fn runs_of_a_hostile_destination_are_refused() {
        let block = Block { name: "a".into(), guest_address: 0, length_bytes: 40960, page_bytes: 4096 };
        let mut pages = PageSets::new(&Layout::new(vec![block]).unwrap());
        let mut add =
            |block, runs: &[u64]| add_runs(&mut pages, &v1::PageRuns { block, runs: runs.to_vec() });
        add(0, &[0, 2, 9, 1]).unwrap();
        for (block, runs) in
            [(1, &[0, 1][..]), (0, &[0][..]), (0, &[9, 2][..]), (0, &[u64::MAX, 2][..]), (0, &[1, 0][..])]
        {
            assert!(add(block, runs).is_err());
        }
        assert_eq!(pages.count(), 3);
    }
}
