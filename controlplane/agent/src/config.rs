//! The agent's configuration: defaults, below a TOML file, below `RAMFERRY_*`
//! environment variables, below command-line flags. One name a key, the same
//! in all of them: `data_listen`, `RAMFERRY_DATA_LISTEN`, `--data-listen`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::Figment;
use figment::providers::{Env, Format as _, Serialized, Toml};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use guest_dirs::{GuestDirs, GuestPathError};

mod guest_dirs;

/// Most migrations that one agent may be told to run at once.
pub const MAX_MIGRATIONS_LIMIT: u32 = 64;
/// Most registration workers of one side of a migration.
pub const REGISTRATION_WORKERS_LIMIT: usize = 16;
/// Longest `shutdown_grace`.
pub const SHUTDOWN_GRACE_LIMIT: Duration = Duration::from_secs(600);

/// The configuration as given: every key may be missing, nothing is checked.
///
/// The CLI fills it from flags; [`Config::load`] merges it over file and environment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The TOML file to read; not itself a key of that file.
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Address of the gRPC services.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    /// Address of the tcp fabric.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_listen: Option<String>,
    /// Address of the verbs fabric, "auto", or "off".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rdma_listen: Option<String>,
    /// The only RDMA device to be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rdma_device: Option<String>,
    /// Address of the Prometheus endpoint, or "off".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<String>,
    /// Where the journal is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    /// Where unix sockets are made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_dir: Option<PathBuf>,
    /// PEM file: this agent's certificate, then its chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file: the certificate's private key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// PEM file: the authorities that sign clients and peers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_ca: Option<PathBuf>,
    /// Name expected in a peer's certificate, instead of the host that was dialled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_server_name: Option<String>,
    /// Most migrations at once, both roles together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_migrations: Option<u32>,
    /// Directories that hold guests' QMP sockets and RAM files; no other is touched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_dirs: Option<Vec<PathBuf>>,
    /// "text" or "json".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<String>,
    /// As in `RUST_LOG`: "info", "info,ramferry_agent=debug".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_filter: Option<String>,
    /// How long running calls may take to end at a shutdown: "10s".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown_grace: Option<String>,
    /// CPUs that the data plane's threads are pinned to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poller_cpus: Option<Vec<usize>>,
    /// Threads that register memory, a migration and side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registration_workers: Option<usize>,
    /// "auto" or "off".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probes: Option<String>,
    /// A hook for tests: where whoever holds migrations before their steps listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_socket: Option<PathBuf>,
}

/// Every key of [`Options`]; other `RAMFERRY_*` variables belong to the client.
const KEYS: &[&str] = &[
    "listen",
    "data_listen",
    "rdma_listen",
    "rdma_device",
    "metrics_listen",
    "state_dir",
    "run_dir",
    "tls_cert",
    "tls_key",
    "tls_ca",
    "tls_server_name",
    "max_migrations",
    "guest_dirs",
    "log_format",
    "log_filter",
    "shutdown_grace",
    "poller_cpus",
    "registration_workers",
    "probes",
    "step_socket",
];

/// A configuration that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Address of the gRPC services. Port 0: the kernel chooses.
    pub listen: SocketAddr,
    /// Address of the tcp fabric. Its bytes are not encrypted; a session's
    /// token is what admits a connection.
    pub data_listen: SocketAddr,
    /// Where guests arrive over verbs.
    pub rdma_listen: RdmaListen,
    /// The only RDMA device to be used; `None` leaves the choice to routing.
    pub rdma_device: Option<String>,
    /// Address of the Prometheus endpoint; `None` is off.
    pub metrics_listen: Option<SocketAddr>,
    /// Where the journal is kept. Must survive a reboot.
    pub state_dir: PathBuf,
    /// Where unix sockets are made.
    pub run_dir: PathBuf,
    /// Mutual TLS of the services, the metrics endpoint and calls to peers.
    pub tls: Option<TlsConfig>,
    /// Most migrations at once, both roles together.
    pub max_migrations: u32,
    /// Where guests' sockets and RAM files may be.
    pub guest_dirs: GuestDirs,
    /// What is logged, and how.
    pub log: LogConfig,
    /// How long running calls may take to end at a shutdown.
    pub shutdown_grace: Duration,
    /// CPUs that the data plane's threads are pinned to.
    pub poller_cpus: Option<Vec<usize>>,
    /// Threads that register memory, a migration and side.
    pub registration_workers: usize,
    /// Whether registration is measured through eBPF, as far as this host allows.
    pub probes: ProbesMode,
    /// A hook for tests: where whoever holds migrations before their steps listens.
    pub step_socket: Option<PathBuf>,
}

/// Whether eBPF probes are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbesMode {
    /// Those that can be.
    Auto,
    /// None.
    Off,
}

/// Where guests arrive over verbs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RdmaListen {
    /// At the address of `data_listen`, where an RDMA device has it; at any
    /// device's, where `data_listen` is any address.
    Auto,
    /// Nowhere.
    Off,
    /// At this address, which an RDMA device must have.
    At(SocketAddr),
}

/// Files of mutual TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// Our certificate, then its chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities that sign the other side.
    pub ca: PathBuf,
    /// Name expected in a server's certificate, instead of the host that was dialled.
    pub server_name: Option<String>,
}

/// What is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// One line of text or one JSON object an event.
    pub format: LogFormat,
    /// As in `RUST_LOG`.
    pub filter: String,
}

/// How a log event is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// A line of text.
    Text,
    /// A JSON object.
    Json,
}

impl Config {
    /// Merges file, environment and `flags`, and checks the result.
    pub fn load(flags: &Options) -> Result<Self, ConfigError> {
        Self::check(&merge(flags)?)
    }

    /// Checks merged options; missing keys get their defaults.
    pub fn check(options: &Options) -> Result<Self, ConfigError> {
        let listen = address("listen", options.listen.as_deref().unwrap_or("127.0.0.1:7050"))?;
        let data_listen = address("data_listen", options.data_listen.as_deref().unwrap_or("127.0.0.1:7051"))?;
        let metrics_listen = match options.metrics_listen.as_deref().unwrap_or("127.0.0.1:9750") {
            "off" => None,
            text => Some(address("metrics_listen", text)?),
        };
        let rdma_listen = match options.rdma_listen.as_deref().unwrap_or("auto") {
            "auto" => RdmaListen::Auto,
            "off" => RdmaListen::Off,
            text => RdmaListen::At(address("rdma_listen", text)?),
        };
        let rdma_address = match rdma_listen {
            RdmaListen::At(address) => Some(address),
            RdmaListen::Auto | RdmaListen::Off => None,
        };
        let tls = tls(options)?;
        let served = [
            ("listen", Some(listen)),
            ("data_listen", Some(data_listen)),
            ("rdma_listen", rdma_address),
            ("metrics_listen", metrics_listen),
        ];
        let exposed =
            served.iter().find_map(|&(key, addr)| Some((key, addr.filter(|addr| !addr.ip().is_loopback())?)));
        if let (Some((key, address)), None) = (exposed, &tls) {
            return Err(ConfigError::NotLoopback { key, address });
        }
        let guest_dirs = guest_dirs(options)?;
        if let (Some((key, address)), true) = (exposed, guest_dirs.is_any()) {
            return Err(ConfigError::GuestDirsMissing { key, address });
        }
        Ok(Self {
            listen,
            data_listen,
            rdma_listen,
            rdma_device: options.rdma_device.clone(),
            metrics_listen,
            state_dir: directory("state_dir", options.state_dir.as_deref(), "/var/lib/ramferry")?,
            run_dir: directory("run_dir", options.run_dir.as_deref(), "/run/ramferry")?,
            tls,
            max_migrations: within(
                "max_migrations",
                options.max_migrations.unwrap_or(4),
                MAX_MIGRATIONS_LIMIT,
            )?,
            guest_dirs,
            log: log(options)?,
            shutdown_grace: shutdown_grace(options.shutdown_grace.as_deref().unwrap_or("10s"))?,
            poller_cpus: options.poller_cpus.as_deref().map(poller_cpus).transpose()?,
            registration_workers: within(
                "registration_workers",
                options.registration_workers.unwrap_or(2),
                REGISTRATION_WORKERS_LIMIT,
            )?,
            probes: probes(options.probes.as_deref().unwrap_or("auto"))?,
            step_socket: options.step_socket.clone(),
        })
    }
}

fn merge(flags: &Options) -> Result<Options, ConfigError> {
    let file = match &flags.config {
        None => Figment::new(),
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|source| ConfigError::File { path: path.clone(), source })?;
            Figment::from(Toml::string(&text))
        }
    };
    merge_over(file.merge(Env::prefixed("RAMFERRY_").only(KEYS)), flags)
}

fn merge_over(below: Figment, flags: &Options) -> Result<Options, ConfigError> {
    let config = flags.config.clone();
    below
        .merge(Serialized::defaults(flags))
        .extract::<Options>()
        .map(|options| Options { config, ..options })
        .map_err(|source| ConfigError::Load { source: Box::new(source) })
}

/// Reads the text of a configuration file.
#[cfg(feature = "fuzzing")]
pub(crate) fn of_text(text: &str) -> Result<Config, ConfigError> {
    Config::check(&merge_over(Figment::from(Toml::string(text)), &Options::default())?)
}

fn address(key: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse().map_err(|_| ConfigError::Invalid {
        key,
        value: text.to_owned(),
        remedy: "give an IP address and a port, as in \"127.0.0.1:7050\" or \"[::1]:7050\"",
    })
}

fn directory(key: &'static str, given: Option<&Path>, default: &str) -> Result<PathBuf, ConfigError> {
    let path = given.unwrap_or(Path::new(default));
    if path.is_absolute() {
        return Ok(path.to_owned());
    }
    Err(ConfigError::Invalid {
        key,
        value: path.display().to_string(),
        remedy: "give an absolute path of a directory",
    })
}

fn within<T>(key: &'static str, value: T, limit: T) -> Result<T, ConfigError>
where
    T: Copy + PartialOrd + From<u8> + std::fmt::Display,
{
    if value >= T::from(1) && value <= limit {
        return Ok(value);
    }
    Err(ConfigError::OutOfRange { key, value: value.to_string(), limit: limit.to_string() })
}

fn tls(options: &Options) -> Result<Option<TlsConfig>, ConfigError> {
    let given = [
        ("tls_cert", options.tls_cert.as_ref()),
        ("tls_key", options.tls_key.as_ref()),
        ("tls_ca", options.tls_ca.as_ref()),
    ];
    let server_name = options.tls_server_name.clone();
    match given.map(|(_, path)| path) {
        [None, None, None] if server_name.is_none() => Ok(None),
        [Some(cert), Some(key), Some(ca)] => {
            Ok(Some(TlsConfig { cert: cert.clone(), key: key.clone(), ca: ca.clone(), server_name }))
        }
        _ => {
            let missing = given.iter().filter(|(_, path)| path.is_none()).map(|&(key, _)| key).collect();
            Err(ConfigError::TlsIncomplete { missing })
        }
    }
}

fn guest_dirs(options: &Options) -> Result<GuestDirs, ConfigError> {
    let dirs = options.guest_dirs.clone().unwrap_or_default();
    if let Some(dir) = dirs.iter().find(|dir| !dir.is_absolute()) {
        return Err(ConfigError::Invalid {
            key: "guest_dirs",
            value: dir.display().to_string(),
            remedy: "give absolute paths of directories",
        });
    }
    Ok(GuestDirs::new(dirs))
}

fn log(options: &Options) -> Result<LogConfig, ConfigError> {
    let format = match options.log_format.as_deref().unwrap_or("text") {
        "text" => LogFormat::Text,
        "json" => LogFormat::Json,
        other => {
            return Err(ConfigError::Invalid {
                key: "log_format",
                value: other.to_owned(),
                remedy: "give \"text\" or \"json\"",
            });
        }
    };
    let filter = options.log_filter.clone().unwrap_or_else(|| "info".to_owned());
    if tracing_subscriber::EnvFilter::try_new(&filter).is_err() {
        return Err(ConfigError::Invalid {
            key: "log_filter",
            value: filter,
            remedy: "give a level or target=level pairs, as in \"info,ramferry_agent=debug\"",
        });
    }
    Ok(LogConfig { format, filter })
}

fn probes(text: &str) -> Result<ProbesMode, ConfigError> {
    match text {
        "auto" => Ok(ProbesMode::Auto),
        "off" => Ok(ProbesMode::Off),
        other => Err(ConfigError::Invalid {
            key: "probes",
            value: other.to_owned(),
            remedy: "give \"auto\" or \"off\"",
        }),
    }
}

fn shutdown_grace(text: &str) -> Result<Duration, ConfigError> {
    match humantime::parse_duration(text) {
        Ok(grace) if grace <= SHUTDOWN_GRACE_LIMIT => Ok(grace),
        _ => Err(ConfigError::Invalid {
            key: "shutdown_grace",
            value: text.to_owned(),
            remedy: "give a time of at most 10 minutes with its unit, as in \"10s\" or \"500ms\"",
        }),
    }
}

fn poller_cpus(cpus: &[usize]) -> Result<Vec<usize>, ConfigError> {
    const HIGHEST: usize = 8191;
    let distinct: std::collections::BTreeSet<usize> = cpus.iter().copied().collect();
    if cpus.is_empty() || distinct.len() != cpus.len() || cpus.iter().any(|&cpu| cpu > HIGHEST) {
        return Err(ConfigError::Invalid {
            key: "poller_cpus",
            value: format!("{cpus:?}"),
            remedy: "give the numbers of one or more CPUs, each once, or leave the key out",
        });
    }
    Ok(cpus.to_vec())
}

/// Why a configuration cannot be used. Names the key, the value and what to do.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration file {}; give --config a TOML file that the agent may read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of another type.
    #[error(
        "configuration has a key or value that is not understood; see `ramferry agent --help` for the keys"
    )]
    Load {
        /// Names the key and where it is from.
        #[source]
        source: Box<figment::Error>,
    },
    /// A value that means nothing.
    #[error("{key} = {value:?} is not usable: {remedy}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A number outside its range.
    #[error("{key} = {value} is out of range: give 1 to {limit}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// The most.
        limit: String,
    },
    /// Some TLS files without the others.
    #[error("TLS needs tls_cert, tls_key and tls_ca together; add {}", missing.join(", "))]
    TlsIncomplete {
        /// The keys to add.
        missing: Vec<&'static str>,
    },
    /// Something but loopback without TLS.
    #[error(
        "{key} = {address} would be reachable from other hosts without TLS; \
         set tls_cert, tls_key and tls_ca, or use a loopback address"
    )]
    NotLoopback {
        /// The key.
        key: &'static str,
        /// Its value.
        address: SocketAddr,
    },
    /// Other hosts could name any socket of this one.
    #[error(
        "{key} = {address} is reachable from other hosts and guest_dirs is empty, so a request could name any \
         unix socket of this host; set guest_dirs to the directories that hold the guests' QMP sockets and RAM files"
    )]
    GuestDirsMissing {
        /// The key that serves other hosts.
        key: &'static str,
        /// Its value.
        address: SocketAddr,
    },
}

#[cfg(test)]
mod tests;
