//! What to do about a TLS connection that was not made. Layers above TLS say
//! "transport error", and TLS itself what is wrong but not where.

use std::error::Error;
use std::io;

use tokio_rustls::rustls::{self, CertificateError, InvalidMessage};

/// Begins the text of an alert that was received.
const ALERT: &str = "received fatal alert: ";

/// What to do about `error`, when a certificate, or TLS where there should be
/// none, is behind it. Speaks of both sides as their configurations do.
pub fn tls_hint(error: &(dyn Error + 'static)) -> Option<&'static str> {
    match find(error)? {
        Found::Alert(alert) => Some(alert_hint(&alert)),
        Found::Error(rustls::Error::InvalidCertificate(why)) => Some(certificate_hint(why)),
        Found::Error(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            Some("what listens there does not speak TLS: check the port, and give that agent TLS files")
        }
        Found::Error(_) => None,
    }
}

/// What the server, by the name of its alert, thinks of the certificate that it was shown.
fn alert_hint(alert: &str) -> &'static str {
    match alert {
        "CertificateExpired" => {
            "the certificate in tls_cert has expired or is not valid yet: renew it, and compare the clocks of both hosts"
        }
        "UnknownCA" | "DecryptError" => {
            "the agent there does not know who signed the certificate in tls_cert: have it signed by an authority in that agent's tls_ca"
        }
        _ => {
            "the agent there does not accept the certificate in tls_cert: see its kind and its signature, and that agent's tls_ca"
        }
    }
}

/// What is wrong with the server's certificate.
fn certificate_hint(why: &CertificateError) -> &'static str {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "the certificate of the agent there has expired: renew it on its host, and compare the clocks"
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "the certificate of the agent there is not valid yet: compare the clocks of both hosts"
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "no authority in tls_ca signed the certificate of the agent there: give the authorities that sign agents"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "the certificate of the agent there is not one of this host name: call it by a name in it, or set tls_server_name"
        }
        _ => {
            "the certificate of the agent there cannot be used: issue it as a server's, signed by an authority in tls_ca"
        }
    }
}

enum Found<'a> {
    Error(&'a rustls::Error),
    /// By its name in rustls.
    Alert(String),
}

fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<Found<'a>> {
    let mut next = Some(error);
    while let Some(error) = next {
        // HTTP/2 keeps no more than the text of what ended its connection.
        if let Some(alert) = error.to_string().strip_prefix(ALERT) {
            return Some(Found::Alert(alert.to_owned()));
        }
        if let Some(found) = error.downcast_ref() {
            return Some(Found::Error(found));
        }
        // The source of an I/O error is that of the error in it.
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_without_tls_have_no_hint() {
        assert_eq!(tls_hint(&io::Error::from(io::ErrorKind::ConnectionRefused)), None);
        assert_eq!(tls_hint(&rustls::Error::HandshakeNotComplete), None);
    }

    #[test]
    fn alerts_are_told_from_one_another_by_their_names_in_rustls() {
        use rustls::AlertDescription::{BadCertificate, CertificateExpired, UnknownCA};
        let hint = |alert| tls_hint(&io::Error::other(rustls::Error::AlertReceived(alert))).unwrap();
        assert!(hint(CertificateExpired).contains("renew it"));
        assert!(hint(UnknownCA).contains("does not know who signed"));
        assert!(hint(BadCertificate).contains("does not accept"));
    }

    #[test]
    fn tls_is_found_within_io_errors() {
        let expired = rustls::Error::InvalidCertificate(CertificateError::Expired);
        let wrapped = io::Error::other(io::Error::other(expired));
        assert!(tls_hint(&wrapped).is_some_and(|hint| hint.contains("has expired")));
    }
}
