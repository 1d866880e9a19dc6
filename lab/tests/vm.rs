//! `ramferry-lab run`: what a command in the VM prints and how it ends comes back as it was, however it ends, and
//! nothing is left of the VM.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ramferry_lab::skipped;
use ramferry_lab::vm::Kernel;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(120);

/// A run with a place for temporary files of its own, so that what is left is found.
struct Lab {
    temporary: TempDir,
}

impl Lab {
    /// None where the kernels are not there.
    fn new() -> Option<Lab> {
        if let Some(kernel) = Kernel::ALL.into_iter().find(|kernel| !kernel.is_made()) {
            skipped(format!("kernel {kernel} is not there: run scripts/setup test"));
            return None;
        }
        Some(Lab { temporary: tempfile::tempdir().unwrap() })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ramferry-lab"));
        command.arg("run").args(arguments).env("TMPDIR", self.temporary.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Starts a run, and waits for its QEMU.
    #[expect(
        clippy::zombie_processes,
        reason = "who asks for it waits for it; one without a QEMU fails the test"
    )]
    fn start(&self) -> (Child, u32) {
        let child = self.command(&["--", "sleep", "1000"]).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < deadline, "no QEMU");
            if let Some(qemu) = qemu_of(child.id()) {
                return (child, qemu);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn assert_nothing_is_left(&self) {
        let left: Vec<_> = fs::read_dir(self.temporary.path()).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn qemu_of(parent: u32) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task")).ok()?.flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<u32> = children
        .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    pids.into_iter().find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with("qemu-system"))
    })
}

fn await_end_of(pid: u32) {
    let deadline = Instant::now() + PATIENCE;
    while Path::new(&format!("/proc/{pid}/exe")).exists() {
        assert!(Instant::now() < deadline, "process {pid} lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Every byte there is, more of them than any buffer on the way holds.
fn noise() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..3 << 20).map(|_| next()).collect()
}

#[test]
fn what_a_command_prints_and_how_it_ends_comes_back_as_it_was() {
    let Some(lab) = Lab::new() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (noise, out) = (noise(), directory.path().join("not,there yet"));
    fs::write(directory.path().join("noise"), &noise).unwrap();
    // What is left running holds its output open, and must not be waited for.
    let script = "cat noise; printf 'to stderr' >&2; cp noise \"$RAMFERRY_LAB_OUT/copy\"; echo here >written; \
                  test \"$RAMFERRY_GREETING\" = 'a b' || exit 3; test \"$(id -u)\" = 0 || exit 4; sleep 1000 & exit 7";
    let output = lab
        .command(&[
            "--env",
            "RAMFERRY_GREETING=a b",
            "--out",
            out.to_str().unwrap(),
            "--",
            "sh",
            "-c",
            script,
        ])
        .current_dir(directory.path())
        .output()
        .unwrap();
    assert_eq!((said(&output).as_str(), output.status.code()), ("to stderr", Some(7)));
    assert!(output.stdout == noise, "{} bytes, and not those", output.stdout.len());
    assert!(fs::read(out.join("copy")).unwrap() == noise);
    assert!(!directory.path().join("written").exists(), "the host's files are not written to");
    lab.assert_nothing_is_left();
}

#[test]
fn a_command_that_a_signal_killed_and_one_that_is_not_there_are_told_apart() {
    let Some(lab) = Lab::new() else { return };
    let output = lab.run(&["--kernel", "6.1", "--", "sh", "-c", "kill -KILL $$"]);
    assert_eq!(output.status.code(), Some(128 + 9), "{}", said(&output));
    assert!(said(&output).contains("killed by signal 9"), "{}", said(&output));
    let output = lab.run(&["--", "/no/such/program"]);
    assert_eq!(output.status.code(), Some(127), "{}", said(&output));
    assert!(said(&output).contains("/no/such/program"), "{}", said(&output));
    lab.assert_nothing_is_left();
}

#[test]
fn a_kernel_that_panics_says_so_in_its_own_words() {
    let Some(lab) = Lab::new() else { return };
    let out = tempfile::tempdir().unwrap();
    let script = "echo before; until [ -e \"$RAMFERRY_LAB_OUT/seen\" ]; do sleep 0.02; done; \
                  echo c >/proc/sysrq-trigger";
    let mut child = lab
        .command(&["--out", out.path().to_str().unwrap(), "--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A panic loses what is still on its way.
    let mut before = [0; 7];
    let read = child.stdout.as_mut().unwrap().read_exact(&mut before);
    fs::write(out.path().join("seen"), "").unwrap();
    let output = child.wait_with_output().unwrap();
    let said = said(&output);
    read.unwrap_or_else(|error| panic!("{error}: {said}"));
    assert_eq!(
        (&before, &*output.stdout, output.status.code()),
        (b"before\n", &b""[..], Some(125)),
        "{said}"
    );
    assert!(said.contains("kernel panicked while the command ran"), "{said}");
    assert!(said.contains("sysrq triggered crash"), "{said}");
    lab.assert_nothing_is_left();
}

/// Whatever else the host does: other VMs boot beside this one.
#[test]
fn by_a_steady_clock_the_same_work_takes_the_same_time() {
    let Some(lab) = Lab::new() else { return };
    // No other program is started meanwhile: its file would be waited for in the host's time.
    let script = "for run in 1 2 3; do read begun rest </proc/uptime; i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done; \
                  read ended rest </proc/uptime; echo $begun $ended; done";
    let output = lab.run(&["--steady-clock", "--processors", "1", "--", "sh", "-c", script]);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let times: Vec<f64> = told
        .lines()
        .map(|line| {
            let (begun, ended) = line.split_once(' ').unwrap();
            ended.parse::<f64>().unwrap() - begun.parse::<f64>().unwrap()
        })
        .collect();
    assert_eq!(times.len(), 3, "{told}{}", said(&output));
    let (least, most) =
        times.iter().fold((f64::MAX, 0.0_f64), |(least, most), time| (least.min(*time), most.max(*time)));
    assert!(most < least * 1.05, "{times:?}");
    lab.assert_nothing_is_left();
}

#[test]
fn a_vm_whose_kernel_panics_as_it_boots_is_booted_once_more() {
    let Some(lab) = Lab::new() else { return };
    // In the VM this directory begins empty: its first process is not there.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let program = directory.path().join("ramferry-lab");
    // By a program of its own: where this process had the file open for writing, a child of another test might hold it.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_ramferry-lab")).arg(&program).status().unwrap();
    assert!(copied.success());
    let mut command = Command::new(&program);
    command.args(["run", "--", "true"]).env("TMPDIR", lab.temporary.path()).stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert_eq!(said.matches("kernel panicked before the command was started").count(), 2, "{said}");
    assert!(said.contains("it is booted once more"), "{said}");
    lab.assert_nothing_is_left();
}

#[test]
fn a_run_that_is_not_done_in_time_is_ended() {
    let Some(lab) = Lab::new() else { return };
    let output = lab.run(&["--timeout", "200ms", "--", "true"]);
    assert_eq!(output.status.code(), Some(124), "{}", said(&output));
    assert!(said(&output).contains("not done in 200ms"), "{}", said(&output));
    lab.assert_nothing_is_left();
}

#[test]
fn a_run_that_is_told_to_end_ends_its_vm_and_cleans_up() {
    let Some(lab) = Lab::new() else { return };
    let (child, qemu) = lab.start();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(128 + 15), "{}", said(&output));
    await_end_of(qemu);
    lab.assert_nothing_is_left();
}

#[test]
fn a_vm_does_not_outlive_a_run_that_is_killed() {
    let Some(lab) = Lab::new() else { return };
    let (mut child, qemu) = lab.start();
    child.kill().unwrap();
    child.wait().unwrap();
    await_end_of(qemu);
}

#[test]
fn a_vm_that_cannot_be_started_says_why() {
    let Some(lab) = Lab::new() else { return };
    let output = lab.run(&["--memory", "100000G", "--", "true"]);
    assert_eq!(output.status.code(), Some(125), "{}", said(&output));
    assert!(said(&output).contains("before the command was started; QEMU said"), "{}", said(&output));
    let file = tempfile::NamedTempFile::new().unwrap();
    let path: PathBuf = file.path().join("below-a-file");
    let output = lab.run(&["--out", path.to_str().unwrap(), "--", "true"]);
    assert_eq!(output.status.code(), Some(125), "{}", said(&output));
    lab.assert_nothing_is_left();
}
