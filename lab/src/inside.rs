//! The first process of the lab VM: makes it a machine that programs can run on, runs the command, and powers off.

mod command;
pub mod hosts;
mod mounts;

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::RebootCommand;

use crate::vm::job::{Job, PORT, Session};
use crate::vm::wire::Frame;
use command::Ended;
use hosts::Hosts;

/// Set for the command to the kernel's release: where a test finds it, nothing that the lab has may be skipped.
pub const LAB_VARIABLE: &str = "RAMFERRY_LAB";
/// Set for the command to the directory whose files are the host's, where there is one.
pub const OUT_VARIABLE: &str = "RAMFERRY_LAB_OUT";

const OUT: &str = "/run/ramferry-lab-out";
const MODULES: [&str; 6] = ["crc32_generic", "crc32c_generic", "rdma_rxe", "ib_uverbs", "rdma_ucm", "veth"];
const OPEN_FILES: u64 = 1 << 20;

/// Whether this process is in the lab VM.
pub fn is_here() -> bool {
    std::env::var_os(LAB_VARIABLE).is_some()
}

/// What `ramferry-lab inside` does. It returns only where it is not the first process of a VM.
///
/// # Errors
/// When it is not.
pub fn run() -> Result<()> {
    ensure!(std::process::id() == 1, "this is for the first process of the lab VM: use `ramferry-lab run`");
    if let Err(error) = serve() {
        eprintln!("ramferry-lab: the VM cannot go on: {error:#}");
    }
    rustix::fs::sync();
    rustix::system::reboot(RebootCommand::PowerOff).context("the VM cannot be powered off")
}

fn serve() -> Result<()> {
    // What was started before has no environment to speak of.
    let job = Job::read()?;
    mounts::make(&Session::modules()?)?;
    let mut line = open_line()?;
    let ended = match prepare(&job) {
        Ok(environment) => command::run(&job, environment, &mut line)?,
        Err(error) => Ended::NotStarted(format!("the VM cannot be made ready: {error:#}")),
    };
    if job.has_out {
        rustix::fs::sync();
    }
    match ended {
        Ended::Exited(status) => Frame::Exited(status),
        Ended::Killed(signal) => Frame::Killed(signal),
        Ended::NotStarted(why) => Frame::NotStarted(why),
    }
    .write(&mut line)?;
    // All of it has arrived when the host answers.
    line.read_exact(&mut [0]).context("the host does not answer")
}

/// Makes the VM ready, and tells what the command is to know of it.
fn prepare(job: &Job) -> Result<Vec<(&'static str, String)>> {
    unlimit();
    // Programs print it; nothing depends on it.
    let _ = fs::write("/proc/sys/kernel/hostname", "lab");
    let mut environment = vec![(LAB_VARIABLE, release()?)];
    if job.has_out {
        mounts::make_out(Path::new(OUT))?;
        environment.push((OUT_VARIABLE, OUT.to_owned()));
    }
    let modules = Command::new("modprobe").arg("-a").args(MODULES).output();
    let modules = modules.context("cannot run modprobe: install kmod")?;
    ensure!(modules.status.success(), "modprobe: {}", String::from_utf8_lossy(&modules.stderr).trim());
    Hosts::make()?;
    Ok(environment)
}

fn release() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("the kernel's release")?;
    Ok(release.trim().to_owned())
}

/// As for root on a machine for RDMA: memory may be locked without limit.
fn unlimit() {
    let limits = [(Resource::Memlock, None), (Resource::Nofile, Some(OPEN_FILES)), (Resource::Core, Some(0))];
    for (resource, limit) in limits {
        // A kernel with a lower bound of its own keeps that.
        let _ = setrlimit(resource, Rlimit { current: limit, maximum: limit });
    }
}

/// The port of that name; the kernel numbers them as it finds them.
fn open_line() -> Result<File> {
    let ports = fs::read_dir("/sys/class/virtio-ports").context("the VM has no ports")?;
    let is_ours =
        |port: &PathBuf| fs::read_to_string(port.join("name")).is_ok_and(|name| name.trim() == PORT);
    let port = ports.flatten().map(|entry| entry.path()).find(is_ours).context("the VM has not its port")?;
    let device = Path::new("/dev").join(port.file_name().context("a port has a name")?);
    let line = OpenOptions::new().read(true).write(true).open(&device);
    line.with_context(|| format!("cannot open {}", device.display()))
}
