//! What both trackers have in common: the files, the processes that write to
//! them, and what becomes of their mappings.
//!
//! Whatever a mechanism cannot vouch for is reported as written: all pages of a
//! mapping that appeared, moved, was replaced or is gone, of a process that
//! ended, and of an operation that failed half-way.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::thread;
use std::time::{Duration, Instant};

use ramferry_ram::{BlockIndex, PageRun, PageSet, PageSets};

use crate::error::{TrackError, WriterError};
use crate::holders::HolderSearch;
use crate::maps::{self, MapsError, Vma};
use crate::process;
use crate::segments::{Segment, segments};
use crate::watch::FileWatch;
use crate::writers::{Mapper, check_files, check_guest_maps, find_mappers};
use crate::{Harvest, TrackedFile, Tracker, TrackerKind};

/// Looks for further writers while arming, until a look finds none.
const MAX_ARM_LOOKS: u32 = 8;
/// Tries to cover a process's mappings while they change.
const MAX_COVER_TRIES: u32 = 4;
/// How long a child made with `vfork` may keep its parent's address space.
const VFORK_PATIENCE: Duration = Duration::from_millis(200);
const VFORK_POLL: Duration = Duration::from_millis(5);

/// One process as `/proc` shows it; bound to the address space it has now, so
/// that after an `execve` it has no mappings.
pub(crate) struct View {
    pub(crate) pid: u32,
    maps: File,
    pub(crate) pagemap: File,
}

impl View {
    fn open(pid: u32) -> Result<Self, WriterError> {
        let open = |operation, name: &str| {
            File::open(format!("/proc/{pid}/{name}")).map_err(|source| match source.raw_os_error() {
                Some(libc::ENOENT | libc::ESRCH) => WriterError::Ended,
                _ => WriterError::Failed { operation, source },
            })
        };
        Ok(Self {
            pid,
            maps: open("opening its list of mappings", "maps")?,
            pagemap: open("opening its page map", "pagemap")?,
        })
    }

    /// Its mappings now; none when it ended.
    pub(crate) fn vmas(&self) -> Result<Vec<Vma>, WriterError> {
        (&self.maps)
            .seek(SeekFrom::Start(0))
            .map_err(|source| WriterError::Failed { operation: "reading its mappings", source })?;
        match maps::read_vmas(self.pid, &self.maps) {
            Err(MapsError::NoProcess { .. }) => Ok(Vec::new()),
            vmas => vmas.map_err(WriterError::Maps),
        }
    }
}

/// What a harvest makes of the pages that it reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Afterwards {
    /// Only one that is written again is reported again.
    Rearm,
    /// They stay as they are: cheaper, and the next harvest reports them once more.
    Leave,
}

/// What a harvest saw of a process.
pub(crate) struct Seen {
    /// Its mappings, read after the written pages were, or while it was stopped.
    pub(crate) vmas: Vec<Vma>,
    /// Segments of which it cannot be told which pages were written.
    pub(crate) lost: Vec<Segment>,
}

/// A way to learn which pages of one process were written.
pub(crate) trait Mechanism: Sized + Send {
    const KIND: TrackerKind;
    /// Whether it also sees the writes of another process in the same address space.
    const SEES_ADDRESS_SPACE: bool;

    /// Prepares to track a process.
    fn attach(view: &View, files: &[TrackedFile]) -> Result<Self, WriterError>;

    /// Begins to track `segment`: pages written after this returned MUST be
    /// reported by the next harvest. May be repeated.
    fn cover(&mut self, view: &View, segment: &Segment, file: &TrackedFile) -> Result<(), WriterError>;

    /// Adds to `written` every page of `segments` that was written since the
    /// previous harvest, and tells of which segments it cannot say.
    fn harvest(
        &mut self,
        view: &View,
        segments: &[Segment],
        files: &[TrackedFile],
        afterwards: Afterwards,
        written: &mut [PageSet],
    ) -> Result<Seen, WriterError>;
}

/// A process that is tracked.
struct Tracked<M> {
    view: View,
    comm: String,
    segments: Vec<Segment>,
    /// Files of which a mapping went since this was last taken.
    gone: Vec<usize>,
    mechanism: M,
}

impl<M: Mechanism> Tracked<M> {
    fn new(pid: u32, files: &[TrackedFile], pending: &mut [PageSet]) -> Result<Self, WriterError> {
        let view = View::open(pid)?;
        let mechanism = M::attach(&view, files)?;
        let comm = process::comm_of(pid);
        let mut tracked = Self { view, comm, segments: Vec::new(), gone: Vec::new(), mechanism };
        let vmas = tracked.view.vmas()?;
        tracked.cover_all(segments(&vmas, files), &[], files, pending)?;
        Ok(tracked)
    }

    fn pid(&self) -> u32 {
        self.view.pid
    }

    /// Adds what was written; `WriterError::Ended` when the process ended, with
    /// everything that it could have written added.
    fn harvest(
        &mut self,
        files: &[TrackedFile],
        afterwards: Afterwards,
        pending: &mut [PageSet],
    ) -> Result<(), WriterError> {
        let seen = self.mechanism.harvest(&self.view, &self.segments, files, afterwards, pending);
        let result = seen.and_then(|Seen { vmas, lost }| {
            let current = segments(&vmas, files);
            if vmas.is_empty() {
                return Err(WriterError::Ended);
            }
            if current != self.segments || !lost.is_empty() {
                self.cover_all(current, &lost, files, pending)?;
            }
            Ok(())
        });
        if result.is_err() {
            self.add_everything(files, pending);
        }
        result
    }

    /// Covers `current` in place of the segments covered until now, and reports
    /// all pages of those that are gone, new, or `lost`.
    fn cover_all(
        &mut self,
        mut current: Vec<Segment>,
        lost: &[Segment],
        files: &[TrackedFile],
        pending: &mut [PageSet],
    ) -> Result<(), WriterError> {
        let known =
            |covered: &[Segment], segment: &Segment| covered.contains(segment) && !lost.contains(segment);
        for segment in self.segments.iter().filter(|segment| !known(&current, segment)) {
            segment.add_to(files, pending);
            self.gone.push(segment.file);
        }
        for _ in 0..MAX_COVER_TRIES {
            let mut failed = None;
            for segment in current.iter().filter(|segment| !known(&self.segments, segment)) {
                segment.add_to(files, pending);
                if let Err(error) = self.mechanism.cover(&self.view, segment, &files[segment.file]) {
                    failed = Some(error);
                    break;
                }
            }
            let Some(error) = failed else {
                self.segments = current;
                return Ok(());
            };
            // The mapping may have gone before it was covered.
            let vmas = self.view.vmas()?;
            let again = segments(&vmas, files);
            if vmas.is_empty() {
                return Err(WriterError::Ended);
            }
            if again == current {
                return Err(error);
            }
            current = again;
        }
        Err(WriterError::Failed {
            operation: "following its mappings, which keep changing,",
            source: std::io::ErrorKind::TimedOut.into(),
        })
    }

    fn add_everything(&self, files: &[TrackedFile], pending: &mut [PageSet]) {
        for segment in &self.segments {
            segment.add_to(files, pending);
        }
    }
}

/// Tracks every process that writes to a guest's RAM files with one mechanism.
pub(crate) struct FileTracker<M> {
    guest: u32,
    files: Vec<TrackedFile>,
    processes: Vec<Tracked<M>>,
    /// Whether there ever was a process beside the guest.
    has_others: bool,
    /// None for a tracker of the guest alone.
    watch: Option<FileWatch>,
    holders: HolderSearch,
    /// Whether a file was opened since every process was last looked at.
    opened: bool,
    /// Files that a tracked process may close: one beside the guest, or a mapping that went.
    may_close: Vec<bool>,
    /// Written pages not yet handed out: they outlive a harvest that failed.
    pending: Vec<PageSet>,
}

impl<M: Mechanism> FileTracker<M> {
    /// Tracks `guest` and every other process that writes to `files`.
    pub(crate) fn arm(guest: u32, files: &[TrackedFile]) -> Result<Self, TrackError> {
        check_files(files)?;
        check_guest_maps(guest, files)?;
        // Before anybody is looked for: who comes after that look leaves an event.
        let watch = FileWatch::new(guest, files)?;
        let mut tracker = Self { watch: Some(watch), ..Self::of_guest(guest, files)? };
        for _ in 0..MAX_ARM_LOOKS {
            let Some(last) = tracker.adopt_new_writers()? else {
                tracker.settle_arming()?;
                return Ok(tracker);
            };
            if !tracker.processes.iter().any(|process| process.pid() == last) {
                continue;
            }
            tracing::debug!(pid = last, kind = M::KIND.as_str(), "another process writes to the guest's RAM");
        }
        let last = tracker.processes.last().map_or(guest, Tracked::pid);
        Err(TrackError::Unsettled { pid: last, comm: process::comm_of(last) })
    }

    /// Tracks `guest` alone.
    pub(crate) fn of_guest(guest: u32, files: &[TrackedFile]) -> Result<Self, TrackError> {
        let mut pending: Vec<PageSet> = files.iter().map(|file| PageSet::new(file.pages)).collect();
        let tracked =
            Tracked::new(guest, files, &mut pending).map_err(|source| failed(guest, guest, source))?;
        pending.iter_mut().for_each(PageSet::clear);
        Ok(Self {
            guest,
            files: files.to_vec(),
            processes: vec![tracked],
            has_others: false,
            watch: None,
            holders: HolderSearch::default(),
            opened: false,
            may_close: vec![false; files.len()],
            pending,
        })
    }

    /// What happened until now was before anything is read of the files.
    fn settle_arming(&mut self) -> Result<(), TrackError> {
        self.refuse_holders(true)?;
        if let Some(watch) = &mut self.watch {
            self.opened = watch.look()?.iter().any(|file| file.opened);
        }
        self.pending.iter_mut().for_each(PageSet::clear);
        Ok(())
    }

    fn refuse_holders(&mut self, all: bool) -> Result<(), TrackError> {
        let known: Vec<u32> = self.processes.iter().map(Tracked::pid).collect();
        self.holders.refuse(&self.files, &known, all)
    }

    /// Reports all of a file whose closing is a tracked process' perhaps; refuses any other change to a file itself.
    fn note_activity(&mut self, may_be_tracked: bool) -> Result<(), TrackError> {
        let Some(watch) = &mut self.watch else { return Ok(()) };
        for ((index, seen), block) in watch.look()?.into_iter().enumerate().zip((0..).map(BlockIndex)) {
            self.opened |= seen.opened;
            if seen.modified {
                return Err(TrackError::Modified { block });
            }
            if seen.closed && !(may_be_tracked && self.may_close[index]) {
                return Err(TrackError::UnseenWriter { block });
            }
            if seen.closed {
                self.pending[index].insert_run(PageRun { first: 0, count: self.files[index].pages });
            }
        }
        Ok(())
    }

    /// Refuses any process beside the guest that wrote since the last harvest, or ended.
    fn confirm_others(&mut self) -> Result<(), TrackError> {
        let mut written: Vec<PageSet> = self.files.iter().map(|file| PageSet::new(file.pages)).collect();
        for process in self.processes.iter_mut().filter(|process| process.pid() != self.guest) {
            let harvested = process.harvest(&self.files, Afterwards::Rearm, &mut written);
            if harvested.is_err() || written.iter().any(|set| !set.is_empty()) {
                return Err(TrackError::WroteLate { pid: process.pid(), comm: process.comm.clone() });
            }
        }
        Ok(())
    }

    /// Adds what was written to `pending`. What processes beside the guest wrote is rearmed in any case: what
    /// [`confirm_others`](Self::confirm_others) finds was written since.
    fn collect(&mut self, guests: Afterwards) -> Result<(), TrackError> {
        let mut ended = Vec::new();
        for process in &mut self.processes {
            let pid = process.pid();
            let afterwards = if pid == self.guest { guests } else { Afterwards::Rearm };
            let harvested = process.harvest(&self.files, afterwards, &mut self.pending);
            process.gone.drain(..).for_each(|file| self.may_close[file] = true);
            match harvested {
                Ok(()) => {}
                Err(WriterError::Ended) if pid != self.guest => ended.push(pid),
                Err(WriterError::Ended) => return Err(TrackError::GuestEnded { pid }),
                Err(source) => {
                    return Err(TrackError::Writer { pid, comm: process.comm.clone(), source });
                }
            }
        }
        self.processes.retain(|process| !ended.contains(&process.pid()));
        Ok(())
    }

    /// Tracks processes that are not tracked yet, reports all pages of the files
    /// they map, and tells one of them, if there was any.
    fn adopt_new_writers(&mut self) -> Result<Option<u32>, TrackError> {
        let known: Vec<u32> = self.processes.iter().map(Tracked::pid).collect();
        let mut last = None;
        for Mapper { pid, segments } in find_mappers(&self.files, &known)? {
            let relative = known.iter().find(|known| process::share_address_space(**known, pid));
            if let Some(&relative) = relative {
                self.await_separation(relative, pid)?;
                continue;
            }
            for segment in &segments {
                self.may_close[segment.file] = true;
                let count = self.files[segment.file].pages;
                self.pending[segment.file].insert_run(PageRun { first: 0, count });
            }
            last = Some(pid);
            self.has_others = true;
            match Tracked::new(pid, &self.files, &mut self.pending) {
                Ok(tracked) => self.processes.push(tracked),
                Err(WriterError::Ended) => {}
                // It may have unmapped the file, or become another program.
                Err(_) if !still_maps(pid, &self.files) => {}
                Err(source) => return Err(failed(self.guest, pid, source)),
            }
        }
        Ok(last)
    }

    /// The guest stands still: whoever writes now does so too late.
    fn refuse_new_writers(&mut self) -> Result<(), TrackError> {
        match self.adopt_new_writers()? {
            Some(pid) => Err(TrackError::WroteLate { pid, comm: process::comm_of(pid) }),
            None => Ok(()),
        }
    }

    /// Two processes in one address space are a `vfork` on its way to `execve`,
    /// or one that stays so and is tracked only by who sees the address space.
    fn await_separation(&self, tracked: u32, other: u32) -> Result<(), TrackError> {
        if M::SEES_ADDRESS_SPACE {
            return Ok(());
        }
        let deadline = Instant::now() + VFORK_PATIENCE;
        while process::share_address_space(tracked, other) {
            if Instant::now() >= deadline {
                let source = WriterError::SharedAddressSpace { with: other };
                return Err(TrackError::Writer { pid: tracked, comm: process::comm_of(tracked), source });
            }
            thread::sleep(VFORK_POLL);
        }
        Ok(())
    }

    fn harvest_and(&mut self, guests: Afterwards, written: &mut PageSets) -> Result<Harvest, TrackError> {
        let start = Instant::now();
        self.check_sets(written)?;
        self.collect(guests)?;
        self.note_activity(true)?;
        let written_pages = self.hand_out(written);
        Ok(Harvest { written_pages, elapsed: start.elapsed() })
    }

    fn check_sets(&self, written: &PageSets) -> Result<(), TrackError> {
        let same = written.iter().count() == self.files.len()
            && written.iter().zip(&self.files).all(|((block, set), file)| {
                set.pages() == file.pages && written.page_bytes(block) == file.page_bytes
            });
        if same { Ok(()) } else { Err(TrackError::WrongPageSets) }
    }

    /// Moves what is pending to `written`, and counts it.
    fn hand_out(&mut self, written: &mut PageSets) -> u64 {
        let mut pages = 0;
        for (set, block) in self.pending.iter_mut().zip((0..).map(BlockIndex)) {
            pages += set.count();
            written.block_mut(block).union_with(set);
            set.clear();
        }
        pages
    }
}

impl<M: Mechanism> Tracker for FileTracker<M> {
    fn kind(&self) -> TrackerKind {
        M::KIND
    }

    fn harvest(&mut self, written: &mut PageSets) -> Result<Harvest, TrackError> {
        self.harvest_and(Afterwards::Rearm, written)
    }

    fn harvest_last(&mut self, written: &mut PageSets) -> Result<Harvest, TrackError> {
        self.harvest_and(Afterwards::Leave, written)
    }

    fn has_other_writers(&self) -> bool {
        self.has_others
    }

    fn recheck(&mut self, written: &mut PageSets) -> Result<(), TrackError> {
        self.check_sets(written)?;
        // Whoever opens a file from here on is looked for the next time.
        let opened = self.note_activity(true).map(|()| std::mem::take(&mut self.opened))?;
        let mut adopted = self.adopt_new_writers()?;
        self.refuse_holders(opened)?;
        if opened {
            // What was neither mapped at the one look nor open at the other was mapped in between.
            adopted = self.adopt_new_writers()?.or(adopted);
        }
        if let Some(pid) = adopted {
            tracing::info!(pid, kind = M::KIND.as_str(), "a new process writes to the guest's RAM");
        }
        self.hand_out(written);
        Ok(())
    }

    fn confirm(&mut self) -> Result<(), TrackError> {
        self.confirm_others()?;
        self.note_activity(false)?;
        if std::mem::take(&mut self.opened) {
            self.refuse_new_writers()?;
            self.refuse_holders(true)?;
            self.refuse_new_writers()?;
            self.note_activity(false)?;
        }
        Ok(())
    }
}

fn still_maps(pid: u32, files: &[TrackedFile]) -> bool {
    maps::vmas_of(pid).is_ok_and(|vmas| !segments(&vmas, files).is_empty())
}

fn failed(guest: u32, pid: u32, source: WriterError) -> TrackError {
    match source {
        WriterError::Ended if pid == guest => TrackError::GuestEnded { pid },
        source => TrackError::Writer { pid, comm: process::comm_of(pid), source },
    }
}
