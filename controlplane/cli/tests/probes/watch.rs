//! `ramferry probe` beside a test, and what an agent serves.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A view under way; killed and reaped with the test.
pub(crate) struct Watch {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Watch {
    /// Returns when every probe is attached.
    pub(crate) fn start(options: &[&str]) -> Self {
        let release = std::env::var("RAMFERRY_LAB");
        assert!(release.is_ok(), "this runs in the lab's VM only: make lab-test");
        let mut child = Command::new(env!("CARGO_BIN_EXE_ramferry"))
            .args(["probe", "--output", "json", "--interval", "200ms"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut watch = Self { child, stdout };
        let first = watch.line().unwrap();
        for probe in first["probes"].as_array().unwrap() {
            assert_eq!(probe["attached"], true, "{probe}");
        }
        watch
    }

    /// Ends it. Returns all that it saw.
    pub(crate) fn end(mut self) -> Value {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let mut last = None;
        while let Some(line) = self.line() {
            last = Some(line);
        }
        assert!(self.child.wait().unwrap().success());
        let last = last.unwrap();
        assert_eq!(last["final"], true);
        last
    }

    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        (self.stdout.read_line(&mut line).unwrap() > 0).then(|| serde_json::from_str(&line).unwrap())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Both fail only where it was reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What was seen of the processes of that name.
pub(crate) fn process<'a>(seen: &'a Value, name: &str) -> &'a Value {
    let processes = seen["processes"].as_array().unwrap();
    processes
        .iter()
        .find(|process| process["process"] == name)
        .unwrap_or_else(|| panic!("no {name} in {seen:#}"))
}

/// What an agent's endpoint serves.
pub(crate) fn scrape(endpoint: SocketAddr) -> String {
    let mut stream = TcpStream::connect(endpoint).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}
