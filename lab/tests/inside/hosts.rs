//! The two hosts are two: what goes from one to the other crosses the cable, and nothing crosses a cable that is cut.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ramferry_lab::inside::hosts::{Host, Hosts};
use rustix::net::{AddressFamily, SocketType};

const PATIENCE: Duration = Duration::from_secs(60);
const MESSAGE_BYTES: u64 = 64 << 10;
const MESSAGES: u64 = 64;

/// One test at a time: they count what crosses the cable, and cut it. Leaves it whole, whatever became of the test.
struct Alone {
    hosts: Hosts,
    _alone: MutexGuard<'static, ()>,
}

impl Alone {
    fn new() -> Alone {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let hosts = Hosts::here().expect("these tests run in the lab VM: scripts/lab-test");
        Alone { hosts, _alone: alone }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let made_whole = self.hosts.mend().and_then(|()| self.hosts.revive());
        match made_whole {
            Ok(revived) => eprintln!("made anew: {revived:?}"),
            Err(error) => eprintln!("the hosts are not whole again: {error:#}"),
        }
    }
}

fn loopback_bytes() -> u64 {
    let text = std::fs::read_to_string("/sys/class/net/lo/statistics/tx_bytes").unwrap();
    text.trim().parse().unwrap()
}

/// A server, killed and reaped on drop.
struct Server(Child);

impl Server {
    /// Starts it, and waits until it listens with rdma_cm.
    fn listen(program: &str, arguments: &[&str]) -> Server {
        let server = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut server = Server(server.unwrap());
        let deadline = Instant::now() + PATIENCE;
        while !cm_ids().contains("LISTEN") {
            assert!(server.0.try_wait().unwrap().is_none(), "{program} {arguments:?} ended");
            assert!(Instant::now() < deadline, "{program} {arguments:?} does not listen: {}", cm_ids());
            thread::sleep(Duration::from_millis(10));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn cm_ids() -> String {
    let output = Command::new("rdma").args(["resource", "show", "cm_id"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// A client that has a minute.
fn client(program: &str, arguments: &[&str]) -> Output {
    Command::new("timeout").args(["60", program]).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// Connects, and exchanges a few messages. Not `rping`: that fails, or hangs, where its server ends before it.
fn exchange(from: Host) -> Output {
    let (to, from) = (from.peer().address().to_string(), from.address().to_string());
    let _server = Server::listen("ucmatose", &["-b", &to, "-C", "4"]);
    client("ucmatose", &["-s", &to, "-b", &from, "-C", "4"])
}

fn write_bandwidth(from: Host, more: &[&str]) -> Output {
    let to = from.peer();
    let (size, count) = (MESSAGE_BYTES.to_string(), MESSAGES.to_string());
    let same = ["-R", "-F", "-s", &size, "-n", &count];
    let (device, to_device) = (from.rdma_device(), to.rdma_device());
    let (to, from) = (to.address().to_string(), from.address().to_string());
    let _server = Server::listen("ib_write_bw", &[&same[..], &["-d", &to_device]].concat());
    client("ib_write_bw", &[&same[..], &["-d", &device, "--source_ip", &from], more, &[&to]].concat())
}

fn assert_success(output: &Output) {
    let text = [&output.stdout[..], &output.stderr].concat();
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&text));
}

#[test]
fn an_rdma_write_crosses_the_cable_in_either_direction() {
    let alone = Alone::new();
    let hosts = &alone.hosts;
    for from in Host::BOTH {
        let (before, loopback) = (hosts.sent_bytes(from).unwrap(), loopback_bytes());
        assert_success(&write_bandwidth(from, &[]));
        let sent = hosts.sent_bytes(from).unwrap() - before;
        assert!(sent >= MESSAGES * MESSAGE_BYTES, "{from:?} sent {sent} bytes only");
        assert_eq!(loopback_bytes(), loopback, "nothing may take the shortcut");
    }
}

#[test]
fn rdma_cm_takes_the_device_of_the_address_and_crosses_the_cable() {
    let alone = Alone::new();
    let hosts = &alone.hosts;
    for from in Host::BOTH {
        let (before, loopback) = (hosts.sent_bytes(from).unwrap(), loopback_bytes());
        assert_success(&exchange(from));
        assert!(hosts.sent_bytes(from).unwrap() > before);
        assert_eq!(loopback_bytes(), loopback);
    }
}

/// A listener there and a connection from here, from an address of its own or from none.
fn connect(from: Host, binds: bool) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((from.peer().address(), 0)).unwrap();
    let target = listener.local_addr().unwrap();
    let stream = if binds {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        let own: SocketAddr = (from.address(), 0).into();
        rustix::net::bind(&socket, &own).unwrap();
        rustix::net::connect(&socket, &target).unwrap();
        TcpStream::from(socket)
    } else {
        TcpStream::connect(target).unwrap()
    };
    let (accepted, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), IpAddr::V4(from.address()), "who binds to nothing comes from the other host");
    (stream, accepted)
}

#[test]
fn tcp_between_them_crosses_the_cable_too_whether_it_binds_or_not() {
    let alone = Alone::new();
    let hosts = &alone.hosts;
    for (from, binds) in [(Host::A, true), (Host::A, false), (Host::B, true), (Host::B, false)] {
        let (before, loopback) = (hosts.sent_bytes(from).unwrap(), loopback_bytes());
        let (mut stream, mut accepted) = connect(from, binds);
        let sender = thread::spawn(move || stream.write_all(&vec![7; 4 << 20]).unwrap());
        let mut received = Vec::new();
        accepted.read_to_end(&mut received).unwrap();
        sender.join().unwrap();
        assert_eq!(received.len(), 4 << 20);
        assert!(hosts.sent_bytes(from).unwrap() - before >= 4 << 20);
        assert_eq!(loopback_bytes(), loopback);
    }
}

#[test]
fn nothing_crosses_a_cable_that_is_cut_and_all_does_when_it_is_mended() {
    let alone = Alone::new();
    let hosts = &alone.hosts;
    for host in Host::BOTH {
        hosts.cut(host).unwrap();
        for from in Host::BOTH {
            let loopback = loopback_bytes();
            let refused =
                TcpStream::connect_timeout(&(from.peer().address(), 9).into(), Duration::from_millis(200));
            assert!(refused.is_err());
            assert_eq!(loopback_bytes(), loopback, "it may not take the shortcut instead");
        }
        let links = Command::new("rdma").args(["link", "show"]).output().unwrap();
        let links = String::from_utf8(links.stdout).unwrap();
        assert_eq!(links.matches("state DOWN").count(), 2, "both ports see it: {links}");

        hosts.mend().unwrap();
        hosts.revive().unwrap();
        for from in Host::BOTH {
            assert_success(&exchange(from));
        }
    }
}

#[test]
fn an_rdma_write_under_way_fails_when_the_cable_is_cut() {
    let alone = Alone::new();
    let hosts = &alone.hosts;
    let (size, to) = (MESSAGE_BYTES.to_string(), Host::B.address().to_string());
    // Far more than is ever sent.
    let same = ["-R", "-F", "-s", &size, "-n", "1000000", "--retry_count", "1"];
    let _server = Server::listen("ib_write_bw", &[&same[..], &["-d", "rxe1"]].concat());
    let before = hosts.sent_bytes(Host::A).unwrap();
    let source = Host::A.address().to_string();
    let mut client = Command::new("ib_write_bw")
        .args([&same[..], &["-d", "rxe0", "--source_ip", &source, &to]].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while hosts.sent_bytes(Host::A).unwrap() - before < 16 * MESSAGE_BYTES {
        assert!(client.try_wait().unwrap().is_none() && Instant::now() < deadline, "it does not write");
        thread::sleep(Duration::from_millis(5));
    }
    hosts.cut(Host::B).unwrap();
    let ended = wait(&mut client);
    let _ = client.kill();
    let output = client.wait_with_output().unwrap();
    hosts.mend().unwrap();
    assert!(ended, "it does not notice");
    assert!(!output.status.success());
}

fn wait(child: &mut Child) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
    true
}
