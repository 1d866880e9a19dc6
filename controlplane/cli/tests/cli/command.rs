//! Runs the binary as a shell would.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// No command of a test takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command under way; ended with the test.
pub(crate) struct Running {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    seen: String,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Starts `ramferry` with the words of `line`, against `agent`.
pub(crate) fn start(agent: impl std::fmt::Display, line: &str) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramferry"));
    command.env_clear().env("RAMFERRY_AGENT", agent.to_string()).args(line.split_whitespace());
    start_command(command)
}

/// Starts a command that runs `ramferry`.
pub(crate) fn start_command(mut command: Command) -> Running {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary was built");
    let stdout = lines(child.stdout.take().expect("it is piped"));
    let stderr = lines(child.stderr.take().expect("it is piped"));
    Running { child, stdout, stderr, seen: String::new() }
}

/// Runs `ramferry` to its end.
pub(crate) fn run(agent: impl std::fmt::Display, line: &str) -> Ended {
    start(agent, line).wait()
}

/// The lines of a pipe as they come; its thread ends with the pipe.
fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = String::new();
        while pipe.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            if sender.send(std::mem::take(&mut line)).is_err() {
                return;
            }
        }
    });
    receiver
}

impl Running {
    /// Presses Ctrl-C.
    pub(crate) fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it is not reaped yet");
    }

    /// The next line of stdout.
    pub(crate) fn next_line(&mut self) -> String {
        self.stdout.recv_timeout(PATIENCE).expect("another line")
    }

    /// Stops reading stdout.
    pub(crate) fn close_stdout(&mut self) {
        // The thread that reads lets go of the pipe when it cannot pass a line on.
        self.stdout = mpsc::channel().1;
    }

    /// Returns once stderr has said `text`.
    pub(crate) fn wait_for_stderr(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            let line =
                self.stderr.recv_timeout(left).unwrap_or_else(|_| panic!("{text:?} not in {}", self.seen));
            self.seen.push_str(&line);
        }
    }

    /// The port of the address that stderr says it listens at.
    pub(crate) fn listening_port(&mut self) -> u16 {
        const BEFORE: &str = "listening at 127.0.0.1:";
        self.wait_for_stderr(BEFORE);
        let (_, after) = self.seen.split_once(BEFORE).expect("it was waited for");
        let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().expect("a port")
    }

    /// The command's end.
    pub(crate) fn wait(mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        let stdout = rest(&self.stdout, deadline);
        let stderr = std::mem::take(&mut self.seen) + &rest(&self.stderr, deadline);
        // Its pipes are closed: it has ended, or was too slow and is killed by drop.
        let status: ExitStatus = match self.child.try_wait() {
            Ok(Some(status)) => status,
            _ if Instant::now() < deadline => self.child.wait().expect("a child"),
            _ => panic!("no end; stdout: {stdout}, stderr: {stderr}"),
        };
        Ended { code: status.code().unwrap_or(-1), stdout, stderr }
    }
}

fn rest(lines: &Receiver<String>, deadline: Instant) -> String {
    let mut text = String::new();
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        text.push_str(&line);
    }
    text
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only where the child was reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Stdout, which must be exactly one JSON object on one line.
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.stdout.matches('\n').count(), 1, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}
