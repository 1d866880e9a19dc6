//! Debian's kernel with `stress`: a guest as people run it, and the worst case
//! for a migration. `scripts/debian-guest` makes its kernel and initramfs.

use std::path::{Path, PathBuf};

/// Debian's kernel, busybox, `stress` and a ticker that prints `tick N uptime`
/// ten times a second on the serial console.
///
/// It needs 512 MiB of RAM with the default `stress`.
#[derive(Clone, Debug)]
pub struct DebianGuest {
    /// The kernel's image, unpacked: TCG takes ten seconds to unpack it.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Arguments of `stress`; empty: it is not started.
    pub stress: String,
}

impl DebianGuest {
    /// The guest that `scripts/setup` made. The error says why a test must be skipped.
    pub fn find() -> Result<DebianGuest, String> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/debian");
        let (kernel, initramfs) = (directory.join("vmlinux"), directory.join("initramfs.cpio.gz"));
        if let Some(missing) = [&kernel, &initramfs].into_iter().find(|file| !file.exists()) {
            return Err(format!("{} is not there: run scripts/setup test", missing.display()));
        }
        Ok(DebianGuest { kernel, initramfs, stress: "--vm 1 --vm-bytes 200M --vm-keep".to_owned() })
    }

    pub(crate) fn arguments(&self) -> Vec<String> {
        // The kernel hands what it does not know, after `--`, to init.
        let append = format!("console=ttyS0 quiet panic=-1 -- {}", self.stress);
        let paths = [&self.kernel, &self.initramfs].map(|path| path.display().to_string());
        ["-cpu", "max", "-kernel", &paths[0], "-initrd", &paths[1], "-append", &append]
            .map(str::to_owned)
            .to_vec()
    }
}
