//! The eBPF probes: which are absent, and why.

use std::collections::BTreeMap;
use std::time::Duration;

use ramferry_probes::{Absence, Options, Probe, ProbeState, Probes, absences};
use tokio::sync::watch;

use super::verdict::Verdict;
use crate::config::ProbesMode;
use crate::probes::{States, all_absent};

/// How long an agent's probes may take to be attached before they are told of as they are.
const ATTACHING: Duration = Duration::from_secs(10);

/// Each probe, and whether it is attached.
#[derive(Clone, Debug)]
pub(super) struct ProbeStates(pub(super) BTreeMap<Probe, ProbeState>);

impl ProbeStates {
    /// Those of the agent.
    pub(super) async fn of_agent(mut states: watch::Receiver<States>) -> Self {
        let known = tokio::time::timeout(ATTACHING, states.wait_for(Option::is_some)).await;
        let known = known.ok().and_then(Result::ok).and_then(|states| states.clone());
        Self(known.unwrap_or_else(|| all_absent(&Absence::Pending)))
    }

    /// Attaches what this process can, and detaches it again.
    pub(super) fn tried(mode: ProbesMode) -> Self {
        match mode {
            ProbesMode::Off => Self(all_absent(&Absence::Off)),
            ProbesMode::Auto => Self(Probes::attach(Options::default()).states().clone()),
        }
    }

    pub(super) fn judge(&self) -> Verdict {
        let attached = self.0.values().filter(|state| state.is_attached()).count();
        let counted = format!("{attached} of {} attached", self.0.len());
        let absent = absences(&self.0);
        match &absent[..] {
            [] => return Verdict::ok(counted),
            [one] if matches!(one.absence, Absence::Off | Absence::Pending) => {
                return Verdict::skip(one.absence.to_string());
            }
            _ => {}
        }
        let told: Vec<String> = absent.iter().map(ToString::to_string).collect();
        let mut remedies: Vec<&str> = Vec::new();
        for remedy in absent.iter().map(|absent| absent.absence.remedy()) {
            if !remedy.is_empty() && !remedies.contains(&remedy) {
                remedies.push(remedy);
            }
        }
        Verdict::warn(
            format!("{counted}; {}", told.join("; ")),
            format!("{} (migrations do not need probes)", remedies.join("; ")),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::verdict::Status;
    use super::*;

    fn states(absent: &[(Probe, Absence)]) -> ProbeStates {
        let mut states: BTreeMap<_, _> =
            Probe::ALL.into_iter().map(|probe| (probe, ProbeState::Attached)).collect();
        states.extend(absent.iter().map(|(probe, absence)| (*probe, ProbeState::Absent(absence.clone()))));
        ProbeStates(states)
    }

    #[test]
    fn absent_probes_warn_with_each_reason_and_each_remedy_once() {
        assert_eq!(states(&[]).judge(), Verdict::ok("10 of 10 attached"));
        let verdict = states(&[
            (Probe::IbUverbsRegMr, Absence::NoBtf),
            (Probe::IbUmemGet, Absence::Needs(Probe::IbUverbsRegMr)),
            (Probe::IbvRegDmabufMr, Absence::NoUprobes),
        ])
        .judge();
        assert_eq!(verdict.status, Status::Warn);
        for part in ["7 of 10 attached", "ib_uverbs_reg_mr: this kernel has no type", "ib_umem_get: it needs"]
        {
            assert!(verdict.evidence.contains(part), "{verdict:?} does not say {part}");
        }
        assert_eq!(verdict.remedy.matches("mount /sys here").count(), 2, "{verdict:?}");
        let twice = states(&[(Probe::IbvRegMr, Absence::NoBtf), (Probe::IbUmemGet, Absence::NoBtf)]).judge();
        assert_eq!(twice.remedy.matches("mount /sys here").count(), 1, "{twice:?}");
    }

    #[test]
    fn probes_that_are_off_or_not_attached_yet_are_skipped() {
        for absence in [Absence::Off, Absence::Pending] {
            let verdict = ProbeStates(all_absent(&absence)).judge();
            assert_eq!(verdict, Verdict::skip(absence.to_string()));
        }
    }

    #[tokio::test]
    async fn an_agents_probes_are_waited_for() {
        let (attached, states) = watch::channel(None);
        let asked = tokio::spawn(ProbeStates::of_agent(states));
        attached.send_replace(Some(all_absent(&Absence::NoUprobes)));
        assert_eq!(asked.await.unwrap().judge().status, Status::Warn);
    }
}
