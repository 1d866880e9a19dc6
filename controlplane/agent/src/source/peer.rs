//! The source's connection to the destination's agent.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ramferry_engine::{Failure, Reason, SourceEvent};
use ramferry_fabric::RegionKey;
use ramferry_fabric::windows::WindowId;
use ramferry_mover::{PeerOrder, SourceHandle, SourceInput};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use ramferry_proto::v1::exchange_control_response::Answer;
use ramferry_proto::v1::peer_service_client::PeerServiceClient;
use ramferry_ram::{BlockIndex, Digest, Layout, PageRun, PageSets};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::config::TlsConfig;
use crate::core::EXCHANGE_TIMEOUT;
use crate::device_stream::Incoming;

/// Orders that wait for the network.
const ORDERS: usize = 1024;
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

    /// Ends the control stream.
    pub(crate) fn close(&self) {
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
                let pages = presence.as_mut().ok_or("the destination told of its presence again")?;
                for runs in &part.pages {
                    add_runs(pages, runs)?;
                }
                if part.last {
                    let presence = presence.take().map(Arc::new);
                    self.said.send_modify(|said| said.presence = presence);
                }
            }
            Answer::WindowsRegistered(answer) => self.windows_registered(answer.windows),
            Answer::WindowsReleased(answer) => {
                let ids = answer.ids.into_iter().map(WindowId).collect();
                self.handle.send(SourceInput::WindowsReleased(ids));
            }
            Answer::RoundEnded(answer) => self.handle.send(SourceEvent::RoundEnded { round: answer.round }),
            Answer::IncomingReady(_) => self.said.send_modify(|said| said.incoming_ready = true),
            Answer::DeviceState(state) => {
                // Without a VMM that reads there is nobody to give it to.
                let _ = self.device_state.send(state).await;
            }
            Answer::DeviceStateLoaded(_) => self.said.send_modify(|said| said.device_state_loaded = true),
            Answer::Digests(answer) => {
                let digest = |bytes: Vec<u8>| <[u8; 32]>::try_from(bytes).map(Digest::from_bytes);
                let digests: Result<_, _> = answer.blocks.into_iter().map(digest).collect();
                let digests = digests.map_err(|_| "a digest of the destination is not 32 bytes long")?;
                self.handle.send(SourceInput::PeerDigests(digests));
            }
            Answer::Running(running) => {
                self.said.send_modify(|said| said.running = Some(running));
                self.handle.send(SourceEvent::DestinationRunning);
            }
            Answer::Aborted(aborted) => {
                self.said.send_modify(|said| said.aborted = true);
                self.handle
                    .send(SourceEvent::DestinationAborted(failure_of(&aborted.reason, aborted.message)));
            }
        }
        Ok(())
    }

    fn windows_registered(&self, windows: Vec<v1::RegisteredWindow>) {
        let settled = windows.into_iter().map(|window| {
            let id = WindowId(window.id);
            if window.error.is_empty() {
                let elapsed = Duration::from_nanos(window.nanoseconds);
                tracing::trace!(id = window.id, ?elapsed, "registered at the destination");
                (id, Ok(RegionKey(window.remote_key)))
            } else {
                (id, Err(window.error))
            }
        });
        self.handle.send(SourceInput::WindowsRegistered(settled.collect()));
    }
}

/// A failure that came from a peer.
pub(crate) fn failure_of(reason: &str, message: String) -> Failure {
    Failure { reason: reason.parse().unwrap_or(Reason::DestinationAborted), message }
}

/// Adds a peer's runs to `pages`.
fn add_runs(pages: &mut PageSets, runs: &v1::PageRuns) -> Result<(), String> {
    let blocks = pages.iter().count();
    if runs.block as usize >= blocks || !runs.runs.len().is_multiple_of(2) {
        return Err(format!("the destination named pages of block {}, of {blocks}", runs.block));
    }
    let set = pages.block_mut(BlockIndex(runs.block));
    for pair in runs.runs.chunks_exact(2) {
        let run = PageRun { first: pair[0], count: pair[1] };
        if !set.admits(run) {
            return Err(format!(
                "the destination named pages {run:?} of block {}: there are none",
                runs.block
            ));
        }
        set.insert_run(run);
    }
    Ok(())
}

/// An order of the data plane as it goes over the wire.
pub(crate) fn order(order: PeerOrder) -> Order {
    match order {
        PeerOrder::RegisterWindows(windows) => {
            let windows = windows.into_iter().map(|window| v1::Window {
                id: window.id.0,
                block: window.range.block.0,
                offset: window.range.offset,
                length: window.range.length,
            });
            Order::RegisterWindows(v1::RegisterWindows { windows: windows.collect() })
        }
        PeerOrder::ReleaseWindows(ids) => {
            Order::ReleaseWindows(v1::ReleaseWindows { ids: ids.into_iter().map(|id| id.0).collect() })
        }
        PeerOrder::ZeroPages { block, runs } => {
            let runs = runs.into_iter().flat_map(|run| [run.first, run.count]).collect();
            Order::ZeroPages(v1::PageRuns { block: block.0, runs })
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

    use super::*;

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
