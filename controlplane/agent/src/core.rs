//! What all migrations of one agent share.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use thiserror::Error;
use tokio::runtime::Handle;

use crate::config::Config;
use crate::destination::DestinationSession;
use crate::fabrics::Fabrics;
use crate::journal::{Journal, Recovered};
use crate::metrics::Metrics;
use crate::migrations::Registry;
use crate::sockets::{self, SocketFile, SocketRoom};
use crate::{MigrationRole, destination, source};

/// Version of the protocol between agents.
pub(crate) const PROTOCOL_VERSION: u32 = 1;
/// Time for one exchange with the VMM or the peer that nobody waits for with
/// the guest paused.
pub(crate) const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The agent's shared state.
pub(crate) struct Agent {
    pub(crate) config: Config,
    pub(crate) journal: Journal,
    pub(crate) metrics: Metrics,
    pub(crate) registry: Registry,
    pub(crate) sessions: Mutex<HashMap<String, Arc<DestinationSession>>>,
    /// Held while it is recorded that a migration never ran here.
    pub(crate) recording_never_ran: tokio::sync::Mutex<()>,
    pub(crate) fabrics: Fabrics,
    pub(crate) boot_id: String,
    pub(crate) runtime: Handle,
    /// What moving device state cost last, if it was ever done.
    /// Of the last migrations, the newest last.
    device_state_costs: Mutex<VecDeque<Duration>>,
}

/// Why the agent's core cannot start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CoreError {
    /// A socket could not be opened.
    #[error("cannot listen on {address}: is another agent running, or its directory missing?")]
    Listen {
        /// Address or path.
        address: String,
        /// Why.
        #[source]
        source: ramferry_fabric::LinkError,
    },
    /// An RDMA address is configured, and this build cannot use it.
    #[error(
        "rdma_listen is {address}, and this agent was built without verbs: leave it out, or build with the \
         cargo feature \"verbs\""
    )]
    VerbsAbsent {
        /// The address.
        address: std::net::SocketAddr,
    },
    /// The kernel does not tell its boot id.
    #[error("cannot read /proc/sys/kernel/random/boot_id; is /proc mounted?")]
    BootId(#[source] io::Error),
    /// Anybody could put a socket in the place of one of ours.
    #[error(
        "other users may change the run directory {path:?} (mode {mode:04o}, owner {owner}); \
         make it the agent's own and writable by no more than the VMMs' group: chmod o-w"
    )]
    RunDirExposed {
        /// The directory.
        path: std::path::PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The user that owns it.
        owner: u32,
    },
    /// The directory for sockets cannot be made.
    #[error("cannot make the run directory {path:?}; set run_dir to a directory that the agent may write")]
    RunDir {
        /// The directory.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes the directory unless it is there, and sees to it that not anybody can
/// take the place of a socket in it, whose names are known beforehand. VMMs of
/// other users reach their own sockets in it, by name.
fn make_run_dir(path: &Path) -> Result<(), CoreError> {
    let cannot = |source| CoreError::RunDir { path: path.to_owned(), source };
    if !path.try_exists().map_err(cannot)? {
        std::fs::create_dir_all(path).map_err(cannot)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o711)).map_err(cannot)?;
    }
    let stat = rustix::fs::stat(path).map_err(|errno| cannot(errno.into()))?;
    let ours = stat.st_uid == 0 || stat.st_uid == rustix::process::geteuid().as_raw();
    if ours && stat.st_mode & 0o002 == 0 {
        return Ok(());
    }
    Err(CoreError::RunDirExposed { path: path.to_owned(), mode: stat.st_mode & 0o7777, owner: stat.st_uid })
}

impl Agent {
    /// Opens the data plane's sockets, and takes up what the journal holds.
    pub(crate) fn start(
        config: Config,
        journal: Journal,
        recovered: Vec<Recovered>,
        metrics: Metrics,
    ) -> Result<Arc<Self>, CoreError> {
        make_run_dir(&config.run_dir)?;
        sockets::sweep(&config.run_dir);
        let fabrics = Fabrics::open(&config)?;
        let boot_id =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(CoreError::BootId)?;
        let registry = Registry::new(config.max_migrations);
        let agent = Arc::new(Self {
            config,
            journal,
            metrics,
            registry,
            sessions: Mutex::default(),
            recording_never_ran: tokio::sync::Mutex::default(),
            fabrics,
            boot_id: boot_id.trim().to_owned(),
            runtime: Handle::current(),
            device_state_costs: Mutex::default(),
        });
        crate::throttle::undo_all(&agent.config);
        for found in recovered {
            match found.created.role {
                MigrationRole::Source => source::recover(&agent, found),
                MigrationRole::Destination => destination::recover(&agent, found),
            }
        }
        Ok(agent)
    }

    /// Ends what can be ended before a shutdown: source migrations that are not
    /// handed over are cancelled. Returns when that is done, or after `grace`.
    pub(crate) async fn shut_down(&self, grace: Duration) {
        let entries = self.registry.all();
        for entry in entries.iter().filter(|entry| entry.role == MigrationRole::Source) {
            source::cancel(entry);
        }
        let ended = async {
            for entry in entries.iter().filter(|entry| !entry.has_ended()) {
                let mut view = entry.subscribe();
                // Fails only when the entry is gone.
                let _ = view.wait_for(|view| crate::migrations::is_final(view.state())).await;
            }
        };
        if tokio::time::timeout(grace, ended).await.is_err() {
            tracing::warn!(
                ?grace,
                "migrations are still under way; the journal takes them up at the next start"
            );
        }
    }

    /// What moving device state will cost: the least that it cost of late, or an
    /// estimate from what a small QEMU guest takes and the memory that its VMM
    /// copies. The least, because one migration on a busy host must not have the
    /// next ones refuse their switchover.
    pub(crate) fn device_state_cost(&self, private_bytes: u64) -> Duration {
        const LEAST: Duration = Duration::from_millis(10);
        const BYTES_PER_SECOND: f64 = 1e9;
        let copied = Duration::from_secs_f64(private_bytes as f64 / BYTES_PER_SECOND);
        let costs = self.device_state_costs.lock().expect("no panic while it is held");
        costs.iter().min().copied().unwrap_or(LEAST + copied)
    }

    pub(crate) fn note_device_state_cost(&self, cost: Duration) {
        const KEPT: usize = 8;
        let mut costs = self.device_state_costs.lock().expect("no panic while it is held");
        if costs.len() == KEPT {
            costs.pop_front();
        }
        costs.push_back(cost);
    }

    pub(crate) fn session(&self, id: &str) -> Option<Arc<DestinationSession>> {
        self.sessions.lock().expect("no panic while it is held").get(id).cloned()
    }

    /// At a source: the unix socket for the device state of migration `id`.
    pub(crate) fn device_state_socket(&self, id: &str) -> SocketFile {
        SocketFile::new(self.config.run_dir.join(format!("{id}.source.sock")))
    }

    /// At a destination: where the VMM makes its socket for the device state of migration `id`.
    pub(crate) fn device_state_room(&self, id: &str) -> SocketRoom {
        SocketRoom::new(self.config.run_dir.join(format!("{id}.destination")))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::Options;

    /// An agent with its state in `directory`, which serves no gRPC.
    pub(crate) fn agent(directory: &Path) -> Arc<Agent> {
        let options = Options {
            data_listen: Some("127.0.0.1:0".into()),
            state_dir: Some(directory.join("state")),
            run_dir: Some(directory.join("run")),
            ..Options::default()
        };
        let config = Config::check(&options).unwrap();
        let (journal, recovered) = Journal::open(&directory.join("journal")).unwrap();
        Agent::start(config, journal, recovered, Metrics::new()).unwrap()
    }

    #[test]
    fn new_run_directory_may_be_searched_by_vmms_and_changed_by_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/run");
        make_run_dir(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o711);
        let ours = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(&path, ours.clone()).unwrap();
        make_run_dir(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, ours.mode());
    }
}
