//! Runs the command, and sends what it prints.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, wait};

use crate::vm::job::Job;
use crate::vm::wire::{Frame, LONGEST_BYTES, Stream};

/// How the command ended.
pub(super) enum Ended {
    Exited(i32),
    Killed(i32),
    NotStarted(String),
}

/// Runs the command of `job` to its end. What it leaves running ends with the VM, and what that prints is lost.
pub(super) fn run(job: &Job, environment: Vec<(&str, String)>, line: &mut File) -> Result<Ended> {
    Frame::Started.write(line)?;
    let (program, arguments) = job.command.split_first().context("the job has no command")?;
    let (out, out_end) = io::pipe().context("cannot make a pipe")?;
    let (err, err_end) = io::pipe().context("cannot make a pipe")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(&job.directory).env_clear();
    command.envs(job.environment.iter().map(|(name, value)| (name, value))).envs(environment);
    command.stdin(Stdio::null()).stdout(out_end).stderr(err_end);
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ok(Ended::NotStarted(format!("{}: {error}", program.display()))),
    };
    // Its ends of the pipes.
    drop(command);
    let pid = Pid::from_child(&child);
    let ended = eventfd(0, EventfdFlags::CLOEXEC).context("cannot make an eventfd")?;
    let line = Mutex::new(line);
    let status = thread::scope(|scope| -> Result<ExitStatus> {
        let (line, ended) = (&line, ended.as_fd());
        let readers = [(out, Stream::Stdout), (err, Stream::Stderr)]
            .map(|(pipe, stream)| scope.spawn(move || forward(pipe, stream, ended, line)));
        let status = reap_until(pid);
        rustix::io::write(ended, &1_u64.to_ne_bytes()).context("cannot write to an eventfd")?;
        for reader in readers {
            reader.join().expect("a reader does not panic")?;
        }
        status
    })?;
    Ok(match (status.code(), status.signal()) {
        (Some(code), _) => Ended::Exited(code),
        (None, signal) => Ended::Killed(signal.unwrap_or(0)),
    })
}

/// Reaps every process that ends, as the first process must, until `pid` is one of them.
fn reap_until(pid: Pid) -> Result<ExitStatus> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((found, status))) if found == pid => return Ok(ExitStatus::from_raw(status.as_raw())),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the command"),
        }
    }
}

/// Sends what comes out of `pipe` until it is closed; once `ended` is raised, until it is empty: a process that the
/// command left behind may hold it open for ever.
fn forward(
    mut pipe: io::PipeReader,
    stream: Stream,
    ended: impl AsFd,
    line: &Mutex<&mut File>,
) -> Result<()> {
    rustix::io::ioctl_fionbio(&pipe, true).context("cannot change a pipe")?;
    let mut buffer = vec![0; LONGEST_BYTES];
    loop {
        let mut ready = [PollFd::new(&pipe, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for what the command prints"),
        }
        let has_ended = !ready[1].revents().is_empty();
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                let mut line = line.lock().expect("a writer does not panic");
                Frame::Output(stream, buffer[..length].to_vec()).write(&mut **line)?;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && has_ended => return Ok(()),
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {}
            Err(error) => return Err(error).context("cannot read what the command prints"),
        }
    }
}
