//! The binary against a scripted agent: what is asked, printed and exited with.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;

use ramferry_proto::v1::{self, MigrationState};
use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::command::{run, start};
use crate::scripted::{Agent, Call, Script, Step};

mod bench;
mod command;
mod probe;
mod scripted;
mod tls;

const MIGRATE: &str =
    "migrate --id vm-1 --to 10.0.0.2:7050 --source-qmp /run/a.qmp --destination-qmp /run/b.qmp";

fn migration(state: MigrationState) -> v1::Migration {
    let spec = v1::MigrationSpec {
        source_qmp_path: "/run/a.qmp".into(),
        destination_qmp_path: "/run/b.qmp".into(),
        destination_agent: "10.0.0.2:7050".into(),
        parameters: Some(v1::MigrationParameters {
            registration_mode: v1::RegistrationMode::Dynamic.into(),
            ..Default::default()
        }),
    };
    v1::Migration { id: "vm-1".into(), spec: Some(spec), state: state.into(), ..Default::default() }
}

fn update(state: MigrationState) -> Step {
    Step::Update(Box::new(migration(state)))
}

fn nanos(nanos: i32) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: 0, nanos })
}

fn succeeded() -> v1::Migration {
    let progress = v1::MigrationProgress {
        ram_bytes: 4 << 30,
        present_bytes: 1 << 30,
        zero_bytes: 4096,
        transferred_bytes: 1 << 30,
        rounds: vec![v1::Round {
            transferred_bytes: 1 << 30,
            duration: nanos(250_000_000),
            dirtied_bytes: 8192,
        }],
        setup_time: nanos(50_000_000),
        total_time: nanos(400_000_000),
        downtime: nanos(12_000_000),
        downtime_parts: vec![v1::DowntimePart { name: "pause".into(), duration: nanos(1_000_000) }],
        throughput_bits_per_second: 34_000_000_000,
        registration_time: nanos(30_000_000),
        registered_bytes: 1 << 30,
        pinned_peak_bytes: 1 << 29,
        ..Default::default()
    };
    v1::Migration {
        fabric: v1::FabricKind::Shm.into(),
        progress: Some(progress),
        verified: Some(true),
        ..migration(MigrationState::Succeeded)
    }
}

fn ended(state: MigrationState, reason: &str, message: &str) -> Step {
    let error = v1::MigrationError { reason: reason.into(), message: message.into() };
    Step::Update(Box::new(v1::Migration { error: Some(error), ..migration(state) }))
}

fn watched(steps: Vec<Step>) -> Agent {
    Agent::start(Script { watches: vec![steps], ..Script::default() })
}

/// Bound, so that nobody else gets the port, and not listening.
fn deaf_address() -> (OwnedFd, SocketAddr) {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = SocketAddr::try_from(getsockname(&socket).expect("bound")).expect("IPv4");
    (socket, address)
}

fn is_watch(call: &Call) -> bool {
    matches!(call, Call::Watch(_))
}

fn is_cancel(call: &Call) -> bool {
    matches!(call, Call::Cancel(_))
}

#[test]
fn migrate_prints_one_object_with_every_key_in_order() {
    let agent = watched(vec![update(MigrationState::Precopy), Step::Update(Box::new(succeeded()))]);
    let ended = run(agent.address(), &format!("{MIGRATE} --output json"));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(
        ended.stdout,
        "{\"id\":\"vm-1\",\"state\":\"SUCCEEDED\",\"fabric\":\"shm\",\"registration\":\"dynamic\",\
         \"postcopy\":\"never\",\"ram_bytes\":4294967296,\"present_bytes\":1073741824,\"zero_bytes\":4096,\
         \"transferred_bytes\":1073741824,\
         \"rounds\":[{\"bytes\":1073741824,\"seconds\":0.25,\"dirtied_bytes\":8192}],\
         \"setup_seconds\":0.05,\"total_seconds\":0.4,\"postcopy_seconds\":null,\"downtime_seconds\":0.012,\
         \"downtime_parts\":{\"pause\":0.001},\"throttle_peak_percent\":0,\"throughput_bits_per_second\":34000000000,\
         \"registration_seconds\":0.03,\"registered_bytes\":1073741824,\"pinned_peak_bytes\":536870912,\
         \"verified\":true,\"error\":null}\n"
    );
    assert!(ended.stderr.contains("vm-1: PRECOPY"), "{ended:?}");
}

#[test]
fn migrate_asks_for_what_was_given() {
    let agent = watched(vec![Step::Update(Box::new(succeeded()))]);
    let flags = "--request-id r-1 --fabric tcp --registration pin-all --max-downtime 15ms --bandwidth-limit 10Gbit \
                 --pin-budget 4GiB --streams 4 --timeout 5m --on-timeout force --no-progress-timeout 3s \
                 --throttle=80 --verify";
    assert_eq!(run(agent.address(), &format!("{MIGRATE} {flags} --quiet")).code, 0);
    let parameters = v1::MigrationParameters {
        max_downtime: nanos(15_000_000),
        bandwidth_limit_bits_per_second: 10_000_000_000,
        timeout: Some(prost_types::Duration { seconds: 300, nanos: 0 }),
        timeout_action: v1::TimeoutAction::Force.into(),
        no_progress_timeout: Some(prost_types::Duration { seconds: 3, nanos: 0 }),
        registration_mode: v1::RegistrationMode::PinAll.into(),
        pin_budget_bytes: 4 << 30,
        fabric: v1::FabricKind::Tcp.into(),
        streams: 4,
        verify: true,
        postcopy: v1::Postcopy::Never.into(),
        throttle_max_percent: 80,
    };
    let spec = migration(MigrationState::Pending)
        .spec
        .map(|spec| v1::MigrationSpec { parameters: Some(parameters), ..spec });
    let request = v1::CreateMigrationRequest {
        id: "vm-1".into(),
        request_id: "r-1".into(),
        spec,
        validate_only: false,
    };
    let calls = agent.calls();
    assert_eq!(calls[0], Call::Create(request));
    assert!(matches!(&calls[1..], [Call::Watch(watch)] if watch.id == "vm-1"), "{calls:?}");
}

#[test]
fn migrate_in_text_ends_with_a_summary_and_is_silent_when_told() {
    let agent = watched(vec![update(MigrationState::Precopy), Step::Update(Box::new(succeeded()))]);
    let ended = run(agent.address(), &format!("{MIGRATE} --quiet"));
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    for line in [
        "migration vm-1 SUCCEEDED",
        "total time    400 ms (50.0 ms of it setup)",
        "downtime      12.0 ms (pause 1.00 ms)",
        "throughput    34.0 Gbit/s over shm",
        "4.00 GiB, 1.00 GiB present, 4.00 KiB zero, 1.00 GiB transferred",
        "verified      yes",
    ] {
        assert!(ended.stdout.contains(line), "{line} in {}", ended.stdout);
    }
}

#[test]
fn failed_migration_exits_one_with_its_error() {
    let agent = watched(vec![ended(MigrationState::Failed, "LINK_LOST", "the peer went away")]);
    let ended = run(agent.address(), &format!("{MIGRATE} --output json"));
    assert_eq!(ended.code, 1);
    assert_eq!(ended.json()["state"], "FAILED");
    assert_eq!(ended.json()["error"], json!({ "reason": "LINK_LOST", "message": "the peer went away" }));
}

#[test]
fn migration_that_somebody_cancelled_exits_three() {
    let agent = watched(vec![ended(MigrationState::Cancelled, "CANCELLED", "on request")]);
    assert_eq!(run(agent.address(), MIGRATE).code, 3);
}

#[test]
fn refused_creation_exits_five_with_reason_and_remedy() {
    let mut details = ErrorDetails::with_error_info("PRIVATE_MEMORY", "ramferry", HashMap::new());
    details.add_precondition_failure_violation("GUEST", "pc.ram", "start QEMU with share=on");
    let status = Status::with_error_details(Code::FailedPrecondition, "RAM is private", details);
    let agent = Agent::start(Script { refusal: Some(status), ..Script::default() });

    let text = run(agent.address(), MIGRATE);
    assert_eq!((text.code, text.stdout.as_str()), (5, ""));
    assert_eq!(
        text.stderr,
        "error: RAM is private\n  reason: PRIVATE_MEMORY (FAILED_PRECONDITION)\n  \
         change: pc.ram: start QEMU with share=on\n"
    );
    let json = run(agent.address(), &format!("{MIGRATE} --output json"));
    assert_eq!(json.code, 5);
    assert_eq!(
        json.json(),
        json!({ "error": {
            "code": "FAILED_PRECONDITION", "reason": "PRIVATE_MEMORY", "message": "RAM is private",
            "violations": [{ "type": "GUEST", "subject": "pc.ram", "description": "start QEMU with share=on" }],
        } })
    );
}

#[test]
fn absent_agent_exits_four_and_says_what_to_check() {
    let (_socket, address) = deaf_address();
    let ended = run(address, "list --output json");
    assert_eq!(ended.code, 4, "{ended:?}");
    assert_eq!(ended.json()["error"]["code"], "UNAVAILABLE");
    assert_eq!(ended.json()["error"]["reason"], "AGENT_UNREACHABLE");
    let first = format!("error: cannot reach the agent at {address}: Connection refused");
    assert!(ended.stderr.starts_with(&first), "{}", ended.stderr);
    assert!(ended.stderr.contains("remedy: check that `ramferry agent` runs there"), "{}", ended.stderr);
}

#[test]
fn broken_stream_is_taken_up_again() {
    let watches = vec![
        vec![update(MigrationState::Preparing), Step::Fail(Status::unavailable("shutting down"))],
        vec![update(MigrationState::Precopy)],
        vec![Step::Fail(Status::unknown("connection reset"))],
        vec![Step::Update(Box::new(succeeded()))],
    ];
    let agent = Agent::start(Script { watches, ..Script::default() });
    let ended = run(agent.address(), MIGRATE);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(agent.calls().iter().filter(|call| is_watch(call)).count(), 4);
    assert!(ended.stderr.contains("shutting down; trying again"), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("stopped reporting before the migration's end; trying again"),
        "{}",
        ended.stderr
    );
}

#[test]
fn agent_that_restarts_is_waited_for() {
    let watches =
        vec![vec![update(MigrationState::Precopy), Step::Stall], vec![Step::Update(Box::new(succeeded()))]];
    let mut agent = Agent::start(Script { watches, ..Script::default() });
    let running = start(agent.address(), &format!("{MIGRATE} --output json"));
    agent.wait_for(1, is_watch);
    agent.kill();
    agent.resume();
    let ended = running.wait();
    assert_eq!((ended.code, &ended.json()["state"]), (0, &json!("SUCCEEDED")), "{ended:?}");
}

#[test]
fn agent_that_stays_away_is_given_up_with_the_way_back() {
    let mut agent = watched(vec![update(MigrationState::Precopy), Step::Stall]);
    let running = start(agent.address(), &format!("{MIGRATE} --output json --reconnect-timeout 300ms"));
    agent.wait_for(1, is_watch);
    agent.kill();
    let address = agent.address();
    drop(agent);
    let ended = running.wait();
    assert_eq!((ended.code, &ended.json()["error"]["code"]), (4, &json!("UNAVAILABLE")), "{ended:?}");
    assert!(ended.stderr.contains("`ramferry watch vm-1` follows it"), "{}", ended.stderr);
    assert!(ended.stderr.contains(&format!("cannot reach the agent at {address}")), "{}", ended.stderr);
}

#[test]
fn migration_that_the_agent_forgot_is_not_asked_for_again() {
    let agent = watched(vec![Step::Fail(Status::not_found("no migration vm-1"))]);
    let ended = run(agent.address(), "watch vm-1");
    assert_eq!((ended.code, agent.calls().len()), (5, 1), "{ended:?}");
    assert!(ended.stderr.contains("error: no migration vm-1"), "{}", ended.stderr);
}

#[test]
fn ctrl_c_cancels_once_and_waits_for_the_end() {
    let steps = vec![
        update(MigrationState::Precopy),
        Step::UntilCancelled,
        update(MigrationState::Cancelling),
        ended(MigrationState::Cancelled, "CANCELLED", "on request"),
    ];
    let agent = watched(steps);
    let running = start(agent.address(), &format!("{MIGRATE} --output json"));
    agent.wait_for(1, is_watch);
    running.interrupt();
    let ended = running.wait();
    assert_eq!((ended.code, &ended.json()["state"]), (3, &json!("CANCELLED")), "{ended:?}");
    assert_eq!(agent.calls().iter().filter(|call| is_cancel(call)).count(), 1);
}

#[test]
fn second_ctrl_c_leaves() {
    let agent = watched(vec![update(MigrationState::Precopy), Step::Stall]);
    let running = start(agent.address(), MIGRATE);
    agent.wait_for(1, is_watch);
    running.interrupt();
    agent.wait_for(1, is_cancel);
    running.interrupt();
    let ended = running.wait();
    assert_eq!(ended.code, 130, "{ended:?}");
    assert!(ended.stderr.contains("migration vm-1 may go on"), "{}", ended.stderr);
    assert_eq!(agent.calls().iter().filter(|call| is_cancel(call)).count(), 1);
}

#[test]
fn refused_cancellation_is_told_and_the_migration_is_followed_on() {
    let script = Script {
        watches: vec![vec![update(MigrationState::SwitchingOver), Step::Stall]],
        cancel_refusal: Some(Status::failed_precondition("the destination runs the guest")),
        ..Script::default()
    };
    let agent = Agent::start(script);
    let mut running = start(agent.address(), MIGRATE);
    agent.wait_for(1, is_watch);
    running.interrupt();
    running.wait_for_stderr("not cancelled: the destination runs the guest");
    running.interrupt();
    assert_eq!(running.wait().code, 130);
    assert_eq!(agent.calls().iter().filter(|call| is_cancel(call)).count(), 1);
}

#[test]
fn watch_leaves_at_the_first_ctrl_c_and_cancels_nothing() {
    let agent = watched(vec![update(MigrationState::Precopy), Step::Stall]);
    let running = start(agent.address(), "watch vm-1");
    agent.wait_for(1, is_watch);
    running.interrupt();
    assert_eq!(running.wait().code, 130);
    assert_eq!(agent.calls().len(), 1);
}

#[test]
fn watch_in_json_prints_an_object_an_update() {
    let agent = watched(vec![update(MigrationState::Precopy), Step::Update(Box::new(succeeded()))]);
    let ended = run(agent.address(), "watch vm-1 --output json --interval 250ms --quiet");
    let states: Vec<_> = ended
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect(line)["state"].clone())
        .collect();
    assert_eq!((ended.code, states), (0, vec![json!("PRECOPY"), json!("SUCCEEDED")]));
    let calls = agent.calls();
    assert!(matches!(&calls[..], [Call::Watch(watch)] if watch.interval == nanos(250_000_000)), "{calls:?}");
}

#[test]
fn detached_migrate_returns_after_creation() {
    let agent = watched(Vec::new());
    let ended = run(agent.address(), &format!("{MIGRATE} --detach --output json"));
    assert_eq!((ended.code, &ended.json()["state"]), (0, &json!("PENDING")));
    let ended = run(agent.address(), &format!("{MIGRATE} --detach"));
    assert_eq!(ended.stdout, "migration vm-1 is created; `ramferry watch vm-1` follows it\n");
    assert!(!agent.calls().iter().any(is_watch));
}

#[test]
fn check_tells_what_would_be_used() {
    let check = v1::CheckMigrationResponse {
        fabric: v1::FabricKind::Shm.into(),
        fabric_reason: "both agents run on one host".into(),
        tracker: "uffd_wp".into(),
        ram_bytes: 1 << 30,
        present_bytes: 1 << 20,
        source_vmm: "QEMU 7.2.22 (pc-q35-7.2)".into(),
        destination_vmm: "QEMU 7.2.22 (pc-q35-7.2)".into(),
        recheck_reason: "direct I/O of disk0".into(),
    };
    let agent = Agent::start(Script { check, ..Script::default() });
    let line = MIGRATE.replace("migrate --id vm-1", "check");
    let text = run(agent.address(), &line);
    assert_eq!(text.code, 0, "{text:?}");
    assert!(text.stdout.contains("fabric       shm (both agents run on one host)"), "{}", text.stdout);
    assert!(text.stdout.contains("rechecks     direct I/O of disk0"), "{}", text.stdout);
    let json = run(agent.address(), &format!("{line} --output json")).json();
    assert_eq!(json["recheck_reason"], json!("direct I/O of disk0"));
    assert_eq!((&json["fabric"], &json["present_bytes"]), (&json!("shm"), &json!(1 << 20)));
}

#[test]
fn list_reads_every_page() {
    let page = |id: &str, next: &str| v1::ListMigrationsResponse {
        migrations: vec![v1::Migration { id: id.into(), ..migration(MigrationState::Precopy) }],
        next_page_token: next.into(),
    };
    let pages = [page("vm-1", "more"), page("vm-2", "")];
    let agent = Agent::start(Script { pages: [pages.clone(), pages].concat(), ..Script::default() });
    let text = run(agent.address(), "list --state precopy");
    assert_eq!(text.code, 0, "{text:?}");
    let first: Vec<_> =
        text.stdout.lines().map(|line| line.split_whitespace().next().unwrap_or("")).collect();
    assert_eq!(first, ["ID", "vm-1", "vm-2"]);
    let calls = agent.calls();
    let [Call::List(one), Call::List(two)] = &calls[..] else { panic!("{calls:?}") };
    assert_eq!(one.states, [i32::from(MigrationState::Precopy)]);
    assert_eq!(two.page_token, "more");
    let json = run(agent.address(), "list --output json").json();
    assert_eq!(json["migrations"][1]["id"], "vm-2");
}

#[test]
fn commands_about_one_migration_make_their_call() {
    let agent = Agent::start(Script { migration: succeeded(), ..Script::default() });
    let text = run(agent.address(), "get vm-1");
    assert!(text.stdout.contains("destination   10.0.0.2:7050 /run/b.qmp"), "{}", text.stdout);
    let json = run(agent.address(), "get vm-1 --output json").json();
    assert_eq!((&json["downtime_seconds"], &json["source_qmp"]), (&json!(0.012), &json!("/run/a.qmp")));
    assert_eq!(run(agent.address(), "cancel vm-1").stdout, "migration vm-1 SUCCEEDED\n");
    assert_eq!(run(agent.address(), "switchover vm-1").code, 0);
    assert_eq!(
        run(agent.address(), "delete vm-1 vm-2 --output json").json(),
        json!({ "deleted": ["vm-1", "vm-2"] })
    );
    let id = |id: &str| id.to_owned();
    assert_eq!(
        agent.calls(),
        [
            Call::Get(id("vm-1")),
            Call::Get(id("vm-1")),
            Call::Cancel(id("vm-1")),
            Call::Switchover(id("vm-1")),
            Call::Delete(id("vm-1")),
            Call::Delete(id("vm-2")),
        ]
    );
}

#[test]
fn set_masks_exactly_what_was_given() {
    let agent = Agent::start(Script { migration: migration(MigrationState::Precopy), ..Script::default() });
    assert_eq!(
        run(agent.address(), "set vm-1 --bandwidth-limit none --timeout none --on-timeout force").code,
        0
    );
    let calls = agent.calls();
    let [Call::Update(request)] = &calls[..] else { panic!("{calls:?}") };
    let paths = request.update_mask.as_ref().map(|mask| mask.paths.clone()).unwrap_or_default();
    assert_eq!(paths, ["bandwidth_limit_bits_per_second", "timeout", "timeout_action"]);
    let expected =
        v1::MigrationParameters { timeout_action: v1::TimeoutAction::Force.into(), ..Default::default() };
    assert_eq!(request.parameters, Some(expected));
}

#[test]
fn help_teaches_examples_and_exit_codes() {
    let ended = run("127.0.0.1:1", "migrate --help");
    assert_eq!(ended.code, 0);
    for text in ["--on-timeout force", "Exit codes:", "RAMFERRY_AGENT", "[default: 100ms]"] {
        assert!(ended.stdout.contains(text), "{text} in {}", ended.stdout);
    }
    assert!(run("127.0.0.1:1", "--version").stdout.starts_with("ramferry 0."));
}

#[test]
fn unusable_command_lines_exit_two() {
    assert_eq!(run("127.0.0.1:1", "migrate").code, 2);
    assert_eq!(run("127.0.0.1", "list").code, 2);
    let ended = run("127.0.0.1:1", "list --tls-ca /nonexistent.pem --output json");
    assert_eq!((ended.code, &ended.json()["error"]["reason"]), (2, &json!("FILE_UNUSABLE")), "{ended:?}");
}

#[test]
fn completions_and_manual_pages_are_made() {
    for shell in ["bash", "zsh", "fish"] {
        let ended = run("127.0.0.1:1", &format!("completions {shell}"));
        assert!(ended.code == 0 && ended.stdout.contains("switchover"), "{shell}");
    }
    assert!(run("127.0.0.1:1", "man").stdout.contains(".TH ramferry 1"));
    let directory = tempfile::tempdir().expect("a directory");
    let line = format!("man --out-dir {}", directory.path().display());
    assert_eq!(run("127.0.0.1:1", &line).code, 0);
    assert!(directory.path().join("ramferry-migrate.1").exists());
}
