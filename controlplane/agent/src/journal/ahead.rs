//! The disk's backlog, written while the guest runs: a record that is synced in its pause then finds little before it.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tracing::debug;

use super::MigrationLog;

/// Longest that a switchover is put off. Where the link carries more than the guest writes, what it writes meanwhile costs
/// its pause less than the same wait in there; where it does not, its working set is to be copied either way, or post-copy
/// leaves it for later. A disk that needs longer does not come to rest.
const PATIENCE: Duration = Duration::from_secs(1);

/// A sync under way on another thread.
#[derive(Debug)]
pub(crate) struct SyncedAhead(JoinHandle<()>);

impl SyncedAhead {
    pub(crate) fn begin(runtime: &Handle, log: &MigrationLog) -> Self {
        Self(runtime.spawn_blocking(log.sync_ahead()))
    }

    /// Until it has ended, for a bounded time. Whatever becomes of it, `append` syncs its record.
    pub(crate) async fn wait(self) {
        if tokio::time::timeout(PATIENCE, self.0).await.is_err() {
            debug!(?PATIENCE, "journal: the disk has a long backlog; the switchover does not wait for it");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_switchover_waits_for_the_disk_and_not_for_ever() {
        let (release, released) = tokio::sync::oneshot::channel::<()>();
        let waiting = tokio::spawn(SyncedAhead(tokio::spawn(async { drop(released.await) })).wait());
        assert!(!waiting.is_finished());
        release.send(()).unwrap();
        waiting.await.unwrap();

        let never = SyncedAhead(tokio::spawn(std::future::pending()));
        let began = Instant::now();
        never.wait().await;
        assert!(began.elapsed() >= PATIENCE);
    }
}
