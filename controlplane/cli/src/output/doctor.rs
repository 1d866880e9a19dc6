//! What `ramferry doctor` prints.

use std::fmt::Write as _;

use serde::Serialize;

use super::printable;

/// One check.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) id: String,
    pub(crate) status: &'static str,
    pub(crate) evidence: String,
    pub(crate) remedy: String,
}

/// All of them.
#[derive(Debug, Serialize)]
pub(crate) struct Examination {
    /// Who made the checks; none: this process.
    agent: Option<String>,
    failed: usize,
    warned: usize,
    passed: usize,
    skipped: usize,
    checks: Vec<Check>,
}

impl Examination {
    pub(crate) fn new(agent: Option<String>, checks: Vec<Check>) -> Self {
        let count = |status| checks.iter().filter(|check| check.status == status).count();
        let (failed, warned) = (count("fail"), count("warn"));
        Self { agent, failed, warned, passed: count("ok"), skipped: count("skip"), checks }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed > 0
    }

    /// What is wrong comes last: that is what a terminal shows.
    pub(crate) fn text(&self) -> String {
        let width = self.checks.iter().map(|check| check.id.chars().count()).max().unwrap_or(0);
        let mut text = self.skipped_text();
        for status in ["ok", "warn", "fail"] {
            for check in self.checks.iter().filter(|check| check.status == status) {
                let (id, evidence) = (one_line(&check.id), one_line(&check.evidence));
                let _ = writeln!(text, "{status:4}  {id:width$}  {evidence}");
                if !check.remedy.is_empty() {
                    let _ = writeln!(text, "      {:width$}  -> {}", "", one_line(&check.remedy));
                }
            }
        }
        let _ = writeln!(
            text,
            "{} failed, {} warned, {} ok, {} skipped, {}",
            self.failed,
            self.warned,
            self.passed,
            self.skipped,
            match &self.agent {
                Some(agent) => format!("as the agent at {agent} sees its host"),
                None => "with the rights and limits of this process; --agent HOST:PORT asks a running agent"
                    .to_owned(),
            }
        );
        text
    }

    /// What was skipped, those for one reason together: on a host without RDMA they are many.
    fn skipped_text(&self) -> String {
        let mut reasons: Vec<(&str, Vec<String>)> = Vec::new();
        for check in self.checks.iter().filter(|check| check.status == "skip") {
            let id = one_line(&check.id);
            match reasons.iter_mut().find(|(reason, _)| *reason == check.evidence) {
                Some((_, ids)) => ids.push(id),
                None => reasons.push((&check.evidence, vec![id])),
            }
        }
        let line =
            |(reason, ids): (&str, Vec<String>)| format!("skip  {}: {}\n", ids.join(", "), one_line(reason));
        reasons.into_iter().map(line).collect()
    }
}

fn one_line(text: &str) -> String {
    printable(&text.replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(id: &str, status: &'static str, evidence: &str, remedy: &str) -> Check {
        Check { id: id.into(), status, evidence: evidence.into(), remedy: remedy.into() }
    }

    #[test]
    fn what_failed_is_told_last_with_its_remedy() {
        let checks = vec![
            check("memlock", "fail", "64 KiB", "raise it"),
            check("btf", "ok", "5 MiB", ""),
            check("rdma_port", "skip", "no device", ""),
            check("peer_data", "skip", "no peer", ""),
            check("rdma_mtu", "skip", "no device", ""),
            check("kernel", "warn", "6.1\u{1b}[31m", "boot\nanother"),
        ];
        let examination = Examination::new(Some("a:1".into()), checks);
        assert!(examination.has_failed());
        assert_eq!(
            examination.text(),
            "skip  rdma_port, rdma_mtu: no device\n\
             skip  peer_data: no peer\n\
             ok    btf        5 MiB\n\
             warn  kernel     6.1\\u{1b}[31m\n                 -> boot another\n\
             fail  memlock    64 KiB\n                 -> raise it\n\
             1 failed, 1 warned, 1 ok, 3 skipped, as the agent at a:1 sees its host\n"
        );
        assert!(!Examination::new(None, vec![check("btf", "warn", "", "x")]).has_failed());
    }
}
