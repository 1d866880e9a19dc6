//! A connection of the tcp fabric at the side that posts: answers of a peer that is not what it should be. The first
//! bytes choose the operations that are posted, the rest is what the peer says.
#![no_main]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use ramferry_fabric::{
    Domain, Link, MappedDomain, OpId, Place, Region, RegionKey, Rights, Transfer, fuzzing,
};
use ramferry_fuzz::{PAGE, memory, range};
use ramferry_ram::Memory;

/// Page 1 is registered; the pages beside it must never change.
struct Side {
    memory: Arc<Memory>,
    domain: Arc<MappedDomain>,
    region: Region,
}

static SIDE: LazyLock<Side> = LazyLock::new(|| {
    let memory = memory(3);
    let domain = Arc::new(MappedDomain::new(Arc::clone(&memory)).expect("presence is known"));
    let region = domain.register(range(PAGE, PAGE), Rights::LOCAL).expect("a region");
    Side { memory, domain, region }
});

fuzz_target!(|data: &[u8]| {
    let Some((operations, said)) = data.split_at_checked(8) else { return };
    let side = &*SIDE;
    side.memory.span(range(0, 3 * PAGE)).expect("the block").write_from(&[7; 3 * PAGE as usize]);
    let (mut peer, ours) = UnixStream::pair().expect("a pair of sockets");
    ours.set_nonblocking(true).expect("a socket");
    let mut link = fuzzing::tcp_link(OwnedFd::from(ours), Arc::clone(&side.domain));

    let mut accepted = BTreeMap::new();
    let mut completions = Vec::new();
    let (early, late) = said.split_at(said.len() / 2);
    for (number, kind) in operations.iter().enumerate() {
        let id = OpId(number as u64);
        if post(&mut *link, id, *kind, side.region.key) {
            accepted.insert(id, 0);
        }
        if kind & 0x80 != 0 {
            link.poll(&mut completions);
        }
    }
    peer.write_all(early).expect("a socket takes so little");
    link.poll(&mut completions);
    // The link may have hung up by now.
    let _ = peer.write_all(late);
    for _ in 0..32 {
        link.poll(&mut completions);
    }
    drop(peer);
    for _ in 0..32 {
        link.poll(&mut completions);
    }

    for completion in &completions {
        *accepted.get_mut(&completion.id).expect("an operation that was accepted") += 1;
    }
    assert!(accepted.values().all(|count| *count == 1), "{accepted:?} completions of each operation");
    assert!(link.is_dead().is_some(), "the peer is gone");
    link.close();
    let mut bytes = [0; 3 * PAGE as usize];
    side.memory.span(range(0, 3 * PAGE)).expect("the block").read_into(&mut bytes);
    let beside = bytes[..PAGE as usize].iter().chain(&bytes[2 * PAGE as usize..]);
    assert!(beside.into_iter().all(|byte| *byte == 7), "memory beside the region was written to");
});

fn post(link: &mut dyn Link, id: OpId, kind: u8, key: RegionKey) -> bool {
    let offset = PAGE + u64::from(kind >> 4 & 7) * 64;
    let length = 1 + u32::from(kind >> 2 & 3) * 30;
    let op = Transfer {
        id,
        local: Place { key, offset },
        remote: Place { key: RegionKey(u64::from(kind)), offset },
        length,
    };
    let posted = match kind & 3 {
        0 => link.post_write(op),
        1 | 2 => link.post_read(op),
        _ => link.post_fence(id),
    };
    posted.is_ok()
}
