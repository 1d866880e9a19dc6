use std::any::Any;
use std::sync::Arc;

use ramferry_ram::{Access, Memory};

use super::Fixture;
use crate::faulty::{Faults, FaultyLink};
use crate::{FabricKind, Link, LinkError, SessionToken};

/// A fabric whose completions come late and whose queue is full now and then.
#[derive(Debug)]
pub struct Delayed<F>(pub F);

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

    fn is_available(&self) -> bool {
        self.0.is_available()
    }

    fn source_access(&self) -> Access {
        self.0.source_access()
    }

    fn domain(&self, memory: Arc<Memory>) -> Arc<F::Domain> {
        self.0.domain(memory)
    }

    fn destination_domain(&self, memory: Arc<Memory>) -> Arc<F::Domain> {
        self.0.destination_domain(memory)
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
