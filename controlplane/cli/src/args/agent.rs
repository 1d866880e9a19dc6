//! Options of `ramferry agent`: each overrides the key of the same name in the
//! configuration file and in the environment.

use std::path::PathBuf;

use clap::Args;

const EXAMPLES: &str = "\
Examples:
  Both agents on this host:
    ramferry agent --state-dir /var/lib/ramferry/a
    ramferry agent --state-dir /var/lib/ramferry/b --run-dir /run/ramferry-b --listen 127.0.0.1:8050 \\
        --data-listen 127.0.0.1:8051 --metrics-listen off

  A host of a cluster:
    ramferry agent --listen 10.0.0.1:7050 --data-listen 10.0.0.1:7051 --guest-dirs /run/guests,/dev/shm/guests \\
        --tls-cert /etc/ramferry/node.pem --tls-key /etc/ramferry/node.key --tls-ca /etc/ramferry/ca.pem

Every option is also a key of the configuration file (data_listen = \"10.0.0.1:7051\") and an
environment variable (RAMFERRY_DATA_LISTEN). Options win over the environment, and the environment
over the file. Only loopback may be served without TLS. SIGTERM and Ctrl-C end the agent; guests that
it was moving run on where they are.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AgentArgs {
    /// TOML file with any of the keys below.
    #[arg(long, env = "RAMFERRY_CONFIG", hide_env_values = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Address of the gRPC services [default: 127.0.0.1:7050].
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<String>,
    /// Address of the tcp fabric [default: 127.0.0.1:7051].
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) data_listen: Option<String>,
    /// Address of the verbs fabric, which an RDMA device must have; auto: that of the tcp fabric, where it
    /// is one; or off [default: auto].
    #[arg(long, value_name = "ADDR:PORT|auto|off")]
    pub(crate) rdma_listen: Option<String>,
    /// The only RDMA device to be used [default: the one by which the peer is reached].
    #[arg(long, value_name = "NAME")]
    pub(crate) rdma_device: Option<String>,
    /// Address of the Prometheus endpoint, or off [default: 127.0.0.1:9750].
    #[arg(long, value_name = "ADDR:PORT|off")]
    pub(crate) metrics_listen: Option<String>,
    /// Directory of the journal; must survive a reboot [default: /var/lib/ramferry].
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Directory for unix sockets [default: /run/ramferry].
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Directories that hold guests' QMP sockets and RAM files; may be repeated [default: any, where only
    /// loopback is served].
    #[arg(long, alias = "guest-dir", value_name = "DIR", value_delimiter = ',')]
    pub(crate) guest_dirs: Option<Vec<PathBuf>>,
    /// Most migrations at once, both roles together [default: 4].
    #[arg(long, value_name = "NUMBER")]
    pub(crate) max_migrations: Option<u32>,
    /// PEM file of this agent's certificate.
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// PEM file of this agent's private key.
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    pub(crate) tls_key: Option<PathBuf>,
    /// PEM file of the authorities that sign clients and peers.
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// The name in peers' certificates, where it is not the host that is called.
    #[arg(long, value_name = "NAME", help_heading = "TLS")]
    pub(crate) tls_server_name: Option<String>,
    /// How log events are written: text or json [default: text].
    #[arg(long, value_name = "FORMAT", help_heading = "Log")]
    pub(crate) log_format: Option<String>,
    /// What is logged: a level, or target=level pairs [default: info].
    #[arg(long, value_name = "FILTER", help_heading = "Log")]
    pub(crate) log_filter: Option<String>,
    /// How long running calls may take to end at a shutdown [default: 10s].
    #[arg(long, value_name = "DURATION", help_heading = "Tuning")]
    pub(crate) shutdown_grace: Option<String>,
    /// CPUs that the threads of the data plane are pinned to: 2,3.
    #[arg(long, value_name = "CPU", value_delimiter = ',', help_heading = "Tuning")]
    pub(crate) poller_cpus: Option<Vec<usize>>,
    /// Threads that register memory, on each side of a migration [default: 2].
    #[arg(long, value_name = "NUMBER", help_heading = "Tuning")]
    pub(crate) registration_workers: Option<usize>,
    /// Whether registration of any process on this host is measured through eBPF, as far as the host allows:
    /// auto or off [default: auto].
    #[arg(long, value_name = "auto|off", help_heading = "Tuning")]
    pub(crate) probes: Option<String>,
    /// For tests: migrations wait before each step for whoever listens at this unix socket.
    #[arg(long, value_name = "PATH", hide = true)]
    pub(crate) step_socket: Option<PathBuf>,
}

impl AgentArgs {
    /// The options, as the agent takes them.
    pub(crate) fn into_options(self) -> ramferry_agent::Options {
        ramferry_agent::Options {
            config: self.config,
            listen: self.listen,
            data_listen: self.data_listen,
            rdma_listen: self.rdma_listen,
            rdma_device: self.rdma_device,
            metrics_listen: self.metrics_listen,
            state_dir: self.state_dir,
            run_dir: self.run_dir,
            tls_cert: self.tls_cert,
            tls_key: self.tls_key,
            tls_ca: self.tls_ca,
            tls_server_name: self.tls_server_name,
            max_migrations: self.max_migrations,
            guest_dirs: self.guest_dirs,
            log_format: self.log_format,
            log_filter: self.log_filter,
            shutdown_grace: self.shutdown_grace,
            poller_cpus: self.poller_cpus,
            registration_workers: self.registration_workers,
            probes: self.probes,
            step_socket: self.step_socket,
        }
    }
}
