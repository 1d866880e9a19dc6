//! What an agent that died left in the VMM: a descriptor that keeps its RAM registered.

use std::fs;
use std::os::fd::OwnedFd;

use super::FaultsError;
use super::userfaultfd::has_our_features;
use crate::remote_call::{remote_close, take_descriptor};
use crate::segments::Segment;
use crate::{process, remote_call};

/// A userfaultfd that the VMM has open, and a copy of it.
pub(super) struct Left {
    pub(super) descriptor: u32,
    pub(super) fd: OwnedFd,
}

/// Userfaultfds of `vmm` on which exactly our features were agreed.
pub(super) fn find(vmm: u32) -> Result<Vec<Left>, FaultsError> {
    let mut found = Vec::new();
    for descriptor in descriptors_of(vmm)? {
        let fdinfo = fs::read_to_string(format!("/proc/{vmm}/fdinfo/{descriptor}")).unwrap_or_default();
        if !has_our_features(&fdinfo) {
            continue;
        }
        let fd = take_descriptor(vmm, descriptor as i32).map_err(|source| {
            let source = remote_call::RemoteCallError::Transfer { pid: vmm, source };
            FaultsError::RemoteCall { vmm, source }
        })?;
        found.push(Left { descriptor, fd });
    }
    Ok(found)
}

/// Has `vmm` close every descriptor that it has of our open file `fd`; `descriptor` is one.
pub(super) fn close(vmm: u32, fd: std::os::fd::BorrowedFd<'_>, descriptor: u32) -> Result<(), FaultsError> {
    for theirs in descriptors_of(vmm)? {
        let is_it = process::is_same_open_file(fd, vmm, theirs);
        // Without kcmp(2) there is only the number to go by, and that it is a userfaultfd.
        if is_it.unwrap_or(theirs == descriptor) {
            remote_close(vmm, theirs).map_err(|source| match source {
                remote_call::RemoteCallError::Ended { .. } => FaultsError::Ended { vmm },
                source => FaultsError::RemoteCall { vmm, source },
            })?;
        }
    }
    Ok(())
}

/// Whether all of `segments` wait for both kinds of faults, by what the kernel tells of `vmm`'s mappings. It looks at every
/// page that is mapped to tell, which takes tens of milliseconds a GiB.
pub(super) fn is_registered(vmm: u32, segments: &[Segment]) -> Result<bool, FaultsError> {
    let smaps = fs::read_to_string(format!("/proc/{vmm}/smaps"))
        .map_err(|source| FaultsError::of_call(vmm, "reading smaps", source))?;
    Ok(is_registered_by(&smaps, segments))
}

fn is_registered_by(smaps: &str, segments: &[Segment]) -> bool {
    let mut registered: Vec<(u64, u64)> = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |wanted| flags.split_whitespace().any(|flag| flag == wanted);
            registered.extend(current.take().filter(|_| has("um") && has("ui")));
            continue;
        }
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let ends = range.and_then(|(start, end)| {
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        });
        current = ends.or(current);
    }
    // Both ascend; what is registered may be in more pieces than the segments.
    segments.iter().all(|segment| {
        let mut at = segment.start;
        for (start, end) in &registered {
            if (*start..*end).contains(&at) {
                at = *end;
            }
        }
        at >= segment.end
    })
}

fn descriptors_of(vmm: u32) -> Result<Vec<u32>, FaultsError> {
    process::userfaultfds_of(vmm).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => FaultsError::Ended { vmm },
        _ => FaultsError::of_call(vmm, "listing descriptors", source),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn mappings_are_registered_only_where_all_of_them_wait_for_both_kinds() {
        let smaps = |first: &str, second: &str| {
            format!(
                "7f0000000000-7f0000002000 rw-s 00000000 00:1a 42 /dev/shm/a\nSize: 8 kB\nVmFlags: rd wr sh {first}\n\
                 7f0000002000-7f0000004000 rw-s 00002000 00:1a 42 /dev/shm/a\nVmFlags: rd wr {second}\n"
            )
        };
        let start = 0x7f00_0000_0000;
        let segment = |pages: u64| [Segment { start, end: start + pages * 4096, file: 0, offset: 0 }];
        assert!(is_registered_by(&smaps("um ui", "ui mr um"), &segment(4)));
        for second in ["", "um", "ui", "uw ui"] {
            assert!(!is_registered_by(&smaps("um ui", second), &segment(4)), "{second}");
            assert!(is_registered_by(&smaps("um ui", second), &segment(2)), "{second}");
        }
        assert!(!is_registered_by("", &segment(1)));
        assert!(!is_registered_by("7f0000000000-zz x\nVmFlags: um ui\n", &segment(1)));
    }

    proptest! {
        #[test]
        fn whatever_the_kernel_tells_is_read_without_panic(text in "(VmFlags:|API:|[0-9a-f]{0,17}-| um| ui|[ -~]|\n){0,60}") {
            is_registered_by(&text, &[Segment { start: 0, end: 4096, file: 0, offset: 0 }]);
            has_our_features(&text);
        }
    }
}
