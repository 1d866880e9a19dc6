//! The ports of this host's RDMA devices, as the kernel shows them under
//! /sys/class/infiniband: read without opening a device, also by a build without verbs.

use std::fs;
use std::path::Path;

use super::MetricName;
use super::text::Exposition;

/// Where the kernel shows RDMA devices.
pub(super) const SYSFS: &str = "/sys/class/infiniband";
/// Most ports that are shown.
const PORTS_LIMIT: usize = 64;
/// Counters of data are in units of four bytes.
const DATA_UNIT_BYTES: u64 = 4;

/// What is shown of a port's counters, where its device has them: loss, congestion, errors. A device has some forty
/// more, and each is a series.
const EVENTS: [&str; 30] = [
    "duplicate_request",
    "excessive_buffer_overrun_errors",
    "implied_nak_seq_err",
    "link_downed",
    "link_error_recovery",
    "local_ack_timeout_err",
    "local_link_integrity_errors",
    "np_cnp_sent",
    "np_ecn_marked_roce_packets",
    "out_of_buffer",
    "out_of_seq_request",
    "out_of_sequence",
    "packet_seq_err",
    "port_rcv_errors",
    "port_xmit_discards",
    "port_xmit_wait",
    "rcvd_rnr_err",
    "rcvd_seq_err",
    "completer_retry_err",
    "req_cqe_error",
    "req_remote_access_errors",
    "resp_cqe_error",
    "resp_remote_access_errors",
    "retry_exceeded_err",
    "retry_rnr_exceeded_err",
    "rnr_nak_retry_err",
    "rp_cnp_handled",
    "rx_icrc_encapsulated",
    "send_err",
    "symbol_error",
];

/// A metric and where its value is.
type DataCounter = (MetricName, fn(&Port) -> Option<u64>);

/// One port.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Port {
    device: String,
    port: String,
    link_layer: String,
    transport: &'static str,
    firmware: String,
    is_active: bool,
    rate_bytes_per_second: f64,
    transmitted_bytes: Option<u64>,
    received_bytes: Option<u64>,
    events: Vec<(&'static str, u64)>,
}

/// The ports there are, in order; none where there is no device.
pub(super) fn read(sysfs: &Path) -> Vec<Port> {
    let mut ports = Vec::new();
    for device in entries(sysfs) {
        let path = sysfs.join(&device);
        for port in entries(&path.join("ports")) {
            if ports.len() < PORTS_LIMIT {
                ports.push(Port::read(&path, &device, port));
            }
        }
    }
    ports
}

impl Port {
    fn read(path: &Path, device: &str, port: String) -> Self {
        let files = path.join("ports").join(&port);
        let data = |name| number(&files.join("counters").join(name));
        let data_bytes = |name| data(name).map(|units| units.saturating_mul(DATA_UNIT_BYTES));
        let event = |name| {
            let places = ["counters", "hw_counters"];
            places.iter().find_map(|place| number(&files.join(place).join(name)))
        };
        Self {
            device: device.to_owned(),
            link_layer: text(&files.join("link_layer")).to_lowercase(),
            transport: transport(&text(&path.join("node_type"))),
            firmware: text(&path.join("fw_ver")),
            is_active: text(&files.join("state")).starts_with("4:"),
            rate_bytes_per_second: rate(&text(&files.join("rate"))),
            transmitted_bytes: data_bytes("port_xmit_data"),
            received_bytes: data_bytes("port_rcv_data"),
            events: EVENTS.into_iter().filter_map(|name| Some((name, event(name)?))).collect(),
            port,
        }
    }
}

/// Writes what is known of `ports`; a metric without samples is left out.
pub(super) fn render(ports: &[Port], text: &mut Exposition) {
    if ports.is_empty() {
        return;
    }
    text.family(MetricName::RdmaDeviceInfo);
    for port in ports {
        let labels = [&*port.device, &port.port, &port.link_layer, port.transport, &port.firmware];
        text.sample(MetricName::RdmaDeviceInfo, &labels, 1);
    }
    text.family(MetricName::RdmaPortActive);
    for port in ports {
        text.sample(MetricName::RdmaPortActive, &[&port.device, &port.port], u8::from(port.is_active));
    }
    text.family(MetricName::RdmaPortRateBytesPerSecond);
    for port in ports {
        let labels = [&*port.device, &port.port];
        text.sample(MetricName::RdmaPortRateBytesPerSecond, &labels, port.rate_bytes_per_second);
    }
    let data: [DataCounter; 2] = [
        (MetricName::RdmaPortTransmittedBytesTotal, |port| port.transmitted_bytes),
        (MetricName::RdmaPortReceivedBytesTotal, |port| port.received_bytes),
    ];
    for (metric, bytes) in data {
        let known: Vec<_> = ports.iter().filter_map(|port| Some((port, bytes(port)?))).collect();
        if !known.is_empty() {
            text.family(metric);
        }
        for (port, bytes) in known {
            text.sample(metric, &[&port.device, &port.port], bytes);
        }
    }
    if ports.iter().any(|port| !port.events.is_empty()) {
        text.family(MetricName::RdmaPortEventsTotal);
    }
    for port in ports {
        for (name, count) in &port.events {
            text.sample(MetricName::RdmaPortEventsTotal, &[&port.device, &port.port, name], count);
        }
    }
}

fn entries(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = names.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// A file's text without the space around it; empty where it cannot be read.
fn text(file: &Path) -> String {
    fs::read_to_string(file).map(|text| text.trim().to_owned()).unwrap_or_default()
}

fn number(file: &Path) -> Option<u64> {
    text(file).parse().ok()
}

/// From node_type: "1: CA".
fn transport(node_type: &str) -> &'static str {
    match node_type.split(':').next() {
        Some("1") => "infiniband",
        Some("4") => "iwarp",
        _ => "other",
    }
}

/// From rate: "100 Gb/sec (4X EDR)"; 0 where it is not known.
fn rate(text: &str) -> f64 {
    const BYTES_PER_GIGABIT: f64 = 1e9 / 8.0;
    let gigabits: Option<f64> = text.split(' ').next().and_then(|number| number.parse().ok());
    gigabits.unwrap_or_default() * BYTES_PER_GIGABIT
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A tree with one port of an mlx5 device, and one of soft-RoCE that is down.
    pub(in crate::metrics) fn sysfs() -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        let files = [
            ("mlx5_0/node_type", "1: CA\n"),
            ("mlx5_0/fw_ver", "16.35.2000\n"),
            ("mlx5_0/ports/1/link_layer", "Ethernet\n"),
            ("mlx5_0/ports/1/state", "4: ACTIVE\n"),
            ("mlx5_0/ports/1/rate", "100 Gb/sec (4X EDR)\n"),
            ("mlx5_0/ports/1/counters/port_xmit_data", "250\n"),
            ("mlx5_0/ports/1/counters/port_rcv_data", "125\n"),
            ("mlx5_0/ports/1/counters/symbol_error", "3\n"),
            ("mlx5_0/ports/1/hw_counters/out_of_sequence", "7\n"),
            ("mlx5_0/ports/1/hw_counters/lifespan", "10\n"),
            ("rxe0/node_type", "1: CA\n"),
            ("rxe0/ports/1/counters/port_xmit_data", "N/A (no PMA)\n"),
            ("rxe0/ports/1/link_layer", "Ethernet\n"),
            ("rxe0/ports/1/state", "1: DOWN\n"),
            ("rxe0/ports/1/rate", "2.5 Gb/sec (1X SDR)\n"),
        ];
        for (name, text) in files {
            let path = tree.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        tree
    }

    #[test]
    fn ports_are_read_with_what_their_devices_have() {
        let tree = sysfs();
        let ports = read(tree.path());
        let [mlx5, rxe] = &ports[..] else { panic!("{ports:?}") };
        assert_eq!((&*mlx5.device, &*mlx5.port, &*mlx5.firmware), ("mlx5_0", "1", "16.35.2000"));
        assert_eq!((&*mlx5.link_layer, mlx5.transport, mlx5.is_active), ("ethernet", "infiniband", true));
        assert_eq!(mlx5.rate_bytes_per_second, 12.5e9);
        assert_eq!((mlx5.transmitted_bytes, mlx5.received_bytes), (Some(1000), Some(500)));
        assert_eq!(mlx5.events, [("out_of_sequence", 7), ("symbol_error", 3)]);
        assert_eq!((rxe.is_active, rxe.rate_bytes_per_second), (false, 312.5e6));
        assert_eq!((rxe.transmitted_bytes, &*rxe.firmware, rxe.events.len()), (None, "", 0));
    }

    #[test]
    fn a_host_without_devices_has_no_ports() {
        assert!(read(Path::new("/nonexistent")).is_empty());
        let mut text = Exposition::default();
        render(&[], &mut text);
        assert_eq!(text.finish(), "");
    }
}
