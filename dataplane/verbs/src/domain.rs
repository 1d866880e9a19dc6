use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ramferry_fabric::regions::{DEREGISTER_WAIT, Need, RegionTable, RegionUse};
use ramferry_fabric::{AccessFault, Domain, LinkError, Region, RegionKey, RegisterError, Rights};
use ramferry_ram::{BlockRange, Memory};
use rustix::io::Errno;

use crate::device::Device;
use crate::info::Transport;
use crate::protection::ProtectionDomain;
use crate::region::{MemoryRegion, Paging};

/// Pause before a region that the device holds is deregistered again.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// Registered memory of one session over RDMA, in a protection domain of its own.
///
/// A key is 32 bits that count the session's registrations, from a random number,
/// above the device's own key, which is what the peer's device is given with each
/// operation. What keeps others out is not that a key is hard to guess: it is of
/// use only to queue pairs of this protection domain, which are made only for
/// peers that presented the session's token, and reaches only what was registered:
/// guest RAM of this migration. It dies with its region, the region with the
/// session.
///
/// Where the device has on-demand paging for connected queue pairs, nothing is
/// pinned: the device faults pages in, and is asked to do so ahead.
pub struct VerbsDomain {
    // Regions are ended before their protection domain.
    table: RegionTable<MemoryRegion>,
    protection: Arc<ProtectionDomain>,
    /// This side's address of the device.
    address: IpAddr,
    paging: Paging,
    /// Upper half of the next key.
    serial: AtomicU32,
}

impl VerbsDomain {
    pub(crate) fn new(
        device: Arc<Device>,
        address: IpAddr,
        memory: Arc<Memory>,
    ) -> Result<Arc<Self>, LinkError> {
        let paging = if device.capabilities().on_demand_paging { Paging::OnDemand } else { Paging::Pinned };
        let protection = ProtectionDomain::new(device)
            .map_err(|source| LinkError::System { what: "make a protection domain", source })?;
        let serial = getrandom::u32().map_err(|_| LinkError::System {
            what: "get randomness for the keys of regions",
            source: Errno::AGAIN,
        })?;
        let table = RegionTable::new(memory);
        Ok(Arc::new(Self { table, protection, address, paging, serial: AtomicU32::new(serial) }))
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<Memory> {
        self.table.memory()
    }

    /// Name of the device.
    pub fn device_name(&self) -> &str {
        self.device().name()
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        self.protection.device()
    }

    pub(crate) fn protection(&self) -> &Arc<ProtectionDomain> {
        &self.protection
    }

    pub(crate) fn address(&self) -> IpAddr {
        self.address
    }

    /// Begins an operation of this side.
    pub(crate) fn begin(
        &self,
        key: RegionKey,
        need: Need,
        offset: u64,
        length: u32,
    ) -> Result<RegionUse<MemoryRegion>, AccessFault> {
        let region = self.table.begin(key, need, offset, length)?;
        // On iWARP the peer's device writes what was read as if it had been asked to write.
        let must_be_open = need == Need::LocalWrite && self.device().transport() == Transport::Iwarp;
        if must_be_open && !region.rights().remote_write {
            return Err(AccessFault::Rights);
        }
        Ok(region)
    }

    fn deregister_region(&self, region: &MemoryRegion) -> Result<(), RegisterError> {
        let start = Instant::now();
        loop {
            match region.deregister() {
                Ok(()) => return Ok(()),
                // Without a device there is nothing that could use it.
                Err(Errno::IO | Errno::NODEV) => return Ok(()),
                Err(Errno::BUSY | Errno::AGAIN | Errno::INTR) if start.elapsed() < DEREGISTER_WAIT => {
                    thread::sleep(BUSY_PAUSE);
                }
                Err(Errno::BUSY | Errno::AGAIN | Errno::INTR) => {
                    return Err(RegisterError::InUse { waited: start.elapsed() });
                }
                Err(errno) => {
                    return Err(RegisterError::System {
                        what: "deregister memory with the RDMA device",
                        source: errno.into(),
                    });
                }
            }
        }
    }
}

impl Domain for VerbsDomain {
    fn register(&self, range: BlockRange, rights: Rights) -> Result<Region, RegisterError> {
        let reservation = self.table.reserve(range, rights)?;
        if self.table.len() >= self.device().capabilities().max_regions as usize {
            return Err(RegisterError::TooManyRegions);
        }
        let region = MemoryRegion::register(&self.protection, self.memory(), range, rights, self.paging)?;
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let key = RegionKey(u64::from(serial) << 32 | u64::from(region.remote_key()));
        Ok(reservation.publish(key, region))
    }

    fn deregister(&self, key: RegionKey) -> Result<(), RegisterError> {
        let entry = self.table.revoke(key)?;
        entry.wait_until_idle(DEREGISTER_WAIT)?;
        self.deregister_region(&entry)?;
        self.table.release(key)
    }

    fn pinned_bytes(&self) -> u64 {
        match self.paging {
            Paging::Pinned => self.table.registered_bytes(),
            Paging::OnDemand => 0,
        }
    }
}

impl fmt::Debug for VerbsDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerbsDomain")
            .field("device", &self.device_name())
            .field("pinned_bytes", &self.pinned_bytes())
            .finish_non_exhaustive()
    }
}
