//! What the VM is to do, and where it finds that.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::kernel::KernelFiles;
use crate::scratch::Scratch;

/// Where the VM sees a [`Session`].
pub(crate) const SESSION: &str = "/run/ramferry-lab";
/// The one port of the VM: the line to its host.
pub(crate) const PORT: &str = "ramferry-lab";
/// Mount tag of the directory for what is to leave the VM.
pub(crate) const OUT_TAG: &str = "out";

const JOB: &str = "job";
const MODULES: &str = "modules";
const INIT: &str = "init";
/// What the command sees of the caller's environment: these, and all that begins so.
const NAMES: [&str; 6] = ["PATH", "HOME", "USER", "LANG", "TERM", "TEST_THREADS"];
const PREFIXES: [&str; 3] = ["CARGO", "RUST", "RAMFERRY"];

/// The command that a VM runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) command: Vec<OsString>,
    pub(crate) directory: PathBuf,
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// Whether there is a directory for what is to leave the VM.
    pub(crate) has_out: bool,
}

impl Job {
    /// `command` in this process' directory, with its environment as far as the lab passes it on.
    pub(crate) fn here(command: &[OsString], more: &[(OsString, OsString)], has_out: bool) -> Result<Job> {
        let mut environment: Vec<_> = env::vars_os().filter(|(name, _)| is_passed_on(name)).collect();
        environment.extend_from_slice(more);
        let directory = env::current_dir().context("this process' directory cannot be told")?;
        Ok(Job { command: command.to_vec(), directory, environment, has_out })
    }

    /// The job of the VM that this process is the first of.
    pub(crate) fn read() -> Result<Job> {
        let path = Path::new(SESSION).join(JOB);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        serde_json::from_reader(file).with_context(|| format!("{} is no job", path.display()))
    }
}

fn is_passed_on(name: &OsStr) -> bool {
    NAMES.iter().any(|known| name == *known)
        || PREFIXES.iter().any(|prefix| name.as_bytes().starts_with(prefix.as_bytes()))
}

/// A directory that the VM finds at [`SESSION`]: the job, and links to its modules and its first process.
#[derive(Debug)]
pub(crate) struct Session(Scratch);

impl Session {
    pub(crate) fn new(job: &Job, kernel: &KernelFiles, init: &Path) -> Result<Session> {
        let scratch = Scratch::new(&env::temp_dir())?;
        fs::write(scratch.join(JOB), serde_json::to_vec(job)?).context("cannot write the job")?;
        for (link, target) in [(MODULES, kernel.modules.as_path()), (INIT, init)] {
            let target = fs::canonicalize(target)
                .with_context(|| format!("{} is not to be found", target.display()))?;
            symlink(target, scratch.join(link)).context("cannot make a link in a new directory")?;
        }
        Ok(Session(scratch))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where the VM's modules are, in the VM.
    pub(crate) fn modules() -> Result<PathBuf> {
        fs::canonicalize(Path::new(SESSION).join(MODULES)).context("the kernel's modules are not to be found")
    }
}
