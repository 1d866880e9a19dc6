//! What a monitor says. The first byte chooses: a line as any kind of reply, a listing of RAM blocks, or a whole
//! conversation, in which each line answers a command and `@` stands for the command's id.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use ramferry_guest::fuzzing;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

/// For a command. None is waited for so long: whoever has no answer left hangs up.
const LIMIT: Duration = Duration::from_secs(20);
/// After so long the next line is said though nothing was asked: the last one was not understood.
const PATIENCE: Duration = Duration::from_millis(1);
const MOST_LINES: usize = 40;

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_all().build().expect("a runtime"));

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 3 {
        0 => fuzzing::line(rest),
        1 => fuzzing::ram_blocks(&String::from_utf8_lossy(rest)),
        _ => RUNTIME.block_on(async {
            let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
            let (result, ()) = tokio::join!(fuzzing::survey(ours, LIMIT), converse(theirs, rest));
            if let Err(error) = result {
                assert!(!error.to_string().is_empty() && !error.remedy().is_empty());
            }
        }),
    }
});

/// Greets with the first line, and answers a command with each of the others.
async fn converse(stream: UnixStream, script: &[u8]) {
    let (read, mut write) = stream.into_split();
    let mut commands = BufReader::new(read).lines();
    let mut id = String::new();
    for (number, line) in script.split(|byte| *byte == b'\n').take(MOST_LINES).enumerate() {
        if number > 0 {
            match timeout(PATIENCE, commands.next_line()).await {
                Ok(Ok(Some(command))) => {
                    let command: serde_json::Value =
                        serde_json::from_str(&command).expect("a command is JSON");
                    id = command["id"].to_string();
                }
                Ok(_) => return,
                Err(_) => {}
            }
        }
        let mut answer = Vec::new();
        for byte in line {
            if *byte == b'@' { answer.extend(id.as_bytes()) } else { answer.push(*byte) }
        }
        answer.push(b'\n');
        if write.write_all(&answer).await.is_err() {
            return;
        }
    }
}
