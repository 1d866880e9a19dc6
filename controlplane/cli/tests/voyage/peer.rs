//! A peer in the test's own hands: between two agents, or in the place of a source.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use ramferry_proto::v1::exchange_control_response::Answer;
use ramferry_proto::v1::peer_service_client::PeerServiceClient;
use ramferry_proto::v1::peer_service_server::{PeerService, PeerServiceServer};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status, Streaming};

use crate::harness::{Agent, PATIENCE, Pair, parameters};

/// Where the orders of a control stream are put.
type Requests = mpsc::Sender<v1::ExchangeControlRequest>;

/// What went through a [`Proxy`].
#[derive(Default)]
pub(crate) struct Heard {
    pub(crate) negotiations: Vec<v1::NegotiateSessionRequest>,
    pub(crate) tokens: Vec<Vec<u8>>,
    pub(crate) keys: Vec<u64>,
}

/// Changes a destination's answer on its way.
pub(crate) type Twist = fn(&mut v1::NegotiateSessionResponse);

/// A destination's agent to a source, and a source to a destination's agent.
#[derive(Clone)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    destination: SocketAddr,
    heard: Arc<Mutex<Heard>>,
    twist: Arc<Mutex<Option<Twist>>>,
}

impl Proxy {
    /// Serves until the test's runtime ends.
    pub(crate) async fn start(destination: &Agent) -> Proxy {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy {
            address: listener.local_addr().unwrap(),
            destination: destination.grpc,
            heard: Arc::default(),
            twist: Arc::default(),
        };
        let service = PeerServiceServer::new(proxy.clone());
        tokio::spawn(
            Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener)),
        );
        proxy
    }

    pub(crate) fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap()
    }

    pub(crate) fn twist(&self, twist: Twist) {
        *self.twist.lock().unwrap() = Some(twist);
    }

    async fn client(&self) -> PeerServiceClient<Channel> {
        peers(self.destination).await
    }
}

async fn peers(address: SocketAddr) -> PeerServiceClient<Channel> {
    PeerServiceClient::connect(format!("http://{address}")).await.unwrap()
}

#[tonic::async_trait]
impl PeerService for Proxy {
    async fn get_peer_info(
        &self,
        request: Request<v1::GetPeerInfoRequest>,
    ) -> Result<Response<v1::GetPeerInfoResponse>, Status> {
        self.client().await.get_peer_info(request.into_inner()).await
    }

    async fn negotiate_session(
        &self,
        request: Request<v1::NegotiateSessionRequest>,
    ) -> Result<Response<v1::NegotiateSessionResponse>, Status> {
        let request = request.into_inner();
        self.heard().negotiations.push(request.clone());
        let mut response = self.client().await.negotiate_session(request).await?.into_inner();
        self.heard().tokens.push(response.session_token.clone());
        if let Some(twist) = *self.twist.lock().unwrap() {
            twist(&mut response);
        }
        Ok(Response::new(response))
    }

    type ExchangeControlStream = ReceiverStream<Result<v1::ExchangeControlResponse, Status>>;

    async fn exchange_control(
        &self,
        request: Request<Streaming<v1::ExchangeControlRequest>>,
    ) -> Result<Response<Self::ExchangeControlStream>, Status> {
        let orders = request.into_inner().map_while(Result::ok);
        let mut answers = self.client().await.exchange_control(orders).await?.into_inner();
        let (sender, passed_on) = mpsc::channel(64);
        let heard = Arc::clone(&self.heard);
        tokio::spawn(async move {
            while let Ok(Some(answer)) = answers.message().await {
                if let Some(Answer::WindowsRegistered(registered)) = &answer.answer {
                    let keys = registered.windows.iter().map(|window| window.remote_key);
                    heard.lock().unwrap().keys.extend(keys.filter(|key| *key != 0));
                }
                if sender.send(Ok(answer)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(passed_on)))
    }
}

/// What the source's agent of `pair` would ask the destination's for these guests.
pub(crate) async fn negotiation(
    pair: &Pair,
    source: &Path,
    destination: &Path,
) -> v1::NegotiateSessionRequest {
    let proxy = Proxy::start(&pair.destination).await;
    let mut spec = pair.spec(source, destination, parameters(v1::FabricKind::Tcp));
    spec.destination_agent = proxy.address.to_string();
    let request = v1::CheckMigrationRequest { spec: Some(spec) };
    pair.source.client().await.check_migration(request).await.unwrap();
    let mut request = proxy.heard().negotiations.pop().unwrap();
    request.validate_only = false;
    request
}

/// A session at a destination's agent whose source is the test.
pub(crate) struct Session {
    pub(crate) token: Vec<u8>,
    pub(crate) data: SocketAddr,
    orders: Requests,
    answers: Streaming<v1::ExchangeControlResponse>,
}

impl Session {
    /// Negotiates, and opens the control stream with the token.
    pub(crate) async fn open(agent: SocketAddr, request: v1::NegotiateSessionRequest) -> Session {
        let id = request.migration_id.clone();
        let made = peers(agent).await.negotiate_session(request).await.unwrap().into_inner();
        let token = made.session_token;
        let (orders, answers) = open(agent, &id, token.clone()).await.unwrap();
        let data = made.fabric_address.parse().unwrap();
        let mut session = Session { token, data, orders, answers };
        session.hear(|answer| matches!(answer, Answer::Presence(part) if part.last)).await;
        session
    }

    pub(crate) async fn order(&self, order: Order) {
        self.orders.send(v1::ExchangeControlRequest { order: Some(order) }).await.unwrap();
    }

    /// The first answer that `wanted` accepts.
    pub(crate) async fn hear(&mut self, wanted: impl Fn(&Answer) -> bool) -> Answer {
        let hearing = async {
            loop {
                let answer = self.answers.message().await.unwrap().expect("the stream goes on");
                if let Some(answer) = answer.answer.filter(&wanted) {
                    return answer;
                }
            }
        };
        tokio::time::timeout(PATIENCE, hearing).await.expect("it answers in time")
    }

    /// Registers windows of `length` bytes, one behind the other: their keys.
    pub(crate) async fn register(&mut self, ids: std::ops::Range<u64>, length: u64) -> Vec<u64> {
        let windows: Vec<_> =
            ids.map(|id| v1::Window { id, block: 0, offset: id * length, length }).collect();
        let mut missing = windows.len();
        let mut keys = vec![0; missing];
        let first = windows[0].id;
        self.order(Order::RegisterWindows(v1::RegisterWindows { windows })).await;
        while missing > 0 {
            let answer = self.hear(|answer| matches!(answer, Answer::WindowsRegistered(_))).await;
            let Answer::WindowsRegistered(registered) = answer else { unreachable!() };
            for window in registered.windows {
                assert_eq!(window.error, "");
                keys[(window.id - first) as usize] = window.remote_key;
                missing -= 1;
            }
        }
        keys
    }

    /// The source gives up.
    pub(crate) async fn abort(&mut self, message: &str) {
        self.order(Order::Abort(v1::AbortSession { reason: "CANCELLED".into(), message: message.into() }))
            .await;
        self.hear(|answer| matches!(answer, Answer::Aborted(_))).await;
    }

    /// A link with this session's token; the verdict where it is not welcome.
    pub(crate) fn link(&self) -> Result<DataLink, u8> {
        DataLink::open(self.data, &self.token)
    }
}

/// Opens a control stream.
pub(crate) async fn open(
    agent: SocketAddr,
    id: &str,
    token: Vec<u8>,
) -> Result<(Requests, Streaming<v1::ExchangeControlResponse>), Status> {
    let (orders, queue) = mpsc::channel(64);
    let open = v1::OpenSession { migration_id: id.into(), session_token: token };
    orders.send(v1::ExchangeControlRequest { order: Some(Order::Open(open)) }).await.unwrap();
    let answers = peers(agent).await.exchange_control(ReceiverStream::new(queue)).await?;
    Ok((orders, answers.into_inner()))
}

/// Negotiates, and returns the refusal.
pub(crate) async fn refusal(agent: &Agent, request: v1::NegotiateSessionRequest) -> Status {
    peers(agent.grpc).await.negotiate_session(request).await.expect_err("it is refused")
}

/// A link of the tcp fabric, spoken by hand.
#[derive(Debug)]
pub(crate) struct DataLink(TcpStream);

impl DataLink {
    pub(crate) fn open(address: SocketAddr, token: &[u8]) -> Result<DataLink, u8> {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut hello = b"ramferry\x01\0\x03\0\0\0\0\0".to_vec();
        hello.extend_from_slice(token);
        stream.write_all(&hello).unwrap();
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).unwrap();
        if reply[10] == 0 { Ok(DataLink(stream)) } else { Err(reply[10]) }
    }

    /// Writes a page, then fences: `Ok` when it was placed, the cause of the refusal otherwise.
    pub(crate) fn write_page(&mut self, key: u64, offset: u64) -> Result<(), u16> {
        let mut frames = vec![1, 0, 0, 0];
        frames.extend_from_slice(&4096_u32.to_le_bytes());
        for field in [1, key, offset] {
            frames.extend_from_slice(&field.to_le_bytes());
        }
        frames.extend_from_slice(&[0x77; 4096]);
        frames.extend_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0]);
        for field in [2_u64, 0, 0] {
            frames.extend_from_slice(&field.to_le_bytes());
        }
        self.0.write_all(&frames).unwrap();
        let mut answer = [0; 32];
        self.0.read_exact(&mut answer).unwrap();
        match answer[0] {
            0x82 => Ok(()),
            0x83 => Err(u16::from_le_bytes([answer[2], answer[3]])),
            other => panic!("unknown answer {other:#x}"),
        }
    }
}
