//! Which probes there are.

use std::collections::BTreeMap;

use crate::Absence;

/// A place that is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names of the functions")]
pub enum Probe {
    IbvRegMr,
    IbvRegMrIova,
    IbvRegMrIova2,
    IbvRegDmabufMr,
    IbvDeregMr,
    IbvCmdRegMr,
    IbvCmdRegDmabufMr,
    IbUverbsRegMr,
    IbUmemGet,
    TryToCompactPages,
}

/// Where a probe's function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Libibverbs,
    Kernel,
}

/// Whether a probe sees anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeState {
    /// It does.
    Attached,
    /// It does not, and why.
    Absent(Absence),
}

impl Probe {
    /// All of them, in the order in which they are attached: what ends a call before what begins one, and
    /// each after those that it needs.
    pub const ALL: [Self; 10] = [
        Self::IbvCmdRegMr,
        Self::IbvCmdRegDmabufMr,
        Self::IbvRegMr,
        Self::IbvRegMrIova,
        Self::IbvRegMrIova2,
        Self::IbvRegDmabufMr,
        Self::IbvDeregMr,
        Self::IbUverbsRegMr,
        Self::IbUmemGet,
        Self::TryToCompactPages,
    ];

    /// The function, and the probe's name in metrics and in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::IbvRegMr => "ibv_reg_mr",
            Self::IbvRegMrIova => "ibv_reg_mr_iova",
            Self::IbvRegMrIova2 => "ibv_reg_mr_iova2",
            Self::IbvRegDmabufMr => "ibv_reg_dmabuf_mr",
            Self::IbvDeregMr => "ibv_dereg_mr",
            Self::IbvCmdRegMr => "ibv_cmd_reg_mr",
            Self::IbvCmdRegDmabufMr => "ibv_cmd_reg_dmabuf_mr",
            Self::IbUverbsRegMr => "ib_uverbs_reg_mr",
            Self::IbUmemGet => "ib_umem_get",
            Self::TryToCompactPages => "try_to_compact_pages",
        }
    }

    pub(crate) const fn place(self) -> Place {
        match self {
            Self::IbUverbsRegMr | Self::IbUmemGet | Self::TryToCompactPages => Place::Kernel,
            _ => Place::Libibverbs,
        }
    }

    /// The programs at its return and at its entry. Attached in that order: a call whose beginning is seen is
    /// then one whose end is seen, too.
    pub(crate) const fn programs(self) -> &'static [&'static str] {
        match self {
            Self::IbvRegMr | Self::IbvRegMrIova | Self::IbvRegMrIova2 | Self::IbvRegDmabufMr => {
                &["register_exit", "register_enter"]
            }
            Self::IbvDeregMr => &["deregister_exit", "deregister_enter"],
            Self::IbvCmdRegMr | Self::IbvCmdRegDmabufMr => &["command_exit"],
            Self::IbUverbsRegMr => &["register_exit", "register_enter"],
            Self::IbUmemGet => &["pin_exit", "pin_enter"],
            Self::TryToCompactPages => &["compaction_exit", "compaction_enter"],
        }
    }

    /// The probe without which this one sees nothing.
    pub(crate) const fn needs(self) -> Option<Self> {
        match self {
            Self::IbUmemGet | Self::TryToCompactPages => Some(Self::IbUverbsRegMr),
            _ => None,
        }
    }

    /// Its number among the functions of libibverbs, each of which has a bit in the programs' `inside`.
    pub(crate) const fn number(self) -> u64 {
        let number = self as u64;
        assert!(number < 32, "there are no more bits");
        number
    }
}

impl ProbeState {
    /// Whether it is attached.
    pub const fn is_attached(&self) -> bool {
        matches!(self, Self::Attached)
    }

    /// Why it is not.
    pub const fn absence(&self) -> Option<&Absence> {
        match self {
            Self::Attached => None,
            Self::Absent(absence) => Some(absence),
        }
    }
}

/// Probes that are absent for one reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Absent<'a> {
    /// The reason.
    pub absence: &'a Absence,
    /// Which.
    pub probes: Vec<&'static str>,
}

impl std::fmt::Display for Absent<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.probes.join(", "), self.absence)
    }
}

/// The probes that are absent, by the reason.
pub fn absences(states: &BTreeMap<Probe, ProbeState>) -> Vec<Absent<'_>> {
    let mut all: Vec<Absent<'_>> = Vec::new();
    for (probe, state) in states {
        let Some(absence) = state.absence() else { continue };
        match all.iter_mut().find(|absent| absent.absence == absence) {
            Some(absent) => absent.probes.push(probe.as_str()),
            None => all.push(Absent { absence, probes: vec![probe.as_str()] }),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn all_lists_every_probe_once_and_after_what_it_needs() {
        let listed: BTreeSet<_> = Probe::ALL.into_iter().collect();
        assert_eq!(listed.len(), Probe::ALL.len());
        let place = |probe| Probe::ALL.into_iter().position(|other| other == probe);
        for probe in Probe::ALL {
            assert!(probe.needs().is_none_or(|needed| place(needed) < place(probe)), "{probe:?}");
            assert!(probe.programs()[0].ends_with("_exit"), "{probe:?}");
        }
    }

    #[test]
    fn probes_that_are_absent_for_one_reason_are_told_together() {
        let absent = |probe, absence| (probe, ProbeState::Absent(absence));
        let states = BTreeMap::from([
            (Probe::IbvRegMr, ProbeState::Attached),
            absent(Probe::IbUverbsRegMr, Absence::NoBtf),
            absent(Probe::IbvDeregMr, Absence::Off),
            absent(Probe::IbUmemGet, Absence::NoBtf),
        ]);
        let told: Vec<String> = absences(&states).iter().map(ToString::to_string).collect();
        let [off, btf] = &told[..] else { panic!("{told:?}") };
        assert_eq!(off, "ibv_dereg_mr: probes are turned off");
        assert!(
            btf.starts_with("ib_uverbs_reg_mr, ib_umem_get: this kernel has no type information"),
            "{btf}"
        );
    }
}
