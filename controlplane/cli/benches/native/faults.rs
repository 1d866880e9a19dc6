//! How long a guest in post-copy waits for a page, beside bare reads of a page over a link of the same fabric.
//!
//! The guest is Debian's, whose `stress` rewrites 200 MB without pause. A fault's time begins when a thread of the
//! destination's agent was told of it, and ends when the guest was let at the page: in it are the wait for the page's window
//! to be registered at both sides, the read of the page, ahead of that of what is owed behind it, the account of what is
//! owed, and `UFFDIO_CONTINUE`; the stream reads the rest all the while, through links and threads of its own. The kernel's
//! telling and the guest's waking are not in it. Pages that the stream is reading when the guest reaches for them are not counted. The
//! agent's metrics give the times in buckets that double; quantiles are interpolated within them, and the bounds of the p50's are told.
//!
//! A bare read begins at `post_read` and ends when a poll has its completion; nothing else is on the link, nor on the host.
//! Both sides' memory is registered, and was touched.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ramferry_fabric::{
    Admission, Domain, Link, MappedDomain, OpId, Place, RegionKey, Rights, SessionToken, Transfer, shm, tcp,
};
use ramferry_lab::{DebianGuest, Qemu};
use ramferry_proto::v1;
use ramferry_ram::{Access, BlockIndex, BlockRange};
use serde_json::json;
use tempfile::TempDir;

use crate::LOOK_INTERVAL;
use crate::downtime::under_stress;
use crate::measuring::agents::{Agent, Probes, migrate, order};
use crate::measuring::ram::{fresh_file, memory};
use crate::measuring::report::{Report, quantile};
use crate::measuring::scraped::Histogram;
use crate::still::touch;

/// Over each fabric: one takes so short that its guest waits for a handful of pages only.
const MIGRATIONS: usize = 20;
/// Of the two sides of the bare reads, each.
const BARE_BYTES: u64 = 256 << 20;
const READS: u64 = 4000;
/// A page, which a fault waits for, and what is read with it at most.
const SIZES_KIB: [u32; 2] = [4, 64];
/// From one read to the next, in pieces of its size: odd, so that each piece has its turn, and none is in a cache.
const STRIDE: u64 = 1237;
const PATIENCE: Duration = Duration::from_secs(120);
const LINK_PATIENCE: Duration = Duration::from_secs(10);
const METRIC: &str = "ramferry_postcopy_fault_duration_seconds";
/// What a fault is to stay within, as a multiple of a bare read.
const AIM: f64 = 3.0;

/// Measures bare reads before and after the migrations over the same fabric.
pub(crate) fn run(report: &mut Report) -> Result<()> {
    let debian = match DebianGuest::find() {
        Ok(debian) => debian,
        Err(reason) => {
            eprintln!("SKIPPED faults in post-copy: {reason}");
            return Ok(());
        }
    };
    let agents = (Agent::start(Probes::Off)?, Agent::start(Probes::Off)?);
    let mut guest = under_stress(&debian)?;
    for fabric in ["shm", "tcp"] {
        let before = read_bare(report, &guest, fabric)?;
        for migration in 1..=MIGRATIONS {
            eprintln!("faults over {fabric}: migration {migration} of {MIGRATIONS}");
            guest = to_postcopy(&agents, fabric, &guest)?;
        }
        let after = read_bare(report, &guest, fabric)?;
        publish(report, fabric, &Histogram::read(&agents.1, METRIC, fabric)?, f64::midpoint(before, after))?;
    }
    Ok(())
}

fn bare_name(fabric: &str, size_kib: u32) -> String {
    format!("bare read of {size_kib} KiB over {fabric}, p50")
}

/// Reads bare while the guest stands still; the p50 of a page.
fn read_bare(report: &mut Report, guest: &Qemu, fabric: &str) -> Result<f64> {
    guest.stop()?;
    let mut bare = Bare::open(fabric)?;
    let mut of_a_page = None;
    for size_kib in SIZES_KIB {
        let name = bare_name(fabric, size_kib);
        let times = bare.read(size_kib << 10)?;
        let p50 = quantile(&times, 0.5).context("no read")?;
        of_a_page.get_or_insert(p50);
        report.add_time(&name, p50);
        report.sample(&name, "p99_seconds", quantile(&times, 0.99).context("no read")?);
        report.note(&name, "fabric", json!(fabric));
        report.note(&name, "what", json!(format!("bare read of {size_kib} KiB")));
    }
    bare.link.close();
    guest.cont()?;
    of_a_page.context("no read")
}

/// Moves the guest, which waits for what it rewrote during the first round; where it is then.
fn to_postcopy(agents: &(Agent, Agent), fabric: &str, guest: &Qemu) -> Result<Qemu> {
    let there = guest.destination().start()?;
    let parameters =
        v1::MigrationParameters { postcopy: v1::Postcopy::Always.into(), ..order(fabric, "dynamic")? };
    let voyage = migrate((&agents.0, &agents.1), (guest, &there), parameters, LOOK_INTERVAL)?;
    ensure!(voyage.progress.postcopy, "it did not come to post-copy");
    // By then the destination has told its last faults, too; and stress rewrites all of its memory again.
    for _ in 0..10 {
        let lines = there.line_count();
        there.wait_line_from(lines, |line| line.starts_with("tick "), PATIENCE)?;
    }
    Ok(there)
}

fn publish(report: &mut Report, fabric: &str, faults: &Histogram, bare_seconds: f64) -> Result<()> {
    let name = format!("fault service over {fabric}, p50");
    let p50 = faults.quantile(0.5).context("no page was waited for, or none a short time")?;
    report.add_time(&name, p50.seconds);
    report.sample(&name, "p50_above_seconds", p50.above_seconds);
    report.sample(&name, "p50_at_most_seconds", p50.at_most_seconds);
    report.sample(&name, "mean_seconds", faults.mean_seconds());
    if let Some(p99) = faults.quantile(0.99) {
        report.sample(&name, "p99_at_most_seconds", p99.at_most_seconds);
    }
    report.sample(&name, "within_aim_share", faults.share_within(AIM * bare_seconds));
    report.sample(&name, "faults", faults.count());
    report.note(&name, "at_most_seconds", json!(faults.buckets()));
    report.note(&name, "fabric", json!(fabric));
    report.note(&name, "what", json!("fault service"));
    report.compare(&name, &bare_name(fabric, SIZES_KIB[0]));
    Ok(())
}

/// A link that reads, and nothing around it. Its ends are dropped in order.
struct Bare {
    link: Box<dyn Link>,
    local: RegionKey,
    remote: RegionKey,
    _serving: Serving,
}

/// In each, the links end before their listener.
enum Serving {
    Shm { _admission: Admission, _listener: shm::Listener, _directory: TempDir },
    Tcp { _admission: Admission, _listener: tcp::Listener },
}

impl Bare {
    fn open(fabric: &str) -> Result<Self> {
        let side = || -> Result<_> {
            let file = fresh_file(BARE_BYTES)?;
            touch(file.path(), BARE_BYTES)?;
            Ok(Arc::new(memory(file.path(), BARE_BYTES, Access::ReadWrite)?))
        };
        let whole = BlockRange { block: BlockIndex(0), offset: 0, length: BARE_BYTES };
        let token = SessionToken::random()?;
        let reader = Arc::new(MappedDomain::new(side()?)?);
        let local = reader.register(whole, Rights::LOCAL)?.key;
        let (remote, link, serving) = if fabric == "shm" {
            let directory = tempfile::tempdir()?;
            let listener = shm::Listener::bind(&directory.path().join("data"))?;
            let domain = Arc::new(MappedDomain::reached_by_peer(side()?)?);
            let remote = domain.register(whole, Rights::REMOTE_READ)?.key;
            let admission = listener.admit(token.clone(), domain, 1);
            let link = shm::connect(listener.path(), &token, reader, LINK_PATIENCE)?;
            (remote, link, Serving::Shm { _admission: admission, _listener: listener, _directory: directory })
        } else {
            let listener = tcp::Listener::bind((Ipv4Addr::LOCALHOST, 0).into())?;
            let domain = Arc::new(MappedDomain::new(side()?)?);
            let remote = domain.register(whole, Rights::REMOTE_READ)?.key;
            let admission = listener.admit(token.clone(), domain, 1);
            let link = tcp::connect(listener.local_addr(), &token, reader, LINK_PATIENCE)?;
            (remote, link, Serving::Tcp { _admission: admission, _listener: listener })
        };
        Ok(Self { link, local, remote, _serving: serving })
    }

    /// Reads of `size`, one after the other, here and there; how long each took, in order of time taken.
    fn read(&mut self, size: u32) -> Result<Vec<f64>> {
        let pieces = BARE_BYTES / u64::from(size);
        let mut completions = Vec::new();
        let mut times = Vec::new();
        for turn in 0..READS {
            let offset = turn * STRIDE % pieces * u64::from(size);
            let transfer = Transfer {
                id: OpId(turn),
                local: Place { key: self.local, offset },
                remote: Place { key: self.remote, offset },
                length: size,
            };
            let begun = Instant::now();
            self.link.post_read(transfer)?;
            while self.link.poll(&mut completions) == 0 {
                if begun.elapsed() > LINK_PATIENCE {
                    bail!("a read of {size} bytes does not complete");
                }
                std::hint::spin_loop();
            }
            times.push(begun.elapsed().as_secs_f64());
            completions.drain(..).try_for_each(|completion| completion.result)?;
        }
        times.sort_by(f64::total_cmp);
        Ok(times)
    }
}
