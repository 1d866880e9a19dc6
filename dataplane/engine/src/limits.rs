//! How long things may take, and how often they are tried.

use std::time::Duration;

/// Least time between two harvests while the guest runs: the rounds of a guest that is quiet, yet does not
/// converge, must not spin.
pub const ROUND_INTERVAL: Duration = Duration::from_millis(10);

/// What passes between the last look at what a running guest wrote and its pause: the VMM sends the live part of
/// its own stream first. The guest dirties on meanwhile.
pub const PAUSE_LATENCY: Duration = Duration::from_millis(15);

/// For links, tracker and presence. Both sides.
pub const PREPARE: Duration = Duration::from_secs(120);
/// For a harvest.
pub const HARVEST: Duration = Duration::from_secs(30);
/// For a fence.
pub const FENCE: Duration = Duration::from_secs(30);
/// For the destination's acknowledgement of a round.
pub const ACKNOWLEDGE: Duration = Duration::from_secs(30);
/// For a running guest to end its transfers. Beyond it the guest is not drained, and the driver must say so itself.
pub const DRAIN_GUEST: Duration = Duration::from_secs(60);
/// For the comparison of what was sent with what is there.
pub const RECHECK: Duration = Duration::from_secs(600);
/// For the guest's pause.
pub const PAUSE: Duration = Duration::from_secs(30);
/// Least time between two steps of the throttle.
pub const THROTTLE_INTERVAL: Duration = Duration::from_secs(1);
/// For a step of the throttle. Beyond it the guest is taken for one that cannot be throttled.
pub const THROTTLE_ANSWER: Duration = Duration::from_secs(5);
/// For the copy of the last round, unless [`LAST_COPY_FACTOR`] times what is expected of it is more.
pub const LAST_COPY: Duration = Duration::from_secs(60);
/// The last round may take this many times what is expected of it.
pub const LAST_COPY_FACTOR: u32 = 4;
/// For the comparison of RAM, or its digest.
pub const VERIFY: Duration = Duration::from_secs(600);
/// For the device state.
pub const DEVICE_STATE: Duration = Duration::from_secs(60);
/// For the destination to hold what is owed, and to catch every access to it. Both sides.
pub const OWED: Duration = Duration::from_secs(30);
/// For HANDED_OVER to be durable at the source.
pub const HANDOVER: Duration = Duration::from_secs(30);
/// For the answer to COMMIT. After it the source asks.
pub const COMMIT_ANSWER: Duration = Duration::from_secs(5);

/// For the destination to drain a round.
pub const DRAIN: Duration = Duration::from_secs(30);
/// A destination that is owed memory and says nothing for so long is asked how far it is.
pub const SERVE_SILENCE: Duration = Duration::from_secs(5);

/// For the destination's VMM to wait for device state.
pub const INCOMING: Duration = Duration::from_secs(30);

/// For the copy under way to stop, and for the peer to be told, once a migration is being undone.
pub const UNDO: Duration = Duration::from_secs(10);
/// For links, regions and tracker to be let go.
pub const RELEASE: Duration = Duration::from_secs(60);
/// For a destination guest whose memory is lost to stop. After it its VMM is ended.
pub const STOP: Duration = Duration::from_secs(30);
/// For the destination to be rid of its guest.
pub const DISCARD: Duration = Duration::from_secs(60);

/// First interval before something that failed is tried again. It doubles with each failure.
pub const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Longest interval before something that failed is tried again.
pub const RETRY_MOST: Duration = Duration::from_secs(5);
/// A guest's resume or stop is ordered again after so long without an answer.
pub const RESUME_ANSWER: Duration = Duration::from_secs(5);
/// The resume of a source guest is tried for so long. After that its VMM is taken for dead.
pub const RESUME: Duration = Duration::from_secs(600);
