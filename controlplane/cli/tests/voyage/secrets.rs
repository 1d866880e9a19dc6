//! What must never be written down: tokens, region keys, private keys.

use std::fmt::Write as _;
use std::path::Path;

use ramferry_proto::v1;

use crate::harness::{Agent, Pair, assert_proves_itself, boot, proof, quiet, ramferry};
use crate::peer::Proxy;

/// Everything that an agent shows or keeps, a character a byte.
pub(crate) fn everything_of(name: &str, agent: &Agent) -> Vec<(String, String)> {
    let mut found = vec![
        (format!("{name}'s log"), characters(agent.log().as_bytes())),
        (format!("{name}'s metrics"), characters(agent.scrape().as_bytes())),
    ];
    collect(agent.directory(), name, &mut found);
    found
}

fn collect(directory: &Path, name: &str, found: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, name, found);
        } else if path.is_file() {
            found.push((format!("{name}'s {}", path.display()), characters(&std::fs::read(&path).unwrap())));
        }
    }
}

/// So that any bytes can be searched as text.
fn characters(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

/// A secret in every form in which a program would show it.
fn forms(secret: &[u8]) -> Vec<String> {
    let mut hexadecimal = String::new();
    for byte in secret {
        write!(hexadecimal, "{byte:02x}").unwrap();
    }
    let list = format!("{:?}", &secret[..8]);
    vec![
        hexadecimal.to_uppercase(),
        hexadecimal,
        // As part of a longer list.
        list.trim_matches(['[', ']']).to_owned(),
        characters(&secret[..8].escape_ascii().collect::<Vec<u8>>()),
        base64(&secret[..secret.len() / 3 * 3]),
        characters(secret),
    ]
}

fn key_forms(key: u64) -> Vec<String> {
    vec![key.to_string(), format!("{key:x}"), format!("{key:X}"), characters(&key.to_le_bytes())]
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

#[test]
fn forms_are_those_that_programs_write() {
    let secret: Vec<u8> = (0..32).map(|n| n * 7 + 3).collect();
    let shown = [format!("{secret:?}"), format!("x={}", base64(&secret[..30]))];
    for text in shown {
        assert!(forms(&secret).iter().any(|form| text.contains(form)), "{text}");
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
            .args(["--id", "told", "--fabric", fabric, "--verify", "--output", "json"])
            // Agents that log so much are slow.
            .args(["--max-downtime", "10s"]);
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
        places.push(("the command's output".into(), characters(&[moved.stdout, moved.stderr].concat())));
        // The logs are as talkative as was asked for.
        assert!(places[0].1.contains("\"TRACE\""), "{:?}", places[0].0);
        for (place, text) in &places {
            for (what, forms) in std::iter::once(("the token", forms(&token)))
                .chain(keys.iter().map(|key| ("a region's key", key_forms(*key))))
            {
                for form in forms {
                    assert!(!text.contains(&form), "{fabric}: {place} holds {what} as {form:?}");
                }
            }
        }
    }
}
