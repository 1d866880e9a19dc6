//! Peers that do not keep to the protocol: each is answered with what is wrong,
//! no guest is harmed, and the next migration succeeds.

use std::time::{Duration, Instant};

use ramferry_lab::{Guest, Qemu, RamBlock};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use ramferry_proto::v1::exchange_control_response::Answer;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::{
    MIB, PATIENCE, Pair, assert_proves_itself, assert_refused, boot, parameters, proof, quiet,
};
use crate::peer::{DataLink, Proxy, Session, Twist, negotiation, open, refusal};

/// Causes in the error frames of the tcp fabric.
const UNKNOWN_KEY: u16 = 1;
const OUT_OF_BOUNDS: u16 = 2;
/// Verdict on a hello whose token no session has.
const UNKNOWN_SESSION: u8 = 1;
const WINDOW_BYTES: u64 = 64 << 10;

fn idle() -> Qemu {
    Qemu::builder().guest(Guest::Nothing).block(RamBlock::node(128 * MIB)).start().unwrap()
}

fn assert_status(status: &Status, code: Code, reason: &str, part: &str) {
    let found = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    assert_eq!((status.code(), found.as_str()), (code, reason), "{}", status.message());
    assert!(status.message().contains(part), "{:?} does not say {part:?}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_of_another_version_or_without_sense_are_refused_in_both_directions() {
    let pair = Pair::start();
    let guest = idle();
    let receiver = guest.destination().start().unwrap();
    let request = negotiation(&pair, &guest.qmp_path(), &receiver.qmp_path()).await;

    // A source to our destination.
    let newer = v1::NegotiateSessionRequest { protocol_version: 2, ..request.clone() };
    let status = refusal(&pair.destination, newer).await;
    assert_status(&status, Code::FailedPrecondition, "PROTOCOL_VERSION", "upgrade the older agent");
    let greedy = v1::NegotiateSessionRequest { streams: 1_000_000, ..request.clone() };
    let status = refusal(&pair.destination, greedy).await;
    assert_status(&status, Code::InvalidArgument, "OUT_OF_RANGE", "give at most 64");
    let escaping = v1::NegotiateSessionRequest { migration_id: "../../etc/passwd".into(), ..request };
    let status = refusal(&pair.destination, escaping).await;
    assert_status(&status, Code::InvalidArgument, "MIGRATION_ID_INVALID", "1 to 64 of");

    // A destination to our source. Each leaves a session behind that nobody opens.
    let twists: [(&str, Twist, &str); 5] = [
        ("newer", |response| response.protocol_version = 2, "upgrade the older agent"),
        ("token", |response| response.session_token = vec![1; 31], "32 bytes"),
        ("streams", |response| response.streams = 65, "number of streams"),
        ("text", |response| response.fabric_reason = "x".repeat(1 << 20), "too long"),
        ("socket", twist_to_foreign_socket, "not one of an agent"),
    ];
    let proxy = Proxy::start(&pair.destination).await;
    for (id, twist, part) in twists {
        proxy.twist(twist);
        let receiver = guest.destination().start().unwrap();
        let auto = parameters(v1::FabricKind::Unspecified);
        let mut spec = pair.spec(&guest.qmp_path(), &receiver.qmp_path(), auto);
        spec.destination_agent = proxy.address.to_string();
        let request = v1::CreateMigrationRequest { id: id.into(), spec: Some(spec), ..Default::default() };
        let result = pair.source.client().await.create_migration(request).await;
        let (code, reason) = match id {
            "newer" => (Code::FailedPrecondition, "PROTOCOL_VERSION"),
            _ => (Code::Internal, "PEER_PROTOCOL"),
        };
        assert_refused(result.map(|answer| answer.into_inner().migration.unwrap()), code, reason, part);
    }
}

/// To a socket on this host that is not an agent's.
fn twist_to_foreign_socket(response: &mut v1::NegotiateSessionResponse) {
    response.fabric = v1::FabricKind::Shm.into();
    response.fabric_address = "/run/systemd/private".into();
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_of_one_session_and_die_with_their_region_and_with_it() {
    let pair = Pair::start();
    let guest = idle();
    let receivers = [guest.destination().start().unwrap(), guest.destination().start().unwrap()];
    let mut sessions = Vec::new();
    for (id, receiver) in ["one", "two"].into_iter().zip(&receivers) {
        let mut request = negotiation(&pair, &guest.qmp_path(), &receiver.qmp_path()).await;
        request.migration_id = id.into();
        sessions.push(Session::open(pair.destination.grpc, request).await);
    }
    let (mut two, mut one) = (sessions.pop().unwrap(), sessions.pop().unwrap());
    assert_ne!(one.token, two.token);
    let (ones, twos) = (one.register(0..64, WINDOW_BYTES).await, two.register(0..64, WINDOW_BYTES).await);
    // Of 128 random keys no two are near one another: by chance in one of 2^31 runs.
    let mut all = [ones.clone(), twos.clone()].concat();
    all.sort_unstable();
    let nearest = all.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap();
    assert!(nearest > 1 << 20, "keys can be guessed from others: {nearest} apart");

    let mut link = one.link().unwrap();
    link.write_page(ones[3], 3 * WINDOW_BYTES).unwrap();
    link.write_page(ones[5], 5 * WINDOW_BYTES + 4096).unwrap();
    assert_eq!(link.write_page(ones[5], 6 * WINDOW_BYTES), Err(OUT_OF_BOUNDS));
    // The other session's key, at a place that this session has registered too.
    assert_eq!(one.link().unwrap().write_page(twos[3], 3 * WINDOW_BYTES), Err(UNKNOWN_KEY));
    let status =
        open(pair.destination.grpc, "one", two.token.clone()).await.expect_err("it is the other's token");
    assert_status(&status, Code::PermissionDenied, "SESSION_TOKEN", "is another");
    let status = open(pair.destination.grpc, "one", Vec::new()).await.expect_err("its source is connected");
    assert_status(&status, Code::PermissionDenied, "SESSION_TOKEN", "only with its token");

    // The broken links above were the first session's own doing, and its end.
    let ended = pair.destination.wait_end("one").await;
    assert_eq!(ended.error.unwrap().reason, "LINK_LOST");
    assert_eq!(one.link().unwrap_err(), UNKNOWN_SESSION);

    let mut link = two.link().unwrap();
    link.write_page(twos[9], 9 * WINDOW_BYTES).unwrap();
    two.order(Order::ReleaseWindows(v1::ReleaseWindows { ids: vec![9] })).await;
    two.hear(|answer| matches!(answer, Answer::WindowsReleased(_))).await;
    assert_eq!(link.write_page(twos[9], 9 * WINDOW_BYTES), Err(UNKNOWN_KEY));
    two.abort("the test is over").await;
    assert_eq!(two.link().unwrap_err(), UNKNOWN_SESSION);
    assert_eq!(DataLink::open(two.data, &[0; 32]).unwrap_err(), UNKNOWN_SESSION);
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_no_source_gives_end_their_session_only() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let receiver = guest.destination().start().unwrap();
    let request = negotiation(&pair, &guest.qmp_path(), &receiver.qmp_path()).await;
    let window = |offset, length| v1::Window { id: 0, block: 0, offset, length };
    let register = |window| Order::RegisterWindows(v1::RegisterWindows { windows: vec![window] });
    let zero = |block, runs: &[u64]| Order::ZeroPages(v1::PageRuns { block, runs: runs.to_vec() });
    let state = |bytes| Order::DeviceState(v1::DeviceState { data: vec![0; bytes].into(), end: false });
    let breaches = [
        ("outside", register(window(1 << 40, 4096))),
        ("overflow", register(window(u64::MAX - 4095, 8192))),
        ("empty", register(window(0, 0))),
        ("block", zero(9, &[0, 1])),
        ("pages", zero(0, &[u64::MAX, 2])),
        ("half", zero(0, &[1, 1, 2])),
        ("many", Order::ReleaseWindows(v1::ReleaseWindows { ids: (0..20_000).collect() })),
        ("state", state(1 << 20)),
        ("round", Order::EndRound(v1::EndRound { round: 7 })),
        ("commit", Order::Commit(v1::Commit {})),
    ];
    for (id, breach) in breaches {
        let request = v1::NegotiateSessionRequest { migration_id: id.into(), ..request.clone() };
        let session = Session::open(pair.destination.grpc, request).await;
        session.order(breach).await;
        let ended = pair.destination.wait_end(id).await;
        let error = ended.error.unwrap();
        assert_eq!(
            (ended.state, error.reason.as_str()),
            (v1::MigrationState::Failed.into(), "PEER_REFUSED"),
            "{id}"
        );
        assert!(error.message.contains("source"), "{id}: {}", error.message);
    }

    // A farewell of many megabytes is kept in short.
    let id = "farewell";
    let request = v1::NegotiateSessionRequest { migration_id: id.into(), ..request.clone() };
    let mut session = Session::open(pair.destination.grpc, request).await;
    session.abort(&"x".repeat(8 << 20)).await;
    let ended = pair.destination.wait_end(id).await;
    assert!((1536..1548).contains(&ended.error.unwrap().message.len()));

    // The destination was not harmed by any of them, nor does a source that stays on its line keep the guest.
    let good = parameters(v1::FabricKind::Tcp);
    let start = Instant::now();
    while let Err(status) = pair.create("good", &guest, &receiver, good).await {
        assert_status(&status, Code::FailedPrecondition, "QMP_BUSY", "one client at a time");
        assert!(start.elapsed() < PATIENCE, "the guest is kept by a session that has ended");
    }
    assert_eq!(pair.source.wait_end("good").await.state(), v1::MigrationState::Succeeded);
    assert_proves_itself(&receiver);
    drop(session);
}

#[tokio::test(flavor = "multi_thread")]
async fn source_that_stops_half_way_in_device_state_is_seen_to_go() {
    let pair = Pair::start();
    let guest = boot(proof(quiet()));
    let receiver = guest.destination().start().unwrap();
    let mut request = negotiation(&pair, &guest.qmp_path(), &receiver.qmp_path()).await;
    request.migration_id = "stuck".into();
    // A source of its own, which dies with everything that it has not said yet.
    let source = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let destination = pair.destination.grpc;
    let filling = source.spawn(async move {
        let session = Session::open(destination, request).await;
        // No VMM listens for it yet: the destination has to stop taking it.
        let state = || Order::DeviceState(v1::DeviceState { data: vec![0; 64 << 10].into(), end: false });
        for _ in 0..1000 {
            let ordered = tokio::time::timeout(Duration::from_secs(2), session.order(state())).await;
            if ordered.is_err() {
                return true;
            }
        }
        false
    });
    assert!(filling.await.unwrap(), "the destination takes device state without end");
    source.shutdown_background();
    let ended = pair.destination.wait_end("stuck").await;
    assert_eq!(ended.error.unwrap().reason, "PEER_LOST");
    pair.migrate("good", &guest, &receiver, parameters(v1::FabricKind::Tcp)).await;
    assert_proves_itself(&receiver);
}
