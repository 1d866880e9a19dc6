//! What probes see of a real RDMA stack: every call, by name, and the kernel's view of it the same. Runs in the lab's
//! VM (`make lab-test`), and nowhere else.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "../voyage/harness.rs"]
#[allow(dead_code, reason = "what is shared with the migrations has more than is used here")]
mod harness;
#[path = "../voyage/limited.rs"]
mod limited;
#[path = "../../benches/measuring/own.rs"]
#[allow(dead_code, reason = "a benchmark asks for more than is used here")]
mod own;
mod watch;

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ramferry_lab::{Qemu, RamBlock, Workload};
use ramferry_probes::Probe;
use serde_json::{Value, json};

use harness::Agent;
use limited::{Absent, Traveller, kernel, library, release, says, without, without_capabilities};
use watch::{Watch, process, scrape};

const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(100);
const MIB: u64 = 1 << 20;
/// Of `ib_write_bw`.
const MESSAGES: u32 = 20;

/// Killed and reaped with the test.
struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    fn ends_well(mut self) {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return;
            }
            thread::sleep(PAUSE);
        }
        panic!("it does not end");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail only where it was reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Calls of an operation, by their smallest size: count and bytes.
fn calls(process: &Value, operation: &str) -> Vec<(Option<u64>, u64, u64)> {
    let calls = process["calls"].as_array().unwrap().iter().filter(|calls| calls["operation"] == operation);
    let number = |value: &Value| value.as_u64().unwrap();
    calls
        .map(|calls| (calls["size_bytes"].as_u64(), number(&calls["count"]), number(&calls["bytes"])))
        .collect()
}

fn count(process: &Value, operation: &str) -> u64 {
    calls(process, operation).iter().map(|(_, count, _)| count).sum()
}

fn bytes(process: &Value, operation: &str) -> u64 {
    calls(process, operation).iter().map(|(_, _, bytes)| bytes).sum()
}

/// What failed, by errno.
fn errors(process: &Value, operation: &str) -> Vec<(i64, u64)> {
    let errors = process["errors"].as_array().unwrap().iter().filter(|error| error["operation"] == operation);
    errors.map(|error| (error["errno"].as_i64().unwrap(), error["count"].as_u64().unwrap())).collect()
}

/// The kernel was asked once for each call, and took no longer than it.
fn assert_kernel_agrees(process: &Value) {
    assert_eq!(count(process, "kernel"), count(process, "register"), "{process:#}");
    assert_eq!(bytes(process, "kernel"), bytes(process, "register"), "{process:#}");
    assert_eq!(bytes(process, "pin"), bytes(process, "register"), "{process:#}");
    assert_eq!(errors(process, "kernel"), errors(process, "register"), "{process:#}");
    let share = |name: &str| process[name].as_f64().unwrap();
    assert!(0.0 < share("pin_share") && share("pin_share") <= share("kernel_share"), "{process:#}");
    assert!(share("kernel_share") <= 1.0, "{process:#}");
}

#[test]
fn known_registrations_are_counted_exactly_by_library_and_kernel() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("registers");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/probes/registers.c");
    let mut gcc = Command::new("gcc");
    gcc.args(["-Wall", "-Werror", "-o"]).arg(&program).arg(source).arg("-libverbs");
    assert!(gcc.status().unwrap().success());

    let mut registers = Program::start(Command::new(&program).stdin(Stdio::piped()));
    let watch = Watch::start(&["--comm", "registers"]);
    registers.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
    registers.ends_well();
    let seen = watch.end();
    assert_eq!(seen["lost_calls"], 0);
    let process = process(&seen, "registers");
    let sized = |bytes| (Some(bytes), 20, 20 * bytes);
    assert_eq!(
        calls(process, "register"),
        [sized(4096), (Some(8192), 8, 0), sized(65536), sized(MIB)],
        "{process:#}"
    );
    assert_eq!(calls(process, "deregister"), [sized(4096), sized(65536), sized(MIB)]);
    // What is refused before a page is pinned has no size in the kernel.
    assert_eq!(
        calls(process, "kernel"),
        [sized(4096), (Some(8192), 5, 0), sized(65536), sized(MIB), (None, 3, 0)]
    );
    assert_eq!(calls(process, "pin"), [sized(4096), (Some(8192), 5, 0), sized(65536), sized(MIB)]);
    assert_eq!(errors(process, "register"), [(14, 5), (22, 3)]);
    assert_eq!(errors(process, "pin"), [(14, 5)]);
    assert!(process["minor_faults"].as_u64() > Some(0), "fresh memory is mapped by pinning it: {process:#}");
    assert_kernel_agrees(process);
}

#[test]
fn ib_write_bw_is_seen_by_its_name() {
    let watch = Watch::start(&[]);
    let perftest = |device: &str| {
        let mut command = Command::new("timeout");
        command.args([
            &PATIENCE.as_secs().to_string(),
            "ib_write_bw",
            "-R",
            "-F",
            "-d",
            device,
            "-s",
            "65536",
            "-n",
            &MESSAGES.to_string(),
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let server = Program::start(&mut perftest("rxe1"));
    let deadline = Instant::now() + PATIENCE;
    let mut clients = 0;
    // The server does not say when it listens; a client that is too early is refused, and calls again.
    while !perftest("rxe0").arg("10.77.0.2").status().unwrap().success() {
        clients += 1;
        assert!(Instant::now() < deadline, "ib_write_bw does not connect after {clients}");
        thread::sleep(PAUSE);
    }
    server.ends_well();
    let seen = watch.end();
    let process = process(&seen, "ib_write_bw");
    // The buffer of each side.
    assert!(count(process, "register") >= 2, "{process:#}");
    assert_eq!(errors(process, "register"), []);
    assert_kernel_agrees(process);
    // A client that is refused ends without.
    assert!((2..=count(process, "register")).contains(&count(process, "deregister")), "{process:#}");
}

#[test]
fn registrations_of_qemus_own_migration_are_seen_by_its_name() {
    let workload = Workload { mib: 4, touch_mib: 8, rate_mib: 8, ..Workload::default() };
    let from = Qemu::builder().block(RamBlock::node(64 * MIB)).proof(workload).start().unwrap();
    from.wait_ready(PATIENCE).unwrap();
    let to = from.destination().start().unwrap();
    let watch = Watch::start(&[]);
    let way = own::Way { listen: "rdma:10.77.0.2:20100", capability: None, parameters: json!({}) };
    own::migrate(&from, &to, &way, PAUSE).unwrap();
    drop((from, to));
    let seen = watch.end();
    let process = process(&seen, "qemu-system-x86");
    // A MiB at a time of what was touched, on both sides, and its buffers.
    assert!(count(process, "register") >= 16, "{process:#}");
    assert!(bytes(process, "register") >= 2 * 8 * MIB, "{process:#}");
    assert_kernel_agrees(process);
}

#[test]
fn agent_attaches_every_probe_and_exposes_what_other_processes_register() {
    let agent = Agent::start_with(&["--probes", "auto"]);
    wait_for(&agent, |text| {
        let probes = text.lines().filter(|line| line.starts_with("ramferry_ebpf_probe_attached{"));
        probes.clone().count() == Probe::ALL.len() && probes.clone().all(|line| line.ends_with(" 1"))
    });
    let status = Command::new(env!("CARGO_BIN_EXE_ramferry"))
        .args(["bench", "registration", "--fabric", "verbs", "--rdma-device", "rxe0", "--sizes", "1MiB"])
        .args(["--threads", "1", "--runs", "1", "--memory", "8MiB", "--quiet"])
        .stdout(Stdio::null())
        .status();
    assert!(status.unwrap().success());
    let name = "ramferry_ebpf_reg_mr_duration_seconds";
    let text = wait_for(&agent, |text| text.contains(&format!("{name}_count{{process=\"ramferry\"}}")));
    let value = |series: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{series} ")));
        line.unwrap_or_else(|| panic!("no {series} in {text}")).parse().unwrap()
    };
    let count = value(&format!("{name}_count{{process=\"ramferry\"}}"));
    assert!(count >= 8.0, "{text}");
    assert_eq!(value(&format!("{name}_bucket{{process=\"ramferry\",le=\"+Inf\"}}")), count);
    assert!(value("ramferry_ebpf_pinned_bytes_total{process=\"ramferry\"}") >= (8 * MIB) as f64);
    assert!(value("ramferry_ebpf_pin_duration_seconds_count{process=\"ramferry\"}") >= 8.0);
    assert_eq!(value("ramferry_ebpf_events_dropped_total"), 0.0);
}

/// That a guest moves there is shown by the voyages of the same names.
#[test]
fn without_capabilities_every_probe_is_absent_and_without_tracefs_none() {
    let reason = "this process lacks CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN";
    let probes = [library(), kernel()].concat();
    says(without_capabilities(), &[], &[Absent { probes, reason, remedy: "give it CAP_SYS_ADMIN" }]);
    says(without("/sys/kernel/tracing /sys/kernel/debug"), &Probe::ALL.map(Probe::as_str), &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_btf_the_kernels_probes_are_absent_and_a_guest_moves() {
    let absent = [Absent { probes: kernel(), reason: "no type information", remedy: "mount /sys here" }];
    let site = without("/sys/kernel/btf");
    if release().starts_with("6.1.") {
        // What a kernel says is its own; that a guest moves beside it is shown on the newer one.
        says(site, &library(), &absent);
    } else {
        Traveller::boot().leaves(site, &library(), &absent).await;
    }
}

/// What the agent's endpoint serves, once that is `wanted`.
fn wait_for(agent: &Agent, wanted: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = scrape(agent.metrics);
        if wanted(&text) {
            return text;
        }
        assert!(Instant::now() < deadline, "{text}");
        thread::sleep(PAUSE);
    }
}
