//! The devices that this process uses, each watched for what happens to it.
//!
//! A device that was used once stays open until it is removed, as librdmacm keeps
//! it anyway; its thread sleeps until something happens.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use ramferry_fabric::{HardwareFault, LinkError};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::cm::{EventChannel, EventKind, Identifier, forget_removed_devices};
use crate::context::{Capabilities, Context};
use crate::info::Transport;
use crate::os;
use crate::status::AsyncEvent;
use crate::suspicion::keep_cause;

/// How often the watcher looks up where nothing wakes it.
const LOOK_AROUND: Duration = Duration::from_secs(60);
/// Pause after the kernel refused to tell what happened.
const PAUSE: Duration = Duration::from_millis(100);

/// The devices in use.
static DEVICES: Mutex<Vec<Arc<Device>>> = Mutex::new(Vec::new());

/// A device in use.
#[derive(Debug)]
pub(crate) struct Device {
    name: String,
    capabilities: Capabilities,
    transport: Transport,
    subscribers: Arc<Subscribers>,
    context: Arc<Context>,
    // Last: when nothing of a device that was removed is left, librdmacm is to let go of it.
    _sweep: Sweep,
}

impl Device {
    /// The device that an identifier is bound to, by `at`, one of its addresses.
    pub(crate) fn of(identifier: &Identifier, at: IpAddr) -> Result<Arc<Self>, LinkError> {
        let mut devices = lock(&DEVICES);
        if let Some(device) = devices.iter().find(|device| device.context.is_of(identifier)) {
            return Ok(Arc::clone(device));
        }
        let device = Arc::new(Self::open(identifier, at)?);
        devices.push(Arc::clone(&device));
        Ok(device)
    }

    fn open(identifier: &Identifier, at: IpAddr) -> Result<Self, LinkError> {
        let system = |what| move |source| LinkError::System { what, source };
        let channel = EventChannel::new()?;
        let anchor =
            Identifier::new(&channel).map_err(system("make an identifier of the connection manager"))?;
        let not_reached = |_| LinkError::NotReached { address: at.to_string() };
        anchor.bind(SocketAddr::new(at, 0)).map_err(not_reached)?;
        // The address may have moved meanwhile.
        let context = Context::bound(anchor).filter(|context| context.is_of(identifier));
        let context = Arc::new(context.ok_or_else(|| not_reached(Errno::NODEV))?);
        let name = context.name();
        let capabilities = context.capabilities().map_err(system("ask an RDMA device what it can do"))?;
        os::set_nonblocking(context.async_fd()).map_err(system("set a descriptor of an RDMA device"))?;
        let subscribers = Arc::new(Subscribers { device: name.clone(), ..Subscribers::default() });
        let watch = Watch { context: Arc::clone(&context), channel, subscribers: Arc::clone(&subscribers) };
        thread::Builder::new().name(format!("rdma-{name}")).spawn(move || watch.run()).map_err(|error| {
            let source = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
            LinkError::System { what: "start a thread that watches an RDMA device", source }
        })?;
        let (transport, _sweep) = (context.transport(), Sweep(Arc::clone(&subscribers)));
        Ok(Self { name, capabilities, transport, subscribers, context, _sweep })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    pub(crate) fn transport(&self) -> Transport {
        self.transport
    }

    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    /// Has `signal` told what happens to the device, and to the queue pair of this number.
    pub(crate) fn subscribe(&self, number: u32, port: u8, signal: &Arc<Signal>) {
        let mut links = lock(&self.subscribers.links);
        links.retain(|_, (_, other)| other.strong_count() > 0);
        links.insert(number, (port, Arc::downgrade(signal)));
        drop(links);
        // It may have happened before anybody was there to be told.
        if self.subscribers.removed.load(Ordering::SeqCst) {
            signal.raise(LinkError::Hardware {
                device: self.name.clone(),
                fault: HardwareFault::DeviceRemoved,
            });
        }
    }
}

/// Who is to be told: by number of the queue pair, its port and where to tell.
#[derive(Default)]
struct Subscribers {
    device: String,
    removed: AtomicBool,
    links: Mutex<HashMap<u32, (u8, Weak<Signal>)>>,
}

impl fmt::Debug for Subscribers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Subscribers({} of {})", lock(&self.links).len(), self.device)
    }
}

impl Subscribers {
    fn tell(&self, event: AsyncEvent) {
        let device = &*self.device;
        match event {
            AsyncEvent::QueuePair { number, fault } => {
                let error = fault.link_error(device);
                tracing::warn!(device, queue_pair = number, %error, "a queue pair failed");
                let link = lock(&self.links).get(&number).and_then(|(_, signal)| signal.upgrade());
                if let Some(signal) = link {
                    signal.raise(error);
                }
            }
            AsyncEvent::Device(fault) => {
                tracing::error!(device, error = %fault, "an RDMA device failed");
                self.tell_all(fault);
            }
            AsyncEvent::PortDown { port } | AsyncEvent::PortUp { port } => {
                let is_down = matches!(event, AsyncEvent::PortDown { .. });
                tracing::warn!(device, port, is_down, "the port of an RDMA device changed");
                for (at, signal) in lock(&self.links).values() {
                    if let Some(signal) = signal.upgrade().filter(|_| *at == port) {
                        signal.port_down.store(is_down, Ordering::Relaxed);
                    }
                }
            }
            AsyncEvent::Notice(what) => tracing::debug!(device, what, "an event of an RDMA device"),
            AsyncEvent::Unknown(event) => tracing::warn!(device, event, "an unknown event of an RDMA device"),
        }
    }

    fn tell_all(&self, fault: HardwareFault) {
        let error = LinkError::Hardware { device: self.device.clone(), fault };
        let links: Vec<_> = lock(&self.links).values().filter_map(|(_, signal)| signal.upgrade()).collect();
        links.iter().for_each(|signal| signal.raise(error.clone()));
    }
}

/// Where a link hears what happened outside its queues.
#[derive(Debug)]
pub(crate) struct Signal {
    wake: OwnedFd,
    error: Mutex<Option<LinkError>>,
    port_down: AtomicBool,
}

impl Signal {
    pub(crate) fn new() -> Result<Arc<Self>, LinkError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|source| LinkError::System { what: "make an event descriptor", source })?;
        Ok(Arc::new(Self { wake, error: Mutex::new(None), port_down: AtomicBool::new(false) }))
    }

    /// Tells an error; the first one stays that does not leave its cause open. [`Signal::fd`] is
    /// readable from then on, until the error is asked for.
    pub(crate) fn raise(&self, error: LinkError) {
        // Held until its descriptor is readable, too: none that was told is missed.
        let mut known = lock(&self.error);
        match &mut *known {
            Some(known) => keep_cause(known, error),
            None => *known = Some(error),
        }
        // An eventfd's counter takes a one always, short of 2^64 of them.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    pub(crate) fn error(&self) -> Option<LinkError> {
        let known = lock(&self.error);
        if known.is_some() {
            // Who waits for a better reason sleeps meanwhile.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        known.clone()
    }

    /// The reason behind an error, where this side's port being down is it.
    pub(crate) fn explain(&self, error: LinkError) -> LinkError {
        match error {
            // Soft-RoCE that finds no route to the peer flushes its requests and tells no reason.
            LinkError::Hardware {
                device,
                fault: HardwareFault::PathLost | HardwareFault::LocalOperation | HardwareFault::QueuePair,
            } if self.is_port_down() => LinkError::Hardware { device, fault: HardwareFault::PortDown },
            error => error,
        }
    }

    /// Whether the port was down when it was last heard of.
    pub(crate) fn is_port_down(&self) -> bool {
        self.port_down.load(Ordering::Relaxed)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// The thread that watches a device. It ends when the device is removed.
struct Watch {
    context: Arc<Context>,
    channel: Arc<EventChannel>,
    subscribers: Arc<Subscribers>,
}

impl Watch {
    fn run(self) {
        while self.look().is_ok() {
            let fds = [self.context.async_fd(), self.channel.fd()];
            if os::wait_readable(&fds, LOOK_AROUND).is_err() {
                thread::sleep(PAUSE);
            }
        }
        let device = &*self.subscribers.device;
        tracing::warn!(device, "an RDMA device was removed");
        self.subscribers.removed.store(true, Ordering::SeqCst);
        self.subscribers.tell_all(HardwareFault::DeviceRemoved);
        let context = &self.context;
        let removed: Vec<_> =
            lock(&DEVICES).extract_if(.., |device| Arc::ptr_eq(&device.context, context)).collect();
        drop(self.context);
        drop(removed);
    }

    /// Passes on what happened; fails when the device is gone.
    fn look(&self) -> Result<(), ()> {
        while let Ok(Some(event)) = self.channel.next() {
            if event.kind == EventKind::DeviceRemoval {
                return Err(());
            }
        }
        loop {
            match self.context.next_async_event() {
                Ok(Some(event)) => self.subscribers.tell(event),
                Ok(None) => return Ok(()),
                Err(Errno::NODEV | Errno::IO | Errno::BADF) => return Err(()),
                Err(errno) => {
                    let device = &*self.subscribers.device;
                    tracing::warn!(device, %errno, "cannot hear of an RDMA device");
                    thread::sleep(PAUSE);
                    return Ok(());
                }
            }
        }
    }
}

/// Dropped behind everything else of a device.
#[derive(Debug)]
struct Sweep(Arc<Subscribers>);

impl Drop for Sweep {
    fn drop(&mut self) {
        if self.0.removed.load(Ordering::SeqCst) {
            forget_removed_devices();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_queue_pair_gives_way_to_the_first_reason_and_each_wakes_once() {
        let signal = Signal::new().unwrap();
        let is_readable = || os::wait_readable(&[signal.fd()], Duration::ZERO).unwrap();
        let broken = LinkError::Hardware { device: "rxe0".into(), fault: HardwareFault::QueuePair };
        assert!(signal.error().is_none() && !is_readable());
        for (told, kept) in [
            (broken.clone(), broken),
            (LinkError::PeerClosed, LinkError::PeerClosed),
            (LinkError::SessionEnded, LinkError::PeerClosed),
        ] {
            signal.raise(told);
            assert!(is_readable());
            assert_eq!(signal.error(), Some(kept));
            assert!(!is_readable());
        }
    }
}
