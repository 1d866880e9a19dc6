//! Protection domains: a key of one is no key of another.
#![allow(unsafe_code, reason = "owns a protection domain of libibverbs")]

use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys::ibv_pd;
use rustix::io::Errno;

use crate::device::Device;
use crate::os::last_errno;

/// The protection domain of one migration.
#[derive(Debug)]
pub(crate) struct ProtectionDomain {
    raw: NonNull<ibv_pd>,
    // After the above: it is open for as long as anything is made on it.
    device: Arc<Device>,
}

// SAFETY: libibverbs allows calls on a protection domain from any thread at once.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for `Send`.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    pub(crate) fn new(device: Arc<Device>) -> Result<Arc<Self>, Errno> {
        // SAFETY: the device is open while its `Arc` is held here.
        let raw = NonNull::new(unsafe { rdma_sys::ibv_alloc_pd(device.context().raw()) });
        let raw = raw.ok_or_else(last_errno)?;
        Ok(Arc::new(Self { raw, device }))
    }

    pub(crate) fn raw(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }

    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once. Whatever was made in it (regions, queue pairs) holds
        // its `Arc`, and was ended before.
        let result = unsafe { rdma_sys::ibv_dealloc_pd(self.raw()) };
        if result != 0 {
            tracing::warn!(result, device = self.device.name(), "a protection domain could not be freed");
        }
    }
}
