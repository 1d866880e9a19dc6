use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fixture::{Drive, Fixture, Pair, TestMemory, eventually, range, transfer};
use crate::faulty::{Faults, FaultyLink};
use crate::{Domain, LinkError, PostError, Rights};

const REGION_BYTES: u64 = 256 << 10;
/// What "bounded" is held to.
const BOUND: Duration = Duration::from_secs(5);

/// A region without operations is deregistered at once, and its range can be
/// registered again, under another key.
pub fn idle_region_is_deregistered<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let mut drive = pair.link();
    let mut keys = Vec::new();
    for round in 0..20_u64 {
        let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
        assert_eq!(pair.destination_domain.pinned_bytes(), REGION_BYTES);
        drive.write(transfer(round, local, remote, 0, 4096)).expect("accepted");
        drive.fence(100 + round).expect("accepted");
        drive.succeed();
        let start = Instant::now();
        pair.source_domain.deregister(local.key).expect("deregistered");
        pair.destination_domain.deregister(remote.key).expect("deregistered");
        assert!(start.elapsed() < BOUND);
        assert!(pair.destination_domain.deregister(remote.key).is_err(), "a dead key");
        assert_eq!(pair.destination_domain.pinned_bytes(), 0);
        assert_eq!(pair.source_domain.pinned_bytes(), 0);
        keys.extend([local.key, remote.key]);
    }
    let count = keys.len();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), count, "no key is used twice");
    drive.link.close();
}

/// Deregistering waits for the operations under way, at either side.
pub fn region_under_way_is_deregistered_after_its_operations<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    for piece in 0..64 {
        drive.write(transfer(piece, local, remote, piece * 4096, 4096)).expect("accepted");
    }
    std::thread::scope(|scope| {
        let domain = &pair.source_domain;
        let deregistered = scope.spawn(move || domain.deregister(local.key));
        eventually("the local key is dead", || {
            // Not polled while the queue has room: the writes stay under way.
            let probe = drive.try_write(transfer(1000, local, remote, 0, 1));
            if probe == Err(PostError::Full) {
                drive.poll();
            }
            matches!(probe, Err(PostError::Invalid(_)))
        });
        drive.drain();
        deregistered.join().expect("no panic").expect("deregistered");
    });
    drive.fence(2000).expect("accepted");
    drive.succeed();
    pair.destination_domain.deregister(remote.key).expect("deregistered");
    let after = pair.destination.bytes(range(0, REGION_BYTES));
    assert!(after == pair.source.bytes(range(0, REGION_BYTES)), "everything was written before");
    drive.link.close();
}

/// Other regions of the peer are no concern of a link.
pub fn link_works_on_after_its_peer_deregisters_another_region<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let (_, other) = pair.register(range(REGION_BYTES, REGION_BYTES), Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    drive.write(transfer(1, local, remote, 0, 4096)).expect("accepted");
    pair.destination_domain.deregister(other.key).expect("deregistered");
    drive.write(transfer(2, local, remote, 4096, 4096)).expect("accepted");
    drive.fence(3).expect("accepted");
    drive.succeed();
    drive.link.close();
}

/// When the peer is lost, everything accepted completes, and the link is dead.
pub fn peer_lost_mid_write_completes_every_operation<F: Fixture>(fixture: &F) {
    let mut pair = Pair::new(fixture);
    let both = Rights { remote_write: true, remote_read: true };
    let (local, remote) = pair.register(range(0, REGION_BYTES), both);
    let mut drive = pair.link();
    for id in 0..40_u64 {
        drive.write(transfer(id, local, remote, 0, REGION_BYTES as u32)).expect("accepted");
        if id % 10 == 5 {
            drive.read(transfer(100 + id, local, remote, 0, 4096)).expect("accepted");
        }
        if id == 20 {
            drive.poll();
        }
    }
    drive.fence(1000).expect("accepted");
    let start = Instant::now();
    pair.session = None;
    assert!(start.elapsed() < BOUND, "ending a session is bounded");
    drive.drain();
    if drive.result(1000).is_ok() {
        // It was answered before the end, as it may be where the peer's CPU takes no part in writes.
        assert!(
            drive.completions.iter().all(|completion| completion.result.is_ok()),
            "all before it is placed"
        );
    }
    eventually("the link is dead", || {
        drive.poll();
        drive.link.is_dead().is_some()
    });
    assert!(matches!(drive.fence(1001), Err(PostError::Dead(_))));
    pair.source_domain.deregister(local.key).expect("nothing is under way");
    pair.destination_domain.deregister(remote.key).expect("nothing is under way");
    drive.link.close();
}

/// A peer that does nothing stops neither polling nor waiting nor closing.
pub fn stalled_peer_blocks_nothing<F: Fixture>(fixture: &F) {
    let source = TestMemory::patterned(1, fixture.source_access());
    let domain = fixture.domain(Arc::clone(&source.memory));
    let Some((link, peer)) = fixture.stalled(Arc::clone(&domain)) else {
        eprintln!("SKIPPED: with {} the peer takes no part in a transfer", fixture.kind());
        return;
    };
    let local = domain.register(range(0, 2 << 20), Rights::LOCAL).expect("registered");
    let mut drive = Drive::new(link);
    drive.fence(0).expect("accepted");
    // More than any socket buffers.
    let mut full = false;
    let start = Instant::now();
    while !full && start.elapsed() < BOUND {
        let op = transfer(1, local, local, 0, 2 << 20);
        match drive.try_write(op) {
            Ok(()) => {}
            Err(PostError::Full) => full = true,
            Err(error) => panic!("not accepted: {error}"),
        }
        drive.poll();
    }
    assert!(full, "a queue that nobody takes from fills up");
    let start = Instant::now();
    drive.link.wait(Duration::from_millis(50)).expect("a live link waits");
    assert!(start.elapsed() < BOUND);
    assert_eq!(drive.link.is_dead(), None);
    assert!(drive.completions.len() < drive.accepted(), "operations are under way");
    let start = Instant::now();
    drive.link.close();
    assert!(start.elapsed() < BOUND, "closing is bounded");
    domain.deregister(local.key).expect("nothing is under way after the link's end");
    drop(peer);
}

/// What one session registered is out of another's reach, and its end no
/// concern of the other's.
pub fn sessions_are_isolated<F: Fixture>(fixture: &F) {
    let one = Pair::new(fixture);
    let other = Pair::new(fixture);
    let (local, remote) = one.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let (other_local, other_remote) = other.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let before = other.destination.all();
    let mut intruder = one.link();
    let mut bystander = other.link();
    intruder.write(transfer(1, local, other_remote, 0, 4096)).expect("accepted");
    intruder.fence(2).expect("accepted");
    intruder.drain();
    assert!(matches!(intruder.link.is_dead(), Some(LinkError::RemoteAccess(_))));
    assert!(other.destination.all() == before, "the other session's memory did not change");
    drop(intruder);
    let mut again = one.link();
    again.write(transfer(1, local, remote, 0, 4096)).expect("accepted");
    again.fence(2).expect("accepted");
    again.succeed();
    drop(one);
    bystander.write(transfer(1, other_local, other_remote, 0, 4096)).expect("accepted");
    bystander.fence(2).expect("accepted");
    bystander.succeed();
    bystander.link.close();
}

/// After the session's end nothing reaches the memory, by any link.
pub fn keys_are_dead_after_the_session_ends<F: Fixture>(fixture: &F) {
    let mut pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    drive.fence(0).expect("accepted");
    drive.succeed();
    let session = fixture.admit(
        crate::SessionToken::random().expect("randomness"),
        Arc::clone(&pair.destination_domain),
        1,
    );
    pair.session = None;
    let before = pair.destination.all();
    let posted = drive.write(transfer(1, local, remote, 0, 4096));
    if posted.is_ok() {
        let _ = drive.fence(2);
    }
    drive.drain();
    eventually("the link is dead", || {
        drive.poll();
        drive.link.is_dead().is_some()
    });
    assert!(pair.destination.all() == before, "nothing was written");
    let again = fixture.connect(&session, &pair.token, Arc::clone(&pair.source_domain));
    assert_eq!(again.err(), Some(LinkError::UnknownSession), "the token is dead");
    drive.link.close();
}

/// A link that takes leave is no failure of its session.
pub fn closed_link_is_no_failure<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    for _ in 0..10 {
        let mut drive = pair.link();
        drive.fence(1).expect("accepted");
        drive.succeed();
        drive.link.close();
    }
    let session = pair.session.as_ref().expect("a session");
    // Two links at once are its limit: the third proves that the first is over.
    let links = [pair.link(), pair.link()];
    assert_eq!(fixture.failure(session), None);
    links.into_iter().for_each(|drive| drive.link.close());
}

/// A link that vanishes is a failure of its session.
pub fn dropped_link_is_a_failure<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    drop(pair.link());
    let session = pair.session.as_ref().expect("a session");
    eventually("the session says so", || fixture.failure(session).is_some());
}

/// Whatever is injected, every operation that was accepted completes once.
pub fn injected_faults_complete_every_operation_once<F: Fixture>(fixture: &F) {
    let plans = [
        Faults { die_after_operations: Some(1), ..Faults::default() },
        Faults { die_after_operations: Some(17), delay_polls: 5, ..Faults::default() },
        Faults { die_after_bytes: Some(100_000), ..Faults::default() },
        Faults { lose_operation: Some(9), reverse_completions: true, ..Faults::default() },
        Faults { delay_polls: 4, reverse_completions: true, ..Faults::default() },
        Faults { die_after_bytes: Some(1), refuse_every: Some(2), ..Faults::default() },
        Faults { delay_polls: 9, refuse_every: Some(3), ..Faults::default() },
    ];
    for faults in plans {
        let pair = Pair::new(fixture);
        let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
        let dies = faults.die_after_operations.is_some()
            || faults.die_after_bytes.is_some()
            || faults.lose_operation.is_some();
        let link = pair.try_link().expect("a link");
        let mut drive = Drive::new(Box::new(FaultyLink::new(link, faults)));
        for id in 0..200_u64 {
            let posted = drive.write(transfer(id, local, remote, id % 64 * 4096, 4096));
            match posted {
                Ok(()) => {}
                Err(PostError::Dead(_)) if dies => break,
                Err(error) => panic!("operation {id}: {error}"),
            }
            drive.poll();
        }
        let fenced = drive.fence(1000);
        drive.drain();
        assert_eq!(drive.link.is_dead().is_some(), dies);
        if dies {
            assert!(fenced.is_err(), "a dead link takes nothing");
            assert!(drive.completions.iter().any(|completion| completion.result.is_err()));
            drop(drive);
            drive = pair.link();
            drive.fence(1).expect("another link works");
        }
        drive.succeed();
        pair.source_domain.deregister(local.key).expect("nothing is under way");
        pair.destination_domain.deregister(remote.key).expect("nothing is under way");
        drive.link.close();
    }
}
