//! The source's orders until COMMIT.

use std::time::Duration;

use super::phase::{Incoming, Phase, Serving};
use super::postcopy::Owed;
use super::{Destination, DestinationAction, DestinationEvent};
use crate::{Failure, Reason, limits};

impl Destination {
    /// An order of the source. One that may not come now is a breach of the protocol.
    pub(super) fn order(
        &mut self,
        now: Duration,
        order: DestinationEvent,
        actions: &mut Vec<DestinationAction>,
    ) {
        let Phase::Receiving(receiving) = &mut self.phase else {
            return self.breach(&order, actions);
        };
        let free = receiving.takes_orders(self.owed.is_some());
        let (serving, limit, action) = match order {
            DestinationEvent::EndRound { round } if free && receiving.expects(round) => {
                (Serving::Drain { round }, limits::DRAIN, DestinationAction::DrainRound { round })
            }
            DestinationEvent::PrepareIncoming { postcopy } if free && receiving.incoming == Incoming::Off => {
                receiving.incoming = Incoming::Starting;
                let action = DestinationAction::StartIncoming { postcopy };
                (Serving::Incoming { postcopy }, limits::INCOMING, action)
            }
            DestinationEvent::Owed { pages }
                if free && receiving.incoming == (Incoming::Ready { postcopy: true }) =>
            {
                (Serving::Hold, limits::OWED, DestinationAction::HoldOwed { pages })
            }
            DestinationEvent::Verify if free => (Serving::Digest, limits::VERIFY, DestinationAction::Digest),
            DestinationEvent::Commit if receiving.is_complete() => {
                self.enter(Phase::Committing { veto: None }, None);
                return actions.push(DestinationAction::WriteCommitted);
            }
            order => return self.breach(&order, actions),
        };
        receiving.serving = serving;
        self.limit = Some(now.saturating_add(limit));
        actions.push(action);
    }

    fn breach(&mut self, order: &DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let order = match order {
            DestinationEvent::Owed { .. } => "Owed".to_owned(),
            order => format!("{order:?}"),
        };
        let message = format!("the source's agent ordered {order} in the step {}", self.phase.name());
        self.abort(Failure::new(Reason::PeerRefused, message), actions);
    }

    /// The result of an action; passes it on to the source when it is the one waited for.
    pub(super) fn served(&mut self, result: &DestinationEvent, actions: &mut Vec<DestinationAction>) {
        let Phase::Receiving(receiving) = &mut self.phase else { return };
        match (receiving.serving, result) {
            // The source's VMM sends it beside the last round's end.
            (Serving::Nothing | Serving::Drain { .. }, DestinationEvent::DeviceStateLoaded)
                if matches!(receiving.incoming, Incoming::Ready { .. }) =>
            {
                receiving.incoming = Incoming::Loaded;
                return actions.push(DestinationAction::TellDeviceStateLoaded);
            }
            (Serving::Drain { round }, DestinationEvent::RoundDrained { round: drained })
                if round == *drained =>
            {
                receiving.rounds_ended = round;
                actions.push(DestinationAction::AcknowledgeRound { round });
            }
            (Serving::Incoming { postcopy }, DestinationEvent::IncomingReady) => {
                receiving.incoming = Incoming::Ready { postcopy };
                actions.push(DestinationAction::TellIncomingReady);
            }
            (Serving::Hold, DestinationEvent::OwedHeld) => {
                self.owed = Some(Owed::default());
                actions.push(DestinationAction::TellOwedAccepted);
            }
            (Serving::Digest, DestinationEvent::Verified) => {}
            _ => return,
        }
        receiving.serving = Serving::Nothing;
        self.limit = None;
    }
}
