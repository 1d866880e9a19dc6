//! Which ranges of a guest's RAM are registered under which key, and what is
//! under way in them: the part of a [`Domain`](crate::Domain) that is the same
//! whatever a fabric does to register a range.
//!
//! ```text
//!            reserve              publish
//!  (free) ------------> RESERVED ---------> LIVE (operations under way: 0, 1, ...)
//!    ^ ^                   |                  |
//!    | +-------------------+                  | revoke: no operation begins any more
//!    |   reservation dropped                  v
//!    +------------------------------------ LEAVING
//!        release (none under way)
//! ```
//!
//! No two ranges share a byte, whatever state they are in.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use ramferry_ram::{Access, BlockIndex, BlockRange, Memory};

use crate::{AccessFault, Region, RegionKey, RegisterError, Rights};

/// How long an operation under way in a region may go on after the region was
/// taken back.
const GRACE: Duration = Duration::from_secs(1);
/// How long a domain waits for such operations when it deregisters a region;
/// longer than they may go on.
pub const DEREGISTER_WAIT: Duration = Duration::from_secs(3);

/// What an operation does with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The peer writes to it.
    RemoteWrite,
    /// The peer reads it.
    RemoteRead,
    /// An operation of this side reads it.
    LocalRead,
    /// An operation of this side writes to it.
    LocalWrite,
}

/// The regions of one session's memory. With each, `T` is kept: what the fabric
/// needs to use it and to undo its registration.
pub struct RegionTable<T> {
    memory: Arc<Memory>,
    state: RwLock<State<T>>,
    registered_bytes: AtomicU64,
}

struct State<T> {
    live: HashMap<RegionKey, Arc<Entry<T>>>,
    /// Keys that are dead, of ranges that are registered still.
    leaving: HashMap<RegionKey, Arc<Entry<T>>>,
    /// First byte to first byte after, of everything registered or about to be.
    reserved: BTreeMap<(BlockIndex, u64), u64>,
}

/// A region, live or leaving.
#[derive(Debug)]
pub struct Entry<T> {
    range: BlockRange,
    rights: Rights,
    kept: T,
    uses: Mutex<u32>,
    idle: Condvar,
    revoked: OnceLock<Instant>,
}

/// An operation under way in a region: the region stays registered while this
/// lives.
#[derive(Debug)]
pub struct RegionUse<T> {
    entry: Arc<Entry<T>>,
    range: BlockRange,
}

/// A range that nobody else can register, until it is published or dropped.
#[must_use]
pub struct Reservation<'t, T> {
    table: &'t RegionTable<T>,
    range: BlockRange,
    rights: Rights,
    published: bool,
}

impl<T> RegionTable<T> {
    /// A table without regions.
    pub fn new(memory: Arc<Memory>) -> Self {
        let state = State { live: HashMap::new(), leaving: HashMap::new(), reserved: BTreeMap::new() };
        Self { memory, state: RwLock::new(state), registered_bytes: AtomicU64::new(0) }
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Bytes of all regions, live and leaving.
    pub fn registered_bytes(&self) -> u64 {
        self.registered_bytes.load(Ordering::Relaxed)
    }

    /// Regions, live and leaving.
    pub fn len(&self) -> usize {
        let state = self.read_state();
        state.live.len() + state.leaving.len()
    }

    /// Whether there is no region.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this side may write to a block.
    pub fn is_writable(&self, block: BlockIndex) -> bool {
        self.memory.mapping(block).access() == Access::ReadWrite
    }

    /// Whether a region has the key, live or leaving.
    pub fn has(&self, key: RegionKey) -> bool {
        let state = self.read_state();
        state.live.contains_key(&key) || state.leaving.contains_key(&key)
    }

    /// The live regions.
    pub fn live(&self) -> Vec<(Region, Rights)> {
        let state = self.read_state();
        let region = |(key, entry): (&RegionKey, &Arc<Entry<T>>)| {
            (Region { key: *key, range: entry.range }, entry.rights)
        };
        state.live.iter().map(region).collect()
    }

    /// Begins to register a range.
    ///
    /// # Errors
    /// When it is not whole pages within a block, overlaps a region, or cannot be
    /// given these rights.
    pub fn reserve(&self, range: BlockRange, rights: Rights) -> Result<Reservation<'_, T>, RegisterError> {
        self.check(range, rights)?;
        let end = range.offset + range.length;
        let mut state = self.write_state();
        let before = state.reserved.range(..(range.block, end)).next_back();
        if before.is_some_and(|((block, _), other_end)| *block == range.block && *other_end > range.offset) {
            return Err(RegisterError::Overlap { range });
        }
        state.reserved.insert((range.block, range.offset), end);
        Ok(Reservation { table: self, range, rights, published: false })
    }

    /// Begins an operation on `length` bytes at `offset` of the region's block.
    ///
    /// # Errors
    /// When no live region has the key, or it does not have these bytes or rights.
    pub fn begin(
        &self,
        key: RegionKey,
        need: Need,
        offset: u64,
        length: u32,
    ) -> Result<RegionUse<T>, AccessFault> {
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

    /// Takes a key out of use: no operation begins in its region any more. The
    /// range stays taken until it is released. May be called again.
    ///
    /// # Errors
    /// When no region has the key.
    pub fn revoke(&self, key: RegionKey) -> Result<Arc<Entry<T>>, RegisterError> {
        let mut state = self.write_state();
        if let Some(entry) = state.live.remove(&key) {
            let _ = entry.revoked.set(Instant::now());
            state.leaving.insert(key, entry);
        }
        state.leaving.get(&key).cloned().ok_or(RegisterError::UnknownKey)
    }

    /// Frees the range of a region that was revoked, and is not registered any
    /// more. Of several calls at once for one key, one ends well.
    ///
    /// # Errors
    /// When no region that was revoked has the key.
    pub fn release(&self, key: RegionKey) -> Result<(), RegisterError> {
        let mut state = self.write_state();
        let entry = state.leaving.remove(&key).ok_or(RegisterError::UnknownKey)?;
        state.reserved.remove(&(entry.range.block, entry.range.offset));
        self.registered_bytes.fetch_sub(entry.range.length, Ordering::Relaxed);
        Ok(())
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

    fn read_state(&self) -> std::sync::RwLockReadGuard<'_, State<T>> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> std::sync::RwLockWriteGuard<'_, State<T>> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> fmt::Debug for RegionTable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegionTable")
            .field("regions", &self.len())
            .field("registered_bytes", &self.registered_bytes())
            .finish_non_exhaustive()
    }
}

impl<T> Reservation<'_, T> {
    /// Makes the range, which is registered now, a live region.
    ///
    /// # Panics
    /// When another region has the key.
    pub fn publish(mut self, key: RegionKey, kept: T) -> Region {
        let Self { range, rights, .. } = self;
        let entry = Entry {
            range,
            rights,
            kept,
            uses: Mutex::new(0),
            idle: Condvar::new(),
            revoked: OnceLock::new(),
        };
        let mut state = self.table.write_state();
        assert!(!state.leaving.contains_key(&key), "a key that was never used");
        let other = state.live.insert(key, Arc::new(entry));
        assert!(other.is_none(), "a key that was never used");
        self.table.registered_bytes.fetch_add(range.length, Ordering::Relaxed);
        self.published = true;
        Region { key, range }
    }
}

impl<T> Drop for Reservation<'_, T> {
    fn drop(&mut self) {
        if !self.published {
            self.table.write_state().reserved.remove(&(self.range.block, self.range.offset));
        }
    }
}

impl<T> fmt::Debug for Reservation<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reservation({:?})", self.range)
    }
}

impl<T> Entry<T> {
    /// What was registered.
    pub fn range(&self) -> BlockRange {
        self.range
    }

    /// Waits until no operation is under way in a region that was revoked.
    ///
    /// # Errors
    /// [`RegisterError::InUse`] when `limit` has passed.
    pub fn wait_until_idle(&self, limit: Duration) -> Result<(), RegisterError> {
        let start = Instant::now();
        let mut uses = self.lock_uses();
        while *uses > 0 {
            let Some(left) = limit.checked_sub(start.elapsed()) else {
                return Err(RegisterError::InUse { waited: start.elapsed() });
            };
            uses = self.idle.wait_timeout(uses, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn lock_uses(&self) -> MutexGuard<'_, u32> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Deref for Entry<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.kept
    }
}

impl<T> RegionUse<T> {
    /// The operation's bytes.
    pub fn range(&self) -> BlockRange {
        self.range
    }

    /// What the region's rights are.
    pub fn rights(&self) -> Rights {
        self.entry.rights
    }

    /// Whether the region was taken back so long ago that the operation must end.
    pub fn must_end(&self) -> bool {
        self.entry.revoked.get().is_some_and(|since| since.elapsed() > GRACE)
    }
}

impl<T> Deref for RegionUse<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.entry.kept
    }
}

impl<T> Drop for RegionUse<T> {
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
