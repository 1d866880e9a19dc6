//! What `ramferry bench` measured, as tables.

use std::time::Duration;

use super::table::columns;
use super::{bit_rate, bytes, duration};
use crate::bench::fabric::{FabricReport, ServerReport, counted};
use crate::bench::registration::{Case, RegistrationReport, Skipped};
use crate::bench::scan::{Pass, ScanReport};
use crate::bench::{Latency, Spread};

/// What a report says to people.
pub(crate) trait Table {
    /// Lines, each with its end.
    fn text(&self) -> String;
}

impl Table for FabricReport {
    fn text(&self) -> String {
        let server = match (&self.server, &self.address) {
            (Some(server), _) => format!("to {server}"),
            (None, Some(address)) => format!("both sides in this process at {address}"),
            (None, None) => "both sides in this process".to_owned(),
        };
        let run = duration(Duration::from_secs_f64(self.duration_seconds));
        let mut text = format!(
            "{}, {server}; {} a side, median of {} of {run}\n",
            self.fabric,
            bytes(self.memory_bytes),
            counted(self.runs, "run"),
        );
        if let Some(device) = &self.rdma_device {
            let rate = device.port_bits_per_second.map_or_else(|| "of unknown rate".to_owned(), bit_rate);
            text.push_str(&format!("device  {}, port {rate}\n", device.name));
        }
        if let Some(fence) = &self.fence {
            text.push_str(&format!("fence   {}\n", latency(fence)));
        }
        if let Some(round_trip) = &self.limit_round_trip {
            text.push_str(&format!("{} {}\n", self.limit, latency(round_trip)));
        }
        let limit = format!("LIMIT ({})", self.limit);
        let heading = ["SIZE", "LINKS", "RATE", "LOWEST-HIGHEST", "BYTES", "WRITES", &limit, "OF LIMIT"];
        let rows: Vec<_> = self
            .cases
            .iter()
            .map(|case| {
                vec![
                    bytes(case.size_bytes.into()),
                    case.links.to_string(),
                    bit_rate(case.bits_per_second.median as u64),
                    between(case.bits_per_second, |bits| bit_rate(bits as u64)),
                    byte_rate(case.bytes_per_second.median),
                    format!("{}/s", count(case.messages_per_second.median)),
                    bit_rate(case.limit_bits_per_second.median as u64),
                    format!("{:.2}", case.of_limit),
                ]
            })
            .collect();
        text.push_str(&columns(&heading, &rows));
        incomplete(text, self.complete)
    }
}

impl Table for ServerReport {
    fn text(&self) -> String {
        let (Some(client), Some(fabric)) = (self.client, self.fabric) else { return String::new() };
        let placed =
            self.placed_bytes.map_or_else(String::new, |placed| format!(", {} placed", bytes(placed)));
        format!("served {client} over {fabric} with {} of memory{placed}\n", bytes(self.memory_bytes))
    }
}

impl Table for RegistrationReport {
    fn text(&self) -> String {
        let heading = [
            "SIDE",
            "MEMORY",
            "PAGES",
            "REGION",
            "THREADS",
            "REGISTER p50",
            "MAX",
            "RATE",
            "DEREGISTER p50",
            "MAX",
            "REGIONS",
        ];
        let seconds = |seconds| duration(Duration::from_secs_f64(seconds));
        let row = |case: &Case| {
            vec![
                case.side.as_str().to_owned(),
                if case.touched { "touched" } else { "untouched" }.to_owned(),
                bytes(case.page_bytes),
                bytes(case.size_bytes),
                case.threads.to_string(),
                seconds(case.register.p50_seconds),
                seconds(case.register.max_seconds),
                byte_rate(case.bytes_per_second.median),
                seconds(case.deregister.p50_seconds),
                seconds(case.deregister.max_seconds),
                case.register.count.to_string(),
            ]
        };
        let rows: Vec<_> = self.cases.iter().map(row).collect();
        let mut text = format!("{}, at most {} at once\n", self.fabric, bytes(self.memory_bytes));
        text.push_str(&columns(&heading, &rows));
        for skipped in &self.skipped {
            text.push_str(&format!("skipped: {}\n", skip(skipped)));
        }
        incomplete(text, self.complete)
    }
}

impl Table for ScanReport {
    fn text(&self) -> String {
        let mut rows = Vec::new();
        let mut add = |what: String, rate: Option<Spread>, seconds: Spread| {
            let time = |seconds| duration(Duration::from_secs_f64(seconds));
            let rate = rate.map_or_else(String::new, |rate| byte_rate(rate.median));
            rows.push(vec![what, time(seconds.median), between(seconds, time), rate]);
        };
        let mut add_pass =
            |what: String, pass: &Pass| add(what, Some(pass.bytes_per_second), pass.seconds_per_gib);
        for pass in &self.zero_scan {
            add_pass(format!("zero scan of {} pages ({})", pass.pages, self.zero_scan_by), pass);
        }
        if let Some(pass) = &self.page_hash {
            add_pass("hash of each page".to_owned(), pass);
        }
        for harvest in &self.harvest {
            let tracker = self.tracker.unwrap_or_default();
            add(
                format!("harvest, {} % written ({tracker})", harvest.dirty_percent),
                None,
                harvest.seconds_per_gib,
            );
        }
        let runs = counted(self.runs, "run");
        let mut text = format!("{} of memory, median of {runs}\n", bytes(self.memory_bytes));
        text.push_str(&columns(&["WHAT", "A GiB", "LOWEST-HIGHEST", "RATE"], &rows));
        if let Some(reason) = &self.harvest_skipped {
            text.push_str(&format!("skipped: harvest: {reason}\n"));
        }
        incomplete(text, self.complete)
    }
}

fn incomplete(mut text: String, is_complete: bool) -> String {
    if !is_complete {
        text.push_str("not all was measured\n");
    }
    text
}

fn latency(latency: &Latency) -> String {
    let seconds = |seconds| duration(Duration::from_secs_f64(seconds));
    format!(
        "p50 {}, p99 {}, at most {} ({} round trips)",
        seconds(latency.p50_seconds),
        seconds(latency.p99_seconds),
        seconds(latency.max_seconds),
        latency.count
    )
}

fn skip(skipped: &Skipped) -> String {
    let mut what = format!("pages of {}", bytes(skipped.page_bytes));
    if let Some(size) = skipped.size_bytes {
        what.push_str(&format!(", regions of {}", bytes(size)));
    }
    if let Some(threads) = skipped.threads {
        what.push_str(&format!(", {}", counted(threads, "thread")));
    }
    format!("{what}: {}", skipped.reason)
}

fn between(spread: Spread, text: impl Fn(f64) -> String) -> String {
    format!("{} - {}", text(spread.min), text(spread.max))
}

/// `4.21 GB/s`: decimal, as other tools have it.
fn byte_rate(bytes_per_second: f64) -> String {
    format!("{}B/s", scaled(bytes_per_second))
}

/// `38.1 k`.
fn count(amount: f64) -> String {
    scaled(amount).trim_end().to_owned()
}

fn scaled(amount: f64) -> String {
    let (divisor, unit) = match amount {
        a if a < 1e3 => (1.0, ""),
        a if a < 1e6 => (1e3, "k"),
        a if a < 1e9 => (1e6, "M"),
        _ => (1e9, "G"),
    };
    format!("{} {unit}", super::three_digits(amount / divisor))
}

#[cfg(test)]
mod tests {
    use ramferry_fabric::FabricKind;

    use super::*;
    use crate::bench::fabric::{Case as FabricCase, Peer, Plan};

    fn spread(median: f64) -> Spread {
        Spread { median, min: median / 2.0, max: median * 2.0 }
    }

    #[test]
    fn fabric_table_has_the_limit_beside_each_rate() {
        let plan = Plan {
            fabric: FabricKind::Tcp,
            sizes: vec![65536],
            links: vec![2],
            runs: 3,
            duration: Duration::from_millis(200),
            memory_bytes: 256 << 20,
            rdma_device: None,
        };
        let mut report = FabricReport::new(&plan, &Peer::Here([127, 0, 0, 1].into()));
        report.limit = "sockets";
        report.complete = true;
        report.fence = Latency::of(vec![Duration::from_micros(20)]);
        report.cases.push(FabricCase {
            size_bytes: 65536,
            links: 2,
            bytes_per_second: spread(4e9),
            bits_per_second: spread(32e9),
            messages_per_second: spread(61_035.0),
            limit_bytes_per_second: spread(5e9),
            limit_bits_per_second: spread(40e9),
            of_limit: 0.8,
        });
        assert_eq!(
            report.text(),
            "tcp, both sides in this process at 127.0.0.1; 256 MiB a side, median of 3 runs of 200 ms\n\
             fence   p50 20.0 us, p99 20.0 us, at most 20.0 us (1 round trips)\n\
             SIZE      LINKS  RATE         LOWEST-HIGHEST             BYTES      WRITES    LIMIT (sockets)  OF LIMIT\n\
             64.0 KiB  2      32.0 Gbit/s  16.0 Gbit/s - 64.0 Gbit/s  4.00 GB/s  61.0 k/s  40.0 Gbit/s      0.80\n"
        );
    }

    #[test]
    fn what_was_left_out_is_said() {
        let mut report = ScanReport::new(1 << 30, 1);
        report.harvest_skipped = Some("no tracker".to_owned());
        let text = report.text();
        assert!(text.ends_with("skipped: harvest: no tracker\nnot all was measured\n"), "{text}");
        let skipped = Skipped {
            page_bytes: 2 << 20,
            size_bytes: Some(1 << 30),
            threads: Some(2),
            reason: "why".to_owned(),
        };
        assert_eq!(skip(&skipped), "pages of 2.00 MiB, regions of 1.00 GiB, 2 threads: why");
        assert_eq!((byte_rate(12.0), count(999.0)), ("12.0 B/s".to_owned(), "999".to_owned()));
    }
}
