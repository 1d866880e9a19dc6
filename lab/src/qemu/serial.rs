//! The guest's serial line: every line it prints, with the moment it arrived.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Longer ones are cut.
const MAX_LINE_BYTES: usize = 4096;

/// One line of the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When its last byte arrived.
    pub at: Instant,
    /// Without the end of line.
    pub text: String,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<Line>,
    partial: Vec<u8>,
    connection: Option<UnixStream>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    /// A reader that panicked leaves complete lines behind, which stay readable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(super) struct Serial {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    /// Connected to and closed on drop when QEMU never came.
    path: std::path::PathBuf,
}

impl Serial {
    /// Listens on `path` before QEMU starts, so that nothing it prints is missed.
    pub(super) fn listen(path: &Path) -> Result<Serial> {
        let listener = UnixListener::bind(path).with_context(|| format!("cannot bind {}", path.display()))?;
        let shared = Arc::new(Shared::default());
        let reader = thread::Builder::new()
            .name("serial".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || {
                    // One guest, one connection; it ends when QEMU does.
                    if let Ok((connection, _)) = listener.accept() {
                        read_all(connection, &shared);
                    }
                    shared.lock().closed = true;
                    shared.changed.notify_all();
                }
            })
            .context("cannot start a thread")?;
        Ok(Serial { shared, reader: Some(reader), path: path.to_owned() })
    }

    pub(super) fn lines(&self) -> Vec<Line> {
        self.shared.lock().lines.clone()
    }

    /// What came after the last end of line.
    pub(super) fn partial(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().partial).into_owned()
    }

    pub(super) fn count(&self) -> usize {
        self.shared.lock().lines.len()
    }

    /// The first line from number `from` on for which `wanted` gives a value.
    pub(super) fn wait<T>(
        &self,
        from: usize,
        timeout: Duration,
        mut wanted: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        let mut next = from;
        let mut state = self.shared.lock();
        loop {
            while next < state.lines.len() {
                if let Some(value) = wanted(&state.lines[next]) {
                    return Ok(value);
                }
                next += 1;
            }
            let last = || {
                state.lines.iter().rev().take(5).rev().map(|line| &*line.text).collect::<Vec<_>>().join("\n")
            };
            if state.closed {
                bail!("the guest's serial line closed; its last lines:\n{}", last());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the guest did not print it in {timeout:?}; its last lines:\n{}", last());
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn send(&self, bytes: &[u8]) -> Result<()> {
        let state = self.shared.lock();
        let mut connection = state.connection.as_ref().context("QEMU has not connected its serial line")?;
        connection.write_all(bytes).context("cannot write to the guest's serial line")
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        let connected = self.shared.lock().connection.take();
        match connected {
            Some(connection) => drop(connection.shutdown(std::net::Shutdown::Both)),
            // Wakes a reader that still waits for QEMU to connect.
            None => drop(UnixStream::connect(&self.path)),
        }
        if let Some(reader) = self.reader.take() {
            // It has nothing to report that its lines do not show.
            let _ = reader.join();
        }
    }
}

fn read_all(mut connection: UnixStream, shared: &Shared) {
    shared.lock().connection = connection.try_clone().ok();
    shared.changed.notify_all();
    let mut buffer = [0; 4096];
    loop {
        let length = match connection.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let at = Instant::now();
        let mut state = shared.lock();
        for &byte in &buffer[..length] {
            match byte {
                b'\n' => {
                    let bytes = std::mem::take(&mut state.partial);
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    state.lines.push(Line { at, text });
                }
                b'\r' => {}
                _ if state.partial.len() < MAX_LINE_BYTES => state.partial.push(byte),
                _ => {}
            }
        }
        drop(state);
        shared.changed.notify_all();
    }
}
