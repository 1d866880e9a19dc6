//! What a source's driver copies with: made when the migration is prepared, taken
//! down when it lets go of the guest's memory.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use ramferry_engine::{LateWrites, SourceEvent};
use ramferry_fabric::windows::Windows;
use ramferry_ram::{Memory, PageSets};
use ramferry_tracking::Tracker;

use super::{Driver, SourceInput, SourceParts};
use crate::copy::Copy;
use crate::recheck::Notes;
use crate::worker::{Job, Worker};
use crate::{MoverError, wait_until_gone};

/// Everything that [`SourceAction::Release`] takes down, in this order.
pub(super) struct Plane {
    pub(super) workers: Vec<(Sender<Job>, JoinHandle<()>)>,
    pub(super) copy: Arc<Copy>,
    pub(super) tracker: Box<dyn Tracker>,
    pub(super) memory: Arc<Memory>,
    /// Pages that were holes at the source when the tracker was armed.
    pub(super) holes: Option<PageSets>,
    /// Those of them that were never sent since.
    pub(super) unsent_holes: PageSets,
}

impl Driver {
    pub(super) fn set_up(&mut self, parts: SourceParts) -> Result<SourceEvent, MoverError> {
        let present = parts.memory.first_presence()?;
        let mut pages = PageSets::clone(&present);
        pages.union_with(&parts.destination_presence);
        let mut holes = parts.destination_presence.clone();
        holes.subtract(&present);
        self.sizes = (parts.memory.layout().total_bytes(), present.bytes());
        self.tracker_kind = Some(parts.tracker.kind());

        let handle = self.handle.clone();
        let copy = Copy::new(
            Arc::clone(&parts.memory),
            parts.domain,
            Windows::new(parts.windows, parts.memory.layout())?,
            parts.destination_presence,
            parts.order,
            parts.registration_workers,
            Box::new(move |error| handle.send(SourceInput::MemoryFailed(error))),
        );
        let cpus = parts.poller_cpus.unwrap_or_default();
        let workers = parts.links.into_iter().enumerate().map(|(index, link)| {
            let cpu = (!cpus.is_empty()).then(|| cpus[index % cpus.len()]);
            self.spawn_worker(index, Worker::new(link, Arc::clone(&copy)), cpu)
        });
        let workers = workers.collect::<Result<_, _>>()?;
        let others_write = parts.tracker.has_other_writers();
        self.plane = Some(Plane {
            workers,
            copy,
            tracker: parts.tracker,
            memory: parts.memory,
            unsent_holes: holes.clone(),
            holes: Some(holes),
        });
        self.expect_late_writes(parts.late_writes);
        if others_write {
            self.expect_late_writes(LateWrites::Undrainable);
        }
        Ok(SourceEvent::Prepared { pages, fixed: parts.fixed_costs })
    }

    fn spawn_worker(
        &self,
        index: usize,
        worker: Worker,
        cpu: Option<usize>,
    ) -> Result<(Sender<Job>, JoinHandle<()>), MoverError> {
        let (jobs, queue) = channel();
        let handle = self.handle.clone();
        let builder = thread::Builder::new().name(format!("copy-{index}"));
        let body = move || {
            let work = || {
                if let Some(cpu) = cpu {
                    pin_to(cpu);
                }
                worker.run(&queue, |result| handle.send(SourceInput::JobDone(result)));
            };
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                handle.send(SourceInput::MemoryFailed(MoverError::ThreadEnded));
            }
        };
        Ok((jobs, builder.spawn(body).map_err(MoverError::Thread)?))
    }

    /// Before the engine hears of the pages that may be filled late: each is noted when it is sent.
    pub(super) fn expect_late_writes(&mut self, late: LateWrites) {
        let Some(plane) = self.plane.as_ref().filter(|_| late > self.late_writes) else {
            return;
        };
        plane.copy.notes.get_or_init(|| Notes::new(plane.memory.layout()));
        self.late_writes = late;
        self.feed(SourceEvent::LateWrites(late));
    }

    pub(super) fn release(&mut self) {
        self.stop_lending();
        let Some(plane) = self.plane.take() else {
            return;
        };
        if let Some(job) = self.job.take() {
            job.stop();
        }
        self.counted = plane.copy.counters.read();
        self.recent = plane.copy.counters.take_recent();
        self.pinned_peak_bytes = plane.copy.pinned().2;
        plane.copy.close();
        let threads: Vec<_> = plane.workers.into_iter().map(|(_, thread)| thread).collect();
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a copying thread panicked");
            }
        }
        let memory = Arc::downgrade(&plane.memory);
        drop((plane.copy, plane.tracker, plane.memory));
        wait_until_gone(&memory);
    }
}

/// Pins the calling thread. A CPU that is not there is no reason to fail.
fn pin_to(cpu: usize) {
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        tracing::warn!(cpu, "there is no such CPU to pin a copying thread to");
        return;
    }
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::warn!(cpu, %error, "cannot pin a copying thread");
    }
}
