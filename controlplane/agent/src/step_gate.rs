//! A hook for tests: holds a migration before each of its steps until whoever
//! listens lets it go on. Without `step_socket` there is nothing of it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ramferry_mover::Step;
use serde::Serialize;

use crate::MigrationRole;

/// A listener that keeps a step for longer is taken to be gone.
const HOLD_LIMIT: Duration = Duration::from_secs(120);

/// The gate of one migration's driver. Steps pass it freely once the listener is gone.
pub(crate) struct StepGate {
    migration: String,
    role: MigrationRole,
    listener: Option<BufReader<UnixStream>>,
}

/// What the listener is told of a step, as one line.
#[derive(Serialize)]
struct Line<'a> {
    migration: &'a str,
    role: MigrationRole,
    step: &'a str,
    phase: &'a str,
    round: Option<u32>,
}

impl StepGate {
    /// The gate of a migration's driver; an open one where no socket is given.
    pub(crate) fn new(socket: Option<&Path>, role: MigrationRole, migration: &str) -> Self {
        let listener = socket.and_then(|path| match connect(path) {
            Ok(stream) => Some(BufReader::new(stream)),
            Err(error) => {
                tracing::warn!(?path, %error, "nobody listens at step_socket: steps are not held");
                None
            }
        });
        Self { migration: migration.to_owned(), role, listener }
    }

    /// Tells of `step`, and waits until it may be carried out.
    ///
    /// # Panics
    /// When the listener asks for it, to see what becomes of a driver's panic.
    pub(crate) fn pass(&mut self, step: Step) {
        let Some(listener) = &mut self.listener else {
            return;
        };
        let (migration, role) = (self.migration.as_str(), self.role);
        let line = Line { migration, role, step: step.action, phase: step.phase, round: step.round };
        match exchange(listener, &line) {
            Ok(answer) => assert!(answer.trim_end() != "panic", "the listener at step_socket asked for it"),
            Err(error) => {
                tracing::warn!(%error, "the listener at step_socket is gone: steps are not held");
                self.listener = None;
            }
        }
    }
}

fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(HOLD_LIMIT))?;
    stream.set_write_timeout(Some(HOLD_LIMIT))?;
    Ok(stream)
}

fn exchange(listener: &mut BufReader<UnixStream>, line: &Line<'_>) -> std::io::Result<String> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    listener.get_mut().write_all(text.as_bytes())?;
    let mut answer = String::new();
    match listener.read_line(&mut answer)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    const STEP: Step = Step { action: "copy", phase: "last_copy", round: Some(3) };

    fn gate() -> (StepGate, BufReader<UnixStream>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("steps");
        let listener = UnixListener::bind(&path).unwrap();
        let gate = StepGate::new(Some(&path), MigrationRole::Source, "m");
        (gate, BufReader::new(listener.accept().unwrap().0))
    }

    #[test]
    fn step_waits_for_the_listener_and_goes_on_without_one() {
        let (mut gate, mut listener) = gate();
        let driver = std::thread::spawn(move || {
            gate.pass(STEP);
            gate.pass(STEP);
            gate.pass(STEP);
        });
        let mut line = String::new();
        listener.read_line(&mut line).unwrap();
        assert_eq!(
            line,
            "{\"migration\":\"m\",\"role\":\"source\",\"step\":\"copy\",\"phase\":\"last_copy\",\"round\":3}\n"
        );
        assert!(!driver.is_finished());
        listener.get_mut().write_all(b"go\n").unwrap();
        drop(listener);
        driver.join().unwrap();
    }

    #[test]
    fn driver_panics_when_the_listener_asks_for_it() {
        let (mut gate, mut listener) = gate();
        listener.get_mut().write_all(b"panic\n").unwrap();
        catch_unwind(AssertUnwindSafe(|| gate.pass(STEP))).unwrap_err();
    }

    #[test]
    fn without_a_socket_no_step_is_held() {
        StepGate::new(None, MigrationRole::Source, "m").pass(STEP);
        StepGate::new(Some("/nonexistent/steps".as_ref()), MigrationRole::Source, "m").pass(STEP);
    }
}
