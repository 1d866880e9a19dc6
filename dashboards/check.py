#!/usr/bin/env python3
"""Holds docs/metrics.md (made from the agent's MetricName), dashboards, rules, runbooks and the rules' cases to one another."""

import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
RULES = ROOT / "dashboards/prometheus"
RUNBOOKS = ROOT / "docs/runbooks"
SEVERITIES = {"critical", "warning", "info"}
# What Prometheus adds to every series, and what it makes itself.
TARGET_LABELS = {"job", "instance"}
OWN = {"up": TARGET_LABELS, "ALERTS": TARGET_LABELS | {"alertname", "alertstate", "severity"}}
# Metrics that the eBPF probes make, with the labels that panels and rules use. Once docs/metrics.md lists one, it is held
# to what stands there.
PROBES = {
    "ramferry_ebpf_reg_mr_duration_seconds": ("histogram", set()),
    "ramferry_ebpf_dereg_mr_duration_seconds": ("histogram", set()),
    "ramferry_ebpf_pin_duration_seconds": ("histogram", set()),
    "ramferry_ebpf_pinned_bytes_total": ("counter", set()),
    "ramferry_ebpf_reg_mr_errors_total": ("counter", {"errno"}),
    "ramferry_ebpf_probe_attached": ("gauge", {"probe"}),
    "ramferry_ebpf_events_dropped_total": ("counter", set()),
}
# Words of PromQL that stand where a metric's name could.
WORDS = {"and", "or", "unless", "on", "ignoring", "by", "without", "group_left", "group_right", "offset", "bool"}
ROW = re.compile(r"^\| `(ramferry_\w+)` \| (\w+) \| [^|]+ \| ([^|]+) \|")
STRING = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'")


def main() -> int:
    faults = list(check())
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def check():
    metrics = documented()
    rules = load_rules()
    recorded = {rule["record"] for rule in rules if "record" in rule}
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    for rule in rules:
        name = rule.get("record") or rule["alert"]
        yield from faults_of(rule["expr"], f"rule {name}", metrics, recorded)
    for path in sorted((ROOT / "dashboards/grafana").glob("*.json")):
        yield from faults_of_dashboard(path, metrics, recorded)
    yield from faults_of_alerts(alerts)


def documented() -> dict[str, tuple[str, set[str]]]:
    metrics = {name: (kind, set(labels)) for name, (kind, labels) in PROBES.items()}
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        if row := ROW.match(line):
            name, kind, labels = row.groups()
            metrics[name] = (kind, set(re.findall(r"`(\w+)`", labels)))
    assert len(metrics) > len(PROBES), "docs/metrics.md lists no metric"
    return metrics


def load_rules() -> list[dict]:
    files = [yaml.safe_load((RULES / name).read_text()) for name in ("recording.yml", "alerts.yml")]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def faults_of_dashboard(path: Path, metrics, recorded):
    sheet = json.loads(path.read_text())
    where = path.name
    names = {variable["name"] for variable in sheet["templating"]["list"]}
    if missing := {"datasource", "job", "instance", "runbooks"} - names:
        yield f"{where}: no variable {missing}"
    for variable in sheet["templating"]["list"]:
        if listed := re.match(r"label_values\((.+), (\w+)\)$", str(variable.get("query", ""))):
            yield from faults_of(listed[1], f"{where}: variable {variable['name']}", metrics, recorded)
    for annotation in sheet["annotations"]["list"]:
        yield from faults_of(annotation["expr"], f"{where}: annotation {annotation['name']}", metrics, recorded)
    panels = [panel for panel in sheet["panels"] if panel["type"] != "row"]
    for panel in panels:
        place = f"{where}: panel {panel['title']!r}"
        if not panel.get("description"):
            yield f"{place} has no description"
        books = [link["url"].removeprefix("${runbooks}/") for link in panel.get("links", [])]
        if not books or not all((RUNBOOKS / book).is_file() for book in books):
            yield f"{place} has no runbook: {books}"
        for target in panel["targets"]:
            expr = target["expr"]
            yield from faults_of(expr, place, metrics, recorded)
            if re.search(r"\b(rate|increase)\(", expr) and not re.search(r"\[\$__(rate_interval|range)\]", expr):
                yield f"{place}: a rate over a fixed time: {expr}"
            if "ramferry_" in expr and 'instance=~"$instance"' not in expr:
                yield f"{place} is not held to the agents chosen: {expr}"


def faults_of_alerts(alerts: dict[str, dict]):
    cases = yaml.safe_load((RULES / "tests/alerts.yml").read_text())["tests"]
    tried = [case for test in cases for case in test.get("alert_rule_test", [])]
    fire = {case["alertname"] for case in tried if case.get("exp_alerts")}
    quiet = {case["alertname"] for case in tried if not case.get("exp_alerts")}
    for name, alert in alerts.items():
        if alert["labels"].get("severity") not in SEVERITIES:
            yield f"alert {name} has no severity of {SEVERITIES}"
        if alert["annotations"].get("runbook_url") != f"docs/runbooks/{name}.md":
            yield f"alert {name} does not name its runbook docs/runbooks/{name}.md"
        yield from faults_of_runbook(name)
        if name not in fire:
            yield f"alert {name} has no case in which it fires"
        if name not in quiet:
            yield f"alert {name} has no case in which it does not fire"
    for name in sorted((fire | quiet) - set(alerts)):
        yield f"tests/alerts.yml: there is no alert {name}"
    index = (RUNBOOKS / "README.md").read_text()
    for book in sorted(path.stem for path in RUNBOOKS.glob("Ramferry*.md")):
        if book not in alerts:
            yield f"docs/runbooks/{book}.md is of no alert"
        if f"({book}.md)" not in index:
            yield f"docs/runbooks/README.md does not list {book}"


def faults_of_runbook(name: str):
    path = RUNBOOKS / f"{name}.md"
    text = path.read_text() if path.is_file() else ""
    for heading in ("## Meaning", "## Likely causes", "## Tell them apart", "## Remedy"):
        if heading not in text:
            yield f"docs/runbooks/{name}.md has no {heading!r}"


def faults_of(expr: str, where: str, metrics, recorded):
    """Names that nothing makes, and labels that what is named does not have."""
    known = dict(OWN)
    for name, (kind, labels) in metrics.items():
        suffixes = ["_bucket", "_sum", "_count"] if kind == "histogram" else [""]
        for suffix in suffixes:
            known[name + suffix] = labels | TARGET_LABELS | ({"le"} if suffix == "_bucket" else set())
    bare = STRING.sub('""', expr)
    named = re.findall(r"(?<![\w:$.])(?:up|ALERTS|ramferry[\w:]+)(?!\w)(?=\s*[^\w(]|$)", re.sub(r"\{[^}]*\}", "{}", bare))
    if not named:
        yield f"{where}: no metric in {expr}"
    allowed = set()
    for name in named:
        if name in recorded:
            allowed |= TARGET_LABELS | {"cause", "fabric"}
        elif name in known:
            allowed |= known[name]
        else:
            yield f"{where}: nothing makes {name}"
    # Labels in a selector are of the one metric before it; those of groupings of any in the expression.
    for name, matchers in re.findall(r"([\w:]+)\{([^}]*)\}", bare):
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        if name in known and (strange := labels - known[name]):
            yield f"{where}: {name} has no label {strange}"
    for labels in re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", bare):
        if strange := set(re.findall(r"\w+", labels)) - allowed - WORDS:
            yield f"{where}: nothing in it has label {strange}"


if __name__ == "__main__":
    sys.exit(main())
