//! The side whose memory is reached: its CPU answers fences, and no more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_fabric::{AccessFault, HardwareFault, LinkError, hello};

use crate::cm::{EventChannel, EventKind, Identifier};
use crate::completion::Ended;
use crate::device::Signal;
use crate::domain::VerbsDomain;
use crate::message::{FENCES, MESSAGE_BYTES, Message};
use crate::messages::MessageSlots;
use crate::os;
use crate::queue_pair::{Depths, QueuePair, Request, Verb};
use crate::status::Outcome;
use crate::suspicion::leaves_cause_open;

/// How long a peer that was accepted may take to say so.
const ESTABLISH_LIMIT: Duration = Duration::from_secs(5);
/// How often a thread that nothing wakes looks around.
const LOOK_AROUND: Duration = Duration::from_secs(5);
/// How long the end of a link waits for the peer's, which makes it orderly.
const FAREWELL_LIMIT: Duration = Duration::from_millis(500);
/// How long a failure without a reason waits for one.
const REASON_LIMIT: Duration = Duration::from_millis(200);
/// How long answers may stay unsent before the peer is given up.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Messages that a peer may have sent: a fence for each credit, and the goodbye.
const RECEIVES: usize = FENCES + 1;
/// Answers on their way: those of the fences that the peer sent upon earlier
/// answers may be posted before the end of these is told.
const ANSWERS: usize = 2 * FENCES;
pub(crate) const SERVED_SLOTS: usize = RECEIVES + ANSWERS;
pub(crate) const SERVED_DEPTHS: Depths = Depths { send: ANSWERS as u32, receive: RECEIVES as u32 };

/// Serves a connection that was asked for until it ends. Well when the peer took leave.
pub(crate) fn serve(
    request: Identifier,
    domain: &Arc<VerbsDomain>,
    signal: &Arc<Signal>,
) -> Result<(), LinkError> {
    let mut served = Served::accept(request, domain, signal)?;
    let result = served.run();
    if result.is_ok() {
        served.wait_for_the_peers_end();
    }
    served.queue_pair.identifier().disconnect();
    result
}

struct Served<'s> {
    // The queue pair is destroyed before the memory of its messages.
    queue_pair: QueuePair,
    slots: MessageSlots,
    channel: Arc<EventChannel>,
    signal: &'s Signal,
    device: String,
    answers_under_way: usize,
    next_answer: usize,
    ended: Vec<Ended>,
}

impl<'s> Served<'s> {
    fn accept(
        request: Identifier,
        domain: &Arc<VerbsDomain>,
        signal: &'s Arc<Signal>,
    ) -> Result<Self, LinkError> {
        let system = |what| move |source| LinkError::System { what, source };
        let channel = EventChannel::new()?;
        let request = request.migrate(&channel).map_err(system("take over a connection"))?;
        let port = request.port();
        let mut queue_pair = QueuePair::new(request, domain.protection(), SERVED_DEPTHS)?;
        let slots = MessageSlots::new(domain.protection(), SERVED_SLOTS)
            .map_err(system("register memory for messages"))?;
        for slot in 0..RECEIVES {
            queue_pair
                .post_receive(slot as u64, slots.local(slot))
                .map_err(system("post to a queue pair"))?;
        }
        domain.device().subscribe(queue_pair.number(), port, signal);
        let welcome = hello::encode_reply(hello::Verdict::Welcome);
        queue_pair.identifier().accept(&welcome).map_err(system("accept a connection"))?;
        let device = domain.device_name().to_owned();
        let (answers_under_way, next_answer, ended) = (0, 0, Vec::new());
        let served =
            Self { queue_pair, slots, channel, signal, device, answers_under_way, next_answer, ended };
        served.wait_until_established()?;
        Ok(served)
    }

    fn wait_until_established(&self) -> Result<(), LinkError> {
        let deadline = Instant::now() + ESTABLISH_LIMIT;
        loop {
            if let Some(error) = self.signal.error() {
                return Err(self.reason_or(error));
            }
            match self.channel.next().map_err(LinkError::Lost)?.map(|event| event.kind) {
                Some(EventKind::Established) => return Ok(()),
                Some(EventKind::Other(_)) => {}
                Some(_) => return Err(LinkError::PeerClosed),
                None => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        let what = "the peer's confirmation of the connection";
                        return Err(LinkError::TimedOut { what, after: ESTABLISH_LIMIT });
                    }
                    let fds = [self.channel.fd(), self.signal.fd()];
                    os::wait_readable(&fds, left).map_err(LinkError::Lost)?;
                }
            }
        }
    }

    fn run(&mut self) -> Result<(), LinkError> {
        loop {
            self.queue_pair.received.arm().map_err(LinkError::Lost)?;
            if self.take_messages()? {
                return Ok(());
            }
            self.look_aside()?;
            let fds = [self.queue_pair.received.fd(), self.channel.fd(), self.signal.fd()];
            os::wait_readable(&fds, LOOK_AROUND).map_err(LinkError::Lost)?;
        }
    }

    /// Takes what was received; whether that was the goodbye.
    fn take_messages(&mut self) -> Result<bool, LinkError> {
        let mut ended = std::mem::take(&mut self.ended);
        let mut is_over = false;
        loop {
            ended.clear();
            if self.queue_pair.received.poll(&mut ended).map_err(LinkError::Lost)? == 0 {
                break;
            }
            for end in &ended {
                is_over |= self.take_message(*end)?;
            }
        }
        self.ended = ended;
        Ok(is_over)
    }

    fn take_message(&mut self, end: Ended) -> Result<bool, LinkError> {
        if end.outcome != Outcome::Done {
            return Err(self.reason(end.outcome));
        }
        let slot = end.id as usize;
        let is_whole = end.length as usize == MESSAGE_BYTES;
        match is_whole.then(|| Message::decode(&self.slots.read(slot))).flatten() {
            Some(Message::Goodbye) => Ok(true),
            Some(Message::Fence { number }) => {
                // Before the answer, upon which the peer may send the next.
                let local = self.slots.local(slot);
                self.queue_pair.post_receive(end.id, local).map_err(LinkError::Lost)?;
                self.answer(number)?;
                Ok(false)
            }
            Some(Message::FenceAnswer { .. }) => Err(LinkError::PeerProtocol("message out of place")),
            None => Err(LinkError::PeerProtocol("malformed message")),
        }
    }

    fn answer(&mut self, number: u64) -> Result<(), LinkError> {
        self.wait_for_room()?;
        let slot = RECEIVES + self.next_answer;
        self.next_answer = (self.next_answer + 1) % ANSWERS;
        self.slots.write(slot, Message::FenceAnswer { number }.encode());
        let request =
            Request { id: slot as u64, verb: Verb::Send, local: self.slots.local(slot), signalled: true };
        self.queue_pair.post(&[request]).map_err(|(_, errno)| LinkError::Lost(errno))?;
        self.answers_under_way += 1;
        Ok(())
    }

    /// Waits for a place among the answers under way. There is one, unless the peer sends
    /// more fences than it has credits for.
    fn wait_for_room(&mut self) -> Result<(), LinkError> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let mut ended = Vec::new();
            self.queue_pair.sent.arm().map_err(LinkError::Lost)?;
            self.queue_pair.sent.poll(&mut ended).map_err(LinkError::Lost)?;
            self.answers_under_way -= ended.len();
            if let Some(end) = ended.iter().find(|end| end.outcome != Outcome::Done) {
                return Err(self.reason(end.outcome));
            }
            if self.answers_under_way < ANSWERS {
                return Ok(());
            }
            self.look_aside()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LinkError::PeerProtocol("more fences than there are credits for"));
            }
            let fds = [self.queue_pair.sent.fd(), self.channel.fd(), self.signal.fd()];
            os::wait_readable(&fds, left).map_err(LinkError::Lost)?;
        }
    }

    /// Hears what is told outside the completion queues.
    fn look_aside(&self) -> Result<(), LinkError> {
        match self.hear() {
            Err(error) if leaves_cause_open(&error) => Err(self.reason_or(error)),
            heard => heard,
        }
    }

    /// The same at once: of what was told, what leaves its cause open only where nothing else was.
    fn hear(&self) -> Result<(), LinkError> {
        let told = self.signal.error();
        if let Some(error) = told.as_ref().filter(|error| !leaves_cause_open(error)) {
            return Err(error.clone());
        }
        while let Some(event) = self.channel.next().map_err(LinkError::Lost)? {
            match event.kind {
                kind if kind.is_end_by_peer() => return Err(LinkError::PeerClosed),
                EventKind::DeviceRemoval => return Err(self.hardware(HardwareFault::DeviceRemoved)),
                _ => {}
            }
        }
        told.map_or(Ok(()), Err)
    }

    /// Why a request failed. A flush says nothing.
    fn reason(&self, outcome: Outcome) -> LinkError {
        match outcome.link_error(&self.device) {
            Some(error) => self.signal.explain(error),
            // This side's requests only receive and answer. What else fails a queue pair is an
            // operation of the peer that its device refused, and not every device tells more.
            None => self.reason_or(LinkError::RefusedPeer(AccessFault::Unspecified)),
        }
    }

    /// The reason of an end that is known. It may come a moment later, by another way; where none
    /// comes it is `otherwise`.
    fn reason_or(&self, mut otherwise: LinkError) -> LinkError {
        let deadline = Instant::now() + REASON_LIMIT;
        loop {
            match self.hear() {
                Err(error) if leaves_cause_open(&error) => otherwise = error,
                Err(error) => return error,
                Ok(()) => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let fds = [self.channel.fd(), self.signal.fd()];
            if left.is_zero() || os::wait_readable(&fds, left).is_err() {
                if self.signal.is_port_down() {
                    return self.hardware(HardwareFault::PortDown);
                }
                return otherwise;
            }
        }
    }

    /// After a goodbye the peer ends the connection, once its device has heard that we have it.
    fn wait_for_the_peers_end(&self) {
        let deadline = Instant::now() + FAREWELL_LIMIT;
        while self.hear().is_ok() {
            let left = deadline.saturating_duration_since(Instant::now());
            let fds = [self.channel.fd(), self.signal.fd()];
            if left.is_zero() || os::wait_readable(&fds, left).is_err() {
                break;
            }
        }
    }

    fn hardware(&self, fault: HardwareFault) -> LinkError {
        LinkError::Hardware { device: self.device.clone(), fault }
    }
}
