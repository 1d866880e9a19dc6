//! A guest's RAM: which files it is made of, and where they are in its address space.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};

use super::Machine;
use crate::scratch::Scratch;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const FOUR_GIB: u64 = 4 * GIB;
const DIMM_SLOTS: u64 = 8;

/// What a block's pages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A file in `/dev/shm`, shared.
    Tmpfs,
    /// A file in `/dev/shm`, shared, that QEMU makes there and unlinks at once.
    TmpfsUnlinked,
    /// A file on the hugetlbfs mounted there, shared.
    HugeTlbfs(PathBuf),
    /// A file in `/dev/shm` that is mapped private: the RAM is not in it.
    Private,
    /// A memfd, shared.
    Memfd,
}

/// What a block is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// RAM that is there at boot: one NUMA node for each such block when there are several.
    Node,
    /// A DIMM, above 4 GiB.
    Dimm,
}

/// One memory backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// How much; a whole number of MiB.
    pub bytes: u64,
    /// What it is to the guest.
    pub role: Role,
    /// What its pages come from.
    pub backing: Backing,
}

impl RamBlock {
    /// RAM that is there at boot, on tmpfs.
    pub fn node(bytes: u64) -> RamBlock {
        RamBlock { bytes, role: Role::Node, backing: Backing::Tmpfs }
    }

    /// A DIMM, on tmpfs.
    pub fn dimm(bytes: u64) -> RamBlock {
        RamBlock { bytes, role: Role::Dimm, backing: Backing::Tmpfs }
    }

    /// The same on another backing.
    #[must_use]
    pub fn on(self, backing: Backing) -> RamBlock {
        RamBlock { backing, ..self }
    }
}

/// One piece of a block in the guest's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    guest_address: u64,
    block: usize,
    offset: u64,
    bytes: u64,
}

/// The blocks of one guest with their places.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    blocks: Vec<RamBlock>,
    pieces: Vec<Piece>,
}

impl Plan {
    pub(super) fn new(blocks: &[RamBlock], machine: Machine) -> Result<Plan> {
        for block in blocks {
            ensure!(block.bytes > 0 && block.bytes.is_multiple_of(MIB), "a block of {} bytes", block.bytes);
        }
        ensure!(blocks.iter().any(|block| block.role == Role::Node), "a guest needs RAM at boot");
        let boot_bytes: u64 = bytes_of(blocks, Role::Node);
        let low_bytes = machine.low_bytes(boot_bytes);

        let mut pieces = Vec::new();
        let (mut at, mut dimm_address) = (0, above_boot_ram(boot_bytes, low_bytes));
        for (block, RamBlock { bytes, role, .. }) in blocks.iter().enumerate() {
            if *role == Role::Dimm {
                pieces.push(Piece { guest_address: dimm_address, block, offset: 0, bytes: *bytes });
                dimm_address += bytes.next_multiple_of(GIB);
                continue;
            }
            let below = low_bytes.saturating_sub(at).min(*bytes);
            if below > 0 {
                pieces.push(Piece { guest_address: at, block, offset: 0, bytes: below });
            }
            if below < *bytes {
                let guest_address = FOUR_GIB + (at + below - low_bytes);
                pieces.push(Piece { guest_address, block, offset: below, bytes: bytes - below });
            }
            at += bytes;
        }
        Ok(Plan { blocks: blocks.to_vec(), pieces })
    }

    /// Which block holds that guest-physical address, and where in it.
    pub(super) fn locate(&self, guest_address: u64) -> Option<(usize, u64)> {
        self.pieces.iter().find_map(|piece| {
            let distance = guest_address.checked_sub(piece.guest_address)?;
            (distance < piece.bytes).then_some((piece.block, piece.offset + distance))
        })
    }

    /// Start and length of each DIMM.
    pub(super) fn dimms(&self) -> Vec<(u64, u64)> {
        let is_dimm = |piece: &&Piece| self.blocks[piece.block].role == Role::Dimm;
        self.pieces.iter().filter(is_dimm).map(|piece| (piece.guest_address, piece.bytes)).collect()
    }

    /// The file of each block, where it has a name.
    pub(super) fn files(&self, scratch: &Scratch, huge: Option<&Scratch>) -> Vec<Option<PathBuf>> {
        let file = |(index, block): (usize, &RamBlock)| match block.backing {
            Backing::Tmpfs | Backing::Private => Some(scratch.join(&format!("ram{index}"))),
            Backing::HugeTlbfs(_) => huge.map(|huge| huge.join(&format!("ram{index}"))),
            Backing::TmpfsUnlinked | Backing::Memfd => None,
        };
        self.blocks.iter().enumerate().map(file).collect()
    }

    /// QEMU's arguments.
    pub(super) fn arguments(&self, scratch: &Path, files: &[Option<PathBuf>]) -> Result<Vec<String>> {
        let dimms = self.dimms();
        let boot_mib = bytes_of(&self.blocks, Role::Node) / MIB;
        let mut size = format!("size={boot_mib}M");
        if let Some((start, length)) = dimms.last() {
            ensure!(dimms.len() as u64 <= DIMM_SLOTS, "at most {DIMM_SLOTS} DIMMs");
            let room_mib = (start + length) / MIB;
            size.push_str(&format!(",slots={DIMM_SLOTS},maxmem={}M", boot_mib + room_mib));
        }
        let mut arguments = vec!["-m".to_owned(), size];
        let nodes = self.blocks.iter().filter(|block| block.role == Role::Node).count();
        let (mut node, mut dimm) = (0, 0);
        for (index, block) in self.blocks.iter().enumerate() {
            arguments
                .extend(["-object".to_owned(), backend(index, block, scratch, files[index].as_deref())?]);
            match block.role {
                Role::Node if nodes == 1 => {
                    arguments.extend(["-machine".to_owned(), format!("memory-backend=ram{index}")]);
                }
                Role::Node => {
                    arguments.extend(["-numa".to_owned(), format!("node,nodeid={node},memdev=ram{index}")]);
                    node += 1;
                }
                Role::Dimm => {
                    let device = format!("pc-dimm,id=dimm{dimm},memdev=ram{index},addr={:#x}", dimms[dimm].0);
                    arguments.extend(["-device".to_owned(), device]);
                    dimm += 1;
                }
            }
        }
        Ok(arguments)
    }
}

fn backend(index: usize, block: &RamBlock, scratch: &Path, file: Option<&Path>) -> Result<String> {
    let size = format!("id=ram{index},size={}M", block.bytes / MIB);
    let in_file = |path: &Path, share: &str| {
        format!("memory-backend-file,{size},mem-path={},share={share}", path.display())
    };
    Ok(match (&block.backing, file) {
        (Backing::Tmpfs | Backing::HugeTlbfs(_), Some(file)) => in_file(file, "on"),
        (Backing::Private, Some(file)) => in_file(file, "off"),
        (Backing::TmpfsUnlinked, _) => in_file(scratch, "on"),
        (Backing::Memfd, _) => format!("memory-backend-memfd,{size},share=on"),
        (_, None) => bail!("block {index} has no file"),
    })
}

fn bytes_of(blocks: &[RamBlock], role: Role) -> u64 {
    blocks.iter().filter(|block| block.role == role).map(|block| block.bytes).sum()
}

/// Where QEMU's range for DIMMs begins.
fn above_boot_ram(boot_bytes: u64, low_bytes: u64) -> u64 {
    (FOUR_GIB + (boot_bytes - low_bytes)).next_multiple_of(GIB)
}

impl Machine {
    /// How much of the RAM is below 4 GiB: QEMU keeps a hole there for devices.
    fn low_bytes(self, boot_bytes: u64) -> u64 {
        let (most, when_more) = match self {
            Machine::Q35 => (0xb000_0000, 0x8000_0000),
            Machine::Pc => (0xe000_0000, 0xc000_0000),
        };
        if boot_bytes >= most { when_more } else { boot_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_around_the_hole_is_found_in_its_block() {
        let blocks = [RamBlock::node(GIB), RamBlock::node(2 * GIB), RamBlock::dimm(256 * MIB)];
        let plan = Plan::new(&blocks, Machine::Q35).unwrap();
        assert_eq!(plan.locate(0x1000), Some((0, 0x1000)));
        assert_eq!(plan.locate(GIB), Some((1, 0)));
        assert_eq!(plan.locate(2 * GIB), None);
        assert_eq!(plan.locate(FOUR_GIB), Some((1, GIB)));
        assert_eq!(plan.dimms(), [(5 * GIB, 256 * MIB)]);
        assert_eq!(plan.locate(5 * GIB + 5), Some((2, 5)));
        assert_eq!(plan.locate(5 * GIB + 256 * MIB), None);
    }

    #[test]
    fn a_guest_without_ram_at_boot_is_refused() {
        assert!(Plan::new(&[RamBlock::dimm(GIB)], Machine::Pc).is_err());
        assert!(Plan::new(&[RamBlock::node(MIB + 1)], Machine::Pc).is_err());
    }
}
