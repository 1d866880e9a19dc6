use std::io;

use thiserror::Error;

use crate::maps::MapsError;

/// Why a process could not be made to call. It runs on unharmed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RemoteCallError {
    /// The process is not there any more.
    #[error("process {pid} ended")]
    Ended {
        /// The process.
        pid: u32,
    },
    /// A debugger holds it.
    #[error("process {pid} is being traced by process {tracer} ({comm}): end that first")]
    AlreadyTraced {
        /// The process.
        pid: u32,
        /// Who traces it.
        tracer: u32,
        /// That process's name.
        comm: String,
    },
    /// We may not trace it.
    #[error(
        "may not trace process {pid}: give the agent CAP_SYS_PTRACE (and, under a security module, leave to trace it)"
    )]
    Denied {
        /// The process.
        pid: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Its seccomp filters could kill it for a call that it never makes itself,
    /// and we may not suspend them.
    #[error(
        "process {pid} runs under seccomp, which could kill it for calling userfaultfd: give the agent CAP_SYS_ADMIN \
         and run it without a seccomp filter of its own, or start QEMU with `-sandbox off`"
    )]
    Seccomp {
        /// The process.
        pid: u32,
        /// The kernel's answer to suspending them.
        #[source]
        source: io::Error,
    },
    /// It is a 32-bit process.
    #[error("process {pid} is not a 64-bit process")]
    NotSixtyFourBit {
        /// The process.
        pid: u32,
    },
    /// No `syscall` instruction was found in its code.
    #[error("found no system call instruction in process {pid}")]
    NoSyscallInstruction {
        /// The process.
        pid: u32,
    },
    /// Its mappings or memory could not be read.
    #[error("cannot look into process {pid}")]
    Maps {
        /// The process.
        pid: u32,
        /// Why.
        #[source]
        source: MapsError,
    },
    /// No thread stopped in time, or they were where none may be made to call.
    #[error(
        "no thread of process {pid} could be stopped for a system call: is it frozen, or stuck in the kernel?"
    )]
    NotStopped {
        /// The process.
        pid: u32,
    },
    /// A thread took the call and did not come back from it in time.
    #[error(
        "a thread of process {pid} does not run, so it cannot be given back its registers; this is done as soon as it \
         runs, and until then the agent's child that waits for it must not be killed: is the process in a frozen cgroup?"
    )]
    Stuck {
        /// The process.
        pid: u32,
    },
    /// It may have no userfaultfd.
    #[error("userfaultfd failed in process {pid}{}", refusal_hint(source))]
    Refused {
        /// The process.
        pid: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A call was made and failed.
    #[error("process {pid} was made to call {call}, which failed")]
    CallFailed {
        /// The process.
        pid: u32,
        /// The call.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The descriptor could not be taken over.
    #[error("cannot take a descriptor from process {pid}")]
    Transfer {
        /// The process.
        pid: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Tracing failed in another way.
    #[error("cannot trace process {pid}: {operation} failed")]
    Trace {
        /// The process.
        pid: u32,
        /// What failed.
        operation: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn refusal_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM) => ": set vm.unprivileged_userfaultfd=1",
        Some(libc::ENOSYS) => ": the kernel was built without CONFIG_USERFAULTFD",
        Some(libc::EMFILE) => ": the process has no free descriptor; raise its RLIMIT_NOFILE",
        _ => "",
    }
}
