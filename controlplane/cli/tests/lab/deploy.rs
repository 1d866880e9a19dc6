//! The unit under deploy/, run by systemd: what it takes from the agent is not missed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use ramferry_lab::{Fill, Qemu, RamBlock, Workload};
use serde_json::Value;

use crate::harness::{Agent, MIB, PATIENCE, assert_proves_itself, boot, bound, ramferry, settled_checks};

const UNIT: &str = "ramferry-agent.service";
/// Where the service is served, for the part of the test that runs beside it.
const SERVED: &str = "RAMFERRY_SERVED";
const INNER: &str = "deploy::beside_the_service";
const LOOK: std::time::Duration = std::time::Duration::from_millis(100);

/// systemd in process and mount namespaces of its own, with the service and nothing else. Killed with all that it runs.
struct Systemd {
    child: Child,
    log: PathBuf,
}

impl Systemd {
    fn start(directory: &Path) -> Systemd {
        let release = std::env::var("RAMFERRY_LAB");
        assert!(release.is_ok(), "this runs in the lab's VM only: make lab-test");
        let log = directory.join("agent.log");
        install(directory, &log);
        // What it says of itself goes to its console.
        const START: &str = r#"mount --bind "$0" /dev/console &&
            exec env -i container=lab PATH="$PATH" /lib/systemd/systemd --system --log-target=console "$@""#;
        let console = directory.join("console");
        std::fs::write(&console, "").unwrap();
        let child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--propagation", "private"])
            .args(["sh", "-c", START])
            .arg(console)
            .arg(format!("--unit={UNIT}"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Systemd { child, log }
    }

    /// The agent's address, once it is served.
    fn served(&self) -> String {
        let deadline = Instant::now() + 2 * PATIENCE;
        loop {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            if let Some((grpc, _)) = log.lines().find_map(bound) {
                return grpc.to_string();
            }
            assert!(Instant::now() < deadline, "the service does not start: {log}");
            std::thread::sleep(LOOK);
        }
    }

    /// A command beside what it runs.
    fn enter(&self) -> Command {
        let systemd = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{systemd}/task/{systemd}/children")).unwrap();
        let mut command = Command::new("nsenter");
        command.args(["--pid", "--mount", "--target", children.trim(), "--"]);
        command
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // Both fail only where it was reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The unit as it is, with a drop-in that says where it logs and has it wait for nothing of a host's boot.
fn install(directory: &Path, log: &Path) {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let units = Path::new("/etc/systemd/system");
    let drop_in = units.join(format!("{UNIT}.d"));
    std::fs::create_dir_all(&drop_in).unwrap();
    std::fs::copy(repository.join("deploy").join(UNIT), units.join(UNIT)).unwrap();
    let log = log.display();
    let own = format!(
        "[Unit]\nDefaultDependencies=no\n[Service]\nStandardOutput=file:{log}\nStandardError=file:{log}\n"
    );
    std::fs::write(drop_in.join("lab.conf"), own).unwrap();
    std::fs::create_dir_all("/etc/ramferry").unwrap();
    let temporary = directory.parent().unwrap().display();
    let configuration = format!(
        "listen = \"127.0.0.1:0\"\ndata_listen = \"127.0.0.1:0\"\nmetrics_listen = \"127.0.0.1:0\"\n\
         log_format = \"json\"\nguest_dirs = [\"{temporary}\", \"/dev/shm\"]\n"
    );
    std::fs::write("/etc/ramferry/agent.toml", configuration).unwrap();
    // The program that is tested in the place of the one that is packaged.
    let _ = std::fs::remove_file("/usr/bin/ramferry");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ramferry"), "/usr/bin/ramferry").unwrap();
}

#[test]
fn the_unit_leaves_the_agent_all_that_a_migration_and_probes_need() {
    let directory = tempfile::tempdir().unwrap();
    let systemd = Systemd::start(directory.path());
    let served = systemd.served();
    let test = std::env::current_exe().unwrap();
    let mut beside = systemd.enter();
    beside.arg(test).args(["--exact", "--ignored", "--nocapture", INNER]).env(SERVED, &served);
    let ended = beside.status().unwrap();
    let log = std::fs::read_to_string(&systemd.log).unwrap();
    assert!(ended.success(), "{log}");
}

/// What the agent says of itself under systemd, and that a guest leaves it and comes back.
#[test]
#[ignore = "run by the test above, in the namespaces of systemd"]
fn beside_the_service() {
    let served = std::env::var(SERVED).expect("run by the test above");
    let checks = settled_checks(&served);
    let sound = [
        "memlock",
        "open_files",
        "capabilities",
        "userfaultfd",
        "pidfd_getfd",
        "tracker_uffd_wp",
        "ebpf_probes",
        "cgroup_memory",
        "rdma_devices",
        "state_dir",
        "journal",
    ];
    for id in sound {
        let check = checks.iter().find(|check| check["id"] == id).unwrap();
        assert_eq!(check["status"], "ok", "{check}");
    }
    let other = Agent::start();
    let another = other.grpc.to_string();
    let workload = Workload { mib: 2, touch_mib: 4, rate_mib: 4, ..Workload::default() };
    let guest = boot(Qemu::builder().block(RamBlock::node(32 * MIB)).proof(workload));
    let (there, _) = moved(&served, &another, &guest, &["--verify"]);
    let (back, _) = moved(&another, &served, &there, &["--verify"]);
    assert_proves_itself(&back);
    throttled(&served, &another);
}

/// Of a guest in a cgroup of its own, which writes faster than it may be copied, the service may hold back the vCPUs.
fn throttled(from: &str, to: &str) {
    const ROOT: &str = "/sys/fs/cgroup";
    let workload = Workload { mib: 6, touch_mib: 0, rate_mib: 0, fill: Fill::Stamp, ..Workload::default() };
    let scope = Path::new(ROOT).join("guest.scope");
    std::fs::write(Path::new(ROOT).join("cgroup.subtree_control"), "+cpu").unwrap();
    std::fs::create_dir_all(&scope).unwrap();
    // More than there is; that there is a quota keeps the kernel from patching its code (docs/lab.md, "Traps").
    std::fs::write(scope.join("cpu.max"), "800000 100000").unwrap();
    let guest = boot(Qemu::builder().block(RamBlock::node(32 * MIB)).proof(workload));
    std::fs::write(scope.join("cgroup.procs"), guest.pid().to_string()).unwrap();
    let (there, ended) = moved(
        from,
        to,
        &guest,
        &[
            "--throttle",
            "--bandwidth-limit",
            "24Mbit",
            "--max-downtime",
            "1s",
            "--no-progress-timeout",
            "10s",
        ],
    );
    assert!(ended["throttle_peak_percent"].as_u64().unwrap() > 0, "{ended}");
    assert_proves_itself(&there);
    assert_eq!(std::fs::read_to_string(scope.join("cgroup.type")).unwrap().trim(), "domain");
}

/// Where it is then, and what is said of its way there.
fn moved(from: &str, to: &str, guest: &Qemu, options: &[&str]) -> (Qemu, Value) {
    let receiver = guest.destination().start().unwrap();
    let output = ramferry()
        .args([
            "migrate",
            "--agent",
            from,
            "--to",
            to,
            "--fabric",
            "tcp",
            "--on-timeout",
            "force",
            "--output",
            "json",
        ])
        .args(options)
        .arg("--source-qmp")
        .arg(guest.qmp_path())
        .arg("--destination-qmp")
        .arg(receiver.qmp_path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let ended = String::from_utf8(output.stdout).unwrap();
    (receiver, serde_json::from_str(ended.lines().last().unwrap()).unwrap())
}
