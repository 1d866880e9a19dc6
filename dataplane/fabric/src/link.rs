use std::fmt;
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;

/// Longest transfer that may be posted as one operation.
pub const MAX_TRANSFER_BYTES: u32 = 16 << 20;

/// What carries a guest's RAM between two agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FabricKind {
    /// RDMA.
    Verbs,
    /// Shared memory, both agents on one host.
    Shm,
    /// TCP streams.
    Tcp,
}

impl FabricKind {
    /// The name in options, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            FabricKind::Verbs => "verbs",
            FabricKind::Shm => "shm",
            FabricKind::Tcp => "tcp",
        }
    }
}

impl fmt::Display for FabricKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Names a region to the two sides of its session, and to nobody else.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionKey(pub u64);

impl fmt::Debug for RegionKey {
    /// Enough to tell keys apart in a log, too little to use one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegionKey(..{:04x})", self.0 & 0xffff)
    }
}

/// The caller's label of an operation. Several operations may carry one label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpId(pub u64);

/// A place in registered memory. The offset counts from the start of the
/// region's block, so that a range keeps its offsets when it is registered
/// again under another key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The region.
    pub key: RegionKey,
    /// First byte, from the start of the region's block.
    pub offset: u64,
}

/// One write or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Returned with the completion.
    pub id: OpId,
    /// Where in this side's memory.
    pub local: Place,
    /// Where in the peer's memory.
    pub remote: Place,
    /// Length in bytes, from 1 to [`MAX_TRANSFER_BYTES`].
    pub length: u32,
}

/// The end of one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The operation's label.
    pub id: OpId,
    /// Whether it was carried out.
    pub result: Result<(), OpError>,
}

/// One connection to a peer's registered memory.
///
/// An implementation *must*:
/// - complete every operation that it accepted exactly once, also when the link
///   dies, then with an error;
/// - keep the local region of an operation from being deregistered until the
///   operation completes;
/// - carry operations out in the order posted, as far as a fence can tell;
/// - never block in `post_*` and `poll`, and do a bounded amount of work there;
/// - die when the peer refuses an operation.
///
/// A caller *may rely on*: a write that completed may have its local memory
/// changed or deregistered; a read that completed is in local memory; a fence that
/// completed well means that every operation posted before it is in the peer's
/// memory. A write that completed well is not proof of that: a fabric may hear
/// of the peer's refusal only afterwards, and then the fence fails.
///
/// A caller *must* poll to make progress, and must not expect completions of
/// operations after [`Link::close`].
pub trait Link: Send {
    /// Starts to copy local memory to the peer's.
    ///
    /// # Errors
    /// The operation was not accepted.
    fn post_write(&mut self, op: Transfer) -> Result<(), PostError>;

    /// Starts to copy the peer's memory to local memory.
    ///
    /// # Errors
    /// The operation was not accepted.
    fn post_read(&mut self, op: Transfer) -> Result<(), PostError>;

    /// Starts a fence: it completes when every operation posted before it on
    /// this link is placed in the peer's memory.
    ///
    /// # Errors
    /// The fence was not accepted.
    fn post_fence(&mut self, id: OpId) -> Result<(), PostError>;

    /// Makes progress and appends what completed; returns how many that were.
    fn poll(&mut self, completions: &mut Vec<Completion>) -> usize;

    /// Sleeps until `poll` could make progress, or until `timeout` has passed.
    ///
    /// # Errors
    /// When the link is dead and every completion was delivered.
    fn wait(&mut self, timeout: Duration) -> Result<(), LinkError>;

    /// Ends the connection, within a bounded time. Operations that have not
    /// completed may or may not be carried out.
    fn close(self: Box<Self>);

    /// Why the link carries nothing any more, if so.
    fn is_dead(&self) -> Option<&LinkError>;
}

/// Why an operation was not accepted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PostError {
    /// The queue is full.
    #[error("the link's queue is full: poll it, then post again")]
    Full,
    /// The link is dead.
    #[error("the link is dead: {0}")]
    Dead(#[source] LinkError),
    /// The operation can never be carried out.
    #[error("the operation is not valid: {0}")]
    Invalid(#[source] InvalidOperation),
}

/// What is wrong with an operation at the side that posts it.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum InvalidOperation {
    /// The local place cannot be used.
    #[error("its local place cannot be used: {0}")]
    Local(#[source] AccessFault),
    /// Its length is not from 1 to [`MAX_TRANSFER_BYTES`].
    #[error("its length of {length} bytes is not from 1 to {MAX_TRANSFER_BYTES}")]
    Length {
        /// Its length.
        length: u32,
    },
}

/// Why an accepted operation was not carried out.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpError {
    /// The peer refused it.
    #[error("the peer refused the operation: {0}")]
    RemoteAccess(#[source] AccessFault),
    /// The link died first. It may or may not have been carried out.
    #[error("the link died before the operation completed: {0}")]
    LinkDead(#[source] LinkError),
}

/// Why a place in registered memory may not be used.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AccessFault {
    /// No live region of the session has the key.
    #[error("no region of the session has this key, or not any more")]
    UnknownKey,
    /// The range is not within the region.
    #[error("the range is not within the region")]
    OutOfBounds,
    /// The region was not registered for this.
    #[error("the region was not registered for this kind of access")]
    Rights,
    /// The transfer is longer than the peer accepts.
    #[error("the transfer is longer than {MAX_TRANSFER_BYTES} bytes, or empty")]
    Length,
    /// The memory behind the region is gone.
    #[error("the memory behind the region is gone: was the RAM file truncated?")]
    MemoryGone,
    /// The region was deregistered while the operation was under way.
    #[error("the region was deregistered while the operation was under way")]
    Revoked,
    /// Refused by the fabric's hardware, which does not say why.
    #[error("the fabric refused the access")]
    Unspecified,
}

/// Why a link could not be made, or died.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkError {
    /// The peer could not be reached.
    #[error("cannot connect to {address}: is the peer's agent running and its data port open?")]
    Connect {
        /// Where.
        address: String,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
    /// The peer knows no session with this token.
    #[error("the peer knows no session with this token: the session ended, or is another agent's")]
    UnknownSession,
    /// The session has as many links as it may.
    #[error("the session has as many links as were agreed on")]
    TooManyLinks,
    /// The peer speaks another version of the protocol.
    #[error(
        "the peer speaks version {theirs} of the data protocol, this agent version {ours}: upgrade the older"
    )]
    Version {
        /// This side's.
        ours: u16,
        /// The peer's.
        theirs: u16,
    },
    /// The two sides do not have the same blocks.
    #[error("the peer's RAM blocks are not this side's: {0}")]
    Layout(&'static str),
    /// The peer is of another user.
    #[error("the peer runs as user {uid}: both agents of one host must run as one user")]
    OtherUser {
        /// Its user.
        uid: u32,
    },
    /// Something took too long.
    #[error("{what} took longer than {after:?}")]
    TimedOut {
        /// What.
        what: &'static str,
        /// How long it may take.
        after: Duration,
    },
    /// The connection broke.
    #[error("the connection to the peer broke")]
    Lost(#[source] Errno),
    /// The peer ended the connection without taking leave.
    #[error("the peer ended the connection")]
    PeerClosed,
    /// The peer refused an operation of this side.
    #[error("the peer refused an operation: {0}")]
    RemoteAccess(#[source] AccessFault),
    /// An operation of the peer was refused.
    #[error("an operation of the peer was refused: {0}")]
    RefusedPeer(#[source] AccessFault),
    /// The peer broke the protocol.
    #[error("the peer broke the data protocol: {0}")]
    PeerProtocol(&'static str),
    /// The peer says that this side broke the protocol.
    #[error("the peer says that this agent broke the data protocol: {0}")]
    OwnProtocol(&'static str),
    /// This side's memory behind a region is gone.
    #[error("this side's memory behind a region is gone: was the RAM file truncated?")]
    LocalMemory,
    /// The session was ended at this side.
    #[error("the session ended")]
    SessionEnded,
    /// The system refused what the link needs.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: Errno,
    },
    /// This host has no device for the fabric.
    #[error("this host has no RDMA device that is ready: run `rdma link`; for soft-RoCE, `rdma link add`")]
    NoDevice,
    /// No device of the fabric leads to an address.
    #[error(
        "no RDMA device of this host leads to {address}: give an address of an RDMA interface (`rdma link`)"
    )]
    NotReached {
        /// The address.
        address: String,
    },
    /// Another device than the one asked for leads to an address.
    #[error(
        "RDMA device {asked} does not lead to {address}, {found} does: correct the address or the device"
    )]
    OtherDevice {
        /// The device that was asked for.
        asked: String,
        /// The address.
        address: String,
        /// The device that leads there.
        found: String,
    },
    /// The fabric's hardware gave up.
    #[error("RDMA device {device}: {fault}")]
    Hardware {
        /// The device.
        device: String,
        /// What it says.
        #[source]
        fault: HardwareFault,
    },
    /// What a fabric outside this crate says.
    #[error("{0}")]
    Fabric(String),
}

/// Why a fabric's hardware carries nothing more over a link.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HardwareFault {
    /// The peer acknowledges nothing, however often it is sent.
    #[error(
        "the peer acknowledges nothing: its host or the path to it is gone; check cable, switch (MTU, PFC) and \
         firewall (RoCE: UDP port 4791)"
    )]
    PathLost,
    /// The peer was not ready for a message.
    #[error("the peer was not ready for a message in time: its agent hangs, or is of another version")]
    ReceiverNotReady,
    /// This side's memory may not be used as an operation did.
    #[error("this side's memory was refused to an operation; report it with the agent's log")]
    LocalProtection,
    /// An operation was malformed at this side.
    #[error("an operation was malformed; report it with the agent's log")]
    LocalOperation,
    /// The peer's device found an operation malformed.
    #[error("the peer's device found an operation malformed: are both agents of one version?")]
    RemoteInvalid,
    /// The peer's device failed at an operation.
    #[error("the peer's device failed at an operation: see the kernel's log of the peer's host")]
    RemoteOperation,
    /// An answer of the peer's device was not understood.
    #[error("an answer of the peer's device was not understood: see the kernel's log of both hosts")]
    BadResponse,
    /// The queue pair broke.
    #[error("the queue pair broke: see the kernel's log")]
    QueuePair,
    /// A completion queue broke.
    #[error("a completion queue broke: see the kernel's log")]
    CompletionQueue,
    /// The port went down.
    #[error("the port went down: check the link (`rdma link`, `ip link`)")]
    PortDown,
    /// The device failed.
    #[error("the device failed: see the kernel's log")]
    DeviceFailed,
    /// The device was removed.
    #[error("the device was removed, or its driver restarted")]
    DeviceRemoved,
    /// A status that this version does not know.
    #[error("it ended an operation with status {status}, vendor's code {vendor:#x}: see the kernel's log")]
    Status {
        /// The status, as in `enum ibv_wc_status`.
        status: u32,
        /// The vendor's own code.
        vendor: u32,
    },
}
