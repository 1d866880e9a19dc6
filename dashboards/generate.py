#!/usr/bin/env python3
"""Makes the dashboards' JSON under dashboards/grafana.

  generate.py          writes it
  generate.py --check  fails where it is not what is written there
"""

import json
import sys
from pathlib import Path

import data_plane
import fleet
import migration
from grafana_foundation_sdk.cog.encoder import JSONEncoder

HERE = Path(__file__).parent


def texts() -> dict[Path, str]:
    sheets = {"fleet": fleet.sheet(), "migration": migration.sheet(), "data-plane": data_plane.sheet()}
    return {
        HERE / "grafana" / f"{name}.json": JSONEncoder(sort_keys=True, indent=2).encode(sheet.builder.build()) + "\n"
        for name, sheet in sheets.items()
    }


def main() -> int:
    made = texts()
    for path, text in made.items():
        json.loads(text)
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path.relative_to(HERE.parent)} is not what the code makes: target/venv/bin/python dashboards/generate.py")
            return 1
    strangers = set((HERE / "grafana").glob("*.json")) - set(made)
    for path in sorted(strangers):
        print(f"{path.relative_to(HERE.parent)} is made by nothing")
    return 1 if strangers else 0


if __name__ == "__main__":
    sys.exit(main())
