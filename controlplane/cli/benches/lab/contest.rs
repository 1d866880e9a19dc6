//! Who moves a guest from host to host, and what that takes.

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use ramferry_lab::{Qemu, QemuBuilder};
use ramferry_proto::v1;
use serde_json::{Value, json};

use crate::hosts::{DESTINATION, Hosts, watch_wire};
use crate::measuring::agents::{migrate, order, seconds};
use crate::measuring::costs::{Cost, machine_cpu_seconds, watch};
use crate::measuring::own::{self, Pause, Way, between, wait_event};
use crate::measuring::report::Report;
use crate::measuring::scraped::Histogram;

/// As many as ramferry's agents choose.
pub(crate) const QUEUE_PAIRS: usize = 4;
pub(crate) const STREAMS: usize = 2;
/// QEMU's default, and here everybody's.
const MAX_DOWNTIME: Duration = Duration::from_millis(300);
/// Looking costs processor time, of which emulation leaves little.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Accesses that waited for the source.
const FAULTS: &str = "ramferry_postcopy_fault_duration_seconds";
const GIB: f64 = (1_u64 << 30) as f64;

/// Who moves the guest.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Contestant {
    /// QEMU itself, over `rdma` or `tcp`.
    Qemu { fabric: &'static str, registration: &'static str },
    /// ramferry.
    Ours {
        fabric: &'static str,
        registration: &'static str,
        streams: usize,
        pin_budget_bytes: u64,
        /// After the first round.
        postcopy: bool,
    },
}

impl Contestant {
    pub(crate) const QEMU_DYNAMIC: Contestant = Contestant::Qemu { fabric: "rdma", registration: "dynamic" };
    pub(crate) const QEMU_PIN_ALL: Contestant = Contestant::Qemu { fabric: "rdma", registration: "pin-all" };
    pub(crate) const QEMU_TCP: Contestant = Contestant::Qemu { fabric: "tcp", registration: "dynamic" };
    pub(crate) const DYNAMIC: Contestant = Contestant::ours("verbs", "dynamic", QUEUE_PAIRS, false);
    pub(crate) const PIN_ALL: Contestant = Contestant::ours("verbs", "pin-all", QUEUE_PAIRS, false);
    pub(crate) const POSTCOPY: Contestant = Contestant::ours("verbs", "dynamic", QUEUE_PAIRS, true);
    pub(crate) const TCP: Contestant = Contestant::ours("tcp", "dynamic", STREAMS, false);
    pub(crate) const SHM: Contestant = Contestant::ours("shm", "dynamic", STREAMS, false);

    const fn ours(
        fabric: &'static str,
        registration: &'static str,
        streams: usize,
        postcopy: bool,
    ) -> Contestant {
        Contestant::Ours { fabric, registration, streams, pin_budget_bytes: 0, postcopy }
    }

    pub(crate) fn name(self) -> String {
        match self {
            Contestant::Qemu { fabric: "tcp", .. } => "qemu tcp".to_owned(),
            Contestant::Qemu { fabric, registration } => format!("qemu {fabric} {registration}"),
            Contestant::Ours { fabric, registration, streams, pin_budget_bytes, postcopy } => {
                let mut name = format!("{fabric} {registration}");
                if fabric == "verbs" && streams != QUEUE_PAIRS {
                    name.push_str(&format!(", {streams} queue pair"));
                }
                if pin_budget_bytes > 0 {
                    name.push_str(&format!(", budget {} MiB", pin_budget_bytes >> 20));
                }
                if postcopy {
                    name.push_str(", post-copy");
                }
                name
            }
        }
    }

    /// A destination as this contestant needs it: QEMU resumes by itself.
    pub(crate) fn destination(self, builder: QemuBuilder) -> Result<Qemu> {
        builder.incoming(true).paused(matches!(self, Contestant::Ours { .. })).start()
    }
}

/// What one move took.
#[derive(Debug)]
pub(crate) struct Move {
    pub(crate) transferred_bytes: u64,
    /// From the call to the destination's readiness to run, or its running.
    pub(crate) whole_seconds: f64,
    pub(crate) setup_seconds: f64,
    pub(crate) copy_seconds: f64,
    /// From the call until the first bytes had left the source host.
    pub(crate) first_byte_seconds: Option<f64>,
    /// From the source's stop to the destination's resume, where the guest ran.
    pub(crate) downtime_seconds: Option<f64>,
    told: Option<Told>,
    pulled: Option<Pulled>,
    source: Cost,
    destination: Cost,
    machine_cpu_seconds: f64,
}

/// What ramferry's agents say of the downtime.
#[derive(Debug)]
struct Told {
    seconds: f64,
    /// By name, in their order.
    parts: Vec<(String, f64)>,
}

/// What was left when the guest was resumed.
#[derive(Debug)]
struct Pulled {
    /// From the resume to the last page.
    seconds: f64,
    /// How long accesses waited that had to.
    faults: Histogram,
}

/// What its mover says of a move.
struct Outcome {
    called: SystemTime,
    /// When the destination had all of the guest; QEMU tells it by an event.
    ended: Option<SystemTime>,
    transferred_bytes: u64,
    setup_seconds: f64,
    copy_seconds: f64,
    told: Option<Told>,
    pulled: Option<Pulled>,
    /// Of the source's agent and the destination's.
    agents: [Cost; 2],
}

/// Moves a guest between the hosts.
pub(crate) fn run(hosts: &Hosts, contestant: Contestant, from: &Qemu, to: &Qemu) -> Result<Move> {
    let ran = from.status()? == "running";
    from.qmp_events()?;
    let before = machine_cpu_seconds()?;
    let ((outcome, first), costs) = watch(&[from.pid(), to.pid()], LOOK_INTERVAL, || {
        watch_wire(|| match contestant {
            Contestant::Qemu { fabric, registration } => by_qemu(fabric, registration == "pin-all", from, to),
            Contestant::Ours { .. } => by_us(hosts, contestant, from, to),
        })
    })?;
    let machine_cpu_seconds = machine_cpu_seconds()? - before;
    let has_arrived = |event: &Value| event["event"] == "MIGRATION" && event["data"]["status"] == "completed";
    let (ended, downtime_seconds) = match (ran, outcome.ended) {
        (true, _) => {
            let pause = Pause::of(from, to, LOOK_INTERVAL)?;
            (pause.resumed, Some(pause.seconds()?))
        }
        (false, Some(ended)) => (ended, None),
        (false, None) => (wait_event(to, has_arrived, LOOK_INTERVAL)?, None),
    };
    Ok(Move {
        transferred_bytes: outcome.transferred_bytes,
        whole_seconds: between(outcome.called, ended)?,
        setup_seconds: outcome.setup_seconds,
        copy_seconds: outcome.copy_seconds,
        first_byte_seconds: first.map(|first| between(outcome.called, first)).transpose()?,
        downtime_seconds,
        told: outcome.told.filter(|_| ran),
        pulled: outcome.pulled,
        source: sum(costs[0], outcome.agents[0]),
        destination: sum(costs[1], outcome.agents[1]),
        machine_cpu_seconds,
    })
}

impl Move {
    /// Notes under `name` what is beside the move's time.
    pub(crate) fn note(&self, report: &mut Report, name: &str) {
        let per_gib = GIB / self.transferred_bytes.max(1) as f64;
        let mut sample = |key: &str, value: f64| report.sample(name, key, value);
        sample("setup_seconds", self.setup_seconds);
        sample("copy_seconds", self.copy_seconds);
        if let Some(seconds) = self.first_byte_seconds {
            sample("first_byte_seconds", seconds);
        }
        if let Some(seconds) = self.downtime_seconds {
            sample("downtime_seconds", seconds);
        }
        if let Some(pulled) = &self.pulled {
            sample("postcopy_seconds", pulled.seconds);
            sample("faults", pulled.faults.count());
            if let Some(p50) = pulled.faults.quantile(0.5) {
                sample("fault_p50_seconds", p50.seconds);
            }
        }
        sample("transferred_bytes", self.transferred_bytes as f64);
        sample("source_cpu_seconds_per_gib", self.source.cpu_seconds * per_gib);
        sample("destination_cpu_seconds_per_gib", self.destination.cpu_seconds * per_gib);
        sample("machine_cpu_seconds_per_gib", self.machine_cpu_seconds * per_gib);
        sample("source_pinned_peak_bytes", self.source.pinned_bytes as f64);
        sample("destination_pinned_peak_bytes", self.destination.pinned_bytes as f64);
    }

    /// Notes under `name` what the downtime was spent on, where its mover tells.
    pub(crate) fn note_downtime(&self, report: &mut Report, name: &str) {
        let Some(told) = &self.told else { return };
        report.sample(name, "reported_seconds", told.seconds);
        for (part, seconds) in &told.parts {
            report.sample(name, &format!("part_{part}_seconds"), *seconds);
        }
    }
}

/// What a destination of QEMU's own migration listens at.
pub(crate) fn listen(fabric: &str) -> String {
    // Over RDMA it does not say which port it was given.
    static PORT: AtomicU16 = AtomicU16::new(20_000);
    match fabric {
        "rdma" => format!("rdma:{}:{}", DESTINATION.address, PORT.fetch_add(1, Ordering::Relaxed)),
        _ => format!("{fabric}:{}:0", DESTINATION.address),
    }
}

fn by_us(hosts: &Hosts, contestant: Contestant, from: &Qemu, to: &Qemu) -> Result<Outcome> {
    let Contestant::Ours { fabric, registration, streams, pin_budget_bytes, postcopy } = contestant else {
        anyhow::bail!("{} is not ramferry", contestant.name());
    };
    let parameters = v1::MigrationParameters {
        streams: u32::try_from(streams)?,
        pin_budget_bytes,
        max_downtime: Some(MAX_DOWNTIME.try_into()?),
        postcopy: if postcopy { v1::Postcopy::Always } else { v1::Postcopy::Never }.into(),
        ..order(fabric, registration)?
    };
    let faults = || Histogram::read(&hosts.destination, FAULTS, fabric);
    let before = faults()?;
    let voyage = migrate((&hosts.source, &hosts.destination), (from, to), parameters, LOOK_INTERVAL)?;
    let pulled = postcopy.then(|| {
        let seconds = seconds(voyage.progress.postcopy_time)?;
        anyhow::Ok(Pulled { seconds, faults: faults()?.since(&before) })
    });
    Ok(Outcome {
        called: voyage.called,
        ended: Some(voyage.called + Duration::from_secs_f64(voyage.total_seconds()?)),
        transferred_bytes: voyage.transferred_bytes(),
        setup_seconds: voyage.setup_seconds()?,
        copy_seconds: voyage.copy_seconds()?,
        told: Some(Told { seconds: voyage.downtime_seconds()?, parts: voyage.downtime_parts()? }),
        pulled: pulled.transpose()?,
        agents: [voyage.source, voyage.destination],
    })
}

fn by_qemu(fabric: &str, pin_all: bool, from: &Qemu, to: &Qemu) -> Result<Outcome> {
    let listen = listen(fabric);
    let way = Way {
        listen: &listen,
        capability: pin_all.then_some("rdma-pin-all"),
        // Its default limit of bandwidth is not what is measured.
        parameters: json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": MAX_DOWNTIME.as_millis() as u64 }),
    };
    let moved = own::migrate(from, to, &way, LOOK_INTERVAL)?;
    let setup_seconds = moved.seconds("setup-time")?;
    Ok(Outcome {
        called: moved.called,
        ended: None,
        transferred_bytes: moved.transferred_bytes()?,
        setup_seconds,
        copy_seconds: moved.seconds("total-time")? - setup_seconds,
        told: None,
        pulled: None,
        agents: [Cost::default(); 2],
    })
}

fn sum(one: Cost, other: Cost) -> Cost {
    Cost {
        cpu_seconds: one.cpu_seconds + other.cpu_seconds,
        memory_bytes: one.memory_bytes + other.memory_bytes,
        pinned_bytes: one.pinned_bytes + other.pinned_bytes,
    }
}
