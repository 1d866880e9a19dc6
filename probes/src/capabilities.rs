//! What this process may do.

/// Those that loading and attaching need, by their numbers in `linux/capability.h`.
const NEEDED: [(&str, u32); 3] = [("CAP_BPF", 39), ("CAP_PERFMON", 38), ("CAP_SYS_ADMIN", 21)];

/// The kernel takes it for the other two as well.
const ENOUGH: u64 = 1 << 21;

/// Those that are needed and not effective; empty where none is, or where it cannot be told.
pub(crate) fn missing() -> String {
    std::fs::read_to_string("/proc/self/status").map(|status| missing_in(&status)).unwrap_or_default()
}

fn missing_in(status: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(effective) = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()) else {
        return String::new();
    };
    if effective & ENOUGH != 0 {
        return String::new();
    }
    let lacking = NEEDED.iter().filter(|(_, bit)| effective & (1 << bit) == 0).map(|(name, _)| *name);
    lacking.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_ones_are_named_where_the_greatest_of_them_is_missing_too() {
        assert_eq!(
            missing_in("Name:\ta\nCapEff:\t0000000000000000\n"),
            "CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN"
        );
        assert_eq!(missing_in("CapEff:\t000001ffffffffff\n"), "");
        assert_eq!(missing_in("CapEff:\t000001ffffdfffff\n"), "CAP_SYS_ADMIN");
        assert_eq!(missing_in("CapEff:\t000001bfffdfffff\n"), "CAP_PERFMON, CAP_SYS_ADMIN");
        assert_eq!(missing_in("CapEff:\t0000000000200000\n"), "");
        assert_eq!(missing_in("Name:\ta\n"), "");
    }
}
