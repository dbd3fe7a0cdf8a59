"""The kernel suites with whatever peers are installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.on_gpu.part import Context
from recap_fast.bench.suites import RESULTS, run_suites

SUITES = ("policy_loss", "logprobs", "reweighter", "advantages")
DEADLINE = 480.0
"""Seconds after which no measurement starts: results so far are better than none."""


def run(context: Context) -> dict[str, Any]:
    """`measure` of the suites of the kernels."""
    suites = ("policy_loss", "reweighter") if context.rehearse else SUITES
    # A rehearsal leaves out what takes seconds to compile or import.
    return measure(context, "kernels", suites, "not compile and not TRL")


def measure(context: Context, part: str, suites: Sequence[str], rehearsed: str) -> dict[str, Any]:
    """The median of each measurement in milliseconds, and how many were left out.

    Args:
        part: folder of its results, in `context.work`.
        rehearsed: what a rehearsal runs of the suites, as pytest's -k.

    Raises:
        RuntimeError: an implementation of ours failed or gave a wrong result.
    """
    status = run_suites(
        suites,
        shapes=context.shapes,
        keyword=rehearsed if context.rehearse else None,
        rounds=2 if context.rehearse else 5,
        deadline=DEADLINE,
        output=context.work / part,
    )
    record = json.loads((context.work / part / RESULTS).read_text())
    found: dict[str, dict[str, float]] = {}
    for benchmark in record["benchmarks"]:
        extra = benchmark["extra_info"]
        group = found.setdefault(f"{extra['suite']} {extra['size']}", {})
        group[extra["implementation"]] = benchmark["stats"]["median"] * 1e3
    failed = [entry for entry in record["not_measured"] if entry["failed"]]
    if status != 0:
        raise RuntimeError(f"benchmarks failed: {failed}; measured: {found}")
    return {"milliseconds": found, "not_measured": len(record["not_measured"])}
