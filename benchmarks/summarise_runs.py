"""Says how much finished runs learned: mean rewards of the first and last quarter of their steps.

    for s in 0 1 2; do recap-fast train examples/smollm2-cpu.yaml \\
        --set seed=$s --set run=runs/seed$s; done
    python benchmarks/summarise_runs.py runs/seed0 runs/seed1 runs/seed2 [--json PATH]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recap_fast.config import load_config
from recap_fast.report.metrics import read_metrics


def summarise(run: Path) -> dict[str, Any]:
    rows = read_metrics(run)
    steps = [row for row in rows if row["step"]]
    quarter = max(1, len(steps) // 4)
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)]
    held_out = [key for key in evaluations[0] if key.startswith("eval/")]
    return {
        "run": run.name,
        "seed": load_config(run / "config.yaml").seed,
        "steps": len(steps),
        "training_seconds": sum(row["time/total"] for row in steps),
        "rewards": {
            key.removeprefix("reward/"): [
                sum(row[key] for row in part) / quarter
                for part in (steps[:quarter], steps[-quarter:])
            ]
            for key in steps[0]
            if key.startswith("reward/")
        },
        "weights": {
            key.removeprefix("weight/"): [min(r[key] for r in steps), max(r[key] for r in steps)]
            for key in steps[0]
            if key.startswith("weight/")
        },
        "held_out": {
            key.removeprefix("eval/"): [evaluations[0][key], evaluations[-1][key]]
            for key in held_out
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [summarise(run) for run in options.runs]
    names = ["seed", "steps", "seconds", *(f"{name}, quarters" for name in found[0]["rewards"])]
    shown = [key for key in found[0]["held_out"] if not key.endswith("tokens")]
    table = Table(*names, *shown)
    for run in found:
        pairs = [*run["rewards"].values(), *(run["held_out"][key] for key in shown)]
        table.add_row(
            str(run["seed"]),
            str(run["steps"]),
            f"{run['training_seconds']:.0f}",
            *(f"{before:.2f} -> {after:.2f}" for before, after in pairs),
        )
    Console(width=160).print(table)
    if options.json:
        machines = [json.loads((run / "machine.json").read_text()) for run in options.runs]
        record = {"machine": machines[0], "runs": found}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
