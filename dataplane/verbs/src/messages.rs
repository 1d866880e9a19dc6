//! Memory for the few short messages that the two sides of a link exchange.
#![allow(unsafe_code, reason = "owns memory that a device writes to, and its registration")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys::{ibv_access_flags, ibv_mr};
use rustix::io::Errno;

use crate::link::LINK_SLOTS;
use crate::message::{MESSAGE_BYTES, RawMessage};
use crate::os::last_errno;
use crate::protection::ProtectionDomain;
use crate::queue_pair::Local;
use crate::served::SERVED_SLOTS;

const PAGE_BYTES: usize = 4096;

/// What a link registers for its own messages on the side that registers more, in bytes.
pub const MESSAGES_BYTES: u64 =
    MessageSlots::bytes(if LINK_SLOTS > SERVED_SLOTS { LINK_SLOTS } else { SERVED_SLOTS }) as u64;

/// Slots of one message each, registered for this side's queue pair alone.
#[derive(Debug)]
pub(crate) struct MessageSlots {
    region: NonNull<ibv_mr>,
    start: NonNull<u8>,
    layout: Layout,
    local_key: u32,
    // After the region, which `drop` ends.
    _protection: Arc<ProtectionDomain>,
}

// SAFETY: the memory is owned, and its region may be ended from any thread.
unsafe impl Send for MessageSlots {}

impl MessageSlots {
    pub(crate) fn new(protection: &Arc<ProtectionDomain>, slots: usize) -> Result<Self, Errno> {
        let bytes = Self::bytes(slots);
        let layout = Layout::from_size_align(bytes, PAGE_BYTES).map_err(|_| Errno::INVAL)?;
        // SAFETY: the layout is not of size zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(Errno::NOMEM)?;
        // SAFETY: the range was just allocated, and lives until the region is ended; no reference
        // to it is ever made. The protection domain is alive, and held by what this makes.
        let region = unsafe {
            rdma_sys::ibv_reg_mr(
                protection.raw(),
                start.as_ptr().cast(),
                bytes,
                ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0.cast_signed(),
            )
        };
        let Some(region) = NonNull::new(region) else {
            let errno = last_errno();
            // SAFETY: allocated above with this layout, and given to nobody.
            unsafe { dealloc(start.as_ptr(), layout) };
            return Err(errno);
        };
        // SAFETY: the region was just made, and its key does not change.
        let local_key = unsafe { (*region.as_ptr()).lkey };
        Ok(Self { region, start, layout, local_key, _protection: Arc::clone(protection) })
    }

    /// What so many slots register, in bytes. Whole pages: a device sees nothing else of this process in them.
    pub(crate) const fn bytes(slots: usize) -> usize {
        let bytes = (slots * MESSAGE_BYTES).next_multiple_of(PAGE_BYTES);
        if bytes == 0 { PAGE_BYTES } else { bytes }
    }

    /// For a request that sends or receives a slot's message.
    pub(crate) fn local(&self, slot: usize) -> Local {
        let address = self.slot(slot).as_ptr() as u64;
        Local { address, length: MESSAGE_BYTES as u32, key: self.local_key }
    }

    pub(crate) fn read(&self, slot: usize) -> RawMessage {
        // SAFETY: the slot is within the allocation (`slot` checks), and aligned to its size. The
        // read is volatile: a device wrote it.
        unsafe { self.slot(slot).cast::<RawMessage>().read_volatile() }
    }

    pub(crate) fn write(&mut self, slot: usize, message: RawMessage) {
        // SAFETY: as for `read`.
        unsafe { self.slot(slot).cast::<RawMessage>().write_volatile(message) }
    }

    fn slot(&self, slot: usize) -> NonNull<u8> {
        let offset = slot * MESSAGE_BYTES;
        assert!(offset + MESSAGE_BYTES <= self.layout.size(), "slot {slot} is there");
        // SAFETY: the offset is within the allocation (asserted).
        unsafe { self.start.add(offset) }
    }
}

impl Drop for MessageSlots {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended once; the queue pair that used it was destroyed before: whoever
        // owns both drops that first.
        let result = unsafe { rdma_sys::ibv_dereg_mr(self.region.as_ptr()) };
        if result != 0 {
            // The device may still write to the memory: it must not become anything else.
            tracing::warn!(result, "the memory of a link's messages could not be deregistered");
            return;
        }
        // SAFETY: allocated by `new` with this layout, and out of the device's reach.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}
