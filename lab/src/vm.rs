//! A VM with Debian's kernel, and with it a real RDMA stack, that runs one command over this host's file system.
//!
//! QEMU boots the kernel with a small initramfs, which mounts the host's `/`, read-only, under an overlay in memory and
//! starts `ramferry-lab inside` there (`inside.rs`). That process runs the command and sends what it prints and how it
//! ended over one line (`wire.rs`). QEMU dies with this process, whatever ends it.

mod console;
pub(crate) mod job;
mod kernel;
mod machine;
pub(crate) mod wire;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::qemu::keeper;
use console::Console;
use job::{Job, Session};
pub use kernel::Kernel;
use wire::{FAREWELL, Frame, Stream};

/// How long a VM may take to power off after its last word; then it is killed.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(10);
const POWER_OFF_POLL: Duration = Duration::from_millis(5);

/// A VM to run a command in.
#[derive(Clone, Debug)]
pub struct Vm {
    /// What it boots.
    pub kernel: Kernel,
    /// The `ramferry-lab` binary: the VM's first process.
    pub binary: PathBuf,
    /// Virtual processors.
    pub processors: u32,
    /// Its clock counts instructions, a nanosecond each, whatever the host does: the same work always takes the same time. Processors
    /// take turns then.
    pub steady_clock: bool,
    /// Its memory; what is written to files takes some of it.
    pub memory_mib: u64,
    /// For all of it, from the boot to the end of the command.
    pub timeout: Duration,
    /// A directory of the host's that the VM may write to.
    pub out: Option<PathBuf>,
    /// Shows what its kernel says, on standard error.
    pub shows_console: bool,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The command ended with that status.
    Exited(i32),
    /// That signal killed the command.
    Killed(i32),
    /// The command could not be started.
    NotStarted(String),
    /// It was not done in time.
    TimedOut,
    /// [`Interrupt::raise`] was called with that signal.
    Interrupted(i32),
    /// The VM ended, and not because the command did.
    Died(Death),
}

/// What is known of a VM that ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Whether the command had been started.
    pub booted: bool,
    /// What QEMU said.
    pub qemu: String,
    /// The last lines of the kernel's.
    pub console: String,
}

impl Death {
    /// Whether the kernel gave up.
    pub fn is_panic(&self) -> bool {
        self.console.contains("Kernel panic")
    }
}

/// Ends a run from another thread.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<Mutex<Interruptible>>);

#[derive(Debug, Default)]
struct Interruptible {
    signal: Option<i32>,
    line: Option<UnixStream>,
}

impl Interrupt {
    /// Ends the run that this was given to, or will be; `signal` is why.
    pub fn raise(&self, signal: i32) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.signal = Some(signal);
        if let Some(line) = &inner.line {
            let _ = line.shutdown(Shutdown::Both);
        }
    }

    fn watch(&self, line: &UnixStream) -> Result<()> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.line = Some(line.try_clone().context("cannot duplicate a socket")?);
        if inner.signal.is_some() {
            let _ = line.shutdown(Shutdown::Both);
        }
        Ok(())
    }

    fn signal(&self) -> Option<i32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).signal
    }
}

/// QEMU's ends of the line and the console.
struct Ends {
    line: OwnedFd,
    console: OwnedFd,
}

impl Vm {
    /// Boots the VM, runs `command` in it in this process' directory, with `environment` beside what of this process' is
    /// passed on, and copies what it prints to `stdout` and `stderr`. Whatever happens, no VM is left when this returns.
    ///
    /// # Errors
    /// When the VM cannot be started, or what it sends cannot be written.
    pub fn run(
        &self,
        command: &[OsString],
        environment: &[(OsString, OsString)],
        interrupt: &Interrupt,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<Outcome> {
        let deadline = Instant::now() + self.timeout;
        let kernel = self.kernel.files()?;
        if let Some(out) = &self.out {
            fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
        }
        let job = Job::here(command, environment, self.out.is_some())?;
        let session = Session::new(&job, &kernel, &self.binary)?;
        let (line, line_end) = UnixStream::pair().context("cannot make a pair of sockets")?;
        let (console, console_end) = UnixStream::pair().context("cannot make a pair of sockets")?;
        let ends = Ends { line: line_end.into(), console: console_end.into() };
        let stderr_path = session.path().join("qemu-stderr");
        let mut qemu = machine::command(self, &kernel, &session, ends);
        qemu.stderr(File::create(&stderr_path).context("cannot make a file in a new directory")?);
        let mut machine = Machine(keeper::spawn(qemu)?);
        let console = Console::read(console, self.shows_console)?;

        interrupt.watch(&line)?;
        let mut conversation = Conversation { line, deadline, booted: false };
        let last = conversation.follow(stdout, stderr);
        if matches!(last, Ok(Last::Said(_))) {
            conversation.part(&mut machine);
        }
        machine.end();
        if let Some(signal) = interrupt.signal() {
            return Ok(Outcome::Interrupted(signal));
        }
        Ok(match last? {
            Last::Said(outcome) => outcome,
            Last::TimedOut => Outcome::TimedOut,
            Last::Silent => Outcome::Died(Death {
                booted: conversation.booted,
                qemu: fs::read_to_string(&stderr_path).unwrap_or_default().trim().to_owned(),
                console: console.end(),
            }),
        })
    }
}

/// QEMU's process. Killed and reaped on drop.
struct Machine(Child);

impl Machine {
    /// Waits for it to end by itself.
    fn wait(&mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(POWER_OFF_POLL);
        }
    }

    fn end(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// How a conversation with the VM ended.
enum Last {
    Said(Outcome),
    TimedOut,
    Silent,
}

struct Conversation {
    line: UnixStream,
    deadline: Instant,
    booted: bool,
}

impl Conversation {
    /// Copies what the command prints, until it ends.
    fn follow(&mut self, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<Last> {
        let line = self.line.try_clone().context("cannot duplicate a socket")?;
        let mut reader = BufReader::new(Bounded { line, deadline: self.deadline });
        loop {
            let frame = match Frame::read(&mut reader) {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(Last::Silent),
                Err(error) => match error.downcast_ref::<io::Error>().map(io::Error::kind) {
                    Some(ErrorKind::TimedOut) => return Ok(Last::TimedOut),
                    // A QEMU that is killed closes the line where it is.
                    Some(ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => return Ok(Last::Silent),
                    _ => return Err(error),
                },
            };
            match frame {
                Frame::Started => self.booted = true,
                Frame::Output(stream, bytes) => {
                    let printed = match stream {
                        Stream::Stdout => stdout.write_all(&bytes).and_then(|()| stdout.flush()),
                        Stream::Stderr => stderr.write_all(&bytes).and_then(|()| stderr.flush()),
                    };
                    printed.context("cannot print what the VM sent")?;
                }
                Frame::Exited(status) => return Ok(Last::Said(Outcome::Exited(status))),
                Frame::Killed(signal) => return Ok(Last::Said(Outcome::Killed(signal))),
                Frame::NotStarted(why) => return Ok(Last::Said(Outcome::NotStarted(why))),
            }
        }
    }

    /// Tells the VM that all has arrived, and lets it power off.
    fn part(&mut self, machine: &mut Machine) {
        // One that is already gone is not to be told.
        if self.line.write_all(&[FAREWELL]).is_ok() {
            machine.wait(POWER_OFF_TIMEOUT);
        }
    }
}

/// Reads until a deadline.
struct Bounded {
    line: UnixStream,
    deadline: Instant,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.line.set_read_timeout(Some(left))?;
            match self.line.read(buffer) {
                // The kernel does not go on with a read that has a timeout; whom the signal concerns, closes the line.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
                read => return read,
            }
        }
    }
}
