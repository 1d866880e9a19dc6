//! What the link between the hosts can do: `ib_write_bw`, and plain sockets.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ramferry_fabric::limits;
use ramferry_ram::Access;

use crate::hosts::{DESTINATION, Host, SOURCE};
use crate::measuring::ram::{fresh_file, memory};
use crate::measuring::report::Report;

const MIB: u64 = 1 << 20;
const MESSAGE_BYTES: u64 = MIB;
const PIECE_BYTES: u64 = MIB;
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);

pub(crate) fn perftest_name(queue_pairs: usize) -> String {
    format!("ib_write_bw, {queue_pairs} queue pair{}", if queue_pairs == 1 { "" } else { "s" })
}

pub(crate) fn sockets_name(streams: usize) -> String {
    format!("sockets, {streams} stream{}", if streams == 1 { "" } else { "s" })
}

/// Writes `bytes` from the one host to the other, as the case of that name.
pub(crate) fn measure_perftest(
    report: &mut Report,
    name: &str,
    bytes: u64,
    queue_pairs: usize,
) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let output = directory.path().join("report.json");
    let iterations = bytes / MESSAGE_BYTES / queue_pairs as u64;
    let server =
        Server(perftest(DESTINATION, iterations, queue_pairs).spawn().context("cannot run ib_write_bw")?);
    let mut client = perftest(SOURCE, iterations, queue_pairs);
    client.args(["--out_json", "--out_json_file"]).arg(&output).arg(DESTINATION.address);
    let deadline = Instant::now() + PATIENCE;
    // The server does not say when it listens: a client that is too early is refused, and calls again.
    while !client.status()?.success() {
        ensure!(Instant::now() < deadline, "ib_write_bw does not connect");
        std::thread::sleep(PAUSE);
    }
    server.wait(deadline)?;
    let moved = iterations * queue_pairs as u64 * MESSAGE_BYTES;
    report.add(name, moved, moved as f64 / (average(&output)? * MIB as f64));
    Ok(())
}

/// Sends the RAM in a file from the one host's address to the other's, as the case of that name.
pub(crate) fn measure_sockets(
    report: &mut Report,
    name: &str,
    file: &Path,
    bytes: u64,
    streams: usize,
) -> Result<()> {
    let source = memory(file, bytes, Access::Read)?;
    let pages = source.presence()?;
    let to = fresh_file(bytes)?;
    let to = memory(to.path(), bytes, Access::ReadWrite)?;
    let address = DESTINATION.address.parse()?;
    let elapsed = limits::sockets(&source, &to, &pages, PIECE_BYTES, address, streams)?;
    report.add(name, pages.bytes(), elapsed.as_secs_f64());
    Ok(())
}

fn perftest(host: Host, iterations: u64, queue_pairs: usize) -> Command {
    let mut command = Command::new("timeout");
    command
        .args([&PATIENCE.as_secs().to_string(), "ib_write_bw", "-R", "-F", "-d", host.rdma])
        .args([
            "-s",
            &MESSAGE_BYTES.to_string(),
            "-n",
            &iterations.to_string(),
            "-q",
            &queue_pairs.to_string(),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// The average rate that `ib_write_bw` reports, in MiB a second. Its report resembles JSON, and is none.
fn average(path: &Path) -> Result<f64> {
    let text = fs::read_to_string(path).context("ib_write_bw left no report")?;
    let value = text.lines().find_map(|line| line.trim().trim_start_matches('"').strip_prefix("BW_average"));
    let rate = value.map(|value| value.trim_matches(['"', ':', ',', ' ']).parse());
    rate.and_then(Result::ok).with_context(|| format!("ib_write_bw does not say its average: {text}"))
}

/// Killed and reaped when it is dropped.
struct Server(Child);

impl Server {
    fn wait(mut self, deadline: Instant) -> Result<()> {
        loop {
            match self.0.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("ib_write_bw's server ended with {status}"),
                None if Instant::now() > deadline => bail!("ib_write_bw's server does not end"),
                None => std::thread::sleep(PAUSE),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
