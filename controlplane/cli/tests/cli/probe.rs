//! `ramferry probe`, on a host with or without the right to.

use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::command::{Ended, run, start, start_command};

/// Of no agent: none is asked.
const NOBODY: &str = "127.0.0.1:1";

fn parsed(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// The word that says why a probe is absent; null where it is not.
fn reason<'a>(object: &'a Value, probe: &str) -> &'a Value {
    let probes = object["probes"].as_array().expect("probes");
    let found = probes.iter().find(|state| state["probe"] == probe).expect("every probe is told of");
    assert_eq!(found["attached"].as_bool(), Some(found["reason"].is_null()), "{found}");
    assert_eq!(found["detail"].is_null(), found["reason"].is_null(), "{found}");
    &found["reason"]
}

fn may_probe() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    let has_library = !ramferry_probes::standard_libraries().is_empty();
    if !is_root || !has_library {
        eprintln!("SKIPPED: probes need root and libibverbs");
    }
    is_root && has_library
}

fn assert_clean(ended: &Ended) {
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
}

#[test]
fn every_interval_is_a_line_and_the_last_one_is_the_whole() {
    if !may_probe() {
        return;
    }
    let ended = run(NOBODY, "probe --duration 200ms --interval 50ms --output json");
    assert_clean(&ended);
    let lines: Vec<Value> = ended.stdout.lines().map(parsed).collect();
    let (last, others) = lines.split_last().expect("a line");
    assert!(!others.is_empty() && others.iter().all(|line| line["final"] == false));
    assert_eq!(last["final"], true);
    assert!(last["elapsed_seconds"].as_f64() >= Some(0.2), "{last}");
    assert_eq!(last["interval_seconds"], last["elapsed_seconds"]);
    for probe in ["ibv_reg_mr", "ibv_dereg_mr", "ibv_cmd_reg_mr"] {
        assert!(reason(last, probe).is_null(), "{last}");
    }
    assert!(last["libraries"][0].as_str().is_some_and(|path| path.contains("libibverbs.so")), "{last}");
}

#[test]
fn ends_clean_by_either_signal_and_when_nobody_reads() {
    if !may_probe() {
        return;
    }
    for signal in [Signal::INT, Signal::TERM] {
        let mut running = start(NOBODY, "probe --interval 20ms --output json");
        running.next_line();
        running.signal(signal);
        let ended = running.wait();
        assert_clean(&ended);
        assert_eq!(parsed(ended.stdout.lines().last().expect("a last line"))["final"], true);
    }
    let mut running = start(NOBODY, "probe --interval 20ms");
    running.next_line();
    running.close_stdout();
    assert_clean(&running.wait());
}

#[test]
fn without_the_right_to_it_says_what_is_lacking() {
    if !may_probe() {
        return;
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-bpf,-perfmon,-sys_admin", "--", env!("CARGO_BIN_EXE_ramferry")]);
    command.args(["probe", "--output", "json"]);
    let ended = start_command(command).wait();
    assert_eq!(ended.code, 1, "{ended:?}");
    assert_eq!(ended.stderr, "error: no probe could be attached\n");
    let object = ended.json();
    assert_eq!(reason(&object, "ibv_reg_mr"), "no_capability");
    let detail = object["probes"][0]["detail"].as_str().expect("a reason");
    assert!(detail.contains("CAP_BPF") && detail.contains("CAP_SYS_ADMIN"), "{detail}");
    // On this host that may come first.
    assert!(
        ["no_capability", "no_kprobes", "no_btf"].map(Value::from).contains(reason(&object, "ib_umem_get"))
    );
}

#[test]
fn agent_without_the_right_to_starts_and_says_which_probes_are_absent() {
    if !may_probe() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-bpf,-perfmon,-sys_admin", "--", env!("CARGO_BIN_EXE_ramferry"), "agent"]);
    command.args([
        "--listen",
        "127.0.0.1:0",
        "--data-listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
    ]);
    command.arg("--state-dir").arg(directory.path().join("state"));
    command.arg("--run-dir").arg(directory.path().join("run"));
    let mut agent = start_command(command);
    agent.wait_for_stderr("agent started");
    agent.wait_for_stderr("eBPF probes are absent");
    agent.wait_for_stderr("this process lacks CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN");
    agent.signal(Signal::TERM);
    let ended = agent.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stderr.contains("ibv_reg_mr, "), "{ended:?}");
}

#[test]
fn marks_are_in_the_binary() {
    let output = Command::new("readelf").args(["--notes", env!("CARGO_BIN_EXE_ramferry")]).output();
    let output = output.expect("binutils are installed");
    let notes = String::from_utf8_lossy(&output.stdout).into_owned();
    for mark in ["window_registered", "round_done", "switchover_part", "switchover_done"] {
        assert!(notes.contains(&format!("Name: {mark}\n")), "{mark}");
    }
}

#[test]
fn library_that_is_not_there_is_named() {
    let ended = run(NOBODY, "probe --library /nonexistent/libibverbs.so.1 --duration 10ms");
    let expected = ["/nonexistent/libibverbs.so.1 cannot be read", "this process lacks", "no uprobes"];
    assert!(expected.iter().any(|text| ended.stdout.contains(text)), "{ended:?}");
}
