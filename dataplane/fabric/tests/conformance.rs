//! The conformance suite on every fabric of this crate, and on each of them
//! through a link that delays completions, turns their order round, and refuses posts.

mod fixtures;

use std::any::Any;
use std::sync::Arc;

use ramferry_fabric::conformance::Fixture;
use ramferry_fabric::faulty::{Faults, FaultyLink};
use ramferry_fabric::{FabricKind, Link, LinkError, SessionToken};
use ramferry_ram::Memory;

mod tcp {
    use super::fixtures::Tcp;

    ramferry_fabric::conformance_suite!(Tcp);
}

mod shm {
    use super::fixtures::Shm;

    ramferry_fabric::conformance_suite!(Shm);
}

mod tcp_delayed {
    use super::Delayed;
    use super::fixtures::Tcp;

    ramferry_fabric::conformance_suite!(Delayed(Tcp));
}

mod shm_delayed {
    use super::Delayed;
    use super::fixtures::Shm;

    ramferry_fabric::conformance_suite!(Delayed(Shm));
}

/// A fabric whose completions come late and whose queue is full now and then.
struct Delayed<F>(F);

impl<F> Delayed<F> {
    fn wrap(link: Box<dyn Link>) -> Box<dyn Link> {
        let faults =
            Faults { delay_polls: 3, refuse_every: Some(7), reverse_completions: true, ..Faults::default() };
        Box::new(FaultyLink::new(link, faults))
    }
}

impl<F: Fixture> Fixture for Delayed<F> {
    type Domain = F::Domain;
    type Destination = F::Destination;

    fn kind(&self) -> FabricKind {
        self.0.kind()
    }

    fn domain(&self, memory: Arc<Memory>) -> Arc<F::Domain> {
        self.0.domain(memory)
    }

    fn admit(&self, token: SessionToken, domain: Arc<F::Domain>, links: u32) -> F::Destination {
        self.0.admit(token, domain, links)
    }

    fn connect(
        &self,
        to: &F::Destination,
        token: &SessionToken,
        domain: Arc<F::Domain>,
    ) -> Result<Box<dyn Link>, LinkError> {
        self.0.connect(to, token, domain).map(Self::wrap)
    }

    fn failure(&self, of: &F::Destination) -> Option<LinkError> {
        self.0.failure(of)
    }

    fn stalled(&self, domain: Arc<F::Domain>) -> Option<(Box<dyn Link>, Box<dyn Any>)> {
        self.0.stalled(domain).map(|(link, peer)| (Self::wrap(link), peer))
    }
}
