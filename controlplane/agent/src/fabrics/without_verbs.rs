//! In the place of verbs, in a build that has none.

use std::net::SocketAddr;
use std::sync::Arc;

use ramferry_engine::{Failure, Reason};
use ramferry_fabric::SessionToken;
use ramferry_ram::Memory;

use super::{Admitted, Agreed, Connected, PortMtu};
use crate::config::{Config, RdmaListen};
use crate::core::CoreError;

/// Whether this build has verbs.
pub(crate) const HAS_VERBS: bool = false;
const ABSENT: &str = "this agent was built without verbs (cargo feature \"verbs\")";

#[derive(Debug)]
pub(super) struct Verbs;

impl Verbs {
    pub(super) fn open(config: &Config) -> Result<Self, CoreError> {
        match config.rdma_listen {
            RdmaListen::At(address) => Err(CoreError::VerbsAbsent { address }),
            RdmaListen::Auto | RdmaListen::Off => Ok(Self),
        }
    }

    pub(super) fn reaches_peers(&self) -> Result<String, String> {
        Err(ABSENT.into())
    }

    pub(super) fn is_reached_by_peers(&self) -> Result<String, String> {
        Err(ABSENT.into())
    }

    pub(super) fn describe(&self) -> Result<String, String> {
        Err(ABSENT.into())
    }

    pub(super) fn address(&self) -> String {
        String::new()
    }

    pub(super) fn admit(&self, _: SessionToken, _: Arc<Memory>, _: u32) -> Result<Admitted, Failure> {
        Err(Failure::new(Reason::PeerRefused, ABSENT))
    }

    pub(super) fn connect(&self, _: SocketAddr, _: &Agreed, _: &Arc<Memory>) -> Result<Connected, Failure> {
        Err(Failure::new(Reason::PeerRefused, ABSENT))
    }
}

pub(crate) fn port_mtus() -> Result<Vec<PortMtu>, String> {
    Err(ABSENT.into())
}

pub(crate) fn rdma_listen_address(_: &Config) -> Result<SocketAddr, String> {
    Err(ABSENT.into())
}
