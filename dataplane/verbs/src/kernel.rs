//! What the running kernel can do.

use std::sync::LazyLock;

use ramferry_ram::Access;

/// The first that pins, for reading, memory that is mapped for reading only.
const PINS_READ_ONLY: (u32, u32) = (6, 2);

/// How the RAM files of a guest have to be mapped to be registered for this side's
/// writes to the peer: for reading only, but for kernels older than 6.2, which
/// pin everything as if to write.
pub fn source_access() -> Access {
    static ACCESS: LazyLock<Access> = LazyLock::new(|| {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        access_of(&release)
    });
    *ACCESS
}

/// A release that cannot be told is taken for a new one: an old one says so when it refuses.
fn access_of(release: &str) -> Access {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) < PINS_READ_ONLY => Access::ReadWrite,
        _ => Access::Read,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_6_2_need_writable_memory() {
        for old in ["6.1.0-42-amd64\n", "5.15.0", "4.18.0-553.el8", "6.1-rc3"] {
            assert_eq!(access_of(old), Access::ReadWrite, "{old}");
        }
        for new in ["6.2.0", "6.12.9+deb13", "7.0", "10.1.2", "", "unknown"] {
            assert_eq!(access_of(new), Access::Read, "{new}");
        }
    }
}
