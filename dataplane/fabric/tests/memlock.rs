//! What pinning does to the process's locked memory. One test in a process of
//! its own: the limit is the process's.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up is to fail")]

use std::sync::Arc;

use ramferry_fabric::conformance::TestMemory;
use ramferry_fabric::{Domain, MappedDomain, RegisterError, Rights};
use ramferry_ram::{Access, BlockIndex, BlockRange};
use rustix::process::{Resource, Rlimit};

fn locked_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn range(offset: u64, length: u64) -> BlockRange {
    BlockRange { block: BlockIndex(0), offset, length }
}

#[test]
fn memory_is_locked_while_registered_and_the_limit_is_named() {
    let memory = TestMemory::patterned(1, Access::ReadWrite).memory;
    let domain = MappedDomain::new(Arc::clone(&memory));
    let before = locked_kib();
    let region = domain.register(range(0, 256 << 10), Rights::LOCAL).unwrap();
    assert_eq!(locked_kib() - before, 256);
    domain.deregister(region.key).unwrap();
    assert_eq!(locked_kib(), before);

    let region = domain.register(range(0, 64 << 10), Rights::LOCAL).unwrap();
    let capabilities = rustix::thread::capabilities(None).unwrap();
    let without = rustix::thread::CapabilitySets {
        effective: capabilities.effective - rustix::thread::CapabilitySet::IPC_LOCK,
        ..capabilities
    };
    rustix::thread::set_capabilities(None, without).unwrap();
    let limit =
        Rlimit { current: Some(128 << 10), maximum: rustix::process::getrlimit(Resource::Memlock).maximum };
    rustix::process::setrlimit(Resource::Memlock, limit).unwrap();
    let refused = domain.register(range(64 << 10, 256 << 10), Rights::LOCAL).unwrap_err();
    let RegisterError::MemlockLimit { limit_bytes, needed_bytes } = &refused else {
        panic!("{refused}");
    };
    assert_eq!((*limit_bytes, *needed_bytes), (128 << 10, (64 + 256) << 10));
    let text = refused.to_string();
    for part in ["RLIMIT_MEMLOCK", "131072", "327680", "LimitMEMLOCK=infinity"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(domain.pinned_bytes(), 64 << 10);
    assert_eq!(locked_kib() - before, 64, "what was refused left nothing locked");
    let smaller = domain.register(range(64 << 10, 64 << 10), Rights::LOCAL).expect("within the limit");
    domain.deregister(smaller.key).unwrap();
    domain.deregister(region.key).unwrap();

    domain.register(range(0, 64 << 10), Rights::LOCAL).unwrap();
    drop(domain);
    assert_eq!(locked_kib(), before, "a domain releases what it holds");
    drop(memory);
}
