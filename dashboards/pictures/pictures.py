#!/usr/bin/env python3
"""Draws each dashboard in headless Chromium.

  pictures.py ANSWERS DRAW_JS DIRECTORY    ANSWERS as the voyage `dashboards::` keeps them, DRAW_JS as esbuild makes it
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# As draw.jsx has them.
COLUMN_PX, ROW_PX, MARGIN_PX = 60, 30, 8
STEP_MS = 500
PATIENCE_SECONDS = 120

PAGE = """<!doctype html>
<meta charset="utf-8">
<style>html {{ background: #111217; font-size: 14px; line-height: 1.57; -webkit-font-smoothing: antialiased }}
body {{ margin: {margin}px }} * {{ box-sizing: border-box }} section {{ overflow: hidden }} h2 {{ margin: 0; font-size: 14px }}</style>
<link rel="stylesheet" href="{style}">
<div id="root"></div>
<script>window.SHEET = {sheet}; window.RANGE = {range};</script>
<script src="{script}"></script>
"""


def main() -> None:
    answers, script, directory = (Path(argument).resolve() for argument in sys.argv[1:])
    kept = json.loads(answers.read_text())
    span = {"start": kept["start"] * 1000, "end": kept["end"] * 1000, "step": STEP_MS}
    for name, sheet in kept["sheets"].items():
        draw(sheet, span, script, directory / f"{name}.png")


def draw(sheet: dict, span: dict, script: Path, picture: Path) -> None:
    sheet = {**sheet, "panels": shown(sheet["panels"])}
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in sheet["panels"])
    size = f"{24 * COLUMN_PX + MARGIN_PX},{rows * ROW_PX + 2 * MARGIN_PX}"
    # A text of the dashboard must not end the script that holds it.
    embedded = json.dumps(sheet).replace("</", "<\\/")
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "page.html"
        page.write_text(PAGE.format(margin=MARGIN_PX, sheet=embedded, range=json.dumps(span), script=script.as_uri(),
                                    style=script.with_suffix(".css").as_uri()))
        subprocess.run(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
             "--allow-file-access-from-files", f"--user-data-dir={scratch}/profile", f"--window-size={size}",
             "--virtual-time-budget=10000", f"--screenshot={picture}", page.as_uri()],
            check=True, capture_output=True, timeout=PATIENCE_SECONDS,
        )
    print(f"pictures: {picture}")


def shown(panels: list[dict]) -> list[dict]:
    """Without the rows in which no panel has data: RDMA and eBPF where there are none. What is below moves up."""
    groups: list[list[dict]] = []
    for panel in panels:
        if panel["type"] == "row":
            groups.append([])
        groups[-1].append(panel)
    kept, moved = [], 0
    for group in groups:
        top = group[0]["gridPos"]["y"]
        bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in group)
        if not any(target["series"] for panel in group for target in panel.get("targets") or []):
            moved += bottom - top
            continue
        for panel in group:
            kept.append({**panel, "gridPos": {**panel["gridPos"], "y": panel["gridPos"]["y"] - moved}})
    return kept


if __name__ == "__main__":
    main()
