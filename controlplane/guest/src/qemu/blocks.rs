//! QEMU's RAM blocks, and the files behind them.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ramferry_ram::{Access, Block, FileIdentity, RamFile};
use ramferry_tracking::maps::{Vma, open_mapped_file, vmas_of};
use serde_json::json;

use crate::qmp::{QmpClient, QmpError};
use crate::{GuestError, Version};

use super::replies::{HumanReadable, Memdev};

/// `linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// From this version QEMU leaves only files with a name out of its stream.
const NAMED_FILES_ONLY: (u32, u32) = (8, 1);

/// Length of what `mkstemp` puts at the end of a name.
const TEMPORARY_SUFFIX_BYTES: usize = 6;

/// A RAM block as `x-query-ramblock` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RamBlock {
    /// Empty for a block that no device uses.
    pub(super) name: String,
    pub(super) page_bytes: u64,
    pub(super) guest_address: u64,
    pub(super) used_bytes: u64,
    pub(super) length_bytes: u64,
}

impl RamBlock {
    pub(super) fn block(&self) -> Block {
        Block {
            name: self.name.clone(),
            guest_address: self.guest_address,
            length_bytes: self.length_bytes,
            page_bytes: self.page_bytes,
        }
    }
}

/// A block that is a shared file, and the path that QEMU was given for it.
#[derive(Clone, Debug)]
pub(super) struct SharedBlock {
    pub(super) block: Block,
    mem_path: PathBuf,
}

/// The blocks in use, in QEMU's order.
pub(super) async fn query(client: &QmpClient) -> Result<Vec<RamBlock>, GuestError> {
    let listing: HumanReadable = client.execute("x-query-ramblock", json!({})).await?;
    let mut blocks = parse(&listing.human_readable_text)?;
    blocks.retain(|block| !block.name.is_empty());
    Ok(blocks)
}

/// Whether two answers to [`query`] are of the same RAM. The order and the part
/// of a firmware block that is used may change while a guest runs.
pub(super) fn same(before: &[RamBlock], now: &[RamBlock]) -> bool {
    let is = |a: &RamBlock, b: &RamBlock| a.block() == b.block();
    before.len() == now.len() && before.iter().all(|block| now.iter().any(|other| is(block, other)))
}

/// Those of `blocks` that are shared files.
///
/// # Errors
/// When a memory backend that is in use is anything else.
pub(super) async fn shared(client: &QmpClient, blocks: &[RamBlock]) -> Result<Vec<SharedBlock>, GuestError> {
    let memdevs: Vec<Memdev> = client.execute("query-memdev", json!({})).await?;
    let mut shared = Vec::new();
    for block in blocks {
        let backend = memdevs.iter().find_map(|memdev| {
            let id = memdev.id.as_deref()?;
            let known_as = block.name.strip_prefix("/objects/").unwrap_or(&block.name);
            (id == known_as).then_some((id, memdev.share))
        });
        let Some((id, share)) = backend else { continue };
        let object = format!("/objects/{id}");
        let kind: String = property(client, &object, "type").await?;
        check_kind(client.version(), block, &kind, share)?;
        let mem_path: String = if kind == "memory-backend-file" {
            property(client, &object, "mem-path").await?
        } else {
            String::new()
        };
        shared.push(SharedBlock { block: block.block(), mem_path: mem_path.into() });
    }
    if shared.is_empty() {
        let largest = blocks.iter().max_by_key(|block| block.length_bytes);
        return Err(match largest {
            Some(block) => private(block, "no memory backend", false),
            None => GuestError::Layout(ramferry_ram::LayoutError::Empty),
        });
    }
    shared.sort_by_key(|shared| shared.block.guest_address);
    Ok(shared)
}

/// The files that process `pid` has mapped for `blocks`, in their order.
///
/// # Errors
/// When a block is not the whole of one file on tmpfs or hugetlbfs.
pub(super) fn open_files(
    pid: u32,
    blocks: &[SharedBlock],
    access: Access,
) -> Result<Vec<RamFile>, GuestError> {
    let mut mapped: HashMap<FileIdentity, Vec<Vma>> = HashMap::new();
    for vma in vmas_of(pid)? {
        if let (Some(identity), true, true) = (vma.identity, vma.shared, vma.writable) {
            mapped.entry(identity).or_default().push(vma);
        }
    }
    let mut files: Vec<RamFile> = Vec::new();
    for shared in blocks {
        let vma = find_mapping(pid, shared, &mapped)?;
        let file = open_file(pid, vma, &shared.block, access)?;
        if let Some(other) = files.iter().position(|other| other.identity() == file.identity()) {
            let first = blocks[other].block.name.clone();
            return Err(GuestError::SameFile { first, second: shared.block.name.clone() });
        }
        files.push(file);
    }
    Ok(files)
}

/// Property `name` of the object at `path`.
pub(super) async fn property<T: serde::de::DeserializeOwned>(
    client: &QmpClient,
    path: &str,
    name: &str,
) -> Result<T, QmpError> {
    client.execute("qom-get", json!({ "path": path, "property": name })).await
}

fn check_kind(version: Version, block: &RamBlock, kind: &str, share: bool) -> Result<(), GuestError> {
    let not_skipped = || GuestError::NotSkipped { block: block.name.clone(), kind: kind.to_owned(), version };
    match kind {
        "memory-backend-file" if share => Ok(()),
        "memory-backend-memfd" if share && (version.major, version.minor) < NAMED_FILES_ONLY => Ok(()),
        "memory-backend-memfd" | "memory-backend-shm" if share => Err(not_skipped()),
        _ => Err(private(block, kind, share)),
    }
}

fn private(block: &RamBlock, kind: &str, share: bool) -> GuestError {
    GuestError::PrivateMemory {
        block: block.name.clone(),
        length_bytes: block.length_bytes,
        kind: kind.to_owned(),
        share,
    }
}

pub(super) fn parse(text: &str) -> Result<Vec<RamBlock>, GuestError> {
    let bad = |line: &str| GuestError::RamBlocks { line: line.trim().to_owned() };
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let header = lines.next().ok_or_else(|| bad(text))?;
    let columns: Vec<&str> = header.split_whitespace().skip_while(|word| *word != "PSize").skip(1).collect();
    let column = |name: &str| columns.iter().position(|column| *column == name).ok_or_else(|| bad(header));
    let (offset, used, total) = (column("Offset")?, column("Used")?, column("Total")?);
    lines.map(|line| parse_line(line, offset, used, total).ok_or_else(|| bad(line))).collect()
}

/// `name`, a size in two words, then numbers in the header's order. A long name
/// runs into the columns, so that their places mean nothing.
fn parse_line(line: &str, offset: usize, used: usize, total: usize) -> Option<RamBlock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let first_number = words.iter().position(|word| word.starts_with("0x"))?;
    let (labels, numbers) = words.split_at(first_number);
    let (name, size) = labels.split_at(labels.len().checked_sub(2)?);
    let number = |at: usize| u64::from_str_radix(numbers.get(at)?.strip_prefix("0x")?, 16).ok();
    let unit: u64 = match size[1] {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    Some(RamBlock {
        name: name.join(" "),
        page_bytes: size[0].parse::<u64>().ok()?.checked_mul(unit)?,
        guest_address: number(offset)?,
        used_bytes: number(used)?,
        length_bytes: number(total)?,
    })
}

fn find_mapping<'a>(
    pid: u32,
    shared: &SharedBlock,
    mapped: &'a HashMap<FileIdentity, Vec<Vma>>,
) -> Result<&'a Vma, GuestError> {
    let wanted = Wanted::new(pid, shared);
    let mut candidates = mapped.iter().filter(|(identity, vmas)| wanted.is(**identity, &vmas[0]));
    let found = match (candidates.next(), candidates.next()) {
        (Some((_, vmas)), None) => whole(vmas, shared.block.length_bytes),
        _ => None,
    };
    found.ok_or_else(|| GuestError::NotMapped {
        block: shared.block.name.clone(),
        path: shared.mem_path.display().to_string(),
        pid,
    })
}

/// How the file of a block is known among those that QEMU has mapped.
enum Wanted {
    /// `mem-path` is this file.
    File(FileIdentity),
    /// `mem-path` is a directory on this device; QEMU made a file in it, with
    /// this beginning of a name, and unlinked it.
    Temporary { device: u64, beginning: String },
    /// `mem-path` names nothing any more: the file was unlinked.
    Unlinked(PathBuf),
    /// A memfd has no path, but a name.
    Memfd(u64),
}

impl Wanted {
    fn new(pid: u32, shared: &SharedBlock) -> Self {
        if shared.mem_path.as_os_str().is_empty() {
            return Wanted::Memfd(shared.block.length_bytes);
        }
        // As QEMU sees it, which may be in another mount namespace.
        let process = PathBuf::from(format!("/proc/{pid}"));
        let seen = match shared.mem_path.strip_prefix("/") {
            Ok(path) => process.join("root").join(path),
            Err(_) => process.join("cwd").join(&shared.mem_path),
        };
        match std::fs::metadata(&seen) {
            Ok(meta) if meta.is_dir() => Wanted::Temporary {
                device: meta.dev(),
                beginning: format!("qemu_back_mem.{}.", shared.block.name.replace('/', "_")),
            },
            Ok(meta) => Wanted::File(FileIdentity { device: meta.dev(), inode: meta.ino() }),
            Err(_) => Wanted::Unlinked(shared.mem_path.clone()),
        }
    }

    fn is(&self, identity: FileIdentity, vma: &Vma) -> bool {
        match self {
            Wanted::File(wanted) => identity == *wanted,
            Wanted::Temporary { device, beginning } => {
                let suffix = file_name(&vma.path).strip_prefix(beginning.as_str());
                identity.device == *device
                    && suffix
                        .is_some_and(|suffix| suffix.len() == TEMPORARY_SUFFIX_BYTES && !suffix.contains('.'))
            }
            Wanted::Unlinked(path) => vma.deleted && vma.path == *path,
            Wanted::Memfd(length_bytes) => {
                file_name(&vma.path) == "memfd:memory-backend-memfd" && vma.length_bytes() == *length_bytes
            }
        }
    }
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(OsStr::to_str).unwrap_or_default()
}

/// The first of `vmas`, if they map the first `length_bytes` of their file without a gap.
fn whole(vmas: &[Vma], length_bytes: u64) -> Option<&Vma> {
    let mut by_offset: Vec<&Vma> = vmas.iter().collect();
    by_offset.sort_by_key(|vma| vma.offset);
    let mut end = 0;
    for vma in &by_offset {
        if vma.offset > end {
            return None;
        }
        end = end.max(vma.offset + vma.length_bytes());
    }
    if end >= length_bytes { by_offset.first().copied() } else { None }
}

fn open_file(pid: u32, vma: &Vma, block: &Block, access: Access) -> Result<RamFile, GuestError> {
    let unusable = |source| GuestError::Ram { block: block.name.clone(), source };
    let file = RamFile::from_fd(open_mapped_file(pid, vma, access)?, access).map_err(unusable)?;
    let on_tmpfs = || rustix::fs::fstatfs(&file).is_ok_and(|statfs| statfs.f_type as u64 == TMPFS_MAGIC);
    if !file.is_hugetlbfs() && !on_tmpfs() {
        return Err(GuestError::FileSystem { block: block.name.clone(), path: vma.path.clone() });
    }
    if file.length_bytes() != block.length_bytes {
        return Err(GuestError::FileLength {
            block: block.name.clone(),
            path: vma.path.clone(),
            block_bytes: block.length_bytes,
            file_bytes: file.length_bytes(),
        });
    }
    Ok(file)
}

#[cfg(test)]
mod tests;
