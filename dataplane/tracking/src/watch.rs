//! What is done to the RAM files themselves, whoever does it: told by inotify.
//!
//! A look at who has a file mapped sees only who has it then. Between two looks a process may open the file,
//! write to it, and be gone; it leaves an event behind. The kernel does not tell whose it was.
//!
//! Not told: what is done through a descriptor that somebody was handed (its last close is the VMM's), and
//! `write(2)` through the very descriptor that `memfd_create` returned.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};

use ramferry_ram::{BlockIndex, FileIdentity};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::TrackedFile;
use crate::error::TrackError;

/// Events of one `read`; there are few.
const BUFFER_BYTES: usize = 4096;

/// What was done to one file since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Activity {
    /// Somebody opened it.
    pub(crate) opened: bool,
    /// Its last mapping or descriptor of an opening for writing went.
    pub(crate) closed: bool,
    /// It was written, truncated or punched, not through a mapping.
    pub(crate) modified: bool,
}

#[derive(Debug)]
pub(crate) struct FileWatch {
    inotify: OwnedFd,
    /// Of each file.
    watches: Vec<i32>,
}

impl FileWatch {
    /// Watches `files`, of which `guest` has each mapped.
    pub(crate) fn new(guest: u32, files: &[TrackedFile]) -> Result<Self, TrackError> {
        let failed = |block, source: Errno| TrackError::Watch { block, source: source.into() };
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .map_err(|errno| failed(BlockIndex(0), errno))?;
        let mut watches = Vec::new();
        for (file, block) in files.iter().zip((0..).map(BlockIndex)) {
            let found = find(guest, file.identity).ok_or_else(|| failed(block, Errno::NOENT))?;
            let path = format!("/proc/self/fd/{}", found.as_raw_fd());
            let events = WatchFlags::OPEN | WatchFlags::CLOSE_WRITE | WatchFlags::MODIFY;
            watches.push(inotify::add_watch(&inotify, path, events).map_err(|errno| failed(block, errno))?);
        }
        Ok(Self { inotify, watches })
    }

    /// What was done to each file since the last look.
    pub(crate) fn look(&mut self) -> Result<Vec<Activity>, TrackError> {
        let mut seen = vec![Activity::default(); self.watches.len()];
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(seen),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(TrackError::Watch { block: BlockIndex(0), source: errno.into() }),
            };
            let flags = event.events();
            if flags.intersects(ReadFlags::QUEUE_OVERFLOW) {
                seen.fill(Activity { opened: true, closed: true, modified: true });
            }
            let Some(file) = self.watches.iter().position(|watch| *watch == event.wd()) else { continue };
            seen[file].opened |= flags.intersects(ReadFlags::OPEN);
            seen[file].closed |= flags.intersects(ReadFlags::CLOSE_WRITE);
            seen[file].modified |= flags.intersects(ReadFlags::MODIFY);
        }
    }
}

/// The file, without opening it: by a descriptor of ours or the guest's, or by the guest's mapping of it, which takes
/// a capability.
fn find(guest: u32, identity: FileIdentity) -> Option<OwnedFd> {
    ["/proc/self/fd".to_owned(), format!("/proc/{guest}/fd"), format!("/proc/{guest}/map_files")]
        .into_iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flatten()
        .filter_map(|entry| {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let file = rustix::fs::open(entry.ok()?.path(), flags, Mode::empty()).ok()?;
            let stat = rustix::fs::fstat(&file).ok()?;
            (FileIdentity { device: stat.st_dev, inode: stat.st_ino } == identity).then_some(file)
        })
        .next()
}
