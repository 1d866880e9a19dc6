//! Windows that one side registers on the other's order, for the other to write or read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ramferry_fabric::windows::{Window, WindowId};
use ramferry_fabric::{Domain, RegionKey, Rights};
use ramferry_ram::Memory;

use crate::batch::batches;
use crate::counters::Counters;
use crate::pool::Pool;

/// Most windows that a peer may hold at once: 64 TiB in windows of 64 MiB.
const MAX_WINDOWS: usize = 1 << 20;

/// A place in a bounded queue of the peer's orders: given back, by being
/// dropped, when the order was carried out.
pub type Place = Arc<dyn Send + Sync>;

/// What became of a window that the peer wants registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisteredWindow {
    /// The window.
    pub id: WindowId,
    /// Its remote key, or why there is none.
    pub key: Result<RegionKey, String>,
    /// What the registration took.
    pub elapsed: Duration,
}

/// An answer to the peer's orders about windows.
#[derive(Clone, Debug)]
pub enum WindowsAnswer {
    /// To `RegisterWindows`, in any order and number.
    Registered(Vec<RegisteredWindow>),
    /// To `ReleaseWindows`.
    Released(Vec<WindowId>),
}

/// Sends an answer to the peer's agent; `false` when that is lost. May block while the control stream is full.
pub type SendWindowsAnswer = Box<dyn Fn(WindowsAnswer) -> bool + Send + Sync>;

/// The windows of one session that the peer ordered, and the threads that register them.
pub(crate) struct Served {
    pool: Pool,
    inner: Arc<Inner>,
}

struct Inner {
    domain: Arc<dyn Domain>,
    memory: Arc<Memory>,
    counters: Arc<Counters>,
    rights: Rights,
    regions: Mutex<HashMap<WindowId, Option<RegionKey>>>,
    answer: SendWindowsAnswer,
}

impl Served {
    pub(crate) fn new(
        domain: Arc<dyn Domain>,
        memory: Arc<Memory>,
        counters: Arc<Counters>,
        rights: Rights,
        threads: usize,
        answer: SendWindowsAnswer,
    ) -> Self {
        let regions = Mutex::default();
        let inner = Arc::new(Inner { domain, memory, counters, rights, regions, answer });
        Self { pool: Pool::new("register", threads), inner }
    }

    /// Begins to register windows; why one may not be, after which the others are all the same.
    pub(crate) fn register(&self, windows: Vec<Window>, place: Option<&Place>) -> Result<(), String> {
        let (admitted, refused) = self.inner.admit(windows);
        for batch in batches(&admitted) {
            let (inner, batch, place) = (Arc::clone(&self.inner), batch.to_vec(), place.cloned());
            self.pool.run(move || {
                inner.register(&batch);
                drop(place);
            });
        }
        refused.map_or(Ok(()), Err)
    }

    pub(crate) fn release(&self, ids: Vec<WindowId>, place: Option<Place>) {
        let inner = Arc::clone(&self.inner);
        self.pool.run(move || {
            inner.release(ids);
            drop(place);
        });
    }

    /// Windows there are, and bytes pinned for them.
    pub(crate) fn pinned(&self) -> (u64, u64) {
        (self.inner.regions().len() as u64, self.inner.domain.pinned_bytes())
    }

    /// Ends the threads behind what is queued.
    pub(crate) fn close(&self) {
        self.pool.close();
    }
}

impl Inner {
    fn regions(&self) -> MutexGuard<'_, HashMap<WindowId, Option<RegionKey>>> {
        self.regions.lock().expect("no panic while it is held")
    }

    /// Takes note of windows that are to be registered: those that may be, and why one may not.
    fn admit(&self, windows: Vec<Window>) -> (Vec<Window>, Option<String>) {
        let mut refused = None;
        let mut regions = self.regions();
        let mut may_be_registered = |window: &Window| {
            let why = if !self.memory.layout().contains(window.range) || window.range.length == 0 {
                format!("window {:?} is outside the guest's RAM", window.range)
            } else if regions.len() >= MAX_WINDOWS {
                format!("more than {MAX_WINDOWS} windows")
            } else if regions.insert(window.id, None).is_some() {
                format!("window {} was registered already", window.id.0)
            } else {
                return true;
            };
            refused = Some(why);
            false
        };
        let admitted = windows.into_iter().filter(&mut may_be_registered).collect();
        (admitted, refused)
    }

    fn register(&self, windows: &[Window]) {
        let registered = windows.iter().map(|window| self.register_one(window)).collect();
        (self.answer)(WindowsAnswer::Registered(registered));
    }

    fn register_one(&self, window: &Window) -> RegisteredWindow {
        let started = Instant::now();
        let key = self.domain.register(window.range, self.rights).map(|region| region.key);
        let elapsed = started.elapsed();
        match &key {
            Ok(key) => {
                self.counters.add_registration(window.range.length, elapsed);
                self.regions().insert(window.id, Some(*key));
            }
            Err(error) => {
                self.counters.add_failed_registration(error);
                self.regions().remove(&window.id);
            }
        }
        RegisteredWindow { id: window.id, key: key.map_err(|error| error.to_string()), elapsed }
    }

    fn release(&self, ids: Vec<WindowId>) {
        for id in &ids {
            let Some(key) = self.regions().remove(id).flatten() else { continue };
            let started = Instant::now();
            match self.domain.deregister(key) {
                Ok(()) => self.counters.add_deregistration(started.elapsed()),
                Err(error) => tracing::warn!(%error, "a window could not be deregistered"),
            }
        }
        (self.answer)(WindowsAnswer::Released(ids));
    }
}
