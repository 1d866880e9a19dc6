//! What goes wrong between two RDMA hosts, for real: in the lab only, whose network this takes
//! apart. To be run one test at a time (`--test-threads=1`).
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up is to fail")]

mod fixtures;

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fixtures::{TIMEOUT, Verbs, has_device};
use ramferry_fabric::conformance::{Drive, TestMemory, eventually};
use ramferry_fabric::{
    Domain, HardwareFault, Link, LinkError, OpId, Place, PostError, Region, RegionKey, RegisterError, Rights,
    SessionToken, Transfer,
};
use ramferry_lab::inside::hosts::{Host, Hosts};
use ramferry_ram::{Access, BlockIndex, BlockRange};
use ramferry_verbs::{Listener, VerbsDomain, connect, devices, domain_towards, memlock, source_access};
use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;

const REGION_BYTES: u64 = 1 << 20;
/// What "bounded" is held to, on a machine that is emulated.
const BOUND: Duration = Duration::from_secs(20);
/// Set in the process that is to be killed: the part it plays.
const PART: &str = "RAMFERRY_VERBS_TEST_PART";
const TOKEN: [u8; 32] = [0x5a; 32];

/// Whether the tests may take the network of this machine apart.
fn is_lab() -> bool {
    let is_lab = std::env::var_os("RAMFERRY_LAB").is_some();
    if !is_lab {
        eprintln!("SKIPPED: takes the network apart, which only the lab's may be (RAMFERRY_LAB)");
    }
    is_lab && has_device()
}

fn range() -> BlockRange {
    BlockRange { block: BlockIndex(0), offset: 0, length: REGION_BYTES }
}

/// Both sides of a session in this process.
struct Ends {
    admission: Option<ramferry_verbs::Admission>,
    listener: Listener,
    source: Arc<VerbsDomain>,
    destination: Arc<VerbsDomain>,
    token: SessionToken,
    local: Region,
    remote: Region,
}

impl Ends {
    fn new() -> Self {
        let listener = Verbs::listen();
        let memory = || TestMemory::patterned(1, Access::ReadWrite).memory;
        let destination = listener.domain(memory()).unwrap();
        let source = domain_towards(listener.local_addr(), None, memory(), TIMEOUT).unwrap();
        let token = SessionToken::random().unwrap();
        let admission = Some(listener.admit(token.clone(), Arc::clone(&destination), 2));
        let remote = destination.register(range(), Rights::REMOTE_WRITE).unwrap();
        let local = source.register(range(), Rights::LOCAL).unwrap();
        Self { admission, listener, source, destination, token, local, remote }
    }

    fn link(&self) -> Box<dyn Link> {
        connect(self.listener.local_addr(), &self.token, Arc::clone(&self.source), TIMEOUT).unwrap()
    }

    /// One write and its fence.
    fn try_it(&self) {
        let mut drive = Drive::new(self.link());
        drive.write(write(1, self.local, self.remote.key)).unwrap();
        drive.fence(2).unwrap();
        drive.succeed();
        drive.link.close();
    }
}

fn write(id: u64, local: Region, remote: RegionKey) -> Transfer {
    Transfer {
        id: OpId(id),
        local: Place { key: local.key, offset: 0 },
        remote: Place { key: remote, offset: 0 },
        length: REGION_BYTES as u32,
    }
}

/// Writes until the link dies; everything accepted completes, once. Says of what it died, and when.
fn write_until_dead(
    drive: &mut Drive,
    local: Region,
    remote: RegionKey,
    mut after: impl FnMut(u64),
) -> LinkError {
    let start = Instant::now();
    let mut posted = 0;
    while drive.link.is_dead().is_none() {
        assert!(start.elapsed() < 2 * BOUND, "the link lives on");
        match drive.try_write(write(posted, local, remote)) {
            Ok(()) => {
                posted += 1;
                after(posted);
            }
            Err(PostError::Full) => {
                drive.poll();
                let _ = drive.link.wait(Duration::from_millis(5));
            }
            Err(PostError::Dead(_)) => break,
            Err(error) => panic!("{error}"),
        }
    }
    drive.drain();
    let mut ids: Vec<_> = drive.completions.iter().map(|completion| completion.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), drive.accepted(), "each operation completed once");
    drive.link.is_dead().expect("a dead link").clone()
}

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The cable between the two hosts of the lab is cut; whole again when this is dropped.
struct Cable(Hosts);

impl Cable {
    fn cut() -> Self {
        let hosts = Hosts::here().unwrap();
        hosts.cut(Host::B).unwrap();
        Cable(hosts)
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        if let Err(error) = self.0.mend() {
            eprintln!("{error:#}");
        }
    }
}

/// A session over a cable that was cut and mended. Nobody may have the devices open: soft-RoCE may need new ones.
fn try_anew() {
    eprintln!("made anew: {:?}", Hosts::here().unwrap().revive().unwrap());
    Ends::new().try_it();
}

#[test]
fn a_cut_cable_is_found_within_seconds_and_a_link_made_after_it_was_mended_works() {
    if !is_lab() {
        return;
    }
    let ends = Ends::new();
    let mut drive = Drive::new(ends.link());
    let (mut cable, mut cut) = (None, Instant::now());
    let error = write_until_dead(&mut drive, ends.local, ends.remote.key, |posted| {
        if posted == 5 {
            cable = Some(Cable::cut());
            cut = Instant::now();
        }
    });
    assert!(cut.elapsed() < BOUND, "found after {:?}", cut.elapsed());
    eprintln!("found after {:?}: {error}", cut.elapsed());
    let LinkError::Hardware { fault, .. } = &error else { panic!("{error:?}") };
    assert!(matches!(fault, HardwareFault::PortDown | HardwareFault::PathLost), "{fault:?}");
    assert!(drive.completions.iter().any(|completion| completion.result.is_err()));
    drop(cable);
    let start = Instant::now();
    drive.link.close();
    assert!(start.elapsed() < BOUND, "closing is bounded");
    drop(ends);
    try_anew();
}

#[test]
fn a_session_ends_in_time_while_the_cable_is_cut() {
    if !is_lab() {
        return;
    }
    let mut ends = Ends::new();
    let mut drive = Drive::new(ends.link());
    drive.fence(1).unwrap();
    drive.succeed();
    let cable = Cable::cut();
    let start = Instant::now();
    ends.admission = None;
    drive.link.close();
    assert!(start.elapsed() < BOUND, "took {:?}", start.elapsed());
    ends.destination.deregister(ends.remote.key).unwrap();
    ends.source.deregister(ends.local.key).unwrap();
    drop(cable);
    drop(ends);
    try_anew();
}

#[test]
fn nobody_listening_is_said_at_once() {
    if !has_device() {
        return;
    }
    let ends = Ends::new();
    let free = Verbs::listen().local_addr();
    let start = Instant::now();
    let refused = connect(free, &ends.token, Arc::clone(&ends.source), TIMEOUT);
    assert!(matches!(refused.err(), Some(LinkError::Connect { .. })));
    assert!(start.elapsed() < BOUND);
}

#[test]
fn devices_are_told_apart_and_forced() {
    if !has_device() {
        return;
    }
    let found = devices().unwrap();
    let destination = fixtures::destination_address().unwrap();
    let of = |address: &IpAddr| found.iter().find(|device| device.addresses.contains(address)).unwrap();
    let theirs = of(&destination);
    assert!(theirs.active && theirs.mtu_bytes >= 1024 && theirs.max_message_bytes > 0, "{theirs:?}");
    let listener = Listener::bind(SocketAddr::new(destination, 0), Some(&theirs.name)).unwrap();
    assert_eq!(listener.device(), theirs.name);
    let memory = || TestMemory::patterned(1, Access::ReadWrite).memory;
    let chosen = domain_towards(listener.local_addr(), None, memory(), TIMEOUT).unwrap();
    let forced =
        domain_towards(listener.local_addr(), Some(chosen.device_name()), memory(), TIMEOUT).unwrap();
    assert_eq!(forced.device_name(), chosen.device_name());
    let other = Listener::bind(SocketAddr::new(destination, 0), Some("no-such-device"));
    assert!(matches!(other, Err(LinkError::OtherDevice { .. })), "{other:?}");
    let none = domain_towards(listener.local_addr(), Some("no-such-device"), memory(), TIMEOUT);
    assert!(matches!(none, Err(LinkError::OtherDevice { .. })), "{none:?}");
    for elsewhere in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))] {
        let refused = Listener::bind(SocketAddr::new(elsewhere, 0), None);
        assert!(matches!(refused, Err(LinkError::NotReached { .. })), "{refused:?}");
    }
}

#[test]
fn the_memlock_limit_is_named_with_what_is_pinned_and_needed() {
    if !has_device() {
        return;
    }
    let ends = Ends::new();
    let pinned = memlock::pinned_bytes().unwrap();
    assert!(pinned >= 2 * REGION_BYTES, "{pinned} bytes are pinned");
    let before = rustix::process::getrlimit(Resource::Memlock);
    let limit = pinned + (512 << 10);
    rustix::process::setrlimit(Resource::Memlock, Rlimit { current: Some(limit), ..before }).unwrap();
    let (part, rest) = (
        BlockRange { block: BlockIndex(1), offset: 0, length: 256 << 10 },
        BlockRange { block: BlockIndex(1), offset: 256 << 10, length: 512 << 10 },
    );
    // The kernel asks the thread that registers for its capabilities.
    let domain = Arc::clone(&ends.source);
    let (fits, refused, again) = std::thread::spawn(move || {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective -= CapabilitySet::IPC_LOCK;
        rustix::thread::set_capabilities(None, sets).unwrap();
        let fits = domain.register(part, Rights::LOCAL);
        let refused = domain.register(rest, Rights::LOCAL);
        domain.deregister(fits.as_ref().unwrap().key).unwrap();
        (fits.map(drop), refused, domain.register(part, Rights::LOCAL))
    })
    .join()
    .unwrap();
    rustix::process::setrlimit(Resource::Memlock, before).unwrap();
    fits.unwrap();
    again.unwrap();
    let refused = refused.unwrap_err();
    let RegisterError::PinLimit { needed_bytes, pinned_bytes, limit_bytes } = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((needed_bytes, limit_bytes), (rest.length, limit));
    assert!(pinned_bytes >= pinned + part.length, "{pinned_bytes} bytes were pinned");
    for remedy in ["LimitMEMLOCK", "--ulimit memlock", "ulimit -l"] {
        assert!(refused.to_string().contains(remedy), "{refused}");
    }
    ends.source.register(rest, Rights::LOCAL).expect("what was refused can be had with a higher limit");
}

#[test]
fn memory_mapped_for_reading_is_registered_or_the_kernel_is_named() {
    if !has_device() {
        return;
    }
    let address = SocketAddr::new(fixtures::destination_address().unwrap(), 1);
    let register = |access| {
        let memory = TestMemory::patterned(1, access).memory;
        domain_towards(address, None, memory, TIMEOUT).unwrap().register(range(), Rights::LOCAL).map(drop)
    };
    register(source_access()).unwrap();
    match (source_access(), register(Access::Read)) {
        (Access::Read, registered) => registered.unwrap(),
        (Access::ReadWrite, Err(RegisterError::PinsWritableOnly)) => {}
        (Access::ReadWrite, other) => panic!("{other:?}"),
    }
}

#[test]
fn fifty_sessions_leave_nothing_behind() {
    if !has_device() {
        return;
    }
    let session = || {
        let ends = Ends::new();
        let mut drives = [Drive::new(ends.link()), Drive::new(ends.link())];
        for drive in &mut drives {
            drive.write(write(1, ends.local, ends.remote.key)).unwrap();
            drive.fence(2).unwrap();
            drive.succeed();
        }
        let [one, other] = drives;
        one.link.close();
        // The other is dropped: as when its agent fails.
        drop(other);
    };
    session();
    let mut before = Resources::now();
    // Threads that were let go end a moment later.
    eventually("the first session is gone", || {
        let now = Resources::now();
        now == std::mem::replace(&mut before, now.clone()) && now.pinned_bytes == Some(0)
    });
    (0..50).for_each(|_| session());
    eventually("everything is as before", || Resources::now() == before);
}

/// What this process, and the RDMA devices for all, have in use.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Resources {
    descriptors: usize,
    threads: usize,
    pinned_bytes: Option<u64>,
    rdma: String,
}

impl Resources {
    fn now() -> Self {
        let count = |path| std::fs::read_dir(path).unwrap().count();
        Self {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            pinned_bytes: memlock::pinned_bytes(),
            rdma: run("rdma", "resource show"),
        }
    }
}

/// Another process of this test, that plays a part until it is killed.
struct Peer {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Peer {
    fn start(part: &str) -> Self {
        let arguments = ["--exact", "the_part_of_another_process", "--nocapture", "--test-threads=1"];
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(arguments)
            .env(PART, part)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        Self { child, said }
    }

    /// The next line that it says for us.
    fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.said.read_line(&mut line).unwrap() > 0, "the other process ended");
            if let Some(said) = line.trim().split_once("PEER ") {
                return said.1.to_owned();
            }
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test by itself: what the processes that tests start do.
#[test]
fn the_part_of_another_process() {
    let Ok(part) = std::env::var(PART) else { return };
    match part.split_once(' ') {
        None => {
            let listener = Verbs::listen();
            let domain = listener.domain(TestMemory::patterned(2, Access::ReadWrite).memory).unwrap();
            let _admission = listener.admit(SessionToken::from_bytes(TOKEN), Arc::clone(&domain), 2);
            let region = domain.register(range(), Rights::REMOTE_WRITE).unwrap();
            println!("PEER {} {}", listener.local_addr(), region.key.0);
            std::thread::sleep(10 * BOUND);
        }
        Some((address, key)) => {
            let address: SocketAddr = address.parse().unwrap();
            let memory = TestMemory::patterned(1, Access::ReadWrite).memory;
            let domain = domain_towards(address, None, memory, TIMEOUT).unwrap();
            let local = domain.register(range(), Rights::LOCAL).unwrap();
            let link = connect(address, &SessionToken::from_bytes(TOKEN), domain, TIMEOUT).unwrap();
            let mut drive = Drive::new(link);
            write_until_dead(&mut drive, local, RegionKey(key.parse().unwrap()), |posted| {
                if posted == 5 {
                    println!("PEER writes");
                }
            });
        }
    }
}

#[test]
fn a_destination_that_is_killed_in_mid_write_is_found_at_once_and_another_works() {
    if !has_device() {
        return;
    }
    for round in 0..2 {
        let mut peer = Peer::start("destination");
        let said = peer.hear();
        let (address, key) = said.split_once(' ').unwrap();
        let (address, key) = (address.parse().unwrap(), RegionKey(key.parse().unwrap()));
        let memory = TestMemory::patterned(1, Access::ReadWrite).memory;
        let domain = domain_towards(address, None, memory, TIMEOUT).unwrap();
        let local = domain.register(range(), Rights::LOCAL).unwrap();
        let link = connect(address, &SessionToken::from_bytes(TOKEN), Arc::clone(&domain), TIMEOUT).unwrap();
        let mut drive = Drive::new(link);
        let mut killed = Instant::now();
        let error = write_until_dead(&mut drive, local, key, |posted| {
            if posted == 5 {
                peer.kill();
                killed = Instant::now();
            }
        });
        eprintln!("round {round}: found after {:?}: {error}", killed.elapsed());
        assert!(killed.elapsed() < BOUND);
        let path_lost = matches!(&error, LinkError::Hardware { fault: HardwareFault::PathLost, .. });
        assert!(error == LinkError::PeerClosed || path_lost, "{error:?}");
        domain.deregister(local.key).unwrap();
        drive.link.close();
    }
}

#[test]
fn a_source_that_is_killed_in_mid_write_is_a_failure_of_its_session_and_ends_in_time() {
    if !has_device() {
        return;
    }
    let listener = Verbs::listen();
    let domain = listener.domain(TestMemory::patterned(2, Access::ReadWrite).memory).unwrap();
    let admission = listener.admit(SessionToken::from_bytes(TOKEN), Arc::clone(&domain), 2);
    let region = domain.register(range(), Rights::REMOTE_WRITE).unwrap();
    for _ in 0..2 {
        let mut peer = Peer::start(&format!("{} {}", listener.local_addr(), region.key.0));
        assert_eq!(peer.hear(), "writes");
        assert_eq!(admission.connections(), 1);
        peer.kill();
        eventually("the session says so", || admission.failure().is_some() && admission.connections() == 0);
    }
    assert_eq!(admission.failure(), Some(LinkError::PeerClosed));
    let start = Instant::now();
    domain.deregister(region.key).unwrap();
    drop(admission);
    assert!(start.elapsed() < BOUND);
}

/// Deletes an RDMA device, and makes it anew on drop.
struct Removed {
    device: &'static str,
    netdev: &'static str,
    deletion: Option<Child>,
}

impl Removed {
    fn begin(device: &'static str, netdev: &'static str) -> Self {
        let deletion = Command::new("rdma").args(["link", "delete", device]).spawn().unwrap();
        Self { device, netdev, deletion: Some(deletion) }
    }

    /// The kernel waits until nobody uses it.
    fn finish(&mut self) {
        let Some(mut deletion) = self.deletion.take() else { return };
        eventually("the device is deleted", || deletion.try_wait().unwrap().is_some());
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        self.finish();
        run("rdma", &format!("link add {} type rxe netdev {}", self.device, self.netdev));
        eventually("the port is active", || {
            devices()
                .is_ok_and(|found| found.iter().any(|device| device.name == self.device && device.active))
        });
    }
}

#[test]
fn a_device_removed_under_its_source_is_named_and_used_again_when_it_is_back() {
    if !is_lab() {
        return;
    }
    let ends = Ends::new();
    let mut drive = Drive::new(ends.link());
    let mut removed = None;
    let error = write_until_dead(&mut drive, ends.local, ends.remote.key, |posted| {
        if posted == 5 {
            removed = Some(Removed::begin("rxe0", "v0"));
        }
    });
    eprintln!("{error}");
    assert_eq!(error, LinkError::Hardware { device: "rxe0".into(), fault: HardwareFault::DeviceRemoved });
    drive.link.close();
    drop(ends);
    removed.as_mut().unwrap().finish();
    drop(removed);
    Ends::new().try_it();
}

#[test]
fn a_device_removed_under_its_listener_is_named_and_listened_at_again_when_it_is_back() {
    if !is_lab() {
        return;
    }
    let mut ends = Ends::new();
    let mut drive = Drive::new(ends.link());
    drive.fence(1).unwrap();
    drive.succeed();
    let mut removed = Removed::begin("rxe1", "v1");
    let gone = LinkError::Hardware { device: "rxe1".into(), fault: HardwareFault::DeviceRemoved };
    eventually("the listener says so", || ends.listener.failure() == Some(gone.clone()));
    eventually("the session says so", || ends.admission.as_ref().unwrap().failure() == Some(gone.clone()));
    eventually("the source hears of it", || {
        drive.poll();
        drive.link.is_dead().is_some()
    });
    drive.link.close();
    let start = Instant::now();
    ends.admission = None;
    assert!(start.elapsed() < BOUND);
    drop(ends);
    removed.finish();
    drop(removed);
    Ends::new().try_it();
}
