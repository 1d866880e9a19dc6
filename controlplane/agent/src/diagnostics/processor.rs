//! How the processors are clocked, and how libibverbs is told to treat forks.

use std::collections::BTreeMap;
use std::path::Path;

use super::host::Host;
use super::verdict::Verdict;

/// Copies of pinned pages at a fork are made for the child from here on.
const FORK_IS_SAFE: (u32, u32) = (5, 12);

/// How the processors are clocked.
#[derive(Clone, Debug)]
pub(super) struct Governors {
    /// Processors by governor and driver.
    pub(super) processors: BTreeMap<(String, String), usize>,
}

impl Governors {
    pub(super) fn read(host: &Host) -> Self {
        const CPUS: &str = "/sys/devices/system/cpu";
        let mut processors = BTreeMap::new();
        for name in host.names(CPUS) {
            if name.strip_prefix("cpu").is_none_or(|number| number.parse::<u32>().is_err()) {
                continue;
            }
            let scaling = Path::new(CPUS).join(name).join("cpufreq");
            if let Some(governor) = host.text(scaling.join("scaling_governor")) {
                let driver = host.text(scaling.join("scaling_driver")).unwrap_or_default();
                *processors.entry((governor, driver)).or_default() += 1;
            }
        }
        Self { processors }
    }

    pub(super) fn judge(&self) -> Verdict {
        if self.processors.is_empty() {
            return Verdict::skip("no processor has cpufreq: a virtual machine, or a kernel without it");
        }
        let told = |((governor, driver), count): (&(String, String), &usize)| {
            format!("{count} x {governor} ({driver})")
        };
        let evidence = self.processors.iter().map(told).collect::<Vec<_>>().join(", ");
        // These drivers' powersave goes up with the load.
        let is_slow = |governor: &str, driver: &str| match governor {
            "powersave" => !driver.starts_with("intel_pstate") && !driver.starts_with("amd-pstate-epp"),
            "conservative" | "userspace" => true,
            _ => false,
        };
        if self.processors.keys().any(|(governor, driver)| is_slow(governor, driver)) {
            return Verdict::warn(
                format!("{evidence}: copying and polling threads run below the processor's speed"),
                "cpupower frequency-set -g performance",
            );
        }
        Verdict::ok(evidence)
    }
}

/// How libibverbs is told to treat forks: by the environment of the process.
#[derive(Clone, Debug)]
pub(super) struct ForkSafety {
    /// Variables that are set, with their values.
    pub(super) variables: Vec<(&'static str, String)>,
    pub(super) kernel: Option<(u32, u32)>,
}

impl ForkSafety {
    pub(super) const VARIABLES: [&'static str; 3] =
        ["RDMAV_FORK_SAFE", "IBV_FORK_SAFE", "RDMAV_HUGEPAGES_SAFE"];

    pub(super) fn read(kernel: Option<(u32, u32)>) -> Self {
        let value = |name| Some((name, std::env::var_os(name)?.to_string_lossy().into_owned()));
        Self { variables: Self::VARIABLES.into_iter().filter_map(value).collect(), kernel }
    }

    pub(super) fn judge(&self) -> Verdict {
        if self.variables.is_empty() {
            return Verdict::ok(format!(
                "{} are not set, and need not be: guest RAM is mapped shared",
                Self::VARIABLES.join(", ")
            ));
        }
        let told: Vec<String> =
            self.variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let evidence = told.join(", ");
        let is_set = |name| self.variables.iter().any(|(set, _)| *set == name);
        let fork_safe = is_set("RDMAV_FORK_SAFE") || is_set("IBV_FORK_SAFE");
        if !fork_safe {
            return Verdict::ok(format!("{evidence}: without effect while RDMAV_FORK_SAFE is not set"));
        }
        let mut why = "every registration marks its pages one by one".to_owned();
        if self.kernel.is_some_and(|kernel| kernel >= FORK_IS_SAFE) {
            why += ", which this kernel does not need";
        }
        if !is_set("RDMAV_HUGEPAGES_SAFE") {
            why += "; and RAM on huge pages cannot be registered (EINVAL)";
        }
        Verdict::warn(
            format!("{evidence}: {why}"),
            "take RDMAV_FORK_SAFE, IBV_FORK_SAFE and RDMAV_HUGEPAGES_SAFE out of the agent's environment \
             (UnsetEnvironment= in its unit) and restart it",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::fake::Fake;
    use super::super::verdict::Status;
    use super::*;

    #[test]
    fn a_governor_that_keeps_processors_slow_warns_with_how_many() {
        let governor = |cpu: u32| format!("/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor");
        let driver = |cpu: u32| format!("/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_driver");
        let fake = Fake::new(&[("/sys/devices/system/cpu/cpufreq/x", "")]);
        assert_eq!(Governors::read(&fake.host()).judge().status, Status::Skip);
        for cpu in 0..2 {
            fake.write(&governor(cpu), "powersave\n");
            fake.write(&driver(cpu), "acpi-cpufreq\n");
        }
        let verdict = Governors::read(&fake.host()).judge();
        assert_eq!(verdict.status, Status::Warn);
        assert!(verdict.evidence.starts_with("2 x powersave (acpi-cpufreq): "), "{verdict:?}");
        (0..2).for_each(|cpu| fake.write(&driver(cpu), "intel_pstate"));
        assert_eq!(Governors::read(&fake.host()).judge().status, Status::Ok);
    }

    #[test]
    fn fork_safety_that_is_asked_for_warns_of_what_it_costs() {
        let judged = |names: &[&'static str]| {
            let variables = names.iter().map(|name| (*name, "1".to_owned())).collect();
            ForkSafety { variables, kernel: Some((6, 12)) }.judge()
        };
        assert_eq!(judged(&[]).status, Status::Ok);
        let verdict = judged(&["RDMAV_FORK_SAFE"]);
        assert_eq!(verdict.status, Status::Warn);
        assert!(verdict.evidence.contains("RDMAV_FORK_SAFE=1") && verdict.evidence.contains("EINVAL"));
        let verdict = judged(&["IBV_FORK_SAFE", "RDMAV_HUGEPAGES_SAFE"]);
        assert!(verdict.status == Status::Warn && !verdict.evidence.contains("EINVAL"), "{verdict:?}");
        assert_eq!(judged(&["RDMAV_HUGEPAGES_SAFE"]).status, Status::Ok);
    }
}
