//! A disk that answers when a test lets it.
//!
//! A file of a file system of our own (FUSE). A read with `O_DIRECT` pins the reader's pages, as a read from
//! a real disk does, and the kernel fills them, behind the page tables, when we answer: at a time that a test chooses.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountFlags, mount};
use tempfile::TempDir;

const READER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/reader.img"));
const NAME: &str = "disk";
const NODE: u64 = 2;
const SIZE_BYTES: u64 = 2 << 20;
/// Reads from here on are held.
const HELD_FROM: u64 = 1 << 20;
/// What every word from there on holds.
const WORD: [u8; 2] = 0xa55a_u16.to_le_bytes();
const LONGEST_READ: u32 = 128 << 10;
/// Ample for any request that carries no data.
const REQUEST_BYTES: usize = 256 << 10;

const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const OPEN_DIRECT_IO: u32 = 1;
const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;

/// A disk of 2 MiB: a boot sector that reads one page from the second half, where every word is `0xa55a`. Reads of
/// that half wait until [`HeldDisk::release`].
#[derive(Debug)]
pub struct HeldDisk {
    state: Arc<State>,
    server: Option<JoinHandle<()>>,
    stop: Arc<UnixStream>,
    directory: TempDir,
}

#[derive(Debug, Default)]
struct State {
    held: Mutex<Held>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    released: bool,
    /// Requests that wait, as they came.
    reads: Vec<Vec<u8>>,
}

impl HeldDisk {
    /// Mounts the disk. The error says why a test that needs it must be skipped.
    pub fn mount() -> Result<HeldDisk, String> {
        let directory =
            tempfile::Builder::new().prefix("ramferry-disk-").tempdir().map_err(|e| e.to_string())?;
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let device = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/fuse");
        let device = device.map_err(|error| format!("/dev/fuse cannot be opened: {error}"))?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let options = std::ffi::CString::new(options).map_err(|error| error.to_string())?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        mount("ramferry", directory.path(), "fuse", flags, options.as_c_str())
            .map_err(|error| format!("FUSE cannot be mounted: {error}"))?;
        let (stop, stopped) = UnixStream::pair().map_err(|error| error.to_string())?;
        let state = Arc::new(State::default());
        let serving = Arc::clone(&state);
        let server = thread::spawn(move || serve(&device, &stopped, &serving));
        Ok(HeldDisk { state, server: Some(server), stop: Arc::new(stop), directory })
    }

    /// The file to be read, with `O_DIRECT`.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join(NAME)
    }

    /// Where reads are held, in bytes from the start.
    pub fn held_from(&self) -> u64 {
        HELD_FROM
    }

    /// Waits until a read is held; whether there was one in time.
    pub fn wait_held(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut held = self.state.lock();
        while held.reads.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            held = self.state.changed.wait_timeout(held, left).expect("no panic while it is held").0;
        }
        true
    }

    /// Lets every read be answered, those that are held at once.
    pub fn release(&self) {
        self.releaser().release();
    }

    /// What lets the reads be answered, from elsewhere.
    pub fn releaser(&self) -> Releaser {
        Releaser { state: Arc::clone(&self.state), wake: Arc::clone(&self.stop) }
    }
}

/// Lets the reads of a [`HeldDisk`] be answered.
#[derive(Debug)]
pub struct Releaser {
    state: Arc<State>,
    wake: Arc<UnixStream>,
}

impl Releaser {
    /// As [`HeldDisk::release`].
    pub fn release(&self) {
        self.state.lock().released = true;
        // The server looks when it is woken.
        let _ = (&*self.wake).write_all(b"r");
    }
}

impl Drop for HeldDisk {
    fn drop(&mut self) {
        self.release();
        let _ = Command::new("umount").arg("-l").arg(self.directory.path()).status();
        let _ = self.stop.shutdown(std::net::Shutdown::Both);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("no panic while it is held")
    }
}

/// Answers until the disk is dropped. Closing the device ends every request that is left.
fn serve(device: &File, stopped: &UnixStream, state: &State) {
    let mut request = vec![0; REQUEST_BYTES];
    loop {
        let mut ready = [PollFd::new(device, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        if poll(&mut ready, None).is_err() {
            continue;
        }
        let woken = !ready[1].revents().is_empty();
        if woken {
            if !matches!((&*stopped).read(&mut [0]), Ok(1)) {
                return;
            }
            let reads = std::mem::take(&mut state.lock().reads);
            reads.iter().for_each(|read| answer_read(device, read));
            continue;
        }
        match (&*device).read(&mut request) {
            Ok(length) if length >= IN_HEADER => handle(device, &request[..length], state),
            Ok(_) => return,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // A request that was given up before it was read.
            Err(error) if error.kind() == ErrorKind::NotFound || error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn handle(device: &File, request: &[u8], state: &State) {
    const LOOKUP: u32 = 1;
    const FORGET: u32 = 2;
    const GETATTR: u32 = 3;
    const OPEN: u32 = 14;
    const READ: u32 = 15;
    const RELEASE: u32 = 18;
    const FLUSH: u32 = 25;
    const INIT: u32 = 26;
    const INTERRUPT: u32 = 36;
    const BATCH_FORGET: u32 = 42;
    match number::<u32>(request, 4) {
        INIT => answer(device, request, Ok(&init())),
        LOOKUP if request[IN_HEADER..].strip_suffix(&[0]) == Some(NAME.as_bytes()) => {
            let mut entry = Vec::new();
            [NODE, 0, 1, 1, 0].iter().for_each(|field: &u64| entry.extend(field.to_ne_bytes()));
            entry.extend(attributes(NODE));
            answer(device, request, Ok(&entry));
        }
        LOOKUP => answer(device, request, Err(ENOENT)),
        GETATTR => {
            let mut found = Vec::new();
            [1, 0].iter().for_each(|field: &u64| found.extend(field.to_ne_bytes()));
            found.extend(attributes(number(request, 16)));
            answer(device, request, Ok(&found));
        }
        OPEN => {
            let mut opened = vec![0; 8];
            [OPEN_DIRECT_IO, 0].iter().for_each(|field| opened.extend(field.to_ne_bytes()));
            answer(device, request, Ok(&opened));
        }
        READ => {
            let mut held = state.lock();
            if held.released || number::<u64>(request, IN_HEADER + 8) < HELD_FROM {
                answer_read(device, request);
            } else {
                held.reads.push(request.to_vec());
                state.changed.notify_all();
            }
        }
        RELEASE | FLUSH => answer(device, request, Ok(&[])),
        // These are not answered; a read that is interrupted goes on.
        FORGET | BATCH_FORGET | INTERRUPT => {}
        _ => answer(device, request, Err(ENOSYS)),
    }
}

fn answer_read(device: &File, request: &[u8]) {
    let offset = number::<u64>(request, IN_HEADER + 8);
    let end = (offset + u64::from(number::<u32>(request, IN_HEADER + 16))).min(SIZE_BYTES);
    let byte = |at: u64| match at {
        ..HELD_FROM => READER.get(at as usize).copied().unwrap_or(0),
        _ => WORD[(at % 2) as usize],
    };
    let bytes: Vec<u8> = (offset..end.max(offset)).map(byte).collect();
    answer(device, request, Ok(&bytes));
}

fn answer(device: &File, request: &[u8], result: Result<&[u8], i32>) {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(errno) => (-errno, &[][..]),
    };
    let mut reply = Vec::with_capacity(OUT_HEADER + body.len());
    reply.extend(u32::try_from(OUT_HEADER + body.len()).expect("a short answer").to_ne_bytes());
    reply.extend(error.to_ne_bytes());
    reply.extend(&request[8..16]);
    reply.extend(body);
    // Who asked may have been killed.
    let _ = (&*device).write_all(&reply);
}

/// `fuse_init_out` of 7.31.
fn init() -> Vec<u8> {
    let mut out = Vec::new();
    for field in [7, 31, 0, 0, 0, LONGEST_READ, 1] {
        out.extend(field.to_ne_bytes());
    }
    out.resize(64, 0);
    out
}

/// `fuse_attr`: the disk, or the directory that holds it.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size): (u32, u64) = if node == NODE { (0o100_644, SIZE_BYTES) } else { (0o040_755, 0) };
    let mut out = Vec::new();
    for field in [node, size, size / 512, 0, 0, 0] {
        out.extend(field.to_ne_bytes());
    }
    for field in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        out.extend(field.to_ne_bytes());
    }
    out
}

fn number<T: Number>(bytes: &[u8], at: usize) -> T {
    T::read(&bytes[at..])
}

trait Number {
    fn read(bytes: &[u8]) -> Self;
}

impl Number for u32 {
    fn read(bytes: &[u8]) -> Self {
        u32::from_ne_bytes(bytes[..4].try_into().expect("four bytes"))
    }
}

impl Number for u64 {
    fn read(bytes: &[u8]) -> Self {
        u64::from_ne_bytes(bytes[..8].try_into().expect("eight bytes"))
    }
}
