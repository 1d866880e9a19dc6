use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use ramferry_ram::BlockRange;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown};

use super::raw::{self, MAX_PARTS, Part};
use super::receiver::after;
use super::wire::{Cause, Frame, HEADER_BYTES, Header};
use crate::domain::RegionUse;
use crate::regions::Need;
use crate::session::timespec;
use crate::{
    Completion, InvalidOperation, Link, LinkError, MAX_TRANSFER_BYTES, MappedDomain, OpError, OpId,
    PostError, Transfer,
};

/// Operations accepted whose completion the caller has not taken yet, at most.
const QUEUE_DEPTH: usize = 256;
/// Bytes moved in each direction by one poll, at most by one call more.
const POLL_BUDGET: usize = 4 << 20;
/// While there is something to send and no answer is due, one poll in so many
/// looks for what the peer says.
const LISTEN_EVERY: u32 = 16;

/// The side that posts.
pub(super) struct TcpLink {
    socket: OwnedFd,
    domain: Arc<MappedDomain>,
    /// Frames that the socket has not taken whole.
    unsent: VecDeque<Unsent>,
    /// Bytes of the first of them that it has taken.
    taken: usize,
    /// Reads and fences, in the order posted, which is that of the answers.
    unanswered: VecDeque<Unanswered>,
    incoming: Incoming,
    done: VecDeque<Completion>,
    /// Accepted, and not yet taken by the caller.
    outstanding: usize,
    next_sequence: u64,
    polls: u32,
    dead: Option<LinkError>,
}

struct Unsent {
    header: Header,
    sequence: u64,
    /// What follows the header; the operation completes when it is sent.
    write: Option<(OpId, RegionUse)>,
}

struct Unanswered {
    sequence: u64,
    id: OpId,
    /// Where a read's bytes go.
    read: Option<RegionUse>,
}

/// An answer being received.
#[derive(Default)]
struct Incoming {
    header: Header,
    filled: usize,
    /// What is still to come of the first unanswered read.
    body: Option<BlockRange>,
}

impl Unsent {
    fn length(&self) -> usize {
        HEADER_BYTES + self.write.as_ref().map_or(0, |(_, region)| region.range().length as usize)
    }
}

impl TcpLink {
    /// Takes a non-blocking socket whose hello was answered with a welcome.
    pub(super) fn new(socket: OwnedFd, domain: Arc<MappedDomain>) -> Self {
        Self {
            socket,
            domain,
            unsent: VecDeque::with_capacity(QUEUE_DEPTH),
            taken: 0,
            unanswered: VecDeque::with_capacity(QUEUE_DEPTH),
            incoming: Incoming::default(),
            done: VecDeque::with_capacity(QUEUE_DEPTH),
            outstanding: 0,
            next_sequence: 1,
            polls: 0,
            dead: None,
        }
    }

    fn check_room(&self) -> Result<(), PostError> {
        match &self.dead {
            Some(error) => Err(PostError::Dead(error.clone())),
            None if self.outstanding >= QUEUE_DEPTH => Err(PostError::Full),
            None => Ok(()),
        }
    }

    fn begin(&self, op: &Transfer, need: Need) -> Result<RegionUse, PostError> {
        if op.length == 0 || op.length > MAX_TRANSFER_BYTES {
            return Err(PostError::Invalid(InvalidOperation::Length { length: op.length }));
        }
        let begun = self.domain.begin(op.local.key, need, op.local.offset, op.length);
        begun.map_err(|fault| PostError::Invalid(InvalidOperation::Local(fault)))
    }

    fn accept(&mut self, frame: Frame, sequence: u64, write: Option<(OpId, RegionUse)>) {
        self.unsent.push_back(Unsent { header: frame.encode(), sequence, write });
        self.outstanding += 1;
    }

    fn sequence(&mut self) -> u64 {
        self.next_sequence += 1;
        self.next_sequence - 1
    }

    fn complete(&mut self, id: OpId, result: Result<(), OpError>) {
        self.done.push_back(Completion { id, result });
    }

    fn progress(&mut self) -> Result<(), LinkError> {
        let quiet = self.unanswered.is_empty() && !self.unsent.is_empty();
        if !quiet || self.polls.is_multiple_of(LISTEN_EVERY) {
            self.receive()?;
        }
        self.send().map_err(|error| self.last_words(error))
    }

    /// Hands frames to the socket until it is full.
    fn send(&mut self) -> Result<(), LinkError> {
        let mut budget = POLL_BUDGET;
        while !self.unsent.is_empty() && budget > 0 {
            let sent = match self.send_once() {
                Ok(sent) => sent,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(Errno::FAULT) => return Err(LinkError::LocalMemory),
                Err(errno) => return Err(LinkError::Lost(errno)),
            };
            budget = budget.saturating_sub(sent);
            self.taken += sent;
            while let Some(first) = self.unsent.front()
                && self.taken >= first.length()
            {
                self.taken -= first.length();
                if let Some(Unsent { write: Some((id, region)), .. }) = self.unsent.pop_front() {
                    drop(region);
                    self.complete(id, Ok(()));
                }
            }
        }
        Ok(())
    }

    fn send_once(&self) -> Result<usize, Errno> {
        let mut parts = [Part::Bytes(&[]); MAX_PARTS];
        let (mut count, mut bytes, mut skip) = (0, 0, self.taken);
        for unsent in &self.unsent {
            if count + 2 > MAX_PARTS || bytes >= POLL_BUDGET {
                break;
            }
            bytes += unsent.length() - skip;
            if skip < HEADER_BYTES {
                parts[count] = Part::Bytes(&unsent.header[skip..]);
                count += 1;
            }
            if let Some((_, region)) = &unsent.write {
                let rest = after(region.range(), skip.saturating_sub(HEADER_BYTES));
                let span = self.domain.memory().span(rest);
                parts[count] = Part::Ram(span.expect("a region lies within its block"));
                count += 1;
            }
            skip = 0;
        }
        raw::send(self.socket.as_fd(), &parts[..count], libc::MSG_DONTWAIT)
    }

    /// Receives answers until there are no more.
    fn receive(&mut self) -> Result<(), LinkError> {
        let mut budget = POLL_BUDGET;
        while budget > 0 {
            let received = match self.receive_once() {
                Ok(0) => return Err(LinkError::PeerClosed),
                Ok(received) => received,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(Errno::FAULT) => return Err(LinkError::LocalMemory),
                Err(errno) => return Err(LinkError::Lost(errno)),
            };
            budget = budget.saturating_sub(received);
            if let Some(rest) = self.incoming.body {
                self.incoming.body = Some(after(rest, received));
            } else {
                self.incoming.filled += received;
            }
            self.progress_incoming()?;
        }
        Ok(())
    }

    fn receive_once(&mut self) -> Result<usize, Errno> {
        if let Some(rest) = self.incoming.body {
            let span = self.domain.memory().span(rest).expect("a region lies within its block");
            return raw::receive(self.socket.as_fd(), span, &mut [], libc::MSG_DONTWAIT);
        }
        let Incoming { header, filled, .. } = &mut self.incoming;
        rustix::net::recv(&self.socket, &mut header[*filled..], RecvFlags::DONTWAIT).map(|(_, count)| count)
    }

    /// Judges a header that is complete, completes a read whose bytes are.
    fn progress_incoming(&mut self) -> Result<(), LinkError> {
        if let Some(rest) = self.incoming.body {
            if rest.length == 0 {
                self.incoming = Incoming::default();
                self.answered();
            }
            return Ok(());
        }
        if self.incoming.filled < HEADER_BYTES {
            return Ok(());
        }
        let header = std::mem::take(&mut self.incoming).header;
        let frame = Frame::decode(&header).map_err(|error| LinkError::PeerProtocol(error.as_str()))?;
        if let Frame::Error { sequence, cause } = frame {
            return Err(self.refused(sequence, cause));
        }
        // An answer to a request that is not sent whole is as wrong as one to none.
        let first_unsent = self.unsent.front().map_or(self.next_sequence, |unsent| unsent.sequence);
        let expected = self.unanswered.front().filter(|unanswered| unanswered.sequence < first_unsent);
        match (frame, expected) {
            (Frame::FenceAck { sequence }, Some(Unanswered { sequence: ours, read: None, .. }))
                if sequence == *ours =>
            {
                self.answered();
                Ok(())
            }
            (
                Frame::ReadData { sequence, length },
                Some(Unanswered { sequence: ours, read: Some(region), .. }),
            ) if sequence == *ours && u64::from(length) == region.range().length => {
                self.incoming.body = Some(region.range());
                Ok(())
            }
            _ => Err(LinkError::PeerProtocol("answer to nothing that was asked")),
        }
    }

    fn answered(&mut self) {
        if let Some(Unanswered { id, read, .. }) = self.unanswered.pop_front() {
            drop(read);
            self.complete(id, Ok(()));
        }
    }

    /// The peer refused the operation `sequence`; if it has not completed, it
    /// completes with the peer's reason.
    fn refused(&mut self, sequence: u64, cause: Cause) -> LinkError {
        if let Cause::Access(fault) = cause {
            let unsent = self.unsent.iter_mut().find(|unsent| unsent.sequence == sequence);
            let write = unsent.and_then(|unsent| unsent.write.take()).map(|(id, _)| id);
            let position = self.unanswered.iter().position(|unanswered| unanswered.sequence == sequence);
            let answer = position.and_then(|position| self.unanswered.remove(position)).map(|entry| entry.id);
            if let Some(id) = write.or(answer) {
                self.complete(id, Err(OpError::RemoteAccess(fault)));
            }
        }
        cause.told()
    }

    fn die(&mut self, error: LinkError) {
        let writes = std::mem::take(&mut self.unsent).into_iter().filter_map(|unsent| unsent.write);
        let answers = std::mem::take(&mut self.unanswered).into_iter().map(|unanswered| unanswered.id);
        for id in writes.map(|(id, _)| id).chain(answers) {
            self.done.push_back(Completion { id, result: Err(OpError::LinkDead(error.clone())) });
        }
        // The peer may have ended the connection already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        self.dead = Some(error);
    }

    /// Before the link dies of an error in sending: the peer's reason, if it gave one.
    fn last_words(&mut self, error: LinkError) -> LinkError {
        match self.receive() {
            Err(told @ (LinkError::RemoteAccess(_) | LinkError::OwnProtocol(_))) => told,
            _ => error,
        }
    }
}

impl Link for TcpLink {
    fn post_write(&mut self, op: Transfer) -> Result<(), PostError> {
        self.check_room()?;
        let region = self.begin(&op, Need::LocalRead)?;
        let sequence = self.sequence();
        let Transfer { id, remote, length, .. } = op;
        let frame = Frame::Write { sequence, key: remote.key.0, offset: remote.offset, length };
        self.accept(frame, sequence, Some((id, region)));
        Ok(())
    }

    fn post_read(&mut self, op: Transfer) -> Result<(), PostError> {
        self.check_room()?;
        let region = self.begin(&op, Need::LocalWrite)?;
        let sequence = self.sequence();
        let Transfer { id, remote, length, .. } = op;
        let frame = Frame::Read { sequence, key: remote.key.0, offset: remote.offset, length };
        self.accept(frame, sequence, None);
        self.unanswered.push_back(Unanswered { sequence, id, read: Some(region) });
        Ok(())
    }

    fn post_fence(&mut self, id: OpId) -> Result<(), PostError> {
        self.check_room()?;
        let sequence = self.sequence();
        self.accept(Frame::Fence { sequence }, sequence, None);
        self.unanswered.push_back(Unanswered { sequence, id, read: None });
        Ok(())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        if self.dead.is_none() {
            self.polls = self.polls.wrapping_add(1);
            if let Err(error) = self.progress() {
                self.die(error);
            }
        }
        let count = self.done.len();
        completions.extend(self.done.drain(..));
        self.outstanding -= count;
        count
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), LinkError> {
        if !self.done.is_empty() {
            return Ok(());
        }
        if let Some(error) = &self.dead {
            return Err(error.clone());
        }
        let out = if self.unsent.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN | out)];
        match poll(&mut fds, Some(&timespec(timeout))) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(source) => Err(LinkError::System { what: "wait for the link", source }),
        }
    }

    fn close(mut self: Box<Self>) {
        if self.dead.is_none() && self.unsent.is_empty() && self.unanswered.is_empty() {
            // A peer that does not hear it counts the connection as lost, no more.
            let goodbye = Frame::Goodbye.encode();
            let _ = raw::send(self.socket.as_fd(), &[Part::Bytes(&goodbye)], libc::MSG_DONTWAIT);
            self.dead = Some(LinkError::SessionEnded);
        }
    }

    fn is_dead(&self) -> Option<&LinkError> {
        self.dead.as_ref()
    }
}
