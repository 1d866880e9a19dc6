//! Dashboards and alerts over real agents: every panel shows something, and alerts fire.

mod prometheus;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use ramferry_lab::{Qemu, Workload, skipped};
use ramferry_proto::v1;
use ramferry_proto::v1::FabricKind::Tcp;
use serde_json::Value;

use crate::authority::Authority;
use crate::faults::cut::cut_data;
use crate::faults::stage::{Course, Stage};
use crate::faults::steps::Held;
use crate::harness::{
    Agent, MIB, PATIENCE, Pair, Site, assert_proves_itself, boot, parameters, proof, quiet,
};
use crate::postcopy::lost;
use crate::throttle::stage as throttle;
pub(crate) use prometheus::Prometheus;
use prometheus::{check_metrics, repository};

/// Parts of queries that can have no data here, and why.
const NOT_HERE: [(&str, &str); 2] = [
    ("ramferry_rdma_", "this host has no RDMA device"),
    ("ramferry_ebpf_", "no eBPF probe is attached by these agents"),
];
/// Alerts that this voyage makes fire, each waited for.
const FIRED: [&str; 9] = [
    "RamferryHostUnfit",
    "RamferryTargetDown",
    "RamferrySlowRegistration",
    "RamferryMigrationNotConverging",
    "RamferryMigrationFailures",
    "RamferryDowntimeOverBudget",
    "RamferryMigrationStalled",
    "RamferryPostcopyStalled",
    "RamferryMemoryLost",
];

fn why_not_here(query: &str) -> Option<&'static str> {
    NOT_HERE.iter().find(|(part, _)| query.contains(part)).map(|(_, why)| *why)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_panel_and_rule_has_data_of_real_migrations_and_alerts_fire() {
    let authority = Authority::new();
    let options = authority.options("source", &["peer"]);
    let secured = Agent::start_with(&options.iter().map(String::as_str).collect::<Vec<_>>());
    // It can track no guest, and says so of its host.
    let enter = ["setpriv", "--bounding-set=-sys_ptrace", "--"].map(str::to_owned).into();
    let (pair, mut gone) = (Pair::start(), Agent::start_at(Site { enter, ..Site::here() }, &[]));
    let (waits, loses) = (stage("waits").await, stage("loses-memory").await);
    let held = [&waits, &loses].map(|stage| [&stage.pair.source, &stage.pair.destination]);
    let agents = [&[&pair.source, &pair.destination, &secured, &gone][..], held.as_flattened()].concat();
    let Some(prometheus) = Prometheus::over(&agents) else {
        return skipped("there is no Prometheus (see scripts/setup)");
    };
    prometheus.wait("sum(up) == 8").await;

    registers_slowly(&pair, &prometheus).await;
    prometheus.wait_firing("RamferryHostUnfit").await;
    gone.kill();
    prometheus.wait_firing("RamferryTargetDown").await;
    does_not_converge_and_is_forced(&pair, &prometheus).await;
    if throttle::has_controller() {
        is_throttled(&pair, &prometheus).await;
    }
    stalls(&pair, &prometheus).await;
    waits_in_postcopy(&waits, &prometheus).await;
    loses_memory_in_postcopy(&loses, &prometheus).await;
    if let Some(file) = std::env::var_os("RAMFERRY_PICTURES") {
        keep_answers(&prometheus, Path::new(&file));
    }
    let faults = [every_panel_has_data(&prometheus), every_rule_has_data(&prometheus)].concat();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    for agent in [&pair.source, &pair.destination, &secured] {
        let answer = agent.scrape();
        let (_, exposition) = answer.split_once("\r\n\r\n").unwrap();
        check_metrics(exposition).unwrap();
    }
}

/// A pin budget of a window or two: each is registered only when another was released.
async fn registers_slowly(pair: &Pair, prometheus: &Prometheus) {
    let guest = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    let parameters = v1::MigrationParameters { pin_budget_bytes: 4 * MIB, ..parameters(Tcp) };
    pair.migrate("slow-registration", &guest, &destination, parameters).await;
    prometheus.wait_firing("RamferrySlowRegistration").await;
}

async fn does_not_converge_and_is_forced(pair: &Pair, prometheus: &Prometheus) {
    let guest = boot(proof(Workload { mib: 64, rate_mib: 0, ..quiet() }));
    let destination = guest.destination().start().unwrap();
    let short = v1::MigrationParameters {
        max_downtime: Some(Duration::from_millis(1).try_into().unwrap()),
        no_progress_timeout: Some(Duration::from_secs(60).try_into().unwrap()),
        ..parameters(Tcp)
    };
    let cancelled_at_timeout = v1::MigrationParameters {
        timeout_action: v1::TimeoutAction::Cancel.into(),
        no_progress_timeout: Some(Duration::from_secs(4).try_into().unwrap()),
        ..short
    };
    let ended = pair.run("busy", &guest, &destination, cancelled_at_timeout).await;
    assert_eq!(ended.error.unwrap().reason, "NOT_CONVERGING");
    prometheus.wait_firing("RamferryMigrationFailures").await;

    pair.create("forced", &guest, &destination, short).await.unwrap();
    prometheus.wait_firing("RamferryMigrationNotConverging").await;
    let request = v1::ForceSwitchoverRequest { id: "forced".into() };
    pair.source.client().await.force_switchover(request).await.unwrap();
    let ended = pair.source.wait_end("forced").await;
    assert_eq!(ended.state(), v1::MigrationState::Succeeded, "{:?}", ended.error);
    prometheus.wait_firing("RamferryDowntimeOverBudget").await;
}

async fn is_throttled(pair: &Pair, prometheus: &Prometheus) {
    let guest = boot(proof(throttle::hot()));
    let destination = guest.destination().start().unwrap();
    pair.create("throttled", &guest, &destination, throttle::slow(50)).await.unwrap();
    prometheus.wait("ramferry_migration_throttle_ratio{migration=\"throttled\"} >= 0.3").await;
    cancel(pair, "throttled").await;
}

async fn cancel(pair: &Pair, id: &str) {
    let request = v1::CancelMigrationRequest { id: id.into() };
    pair.source.client().await.cancel_migration(request).await.unwrap();
    pair.source.wait_end(id).await;
}

/// The destination's agent stands still while a migration copies.
async fn stalls(pair: &Pair, prometheus: &Prometheus) {
    let guest: Qemu = boot(proof(quiet()));
    let destination = guest.destination().start().unwrap();
    let slow = v1::MigrationParameters { bandwidth_limit_bits_per_second: 8 * 8 * MIB, ..parameters(Tcp) };
    pair.create("stalled", &guest, &destination, slow).await.unwrap();
    prometheus.wait("ramferry_migration_remaining_bytes{migration=\"stalled\",role=\"source\"} > 0").await;
    let signal = |signal| {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pair.destination.pid()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    };
    signal(rustix::process::Signal::STOP);
    prometheus.wait_firing("RamferryMigrationStalled").await;
    signal(rustix::process::Signal::CONT);
    cancel(pair, "stalled").await;
    // Its end was scraped.
    prometheus.wait("sum(ramferry_migrations_active{role=\"source\"}) == 0").await;
}

/// Two agents that are held, and a guest for a migration of this name.
async fn stage(id: &str) -> Stage {
    let mut stage = Stage::set_course(Course::Postcopy).await;
    stage.id = id.into();
    stage
}

/// In post-copy, owed memory that it does not need now. What it may read was scraped before, at 0.
async fn in_postcopy(stage: &Stage, prometheus: &Prometheus) -> Held {
    stage.begin_course(Course::Postcopy, Tcp).await;
    let held = stage.hold(Course::Postcopy, |step| step.to_string() == "source pause_guest 1").await;
    let instance = stage.pair.destination.metrics;
    let nothing = format!("ramferry_postcopy_fault_duration_seconds_count{{instance=\"{instance}\"}} == 0");
    prometheus.wait(&nothing).await;
    lost::owe_what_is_not_needed(stage, held).await
}

/// The links of a guest in post-copy are lost, and for a while there are no others.
async fn waits_in_postcopy(stage: &Stage, prometheus: &Prometheus) {
    let held = in_postcopy(stage, prometheus).await;
    assert!(cut_data(&stage.pair.source, stage.proxy.address) > 0);
    drop(held);
    let held = stage.hold(Course::Postcopy, |step| step.to_string() == "source reconnect 1").await;
    fires_at_destination(stage, prometheus);
    let others = "ALERTS{alertname=~\"RamferryMigration.*\",alertstate=\"firing\"} \
                  and on (instance, migration) ramferry_migration_postcopy_seconds";
    let others = prometheus.now(others);
    assert!(others.is_empty(), "its alert is another: {others:#?}");
    drop(held);
    stage.steps.open();
    assert_eq!(stage.pair.source.wait_end(&stage.id).await.state(), v1::MigrationState::Succeeded);
    assert_proves_itself(&stage.receiver);
    let expected = "ramferry_migration_expected_downtime_seconds and ramferry_migration_postcopy_seconds";
    let expected = prometheus.all_along(expected);
    assert!(expected.is_empty(), "it has switched over: {expected:#?}");
}

/// The destination is held before each new try to read, and would tell nothing: those go by.
fn fires_at_destination(stage: &Stage, prometheus: &Prometheus) {
    let firing = "ALERTS{alertname=\"RamferryPostcopyStalled\",alertstate=\"firing\",role=\"destination\"}";
    let deadline = Instant::now() + PATIENCE;
    while prometheus.now(firing).is_empty() {
        assert!(Instant::now() < deadline, "never: {firing}");
        drop(stage.steps.next_within(Duration::from_millis(100)));
    }
}

async fn loses_memory_in_postcopy(stage: &Stage, prometheus: &Prometheus) {
    let held = in_postcopy(stage, prometheus).await;
    lost::truncate(&stage.guest);
    drop(held);
    stage.steps.open();
    prometheus.wait_firing("RamferryMemoryLost").await;
    prometheus.wait("sum(ramferry_migrations_active) == 0").await;
}

/// What panels and annotations show nothing though they could.
fn every_panel_has_data(prometheus: &Prometheus) -> Vec<String> {
    let mut faults = Vec::new();
    let mut shown = BTreeSet::new();
    for (name, sheet) in sheets() {
        let annotations = sheet["annotations"]["list"].as_array().unwrap();
        let of_panels = panels(&sheet).iter().flat_map(|panel| {
            let targets = panel["targets"].as_array().cloned().unwrap_or_default();
            targets.into_iter().map(|target| (panel["title"].clone(), target))
        });
        let queries = of_panels.chain(annotations.iter().map(|one| (one["name"].clone(), one.clone())));
        for (title, target) in queries {
            let has_data = answer(prometheus, &target).iter().any(is_a_number);
            shown.insert(format!("{name}: {title}"));
            let query = target["expr"].as_str().unwrap();
            match (has_data, why_not_here(query)) {
                (false, None) => faults.push(format!("{name}: {title} shows nothing: {query}")),
                (true, Some(why)) => eprintln!("{name}: {title} has data, though {why}"),
                (false, Some(why)) => eprintln!("{name}: {title} is not shown: {why}"),
                (true, None) => {}
            }
        }
    }
    eprintln!("{} panels and annotations", shown.len());
    assert!(shown.len() > 50, "{shown:?}");
    faults
}

/// For `make dashboard-pictures`: the dashboards, each query with what it gave.
fn keep_answers(prometheus: &Prometheus, file: &Path) {
    let mut answered = sheets();
    for (_, sheet) in &mut answered {
        for panel in sheet["panels"].as_array_mut().unwrap() {
            let targets = panel.get_mut("targets").and_then(Value::as_array_mut);
            for target in targets.into_iter().flatten() {
                let series = answer(prometheus, target);
                target["series"] = series.into();
            }
        }
    }
    let (start_seconds, end_seconds) = prometheus.time_seconds();
    let sheets: serde_json::Map<_, _> =
        answered.into_iter().map(|(name, sheet)| (name.to_owned(), sheet)).collect();
    let all = serde_json::json!({ "start": start_seconds, "end": end_seconds, "sheets": sheets });
    std::fs::write(file, all.to_string()).unwrap();
}

/// The dashboards by their files' names.
fn sheets() -> Vec<(&'static str, Value)> {
    let read = |name| {
        let path = repository("dashboards/grafana").join(name).with_extension("json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    ["fleet", "migration", "data-plane"].map(|name| (name, read(name))).into()
}

fn panels(sheet: &Value) -> &[Value] {
    sheet["panels"].as_array().unwrap()
}

/// What a panel's query, or an annotation's, gives: now, or all along.
fn answer(prometheus: &Prometheus, target: &Value) -> Vec<Value> {
    let query = chosen(target["expr"].as_str().unwrap());
    if target["instant"] == true { prometheus.now(&query) } else { prometheus.all_along(&query) }
}

/// A query with every variable at its widest, over times that fit a scrape every 200 ms.
fn chosen(query: &str) -> String {
    let values = [
        ("$job", ".*"),
        ("$instance", ".*"),
        ("$migration", ".*"),
        ("$__rate_interval", "2s"),
        ("$__range", "120s"),
        ("offset 15s", "offset 1s"),
    ];
    let query = values.iter().fold(query.to_owned(), |query, (name, value)| query.replace(name, value));
    assert!(!query.contains('$'), "a variable without a value: {query}");
    query
}

/// Whether a series has a value that can be drawn.
fn is_a_number(series: &Value) -> bool {
    let values = series["values"].as_array().cloned().unwrap_or_else(|| vec![series["value"].clone()]);
    values.iter().any(|value| value[1].as_str().is_some_and(|number| !number.contains("NaN")))
}

/// What rules are broken, or compare nothing though they could.
fn every_rule_has_data(prometheus: &Prometheus) -> Vec<String> {
    let mut faults = Vec::new();
    let rules = prometheus.rules();
    assert!(rules.len() > 15, "{rules:#?}");
    for rule in rules {
        let (name, query) = (rule["name"].as_str().unwrap(), rule["query"].as_str().unwrap());
        if rule["health"] != "ok" {
            faults.push(format!("rule {name}: {}", rule["lastError"]));
        }
        let compared = if rule["type"] == "recording" { name } else { without_threshold(query) };
        let has_data = prometheus.all_along(compared).iter().any(is_a_number);
        if !has_data && !FIRED.contains(&name) {
            match why_not_here(query) {
                Some(why) => eprintln!("rule {name} has no data: {why}"),
                None => faults.push(format!("rule {name} has no data: {compared}")),
            }
        }
    }
    faults
}

/// What an alert compares: its expression up to the last comparison.
fn without_threshold(query: &str) -> &str {
    [" > ", " == ", " < "]
        .iter()
        .filter_map(|sign| query.rfind(sign))
        .max()
        .map_or(query, |end| &query[..end])
}
