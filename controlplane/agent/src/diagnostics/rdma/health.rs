//! How well ports carry what they are given.

use super::super::verdict::Verdict;
use super::flow::{Flow, Pause, Pfc};
use super::{Pcie, Port, Rdma};

/// Counters of packets, sent or received.
pub(super) const PACKETS: [&str; 4] = ["port_xmit_packets", "port_rcv_packets", "sent_pkts", "rcvd_pkts"];
/// Counters of what was lost, damaged or sent again.
const ERRORS: [&str; 21] = [
    "symbol_error",
    "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
    "port_rcv_errors",
    "port_rcv_remote_physical_errors",
    "port_xmit_discards",
    "port_xmit_constraint_errors",
    "port_rcv_constraint_errors",
    "out_of_sequence",
    "out_of_buffer",
    "packet_seq_err",
    "local_ack_timeout_err",
    "rnr_nak_retry_err",
    "implied_nak_seq_err",
    "req_transport_retries_exceeded",
    "rx_icrc_encapsulated",
    "out_of_seq_request",
    "rcvd_seq_err",
    "retry_exceeded_err",
    "completer_retry_err",
    "send_err",
];
/// Told beside them, and no error.
const EVENTS: [&str; 2] = ["link_downed", "link_error_recovery"];
/// Of RoCE's answers to congestion: packets that came marked, answers sent, answers heeded, transmissions that were
/// slowed down or begun again. The names are the drivers': mlx5, bnxt_re, irdma.
const CONGESTION: [&str; 12] = [
    "np_ecn_marked_roce_packets",
    "np_cnp_sent",
    "rp_cnp_handled",
    "roce_adp_retrans",
    "roce_adp_retrans_to",
    "roce_slow_restart",
    "rx_ecn_marked_pkts",
    "tx_cnp_pkts",
    "rx_cnp_pkts",
    "RxECNMrkd",
    "cnpSent",
    "cnpHandled",
];
/// Errors are rare where there is no more than one in so many packets.
const PACKETS_PER_ERROR: u64 = 1_000_000;
/// Below this, an adapter of RDMA was not trained as it should be.
const RATE_GIGABITS: f64 = 10.0;

/// Whether a counter is worth telling of.
pub(super) fn is_of_interest(name: &str) -> bool {
    ERRORS.contains(&name) || EVENTS.contains(&name) || CONGESTION.contains(&name)
}

impl Rdma {
    pub(in crate::diagnostics) fn judge_rate(&self) -> Verdict {
        if let Some(idle) = self.idle() {
            return idle;
        }
        let judged = self.ports.iter().filter(|port| port.is_active()).map(|port| {
            let speed = port.interface.as_ref().and_then(|interface| Some((interface, interface.speed_megabits?)));
            let told = speed.map(|(interface, megabits)| format!("; {} has {megabits} Mbit/s", interface.name));
            let evidence = format!("{} has {}{}", port.name(), port.rate, told.unwrap_or_default());
            if !port.is_hardware {
                return Verdict::ok(format!("{evidence}; soft-RoCE, whose rate is that of its processor"));
            }
            let gigabits = port.rate.split_whitespace().next().and_then(|number| number.parse::<f64>().ok());
            let is_narrow = !port.is_ethernet && port.rate.contains("(1X");
            if is_narrow || gigabits.is_some_and(|gigabits| gigabits < RATE_GIGABITS) {
                return Verdict::warn(
                    format!("{evidence}: less than an RDMA port should have"),
                    "reseat or replace the cable, and see the speed and lanes that the switch's port is set to",
                );
            }
            Verdict::ok(evidence)
        });
        Verdict::of_all(judged.collect()).unwrap_or_else(|| Verdict::skip("no port is active"))
    }

    pub(in crate::diagnostics) fn judge_pcie(&self) -> Verdict {
        if let Some(idle) = self.idle() {
            return idle;
        }
        let judged = self.ports.iter().filter_map(|port| Some(judge_pcie_of(port, port.pcie.as_ref()?)));
        Verdict::of_all(judged.collect()).unwrap_or_else(|| Verdict::skip("no device is on a PCIe bus"))
    }

    pub(in crate::diagnostics) fn judge_errors(&self) -> Verdict {
        if let Some(idle) = self.idle() {
            return idle;
        }
        Verdict::of_all(self.ports.iter().map(judge_errors_of).collect()).expect("there are ports")
    }

    pub(in crate::diagnostics) fn judge_flow_control(&self) -> Verdict {
        if let Some(idle) = self.idle() {
            return idle;
        }
        let roce = self.ports.iter().filter(|port| port.is_active() && port.is_ethernet && port.is_hardware);
        Verdict::of_all(roce.map(judge_flow_control_of).collect()).unwrap_or_else(|| {
            Verdict::skip(
                "no active port is a RoCE adapter's: InfiniBand has credits, soft-RoCE neither PFC nor ECN",
            )
        })
    }
}

fn judge_pcie_of(port: &Port, pcie: &Pcie) -> Verdict {
    let Pcie { speed, max_speed, width, max_width } = pcie;
    let evidence = format!("{} is at {speed} x{width}, of {max_speed} x{max_width} at most", port.device);
    if speed == max_speed && width == max_width {
        return Verdict::ok(evidence);
    }
    Verdict::warn(
        evidence,
        "move the adapter to a slot with all its lanes, or reseat it (lspci -vv: LnkSta against LnkCap)",
    )
}

fn judge_errors_of(port: &Port) -> Verdict {
    let list = |wanted: &[&str]| {
        let of: Vec<_> = port.counters.iter().filter(|(name, _)| wanted.contains(&name.as_str())).collect();
        let told: Vec<String> = of.iter().map(|(name, count)| format!("{name} {count}")).collect();
        (of.iter().map(|(_, count)| count).sum::<u64>(), told.join(", "))
    };
    let ((errors, told), (_, events)) = (list(&ERRORS), list(&EVENTS));
    let packets = port.packets.map_or("an unknown number of".to_owned(), |packets| packets.to_string());
    let mut evidence =
        format!("{}: {errors} errors in {packets} packets since the driver was loaded", port.name());
    for more in [told, events].into_iter().filter(|text| !text.is_empty()) {
        evidence = format!("{evidence}, {more}");
    }
    let allowed = port.packets.map_or(0, |packets| packets / PACKETS_PER_ERROR);
    if errors <= allowed {
        return Verdict::ok(evidence);
    }
    Verdict::warn(
        evidence,
        "look again in a minute: while they grow, packets are lost (cable, switch, PFC and ECN, MTU along the way); where \
         they stand still, that is over",
    )
}

fn judge_flow_control_of(port: &Port) -> Verdict {
    let counted: Vec<String> =
        CONGESTION.iter().filter_map(|name| Some(format!("{name} {}", port.counter(name)?))).collect();
    let heard = if counted.is_empty() { "no congestion was told".to_owned() } else { counted.join(", ") };
    let Some(interface) = &port.interface else {
        return Verdict::skip(format!("{}: {heard}; which interface is its own is not told", port.name()));
    };
    let Flow { pfc, pause } = &interface.flow;
    let ecn = interface.ecn_priorities.as_ref();
    let evidence = format!(
        "{}: {}, {}, {}; {heard}",
        port.name(),
        told_of_pfc(pfc),
        told_of_pause(pause),
        told_of_ecn(ecn)
    );
    let has_pfc = pfc.as_ref().map(|pfc| !pfc.priorities.is_empty());
    let has_pause = pause.as_ref().map(|pause| pause.is_on());
    let ecn_remedy = format!(
        "turn ECN on for the priority that RoCE uses, as on the switches: echo 1 > \
         /sys/class/net/{0}/ecn/roce_np/enable/3 and .../roce_rp/enable/3",
        interface.name
    );
    match (ecn.map(|priorities| !priorities.is_empty()), has_pfc, has_pause) {
        (Some(true), ..) => Verdict::ok(evidence),
        (Some(false), ..) => {
            Verdict::warn(format!("{evidence}; without ECN one busy link fills the switch"), ecn_remedy)
        }
        (None, Ok(true), _) | (None, _, Ok(true)) => Verdict::ok(evidence),
        (None, Ok(false), _) => Verdict::warn(
            format!("{evidence}; where a switch is busy, packets are lost and sent again"),
            format!(
                "turn PFC on for the priority that RoCE uses, as on the switches (dcb pfc set dev {} prio-pfc all:off 3:on), \
                 or ECN where the adapter's tool shows it",
                interface.name
            ),
        ),
        (None, Err(_), _) => Verdict::skip(evidence),
    }
}

fn told_of_pfc(pfc: &Result<Pfc, String>) -> String {
    match pfc {
        Ok(pfc) if pfc.priorities.is_empty() => "PFC off".to_owned(),
        Ok(Pfc { priorities, sent_frames, received_frames }) => format!(
            "PFC on for priorities {priorities:?} ({sent_frames} frames sent, {received_frames} received)"
        ),
        Err(why) => format!("PFC not told ({why})"),
    }
}

fn told_of_pause(pause: &Result<Pause, String>) -> String {
    let pause = match pause {
        Ok(pause) => pause,
        Err(why) => return format!("pause frames not told ({why})"),
    };
    let mode = match (pause.is_sent, pause.is_received) {
        (true, true) => "on",
        (true, false) => "sent only",
        (false, true) => "heeded only",
        (false, false) => "off",
    };
    let counted = |frames: Option<u64>, what| frames.map(|count| format!("{count} {what}"));
    let counts = [counted(pause.sent_frames, "sent"), counted(pause.received_frames, "received")];
    let counts: Vec<String> = counts.into_iter().flatten().collect();
    let counts = if counts.is_empty() { String::new() } else { format!(" ({})", counts.join(", ")) };
    format!("pause frames {mode}{counts}")
}

fn told_of_ecn(priorities: Option<&Vec<u32>>) -> String {
    match priorities {
        Some(priorities) if priorities.is_empty() => "ECN off".to_owned(),
        Some(priorities) => format!("ECN on for priorities {priorities:?}"),
        None => "ECN not told (its driver does not show it in /sys)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::verdict::Status;
    use super::super::Interface;
    use super::super::tests::{read, soft_roce};
    use super::*;

    fn hardware() -> Rdma {
        let mut rdma = read(&soft_roce());
        rdma.ports[0].is_hardware = true;
        rdma.ports[0].rate = "100 Gb/sec (4X EDR)".into();
        rdma
    }

    #[test]
    fn soft_roce_is_not_judged_by_its_rate() {
        let verdict = read(&soft_roce()).judge_rate();
        assert!(verdict.status == Status::Ok && verdict.evidence.contains("2.5 Gb/sec"), "{verdict:?}");
    }

    #[test]
    fn a_port_that_was_trained_low_warns() {
        let mut rdma = hardware();
        assert_eq!(rdma.judge_rate().status, Status::Ok);
        rdma.ports[0].rate = "2.5 Gb/sec (1X SDR)".into();
        assert_eq!(rdma.judge_rate().status, Status::Warn);
        rdma.ports[0].rate = "25 Gb/sec (1X EDR)".into();
        assert_eq!(rdma.judge_rate().status, Status::Ok);
        rdma.ports[0].is_ethernet = false;
        assert_eq!(rdma.judge_rate().status, Status::Warn);
    }

    #[test]
    fn a_device_on_fewer_lanes_than_it_has_warns() {
        let mut rdma = hardware();
        assert_eq!(rdma.judge_pcie().status, Status::Skip);
        let speed = "16.0 GT/s PCIe".to_owned();
        rdma.ports[0].pcie = Some(Pcie { speed: speed.clone(), max_speed: speed, width: 8, max_width: 16 });
        let verdict = rdma.judge_pcie();
        assert!(verdict.status == Status::Warn && verdict.evidence.contains("x8, of"), "{verdict:?}");
        rdma.ports[0].pcie.as_mut().unwrap().width = 16;
        assert_eq!(rdma.judge_pcie().status, Status::Ok);
    }

    #[test]
    fn errors_warn_where_they_are_more_than_one_in_a_million_packets() {
        let mut rdma = hardware();
        assert_eq!(rdma.judge_errors().status, Status::Ok);
        rdma.ports[0].counters = vec![("symbol_error".into(), 3), ("link_downed".into(), 1)];
        let verdict = rdma.judge_errors();
        assert_eq!(verdict.status, Status::Warn);
        let told =
            "rxe0/1: 3 errors in 1000 packets since the driver was loaded, symbol_error 3, link_downed 1";
        assert_eq!(verdict.evidence, told);
        rdma.ports[0].packets = Some(3_000_000);
        assert_eq!(rdma.judge_errors().status, Status::Ok);
        rdma.ports[0].packets = None;
        assert_eq!(rdma.judge_errors().status, Status::Warn);
    }

    fn flow(rdma: &mut Rdma) -> &mut Interface {
        rdma.ports[0].interface.as_mut().unwrap()
    }

    #[test]
    fn a_roce_adapter_without_ecn_warns_and_one_that_tells_nothing_is_skipped() {
        assert_eq!(read(&soft_roce()).judge_flow_control().status, Status::Skip);
        let mut rdma = hardware();
        let verdict = rdma.judge_flow_control();
        assert_eq!(verdict.status, Status::Skip);
        assert!(verdict.evidence.contains("PFC not told (it was not asked for)"), "{verdict:?}");
        rdma.ports[0].counters = vec![("np_cnp_sent".into(), 7), ("roce_adp_retrans".into(), 2)];
        flow(&mut rdma).ecn_priorities = Some(vec![]);
        let verdict = rdma.judge_flow_control();
        assert!(verdict.status == Status::Warn && verdict.evidence.contains("np_cnp_sent 7"), "{verdict:?}");
        assert!(verdict.evidence.contains("roce_adp_retrans 2"), "{verdict:?}");
        assert!(verdict.remedy.contains("/sys/class/net/v0/ecn"), "{verdict:?}");
        flow(&mut rdma).ecn_priorities = Some(vec![3]);
        assert_eq!(rdma.judge_flow_control().status, Status::Ok);
    }

    #[test]
    fn without_ecn_to_see_an_adapter_needs_pfc_or_pause_frames() {
        let mut rdma = hardware();
        flow(&mut rdma).flow.pfc = Ok(Pfc::default());
        let verdict = rdma.judge_flow_control();
        assert!(verdict.status == Status::Warn && verdict.evidence.contains("PFC off"), "{verdict:?}");
        assert!(verdict.remedy.contains("dcb pfc set dev v0"), "{verdict:?}");
        flow(&mut rdma).flow.pause = Ok(Pause { is_sent: true, ..Pause::default() });
        let verdict = rdma.judge_flow_control();
        assert!(verdict.status == Status::Warn && verdict.evidence.contains("sent only"), "{verdict:?}");
        let both = Pause { is_sent: true, is_received: true, sent_frames: Some(4), received_frames: Some(0) };
        flow(&mut rdma).flow.pause = Ok(both);
        let verdict = rdma.judge_flow_control();
        assert!(
            verdict.status == Status::Ok && verdict.evidence.contains("on (4 sent, 0 received)"),
            "{verdict:?}"
        );
        flow(&mut rdma).flow = Flow {
            pfc: Ok(Pfc { priorities: vec![3], sent_frames: 12, received_frames: 40 }),
            ..Flow::default()
        };
        let verdict = rdma.judge_flow_control();
        assert_eq!(verdict.status, Status::Ok);
        let told = "PFC on for priorities [3] (12 frames sent, 40 received)";
        assert!(verdict.evidence.contains(told), "{verdict:?}");
    }
}
