//! Links over RDMA: RoCE, InfiniBand and iWARP alike.
//!
//! This is the one crate that names `rdma-sys`. A link is one reliably connected
//! queue pair, found, made and ended by librdmacm; several links of a session are
//! several queue pairs. The destination's CPU takes no part in a transfer.
//!
//! ```text
//!  source agent                                      destination agent
//!  domain_towards(address)                           Listener::bind, domain, admit
//!    | device, port and address: librdmacm's           | one protection domain a session
//!  connect                                             |
//!    -- request: hello with the token ---------------->| acceptor: judges
//!    <------------ accept: welcome, or reject: verdict-| a thread a link
//!  VerbsLink                                           |
//!    == RDMA WRITE, RDMA READ ========================>| (device alone: key, bounds, rights)
//!    -- SEND fence n --------------------------------->| its receive is behind the writes before it
//!    <--------------------------- SEND fence answer n -|
//!    -- SEND goodbye --------------------------------->|
//!    -- disconnect ----------------------------------->|
//! ```
//!
//! * **Keys.** A place's offset is the address that the device is given: regions are
//!   registered under the offsets of their block, so that neither side needs a table
//!   of the other's. See [`VerbsDomain`] for what keeps others out.
//! * **Completions.** Requests are posted in chains of up to 16, of which the last is
//!   told when it ends; requests end in order, so that this speaks for those before
//!   it. When one fails, each that is left ends once, with the first reason.
//! * **Fences** are messages: that a write has ended at its sender does not prove
//!   that it is placed. iWARP, which has no writes that notify, works the same way.
//!   Both sides have receives posted for every message that there can be (16 fences
//!   and the goodbye), so that none ever finds its receiver unready.
//! * **Waiting.** A link is polled; [`Link::wait`](ramferry_fabric::Link::wait) arms
//!   the completion queues, polls once more, and sleeps on their descriptors, the
//!   connection's and the device's.
//! * **Lost peers.** An agent that ends is heard of through the connection manager at
//!   once; a link with operations under way waits half a second more for their ends,
//!   which may say why. So does one whose queue pair failed: that alone says no cause, and
//!   a peer that ended is heard of meanwhile. A host or path that is gone is found by the
//!   device, which sends a packet 7 times, within 4 to 8 s (RoCE, InfiniBand).
//! * **iWARP** has the peer's device write what is read: regions that reads are to
//!   land in need [`Rights::REMOTE_WRITE`](ramferry_fabric::Rights::REMOTE_WRITE).
//! * **Kernels before 6.2** pin memory only where it is mapped for writing, also to send
//!   it: [`source_access`] tells how a source has to map its guest.
//! * **On-demand paging** is used where the device offers it for connected queue
//!   pairs: nothing is pinned then, and the device is asked to fault pages in ahead.
//!   Soft-RoCE of Linux 6.1 and 6.12 does not offer it; beyond finding that out,
//!   this way has not been tried.

mod cm;
mod completion;
mod connect;
mod context;
mod device;
mod domain;
mod info;
mod interfaces;
mod kernel;
mod link;
mod listener;
pub mod memlock;
mod message;
mod messages;
mod os;
mod protection;
mod queue_pair;
mod region;
mod send_queue;
mod served;
mod session;
mod status;
mod suspicion;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod testing;

pub use connect::{connect, domain_towards};
pub use domain::VerbsDomain;
pub use info::{DeviceError, DeviceInfo, LinkLayer, Transport, devices};
pub use kernel::source_access;
pub use listener::Listener;
pub use messages::MESSAGES_BYTES;
pub use session::Admission;
