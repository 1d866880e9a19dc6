//! Certificates that must not open anything, on either side of a connection, and
//! what is said about each.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::auth::tls_hint;
use crate::source::{peer_channel, peer_refusal};

/// The whole of what went wrong when an orchestrator, or a peer, calls with `tls`.
async fn refusal(secured: &Secured, tls: &TlsConfig) -> Box<dyn std::error::Error + Send + Sync> {
    match secured.connect(tls).await {
        Err(error) => Box::new(error),
        // With TLS 1.3 the client's certificate is judged after the client's handshake.
        Ok(channel) => Box::new(node_info(channel).await.expect_err("this certificate opens nothing")),
    }
}

fn assert_hint(what: &str, error: &(dyn std::error::Error + 'static), part: &str) {
    let hint = tls_hint(error).unwrap_or_else(|| panic!("no hint for {what}: {error:?}"));
    assert!(hint.contains(part), "{what}: {hint:?} does not say {part:?}");
}

/// Makes a server's certificate: from its authority, or a stranger.
type Issue = fn(&Authority, &Authority) -> TlsConfig;

/// A certificate that nobody but itself signed, with every role.
fn self_signed(authority: &Authority, name: &str) -> TlsConfig {
    let mut params = CertificateParams::new(vec!["agent.test".to_owned()]).unwrap();
    for role in ["peer", "orchestrator"] {
        let uri = Ia5String::try_from(format!("ramferry:role:{role}")).unwrap();
        params.subject_alt_names.push(SanType::URI(uri));
    }
    let key = KeyPair::generate().unwrap();
    let path = |kind: &str| authority.dir.path().join(format!("{name}.{kind}.pem"));
    std::fs::write(path("cert"), params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(path("key"), key.serialize_pem()).unwrap();
    let ca = authority.dir.path().join("ca.pem");
    TlsConfig { cert: path("cert"), key: path("key"), ca, server_name: Some("agent.test".into()) }
}

#[tokio::test]
async fn certificates_of_callers_that_open_nothing_are_refused_with_what_to_do() {
    const ROLES: &[&str] = &["orchestrator", "peer"];
    let secured = Secured::start().await;
    let (ours, stranger) = (&secured.authority, Authority::new());
    let trusting = |tls: TlsConfig| TlsConfig { ca: ours.dir.path().join("ca.pem"), ..tls };
    let cases = [
        (
            "another authority's",
            trusting(stranger.issue("stranger", ROLES, Valid::Now)),
            "does not know who signed",
        ),
        ("self-signed", self_signed(ours, "self"), "does not know who signed"),
        (
            "expired",
            ours.issue("expired", ROLES, Valid::InThePast),
            "has expired or is not valid yet: renew it",
        ),
        ("not valid yet", ours.issue("early", ROLES, Valid::InTheFuture), "compare the clocks"),
    ];
    for (what, tls, part) in cases {
        let error = refusal(&secured, &tls).await;
        assert_hint(what, error.as_ref(), part);

        // The same certificate in the hands of a source's agent.
        let address = secured.running.bound.grpc.to_string();
        let channel = peer_channel(&address, Some(&tls)).unwrap();
        let told = peer_refusal(&address, &negotiate(channel).await);
        let found = (told.code(), reason_of(&told));
        assert_eq!(found, (Code::FailedPrecondition, Some("DESTINATION_TLS".into())), "{what}: {told:?}");
        assert!(told.message().contains(part) && told.message().contains(&address), "{what}: {told:?}");
    }
    secured.running.stop().await;
}

#[tokio::test]
async fn servers_that_are_not_who_they_should_be_are_refused_with_what_to_do() {
    let stranger = Authority::new();
    let wrong: [(&str, Issue, &str); 5] = [
        (
            "another authority's",
            |_, stranger| stranger.issue("server", &["peer"], Valid::Now),
            "no authority in tls_ca",
        ),
        ("self-signed", |ours, _| self_signed(ours, "server"), "no authority in tls_ca"),
        (
            "expired",
            |ours, _| ours.issue("server", &["peer"], Valid::InThePast),
            "has expired: renew it on its host",
        ),
        ("not valid yet", |ours, _| ours.issue("server", &["peer"], Valid::InTheFuture), "not valid yet"),
        (
            "of another host",
            |ours, _| ours.issue_for("elsewhere.test", "server", &["peer"], Valid::Now),
            "not one of this host name",
        ),
    ];
    for (what, server, part) in wrong {
        let authority = Authority::new();
        let tls = TlsConfig { ca: authority.dir.path().join("ca.pem"), ..server(&authority, &stranger) };
        let client = authority.issue("client", &["orchestrator", "peer"], Valid::Now);
        let secured = Secured::start_with(authority, tls).await;
        let error = secured.connect(&client).await.expect_err("such a server is not trusted");
        assert_hint(what, &error, part);

        let address = secured.running.bound.grpc.to_string();
        let told = peer_refusal(&address, &negotiate(peer_channel(&address, Some(&client)).unwrap()).await);
        assert_eq!(reason_of(&told).as_deref(), Some("DESTINATION_TLS"), "{what}: {told:?}");
        assert!(told.message().contains(part), "{what}: {told:?}");
        secured.running.stop().await;
    }
}

#[tokio::test]
async fn swapped_certificates_are_refused_by_role_to_whom_it_concerns() {
    let secured = Secured::start().await;
    let address = secured.running.bound.grpc.to_string();
    // An orchestrator's certificate on PeerService, as a source's agent: of that agent, not of its caller.
    let tls = secured.authority.issue("orchestrator", &["orchestrator"], Valid::Now);
    let refused = negotiate(peer_channel(&address, Some(&tls)).unwrap()).await;
    let found = (refused.code(), reason_of(&refused));
    assert_eq!(found, (Code::PermissionDenied, Some("ROLE_MISSING".into())));
    assert!(refused.message().contains("\"ramferry:role:peer\"; issue one that has"), "{refused:?}");
    let told = peer_refusal(&address, &refused);
    let found = (told.code(), reason_of(&told));
    assert_eq!(found, (Code::FailedPrecondition, Some("PEER_ROLE_MISSING".into())));
    for part in ["not the caller", "role peer", &address] {
        assert!(told.message().contains(part), "{told:?} does not say {part:?}");
    }
    // A peer's certificate on the orchestrators' services.
    let refused = node_info(secured.as_role(&["peer"]).await).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("\"ramferry:role:orchestrator\"; issue one that has"), "{refused:?}");
    secured.running.stop().await;
}

#[tokio::test]
async fn tls_and_plain_text_do_not_mix_and_say_so() {
    let secured = Secured::start().await;
    let target = Target::from_shared(format!("http://{}", secured.running.bound.grpc)).unwrap();
    let plain = target.connect_lazy();
    let refused = node_info(plain).await.unwrap_err();
    assert!([Code::Unavailable, Code::Unknown, Code::Internal].contains(&refused.code()), "{refused:?}");
    let address = secured.running.bound.grpc.to_string();
    let told = peer_refusal(&address, &negotiate(peer_channel(&address, None).unwrap()).await);
    assert_eq!(reason_of(&told).as_deref(), Some("DESTINATION_UNREACHABLE"), "{told:?}");
    assert!(told.message().contains("both agents use TLS or neither"), "{told:?}");

    let open = Running::start(Options::default()).await;
    let tls = secured.authority.issue("client", &["orchestrator", "peer"], Valid::Now);
    let address = open.bound.grpc.to_string();
    let told = peer_refusal(&address, &negotiate(peer_channel(&address, Some(&tls)).unwrap()).await);
    assert_eq!(reason_of(&told).as_deref(), Some("DESTINATION_TLS"), "{told:?}");
    assert!(told.message().contains("does not speak TLS"), "{told:?}");
    open.stop().await;
    secured.running.stop().await;
}

#[tokio::test]
async fn garbage_on_the_grpc_port_ends_its_own_connection_only() {
    let secured = Secured::start().await;
    let plain = Running::start(Options::default()).await;
    for bound in [secured.running.bound, plain.bound] {
        let noises: [&[u8]; 5] = [
            b"\0\0\0\0\0\0\0\0",
            b"\x16\x03\x01\xff\xff garbage in the place of a ClientHello",
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            &[0xa5; 1 << 16],
        ];
        for noise in noises {
            let mut stream = tokio::net::TcpStream::connect(bound.grpc).await.unwrap();
            // The server may have had enough before all is written.
            let _ = stream.write_all(noise).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let ended = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut answer)).await;
            assert!(ended.is_ok(), "{noise:?} kept the connection open");
        }
    }
    assert!(node_info(secured.as_role(&["orchestrator"]).await).await.is_ok());
    assert_eq!(node_info(plain.plain().await).await.unwrap(), "loopback");
    plain.stop().await;
    secured.running.stop().await;
}

#[tokio::test]
async fn connections_that_say_nothing_keep_nobody_out() {
    const LIMIT: usize = 4;
    let authority = Authority::new();
    let tls = authority.issue("server", &["peer"], Valid::Now);
    let mut running = Running::start_limited(
        Options {
            tls_cert: Some(tls.cert),
            tls_key: Some(tls.key),
            tls_ca: Some(tls.ca),
            ..Options::default()
        },
        LIMIT,
    )
    .await;
    // One whose caller was let in, before strangers take every other place and more.
    let target = Target::from_shared(format!("https://{}", running.bound.grpc)).unwrap();
    let tls = authority.issue("client", &["orchestrator"], Valid::Now);
    let connect = || {
        let tls = auth::client_tls(&tls, "127.0.0.1").unwrap();
        let target = target.clone().tls_config(tls).unwrap();
        async move { target.connect().await }
    };
    let kept = connect().await.unwrap();
    node_info(kept.clone()).await.unwrap();
    let mut idle = Vec::new();
    for _ in 0..4 * LIMIT {
        idle.push(tokio::net::TcpStream::connect(running.bound.grpc).await.unwrap());
    }
    let late = tokio::time::timeout(Duration::from_secs(30), connect()).await.expect("it is served in time");
    assert!(node_info(late.unwrap()).await.is_ok());
    // The first was not ended for it: a second call needs no second handshake.
    assert!(node_info(kept).await.is_ok());
    let mut first = idle.remove(0);
    let ended = tokio::time::timeout(Duration::from_secs(30), first.read(&mut [0; 64])).await;
    assert!(matches!(ended.expect("the oldest was sent away"), Ok(0) | Err(_)));
    let _ = running.stop.take().unwrap().send(());
    running.served.await.unwrap().unwrap();
}

#[test]
fn the_end_of_each_certificate_is_told() {
    let authority = Authority::new();
    let tls = authority.issue("server", &["peer"], Valid::InThePast);
    let [agent, of_authority] = auth::expiries(&tls).unwrap();
    let first_of_january_2002 = 1_009_843_200;
    assert_eq!(agent, ("agent", first_of_january_2002));
    assert!(of_authority.0 == "authority" && of_authority.1 > first_of_january_2002, "{of_authority:?}");
}
