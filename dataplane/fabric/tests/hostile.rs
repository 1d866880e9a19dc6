//! Peers that do not keep to the protocol, and memory that vanishes: at both
//! ends, nothing is harmed but the connection.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up is to fail")]

mod fixtures;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fixtures::{LOOPBACK, Shm, TIMEOUT, Tcp};
use proptest::prelude::*;
use ramferry_fabric::conformance::{Drive, Fixture, Pair, TestMemory, eventually};
use ramferry_fabric::{
    AccessFault, Domain, LinkError, OpError, OpId, Place, Region, RegionKey, Rights, SessionToken, TcpDomain,
    Transfer, shm, tcp,
};
use ramferry_ram::{Access, BlockIndex, BlockRange};

const WRITE: u8 = 1;
const READ: u8 = 2;
const FENCE: u8 = 3;
const GOODBYE: u8 = 4;
const READ_DATA: u8 = 0x81;
const FENCE_ACK: u8 = 0x82;
const ERROR: u8 = 0x83;
const REGION: BlockRange = BlockRange { block: BlockIndex(0), offset: 4096, length: 64 << 10 };

fn hello(token: &SessionToken) -> Vec<u8> {
    let mut hello = b"ramferry\x01\0\x03\0\0\0\0\0".to_vec();
    hello.extend_from_slice(token.as_bytes());
    hello
}

fn frame(opcode: u8, sequence: u64, key: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut frame = vec![opcode, 0, 0, 0];
    frame.extend_from_slice(&length.to_le_bytes());
    for field in [sequence, key, offset] {
        frame.extend_from_slice(&field.to_le_bytes());
    }
    frame
}

fn dial(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

/// A connection whose token was accepted.
fn enter(pair: &Pair<'_, Tcp>) -> TcpStream {
    let address = pair.session.as_ref().unwrap().address;
    let start = Instant::now();
    loop {
        let mut stream = dial(address);
        stream.write_all(&hello(&pair.token)).unwrap();
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).unwrap();
        match reply[10] {
            0 => return stream,
            2 if start.elapsed() < TIMEOUT => std::thread::yield_now(),
            verdict => panic!("verdict {verdict}"),
        }
    }
}

/// Everything that the peer says until it ends the connection.
fn hear_out(stream: &mut TcpStream) -> Vec<u8> {
    let mut heard = Vec::new();
    match stream.read_to_end(&mut heard) {
        Ok(_) => heard,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => heard,
        Err(error) => panic!("the connection was not ended: {error}"),
    }
}

fn expect_working<F: Fixture>(pair: &Pair<'_, F>) {
    let place = BlockRange { block: BlockIndex(1), offset: 8192, length: 4096 };
    let (local, remote) = pair.register(place, Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    drive.write(write(1, local, remote, place.offset, 4096)).unwrap();
    drive.fence(2).unwrap();
    drive.succeed();
    assert!(pair.source.bytes(place) == pair.destination.bytes(place));
    drive.link.close();
    pair.source_domain.deregister(local.key).unwrap();
    pair.destination_domain.deregister(remote.key).unwrap();
}

fn write(id: u64, local: Region, remote: Region, offset: u64, length: u32) -> Transfer {
    let place = |region: Region| Place { key: region.key, offset };
    Transfer { id: OpId(id), local: place(local), remote: place(remote), length }
}

#[test]
fn refused_frames_are_answered_with_the_cause() {
    let pair = Pair::new(&Tcp);
    let readable = pair.destination_domain.register(REGION, Rights::REMOTE_READ).unwrap().key.0;
    let mut nonzero = frame(FENCE, 1, 0, 0, 0);
    nonzero[1] = 1;
    for (bytes, cause) in [
        (frame(WRITE, 9, readable ^ 1, 4096, 16), 1),
        (frame(READ, 9, readable, 0, 16), 2),
        (frame(READ, 9, readable, u64::MAX - 3, 16), 2),
        (frame(WRITE, 9, readable, 4096, 16), 3),
        (frame(WRITE, 9, readable, 4096, u32::MAX), 4),
        (frame(READ, 9, readable, 4096, 0), 4),
        (frame(FENCE, 9, readable, 0, 0), 16),
        (frame(GOODBYE, 9, 0, 0, 0), 16),
        (nonzero, 16),
        (frame(0, 9, 0, 0, 0), 17),
        (frame(0x7f, 9, 0, 0, 0), 17),
        (frame(READ_DATA, 9, 0, 0, 16), 18),
        (frame(FENCE_ACK, 9, 0, 0, 0), 18),
    ] {
        let mut stream = enter(&pair);
        stream.write_all(&bytes).unwrap();
        // More than the peer will read: the answer must be heard nevertheless.
        stream.write_all(&[0xee; 4096]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let answer = hear_out(&mut stream);
        assert_eq!(answer.len(), 32, "one frame answers {bytes:?}");
        assert_eq!(answer[0], ERROR);
        assert_eq!(u16::from_le_bytes([answer[2], answer[3]]), cause, "{bytes:?}");
    }
    let failure = pair.session.as_ref().unwrap().admission.failure();
    assert_eq!(failure, Some(LinkError::RefusedPeer(AccessFault::UnknownKey)), "the first is kept");
    expect_working(&pair);
}

#[test]
fn other_versions_are_told_so() {
    let pair = Pair::new(&Tcp);
    let mut stream = dial(pair.session.as_ref().unwrap().address);
    let mut hello = hello(&pair.token);
    hello[8] = 2;
    stream.write_all(&hello).unwrap();
    assert_eq!(hear_out(&mut stream), b"ramferry\x01\0\x03\0\0\0\0\0");
}

#[test]
fn strangers_keep_nobody_out() {
    let pair = Pair::new(&Tcp);
    let address = pair.session.as_ref().unwrap().address;
    let idle: Vec<TcpStream> = (0..200).map(|_| dial(address)).collect();
    let start = Instant::now();
    expect_working(&pair);
    assert!(start.elapsed() < Duration::from_secs(4), "nobody waits for strangers to time out");
    let mut first = &idle[0];
    assert_eq!(first.read(&mut [0]).unwrap(), 0, "the oldest stranger was sent away");
    for mut stranger in idle {
        // Whichever were sent away already.
        let _ = stranger.write_all(b"GET / HTTP/1.1\r\nHost: this is no way to talk to us\r\n\r\n");
    }
    expect_working(&pair);
}

#[test]
fn stranger_that_says_nothing_is_sent_away() {
    let pair = Pair::new(&Tcp);
    let mut stream = dial(pair.session.as_ref().unwrap().address);
    stream.write_all(b"ramferry").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn deregistering_does_not_wait_for_a_peer_that_stalls() {
    let pair = Pair::new(&Tcp);
    let region = pair.destination_domain.register(REGION, Rights::REMOTE_WRITE).unwrap();
    let mut stream = enter(&pair);
    stream.write_all(&frame(WRITE, 1, region.key.0, REGION.offset, 4096)).unwrap();
    stream.write_all(&[1; 100]).unwrap();
    let first = BlockRange { length: 100, ..REGION };
    eventually("the first bytes are placed", || pair.destination.bytes(first) == [1; 100]);
    let start = Instant::now();
    pair.destination_domain.deregister(region.key).unwrap();
    assert!(start.elapsed() < Duration::from_secs(3));
    let answer = hear_out(&mut stream);
    assert_eq!((answer[0], answer[2]), (ERROR, 6));
    let failure = pair.session.as_ref().unwrap().admission.failure();
    eventually("the session says so", || {
        failure.is_some() || pair.session.as_ref().unwrap().admission.failure().is_some()
    });
    expect_working(&pair);
}

#[test]
fn session_ends_at_once_while_a_peer_stalls() {
    let mut pair = Pair::new(&Tcp);
    let region = pair.destination_domain.register(REGION, Rights::REMOTE_WRITE).unwrap();
    let mut stream = enter(&pair);
    stream.write_all(&frame(WRITE, 1, region.key.0, REGION.offset, 4096)).unwrap();
    let start = Instant::now();
    pair.session = None;
    assert!(start.elapsed() < Duration::from_secs(1));
    pair.destination_domain.deregister(region.key).unwrap();
    assert_eq!(hear_out(&mut stream), []);
}

#[derive(Clone, Debug)]
enum Said {
    Noise(Vec<u8>),
    Frame { opcode: u8, knows_key: bool, key: u64, offset: u64, length: u32 },
}

fn any_said() -> impl Strategy<Value = Said> {
    let opcode = proptest::sample::select(vec![WRITE, READ, FENCE, GOODBYE, READ_DATA, FENCE_ACK, ERROR]);
    let offset = prop_oneof![0..200_000_u64, any::<u64>()];
    let length = prop_oneof![0..100_000_u32, any::<u32>()];
    prop_oneof![
        1 => proptest::collection::vec(any::<u8>(), 0..200).prop_map(Said::Noise),
        3 => (opcode, any::<bool>(), any::<u64>(), offset, length).prop_map(
            |(opcode, knows_key, key, offset, length)| Said::Frame { opcode, knows_key, key, offset, length }
        ),
    ]
}

#[test]
fn random_streams_leave_memory_and_other_sessions_alone() {
    let pair = Pair::new(&Tcp);
    let other = Pair::new(&Tcp);
    let readable = pair.destination_domain.register(REGION, Rights::REMOTE_READ).unwrap();
    let before = pair.destination.all();
    let config = ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let stream = (any::<bool>(), proptest::collection::vec(any_said(), 1..20));
    let outcome = runner.run(&stream, |(admitted, said)| {
        let address = pair.session.as_ref().unwrap().address;
        let mut stream = if admitted { enter(&pair) } else { dial(address) };
        for said in said {
            let bytes = match said {
                Said::Noise(bytes) => bytes,
                Said::Frame { opcode, knows_key, key, offset, length } => {
                    let key = if knows_key { readable.key.0 } else { key };
                    frame(opcode, 1, key, offset, length)
                }
            };
            // The peer may have had enough.
            if stream.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = stream.shutdown(std::net::Shutdown::Write);
        hear_out(&mut stream);
        prop_assert!(pair.destination.all() == before, "the memory did not change");
        Ok(())
    });
    outcome.unwrap();
    expect_working(&other);
    expect_working(&pair);
}

/// A peer that welcomes a link, hears one frame and answers with `answer`.
fn impostor(answer: Vec<u8>) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    let address = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.read_exact(&mut [0; 48]).unwrap();
        stream.write_all(b"ramferry\x01\0\0\0\0\0\0\0").unwrap();
        stream.read_exact(&mut [0; 32]).unwrap();
        stream.write_all(&answer).unwrap();
        // Until the link ends the connection.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    (address, thread)
}

/// What a link makes of `answer` to a read of 4096 bytes, and that it changed nothing.
fn answered(answer: Vec<u8>) -> LinkError {
    let memory = TestMemory::patterned(1, Access::ReadWrite);
    let before = memory.all();
    let domain = Arc::new(TcpDomain::new(Arc::clone(&memory.memory)).unwrap());
    let local = domain.register(REGION, Rights::LOCAL).unwrap();
    let (address, peer) = impostor(answer);
    let token = SessionToken::random().unwrap();
    let mut drive = Drive::new(tcp::connect(address, &token, domain, TIMEOUT).unwrap());
    drive.read(write(1, local, local, REGION.offset, 4096)).unwrap();
    drive.drain();
    assert!(drive.result(1).is_err());
    let error = drive.link.is_dead().unwrap().clone();
    drop(drive);
    peer.join().unwrap();
    assert!(memory.all() == before, "local memory did not change");
    error
}

#[test]
fn false_answers_kill_the_link_and_touch_no_memory() {
    for answer in [
        frame(FENCE_ACK, 1, 0, 0, 0),
        frame(READ_DATA, 2, 0, 0, 4096),
        frame(READ_DATA, 1, 0, 0, 4095),
        frame(READ_DATA, 1, 0, 0, 1 << 20),
        frame(READ_DATA, 1, 0, 0, u32::MAX),
        frame(READ_DATA, 1, 5, 0, 4096),
        frame(WRITE, 1, 1, 4096, 4096),
        frame(0, 0, 0, 0, 0),
        vec![0xff; 4096],
    ] {
        let error = answered([answer.clone(), vec![0xaa; 8192]].concat());
        assert!(matches!(error, LinkError::PeerProtocol(_)), "{answer:?}: {error}");
    }
}

#[test]
fn refusals_reach_the_operation_that_was_refused() {
    let mut refusal = frame(ERROR, 1, 0, 0, 0);
    refusal[2] = 3;
    assert_eq!(answered(refusal), LinkError::RemoteAccess(AccessFault::Rights));
    let mut complaint = frame(ERROR, 0, 0, 0, 0);
    complaint[2] = 16;
    assert!(matches!(answered(complaint), LinkError::OwnProtocol(_)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_answers_touch_no_memory(answer in proptest::collection::vec(any::<u8>(), 32..300)) {
        let _ = answered(answer);
    }
}

#[test]
fn unreachable_peers_are_named() {
    let memory = TestMemory::patterned(1, Access::Read);
    let domain = Arc::new(TcpDomain::new(Arc::clone(&memory.memory)).unwrap());
    let token = SessionToken::random().unwrap();
    // A port that was just given back.
    let address = TcpListener::bind(LOOPBACK).unwrap().local_addr().unwrap();
    let refused = tcp::connect(address, &token, Arc::clone(&domain), TIMEOUT).err().unwrap();
    assert!(matches!(&refused, LinkError::Connect { address: named, .. } if *named == address.to_string()));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nobody.sock");
    let refused = shm::connect(&path, &token, domain, TIMEOUT).err().unwrap();
    assert!(refused.to_string().contains("nobody.sock"), "{refused}");
}

#[test]
fn peer_that_never_answers_the_hello_is_given_up() {
    let listener = TcpListener::bind(LOOPBACK).unwrap();
    let memory = TestMemory::patterned(1, Access::Read);
    let domain = Arc::new(TcpDomain::new(Arc::clone(&memory.memory)).unwrap());
    let token = SessionToken::random().unwrap();
    let limit = Duration::from_millis(100);
    let refused = tcp::connect(listener.local_addr().unwrap(), &token, domain, limit).err();
    assert!(matches!(refused, Some(LinkError::TimedOut { .. })), "{refused:?}");
}

fn truncate<F: Fixture>(pair: &Pair<'_, F>, at_source: bool) {
    let memory = if at_source { &pair.source } else { &pair.destination };
    rustix::fs::ftruncate(memory.memory.file(BlockIndex(0)), 4096).unwrap();
}

fn truncated_destination_is_reported<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(REGION, Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    truncate(&pair, false);
    drive.write(write(1, local, remote, REGION.offset, 64 << 10)).unwrap();
    drive.fence(2).unwrap();
    drive.drain();
    let gone = OpError::RemoteAccess(AccessFault::MemoryGone);
    let told = LinkError::RemoteAccess(AccessFault::MemoryGone);
    assert_eq!(drive.link.is_dead(), Some(&told));
    assert!(drive.result(2).is_err());
    assert!([Ok(()), Err(gone)].contains(drive.result(1)), "{:?}", drive.result(1));
    expect_working(&Pair::new(fixture));
}

fn truncated_source_is_reported<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(REGION, Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    truncate(&pair, true);
    drive.write(write(1, local, remote, REGION.offset, 64 << 10)).unwrap();
    drive.fence(2).unwrap();
    drive.drain();
    assert_eq!(drive.link.is_dead(), Some(&LinkError::LocalMemory));
    assert!(drive.result(2).is_err());
    expect_working(&Pair::new(fixture));
}

#[test]
fn destination_file_truncated_under_tcp_is_reported() {
    truncated_destination_is_reported(&Tcp);
}

#[test]
fn destination_file_truncated_under_shm_is_reported() {
    truncated_destination_is_reported(&Shm);
}

#[test]
fn source_file_truncated_under_tcp_is_reported() {
    truncated_source_is_reported(&Tcp);
}

#[test]
fn source_file_truncated_under_shm_is_reported() {
    truncated_source_is_reported(&Shm);
}

#[test]
fn different_blocks_are_refused_by_shm() {
    let source = TestMemory::with_blocks(1, Access::Read, &[8192]);
    let pair = Pair::between(&Shm, source, TestMemory::patterned(2, Access::ReadWrite));
    assert!(matches!(pair.try_link(), Err(LinkError::Layout(_))));
    let source = TestMemory::with_blocks(1, Access::Read, &[8192, 4096]);
    let pair = Pair::between(&Shm, source, TestMemory::patterned(2, Access::ReadWrite));
    assert!(matches!(pair.try_link(), Err(LinkError::Layout(_))));
}

#[test]
fn abandoned_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    // What an agent that was killed leaves behind.
    let kind = rustix::net::SocketType::SEQPACKET;
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, kind, None).unwrap();
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    drop(socket);
    let listener = shm::Listener::bind(&path).unwrap();
    assert!(matches!(shm::Listener::bind(&path), Err(LinkError::System { .. })), "somebody listens there");
    drop(listener);
    assert!(!path.exists());
    shm::Listener::bind(&path).unwrap();
}

#[test]
fn forged_keys_in_every_slot_are_refused_by_shm() {
    let pair = Pair::new(&Shm);
    let (local, remote) = pair.register(REGION, Rights::REMOTE_WRITE);
    let before = pair.destination.all();
    // The same slot, another key.
    for high in 1..64_u64 {
        let forged = Place { key: RegionKey(remote.key.0 ^ (high << 32)), offset: REGION.offset };
        let mut drive = pair.link();
        drive.write(Transfer { remote: forged, ..write(1, local, remote, REGION.offset, 4096) }).unwrap();
        drive.drain();
        assert_eq!(drive.result(1), &Err(OpError::RemoteAccess(AccessFault::UnknownKey)));
    }
    assert!(pair.destination.all() == before);
}

#[test]
fn links_of_a_session_outlive_the_listener() {
    let memory = || TestMemory::patterned(1, Access::ReadWrite).memory;
    let listener = tcp::Listener::bind(LOOPBACK).unwrap();
    let token = SessionToken::random().unwrap();
    let admission = listener.admit(token.clone(), Arc::new(TcpDomain::new(memory()).unwrap()), 1);
    let domain = Arc::new(TcpDomain::new(memory()).unwrap());
    let mut drive =
        Drive::new(tcp::connect(listener.local_addr(), &token, Arc::clone(&domain), TIMEOUT).unwrap());
    let address = listener.local_addr();
    drop(listener);
    drive.fence(1).unwrap();
    drive.succeed();
    assert_eq!(admission.connections(), 1);
    assert!(tcp::connect(address, &token, domain, TIMEOUT).is_err(), "nobody listens any more");
    drive.link.close();
    eventually("the link's end is seen", || admission.connections() == 0);
    assert_eq!(admission.failure(), None);
}

#[test]
fn other_users_are_refused_by_shm() {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::PermissionsExt;

    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can become another user");
        return;
    }
    let pair = Pair::new(&Shm);
    let (path, directory) = &pair.session.as_ref().unwrap().address;
    // The socket's own permissions would keep others out too.
    set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    set_permissions(path, Permissions::from_mode(0o666)).unwrap();
    let refused = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let nobody = rustix::thread::Uid::from_raw(65534);
            // This thread alone becomes another user.
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            shm::connect(path, &pair.token, Arc::clone(&pair.source_domain), TIMEOUT).err()
        });
        thread.join().unwrap()
    });
    assert!(refused.is_some(), "the token alone opens no link to another user");
    expect_working(&pair);
}

#[test]
fn keys_are_random_and_no_key_comes_back() {
    let memory = || TestMemory::patterned(1, Access::ReadWrite).memory;
    let domains: Vec<_> = (0..4).map(|_| TcpDomain::new(memory()).unwrap()).collect();
    let mut keys = Vec::new();
    for domain in &domains {
        for _ in 0..32 {
            let region = domain.register(REGION, Rights::REMOTE_WRITE).unwrap();
            domain.deregister(region.key).unwrap();
            keys.push(region.key.0);
        }
    }
    keys.sort_unstable();
    let nearest = keys.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap();
    // Of 128 random keys two are so near one another once in 2^31 runs.
    assert!(nearest > 1 << 20, "keys can be guessed from others: {nearest} apart");
}
