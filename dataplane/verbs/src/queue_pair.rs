//! Queue pairs: what carries the operations of one link.
#![allow(unsafe_code, reason = "owns a queue pair of librdmacm and posts work requests to it")]

use std::ptr::{self, NonNull};
use std::sync::Arc;

use ramferry_fabric::LinkError;
use rdma_sys::{
    ibv_qp, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_cap, ibv_qp_init_attr, ibv_qp_state, ibv_qp_type,
    ibv_recv_wr, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wr_opcode, rdma_t, wr_t,
};
use rustix::io::Errno;

use crate::cm::Identifier;
use crate::completion::CompletionQueue;
use crate::os::{errno, last_errno};
use crate::protection::ProtectionDomain;

/// A reliably connected queue pair, with a completion queue for what it sends and
/// one for what it receives. They are not one: that has hung soft-RoCE.
pub(crate) struct QueuePair {
    raw: NonNull<ibv_qp>,
    number: u32,
    // Memory of posted chains, kept from one to the next.
    requests: Vec<ibv_send_wr>,
    parts: Vec<ibv_sge>,
    // After the queue pair, which `drop` destroys, in this order: its completion queues, the
    // identifier whose queue pair it is, the domain it was made in.
    pub(crate) sent: CompletionQueue,
    pub(crate) received: CompletionQueue,
    identifier: Identifier,
    _protection: Arc<ProtectionDomain>,
}

// SAFETY: libibverbs allows a queue pair to be used from any thread. The pointers in the kept
// memory are written and used within one call.
unsafe impl Send for QueuePair {}

/// Depths of a queue pair's queues.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Depths {
    pub(crate) send: u32,
    pub(crate) receive: u32,
}

/// A piece of registered memory of this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Local {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) key: u32,
}

/// A work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) verb: Verb,
    pub(crate) local: Local,
    /// Whether its end is told also when it ends well.
    pub(crate) signalled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Write { address: u64, key: u32 },
    Read { address: u64, key: u32 },
    Send,
}

impl QueuePair {
    /// Makes the queue pair of `identifier`, which is bound to the domain's device.
    pub(crate) fn new(
        identifier: Identifier,
        protection: &Arc<ProtectionDomain>,
        depths: Depths,
    ) -> Result<Self, LinkError> {
        let system = |what| move |source| LinkError::System { what, source };
        let device = protection.device();
        // Every request may have its end told, when the queue pair fails.
        let sent = CompletionQueue::new(device, depths.send).map_err(system("make a completion queue"))?;
        let received =
            CompletionQueue::new(device, depths.receive).map_err(system("make a completion queue"))?;
        let mut attributes = ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: sent.raw(),
            recv_cq: received.raw(),
            srq: ptr::null_mut(),
            cap: ibv_qp_cap {
                max_send_wr: depths.send,
                max_recv_wr: depths.receive,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: the identifier is alive and has no queue pair yet (it is given away here); the
        // protection domain and the completion queues are alive, and held by what this makes.
        let result = unsafe { rdma_sys::rdma_create_qp(identifier.raw(), protection.raw(), &mut attributes) };
        if result != 0 {
            return Err(system("make a queue pair")(last_errno()));
        }
        // SAFETY: the call made the identifier's queue pair; its number does not change.
        let (raw, number) = unsafe {
            let raw = (*identifier.raw()).qp;
            (NonNull::new(raw).expect("a queue pair was made"), (*raw).qp_num)
        };
        Ok(Self {
            raw,
            number,
            requests: Vec::new(),
            parts: Vec::new(),
            sent,
            received,
            identifier,
            _protection: Arc::clone(protection),
        })
    }

    /// By which its device names it.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn identifier(&self) -> &Identifier {
        &self.identifier
    }

    /// Posts a chain of requests in one call. There is room for them: who posts counts.
    ///
    /// # Errors
    /// How many were posted, and why not the one after them.
    pub(crate) fn post(&mut self, chain: &[Request]) -> Result<(), (usize, Errno)> {
        if chain.is_empty() {
            return Ok(());
        }
        self.parts.clear();
        self.parts.extend(chain.iter().map(|request| ibv_sge {
            addr: request.local.address,
            length: request.local.length,
            lkey: request.local.key,
        }));
        self.requests.clear();
        self.requests.reserve(chain.len());
        for (index, request) in chain.iter().enumerate() {
            // SAFETY: `index` is within the parts, one of which was made for each request.
            let part = unsafe { self.parts.as_mut_ptr().add(index) };
            self.requests.push(raw_request(request, part));
        }
        let start = self.requests.as_mut_ptr();
        for index in 1..chain.len() {
            // SAFETY: both indices are within the requests, one of which was made for each of the chain.
            unsafe { (*start.add(index - 1)).next = start.add(index) };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive; the requests are a list that ends, each with one part,
        // all of which live until the call returns, when it has copied them. The memory that they
        // name is registered: who posts holds the regions until the requests have ended.
        let result = unsafe { rdma_sys::ibv_post_send(self.raw.as_ptr(), start, &mut bad) };
        if result == 0 {
            return Ok(());
        }
        let posted = match bad.is_null() {
            true => 0,
            // SAFETY: the call sets `bad` to a request of the list.
            false => usize::try_from(unsafe { bad.offset_from(start) }).unwrap_or(0),
        };
        Err((posted, errno(result)))
    }

    /// Posts memory for one message of the peer.
    pub(crate) fn post_receive(&mut self, id: u64, local: Local) -> Result<(), Errno> {
        let mut part = ibv_sge { addr: local.address, length: local.length, lkey: local.key };
        let mut request = ibv_recv_wr { wr_id: id, next: ptr::null_mut(), sg_list: &mut part, num_sge: 1 };
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive; the request and its part live until the call returns,
        // when it has copied them. The memory is registered for as long as the queue pair is there:
        // its link drops that first.
        let result = unsafe { rdma_sys::ibv_post_recv(self.raw.as_ptr(), &mut request, &mut bad) };
        if result == 0 { Ok(()) } else { Err(errno(result)) }
    }

    /// Has it carry out nothing more: every request posted ends, flushed.
    pub(crate) fn fail(&mut self) {
        // SAFETY: every field is a number or a struct of numbers, for which zero is a value.
        let mut attributes: ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
        // SAFETY: the queue pair is alive, and only the state is taken from the attributes. It
        // fails where the device is gone, and then nothing is carried out either.
        let _ = unsafe {
            rdma_sys::ibv_modify_qp(
                self.raw.as_ptr(),
                &mut attributes,
                ibv_qp_attr_mask::IBV_QP_STATE.0.cast_signed(),
            )
        };
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made by `rdma_create_qp` for this identifier, destroyed once. It waits for events
        // of the device about it to be acknowledged, which its watcher does at once.
        unsafe { rdma_sys::rdma_destroy_qp(self.identifier.raw()) };
    }
}

fn raw_request(request: &Request, part: *mut ibv_sge) -> ibv_send_wr {
    let (opcode, remote) = match request.verb {
        Verb::Write { address, key } => (ibv_wr_opcode::IBV_WR_RDMA_WRITE, Some((address, key))),
        Verb::Read { address, key } => (ibv_wr_opcode::IBV_WR_RDMA_READ, Some((address, key))),
        Verb::Send => (ibv_wr_opcode::IBV_WR_SEND, None),
    };
    // SAFETY: every field is a number, a pointer, or a union of such, for which zero is a value.
    let mut raw: ibv_send_wr = unsafe { std::mem::zeroed() };
    raw.wr_id = request.id;
    raw.sg_list = part;
    raw.num_sge = 1;
    raw.opcode = opcode;
    raw.send_flags = if request.signalled { ibv_send_flags::IBV_SEND_SIGNALED.0 } else { 0 };
    if let Some((remote_addr, rkey)) = remote {
        raw.wr = wr_t { rdma: rdma_t { remote_addr, rkey } };
    }
    raw
}
