//! A migration as two pure state machines: [`Source`] and [`Destination`].
//!
//! Events go in with the time at which they happened, actions come out. There is no
//! clock, no thread, no socket and no file in here, so that a whole migration, with
//! every failure that it can meet, runs in a unit test. The mover carries the actions
//! out and reports each one's result as an event.
//!
//! # What a driver must do
//!
//! * Hand events over one at a time, and carry actions out in the order in which they
//!   are given. It may start one before the last has ended, with two exceptions: journal
//!   records reach the journal in the order in which they were given, and what is sent to
//!   the peer on one control stream arrives in the order in which it was sent.
//! * Report exactly one result for each action that has one. A result that comes after the
//!   machine has moved on does no harm.
//! * See that a link that makes no progress fails: a round may take as long as it takes.
//! * Send `Tick` once `deadline()` has passed. An early `Tick` does no harm.
//! * Say with `LateWrites` that pages are filled after they were reported, before the pages are copied that such a
//!   writer can reach, and from then on keep a hash of each page, taken just before it is sent.
//! * Give the destination's VMM no device state before the zero pages that were sent ahead of it are applied: a VMM
//!   reads guest RAM while it loads.
//! * In a switchover into post-copy serve the destination's reads of memory from `PauseGuest` on, until `Release`, and
//!   catch every access of the destination's VMM to guest RAM from `StartIncoming` on: it waits until what it needs is
//!   there.
//! * Let what is owed outlive the destination's agent, from `OwedHeld` on: a page counts as owed until its bytes are in
//!   place, and is let in only when it does not. A page that was let in once is never written again.
//! * Let nobody run a guest on what is not its memory: where the agent ends, or memory is lost, accesses to what is
//!   owed wait.
//! * Never hold `ResumeGuest` back behind anything else, least of all behind a
//!   `PauseGuest` that is under way: it interrupts that one.
//! * Keep a [`Destination`] after its `Finish`, for as long as its source may ask: it goes on answering.
//! * Write the outcome to the journal at `Finish`. The `recover_` constructors are for journals without one.
//! * Report `GuestStopped` only when no earlier `ResumeGuest` can run the guest any more.
//! * Report `GuestResumed` only when the guest runs and no earlier `PauseGuest` can still stop it.
//!
//! # Who may run the guest
//!
//! 1. Until the source has sent COMMIT, any failure resumes the guest at the source.
//! 2. The source has HANDED_OVER in its journal before it sends COMMIT. From the order to
//!    send it until the destination says that it aborted, the source does not resume.
//! 3. The destination has COMMITTED in its journal before it resumes its guest, and ABORTED
//!    before it says that it aborted.
//! 4. The last record of a journal counts. ABORTED follows COMMITTED only where the guest
//!    was not yet ordered to resume.
//! 5. A source that does not know the outcome asks. A destination that is asked before it was
//!    told to commit never commits.
//! 6. In post-copy the guest is the destination's, whatever becomes of the source's agent, its VMM or the way there: it
//!    waits for its memory. The source lets go of nothing before the destination says that it has everything. Where
//!    the source says that memory is lost for good, the destination's guest is stopped, and no guest runs on.
#![forbid(unsafe_code)]

mod convergence;
mod destination;
mod failure;
pub mod limits;
mod parameters;
mod progress;
mod retry;
mod source;
mod trouble;

pub use destination::{Destination, DestinationAction, DestinationEvent, DestinationOutcome};
pub use failure::{Failure, Reason, UnknownReason};
pub use parameters::{BytesPerSecond, ParameterError, Parameters, Percent, Postcopy, TimeoutAction};
pub use progress::{DowntimeParts, FixedCosts, Progress, Round, State};
pub use source::{LateWrites, Outcome, Source, SourceAction, SourceEvent};
