use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use ramferry_ram::{Access, BlockIndex, BlockRange, Memory, PageRun, RamError};

use super::{Domain, Region, RegisterError, Rights};
use crate::shm::PeerMemory;
use crate::{AccessFault, LinkError, RegionKey};

/// How long an operation under way in a region may go on after the region was
/// taken back.
const GRACE: Duration = Duration::from_secs(1);
/// How long `deregister` waits for such operations; longer than they may go on.
const DEREGISTER_WAIT: Duration = Duration::from_secs(3);

/// Registered memory of a session whose fabric moves bytes by the CPU, so that
/// nothing has to be locked: what registering a region does is to allocate the
/// pages that the peer will write and that were never touched, and to map those
/// that are there, so that no copy has to fault them in one by one.
///
/// A range that overlaps a region is refused.
pub struct MappedDomain {
    memory: Arc<Memory>,
    /// Whether this process' mapping is the one that bytes are read from or written to.
    reached_here: bool,
    state: RwLock<State>,
    pinned_bytes: AtomicU64,
    /// The peer's RAM, while a link over shm has it mapped.
    peer_memory: Mutex<Weak<PeerMemory>>,
}

#[derive(Default)]
struct State {
    live: HashMap<RegionKey, Arc<Entry>>,
    /// Keys that are dead, of memory that is pinned still.
    leaving: HashMap<RegionKey, Arc<Entry>>,
    /// First byte to first byte after, of everything pinned or about to be.
    reserved: BTreeMap<(BlockIndex, u64), u64>,
    mirrors: Vec<Arc<dyn Mirror>>,
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

#[derive(Debug)]
struct Entry {
    range: BlockRange,
    rights: Rights,
    uses: Mutex<u32>,
    idle: Condvar,
    revoked: OnceLock<Instant>,
}

/// What an operation does with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    RemoteWrite,
    RemoteRead,
    LocalRead,
    LocalWrite,
}

/// An operation under way in a region: the region stays pinned while this lives.
#[derive(Debug)]
pub(crate) struct RegionUse {
    entry: Arc<Entry>,
    range: BlockRange,
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
            memory,
            reached_here,
            state: RwLock::default(),
            pinned_bytes: AtomicU64::new(0),
            peer_memory: Mutex::default(),
        })
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Begins an operation on `length` bytes at `offset` of the region's block.
    pub(crate) fn begin(
        &self,
        key: RegionKey,
        need: Need,
        offset: u64,
        length: u32,
    ) -> Result<RegionUse, AccessFault> {
        let state = self.read_state();
        let entry = state.live.get(&key).ok_or(AccessFault::UnknownKey)?;
        let range = BlockRange { block: entry.range.block, offset, length: u64::from(length) };
        if !encloses(entry.range, range) {
            return Err(AccessFault::OutOfBounds);
        }
        let allowed = match need {
            Need::RemoteWrite => entry.rights.remote_write,
            Need::RemoteRead => entry.rights.remote_read,
            Need::LocalRead => true,
            Need::LocalWrite => self.is_writable(entry.range.block),
        };
        if !allowed {
            return Err(AccessFault::Rights);
        }
        *entry.lock_uses() += 1;
        Ok(RegionUse { entry: Arc::clone(entry), range })
    }

    /// Keeps `mirror` the same as the table of live regions, until it is detached.
    pub(crate) fn attach(&self, mirror: Arc<dyn Mirror>) -> Result<(), RegisterError> {
        let mut state = self.write_state();
        for (key, entry) in &state.live {
            if !mirror.publish(Region { key: *key, range: entry.range }, entry.rights) {
                return Err(RegisterError::TooManyRegions);
            }
        }
        state.mirrors.push(mirror);
        Ok(())
    }

    pub(crate) fn detach(&self, mirror: &Arc<dyn Mirror>) {
        self.write_state().mirrors.retain(|other| !Arc::ptr_eq(other, mirror));
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

    fn is_writable(&self, block: BlockIndex) -> bool {
        self.memory.mapping(block).access() == Access::ReadWrite
    }

    fn check(&self, range: BlockRange, rights: Rights) -> Result<(), RegisterError> {
        let layout = self.memory.layout();
        let Some(block) = layout.block(range.block).filter(|_| range.length > 0 && layout.contains(range))
        else {
            return Err(RegisterError::Range { range });
        };
        let page_bytes = block.page_bytes;
        if !range.offset.is_multiple_of(page_bytes) || !range.length.is_multiple_of(page_bytes) {
            return Err(RegisterError::Misaligned { range, page_bytes });
        }
        if rights.remote_write && !self.is_writable(range.block) {
            return Err(RegisterError::ReadOnly);
        }
        Ok(())
    }

    fn reserve(&self, range: BlockRange) -> Result<(), RegisterError> {
        let end = range.offset + range.length;
        let mut state = self.write_state();
        let before = state.reserved.range(..(range.block, end)).next_back();
        if before.is_some_and(|((block, _), other_end)| *block == range.block && *other_end > range.offset) {
            return Err(RegisterError::Overlap { range });
        }
        state.reserved.insert((range.block, range.offset), end);
        Ok(())
    }

    fn pin(&self, range: BlockRange, rights: Rights) -> Result<(), RegisterError> {
        let mapping = self.memory.mapping(range.block);
        // Not before something is registered: a source arms its tracker first.
        let presence = self.memory.first_presence()?;
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
        self.pinned_bytes.fetch_add(range.length, Ordering::Relaxed);
        Ok(())
    }

    fn unpin(&self, range: BlockRange) {
        self.pinned_bytes.fetch_sub(range.length, Ordering::Relaxed);
    }

    fn publish(&self, range: BlockRange, rights: Rights) -> Result<Region, RegisterError> {
        let mut state = self.write_state();
        let key = loop {
            let key = RegionKey(getrandom::u64().map_err(RegisterError::Random)?);
            if key.0 != 0 && !state.live.contains_key(&key) && !state.leaving.contains_key(&key) {
                break key;
            }
        };
        let region = Region { key, range };
        let full = state.mirrors.iter().position(|mirror| !mirror.publish(region, rights));
        if let Some(full) = full {
            state.mirrors[..full].iter().for_each(|mirror| mirror.retract(key));
            return Err(RegisterError::TooManyRegions);
        }
        let entry =
            Entry { range, rights, uses: Mutex::new(0), idle: Condvar::new(), revoked: OnceLock::new() };
        state.live.insert(key, Arc::new(entry));
        Ok(region)
    }

    /// Takes the key out of use. The entry stays in `leaving` until it is unpinned.
    fn revoke(&self, key: RegionKey) -> Result<Arc<Entry>, RegisterError> {
        let mut state = self.write_state();
        if let Some(entry) = state.live.remove(&key) {
            state.mirrors.iter().for_each(|mirror| mirror.retract(key));
            let _ = entry.revoked.set(Instant::now());
            state.leaving.insert(key, entry);
        }
        state.leaving.get(&key).cloned().ok_or(RegisterError::UnknownKey)
    }

    fn wait_until_idle(&self, key: RegionKey, entry: &Entry) -> Result<(), RegisterError> {
        let start = Instant::now();
        let in_use = || Err(RegisterError::InUse { waited: start.elapsed() });
        let mut uses = entry.lock_uses();
        while *uses > 0 {
            let Some(left) = DEREGISTER_WAIT.checked_sub(start.elapsed()) else { return in_use() };
            uses = entry.idle.wait_timeout(uses, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(uses);
        // Operations of mirrors tell nobody when they end.
        let mut nap = Duration::from_micros(20);
        while self.read_state().mirrors.iter().any(|mirror| mirror.in_use(key)) {
            if start.elapsed() > DEREGISTER_WAIT {
                return in_use();
            }
            std::thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(5));
        }
        Ok(())
    }

    fn unreserve(&self, range: BlockRange) {
        self.write_state().reserved.remove(&(range.block, range.offset));
    }

    fn read_state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Domain for MappedDomain {
    fn register(&self, range: BlockRange, rights: Rights) -> Result<Region, RegisterError> {
        self.check(range, rights)?;
        self.reserve(range)?;
        let registered = self
            .pin(range, rights)
            .and_then(|()| self.publish(range, rights).inspect_err(|_| self.unpin(range)));
        if registered.is_err() {
            self.unreserve(range);
        }
        registered
    }

    fn deregister(&self, key: RegionKey) -> Result<(), RegisterError> {
        let entry = self.revoke(key)?;
        self.wait_until_idle(key, &entry)?;
        // Of two calls at once for one key, one unpins.
        if self.write_state().leaving.remove(&key).is_none() {
            return Err(RegisterError::UnknownKey);
        }
        self.unpin(entry.range);
        self.unreserve(entry.range);
        Ok(())
    }

    fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for MappedDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedDomain").field("pinned_bytes", &self.pinned_bytes()).finish_non_exhaustive()
    }
}

impl Entry {
    fn lock_uses(&self) -> MutexGuard<'_, u32> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RegionUse {
    /// The operation's bytes.
    pub(crate) fn range(&self) -> BlockRange {
        self.range
    }

    /// Whether the region was taken back so long ago that the operation must end.
    pub(crate) fn must_end(&self) -> bool {
        self.entry.revoked.get().is_some_and(|since| since.elapsed() > GRACE)
    }
}

impl Drop for RegionUse {
    fn drop(&mut self) {
        let mut uses = self.entry.lock_uses();
        *uses -= 1;
        if *uses == 0 {
            self.entry.idle.notify_all();
        }
    }
}

/// Whether `inner` lies within `outer`.
pub(crate) fn encloses(outer: BlockRange, inner: BlockRange) -> bool {
    match (outer.checked_end(), inner.checked_end()) {
        (Some(outer_end), Some(inner_end)) => {
            outer.block == inner.block && outer.offset <= inner.offset && inner_end <= outer_end
        }
        _ => false,
    }
}
