//! Holds agents before each step of a migration (`ramferry agent --step-socket`).

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::harness::PATIENCE;

/// A step of one side of a migration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Step {
    pub(crate) role: String,
    pub(crate) step: String,
    pub(crate) phase: String,
    pub(crate) round: Option<u64>,
}

impl Step {
    fn parse(line: &str) -> Step {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = |name: &str| line[name].as_str().unwrap().to_owned();
        Step { role: text("role"), step: text("step"), phase: text("phase"), round: line["round"].as_u64() }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Step { role, step, phase, round } = self;
        write!(f, "{role} {step}")?;
        if phase.starts_with("last_") && role == "source" {
            write!(f, " last")?;
        }
        round.map_or(Ok(()), |round| write!(f, " {round}"))
    }
}

/// A step that waits; it is carried out when this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) step: Step,
    agent: Option<UnixStream>,
}

impl Held {
    /// Has the driver panic in place of the step.
    pub(crate) fn panic(mut self) {
        self.agent.take().unwrap().write_all(b"panic\n").unwrap();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            // It may have been killed.
            let _ = agent.write_all(b"go\n");
        }
    }
}

/// Everything the accepting thread shares.
#[derive(Default)]
struct Shared {
    /// `None` once all steps go by unheld.
    agents: Option<Vec<UnixStream>>,
}

/// Where agents wait before their steps.
pub(crate) struct Steps {
    directory: tempfile::TempDir,
    held: Receiver<Held>,
    shared: Arc<Mutex<Shared>>,
}

impl Steps {
    pub(crate) fn listen() -> Steps {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("steps")).unwrap();
        let (sender, held) = channel();
        let shared = Arc::new(Mutex::new(Shared { agents: Some(Vec::new()) }));
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for agent in listener.incoming().map_while(Result::ok) {
                let Some(agents) = &mut accepting.lock().unwrap().agents else { break };
                agents.push(agent.try_clone().unwrap());
                let sender = sender.clone();
                std::thread::spawn(move || report(&agent, &sender));
            }
        });
        Steps { directory, held, shared }
    }

    /// The option's value.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("steps")
    }

    /// The next step that waits; none when none comes in time.
    pub(crate) fn next_within(&self, limit: Duration) -> Option<Held> {
        self.held.recv_timeout(limit).ok()
    }

    pub(crate) fn next(&self) -> Held {
        self.next_within(PATIENCE).expect("a step in time")
    }

    /// Holds no step any more, of any agent.
    pub(crate) fn open(&self) {
        let agents = self.shared.lock().unwrap().agents.take();
        for agent in agents.into_iter().flatten() {
            // One that was killed is closed already.
            let _ = agent.shutdown(std::net::Shutdown::Both);
        }
        // Ends the accepting thread, and with it its listener.
        let _ = UnixStream::connect(self.path());
        self.held.try_iter().for_each(drop);
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.open();
    }
}

/// Reports each step of one agent's migration until its end.
fn report(agent: &UnixStream, held: &Sender<Held>) {
    let reader = BufReader::new(agent.try_clone().unwrap());
    for line in reader.lines().map_while(Result::ok) {
        let step = Step::parse(&line);
        let agent = Some(agent.try_clone().unwrap());
        // Nobody waits for steps any more: the agent goes on.
        let _ = held.send(Held { step, agent });
    }
}
