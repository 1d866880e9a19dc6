use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_fabric::regions::{Need, RegionUse};
use ramferry_fabric::{
    Completion, HardwareFault, InvalidOperation, Link, LinkError, MAX_TRANSFER_BYTES, OpError, OpId,
    PostError, Transfer,
};
use rustix::io::Errno;

use crate::cm::EventKind;
use crate::completion::Ended;
use crate::device::Signal;
use crate::domain::VerbsDomain;
use crate::message::{FENCES, MESSAGE_BYTES, Message};
use crate::messages::MessageSlots;
use crate::os;
use crate::queue_pair::{Depths, Local, QueuePair, Request, Verb};
use crate::region::MemoryRegion;
use crate::send_queue::SendQueue;
use crate::status::{Outcome, QueuePairFault};
use crate::suspicion::{Suspicion, leaves_cause_open};

/// Operations accepted whose completion the caller has not taken yet, and work
/// requests that have not ended, at most.
const QUEUE_DEPTH: usize = 128;
/// Requests that are posted by one call, at most; the last of them has its end told.
const CHAIN_REQUESTS: usize = 16;
/// A chain of so many bytes is worth a call of its own.
const CHAIN_BYTES: u64 = 256 << 10;
/// Polls that find nothing before one looks at what is told elsewhere.
const LOOK_ASIDE_EVERY: u32 = 64;
/// How long requests may take to end after the queue pair failed.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// How long a link takes leave.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);
/// Longest sleep while a link ends.
const NAP: Duration = Duration::from_millis(20);

/// What a link's queue pair needs.
/// Memory for the answers, then for what is sent.
pub(crate) const LINK_SLOTS: usize = 2 * FENCES + 1;

pub(crate) const LINK_DEPTHS: Depths =
    Depths { send: QUEUE_DEPTH as u32 + FENCES as u32 + 1, receive: FENCES as u32 };

/// The side that posts.
pub(crate) struct VerbsLink {
    // The queue pair is destroyed first: then no device reaches what follows.
    queue_pair: Option<QueuePair>,
    slots: MessageSlots,
    requests: SendQueue<Operation>,
    domain: Arc<VerbsDomain>,
    signal: Arc<Signal>,
    /// Longest message that the port takes.
    max_request_bytes: u32,
    /// Accepted, and not posted yet: the last of `requests`.
    chain: Vec<Request>,
    chain_bytes: u64,
    /// Fences that were sent and wait for their answer, the oldest first.
    fences: VecDeque<(u64, OpId)>,
    /// Fences that were accepted and have not completed.
    fences_under_way: usize,
    next_fence: u64,
    /// Fences that are answered.
    answered: u64,
    goodbye_sent: bool,
    done: VecDeque<Completion>,
    /// Accepted, and not yet taken by the caller.
    outstanding: usize,
    idle_polls: u32,
    ended: Vec<Ended>,
    /// Operations that a failed queue pair flushed, while its reason is not known.
    unexplained: Vec<Operation>,
    /// It seems to have ended.
    suspicion: Option<Suspicion>,
    death: Option<Death>,
}

enum Operation {
    Transfer { id: OpId, region: RegionUse<MemoryRegion> },
    Fence { id: OpId, number: u64 },
    Goodbye,
}

struct Death {
    error: LinkError,
    since: Instant,
}

impl VerbsLink {
    /// Posts the receives of a queue pair that is not connected yet.
    pub(crate) fn prepare(queue_pair: &mut QueuePair, slots: &MessageSlots) -> Result<(), Errno> {
        (0..FENCES).try_for_each(|slot| queue_pair.post_receive(slot as u64, slots.local(slot)))
    }

    pub(crate) fn slots(domain: &VerbsDomain) -> Result<MessageSlots, Errno> {
        MessageSlots::new(domain.protection(), LINK_SLOTS)
    }

    /// Takes a queue pair that was prepared, is connected, and is welcome at the peer.
    pub(crate) fn new(
        queue_pair: QueuePair,
        slots: MessageSlots,
        domain: Arc<VerbsDomain>,
        signal: Arc<Signal>,
        max_request_bytes: u32,
    ) -> Self {
        Self {
            queue_pair: Some(queue_pair),
            slots,
            requests: SendQueue::new(),
            domain,
            signal,
            max_request_bytes,
            chain: Vec::with_capacity(CHAIN_REQUESTS),
            chain_bytes: 0,
            fences: VecDeque::with_capacity(FENCES),
            fences_under_way: 0,
            next_fence: 0,
            answered: 0,
            goodbye_sent: false,
            done: VecDeque::with_capacity(QUEUE_DEPTH),
            outstanding: 0,
            idle_polls: 0,
            ended: Vec::new(),
            unexplained: Vec::new(),
            suspicion: None,
            death: None,
        }
    }

    fn check_room(&self, requests: usize) -> Result<(), PostError> {
        match &self.death {
            Some(death) => Err(PostError::Dead(death.error.clone())),
            None if self.suspicion.is_some() => Err(PostError::Full),
            None if self.outstanding >= QUEUE_DEPTH => Err(PostError::Full),
            None if self.requests.len() + requests > QUEUE_DEPTH => Err(PostError::Full),
            None => Ok(()),
        }
    }

    fn post_transfer(&mut self, op: Transfer, need: Need) -> Result<(), PostError> {
        self.check_room(1)?;
        if op.length == 0 || op.length > MAX_TRANSFER_BYTES {
            return Err(PostError::Invalid(InvalidOperation::Length { length: op.length }));
        }
        let parts = op.length.div_ceil(self.max_request_bytes);
        self.check_room(parts as usize)?;
        let begun = self.domain.begin(op.local.key, need, op.local.offset, op.length);
        let region = begun.map_err(|fault| PostError::Invalid(InvalidOperation::Local(fault)))?;
        let local_key = region.local_key();
        let mut operation = Some(Operation::Transfer { id: op.id, region });
        for part in 0..parts {
            let start = part * self.max_request_bytes;
            let length = self.max_request_bytes.min(op.length - start);
            // An offset that overflows is refused by the peer as any other that it does not have.
            let address = op.remote.offset.wrapping_add(u64::from(start));
            let key = op.remote.key.0 as u32;
            let verb = match need {
                Need::LocalWrite => Verb::Read { address, key },
                _ => Verb::Write { address, key },
            };
            let local = Local { address: op.local.offset + u64::from(start), length, key: local_key };
            let is_last = part + 1 == parts;
            self.enqueue(if is_last { operation.take() } else { None }, verb, local);
        }
        self.outstanding += 1;
        if self.chain.len() >= CHAIN_REQUESTS || self.chain_bytes >= CHAIN_BYTES {
            self.flush();
        }
        Ok(())
    }

    fn enqueue(&mut self, operation: Option<Operation>, verb: Verb, local: Local) {
        let id = self.requests.push(operation);
        self.chain_bytes += u64::from(local.length);
        self.chain.push(Request { id, verb, local, signalled: false });
    }

    /// Hands the chain to the device.
    fn flush(&mut self) {
        self.chain_bytes = 0;
        let Some(last) = self.chain.last_mut() else { return };
        last.signalled = true;
        let Some(queue_pair) = &mut self.queue_pair else { return };
        let posted = queue_pair.post(&self.chain);
        if let Err((posted, source)) = posted {
            let first_left = self.chain[posted.min(self.chain.len() - 1)].id;
            self.chain.clear();
            let error = self.signal.error();
            self.die(error.unwrap_or(LinkError::System { what: "post to a queue pair", source }));
            let error = self.death_error();
            let Self { requests, done, fences_under_way, .. } = self;
            requests.abandon_from(first_left, |operation, outcome| {
                complete(operation, outcome, &error, done, fences_under_way);
            });
        }
        self.chain.clear();
    }

    /// Takes what the device says has ended.
    fn reap(&mut self) -> usize {
        let mut ended = std::mem::take(&mut self.ended);
        ended.clear();
        let polled = match &mut self.queue_pair {
            Some(queue_pair) => queue_pair.sent.poll(&mut ended),
            None => Ok(0),
        };
        let sent = ended.len();
        for end in &ended {
            self.sent(*end);
        }
        ended.clear();
        let received = match &mut self.queue_pair {
            Some(queue_pair) => queue_pair.received.poll(&mut ended),
            None => Ok(0),
        };
        let count = sent + ended.len();
        for end in &ended {
            self.received(*end);
        }
        self.ended = ended;
        if let Err(source) = polled.and(received) {
            self.die(LinkError::System { what: "poll a completion queue", source });
        }
        self.complete_fences();
        count
    }

    fn sent(&mut self, end: Ended) {
        if end.outcome != Outcome::Done {
            self.fail(end.outcome);
        }
        let death = self.death.as_ref().map(|death| death.error.clone());
        let Self { requests, done, fences, fences_under_way, goodbye_sent, unexplained, .. } = self;
        let known = requests.ended(end.id, end.outcome, |operation, outcome| match (operation, &death) {
            (Operation::Fence { id, number }, _) if outcome == Outcome::Done => {
                fences.push_back((number, id));
            }
            (Operation::Goodbye, _) => *goodbye_sent = true,
            (operation, None) if outcome != Outcome::Done => unexplained.push(operation),
            (operation, death) => {
                let error = death.as_ref().unwrap_or(&LinkError::SessionEnded);
                complete(operation, outcome, error, done, fences_under_way);
            }
        });
        if known.is_err() {
            self.die(LinkError::Fabric("the device told the end of a request that was never made".into()));
        }
    }

    fn received(&mut self, end: Ended) {
        if end.outcome != Outcome::Done {
            return self.fail(end.outcome);
        }
        let slot = end.id as usize;
        let message =
            (end.length as usize == MESSAGE_BYTES).then(|| Message::decode(&self.slots.read(slot))).flatten();
        // Fences are answered in order, each once.
        if message != Some(Message::FenceAnswer { number: self.answered }) || self.answered >= self.next_fence
        {
            return self.die(LinkError::PeerProtocol("answer to nothing that was asked"));
        }
        self.answered += 1;
        let local = self.slots.local(slot);
        let posted = self.queue_pair.as_mut().map(|queue_pair| queue_pair.post_receive(end.id, local));
        if let Some(Err(source)) = posted {
            self.die(LinkError::System { what: "post to a queue pair", source });
        }
    }

    /// A fence has completed when it was answered, and everything before it has ended.
    fn complete_fences(&mut self) {
        while let Some((number, id)) = self.fences.front().copied()
            && number < self.answered
        {
            self.fences.pop_front();
            self.fences_under_way -= 1;
            self.done.push_back(Completion { id, result: Ok(()) });
        }
    }

    /// A request failed.
    fn fail(&mut self, outcome: Outcome) {
        let device = self.domain.device_name();
        let told = outcome.link_error(device).or_else(|| self.signal.error());
        self.end(told.unwrap_or_else(|| QueuePairFault::Broken.link_error(device)));
    }

    /// The link has ended; for this reason, unless it leaves its cause open and another is told.
    fn end(&mut self, error: LinkError) {
        match leaves_cause_open(&error) {
            true => self.suspect(error),
            false => self.die(error),
        }
    }

    /// The link seems to have ended. What still comes says why, if anything does: a peer that
    /// refused an operation leaves, too, and its refusal may be heard after that.
    fn suspect(&mut self, error: LinkError) {
        match &mut self.suspicion {
            Some(suspicion) => suspicion.hear(error),
            None => self.suspicion = Some(Suspicion::new(error, Instant::now())),
        }
    }

    /// The link carries nothing more.
    fn die(&mut self, error: LinkError) {
        if self.death.is_some() {
            return;
        }
        let error = self.signal.explain(error);
        tracing::debug!(device = self.domain.device_name(), %error, "a link died");
        for operation in self.unexplained.drain(..) {
            complete(operation, Outcome::Flushed, &error, &mut self.done, &mut self.fences_under_way);
        }
        self.death = Some(Death { error, since: Instant::now() });
        if let Some(queue_pair) = &mut self.queue_pair {
            queue_pair.fail();
        }
    }

    /// Hears what is told outside the completion queues.
    fn look_aside(&mut self) {
        if let Some(error) = self.signal.error() {
            self.end(error);
        }
        let Some(queue_pair) = &self.queue_pair else { return };
        let channel = Arc::clone(queue_pair.identifier().channel());
        while let Ok(Some(event)) = channel.next() {
            match event.kind {
                kind if kind.is_end_by_peer() => self.suspect(LinkError::PeerClosed),
                EventKind::DeviceRemoval => {
                    let device = self.domain.device_name().to_owned();
                    self.die(LinkError::Hardware { device, fault: HardwareFault::DeviceRemoved });
                }
                _ => {}
            }
        }
    }

    /// Lets a suspicion become certain in time; then waits, within bounds, for the requests of the
    /// failed queue pair to end, and destroys it.
    fn bury(&mut self) {
        let is_idle = self.requests.is_empty() && self.unexplained.is_empty();
        let suspicion = self.suspicion.as_ref().filter(|_| self.death.is_none());
        let verdict = suspicion.and_then(|suspicion| suspicion.verdict(is_idle, Instant::now()));
        if let Some(error) = verdict.cloned() {
            self.die(error);
        }
        let Some(death) = &self.death else { return };
        if self.queue_pair.is_some() && (self.requests.is_empty() || death.since.elapsed() > FLUSH_LIMIT) {
            self.destroy();
        }
    }

    fn destroy(&mut self) {
        self.queue_pair = None;
        self.chain.clear();
        let error = self.death_error();
        let Self { requests, done, fences, fences_under_way, .. } = self;
        requests.abandon(|operation, outcome| complete(operation, outcome, &error, done, fences_under_way));
        for (_, id) in fences.drain(..) {
            *fences_under_way -= 1;
            done.push_back(Completion { id, result: Err(OpError::LinkDead(error.clone())) });
        }
    }

    fn death_error(&self) -> LinkError {
        self.death.as_ref().map_or(LinkError::SessionEnded, |death| death.error.clone())
    }

    fn is_ending(&self) -> bool {
        self.death.is_some() || self.suspicion.is_some()
    }

    fn progress(&mut self) {
        self.flush();
        if self.reap() > 0 {
            self.idle_polls = 0;
        } else {
            self.idle_polls = self.idle_polls.wrapping_add(1);
        }
        let is_idle = self.idle_polls > 0 && self.idle_polls.is_multiple_of(LOOK_ASIDE_EVERY);
        if is_idle || self.is_ending() {
            self.look_aside();
        }
        self.bury();
    }

    /// Has the completion queues wake a sleeper; whether something came meanwhile.
    fn arm(&mut self) -> Result<bool, Errno> {
        let Some(queue_pair) = &mut self.queue_pair else { return Ok(true) };
        queue_pair.sent.arm()?;
        queue_pair.received.arm()?;
        Ok(self.reap() > 0)
    }

    fn sleep(&mut self, timeout: Duration) -> Result<(), Errno> {
        let Some(queue_pair) = &self.queue_pair else { return Ok(()) };
        let fds: [BorrowedFd<'_>; 4] = [
            queue_pair.sent.fd(),
            queue_pair.received.fd(),
            queue_pair.identifier().channel().fd(),
            self.signal.fd(),
        ];
        os::wait_readable(&fds, timeout)?;
        // What woke us is found by the next poll, whichever it was.
        self.idle_polls = LOOK_ASIDE_EVERY - 1;
        Ok(())
    }

    /// Tells the peer that the end of the link is meant.
    fn take_leave(&mut self) {
        let slot = 2 * FENCES;
        self.slots.write(slot, Message::Goodbye.encode());
        self.enqueue(Some(Operation::Goodbye), Verb::Send, self.slots.local(slot));
        let deadline = Instant::now() + GOODBYE_LIMIT;
        while !self.goodbye_sent && !self.is_ending() && Instant::now() < deadline {
            self.progress();
            let is_sent = self.goodbye_sent || self.arm().unwrap_or(true);
            if !is_sent && self.sleep(NAP).is_err() {
                break;
            }
        }
    }
}

/// Completes an operation whose last request has ended.
fn complete(
    operation: Operation,
    outcome: Outcome,
    error: &LinkError,
    done: &mut VecDeque<Completion>,
    fences_under_way: &mut usize,
) {
    let id = match operation {
        Operation::Transfer { id, region } => {
            drop(region);
            id
        }
        Operation::Fence { id, .. } => {
            *fences_under_way -= 1;
            id
        }
        Operation::Goodbye => return,
    };
    done.push_back(Completion { id, result: outcome.op_result(error) });
}

impl Link for VerbsLink {
    fn post_write(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post_transfer(op, Need::LocalRead)
    }

    fn post_read(&mut self, op: Transfer) -> Result<(), PostError> {
        self.post_transfer(op, Need::LocalWrite)
    }

    fn post_fence(&mut self, id: OpId) -> Result<(), PostError> {
        self.check_room(1)?;
        if self.fences_under_way == FENCES {
            return Err(PostError::Full);
        }
        let number = self.next_fence;
        let slot = FENCES + (number % FENCES as u64) as usize;
        self.slots.write(slot, Message::Fence { number }.encode());
        self.next_fence += 1;
        self.fences_under_way += 1;
        self.outstanding += 1;
        self.enqueue(Some(Operation::Fence { id, number }), Verb::Send, self.slots.local(slot));
        self.flush();
        Ok(())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize {
        self.progress();
        let count = self.done.len();
        completions.extend(self.done.drain(..));
        self.outstanding -= count;
        count
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), LinkError> {
        if !self.done.is_empty() {
            return Ok(());
        }
        self.flush();
        let failed = |source| LinkError::System { what: "wait for the link", source };
        if self.is_ending() {
            if self.death.is_some() && self.outstanding == 0 {
                return Err(self.death_error());
            }
            // What is left ends within bounds, with or without being told.
            return self.sleep(timeout.min(NAP)).map_err(failed);
        }
        if self.arm().map_err(failed)? || !self.done.is_empty() {
            return Ok(());
        }
        self.sleep(timeout).map_err(failed)
    }

    fn close(mut self: Box<Self>) {
        if !self.is_ending() && self.outstanding == 0 && self.requests.is_empty() {
            self.take_leave();
        }
        if let Some(queue_pair) = &self.queue_pair {
            queue_pair.identifier().disconnect();
        }
    }

    fn is_dead(&self) -> Option<&LinkError> {
        self.death.as_ref().map(|death| &death.error)
    }
}
