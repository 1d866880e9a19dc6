//! Another agent, seen from this host.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ramferry_proto::v1;
use ramferry_proto::v1::peer_service_client::PeerServiceClient;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::certificate::CertificateFacts;
use super::verdict::Verdict;
use crate::auth::{client_config, tls_hint};
use crate::config::TlsConfig;
use crate::core::PROTOCOL_VERSION;
use crate::source::peer_channel;
use crate::status::{causes, shortened};

/// For each thing that is asked of the peer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clocks that differ by more make records of both hosts hard to compare.
const WARN_SKEW: Duration = Duration::from_secs(2);
/// Clocks that differ by more have certificates refused.
const FAIL_SKEW: Duration = Duration::from_secs(300);
/// Most addresses of a name that are tried.
const ADDRESSES: usize = 4;

/// Why a port could not be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unreached {
    /// It is not an address, or the name has none.
    NoAddress(String),
    /// The host answered that nobody listens.
    Refused,
    /// Nothing came back.
    Silent,
    /// Something else.
    Other(String),
}

/// What was seen of the peer.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// As it was given.
    pub(super) address: String,
    /// How long its port took to answer.
    pub(super) reached: Result<Duration, Unreached>,
    /// Its certificate, or what is wrong with TLS; `None` where this host has no TLS or it was not reached.
    pub(super) certificate: Option<Result<CertificateFacts, String>>,
    /// What it told, or why it did not; `None` where it was not reached.
    pub(super) told: Option<Result<Told, String>>,
    pub(super) data: Option<(SocketAddr, Result<Duration, Unreached>)>,
    pub(super) now: SystemTime,
}

/// What the peer told of itself.
#[derive(Clone, Debug)]
pub(super) struct Told {
    pub(super) info: v1::GetPeerInfoResponse,
    /// Its clock less ours, in the middle of the call; `None` where it did not tell the time.
    pub(super) ahead_milliseconds: Option<i64>,
    pub(super) round_trip: Duration,
}

impl Peer {
    pub(super) async fn ask(address: &str, tls: Option<&TlsConfig>) -> Self {
        let mut peer = Self {
            address: shortened(address),
            reached: Err(Unreached::Silent),
            certificate: None,
            told: None,
            data: None,
            now: SystemTime::now(),
        };
        let addresses = match resolve(address).await {
            Ok(addresses) => addresses,
            Err(unreached) => {
                peer.reached = Err(unreached);
                return peer;
            }
        };
        let mut at = None;
        for address in addresses {
            peer.reached = reach(address).await;
            if peer.reached.is_ok() {
                at = Some(address);
                break;
            }
        }
        let Some(at) = at else { return peer };
        if let Some(tls) = tls {
            peer.certificate = Some(certificate(at, address, tls).await);
        }
        let told = call(address, tls).await;
        if let Ok(told) = &told
            && let Ok(mut data) = told.info.tcp_address.parse::<SocketAddr>()
        {
            if data.ip().is_unspecified() {
                data.set_ip(at.ip());
            }
            peer.data = Some((data, reach(data).await));
        }
        peer.told = Some(told);
        peer
    }

    pub(super) fn judge_agent(&self) -> Verdict {
        let address = &self.address;
        match &self.reached {
            Ok(took) => Verdict::ok(format!("{address} took a connection in {}", milliseconds(*took))),
            Err(why) => unreached(address, why, "the peer's agent", "listen"),
        }
    }

    pub(super) fn judge_certificate(&self) -> Verdict {
        const REMEDY: &str = "renew it on the peer's host, and restart its agent";
        match &self.certificate {
            None if self.reached.is_err() => Verdict::skip("the peer was not reached"),
            None => Verdict::skip("TLS is off here: set tls_cert, tls_key and tls_ca, or give --config"),
            Some(Ok(facts)) if !facts.is_peer => Verdict::warn(
                format!("{} has no URI subject alternative name ramferry:role:peer", facts.name),
                "issue it with that name, or guests of the peer cannot come to this host",
            ),
            Some(Ok(facts)) => facts.judge_time(self.now, REMEDY),
            Some(Err(why)) => Verdict::fail(
                why,
                "compare tls_ca, names and expiry of both certificates (openssl x509 -noout -text -in FILE), and both clocks",
            ),
        }
    }

    pub(super) fn judge_version(&self) -> Verdict {
        match &self.told {
            None => Verdict::skip("the peer was not reached"),
            Some(Err(why)) => Verdict::fail(
                format!("{} does not tell of itself: {why}", self.address),
                "see that this is a ramferry agent (its gRPC port, `listen`), that both use TLS or neither does, and that \
                 it is as new as this one",
            ),
            Some(Ok(Told { info, .. })) => {
                let ours = env!("CARGO_PKG_VERSION");
                let evidence = format!(
                    "the peer is version {}, protocol {}; this is {ours}, protocol {PROTOCOL_VERSION}",
                    printable(&info.agent_version),
                    info.protocol_version
                );
                if info.protocol_version != PROTOCOL_VERSION {
                    return Verdict::fail(evidence, "install the same version on both hosts");
                }
                if info.agent_version != ours {
                    return Verdict::warn(
                        evidence,
                        "install the same version on both hosts, once no migration runs",
                    );
                }
                Verdict::ok(evidence)
            }
        }
    }

    pub(super) fn judge_clock(&self) -> Verdict {
        let Some(Ok(told)) = &self.told else { return Verdict::skip("the peer told no time") };
        let Some(ahead) = told.ahead_milliseconds else { return Verdict::skip("the peer told no time") };
        let which = if ahead < 0 { "behind" } else { "ahead" };
        let skew = Duration::from_millis(ahead.unsigned_abs());
        let evidence = format!(
            "the peer's clock is {} {which} (within {})",
            milliseconds(skew),
            milliseconds(told.round_trip / 2)
        );
        let certain = skew.saturating_sub(told.round_trip / 2);
        let remedy =
            "set both clocks by one source (timedatectl; chronyc tracking), on the host that is wrong";
        if certain > FAIL_SKEW {
            return Verdict::fail(format!("{evidence}: certificates seem expired, or not valid yet"), remedy);
        }
        if certain > WARN_SKEW {
            return Verdict::warn(evidence, remedy);
        }
        Verdict::ok(evidence)
    }

    pub(super) fn judge_data(&self) -> Verdict {
        let Some(Ok(Told { info, .. })) = &self.told else {
            return Verdict::skip("the peer told no data port");
        };
        let rdma = match (&*info.verbs_address, &*info.verbs_unavailable) {
            ("", why) => format!("no RDMA there ({})", printable(why)),
            (address, _) => format!("RDMA at {} (not tried: ramferry bench fabric)", printable(address)),
        };
        let Some((address, reached)) = &self.data else {
            return Verdict::warn(
                format!("the peer's data address {:?} is not one; {rdma}", printable(&info.tcp_address)),
                "install the same version on both hosts",
            );
        };
        let is_here = self.address.starts_with("127.") || self.address.starts_with("localhost");
        if address.ip().is_loopback() && !is_here && !self.address.starts_with("[::1]") {
            return Verdict::warn(
                format!(
                    "the peer's tcp fabric listens at {address}, which only its own host reaches; {rdma}"
                ),
                "set data_listen in the peer's configuration to an address of its host, and restart it",
            );
        }
        match reached {
            Ok(took) => {
                Verdict::ok(format!("{address} took a connection in {}; {rdma}", milliseconds(*took)))
            }
            Err(why) => unreached(&address.to_string(), why, "the peer's tcp fabric", "data_listen"),
        }
    }
}

fn unreached(address: &str, why: &Unreached, what: &str, key: &str) -> Verdict {
    let port = address.rsplit_once(':').map_or("its port", |(_, port)| port);
    match why {
        Unreached::NoAddress(why) => Verdict::fail(
            format!("{address}: {why}"),
            "give HOST:PORT, with a name that this host can resolve (getent hosts NAME)",
        ),
        Unreached::Refused => Verdict::fail(
            format!("{address} refuses connections: its host is up, and nothing listens there"),
            format!(
                "start {what} there, or correct its key {key} (ss -ltn on that host shows what listens); a firewall may refuse, too"
            ),
        ),
        Unreached::Silent => Verdict::fail(
            format!("{address} did not answer within {PATIENCE:?}"),
            format!(
                "see that its host is up (ping), and let TCP port {port} in through the firewalls between (nft list \
                 ruleset; on the peer's host too)"
            ),
        ),
        Unreached::Other(why) => {
            Verdict::fail(format!("{address}: {why}"), "mend the route to it (ip route get ADDRESS)")
        }
    }
}

async fn resolve(address: &str) -> Result<Vec<SocketAddr>, Unreached> {
    let none = |why: String| Unreached::NoAddress(why);
    let looked_up = tokio::time::timeout(PATIENCE, tokio::net::lookup_host(address)).await;
    let found = looked_up.map_err(|_| none(format!("its name was not resolved within {PATIENCE:?}")))?;
    let found: Vec<_> = found.map_err(|error| none(error.to_string()))?.take(ADDRESSES).collect();
    if found.is_empty() { Err(none("its name has no address".into())) } else { Ok(found) }
}

async fn reach(address: SocketAddr) -> Result<Duration, Unreached> {
    let begun = Instant::now();
    match tokio::time::timeout(PATIENCE, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(begun.elapsed()),
        Ok(Err(error)) => Err(match error.kind() {
            io::ErrorKind::ConnectionRefused => Unreached::Refused,
            io::ErrorKind::TimedOut => Unreached::Silent,
            _ => Unreached::Other(error.to_string()),
        }),
        Err(_) => Err(Unreached::Silent),
    }
}

/// The certificate that the agent shows, after a handshake as a migration's would be.
async fn certificate(at: SocketAddr, address: &str, tls: &TlsConfig) -> Result<CertificateFacts, String> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let name = tls.server_name.as_deref().unwrap_or(host).trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(name.to_owned()).map_err(|error| causes(&error))?;
    let config = client_config(tls).map_err(|error| causes(&error))?;
    let connect = async {
        let stream = TcpStream::connect(at).await?;
        TlsConnector::from(Arc::clone(&config)).connect(name, stream).await
    };
    let connected = tokio::time::timeout(PATIENCE, connect).await;
    let connected = connected.map_err(|_| format!("no TLS handshake with {address} within {PATIENCE:?}"))?;
    let stream = connected.map_err(|error| {
        let hint = tls_hint(&error).map(|hint| format!(": {hint}")).unwrap_or_default();
        format!("TLS with {address}: {}{hint}", causes(&error))
    })?;
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let shown = shown.ok_or_else(|| format!("{address} shows no certificate"))?;
    CertificateFacts::of_der(&format!("the peer's certificate ({address})"), shown)
}

async fn call(address: &str, tls: Option<&TlsConfig>) -> Result<Told, String> {
    let refused = |status: tonic::Status| {
        let cause = std::error::Error::source(&status).map(|source| {
            let hint = tls_hint(source).map(|hint| format!("; {hint}")).unwrap_or_default();
            format!(" ({}{hint})", causes(source))
        });
        let text = match status.code() {
            tonic::Code::Unimplemented => "its version does not know GetPeerInfo".to_owned(),
            _ => format!("{}{}", status.message(), cause.unwrap_or_default()),
        };
        shortened(printable(&text))
    };
    let mut client = PeerServiceClient::new(peer_channel(address, tls).map_err(refused)?);
    let (begun, began) = (Instant::now(), SystemTime::now());
    let asked = tokio::time::timeout(PATIENCE, client.get_peer_info(v1::GetPeerInfoRequest {})).await;
    let info = asked.map_err(|_| format!("no answer within {PATIENCE:?}"))?.map_err(refused)?.into_inner();
    let round_trip = begun.elapsed();
    let time = info.time.and_then(|time| SystemTime::try_from(time).ok());
    let ahead_milliseconds = time.map(|time| difference(time, began + round_trip / 2));
    Ok(Told { info, ahead_milliseconds, round_trip })
}

/// `one` less `other`.
fn difference(one: SystemTime, other: SystemTime) -> i64 {
    let whole = |span: Duration| i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
    one.duration_since(other).map_or_else(|error| -whole(error.duration()), whole)
}

fn milliseconds(span: Duration) -> String {
    if span >= Duration::from_secs(10) {
        return format!("{} s", span.as_secs());
    }
    format!("{:.1} ms", span.as_secs_f64() * 1e3)
}

/// A text of the peer's without what could drive a terminal.
fn printable(text: &str) -> String {
    shortened(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::super::verdict::Status;
    use super::*;

    fn told(change: impl FnOnce(&mut v1::GetPeerInfoResponse)) -> Told {
        let mut info = v1::GetPeerInfoResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            protocol_version: PROTOCOL_VERSION,
            tcp_address: "10.0.0.2:7051".into(),
            verbs_unavailable: "there is no RDMA device".into(),
            ..Default::default()
        };
        change(&mut info);
        Told { info, ahead_milliseconds: Some(0), round_trip: Duration::from_millis(2) }
    }

    fn peer(told: Told) -> Peer {
        Peer {
            address: "10.0.0.2:7050".into(),
            reached: Ok(Duration::from_millis(1)),
            certificate: None,
            data: Some(("10.0.0.2:7051".parse().unwrap(), Ok(Duration::from_millis(1)))),
            told: Some(Ok(told)),
            now: SystemTime::now(),
        }
    }

    #[test]
    fn a_sound_peer_passes() {
        let peer = peer(told(|_| {}));
        for verdict in [peer.judge_agent(), peer.judge_version(), peer.judge_clock(), peer.judge_data()] {
            assert_eq!(verdict.status, Status::Ok, "{verdict:?}");
        }
        assert_eq!(peer.judge_certificate().status, Status::Skip);
    }

    #[test]
    fn each_way_not_to_be_reached_has_its_own_remedy() {
        for (why, part) in [
            (Unreached::NoAddress("no such name".into()), "HOST:PORT"),
            (Unreached::Refused, "ss -ltn"),
            (Unreached::Silent, "TCP port 7050"),
            (Unreached::Other("Network is unreachable".into()), "ip route get"),
        ] {
            let peer = Peer { reached: Err(why), told: None, data: None, ..peer(told(|_| {})) };
            let verdict = peer.judge_agent();
            assert!(verdict.status == Status::Fail && verdict.remedy.contains(part), "{verdict:?}");
            let rest =
                [peer.judge_version(), peer.judge_clock(), peer.judge_data(), peer.judge_certificate()];
            assert!(rest.iter().all(|verdict| verdict.status == Status::Skip), "{rest:?}");
        }
    }

    #[test]
    fn another_protocol_fails_and_another_version_warns() {
        let older = peer(told(|info| info.protocol_version = 0)).judge_version();
        assert_eq!(older.status, Status::Fail);
        let newer = peer(told(|info| info.agent_version = "9.9\u{1b}[31m".into())).judge_version();
        assert!(newer.status == Status::Warn && !newer.evidence.contains('\u{1b}'), "{newer:?}");
        let silent = Peer { told: Some(Err("no answer".into())), ..peer(told(|_| {})) };
        assert_eq!(silent.judge_version().status, Status::Fail);
    }

    #[test]
    fn clocks_that_differ_warn_and_fail_by_how_much() {
        let judged = |milliseconds| {
            let told = Told { ahead_milliseconds: milliseconds, ..told(|_| {}) };
            peer(told).judge_clock()
        };
        assert_eq!(judged(Some(-1500)).status, Status::Ok);
        let behind = judged(Some(-4000));
        assert!(behind.status == Status::Warn && behind.evidence.contains("4000.0 ms behind"), "{behind:?}");
        let ahead = judged(Some(400_000));
        assert!(ahead.status == Status::Fail && ahead.evidence.contains("400 s ahead"), "{ahead:?}");
        assert_eq!(judged(None).status, Status::Skip);
        let now = SystemTime::now();
        assert_eq!(difference(now, now + Duration::from_millis(7)), -7);
    }

    #[test]
    fn a_data_port_that_is_closed_or_of_loopback_is_told() {
        let mut closed = peer(told(|_| {}));
        closed.data.as_mut().unwrap().1 = Err(Unreached::Silent);
        let verdict = closed.judge_data();
        assert!(verdict.status == Status::Fail && verdict.remedy.contains("TCP port 7051"), "{verdict:?}");
        let mut loopback = peer(told(|_| {}));
        loopback.data.as_mut().unwrap().0 = "127.0.0.1:7051".parse().unwrap();
        let verdict = loopback.judge_data();
        assert!(verdict.status == Status::Warn && verdict.remedy.contains("data_listen"), "{verdict:?}");
        let garbled = Peer { data: None, ..peer(told(|info| info.tcp_address = "x".into())) };
        assert_eq!(garbled.judge_data().status, Status::Warn);
    }

    #[test]
    fn a_peers_certificate_is_judged_by_its_time_and_role() {
        let now = SystemTime::now();
        let facts = CertificateFacts {
            name: "the peer's certificate".into(),
            subject: String::new(),
            not_before: now - Duration::from_secs(86_400),
            not_after: now + Duration::from_secs(3600),
            is_peer: true,
        };
        let judged =
            |certificate| Peer { certificate: Some(certificate), ..peer(told(|_| {})) }.judge_certificate();
        assert_eq!(judged(Ok(facts.clone())).status, Status::Warn);
        assert_eq!(judged(Ok(CertificateFacts { is_peer: false, ..facts })).status, Status::Warn);
        assert_eq!(judged(Err("UnknownIssuer".into())).status, Status::Fail);
    }

    #[tokio::test]
    async fn a_port_that_nobody_listens_at_is_refused() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        assert!(reach(address).await.is_ok());
        let peer = Peer::ask("no port", None).await;
        assert!(matches!(peer.reached, Err(Unreached::NoAddress(_))), "{peer:?}");
    }
}
