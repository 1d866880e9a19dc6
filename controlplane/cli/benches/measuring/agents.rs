//! Two agents in processes of their own, and a guest that goes from the one to
//! the other.

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use ramferry_lab::{Credentials, Qemu};
use ramferry_proto::v1;
use ramferry_proto::v1::migration_service_client::MigrationServiceClient;
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use super::costs::{Cost, watch};

/// Longest migration.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest that an agent takes to attach its probes.
const PROBES_PATIENCE: Duration = Duration::from_secs(30);
/// Lines of an agent's log that are kept until somebody asks.
const LOG_LINES: usize = 1000;

/// What an agent does with its eBPF probes, which concern every process of the host as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probes {
    Attached,
    Off,
}

impl Probes {
    /// In the order of a run: each comes first as often as the other, for whoever comes second finds the host as the first
    /// left it.
    pub(crate) fn both(run: usize) -> [Probes; 2] {
        if run.is_multiple_of(2) { [Probes::Attached, Probes::Off] } else { [Probes::Off, Probes::Attached] }
    }

    /// An agent that takes no part in what is measured, and whose probes see all of it as long as it lives: a kernel has
    /// those of one agent on it, also where two hosts share it.
    pub(crate) fn bystander(self) -> Result<Agent> {
        Agent::start(self)
    }

    /// How cases are named.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Probes::Attached => "probes attached",
            Probes::Off => "no probes",
        }
    }
}

/// An agent; it ends when it is dropped.
pub(crate) struct Agent {
    process: Process,
    grpc: String,
    metrics: String,
    runtime: Runtime,
    caller: Option<Credentials>,
    log: Mutex<Receiver<String>>,
    _directories: [TempDir; 2],
}

/// Killed and reaped when it is dropped.
struct Process(Child);

/// What a migration took.
#[derive(Debug)]
pub(crate) struct Voyage {
    pub(crate) progress: v1::MigrationProgress,
    /// When the call was made.
    pub(crate) called: SystemTime,
    pub(crate) source: Cost,
    pub(crate) destination: Cost,
}

impl Voyage {
    pub(crate) fn transferred_bytes(&self) -> u64 {
        self.progress.transferred_bytes
    }

    /// Time of the copy itself: of all rounds.
    pub(crate) fn copy_seconds(&self) -> Result<f64> {
        self.progress.rounds.iter().map(|round| seconds(round.duration)).sum()
    }

    pub(crate) fn total_seconds(&self) -> Result<f64> {
        seconds(self.progress.total_time)
    }

    pub(crate) fn downtime_seconds(&self) -> Result<f64> {
        seconds(self.progress.downtime)
    }

    pub(crate) fn downtime_part_seconds(&self, name: &str) -> Result<f64> {
        let part = self.progress.downtime_parts.iter().find(|part| part.name == name);
        seconds(part.with_context(|| format!("no part {name} of the downtime"))?.duration)
    }

    /// Every part of the downtime that the agent tells of, in its order.
    pub(crate) fn downtime_parts(&self) -> Result<Vec<(String, f64)>> {
        let parts = &self.progress.downtime_parts;
        parts.iter().map(|part| Ok((part.name.clone(), seconds(part.duration)?))).collect()
    }

    pub(crate) fn registration_seconds(&self) -> Result<f64> {
        seconds(self.progress.registration_time)
    }

    pub(crate) fn setup_seconds(&self) -> Result<f64> {
        seconds(self.progress.setup_time)
    }
}

impl Agent {
    /// An agent that serves loopback only.
    pub(crate) fn start(probes: Probes) -> Result<Agent> {
        let options = ["--data-listen".to_owned(), "127.0.0.1:0".to_owned()];
        Agent::start_with("127.0.0.1", &options, None, probes)
    }

    /// An agent with these options, which is called at that address with the caller's credentials.
    pub(crate) fn start_with(
        address: &str,
        options: &[String],
        caller: Option<&Credentials>,
        probes: Probes,
    ) -> Result<Agent> {
        let directory = tempfile::tempdir()?;
        // On a tmpfs, as `/run` is: what a guest is owed is kept there, and waits for no disk.
        let run_directory = tempfile::tempdir_in("/dev/shm")?;
        let mut child = Command::new(env!("CARGO_BIN_EXE_ramferry"))
            .args(["agent", "--listen", &format!("{address}:0"), "--metrics-listen", "127.0.0.1:0"])
            .args(["--log-format", "json"])
            .args(["--probes", if probes == Probes::Off { "off" } else { "auto" }])
            .arg("--state-dir")
            .arg(directory.path().join("state"))
            .arg("--run-dir")
            .arg(run_directory.path().join("run"))
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start an agent")?;
        let stderr = BufReader::new(child.stderr.take().context("the agent has no stderr")?);
        let process = Process(child);
        let (Addresses { grpc, metrics }, log) = listening(stderr)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        if probes == Probes::Attached {
            await_probes(&log)?;
        }
        Ok(Agent {
            process,
            grpc,
            metrics,
            runtime,
            caller: caller.cloned(),
            log: Mutex::new(log),
            _directories: [directory, run_directory],
        })
    }

    /// What it has logged since it started, or since the last call: the first lines, where there are many.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).try_iter().collect::<Vec<_>>().join("\n")
    }

    /// Its metrics as they are now.
    pub(crate) fn scrape(&self) -> Result<String> {
        let mut stream = TcpStream::connect(&self.metrics).context("cannot reach an agent's metrics")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "an agent does not tell its metrics: {answer}");
        Ok(answer)
    }

    pub(crate) fn process(&self) -> u32 {
        self.process.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a migration is asked for.
pub(crate) fn order(fabric: &str, registration: &str) -> Result<v1::MigrationParameters> {
    let fabric = v1::FabricKind::from_str_name(&format!("FABRIC_KIND_{}", fabric.to_uppercase()))
        .with_context(|| format!("{fabric} is no fabric"))?;
    let registration = registration.to_uppercase().replace('-', "_");
    let registration = v1::RegistrationMode::from_str_name(&format!("REGISTRATION_MODE_{registration}"))
        .with_context(|| format!("{registration} is no mode of registration"))?;
    Ok(v1::MigrationParameters {
        fabric: fabric.into(),
        registration_mode: registration.into(),
        ..Default::default()
    })
}

/// Moves a guest from the one agent to the other, looking at their memory at every `interval`.
pub(crate) fn migrate(
    (source, destination): (&Agent, &Agent),
    (from, to): (&Qemu, &Qemu),
    parameters: v1::MigrationParameters,
    interval: Duration,
) -> Result<Voyage> {
    let spec = v1::MigrationSpec {
        source_qmp_path: from.qmp_path().display().to_string(),
        destination_qmp_path: to.qmp_path().display().to_string(),
        destination_agent: destination.grpc.clone(),
        parameters: Some(parameters),
    };
    // Connected before the call, and anew each time: nobody keeps a connection alive between two.
    let client = source.runtime.block_on(connect(&source.grpc, source.caller.as_ref()))?;
    let processes = [source.process(), destination.process()];
    let ((progress, called), costs) = watch(&processes, interval, || {
        source.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, order_and_follow(client, spec))
                .await
                .context("the migration does not end")?
        })
    })?;
    let [source, destination] = costs[..] else { unreachable!("two processes were watched") };
    Ok(Voyage { progress, called, source, destination })
}

async fn order_and_follow(
    mut client: MigrationServiceClient<Channel>,
    spec: v1::MigrationSpec,
) -> Result<(v1::MigrationProgress, SystemTime)> {
    let called = SystemTime::now();
    let request = v1::CreateMigrationRequest { spec: Some(spec), ..Default::default() };
    let answer = client.create_migration(request).await.context("the migration was refused")?.into_inner();
    let id = answer.migration.context("an answer without a migration")?.id;
    let mut stream =
        client.watch_migration(v1::WatchMigrationRequest { id, interval: None }).await?.into_inner();
    let mut last = None;
    while let Some(answer) = stream.message().await? {
        last = answer.migration;
    }
    let migration = last.context("the migration was not to be seen")?;
    ensure!(
        migration.state() == v1::MigrationState::Succeeded,
        "the migration ended in {:?}: {:?}",
        migration.state(),
        migration.error
    );
    Ok((migration.progress.context("a migration without progress")?, called))
}

async fn connect(grpc: &str, caller: Option<&Credentials>) -> Result<MigrationServiceClient<Channel>> {
    let scheme = if caller.is_some() { "https" } else { "http" };
    let mut endpoint = Channel::from_shared(format!("{scheme}://{grpc}"))?;
    if let Some(caller) = caller {
        let (certificate, key) = (std::fs::read(&caller.certificate)?, std::fs::read(&caller.key)?);
        let authority = Certificate::from_pem(std::fs::read(&caller.authority)?);
        let identity = Identity::from_pem(certificate, key);
        endpoint =
            endpoint.tls_config(ClientTlsConfig::new().ca_certificate(authority).identity(identity))?;
    }
    let channel = endpoint.connect().await.with_context(|| format!("cannot reach the agent at {grpc}"))?;
    Ok(MigrationServiceClient::new(channel))
}

/// Where an agent is.
struct Addresses {
    grpc: String,
    metrics: String,
}

/// Where the agent says that it is, and what it says from then on.
fn listening(log: impl BufRead + Send + 'static) -> Result<(Addresses, Receiver<String>)> {
    let mut lines = log.lines();
    let mut said = Vec::new();
    for line in lines.by_ref() {
        let line = line?;
        let entry: Value = serde_json::from_str(&line).unwrap_or_default();
        if entry["message"] == "agent started" {
            let address = |key: &str| entry[key].as_str().context("the agent does not say where it is");
            let addresses =
                Addresses { grpc: address("grpc")?.to_owned(), metrics: address("metrics")?.to_owned() };
            let (sender, receiver) = sync_channel(LOG_LINES);
            said.into_iter().for_each(|line| drop(sender.try_send(line)));
            // Its log must not fill the pipe: lines that nobody takes are dropped.
            std::thread::spawn(move || {
                lines.map_while(Result::ok).for_each(|line| drop(sender.try_send(line)));
            });
            return Ok((addresses, receiver));
        }
        said.push(line);
    }
    anyhow::bail!("the agent did not start: {}", said.join("\n"))
}

/// Waits until an agent has attached its probes.
fn await_probes(log: &Receiver<String>) -> Result<()> {
    loop {
        let line = log.recv_timeout(PROBES_PATIENCE).context("the agent does not say what its probes do")?;
        let entry: Value = serde_json::from_str(&line).unwrap_or_default();
        if entry["message"] == "eBPF probes" {
            ensure!(entry["attached"].as_u64() > Some(0), "no probe is attached: {line}");
            return Ok(());
        }
    }
}

pub(crate) fn seconds(duration: Option<prost_types::Duration>) -> Result<f64> {
    let duration = duration.context("the migration does not say how long it took")?;
    Ok(Duration::try_from(duration)?.as_secs_f64())
}
