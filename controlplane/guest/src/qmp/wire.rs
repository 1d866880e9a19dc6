//! Lines of QMP.

use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::{Value, json};

use super::{QmpEvent, Version};

/// Characters of a line that an error shows.
const EXCERPT_CHARACTERS: usize = 80;

#[derive(Debug, Deserialize, PartialEq)]
pub(super) struct Refusal {
    pub(super) class: String,
    pub(super) desc: String,
}

#[derive(Debug, PartialEq)]
pub(super) enum Message {
    Event(QmpEvent),
    Reply { id: u64, reply: Result<Value, Refusal> },
}

#[derive(Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "return", default, deserialize_with = "present")]
    result: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<Timestamp>,
}

/// A result that is `null` is a result.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// Both are -1 where QEMU could not tell the time.
#[derive(Deserialize)]
struct Timestamp {
    seconds: i64,
    microseconds: i64,
}

impl Timestamp {
    fn time(&self) -> Option<SystemTime> {
        let seconds = Duration::from_secs(u64::try_from(self.seconds).ok()?);
        let rest = Duration::from_micros(u64::try_from(self.microseconds).ok()?);
        SystemTime::UNIX_EPOCH.checked_add(seconds)?.checked_add(rest)
    }
}

/// When QEMU looks at a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Band {
    /// When it is done with those before it.
    In,
    /// At once, also while its main loop hangs.
    OutOf,
}

impl Band {
    fn key(self) -> &'static str {
        match self {
            Band::In => "execute",
            Band::OutOf => "exec-oob",
        }
    }
}

pub(super) fn command(id: u64, band: Band, command: &str, arguments: &Value) -> Vec<u8> {
    let mut line = json!({ band.key(): command, "arguments": arguments, "id": id }).to_string().into_bytes();
    line.push(b'\n');
    line
}

/// QEMU's version, and whether it takes commands out of band.
pub(super) fn greeting(line: &[u8]) -> Option<(Version, bool)> {
    #[derive(Deserialize)]
    struct Greeting {
        #[serde(rename = "QMP")]
        qmp: Body,
    }
    #[derive(Deserialize)]
    struct Body {
        version: Versions,
        #[serde(default)]
        capabilities: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Versions {
        qemu: Version,
    }
    let Body { version, capabilities } = serde_json::from_slice::<Greeting>(line).ok()?.qmp;
    Some((version.qemu, capabilities.iter().any(|capability| capability == "oob")))
}

/// `None` for what is neither an event nor a reply to a command of ours; QEMU
/// answers without our `id` only to what it could not read.
pub(super) fn parse(line: &[u8]) -> Option<Message> {
    let line: Line = serde_json::from_slice(line).ok()?;
    match line {
        Line { event: Some(name), data, timestamp, .. } => {
            let timestamp = timestamp.as_ref().and_then(Timestamp::time).unwrap_or_else(SystemTime::now);
            Some(Message::Event(QmpEvent { name, data, timestamp }))
        }
        Line { id: Some(id), result: Some(result), .. } => Some(Message::Reply { id, reply: Ok(result) }),
        Line { id: Some(id), error: Some(refusal), .. } => Some(Message::Reply { id, reply: Err(refusal) }),
        _ => None,
    }
}

pub(super) fn excerpt(line: &[u8]) -> String {
    String::from_utf8_lossy(line).chars().take(EXCERPT_CHARACTERS).collect()
}
