"""Writes the static tables again: benchmarks/results/static/*.json and docs/static.md.

    .venv/bin/python tools/static_tables.py

Compiles with the installed Triton, and with the one of tools/triton36.sh, which it needs.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from recap_fast.bench.static_analysis import StaticTable, static_table, to_json, to_markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "static.md"
RESULTS = ROOT / "benchmarks" / "results" / "static"
TRITON_36 = ROOT / ".venv" / "triton-3.6"


def show(page: str, version: str, table: StaticTable) -> str:
    """Replaces the table of a version between its two marks."""
    start, end = f"<!-- triton {version} -->\n", "<!-- end -->"
    content = f"{start}Triton {table.triton}:\n\n{to_markdown(table)}{end}"
    changed, found = re.subn(f"{re.escape(start)}.*?{re.escape(end)}", content, page, flags=re.S)
    if found != 1:
        raise SystemExit(f"{PAGE}: wanted the mark {start.strip()} once, found it {found} times")
    return changed


def main() -> None:
    if not TRITON_36.exists():
        sys.exit(f"{TRITON_36} is missing: run tools/triton36.sh first")
    RESULTS.mkdir(parents=True, exist_ok=True)
    page = PAGE.read_text(encoding="utf-8")
    for folder in (None, TRITON_36):
        table = static_table(triton=folder)
        version = ".".join(table.triton.split(".")[:2])
        (RESULTS / f"triton-{version}.json").write_text(to_json(table), encoding="utf-8")
        page = show(page, version, table)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
