use std::collections::BTreeMap;
use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::diagnostics::{Check, Status, Verdict};

const SECOND: Duration = Duration::from_secs(1);

/// Every helper called once.
fn exercised() -> (Metrics, ActiveMigration) {
    let metrics = Metrics::new();
    let source = MigrationRole::Source;
    let mut active = metrics.migration_started(source, "vm-1");
    active.state(MigrationState::Precopy);
    let ended = metrics.migration_started(MigrationRole::Destination, "vm-0");
    ended.ended(MigrationMode::Precopy, MigrationResult::Failed, Some("LINK_LOST"));
    metrics.downtime(SECOND, &[(DowntimePart::Copy, SECOND)]);
    metrics.registration(source, "dynamic", "tcp", SECOND, 4096);
    metrics.registration_error(source, Some(12));
    metrics.deregistration(source, "tcp", SECOND);
    metrics.transfer("tcp", 4096, 1, 2);
    metrics.stall("registration", Duration::from_millis(1500));
    metrics.harvest("uffd_wp", SECOND, 7);
    metrics.over_max_downtime();
    metrics.certificate("agent", 1_800_000_000);
    metrics.refresh_rdma_ports(rdma_ports::tests::sysfs().path());
    let counts = ramferry_mover::OperationCounts { posted: 3, ..Default::default() };
    metrics.operations("tcp", ramferry_mover::Opcode::Write, &counts);
    metrics.pulled("tcp", 4096);
    metrics.postcopy_faults("tcp", &counts);
    let of_a_source = MigrationGauges {
        expected_downtime: Some(SECOND),
        max_downtime: Some(SECOND),
        throttle_percent: Some(20),
        ..MigrationGauges::default()
    };
    active.set(of_a_source);
    active.state(MigrationState::Postcopy);
    metrics.grpc("other", "OK", SECOND);
    metrics.set_ebpf(&ebpf::tests::states(), ebpf::tests::snapshot());
    let verdict = Verdict { status: Status::Warn, evidence: "1".into(), remedy: "2".into() };
    metrics.diagnosed(&[Finding { check: Check::Memlock, verdict }]);
    (metrics, active)
}

/// Family to the label names of one of its samples.
fn families(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut families = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (series, _) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let family =
            ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
        let labels = labels.trim_end_matches('}').split(',').filter_map(|pair| pair.split_once('='));
        let names: Vec<_> = labels.map(|(label, _)| label.to_owned()).filter(|label| label != "le").collect();
        families.insert(family.to_owned(), names);
    }
    families
}

fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

#[test]
fn every_metric_of_the_list_is_exposed_and_no_other() {
    let (metrics, _active) = exercised();
    let exposed = families(&metrics.render());
    let listed: BTreeMap<_, _> = MetricName::ALL
        .iter()
        .map(|metric| metric.info())
        .map(|info| (info.name.to_owned(), info.labels.iter().map(|&label| label.to_owned()).collect()))
        .collect();
    assert_eq!(exposed, listed);
}

#[test]
fn every_family_has_one_help_and_its_type() {
    let (metrics, _active) = exercised();
    let text = metrics.render();
    for metric in MetricName::ALL {
        let info = metric.info();
        let help = format!("# HELP {} {}\n", info.name, info.help);
        let kind = format!("# TYPE {} {}\n", info.name, info.kind.exposed());
        assert_eq!(text.matches(&help).count(), 1, "{help}");
        assert_eq!(text.matches(&kind).count(), 1, "{kind}");
    }
}

#[test]
fn gauges_of_a_migration_vanish_when_it_ends() {
    let metrics = Metrics::new();
    let active = metrics.migration_started(MigrationRole::Source, "vm-7");
    active.set(MigrationGauges { memory_bytes: 1 << 30, round: 3, ..MigrationGauges::default() });
    active.set_pinned("tcp", 2, 128);
    let text = metrics.render();
    let series = "ramferry_migration_memory_bytes{migration=\"vm-7\",role=\"source\"}";
    assert_eq!(value(&text, series), Some(1_073_741_824.0));
    assert_eq!(value(&text, "ramferry_pinned_bytes{side=\"source\",fabric=\"tcp\"}"), Some(128.0));
    assert_eq!(metrics.migrations_active(), 1);

    active.ended(MigrationMode::Precopy, MigrationResult::Succeeded, None);
    let text = metrics.render();
    assert!(!text.contains("vm-7"), "{text}");
    assert_eq!(value(&text, "ramferry_pinned_bytes{side=\"source\",fabric=\"tcp\"}"), Some(0.0));
    let series = r#"ramferry_migrations_total{role="source",mode="precopy",result="succeeded",reason=""}"#;
    assert_eq!(value(&text, series), Some(1.0));
    assert_eq!(metrics.migrations_active(), 0);
}

#[test]
fn both_roles_of_one_migration_are_apart() {
    let metrics = Metrics::new();
    let _source = metrics.migration_started(MigrationRole::Source, "m");
    let destination = metrics.migration_started(MigrationRole::Destination, "m");
    let rounds = |text: &str| text.matches("ramferry_migration_round{").count();
    assert_eq!(rounds(&metrics.render()), 2);
    drop(destination);
    assert_eq!(rounds(&metrics.render()), 1);
}

#[test]
fn retry_under_the_same_id_outlives_the_first_handle() {
    let metrics = Metrics::new();
    let first = metrics.migration_started(MigrationRole::Source, "m");
    let _second = metrics.migration_started(MigrationRole::Source, "m");
    drop(first);
    assert_eq!(metrics.migrations_active(), 1);
}

#[test]
fn states_are_counted_and_their_time_recorded() {
    let metrics = Metrics::new();
    let mut active = metrics.migration_started(MigrationRole::Source, "m");
    active.state(MigrationState::Preparing);
    active.state(MigrationState::Precopy);
    let text = metrics.render();
    let active_in =
        |state| value(&text, &format!("ramferry_migrations_active{{role=\"source\",state=\"{state}\"}}"));
    assert_eq!((active_in("precopy"), active_in("preparing")), (Some(1.0), Some(0.0)));
    let series = r#"ramferry_migration_phase_duration_seconds_count{role="source",phase="preparing"}"#;
    assert_eq!(value(&text, series), Some(1.0));
}

#[test]
fn time_in_postcopy_is_told_only_there() {
    let metrics = Metrics::new();
    let mut active = metrics.migration_started(MigrationRole::Destination, "m");
    let series = "ramferry_migration_postcopy_seconds{migration=\"m\",role=\"destination\"}";
    active.state(MigrationState::SwitchingOver);
    assert_eq!(value(&metrics.render(), series), None);
    active.state(MigrationState::Postcopy);
    let first = value(&metrics.render(), series).unwrap();
    // Nothing is set in between, as while a guest waits.
    assert!(value(&metrics.render(), series).unwrap() > first);
    active.ended(MigrationMode::Postcopy, MigrationResult::Succeeded, None);
    assert!(!metrics.render().contains("ramferry_migration_postcopy_seconds"));
}

/// Or an alert on their increase would miss the first.
#[test]
fn lost_memory_and_reads_of_a_destination_are_counted_from_zero() {
    let metrics = Metrics::new();
    metrics.reads_begin("tcp");
    let text = metrics.render();
    for mode in ["precopy", "postcopy"] {
        let series = format!(
            r#"ramferry_migrations_total{{role="destination",mode="{mode}",result="failed",reason="MEMORY_LOST"}}"#
        );
        assert_eq!(value(&text, &series), Some(0.0));
    }
    let read = r#"ramferry_completions_total{fabric="tcp",opcode="read",status="success"}"#;
    let faults = r#"ramferry_postcopy_fault_duration_seconds_count{fabric="tcp"}"#;
    let bytes = r#"ramferry_postcopy_bytes_total{fabric="tcp"}"#;
    assert_eq!([read, faults, bytes].map(|series| value(&text, series)), [Some(0.0); 3]);
}

#[test]
fn seconds_keep_their_fraction() {
    let metrics = Metrics::new();
    metrics.stall("credit", Duration::from_millis(250));
    metrics.stall("credit", Duration::from_millis(500));
    metrics.poller(Duration::from_millis(125), SECOND);
    let text = metrics.render();
    assert_eq!(value(&text, "ramferry_stall_seconds_total{cause=\"credit\"}"), Some(0.75));
    assert_eq!(value(&text, "ramferry_poller_busy_seconds_total"), Some(0.125));
}

#[test]
fn reasons_of_a_hostile_peer_stay_bounded() {
    let metrics = Metrics::new();
    let count = || metrics.render().matches("ramferry_migrations_total{").count();
    let at_first = count();
    for n in 0..1000 {
        let active = metrics.migration_started(MigrationRole::Source, "m");
        active.ended(MigrationMode::Precopy, MigrationResult::Failed, Some(&format!("REASON_{n}")));
    }
    let active = metrics.migration_started(MigrationRole::Source, "m");
    active.ended(MigrationMode::Precopy, MigrationResult::Failed, Some("not a \"reason\""));
    assert_eq!(count() - at_first, REASONS_LIMIT + 1);
}

#[test]
fn registration_falls_into_the_bucket_of_its_power_of_two() {
    let metrics = Metrics::new();
    metrics.registration(MigrationRole::Source, "dynamic", "shm", Duration::from_micros(1000), 1);
    metrics.upkeep();
    let text = metrics.render();
    let bucket = |le| {
        let series = format!(
            "ramferry_registration_duration_seconds_bucket{{side=\"source\",mode=\"dynamic\",fabric=\"shm\",le=\"{le}\"}}"
        );
        value(&text, &series)
    };
    assert_eq!(
        (bucket("0.000512"), bucket("0.001024"), bucket("67.108864")),
        (Some(0.0), Some(1.0), Some(1.0))
    );
}

#[test]
fn docs_list_every_metric() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, markdown()).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == markdown(),
        "docs/metrics.md is not that of the code: UPDATE=1 cargo test -p ramferry-agent docs_list_every_metric"
    );
}

#[tokio::test]
async fn endpoint_serves_metrics_and_nothing_else() {
    async fn get(address: std::net::SocketAddr, head: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
    let endpoint = Endpoint::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = endpoint.address();
    let server = tokio::spawn(endpoint.serve(Metrics::new(), None));
    let answer = get(address, "GET /metrics").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(CONTENT_TYPE_HEADER), "{answer}");
    assert!(answer.contains("ramferry_build_info{version="));
    assert!(get(address, "GET /").await.starts_with("HTTP/1.1 404"));
    assert!(get(address, "POST /metrics").await.starts_with("HTTP/1.1 405"));
    server.abort();
}

const CONTENT_TYPE_HEADER: &str = "content-type: text/plain; version=0.0.4; charset=utf-8";
