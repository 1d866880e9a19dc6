//! What completion statuses and events of devices mean.

use ramferry_fabric::{AccessFault, HardwareFault, LinkError, OpError};

/// How a work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// Not carried out, because the queue pair had failed before. It says nothing of why.
    Flushed,
    /// The peer's device refused it: key, bounds or rights.
    RemoteAccess,
    Failed(HardwareFault),
}

impl Outcome {
    /// From `enum ibv_wc_status`.
    pub(crate) fn from_status(status: u32, vendor: u32) -> Self {
        use rdma_sys::ibv_wc_status as wc;
        Outcome::Failed(match status {
            wc::IBV_WC_SUCCESS => return Outcome::Done,
            wc::IBV_WC_WR_FLUSH_ERR => return Outcome::Flushed,
            wc::IBV_WC_REM_ACCESS_ERR => return Outcome::RemoteAccess,
            wc::IBV_WC_LOC_PROT_ERR | wc::IBV_WC_LOC_ACCESS_ERR | wc::IBV_WC_MW_BIND_ERR => {
                HardwareFault::LocalProtection
            }
            wc::IBV_WC_LOC_LEN_ERR
            | wc::IBV_WC_LOC_QP_OP_ERR
            | wc::IBV_WC_LOC_EEC_OP_ERR
            | wc::IBV_WC_LOC_RDD_VIOL_ERR
            | wc::IBV_WC_INV_EECN_ERR
            | wc::IBV_WC_INV_EEC_STATE_ERR
            | wc::IBV_WC_TM_ERR
            | wc::IBV_WC_TM_RNDV_INCOMPLETE => HardwareFault::LocalOperation,
            wc::IBV_WC_REM_INV_REQ_ERR | wc::IBV_WC_REM_INV_RD_REQ_ERR => HardwareFault::RemoteInvalid,
            wc::IBV_WC_REM_OP_ERR | wc::IBV_WC_REM_ABORT_ERR => HardwareFault::RemoteOperation,
            wc::IBV_WC_BAD_RESP_ERR => HardwareFault::BadResponse,
            wc::IBV_WC_RETRY_EXC_ERR | wc::IBV_WC_RESP_TIMEOUT_ERR => HardwareFault::PathLost,
            wc::IBV_WC_RNR_RETRY_EXC_ERR => HardwareFault::ReceiverNotReady,
            wc::IBV_WC_FATAL_ERR => HardwareFault::DeviceFailed,
            _ => HardwareFault::Status { status, vendor },
        })
    }

    /// What becomes of the link, where the outcome says why.
    pub(crate) fn link_error(self, device: &str) -> Option<LinkError> {
        match self {
            Outcome::Done | Outcome::Flushed => None,
            Outcome::RemoteAccess => Some(LinkError::RemoteAccess(AccessFault::Unspecified)),
            Outcome::Failed(fault) => Some(LinkError::Hardware { device: device.to_owned(), fault }),
        }
    }

    /// What becomes of the operation, on a link that is dead of `cause`.
    pub(crate) fn op_result(self, cause: &LinkError) -> Result<(), OpError> {
        match self {
            Outcome::Done => Ok(()),
            Outcome::RemoteAccess => Err(OpError::RemoteAccess(AccessFault::Unspecified)),
            Outcome::Flushed | Outcome::Failed(_) => Err(OpError::LinkDead(cause.clone())),
        }
    }
}

/// What happened to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AsyncEvent {
    /// To one queue pair, whose link is over.
    QueuePair {
        number: u32,
        fault: QueuePairFault,
    },
    /// To a port: its links may go on when it comes back in time.
    PortDown {
        port: u8,
    },
    PortUp {
        port: u8,
    },
    /// To the device: its links are over.
    Device(HardwareFault),
    /// Nothing that ends a link.
    Notice(&'static str),
    /// Nothing that this version knows.
    Unknown(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueuePairFault {
    /// The device gave it up.
    Broken,
    /// An operation of the peer was refused.
    RefusedPeer,
}

impl QueuePairFault {
    pub(crate) fn link_error(self, device: &str) -> LinkError {
        match self {
            QueuePairFault::Broken => {
                LinkError::Hardware { device: device.to_owned(), fault: HardwareFault::QueuePair }
            }
            QueuePairFault::RefusedPeer => LinkError::RefusedPeer(AccessFault::Unspecified),
        }
    }
}

impl AsyncEvent {
    /// From `enum ibv_event_type`; `queue_pair` is asked only where the event is of one.
    pub(crate) fn from_raw(kind: i32, queue_pair: impl FnOnce() -> u32, port: u8) -> Self {
        let queue_pair = |fault| AsyncEvent::QueuePair { number: queue_pair(), fault };
        match kind {
            0 => AsyncEvent::Device(HardwareFault::CompletionQueue),
            1 => queue_pair(QueuePairFault::Broken),
            2 | 3 => queue_pair(QueuePairFault::RefusedPeer),
            4 => AsyncEvent::Notice("first packet on a queue pair"),
            5 => AsyncEvent::Notice("send queue drained"),
            6 => AsyncEvent::Notice("path migrated"),
            7 => AsyncEvent::Notice("path could not migrate"),
            8 => AsyncEvent::Device(HardwareFault::DeviceFailed),
            9 => AsyncEvent::PortUp { port },
            10 => AsyncEvent::PortDown { port },
            11 => AsyncEvent::Notice("local identifier changed"),
            12 => AsyncEvent::Notice("partition keys changed"),
            13 => AsyncEvent::Notice("subnet manager changed"),
            14 => AsyncEvent::Notice("shared receive queue failed"),
            15 => AsyncEvent::Notice("shared receive queue runs low"),
            16 => AsyncEvent::Notice("last receive of a queue pair"),
            17 => AsyncEvent::Notice("subnet manager asks for registration"),
            18 => AsyncEvent::Notice("addresses changed"),
            19 => AsyncEvent::Notice("work queue failed"),
            other => AsyncEvent::Unknown(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdma_sys::ibv_event_type as event;

    #[test]
    fn every_status_says_what_it_means() {
        let fault = |status| match Outcome::from_status(status, 7) {
            Outcome::Failed(fault) => fault,
            other => panic!("{status}: {other:?}"),
        };
        assert_eq!(Outcome::from_status(0, 0), Outcome::Done);
        assert_eq!(Outcome::from_status(5, 0), Outcome::Flushed);
        assert_eq!(Outcome::from_status(10, 0), Outcome::RemoteAccess);
        assert_eq!(fault(4), HardwareFault::LocalProtection);
        assert_eq!(fault(12), HardwareFault::PathLost);
        assert_eq!(fault(13), HardwareFault::ReceiverNotReady);
        assert_eq!(fault(21), HardwareFault::Status { status: 21, vendor: 7 });
        assert_eq!(fault(24), HardwareFault::Status { status: 24, vendor: 7 });
        for status in (1..24).filter(|status| ![5, 10, 21].contains(status)) {
            assert!(
                !matches!(fault(status), HardwareFault::Status { .. }),
                "{status} has a meaning of its own"
            );
        }
    }

    #[test]
    fn only_a_flush_leaves_the_cause_open() {
        for status in 1..30 {
            let outcome = Outcome::from_status(status, 0);
            assert_eq!(outcome.link_error("rxe0").is_none(), outcome == Outcome::Flushed);
            assert!(outcome.op_result(&LinkError::PeerClosed).is_err());
        }
        assert_eq!(Outcome::Done.op_result(&LinkError::PeerClosed), Ok(()));
    }

    #[test]
    fn every_event_of_a_device_is_known() {
        let of = |kind: event| AsyncEvent::from_raw(kind as i32, || 77, 2);
        for kind in 0..=event::IBV_EVENT_WQ_FATAL as i32 {
            assert!(!matches!(AsyncEvent::from_raw(kind, || 77, 2), AsyncEvent::Unknown(_)), "event {kind}");
        }
        assert_eq!(AsyncEvent::from_raw(20, || panic!("no queue pair"), 0), AsyncEvent::Unknown(20));
        let broken = AsyncEvent::QueuePair { number: 77, fault: QueuePairFault::Broken };
        assert_eq!(of(event::IBV_EVENT_QP_FATAL), broken);
        let refused = AsyncEvent::QueuePair { number: 77, fault: QueuePairFault::RefusedPeer };
        assert_eq!(of(event::IBV_EVENT_QP_ACCESS_ERR), refused);
        assert_eq!(of(event::IBV_EVENT_QP_REQ_ERR), refused);
        assert_eq!(of(event::IBV_EVENT_PORT_ERR), AsyncEvent::PortDown { port: 2 });
        assert_eq!(of(event::IBV_EVENT_PORT_ACTIVE), AsyncEvent::PortUp { port: 2 });
        assert_eq!(of(event::IBV_EVENT_DEVICE_FATAL), AsyncEvent::Device(HardwareFault::DeviceFailed));
        assert_eq!(of(event::IBV_EVENT_CQ_ERR), AsyncEvent::Device(HardwareFault::CompletionQueue));
    }
}
