//! The two RDMA hosts of the VM: an agent on each, and the wire between them.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use ramferry_lab::{Authority, Credentials};

use crate::measuring::agents::{Agent, Probes};

/// One host: its address, its network device and its RDMA device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    name: &'static str,
    pub(crate) address: &'static str,
    pub(crate) network: &'static str,
    pub(crate) rdma: &'static str,
}

pub(crate) const SOURCE: Host = Host { name: "source", address: "10.77.0.1", network: "v0", rdma: "rxe0" };
pub(crate) const DESTINATION: Host =
    Host { name: "destination", address: "10.77.0.2", network: "v1", rdma: "rxe1" };

/// More than what connects and agrees sends before it, less than a page set.
const FIRST_BYTES: u64 = 64 << 10;
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// Both hosts' agents.
pub(crate) struct Hosts {
    pub(crate) source: Agent,
    pub(crate) destination: Agent,
    _authority: Authority,
}

/// Where what the agents say to each other goes, device state and all, beside the guest's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Control {
    Loopback,
    /// With the memory.
    Link,
}

impl Control {
    fn address(self, host: Host) -> &'static str {
        match self {
            Control::Loopback => "127.0.0.1",
            Control::Link => host.address,
        }
    }
}

impl Hosts {
    /// Agents without probes.
    pub(crate) fn start(control: Control) -> Result<Hosts> {
        let authority = Authority::new()?;
        let caller = authority.issue("127.0.0.1", "orchestrator", &["orchestrator"])?;
        let [source, destination] = [SOURCE, DESTINATION].map(|host| {
            let address = control.address(host);
            let credentials = authority.issue(address, host.name, &["peer"])?;
            agent(host, address, &credentials, &caller).with_context(|| format!("at the {}", host.name))
        });
        Ok(Hosts { source: source?, destination: destination?, _authority: authority })
    }

    /// Says that something failed, and what the agents logged since the last time.
    pub(crate) fn failure(&self, what: &str, error: &anyhow::Error) -> String {
        let failure = format!("{what}: {error:#}");
        eprintln!("{failure}");
        for (name, agent) in [("source", &self.source), ("destination", &self.destination)] {
            eprintln!("log of the {name}'s agent:\n{}", agent.log());
        }
        failure
    }
}

fn agent(host: Host, called_at: &str, credentials: &Credentials, caller: &Credentials) -> Result<Agent> {
    let mut options = credentials.options();
    let address = format!("{}:0", host.address);
    let guests = format!("{},/dev/shm", std::env::temp_dir().display());
    for (option, value) in [
        ("--data-listen", address.as_str()),
        ("--rdma-listen", &address),
        ("--rdma-device", host.rdma),
        ("--guest-dirs", &guests),
    ] {
        options.extend([option.to_owned(), value.to_owned()]);
    }
    Agent::start_with(called_at, &options, Some(caller), Probes::Off)
}

/// Runs something, and says when its first bytes had left the source host.
pub(crate) fn watch_wire<T>(run: impl FnOnce() -> Result<T>) -> Result<(T, Option<SystemTime>)> {
    let path = format!("/sys/class/net/{}/statistics/tx_bytes", SOURCE.network);
    let counter = File::open(&path).with_context(|| format!("cannot open {path}"))?;
    let before = sent_bytes(&counter)?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                if sent_bytes(&counter).ok()? >= before + FIRST_BYTES {
                    return Some(SystemTime::now());
                }
                std::thread::park_timeout(LOOK_INTERVAL);
            }
            None
        });
        let outcome = run();
        done.store(true, Ordering::Release);
        watch.thread().unpark();
        let first = watch.join().map_err(|_| anyhow::anyhow!("the watch over the wire panicked"))?;
        Ok((outcome?, first))
    })
}

fn sent_bytes(counter: &File) -> Result<u64> {
    let mut text = [0; 32];
    let length = counter.read_at(&mut text, 0)?;
    Ok(std::str::from_utf8(&text[..length])?.trim().parse()?)
}
