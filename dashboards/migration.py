"""One migration while it is under way: how far is it, will it converge, what holds it up?"""

from panels import CHOSEN, Sheet, at_once, bars, buckets, lines, number, query, steps_of, where_any

ONE = CHOSEN + ',migration=~"$migration"'
SOURCE = ONE + ',role="source"'
# Gauges of the migration name the agents that have it; what only agents count is held to those.
AGENTS = "(group by (job, instance) (ramferry_migration_memory_bytes{" + ONE + "}))"
HERE = "and on (job, instance) " + AGENTS
HERE_LATELY = (
    "and on (job, instance) (group by (job, instance) (last_over_time(ramferry_migration_memory_bytes{"
    + ONE
    + "}[$__rate_interval])))"
)
SHARES = [(0.5, "p50"), (0.99, "p99")]


def sheet() -> Sheet:
    sheet = Sheet(
        "ramferry-migration",
        "ramferry: one migration",
        "How far is a migration, will it converge, and what holds it up? Figures of a migration are there while it is under "
        "way; choose a time when it was.",
        of_one_migration=True,
    )
    progress(sheet)
    convergence(sheet)
    postcopy(sheet)
    holdups(sheet)
    return sheet


def gauge(name: str) -> str:
    return f"max by (migration) (ramferry_migration_{name}{{{SOURCE}}})"


def progress(sheet: Sheet) -> None:
    sheet.row("Progress")
    states = f"sum by (state) (ramferry_migrations_active{{{CHOSEN},role=\"source\"}} {HERE}) > 0"
    sheet.add(
        steps_of(lines("none", query(states, "{{state}}"), stacked=True)),
        "State",
        "In which state the source's agent has its migrations: of all that it has under way.",
        "RamferryMigrationStalled",
        width=12,
    )
    steps = [(None, "blue")]
    sheet.add(
        number("bytes", at_once(f"last_over_time({gauge('memory_bytes')}[$__range:])", "{{migration}}"), steps=steps),
        "RAM of the guest",
        "All of it, touched or not. Cost follows what was touched.",
        "RamferryMigrationStalled",
        width=4,
    )
    sheet.add(
        number("none", at_once(f"last_over_time({gauge('round')}[$__range:])", "{{migration}}"), steps=steps),
        "Round",
        "The round under way. The first copies everything, each further one what the guest wrote meanwhile.",
        "RamferryMigrationNotConverging",
        width=4,
    )
    left = f"last_over_time({gauge('max_downtime_seconds')}[$__range:])"
    sheet.add(
        number("s", at_once(left, "{{migration}}"), steps=steps),
        "Downtime aimed at",
        "max_downtime, as it was asked for or changed since.",
        "RamferryDowntimeOverBudget",
        width=4,
    )
    sheet.add(
        lines("bytes", query(gauge("remaining_bytes"), "{{migration}}")),
        "Remaining in the round",
        "A saw-tooth: each round begins with what the guest wrote in the one before. Teeth that do not shrink do not "
        "converge; a flat line is a stall. In post-copy it is what the guest is still owed.",
        "RamferryMigrationStalled",
    )
    sheet.add(
        steps_of(lines("none", query(gauge("round"), "{{migration}}"))),
        "Rounds",
        "Rounds become shorter as a migration converges.",
        "RamferryMigrationNotConverging",
    )


def convergence(sheet: Sheet) -> None:
    sheet.row("Will it converge?")
    sheet.add(
        lines(
            "Bps",
            query(gauge("throughput_bytes_per_second"), "copied, {{migration}}"),
            query(gauge("dirty_rate_bytes_per_second"), "written by the guest, {{migration}}"),
        ),
        "Copy against guest",
        "A migration converges while it copies faster than the guest writes pages that were clean. Throughput is known "
        "from the end of the first round.",
        "RamferryMigrationNotConverging",
    )
    sheet.add(
        lines(
            "s",
            query(gauge("expected_downtime_seconds"), "expected, {{migration}}"),
            query(gauge("max_downtime_seconds"), "aimed at, {{migration}}"),
        ),
        "Expected downtime",
        "If it switched over now. The switchover comes when this falls below what is aimed at. In post-copy there is none to "
        "come, and no line.",
        "RamferryMigrationNotConverging",
    )
    dirty = f"sum by (tracker) (rate(ramferry_tracking_dirty_pages_total{{{CHOSEN}}}[$__rate_interval]) {HERE})"
    sheet.add(
        lines("none", query(dirty, "{{tracker}}")),
        "Pages found written, a second",
        "What harvests found, at the agents that have the migration.",
        "RamferryMigrationNotConverging",
        width=8,
    )
    sheet.add(
        steps_of(lines("percentunit", query(gauge("throttle_ratio"), "{{migration}}"), most=1)),
        "Processor time taken from the guest",
        "Throttling, where it was asked for (--throttle): the share of their time that its vCPUs do not get, so that it writes "
        "less. All of it is given back at the pause.",
        "RamferryMigrationNotConverging",
        width=8,
    )
    harvest = (
        "histogram_quantile(0.99, sum by (le, tracker) (rate(ramferry_tracking_harvest_duration_seconds_bucket{"
        + CHOSEN
        + "}[$__rate_interval]) "
        + HERE
        + "))"
    )
    sheet.add(
        lines("s", query(harvest, "{{tracker}}")),
        "Harvest",
        "99 of 100 harvests took no longer. The last one is part of the downtime.",
        "RamferryDowntimeOverBudget",
        width=8,
    )


def postcopy(sheet: Sheet) -> None:
    sheet.row("Post-copy: the guest runs at the destination, and is still owed memory")
    under_way = f"ramferry_migration_postcopy_seconds{{{ONE}}}"
    owed = f"max by (migration, role) (ramferry_migration_remaining_bytes{{{ONE}}} and {under_way})"
    sheet.add(
        lines("bytes", query(owed, "{{migration}}, told by its {{role}}")),
        "Memory still owed",
        "Falls to 0 at the pace of the links: the destination reads what nobody waits for, too. Where it is flat, a link or an agent "
        "is lost, and the guest waits wherever it touches what has not come. The destination's figure is the true one.",
        "RamferryPostcopyStalled",
        width=8,
    )
    sheet.add(
        lines("s", query(f"max by (migration, role) ({under_way})", "{{migration}}, told by its {{role}}")),
        "Running on memory that has not all arrived",
        "For so long both hosts have been needed: leave them, both agents and the source's VMM alone.",
        "RamferryPostcopyStalled",
        width=8,
    )
    sheet.add(
        lines("Bps", query(here("fabric", "ramferry_postcopy_bytes_total"), "{{fabric}}"), stacked=True),
        "Memory brought",
        "Bytes that the destination read from the source: pages that the guest waited for, those around them, and the rest in order.",
        "RamferryPostcopyStalled",
        width=8,
    )
    faults = "ramferry_postcopy_fault_duration_seconds"
    sheet.add(
        lines("none", query(here("fabric", faults + "_count"), "{{fabric}}")),
        "Accesses that waited, a second",
        "Times that the guest touched memory which was still at the source, and had it brought.",
        "RamferryPostcopyStalled",
        width=6,
    )
    sheet.add(
        buckets("s", here("le", faults + "_bucket")),
        "How long each waited",
        "From the access to the page. A band near the link's own latency is what can be had; a second one far above it are accesses that "
        "waited for a lost link. What took longer than 17 s is in the topmost.",
        "RamferryPostcopyStalled",
        width=6,
    )
    sheet.add(
        lines("s", *(query(f"histogram_quantile({share}, {here('le', faults + '_bucket')})", name) for share, name in SHARES)),
        "Wait for a page, p50 and p99",
        "Half of the accesses, and 99 of 100, waited no longer; a vCPU stood still for that. Buckets double, so that a figure is exact to a factor of two. Above "
        "17 s this shows 17 s.",
        "RamferryPostcopyStalled",
        width=6,
    )
    failed = f'increase(ramferry_completions_total{{{CHOSEN},opcode="read",status!="success"}}[$__rate_interval])'
    reads = f"{failed} {HERE_LATELY}"
    sheet.add(
        bars("none", query(where_any(reads, "fabric, status", "status"), "{{fabric}} {{status}}")),
        "Reads that failed",
        "What a dying link did not carry out, by what killed the link. It is read again over another one: none is lost.",
        "RamferryRetryExceeded",
        width=6,
    )


def here(by: str, counter: str) -> str:
    """The rate of what only agents count, at those that have the migration, or had it in that time: post-copy can be over
    before the next scrape."""
    return f"sum by ({by}) (rate({counter}{{{CHOSEN}}}[$__rate_interval]) {HERE_LATELY})"


def holdups(sheet: Sheet) -> None:
    sheet.row("What holds it up?")
    stalls = f"sum by (cause) (rate(ramferry_stall_seconds_total{{{CHOSEN}}}[$__rate_interval]) {HERE})"
    sheet.add(
        lines("none", query(stalls, "waits for {{cause}}"), stacked=True),
        "Copying threads that wait",
        "How many threads wait at a time, and for what: registration is late, the link is full (the best there is), or the "
        "bandwidth limit holds.",
        "RamferrySlowRegistration",
    )
    pages = f"sum by (kind) (rate(ramferry_transfer_pages_total{{{CHOSEN}}}[$__rate_interval]) {HERE})"
    sheet.add(
        lines("none", query(pages, "{{kind}}"), stacked=True),
        "Pages, a second",
        "Pages moved as data, and pages that were zero and only named.",
        "RamferryMigrationStalled",
    )
    pinned = f"sum by (side, fabric) (ramferry_pinned_bytes{{{CHOSEN}}} {HERE}) > 0"
    sheet.add(
        lines("bytes", query(pinned, "{{side}}, {{fabric}}")),
        "Registered now",
        "Memory in registered regions at each side; over verbs it is locked.",
        "RamferryMemlockHeadroom",
    )
    depth = f"sum by (instance) (ramferry_send_queue_depth{{{CHOSEN}}} {HERE})"
    sheet.add(
        lines("none", query(depth, "{{instance}}")),
        "Operations on their way",
        "Posted to links and not completed. 0 while there is something to copy: see what the threads wait for.",
        "RamferryMigrationStalled",
    )
