//! What must never be written down: tokens, region keys, private keys.

use std::fmt::Write as _;
use std::path::Path;

use ramferry_proto::v1;

use crate::harness::{Agent, Pair, assert_proves_itself, boot, proof, quiet, ramferry};
use crate::peer::Proxy;

/// Everything that an agent shows or keeps.
pub(crate) fn everything_of(name: &str, agent: &Agent) -> Vec<(String, Vec<u8>)> {
    let mut found = vec![
        (format!("{name}'s log"), agent.log().into_bytes()),
        (format!("{name}'s metrics"), agent.scrape().into_bytes()),
    ];
    collect(agent.directory(), name, &mut found);
    found
}

fn collect(directory: &Path, name: &str, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, name, found);
        } else if path.is_file() {
            found.push((format!("{name}'s {}", path.display()), std::fs::read(&path).unwrap()));
        }
    }
}

/// A secret in every form in which a program would show it.
fn forms(secret: &[u8]) -> Vec<Vec<u8>> {
    let mut hexadecimal = String::new();
    for byte in secret {
        write!(hexadecimal, "{byte:02x}").unwrap();
    }
    let list = format!("{:?}", &secret[..8]);
    let texts = [
        hexadecimal.to_uppercase(),
        hexadecimal,
        // As part of a longer list.
        list.trim_matches(['[', ']']).to_owned(),
        String::from_utf8_lossy(&secret[..8].escape_ascii().collect::<Vec<u8>>()).into_owned(),
        base64(&secret[..secret.len() / 3 * 3]),
    ];
    let mut forms: Vec<Vec<u8>> = texts.into_iter().map(String::into_bytes).collect();
    forms.push(secret.to_vec());
    forms
}

fn key_forms(key: u64) -> Vec<Vec<u8>> {
    let texts = [key.to_string(), format!("{key:x}"), format!("{key:X}")];
    let mut forms: Vec<Vec<u8>> = texts.into_iter().map(String::into_bytes).collect();
    forms.push(key.to_le_bytes().to_vec());
    forms
}

/// Of a length that is a multiple of 3.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |group: &[u8], shift: u32| {
        let group = u32::from_be_bytes([0, group[0], group[1], group[2]]);
        char::from(DIGITS[(group >> shift) as usize & 63])
    };
    bytes.chunks_exact(3).flat_map(|group| [18, 12, 6, 0].map(|shift| digit(group, shift))).collect()
}

pub(crate) fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn forms_are_those_that_programs_write() {
    let secret: Vec<u8> = (0..32).map(|n| n * 7 + 3).collect();
    let shown = [format!("{secret:?}"), format!("x={}", base64(&secret[..30]))];
    for text in shown {
        assert!(forms(&secret).iter().any(|form| contains(text.as_bytes(), form)), "{text}");
    }
    assert_eq!(base64(b"ramfer"), "cmFtZmVy");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_keys_are_nowhere_to_be_read_at_the_most_talkative_log_level() {
    for fabric in ["tcp", "shm"] {
        let talkative = || Agent::start_with(&["--log-filter", "trace"]);
        let pair = Pair { source: talkative(), destination: talkative() };
        let proxy = Proxy::start(&pair.destination).await;
        let guest = boot(proof(quiet()));
        let receiver = guest.destination().start().unwrap();
        let mut command = ramferry();
        command
            .args(["migrate", "--agent", &pair.source.grpc.to_string(), "--to", &proxy.address.to_string()])
            .arg("--source-qmp")
            .arg(guest.qmp_path())
            .arg("--destination-qmp")
            .arg(receiver.qmp_path())
            .args(["--id", "told", "--fabric", fabric, "--verify", "--output", "json"]);
        let moved = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        assert!(moved.status.success(), "{moved:?}");
        assert_proves_itself(&receiver);
        let ended = pair.destination.wait_end("told").await;
        assert_eq!(ended.state(), v1::MigrationState::Succeeded);

        let (token, keys) = {
            let heard = proxy.heard();
            (heard.tokens[0].clone(), heard.keys.clone())
        };
        assert_eq!(token.len(), 32);
        assert!(!keys.is_empty());
        let mut places = everything_of("the source", &pair.source);
        places.extend(everything_of("the destination", &pair.destination));
        places.push(("the command's output".into(), [moved.stdout, moved.stderr].concat()));
        // The logs are as talkative as was asked for.
        assert!(contains(&places[0].1, b"\"TRACE\""), "{:?}", places[0].0);
        for (place, text) in &places {
            for (what, forms) in std::iter::once(("the token", forms(&token)))
                .chain(keys.iter().map(|key| ("a region's key", key_forms(*key))))
            {
                for form in forms {
                    assert!(
                        !contains(text, &form),
                        "{fabric}: {place} holds {what} as {:?}",
                        String::from_utf8_lossy(&form)
                    );
                }
            }
        }
    }
}
