//! The source's part of post-copy: its memory is there for the destination to read, until that has everything.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use ramferry_engine::{Failure, Reason, SourceEvent};
use ramferry_fabric::windows::Window;
use ramferry_fabric::{Domain, LinkError, Rights};
use ramferry_ram::{BlockIndex, Memory};

use super::Driver;
use crate::served::{Place, SendWindowsAnswer, Served};

/// What a destination reads this side's memory through.
pub struct Lent {
    /// Whether the links that the destination opened are broken; dropping it ends them.
    pub links: Box<dyn FnMut() -> Option<LinkError> + Send>,
    /// Where windows are registered.
    pub domain: Arc<dyn Domain>,
    /// The guest's RAM.
    pub memory: Arc<Memory>,
    /// Threads that register.
    pub registration_workers: usize,
    /// To the destination's agent.
    pub answer: SendWindowsAnswer,
}

/// Field order is teardown order.
pub(super) struct Lending {
    links: Box<dyn FnMut() -> Option<LinkError> + Send>,
    pub(super) served: Served,
    memory: Arc<Memory>,
}

/// What of the guest's RAM is gone. Sending from a mapping that its file no longer covers fails without a trace in that.
fn cut_off(memory: &Memory) -> Option<String> {
    if let Err(error) = memory.check() {
        return Some(error.to_string());
    }
    (0..).map(BlockIndex).zip(memory.layout().blocks()).find_map(|(index, block)| {
        let file = memory.file(index).as_fd().try_clone_to_owned().map(File::from);
        match file.and_then(|file| file.metadata()) {
            Ok(now) if now.len() < block.length_bytes => {
                Some(format!("the RAM file of block {} was truncated to {} bytes", block.name, now.len()))
            }
            // What cannot be asked is not known to be gone.
            _ => None,
        }
    })
}

impl Driver {
    pub(super) fn lend(&mut self, lent: Lent) {
        self.stop_lending();
        let served = Served::new(
            lent.domain,
            Arc::clone(&lent.memory),
            Arc::clone(&self.lending_counters),
            Rights::REMOTE_READ,
            lent.registration_workers,
            lent.answer,
        );
        self.lending = Some(Lending { links: lent.links, served, memory: lent.memory });
    }

    pub(super) fn register_for_reading(&mut self, windows: Vec<Window>, place: &Place) {
        let Some(lending) = &self.lending else { return };
        if let Err(why) = lending.served.register(windows, Some(place)) {
            let message = format!("the destination's order was refused: {why}");
            self.feed(SourceEvent::Failed(Failure::new(Reason::PeerRefused, message)));
        }
    }

    /// Tells of links that broke, and of RAM that is gone.
    pub(super) fn look_at_lending(&mut self) {
        let Some(lending) = &mut self.lending else { return };
        let broken = (lending.links)();
        let why = match (cut_off(&lending.memory), &broken) {
            (Some(why), _) => Some(why),
            (None, Some(error @ LinkError::LocalMemory)) => Some(error.to_string()),
            (None, _) => None,
        };
        if let Some(why) = why {
            let message = format!("the source's RAM cannot be read any more: {why}");
            self.stop_lending();
            return self.feed(SourceEvent::MemoryLost(Failure::new(Reason::GuestFailed, message)));
        }
        if let Some(error) = broken {
            self.stop_lending();
            let message = format!("a link that the destination reads by is lost: {error}");
            self.feed(SourceEvent::Failed(Failure::new(Reason::LinkLost, message)));
        }
    }

    pub(super) fn stop_lending(&mut self) {
        if let Some(lending) = self.lending.take() {
            lending.served.close();
        }
    }
}
