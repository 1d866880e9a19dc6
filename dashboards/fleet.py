"""The fleet: are the agents there, do migrations succeed, and what do their guests notice?"""

from panels import CHOSEN, FIRING, Sheet, at_once, bars, lines, number, quantile, query, rows, where_any

SOURCE = CHOSEN + ',role="source"'
ENDED = "ramferry_migration_duration_seconds_count{" + SOURCE + "}"


def sheet() -> Sheet:
    sheet = Sheet(
        "ramferry-fleet",
        "ramferry: fleet",
        "Are the agents there, do migrations succeed, and what do guests notice of them?",
    )
    now(sheet)
    postcopy(sheet)
    outcomes(sheet)
    downtime(sheet)
    service(sheet)
    return sheet


def now(sheet: Sheet) -> None:
    sheet.row("Now")
    sheet.add(
        number("none", at_once(f"sum(up{{{CHOSEN}}})", "up"), steps=[(None, "red"), (1, "green")]),
        "Agents that answer",
        "Agents whose last scrape succeeded.",
        "RamferryTargetDown",
        width=4,
    )
    sheet.add(
        number("none", at_once(f"sum(1 - up{{{CHOSEN}}})", "down"), steps=[(None, "green"), (1, "red")]),
        "Agents that do not",
        "Agents whose last scrape failed: they are down, or Prometheus cannot reach them. Their guests run on.",
        "RamferryTargetDown",
        width=4,
    )
    active = f"sum by (role) (ramferry_migrations_active{{{CHOSEN}}})"
    sheet.add(
        number("none", at_once(active, "at its {{role}}"), steps=[(None, "blue")]),
        "Migrations under way",
        "Each counts once at its source and once at its destination, where both are agents chosen above.",
        "RamferryMigrationStalled",
        width=6,
    )
    sheet.add(
        number(
            "percentunit",
            at_once("max(ramferry:migrations:failure_ratio_1h)", "failed"),
            steps=[(None, "green"), (0.05, "yellow"), (0.2, "red")],
        ),
        "Failed in the last hour",
        "Of the migrations that ended, the share that failed. Those that were cancelled did not fail.",
        "RamferryMigrationFailures",
        width=4,
    )
    firing = f"count by (alertname, severity) ({FIRING})"
    sheet.add(
        number("none", at_once(firing, "{{alertname}}"), steps=[(None, "orange")]),
        "Alerts firing",
        "How many series each alert fires for.",
        "README",
        width=6,
    )


def postcopy(sheet: Sheet) -> None:
    sheet.row("Post-copy: guests that run, and are still owed memory by another host")
    guests = f'sum by (role) (ramferry_migrations_active{{{CHOSEN},state="postcopy"}})'
    sheet.add(
        number("none", at_once(f"max({guests})", "now"), steps=[(None, "blue")]),
        "Guests in post-copy",
        "Each needs both of its hosts, and its VMM at the source, until this is over. As seen by sources or destinations, whichever see more.",
        "RamferryPostcopyStalled",
        width=4,
    )
    lost = f'increase(ramferry_migrations_total{{{CHOSEN},role="destination",reason="MEMORY_LOST"}}[$__range])'
    sheet.add(
        number("none", at_once(f"round(sum({lost}))", "lost"), steps=[(None, "green"), (1, "red")]),
        "Memory lost",
        "Guests in the time shown that were stopped at their destinations, because what they were owed could not be had again. They have to be "
        "started anew.",
        "RamferryMemoryLost",
        width=4,
    )
    under_way = f"ramferry_migration_postcopy_seconds{{{CHOSEN}}}"
    owed = f'ramferry_migration_remaining_bytes{{{CHOSEN},role="destination"}} and {under_way}'
    sheet.add(
        lines("bytes", query(f"sum by (instance) ({owed})", "at {{instance}}"), stacked=True),
        "Memory still owed to guests",
        "By the host that they run at. It falls within seconds; a flat line is a guest that waits.",
        "RamferryPostcopyStalled",
        width=8,
    )
    sheet.add(
        lines("s", query(f"max by (instance, role) ({under_way})", "{{instance}}, {{role}}")),
        "Longest in post-copy",
        "Of the guests in post-copy now, the one that has run longest on memory that has not all arrived.",
        "RamferryPostcopyStalled",
        width=8,
    )


def outcomes(sheet: Sheet) -> None:
    sheet.row("Migrations")
    ended = where_any(f"increase({ENDED}[$__rate_interval])", "result", "result")
    sheet.add(
        bars("none", query(ended, "{{result}}")),
        "How migrations ended",
        "Migrations that ended, counted at their sources.",
        "RamferryMigrationFailures",
    )
    reasons = f'sum by (reason) (increase(ramferry_migrations_total{{{SOURCE},result="failed"}}[$__range])) > 0'
    sheet.add(
        rows(at_once(reasons)),
        "Why they failed",
        "Failures in the time shown, by the reason that the caller was given.",
        "RamferryMigrationFailures",
    )
    sheet.add(
        lines(
            "s",
            query(quantile(0.5, "ramferry_migration_duration_seconds", "result", SOURCE), "median, {{result}}"),
            query(quantile(0.99, "ramferry_migration_duration_seconds", "result", SOURCE), "p99, {{result}}"),
        ),
        "How long migrations took",
        "From the call that created a migration to its end: half of them, and 99 of 100, took no longer.",
        "RamferryMigrationNotConverging",
    )
    phases = f"sum by (phase) (increase(ramferry_migration_phase_duration_seconds_sum{{{SOURCE}}}[$__rate_interval]))"
    sheet.add(
        bars("s", query(phases, "{{phase}}")),
        "Where their time went",
        "Seconds that migrations spent in each state, counted when they left it. A long precopy is a guest that writes "
        "fast or a slow link; a long preparing is the destination or registration.",
        "RamferrySlowRegistration",
    )


def downtime(sheet: Sheet) -> None:
    sheet.row("What guests notice")
    sheet.add(
        lines(
            "s",
            query(quantile(0.5, "ramferry_migration_downtime_seconds", ""), "median"),
            query(quantile(0.99, "ramferry_migration_downtime_seconds", ""), "p99"),
        ),
        "Downtime",
        "How long guests stood still: half of them, and 99 of 100, no longer. Buckets double, so that a figure is exact "
        "to a factor of two.",
        "RamferryDowntimeOverBudget",
        width=8,
    )
    part = (
        f"sum by (part) (rate(ramferry_migration_downtime_part_seconds_sum{{{CHOSEN}}}[$__rate_interval])) "
        f"/ sum by (part) (rate(ramferry_migration_downtime_part_seconds_count{{{CHOSEN}}}[$__rate_interval]) > 0)"
    )
    sheet.add(
        lines("s", query(part, "{{part}}"), stacked=True),
        "What a downtime is made of",
        "The mean of each part. `pause` lies before the downtime; `verify` is there only where it was asked for.",
        "RamferryDowntimeOverBudget",
        width=8,
    )
    over = f"increase(ramferry_migrations_over_max_downtime_total{{{CHOSEN}}}[$__rate_interval])"
    sheet.add(
        bars("none", query(where_any(over, "instance", "instance"), "{{instance}}")),
        "Longer than was asked for",
        "Migrations whose guest stood still for longer than their max_downtime, without what verify took.",
        "RamferryDowntimeOverBudget",
        width=8,
    )


def service(sheet: Sheet) -> None:
    sheet.row("Agents")
    moved = f"sum by (fabric) (rate(ramferry_transfer_bytes_total{{{CHOSEN}}}[$__rate_interval]))"
    sheet.add(
        lines("Bps", query(moved, "{{fabric}}"), stacked=True),
        "RAM moved",
        "Bytes that sources wrote to their destinations.",
        "RamferryMigrationStalled",
    )
    calls = f"sum by (code) (rate(ramferry_grpc_requests_total{{{CHOSEN}}}[$__rate_interval]))"
    sheet.add(
        lines("reqps", query(calls, "{{code}}")),
        "Calls to the agents",
        "gRPC calls that ended, of orchestrators and of other agents.",
        "RamferryMigrationFailures",
    )
    slow = quantile(0.99, "ramferry_grpc_request_duration_seconds", "method")
    sheet.add(
        lines("s", query(slow, "{{method}}")),
        "How long calls took",
        "99 of 100 calls of a method took no longer. Streams (WatchMigration, ExchangeControl) last as long as what they "
        "follow.",
        "RamferryMigrationFailures",
    )
    sheet.add(
        rows(at_once(f"count by (version) (ramferry_build_info{{{CHOSEN}}})")),
        "Versions",
        "How many agents run each version.",
        "RamferryTargetDown",
        width=6,
    )
    left = f"min by (instance, certificate) (ramferry_certificate_expiry_timestamp_seconds{{{CHOSEN}}}) - time()"
    sheet.add(
        number(
            "s",
            at_once(left, "{{instance}}, {{certificate}}"),
            steps=[(None, "red"), (3 * 86400, "yellow"), (14 * 86400, "green")],
        ),
        "Certificates are valid for",
        "How long the certificates that an agent read at its start still hold; none where it serves loopback alone. A renewed file counts after a restart.",
        "RamferryCertificateExpiring",
        width=6,
    )
    found = f"sort_desc(max by (instance, check) (ramferry_doctor_check_status{{{CHOSEN}}}) > 0)"
    sheet.add(
        rows(at_once(found)),
        "What doctor finds",
        "Checks of each host that fail (2) or warn (1), worst first; they are made every three minutes. What was read and what to do: "
        "ramferry doctor --agent INSTANCE's gRPC address.",
        "RamferryHostUnfit",
        width=24,
    )
