//! Which trackers there are here.

use ramferry_lab::inside::LAB_VARIABLE;
use ramferry_tracking::{TrackerKind, self_test};

/// Since when the kernel has asynchronous write-protection.
const FIRST_WITH_UFFD_WP: (u32, u32) = (6, 7);

/// Whether `kind` passes its self-test here; where it does not, says why. In the lab VM every kind does that its kernel
/// has: there it may not be passed over.
pub(crate) fn works(kind: TrackerKind) -> bool {
    let Err(error) = self_test(kind) else { return true };
    if let Ok(release) = std::env::var(LAB_VARIABLE) {
        assert!(!is_had(kind, &release), "Linux {release} has {kind}: {error}");
    }
    eprintln!("SKIPPED: {error}");
    false
}

/// The best kind that works here.
pub(crate) fn best() -> Option<TrackerKind> {
    let found = TrackerKind::ALL.into_iter().find(|kind| self_test(*kind).is_ok());
    if found.is_none() {
        eprintln!("SKIPPED: no tracker works here");
    }
    found
}

fn is_had(kind: TrackerKind, release: &str) -> bool {
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap());
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    kind == TrackerKind::SoftDirty || version >= FIRST_WITH_UFFD_WP
}
