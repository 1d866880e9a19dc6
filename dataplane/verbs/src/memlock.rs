//! How much memory this process may pin, and has pinned.

use ramferry_fabric::RegisterError;
use rustix::process::Resource;
use rustix::thread::CapabilitySet;

/// Bytes that devices hold pinned for this process; `None` where the kernel does not say.
pub fn pinned_bytes() -> Option<u64> {
    parse_pinned(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// Bytes that this process may pin; `None` without a limit.
pub fn limit_bytes() -> Option<u64> {
    let unlimited =
        rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if unlimited { None } else { rustix::process::getrlimit(Resource::Memlock).current }
}

/// Whether pinning `needed_bytes` more is beyond the limit, and how far.
pub(crate) fn exceeded_by(needed_bytes: u64) -> Option<RegisterError> {
    let limit_bytes = limit_bytes()?;
    let pinned_bytes = pinned_bytes().unwrap_or(0);
    let needed = pinned_bytes.saturating_add(needed_bytes);
    (needed > limit_bytes).then_some(RegisterError::PinLimit { needed_bytes, pinned_bytes, limit_bytes })
}

fn parse_pinned(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_bytes_are_those_of_the_status() {
        assert_eq!(parse_pinned("VmPeak:\t 1 kB\nVmPin:\t    2048 kB\nVmHWM: 3 kB\n"), Some(2 << 20));
        for without in ["", "VmPin: \n", "VmPin: x kB\n", "VmPin: 18446744073709551615 kB\n"] {
            assert_eq!(parse_pinned(without), None, "{without:?}");
        }
        assert_eq!(pinned_bytes(), Some(0), "nothing is pinned in this process");
    }
}
