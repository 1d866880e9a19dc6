//! The destination's part of post-copy: links to the source's memory, what the guest is owed, and the way back to both
//! after a restart of this agent.

use std::net::IpAddr;
use std::sync::{Arc, Weak};

use ramferry_engine::{DestinationEvent, Failure, Reason};
use ramferry_fabric::windows::{DEFAULT_WINDOW_BYTES, RegistrationMode, WindowConfig};
use ramferry_fabric::{FabricKind, SessionToken};
use ramferry_mover::{DestinationInput, FAULT_LINKS, PeerOrder, Readers, Retaken, reads_lost};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_response::Answer;
use ramferry_ram::{Access, Layout, Memory, Owed, PageSets};
use ramferry_tracking::postcopy::{self, FaultsError, RemoteFaults};

use super::DestinationSession;
use crate::MigrationRole;
use crate::fabrics::{Agreed, Connected};
use crate::keepsake::{self, Keepsake, Terms};
use crate::request::{MAX_STREAMS, reading_budget};
use crate::source::{add_runs, blocking_step, is_shm_socket, orders};
use crate::status::causes;

/// Where a fault waits for the whole of its window.
const SHORT_WINDOW_BYTES: u64 = 8 << 20;

/// What a destination reads, from where.
#[derive(Default)]
pub(super) struct Reads {
    memory: Weak<Memory>,
    terms: Option<Terms>,
    /// The source's last offer, until its links are opened.
    offer: Option<v1::ServeReads>,
    /// Whoever reads is there: an offer's links are opened when it comes.
    begun: bool,
    /// The source's agent, as it came.
    peer: Option<IpAddr>,
    /// Of what is owed, what was named so far.
    owed: Option<PageSets>,
}

/// When links to the source's memory are opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// As post-copy begins: the guest still runs at the source.
    First,
    /// In post-copy: the guest is here, and waits.
    Again,
}

impl DestinationSession {
    pub(super) fn note_memory(&self, memory: &Arc<Memory>, terms: Terms) {
        let mut reads = self.reads();
        reads.memory = Arc::downgrade(memory);
        reads.terms = Some(terms);
    }

    /// A control stream came from there.
    pub(crate) fn note_peer(&self, peer: Option<IpAddr>) {
        self.reads().peer = peer;
    }

    /// The source's memory can be read. Before post-copy the links are opened when it begins; in it, at once.
    pub(crate) fn take_offer(self: &Arc<Self>, offer: v1::ServeReads) {
        let begun = {
            let mut reads = self.reads();
            reads.offer = Some(offer);
            reads.begun
        };
        if begun {
            self.open_soon();
        }
    }

    /// Whoever reads was found again: an offer that came before may be waiting.
    pub(super) fn has_retaken(self: &Arc<Self>) {
        self.reads().begun = true;
        self.open_soon();
    }

    /// Whether links are being opened, or are about to be.
    pub(super) fn is_opening(&self) -> bool {
        self.opening.try_lock().is_err() || self.reads().offer.is_some()
    }

    fn open_soon(self: &Arc<Self>) {
        let session = Arc::clone(self);
        let connecting = self.agent.runtime.spawn(async move {
            if let Err(failure) = session.open_readers(Opening::Again).await {
                session.handle.send(DestinationEvent::Failed(reads_lost(&failure)));
            }
        });
        self.keep(connecting.abort_handle());
    }

    /// A part of what is owed; all of it after the last.
    pub(crate) fn take_owed(&self, part: &v1::OwedPages) -> Result<Option<PageSets>, String> {
        let mut reads = self.reads();
        let layout = reads.memory.upgrade().map(|memory| memory.layout().clone());
        let layout: Layout = layout.ok_or("it named what is owed before the memory was there")?;
        let pages = reads.owed.get_or_insert_with(|| PageSets::new(&layout));
        for runs in &part.pages {
            add_runs(pages, runs)?;
        }
        Ok(if part.last { reads.owed.take() } else { None })
    }

    /// Keeps what another agent on this host would need to go on, or to give the VMM back: before anything is done to it.
    pub(crate) async fn prepare_reads(&self) -> Result<(), Failure> {
        let vmm = self.guest.get().await?.pid();
        let (memory, terms) = self.memory_to_read()?;
        let kept = Keepsake::new(&self.agent.boot_id, vmm, &terms, None, &memory);
        kept.write(&keepsake::path(&self.agent.config, &self.entry.id, MigrationRole::Destination))
    }

    /// Opens the first links.
    pub(super) async fn begin_reads(self: &Arc<Self>) -> Result<(), Failure> {
        {
            let mut reads = self.reads();
            if reads.offer.is_none() {
                return Err(refused("it came to post-copy without one"));
            }
            reads.begun = true;
        }
        self.open_readers(Opening::First).await
    }

    /// Opens the links of the last offer, unless another call has, or does: one at a time, or the links of an older
    /// one might take the place of a newer one's.
    async fn open_readers(self: &Arc<Self>, opening: Opening) -> Result<(), Failure> {
        let _turn = self.opening.lock().await;
        let (memory, terms) = self.memory_to_read()?;
        let (offer, peer) = {
            let mut reads = self.reads();
            (reads.offer.take(), reads.peer)
        };
        let Some(offer) = offer else { return Ok(()) };
        let token = <[u8; SessionToken::BYTES]>::try_from(&*offer.token)
            .map_err(|_| refused("its token is not 32 bytes long"))?;
        let fabric = crate::request::fabric(offer.fabric).ok().flatten();
        let fabric = fabric.ok_or_else(|| refused("it names no fabric"))?;
        let most = MAX_STREAMS + FAULT_LINKS as u32;
        if offer.links == 0 || offer.links > most || offer.address.len() > crate::status::TEXT_BYTES {
            return Err(refused("it is of no or too many links"));
        }
        if fabric == FabricKind::Shm && !is_shm_socket(&offer.address) {
            return Err(refused("its socket is not one of an agent"));
        }
        let agreed = Agreed {
            token: SessionToken::from_bytes(token),
            fabric,
            fabric_reason: String::new(),
            address: offer.address,
            streams: offer.links,
        };
        let budget = terms.pin_budget_bytes.map(|bytes| reading_budget(bytes, memory.layout()));
        let agent = Arc::clone(&self.agent);
        let to = peer.map_or_else(String::new, |peer| std::net::SocketAddr::new(peer, 0).to_string());
        let Connected { domain, links, links_bytes } =
            blocking_step(move || agent.fabrics.connect(&agreed, &memory, &to)).await?;
        let ordering = Arc::clone(self);
        let windows = WindowConfig { links_bytes, ..windows_to_read(fabric, budget, opening)? };
        self.handle.send(DestinationInput::Readers(Box::new(Readers {
            links,
            domain,
            windows,
            registration_workers: self.agent.config.registration_workers,
            order: Box::new(move |order| ordering.order_of_the_data_plane(&order)),
        })));
        Ok(())
    }

    fn order_of_the_data_plane(&self, order: &PeerOrder) -> bool {
        use v1::exchange_control_request::Order;
        orders(order).into_iter().all(|order| {
            self.answer_blocking(match order {
                Order::RegisterWindows(order) => Answer::RegisterWindows(order),
                Order::ReleaseWindows(order) => Answer::ReleaseWindows(order),
                other => unreachable!("{other:?} is no order of one that reads"),
            })
        })
    }

    /// Gives back a VMM that this agent, or one before it, had made wait for a guest that will not run here: or else it
    /// could neither be ended nor be used again.
    pub(super) async fn give_vmm_back(&self) -> Result<(), Failure> {
        let path = keepsake::path(&self.agent.config, &self.entry.id, MigrationRole::Destination);
        let boot_id = self.agent.boot_id.clone();
        blocking_step(move || {
            let Some(kept) = Keepsake::read(&path)? else { return Ok(()) };
            let memory = kept.reopen(&boot_id, Access::ReadWrite)?;
            match postcopy::release(kept.vmm, &memory) {
                Err(error) if !error.vmm_ended() => Err(of_faults(&error)),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Takes up what this agent left when it ended: the VMM waits.
    pub(super) async fn retake(self: &Arc<Self>) -> Result<DestinationInput, Failure> {
        let session = Arc::clone(self);
        blocking_step(move || {
            let (config, id) = (&session.agent.config, &session.entry.id);
            let path = keepsake::path(config, id, MigrationRole::Destination);
            let lost = |why: String| Failure::new(Reason::MemoryLost, why);
            let kept = Keepsake::read(&path)?.ok_or_else(|| lost(format!("{} is gone", path.display())))?;
            let memory = kept.reopen(&session.agent.boot_id, Access::ReadWrite)?;
            let owed = Owed::open(&keepsake::owed_path(config, id), id, memory.layout())
                .map_err(|error| lost(causes(&error)))?;
            session.note_memory(&memory, kept.terms());
            if owed.is_empty() {
                // It may have been let in already, in part or whole.
                postcopy::release(kept.vmm, &memory).map_err(|error| of_faults(&error))?;
                return Ok(DestinationEvent::Pulled.into());
            }
            let faults = RemoteFaults::retake(kept.vmm, Arc::clone(&memory), &kept.partners);
            let faults = match faults {
                Err(error) if error.vmm_ended() => {
                    return Ok(DestinationEvent::GuestGone(of_faults(&error)).into());
                }
                faults => faults.map_err(|error| of_faults(&error))?,
            };
            let answering = Arc::clone(&session);
            Ok(DestinationInput::Retaken(Box::new(Retaken {
                memory,
                faults,
                owed,
                answer: Arc::new(move |answer| answering.answer_of_the_data_plane(answer)),
            })))
        })
        .await
    }

    fn memory_to_read(&self) -> Result<(Arc<Memory>, Terms), Failure> {
        let reads = self.reads();
        let known = reads.memory.upgrade().zip(reads.terms.clone());
        known.ok_or_else(|| Failure::new(Reason::Internal, "the guest's RAM is not held any more"))
    }

    fn reads(&self) -> std::sync::MutexGuard<'_, Reads> {
        self.reads.lock().expect("no panic while it is held")
    }
}

/// Where nothing is pinned all windows are ordered at once at first. Later a guest waits: what it waits for comes first.
fn windows_to_read(
    fabric: FabricKind,
    pin_budget_bytes: Option<u64>,
    opening: Opening,
) -> Result<WindowConfig, Failure> {
    let at_once = opening == Opening::First && fabric != FabricKind::Verbs && pin_budget_bytes.is_none();
    let mode = if at_once { RegistrationMode::PinAll } else { RegistrationMode::Dynamic };
    let window_bytes = if at_once { DEFAULT_WINDOW_BYTES } else { SHORT_WINDOW_BYTES };
    let random = getrandom::u32().map_err(|error| Failure::new(Reason::Internal, error.to_string()))?;
    let first_id = u64::from(random) << u32::BITS;
    Ok(WindowConfig { pin_budget_bytes, window_bytes, first_id, ..WindowConfig::new(mode) })
}

fn refused(what: &str) -> Failure {
    Failure::new(Reason::PeerRefused, format!("the source's offer: {what}"))
}

fn of_faults(error: &FaultsError) -> Failure {
    let not_held_up = matches!(error, FaultsError::NotArmed { .. });
    let reason = if not_held_up { Reason::MemoryLost } else { Reason::GuestFailed };
    Failure::new(reason, causes(error))
}
