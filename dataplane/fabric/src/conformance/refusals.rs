use std::sync::Arc;

use ramferry_ram::{Access, BlockIndex, BlockRange};

use super::fixture::{Drive, Fixture, Pair, TestMemory, range, transfer};
use crate::{
    AccessFault, Domain, InvalidOperation, LinkError, MAX_TRANSFER_BYTES, OpId, Place, PostError, RegionKey,
    RegisterError, Rights, SessionToken, Transfer,
};

const REGION_BYTES: u64 = 64 << 10;

/// Posts `op`, which the peer must refuse for `fault`: the link dies of it, the
/// fence after it fails, no byte changes, and another link works.
fn expect_refusal<F: Fixture>(pair: &Pair<'_, F>, is_read: bool, op: Transfer, fault: AccessFault) {
    let before = (pair.source.all(), pair.destination.all());
    let mut drive = pair.link();
    if is_read { drive.read(op) } else { drive.write(op) }.expect("accepted");
    let fenced = drive.fence(u64::MAX);
    drive.drain();
    match fenced {
        Ok(()) => assert!(drive.result(u64::MAX).is_err(), "the fence after a refused operation fails"),
        Err(error) => assert!(matches!(error, PostError::Dead(_)), "{error}"),
    }
    if is_read {
        assert!(drive.result(op.id.0).is_err(), "a refused read fails");
    }
    let reason = drive.link.is_dead().expect("a dead link").clone();
    assert!(
        [fault, AccessFault::Unspecified].map(LinkError::RemoteAccess).contains(&reason),
        "refused for {fault:?}, but it says {reason:?}"
    );
    assert_eq!(drive.fence(1), Err(PostError::Dead(reason.clone())));
    assert_eq!(drive.link.wait(std::time::Duration::ZERO), Err(reason));
    drive.link.close();
    assert!(before == (pair.source.all(), pair.destination.all()), "no byte changed");
    expect_working(pair);
}

/// A new link of the session works, in a range of its own.
fn expect_working<F: Fixture>(pair: &Pair<'_, F>) {
    let place = BlockRange { block: BlockIndex(1), offset: 512 << 10, length: 4096 };
    let (local, remote) = pair.register(place, Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    drive.write(transfer(1, local, remote, place.offset, 4096)).expect("accepted");
    drive.fence(2).expect("accepted");
    drive.succeed();
    assert!(pair.source.bytes(place) == pair.destination.bytes(place));
    drive.link.close();
    pair.source_domain.deregister(local.key).expect("deregistered");
    pair.destination_domain.deregister(remote.key).expect("deregistered");
}

/// A key that no region ever had is refused.
pub fn unknown_key_is_refused<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    for forged in [remote.key.0 ^ 1, remote.key.0.wrapping_add(1 << 16), 0, u64::MAX] {
        let op = Transfer {
            remote: Place { key: RegionKey(forged), offset: 0 },
            ..transfer(1, local, remote, 0, 4096)
        };
        expect_refusal(&pair, false, op, AccessFault::UnknownKey);
        expect_refusal(&pair, true, op, AccessFault::UnknownKey);
    }
}

/// A key is dead once its region was deregistered, also when its range is
/// registered again.
pub fn deregistered_key_is_refused<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, stale) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    pair.destination_domain.deregister(stale.key).expect("deregistered");
    expect_refusal(&pair, false, transfer(1, local, stale, 0, 4096), AccessFault::UnknownKey);
    let again = pair.destination_domain.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    assert_ne!(again.expect("registered again").key, stale.key);
    expect_refusal(&pair, false, transfer(1, local, stale, 0, 4096), AccessFault::UnknownKey);
}

/// The poster's own keys are no keys of the peer.
pub fn local_key_is_no_remote_key<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let both = Rights { remote_write: true, remote_read: true };
    let local = pair.source_domain.register(range(0, REGION_BYTES), both).expect("registered");
    expect_refusal(&pair, false, transfer(1, local, local, 0, 4096), AccessFault::UnknownKey);
}

/// A write that begins or ends outside the region is refused whole.
pub fn write_out_of_bounds_is_refused<F: Fixture>(fixture: &F) {
    out_of_bounds(fixture, false);
}

/// A read that begins or ends outside the region is refused whole.
pub fn read_out_of_bounds_is_refused<F: Fixture>(fixture: &F) {
    out_of_bounds(fixture, true);
}

fn out_of_bounds<F: Fixture>(fixture: &F, is_read: bool) {
    let pair = Pair::new(fixture);
    let both = Rights { remote_write: true, remote_read: true };
    let local = pair.source_domain.register(range(0, 4 * REGION_BYTES), Rights::LOCAL).expect("registered");
    let remote =
        pair.destination_domain.register(range(REGION_BYTES, REGION_BYTES), both).expect("registered");
    for (offset, length) in [
        (REGION_BYTES - 1, 1),
        (REGION_BYTES - 1, 4096),
        (2 * REGION_BYTES, 1),
        (2 * REGION_BYTES - 4095, 4096),
        (REGION_BYTES, REGION_BYTES as u32 + 1),
    ] {
        let op = transfer(1, local, remote, offset, length);
        expect_refusal(&pair, is_read, op, AccessFault::OutOfBounds);
    }
}

/// Offsets that overflow, or lie beyond the block, are refused.
pub fn offset_beyond_the_block_is_refused<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    for offset in [2 << 20, u64::MAX, u64::MAX - 4095, 1 << 63] {
        let op =
            Transfer { remote: Place { key: remote.key, offset }, ..transfer(1, local, remote, 0, 4096) };
        expect_refusal(&pair, false, op, AccessFault::OutOfBounds);
    }
}

/// A region that may only be read is not written.
pub fn write_without_the_right_is_refused<F: Fixture>(fixture: &F) {
    for rights in [Rights::LOCAL, Rights::REMOTE_READ] {
        let pair = Pair::new(fixture);
        let (local, remote) = pair.register(range(0, REGION_BYTES), rights);
        expect_refusal(&pair, false, transfer(1, local, remote, 0, 4096), AccessFault::Rights);
    }
}

/// A region that may only be written is not read.
pub fn read_without_the_right_is_refused<F: Fixture>(fixture: &F) {
    for rights in [Rights::LOCAL, Rights::REMOTE_WRITE] {
        let pair = Pair::new(fixture);
        let (local, remote) = pair.register(range(0, REGION_BYTES), rights);
        expect_refusal(&pair, true, transfer(1, local, remote, 0, 4096), AccessFault::Rights);
    }
}

/// A token that no session has opens no link.
pub fn wrong_token_is_refused<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let session = pair.session.as_ref().expect("a session");
    let mut bytes = *pair.token.as_bytes();
    bytes[31] ^= 1;
    let random = SessionToken::random().expect("randomness");
    for token in [SessionToken::from_bytes(bytes), random, SessionToken::from_bytes([0; 32])] {
        let refused = fixture.connect(session, &token, Arc::clone(&pair.source_domain));
        assert_eq!(refused.err(), Some(LinkError::UnknownSession));
    }
    expect_working(&pair);
}

/// What can never be carried out is not accepted, and harms the link in no way.
pub fn invalid_operations_are_not_accepted<F: Fixture>(fixture: &F) {
    let source = TestMemory::patterned(1, fixture.source_access());
    let pair = Pair::between(fixture, source, TestMemory::patterned(2, Access::ReadWrite));
    let both = Rights { remote_write: true, remote_read: true };
    let (local, remote) = pair.register(range(0, REGION_BYTES), both);
    let good = transfer(1, local, remote, 0, 4096);
    let invalid = |fault| Err(PostError::Invalid(InvalidOperation::Local(fault)));
    let mut drive = pair.link();
    let unknown = Transfer { local: Place { key: remote.key, offset: 0 }, ..good };
    assert_eq!(drive.write(unknown), invalid(AccessFault::UnknownKey));
    for offset in [REGION_BYTES - 4095, u64::MAX - 10] {
        let outside = Transfer { local: Place { key: local.key, offset }, ..good };
        assert_eq!(drive.write(outside), invalid(AccessFault::OutOfBounds));
    }
    if fixture.source_access() == Access::Read {
        assert_eq!(drive.read(good), invalid(AccessFault::Rights));
    }
    for length in [0, MAX_TRANSFER_BYTES + 1] {
        let refused = Err(PostError::Invalid(InvalidOperation::Length { length }));
        assert_eq!(drive.write(Transfer { length, ..good }), refused);
    }
    pair.source_domain.deregister(local.key).expect("deregistered");
    assert_eq!(drive.write(good), invalid(AccessFault::UnknownKey));
    let local = pair.source_domain.register(range(0, REGION_BYTES), Rights::LOCAL).expect("registered");
    drive.write(Transfer { local: Place { key: local.key, offset: 0 }, ..good }).expect("accepted");
    drive.fence(2).expect("accepted");
    drive.succeed();
    drive.link.close();
}

/// A session has as many links at once as were agreed on.
pub fn more_links_than_agreed_are_refused<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let first = pair.link();
    let second = pair.link();
    assert_eq!(pair.try_link().err(), Some(LinkError::TooManyLinks));
    first.link.close();
    // A place that was given back can be had again.
    pair.link().link.close();
    second.link.close();
}

/// What cannot be registered is refused with the reason, and leaves nothing behind.
pub fn ranges_that_cannot_be_registered_are_refused<F: Fixture>(fixture: &F) {
    let read_only = fixture.domain(TestMemory::patterned(1, Access::Read).memory);
    let refused = read_only.register(range(0, 4096), Rights::REMOTE_WRITE);
    assert!(matches!(refused, Err(RegisterError::ReadOnly)), "{refused:?}");
    let domain = fixture.domain(TestMemory::patterned(1, Access::ReadWrite).memory);
    let register = |range| domain.register(range, Rights::REMOTE_WRITE);
    for outside in [
        range(0, 0),
        range(0, (2 << 20) + 4096),
        range(2 << 20, 4096),
        range(u64::MAX - 4095, 8192),
        BlockRange { block: BlockIndex(2), offset: 0, length: 4096 },
    ] {
        assert!(matches!(register(outside), Err(RegisterError::Range { .. })), "{outside:?}");
    }
    for misaligned in [range(1, 4096), range(0, 4097)] {
        assert!(matches!(register(misaligned), Err(RegisterError::Misaligned { .. })), "{misaligned:?}");
    }
    assert_eq!(domain.pinned_bytes(), 0);
    let region = register(range(8192, 8192)).expect("registered");
    for overlap in [range(8192, 8192), range(0, 12288), range(12288, 8192), range(0, 1 << 20)] {
        assert!(matches!(register(overlap), Err(RegisterError::Overlap { .. })), "{overlap:?}");
    }
    assert_eq!(domain.pinned_bytes(), 8192);
    for beside in [range(0, 8192), range(16384, 4096), BlockRange { block: BlockIndex(1), ..region.range }] {
        register(beside).expect("beside the region");
    }
    let unknown = domain.deregister(RegionKey(region.key.0 ^ 1));
    assert!(matches!(unknown, Err(RegisterError::UnknownKey)), "{unknown:?}");
}

/// Operations posted around a refused one complete exactly once each.
pub fn operations_before_a_refused_one_complete_once<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let mut drive: Drive = pair.link();
    let forged = Place { key: RegionKey(remote.key.0 ^ 2), offset: 0 };
    for id in 0..100_u64 {
        let mut op = transfer(id, local, remote, id % 16 * 4096, 4096);
        if id == 50 {
            op.remote = forged;
        }
        match drive.write(op) {
            Ok(()) => {}
            Err(PostError::Dead(_)) if id > 50 => break,
            Err(error) => panic!("operation {id}: {error}"),
        }
        if id == 10 {
            drive.fence(1000).expect("accepted");
        }
        if id == 49 {
            // Where the peer's device refuses, its answers to earlier fences are lost with the link.
            drive.drain();
        }
    }
    let fenced = drive.fence(1001);
    drive.drain();
    assert_eq!(drive.result(1000), &Ok(()), "the fence before the refused write");
    match fenced {
        Ok(()) => assert!(drive.result(1001).is_err(), "the fence after it fails"),
        Err(error) => assert!(matches!(error, PostError::Dead(_)), "{error}"),
    }
    let mut ids: Vec<OpId> = drive.completions.iter().map(|completion| completion.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), drive.accepted(), "each operation completed once");
    drive.link.close();
}
