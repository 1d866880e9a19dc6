use std::time::Duration;

use crate::Failure;

/// What holds a migration up: the latest failure, and since when there were any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trouble {
    pub(crate) failure: Failure,
    pub(crate) since: Duration,
}

impl Trouble {
    /// One more failure in `trouble`, or the first.
    pub(crate) fn note(trouble: &mut Option<Self>, now: Duration, failure: Failure) {
        let since = trouble.as_ref().map_or(now, |trouble| trouble.since);
        *trouble = Some(Self { failure, since });
    }
}
