//! Children that do not outlive this process, however it ends.

use std::io;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};
use std::thread;

use anyhow::{Context, Result};

struct Order {
    command: Command,
    answer: Sender<io::Result<Child>>,
}

/// Starts `command` so that the kernel kills it when this process dies.
///
/// The kernel ties a child to the *thread* that made it, and a test's thread may
/// end before its guest: so one thread, which never ends, makes them all.
pub(crate) fn spawn(command: Command) -> Result<Child> {
    static KEEPER: OnceLock<Sender<Order>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (orders, received) = mpsc::channel::<Order>();
        thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || {
                for Order { mut command, answer } in received {
                    // The fixture that asked waits for the answer.
                    let _ = answer.send(command.spawn());
                }
            })
            .expect("a thread can be started");
        orders
    });
    let program = command.get_program().to_owned();
    let (answer, answered) = mpsc::channel();
    keeper.send(Order { command, answer }).ok().context("the keeper thread ended")?;
    let child = answered.recv().context("the keeper thread ended")?;
    child.with_context(|| format!("cannot run {}: scripts/setup installs it", program.display()))
}

/// A command for `program` that dies with the thread that starts it.
pub(crate) fn command(program: &Path) -> Command {
    let setpriv = Path::new("/usr/bin/setpriv");
    if !setpriv.exists() {
        return Command::new(program);
    }
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}
