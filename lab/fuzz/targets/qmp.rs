//! What a monitor says. The first byte chooses: a line as any kind of reply, a listing of RAM blocks, or a whole
//! conversation, in which each line answers a command and `@` stands for the command's id.
#![no_main]

use std::pin::pin;
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use ramferry_guest::fuzzing;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::task::yield_now;

/// For a command. None is waited for so long: whoever has no answer left hangs up.
const LIMIT: Duration = Duration::from_secs(20);
/// After so many turns of all tasks the next line is said though nothing was asked: the last one was not understood.
const PATIENCE_TURNS: usize = 100;
const MOST_LINES: usize = 40;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread().enable_all().event_interval(4).build().expect("a runtime")
});

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
            match soon(commands.next_line()).await {
                Some(Ok(Some(command))) => {
                    let command: serde_json::Value =
                        serde_json::from_str(&command).expect("a command is JSON");
                    id = command["id"].to_string();
                }
                Some(_) => return,
                None => {}
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

async fn soon<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    for _ in 0..PATIENCE_TURNS {
        tokio::select! {
            biased;
            output = &mut future => return Some(output),
            () = yield_now() => {}
        }
    }
    None
}
