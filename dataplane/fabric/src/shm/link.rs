use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use ramferry_ram::BlockRange;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};

use super::copy::copy;
use super::table::Table;
use super::{GOODBYE, PeerMemory, failed};
use crate::domain::RegionUse;
use crate::regions::Need;
use crate::session::timespec;
use crate::{
    AccessFault, Completion, InvalidOperation, Link, LinkError, MAX_TRANSFER_BYTES, MappedDomain, OpError,
    OpId, Place, PostError, Transfer,
};

/// Operations accepted whose completion the caller has not taken yet, at most.
const QUEUE_DEPTH: usize = 256;
/// Bytes copied by one poll, at most.
const POLL_BUDGET: u64 = 1 << 20;

/// The side that posts, and copies.
pub(super) struct ShmLink {
    socket: OwnedFd,
    domain: Arc<MappedDomain>,
    table: Table,
    peer: Arc<PeerMemory>,
    queue: VecDeque<Operation>,
    done: VecDeque<Completion>,
    dead: Option<LinkError>,
}

struct Operation {
    id: OpId,
    /// `None` for a fence.
    transfer: Option<Moving>,
}

struct Moving {
    local: RegionUse,
    remote: Place,
    need: Need,
    /// Bytes copied so far.
    copied: u64,
}

/// Why an operation, and the link with it, ends.
enum Fault {
    Remote(AccessFault),
    Link(LinkError),
}

impl ShmLink {
    pub(super) fn new(
        socket: OwnedFd,
        domain: Arc<MappedDomain>,
        table: Table,
        peer: Arc<PeerMemory>,
    ) -> Self {
        Self { socket, domain, table, peer, queue: VecDeque::new(), done: VecDeque::new(), dead: None }
    }

    fn post(&mut self, id: OpId, transfer: Option<Moving>) {
        self.queue.push_back(Operation { id, transfer });
    }

    fn check_room(&self) -> Result<(), PostError> {
        match &self.dead {
            Some(error) => Err(PostError::Dead(error.clone())),
            None if self.queue.len() + self.done.len() >= QUEUE_DEPTH => Err(PostError::Full),
            None => Ok(()),
        }
    }

    fn post_transfer(&mut self, op: Transfer, local: Need, remote: Need) -> Result<(), PostError> {
        self.check_room()?;
        if op.length == 0 || op.length > MAX_TRANSFER_BYTES {
            return Err(PostError::Invalid(InvalidOperation::Length { length: op.length }));
        }
        let local = self.domain.begin(op.local.key, local, op.local.offset, op.length);
        let local = local.map_err(|fault| PostError::Invalid(InvalidOperation::Local(fault)))?;
        self.post(op.id, Some(Moving { local, remote: op.remote, need: remote, copied: 0 }));
        Ok(())
    }

    /// Whether the peer is there; it says nothing once the link is made.
    fn check_peer(&self) -> Result<(), LinkError> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(Duration::ZERO))) {
            Ok(0) | Err(Errno::INTR) => Ok(()),
            Ok(_) => Err(LinkError::PeerClosed),
            Err(errno) => Err(LinkError::Lost(errno)),
        }
    }

    fn work(&mut self) -> Result<(), LinkError> {
        self.check_peer()?;
        let mut budget = POLL_BUDGET;
        while budget > 0
            && let Some(operation) = self.queue.front_mut()
        {
            let Operation { id, transfer } = operation;
            let id = *id;
            if let Some(moving) = transfer {
                match moving.advance(&self.domain, &self.table, &self.peer, budget) {
                    Ok(copied) => budget -= copied,
                    Err(Fault::Link(error)) => return Err(error),
                    Err(Fault::Remote(fault)) => {
                        self.queue.pop_front();
                        self.done.push_back(Completion { id, result: Err(OpError::RemoteAccess(fault)) });
                        return Err(LinkError::RemoteAccess(fault));
                    }
                }
                if moving.copied < moving.local.range().length {
                    break;
                }
            } else {
                // What was copied is in memory before the fence is seen to have completed.
                fence(Ordering::SeqCst);
            }
            self.queue.pop_front();
            self.done.push_back(Completion { id, result: Ok(()) });
        }
        Ok(())
    }

    fn die(&mut self, error: LinkError) {
        for Operation { id, .. } in self.queue.drain(..) {
            self.done.push_back(Completion { id, result: Err(OpError::LinkDead(error.clone())) });
        }
        // The peer may have ended the connection already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        self.dead = Some(error);
    }
}

impl Moving {
    /// Copies up to `budget` bytes more; returns how many. The peer's key is
    /// checked for each such piece and in use only while it is copied, so that
    /// the peer can deregister whether or not this link is polled.
    fn advance(
        &mut self,
        domain: &MappedDomain,
        table: &Table,
        peer: &PeerMemory,
        budget: u64,
    ) -> Result<u64, Fault> {
        let whole = self.local.range();
        // All of it is checked, so that nothing of an operation out of bounds is carried out.
        let begun = table.begin(self.remote.key, self.need, self.remote.offset, whole.length);
        let (taken, region) = begun.map_err(Fault::Remote)?;
        let length = budget.min(whole.length - self.copied);
        let local = BlockRange { offset: whole.offset + self.copied, length, ..whole };
        let remote = BlockRange { block: region.block, offset: self.remote.offset + self.copied, length };
        let outside = Fault::Remote(AccessFault::OutOfBounds);
        let Some(remote_mapping) = peer.mapping(remote.block) else { return Err(outside) };
        let Ok(remote_span) = remote_mapping.span(remote.offset, length) else { return Err(outside) };
        let local_mapping = domain.memory().mapping(local.block);
        let local_span = local_mapping.span(local.offset, length).expect("a region lies within its block");
        peer.populate(remote, region);
        let copied = match self.need {
            Need::RemoteRead | Need::LocalRead => copy(local_span, remote_span),
            Need::RemoteWrite | Need::LocalWrite => copy(remote_span, local_span),
        };
        copied.map_err(|_| Fault::Remote(AccessFault::Rights))?;
        drop(taken);
        local_mapping.check().map_err(|_| Fault::Link(LinkError::LocalMemory))?;
        remote_mapping.check().map_err(|_| Fault::Remote(AccessFault::MemoryGone))?;
        self.copied += length;
        Ok(length)
    }
}

impl Link for ShmLink {
    fn post_write(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post_transfer(op, Need::LocalRead, Need::RemoteWrite)
    }

    fn post_read(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post_transfer(op, Need::LocalWrite, Need::RemoteRead)
    }

    fn post_fence(&mut self, id: OpId) -> Result<(), PostError> {
        self.check_room()?;
        self.post(id, None);
        Ok(())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        if self.dead.is_none()
            && let Err(error) = self.work()
        {
            self.die(error);
        }
        let count = self.done.len();
        completions.extend(self.done.drain(..));
        count
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), LinkError> {
        if !self.done.is_empty() {
            return Ok(());
        }
        if let Some(error) = &self.dead {
            return Err(error.clone());
        }
        if !self.queue.is_empty() {
            return Ok(());
        }
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(timeout))) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(failed("wait for the link")(errno)),
        }
    }

    fn close(mut self: Box<Self>) {
        if self.dead.is_none() && self.queue.is_empty() {
            // A peer that does not hear it counts the connection as lost, no more.
            let _ = rustix::net::send(&self.socket, &GOODBYE, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            self.dead = Some(LinkError::SessionEnded);
        }
    }

    fn is_dead(&self) -> Option<&LinkError> {
        self.dead.as_ref()
    }
}
