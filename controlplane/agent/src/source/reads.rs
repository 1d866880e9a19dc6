//! The source's part of post-copy: its memory is there to be read by the destination, over links that come from there,
//! until that has everything; after a restart of this agent, too.

use std::sync::{Arc, Weak};

use ramferry_engine::{Failure, Reason, SourceEvent};
use ramferry_fabric::{FabricKind, SessionToken};
use ramferry_mover::{FAULT_LINKS, Lent, SourceInput, WindowsAnswer};
use ramferry_proto::v1;
use ramferry_proto::v1::exchange_control_request::Order;
use ramferry_ram::{Access, Memory, PageSets};
use tonic::Status;

use super::{Session, blocking_step};
use crate::MigrationRole;
use crate::destination::{windows_registered, windows_released};
use crate::keepsake::{self, Keepsake, Terms};
use crate::request::fabric_on_the_wire;

/// Runs that one message about what is owed carries.
const OWED_RUNS: usize = 16 * 1024;

/// What is to be read, and on which terms.
#[derive(Default)]
pub(super) struct Reads {
    memory: Weak<Memory>,
    /// Found again after a restart; nobody else keeps it.
    reopened: Option<Arc<Memory>>,
    terms: Option<Terms>,
}

impl Reads {
    pub(super) fn of(memory: &Arc<Memory>, terms: Terms) -> Self {
        Self { memory: Arc::downgrade(memory), reopened: None, terms: Some(terms) }
    }
}

impl Session {
    /// Keeps what another agent on this host would need to go on, then lets the destination read.
    pub(super) async fn begin_reads(self: &Arc<Self>) -> Result<(), Failure> {
        let (memory, terms) = self.memory()?;
        let token = self.peer.token();
        let pid = self.guest.get().await?.pid();
        let kept = Keepsake::new(&self.agent.boot_id, pid, &terms, token.as_ref(), &memory);
        kept.write(&keepsake::path(&self.agent.config, &self.entry.id, MigrationRole::Source))?;
        self.serve_reads(memory, terms).await
    }

    /// Lets the destination read again, and asks it how far it is. While that is under way another call does nothing: an
    /// offer that takes the place of one whose links are being opened breaks them.
    pub(super) async fn reconnect(self: &Arc<Self>) -> Result<(), Failure> {
        let Ok(_turn) = self.reconnecting.try_lock() else { return Ok(()) };
        let lost = |status: Status| {
            let message = format!(
                "the destination's agent cannot be reached: {}. The guest runs there, and waits where it needs memory that \
                 is still here: see that both agents run and reach each other",
                status.message()
            );
            Failure::new(Reason::PeerLost, message)
        };
        let (memory, terms) = self.memory()?;
        self.peer.open().await.map_err(lost)?;
        self.serve_reads(memory, terms).await?;
        self.send(Order::AskOutcome(v1::AskOutcome {})).await
    }

    /// Lets the destination read before it is asked: after a handover into post-copy its VMM may wait for memory, and so
    /// not resume the guest, without which there is no answer.
    pub(super) async fn lend_to_ask(self: &Arc<Self>) {
        let kept = keepsake::path(&self.agent.config, &self.entry.id, MigrationRole::Source);
        let Ok(_turn) = self.reconnecting.try_lock() else { return };
        if !kept.exists() {
            return;
        }
        let lent = async {
            let (memory, terms) = self.memory()?;
            self.serve_reads(memory, terms).await
        };
        if let Err(failure) = lent.await {
            self.handle.send(event_of(failure));
        }
    }

    /// Tells the destination that what it is owed is lost.
    pub(super) async fn tell_memory_lost(self: &Arc<Self>, failure: &Failure) -> Result<(), Failure> {
        self.peer.open().await.map_err(|status| Failure::new(Reason::PeerLost, status.message()))?;
        self.send(Order::MemoryLost(v1::MemoryLost { message: failure.message.clone() })).await
    }

    /// Tells the destination what it is owed, from the driver's thread.
    pub(super) fn send_owed(&self, pages: &PageSets) -> bool {
        let send = |pages: Vec<v1::PageRuns>, last| {
            self.peer.send_blocking(Order::OwedPages(v1::OwedPages { pages, last }))
        };
        for (block, set) in pages.iter() {
            let runs: Vec<_> = set.runs().collect();
            for runs in runs.chunks(OWED_RUNS) {
                let runs = runs.iter().flat_map(|run| [run.first, run.count]).collect();
                if !send(vec![v1::PageRuns { block: block.0, runs }], false) {
                    return false;
                }
            }
        }
        send(Vec::new(), true)
    }

    /// Forgets what was kept.
    pub(super) fn end_reads(&self) {
        keepsake::remove(&self.agent.config, &self.entry.id, MigrationRole::Source);
        *self.reads() = Reads::default();
    }

    async fn serve_reads(self: &Arc<Self>, memory: Arc<Memory>, terms: Terms) -> Result<(), Failure> {
        let links = u32::try_from(FAULT_LINKS).expect("a few") + terms.streams;
        let random = |error: getrandom::Error| Failure::new(Reason::Internal, error.to_string());
        let token = SessionToken::random().map_err(random)?;
        let (session, asked) = (Arc::clone(self), token.clone());
        let admit = move || {
            let fabrics = &session.agent.fabrics;
            let admitted = fabrics.admit(terms.fabric, asked.clone(), &memory, links);
            // Guests may leave over RDMA from a host at which none can arrive.
            let (fabric, admitted) = match admitted {
                Err(why) if terms.fabric == FabricKind::Verbs => {
                    tracing::warn!(%why, "in post-copy memory is read over tcp");
                    (FabricKind::Tcp, fabrics.admit(FabricKind::Tcp, asked, &memory, links)?)
                }
                admitted => (terms.fabric, admitted?),
            };
            Ok((fabric, admitted, memory))
        };
        let (fabric, admitted, memory) = blocking_step(admit).await?;
        let answering = Arc::clone(&self.peer);
        self.handle.send(SourceInput::Lend(Box::new(Lent {
            links: admitted.links,
            domain: admitted.domain,
            memory,
            registration_workers: self.agent.config.registration_workers,
            answer: Box::new(move |answer| {
                answering.send_blocking(match answer {
                    WindowsAnswer::Registered(windows) => {
                        Order::WindowsRegistered(windows_registered(windows))
                    }
                    WindowsAnswer::Released(ids) => Order::WindowsReleased(windows_released(&ids)),
                })
            }),
        })));
        let order = v1::ServeReads {
            fabric: fabric_on_the_wire(fabric).into(),
            address: self.agent.fabrics.address(fabric),
            token: token.as_bytes().to_vec(),
            links,
        };
        self.send(Order::ServeReads(order)).await
    }

    /// The guest's RAM: the driver's, or what is found of it after a restart.
    fn memory(&self) -> Result<(Arc<Memory>, Terms), Failure> {
        let mut reads = self.reads();
        if let (Some(memory), Some(terms)) = (reads.memory.upgrade(), &reads.terms) {
            return Ok((memory, terms.clone()));
        }
        let path = keepsake::path(&self.agent.config, &self.entry.id, MigrationRole::Source);
        let lost = || Failure::new(Reason::MemoryLost, format!("{} is gone", path.display()));
        let kept = Keepsake::read(&path)?.ok_or_else(lost)?;
        let (memory, terms) = (kept.reopen(&self.agent.boot_id, Access::Read)?, kept.terms());
        reads.memory = Arc::downgrade(&memory);
        reads.reopened = Some(Arc::clone(&memory));
        reads.terms = Some(terms.clone());
        Ok((memory, terms))
    }

    async fn send(&self, order: Order) -> Result<(), Failure> {
        if self.peer.send(order).await {
            return Ok(());
        }
        Err(Failure::new(Reason::PeerLost, "the control stream to the destination's agent is lost"))
    }

    fn reads(&self) -> std::sync::MutexGuard<'_, Reads> {
        self.reads.lock().expect("no panic while it is held")
    }
}

/// What a failed step of post-copy means to the engine.
pub(super) fn event_of(failure: Failure) -> SourceEvent {
    if failure.reason == Reason::MemoryLost {
        SourceEvent::MemoryLost(crate::keepsake::why_lost(failure))
    } else {
        SourceEvent::Failed(failure)
    }
}
