//! A whole server over loopback, without and with mutual TLS.

use ramferry_proto::v1::node_service_client::NodeServiceClient;
use ramferry_proto::v1::node_service_server::{NodeService, NodeServiceServer};
use ramferry_proto::v1::peer_service_client::PeerServiceClient;
use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType, date_time_ymd};
use tonic::transport::{Channel, Endpoint as Target};
use tonic::{Code, Status, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1 as reflection;

use super::*;
use crate::auth::Caller;
use crate::config::{Options, TlsConfig};
use crate::status::reason_of;

/// Answers with who called.
struct EchoCaller;

#[tonic::async_trait]
impl NodeService for EchoCaller {
    async fn get_node_info(
        &self,
        request: tonic::Request<v1::GetNodeInfoRequest>,
    ) -> Result<tonic::Response<v1::GetNodeInfoResponse>, Status> {
        let caller = request.extensions().get::<Caller>().expect("authorized");
        let hostname = caller.name.clone();
        Ok(tonic::Response::new(v1::GetNodeInfoResponse { hostname, ..Default::default() }))
    }

    async fn run_diagnostics(
        &self,
        _: tonic::Request<v1::RunDiagnosticsRequest>,
    ) -> Result<tonic::Response<v1::RunDiagnosticsResponse>, Status> {
        Err(Status::unimplemented("not in a test"))
    }
}

struct Running {
    bound: Bound,
    metrics: Metrics,
    health: Health,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<Result<(), ServerError>>,
}

impl Running {
    async fn start(options: Options) -> Self {
        Self::start_limited(options, incoming::CONNECTIONS_LIMIT).await
    }

    async fn start_limited(mut options: Options, connections_limit: usize) -> Self {
        options.listen = Some("127.0.0.1:0".into());
        options.metrics_listen = Some("127.0.0.1:0".into());
        options.shutdown_grace = Some("200ms".into());
        let config = Config::check(&options).unwrap();
        let metrics = Metrics::new();
        let mut server = Server::bind(&config, metrics.clone()).await.unwrap();
        server.connections_limit = connections_limit;
        let bound = server.bound();
        let services = Services::new().with(NodeServiceServer::new(EchoCaller));
        let health = services.health();
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(server.serve(services, async {
            let _ = stopped.await;
        }));
        Self { bound, metrics, health, stop: Some(stop), served }
    }

    async fn plain(&self) -> Channel {
        Target::from_shared(format!("http://{}", self.bound.grpc)).unwrap().connect().await.unwrap()
    }

    async fn stop(mut self) {
        let _ = self.stop.take().unwrap().send(());
        self.served.await.unwrap().unwrap();
    }
}

async fn node_info(channel: Channel) -> Result<String, Status> {
    let answer = NodeServiceClient::new(channel).get_node_info(v1::GetNodeInfoRequest {}).await?;
    Ok(answer.into_inner().hostname)
}

async fn negotiate(channel: Channel) -> Status {
    let request = v1::NegotiateSessionRequest::default();
    PeerServiceClient::new(channel).negotiate_session(request).await.unwrap_err()
}

async fn health_of(channel: Channel, service: &str) -> Result<i32, Status> {
    let request = HealthCheckRequest { service: service.to_owned() };
    Ok(HealthClient::new(channel).check(request).await?.into_inner().status)
}

const SERVING: i32 = tonic_health::pb::health_check_response::ServingStatus::Serving as i32;
const NOT_SERVING: i32 = tonic_health::pb::health_check_response::ServingStatus::NotServing as i32;

#[tokio::test]
async fn loopback_without_tls_may_do_everything() {
    let running = Running::start(Options::default()).await;
    assert_eq!(node_info(running.plain().await).await.unwrap(), "loopback");
    assert_eq!(negotiate(running.plain().await).await.code(), Code::Unimplemented);
    running.stop().await;
}

#[tokio::test]
async fn health_turns_before_the_server_stops() {
    let running = Running::start(Options::default()).await;
    let channel = running.plain().await;
    for service in ["", "ramferry.v1.NodeService"] {
        assert_eq!(health_of(channel.clone(), service).await.unwrap(), SERVING, "{service}");
    }
    running.health.not_serving().await;
    for service in ["", "ramferry.v1.NodeService"] {
        assert_eq!(health_of(channel.clone(), service).await.unwrap(), NOT_SERVING, "{service}");
    }
    assert_eq!(node_info(channel).await.unwrap(), "loopback");
    running.stop().await;
}

#[tokio::test]
async fn reflection_lists_our_services() {
    use reflection::server_reflection_request::MessageRequest;
    use reflection::server_reflection_response::MessageResponse;

    let running = Running::start(Options::default()).await;
    let mut client = reflection::server_reflection_client::ServerReflectionClient::new(running.plain().await);
    let request = reflection::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers: Streaming<_> =
        client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("no list")
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for expected in ["ramferry.v1.MigrationService", "ramferry.v1.NodeService", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|name| name == expected), "{names:?}");
    }
    drop(answers);
    running.stop().await;
}

#[tokio::test]
async fn calls_are_counted_by_method_and_code() {
    let running = Running::start(Options::default()).await;
    let channel = running.plain().await;
    node_info(channel.clone()).await.unwrap();
    let mut client = NodeServiceClient::new(channel.clone());
    client.run_diagnostics(v1::RunDiagnosticsRequest::default()).await.unwrap_err();
    negotiate(channel).await;
    for series in [
        r#"ramferry_grpc_requests_total{method="ramferry.v1.NodeService/GetNodeInfo",code="OK"} 1"#,
        r#"ramferry_grpc_requests_total{method="ramferry.v1.NodeService/RunDiagnostics",code="UNIMPLEMENTED"} 1"#,
        r#"ramferry_grpc_requests_total{method="ramferry.v1.PeerService/NegotiateSession",code="UNIMPLEMENTED"} 1"#,
    ] {
        // A call is counted when the server lets go of it, soon after its answer has arrived.
        let counted = async {
            while !running.metrics.render().contains(series) {
                tokio::task::yield_now().await;
            }
        };
        let counted = tokio::time::timeout(Duration::from_secs(10), counted).await;
        assert!(counted.is_ok(), "{series} is not in {}", running.metrics.render());
    }
    running.stop().await;
}

#[tokio::test]
async fn stream_that_does_not_end_does_not_hold_the_shutdown_up() {
    let running = Running::start(Options::default()).await;
    let mut watch = HealthClient::new(running.plain().await)
        .watch(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    watch.message().await.unwrap().unwrap();
    running.stop().await;
}

#[tokio::test]
async fn address_that_is_taken_is_named() {
    let running = Running::start(Options::default()).await;
    let options = Options {
        listen: Some(running.bound.grpc.to_string()),
        metrics_listen: Some("off".into()),
        ..Options::default()
    };
    let config = Config::check(&options).unwrap();
    let error = Server::bind(&config, Metrics::new()).await.unwrap_err();
    assert!(error.to_string().contains(&running.bound.grpc.to_string()), "{error}");
    running.stop().await;
}

mod certificates;

/// An authority and the files that it made.
struct Authority {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

#[derive(Clone, Copy)]
enum Valid {
    Now,
    InThePast,
    InTheFuture,
}

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test authority");
        let key = KeyPair::generate().unwrap();
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { dir, issuer: Issuer::new(params, key) }
    }

    fn issue(&self, name: &str, roles: &[&str], valid: Valid) -> TlsConfig {
        self.issue_for("agent.test", name, roles, valid)
    }

    fn issue_for(&self, host: &str, name: &str, roles: &[&str], valid: Valid) -> TlsConfig {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        for role in roles {
            let uri = format!("ramferry:role:{role}");
            params.subject_alt_names.push(SanType::URI(Ia5String::try_from(uri).unwrap()));
        }
        let years = match valid {
            Valid::Now => None,
            Valid::InThePast => Some((2001, 2002)),
            Valid::InTheFuture => Some((4000, 4001)),
        };
        if let Some((from, to)) = years {
            params.not_before = date_time_ymd(from, 1, 1);
            params.not_after = date_time_ymd(to, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |kind: &str| self.dir.path().join(format!("{name}.{kind}.pem"));
        std::fs::write(path("cert"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        TlsConfig {
            cert: path("cert"),
            key: path("key"),
            ca: self.dir.path().join("ca.pem"),
            server_name: Some("agent.test".into()),
        }
    }
}

struct Secured {
    authority: Authority,
    running: Running,
}

impl Secured {
    async fn start() -> Self {
        let authority = Authority::new();
        let tls = authority.issue("server", &["peer"], Valid::Now);
        Self::start_with(authority, tls).await
    }

    async fn start_with(authority: Authority, tls: TlsConfig) -> Self {
        let options = Options {
            tls_cert: Some(tls.cert),
            tls_key: Some(tls.key),
            tls_ca: Some(tls.ca),
            ..Options::default()
        };
        Self { running: Running::start(options).await, authority }
    }

    async fn connect(&self, tls: &TlsConfig) -> Result<Channel, tonic::transport::Error> {
        let target = Target::from_shared(format!("https://{}", self.running.bound.grpc)).unwrap();
        target.tls_config(auth::client_tls(tls, "127.0.0.1").unwrap()).unwrap().connect().await
    }

    async fn as_role(&self, roles: &[&str]) -> Channel {
        self.connect(&self.authority.issue("client", roles, Valid::Now)).await.unwrap()
    }
}

#[tokio::test]
async fn role_decides_which_services_a_certificate_may_call() {
    let secured = Secured::start().await;

    let orchestrator = secured.as_role(&["orchestrator"]).await;
    assert!(node_info(orchestrator.clone()).await.unwrap().contains("CN=client"));
    let refusal = negotiate(orchestrator).await;
    assert_eq!(
        (refusal.code(), reason_of(&refusal).as_deref()),
        (Code::PermissionDenied, Some("ROLE_MISSING"))
    );

    let peer = secured.as_role(&["peer"]).await;
    assert_eq!(negotiate(peer.clone()).await.code(), Code::Unimplemented);
    assert_eq!(node_info(peer).await.unwrap_err().code(), Code::PermissionDenied);

    let both = secured.as_role(&["orchestrator", "peer"]).await;
    assert!(node_info(both.clone()).await.is_ok());
    assert_eq!(negotiate(both).await.code(), Code::Unimplemented);
    secured.running.stop().await;
}

#[tokio::test]
async fn certificate_without_a_role_sees_health_only() {
    let secured = Secured::start().await;
    let channel = secured.as_role(&[]).await;
    assert_eq!(health_of(channel.clone(), "").await.unwrap(), SERVING);
    assert_eq!(node_info(channel.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(negotiate(channel).await.code(), Code::PermissionDenied);
    secured.running.stop().await;
}

#[tokio::test]
async fn client_without_a_certificate_is_told_so_and_sees_nothing() {
    let secured = Secured::start().await;
    let ca = std::fs::read(secured.authority.dir.path().join("ca.pem")).unwrap();
    let tls = tonic::transport::ClientTlsConfig::new()
        .ca_certificate(tonic::transport::Certificate::from_pem(ca))
        .domain_name("agent.test");
    let target = Target::from_shared(format!("https://{}", secured.running.bound.grpc)).unwrap();
    let channel = target.tls_config(tls).unwrap().connect().await.unwrap();
    let refusal = node_info(channel.clone()).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unauthenticated);
    assert_eq!(reason_of(&refusal).as_deref(), Some("CERTIFICATE_MISSING"));
    assert_eq!(health_of(channel, "").await.unwrap_err().code(), Code::Unauthenticated);
    secured.running.stop().await;
}

/// A refused handshake shows at the connection or at the first call.
async fn is_refused(secured: &Secured, tls: &TlsConfig) -> bool {
    match secured.connect(tls).await {
        Err(_) => true,
        Ok(channel) => health_of(channel, "")
            .await
            .is_err_and(|status| status.code() == Code::Unknown || status.code() == Code::Unavailable),
    }
}

#[tokio::test]
async fn certificate_of_another_authority_is_refused() {
    let secured = Secured::start().await;
    let stranger = Authority::new();
    let mut tls = stranger.issue("stranger", &["orchestrator", "peer"], Valid::Now);
    tls.ca = secured.authority.dir.path().join("ca.pem");
    assert!(is_refused(&secured, &tls).await);
    secured.running.stop().await;
}

#[tokio::test]
async fn expired_certificate_is_refused() {
    let secured = Secured::start().await;
    let tls = secured.authority.issue("expired", &["orchestrator"], Valid::InThePast);
    assert!(is_refused(&secured, &tls).await);
    let tls = secured.authority.issue("renewed", &["orchestrator"], Valid::Now);
    assert!(!is_refused(&secured, &tls).await);
    secured.running.stop().await;
}

#[tokio::test]
async fn server_of_another_authority_is_not_trusted() {
    let secured = Secured::start().await;
    let mut tls = secured.authority.issue("client", &["orchestrator"], Valid::Now);
    tls.ca = Authority::new().dir.keep().join("ca.pem");
    assert!(secured.connect(&tls).await.is_err());
    std::fs::remove_dir_all(tls.ca.parent().unwrap()).unwrap();
    secured.running.stop().await;
}

#[tokio::test]
async fn tls_files_that_cannot_be_used_are_named() {
    let authority = Authority::new();
    let good = authority.issue("server", &[], Valid::Now);
    let other = authority.issue("other", &[], Valid::Now);
    let bind = |tls: TlsConfig| async {
        let mut config =
            Config::check(&Options { listen: Some("127.0.0.1:0".into()), ..Options::default() }).unwrap();
        config.metrics_listen = None;
        config.tls = Some(tls);
        Server::bind(&config, Metrics::new()).await
    };
    let error = bind(TlsConfig { key: "/nowhere/key.pem".into(), ..good.clone() }).await.unwrap_err();
    assert!(error.to_string().contains("/nowhere/key.pem"), "{error}");
    let error = bind(TlsConfig { cert: good.key.clone(), ..good.clone() }).await.unwrap_err();
    assert!(error.to_string().contains("server.key.pem"), "{error}");
    assert!(bind(TlsConfig { key: other.key, ..good.clone() }).await.is_err());
    assert!(bind(good).await.is_ok());
}

#[tokio::test]
async fn metrics_beyond_loopback_need_a_certificate() {
    use http_body_util::BodyExt as _;
    use hyper_util::rt::TokioIo;
    use tokio_rustls::rustls::pki_types::pem::PemObject as _;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use tokio_rustls::rustls::{ClientConfig, RootCertStore};

    let authority = Authority::new();
    let tls = authority.issue("server", &[], Valid::Now);
    let endpoint = Endpoint::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = endpoint.address();
    let server = auth::metrics_tls(&tls).unwrap();
    let serving = tokio::spawn(endpoint.serve(Metrics::new(), Some(server)));

    let scrape = |identity: Option<&TlsConfig>| {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&tls.ca).unwrap()).unwrap();
        let builder = ClientConfig::builder().with_root_certificates(roots);
        let config = match identity {
            None => builder.with_no_client_auth(),
            Some(tls) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_file(&tls.cert).unwrap()],
                    PrivateKeyDer::from_pem_file(&tls.key).unwrap(),
                )
                .unwrap(),
        };
        async move {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let name = ServerName::try_from("agent.test").unwrap();
            let stream =
                tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.ok()?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
            tokio::spawn(connection);
            let request =
                Request::get("/metrics").body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap();
            let body = sender.send_request(request).await.ok()?.into_body();
            Some(String::from_utf8(body.collect().await.ok()?.to_bytes().to_vec()).unwrap())
        }
    };
    let prometheus = authority.issue("prometheus", &[], Valid::Now);
    assert!(scrape(Some(&prometheus)).await.unwrap().contains("ramferry_build_info"));
    assert_eq!(scrape(None).await, None);
    serving.abort();
}
