//! The second process: this program again, that writes when it is told to and
//! ends with its input.

use std::io::{self, BufRead as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use ramferry_ram::{Access, Mapping, RamFile};

use crate::bench::memory::BASE_PAGE_BYTES;
use crate::bench::{BenchError, Bounds};

/// The hidden command that runs [`write_on_command`].
const COMMAND: [&str; 2] = ["bench", "scan-writer"];
/// Between two looks at the bounds.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The second process; killed and reaped when it is dropped.
pub(super) struct Writer {
    child: Child,
    orders: ChildStdin,
    /// A message for each order that was carried out.
    done: Receiver<()>,
}

impl Writer {
    /// Has it map `bytes` of `file`.
    pub(super) fn start(file: &RamFile, bytes: u64) -> Result<Self, BenchError> {
        let failed = BenchError::system("start a second process");
        // It opens the file of this process, which has no other name.
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_fd().as_raw_fd());
        let mut child = Command::new("/proc/self/exe")
            .args(COMMAND)
            .args([path, bytes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A Ctrl-C at the terminal is for this process, which ends that one.
            .process_group(0)
            .spawn()
            .map_err(&failed)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (orders, answers) = pipes.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        let (sender, done) = mpsc::channel();
        // The thread ends with the pipe, and that with the process.
        thread::spawn(move || {
            for answer in io::BufReader::new(answers).lines() {
                if answer.is_err() || sender.send(()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, orders, done })
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it fill that share of the pages, evenly spread, with `value`.
    pub(super) fn write(&mut self, percent: u64, value: u8, bounds: &Bounds) -> Result<(), BenchError> {
        let ended = BenchError::system("have the second process write");
        writeln!(self.orders, "{percent} {value}").map_err(&ended)?;
        loop {
            bounds.check()?;
            match self.done.recv_timeout(LOOK_INTERVAL) {
                Ok(()) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(ended(io::ErrorKind::BrokenPipe.into())),
            }
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Both fail only where it has ended and was reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The pages that are written for a share of so many.
pub(super) fn dirty_pages(pages: u64, percent: u64) -> impl Iterator<Item = u64> {
    (0..pages).filter(move |page| page % 100 < percent)
}

/// What the second process does until its input ends.
pub(crate) fn write_on_command(path: &Path, bytes: u64) -> Result<(), BenchError> {
    let mapping = Mapping::new(&RamFile::open(path, Access::ReadWrite)?, bytes, Access::ReadWrite)?;
    for line in io::stdin().lines() {
        let line = line.map_err(BenchError::system("read an order"))?;
        let (percent, value) = parse(&line).ok_or(BenchError::Foreign)?;
        let content = [value; BASE_PAGE_BYTES as usize];
        for page in dirty_pages(bytes / BASE_PAGE_BYTES, percent) {
            mapping.span(page * BASE_PAGE_BYTES, BASE_PAGE_BYTES)?.write_from(&content);
        }
        writeln!(io::stdout()).map_err(BenchError::system("answer"))?;
    }
    Ok(())
}

fn parse(order: &str) -> Option<(u64, u8)> {
    let (percent, value) = order.split_once(' ')?;
    Some((percent.parse().ok()?, value.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_pages_is_spread_over_all_of_them() {
        assert_eq!(dirty_pages(1000, 0).count(), 0);
        assert_eq!(dirty_pages(1000, 100).count(), 1000);
        let pages: Vec<u64> = dirty_pages(250, 20).collect();
        assert_eq!(pages.len(), 60);
        assert_eq!((pages[0], pages[20], pages[59]), (0, 100, 219));
    }

    #[test]
    fn orders_are_two_numbers() {
        assert_eq!(parse("20 1"), Some((20, 1)));
        assert!(["", "20", "20 256", "a 1", "20 1 2"].iter().all(|order| parse(order).is_none()));
    }
}
