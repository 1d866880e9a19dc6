//! What a check found.

use ramferry_proto::v1;

/// How a check ended. Later ones are worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// It does not apply here, or could not be made; the evidence says why.
    Skip,
    /// As it should be.
    Ok,
    /// Migrations work, and worse than they could, or not all of them.
    Warn,
    /// Migrations fail.
    Fail,
}

impl Status {
    /// The name in outputs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }

    /// The value of its metric: what is worse is greater.
    pub(crate) const fn gauge(self) -> f64 {
        match self {
            Self::Skip => -1.0,
            Self::Ok => 0.0,
            Self::Warn => 1.0,
            Self::Fail => 2.0,
        }
    }

    pub(crate) const fn on_the_wire(self) -> v1::DiagnosticStatus {
        match self {
            Self::Skip => v1::DiagnosticStatus::Skip,
            Self::Ok => v1::DiagnosticStatus::Ok,
            Self::Warn => v1::DiagnosticStatus::Warn,
            Self::Fail => v1::DiagnosticStatus::Fail,
        }
    }
}

/// What a check found, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// How it ended.
    pub status: Status,
    /// What was read, with its number; of a check that was skipped, why.
    pub evidence: String,
    /// What to do; empty unless the status is warn or fail.
    pub remedy: String,
}

impl Verdict {
    pub(super) fn ok(evidence: impl Into<String>) -> Self {
        Self { status: Status::Ok, evidence: evidence.into(), remedy: String::new() }
    }

    pub(super) fn skip(why: impl Into<String>) -> Self {
        Self { status: Status::Skip, evidence: why.into(), remedy: String::new() }
    }

    pub(super) fn warn(evidence: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Warn, evidence: evidence.into(), remedy: remedy.into() }
    }

    pub(super) fn fail(evidence: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Fail, evidence: evidence.into(), remedy: remedy.into() }
    }

    /// One verdict of those on several things of a kind: the worst status, all evidence, each remedy once.
    /// `None` of nothing.
    pub(super) fn of_all(verdicts: Vec<Self>) -> Option<Self> {
        let status = verdicts.iter().map(|verdict| verdict.status).max()?;
        let mut remedies: Vec<String> = Vec::new();
        let mut evidence = Vec::new();
        for verdict in verdicts {
            evidence.push(verdict.evidence);
            if !verdict.remedy.is_empty() && !remedies.contains(&verdict.remedy) {
                remedies.push(verdict.remedy);
            }
        }
        Some(Self { status, evidence: evidence.join("; "), remedy: remedies.join("; ") })
    }
}

/// `1.5 GiB`, as people write it.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    #[allow(clippy::cast_precision_loss, reason = "one digit behind the point is shown")]
    let amount = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    let whole = amount.fract() == 0.0;
    if whole { format!("{amount:.0} {}", UNITS[unit]) } else { format!("{amount:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_of_several_counts_and_each_remedy_is_told_once() {
        let several = vec![
            Verdict::ok("a 1"),
            Verdict::fail("b 2", "mend"),
            Verdict::warn("c 3", "mend"),
            Verdict::skip("d"),
        ];
        let all = Verdict::of_all(several).unwrap();
        assert_eq!(all, Verdict::fail("a 1; b 2; c 3; d", "mend"));
        assert_eq!(Verdict::of_all(Vec::new()), None);
    }

    #[test]
    fn what_is_worse_has_the_greater_gauge() {
        let gauges = [Status::Skip, Status::Ok, Status::Warn, Status::Fail].map(Status::gauge);
        assert_eq!(gauges, [-1.0, 0.0, 1.0, 2.0]);
    }

    #[test]
    fn bytes_have_the_unit_that_people_use() {
        let written = [0, 1, 1023, 65536, 3 << 29, u64::MAX].map(bytes);
        assert_eq!(written, ["0 B", "1 B", "1023 B", "64 KiB", "1.5 GiB", "16 EiB"]);
    }
}
