//! What a link has heard of its end, while more may be heard.

use std::time::{Duration, Instant};

use ramferry_fabric::{HardwareFault, LinkError};

/// How long a link that seems to have ended waits to be told why.
const REASON_LIMIT: Duration = Duration::from_millis(500);

/// Whether an error may be no more than what followed from another, which is told a moment later:
/// a queue pair that failed, and what it flushed, are so wherever a connection ends.
pub(crate) fn leaves_cause_open(error: &LinkError) -> bool {
    matches!(error, LinkError::Hardware { fault: HardwareFault::QueuePair, .. })
}

/// Of what is told, keeps the first that does not leave its cause open.
pub(crate) fn keep_cause(known: &mut LinkError, told: LinkError) {
    if leaves_cause_open(known) {
        *known = told;
    }
}

/// Why a link seems to have ended, and since when it seems so.
pub(crate) struct Suspicion {
    error: LinkError,
    since: Instant,
}

impl Suspicion {
    pub(crate) fn new(error: LinkError, since: Instant) -> Self {
        Self { error, since }
    }

    /// Takes what else is told. Its time goes on, so that what tells no cause ends in time, too.
    pub(crate) fn hear(&mut self, told: LinkError) {
        keep_cause(&mut self.error, told);
    }

    /// The link's error once it is certain. Operations that are under way may still tell another by
    /// the way they end; where none is, only an error that leaves its cause open waits.
    pub(crate) fn verdict(&self, is_idle: bool, now: Instant) -> Option<&LinkError> {
        let is_over = now.saturating_duration_since(self.since) > REASON_LIMIT;
        let is_all = is_idle && !leaves_cause_open(&self.error);
        (is_over || is_all).then_some(&self.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken() -> LinkError {
        LinkError::Hardware { device: "rxe0".into(), fault: HardwareFault::QueuePair }
    }

    #[test]
    fn a_failed_queue_pair_is_told_only_when_nothing_else_is_in_time() {
        let start = Instant::now();
        let late = start + REASON_LIMIT + Duration::from_millis(1);
        for is_idle in [false, true] {
            let mut suspicion = Suspicion::new(broken(), start);
            suspicion.hear(broken());
            assert_eq!(suspicion.verdict(is_idle, start + REASON_LIMIT), None);
            assert_eq!(suspicion.verdict(is_idle, late), Some(&broken()));
            suspicion.hear(LinkError::PeerClosed);
            assert_eq!(suspicion.verdict(is_idle, late), Some(&LinkError::PeerClosed));
        }
    }

    #[test]
    fn a_peer_that_left_is_told_at_once_unless_operations_may_tell_another_reason() {
        let start = Instant::now();
        let mut suspicion = Suspicion::new(LinkError::PeerClosed, start);
        suspicion.hear(broken());
        assert_eq!(suspicion.verdict(true, start), Some(&LinkError::PeerClosed));
        assert_eq!(suspicion.verdict(false, start), None);
    }

    #[test]
    fn only_a_failed_queue_pair_leaves_its_cause_open() {
        assert!(leaves_cause_open(&broken()));
        for fault in [HardwareFault::PathLost, HardwareFault::PortDown, HardwareFault::LocalProtection] {
            assert!(!leaves_cause_open(&LinkError::Hardware { device: "rxe0".into(), fault }));
        }
        assert!(!leaves_cause_open(&LinkError::PeerClosed));
    }
}
