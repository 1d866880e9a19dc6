//! What a deputy tells of its errand, in a few bytes: it may not allocate.

use std::io;

use super::RemoteCallError;
use crate::deputy::REPORT_BYTES;

/// What [`RemoteCallError::Trace`] may name.
const OPERATIONS: &[&str] = &[
    "ptrace",
    "PTRACE_SEIZE",
    "PTRACE_INTERRUPT",
    "PTRACE_CONT",
    "PTRACE_SYSCALL",
    "PTRACE_DETACH",
    "PTRACE_GETREGS",
    "PTRACE_SETREGS",
    "PTRACE_GETSIGMASK",
    "PTRACE_SETSIGMASK",
    "waitid",
    "waitpid",
    "injected call",
];

/// What [`RemoteCallError::CallFailed`] may name.
const CALLS: &[&str] = &["madvise", "close"];

/// Of an errand that brought nothing back.
pub(super) const SUCCESS: [u8; REPORT_BYTES] = [0xff, 0, 0, 0, 0, 0, 0, 0];

/// Of an errand that brought a descriptor back, which has this number in its process.
pub(super) fn of_descriptor(number: i32) -> [u8; REPORT_BYTES] {
    let number = number.to_ne_bytes();
    [0xff, 0, 0, 0, number[0], number[1], number[2], number[3]]
}

pub(super) fn descriptor([_, _, _, _, number @ ..]: [u8; REPORT_BYTES]) -> i32 {
    i32::from_ne_bytes(number)
}

/// The kind, the operation, two bytes of nothing, the error number.
pub(super) fn encode(error: &RemoteCallError) -> [u8; REPORT_BYTES] {
    let (kind, operation, source) = match error {
        RemoteCallError::NotStopped { .. } => (1, 0, None),
        RemoteCallError::NotSixtyFourBit { .. } => (2, 0, None),
        RemoteCallError::Denied { source, .. } => (3, 0, Some(source)),
        RemoteCallError::Seccomp { source, .. } => (4, 0, Some(source)),
        RemoteCallError::Refused { source, .. } => (5, 0, Some(source)),
        RemoteCallError::Transfer { source, .. } => (6, 0, Some(source)),
        RemoteCallError::Trace { operation, source, .. } => {
            (7, OPERATIONS.iter().position(|known| known == operation).unwrap_or(0), Some(source))
        }
        RemoteCallError::CallFailed { call, source, .. } => {
            (8, CALLS.iter().position(|known| known == call).unwrap_or(0), Some(source))
        }
        // What else there is was found out before.
        _ => (0, 0, None),
    };
    let errno = source.and_then(io::Error::raw_os_error).unwrap_or(libc::EIO).to_ne_bytes();
    [kind, operation as u8, 0, 0, errno[0], errno[1], errno[2], errno[3]]
}

pub(super) fn decode(pid: u32, report: [u8; REPORT_BYTES]) -> RemoteCallError {
    let [kind, operation, _, _, errno @ ..] = report;
    let source = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
    match kind {
        1 => RemoteCallError::NotStopped { pid },
        2 => RemoteCallError::NotSixtyFourBit { pid },
        3 => RemoteCallError::Denied { pid, source },
        4 => RemoteCallError::Seccomp { pid, source },
        5 => RemoteCallError::Refused { pid, source },
        6 => RemoteCallError::Transfer { pid, source },
        7 => {
            let operation = OPERATIONS.get(usize::from(operation)).copied().unwrap_or(OPERATIONS[0]);
            RemoteCallError::Trace { pid, operation, source }
        }
        8 => {
            let call = CALLS.get(usize::from(operation)).copied().unwrap_or(CALLS[0]);
            RemoteCallError::CallFailed { pid, call, source }
        }
        _ => RemoteCallError::Ended { pid },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_of_a_deputy_arrives_as_it_was() {
        let pid = 7;
        let source = || io::Error::from_raw_os_error(libc::EPERM);
        let errors = [
            RemoteCallError::Ended { pid },
            RemoteCallError::NotStopped { pid },
            RemoteCallError::NotSixtyFourBit { pid },
            RemoteCallError::Denied { pid, source: source() },
            RemoteCallError::Seccomp { pid, source: source() },
            RemoteCallError::Refused { pid, source: source() },
            RemoteCallError::Transfer { pid, source: source() },
            RemoteCallError::Trace { pid, operation: "injected call", source: source() },
            RemoteCallError::CallFailed { pid, call: "close", source: source() },
        ];
        for error in errors {
            let decoded = decode(pid, encode(&error));
            assert_eq!(format!("{decoded:?}"), format!("{error:?}"));
        }
    }
}
