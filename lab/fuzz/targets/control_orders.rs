//! Orders of a source on the control stream, at a destination's driver and engine with a guest's RAM behind them.
#![no_main]

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use libfuzzer_sys::fuzz_target;
use ramferry_agent::fuzzing::orders;
use ramferry_engine::{
    Destination, DestinationAction, DestinationEvent, DestinationOutcome, Failure, Reason,
};
use ramferry_fabric::MappedDomain;
use ramferry_fuzz::{PAGE, memory, messages, range};
use ramferry_mover::{
    DestinationHandle, DestinationInput, DestinationOutside, DestinationParts, DestinationSnapshot,
    PeerAnswer, PostcopyParts, spawn_destination,
};
use ramferry_ram::Memory;

const PAGES: u64 = 16;

/// An agent whose guest does whatever it is told, at once.
struct Agent {
    handle: DestinationHandle,
    parts: Option<Box<DestinationParts>>,
    done: Vec<&'static str>,
    ended: Sender<(DestinationOutcome, Vec<&'static str>)>,
}

impl DestinationOutside for Agent {
    fn act(&mut self, action: DestinationAction) {
        let reply: DestinationInput = match action {
            DestinationAction::Prepare => {
                DestinationInput::Ready(self.parts.take().expect("it is prepared once"))
            }
            DestinationAction::StartIncoming { .. } => DestinationEvent::IncomingReady.into(),
            // All of the device state came before.
            DestinationAction::TellIncomingReady => DestinationEvent::DeviceStateLoaded.into(),
            DestinationAction::WriteCommitted => {
                self.done.push("COMMITTED");
                DestinationEvent::CommittedSynced.into()
            }
            DestinationAction::WriteAborted(_) => {
                self.done.push("ABORTED");
                DestinationEvent::AbortedSynced.into()
            }
            DestinationAction::ResumeGuest => {
                self.done.push("resumed");
                DestinationEvent::GuestResumed.into()
            }
            DestinationAction::DiscardGuest => {
                self.done.push("discarded");
                DestinationEvent::GuestDiscarded.into()
            }
            DestinationAction::Finish(outcome) => {
                let _ = self.ended.send((outcome, std::mem::take(&mut self.done)));
                return;
            }
            _ => return,
        };
        self.handle.send(reply);
    }

    fn publish(&mut self, _: &DestinationSnapshot) {}
}

fuzz_target!(|data: &[u8]| {
    let memory = memory(PAGES);
    memory.span(range(0, PAGES * PAGE)).expect("the block").write_from(&[7; (PAGES * PAGE) as usize]);
    let (ended, outcome) = channel();
    let parts = parts(&memory);
    let (handle, thread) = spawn_destination(Destination::new(), |handle| Agent {
        handle,
        parts: Some(Box::new(parts)),
        done: Vec::new(),
        ended,
    });
    let inputs = orders(&messages(data));
    let clears = inputs.iter().any(|input| matches!(input, DestinationInput::ZeroPages { .. }));
    for input in inputs {
        handle.send(input);
    }
    // Whatever was ordered, this ends it.
    handle.send(DestinationEvent::Abort(Failure::new(Reason::Cancelled, "the end")));
    thread.join().expect("no order makes the driver panic");
    let (outcome, done) = outcome.recv().expect("the engine ends");

    // The rule of who may run the guest.
    let resumed = done.iter().position(|what| *what == "resumed");
    assert_eq!(outcome == DestinationOutcome::Running, resumed.is_some(), "{done:?}");
    if let Some(resumed) = resumed {
        assert!(done[..resumed].contains(&"COMMITTED") && !done.contains(&"ABORTED"), "{done:?}");
    }
    let mut bytes = [0; (PAGES * PAGE) as usize];
    memory.span(range(0, PAGES * PAGE)).expect("the block").read_into(&mut bytes);
    for page in bytes.chunks(PAGE as usize) {
        assert!(page.iter().all(|byte| *byte == page[0]), "a page is cleared whole");
        assert!(page[0] == 7 || (page[0] == 0 && clears));
    }
});

fn parts(memory: &Arc<Memory>) -> DestinationParts {
    DestinationParts {
        links: Box::new(|| None),
        domain: Arc::new(MappedDomain::new(Arc::clone(memory)).expect("presence is known")),
        memory: Arc::clone(memory),
        registration_workers: 1,
        // An order into post-copy fails: there is no VMM.
        postcopy: PostcopyParts {
            vmm: 0,
            partners: Vec::new(),
            owed_path: std::path::PathBuf::new(),
            migration: String::new(),
        },
        answer: Arc::new(|_: PeerAnswer| true),
    }
}
