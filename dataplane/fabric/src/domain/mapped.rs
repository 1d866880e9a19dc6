use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use ramferry_ram::{Access, BlockRange, Memory, PageRun, RamError};

use super::{Domain, Region, RegisterError, Rights};
use crate::regions::{self, DEREGISTER_WAIT, Need, RegionTable};
use crate::shm::PeerMemory;
use crate::{AccessFault, LinkError, RegionKey};

/// An operation under way in a region of a [`MappedDomain`].
pub(crate) type RegionUse = regions::RegionUse<()>;

/// Registered memory of a session whose fabric moves bytes by the CPU, so that
/// nothing has to be locked: what registering a region does is to allocate the
/// pages that the peer will write and that were never touched, and to map those
/// that are there, so that no copy has to fault them in one by one.
///
/// A range that overlaps a region is refused.
pub struct MappedDomain {
    table: RegionTable<()>,
    /// Whether this process' mapping is the one that bytes are read from or written to.
    reached_here: bool,
    /// Held while a key goes in and out of use, so that they are the same as the table.
    mirrors: RwLock<Vec<Arc<dyn Mirror>>>,
    /// The peer's RAM, while a link over shm has it mapped.
    peer_memory: Mutex<Weak<PeerMemory>>,
}

/// A copy of the table of live regions that operations are checked against
/// elsewhere.
pub(crate) trait Mirror: Send + Sync {
    /// Adds a region; whether there was room.
    fn publish(&self, region: Region, rights: Rights) -> bool;
    /// Takes a region's key out of use. Operations under way may go on.
    fn retract(&self, key: RegionKey);
    /// Whether operations are under way in a region that was retracted.
    fn in_use(&self, key: RegionKey) -> bool;
}

impl MappedDomain {
    /// The memory of one session, nothing of it registered.
    ///
    /// # Errors
    /// When the kernel cannot tell what of it was ever touched.
    pub fn new(memory: Arc<Memory>) -> Result<Self, RamError> {
        Self::reached(memory, true)
    }

    /// The same, of memory that only the peer reaches, through a mapping of its own.
    ///
    /// # Errors
    /// As [`MappedDomain::new`].
    pub fn reached_by_peer(memory: Arc<Memory>) -> Result<Self, RamError> {
        Self::reached(memory, false)
    }

    fn reached(memory: Arc<Memory>, reached_here: bool) -> Result<Self, RamError> {
        Ok(Self {
            table: RegionTable::new(memory),
            reached_here,
            mirrors: RwLock::default(),
            peer_memory: Mutex::default(),
        })
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<Memory> {
        self.table.memory()
    }

    /// Begins an operation on `length` bytes at `offset` of the region's block.
    pub(crate) fn begin(
        &self,
        key: RegionKey,
        need: Need,
        offset: u64,
        length: u32,
    ) -> Result<RegionUse, AccessFault> {
        self.table.begin(key, need, offset, length)
    }

    /// Keeps `mirror` the same as the table of live regions, until it is detached.
    pub(crate) fn attach(&self, mirror: Arc<dyn Mirror>) -> Result<(), RegisterError> {
        let mut mirrors = self.write_mirrors();
        for (region, rights) in self.table.live() {
            if !mirror.publish(region, rights) {
                return Err(RegisterError::TooManyRegions);
            }
        }
        mirrors.push(mirror);
        Ok(())
    }

    pub(crate) fn detach(&self, mirror: &Arc<dyn Mirror>) {
        self.write_mirrors().retain(|other| !Arc::ptr_eq(other, mirror));
    }

    /// Makes the peer's RAM, given what other links of the session have mapped.
    pub(crate) fn peer_memory(
        &self,
        map: impl FnOnce(Option<Arc<PeerMemory>>) -> Result<Arc<PeerMemory>, LinkError>,
    ) -> Result<Arc<PeerMemory>, LinkError> {
        let mut earlier = self.peer_memory.lock().unwrap_or_else(PoisonError::into_inner);
        let memory = map(earlier.upgrade())?;
        *earlier = Arc::downgrade(&memory);
        Ok(memory)
    }

    fn pin(&self, range: BlockRange, rights: Rights) -> Result<(), RegisterError> {
        let mapping = self.memory().mapping(range.block);
        // Not before something is registered: a source arms its tracker first.
        let presence = self.memory().first_presence()?;
        let present = presence.block(range.block);
        let page_bytes = presence.page_bytes(range.block);
        let (mut page, end) = (range.offset / page_bytes, (range.offset + range.length) / page_bytes);
        while page < end {
            let run = present.next_run_before(page, end).unwrap_or(PageRun { first: end, count: 0 });
            if rights.remote_write {
                let hole_bytes = (run.first - page) * page_bytes;
                mapping.populate(page * page_bytes, hole_bytes, Access::ReadWrite)?;
            }
            if self.reached_here {
                mapping.map_present(run.first * page_bytes, run.count * page_bytes)?;
            }
            page = run.end();
        }
        Ok(())
    }

    /// Waits for the operations of mirrors, which tell nobody when they end.
    fn wait_for_mirrors(&self, key: RegionKey, start: Instant) -> Result<(), RegisterError> {
        let mut nap = Duration::from_micros(20);
        while self.read_mirrors().iter().any(|mirror| mirror.in_use(key)) {
            if start.elapsed() > DEREGISTER_WAIT {
                return Err(RegisterError::InUse { waited: start.elapsed() });
            }
            std::thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(5));
        }
        Ok(())
    }

    fn read_mirrors(&self) -> std::sync::RwLockReadGuard<'_, Vec<Arc<dyn Mirror>>> {
        self.mirrors.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_mirrors(&self) -> std::sync::RwLockWriteGuard<'_, Vec<Arc<dyn Mirror>>> {
        self.mirrors.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Domain for MappedDomain {
    fn register(&self, range: BlockRange, rights: Rights) -> Result<Region, RegisterError> {
        let reservation = self.table.reserve(range, rights)?;
        self.pin(range, rights)?;
        let mirrors = self.write_mirrors();
        let key = loop {
            let key = RegionKey(getrandom::u64().map_err(RegisterError::Random)?);
            if key.0 != 0 && !self.table.has(key) {
                break key;
            }
        };
        let region = Region { key, range };
        if let Some(full) = mirrors.iter().position(|mirror| !mirror.publish(region, rights)) {
            mirrors[..full].iter().for_each(|mirror| mirror.retract(key));
            return Err(RegisterError::TooManyRegions);
        }
        Ok(reservation.publish(key, ()))
    }

    fn deregister(&self, key: RegionKey) -> Result<(), RegisterError> {
        let start = Instant::now();
        let entry = {
            let mirrors = self.write_mirrors();
            let entry = self.table.revoke(key)?;
            mirrors.iter().for_each(|mirror| mirror.retract(key));
            entry
        };
        entry.wait_until_idle(DEREGISTER_WAIT)?;
        self.wait_for_mirrors(key, start)?;
        self.table.release(key)
    }

    fn pinned_bytes(&self) -> u64 {
        self.table.registered_bytes()
    }
}

impl fmt::Debug for MappedDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedDomain").field("pinned_bytes", &self.pinned_bytes()).finish_non_exhaustive()
    }
}
