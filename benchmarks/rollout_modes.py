"""Steps of one run with its rollouts in the trainer's process, from a server, and one step off.

SmolLM2-135M-Instruct on a CPU, the configuration of `make train`. Every mode has its own process;
they take turns, and the first steps of each are left out. On a CPU both sides compute on the same
cores, so that sampling ahead hides what one side leaves idle and no more.

    python -m benchmarks.rollout_modes [--steps 8] [--rounds 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import provenance
from recap_fast.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "smollm2-cpu.yaml"
MODES = {
    "in process": ["rollout.engine=vllm"],
    "server": ["rollout.engine=vllm_server"],
    "server, one step off": ["rollout.engine=vllm_server", "rollout.async.depth=1"],
}
_LEFT_OUT = 2


def run(mode: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Metrics of a run's steps but the first."""
    settings = [
        f"run={folder / 'run'}", f"training.steps={steps + _LEFT_OUT}", "loss.rollout_is_cap=2.0",
        "evaluation.before=false", "evaluation.after=false", "evaluation.every=0",
        "checkpoint.every=0", "logging.tensorboard=false", *MODES[mode],
    ]  # fmt: skip
    command = [sys.executable, "-m", "recap_fast", "train", str(EXAMPLE), "--overwrite"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{mode}: {done.stdout}{done.stderr}")
    return [row for row in read_metrics(folder / "run") if (row["step"] or 0) > _LEFT_OUT]


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over steps."""
    keys = {
        "step s": "time/total", "waiting s": "time/rollout", "training s": "time/train",
        "sync s": "time/sync", "tokens/s": "tokens_per_second", "staleness": "staleness/mean",
    }  # fmt: skip
    found = {}
    for name, key in keys.items():
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            found[name] = round(median(values), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    rows: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(options.rounds):
        for mode in MODES:
            with (
                console.status(f"round {number + 1} of {options.rounds}: {mode}"),
                tempfile.TemporaryDirectory() as folder,
            ):
                rows[mode] += run(mode, options.steps, Path(folder))
    results = {mode: summarise(found) for mode, found in rows.items()}
    table = Table("mode", *results["server"])
    for mode, found in results.items():
        table.add_row(mode, *(str(found.get(name, "")) for name in results["server"]))
    console.print(table)
    if options.json is not None:
        about = provenance(torch.device("cpu"), "python -m benchmarks.rollout_modes")
        record = {**about, "steps": options.steps * options.rounds, "modes": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
