//! The agent's own certificate and its authorities.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::verdict::Verdict;
use crate::auth::{Caller, Role};
use crate::config::TlsConfig;
use crate::status::causes;

/// A certificate that ends sooner is to be renewed.
const WARN_BEFORE: Duration = Duration::from_secs(14 * 86_400);

/// A certificate's time and rights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CertificateFacts {
    /// Where it is from: a file, or a peer.
    pub(super) name: String,
    pub(super) subject: String,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    /// Whether it may call another agent, and be called by an orchestrator's.
    pub(super) is_peer: bool,
}

impl CertificateFacts {
    pub(super) fn of_der(name: &str, der: &[u8]) -> Result<Self, String> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| causes(&error))?;
        let time = |seconds: i64| match u64::try_from(seconds) {
            Ok(seconds) => UNIX_EPOCH + Duration::from_secs(seconds),
            Err(_) => UNIX_EPOCH,
        };
        let validity = certificate.validity();
        Ok(Self {
            name: name.to_owned(),
            subject: certificate.subject().to_string(),
            not_before: time(validity.not_before.timestamp()),
            not_after: time(validity.not_after.timestamp()),
            is_peer: Caller::of_certificate(der).is_some_and(|caller| caller.has(Role::Peer)),
        })
    }

    /// Whether its time is now, and for how long; `remedy` says how it is renewed.
    pub(super) fn judge_time(&self, now: SystemTime, remedy: &str) -> Verdict {
        let until = humantime::format_rfc3339_seconds(self.not_after);
        if let Ok(early) = self.not_before.duration_since(now)
            && !early.is_zero()
        {
            return Verdict::fail(
                format!(
                    "{} is not valid for another {}, by the clock here ({})",
                    self.name,
                    in_days(early),
                    humantime::format_rfc3339_seconds(now)
                ),
                format!("set the clock (timedatectl; chronyc tracking); if it is right: {remedy}"),
            );
        }
        match self.not_after.duration_since(now) {
            Err(late) => Verdict::fail(
                format!("{} expired {} ago, at {until}", self.name, in_days(late.duration())),
                remedy,
            ),
            Ok(left) if left < WARN_BEFORE => {
                Verdict::warn(format!("{} expires in {}, at {until}", self.name, in_days(left)), remedy)
            }
            Ok(left) => Verdict::ok(format!("{} is valid for {}, until {until}", self.name, in_days(left))),
        }
    }
}

/// The certificates of a file, or the file's name and what is wrong with it.
type FileRead = Result<Vec<CertificateFacts>, (String, String)>;

/// The files of TLS, read.
pub(super) struct Certificates {
    /// `tls_cert` and `tls_ca`; `None` where TLS is off.
    files: Option<[FileRead; 2]>,
    now: SystemTime,
}

impl Certificates {
    pub(super) fn read(tls: Option<&TlsConfig>, now: SystemTime) -> Self {
        let files = tls.map(|tls| [read(&tls.cert), read(&tls.ca)]);
        Self { files, now }
    }

    pub(super) fn judge(&self) -> Verdict {
        const REMEDY: &str = "have it issued anew by the authority, put it in its place (tls_cert, tls_key, tls_ca) and \
                              restart the agent, which reads it at its start only";
        let Some(files) = &self.files else {
            return Verdict::skip("TLS is off, so only loopback is served");
        };
        let mut verdicts = Vec::new();
        for (number, file) in files.iter().enumerate() {
            match file {
                Err((name, why)) => verdicts.push(Verdict::fail(
                    format!("{name}: {why}"),
                    "give PEM files that the agent's user may read: tls_cert, tls_key, tls_ca",
                )),
                Ok(certificates) => {
                    let mut times: Vec<_> =
                        certificates.iter().map(|facts| facts.judge_time(self.now, REMEDY)).collect();
                    // Where several authorities are trusted, an old one that has expired does no harm.
                    if number == 1 && times.iter().any(|verdict| verdict.remedy.is_empty()) {
                        times.retain(|verdict| verdict.remedy.is_empty());
                    }
                    verdicts.extend(times);
                    if let Some(own) = certificates.first().filter(|own| number == 0 && !own.is_peer) {
                        verdicts.push(Verdict::fail(
                            format!(
                                "it has no URI subject alternative name ramferry:role:peer ({})",
                                own.subject
                            ),
                            "issue it with that name, or no agent takes a guest of this one",
                        ));
                    }
                }
            }
        }
        Verdict::of_all(verdicts).expect("there are two files")
    }
}

fn read(path: &Path) -> FileRead {
    let name = path.display().to_string();
    let wrong = |why: String| (name.clone(), why);
    let bytes = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let ders = CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
    let ders = ders.map_err(|error| wrong(causes(&error)))?;
    if ders.is_empty() {
        return Err(wrong("it holds no certificate".into()));
    }
    ders.iter().map(|der| CertificateFacts::of_der(&name, der).map_err(wrong)).collect()
}

/// `3 days`, `23 hours`, `5 minutes`.
fn in_days(time: Duration) -> String {
    let seconds = time.as_secs();
    let (count, unit) = match seconds {
        172_800.. => (seconds / 86_400, "days"),
        7200.. => (seconds / 3600, "hours"),
        _ => (seconds / 60, "minutes"),
    };
    format!("{count} {unit}")
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::super::verdict::Status;
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    /// A certificate, and one of an authority that lasts.
    fn files(directory: &Path, days: (i64, i64), roles: &[&str]) -> TlsConfig {
        let pem = |days: (i64, i64), roles: &[&str]| {
            let mut parameters = CertificateParams::new(vec!["node".to_owned()]).unwrap();
            let now = SystemTime::now();
            let at = |days: i64| {
                let span = DAY * u32::try_from(days.abs()).unwrap();
                if days < 0 { now - span } else { now + span }
            };
            (parameters.not_before, parameters.not_after) = (at(days.0).into(), at(days.1).into());
            for role in roles {
                parameters
                    .subject_alt_names
                    .push(SanType::URI(format!("ramferry:role:{role}").try_into().unwrap()));
            }
            parameters.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
        };
        let (cert, ca) = (directory.join("cert.pem"), directory.join("ca.pem"));
        std::fs::write(&cert, pem(days, roles)).unwrap();
        std::fs::write(&ca, pem((-400, 400), &[])).unwrap();
        TlsConfig { key: directory.join("key.pem"), cert, ca, server_name: None }
    }

    fn judged(days: (i64, i64), roles: &[&str]) -> Verdict {
        let directory = tempfile::tempdir().unwrap();
        Certificates::read(Some(&files(directory.path(), days, roles)), SystemTime::now()).judge()
    }

    #[test]
    fn a_certificate_is_judged_by_the_time_that_is_left_of_it() {
        assert_eq!(judged((-1, 90), &["peer"]).status, Status::Ok);
        let soon = judged((-1, 1), &["peer"]);
        assert_eq!(soon.status, Status::Warn);
        assert!(soon.evidence.contains("cert.pem expires in 23 hours, at "), "{soon:?}");
        let gone = judged((-9, -3), &["peer"]);
        assert!(gone.status == Status::Fail && gone.evidence.contains("expired 3 days ago"), "{gone:?}");
        let early = judged((3, 9), &["peer"]);
        assert!(early.status == Status::Fail && early.remedy.starts_with("set the clock"), "{early:?}");
    }

    #[test]
    fn a_certificate_that_may_not_call_peers_fails() {
        let verdict = judged((-1, 90), &["orchestrator"]);
        assert!(
            verdict.status == Status::Fail && verdict.evidence.contains("ramferry:role:peer"),
            "{verdict:?}"
        );
    }

    #[test]
    fn files_that_cannot_be_read_fail_by_name_and_no_tls_is_skipped() {
        let directory = tempfile::tempdir().unwrap();
        let tls = files(directory.path(), (-1, 90), &["peer"]);
        std::fs::write(&tls.cert, "no PEM").unwrap();
        std::fs::remove_file(&tls.ca).unwrap();
        let verdict = Certificates::read(Some(&tls), SystemTime::now()).judge();
        assert_eq!(verdict.status, Status::Fail);
        for part in ["cert.pem: it holds no certificate", "ca.pem: No such file"] {
            assert!(verdict.evidence.contains(part), "{verdict:?}");
        }
        assert_eq!(Certificates::read(None, SystemTime::now()).judge().status, Status::Skip);
    }
}
