//! A small blocking QMP client on the test's own socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

const REPLY_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_PAUSE: Duration = Duration::from_millis(2);

#[derive(Debug)]
pub(super) struct Monitor {
    connection: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    /// Connects as soon as QEMU listens. `alive` fails when it never will.
    pub(super) fn connect(
        path: &Path,
        timeout: Duration,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<Monitor> {
        let deadline = Instant::now() + timeout;
        let stream = loop {
            alive()?;
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("QEMU does not listen on {}", path.display()));
                }
                // There is no event to wait for: the socket appears when QEMU binds it.
                Err(_) => std::thread::sleep(CONNECT_PAUSE),
            }
        };
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        let mut monitor = Monitor { connection: BufReader::new(stream), events: Vec::new() };
        monitor.receive().context("no QMP greeting")?;
        monitor.execute(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(monitor)
    }

    /// Sends one command; its `return`, or its error.
    pub(super) fn execute(&mut self, command: &Value) -> Result<Value> {
        let mut bytes = command.to_string();
        bytes.push('\n');
        self.connection.get_mut().write_all(bytes.as_bytes()).context("cannot write to QMP")?;
        loop {
            let mut answer = self.receive().with_context(|| format!("no answer to {command}"))?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {}", error["desc"].as_str().unwrap_or("an error without a description"));
            }
            self.events.push(answer);
        }
    }

    /// The events that came with the answers so far.
    pub(super) fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.connection.read_line(&mut line).context("cannot read from QMP")? == 0 {
            bail!("QEMU closed QMP");
        }
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
    }
}
