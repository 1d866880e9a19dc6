//! A whole agent, from its configuration to its end.

use std::path::Path;
use std::time::Duration;

use ramferry_agent::journal::JournalError;
use ramferry_agent::{AgentError, Bound, Config, Options, run_until};
use ramferry_proto::v1;
use ramferry_proto::v1::migration_service_client::MigrationServiceClient;
use ramferry_proto::v1::node_service_client::NodeServiceClient;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Longest wait for anything that an agent without migrations does.
const PATIENCE: Duration = Duration::from_secs(30);

struct Running {
    bound: Bound,
    stop: oneshot::Sender<()>,
    agent: JoinHandle<Result<(), AgentError>>,
}

fn config(dir: &Path) -> Config {
    let any_port = || Some("127.0.0.1:0".to_owned());
    let options = Options {
        listen: any_port(),
        data_listen: any_port(),
        metrics_listen: any_port(),
        state_dir: Some(dir.join("state")),
        run_dir: Some(dir.join("run")),
        // They keep the process of this test from ending for a second.
        probes: Some("off".to_owned()),
        ..Options::default()
    };
    Config::check(&options).expect("usable")
}

async fn start(dir: &Path) -> Running {
    let (stop, stopped) = oneshot::channel::<()>();
    let (ready, bound) = oneshot::channel();
    let config = config(dir);
    let agent = tokio::spawn(async move {
        let shutdown = async {
            let _ = stopped.await;
        };
        run_until(config, shutdown, |bound| ready.send(*bound).expect("awaited")).await
    });
    match tokio::time::timeout(PATIENCE, bound).await.expect("in time") {
        Ok(bound) => Running { bound, stop, agent },
        Err(_) => panic!("did not start: {:?}", agent.await),
    }
}

impl Running {
    fn url(&self) -> String {
        format!("http://{}", self.bound.grpc)
    }

    async fn stop(self) {
        self.stop.send(()).expect("running");
        let result = tokio::time::timeout(PATIENCE, self.agent).await.expect("in time");
        result.expect("no panic").expect("a clean end");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_tells_of_its_host_and_stops_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut node = NodeServiceClient::connect(running.url()).await.unwrap();
    let info = node.get_node_info(v1::GetNodeInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.agent_version, env!("CARGO_PKG_VERSION"));
    assert!(!info.hostname.is_empty() && !info.kernel_release.is_empty());
    assert_eq!(info.boot_id.len(), 36);
    assert_eq!((info.migrations_active, info.migrations_max), (0, 4));
    let names: Vec<_> = info.trackers.iter().map(|tracker| tracker.name.as_str()).collect();
    assert_eq!(names, ["uffd_wp", "soft_dirty"]);
    assert!(info.trackers.iter().all(|tracker| tracker.available == tracker.detail.is_empty()));
    assert!(info.limits.iter().any(|limit| limit.name == "memlock"));

    let mut migrations = MigrationServiceClient::connect(running.url()).await.unwrap();
    let list = migrations.list_migrations(v1::ListMigrationsRequest::default()).await.unwrap().into_inner();
    assert!(list.migrations.is_empty());
    drop((node, migrations));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn second_agent_with_the_same_state_is_refused_until_the_first_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let first = start(dir.path()).await;
    let second = run_until(config(dir.path()), std::future::pending(), |_| {}).await;
    assert!(matches!(second, Err(AgentError::Journal(JournalError::Locked { .. }))), "{second:?}");
    first.stop().await;
    start(dir.path()).await.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_share_a_process() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = start(one.path()).await;
    let second = start(two.path()).await;
    assert_ne!(first.bound, second.bound);
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_directory_that_anybody_may_change_is_refused() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    std::fs::create_dir(&run).unwrap();
    let allow = |mode| std::fs::set_permissions(&run, std::fs::Permissions::from_mode(mode)).unwrap();
    allow(0o1777);
    let refused = run_until(config(dir.path()), std::future::pending(), |_| {}).await.unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("1777") && text.contains("chmod o-w"), "{text}");
    // The VMMs' group may make sockets there.
    allow(0o770);
    start(dir.path()).await.stop().await;
}
