//! The migrations that this agent knows: those that run, and those that ended.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use ramferry_engine::Parameters;
use ramferry_mover::SourceHandle;
use ramferry_proto::v1;
use thiserror::Error;
use tokio::sync::watch;

use crate::MigrationRole;

/// Most migrations that are known, those that ended included: each is a file of
/// the journal, and callers and peers choose their number. As many again that
/// never ran here: a peer makes such a record by asking.
const KNOWN_LIMIT: usize = 10_000;

/// One migration as this agent sees it.
pub(crate) struct Entry {
    pub(crate) id: String,
    pub(crate) role: MigrationRole,
    pub(crate) request_id: String,
    /// As the caller gave it; the view's follows what is changed later.
    pub(crate) asked: Option<v1::MigrationSpec>,
    view: watch::Sender<v1::Migration>,
    /// At a source, while the migration runs: its driver, and the parameters last set.
    driver: Mutex<Option<(SourceHandle, Parameters)>>,
    /// At a destination: the source knows how it ended.
    settled: AtomicBool,
    /// It was only asked about.
    pub(crate) never_ran: bool,
}

impl Entry {
    pub(crate) fn new(request_id: String, role: MigrationRole, view: v1::Migration) -> Arc<Self> {
        Arc::new(Self::of(request_id, role, view, false))
    }

    /// What is kept of an id that no session had: that it never will have one here.
    pub(crate) fn never_ran(view: v1::Migration) -> Arc<Self> {
        Arc::new(Self::of(String::new(), MigrationRole::Destination, view, true))
    }

    fn of(request_id: String, role: MigrationRole, mut view: v1::Migration, never_ran: bool) -> Self {
        view.role = v1::MigrationRole::from(role).into();
        if view.create_time.is_none() {
            view.create_time = Some(SystemTime::now().into());
        }
        let (id, asked) = (view.id.clone(), view.spec.clone());
        let view = watch::Sender::new(view);
        Self {
            id,
            role,
            request_id,
            asked,
            view,
            driver: Mutex::new(None),
            settled: AtomicBool::new(false),
            never_ran,
        }
    }

    pub(crate) fn view(&self) -> v1::Migration {
        self.view.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<v1::Migration> {
        self.view.subscribe()
    }

    /// Changes the view; notes when its state was entered.
    pub(crate) fn update(&self, change: impl FnOnce(&mut v1::Migration)) {
        self.view.send_modify(|view| {
            let before = view.state;
            change(view);
            if view.state != before {
                let now = Some(SystemTime::now().into());
                view.state_changes.push(v1::StateChange { state: view.state, time: now });
                if is_final(view.state()) {
                    view.end_time = now;
                }
            }
        });
    }

    /// At a destination: the source's agent ended the control stream by itself.
    pub(crate) fn settle(&self) {
        self.settled.store(true, Ordering::Release);
    }

    /// Whether the source will not ask for the outcome: it knows it, or the
    /// answer to a migration that is forgotten would be the same.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire) || self.view.borrow().state() != v1::MigrationState::Succeeded
    }

    pub(crate) fn has_ended(&self) -> bool {
        is_final(self.view.borrow().state())
    }

    pub(crate) fn set_driver(&self, driver: Option<(SourceHandle, Parameters)>) {
        *self.driver() = driver;
    }

    pub(crate) fn driver(&self) -> MutexGuard<'_, Option<(SourceHandle, Parameters)>> {
        self.driver.lock().expect("no panic while it is held")
    }
}

/// Whether a migration in `state` never changes again.
pub(crate) fn is_final(state: v1::MigrationState) -> bool {
    use v1::MigrationState::{Cancelled, Failed, Succeeded};
    matches!(state, Succeeded | Failed | Cancelled)
}

/// All migrations of one agent.
#[derive(Clone)]
pub(crate) struct Registry {
    inner: Arc<Mutex<Inner>>,
    max_active: u32,
    known_limit: usize,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<(MigrationRole, String), Arc<Entry>>,
    /// Entries of migrations that never ran.
    never_ran: usize,
    /// Ids that are being made into entries, or whose entries have not ended.
    active: HashSet<(MigrationRole, String)>,
    /// Guests of active migrations, by the VMM's process.
    guests: HashMap<u32, String>,
    /// Their QMP sockets: each serves one client at a time, and a second would
    /// not even learn whose process it is.
    sockets: HashMap<PathBuf, SocketUse>,
}

struct SocketUse {
    id: String,
    /// The migration is over but for what it has to let go.
    is_over: bool,
}

impl Inner {
    fn check_socket(&self, socket: &Path) -> Result<(), Refusal> {
        match self.sockets.get(socket) {
            Some(other) => Err(Refusal::SocketBusy {
                socket: socket.to_owned(),
                other: other.id.clone(),
                is_over: other.is_over,
            }),
            None => Ok(()),
        }
    }
}

/// Why a migration is not admitted.
#[derive(Debug, Error)]
pub(crate) enum Refusal {
    #[error("migration {0:?} exists already; choose another id, or delete it when it has ended")]
    Exists(String),
    #[error("this agent runs {0} migrations already, its max_migrations; try again when one has ended")]
    Full(u32),
    #[error("this agent keeps the records of {0} migrations, the most it can; delete those that have ended")]
    TooManyKnown(usize),
    #[error(
        "this agent keeps the records of {0} migrations that never ran here, the most it can; delete them"
    )]
    TooManyNeverRan(usize),
    #[error("the guest of process {pid} is being migrated by {other:?}; wait for that or cancel it")]
    GuestBusy { pid: u32, other: String },
    #[error("the guest at {socket:?} is being migrated by {other:?}; wait for that or cancel it")]
    SocketBusy { socket: PathBuf, other: String, is_over: bool },
}

impl Refusal {
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Refusal::Exists(_) => "MIGRATION_EXISTS",
            Refusal::Full(_) => "TOO_MANY_MIGRATIONS",
            Refusal::TooManyKnown(_) | Refusal::TooManyNeverRan(_) => "TOO_MANY_RECORDS",
            Refusal::GuestBusy { .. } | Refusal::SocketBusy { .. } => "GUEST_BUSY",
        }
    }
}

/// A place among the active migrations; given back on drop.
pub(crate) struct Claim {
    registry: Registry,
    key: (MigrationRole, String),
    pid: Option<u32>,
    socket: Option<PathBuf>,
}

impl Claim {
    /// Claims the QMP socket of a guest, which no other migration may use.
    pub(crate) fn claim_socket(&mut self, socket: &Path) -> Result<(), Refusal> {
        let mut inner = self.registry.lock();
        inner.check_socket(socket)?;
        inner.sockets.insert(socket.to_owned(), SocketUse { id: self.key.1.clone(), is_over: false });
        self.socket = Some(socket.to_owned());
        Ok(())
    }

    /// Claims the guest of process `pid`, which no other migration may have.
    pub(crate) fn claim_guest(&mut self, pid: u32) -> Result<(), Refusal> {
        let mut inner = self.registry.lock();
        if let Some(other) = inner.guests.get(&pid) {
            return Err(Refusal::GuestBusy { pid, other: other.clone() });
        }
        inner.guests.insert(pid, self.key.1.clone());
        self.pid = Some(pid);
        Ok(())
    }
}

impl Claim {
    /// The guest may be migrated again as soon as this is dropped, which is soon.
    pub(crate) fn is_over(&self) {
        if let Some(socket) = &self.socket
            && let Some(used) = self.registry.lock().sockets.get_mut(socket)
        {
            used.is_over = true;
        }
    }

    /// Keeps the place until the agent ends: the journal does not say how the
    /// migration ended, and a restart takes it up again. A guest that had moved on
    /// by then would be resumed although it runs elsewhere.
    pub(crate) fn keep_until_restart(self) {
        std::mem::forget(self);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        inner.active.remove(&self.key);
        if let Some(pid) = self.pid {
            inner.guests.remove(&pid);
        }
        if let Some(socket) = &self.socket {
            inner.sockets.remove(socket);
        }
    }
}

impl Registry {
    pub(crate) fn new(max_active: u32) -> Self {
        Self { inner: Arc::default(), max_active, known_limit: KNOWN_LIMIT }
    }

    /// Takes a place for a migration that does not exist yet.
    pub(crate) fn claim(&self, role: MigrationRole, id: &str) -> Result<Claim, Refusal> {
        let key = (role, id.to_owned());
        let mut inner = self.lock();
        if inner.entries.contains_key(&key) || inner.active.contains(&key) {
            return Err(Refusal::Exists(id.to_owned()));
        }
        if inner.active.len() >= self.max_active as usize {
            return Err(Refusal::Full(self.max_active));
        }
        if inner.entries.len() - inner.never_ran >= self.known_limit {
            return Err(Refusal::TooManyKnown(self.known_limit));
        }
        inner.active.insert(key.clone());
        Ok(Claim { registry: self.clone(), key, pid: None, socket: None })
    }

    /// A place for a migration found in the journal: it is not refused.
    pub(crate) fn reclaim(&self, role: MigrationRole, id: &str, pid: u32, socket: &Path) -> Claim {
        let key = (role, id.to_owned());
        let mut inner = self.lock();
        inner.active.insert(key.clone());
        inner.guests.insert(pid, id.to_owned());
        // Requests name it by its real path; one that is gone has none.
        let socket = std::fs::canonicalize(socket).unwrap_or_else(|_| socket.to_owned());
        inner.sockets.insert(socket.clone(), SocketUse { id: id.to_owned(), is_over: false });
        Claim { registry: self.clone(), key, pid: Some(pid), socket: Some(socket) }
    }

    /// Refuses a QMP socket that a migration uses.
    pub(crate) fn check_socket(&self, socket: &Path) -> Result<(), Refusal> {
        self.lock().check_socket(socket)
    }

    /// Whether one more migration that never ran here may be kept. They are counted
    /// apart: questions about ids without end keep no migration out.
    pub(crate) fn has_room_for_never_ran(&self) -> Result<(), Refusal> {
        let limit = self.known_limit;
        if self.lock().never_ran < limit { Ok(()) } else { Err(Refusal::TooManyNeverRan(limit)) }
    }

    pub(crate) fn insert(&self, entry: &Arc<Entry>) {
        let mut inner = self.lock();
        inner.never_ran += usize::from(entry.never_ran);
        let before = inner.entries.insert((entry.role, entry.id.clone()), Arc::clone(entry));
        inner.never_ran -= before.map_or(0, |before| usize::from(before.never_ran));
    }

    pub(crate) fn get(&self, role: MigrationRole, id: &str) -> Option<Arc<Entry>> {
        self.lock().entries.get(&(role, id.to_owned())).cloned()
    }

    pub(crate) fn remove(&self, role: MigrationRole, id: &str) {
        let mut inner = self.lock();
        let removed = inner.entries.remove(&(role, id.to_owned()));
        inner.never_ran -= removed.map_or(0, |removed| usize::from(removed.never_ran));
    }

    /// All entries, by id and then role.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        let mut entries: Vec<_> = self.lock().entries.values().cloned().collect();
        entries.sort_by(|a, b| (&a.id, a.role).cmp(&(&b.id, b.role)));
        entries
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic while it is held")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(id: &str) -> v1::Migration {
        v1::Migration { id: id.into(), ..Default::default() }
    }

    #[test]
    fn a_guest_is_migrated_once_at_a_time() {
        let registry = Registry::new(4);
        let mut first = registry.claim(MigrationRole::Source, "a").unwrap();
        first.claim_guest(7).unwrap();
        let mut second = registry.claim(MigrationRole::Source, "b").unwrap();
        assert!(matches!(second.claim_guest(7), Err(Refusal::GuestBusy { pid: 7, .. })));
        first.claim_socket("/run/qmp".as_ref()).unwrap();
        let busy = second.claim_socket("/run/qmp".as_ref()).unwrap_err();
        assert!(matches!(&busy, Refusal::SocketBusy { other, .. } if other == "a"));
        drop(first);
        second.claim_guest(7).unwrap();
        second.claim_socket("/run/qmp".as_ref()).unwrap();
    }

    #[test]
    fn no_more_migrations_are_admitted_than_the_limit() {
        let registry = Registry::new(1);
        let claim = registry.claim(MigrationRole::Source, "a").unwrap();
        assert!(matches!(registry.claim(MigrationRole::Source, "b"), Err(Refusal::Full(1))));
        assert!(matches!(registry.claim(MigrationRole::Source, "a"), Err(Refusal::Exists(_))));
        drop(claim);
        assert!(registry.claim(MigrationRole::Source, "b").is_ok());
    }

    #[test]
    fn no_more_records_are_kept_than_the_limit() {
        let registry = Registry { known_limit: 2, ..Registry::new(9) };
        for id in ["a", "b"] {
            registry.claim(MigrationRole::Source, id).unwrap();
            registry.insert(&Entry::new(String::new(), MigrationRole::Source, view(id)));
        }
        assert!(matches!(registry.claim(MigrationRole::Source, "c"), Err(Refusal::TooManyKnown(2))));
        registry.has_room_for_never_ran().unwrap();
        registry.remove(MigrationRole::Source, "b");
        registry.claim(MigrationRole::Source, "c").unwrap();
    }

    #[test]
    fn ids_that_are_only_asked_about_keep_no_migration_out() {
        let registry = Registry { known_limit: 2, ..Registry::new(9) };
        for id in ["a", "b"] {
            registry.has_room_for_never_ran().unwrap();
            // Whoever is asked twice keeps it once.
            registry.insert(&Entry::never_ran(view(id)));
            registry.insert(&Entry::never_ran(view(id)));
        }
        assert!(matches!(registry.has_room_for_never_ran(), Err(Refusal::TooManyNeverRan(2))));
        registry.claim(MigrationRole::Source, "c").unwrap();
        registry.remove(MigrationRole::Destination, "b");
        registry.remove(MigrationRole::Destination, "b");
        registry.has_room_for_never_ran().unwrap();
    }
}
