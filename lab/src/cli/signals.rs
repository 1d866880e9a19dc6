//! Signals that would end this process, so that what it made can be removed first.

use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Calls `act` with the first such signal's number. From when this returns none of them ends the process.
pub(super) fn on_first(act: impl FnOnce(i32) + Send + 'static) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.context("cannot wait for signals")?;
    let (ready, armed) = mpsc::channel();
    let work = move || {
        runtime.block_on(async {
            let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
            let [Ok(mut interrupted), Ok(mut terminated), Ok(mut hung_up)] = kinds.map(signal) else {
                return;
            };
            // Who waits for it may have gone.
            let _ = ready.send(());
            let kind = tokio::select! {
                _ = interrupted.recv() => SignalKind::interrupt(),
                _ = terminated.recv() => SignalKind::terminate(),
                _ = hung_up.recv() => SignalKind::hangup(),
            };
            act(kind.as_raw_value());
        });
    };
    thread::Builder::new().name("signals".to_owned()).spawn(work).context("cannot start a thread")?;
    armed.recv().context("signals cannot be waited for")
}
