//! What an agent keeps of a migration that may come to post-copy, so that it can take it up again after its own end:
//! where the guest's RAM is, how the other side is reached, and what the guest is owed.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ramferry_engine::{Failure, Reason};
use ramferry_fabric::{FabricKind, SessionToken};
use ramferry_ram::{Access, Block, BlockIndex, FileIdentity, Layout, Memory, RamFile};
use serde::{Deserialize, Serialize};

use crate::MigrationRole;
use crate::config::Config;
use crate::status::causes;

/// One side's part of it, in a file that only the agent's user may read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Keepsake {
    /// Of the host's start: RAM does not outlive it.
    boot_id: String,
    /// The VMM's process.
    pub(crate) vmm: u32,
    fabric: String,
    /// Links beside those for faults.
    pub(crate) streams: u32,
    pub(crate) pin_budget_bytes: Option<u64>,
    /// At the destination, processes beside this agent that reach the guest's RAM.
    pub(crate) partners: Vec<u32>,
    /// At the source, the session's token: by it the destination knows its source again.
    token: Option<[u8; SessionToken::BYTES]>,
    blocks: Vec<KeptBlock>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptBlock {
    name: String,
    guest_address: u64,
    length_bytes: u64,
    page_bytes: u64,
    device: u64,
    inode: u64,
    path: PathBuf,
}

/// What is not the memory's, of a [`Keepsake`].
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) fabric: FabricKind,
    pub(crate) streams: u32,
    pub(crate) pin_budget_bytes: Option<u64>,
    pub(crate) partners: Vec<u32>,
}

impl Keepsake {
    pub(crate) fn new(
        boot_id: &str,
        vmm: u32,
        terms: &Terms,
        token: Option<&SessionToken>,
        memory: &Memory,
    ) -> Self {
        let kept = |(index, block): (u32, &Block)| {
            let file = memory.file(BlockIndex(index));
            let identity = file.identity();
            let link = format!("/proc/self/fd/{}", std::os::fd::AsFd::as_fd(file).as_raw_fd());
            KeptBlock {
                name: block.name.clone(),
                guest_address: block.guest_address,
                length_bytes: block.length_bytes,
                page_bytes: block.page_bytes,
                device: identity.device,
                inode: identity.inode,
                // Where it has no path it is found among the VMM's mappings.
                path: fs::read_link(link).unwrap_or_default(),
            }
        };
        Self {
            boot_id: boot_id.to_owned(),
            vmm,
            fabric: terms.fabric.as_str().to_owned(),
            streams: terms.streams,
            pin_budget_bytes: terms.pin_budget_bytes,
            partners: terms.partners.clone(),
            token: token.map(|token| *token.as_bytes()),
            blocks: (0..).zip(memory.layout().blocks()).map(kept).collect(),
        }
    }

    pub(crate) fn token(&self) -> Option<SessionToken> {
        self.token.map(SessionToken::from_bytes)
    }

    pub(crate) fn terms(&self) -> Terms {
        let kinds = [FabricKind::Verbs, FabricKind::Shm, FabricKind::Tcp];
        let fabric = kinds.into_iter().find(|kind| kind.as_str() == self.fabric).unwrap_or(FabricKind::Tcp);
        let partners = self.partners.clone();
        Terms { fabric, streams: self.streams, pin_budget_bytes: self.pin_budget_bytes, partners }
    }

    /// Writes it so that it is there whole or not at all.
    pub(crate) fn write(&self, path: &Path) -> Result<(), Failure> {
        let text = serde_json::to_vec(self).map_err(io::Error::from);
        text.and_then(|text| write_whole(path, &text)).map_err(|error| {
            let message = format!("cannot write {}: {error}; see the disk of state_dir", path.display());
            Failure::new(Reason::JournalFailed, message)
        })
    }

    /// `None` where there is none.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, Failure> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unusable(path, &error)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| unusable(path, &error))
    }

    /// The guest's RAM, if it is still there.
    pub(crate) fn reopen(&self, boot_id: &str, access: Access) -> Result<Arc<Memory>, Failure> {
        let lost = |why: String| Failure::new(Reason::MemoryLost, format!("the guest's RAM is gone: {why}"));
        if self.boot_id != boot_id {
            return Err(lost("the host was restarted".into()));
        }
        let layout = self.blocks.iter().map(|block| Block {
            name: block.name.clone(),
            guest_address: block.guest_address,
            length_bytes: block.length_bytes,
            page_bytes: block.page_bytes,
        });
        let layout = Layout::new(layout.collect()).map_err(|error| lost(error.to_string()))?;
        let files: Result<Vec<_>, _> = self.blocks.iter().map(|block| block.open(self.vmm, access)).collect();
        let files = files.map_err(lost)?;
        let memory = Memory::new(layout, files, access).map_err(|error| lost(causes(&error)))?;
        Ok(Arc::new(memory))
    }
}

impl KeptBlock {
    /// By its path, or as the VMM has it mapped.
    fn open(&self, vmm: u32, access: Access) -> Result<RamFile, String> {
        let is_it = |file: &RamFile| {
            file.identity() == FileIdentity { device: self.device, inode: self.inode }
                && file.length_bytes() >= self.length_bytes
        };
        let open = |path: &Path| RamFile::open(path, access).ok().filter(is_it);
        if let Some(file) = open(&self.path) {
            return Ok(file);
        }
        let mapped = fs::read_dir(format!("/proc/{vmm}/map_files")).into_iter().flatten().flatten();
        let mapped = mapped.map(|entry| entry.path()).filter(|link| {
            use std::os::unix::fs::MetadataExt as _;
            fs::metadata(link).is_ok_and(|found| found.dev() == self.device && found.ino() == self.inode)
        });
        let found = mapped.take(1).find_map(|link| open(&link));
        found.ok_or_else(|| {
            format!(
                "the file of {} ({}) is no more, or has another in its place",
                self.name,
                self.path.display()
            )
        })
    }
}

/// Why memory is lost, for an engine: it makes of that what becomes of the guest, and what to do.
pub(crate) fn why_lost(failure: Failure) -> Failure {
    Failure::new(Reason::GuestFailed, failure.message)
}

/// Writes a file that only the agent's user may read, so that it is there whole or not at all.
pub(crate) fn write_whole(path: &Path, text: &[u8]) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text)?;
    fs::rename(&new, path)
}

fn unusable(path: &Path, error: &dyn std::error::Error) -> Failure {
    let message = format!("cannot read {}: {error}", path.display());
    Failure::new(Reason::JournalFailed, message)
}

/// Where the keepsake of a migration is.
pub(crate) fn path(config: &Config, id: &str, role: MigrationRole) -> PathBuf {
    config.state_dir.join("postcopy").join(format!("{id}.{}.json", role.as_str()))
}

/// Where a destination keeps account of what its guest is owed.
pub(crate) fn owed_path(config: &Config, id: &str) -> PathBuf {
    config.state_dir.join("postcopy").join(format!("{id}.owed"))
}

/// Removes what was kept of a migration that has ended.
pub(crate) fn remove(config: &Config, id: &str, role: MigrationRole) {
    let kept = path(config, id, role);
    let mut paths = vec![kept.with_extension("new"), kept];
    if role == MigrationRole::Destination {
        let owed = owed_path(config, id);
        paths.extend([owed.with_added_extension("new"), owed]);
    }
    for path in paths {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "what a migration left could not be removed");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(directory: &Path) -> Memory {
        let path = directory.join("ram");
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let block = Block { name: "a".into(), guest_address: 0, length_bytes: 1 << 20, page_bytes: 4096 };
        let file = RamFile::open(&path, Access::Read).unwrap();
        Memory::new(Layout::new(vec![block]).unwrap(), vec![file], Access::Read).unwrap()
    }

    fn terms() -> Terms {
        Terms { fabric: FabricKind::Shm, streams: 3, pin_budget_bytes: None, partners: Vec::new() }
    }

    #[test]
    fn ram_is_found_again_by_what_was_kept_of_it_and_not_another_file_in_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let token = SessionToken::from_bytes([7; 32]);
        let memory = memory(directory.path());
        let kept = Keepsake::new("boot", std::process::id(), &terms(), Some(&token), &memory);
        let path = directory.path().join("postcopy").join("a.json");
        assert!(Keepsake::read(&path).unwrap().is_none());
        kept.write(&path).unwrap();
        let kept = Keepsake::read(&path).unwrap().unwrap();
        assert_eq!((kept.token(), kept.terms().fabric), (Some(token), FabricKind::Shm));
        assert_eq!(kept.reopen("boot", Access::Read).unwrap().layout(), memory.layout());
        // Nobody has it mapped now, and its name is another's.
        drop(memory);
        fs::rename(directory.path().join("ram"), directory.path().join("old")).unwrap();
        fs::File::create(directory.path().join("ram")).unwrap().set_len(1 << 20).unwrap();
        let failure = kept.reopen("boot", Access::Read).unwrap_err();
        assert_eq!(failure.reason, Reason::MemoryLost, "{failure}");
        assert_eq!(kept.reopen("another", Access::Read).unwrap_err().reason, Reason::MemoryLost);
    }

    #[test]
    fn damaged_keepsake_is_an_error_that_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        fs::write(&path, "{\"boot_id\":").unwrap();
        let failure = Keepsake::read(&path).unwrap_err();
        assert!(failure.message.contains("a.json"), "{failure}");
    }
}
