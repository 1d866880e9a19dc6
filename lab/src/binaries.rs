//! Which QEMUs are on this machine.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A QEMU that the tests know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QemuVersion {
    /// Debian 12's own.
    V7_2,
    /// Debian 12's backport, unpacked by `scripts/setup test`.
    V10_0,
}

impl QemuVersion {
    /// Every version that the tests know.
    pub const ALL: [QemuVersion; 2] = [QemuVersion::V7_2, QemuVersion::V10_0];

    fn prefix(self) -> &'static str {
        match self {
            QemuVersion::V7_2 => "7.2.",
            QemuVersion::V10_0 => "10.0.",
        }
    }

    fn variable(self) -> &'static str {
        match self {
            QemuVersion::V7_2 => "RAMFERRY_QEMU_7_2",
            QemuVersion::V10_0 => "RAMFERRY_QEMU_10_0",
        }
    }
}

/// The QEMU of that version: what `RAMFERRY_QEMU_7_2` or `RAMFERRY_QEMU_10_0`
/// names, else what `scripts/setup` unpacked, else the system's if it is that version.
pub fn qemu_binary(version: QemuVersion) -> Option<PathBuf> {
    let named = env::var_os(version.variable()).map(PathBuf::from);
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/qemu-10.0/qemu-system-x86_64");
    let system = PathBuf::from("qemu-system-x86_64");
    [named, Some(unpacked), Some(system)]
        .into_iter()
        .flatten()
        .find(|binary| version_of(binary).is_some_and(|found| found.starts_with(version.prefix())))
}

/// `7.2.22` of `QEMU emulator version 7.2.22 (Debian ...)`.
fn version_of(binary: &Path) -> Option<String> {
    let output = Command::new(binary).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.strip_prefix("QEMU emulator version ")?.split_whitespace().next().map(str::to_owned)
}
