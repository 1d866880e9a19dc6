"""Registration and data plane: what does registering cost, where does throughput go, what do devices say?"""

from panels import CHOSEN, Sheet, at_once, bars, buckets, lines, number, quantile, query, rows, where_any


def sheet() -> Sheet:
    sheet = Sheet(
        "ramferry-data-plane",
        "ramferry: registration and data plane",
        "What does registering memory cost, where does throughput go, and what do the RDMA devices say?",
    )
    registration(sheet)
    kernel(sheet)
    data_plane(sheet)
    devices(sheet)
    return sheet


def rate(metric: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{CHOSEN}{more}}}[$__rate_interval]))"


def registration(sheet: Sheet) -> None:
    sheet.row("Registration")
    sheet.add(
        buckets("s", rate("ramferry_registration_duration_seconds_bucket", "le")),
        "How long registering a region takes",
        "Registrations a second by how long each took. A second band far above the first is memory that has to be "
        "allocated, or compacted for huge pages, first.",
        "RamferrySlowRegistration",
    )
    sheet.add(
        lines(
            "s",
            query(
                quantile(0.99, "ramferry_registration_duration_seconds", "side, mode, fabric"),
                "{{side}}, {{mode}}, {{fabric}}",
            ),
            query(quantile(0.99, "ramferry_deregistration_duration_seconds", "side"), "deregistering, {{side}}"),
        ),
        "Registering a region, p99",
        "99 of 100 took no longer: registrations, and the deregistrations that a pin budget has done while the copy is under way.",
        "RamferrySlowRegistration",
    )
    sheet.add(
        lines("Bps", query(rate("ramferry_registered_bytes_total", "side, fabric"), "{{side}}, {{fabric}}")),
        "Memory registered, a second",
        "Compare with the RAM moved: registering has to be faster than the copy, or the copy waits for it.",
        "RamferrySlowRegistration",
        width=8,
    )
    share = (
        rate("ramferry_stall_seconds_total", "instance", ',cause="registration"')
        + f" / (sum by (instance) (rate(ramferry_poller_busy_seconds_total{{{CHOSEN}}}[$__rate_interval]) + "
        + f"rate(ramferry_poller_idle_seconds_total{{{CHOSEN}}}[$__rate_interval])) > 0)"
    )
    sheet.add(
        lines("percentunit", query(share, "{{instance}}"), most=1),
        "Share of a copy spent waiting for registration",
        "Of the time of the copying threads. It should be near 0: windows are registered ahead of the copy.",
        "RamferrySlowRegistration",
        width=8,
    )
    sheet.add(
        bars(
            "none",
            query(
                where_any(
                    f"increase(ramferry_registration_errors_total{{{CHOSEN}}}[$__rate_interval])", "side, errno", "errno"
                ),
                "{{side}} {{errno}}",
            ),
        ),
        "Registrations that failed",
        "By the kernel's error. ENOMEM is most often the limit of locked memory.",
        "RamferryRegistrationErrors",
        width=8,
    )
    sheet.add(
        lines(
            "bytes",
            query(f"sum by (instance, fabric) (ramferry_pinned_bytes{{{CHOSEN}}}) > 0", "{{instance}}, {{fabric}}"),
            query(f"ramferry_memlock_limit_bytes{{{CHOSEN}}}", "limit of {{instance}}"),
        ),
        "Registered against the limit of locked memory",
        "Only what is registered over verbs is locked and counts against RLIMIT_MEMLOCK. No line for the limit: there is none.",
        "RamferryMemlockHeadroom",
    )
    sheet.add(
        lines("none", query(f"sum by (instance, side) (ramferry_regions{{{CHOSEN}}}) > 0", "{{instance}}, {{side}}")),
        "Regions",
        "Windows that are registered now.",
        "RamferryRegistrationErrors",
    )


def kernel(sheet: Sheet) -> None:
    sheet.row("Registration as the kernel sees it, of any process (eBPF)")
    sheet.add(
        lines(
            "s",
            query(rate("ramferry_ebpf_reg_mr_duration_seconds_sum", "instance"), "in ibv_reg_mr, {{instance}}"),
            query(rate("ramferry_ebpf_pin_duration_seconds_sum", "instance"), "of it pinning, {{instance}}"),
        ),
        "User time against kernel pin time",
        "Seconds a second that threads spend registering, and how much of that the kernel spends pinning pages. What is "
        "between the two lines is the driver and the device.",
        "RamferrySlowRegistration",
        width=8,
    )
    sheet.add(
        buckets("s", rate("ramferry_ebpf_reg_mr_duration_seconds_bucket", "le")),
        "ibv_reg_mr",
        "How long calls of ibv_reg_mr took, of any process on the host: QEMU's, MPI's or a database's too.",
        "RamferrySlowRegistration",
        width=8,
    )
    failures = rate("ramferry_ebpf_reg_mr_errors_total", "errno")
    sheet.add(
        lines("none", query(failures, "{{errno}}")),
        "ibv_reg_mr that failed, a second",
        "Of any process on the host, by error.",
        "RamferryRegistrationErrors",
        width=8,
    )
    attached = f"min by (probe) (ramferry_ebpf_probe_attached{{{CHOSEN}}})"
    sheet.add(
        number("none", at_once(attached, "{{probe}}"), steps=[(None, "red"), (1, "green")]),
        "Probes attached",
        "1 where a probe is attached at every agent chosen. The others are attached all the same.",
        "RamferryProbeDetached",
    )
    lost = rate("ramferry_ebpf_events_dropped_total", "instance")
    sheet.add(
        lines("none", query(lost, "{{instance}}")),
        "Events that probes dropped, a second",
        "Where this is above 0, live views lack calls; histograms do not.",
        "RamferryProbeDetached",
    )


def data_plane(sheet: Sheet) -> None:
    sheet.row("Data plane")
    sheet.add(
        lines("Bps", query(rate("ramferry_transfer_bytes_total", "instance, fabric"), "{{instance}}, {{fabric}}")),
        "RAM moved",
        "Bytes that sources wrote to their destinations.",
        "RamferryMigrationStalled",
        width=8,
    )
    busy = (
        f"sum by (instance) (rate(ramferry_poller_busy_seconds_total{{{CHOSEN}}}[$__rate_interval])) / "
        f"(sum by (instance) (rate(ramferry_poller_busy_seconds_total{{{CHOSEN}}}[$__rate_interval]) + "
        f"rate(ramferry_poller_idle_seconds_total{{{CHOSEN}}}[$__rate_interval])) > 0)"
    )
    sheet.add(
        lines("percentunit", query(busy, "{{instance}}"), most=1),
        "Busy share of the copying threads",
        "Near 1 the CPU is the limit: more streams, or CPUs of their own. Far below 1 something is waited for.",
        "RamferryMigrationStalled",
        width=8,
    )
    sheet.add(
        lines("none", query(rate("ramferry_stall_seconds_total", "cause"), "{{cause}}"), stacked=True),
        "Copying threads that wait",
        "How many at a time, and for what.",
        "RamferrySlowRegistration",
        width=8,
    )
    sheet.add(
        lines("ops", query(rate("ramferry_work_requests_total", "fabric, opcode"), "{{fabric}}, {{opcode}}")),
        "Operations posted",
        "A write moves up to 1 MiB; a fence proves what was written before it.",
        "RamferryMigrationStalled",
        width=8,
    )
    failed = where_any(
        f'increase(ramferry_completions_total{{{CHOSEN},status!="success"}}[$__rate_interval])',
        "fabric, opcode, status",
        "status",
    )
    sheet.add(
        bars("none", query(failed, "{{fabric}} {{opcode}} {{status}}")),
        "Operations that failed",
        "By how they ended; those that a dying link did not carry out count under what killed it. retry_exceeded: the peer "
        "or the path to it is gone.",
        "RamferryRetryExceeded",
        width=8,
    )
    sheet.add(
        lines("none", query(f"sum by (instance) (ramferry_send_queue_depth{{{CHOSEN}}})", "{{instance}}")),
        "Operations on their way",
        "Posted and not completed.",
        "RamferryMigrationStalled",
        width=8,
    )
    sheet.add(
        buckets("s", rate("ramferry_post_to_completion_seconds_bucket", "le", ',opcode="write"')),
        "From a write's posting to its completion",
        "Writes a second by how long each took: its own time and that of those queued before it.",
        "RamferryRetryExceeded",
    )
    sheet.add(
        lines(
            "s",
            query(
                quantile(0.99, "ramferry_post_to_completion_seconds", "fabric, opcode"),
                "{{fabric}}, {{opcode}}",
            ),
        ),
        "From posting to completion, p99",
        "99 of 100 took no longer. Fences wait for all writes before them, and for the peer's answer. Above 17 s this shows 17 s.",
        "RamferryRetryExceeded",
    )


def devices(sheet: Sheet) -> None:
    sheet.row("RDMA devices")
    ports = f"ramferry_rdma_device_info{{{CHOSEN}}}"
    sheet.add(
        rows(at_once(ports)),
        "Ports",
        "The ports of each host's RDMA devices.",
        "RamferryRdmaPortDown",
        width=8,
    )
    port = "instance, device, port"
    sheet.add(
        lines(
            "Bps",
            query(rate("ramferry_rdma_port_transmitted_bytes_total", port), "sent, {{instance}} {{device}}/{{port}}"),
            query(rate("ramferry_rdma_port_received_bytes_total", port), "received, {{instance}} {{device}}/{{port}}"),
            query(f"ramferry_rdma_port_rate_bytes_per_second{{{CHOSEN}}}", "rate, {{instance}} {{device}}/{{port}}"),
        ),
        "Traffic against the port's rate",
        "All that goes through a port, of anybody. Soft-RoCE does not count it.",
        "RamferryRdmaPortDown",
        width=8,
    )
    active = f"min by ({port}) (ramferry_rdma_port_active{{{CHOSEN}}})"
    sheet.add(
        number(
            "none", at_once(active, "{{instance}} {{device}}/{{port}}"), steps=[(None, "red"), (1, "green")]
        ),
        "Ports that are up",
        "1 where a port carries traffic.",
        "RamferryRdmaPortDown",
        width=8,
    )
    events = rate("ramferry_rdma_port_events_total", port + ", counter") + " > 0"
    sheet.add(
        lines("none", query(events, "{{instance}} {{device}}/{{port}}: {{counter}}")),
        "Loss, congestion and errors at ports, a second",
        "The kernel's counters by their names. out_of_sequence and packet_seq_err are loss; np_cnp_sent and rp_cnp_handled "
        "are congestion that was answered (ECN); local_ack_timeout_err comes before retry_exceeded.",
        "RamferryRetryExceeded",
        width=24,
    )
