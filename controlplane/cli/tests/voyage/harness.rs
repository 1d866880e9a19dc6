//! Two agents, two guests, and a call between them.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use ramferry_lab::{Fill, Qemu, QemuBuilder, RamBlock, Workload};
use ramferry_proto::v1;
use ramferry_proto::v1::migration_service_client::MigrationServiceClient;
use serde_json::Value;
use tempfile::TempDir;
use tonic::transport::{Channel, ClientTlsConfig};
use tonic::{Code, Status};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Unless a test asks for another.
const LOG_FILTER: [&str; 2] =
    ["--log-filter", "info,ramferry_agent=debug,ramferry_mover=debug,ramferry_guest=debug"];

/// The program under test.
pub(crate) fn ramferry() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramferry"));
    command.env_remove("RAMFERRY_AGENT").stdin(Stdio::null());
    command
}

/// What doctor says of an agent once that has tried to attach its probes.
pub(crate) fn settled_checks(agent: &str) -> Vec<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let output = ramferry().args(["doctor", "--output", "json", "--agent", agent]).output().unwrap();
        let mut answer: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        let Value::Array(checks) = answer["checks"].take() else { panic!("{output:?}") };
        if checks.iter().any(|check| check["id"] == "ebpf_probes" && check["status"] != "skip") {
            return checks;
        }
        assert!(Instant::now() < deadline, "{checks:?}");
    }
}

/// Where an agent runs.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    /// A command that runs another one there; none for here.
    pub(crate) enter: Vec<String>,
    /// The address that it is served at.
    pub(crate) address: String,
}

impl Site {
    pub(crate) fn here() -> Site {
        Site { enter: Vec::new(), address: "127.0.0.1".into() }
    }

    /// `program`, run there.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut words = self.enter.iter().map(String::as_str).chain([program]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).env_remove("RAMFERRY_AGENT").stdin(Stdio::null());
        command
    }
}

/// An agent in a process of its own; killed and reaped when it is dropped.
pub(crate) struct Agent {
    child: Child,
    directory: TempDir,
    site: Site,
    arguments: Vec<String>,
    pub(crate) grpc: SocketAddr,
    pub(crate) metrics: SocketAddr,
    /// What its callers show; nothing where it serves loopback only.
    pub(crate) caller: Option<ClientTlsConfig>,
    lines: Receiver<String>,
}

impl Agent {
    pub(crate) fn start() -> Agent {
        Agent::start_with(&[])
    }

    pub(crate) fn start_with(arguments: &[&str]) -> Agent {
        Agent::start_at(Site::here(), arguments)
    }

    /// An agent whose state directory is a file system of 64 KiB, which it alone has mounted.
    pub(crate) fn start_on_small_disk() -> Agent {
        const MOUNT: &str = r#"mount -t tmpfs -o size=64k,mode=0700 small "$0" && exec "$@""#;
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let mut enter: Vec<String> =
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", MOUNT].map(Into::into).into();
        enter.push(state.display().to_string());
        Agent::start_in(directory, Site { enter, ..Site::here() }, 0, &[])
    }

    pub(crate) fn start_at(site: Site, arguments: &[&str]) -> Agent {
        Agent::start_in(tempfile::tempdir().unwrap(), site, 0, arguments)
    }

    /// The agent again, after its end: same directories, same options, same address.
    pub(crate) fn restart(&mut self) {
        self.kill();
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let (caller, site) = (self.caller.take(), self.site.clone());
        *self = Agent::start_in(directory, site, self.grpc.port(), &arguments);
        self.caller = caller;
    }

    /// Where it makes its sockets.
    pub(crate) fn run_dir(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    fn start_in(directory: TempDir, site: Site, port: u16, arguments: &[&str]) -> Agent {
        let path = |name: &str| directory.path().join(name);
        // A file that cannot grow is then an error to the agent, and not its end.
        let mut child = site
            .command("sh")
            .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_ramferry")])
            .args(["agent", "--listen", &format!("{}:{port}", site.address)])
            .args(["--data-listen", &format!("{}:0", site.address)])
            .args(["--metrics-listen", "127.0.0.1:0", "--log-format", "json", "--max-migrations", "16"])
            .arg("--state-dir")
            .arg(path("state"))
            .arg("--run-dir")
            .arg(path("run"))
            .args(if arguments.contains(&"--log-filter") { &[][..] } else { &LOG_FILTER })
            // Detaching them keeps a process that is killed from ending for a second.
            .args(if arguments.contains(&"--probes") { &[][..] } else { &["--probes", "off"] })
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
                let _ = child.kill();
                panic!("the agent did not start: {:?}\n{}", child.wait(), seen.join("\n"));
            };
            if let Some((grpc, metrics)) = bound(&line) {
                let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
                let caller = None;
                return Agent { child, directory, site, arguments, grpc, metrics, caller, lines };
            }
            seen.push(line);
        }
    }

    /// `kill -9`, and reaped.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and its end.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        self.stop()
    }

    /// The same, for one that is started again.
    pub(crate) fn stop(&mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap()
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The directory of its journal and its sockets.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What Prometheus would read.
    pub(crate) fn scrape(&self) -> String {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(self.metrics).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer
    }

    /// What it has logged since the last call.
    pub(crate) fn log(&self) -> String {
        self.lines.try_iter().collect::<Vec<_>>().join("\n")
    }

    pub(crate) async fn client(&self) -> MigrationServiceClient<Channel> {
        let scheme = if self.caller.is_some() { "https" } else { "http" };
        let mut endpoint = Channel::from_shared(format!("{scheme}://{}", self.grpc)).unwrap();
        if let Some(caller) = &self.caller {
            endpoint = endpoint.tls_config(caller.clone()).unwrap();
        }
        MigrationServiceClient::new(endpoint.connect().await.unwrap())
    }

    /// Follows a migration until `wanted`.
    pub(crate) async fn wait(&self, id: &str, wanted: impl Fn(&v1::Migration) -> bool) -> v1::Migration {
        let interval = Some(Duration::from_millis(100).try_into().unwrap());
        let request = v1::WatchMigrationRequest { id: id.into(), interval };
        let mut last = None;
        let follow = async {
            let mut stream = self.client().await.watch_migration(request).await.unwrap().into_inner();
            while let Some(response) = stream.message().await.unwrap() {
                let migration = response.migration.unwrap();
                let done = wanted(&migration);
                last = Some(migration);
                if done {
                    return true;
                }
            }
            false
        };
        let found = tokio::time::timeout(PATIENCE, follow).await.unwrap_or(false);
        assert!(found, "migration {id} did not come to what was waited for: {last:#?}\n{}", self.log());
        last.unwrap()
    }

    pub(crate) async fn wait_end(&self, id: &str) -> v1::Migration {
        self.wait(id, |migration| is_final(migration.state())).await
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("log of the agent at {}:\n{}", self.grpc, self.log());
        }
    }
}

/// Where the agent says that it is served.
pub(crate) fn bound(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    if line["message"] != "agent started" {
        return None;
    }
    let address = |name: &str| line[name].as_str()?.parse().ok();
    Some((address("grpc")?, address("metrics")?))
}

pub(crate) fn is_final(state: v1::MigrationState) -> bool {
    use v1::MigrationState::{Cancelled, Failed, Succeeded};
    matches!(state, Succeeded | Failed | Cancelled)
}

/// Two agents.
pub(crate) struct Pair {
    pub(crate) source: Agent,
    pub(crate) destination: Agent,
}

impl Pair {
    pub(crate) fn start() -> Pair {
        Pair { source: Agent::start(), destination: Agent::start() }
    }

    /// The way back.
    pub(crate) fn swap(self) -> Pair {
        Pair { source: self.destination, destination: self.source }
    }

    pub(crate) async fn create(
        &self,
        id: &str,
        source: &Qemu,
        destination: &Qemu,
        parameters: v1::MigrationParameters,
    ) -> Result<v1::Migration, Status> {
        let spec = self.spec(&source.qmp_path(), &destination.qmp_path(), parameters);
        let request = v1::CreateMigrationRequest { id: id.into(), spec: Some(spec), ..Default::default() };
        let response = self.source.client().await.create_migration(request).await?;
        Ok(response.into_inner().migration.unwrap())
    }

    pub(crate) fn spec(
        &self,
        source: &Path,
        destination: &Path,
        parameters: v1::MigrationParameters,
    ) -> v1::MigrationSpec {
        v1::MigrationSpec {
            source_qmp_path: source.display().to_string(),
            destination_qmp_path: destination.display().to_string(),
            destination_agent: self.destination.grpc.to_string(),
            parameters: Some(parameters),
        }
    }

    /// Moves a guest to its end, whichever that is.
    pub(crate) async fn run(
        &self,
        id: &str,
        source: &Qemu,
        destination: &Qemu,
        parameters: v1::MigrationParameters,
    ) -> v1::Migration {
        self.create(id, source, destination, parameters).await.unwrap();
        self.source.wait_end(id).await
    }

    /// Moves a guest, which must succeed.
    pub(crate) async fn migrate(
        &self,
        id: &str,
        source: &Qemu,
        destination: &Qemu,
        parameters: v1::MigrationParameters,
    ) -> v1::Migration {
        let ended = self.run(id, source, destination, parameters).await;
        let logs = || format!("{}\n--- destination\n{}", self.source.log(), self.destination.log());
        assert_eq!(ended.state(), v1::MigrationState::Succeeded, "{:#?}\n{}", ended.error, logs());
        ended
    }
}

/// Parameters that verify, and let a busy guest go.
pub(crate) fn parameters(fabric: v1::FabricKind) -> v1::MigrationParameters {
    v1::MigrationParameters {
        fabric: fabric.into(),
        verify: true,
        timeout_action: v1::TimeoutAction::Force.into(),
        no_progress_timeout: Some(Duration::from_millis(500).try_into().unwrap()),
        ..Default::default()
    }
}

/// A guest that writes a little all the time, and a lot of whose memory is written once.
pub(crate) fn quiet() -> Workload {
    Workload { mib: 16, touch_mib: 96, rate_mib: 32, fill: Fill::Zero, ..Workload::default() }
}

pub(crate) fn proof(workload: Workload) -> QemuBuilder {
    Qemu::builder().block(RamBlock::node(256 * MIB)).proof(workload)
}

/// Starts a guest and waits until it writes.
pub(crate) fn boot(builder: QemuBuilder) -> Qemu {
    let guest = builder.start().unwrap();
    guest.wait_ready(PATIENCE).unwrap();
    guest
}

/// The guest runs on and finds everything as it left it.
pub(crate) fn assert_proves_itself(guest: &Qemu) {
    let tick = guest.next_tick(PATIENCE).unwrap();
    assert_eq!(tick.errors, 0, "{tick:?}");
    let verified = guest.verify(PATIENCE).unwrap();
    assert_eq!(verified.errors, 0, "{:?}", guest.lines());
}

/// Nobody traces the VMM, and its guest runs.
pub(crate) fn assert_runs_untraced(guest: &Qemu) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
    assert!(status.contains("TracerPid:\t0"), "{status}");
    assert_eq!(guest.status().unwrap(), "running");
    assert_proves_itself(guest);
}

/// A call must be refused, with this code and reason, and a message that says `part`.
pub(crate) fn assert_refused(result: Result<v1::Migration, Status>, code: Code, reason: &str, part: &str) {
    use tonic_types::StatusExt as _;
    let status = result.expect_err("it should have been refused");
    let found = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    assert_eq!((status.code(), found.as_str()), (code, reason), "{}", status.message());
    assert!(status.message().contains(part), "{:?} does not say {part:?}", status.message());
}

pub(crate) fn seconds(duration: Option<prost_types::Duration>) -> f64 {
    Duration::try_from(duration.unwrap_or_default()).unwrap().as_secs_f64()
}
