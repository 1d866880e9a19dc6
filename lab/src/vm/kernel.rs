//! The kernels that the lab VM boots. `scripts/lab-kernel` makes them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, ensure};

/// A kernel of Debian's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's own: without asynchronous write-protection.
    V6_1,
    /// Its backport.
    V6_12,
}

impl Kernel {
    /// Every kernel of the lab.
    pub const ALL: [Kernel; 2] = [Kernel::V6_1, Kernel::V6_12];

    /// The version, as it is called in options and files.
    pub fn as_str(self) -> &'static str {
        match self {
            Kernel::V6_1 => "6.1",
            Kernel::V6_12 => "6.12",
        }
    }

    /// Whether `scripts/lab-kernel` has made it.
    pub fn is_made(self) -> bool {
        self.files().is_ok()
    }

    /// Its files. The error says how to make them.
    pub(crate) fn files(self) -> Result<KernelFiles> {
        let directory =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../target/lab/kernel-{}", self.as_str()));
        let files = KernelFiles {
            image: directory.join("vmlinux"),
            initramfs: directory.join("initramfs.cpio"),
            modules: directory.join("modules"),
        };
        for file in [&files.image, &files.initramfs, &files.modules] {
            ensure!(file.exists(), "{} is not there: run scripts/lab-kernel {self}", file.display());
        }
        Ok(files)
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kernel {
    type Err = String;

    fn from_str(version: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|kernel| kernel.as_str() == version);
        found.ok_or_else(|| format!("{version:?} is no kernel of the lab: use 6.1 or 6.12"))
    }
}

/// What a VM boots.
#[derive(Clone, Debug)]
pub(crate) struct KernelFiles {
    pub(crate) image: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// A directory with one named after the kernel's release.
    pub(crate) modules: PathBuf,
}
