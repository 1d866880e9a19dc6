use std::collections::HashSet;

use ramferry_ram::{Access, BlockIndex, BlockRange};

use super::fixture::{Fixture, Pair, TestMemory, range, transfer};
use crate::{Domain, MAX_TRANSFER_BYTES, OpId, Place, Rights, Transfer};

const REGION_BYTES: u64 = 256 << 10;

/// A write changes its bytes in the peer's memory, and no other.
pub fn write_lands_exactly<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(4096, REGION_BYTES), Rights::REMOTE_WRITE);
    let block_1 = BlockRange { block: BlockIndex(1), offset: 0, length: 4096 };
    let (local_1, remote_1) = pair.register(block_1, Rights::REMOTE_WRITE);
    let mut expected = pair.destination.all();
    let source = pair.source.all();
    let mut drive = pair.link();
    let (first, last) = (4096, 4096 + REGION_BYTES);
    for (offset, length) in [
        (first, 1),
        (first + 4095, 2),
        (first + 5001, 12_345),
        (last - 1, 1),
        (last - 4096, 4096),
        (first, 65_536),
    ] {
        drive.write(transfer(offset, local, remote, offset, length)).expect("accepted");
        let (start, end) = (offset as usize, offset as usize + length as usize);
        expected[0][start..end].copy_from_slice(&source[0][start..end]);
    }
    drive.write(transfer(1, local_1, remote_1, 100, 1000)).expect("accepted");
    expected[1][100..1100].copy_from_slice(&source[1][100..1100]);
    // To another offset than its own.
    let moved = Transfer {
        id: OpId(2),
        local: Place { key: local.key, offset: first },
        remote: Place { key: remote_1.key, offset: 2048 },
        length: 777,
    };
    drive.write(moved).expect("accepted");
    expected[1][2048..2825].copy_from_slice(&source[0][first as usize..first as usize + 777]);
    drive.fence(3).expect("accepted");
    drive.succeed();
    assert!(pair.destination.all() == expected, "only the bytes that were written changed");
    assert!(pair.source.all() == source, "the source's memory did not change");
    drive.link.close();
}

/// More operations than any queue holds, each completed exactly once.
pub fn many_operations_through_a_full_queue_complete_once<F: Fixture>(fixture: &F) {
    const OPERATIONS: u64 = 3000;
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    let pieces = REGION_BYTES / 2048;
    for id in 0..OPERATIONS {
        drive.write(transfer(id, local, remote, id % pieces * 2048, 2048)).expect("accepted");
    }
    drive.fence(OPERATIONS).expect("accepted");
    drive.succeed();
    let ids: HashSet<OpId> = drive.completions.iter().map(|completion| completion.id).collect();
    assert_eq!(ids.len() as u64, OPERATIONS + 1, "every operation completed once");
    let written = range(0, REGION_BYTES);
    assert!(pair.source.bytes(written) == pair.destination.bytes(written), "every byte was written");
    drive.link.close();
}

/// When a fence has completed, everything before it is in the peer's memory.
pub fn fence_completes_after_everything_before_it<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    for round in 0..50_u64 {
        let stamp = vec![round as u8 + 1; REGION_BYTES as usize];
        pair.source.memory.span(range(0, REGION_BYTES)).expect("a span").write_from(&stamp);
        for piece in 0..4 {
            let length = REGION_BYTES / 4;
            drive.write(transfer(round, local, remote, piece * length, length as u32)).expect("accepted");
        }
        drive.fence(1000 + round).expect("accepted");
        drive.drain();
        assert_eq!(drive.result(1000 + round), &Ok(()));
        assert!(pair.destination.bytes(range(0, REGION_BYTES)) == stamp, "round {round} was placed");
    }
    drive.link.close();
}

/// A read that has completed is in local memory, and changed no other byte.
pub fn read_brings_the_bytes_of_the_peer<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_READ);
    let peer = pair.destination.all();
    let mut expected = pair.source.all();
    let mut drive = pair.link();
    for (offset, length) in [(0, 1), (4095, 2), (100_000, 70_001), (REGION_BYTES - 9, 9)] {
        drive.read(transfer(offset, local, remote, offset, length)).expect("accepted");
        let (start, end) = (offset as usize, offset as usize + length as usize);
        expected[0][start..end].copy_from_slice(&peer[0][start..end]);
    }
    drive.succeed();
    assert!(pair.source.all() == expected, "only the bytes that were read changed");
    assert!(pair.destination.all() == peer, "the peer's memory did not change");
    drive.link.close();
}

/// Reads on a link bring what writes before them on that link wrote.
pub fn reads_see_the_writes_before_them<F: Fixture>(fixture: &F) {
    let both = Rights { remote_write: true, remote_read: true };
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), both);
    let mut drive = pair.link();
    let written = pair.source.bytes(range(0, 64 << 10));
    for piece in 0..16_u64 {
        let (from, to) = (piece * 4096, REGION_BYTES - (piece + 1) * 4096);
        drive.write(transfer(1, local, remote, from, 4096)).expect("accepted");
        let back = Transfer {
            id: OpId(2),
            local: Place { key: local.key, offset: to },
            remote: Place { key: remote.key, offset: from },
            length: 4096,
        };
        drive.read(back).expect("accepted");
    }
    drive.fence(3).expect("accepted");
    drive.succeed();
    for piece in 0..16_usize {
        let back = pair.source.bytes(range(REGION_BYTES - (piece as u64 + 1) * 4096, 4096));
        assert!(back == written[piece * 4096..(piece + 1) * 4096], "piece {piece} came back");
    }
    drive.link.close();
}

/// Two links of one session share its regions.
pub fn two_links_of_a_session_write_side_by_side<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let drives = [pair.link(), pair.link()];
    std::thread::scope(|scope| {
        for (index, mut drive) in drives.into_iter().enumerate() {
            scope.spawn(move || {
                for piece in (index as u64..64).step_by(2) {
                    drive.write(transfer(piece, local, remote, piece * 4096, 4096)).expect("accepted");
                }
                drive.fence(1000).expect("accepted");
                drive.succeed();
                drive.link.close();
            });
        }
    });
    assert!(pair.source.bytes(range(0, REGION_BYTES)) == pair.destination.bytes(range(0, REGION_BYTES)));
}

/// The longest transfer allowed is carried out.
pub fn largest_transfer_lands<F: Fixture>(fixture: &F) {
    let length = u64::from(MAX_TRANSFER_BYTES);
    let pair = Pair::between(
        fixture,
        TestMemory::with_blocks(3, fixture.source_access(), &[length]),
        TestMemory::with_blocks(4, Access::ReadWrite, &[length]),
    );
    let (local, remote) = pair.register(range(0, length), Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    drive.write(transfer(1, local, remote, 0, MAX_TRANSFER_BYTES)).expect("accepted");
    drive.fence(2).expect("accepted");
    drive.succeed();
    assert!(pair.source.all() == pair.destination.all(), "every byte was written");
    pair.source_domain.deregister(local.key).expect("deregistered");
    drive.link.close();
}

/// Labels are the caller's: several operations may carry one.
pub fn operations_may_share_a_label<F: Fixture>(fixture: &F) {
    let pair = Pair::new(fixture);
    let (local, remote) = pair.register(range(0, REGION_BYTES), Rights::REMOTE_WRITE);
    let mut drive = pair.link();
    for piece in 0..8 {
        drive.write(transfer(7, local, remote, piece * 4096, 4096)).expect("accepted");
    }
    drive.fence(7).expect("accepted");
    drive.succeed();
    assert_eq!(drive.completions.len(), 9);
    assert!(drive.completions.iter().all(|completion| completion.id == OpId(7)));
    drive.link.close();
}
