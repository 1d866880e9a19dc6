//! What all copying threads do at once for a source's driver, and what it tells
//! the engine of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ramferry_engine::SourceEvent;
use ramferry_ram::Memory;

use super::{Driver, SourceInput};
use crate::copy::Pass;
use crate::recheck::Recheck;
use crate::worker::Job;
use crate::{Counted, MoverError};

pub(super) struct RunningJob {
    started: Instant,
    waiting: usize,
    kind: JobKind,
    failed: bool,
}

pub(super) enum JobKind {
    Copy { pass: Arc<Pass>, before: Box<Counted> },
    Recheck(Arc<Recheck>),
    Fence,
}

impl RunningJob {
    pub(super) fn stop(&self) {
        match &self.kind {
            JobKind::Copy { pass, .. } => pass.stop(),
            JobKind::Recheck(recheck) => recheck.stop(),
            JobKind::Fence => {}
        }
    }
}

impl Driver {
    pub(super) fn start_job(&mut self, kind: JobKind, job: impl Fn() -> Job) {
        let Some(plane) = &self.plane else {
            return;
        };
        assert!(self.job.is_none(), "the engine orders one job at a time");
        self.job =
            Some(RunningJob { started: Instant::now(), waiting: plane.workers.len(), kind, failed: false });
        for (jobs, _) in &plane.workers {
            if jobs.send(job()).is_err() {
                self.handle.send(SourceInput::JobDone(Err(MoverError::ThreadEnded)));
            }
        }
    }

    pub(super) fn job_done(&mut self, result: &Result<(), MoverError>) {
        let Some(job) = &mut self.job else {
            return;
        };
        job.waiting -= 1;
        let failed_before = job.failed;
        job.failed |= result.is_err();
        if result.is_err() {
            job.stop();
        }
        let done = if job.waiting == 0 { self.job.take() } else { None };
        if let (Err(error), false) = (result, failed_before) {
            self.fail(error);
        }
        match done {
            Some(job) if job.failed => self.report_broken_off(&job),
            Some(job) => self.report(&job),
            None => {}
        }
    }

    /// What failed has ended all the same.
    fn report_broken_off(&mut self, job: &RunningJob) {
        let Some(plane) = &self.plane else {
            return;
        };
        let elapsed = job.started.elapsed();
        let event = match &job.kind {
            JobKind::Fence => return,
            JobKind::Recheck(recheck) => rechecked(recheck, &plane.memory, elapsed),
            JobKind::Copy { .. } => {
                let unsent = plane.copy.take_unsent();
                SourceEvent::Copied { data_bytes: 0, zero_bytes: 0, elapsed, complete: false, unsent }
            }
        };
        self.feed(event);
    }

    fn report(&mut self, job: &RunningJob) {
        let elapsed = job.started.elapsed();
        let Some(plane) = &self.plane else {
            return;
        };
        if let Err(error) = plane.memory.check() {
            self.fail(&error.into());
            return self.report_broken_off(job);
        }
        let event = match &job.kind {
            JobKind::Fence => SourceEvent::Fenced { elapsed },
            JobKind::Recheck(recheck) => rechecked(recheck, &plane.memory, elapsed),
            JobKind::Copy { before, .. } => {
                let after = plane.copy.counters.read();
                let unsent = plane.copy.take_unsent();
                SourceEvent::Copied {
                    data_bytes: after.data_bytes - before.data_bytes,
                    zero_bytes: after.zero_bytes - before.zero_bytes,
                    elapsed,
                    complete: unsent.is_empty(),
                    unsent,
                }
            }
        };
        self.feed(event);
    }
}

fn rechecked(recheck: &Recheck, memory: &Memory, elapsed: Duration) -> SourceEvent {
    SourceEvent::Rechecked {
        differing: recheck.take_differing(memory.layout()),
        checked_bytes: recheck.checked_bytes(),
        elapsed,
    }
}
