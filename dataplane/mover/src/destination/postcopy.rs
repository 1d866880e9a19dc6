//! The destination's part of post-copy: from the order to hold the VMM's accesses up to the last page.

use std::fmt::Display;
use std::sync::Arc;

use ramferry_engine::{DestinationAction, DestinationEvent, Failure, Reason, State};
use ramferry_ram::{Memory, Owed, PageSets};
use ramferry_tracking::postcopy::RemoteFaults;

use super::{DestinationInput, Driver, PeerAnswer, Retaken};
use crate::MoverError;
use crate::pull::{Pull, PullReport, Readers};

/// The source's memory cannot be read for now.
pub fn reads_lost(cause: &dyn Display) -> Failure {
    let message = format!(
        "the links by which the guest's memory is read from the source are lost: {cause}. Where the guest runs here \
         already it waits for what is still there: see that both agents run and reach each other"
    );
    Failure::new(Reason::LinkLost, message)
}

impl Driver {
    /// From here on each first access of the VMM to its RAM waits until it is let in.
    pub(super) fn arm(&mut self) -> Result<(), MoverError> {
        let Some((plane, postcopy)) = self.plane.as_ref().zip(self.postcopy.as_ref()) else {
            return Ok(());
        };
        let memory = Arc::clone(&plane.memory);
        let faults = RemoteFaults::arm(postcopy.vmm, Arc::clone(&memory), &postcopy.partners)?;
        self.serve(memory, faults)
    }

    fn serve(&mut self, memory: Arc<Memory>, faults: RemoteFaults) -> Result<(), MoverError> {
        let handle = self.handle.clone();
        let report = Arc::new(move |report| handle.send(DestinationInput::Pulling(report)));
        self.pull = Some(Pull::begin(
            memory,
            faults,
            Arc::clone(&self.counters),
            report,
            Arc::clone(&self.handle.reads),
        )?);
        Ok(())
    }

    pub(super) fn read_with(&mut self, readers: Readers) {
        let Some(pull) = &mut self.pull else { return };
        match pull.connect(readers) {
            Ok(()) => self.feed(DestinationEvent::PullResumed),
            Err(error) => self.feed(DestinationEvent::Failed(reads_lost(&error))),
        }
    }

    pub(super) fn hold(&mut self, pages: &PageSets) {
        let (Some(pull), Some(postcopy)) = (&mut self.pull, &self.postcopy) else {
            return self.fail(Reason::Internal, "what is owed was named before post-copy was begun".into());
        };
        if !pull.is_connected() {
            return self.fail(Reason::LinkLost, "there are no links to read the source's memory with".into());
        }
        let layout = pull.memory().layout();
        match Owed::create(&postcopy.owed_path, &postcopy.migration, layout, pages) {
            Ok(owed) => {
                pull.hold(owed);
                self.feed(DestinationEvent::OwedHeld);
            }
            Err(error) => self.fail(Reason::JournalFailed, error.to_string()),
        }
    }

    /// Whether the guest may be let run: a process that came to its RAM meanwhile would not wait.
    pub(super) fn confirm(&self) -> Result<(), MoverError> {
        self.pull.as_ref().map_or(Ok(()), Pull::confirm)
    }

    /// The guest is about to run: what it waits for is read already. It is ordered again where the links are lost.
    pub(super) fn begin_to_pull(&mut self) {
        match &self.pull {
            None => self.outside.act(DestinationAction::Pull),
            Some(pull) if !pull.is_connected() => {
                self.answer(PeerAnswer::ReadersLost);
            }
            // What was in doubt were not the links in use.
            Some(_) => self.feed(DestinationEvent::PullResumed),
        }
    }

    /// The guest runs: reads what nobody waits for, too, which until now would have kept it from running. What it was
    /// copied with goes, beside it: that may take long.
    pub(super) fn guest_runs(&mut self) {
        self.runs = true;
        let Some(pull) = &mut self.pull else { return };
        if let Err(error) = pull.stream() {
            return self.fail(Reason::Internal, error.to_string());
        }
        if let Some(plane) = self.plane.take() {
            let builder = std::thread::Builder::new().name("let-go".into());
            if let Err(error) = builder.spawn(move || drop(plane)) {
                tracing::warn!(%error, "what the copy needed was let go while the guest waited");
            }
        }
    }

    /// A round that ends while the VMM's accesses wait is the last: the guest stood still, or wrote nothing more.
    /// Nothing will be owed.
    pub(super) fn hold_nothing(&mut self) -> Result<(), MoverError> {
        if let (Some(pull), Some(postcopy)) = (&mut self.pull, &self.postcopy)
            && !pull.is_held()
        {
            let layout = pull.memory().layout();
            let nothing = PageSets::new(layout);
            pull.hold(Owed::create(&postcopy.owed_path, &postcopy.migration, layout, &nothing)?);
        }
        Ok(())
    }

    /// Takes up what an agent that died left.
    pub(super) fn go_on(&mut self, retaken: Retaken) {
        self.answer = Some(retaken.answer);
        self.ram_bytes = retaken.memory.layout().total_bytes();
        let served = self.serve(retaken.memory, retaken.faults);
        match (served, &mut self.pull) {
            (Ok(()), Some(pull)) => {
                pull.hold(retaken.owed);
                self.begin_to_pull();
                if self.runs {
                    self.guest_runs();
                }
            }
            (Err(error), _) => self.fail(Reason::Internal, error.to_string()),
            (Ok(()), None) => unreachable!("it was just made"),
        }
    }

    pub(super) fn pulling(&mut self, report: PullReport) {
        match report {
            PullReport::Pulled => self.feed(DestinationEvent::Pulled),
            PullReport::LinkLost(attempt, error) => {
                if self.pull.as_mut().is_some_and(|pull| pull.lost(attempt)) {
                    self.feed(DestinationEvent::Failed(reads_lost(&error)));
                }
            }
            PullReport::VmmEnded => {
                let message = "the VMM ended while the guest was owed memory";
                let failure = Failure::new(Reason::GuestFailed, message);
                self.feed(match self.engine.state() {
                    State::Postcopy => DestinationEvent::GuestGone(failure),
                    _ => DestinationEvent::Failed(failure),
                });
            }
            // The guest cannot have what it is owed: neither can it run.
            PullReport::Failed(error) if self.engine.state() == State::Postcopy => {
                self.feed(DestinationEvent::MemoryLost(Failure::new(Reason::GuestFailed, error.to_string())));
            }
            PullReport::Failed(error) => self.fail(Reason::GuestFailed, error.to_string()),
        }
    }

    pub(super) fn tell_still_owed(&mut self) {
        if self.engine.state() == State::Postcopy
            && let Some(bytes) = self.pull.as_ref().and_then(Pull::owed_bytes)
        {
            self.answer(PeerAnswer::StillOwed(bytes));
        }
    }

    /// Lets the VMM at everything, if it has everything: or else its accesses go on waiting.
    pub(super) fn end_pull(&mut self) {
        let Some(pull) = self.pull.take() else { return };
        if let Err(error) = pull.end() {
            tracing::warn!(%error, "post-copy was not taken down whole");
        }
    }
}
