//! Completion queues, each with a channel of its own to sleep on.
#![allow(unsafe_code, reason = "owns a completion queue of libibverbs")]

use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_sys::{ibv_comp_channel, ibv_cq, ibv_wc};
use rustix::io::Errno;

use crate::device::Device;
use crate::os::{self, errno, last_errno};
use crate::status::Outcome;

/// Completions taken by one poll.
pub(crate) const BATCH: usize = 32;

/// Where the ends of work requests are told.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    raw: NonNull<ibv_cq>,
    // After the above: a channel outlives its queue, a device both.
    channel: CompletionChannel,
    _device: Arc<Device>,
}

// SAFETY: libibverbs allows a completion queue to be used from any thread.
unsafe impl Send for CompletionQueue {}

/// The end of one work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Its number.
    pub(crate) id: u64,
    pub(crate) outcome: Outcome,
    /// Length of a message received.
    pub(crate) length: u32,
}

impl CompletionQueue {
    pub(crate) fn new(device: &Arc<Device>, depth: u32) -> Result<Self, Errno> {
        let channel = CompletionChannel::new(device)?;
        let depth = i32::try_from(depth).map_err(|_| Errno::INVAL)?;
        // SAFETY: the device is open and the channel alive, both held by what this makes.
        let raw = unsafe {
            rdma_sys::ibv_create_cq(device.context().raw(), depth, ptr::null_mut(), channel.raw.as_ptr(), 0)
        };
        let raw = NonNull::new(raw).ok_or_else(last_errno)?;
        Ok(Self { raw, channel, _device: Arc::clone(device) })
    }

    pub(crate) fn raw(&self) -> *mut ibv_cq {
        self.raw.as_ptr()
    }

    /// Takes what has ended, up to [`BATCH`].
    pub(crate) fn poll(&mut self, ended: &mut Vec<Ended>) -> Result<usize, Errno> {
        let mut raw = [const { MaybeUninit::<ibv_wc>::uninit() }; BATCH];
        // SAFETY: the queue is alive, and there is room for `BATCH` completions.
        let count = unsafe { rdma_sys::ibv_poll_cq(self.raw(), BATCH as i32, raw.as_mut_ptr().cast()) };
        let count = usize::try_from(count).map_err(|_| errno(count))?;
        for completion in &raw[..count.min(BATCH)] {
            // SAFETY: the call filled the first `count`.
            let completion = unsafe { completion.assume_init_ref() };
            ended.push(Ended {
                id: completion.wr_id,
                outcome: Outcome::from_status(completion.status, completion.vendor_err),
                length: completion.byte_len,
            });
        }
        Ok(count)
    }

    /// Has [`CompletionQueue::fd`] become readable at the next completion. Those that came before
    /// may not be told: poll once more before sleeping.
    pub(crate) fn arm(&mut self) -> Result<(), Errno> {
        self.channel.drain()?;
        // SAFETY: the queue is alive.
        match unsafe { rdma_sys::ibv_req_notify_cq(self.raw(), 0) } {
            0 => Ok(()),
            result => Err(errno(result)),
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        let _ = self.channel.drain();
        // SAFETY: made by `new`, destroyed once, after the queue pair that uses it (which owns it
        // and is destroyed first). Its events were acknowledged, so that this does not wait.
        let result = unsafe { rdma_sys::ibv_destroy_cq(self.raw()) };
        if result != 0 {
            tracing::warn!(result, "a completion queue could not be destroyed");
        }
    }
}

/// A descriptor that becomes readable when a queue says so.
#[derive(Debug)]
struct CompletionChannel {
    raw: NonNull<ibv_comp_channel>,
}

// SAFETY: libibverbs allows a completion channel to be used from any thread.
unsafe impl Send for CompletionChannel {}

impl CompletionChannel {
    fn new(device: &Arc<Device>) -> Result<Self, Errno> {
        // SAFETY: the device is open; the queue that this becomes part of holds it.
        let raw = NonNull::new(unsafe { rdma_sys::ibv_create_comp_channel(device.context().raw()) });
        let channel = Self { raw: raw.ok_or_else(last_errno)? };
        os::set_nonblocking(channel.fd())?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is alive, and its descriptor open until it is destroyed on drop.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).fd) }
    }

    /// Takes and acknowledges the events there are: one at most for each time it was armed.
    fn drain(&self) -> Result<(), Errno> {
        loop {
            let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: the channel is alive and its descriptor non-blocking; both are places for pointers.
            if unsafe { rdma_sys::ibv_get_cq_event(self.raw.as_ptr(), &mut queue, &mut context) } != 0 {
                return match last_errno() {
                    Errno::AGAIN | Errno::INTR => Ok(()),
                    errno => Err(errno),
                };
            }
            // SAFETY: the event is of the channel's one queue, which is alive: it owns the channel.
            unsafe { rdma_sys::ibv_ack_cq_events(queue, 1) };
        }
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once, after its queue.
        let _ = unsafe { rdma_sys::ibv_destroy_comp_channel(self.raw.as_ptr()) };
    }
}
