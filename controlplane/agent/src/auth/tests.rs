use rcgen::string::Ia5String;
use rcgen::{CertificateParams, KeyPair, SanType};

use super::*;

fn certificate(uris: &[&str]) -> Vec<u8> {
    let mut params = CertificateParams::new(vec!["agent.example".to_owned()]).unwrap();
    let uri = |uri: &&str| SanType::URI(Ia5String::try_from(*uri).unwrap());
    params.subject_alt_names.extend(uris.iter().map(uri));
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

fn roles(uris: &[&str]) -> (bool, bool) {
    let caller = Caller::of_certificate(&certificate(uris)).unwrap();
    (caller.has(Role::Orchestrator), caller.has(Role::Peer))
}

#[test]
fn roles_are_those_of_the_uri_names() {
    assert_eq!(roles(&["ramferry:role:orchestrator"]), (true, false));
    assert_eq!(roles(&["spiffe://x/y", "ramferry:role:peer"]), (false, true));
    assert_eq!(roles(&["ramferry:role:peer", "ramferry:role:orchestrator"]), (true, true));
}

#[test]
fn names_that_only_resemble_a_role_give_none() {
    let resembling = [
        "ramferry:role:Peer",
        "ramferry:role:peer ",
        "ramferry:role:",
        "Ramferry:role:peer",
        "xramferry:role:peer",
        "ramferry:role:peer/x",
    ];
    assert_eq!(roles(&resembling), (false, false));
    assert_eq!(roles(&[]), (false, false));
}

#[test]
fn bytes_that_are_no_certificate_give_no_caller() {
    assert_eq!(Caller::of_certificate(b""), None);
    let mut cut = certificate(&["ramferry:role:peer"]);
    cut.truncate(cut.len() / 2);
    assert_eq!(Caller::of_certificate(&cut), None);
}
