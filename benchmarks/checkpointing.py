"""Time and memory of a training step by activation checkpointing, on random weights.

    python -m benchmarks.checkpointing [--json FILE]

The step is that of benchmarks/training_step.py: of a small model on a CPU, of a 3B's shape on CUDA.
Memory is what a step needs beyond parameters, gradients and optimizer state, at most; time is the
median of steps that take turns.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import (
    CLEAR_REFS,
    cuda_growth,
    free_memory,
    in_fresh_process,
    pick_device,
    provenance,
    resident_growth,
    seconds_in_turns,
)
from benchmarks.training_step import WORKLOADS, ModelShape, Step, Workload, recap_step
from recap_fast.model.checkpointing import LayerModes, checkpoint_layers

CPU = Workload(
    "8 layers of 512", ModelShape(512, 8, 8, 2, 1408, 8192), prompts=4, group=4, prompt_tokens=64,
    completion_tokens=112, max_tokens=2048, gradient_checkpointing=False,
)  # fmt: skip
_M_MMAP_THRESHOLD = -3  # malloc.h


def workload_of(device: torch.device) -> Workload:
    return CPU if device.type == "cpu" else WORKLOADS["gpu"]


def choices(layers: int) -> list[LayerModes]:
    """Those of all layers alike, and one between each two."""
    every = LayerModes.by_cost(layers)
    return [every[place * layers // 2] for place in range(5)]


def make_step(workload: Workload, device: torch.device, modes: LayerModes) -> Step:
    step, _, model = recap_step(workload, device)
    checkpoint_layers(model, modes)
    return step


def peak(workload: Workload, device: torch.device, modes: LayerModes) -> int:
    """Bytes of the second step beyond what the first one left."""
    if device.type == "cpu":  # so that what is freed is the system's again, and not counted
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    step = make_step(workload, device, modes)
    step()
    return cuda_growth(step, device) if device.type == "cuda" else resident_growth(step)


def measure(rounds: int) -> list[dict[str, Any]]:
    """A record for each of `choices`."""
    device = pick_device()
    workload = workload_of(device)
    found = {modes.describe(): modes for modes in choices(workload.model.layers)}
    peaks: dict[str, int | None] = {}
    for name, modes in found.items():
        if device.type == "cuda":
            peaks[name] = peak(workload, device, modes)
            free_memory(device)
        else:
            there = CLEAR_REFS.exists()
            peaks[name] = in_fresh_process(peak, workload, device, modes) if there else None
    step, _, model = recap_step(workload, device)

    def in_mode(modes: LayerModes) -> Step:
        def run() -> None:
            checkpoint_layers(model, modes)
            step()

        return run

    steps = {name: in_mode(modes) for name, modes in found.items()}
    seconds = seconds_in_turns(steps, device, rounds)
    return [
        {
            "modes": name,
            "workload": workload.name,
            "peak_mib": None if peaks[name] is None else peaks[name] / 2**20,  # type: ignore[operator]
            "seconds": statistics.median(times),
            "all_seconds": times,
        }
        for name, times in seconds.items()
    ]


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, relative to the first."""
    lines = ["| mode | peak, MiB | seconds | of none |", "|---|---:|---:|---:|"]
    first = records[0]["seconds"]
    for record in records:
        peak_mib = record["peak_mib"]
        shown = "unknown" if peak_mib is None else f"{peak_mib:.0f}"
        seconds = record["seconds"]
        lines.append(f"| {record['modes']} | {shown} | {seconds:.2f} | {seconds / first:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    records = measure(options.rounds)
    print(table(records))
    if options.json:
        made_by = provenance(pick_device(), "python -m benchmarks.checkpointing")
        record = {"provenance": made_by, "results": records}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
