//! Two RDMA hosts in one machine.
//!
//! Soft-RoCE of these kernels lives in the initial network namespace only, so that both hosts share it: a pair of veth
//! devices, each with an address and an rxe device of its own.
//!
//! ```text
//!   10.77.0.1  rxe0 - v0 ======= v1 - rxe1  10.77.0.2
//! ```
//!
//! Between two addresses of one machine the kernel takes a shortcut: it finds the other address in its table of local
//! ones, and never looks for a device. So what this machine sends from one of them to the other is routed by a table of
//! its own, ahead of the local one, and leaves through the device; what arrives is accepted although it comes from
//! a local address. A program that binds to neither sends from the one to the other. Where a device is down, its
//! table says that there is no route, lest the shortcut be taken then.
//!
//! A device that goes down takes its routes with it: [`Hosts::mend`] makes them anew.

use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

const PORT_TIMEOUT: Duration = Duration::from_secs(30);
const PORT_POLL: Duration = Duration::from_millis(5);

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// `10.77.0.1` on `v0` and `rxe0`.
    A,
    /// `10.77.0.2` on `v1` and `rxe1`.
    B,
}

impl Host {
    /// Both.
    pub const BOTH: [Host; 2] = [Host::A, Host::B];

    /// Its address.
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.number() + 1)
    }

    /// Its network device.
    pub fn network_device(self) -> String {
        format!("v{}", self.number())
    }

    /// Its RDMA device.
    pub fn rdma_device(self) -> String {
        format!("rxe{}", self.number())
    }

    /// The other one.
    pub fn peer(self) -> Host {
        match self {
            Host::A => Host::B,
            Host::B => Host::A,
        }
    }

    fn add_rdma_device(self) -> String {
        format!("link add {} type rxe netdev {}\n", self.rdma_device(), self.network_device())
    }

    fn number(self) -> u8 {
        match self {
            Host::A => 0,
            Host::B => 1,
        }
    }

    /// Routes of what goes from here to the other, and nothing else.
    fn table(self) -> u32 {
        10 + u32::from(self.number())
    }
}

/// The two hosts of the lab VM.
#[derive(Clone, Copy, Debug)]
pub struct Hosts(());

impl Hosts {
    /// The hosts of the lab VM that this process is in. None elsewhere.
    pub fn here() -> Option<Hosts> {
        super::is_here().then_some(Hosts(()))
    }

    /// Makes them, on a machine that has nothing but its loopback device.
    pub(super) fn make() -> Result<Hosts> {
        let hosts = Hosts(());
        allow_local_sources("all")?;
        let mut orders = "link set lo up\nlink add v0 mtu 9000 type veth peer name v1 mtu 9000\n".to_owned();
        // The local table is asked first, unless something else is asked before it.
        orders += "rule add pref 100 lookup local\nrule del pref 0\n";
        for host in Host::BOTH {
            let (from, to, table) = (host.address(), host.peer().address(), host.table());
            let preference = host.table();
            orders += &format!("address add {from}/24 dev {}\n", host.network_device());
            orders += &format!("rule add pref {preference} iif lo from {from} to {to} lookup {table}\n");
            // Who has not chosen an address yet.
            orders +=
                &format!("rule add pref {} iif lo from 0.0.0.0/32 to {to} lookup {table}\n", preference + 10);
            orders += &format!("route add unreachable default metric 1000 table {table}\n");
        }
        batch("ip", &orders)?;
        hosts.set_up()?;
        batch("rdma", &Host::BOTH.map(Host::add_rdma_device).concat())?;
        hosts.await_ports()?;
        Ok(hosts)
    }

    /// Cuts the cable at that host: its device goes down, and the other's loses its carrier.
    pub fn cut(&self, host: Host) -> Result<()> {
        batch("ip", &format!("link set {} down\n", host.network_device()))
    }

    /// Mends it: both devices are up, and what is sent between them goes over them.
    pub fn mend(&self) -> Result<()> {
        self.set_up()?;
        self.await_ports()
    }

    /// Makes those RDMA devices anew whose connection manager is dead, as an operator would; says which. Soft-RoCE's queue
    /// pair for it (GSI) fails for good when something is sent through it while the port is down.
    ///
    /// Waits until nobody has such a device open.
    pub fn revive(&self) -> Result<Vec<Host>> {
        let output = Command::new("rdma")
            .args(["resource", "show", "qp"])
            .stdin(Stdio::null())
            .output()
            .context("cannot run rdma: install iproute2")?;
        ensure!(
            output.status.success(),
            "rdma resource show qp: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let shown = String::from_utf8_lossy(&output.stdout);
        let dead: Vec<_> = Host::BOTH.into_iter().filter(|host| has_dead_manager(&shown, *host)).collect();
        for host in &dead {
            batch("rdma", &format!("link delete {}\n{}", host.rdma_device(), host.add_rdma_device()))?;
        }
        self.await_ports()?;
        Ok(dead)
    }

    fn set_up(self) -> Result<()> {
        let mut orders = String::new();
        for host in Host::BOTH {
            let device = host.network_device();
            allow_local_sources(&device)?;
            orders += &format!("link set {device} up\n");
            orders += &format!(
                "route replace {} dev {device} src {} table {}\n",
                host.peer().address(),
                host.address(),
                host.table()
            );
        }
        batch("ip", &orders)
    }

    /// The kernel tells the ports of it a moment later, and what is sent until then is lost.
    fn await_ports(self) -> Result<()> {
        let deadline = Instant::now() + PORT_TIMEOUT;
        for host in Host::BOTH {
            let path = format!("/sys/class/infiniband/{}/ports/1/state", host.rdma_device());
            while !fs::read_to_string(&path)
                .with_context(|| format!("cannot read {path}"))?
                .contains("ACTIVE")
            {
                ensure!(Instant::now() < deadline, "the port of {} does not come up", host.rdma_device());
                thread::sleep(PORT_POLL);
            }
        }
        Ok(())
    }

    /// Bytes that the host's network device has sent since the VM started.
    pub fn sent_bytes(&self, host: Host) -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/tx_bytes", host.network_device());
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        text.trim().parse().with_context(|| format!("{path} holds no number"))
    }
}

/// Whether that host's queue pair of the connection manager is in error, of what `rdma resource show qp` prints.
fn has_dead_manager(shown: &str, host: Host) -> bool {
    let own = format!("link {}/", host.rdma_device());
    shown
        .lines()
        .any(|line| line.starts_with(&own) && line.contains("type GSI") && line.contains("state ERR"))
}

/// What comes from one of the machine's own addresses is no forgery here; and each device answers for its address only.
fn allow_local_sources(device: &str) -> Result<()> {
    for (name, value) in
        [("rp_filter", "0"), ("accept_local", "1"), ("arp_ignore", "1"), ("arp_announce", "2")]
    {
        let path = format!("/proc/sys/net/ipv4/conf/{device}/{name}");
        fs::write(&path, value).with_context(|| format!("cannot write {path}"))?;
    }
    Ok(())
}

/// Has `ip` or `rdma` carry out a line each.
fn batch(program: &str, orders: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(["-b", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}: install iproute2"))?;
    // They are few: the pipe takes them at once.
    child.stdin.take().context("a pipe was asked for")?.write_all(orders.as_bytes())?;
    let output = child.wait_with_output().with_context(|| format!("cannot wait for {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {} (orders: {orders:?})", said.trim());
    Ok(())
}
