//! A network between two agents that can be cut.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::net::Shutdown;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::harness::Agent;

/// Carries connections to an agent's services, until it is cut.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    cut: watch::Sender<bool>,
    refused: Arc<AtomicU64>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(target: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cut = watch::Sender::new(false);
        let refused = Arc::new(AtomicU64::new(0));
        let accepting = tokio::spawn(accept(listener, target, cut.clone(), Arc::clone(&refused)));
        Proxy { address, cut, refused, accepting }
    }

    /// Ends every connection, and takes no new one. Nothing is carried after it returns.
    pub(crate) async fn cut(&self) {
        self.cut.send_replace(true);
        // Each connection watches; so does nobody else.
        self.cut.closed().await;
    }

    pub(crate) fn heal(&self) {
        self.cut.send_replace(false);
    }

    /// How many connections were not taken.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut.send_replace(true);
        self.accepting.abort();
    }
}

async fn accept(
    listener: TcpListener,
    target: SocketAddr,
    cut: watch::Sender<bool>,
    refused: Arc<AtomicU64>,
) {
    loop {
        let (client, _) = listener.accept().await.unwrap();
        if *cut.borrow() {
            refused.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let mut cut = cut.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                // The agent may be gone for now.
                () = carry(client, target) => {}
                _ = cut.wait_for(|cut| *cut) => {}
            }
        });
    }
}

async fn carry(mut client: TcpStream, target: SocketAddr) {
    if let Ok(mut agent) = TcpStream::connect(target).await {
        let _ = client.set_nodelay(true).and_then(|()| agent.set_nodelay(true));
        let _ = tokio::io::copy_bidirectional(&mut client, &mut agent).await;
    }
}

/// Shuts down the connections that carry RAM from `source`, whose calls go to
/// `proxy`; how many there were.
pub(crate) fn cut_data(source: &Agent, proxy: SocketAddr) -> usize {
    let pid = Pid::from_raw(source.pid().cast_signed()).unwrap();
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let links = descriptors(source.pid()).into_iter().filter(|(_, target)| target.starts_with("socket:"));
    let mut cut = 0;
    for (number, _) in links {
        // It may have been closed just now.
        let Ok(socket) = rustix::process::pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) else {
            continue;
        };
        if carries_data(&socket, source, proxy) {
            rustix::net::shutdown(&socket, Shutdown::Both).unwrap();
            cut += 1;
        }
    }
    cut
}

fn carries_data(socket: &OwnedFd, source: &Agent, proxy: SocketAddr) -> bool {
    let (Ok(local), Ok(Some(peer))) = (rustix::net::getsockname(socket), rustix::net::getpeername(socket))
    else {
        return false;
    };
    if let (Ok(local), Ok(peer)) = (SocketAddr::try_from(local.clone()), SocketAddr::try_from(peer.clone())) {
        return local != source.grpc && local != source.metrics && peer != proxy;
    }
    // In post-copy it is the destination that connects.
    [local, peer].into_iter().any(is_shm)
}

fn is_shm(address: rustix::net::SocketAddrAny) -> bool {
    let path = rustix::net::SocketAddrUnix::try_from(address);
    let path = path.ok().and_then(|address| address.path().map(|path| path.to_string_lossy().into_owned()));
    path.and_then(|path| Path::new(&path).file_name().map(|name| name.to_string_lossy().starts_with("shm-")))
        .unwrap_or(false)
}

/// What a process' descriptors are.
pub(crate) fn descriptors(pid: u32) -> Vec<(i32, String)> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map_while(Result::ok);
    let described = entries.filter_map(|entry| {
        let number = entry.file_name().to_string_lossy().parse().ok()?;
        // It may have been closed just now.
        let target = std::fs::read_link(entry.path()).ok()?;
        Some((number, target.to_string_lossy().into_owned()))
    });
    described.collect()
}
