//! What the VM's kernel says on its serial console.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

/// How much of the end is kept.
const KEPT_BYTES: usize = 64 << 10;
/// How much of that is told.
const TOLD_LINES: usize = 40;

/// Reads the console until its other end closes, so that the VM never waits for a reader.
#[derive(Debug)]
pub(super) struct Console {
    reader: JoinHandle<Vec<u8>>,
}

impl Console {
    pub(super) fn read(mut from: UnixStream, shown: bool) -> Result<Console> {
        let work = move || {
            let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                if shown {
                    // Nobody may be there to see it.
                    let _ = std::io::stderr().write_all(&buffer[..length]);
                }
                kept.extend_from_slice(&buffer[..length]);
                if kept.len() > 2 * KEPT_BYTES {
                    kept.drain(..kept.len() - KEPT_BYTES);
                }
            }
            kept
        };
        let reader = thread::Builder::new().name("console".to_owned()).spawn(work);
        Ok(Console { reader: reader.context("cannot start a thread")? })
    }

    /// Its last lines, once QEMU has ended.
    pub(super) fn end(self) -> String {
        let kept = self.reader.join().unwrap_or_default();
        let text = String::from_utf8_lossy(&kept).replace('\r', "");
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        told(&lines).join("\n")
    }
}

/// The last lines; more of them where a panic's trace is longer, for its first line says why.
fn told<'a, 'b>(lines: &'a [&'b str]) -> &'a [&'b str] {
    let last = lines.len().saturating_sub(TOLD_LINES);
    let panic = lines.iter().rposition(|line| line.contains("Kernel panic"));
    &lines[panic.map_or(last, |panic| panic.min(last))..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_from_its_first_line_on_however_long_its_trace_is() {
        let trace = [" frame"; 2 * TOLD_LINES];
        let panic = ["Kernel panic - not syncing: why"];
        assert_eq!(told(&[&["booted"][..], &panic, &trace].concat()), [&panic[..], &trace].concat());
        let short = [&trace[..], &panic, &trace[..5]].concat();
        assert_eq!(told(&short), &short[short.len() - TOLD_LINES..]);
        assert_eq!(told(&trace), [" frame"; TOLD_LINES]);
        assert_eq!(told(&["booted"]), ["booted"]);
    }
}
