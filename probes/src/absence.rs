//! Why a probe is not attached, and what to do about it.

use std::error::Error;
use std::io;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use rustix::io::Errno;
use thiserror::Error;

use crate::capabilities;
use crate::probe::Probe;

/// A place where symbols are, beside libraries.
pub(crate) const KERNEL: &str = "the kernel";

/// Why a probe is not attached.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Absence {
    /// Nobody asked for it.
    #[error("probes are turned off")]
    Off,
    /// The programs read the registers of another architecture.
    #[error("the programs are for x86_64")]
    Architecture,
    /// The process may not use eBPF.
    #[error("this process lacks {missing}")]
    NoCapability {
        /// The capabilities that it lacks.
        missing: String,
    },
    /// It has the capabilities, and is refused all the same.
    #[error(
        "{step} is refused although this process has the capabilities: a seccomp filter (of a container runtime) or a \
         security module forbids it, or the kernel is locked down and /sys/kernel/security is not mounted here to tell"
    )]
    Forbidden {
        /// What was refused.
        step: &'static str,
    },
    /// The kernel is locked down.
    #[error("the kernel is locked down ({mode}) and refuses {step}")]
    Lockdown {
        /// The mode.
        mode: String,
        /// What was refused.
        step: &'static str,
    },
    /// The kernel cannot probe user space.
    #[error("this kernel has no uprobes (CONFIG_UPROBE_EVENTS), or /sys is not mounted here")]
    NoUprobes,
    /// The kernel cannot probe itself.
    #[error("this kernel has no kprobes (CONFIG_KPROBE_EVENTS), or /sys is not mounted here")]
    NoKprobes,
    /// The kernel does not tell the layout of its structures.
    #[error(
        "this kernel has no type information: /sys/kernel/btf/vmlinux is missing (CONFIG_DEBUG_INFO_BTF)"
    )]
    NoBtf,
    /// The kernel knows no eBPF, or too little.
    #[error("this kernel cannot do what the programs need ({what})")]
    KernelTooOld {
        /// What it cannot do.
        what: &'static str,
    },
    /// There is nothing to attach to.
    #[error("no libibverbs.so.1 in the host's library directories")]
    NoLibibverbs,
    /// The library cannot be read.
    #[error("{library} cannot be read as a shared library: {reason}")]
    LibraryUnreadable {
        /// Its path.
        library: String,
        /// Why.
        reason: String,
    },
    /// The library or the kernel has no such function.
    #[error("{place} has no {symbol}")]
    SymbolMissing {
        /// The function.
        symbol: &'static str,
        /// Where it was looked for.
        place: String,
    },
    /// It sees nothing without another, which is absent.
    #[error("it needs the probe {}, which is absent", .0.as_str())]
    Needs(Probe),
    /// Not yet known: they are being attached.
    #[error("not attached yet")]
    Pending,
    /// Something else.
    #[error("{step} failed: {reason}")]
    Failed {
        /// What was tried.
        step: &'static str,
        /// What the system said.
        reason: String,
    },
}

impl Absence {
    /// Its name for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Architecture => "architecture",
            Self::NoCapability { .. } => "no_capability",
            Self::Forbidden { .. } => "forbidden",
            Self::Lockdown { .. } => "lockdown",
            Self::NoUprobes => "no_uprobes",
            Self::NoKprobes => "no_kprobes",
            Self::NoBtf => "no_btf",
            Self::KernelTooOld { .. } => "kernel_too_old",
            Self::NoLibibverbs => "no_libibverbs",
            Self::LibraryUnreadable { .. } => "library_unreadable",
            Self::SymbolMissing { .. } => "symbol_missing",
            Self::Needs(_) => "needs_other",
            Self::Pending => "pending",
            Self::Failed { .. } => "failed",
        }
    }

    /// What to do about it; empty where nothing is to be done.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Off | Self::Pending | Self::Needs(_) => "",
            Self::Architecture => "none; migrations do not need probes",
            Self::NoCapability { .. } => {
                "give it CAP_SYS_ADMIN, or run it as root (in a container: privileged)"
            }
            Self::Forbidden { .. } => "allow the system calls bpf and perf_event_open",
            Self::Lockdown { .. } => {
                "boot with lockdown=integrity or none; probes on libibverbs work under every lockdown"
            }
            Self::NoUprobes => "mount /sys here (in a container: the host's), or boot a kernel that has them",
            Self::NoKprobes => {
                "mount /sys here (in a container: the host's), or boot a kernel that has them; probes on libibverbs \
                 work without"
            }
            Self::NoBtf => {
                "mount /sys here (in a container: the host's), or boot a kernel that has it; probes on libibverbs work \
                 without"
            }
            Self::KernelTooOld { .. } => "boot Linux 5.15 or newer",
            Self::NoLibibverbs => {
                "install rdma-core's libibverbs1 (in a container: see the host's library directories), and restart the agent"
            }
            Self::LibraryUnreadable { .. } => "mend the file or the rights to read it, and restart the agent",
            Self::SymbolMissing { place, .. } if place == KERNEL => {
                "load the module ib_uverbs and restart the agent; where it is loaded, this kernel's names are others"
            }
            Self::SymbolMissing { .. } => "a newer rdma-core has it",
            Self::Failed { .. } => "report it with the agent's log",
        }
    }

    /// Of an object that could not be loaded.
    pub(crate) fn of_load(error: &EbpfError) -> Self {
        Self::of("loading", error)
    }

    /// Of a program that could not be loaded or attached to `symbol`.
    pub(crate) fn of_attach(error: &ProgramError, symbol: &'static str, place: &str) -> Self {
        if matches!(error, ProgramError::AttachCookieNotSupported) {
            return Self::KernelTooOld { what: "attach cookies" };
        }
        if matches!(error, ProgramError::SyscallError(call) if call.call == "perf_event_open")
            && errno_of(error) == Some(Errno::NOENT)
        {
            return Self::SymbolMissing { symbol, place: place.to_owned() };
        }
        Self::of(if is_load(error) { "loading" } else { "attaching" }, error)
    }

    fn of(step: &'static str, error: &(dyn Error + 'static)) -> Self {
        match errno_of(error) {
            Some(Errno::PERM | Errno::ACCESS) => Self::of_refusal(step),
            Some(Errno::NOSYS) => Self::KernelTooOld { what: "the system call bpf" },
            // No errno of its own; /sys/kernel/security, which would tell, is not mounted in every container.
            _ if is_robbed_of_kernel_memory(&in_one_line(error)) => {
                Self::Lockdown { mode: "confidentiality".into(), step }
            }
            _ => Self::Failed { step, reason: in_one_line(error) },
        }
    }

    fn of_refusal(step: &'static str) -> Self {
        let missing = capabilities::missing();
        if !missing.is_empty() {
            return Self::NoCapability { missing };
        }
        match lockdown() {
            Some(mode) => Self::Lockdown { mode, step },
            None => Self::Forbidden { step },
        }
    }
}

fn is_load(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { .. })
}

/// What the system said, below whatever was made of it.
fn errno_of(error: &(dyn Error + 'static)) -> Option<Errno> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let io_error = error.downcast_ref::<io::Error>().or_else(|| inside(error));
        if let Some(errno) = io_error.and_then(Errno::from_io_error) {
            return Some(errno);
        }
        cause = error.source();
    }
    None
}

/// `#[error(transparent)]` hides the error itself from the chain of sources.
fn inside<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a io::Error> {
    let of_program = |error: &'a ProgramError| match error {
        ProgramError::LoadError { io_error, .. } | ProgramError::IOError(io_error) => Some(io_error),
        ProgramError::SyscallError(call) => Some(&call.io_error),
        ProgramError::MapError(error) => of_map(error),
        _ => None,
    };
    match error.downcast_ref::<EbpfError>() {
        Some(EbpfError::ProgramError(error)) => of_program(error),
        Some(EbpfError::MapError(error)) => of_map(error),
        _ => error.downcast_ref::<ProgramError>().and_then(of_program),
    }
}

fn of_map(error: &MapError) -> Option<&io::Error> {
    match error {
        MapError::CreateError { io_error, .. } | MapError::IoError(io_error) => Some(io_error),
        MapError::SyscallError(call) => Some(&call.io_error),
        _ => None,
    }
}

/// Whether the verifier does not know the helper that reads the kernel's memory: no program gets it under
/// lockdown=confidentiality, and every one otherwise.
fn is_robbed_of_kernel_memory(log: &str) -> bool {
    ["unknown func bpf_probe_read", "cannot use helper bpf_probe_read"].iter().any(|said| log.contains(said))
}

/// The error and its causes; of a verifier's log the end.
fn in_one_line(error: &(dyn Error + 'static)) -> String {
    const MOST: usize = 300;
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().rev().nth(MOST) {
        Some((start, _)) => format!("...{}", &text[start..]),
        None => text,
    }
}

/// The kernel's lockdown, where there is one.
fn lockdown() -> Option<String> {
    let text = std::fs::read_to_string("/sys/kernel/security/lockdown").ok()?;
    lockdown_in(&text)
}

fn lockdown_in(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    let (mode, _) = rest.split_once(']')?;
    (mode != "none").then(|| mode.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(call: &'static str, errno: Errno) -> ProgramError {
        ProgramError::SyscallError(aya::sys::SyscallError { call, io_error: errno.into() })
    }

    #[test]
    fn what_the_kernel_does_not_have_is_a_missing_symbol() {
        let error = refused("perf_event_open", Errno::NOENT);
        let absence = Absence::of_attach(&error, "ib_umem_get", KERNEL);
        assert_eq!(
            (absence.code(), &*absence.to_string()),
            ("symbol_missing", "the kernel has no ib_umem_get")
        );
        assert!(absence.remedy().contains("ib_uverbs"), "{absence:?}");
        let absence = Absence::of_attach(&error, "ibv_reg_dmabuf_mr", "/lib/libibverbs.so.1");
        assert!(absence.remedy().contains("rdma-core"), "{absence:?}");
    }

    #[test]
    fn refusals_say_what_is_lacking() {
        let absence = Absence::of_attach(&refused("perf_event_open", Errno::ACCESS), "ibv_reg_mr", "/lib");
        // What it lacks depends on who runs the test, and so does the answer; that it is a refusal does not.
        assert!(["no_capability", "lockdown", "forbidden"].contains(&absence.code()), "{absence:?}");
        let map = MapError::CreateError { name: "series".into(), io_error: Errno::PERM.into() };
        assert_ne!(Absence::of_load(&EbpfError::MapError(map)).code(), "failed");
    }

    #[test]
    fn other_errors_are_told_in_one_line() {
        let absence = Absence::of_attach(&refused("bpf_link_create", Errno::BUSY), "ibv_reg_mr", "/lib");
        assert_eq!(absence.code(), "failed");
        assert!(!absence.to_string().contains('\n'), "{absence}");
        assert!(absence.to_string().contains("busy"), "{absence}");
    }

    #[test]
    fn helper_that_the_verifier_takes_away_is_lockdown() {
        for log in [
            "R3_w=scalar(id=11) 156: (85) call bpf_probe_read#4 unknown func bpf_probe_read#4 processed 141 insns",
            "156: (85) call bpf_probe_read#4 program of this type cannot use helper bpf_probe_read#4",
        ] {
            assert!(is_robbed_of_kernel_memory(log), "{log}");
        }
        assert!(!is_robbed_of_kernel_memory("156: (85) call bpf_probe_read#4 R1 invalid mem access"));
    }

    #[test]
    fn lockdown_is_the_word_in_brackets() {
        assert_eq!(lockdown_in("none [integrity] confidentiality\n").as_deref(), Some("integrity"));
        assert_eq!(lockdown_in("[none] integrity confidentiality\n"), None);
        assert_eq!(lockdown_in(""), None);
    }
}
