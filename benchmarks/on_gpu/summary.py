"""Collects the parts' records into summary.json and summary.md.

    python -m benchmarks.on_gpu.summary --work FOLDER --results FOLDER

Only the standard library, so that it works where everything else failed. Reads WORK/status.tsv
(part, exit status) and each part's JSON and log. Exit status: 1 if a part failed, else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

SKIPPED = 77
SHOWN = 6
"""Lines of a failed part's log in the summary."""


def collect(work: Path) -> list[dict[str, Any]]:
    """One record a part, in the order in which they ran."""
    records = []
    for line in (work / "status.tsv").read_text().splitlines():
        part, status = line.split("\t")
        file = work / f"{part}.json"
        record = {"part": part, "status": "ok"}
        if int(status) in (0, SKIPPED) and file.exists():
            record = json.loads(file.read_text())
        else:
            record = {"part": part, "status": "failed", "reason": _reason(work, part, int(status))}
        records.append(record)
    return records


def _reason(work: Path, part: str, status: int) -> str:
    log = work / f"{part}.log"
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    tail = "\n".join(lines[-SHOWN:])
    if status in (124, 137):
        return f"ran past its time limit; last lines:\n{tail}"
    return f"exit status {status}:\n{tail}"


def describe(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = ["| part | outcome | seconds |", "| --- | --- | --- |"]
    for record in records:
        first = record.get("reason", "").strip().splitlines()
        outcome = record["status"] + (f": {first[-1]}" if first else "")
        lines.append(f"| {record['part']} | {outcome} | {record.get('seconds', '')} |")
    for record in records:
        lines += ["", f"## {record['part']}", ""]
        if "reason" in record:
            lines += ["```", record["reason"], "```"]
        if "results" in record:
            lines += ["```json", json.dumps(record["results"], indent=1), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes both files and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args()
    records = collect(options.work)
    text = describe(records)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "summary.json").write_text(json.dumps(records, indent=1) + "\n")
    (options.results / "summary.md").write_text(text)
    print(text.split("\n\n", 1)[0])
    return int(any(record["status"] == "failed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
